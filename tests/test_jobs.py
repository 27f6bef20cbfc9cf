"""guided-diffusion's other jobs as commands: classifier guidance, likelihood, super-resolution."""

import contextlib
import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from scripts_in_process import load_script
from tiny import MODEL, PROCESS, make_encoder, make_model, make_references, random_state

from guided_diffusion import dist_util
from guided_diffusion.checkpoint import load_model, save_model
from guided_diffusion.errors import InputError
from guided_diffusion.gaussian_diffusion import GaussianDiffusion
from guided_diffusion.image_datasets import load_image, to_tensor
from guided_diffusion.run.noise import ImageNoise
from guided_diffusion.script_util import create_diffusion, create_model

SIZE = 16
CPU = torch.device("cpu")


def run(script, *flags, status=0):
    """A command: trainings in a process of their own, others in this one. Returns what it said."""
    flags = list(map(str, [*flags, "--device", "cpu"]))
    if script.endswith("_train"):
        result = subprocess.run(
            [sys.executable, ROOT / "scripts" / f"{script}.py", *flags], capture_output=True, text=True
        )
        assert result.returncode == status, result.stderr
        return result.stdout + result.stderr
    module, said = load_script(script), io.StringIO()
    parser = module.create_parser()
    call = module.evaluate if script == "image_nll" else module.translate
    try:
        with contextlib.redirect_stdout(said):
            found = call(parser.parse(flags), dist_util.connect(dist_util.Ranks()))
    except InputError as error:
        found = 2
        said.write(error.text(parser.spell))
    assert (found or 0) == status, said.getvalue()
    return said.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A model of 16 pixels, a classifier and an upsampler from 4 pixels, both of three classes, and images."""
    folder = tmp_path_factory.mktemp("jobs")
    make_model(folder / "model.safetensors")
    make_encoder(folder / "classifier.safetensors", 3)
    network = {**MODEL, "learn_sigma": True, "class_cond": True, "num_classes": 3, "super_res": True}
    model = create_model(**network)
    flags = {**network, **PROCESS}
    save_model(folder / "upsampler.safetensors", random_state(model), model_type="ADM", flags=flags)
    make_references(folder / "images", ["a.png", "b/c.png", "b/d.png", "e.png"])
    return folder


def pictures(folder):
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))}


def test_classifier_sample(data, tmp_path):
    flags = ["--model_path", data / "model.safetensors", "--classifier_path", data / "classifier.safetensors"]
    flags += ["--classifier_width", "32", "--classifier_pool", "attention"]
    flags += ["--timestep_respacing", "4", "--num_samples", "3", "--classifier_scale", "5", "--save_dir"]
    run("classifier_sample", *flags, tmp_path / "a", "--batch_size", "2")
    made = pictures(tmp_path / "a")
    with np.load(tmp_path / "a" / "samples_3x16x16x3.npz") as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert np.array_equal(images, np.stack(list(made.values()))) and len(made) == 3
    noise = ImageNoise([f"0/{n:06d}.png#0" for n in range(3)], CPU)
    assert labels.tolist() == noise.labels(3).tolist()
    # Batches do not matter, and what is missing is made again.
    run("classifier_sample", *flags, tmp_path / "b", "--batch_size", "3")
    (tmp_path / "b" / "000001.png").unlink()
    assert "1 done, 2 already present" in run("classifier_sample", *flags, tmp_path / "b", "--batch_size", "3")
    for name, image in pictures(tmp_path / "b").items():
        assert np.abs(image.astype(int) - made[name]).max() <= 1
    # The classifier matters, and so does the class.
    run("classifier_sample", *flags, tmp_path / "c", "--class_index", "2")
    with np.load(tmp_path / "c" / "samples_3x16x16x3.npz") as file:
        assert file["arr_1"].tolist() == [2, 2, 2]
    assert any(not np.array_equal(image, made[name]) for name, image in pictures(tmp_path / "c").items())
    error = run("classifier_sample", *flags, tmp_path / "d", "--class_index", "3", status=2)
    assert "--class_index is 3" in error and "classes 0 to 2" in error


def test_image_nll(data, tmp_path):
    flags = ["--model_path", data / "model.safetensors", "--data_dir", data / "images", "--timestep_respacing", "5"]
    run("image_nll", *flags, "--save_dir", tmp_path / "a", "--batch_size", "3")
    with open(tmp_path / "a" / "bpd.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["a.png", "b/c.png", "b/d.png", "e.png"]
    model, info = load_model(data / "model.safetensors")
    diffusion = create_diffusion(**{**info.flags, "timestep_respacing": "5", "sigma_small": False})
    x = to_tensor([load_image(str(data / "images" / "b" / "c.png"), SIZE)])
    expected = diffusion.calc_bpd_loop(model, x, noise=ImageNoise(["0/b/c.png#0"], CPU))
    assert float(rows[1]["total_bpd"]) == pytest.approx(float(expected["total_bpd"]), rel=1e-5)
    with np.load(tmp_path / "a" / "vb_terms.npz") as file:
        vb = file["arr_0"]
    mean = np.mean([float(row["total_bpd"]) - float(row["prior_bpd"]) for row in rows])
    assert vb.shape == (5,) and vb.sum() == pytest.approx(mean, rel=1e-5)
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert record["bits_per_dimension"] == pytest.approx(mean + float(rows[0]["prior_bpd"]), rel=1e-4)
    # Resumed: the same bytes.
    before = (tmp_path / "a" / "bpd.csv").read_bytes()
    lines = (tmp_path / "a" / "images.jsonl").read_text().splitlines(True)
    (tmp_path / "a" / "images.jsonl").write_text("".join(lines[::2]) + lines[1][:-20])
    run("image_nll", *flags, "--save_dir", tmp_path / "a", "--batch_size", "3")
    assert before == (tmp_path / "a" / "bpd.csv").read_bytes()
    error = run("image_nll", *flags, "--save_dir", tmp_path / "a", "--seed", "1", status=2)
    assert "--seed was 0 and is 1" in error


def nll(data, images, out, *flags, status=0):
    """image_nll.py in two steps; returns what it said."""
    given = ["--model_path", data / "model.safetensors", "--data_dir", images, "--save_dir", out]
    return run("image_nll", *given, "--timestep_respacing", "2", *flags, status=status)


def test_a_likelihood_knows_its_images(data, tmp_path, caplog):
    """Unreadable ones fail alone; one that is replaced is evaluated again; equal ones elsewhere are known."""
    images, out = make_references(tmp_path / "images", ["a.png", "b.png", "c.png"]), tmp_path / "out"
    (images / "b.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    nll(data, images, out, status=1)
    shutil.copy(images / "c.png", images / "b.png")
    shutil.copy(images / "c.png", images / "a.png")
    caplog.clear()
    nll(data, shutil.copytree(images, tmp_path / "elsewhere"), out)
    assert caplog.messages == ["outputs that are made again, because their sources have changed: 1, such as a.png"]
    nll(data, images, tmp_path / "fresh")
    assert (out / "bpd.csv").read_bytes() == (tmp_path / "fresh" / "bpd.csv").read_bytes()
    assert json.loads((out / "run.json").read_text())["failed"] == {}


def test_damaged_results_of_a_likelihood_are_one_line(data, tmp_path):
    images = make_references(tmp_path / "images", ["a.png"])
    nll(data, images, tmp_path / "sound")
    piped, old = (shutil.copytree(tmp_path / "sound", tmp_path / name) for name in ("piped", "old"))
    (piped / "images.jsonl").unlink()
    os.mkfifo(piped / "images.jsonl")
    assert "images.jsonl is not a regular file" in nll(data, images, piped, status=2)
    (old / "run.json").write_text('{"format": 1, "settings": {}, "versions": {}}')
    assert "run.json is damaged" in nll(data, images, old, status=2)
    # Results are not written through links.
    out = shutil.copytree(tmp_path / "sound", tmp_path / "linked")
    (tmp_path / "mine").write_text("mine")
    for name in ("images.jsonl", "bpd.csv", "vb_terms.npz"):
        (out / name).unlink()
        (out / name).symlink_to(tmp_path / "mine")
    nll(data, images, out, "--overwrite")
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_likelihood_needs_float64_on_the_cpu_alone(data, tmp_path, monkeypatch):
    """As on Apple's GPUs: a tensor there cannot become float64."""

    class OnDevice(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is torch.Tensor.double:
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
            found = super().__torch_function__(function, types, args, kwargs or {})
            return found.as_subclass(torch.Tensor) if function is torch.Tensor.cpu else found

    calc = GaussianDiffusion.calc_bpd_loop

    def on_device(*arguments, **options):
        return {name: terms.as_subclass(OnDevice) for name, terms in calc(*arguments, **options).items()}

    monkeypatch.setattr(GaussianDiffusion, "calc_bpd_loop", on_device)
    nll(data, make_references(tmp_path / "images", ["a.png"]), tmp_path / "out")


def test_junk_is_one_line(data, tmp_path):
    """Among the outputs that are gathered, and as an array of small images."""
    flags = ["--model_path", data / "model.safetensors", "--num_samples", "2", "--timestep_respacing", "2", "--npz"]
    run("image_sample", *flags, "--save_dir", tmp_path / "out")
    (tmp_path / "out" / "000001.png").write_text("junk")
    said = run("image_sample", *flags, "--save_dir", tmp_path / "out", status=2)
    assert re.search(r"out/000001\.png cannot be read: not an image", said)
    (tmp_path / "empty.npz").write_bytes(b"")
    flags = ["--model_path", data / "upsampler.safetensors", "--base_samples", tmp_path / "empty.npz"]
    said = run("super_res_sample", *flags, "--save_dir", tmp_path / "e", status=2)
    assert re.search(r"empty\.npz is damaged or not an \.npz file of images", said)


def test_super_res_sample(data, tmp_path):
    small = np.random.default_rng(0).integers(0, 256, (4, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "small.npz", small, np.array([0, 1, 2, 0]))
    flags = ["--model_path", data / "upsampler.safetensors", "--timestep_respacing", "3"]
    # Another array with the same names; what differs from it is made again.
    np.savez(tmp_path / "other.npz", small[[0, 2, 1, 3]], np.array([0, 1, 2, 1]))
    for name in ("other", "small"):
        run("super_res_sample", *flags, "--base_samples", tmp_path / f"{name}.npz", "--save_dir", tmp_path / "a")
    made = pictures(tmp_path / "a")
    assert [image.shape for image in made.values()] == [(SIZE, SIZE, 3)] * 4
    with np.load(tmp_path / "a" / "samples_4x16x16x3.npz") as file:
        assert np.array_equal(file["arr_0"], np.stack(list(made.values())))
    # The class of an image counts, not its place in a batch.
    run("super_res_sample", *flags, "--base_samples", tmp_path / "small.npz", "--save_dir", tmp_path / "b",
        "--class_index", "0", "--batch_size", "3")  # fmt: skip
    for name, image in pictures(tmp_path / "b").items():
        same = np.abs(image.astype(int) - made[name]).max() <= 1
        assert same == (name in ("000000.png", "000003.png"))
    # A folder of images: names stay.
    run("super_res_sample", *flags, "--base_samples", data / "images", "--small_size", "4", "--class_index", "1",
        "--save_dir", tmp_path / "c", "--npz", "False")  # fmt: skip
    assert Image.open(tmp_path / "c" / "b" / "d.png").size == (SIZE, SIZE)
    error = run("super_res_sample", *flags, "--base_samples", data / "images", "--save_dir", tmp_path / "d", status=2)
    assert "--class_index" in error
    flags[1] = data / "model.safetensors"
    error = run("super_res_sample", *flags, "--base_samples", data / "images", "--save_dir", tmp_path / "d", status=2)
    assert "no super-resolution model" in error


def test_super_res_train(data, tmp_path):
    flags = "--large_size 16 --small_size 4 --num_channels 32 --num_res_blocks 1 --channel_mult 1,2 --save_interval 2"
    flags = [*flags.split(), "--data_dir", data / "images", "--save_dir", tmp_path / "run", "--batch_size", "2"]
    run("super_res_train", *flags, "--lr_anneal_steps", "4", "--attention_resolutions", "8")
    _model, info = load_model(tmp_path / "run" / "model.safetensors")
    assert info.flags["super_res"] and info.flags["image_size"] == 16
    run("super_res_train", *flags, "--lr_anneal_steps", "6", "--resume", "auto")
    run("super_res_sample", "--model_path", tmp_path / "run" / "model.safetensors", "--base_samples", data / "images",
        "--small_size", "4", "--timestep_respacing", "2", "--save_dir", tmp_path / "out")  # fmt: skip
    assert (tmp_path / "out" / "a.png").exists()
    flags[3] = "16"
    error = run("super_res_train", *flags, "--resume", "auto", status=2)
    assert "error: --small_size is 16; it must be below" in error


def test_published_upsamplers_are_recognised():
    """From shapes alone: tensors that take no room, in the layout of the published file of 256 pixels."""
    from guided_diffusion.checkpoint.architecture import adm
    from guided_diffusion.checkpoint.reconcile import published

    with torch.device("meta"):
        model = create_model(
            256, 192, 2, attention_resolutions="32,16,8", num_heads=4, class_cond=True, learn_sigma=True,
            resblock_updown=True, use_scale_shift_norm=True, super_res=True,
        )  # fmt: skip
    found = adm(model.state_dict())
    assert found["super_res"] and found["attention_factors"] == (8, 16, 32)
    row = published("ADM", found)
    assert row is not None and row.flags["image_size"] == 256 and row.flags["num_head_channels"] == -1


def test_image_sample_draws_random_classes(tmp_path):
    """Without a class, every image of a class-conditional model has one of its own draws; by number it has that."""
    flags = {**MODEL, **PROCESS, "class_cond": True, "num_classes": 3}
    state = random_state(create_model(**{**MODEL, "class_cond": True, "num_classes": 3}))
    save_model(tmp_path / "model.safetensors", state, model_type="ADM", flags=flags)
    flags = ["--model_path", tmp_path / "model.safetensors", "--num_samples", "4", "--timestep_respacing", "3", "--npz"]
    arrays = {}
    for name, more in (("drawn", []), ("again", ["--batch_size", "1"]), ("two", ["--class_index", "2"])):
        run("image_sample", *flags, "--save_dir", tmp_path / name, *more)
        with np.load(tmp_path / name / "samples_4x16x16x3.npz") as file:
            arrays[name] = file["arr_0"].astype(int), file["arr_1"].tolist()
    assert arrays["drawn"][1] == arrays["again"][1] and len(set(arrays["drawn"][1])) > 1
    assert np.abs(arrays["drawn"][0] - arrays["again"][0]).max() <= 1
    assert arrays["two"][1] == [2] * 4
