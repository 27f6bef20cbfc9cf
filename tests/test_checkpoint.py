"""Checkpoints of every kind are recognised and loaded; whatever else a file holds is refused in one line, not run."""

import argparse
import functools
import hashlib
import json
import logging
import os
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN_DIR
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from guided_diffusion.checkpoint import architecture, fingerprint, load_model, load_state_dict, read_file, recognise
from guided_diffusion.checkpoint.loading import build, convert, save_model
from guided_diffusion.ddpm import Model
from guided_diffusion.errors import InputError, reading
from guided_diffusion.gaussian_diffusion import get_named_beta_schedule
from guided_diffusion.script_util import attention_factors, channel_multipliers, create_classifier, create_model

CHECKPOINTS = json.loads((GOLDEN_DIR / "checkpoint_keys.json").read_text())
TINY = {
    "image_size": 16, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,1", "attention_resolutions": "8",
    "num_head_channels": 16, "use_scale_shift_norm": True, "resblock_updown": True,
}  # fmt: skip
UNTOLD = ("image_size", "num_heads", "num_head_channels", "use_new_attention_order")
GIVEN = {"image_size": 16, "num_head_channels": 16}
TINY_ENCODER = {
    "image_size": 16, "classifier_width": 32, "classifier_depth": 1, "classifier_attention_resolutions": "8",
    "channel_mult": "1,2", "num_class": 2, "num_head_channels": 32,
}  # fmt: skip


def property_test(examples):
    """Hypothesis settings: the same examples in every run, files in one folder."""
    return settings(max_examples=examples, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def randomise(model):
    """Give all parameters random values, also those that training starts from at zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval().requires_grad_(False)


@functools.cache
def tiny():
    return randomise(create_model(**TINY))


def tiny_state(prefix="", plus=0):
    return {prefix + key: value + plus for key, value in tiny().state_dict().items()}


def output_of(model, channels=3, **labels):
    x = torch.randn(2, channels, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(x, torch.tensor([3, 700]), **labels)


def zeros(shapes):
    """Tensors of zeros that take no room, neither in memory nor in a file."""
    zero = torch.zeros(1)
    return {key: zero.expand(shape) if shape else torch.tensor(0.0) for key, shape in shapes.items()}


def shapes_of(model):
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def saved(path, content, **options):
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".safetensors":
        save_file({key: value.contiguous() for key, value in content.items()}, path, **options)
    else:
        torch.save(content, path, **options)
    return path


def refused(path, names_file=True, **flags):
    """The InputError for a file, which must be one line and, by default, say which file it is about."""
    with pytest.raises(InputError) as caught:
        load_model(path, **flags)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 1500
    assert str(path) in message or not names_file or "\0" in str(path)
    return caught.value


def refusal(path, **flags):
    """The text of that error."""
    return str(refused(path, **flags))


def assert_tiny(path, **flags):
    """The file is the tiny model, weight for weight."""
    model, info = load_model(path, **{**GIVEN, **flags})
    torch.testing.assert_close(output_of(model), output_of(tiny()), rtol=0, atol=0)
    return model, info


@pytest.fixture
def tiny_file(tmp_path):
    return saved(tmp_path / "tiny.pt", tiny_state())


def expected_flags(entry):
    if entry["kind"] == "ADM":
        return {flag: value for flag, value in entry["flags"].items() if flag != "use_fp16"}
    config = entry["config"]
    if entry["kind"] == "DSE":
        return {**config, "num_head_channels": 64, "head": "I2Iout"}
    names = {"num_channels": "ch", "noise_schedule": "beta_schedule", "diffusion_steps": "num_diffusion_timesteps"}
    names |= {name: name for name in ("image_size", "num_res_blocks", "dropout")}
    sides = ",".join(map(str, config["attn_resolutions"]))
    return {flag: config[name] for flag, name in names.items()} | {"attention_resolutions": sides}


@pytest.mark.parametrize("name", sorted(CHECKPOINTS))
def test_published_checkpoints_tell_all_their_flags(name, tmp_path):
    entry = CHECKPOINTS[name]
    # The files of 280 to 560 million parameters are recognised only: as models they would take up to 2.2 GB each.
    network = recognise(read_file(saved(tmp_path / "model.pt", zeros(entry["keys"]))), {})
    info = network.info
    assert info.model_type == {"ADM": "ADM", "DDPM": "DDPM", "DSE": "ENCODER"}[entry["kind"]]
    assert info.assumed == ()
    for flag, value in expected_flags(entry).items():
        if flag == "channel_mult" or flag.endswith("attention_resolutions"):
            meaning = channel_multipliers if flag == "channel_mult" else attention_factors
            size = info.flags["image_size"]
            assert set(meaning(info.flags[flag], size)) == set(meaning(value, size)), flag
        else:
            assert info.flags[flag] == value, flag
    assert shapes_of(build(info)) == {key: tuple(value.shape) for key, value in network.state.items()}


MULTIPLIERS = {
    32: ["1", "2", "1,1", "1,2", "2,1", "1,1,1", "1,2,2", "2,2,1", "1,1,2,2"],
    64: ["1", "0.5", "1,1", "0.5,1", "1,1.5", "1,0.5,1", "1,1,1.5"],
}


@st.composite
def adm_flags(draw):
    base = draw(st.sampled_from([32, 64]))
    names = ("learn_sigma", "class_cond", "use_scale_shift_norm", "resblock_updown", "use_new_attention_order")
    heads = draw(st.sampled_from([{"num_head_channels": 16}, {"num_head_channels": 32}, {"num_heads": 2}]))
    # Sides of 1 and 128 belong to no level.
    sides = draw(st.lists(st.sampled_from(["16", "8", "4", "2", "1", "128"]), unique=True))
    return {
        "image_size": 16, "num_channels": base, "num_res_blocks": draw(st.integers(1, 3)),
        "channel_mult": draw(st.sampled_from(MULTIPLIERS[base])), "attention_resolutions": ",".join(sides),
        "num_classes": draw(st.integers(1, 12)), **heads, **{name: draw(st.booleans()) for name in names},
        "in_channels": draw(st.sampled_from([3, 1])),
    }  # fmt: skip


def reached_factors(flags, sides="attention_resolutions"):
    levels = flags["channel_mult"].count(",") + 1
    return tuple(sorted(set(attention_factors(flags[sides], flags["image_size"])) & {2**i for i in range(levels)}))


@property_test(14)
@given(flags=adm_flags(), suffix=st.sampled_from([".pt", ".safetensors"]))
def test_any_adm_unet_is_recognised_and_loaded(flags, suffix, tmp_path):
    original = randomise(create_model(**flags))
    told = ["num_channels", "num_res_blocks", "channel_mult", "learn_sigma", "class_cond", "use_scale_shift_norm"]
    told += ["in_channels"] + ["resblock_updown"] * ("," in flags["channel_mult"])
    told += ["num_classes"] * flags["class_cond"]
    expected = {**{flag: flags[flag] for flag in told}, "attention_factors": reached_factors(flags)}
    assert architecture.adm(original.state_dict()) == expected

    path = saved(tmp_path / f"model{suffix}", original.state_dict())
    model, info = load_model(path, **{flag: flags[flag] for flag in UNTOLD if flag in flags})
    labels = {"y": torch.tensor([0, flags["num_classes"] - 1])} if flags["class_cond"] else {}
    outputs = [output_of(each, flags["in_channels"], **labels) for each in (model, original)]
    torch.testing.assert_close(*outputs, rtol=0, atol=0)
    # All flags that it was made with fit, and so do those that were found.
    load_model(path, **{flag: value for flag, value in flags.items() if flag != "num_classes" or flags["class_cond"]})
    load_model(path, **info.flags)


@st.composite
def encoder_flags(draw):
    base = draw(st.sampled_from([32, 64]))
    sides = draw(st.lists(st.sampled_from(["16", "8", "4", "2"]), unique=True))
    return {
        "image_size": 16, "classifier_width": base, "classifier_depth": draw(st.integers(1, 3)),
        "channel_mult": draw(st.sampled_from(MULTIPLIERS[base])), "classifier_attention_resolutions": ",".join(sides),
        "classifier_use_scale_shift_norm": draw(st.booleans()), "classifier_resblock_updown": draw(st.booleans()),
        "classifier_pool": draw(st.sampled_from(["adaptive", "attention", "spatial", "spatial_v2"])),
        "num_class": draw(st.integers(1, 12)), "num_head_channels": draw(st.sampled_from([16, 32])),
        "head": draw(st.sampled_from(["out", "I2Iout"])),
    }  # fmt: skip


@property_test(18)
@given(flags=encoder_flags(), suffix=st.sampled_from([".pt", ".safetensors"]))
def test_any_encoder_is_recognised_and_loaded(flags, suffix, tmp_path):
    original = randomise(create_classifier(**flags))
    told = set(flags) - {"classifier_attention_resolutions", "num_head_channels", "image_size"}
    told -= set() if "," in flags["channel_mult"] else {"classifier_resblock_updown"}
    told |= {"image_size"} if flags["classifier_pool"] == "attention" else set()
    expected = {flag: flags[flag] for flag in told}
    expected["attention_factors"] = reached_factors(flags, "classifier_attention_resolutions")
    assert architecture.encoder(original.state_dict(), flags["classifier_depth"]) == expected

    path = saved(tmp_path / f"model{suffix}", original.state_dict())
    known = ("image_size", "num_head_channels", "classifier_depth")
    model, info = load_model(path, **{flag: flags[flag] for flag in known})
    torch.testing.assert_close(output_of(model), output_of(original), rtol=0, atol=0)
    load_model(path, **flags)
    load_model(path, **info.flags)


@property_test(10)
@given(
    base=st.sampled_from([32, 64]), mult=st.sampled_from([(1,), (1, 2), (2, 1), (1, 1, 2)]), depth=st.integers(1, 3),
    sides=st.lists(st.sampled_from([16, 8, 4, 2]), unique=True), channels=st.sampled_from([3, 1]),
    learned=st.booleans(),
)  # fmt: skip
def test_any_ddpm_unet_is_recognised_and_loaded(base, mult, depth, sides, channels, learned, tmp_path):
    shape = {"ch_mult": mult, "num_res_blocks": depth, "attn_resolutions": sides, "image_size": 16}
    original = randomise(Model(ch=base, in_channels=channels, out_ch=channels * (1 + learned), **shape))
    path = saved(tmp_path / "model.pt", {f"module.{k}": v for k, v in original.state_dict().items()})
    model, info = load_model(path, image_size=16)
    reached = [str(16 >> level) for level in range(len(mult)) if 16 >> level in sides]
    expected = {
        "num_channels": base, "num_res_blocks": depth, "channel_mult": ",".join(map(str, mult)),
        "attention_resolutions": ",".join(reached), "learn_sigma": learned, "class_cond": False,
    }  # fmt: skip
    assert info.model_type == "DDPM"
    assert {flag: info.flags[flag] for flag in expected} == expected
    assert info.flags.get("in_channels", 3) == channels
    torch.testing.assert_close(output_of(model, channels), output_of(original, channels), rtol=0, atol=0)


def test_flags_that_agree_are_accepted(tiny_file):
    for flags in (
        {"channel_mult": "1.0,1"}, {"channel_mult": ""},  # empty: nothing was said
        {"attention_resolutions": "4, 8,128"},  # levels that the network does not have
        {"dropout": 0.3, "use_checkpoint": True, "timestep_respacing": "ddim10", "use_kl": True},
        {"num_channels": None, "noise_schedule": None}, {"num_classes": 10},  # counts only with class_cond
    ):  # fmt: skip
        assert_tiny(tiny_file, **flags)


@pytest.mark.parametrize("kind, flag, value, fits", [
    ("ADM", "num_channels", 64, "num_channels=32"), ("ADM", "channel_mult", "1,2", "channel_mult=1,1"),
    ("ADM", "attention_resolutions", "16,8", "attention_resolutions=8"), ("ADM", "class_cond", True, "=False"),
    ("ADM", "image_size", 15, "a multiple of 2"), ("ADM", "num_head_channels", 24, "it must divide the 32"),
    ("ADM", "num_head_channels", 0, "it must divide the 32"), ("ADM", "num_channels", "many", "a whole number"),
    ("ADM", "learn_sigma", "perhaps", "True or False"), ("ADM", "channel_mult", "1,nan", "list of numbers"),
    ("ADM", "attention_resolutions", "0", "list of sides"), ("ENCODER", "num_class", 3, "num_class=2"),
    ("ENCODER", "classifier_width", 64, "classifier_width=32"), ("ENCODER", "image_size", 32, "image_size=16"),
    ("ENCODER", "classifier_attention_resolutions", "16,8", "classifier_attention_resolutions=8"),
])  # fmt: skip
def test_each_flag_that_does_not_fit_is_named_with_what_does(kind, flag, value, fits, tmp_path):
    network = create_model(**TINY) if kind == "ADM" else create_classifier(**TINY_ENCODER)
    error = refused(saved(tmp_path / "m.pt", network.state_dict()), **{**GIVEN, flag: value}, names_file=False)
    assert (error.parameter, error.value) == (flag, value) and fits in error.reason


SCHEDULE = {"noise_schedule": "cosine", "diffusion_steps": 500, "predict_xstart": False, "rescale_timesteps": False}


@pytest.mark.parametrize("flags", [{"num_heads": 4}, {"num_head_channels": 8}, {}], ids=str)
def test_what_nothing_tells_is_assumed_and_logged_in_one_line(flags, tiny_file, caplog):
    _, info = load_model(tiny_file, image_size=16, **flags)
    assert set(SCHEDULE) < set(info.assumed) and ("num_heads" in info.assumed) == (not flags)
    # An image size that nothing tells is asked for.
    assert refused(tiny_file, num_head_channels=16).parameter == "image_size"
    (message,) = caplog.messages
    assert "noise_schedule=linear" in message and "diffusion_steps=1000" in message and str(tiny_file) in message
    assert ("num_heads=4" in message) == (not flags) and "num_head_channels" not in message

    caplog.clear()
    _, info = load_model(tiny_file, image_size=16, num_heads=2, use_new_attention_order=False, **SCHEDULE)
    assert (info.assumed, caplog.messages) == ((), [])


def test_an_extractor_without_metadata_is_converted_with_what_it_does_not_tell(tmp_path, caplog):
    encoder = randomise(create_classifier(**{**TINY_ENCODER, "num_head_channels": 16}, head="I2Iout"))
    path = saved(tmp_path / "dse.pt", encoder.state_dict())
    load_model(path)
    assert "Convert it to .safetensors" in caplog.text
    flags = {"num_head_channels": 16, "noise_schedule": "cosine", "diffusion_steps": 500}
    convert(path, tmp_path / "dse.safetensors", **flags)
    caplog.clear()
    loaded, info = load_model(tmp_path / "dse.safetensors")
    assert {flag: info.flags[flag] for flag in flags} == flags and not info.assumed and not caplog.messages
    torch.testing.assert_close(output_of(loaded), output_of(encoder), rtol=0, atol=0)


def metadata_file(path, flags, **entries):
    text = flags if isinstance(flags, str) else json.dumps(flags)
    return saved(path / "m.safetensors", tiny_state(), metadata={"flags": text, **entries})


STATED = {
    "image_size": 16, "num_heads": 4, "num_head_channels": 16, "use_new_attention_order": False,
    "noise_schedule": "cosine",
}  # fmt: skip


def test_metadata_tells_what_tensors_cannot(tmp_path, caplog):
    path = metadata_file(tmp_path, {**TINY, **STATED}, model_type="ADM", licence="MIT")
    model, info = load_model(path)
    torch.testing.assert_close(output_of(model), output_of(tiny()), rtol=0, atol=0)
    assert {flag: info.flags[flag] for flag in STATED} == STATED
    assert info.metadata["licence"] == "MIT" and not info.assumed and not caplog.messages
    load_model(path, **{**TINY, **STATED})
    # Other programs write numbers as texts or floats, and lists for texts; `attention_factors` is no flag.
    others = {"image_size": 16.0, "num_heads": "4", "channel_mult": [1, 1], "attention_resolutions": 8}
    others |= {"use_scale_shift_norm": "True", "attention_factors": [2]}
    _, info = load_model(metadata_file(tmp_path, {**STATED, **others}))
    assert (info.flags["image_size"], info.flags["num_heads"]) == (16, 4)
    # Entries without a value are not stated.
    assert_tiny(metadata_file(tmp_path, {"image_size": None, "num_classes": None, "mystery": [1]}))
    for flag, value in {"image_size": 32, "noise_schedule": "linear", "use_new_attention_order": True}.items():
        error = refused(metadata_file(tmp_path, STATED), **{flag: value})
        assert (error.parameter, error.value) == (flag, value) and f"{flag}={STATED[flag]}" in error.reason


@pytest.mark.parametrize("flags, says", [
    ("{", "not a JSON object"), ("null", "not a JSON object"), ("[" * 20000, "not a JSON object"),
    ({"image_size": "big"}, "metadata has image_size=big; it must be a whole number"),
    ({**STATED, "num_channels": 64}, "metadata has num_channels=64; the tensors of"),
    ({**STATED, "num_head_channels": 24}, "num_head_channels is 24"), ({**STATED, "image_size": 15}, "a multiple of 2"),
], ids=lambda value: str(value)[:30])  # fmt: skip
def test_metadata_that_is_wrong(flags, says, tmp_path):
    assert says in refusal(metadata_file(tmp_path, flags))


IMPROVED = {
    "attention_resolutions": "16,8", "num_res_blocks": 3, "num_heads": 4, "learn_sigma": True,
    "use_scale_shift_norm": True, "noise_schedule": "cosine", "diffusion_steps": 4000,
}  # fmt: skip
LSUN = {
    "image_size": 256, "num_channels": 128, "channel_mult": "1,1,2,2,4,4", "num_heads": 1, "num_res_blocks": 2,
    "attention_resolutions": "16", "use_scale_shift_norm": False, "noise_schedule": "linear", "diffusion_steps": 1000,
}  # fmt: skip
SIXTY_FOUR = {"image_size": 64, "num_channels": 192, "channel_mult": "1,2,3,4", "class_cond": True}
CIFAR = {"image_size": 32, "num_channels": 128, "channel_mult": "1,2,2,2", "rescale_timesteps": True}


def layout(**flags):
    """The shapes of a network, without its memory."""
    process = ("noise_schedule", "diffusion_steps", "rescale_timesteps")
    with torch.device("meta"):
        model = create_model(**{name: value for name, value in flags.items() if name not in process})
    return zeros(shapes_of(model))


@pytest.mark.parametrize("model", [LSUN, SIXTY_FOUR, CIFAR], ids=["lsun", "imagenet64_cond", "cifar10"])
def test_improved_diffusions_models_are_known(model, tmp_path, caplog):
    expected = {**IMPROVED, **model}  # as its README has them
    info = recognise(read_file(saved(tmp_path / "m.pt", layout(**expected))), {}).info
    assert {flag: info.flags[flag] for flag in expected} == expected
    assert info.flags["num_head_channels"] == -1 and not info.flags["use_new_attention_order"]
    assert (info.assumed, caplog.messages) == ((), [])


OWN = {
    "image_size": 256, "num_channels": 128, "num_res_blocks": 2, "num_heads": 4, "channel_mult": "1,1,2,2,4,4",
    "attention_resolutions": "16", "use_scale_shift_norm": True, "resblock_updown": True,
}  # fmt: skip


@pytest.mark.parametrize("change", [{"attention_resolutions": "16,8"}, {"class_cond": True}, {"num_res_blocks": 3}])
def test_what_only_resembles_a_published_model_is_not_taken_for_it(change, tmp_path, caplog):
    info = recognise(read_file(saved(tmp_path / "m.pt", layout(**{**OWN, **change}))), {}).info
    assert {"image_size", "num_heads", "noise_schedule"} <= set(info.assumed)
    (message,) = caplog.messages
    assert all(text in message for text in ("image_size=256", "num_heads=4", "noise_schedule=linear"))
    assert info.flags["num_head_channels"] == -1  # the default, not the published width


def test_flags_that_contradict_a_published_row_are_reported(tmp_path, caplog):
    source = read_file(saved(tmp_path / "m.pt", layout(**OWN)))
    flags = recognise(source, {"num_heads": 2, "noise_schedule": "cosine"}).info.flags
    assert (flags["num_heads"], flags["num_head_channels"], flags["noise_schedule"]) == (2, -1, "cosine")
    (message,) = caplog.messages
    assert "published" in message and "noise_schedule=linear" in message and "noise_schedule=cosine" in message


def train_record(folder, **flags):
    record = {"model": {**TINY, **STATED, "diffusion_steps": 4000, **flags}, "flags": {}, "versions": {}}
    (folder / "train.json").write_text(json.dumps(record))


def test_record_of_the_training_tells_what_the_file_does_not(tiny_file, tmp_path, caplog):
    train_record(tmp_path, predict_xstart=True)
    model, info = load_model(tiny_file)
    torch.testing.assert_close(output_of(model), output_of(tiny()), rtol=0, atol=0)
    expected = {**STATED, "diffusion_steps": 4000, "predict_xstart": True}
    assert {flag: info.flags[flag] for flag in expected} == expected
    assert (info.assumed, caplog.messages) == ((), [])
    assert refused(tiny_file, noise_schedule="linear").parameter == "noise_schedule"
    path = metadata_file(tmp_path, {**STATED, "noise_schedule": "linear"})  # counts more
    assert load_model(path)[1].flags["noise_schedule"] == "linear"


def test_records_that_are_not_used(tiny_file, tmp_path, caplog):
    train_record(tmp_path, num_channels=64)
    _, info = load_model(tiny_file, **GIVEN)
    assert info.flags["noise_schedule"] == "linear" and "train.json" in caplog.text
    for text in ("[]", '{"model": 3}', '{"a": 1}', "[" * 100000, '{"model": {}}'):  # other programs' files
        (tmp_path / "train.json").write_text(text)
        assert_tiny(tiny_file)
    for value, says in (("many", "a whole number"), (10**15, "from 1 to 1e+06")):
        train_record(tmp_path, diffusion_steps=value)
        error = refused(tiny_file, names_file=False)
        assert all(text in str(error) for text in ("train.json", "diffusion_steps", says))


def optimizer_state():
    return {"state": {0: {"exp_avg": torch.ones(3), "step": torch.tensor(5.0)}}, "param_groups": [{"lr": 1e-4}]}


def changed(change):
    return lambda: {key: change(value) for key, value in tiny_state().items()}


NESTINGS = {
    "state_dict": lambda: {"state_dict": tiny_state(), "epoch": 3},
    "rate in the name": lambda: {"state_dict": tiny_state(plus=1), "ema_0.9999": tiny_state()},
    "average as a list": lambda: {"ema": {"num_updates": 3, "shadow_params": [torch.ones(2)]}, "model": tiny_state()},
    "ddim repository": lambda: [tiny_state(plus=1), optimizer_state(), 3, 1000, tiny_state()],
    "counters beside the weights": lambda: {**tiny_state(), "step": torch.tensor(3), "epoch": 5, "name": "dog"},
    "parsed flags and numpy numbers": lambda: {
        "args": argparse.Namespace(lr=np.float64(0.1), betas=np.ones(3), out=Path("x")),
        "step": np.int64(3),
        "model": tiny_state(),
    },
    "averages and plain copies": lambda: {
        **tiny_state("model.", plus=1), **tiny_state("ema_model."), "ema_model.num_updates": torch.tensor(3),
    },
    "a name that only looks like an average": lambda: {**tiny_state("net."), **tiny_state("schema.net.", plus=1)},
    "wrappers": lambda: tiny_state("module._orig_mod.module."),
    "an odd prefix": lambda: tiny_state("a b\n."),
    "slices of one storage": changed(lambda v: torch.cat([v.new_ones(5), v.flatten(), v.new_ones(3)])[5:-3].view_as(v)),
    "channels last": changed(lambda v: v.to(memory_format=torch.channels_last) if v.ndim == 4 else v),
}  # fmt: skip


@pytest.mark.parametrize("nesting", NESTINGS)
def test_nested_weights_are_found(nesting, tmp_path):
    assert_tiny(saved(tmp_path / "model.pt", NESTINGS[nesting]()))


def test_precision_of_inference(tiny_file):
    for options, dtype in (
        ({"dtype": torch.bfloat16}, torch.bfloat16), ({"use_fp16": True}, torch.float16),
        ({"dtype": torch.float32, "use_fp16": True}, torch.float32),
    ):  # fmt: skip
        model, _ = load_model(tiny_file, **GIVEN, **options)
        assert model.dtype == model.input_blocks[0][0].weight.dtype == dtype


def test_state_dict_is_read_as_it_is_and_its_format_is_told_by_content(tmp_path):
    weights = {"0.weight": torch.randn(3, 3), "0.bias": torch.randn(3)}
    for path, content in (("ä b.pt", weights), ("a.safetensors", weights), ("n.pth", {"state_dict": weights})):
        state = load_state_dict(saved(tmp_path / path, content))
        assert list(state) and all(torch.equal(state[key], weights[key]) for key in weights)
    save_file(tiny_state(), tmp_path / "wrong.pt")
    torch.save(tiny_state(), tmp_path / "wrong.safetensors", _use_new_zipfile_serialization=False)
    for name in ("wrong.pt", "wrong.safetensors"):
        assert_tiny(tmp_path / name)


UNETS = {
    "updown": lambda: create_model(**TINY),
    "convolutions": lambda: create_model(
        **{**TINY, "resblock_updown": False, "use_scale_shift_norm": False, "channel_mult": "1,2", "learn_sigma": True}
    ),
    "classes": lambda: create_model(**{**TINY, "num_res_blocks": 2}, class_cond=True, num_classes=5),
    "ddpm": lambda: Model(ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=[8], image_size=16),
    **{
        f"encoder {pool}": lambda pool=pool: create_classifier(**TINY_ENCODER, classifier_pool=pool)
        for pool in ("adaptive", "attention", "spatial", "spatial_v2")
    },
    "encoder convolutions": lambda: create_classifier(**TINY_ENCODER, classifier_resblock_updown=False),
}


@functools.cache
def network_shapes(name):
    return shapes_of(UNETS[name]())


def network_flags(name):
    return {"image_size": 16} if name == "ddpm" else {"image_size": 16, "num_head_channels": 32}


@property_test(100)
@given(name=st.sampled_from(sorted(UNETS)), data=st.data())
def test_tensors_that_do_not_fit_the_network_are_named(name, data, tmp_path):
    shapes = dict(network_shapes(name))
    # A network without the labels' tensor is an ordinary one too, and its number of rows fits any number of classes.
    key = data.draw(st.sampled_from([key for key in shapes if key != "label_emb.weight"]))
    fault, right = data.draw(st.sampled_from(["missing", "shape", "too many"])), shapes[key]
    if fault == "missing":
        del shapes[key]
    elif fault == "shape":
        axis = data.draw(st.integers(-1, len(right) - 1))
        shapes[key] = (*right, 1) if axis < 0 else (*right[:axis], right[axis] + 1, *right[axis + 1 :])
    else:
        key = f"{key.split('.')[0]}.{data.draw(st.sampled_from(['extra', 'x.weight', '99999999999.0.weight']))}"
        shapes[key] = (32,)
    message = refusal(saved(tmp_path / "m.pt", zeros(shapes)), **network_flags(name))
    assert f"lacks the tensor {key}" in message or fault != "missing"
    assert key in message or fault != "too many"  # of a pair of shapes that disagrees, either is named


def test_a_flipped_bit_of_an_archive_is_found(tmp_path):
    big = torch.randn(1000)
    path = saved(tmp_path / "m.pt", {"model": tiny_state(), "big": big})
    for known in (big.numpy().tobytes(), b"out.2.weight"):  # in the data, in the pickle
        flipped = bytearray(path.read_bytes())
        flipped[flipped.index(known)] ^= 4
        (tmp_path / "flipped.pt").write_bytes(flipped)
        with pytest.raises(InputError, match="damaged"):
            read_file(tmp_path / "flipped.pt")


def test_files_that_would_grow_to_gigabytes_are_refused_at_once(tiny_file, tmp_path):
    with zipfile.ZipFile(tiny_file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "m.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in {**entries, "archive/data/999": bytes(300 << 20)}.items():
            archive.writestr(name, data)
    assert "would unpack to" in refusal(tmp_path / "m.pt")
    shapes = {k: tuple(n * 512 if n % 32 == 0 else n for n in shape) for k, shape in network_shapes("updown").items()}
    path = saved(tmp_path / "views.pt", zeros(shapes))
    assert path.stat().st_size < 200_000
    assert "bytes of tensors describe a network of" in refusal(path, image_size=16, num_head_channels=32)


LONG = "\x1b[31m\n\r" + "x" * 1_000_000


def test_texts_of_a_file_are_shown_short_and_harmless(tmp_path):
    one = torch.zeros(3)
    for content in (
        {LONG: one}, {**tiny_state(), f"out.{LONG}": one}, {**tiny_state(), f"first_stage_model.{LONG}": one},
        {**tiny_state(), f"{LONG}.time_embed.0.weight": one}, {LONG: 3, "y": {LONG: 3}},
    ):  # fmt: skip
        refusal(saved(tmp_path / "m.pt", content), image_size=15)


def header(content, body=b""):
    """A .safetensors file of any header."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + body


def tensor(shape, *offsets):
    return {"dtype": "F32", "shape": shape, "data_offsets": offsets}


def changed_tensor(value):
    return lambda: {**tiny_state(), "out.0.weight": value}


def looped():
    content = {"state_dict": {}, "step": 3}
    content["state_dict"]["model"] = content
    return content | {f"ema_{n}": content for n in range(40)}


def other_network(name, *shape, unet=False):
    return lambda: zeros({**(network_shapes("convolutions") if unet else {}), name: shape})


OTHER_FILES = {
    "text": (b"hello, I am not a model\n" * 10, "begins with b'hello"),
    "web page": (b"<html><body>Sign in</body></html>", "begins with b'<html><body>Sign in"),
    "empty": (b"", "empty"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "begins with b'version https://git-lfs"),
    "pickle": (pickle.dumps({"a": 1}, protocol=2), "damaged"),
    "huge": (header({"a": tensor([2**40, 2**20], 0, 2**62)}), "damaged"),
    "no size": (header({"time_embed.0.weight": tensor([0, 0], 0, 0)}), "lacks the tensor"),
    "no tensor": (header({}), "holds no weights"),
    "metadata": (header({"__metadata__": {"flags": 3}}), "damaged"),
    "nested header": (header(b'{"a": ' * 3000), "damaged"),
    "length": (struct.pack("<Q", 2**63) + b"{}", "damaged"),
    "tensor": (lambda: torch.zeros(3), "it is a Tensor"),
    "counter": (lambda: {"step": torch.tensor(3)}, "its entries are step"),
    "optimizer": (lambda: {"optimizer": optimizer_state(), "optimizer_ema": {"x": torch.ones(3)}}, "holds no weights"),
    "contains itself": (looped, "holds no weights"),
    "NaN": (changed_tensor(torch.full((32,), float("nan"))), "out.0.weight has values that are NaN or infinite"),
    "integers": (changed_tensor(torch.zeros(32, dtype=torch.int8)), "out.0.weight is int8"),
    "sparse": (changed_tensor(torch.zeros(32).to_sparse()), "sparse"),
    "meta": (changed_tensor(torch.zeros(32, device="meta")), "on meta"),
    "nested": (changed_tensor(torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(4, 3)])), "nested"),
    "classifier": (other_network("conv1.weight", 64, 3, 7, 7), "no network that is known here"),
    "latents": (other_network("x.transformer_blocks.0.attn1.to_q.weight", 32, 32, unet=True), "latent diffusion model"),
    "four channels": (other_network("input_blocks.0.0.weight", 32, 4, 3, 3, unet=True), "shape [32, 4, 3, 3]"),
    "33 channels": (
        lambda: zeros({key: tuple(33 if n == 32 else 132 if n == 128 else n for n in shape)
                       for key, shape in network_shapes("ddpm").items()}), "cannot be built"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_FILES)
def test_files_that_are_something_else(name, tmp_path):
    content, says = OTHER_FILES[name]
    path = saved(tmp_path / "m.pt", content() if callable(content) else content)
    assert says in refusal(path, **({"image_size": 16} if name == "33 channels" else GIVEN))
    if name in ("NaN", "integers", "sparse", "nested"):
        with pytest.raises(InputError, match=says):
            load_state_dict(path)  # such as the weights of the energy vgg


def test_places_that_hold_no_file(tmp_path):
    saved(tmp_path / "tiny.pt", b"x")
    (tmp_path / "dangling.pt").symlink_to(tmp_path / "gone.pt")
    os.mkfifo(tmp_path / "pipe.pt")
    for path, says in (
        (tmp_path, "is a folder"), (tmp_path / "nothing.pt", "does not exist"),
        (tmp_path / "tinny.pth", f"did you mean {tmp_path / 'tiny.pt'}?"), (tmp_path / "dangling.pt", "does not exist"),
        (tmp_path / "tiny.pt" / "m.pt", "cannot be read"), (tmp_path / ("x" * 300), "cannot be read"),
        ("a\0b.pt", "cannot be read"), (tmp_path / "pipe.pt", "not a regular file"),
    ):  # fmt: skip
        assert says in refusal(path)


def test_reading_turns_any_exception_into_one_line():
    for raised, says in (
        (FileNotFoundError(2, "No such file"), "/a/b does not exist"),
        (PermissionError(13, "Permission denied"), "/a/b cannot be read: Permission denied"),
        (KeyError("step"), "/a/b is damaged or not a table: it has no entry 'step'"),
        (RecursionError("too deep\nsecond line"), "/a/b is damaged or not a table: too deep"),
        (InputError("another reason"), "another reason"),
    ):  # fmt: skip
        with pytest.raises(InputError) as caught, reading(Path("/a/b"), "a table"):
            raise raised
        assert str(caught.value) == says
    with pytest.raises(KeyboardInterrupt), reading("x"):
        raise KeyboardInterrupt


class Calls:
    """Pickled as a call."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


ATTACKS = {
    "os.system": lambda m: Calls(os.system, f"touch {m}"),
    "builtins.eval": lambda m: Calls(eval, f"open({m!r}, 'w')"),
    "whole module": lambda m: tiny(),
}
PLACES = (
    lambda evil: evil,
    lambda evil: {"state_dict": tiny_state(), "args": evil},
    lambda evil: {**tiny_state(), "x": evil},
)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle 4"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_code_in_a_file_is_refused_and_never_run(attack, form, tmp_path):
    path, marker = tmp_path / "m.pt", tmp_path / "marker"
    for place in PLACES if attack == "os.system" else PLACES[1:2]:
        evil = place(ATTACKS[attack](str(marker)))
        if form == "pickle 4":
            path.write_bytes(pickle.dumps(evil, protocol=4))
        else:
            torch.save(evil, path, _use_new_zipfile_serialization=form == "zip")
        message = refusal(path, **GIVEN)
        assert not marker.exists() and ("holds more than tensors (" in message or form == "pickle 4")


def test_the_attacks_would_work(tmp_path):
    for name in ("os.system", "builtins.eval"):
        marker = tmp_path / name
        pickle.loads(pickle.dumps(ATTACKS[name](str(marker))))
        assert marker.exists()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_becomes_of_the_file_does_not_matter(suffix, tmp_path):
    path = saved(tmp_path / f"m{suffix}", tiny_state())
    model, _ = assert_tiny(path)
    state = load_state_dict(path)
    if sys.platform == "linux":
        assert str(path) not in Path("/proc/self/maps").read_text()
    with open(path, "r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    torch.testing.assert_close(output_of(model), output_of(tiny()), rtol=0, atol=0)
    assert all(torch.equal(state[key], value) for key, value in tiny().state_dict().items())


def test_parameters_do_not_share_memory(tmp_path):
    model, _ = load_model(saved(tmp_path / "m.pt", zeros(network_shapes("updown"))), **network_flags("updown"))
    parameters = list(model.parameters())
    assert len({p.untyped_storage().data_ptr() for p in parameters}) == len(parameters)
    assert all(p.untyped_storage().nbytes() == p.nbytes and p.is_contiguous() for p in parameters)


def test_the_record_names_the_bytes_that_were_loaded(tiny_file):
    def expected():
        return f"sha256 {hashlib.sha256(tiny_file.read_bytes()).hexdigest()}"

    first = fingerprint(tiny_file)
    assert first == expected()
    load_model(tiny_file, **GIVEN)
    saved(tiny_file, tiny_state(plus=1))
    assert fingerprint(tiny_file) == first
    load_state_dict(tiny_file)
    assert fingerprint(tiny_file) == expected() != first


def test_urls_are_read_through_blobfile(tiny_file, tmp_path, monkeypatch):
    import blobfile

    assert "cannot be read: " in refusal("s3://bucket/model.pt")
    metadata_file(tmp_path, STATED)
    monkeypatch.setattr(blobfile, "BlobFile", lambda url, mode: Path(url.removeprefix("gs://bucket")).open(mode))
    assert_tiny(f"gs://bucket{tiny_file}")
    _, info = assert_tiny(f"gs://bucket{tmp_path}/m.safetensors")
    assert info.flags["noise_schedule"] == "cosine"
    monkeypatch.setitem(sys.modules, "blobfile", None)
    assert "blobfile" in refusal("gs://bucket/model.pt")


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_saved_models_load_without_flags(dtype, tmp_path):
    path = tmp_path / "m.safetensors"
    flags = {**TINY, **STATED, "predict_xstart": True}
    save_model(path, tiny(), model_type="ADM", flags=flags, dtype=dtype, metadata={"licence": "MIT"})
    model, info = load_model(path)
    assert (info.model_type, info.metadata["licence"], info.metadata["format"]) == ("ADM", "MIT", "pt")
    assert {flag: info.flags[flag] for flag in flags} == flags
    for key, value in tiny().state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value.to(dtype or value.dtype).float(), rtol=0, atol=0)
    assert {value.dtype for value in load_file(path).values()} == {dtype or torch.float32}
    save_model(path, model, model_type="ADM", flags=info.flags)
    assert load_model(path)[1].flags == info.flags
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.safetensors"]


def test_saved_encoders_and_ddpm_unets_load_without_flags(tmp_path):
    # Three residual blocks may be one level of three, or two levels of one and the downsampling between them.
    deep = {**TINY_ENCODER, "channel_mult": "1", "classifier_depth": 3, "classifier_attention_resolutions": ""}
    deep["classifier_pool"] = "adaptive"
    assert architecture.encoder(create_classifier(**deep).state_dict())["classifier_depth"] == 1
    for original, kind, flags in (
        (create_classifier(**TINY_ENCODER, head="I2Iout"), "ENCODER", TINY_ENCODER),
        (create_classifier(**deep), "ENCODER", deep),
        (UNETS["ddpm"](), "DDPM", {"image_size": 16}),
    ):
        model = randomise(original)
        save_model(tmp_path / "m.safetensors", model.state_dict(), model_type=kind, flags=flags)
        loaded, info = load_model(tmp_path / "m.safetensors")
        assert info.model_type == kind and not info.assumed
        assert info.flags.get("classifier_depth") == flags.get("classifier_depth")
        torch.testing.assert_close(output_of(loaded), output_of(model), rtol=0, atol=0)


def test_saving_what_could_not_be_loaded_is_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    good = {"model_type": "ADM", "flags": {**TINY, **STATED}}
    save_model(path, tiny(), **good)
    before = path.read_bytes()
    large = {**tiny_state(), "out.2.bias": torch.full((3,), 1e6)}
    for state, options, says in (
        (tiny(), dict(good, flags={**TINY, "num_channels": 64}), "num_channels=64"),
        (tiny(), dict(good, model_type="DDPM"), "model_type=DDPM"),
        (tiny(), dict(good, model_type="UNET"), "model_type is 'UNET'"),
        (tiny(), dict(good, flags={}), "image_size is missing"),
        (large, dict(good, dtype=torch.float16), "out.2.bias"),
        ({"a": torch.ones(3)}, good, "no network that is known"),
    ):
        with pytest.raises(InputError, match=says):
            save_model(path, state, **options)
    with pytest.raises(InputError, match="ends with"):
        save_model(tmp_path / "m.pt", tiny(), **good)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.safetensors"]


def betas_of(schedule):
    return torch.from_numpy(get_named_beta_schedule(schedule, 500)).float()


LDM_SCHEDULE = "scaled_linear:0.0015,0.0195"
LIGHTNING = {"timesteps": 500, "beta_schedule": "linear", "linear_start": 0.0015, "linear_end": 0.0195}
DDIM = argparse.Namespace(diffusion={
    "beta_schedule": "linear", "beta_start": np.float64(1e-4), "beta_end": 0.02,
    "num_diffusion_timesteps": np.int64(500),
})  # fmt: skip
STATEMENTS = {
    "betas among the tensors": (lambda: {**tiny_state(), "betas": betas_of("linear")}, "linear"),
    "alphas under a prefix": (
        lambda: {**tiny_state("net."), "diffusion.alphas_cumprod": (1 - betas_of(LDM_SCHEDULE)).cumprod(0)},
        LDM_SCHEDULE,
    ),
    "a list": (lambda: {"model": tiny_state(), "betas": betas_of("cosine").tolist()}, "cosine"),
    "Lightning": (lambda: {"state_dict": tiny_state("model."), "hyper_parameters": LIGHTNING}, LDM_SCHEDULE),
    "nested, of numpy": (lambda: {"model": tiny_state(), "config": DDIM}, "linear:0.0001,0.02"),
    "a numpy array": (lambda: {"model": tiny_state(), "betas": get_named_beta_schedule("cosine", 500)}, "cosine"),
}


@pytest.mark.parametrize("name", STATEMENTS)
def test_schedules_that_a_file_holds_are_used_and_said(name, tmp_path, caplog):
    content, schedule = STATEMENTS[name]
    path = saved(tmp_path / "m.pt", content())
    with caplog.at_level(logging.INFO):
        _, info = assert_tiny(path)
    assert (info.flags["noise_schedule"], info.flags["diffusion_steps"]) == (schedule, 500)
    told, assumed = caplog.messages
    assert f"noise_schedule={schedule}" in told and "use_new_attention_order" in assumed
    assert not {"noise_schedule", "diffusion_steps"} & {*info.assumed}
    error = refused(path, **GIVEN, diffusion_steps=1000)
    assert (error.parameter, error.value) == ("diffusion_steps", 1000)


def test_tables_without_a_name_stay_as_they_are(tmp_path):
    betas = torch.linspace(0.001, 0.3, 20).sqrt() ** 3
    _, info = assert_tiny(saved(tmp_path / "m.pt", {"model": tiny_state(), "betas": betas}))
    schedule = get_named_beta_schedule(info.flags["noise_schedule"], info.flags["diffusion_steps"])
    np.testing.assert_array_equal(schedule, betas.double().numpy())


@pytest.mark.parametrize("entries, flags", [
    ({"parameterization": "x0", "image_size": 16, "num_heads": 2}, {"predict_xstart": True, "num_heads": 2}),
    ({"objective": "pred_v"}, {"predict_v": True}),
    (
        {"timesteps": 1000.0, "num_heads": "4", "rescale_timesteps": "True", "dropout": "0.1"},
        {"diffusion_steps": 1000, "num_heads": 4, "rescale_timesteps": True, "dropout": 0.1},
    ),
])  # fmt: skip
def test_hyper_parameters_tell_what_tensors_cannot(entries, flags, tmp_path):
    path = saved(tmp_path / "m.ckpt", {"state_dict": tiny_state(), "hyper_parameters": entries})
    _, info = load_model(path, image_size=16, **({} if "num_heads" in entries else {"num_head_channels": 16}))
    assert {name: info.flags[name] for name in flags} == flags


@pytest.mark.parametrize("content, says", [
    ({"betas": torch.linspace(0, 1, 20)}, "its entry betas is no noise schedule"),
    ({"betas": torch.full((20,), 1e-20, dtype=torch.float64)}, "alpha_bar must fall"),
    ({"alphas_cumprod": torch.full((20,), float("nan"))}, "its entry alphas_cumprod is no noise schedule"),
    ({"hyper_parameters": {"objective": "flow"}}, "objective='flow', which is not supported"),
    ({"hyper_parameters": {"beta_schedule": "exp"}}, "noise_schedule=exp; it can be linear"),
    ({"hyper_parameters": {"timesteps": -4}}, "diffusion_steps=-4; it must be from 1"),
    ({"hyper_parameters": {"sigma_data": 0.5}}, "EDM"),
    ({"args": argparse.Namespace(weight_schedule="karras")}, "consistency"),
])  # fmt: skip
def test_statements_that_cannot_be(content, says, tmp_path):
    assert says in refusal(saved(tmp_path / "m.pt", {"model": tiny_state(), **content}), **GIVEN)


def test_other_processes_are_known_by_their_names(tmp_path):
    for name in ("edm_bedroom256_ema.pt", "cd_imagenet64_l2.pt", "my-consistency-model.pt"):
        path = saved(tmp_path / name, tiny_state())
        assert "EDM or a consistency model" in refusal(path, **GIVEN, noise_schedule="linear")
    for name in ("redmi.pt", "ct_scans.pt", "inconsistency.pt"):
        assert_tiny(saved(tmp_path / name, tiny_state()))
    train_record(tmp_path)  # of a training here
    load_model(path)


def test_other_processes_are_known_by_their_layouts(tmp_path):
    flags = {"resblock_updown": True, "use_scale_shift_norm": True, "num_head_channels": 64}
    flags["attention_resolutions"] = "32,16,8"
    small = {"image_size": 64, "num_channels": 192, "num_res_blocks": 3, "channel_mult": "1,2,3,4", "class_cond": True}
    large = {"image_size": 256, "num_channels": 256, "num_res_blocks": 2, "channel_mult": "1,1,2,2,4,4"}
    for sizes in (small, large):
        path = saved(tmp_path / "m.pt", layout(**flags, **sizes))
        assert "EDM or a consistency model" in refusal(path)
        info = recognise(read_file(path), {"noise_schedule": "cosine", "num_head_channels": 64}).info
        assert info.flags["noise_schedule"] == "cosine"
