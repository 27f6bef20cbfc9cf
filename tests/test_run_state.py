"""A run keeps its state to itself, and neither the caller's modes nor values that are not finite pass in silence."""

import dataclasses
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import LinearModel
from tiny import SIZE, make_model, make_references

from guided_diffusion import Translator, ddpm, energy
from guided_diffusion.baselines import ilvr, sdedit
from guided_diffusion.errors import InputError
from guided_diffusion.options import check_names, option
from guided_diffusion.script_util import create_classifier, create_diffusion, create_model
from guided_diffusion.sddm import energy_factor, sample
from guided_diffusion.solvers import NotFiniteError
from guided_diffusion.target import Counted

STEPS = 6


def references(seed=0):
    return torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def sampled(ref, **options):
    """The result of a linear model, with two energies; draws are always the same."""
    generator = torch.Generator().manual_seed(1)
    noise = lambda shape: torch.randn(shape, generator=generator)  # noqa: E731
    options = {"blocks": 4, "range_t": 2, "energies": [energy.dct(4), energy.low_pass(4)], **options}
    return sample(LinearModel(), create_diffusion(timestep_respacing=str(STEPS)), ref, noise=noise, **options)


@pytest.fixture(scope="module")
def translator(tmp_path_factory):
    path = make_model(tmp_path_factory.mktemp("model") / "model.safetensors")
    options = {"steps": STEPS, "range_t": 2, "area": 4, "device": "cpu"}
    return Translator(path, energy="dct,low_pass", down_n=4, **options)


def test_translations_side_by_side_do_not_mix(translator, tmp_path):
    """In threads, as generators that take turns, and as a copy by pickle."""
    names = [f"{n}.png" for n in range(4)]
    paths = [make_references(tmp_path, names) / name for name in names]
    alone = [np.asarray(translator(path)) for path in paths]
    with ThreadPoolExecutor(4) as pool:
        together = [np.asarray(image) for image in pool.map(translator, paths)]
    in_turn = [translator.steps(path, previews=False) for path in paths]
    last = [states[-1]["x"] for states in zip(*(list(zip(*in_turn))), strict=True)]
    pickled = pickle.loads(pickle.dumps(translator))
    assert np.array_equal(np.asarray(pickled(paths[0])), alone[0])
    for n, wanted in enumerate(alone):
        assert np.array_equal(together[n], wanted)
        assert np.array_equal(np.asarray(translator.images(last[n])[0]), wanted)


class Broken(LinearModel):
    """Gives NaN for the second image of a batch, or for the only one."""

    def forward(self, x, t):
        out = super().forward(x, t).clone()
        out[-1] = torch.nan
        return out


@pytest.mark.parametrize("method, options", [(sample, {"range_t": 2, "blocks": 4}),
                                             (ilvr, {"range_t": 2, "down_n": 4}), (sdedit, {"start": 3})])  # fmt: skip
def test_values_that_are_not_finite_are_an_error(method, options):
    with pytest.raises(NotFiniteError) as caught:
        method(Broken(), create_diffusion(timestep_respacing=str(STEPS)), references(), **options)
    assert caught.value.finite.tolist() == [True, False] and caught.value.x.shape == (2, 3, SIZE, SIZE)


def test_a_translator_raises_where_the_model_gives_nan(translator, tmp_path, monkeypatch):
    path = make_references(tmp_path, ["a.png"]) / "a.png"
    monkeypatch.setattr(Counted, "__call__", lambda self, x, t: x * torch.nan)
    with pytest.raises(InputError, match="NaN or infinite"):
        translator(path)
    with pytest.raises(InputError, match="NaN or infinite"):
        list(translator.steps(path))


MODES = {
    "inference mode": lambda: torch.inference_mode(),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "gradients": lambda: torch.enable_grad(),
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_the_caller_s_mode_changes_nothing(mode):
    wanted = sampled(references())
    with mode():
        found = sampled(references())
    assert torch.equal(found, wanted) and not found.is_inference()


def test_networks_are_float32_under_another_default_dtype():
    adm = {"image_size": 16, "channel_mult": "1,2"}
    torch.set_default_dtype(torch.float64)
    try:
        networks = [
            create_model(**adm, num_channels=32, num_res_blocks=1, attention_resolutions="8"),
            create_classifier(**adm, classifier_width=32, classifier_depth=1, classifier_attention_resolutions="8"),
            ddpm.Model(ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(8,), image_size=16),
        ]
        for network in networks:
            out = network(torch.zeros(1, 3, 16, 16, dtype=torch.float32), torch.tensor([3]))
            assert out.dtype == torch.float32 and out.isfinite().all()
    finally:
        torch.set_default_dtype(torch.float32)


def test_references_that_overshoot_are_clipped_and_others_named():
    ref = references()
    assert torch.equal(sampled(ref.sign() * 1.08), sampled(ref.sign()))
    for wrong in (ref * 1.5, (ref + 1) * 127.5):
        with pytest.raises(InputError, match=r"\[-1, 1\]"):
            sampled(wrong)
    # Latents have no range, and predictions of latents are not clipped.
    sampled(ref * 3, clip_denoised=False)


def test_the_length_of_an_energy_s_direction_does_not_depend_on_the_steps():
    """At one noise level; with the published 100 steps it is the release's length."""
    published = create_diffusion(timestep_respacing="100")
    for i in (30, 60, 90):
        factor = energy_factor(published, 25, False, i)
        assert factor == pytest.approx(energy_factor(published, 25, True, i))
        for steps in (25, 50, 1000):
            other = create_diffusion(timestep_respacing=str(steps) if steps < 1000 else "")
            j = int(abs(other.alphas_cumprod - published.alphas_cumprod[i]).argmin())
            assert energy_factor(other, 25, False, j) == pytest.approx(factor, rel=0.07)


def test_one_name_with_two_defaults_is_an_error():
    first = dataclasses.make_dataclass("A", [("area", int, option(16, "a"))])
    second = dataclasses.make_dataclass("B", [("blocks", int, option(8, "b", flag="area"))])
    with pytest.raises(TypeError, match="area has the default 16 in A and 8 in B"):
        check_names([first, second])
    check_names([first, first])
