"""The networks' outputs equal those of the published systems; `test_checkpoint` compares their parameters."""

import copy

import pytest
import torch
from conftest import golden, golden_encoder, golden_index, golden_names, golden_unet

from guided_diffusion.ddpm import Model
from guided_diffusion.script_util import create_model


def assert_same_output(actual, expected):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-4 * expected.std()


@pytest.mark.parametrize("name", golden_names("unet_"))
def test_unet_forward(name):
    data = golden(name)
    y = {"y": data["input.y"]} if "input.y" in data else {}
    with torch.no_grad():
        assert_same_output(golden_unet(name)(data["input.x"], data["input.t"], **y), data["output"])


@pytest.mark.parametrize("name", golden_names("ddpm"))
def test_ddpm_forward(name):
    data = golden(name)
    config = golden_index()[name]["config"]
    names = {"ch": "ch", "mult": "ch_mult", "nrb": "num_res_blocks", "att": "attn_resolutions", "size": "image_size"}
    model = Model(**{name: config[short] for short, name in names.items()})
    model.load_state_dict({k[13:]: value for k, value in data.items() if k.startswith("model.module.")})
    with torch.no_grad():
        assert_same_output(model(data["input.x"], data["input.t"]), data["output"])


@pytest.mark.parametrize("name", golden_names("dse"))
def test_encoder_features_and_logits(name):
    data, model = golden(name), golden_encoder()
    with torch.no_grad():
        assert_same_output(model.middle_features(data["input.x"], data["input.t"]), data["output.features"])
        assert_same_output(model(data["input.x"], data["input.t"]), data["output.logits"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype):
    name = "unet_updown_scaleshift_learnsigma"
    data, model = golden(name), copy.deepcopy(golden_unet(name)).set_dtype(dtype)
    with torch.no_grad():
        output = model(data["input.x"], data["input.t"])
    assert output.dtype == torch.float32
    assert (output - data["output"]).abs().mean() < 0.02 * data["output"].std()


SMALL = {"image_size": 16, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "attention_resolutions": "8"}


@pytest.mark.parametrize("classes", [False, True])
def test_class_labels_are_required_and_refused(classes):
    y = {} if classes else {"y": torch.zeros(1, dtype=torch.long)}
    with pytest.raises(ValueError, match="class labels"):
        create_model(**SMALL, class_cond=classes)(torch.zeros(1, 3, 16, 16), torch.zeros(1), **y)


def test_activation_checkpointing_keeps_gradients():
    torch.manual_seed(0)
    plain = create_model(**SMALL)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    saving = create_model(**SMALL, use_checkpoint=True)
    saving.load_state_dict(plain.state_dict())
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([5])
    for model in (plain, saving):
        model(x, t).square().sum().backward()
    for a, b in zip(plain.parameters(), saving.parameters()):
        torch.testing.assert_close(a.grad, b.grad)
