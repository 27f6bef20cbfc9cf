"""Flags: guided-diffusion's names and defaults, their parsing, and the errors of those that fit nothing."""

import argparse
import inspect

import pytest
import torch

from guided_diffusion import script_util
from guided_diffusion.errors import InputError
from guided_diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType
from guided_diffusion.script_util import create_classifier, create_gaussian_diffusion, create_model

TINY = {"image_size": 16, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "attention_resolutions": "8"}


def test_the_releases_command_line_and_guided_diffusions_defaults():
    text = """--attention_resolutions 16 --class_cond False --diffusion_steps 1000 --dropout 0.1 --image_size 256
        --learn_sigma True --noise_schedule cosine --num_channels 128 --num_head_channels 64 --num_res_blocks 1
        --resblock_updown True --use_fp16 False --use_scale_shift_norm True --timestep_respacing 100
        --channel_mult 1,2"""
    parser = argparse.ArgumentParser(exit_on_error=False)
    script_util.add_dict_to_argparser(parser, script_util.model_and_diffusion_defaults())
    assert vars(parser.parse_args(text.split())) == {
        "image_size": 256, "num_channels": 128, "num_res_blocks": 1, "num_heads": 4, "num_heads_upsample": -1,
        "num_head_channels": 64, "attention_resolutions": "16", "channel_mult": "1,2", "dropout": 0.1,
        "class_cond": False, "use_checkpoint": False, "use_scale_shift_norm": True, "resblock_updown": True,
        "use_fp16": False, "use_new_attention_order": False, "learn_sigma": True, "diffusion_steps": 1000,
        "noise_schedule": "cosine", "timestep_respacing": "100", "use_kl": False, "predict_xstart": False,
        "rescale_timesteps": False, "rescale_learned_sigmas": False,
    }  # fmt: skip
    usual = {
        "image_size": 64, "num_res_blocks": 2, "num_head_channels": -1, "attention_resolutions": "16,8",
        "channel_mult": "", "dropout": 0.0, "resblock_updown": False, "learn_sigma": False, "noise_schedule": "linear",
        "timestep_respacing": "",
    }  # fmt: skip
    assert vars(parser.parse_args([])) == {**vars(parser.parse_args(text.split())), **usual}


def test_texts_are_parsed():
    assert all(script_util.str2bool(text) is True for text in ("True", "yes", "t", "1", True))
    assert all(script_util.str2bool(text) is False for text in ("FALSE", "n", "0", False))
    with pytest.raises(argparse.ArgumentTypeError, match="neither True nor False"):
        script_util.str2bool("maybe")
    assert script_util.channel_multipliers("", 512) == (0.5, 1, 1, 2, 2, 4, 4)
    assert [type(m) for m in script_util.channel_multipliers("0.5,1, 1.0", 48)] == [float, int, int]
    assert script_util.attention_factors("32,16,8", 256) == (8, 16, 32)


def test_flags_reach_the_model():
    def count(**flags):
        return sum(p.numel() for p in create_model(**{**TINY, **flags}).parameters())

    def heads(**flags):
        return [m.num_heads for m in create_model(**TINY, **flags).modules() if hasattr(m, "num_heads")]

    plain = create_model(**TINY)
    assert (plain.out_channels, plain.num_classes) == (3, None)
    assert create_model(**TINY, class_cond=True).num_classes == 1000
    assert create_model(**TINY, use_fp16=True).dtype == torch.float16
    dropouts = [m.p for m in create_model(**TINY, dropout=0.3).modules() if isinstance(m, torch.nn.Dropout)]
    assert dropouts and set(dropouts) == {0.3}
    # Scale and shift double the embedding's projections; resampling in residual blocks replaces strided convolutions.
    for flags in ({"use_scale_shift_norm": True}, {"resblock_updown": True}, {"attention_resolutions": "16,8"}):
        assert count(**flags) > count()
    assert heads(num_head_channels=16) == [4] * 4 and heads(num_heads=2, num_heads_upsample=4) == [2] * 2 + [4] * 2


@pytest.mark.parametrize("flags, attribute, expected", [
    ({"predict_xstart": True}, "model_mean_type", ModelMeanType.START_X),
    ({"sigma_small": True}, "model_var_type", ModelVarType.FIXED_SMALL),
    ({"sigma_small": False}, "model_var_type", ModelVarType.FIXED_LARGE),
    ({"learn_sigma": True, "sigma_small": False}, "model_var_type", ModelVarType.LEARNED_RANGE),
    ({}, "loss_type", LossType.MSE), ({"rescale_learned_sigmas": True}, "loss_type", LossType.RESCALED_MSE),
    ({"use_kl": True, "rescale_learned_sigmas": True}, "loss_type", LossType.RESCALED_KL),
    ({"rescale_timesteps": True}, "rescale_timesteps", True),
    ({"steps": 400, "timestep_respacing": "ddim20"}, "timestep_map", list(range(0, 400, 20))),
])  # fmt: skip
def test_flags_reach_the_diffusion(flags, attribute, expected):
    assert getattr(create_gaussian_diffusion(**flags), attribute) == expected
    # The same by the names of the command line.
    assert create_gaussian_diffusion().model_var_type is ModelVarType.FIXED_LARGE  # but create_diffusion's is the small
    named = {"diffusion_steps" if name == "steps" else name: value for name, value in flags.items()}
    assert getattr(script_util.create_diffusion(**named), attribute) == expected
    assert getattr(script_util.create_model_and_diffusion(**TINY, **named)[1], attribute) == expected


def test_classifier_and_extractor():
    flags = {"image_size": 16, "classifier_width": 32, "classifier_depth": 1, "channel_mult": "1,2"}
    flags["classifier_attention_resolutions"] = "8"
    model = create_classifier(**flags, num_class=2, head="I2Iout")
    assert any(name.startswith("I2Iout.") for name in model.state_dict())
    assert model(torch.randn(3, 3, 16, 16), torch.tensor([0, 10, 999])).shape == (3, 2)
    assert create_classifier(**flags)(torch.randn(1, 3, 16, 16), torch.tensor([5])).shape == (1, 1000)
    assert create_classifier(**flags, classifier_use_fp16=True).dtype == torch.float16
    with pytest.raises(ValueError, match="pool is 'max'"):
        create_classifier(**flags, classifier_pool="max")


@pytest.mark.parametrize("flags", [
    {"noise_schedule": "sigmoid"}, {"timestep_respacing": "1001"}, {"diffusion_steps": 0}, {"channel_mult": "a"},
    {"attention_resolutions": "x"}, {"image_size": 48, "channel_mult": ""}, {"num_head_channels": 48}, {"num_heads": 0},
])  # fmt: skip
def test_errors_are_one_line_that_names_parameter_and_value(flags):
    with pytest.raises(InputError) as caught:
        script_util.create_model_and_diffusion(**{**TINY, **flags})
    assert (caught.value.parameter, caught.value.value) == next(iter(flags.items()))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("create, defaults, count", [
    ("create_model_and_diffusion", "model_and_diffusion_defaults", 23),
    ("create_classifier_and_diffusion", "classifier_and_diffusion_defaults", 16),
    ("sr_create_model_and_diffusion", "sr_model_and_diffusion_defaults", 22),
])  # fmt: skip
def test_signatures_list_the_flags_and_their_defaults(create, defaults, count):
    create, defaults = getattr(script_util, create), getattr(script_util, defaults)()
    arguments = inspect.getfullargspec(create).args
    assert len(arguments) == count and set(arguments) == set(defaults)
    assert {name: inspect.signature(create).parameters[name].default for name in arguments} == defaults
    with pytest.raises(TypeError, match="unknown_flag"):
        create(unknown_flag=1)
