"""The commands of ILVR, SDEdit, EGSDE and plain sampling: flags, files and equality with their samplers."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from scripts_in_process import message, run_script

from guided_diffusion import baselines
from guided_diffusion.checkpoint import load_model
from guided_diffusion.errors import InputError
from guided_diffusion.image_datasets import list_references, load_image, to_tensor, to_uint8
from guided_diffusion.run.noise import ImageNoise
from guided_diffusion.script_util import create_diffusion

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A tiny model, an extractor and references, one of them in a folder below; no test writes here."""
    root = tmp_path_factory.mktemp("data")
    tiny.make_model(root / "model.safetensors")
    tiny.make_encoder(root / "dse.safetensors", 2, head="I2Iout")
    tiny.make_references(root / "ref", ("a.png", "b.png", "more/c.png"))
    return root


def run(name, data, out, *flags):
    """One script in this process; returns its exit status and run.json."""
    given = ["--model_path", data / "model.safetensors", "--save_dir", out, "--device", "cpu", *flags]
    if name != "image_sample":
        given += ["--base_samples", data / "ref"]
    status = run_script(name, *given)
    return status, json.loads((out / "run.json").read_text())


def pictures(folder):
    """Outputs by relative name, without the overview."""
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*.png"))}
    found.pop("grid.png")
    return {name: load_image(path, 16) for name, path in found.items()}


def expected(data, sampler, seed=0, flags=None, **options):
    """What a sampler makes of the references with the engine's noise."""
    model, info = load_model(str(data / "model.safetensors"))
    model.to(memory_format=torch.channels_last)
    diffusion = create_diffusion(**{**info.flags, **(flags or {})})
    references = list_references(str(data / "ref"))
    noise = ImageNoise([f"{seed}/{r.name}#0" for r in references], torch.device("cpu"))
    images = to_uint8(
        sampler(model, diffusion, to_tensor([load_image(r, 16) for r in references]), noise=noise, **options)
    )
    return dict(zip((r.name for r in references), images, strict=True))


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, image in found.items():
        assert np.abs(image.astype(int) - wanted[name]).max() <= 1, name


ILVR = ["--timestep_respacing", "6", "--down_N", "4", "--range_t", "2"]
SDEDIT = ["--diffusion_steps", "30", "--t", "8"]
EGSDE = ["--timestep_respacing", "10", "--t", "5", "--ls", "3", "--li", "0.2", "--down_N", "4"]


def test_ilvr_script(data, tmp_path):
    status, record = run("ilvr_sample", data, tmp_path / "out", *ILVR, "--use_ddim", "False")
    assert status == 0 and record["settings"]["method"] == "ilvr" and record["settings"]["down_N"] == 4
    assert "use_ddim" not in record["settings"]
    assert record["model_evaluations"] == 6 and record["negative_impact"] is None
    wanted = expected(data, baselines.ilvr, flags={"timestep_respacing": "6"}, down_n=4, range_t=2)
    assert_equal(pictures(tmp_path / "out"), wanted)


@pytest.mark.parametrize("sigma_small, variance", [("True", "fixed_small"), ("False", "fixed_large")])
def test_sdedit_script(data, tmp_path, sigma_small, variance):
    flags = ("--timestep_respacing", "12", "--t", "7", "--sigma_small", sigma_small)
    status, record = run("sdedit_sample", data, tmp_path / "out", *flags)
    assert status == 0 and record["settings"]["method"] == "sdedit" and record["model_evaluations"] == 7
    wanted = expected(data, baselines.sdedit, flags={"timestep_respacing": "12"}, start=7, variance=variance)
    assert_equal(pictures(tmp_path / "out"), wanted)


def test_egsde_script(data, tmp_path):
    flags = (*EGSDE, "--dsepath", data / "dse.safetensors", "--seed", 3)
    status, record = run("egsde_sample", data, tmp_path / "out", *flags)
    assert status == 0 and record["model_evaluations"] == 5
    assert record["settings"]["dsepath"].startswith("sha256 ")
    encoder, _ = load_model(str(data / "dse.safetensors"))
    options = {"start": 5, "ls": 3, "li": 0.2, "encoder": encoder, "down_n": 4}
    wanted = expected(data, baselines.egsde, seed=3, flags={"timestep_respacing": "10"}, **options)
    assert_equal(pictures(tmp_path / "out"), wanted)
    without = expected(data, baselines.egsde, seed=3, flags={"timestep_respacing": "10"}, **{**options, "ls": 0})
    assert any(np.abs(wanted[name].astype(int) - without[name]).max() > 1 for name in wanted)


def test_scripts_do_what_the_engine_can(data, tmp_path):
    """Batches of one, several samples, an animation, a killed run resumed, and other flags refused."""
    name, flags = "ilvr_sample", (*ILVR, "--samples_per_image", "2", "--save_trajectory")
    run(name, data, tmp_path / "a", *flags, "--batch_size", "4")
    run(name, data, tmp_path / "b", *flags, "--batch_size", "1")
    found = pictures(tmp_path / "a")
    assert sorted(found) == [f"sample_{k}/{image}" for k in (0, 1) for image in ("a.png", "b.png", "more/c.png")]
    assert_equal(pictures(tmp_path / "b"), found)
    assert len(list((tmp_path / "a" / "trajectory").rglob("*.gif"))) == 6
    (tmp_path / "a" / "sample_1" / "b.png").unlink()
    _, record = run(name, data, tmp_path / "a", *flags, "--batch_size", "4")
    assert_equal(pictures(tmp_path / "a"), found)
    assert record["counts"] == {"references": 3, "outputs": 6, "failed": 0}
    assert record["monitor"]["images"] == 6
    with pytest.raises(InputError) as caught:
        run(name, data, tmp_path / "a", *flags, "--seed", "1")
    assert caught.value.parameter == "save_dir"
    assert "holds a run with other settings: --seed was 0 and is 1" in message(name, caught.value)


# Sampling without references


def test_image_script_makes_images_by_number(data, tmp_path):
    flags = ("--timestep_respacing", "6", "--npz", "True")
    status, record = run("image_sample", data, tmp_path / "a", *flags, "--num_samples", 5, "--batch_size", 4)
    assert status == 0 and record["counts"] == {"references": 5, "outputs": 5, "failed": 0}
    found = pictures(tmp_path / "a")
    assert list(found) == [f"{n:06d}.png" for n in range(5)]
    with np.load(tmp_path / "a" / "samples_5x16x16x3.npz") as file:
        assert file.files == ["arr_0"]
        np.testing.assert_array_equal(file["arr_0"], np.stack(list(found.values())))
    with Image.open(tmp_path / "a" / "grid.png") as grid:
        assert grid.width > grid.height > 2 * 16  # five pictures in two lines

    model, info = load_model(str(data / "model.safetensors"))
    model.to(memory_format=torch.channels_last)
    diffusion = create_diffusion(**{**info.flags, "timestep_respacing": "6"})
    draw = ImageNoise(["0/000004.png#0"], torch.device("cpu"))
    x = baselines.unconditional(model, diffusion, torch.zeros(1, 3, 16, 16), noise=draw)
    assert np.abs(to_uint8(x)[0].astype(int) - found["000004.png"]).max() <= 1

    # Going on with more images leaves those that are there alone and adds to the same series.
    status, record = run("image_sample", data, tmp_path / "a", *flags, "--num_samples", 7, "--batch_size", 4)
    more = pictures(tmp_path / "a")
    assert len(more) == 7 and all(np.array_equal(more[name], image) for name, image in found.items())
    run("image_sample", data, tmp_path / "b", *flags[:2], "--num_samples", 7, "--batch_size", 1)
    assert_equal(pictures(tmp_path / "b"), more)
    assert len({image.tobytes() for image in more.values()}) == 7


def test_image_script_with_ddim(data, tmp_path):
    flags = ("--timestep_respacing", "ddim5", "--num_samples", 2)
    _, record = run("image_sample", data, tmp_path / "a", *flags, "--use_ddim", "True")
    assert record["model_evaluations"] == 5
    model, info = load_model(str(data / "model.safetensors"))
    model.to(memory_format=torch.channels_last)
    diffusion = create_diffusion(**{**info.flags, "timestep_respacing": "ddim5"})
    noise = ImageNoise(["0/000000.png#0", "0/000001.png#0"], torch.device("cpu"))
    x = diffusion.ddim_sample_loop(model, (2, 3, 16, 16), noise=noise((2, 3, 16, 16)))
    found = pictures(tmp_path / "a")
    assert_equal(found, dict(zip(found, to_uint8(x))))
    run("image_sample", data, tmp_path / "b", *flags, "--use_ddim", "True", "--eta", "1")
    assert any(np.abs(a.astype(int) - b).max() > 1 for a, b in zip(found.values(), pictures(tmp_path / "b").values()))


# Bad flags


DIVIDE = "it must be at least 1 and divide the image size 16"
ERRORS = {
    "ilvr_sample --timestep_respacing 6 --down_N 5 --range_t 2": f"--down_N is 5; {DIVIDE}",
    "ilvr_sample --timestep_respacing 6 --down_N 4 --range_t 6": "--range_t is 6; a schedule of 6 steps takes 0 to 5",
    "sdedit_sample --timestep_respacing 6": "--t is 500; a schedule of 6 steps takes 1 to 6",
    "egsde_sample": "--dsepath is missing; --ls 500 needs it; --ls 0 does without the realism energy",
    "egsde_sample --ls nan": "--ls is nan; it must be a finite number",
    "egsde_sample --dsepath {data}/model.safetensors --down_N 4": "is a diffusion model, not a classifier",
    "ae_sample --range_t 5 --area 4 --manifold low_pass --down_N 5": f"--down_N is 5; {DIVIDE}",
    "image_sample --eta 0.5": "--eta is 0.5; it is for --use_ddim True",
    "image_sample --timestep_respacing ddim400": "no integer stride gives 400 steps",
}


@pytest.mark.parametrize("command", ERRORS)
def test_bad_flags_are_named_before_anything_is_written(data, tmp_path, command):
    name, *flags = command.format(data=data).split()
    with pytest.raises(InputError) as caught:
        run(name, data, tmp_path / "out", *flags)
    text = message(name, caught.value)
    assert ERRORS[command] in text and "\n" not in text
    assert not (tmp_path / "out").exists() or not os.listdir(tmp_path / "out")


# Ablations by the command


def test_ablation_flags_reach_the_sampler(data, tmp_path):
    flags = ("--timestep_respacing", "6", "--range_t", "2", "--area", "4", "--energy", "dct")
    outputs, records = {}, {}
    for name, more in {
        "plain": (),
        "linear": ("--moo", "linear"),
        "low_pass": ("--manifold", "low_pass", "--down_N", "4"),
    }.items():
        _, records[name] = run("ae_sample", data, tmp_path / name, *flags, *more)
        outputs[name] = np.stack(list(pictures(tmp_path / name).values())).astype(int)
    assert np.abs(outputs["plain"] - outputs["linear"]).max() > 1
    assert np.abs(outputs["plain"] - outputs["low_pass"]).max() > 1
    assert records["low_pass"]["settings"]["down_N"] == 4 and "down_N" not in records["plain"]["settings"]
    for record in records.values():
        assert 0 <= record["negative_impact"] <= 1 and sorted(record["monitor"]["steps"]) == ["3", "4", "5"]
    assert all(values[4:] == [3, 3] for values in records["linear"]["monitor"]["steps"].values())
