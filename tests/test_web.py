"""The web demo without Gradio: the generator of frames, the command that it shows, its flags and its environment."""

import logging
import os
import shlex
import socket
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tiny
import torch
from conftest import ROOT
from PIL import Image
from scripts_in_process import made_by, message

from guided_diffusion.cli import web
from guided_diffusion.errors import InputError
from guided_diffusion.image_datasets import ImageError
from guided_diffusion.web import translate as module
from guided_diffusion.web.translate import Settings, Studio, explain, label

SETTINGS = Settings(area=4, range_t=0.35, steps=6, seed=3, start=1.0, details=1.0, energy="dct", sampler="ancestral")
AWKWARD = 'it\'s a "b" $HOME ä; `c`.png'


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two models, one with classes, and pictures with awkward names, transparency and EXIF; read only."""
    root = tmp_path_factory.mktemp("web")
    tiny.make_model(root / "model.safetensors")
    tiny.make_model(root / "classes.safetensors", 1, class_cond=True, num_classes=3)
    tiny.make_references(root, ["a.png", AWKWARD, "-x.png"])
    pixels = np.random.default_rng(9).integers(0, 256, (40, 24, 4), np.uint8)
    Image.fromarray(pixels).save(root / "alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels[..., :3].copy()).save(root / "turned.jpg", exif=exif)
    return root


@pytest.fixture(scope="module")
def studio(data):
    return Studio([str(data / "model.safetensors"), str(data / "classes.safetensors")], device="cpu")


@pytest.fixture(scope="module")
def first(data):
    return str(data / "model.safetensors")


def last(frames):
    return list(frames)[-1]


class Upload(NamedTuple):
    path: str
    name: str


def command(model, name, settings, root):
    return web.command_line(model, Upload("", name), settings, root=str(root), device="cpu")


def differ_little(one, other):
    """Whether no value differs by more than a grey level: a batch rounds otherwise than its images alone."""
    return np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16)).max() <= 1


def test_previews_come_first_and_the_result_last(studio, data, first):
    *shown, end = studio.translate(first, data / "a.png", SETTINGS, interval=0)
    assert len(shown) == 6 and not any(frame.results for frame in shown)
    assert shown[0].preview.size == (tiny.SIZE, tiny.SIZE) and shown[0].words.startswith("Step 1 of 6, ")
    assert np.array_equal(np.asarray(end.reference), np.asarray(Image.open(data / "a.png")))
    assert np.array_equal(np.asarray(end.results[0]), np.asarray(shown[-1].preview)), "at the last step both are one"
    assert end.words.startswith("Done: 6 steps in ")


def test_several_results_are_those_of_consecutive_seeds(studio, data, first):
    frames = list(studio.translate(first, data / "a.png", replace(SETTINGS, count=3)))
    side = frames[0].preview.width
    assert side > 2 * tiny.SIZE and frames[0].preview.height > 2 * tiny.SIZE, "the preview has them side by side"
    for seed, result in zip((3, 4, 5), frames[-1].results, strict=True):
        alone = last(studio.translate(first, data / "a.png", replace(SETTINGS, seed=seed))).results[0]
        assert differ_little(result, alone)
    assert not differ_little(*frames[-1].results[:2])


@pytest.mark.parametrize(
    "name, changes",
    [
        ("-x.png", {"energy": "none", "variant": "released", "steps": 9}),
        ("alpha.png", {"sampler": "dpmpp_2m", "range_t": 0.0}),
        ("turned.jpg", {"sampler": "ddim", "seed": 2**53 - 1}),
        ("a.png", {"start": 0.55, "range_t": 0.95, "details": 0.4}),
        ("a.png", {"precision": "bf16"}),
        ("a.png", {"model": "classes.safetensors", "class_index": "2"}),
    ],
    ids=str,
)
def test_the_command_makes_the_pages_pixels(studio, data, first, tmp_path, name, changes):
    model = str(data / changes.pop("model", "model.safetensors"))
    wanted = replace(SETTINGS, **changes)
    (tmp_path / name).write_bytes((data / name).read_bytes())
    result = np.asarray(last(studio.translate(model, data / name, wanted)).results[0])
    assert np.array_equal(result, made_by(command(model, name, wanted, tmp_path), tmp_path))
    other = np.asarray(last(studio.translate(first, data / name, replace(SETTINGS, steps=wanted.steps))).results[0])
    assert not np.array_equal(result, other), "the setting changes the picture"


def test_the_command_runs_in_a_shell(studio, data, first, tmp_path):
    for name in ("scripts", "guided_diffusion", "resizer"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / AWKWARD).write_bytes((data / "a.png").read_bytes())
    settings = replace(SETTINGS, count=2)
    text = command(first, AWKWARD, settings, tmp_path)
    line = f'python() {{ {shlex.quote(sys.executable)} "$@"; }}; {text}'
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    frame = last(studio.translate(first, data / "a.png", settings, name=AWKWARD))
    folders = [tmp_path / shlex.split(text)[-2].removesuffix(";").replace("$seed", seed) for seed in ("3", "4")]
    for result, folder in zip(frame.results, folders, strict=True):
        assert differ_little(result, Image.open(folder / AWKWARD))


def test_closing_ends_the_sampling(data, first):
    studio = Studio([first], device="cpu")
    frames = studio.translate(first, data / "a.png", replace(SETTINGS, steps=250), interval=0)
    next(frames)
    studio.close()
    with pytest.raises(InputError, match="closed"):
        next(frames)


def test_a_picture_of_many_colours_looks_like_a_photograph(tmp_path):
    assert not any(module.looks_like_a_photograph(path) for path in (ROOT / "ref_imgs").glob("*.png"))
    rows, columns = np.mgrid[0:96, 0:128]
    scene = np.stack([rows, columns, rows + columns], 2) + np.random.default_rng(0).normal(0, 8, (96, 128, 3))
    Image.fromarray(scene.clip(0, 255).astype(np.uint8)).save(tmp_path / "scene.jpg")
    assert module.looks_like_a_photograph(tmp_path / "scene.jpg")


def test_translations_side_by_side_do_not_mix(studio, data, first):
    jobs = {
        replace(SETTINGS, seed=5): first,
        replace(SETTINGS, sampler="ddim"): first,
        replace(SETTINGS, class_index="1"): str(data / "classes.safetensors"),
    }

    def work(wanted):
        return np.asarray(last(studio.translate(jobs[wanted], data / "a.png", wanted, interval=0)).results[0])

    with ThreadPoolExecutor() as pool:
        assert all(map(np.array_equal, pool.map(work, jobs), map(work, jobs)))


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"area": 5}, "area"),
        ({"seed": None}, "seed"),
        ({"energy": "dct,nothing"}, "energy"),
        ({"energy": "vgg"}, "weights"),
        ({"sampler": "euler"}, "sampler"),
        ({"class_index": "1"}, "class_index"),
        ({"model": "other.safetensors"}, "model"),
        ({"picture": None}, "picture"),
    ],
    ids=str,
)
def test_wrong_settings_are_one_line_in_the_pages_words(data, first, changes, name):
    studio = Studio([first], device="cpu", weights=str(data / "missing.pth"))
    model, picture = changes.pop("model", first), changes.pop("picture", data / "a.png")
    with pytest.raises(InputError) as error:
        list(studio.translate(model, picture, replace(SETTINGS, **changes)))
    words = explain(error.value)
    assert words.startswith(label(name)) and "\n" not in words and "--" not in words and "`" not in words
    assert last(studio.translate(first, data / "a.png", SETTINGS)).results, "the next translation works"


def test_pictures_that_cannot_be_used(studio, data, first, tmp_path):
    (tmp_path / "text.png").write_bytes(b"hello")
    (tmp_path / "half.png").write_bytes((data / "a.png").read_bytes()[:200])
    Image.new("RGB", (4097, 10)).save(tmp_path / "wide.png")
    for name in ("text", "half", "wide"):
        with pytest.raises((ImageError, InputError)) as error:
            list(studio.translate(first, tmp_path / f"{name}.png", SETTINGS))
        words = explain(error.value)
        assert words.startswith("Your picture") and "\n" not in words and str(tmp_path) not in words


def test_a_defect_is_one_line_on_the_page_and_a_traceback_in_the_log(studio, data, first, monkeypatch, caplog):
    def broken(*arguments, **options):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(module, "Translator", broken)
    with caplog.at_level(logging.ERROR, logger="sddm"), pytest.raises(RuntimeError) as error:
        list(studio.translate(first, data / "a.png", SETTINGS))
    assert "first line" in explain(error.value) and "\n" not in explain(error.value)
    assert "Traceback" in caplog.text
    assert "memory" in explain(torch.OutOfMemoryError("CUDA out of memory"))


def test_models_are_looked_at_when_the_studio_opens(studio, data, tmp_path):
    with pytest.raises(InputError):
        Studio([str(data / "model.safetensors"), str(tmp_path / "none.safetensors")], device="cpu")
    plain, classes = studio.models.values()
    with pytest.raises(InputError, match="class_index"):
        list(studio.translate(classes.path, data / "a.png", SETTINGS))
    assert (plain.most_steps, plain.classes, classes.classes) == (250, 0, 3)
    assert plain.areas == [1, 2, 4, 8] and plain.nearest_area(32) == 8 and plain.nearest_area(4) == 4


WITHOUT_GRADIO = """
import runpy, sys
sys.modules["gradio"] = None
sys.argv = ["web_demo.py"]
try:
    runpy.run_path("scripts/web_demo.py", run_name="__main__")
finally:
    assert "torch" not in sys.modules
"""


def test_without_gradio_there_is_one_line_before_torch_is_loaded():
    done = subprocess.run([sys.executable, "-c", WITHOUT_GRADIO], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: the web demo needs gradio: pip install -r requirements-demo.txt\n"


def test_a_port_in_use_is_refused():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError) as error:
            web.free_port("127.0.0.1", port)
        assert message("web_demo", error.value).startswith(f"--port is {port}; ")
    assert web.free_port("127.0.0.1", port) == port and web.free_port("127.0.0.1", 0) > 0
    with pytest.raises(InputError, match="host is '203.0.113.7'"):
        web.free_port("203.0.113.7", 0)


def test_strangers_are_warned_of(capsys):
    for host in ("127.0.0.1", "localhost", "[::1]", "0.0.0.0", "::", "192.168.0.7"):
        web.warn_of_strangers(host)
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_the_environment_is_private(monkeypatch):
    monkeypatch.setattr(os, "environ", {"no_proxy": "example.org"})
    with web.private_environment(offline=True) as folder:
        Path(folder, "upload").write_text("x")
        assert os.environ["GRADIO_TEMP_DIR"] == folder and stat.S_IMODE(os.stat(folder).st_mode) == 0o700
        assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False" and os.environ["HF_HUB_OFFLINE"] == "1"
        assert os.environ["no_proxy"].startswith("example.org,localhost")
    assert not os.path.exists(folder)


def test_examples_stand_in_the_command_with_their_path(data, tmp_path):
    (tmp_path / "ref").mkdir()
    (tmp_path / "ref" / "a.png").write_bytes((data / "a.png").read_bytes())
    where = {"root": str(tmp_path), "examples": str(tmp_path / "ref")}
    same = web.command_line("owner/name", Upload(data / "a.png", "a.png"), SETTINGS, **where)
    assert "--base_samples ref/a.png " in same and "--model_path owner/name " in same and "--device" not in same
    other = web.command_line("owner/name", Upload(data / AWKWARD, "a.png"), SETTINGS, **where)
    assert "--base_samples a.png " in other


def test_the_shell_script_installs_once_and_passes_flags_on(tmp_path):
    """With an interpreter that only says how it is called."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    (tmp_path / ".requirements").write_bytes((ROOT / "requirements.txt").read_bytes())
    line, environment = ["bash", ROOT / "scripts" / "web_demo.sh", "--port", "0"], {**os.environ, "VENV": str(tmp_path)}
    for install in (True, False):
        said = subprocess.run(line, env=environment, stdout=subprocess.PIPE, text=True).stdout
        assert said.splitlines()[-1] == f"{ROOT / 'scripts' / 'web_demo.py'} --port 0"
        assert (f"-r {ROOT / 'requirements-demo.txt'}" in said) == ("once" in said) == install
