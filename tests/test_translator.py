"""Translator: the library's front door gives the commands' very pixels, from any folder, and refuses in their words."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
from conftest import ROOT
from PIL import Image
from scripts_in_process import run_script

from guided_diffusion import Translator
from guided_diffusion.checkpoint import save_model
from guided_diffusion.errors import InputError
from guided_diffusion.image_datasets import ImageError, load_image, to_tensor
from guided_diffusion.script_util import create_model

NAMES = ("a.png", "b.png", "c.png")
OPTIONS = {"steps": 6, "range_t": 2, "area": 4, "energy": "dct", "device": "cpu"}
SDDM = ("--range_t", 2, "--area", 4, "--energy", "dct")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A tiny model, an extractor, a class-conditional model, references, and outputs of the command; read only."""
    root = tmp_path_factory.mktemp("data")
    tiny.make_model(root / "model.safetensors")
    tiny.make_encoder(root / "dse.safetensors", 2, head="I2Iout")
    classes = {**tiny.MODEL, "class_cond": True, "num_classes": 3}
    flags = {**classes, **tiny.PROCESS}
    save_model(root / "classes.safetensors", tiny.random_state(create_model(**classes)), model_type="ADM", flags=flags)
    tiny.make_references(root / "ref", NAMES)
    command(root, root / "out", "ae_sample", *SDDM, "--seed", 3)
    return root


@pytest.fixture(scope="module")
def translate(data):
    return Translator(data / "model.safetensors", **OPTIONS)


def command(data, out, name, *flags):
    """Outputs of a command, one image at a time as a Translator makes them: {name: uint8 [H, W, 3]}."""
    folders = ("--model_path", data / "model.safetensors", "--base_samples", data / "ref", "--save_dir", out)
    run = ("--timestep_respacing", 6, "--batch_size", 1, "--device", "cpu")
    assert run_script(name, *folders, *run, *flags) == 0
    return made(out)


def made(folder):
    return {name: load_image(folder / name, tiny.SIZE) for name in NAMES}


def pixels(image):
    assert isinstance(image, Image.Image)
    return np.asarray(image)


def tensor(data, name):
    """A reference as float32 [3, H, W] in [-1, 1]."""
    return to_tensor([load_image(data / "ref" / name, tiny.SIZE)])[0]


# What goes in


def test_every_kind_of_picture_gives_the_commands_pixels(data, translate):
    wanted = made(data / "out")["b.png"]
    path = data / "ref" / "b.png"
    with Image.open(path) as opened:
        opened.load()
        copied = opened.convert("RGB")
        named = translate(opened, seed=3)  # a PIL image knows its file
    array = np.asarray(copied)
    for image in (
        translate(path, seed=3),
        named,
        translate(copied, seed=3, name="b.png"),
        translate(array, seed=3, name="b.png"),
        translate(tensor(data, "b.png")[None], seed=3, name="b.png"),
    ):
        assert np.array_equal(pixels(image), wanted)
    for other in (translate(path, seed=4), translate(array, seed=3), translate(path, seed=3, name="a.png")):
        assert not np.array_equal(pixels(other), wanted)


def test_lists_of_pictures_and_seeds_give_lists(data, translate):
    paths = [data / "ref" / name for name in NAMES]
    images = translate(paths, seed=[3, 4])
    wanted = [translate(path, seed=seed) for path in paths for seed in (3, 4)]
    for image, alone in zip(images, wanted, strict=True):
        assert np.abs(pixels(image).astype(int) - pixels(alone)).max() <= 1
    mixed = translate([paths[0], np.asarray(Image.open(paths[1]).convert("RGB")), tensor(data, "c.png")], seed=3)
    assert len({pixels(image).tobytes() for image in (*images, *mixed[1:])}) == 8
    single = translate(paths[:1], seed=3, name="b.png")
    alone = translate(paths[0], seed=3, name="b.png")
    assert isinstance(single, list) and np.array_equal(pixels(single[0]), pixels(alone))


def test_pictures_are_brought_to_the_models_size(data, translate):
    tall = np.zeros((40, 24, 3), np.uint8)
    for picture in (tall, tall[..., 0], np.dstack([tall, tall[..., :1]])):
        assert translate(picture).size == (tiny.SIZE, tiny.SIZE)
    padded = Translator(data / "model.safetensors", **OPTIONS, resize="pad", background="black")
    assert not torch.equal(padded.read(tall + 255), translate.read(tall + 255))


def test_wrong_calls(translate, data):
    path = data / "ref" / "a.png"
    for pictures, options, parameter, value in (
        (np.zeros((16, 16, 3)), {}, "picture", "an array float64 [16, 16, 3]"),
        (torch.zeros(2, 3, 16, 16), {}, "picture", "a tensor [2, 3, 16, 16]"),
        (5, {}, "picture", "int"),
        ([], {}, "pictures", "an empty list"),
        (path, {"seed": []}, "seed", "an empty list"),
        ([path, path], {"name": "a.png"}, "name", "a.png"),
    ):
        with pytest.raises(InputError) as caught:
            translate(pictures, **options)
        assert (caught.value.parameter, caught.value.value) == (parameter, value)
    with pytest.raises(ImageError):
        translate(data / "ref" / "missing.png")


# Step by step


def test_steps_are_the_translation(data, translate):
    path = data / "ref" / "a.png"
    states = list(translate.steps(path, seed=3))
    assert [state["i"] for state in states] == [5, 4, 3, 2, 1, 0] and translate.evaluations == 6
    assert [len(state["guided"]) for state in states] == [1, 1, 1, 0, 0, 0]
    for state in states:
        assert state["x"].shape == state["pred_xstart"].shape == (1, 3, tiny.SIZE, tiny.SIZE)
        assert pixels(state["preview"]).shape == (tiny.SIZE, tiny.SIZE, 3)
    final = ((states[-1]["x"][0].permute(1, 2, 0) + 1) * 127.5).clamp(0, 255).numpy()
    assert np.abs(final - made(data / "out")["a.png"]).max() <= 1
    assert len({pixels(state["preview"]).tobytes() for state in states}) == 6


# Options


ILVR = {"method": "ilvr", "down_n": 4, "range_t": 2}
EGSDE = {"method": "egsde", "start": 3, "down_n": 4, "ls": 3, "li": 0.2, "encoder": "{data}/dse.safetensors"}
COMMANDS = [  # a command's flags, the translator's options, and the number of steps
    ("ilvr_sample --down_N 4 --range_t 2", ILVR, 6),
    ("sdedit_sample --t 0.5", {"method": "sdedit", "start": 0.5}, 3),
    ("egsde_sample --t 3 --down_N 4 --ls 3 --li 0.2 --dsepath {data}/dse.safetensors", EGSDE, 3),
    ("ae_sample --energy none --range_t 0.3 --start_t 0.5 --area 4",
     {"energy": [], "range_t": 0.3, "start": 0.5, "area": 4}, 3),
    ("ae_sample --variant released --sampler ddim --eta 0.5 --range_t 2 --area 4 --energy dct",
     {"variant": "released", "sampler": "ddim", "eta": 0.5, "range_t": 2, "area": 4, "energy": "dct"}, 6),
]  # fmt: skip


@pytest.mark.parametrize("line, options, steps", COMMANDS)
def test_options_are_the_commands_flags(data, tmp_path, line, options, steps):
    wanted = command(data, tmp_path / "out", *line.format(data=data).split())
    options = {name: value.format(data=data) if isinstance(value, str) else value for name, value in options.items()}
    translate = Translator(data / "model.safetensors", steps=6, device="cpu", **options)
    assert translate.evaluations == steps
    for name in NAMES[:2]:
        assert np.array_equal(pixels(translate(data / "ref" / name)), wanted[name])


def test_classes(data):
    of = (Translator(data / "classes.safetensors", **OPTIONS, class_index=n) for n in (0, 2))
    assert not np.array_equal(*(pixels(translate(data / "ref" / "a.png")) for translate in of))
    with pytest.raises(InputError, match="class_index is missing; .*class-conditional"):
        Translator(data / "classes.safetensors", **OPTIONS)


@pytest.mark.parametrize(
    "options, parameter, words",
    [
        ({"area": 15}, "area", "area is 15; it must divide the image size 16 into blocks of at least two pixels"),
        ({"energy": "vgg", "weights": "nowhere.pth"}, "weights", "weights is 'nowhere.pth'; no such file"),
        ({"method": "sdm"}, "method", "did you mean sddm?"),
        ({"class_index": 1}, "class_index", "class_index is 1; the model is not class-conditional"),
    ],
)
def test_refused_options(data, options, parameter, words):
    with pytest.raises(InputError) as caught:
        Translator(data / "model.safetensors", **{**OPTIONS, **options})
    assert caught.value.parameter == parameter
    text = str(caught.value)
    assert words in text and "\n" not in text and "--" not in text


def test_unknown_options_are_type_errors(data):
    with pytest.raises(TypeError, match="unexpected option 'down_n'"):
        Translator(data / "model.safetensors", method="sdedit", down_n=4, device="cpu")
    with pytest.raises(InputError, match="not a diffusion model"):
        Translator(data / "dse.safetensors", device="cpu")


# From another folder


OUTSIDE = """
import json, sys
import guided_diffusion
assert "torch" not in sys.modules
from guided_diffusion import Translator
import numpy as np
translate = Translator(sys.argv[1], steps=6, range_t=2, area=4, energy="dct", device="cpu")
image = translate(sys.argv[2], seed=3)
image.save("made.png")
print(json.dumps(guided_diffusion.__file__))
"""


def test_installed_and_used_from_another_folder(data, tmp_path):
    """The library, and the command that is installed with it; the source is copied, as a build leaves files beside."""
    source, site, away = (tmp_path / name for name in ("source", "site", "away"))
    away.mkdir()
    for name in ("guided_diffusion", "resizer"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "--target", site, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    def said(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(site)}
        done = subprocess.run([sys.executable, *arguments], cwd=away, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    found = said("-c", OUTSIDE, data / "model.safetensors", data / "ref" / "b.png")
    assert json.loads(found).startswith(str(site))
    assert np.array_equal(load_image(away / "made.png", tiny.SIZE), made(data / "out")["b.png"])
    assert sorted(os.listdir(away)) == ["made.png"]
    help_text = said(site / "bin" / "sddm", "--help")
    assert help_text.startswith("usage: sddm --model_path PATH") and "--range_t STEP" in help_text
