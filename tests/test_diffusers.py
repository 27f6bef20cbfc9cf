"""Models of diffusers load as our networks and are written back; the process is the library's. Without the library."""

import json
import logging
import os
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN_DIR, golden, golden_index
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scripts_in_process import load_script, run_script
from tiny import MODEL, make_references, pictures

from guided_diffusion.checkpoint import fingerprint, load_model, remote, save_model
from guided_diffusion.checkpoint.diffusers import FIELDS, PROCESS, process_flags
from guided_diffusion.checkpoint.loading import convert
from guided_diffusion.errors import InputError
from guided_diffusion.gaussian_diffusion import get_named_beta_schedule
from guided_diffusion.respace import space_timesteps
from guided_diffusion.script_util import create_diffusion, create_model

ROOT = Path(__file__).resolve().parent.parent
FOLDER = GOLDEN_DIR / "diffusers"
INDEX = json.loads((FOLDER / "index.json").read_text())
COMMITTED = {"ddpm_eps", "v_cosine"}
MODELS = sorted(COMMITTED | {name for name in INDEX["models"] if (FOLDER / name).is_dir()})
TOLERANCE = 2e-5
WEIGHTS, CONFIG = "unet/diffusion_pytorch_model.safetensors", "unet/config.json"
SCHEDULER = "scheduler/scheduler_config.json"

pytestmark = pytest.mark.golden


def assert_golden(path, name, **flags):
    """The path is that golden model."""
    model, info = load_model(path, **flags)
    data = load_file(FOLDER / name / "io.safetensors")
    with torch.no_grad():
        output = model(data["x"], data["t"], **({"y": data["class_labels"]} if "class_labels" in data else {}))
    assert (output - data["output"]).abs().max() <= TOLERANCE
    return model, info


def refused(path, **flags):
    """The InputError for a path: one line that names it."""
    with pytest.raises(InputError) as caught:
        load_model(path, **flags)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 1000 and str(path) in message
    return caught.value


@pytest.fixture
def folder(tmp_path):
    """A copy of `ddpm_eps` that a test may change."""
    shutil.copytree(FOLDER / "ddpm_eps", tmp_path / "model")
    return tmp_path / "model"


def edit(path, *, drop=(), **changes):
    """Change fields of a JSON file."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in content.items() if name not in drop}))


def read_weights(folder):
    return load_file(folder / WEIGHTS)


# ---- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_golden_models_give_golden_outputs(name, caplog):
    with caplog.at_level(logging.WARNING):
        _, info = assert_golden(FOLDER / name, name)
    assert info.model_type == INDEX["models"][name]["ours"].split(",")[0]
    assert (info.flags["image_size"], info.assumed, caplog.messages) == (16, (), [])
    if name == "v_cosine":
        expected = {"norm_groups": 8, "predict_v": True, "noise_schedule": "cosine", "diffusion_steps": 200}
        expected |= {"use_new_attention_order": True, "resblock_updown": False}
        assert {flag: info.flags[flag] for flag in expected} == expected
    if name == "ddpm_eps":  # records of runs with usual networks do not change
        usual = {"norm_groups", "norm_eps", "sines_first", "pad_end", "middle_norm", "predict_v"}
        assert not usual & info.flags.keys()


def test_every_layout_of_a_folder(folder):
    unet, renamed = folder / "unet", folder / "unet" / "renamed.pt"
    assert_golden(unet, "ddpm_eps")
    assert load_model(unet)[1].scheduler == {"clip_denoised": True, "sigma_small": True}
    assert_golden(folder / WEIGHTS, "ddpm_eps")
    (folder / WEIGHTS).rename(renamed)
    assert_golden(renamed, "ddpm_eps")
    assert "renamed.pt" not in str(refused(folder)) and "diffusion_pytorch_model" in str(refused(folder))


def test_the_layout_and_configurations_of_2022(folder, tmp_path):
    root = tmp_path / "old"
    root.mkdir()
    renamed, state = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}, read_weights(folder)
    for new, old in renamed.items():
        state = {name.replace(f".{new}.", f".{old}."): value for name, value in state.items()}
    torch.save(state, root / "diffusion_pytorch_model.bin")
    newer = ("add_attention", "downsample_type", "upsample_type", "dropout", "attn_norm_num_groups", "num_class_embeds")
    edit(folder / CONFIG, drop=newer)
    edit(folder / SCHEDULER, drop=("prediction_type", "thresholding", "timestep_spacing", "clip_sample_range"))
    for name in (CONFIG, SCHEDULER, "model_index.json"):
        shutil.copy(folder / name, root / os.path.basename(name))
    _, info = assert_golden(root, "ddpm_eps")
    assert info.model_type == "DDPM" and info.scheduler == {"clip_denoised": True, "sigma_small": True}
    edit(root / "scheduler_config.json", drop=["num_train_timesteps"], timesteps=500, predict_epsilon=False)
    flags = load_model(root)[1].flags
    assert (flags["diffusion_steps"], flags["predict_xstart"]) == (500, True)


def test_weights_in_shards(folder):
    state = read_weights(folder)
    names = sorted(state)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, part in halves.items():
        save_file({name: state[name] for name in part}, folder / "unet" / shard)
    weight_map = {name: shard for shard, part in halves.items() for name in part}
    index = folder / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    # An older file: the library takes the shards.
    save_file({name: value * 0.5 for name, value in state.items()}, folder / WEIGHTS)
    assert_golden(folder, "ddpm_eps")
    for name in ("missing.safetensors", "../config.json", "/etc/passwd", "", "x\\y", "a\0b", 3):
        index.write_text(json.dumps({"weight_map": {names[0]: name}}))
        assert "index.json" in str(refused(folder))


def test_half_precision_only_where_nothing_else_is_available(folder, caplog):
    half = folder / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    save_file({name: torch.zeros_like(value) for name, value in read_weights(folder).items()}, half)
    assert_golden(folder, "ddpm_eps")
    save_file({name: value.half() for name, value in read_weights(folder).items()}, half)
    (folder / WEIGHTS).unlink()
    with caplog.at_level(logging.INFO):
        model, _ = load_model(folder)
    assert "half-precision" in caplog.text
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


def test_checkpoint_of_a_training_takes_the_averages(folder, tmp_path, caplog):
    checkpoint = tmp_path / "run" / "checkpoint-500"
    checkpoint.mkdir(parents=True)
    shutil.copytree(folder / "scheduler", tmp_path / "run" / "scheduler")
    shutil.copytree(folder / "unet", checkpoint / "unet")
    assert_golden(checkpoint, "ddpm_eps")
    shutil.copytree(folder / "unet", checkpoint / "unet_ema")
    edit(checkpoint / "unet_ema" / "config.json", decay=0.999, optimization_step=10, use_ema_warmup=True, power=0.75)
    save_file({name: 0 * value for name, value in read_weights(folder).items()}, checkpoint / WEIGHTS)
    with caplog.at_level(logging.INFO):
        _, info = assert_golden(checkpoint, "ddpm_eps")
    assert "unet_ema" in caplog.text and info.scheduler["sigma_small"] is True


def test_short_configuration_has_the_librarys_defaults(folder):
    config = json.loads((folder / CONFIG).read_text())
    kept = {name: value for name, value in config.items() if name in FIELDS and value != FIELDS[name]}
    (folder / CONFIG).write_text(json.dumps({**kept, "_name_or_path": "x/y", "mystery": None}))
    assert_golden(folder, "ddpm_eps")


def test_tensors_are_checked_under_the_librarys_names(tmp_path):
    shutil.copytree(FOLDER / "v_cosine", tmp_path / "model")  # of which ours packs q, k and v
    state, stem = read_weights(tmp_path / "model"), "mid_block.attentions.0"
    key = f"{stem}.to_k.bias"
    for changed, says in (
        ({name: value for name, value in state.items() if name != key}, f"lacks the tensor {key}"),
        ({**state, "extra.weight": torch.zeros(3)}, "has the tensor extra.weight"),
        ({**state, f"{stem}.to_v.weight": torch.zeros(3, 3)}, f"{stem}.to_q.weight has shape"),
        ({**state, key: torch.full_like(state[key], float("nan"))}, "NaN or infinite"),
    ):
        save_file(changed, tmp_path / "model" / WEIGHTS)
        assert says in str(refused(tmp_path / "model"))


def test_flags_agree_with_the_configuration_or_are_refused(folder):
    flags = {"image_size": 16, "num_channels": 32, "noise_schedule": "linear", "norm_eps": 1e-6}
    assert_golden(FOLDER / "ddpm_eps", "ddpm_eps", **flags, timestep_respacing="leading10")
    for flag, value in {"image_size": 64, "noise_schedule": "cosine", "norm_groups": 8, "class_cond": True}.items():
        error = refused(FOLDER / "ddpm_eps", **{flag: value})
        assert (error.parameter, error.value) == (flag, value)
    edit(folder / CONFIG, sample_size=None)
    assert refused(folder).parameter == "image_size"
    assert_golden(folder, "ddpm_eps", image_size=16)
    edit(folder / CONFIG, sample_size=[16, 16])
    assert_golden(folder, "ddpm_eps")


def test_scheduler_file_decides_unless_flags_do(folder):
    edit(folder / SCHEDULER, variance_type="fixed_large", clip_sample_range=2.0)
    _, info = load_model(folder)
    assert (info.choose("sigma_small"), info.choose("clip_denoised")) == (False, 2.0)
    assert (info.choose("sigma_small", True), info.choose("clip_denoised", False)) == (True, False)
    edit(folder / SCHEDULER, clip_sample=False)
    assert load_model(folder)[1].choose("clip_denoised") is False
    edit(folder / SCHEDULER, _class_name="PNDMScheduler", drop=("clip_sample", "variance_type"))
    info = load_model(folder)[1]
    assert info.scheduler == {} and info.choose("clip_denoised") is True


def test_folder_without_a_scheduler_says_what_is_assumed(folder, caplog):
    shutil.rmtree(folder / "scheduler")
    _, info = load_model(folder, diffusion_steps=500)
    assert (info.flags["noise_schedule"], info.flags["diffusion_steps"]) == ("linear", 500)
    assert "noise_schedule" in info.assumed and "assumed: noise_schedule=linear, predict_xstart" in caplog.text


# ---- refusals --------------------------------------------------------------------------------------------------------


REFUSED = {
    "latent": "latent diffusion model (it has vqvae)", "text_conditional": "text-conditional",
    "variance_exploding": "variance-exploding", "consistency": "consistency model", "grey": "diffusion_pytorch_model",
    "zero_snr_epsilon": "rescale_betas_zero_snr", "learned_variance": 'variance_type="learned"',
    "class_from_embedding": "class_embed_type", "unknown_block": "KDownBlock2D",
    "no_weights": "diffusion_pytorch_model",
}  # fmt: skip


def test_what_cannot_be_is_refused_before_weights_are_read():
    assert REFUSED.keys() == INDEX["refused"].keys() == {path.name for path in (FOLDER / "refused").iterdir()}
    for name, says in REFUSED.items():
        assert says in str(refused(FOLDER / "refused" / name))


@pytest.mark.parametrize("file, field, value", [
    *[(CONFIG, "down_block_types", value) for value in (["SkipDownBlock2D", "AttnDownBlock2D"], ["DownBlock2D"])],
    (CONFIG, "up_block_types", 3), (CONFIG, "up_block_types", ["AttnUpBlock2D", "AttnUpBlock2D"]),
    (CONFIG, "time_embedding_type", "fourier"), (CONFIG, "upsample_type", "resnet"), (CONFIG, "freq_shift", 0),
    (CONFIG, "time_embedding_dim", 64),
    (CONFIG, "add_attention", False), (CONFIG, "attention_head_dim", 48), (CONFIG, "norm_num_groups", None),
    (CONFIG, "attn_norm_num_groups", 8), (CONFIG, "norm_eps", 0), (CONFIG, "out_channels", 6), (CONFIG, "dropout", 2),
    (CONFIG, "layers_per_block", 10**9), (CONFIG, "block_out_channels", [32, "64"]), (CONFIG, "sample_size", [16, 32]),
    (CONFIG, "attention_legacy_order", True), (CONFIG, "mystery\x1b[31m" + "x" * 10000, "\x1b[31m" * 10000),
    (SCHEDULER, "prediction_type", "flow_prediction"), (SCHEDULER, "thresholding", True), (SCHEDULER, "beta_start", 0),
    (SCHEDULER, "beta_start", 0.5), (SCHEDULER, "num_train_timesteps", 10**12), (SCHEDULER, "trained_betas", [0.1, 2]),
    (SCHEDULER, "clip_sample_range", "1"), (SCHEDULER, "variance_type", "learned"),
])  # fmt: skip
def test_fields_that_cannot_be(file, field, value, folder):
    edit(folder / file, **{field: value})
    (folder / WEIGHTS).unlink()  # never opened
    message = str(refused(folder))
    assert field[:7] in message and ("SDDMPipeline" in message) == (file == CONFIG)


def test_schedulers_that_cannot_be(folder):
    edit(folder / SCHEDULER, variance_type="learned_range")  # with 3 channels
    assert "out_channels" in str(refused(folder))
    for name in ("FlowMatchEulerDiscreteScheduler", ["DDPMScheduler"], "Other"):
        edit(folder / SCHEDULER, _class_name=name)
        assert "scheduler" in str(refused(folder))


@pytest.mark.parametrize("file", ["model_index.json", CONFIG, SCHEDULER])
def test_damaged_configurations(file, folder):
    for text in (b"", b"[]", b"[" * 100000, b'"\xed\xa0\x80"'):
        (folder / file).write_bytes(text)
        assert os.path.basename(file) in str(refused(folder))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["conv", 0.5]),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=4), values, max_size=2),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(
    unet=st.dictionaries(st.sampled_from(["_class_name", "mystery", *sorted(FIELDS)]), JSON, max_size=2),
    scheduler=st.dictionaries(st.sampled_from(["_class_name", "timesteps", *PROCESS]), JSON, max_size=2),
    index=st.dictionaries(st.sampled_from(["vqvae", "vae", "text_encoder", "unet", "_class_name"]), JSON, max_size=1),
)
def test_any_values_load_or_are_refused_in_one_line(unet, scheduler, index, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any" / "model"
    if not path.exists():
        shutil.copytree(FOLDER / "ddpm_eps", path)
    for name, changes in (("model_index", index), ("unet/config", unet), ("scheduler/scheduler_config", scheduler)):
        shutil.copy(FOLDER / "ddpm_eps" / f"{name}.json", path / f"{name}.json")
        edit(path / f"{name}.json", **changes)
    try:
        load_model(path)
    except InputError as error:
        assert str(error).isprintable() and len(str(error)) < 1500


def test_folders_that_are_no_model(folder, tmp_path):
    (tmp_path / "x.pt").write_bytes(b"x")
    assert "is a folder" in str(refused(tmp_path)) and "x.pt" in str(refused(tmp_path))
    (tmp_path / "model_index.json").write_text("{}")
    assert "without config.json" in str(refused(tmp_path))
    (folder / "vae").mkdir()
    assert "latent" in str(refused(folder / "unet"))


# ---- the process -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", INDEX["schedules"])
def test_schedules_are_the_librarys(name):
    fields = INDEX["schedules"][name]
    if fields.get("rescale_betas_zero_snr"):
        with pytest.raises(InputError, match="rescale_betas_zero_snr"):
            process_flags(fields)
        return
    flags = process_flags({"_class_name": "DDPMScheduler", **fields})
    # Ours scales its ends with its length.
    assert (flags["noise_schedule"] == "linear") == (name == "linear")
    betas = get_named_beta_schedule(flags["noise_schedule"], flags["diffusion_steps"])
    assert betas.dtype == np.float64 and len(betas) == fields.get("num_train_timesteps", 1000)
    wanted = load_file(FOLDER / "schedules.safetensors")[f"{name}.alphas_cumprod"]
    np.testing.assert_allclose(np.cumprod(1 - betas), wanted.double(), rtol=3e-5, atol=1e-6)


def test_schedules_and_spacings_that_are_none():
    for text in ("linear:0.1", "linear:nan,0.1", "betas:0.1,x", "betas:0.1,0.2,0.3", "cosine:1", "Linear"):
        with pytest.raises(InputError) as caught:
            get_named_beta_schedule(text, 2)
        assert (caught.value.parameter, caught.value.value) == ("noise_schedule", text)
    for text in ("linspace0", "leading201", "trailing-1", "leading200+1", "linspace10+1", "lead10"):
        with pytest.raises(InputError) as caught:
            space_timesteps(200, text)
        assert (caught.value.parameter, caught.value.value) == ("timestep_respacing", text)


def test_timesteps_are_the_librarys():
    lists = json.loads((FOLDER / "timesteps.json").read_text())
    for name, expected in lists.items():
        total, count, spacing, *shifted = name.split("_")
        total, count = int(total[1:]), int(count[1:])
        text = f"{spacing}{count}" + ("+1" if shifted and spacing == "leading" else "")
        if name in INDEX["timesteps"]["wrong"]:
            expected = expected[:count]
        if expected[0] >= total:  # as the library's: leading, shifted by 1, with a stride of 1
            with pytest.raises(InputError, match="an offset up to 0 fits"):
                space_timesteps(total, text)
            continue
        assert sorted(space_timesteps(total, text), reverse=True) == expected, name


def test_noising_and_velocity_are_the_librarys():
    data = load_file(FOLDER / "forward.safetensors")
    diffusion = create_diffusion(predict_v=True)
    noised = diffusion.q_sample(data["x0"], data["t"], data["noise"])
    # The library's own tables are float32: one value differs by 1.13e-6, and by 1.2e-7 from the float64 formula.
    torch.testing.assert_close(noised, data["noised"], rtol=0, atol=1.2e-6)
    velocity = data["velocity"]
    losses = diffusion.training_losses(lambda x, t: velocity, data["x0"], data["t"], noise=data["noise"])
    assert losses["mse"].max() < 1e-12
    torch.testing.assert_close(diffusion._pred_xstart(velocity, noised, data["t"]), data["x0"], rtol=0, atol=1e-5)


RUNS = INDEX["runs"] if (FOLDER / "runs.safetensors").exists() else {}


# `ddim_eta0` is the library's own DDIM, which keeps the network's noise where x_0 is clipped; ours computes it again.
@pytest.mark.parametrize("name", sorted(set(RUNS) - {"ddim_eta0"}))
def test_runs_are_the_librarys(name, tmp_path):
    run, data = RUNS[name], load_file(FOLDER / "runs.safetensors")
    shutil.copytree(FOLDER / run["model"], tmp_path / "m")
    scheduler = {"_class_name": run["scheduler"], **run["config"]}
    (tmp_path / "m" / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    model, info = load_model(tmp_path / "m")
    labels = [] if run["class_labels"] is None else [torch.tensor(run["class_labels"])]
    timesteps, clip = set(run["timesteps"]), info.choose("clip_denoised")
    diffusion = create_diffusion(**{**info.flags, "sigma_small": info.choose("sigma_small")})
    betas = get_named_beta_schedule(info.flags["noise_schedule"], info.flags["diffusion_steps"])
    kinds = {name: getattr(diffusion, name) for name in ("model_mean_type", "model_var_type")}
    spaced = type(diffusion)(timesteps, betas=betas, **kinds)
    step = spaced.p_sample if run["eta"] is None else partial(spaced.ddim_sample, eta=run["eta"])
    states, noise = data[f"{name}.states"], data[f"{name}.noise"]
    x = states[0]
    for k in range(len(timesteps)):
        i = len(timesteps) - 1 - k
        t = torch.full((len(x),), i)
        for start, tolerance in ((states[k], run["atol_step"]), (x, run["atol_run"])):
            with torch.no_grad():
                out = step(lambda x, t: model(x, t, *labels), start, t, clip_denoised=clip, noise=noise[k])
            if k + 1 < len(timesteps) or min(timesteps) == 0 or run["eta"] == 0:
                assert (out["sample"] - states[k + 1]).abs().max() <= tolerance, (k, tolerance)
        torch.testing.assert_close(out["pred_xstart"], data[f"{name}.pred_original"][k], rtol=0, atol=run["atol_run"])
        x = out["sample"]


# ---- writing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_are_the_same_bits(name, tmp_path):
    ours, theirs = tmp_path / "m.safetensors", tmp_path / "folder"
    convert(FOLDER / name, ours)
    convert(ours, theirs)
    (first, known), (model, info), (again, other) = map(load_model, (FOLDER / name, ours, theirs))
    assert (info.model_type, info.flags, info.scheduler) == (known.model_type, known.flags, known.scheduler)
    assert {**other.flags, "num_heads": info.flags["num_heads"]} == info.flags
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]) and torch.equal(value, first.state_dict()[key]), key
    files = {path.relative_to(theirs).as_posix() for path in theirs.rglob("*") if path.is_file()}
    assert files == {"README.md", "model_index.json", SCHEDULER, CONFIG, WEIGHTS}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "m.safetensors"]


@pytest.mark.parametrize("target", ["folder", "m3.safetensors"])
def test_legacy_order_becomes_the_new_one_and_a_variance_can_be_dropped(target, tmp_path):
    """The golden ADM model with the legacy order of q, k, v and a learned variance."""
    name = "unet_updown_scaleshift_learnsigma"
    data, flags = golden(name), golden_index()[name]["flags"]
    state = {key.removeprefix("model."): value for key, value in data.items() if key.startswith("model.")}
    path, target = tmp_path / "m.safetensors", tmp_path / target
    save_model(path, state, model_type="ADM", flags=flags, metadata={"licence": "MIT"})
    convert(path, tmp_path / "whole")
    convert(path, target, drop_variance=True)
    assert 'license: "MIT"' in (tmp_path / "whole" / "README.md").read_text()
    for converted, channels in ((tmp_path / "whole", 6), (target, 3)):
        model, info = load_model(converted)
        assert info.flags["use_new_attention_order"] is not (converted.suffix == ".safetensors")
        assert info.flags["learn_sigma"] is (channels == 6)
        with torch.no_grad():
            output, wanted = model(data["input.x"], data["input.t"]), data["output"][:, :channels]
        assert (output - wanted).abs().max() <= TOLERANCE * max(1, wanted.abs().max())


@pytest.mark.parametrize("flags, says", [
    ({"num_head_channels": -1, "num_heads": 4}, "num_heads=4 in layers of 32, 64 channels"),
    ({"num_head_channels": -1, "num_heads": 2, "num_heads_upsample": 4}, "num_heads_upsample"),
    ({"rescale_timesteps": True, "diffusion_steps": 4000}, "rescale_timesteps"),
    ({"num_channels": 64, "channel_mult": "0.5,1"}, "in diffusers both are one"),
])  # fmt: skip
def test_models_that_the_library_cannot_express(flags, says, tmp_path):
    flags = {**MODEL, "attention_resolutions": "16,8", **flags}
    process = {name: flags.pop(name) for name in ("rescale_timesteps", "diffusion_steps") if name in flags}
    save_model(tmp_path / "m.safetensors", create_model(**flags), model_type="ADM", flags={**flags, **process})
    with pytest.raises(InputError, match=says):
        convert(tmp_path / "m.safetensors", tmp_path / "folder")
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_nothing_is_overwritten_and_what_would_differ_is_not_written(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    for target in (tmp_path / "there", tmp_path / "no" / "folder"):
        with pytest.raises(InputError) as caught:
            convert(FOLDER / "ddpm_eps", target)
        assert (caught.value.parameter, caught.value.value) == ("save_dir", str(target))
    with pytest.raises(InputError, match="classifier or extractor"):
        convert(ROOT / "models" / "fluent3d_64_dse.safetensors", tmp_path / "folder")
    monkeypatch.setattr("guided_diffusion.checkpoint.loading.TOLERANCE", -1.0)
    with pytest.raises(InputError, match="would differ"):
        convert(FOLDER / "ddpm_eps", tmp_path / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_fingerprints_tell_models_apart(folder, tmp_path):
    first = fingerprint(folder)
    assert first.startswith("sha256 ") and len(first) == 71
    assert first == fingerprint(FOLDER / "ddpm_eps")  # where it lies does not matter
    (folder / "unet" / "notes.txt").write_text("x")
    assert fingerprint(folder) == first
    edit(folder / SCHEDULER, variance_type="fixed_large")
    second = fingerprint(folder)
    state = read_weights(folder)
    save_file({**state, "conv_out.bias": state["conv_out.bias"] + 1}, folder / WEIGHTS)
    assert len({first, second, fingerprint(folder)}) == 3
    (tmp_path / "x.pt").write_bytes(b"abc")
    assert fingerprint(tmp_path / "x.pt") == "sha256 ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# ---- the hub ---------------------------------------------------------------------------------------------------------


def test_which_paths_name_a_model_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for path in ("google/ddpm-cat-256", "hf://google/ddpm-cat-256@main", "google/ddpm-cat-256@0123abc"):
        assert remote.is_id(path)
    # The folder models exists.
    for path in ("nowhere/afhq.safetensors", "models/afhq", "/tmp/x", "a/b/c", "gs://a/b", "x"):
        assert not remote.is_id(path)
    shutil.copytree(FOLDER / "ddpm_eps", tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert_golden("owner/name", "ddpm_eps")  # existing paths win
    with pytest.raises(InputError, match=r"google/x does not exist here; .* pip install huggingface_hub"):
        load_model("google/x")


def test_models_of_the_hub_load_from_the_cache(tmp_path, monkeypatch, caplog):
    """A cache that holds owner/name, and no network."""
    constants = pytest.importorskip("huggingface_hub.constants")
    repository, commit = tmp_path / "hub" / "models--owner--name", "0123456789abcdef" * 2 + "01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "blobs").mkdir()
    snapshot = shutil.copytree(FOLDER / "ddpm_eps", repository / "snapshots" / commit)
    for n, path in enumerate(sorted(snapshot.rglob("*.json"))):
        path.rename(repository / "blobs" / str(n))
        path.symlink_to(os.path.relpath(repository / "blobs" / str(n), path.parent))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO):
        assert_golden("owner/name", "ddpm_eps")
    assert commit in caplog.text and "cached in" in caplog.text
    assert_golden(f"hf://owner/name@{commit}", "ddpm_eps")
    assert fingerprint("owner/name") == f"owner/name@{commit}"
    for path in ("owner/other", "hf://owner/name@v2", "hf://../x"):
        with pytest.raises(InputError) as caught:
            load_model(path)
        assert str(caught.value).isprintable() and path.removeprefix("hf://").split("@")[0] in str(caught.value)


def test_commands_take_a_folder_and_notice_that_it_changed(folder, tmp_path):
    references = ("--base_samples", make_references(tmp_path / "refs", ["a.png"]))
    common = ("--model_path", folder, "--timestep_respacing", "leading6", "--device", "cpu", "--save_dir")
    guided = (*common, tmp_path / "sddm", *references, "--range_t", 2, "--area", 4, "--energy", "dct")
    for name, flags in (
        ("ilvr_sample", (*common, tmp_path / "ilvr", *references, "--down_N", 4, "--range_t", 1)),
        ("image_sample", (*common, tmp_path / "drawn", "--num_samples", 2)),
        ("ae_sample", guided),
    ):
        assert run_script(name, *flags) == 0
    assert all(pictures(tmp_path / name) for name in ("sddm", "ilvr", "drawn"))
    edit(folder / SCHEDULER, variance_type="fixed_large")
    with pytest.raises(InputError, match="another"):
        run_script("ae_sample", *guided)


def test_the_command_converts(tmp_path, capsys):
    script, target = load_script("convert"), tmp_path / "m.safetensors"
    flags = ["--model_path", str(FOLDER / "ddpm_eps"), "--save_dir", str(target)]
    assert script.main(script.create_parser().parse(flags)) == 0
    assert target.exists() and "is written" in capsys.readouterr().out
