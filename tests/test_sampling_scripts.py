"""The sampling commands as their users run them: the release's command line, pictures, energies, methods, errors."""

import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from conftest import ROOT, golden
from PIL import Image
from scripts_in_process import load_script, message, run_script

from guided_diffusion import baselines, energy, sddm
from guided_diffusion.checkpoint import load_model
from guided_diffusion.cli import main as command
from guided_diffusion.errors import InputError
from guided_diffusion.image_datasets import list_references, load_image, to_tensor, to_uint8
from guided_diffusion.run.noise import ImageNoise
from guided_diffusion.script_util import create_diffusion, create_model

# The command line of the release's README, but for the numbers of steps, the model's file and the folders.
RELEASE = (
    "--attention_resolutions 16 --class_cond False --diffusion_steps 1000 --dropout 0.0 --image_size 256 "
    "--learn_sigma False --noise_schedule linear --num_channels 128 --num_head_channels 64 --num_res_blocks 2 "
    "--resblock_updown True --use_fp16 False --use_scale_shift_norm True --area 16 --detail_merge False"
)
# All other flags of the release, some of which do nothing here.
REST_OF_RELEASE = (
    "--num_heads 4 --num_heads_upsample -1 --use_checkpoint False --use_new_attention_order False "
    "--predict_xstart False --rescale_timesteps False "
    "--rescale_learned_sigmas False --use_kl False --batch_size 4 --num_samples 1 "
    "--clip_denoised True --use_ddim False --classifier_scale 1.0 --vggdepth 1 --affine True --losstype l2 "
    "--init_with_blockadain True --diffusionmodel ADM"
)
SDDM = ("--timestep_respacing", "6", "--range_t", "2", "--area", "4", "--seed", "3")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A tiny model, networks for the energies, and three references; no test writes here."""
    root = tmp_path_factory.mktemp("data")
    tiny.make_model(root / "model.safetensors")
    tiny.make_encoder(root / "dse.safetensors", 3, head="I2Iout")
    tiny.make_encoder(root / "classifier.safetensors", 3)
    vgg = golden("energy_vgg_badain")
    torch.save({k.removeprefix("encoder."): v for k, v in vgg.items() if k.startswith("encoder.")}, root / "vgg.pth")
    tiny.make_references(root / "ref", ("a.png", "b.png", "more/c.png"))
    return root


def run(name, data, out, *flags):
    """One script in this process; returns its run.json."""
    given = ["--model_path", data / "model.safetensors", "--save_dir", out, "--device", "cpu"]
    given += [] if name == "image_sample" else ["--base_samples", data / "ref"]
    given += SDDM if name == "ae_sample" else []
    assert run_script(name, *given, *flags) == 0
    return tiny.record(out)


def library(data, sampler, steps, seed=0, names=None, **options):
    """What a sampler makes of the references, or of nothing but names, with the engine's noise: images by name."""
    model, info = load_model(str(data / "model.safetensors"))
    model.to(memory_format=torch.channels_last)
    diffusion = create_diffusion(**{**info.flags, "timestep_respacing": steps})
    references = list_references(str(data / "ref"))
    ref = torch.zeros(len(names), 3, 16, 16) if names else to_tensor([load_image(r, 16) for r in references])
    names = names or [reference.name for reference in references]
    noise = ImageNoise([f"{seed}/{name}#0" for name in names], torch.device("cpu"))
    return dict(zip(names, to_uint8(sampler(model, diffusion, ref, noise=noise, **options)), strict=True))


def translated(data, **options):
    """What the library makes of the references with the flags SDDM."""
    return library(data, sddm.sample, "6", 3, **{"blocks": 4, "range_t": 2, **options})


def differ(found, other):
    return any(np.abs(found[name].astype(int) - other[name]).max() > 1 for name in found)


# ---- ae_sample.py ---------------------------------------------------------------------------------------------------


def test_the_release_command_line_runs_unchanged(tmp_path):
    """With random weights of the README's architecture (131.7 million parameters, 256 pixels) and four steps."""
    flags = RELEASE.split()
    torch.manual_seed(0)
    model = create_model(
        image_size=256, num_channels=128, num_res_blocks=2, attention_resolutions="16", num_head_channels=64,
        resblock_updown=True, use_scale_shift_norm=True, learn_sigma=False,
    )  # fmt: skip
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 131.7
    (tmp_path / "models").mkdir()
    torch.save(model.state_dict(), tmp_path / "models" / "afhq.pt")
    del model
    (tmp_path / "ref_imgs").mkdir()
    for name in ("star.png", "heart.png"):
        shutil.copy(ROOT / "ref_imgs" / name, tmp_path / "ref_imgs")
    paths = ["--model_path", "models/afhq.pt", "--base_samples", "ref_imgs", "--save_dir", "output"]
    steps = ["--timestep_respacing", "4", "--range_t", "1"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    script = [sys.executable, str(ROOT / "scripts" / "ae_sample.py"), *flags, *steps, *paths, *REST_OF_RELEASE.split()]
    done = subprocess.run(script, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("classifier_scale 1.0", "affine True", "losstype l2", "diffusionmodel ADM"):
        assert f"--{name} has no effect" in done.stderr
    assert "--use_kl" not in done.stderr and "1 done, 0 already present, 0 failed" in done.stdout
    assert sorted(os.listdir(tmp_path / "output")) == ["grid.png", "heart.png", "images.jsonl", "run.json"]
    made = np.asarray(Image.open(tmp_path / "output" / "heart.png"))
    assert made.shape == (256, 256, 3) and made.std() > 1
    record = tiny.record(tmp_path / "output")
    assert record["model_evaluations"] == 4 and record["settings"]["num_channels"] == 128


ENERGIES = {
    "vgg": ("--vgg_path {data}/vgg.pth", lambda data: [energy.vgg(data / "vgg.pth", 4)]),
    "none": ("--variant released", lambda data: []),
    "dse,low_pass,dct": (
        "--down_N 4 --dsepath {data}/dse.safetensors",
        lambda data: [energy.dse(load_model(data / "dse.safetensors")[0]), energy.low_pass(4), energy.dct(4)],
    ),
    "classifier": (
        "--classifier_path {data}/classifier.safetensors --target_class 2",
        lambda data: [energy.classifier(load_model(data / "classifier.safetensors")[0], 2)],
    ),
}


@pytest.mark.parametrize("names", ENERGIES)
def test_energies_of_the_command_are_the_librarys(data, tmp_path, names):
    flags, make = ENERGIES[names]
    run("ae_sample", data, tmp_path / "out", "--energy", names, *flags.format(data=data).split())
    variant = "released" if "released" in flags else "manifold"
    tiny.assert_within_one_level(
        tiny.pictures(tmp_path / "out"), translated(data, variant=variant, energies=make(data))
    )


OPTIONS = {
    "--detail_merge True": {"detail_merge": True},
    "--moo linear": {"moo": "linear"},
    "--manifold low_pass --down_N 4": {"manifold": "low_pass", "down_n": 4},
    "--start_t 0.7": {"start": 4},
}


@pytest.mark.parametrize("flags", OPTIONS)
def test_flags_of_the_method_reach_the_sampler(data, tmp_path, flags):
    record = run("ae_sample", data, tmp_path / "out", "--energy", "dct", *flags.split())
    wanted = translated(data, energies=[energy.dct(4)], **OPTIONS[flags])
    tiny.assert_within_one_level(tiny.pictures(tmp_path / "out"), wanted)
    assert differ(wanted, translated(data, energies=[energy.dct(4)]))
    start = OPTIONS[flags].get("start", 6)
    assert record["settings"].get("start_t", 6) == record["model_evaluations"] == start
    assert ("down_N" in record["settings"]) == ("down_N" in flags)
    assert 0 <= record["negative_impact"] <= 1 and len(record["monitor"]["steps"]) == start - 3


@pytest.mark.parametrize("start, range_t, guided", [(5, 4, False), (5, 3, True), (0.5, 0.5, False)])
def test_a_run_without_a_guided_step_says_so(data, tmp_path, caplog, start, range_t, guided):
    run("ae_sample", data, tmp_path / "out", "--energy", "dct", "--range_t", range_t, "--start_t", start)
    assert (f"--range_t {range_t} leaves no step to guide" in caplog.text) != guided


def test_a_share_of_the_schedule_is_the_step_that_it_stands_for(data, tmp_path, caplog):
    caplog.set_level("INFO")
    out, flags = tmp_path / "out", ("--energy", "dct", "--batch_size", 1)
    record = run("ae_sample", data, out, *flags, "--range_t", "0.3")
    assert "--range_t 0.3 is step 2 of 6" in caplog.text and record["settings"]["range_t"] == 2
    made = tiny.files(out)
    tiny.assert_within_one_level(tiny.pictures(out), translated(data, energies=[energy.dct(4)]))
    # Either resumes the other; another step is another run.
    for given in ("2", "0.3"):
        (out / "b.png").unlink()
        run("ae_sample", data, out, *flags, "--range_t", given)
        assert tiny.files(out) == made
    with pytest.raises(InputError) as caught:
        run("ae_sample", data, out, *flags, "--range_t", "0.5")
    assert "--range_t was 2 and is 3" in message("ae_sample", caught.value)


def test_trajectories_show_the_prediction_or_the_state(data, tmp_path):
    states = {}

    def keep(state):
        states.update({(state["i"], key): to_uint8(state[key])[-1] for key in ("x", "pred_xstart")})

    translated(data, energies=[], callback=keep)  # the last reference is more/c.png
    flags = ("--energy", "none", "--save_trajectory")
    for shown, key in (("xt", "x"), ("x0", "pred_xstart")):
        record = run("ae_sample", data, tmp_path / shown, *flags, "--trajectory", shown)
        assert record["settings"].get("trajectory", "x0") == shown
        with Image.open(tmp_path / shown / "trajectory" / "more" / "c.gif") as animation:
            assert animation.n_frames >= 6
            frame = np.asarray(animation.convert("RGB")).astype(int)
        other = states[5, "x" if key == "pred_xstart" else "pred_xstart"]
        # 16 by 16 pixels have no more colours than a GIF.
        assert np.abs(frame - states[5, key]).mean() < 8 < np.abs(frame - other.astype(int)).mean()
    with pytest.raises(InputError) as caught:
        run("ae_sample", data, tmp_path / "xt", *flags)
    assert "--trajectory was 'xt' and is not recorded" in message("ae_sample", caught.value)


def test_the_default_energy_is_said(data, tmp_path, caplog):
    caplog.set_level("INFO")
    first = run("ae_sample", data, tmp_path / "a", "--vgg_path", tmp_path / "missing.pth")
    assert "energy dct (there is no" in caplog.text and "missing.pth" in caplog.text
    second = run("ae_sample", data, tmp_path / "b", "--vgg_path", data / "vgg.pth")
    assert [record["settings"]["energy"] for record in (first, second)] == [["dct"], ["vgg"]]


# ---- the other methods ----------------------------------------------------------------------------------------------

METHODS = {
    "ilvr_sample --timestep_respacing 6 --down_N 4 --range_t 2 --use_ddim False":
        ("ilvr", 6, {"steps": "6", "down_n": 4, "range_t": 2}),
    "sdedit_sample --timestep_respacing 12 --t 7 --sigma_small False":
        ("sdedit", 7, {"steps": "12", "start": 7, "variance": "fixed_large"}),
    "egsde_sample --timestep_respacing 10 --t 5 --ls 3 --li 0.2 --down_N 4 --dsepath {data}/dse.safetensors --seed 3":
        ("egsde", 5, {"steps": "10", "seed": 3, "start": 5, "ls": 3, "li": 0.2, "down_n": 4}),
}  # fmt: skip


@pytest.mark.parametrize("line", METHODS)
def test_methods_of_the_commands_are_the_librarys(data, tmp_path, line):
    name, *flags = line.format(data=data).split()
    method, evaluations, options = METHODS[line]
    record = run(name, data, tmp_path / "out", *flags)
    assert record["settings"]["method"] == method and record["model_evaluations"] == evaluations
    assert "use_ddim" not in record["settings"]
    if method == "egsde":
        assert record["settings"]["dsepath"].startswith("sha256 ")
        options = {**options, "encoder": load_model(str(data / "dse.safetensors"))[0]}
    wanted = library(data, getattr(baselines, method), **options)
    tiny.assert_within_one_level(tiny.pictures(tmp_path / "out"), wanted)
    if method == "egsde":
        assert differ(wanted, library(data, baselines.egsde, **{**options, "ls": 0}))


def test_images_without_references_are_a_series_by_number(data, tmp_path):
    flags = ("--timestep_respacing", "6", "--npz", "True")
    record = run("image_sample", data, tmp_path / "a", *flags, "--num_samples", 5, "--batch_size", 4)
    assert record["counts"] == {"references": 5, "outputs": 5, "failed": 0}
    found = tiny.pictures(tmp_path / "a")
    assert list(found) == [f"{n:06d}.png" for n in range(5)]
    with np.load(tmp_path / "a" / "samples_5x16x16x3.npz") as file:
        assert file.files == ["arr_0"]
        np.testing.assert_array_equal(file["arr_0"], np.stack(list(found.values())))
    tiny.assert_within_one_level(found, library(data, baselines.unconditional, "6", names=list(found)))
    # More images leave those that are there alone and add to the same series.
    run("image_sample", data, tmp_path / "a", *flags, "--num_samples", 7, "--batch_size", 4)
    more = tiny.pictures(tmp_path / "a")
    assert len(more) == 7 and all(np.array_equal(more[name], image) for name, image in found.items())
    run("image_sample", data, tmp_path / "b", *flags[:2], "--num_samples", 7, "--batch_size", 1)
    tiny.assert_within_one_level(tiny.pictures(tmp_path / "b"), more)
    assert len({image.tobytes() for image in more.values()}) == 7


# ---- bad flags ------------------------------------------------------------------------------------------------------

CLASSIFIER = "ae_sample --energy classifier --classifier_path {data}/classifier.safetensors"
DIVIDE = "it must be at least 1 and divide the image size 16"
ERRORS = {
    "ae_sample --area 16": "--area is 16; it must divide the image size 16 into blocks of at least two pixels (8 and 4",
    "ae_sample --range_t 1.5": "--range_t is 1.5; a schedule of 6 steps takes 0 to 5, or a share of it below 1",
    "ae_sample --timestep_respacing 0": "--timestep_respacing is '0'; it asks for 0 steps out of 1000",
    "ae_sample --noise_schedule cosine": "--noise_schedule is 'cosine'; {data}/model.safetensors was trained with",
    "ae_sample --class_index 1": "--class_index is 1; the model is not class-conditional",
    "ae_sample --energy vgg,dct": "--vgg_path is '{data}/nothing.pth'; no such file, and --energy vgg needs it",
    "ae_sample --energy wavelet": "--energy is 'wavelet'; it can be vgg, dct, dse, low_pass, classifier or none",
    "ae_sample --energy dse": "--dsepath is missing; --energy dse needs it",
    "ae_sample --energy dse --dsepath {data}/model.safetensors": "--dsepath is '{data}/model.safetensors'; it is a "
    "diffusion model, not a classifier or extractor",
    CLASSIFIER: "--target_class is missing; --energy classifier needs it",
    f"{CLASSIFIER} --target_class 3": "--target_class is 3; {data}/classifier.safetensors has classes 0 to 2",
    "ae_sample --model_path {data}/dse.safetensors": "--model_path is '{data}/dse.safetensors'; it is a classifier or "
    "extractor, not a diffusion model",
    "ae_sample --base_samples {data}/nowhere": "--base_samples is '{data}/nowhere'; no such file or folder",
    "ae_sample --use_fp16 True --precision bf16": "--precision is 'bf16'; --use_fp16 True contradicts it",
    "ae_sample --eta 0.5": "--eta is 0.5; --sampler ancestral has none",
    "ae_sample --manifold low_pass --down_N 5": f"--down_N is 5; {DIVIDE}",
    "sdedit_sample --timestep_respacing 6": "--t is 500; a schedule of 6 steps takes 1 to 6",
    "egsde_sample": "--dsepath is missing; --ls 500 needs it; --ls 0 does without the realism energy",
    "egsde_sample --ls nan": "--ls is nan; it must be a finite number",
    "image_sample --eta 0.5": "--eta is 0.5; it is for --use_ddim True",
}


@pytest.mark.parametrize("line", ERRORS)
def test_bad_flags_are_one_line_before_anything_is_written(data, tmp_path, line):
    name, *flags = line.format(data=data).split()
    vgg = ("--vgg_path", data / "nothing.pth") if name == "ae_sample" else ()
    with pytest.raises(InputError) as caught:
        run(name, data, tmp_path / "out", *vgg, *flags)
    text = message(name, caught.value)
    assert ERRORS[line].format(data=data) in text and "\n" not in text
    assert not (tmp_path / "out").exists() or not os.listdir(tmp_path / "out")


@pytest.mark.parametrize(
    "flags, message",
    [
        ("", "--base_samples is missing; it is required: folder of reference images"),
        ("--base_samples {data}/ref", "--model_path is missing; it is required: checkpoint, diffusers folder"),
        ("--base_samples {data}/ref --model_path m.pt", "m.pt does not exist"),
        ("--model_path m --base_samples r --area x", "argument --area: 'x' is not a whole number"),
        ("--model_path m --base_samples r --batch_size big", "--batch_size is 'big'; it must be a whole number above"),
        ("--model_path m --base_samples r --rangt 5", "unrecognized arguments: --rangt 5; did you mean --range_t?"),
    ],
)
def test_flags_that_cannot_be_read_end_with_one_line(data, tmp_path, monkeypatch, capsys, flags, message):
    """With the command's own handling of errors: one line and exit status 2."""
    monkeypatch.chdir(tmp_path)
    script = load_script("ae_sample")
    monkeypatch.setattr(sys, "argv", ["ae_sample.py", *flags.format(data=data).split()])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(SystemExit) as caught:
        command.run(script.translate, script.create_parser())
    for number, handler in handlers.items():
        signal.signal(number, handler)
    line = capsys.readouterr().err
    assert caught.value.code == 2 and line.count("\n") == 1 and line.startswith("error: ") and message in line
