"""A kind of checkpoint that is added from outside of the package: one function, and every command takes its files."""

import pytest
import torch
from tiny import make_model, make_references

from guided_diffusion.checkpoint import CHECKPOINTS, ModelInfo, Network, load_model
from guided_diffusion.errors import InputError
from guided_diffusion.script_util import model_and_diffusion_defaults
from guided_diffusion.translator import Translator


class Toy(torch.nn.Module):
    """A network of one convolution: the prediction of noise is a fixed filter of x."""

    def __init__(self, width):
        super().__init__()
        self.filter = torch.nn.Conv2d(3, 3, width, padding=width // 2)

    def forward(self, x, t):
        return self.filter(x)

    def set_dtype(self, dtype):
        self.to(dtype)


@pytest.fixture
def toy():
    @CHECKPOINTS.add("toy")
    def recognise(source, flags):
        """Files with the tensor `filter.weight`; metadata may tell the size."""
        if "filter.weight" not in source.tensors:
            return None
        known = {"image_size": int(source.metadata.get("size", 16)), "noise_schedule": "cosine", **flags}
        info = ModelInfo(source.path, "TOY", {**model_and_diffusion_defaults(), **known})
        return Network(Toy(source.tensors["filter.weight"].shape[-1]), info, source.tensors)

    yield recognise
    del CHECKPOINTS["toy"]


def test_a_kind_from_outside_loads_is_checked_and_samples(toy, tmp_path):
    original, path = Toy(5), tmp_path / "toy.pt"
    torch.save({"state_dict": original.state_dict()}, path)
    model, info = load_model(path, image_size=16)
    assert isinstance(model, Toy) and not model.training and info.flags["noise_schedule"] == "cosine"
    assert torch.equal(model.filter.weight, original.filter.weight)
    translate = Translator(path, steps=4, energy="none", area=4, device="cpu")
    assert translate(make_references(tmp_path / "refs", ["a.png"]) / "a.png").size == (16, 16)
    # The package checks its tensors as those of its own kinds, which are as before.
    weight = {"filter.weight": original.filter.weight}
    for content, says in (
        ({**weight, "filter.bias": torch.full((3,), float("nan"))}, r"filter\.bias has values that are NaN"),
        (weight, r"lacks the tensor filter\.bias"), ({"x": torch.zeros(3)}, "no network that is known here .*toy"),
    ):  # fmt: skip
        torch.save(content, path)
        with pytest.raises(InputError, match=says):
            load_model(path)
    assert load_model(make_model(tmp_path / "m.safetensors"))[1].model_type == "ADM"
