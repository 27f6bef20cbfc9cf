"""ae_sample.py as its users run it: processes, the release's command line, pictures, energies, errors."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import golden
from PIL import Image
from scripts_in_process import load_script, message, run_script

from guided_diffusion import energy, sddm
from guided_diffusion.checkpoint import load_model
from guided_diffusion.cli import main as command
from guided_diffusion.errors import InputError
from guided_diffusion.image_datasets import list_references, load_image, to_tensor, to_uint8
from guided_diffusion.run.noise import ImageNoise
from guided_diffusion.script_util import create_diffusion, create_model

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("--timestep_respacing", "6", "--range_t", "2", "--area", "4", "--seed", "3", "--device", "cpu")
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


def ae_sample(*flags, cwd, timeout=600):
    """A process of its own, without PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(ROOT / "scripts" / "ae_sample.py"), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)


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


def translated(data, seed=3, **options):
    """What the library itself makes of the references with the flags SMALL: uint8 images by output name."""
    model, info = load_model(data / "model.safetensors")
    diffusion = create_diffusion(**{**info.flags, "timestep_respacing": "6"})
    images = {}
    for reference in list_references(data / "ref"):
        ref = to_tensor([load_image(reference, 16)])
        noise = ImageNoise([f"{seed}/{reference.name}#0"], ref.device)
        x = sddm.sample(model, diffusion, ref, blocks=4, range_t=2, noise=noise, **options)
        images[reference.name] = to_uint8(x)[0]
    return images


def test_the_release_command_line_runs_unchanged(tmp_path):
    """With random weights of the README's architecture (131.7 million parameters, 256 pixels) and four steps."""
    flags = RELEASE.split()
    given = dict(zip((flag.removeprefix("--") for flag in flags[::2]), flags[1::2]))
    architecture = {
        "image_size": 256, "num_channels": 128, "num_res_blocks": 2, "attention_resolutions": "16",
        "num_head_channels": 64, "resblock_updown": True, "use_scale_shift_norm": True, "learn_sigma": False,
    }  # fmt: skip
    assert all(str(value) == given[name] for name, value in architecture.items())
    torch.manual_seed(0)
    model = create_model(**architecture)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 131.7
    (tmp_path / "models").mkdir()
    torch.save(model.state_dict(), tmp_path / "models" / "afhq.pt")
    del model
    (tmp_path / "ref_imgs").mkdir()
    for name in ("star.png", "heart.png"):
        shutil.copy(ROOT / "ref_imgs" / name, tmp_path / "ref_imgs")
    paths = ["--model_path", "models/afhq.pt", "--base_samples", "ref_imgs", "--save_dir", "output"]
    steps = ["--timestep_respacing", "4", "--range_t", "1"]
    done = ae_sample(*flags, *steps, *paths, *REST_OF_RELEASE.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("classifier_scale 1.0", "affine True", "losstype l2", "diffusionmodel ADM"):
        assert f"--{name} has no effect" in done.stderr
    assert "1 done, 0 already present, 0 failed" in done.stdout
    assert sorted(os.listdir(tmp_path / "output")) == ["grid.png", "heart.png", "images.jsonl", "run.json"]
    made = np.asarray(Image.open(tmp_path / "output" / "heart.png"))
    assert made.shape == (256, 256, 3) and made.std() > 1
    record = json.loads((tmp_path / "output" / "run.json").read_text())
    assert record["model_evaluations"] == 4 and record["settings"]["num_channels"] == 128


def test_pictures_grid_and_trajectories_from_another_folder(data, tmp_path):
    shutil.copytree(data / "ref", tmp_path / "my pictures")
    (tmp_path / "my pictures" / "Ärger.png").write_bytes((data / "ref" / "a.png").read_bytes())
    done = ae_sample(
        "--model_path", data / "model.safetensors", "--base_samples", "my pictures", *SMALL, "--energy", "dct",
        "--save_trajectory", "--batch_size", "3", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "4 done, 0 already present, 0 failed" in done.stdout and "output/grid.png" in done.stdout.replace(
        os.sep, "/"
    )
    assert "100%, 4/4 images, step 24/24" in done.stderr
    out = tmp_path / "output"
    with Image.open(out / "grid.png") as grid:
        assert grid.size[0] > 2 * 128 and grid.size[1] > 4 * 128  # four pairs below each other
    for name in ("a", "more/c", "Ärger"):
        assert (out / f"{name}.png").exists() and (out / "trajectory" / f"{name}.gif").exists()


ENERGIES = {
    "vgg": (("--vgg_path", "{data}/vgg.pth"), lambda data: [energy.vgg(data / "vgg.pth", 4)]),
    "none": ((), lambda data: []),
    "low_pass": (("--down_N", "4"), lambda data: [energy.low_pass(4)]),
    "dse,low_pass,dct": (
        ("--down_N", "4", "--dsepath", "{data}/dse.safetensors"),
        lambda data: [energy.dse(load_model(data / "dse.safetensors")[0]), energy.low_pass(4), energy.dct(4)],
    ),
    "classifier": (
        ("--classifier_path", "{data}/classifier.safetensors", "--target_class", "2"),
        lambda data: [energy.classifier(load_model(data / "classifier.safetensors")[0], 2)],
    ),
}


def run_here(data, out, *flags):
    """The command in this process; returns its exit status."""
    given = ["--model_path", data / "model.safetensors", "--base_samples", data / "ref", "--save_dir", out]
    return run_script("ae_sample", *given, *SMALL, *flags)


@pytest.mark.parametrize("variant", ["manifold", "released"])
@pytest.mark.parametrize("names", ENERGIES)
def test_energies_of_the_command_are_the_librarys(data, tmp_path, names, variant):
    flags, make = ENERGIES[names]
    flags = [flag.format(data=data) for flag in flags]
    assert run_here(data, tmp_path / "out", "--energy", names, "--variant", variant, "--batch_size", 1, *flags) == 0
    tiny.assert_within_one_level(
        tiny.pictures(tmp_path / "out"), translated(data, variant=variant, energies=make(data))
    )


def test_other_flags_of_the_method_reach_the_sampler(data, tmp_path):
    assert run_here(data, tmp_path / "out", "--energy", "dct", "--detail_merge", "True", "--batch_size", 1) == 0
    merged = translated(data, energies=[energy.dct(4)], detail_merge=True)
    tiny.assert_within_one_level(tiny.pictures(tmp_path / "out"), merged)
    assert any(
        np.abs(merged[n].astype(int) - image).max() > 1
        for n, image in translated(data, energies=[energy.dct(4)]).items()
    )


@pytest.mark.parametrize("start, range_t, guided", [(5, 4, False), (5, 3, True), (0.5, 0.5, False)])
def test_a_run_without_a_guided_step_says_so(data, tmp_path, caplog, start, range_t, guided):
    assert run_here(data, tmp_path / "out", "--energy", "dct", "--range_t", range_t, "--start_t", start) == 0
    assert (f"--range_t {range_t} leaves no step to guide" in caplog.text) != guided


def test_a_share_of_the_schedule_is_the_step_that_it_stands_for(data, tmp_path, caplog):
    caplog.set_level("INFO")
    out = tmp_path / "out"
    assert run_here(data, out, "--energy", "dct", "--range_t", "0.3", "--batch_size", 1) == 0
    assert "--range_t 0.3 is step 2 of 6" in caplog.text and tiny.record(out)["settings"]["range_t"] == 2
    made = tiny.files(out)
    tiny.assert_within_one_level(tiny.pictures(out), translated(data, energies=[energy.dct(4)]))
    # Either resumes the other; another step is another run.
    for given in ("2", "0.3"):
        (out / "b.png").unlink()
        assert run_here(data, out, "--energy", "dct", "--range_t", given, "--batch_size", 1) == 0
        assert tiny.files(out) == made
    with pytest.raises(InputError) as caught:
        run_here(data, out, "--energy", "dct", "--range_t", "0.5", "--batch_size", 1)
    assert "--range_t was 2 and is 3" in message("ae_sample", caught.value)


@pytest.mark.parametrize("given, step", [("4", 4), ("0.5", 3)])
def test_a_late_start(data, tmp_path, given, step):
    assert run_here(data, tmp_path / "out", "--energy", "dct", "--start_t", given, "--batch_size", 1) == 0
    record = tiny.record(tmp_path / "out")
    assert record["settings"]["start_t"] == step and record["model_evaluations"] == step
    wanted = translated(data, energies=[energy.dct(4)], start=step)
    tiny.assert_within_one_level(tiny.pictures(tmp_path / "out"), wanted)
    assert any(
        np.abs(wanted[n].astype(int) - image).max() > 1
        for n, image in translated(data, energies=[energy.dct(4)]).items()
    )


def test_trajectories_show_the_prediction_or_the_state(data, tmp_path):
    states = {}

    def keep(state):
        states.update({(state["i"], key): to_uint8(state[key])[0] for key in ("x", "pred_xstart")})

    wanted = translated(data, energies=[], callback=keep)  # its last reference is more/c.png
    flags = ("--energy", "none", "--save_trajectory", "--batch_size", 1)
    for shown, key in (("xt", "x"), ("x0", "pred_xstart")):
        out = tmp_path / shown
        assert run_here(data, out, *flags, "--trajectory", shown) == 0
        assert tiny.record(out)["settings"].get("trajectory", "x0") == shown
        with Image.open(out / "trajectory" / "more" / "c.gif") as animation:
            assert animation.n_frames >= 6
            frame = np.asarray(animation.convert("RGB")).astype(int)
        other = states[5, "x" if key == "pred_xstart" else "pred_xstart"]
        # 16 by 16 pixels have no more colours than a GIF.
        assert np.abs(frame - states[5, key]).mean() < 8 < np.abs(frame - other.astype(int)).mean()
    found = tiny.pictures(tmp_path / "xt")
    tiny.assert_within_one_level({name: found[name] for name in wanted}, wanted)
    with pytest.raises(InputError) as caught:
        run_here(data, tmp_path / "xt", *flags)
    assert "--trajectory was 'xt' and is not recorded" in message("ae_sample", caught.value)


def test_the_default_energy_is_said(data, tmp_path, caplog):
    caplog.set_level("INFO")
    assert run_here(data, tmp_path / "a", "--vgg_path", tmp_path / "missing.pth") == 0
    assert "energy dct (there is no" in caplog.text and "missing.pth" in caplog.text
    assert run_here(data, tmp_path / "b", "--vgg_path", data / "vgg.pth") == 0
    energies = [json.loads((tmp_path / run / "run.json").read_text())["settings"]["energy"] for run in "ab"]
    assert energies == [["dct"], ["vgg"]]


CLASSIFIER = "--energy classifier --classifier_path {data}/classifier.safetensors"
ERRORS = {
    "--area 16": "--area is 16; it must divide the image size 16 into blocks of at least two pixels (8 and 4 do)",
    "--range_t 1.5": "--range_t is 1.5; a schedule of 6 steps takes 0 to 5, or a share of it below 1",
    "--timestep_respacing 0": "--timestep_respacing is '0'; it asks for 0 steps out of 1000",
    "--timestep_respacing ddim400": "no integer stride",
    "--num_channels 64": "--num_channels is 64; the tensors of {data}/model.safetensors have num_channels=32",
    "--noise_schedule cosine": "--noise_schedule is 'cosine'; {data}/model.safetensors was trained with",
    "--class_index 1": "--class_index is 1; the model is not class-conditional",
    "--energy vgg,dct": "--vgg_path is '{data}/nothing.pth'; no such file, and --energy vgg needs it",
    "--energy wavelet": "--energy is 'wavelet'; it can be vgg, dct, dse, low_pass, classifier or none",
    "--energy dse": "--dsepath is missing; --energy dse needs it",
    "--energy dse --dsepath {data}/model.safetensors": "--dsepath is '{data}/model.safetensors'; it is a diffusion "
    "model, not a classifier or extractor",
    CLASSIFIER: "--target_class is missing; --energy classifier needs it",
    f"{CLASSIFIER} --target_class 3": "--target_class is 3; {data}/classifier.safetensors has classes 0 to 2",
    "--model_path {data}/dse.safetensors": "--model_path is '{data}/dse.safetensors'; it is a classifier or extractor, "
    "not a diffusion model",
    "--base_samples {data}/nowhere": "--base_samples is '{data}/nowhere'; no such file or folder",
    "--use_fp16 True --precision bf16": "--precision is 'bf16'; --use_fp16 True contradicts it",
    "--start_t 7": "--start_t is 7; a schedule of 6 steps takes 1 to 6, or a share of it below 1",
    "--eta 0.5": "--eta is 0.5; --sampler ancestral has none",
}


@pytest.mark.parametrize("flags", ERRORS)
def test_bad_flags_are_one_line_before_anything_is_written(data, tmp_path, flags):
    vgg = () if "--vgg_path" in flags else ("--vgg_path", data / "nothing.pth")
    with pytest.raises(InputError) as caught:
        run_here(data, tmp_path / "out", *vgg, *flags.format(data=data).split())
    text = message("ae_sample", caught.value)
    assert ERRORS[flags].format(data=data) in text and "\n" not in text
    assert not (tmp_path / "out").exists() or not os.listdir(tmp_path / "out")


@pytest.mark.parametrize(
    "flags, message",
    [
        ("", "--base_samples is missing; it is needed: a folder of references"),
        ("--base_samples {data}/ref", "--model_path is missing; it is needed: the target domain's diffusion model"),
        ("--model_path m --base_samples r --area x", "argument --area: 'x' is not a whole number"),
        (
            "--model_path m --base_samples r --batch_size big",
            "--batch_size is 'big'; it must be a whole number above 0",
        ),
        ("--model_path m --base_samples r --variant manifolt", "did you mean manifold?"),
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
    assert caught.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and message in line and line.count("\n") == 1


def test_errors_of_the_process_are_one_line(data, tmp_path):
    done = ae_sample("--model_path", "m.pt", "--base_samples", data / "ref", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("error: m.pt does not exist")
    assert "Traceback" not in done.stderr
