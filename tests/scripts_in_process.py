"""The scripts as modules, for tests that run a command in their own process."""

import importlib.util
import os
import shlex
import signal
from pathlib import Path

import numpy as np
from PIL import Image

from guided_diffusion import dist_util

ROOT = Path(__file__).resolve().parent.parent


def load_script(name):
    """The module of scripts/`name`.py. What it does to signals as a command is undone."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    specification = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    try:
        specification.loader.exec_module(module)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return module


def run_script(name, *flags):
    """A sampling command in this process, without its handling of errors; returns its exit status."""
    module = load_script(name)
    return module.translate(module.create_parser().parse(list(map(str, flags))), dist_util.connect(dist_util.Ranks()))


def made_by(text, folder):
    """The picture that a command line of ae_sample.py makes when it runs in a folder: uint8 [H, W, 3]."""
    words = shlex.split(text)
    assert words[:2] == ["python", "scripts/ae_sample.py"]
    given = load_script("ae_sample").create_parser().parse(words[2:])
    before = os.getcwd()
    os.chdir(folder)
    try:
        assert run_script("ae_sample", *words[2:]) == 0
        name = f"{os.path.splitext(os.path.basename(given.base_samples))[0]}.png"
        return np.asarray(Image.open(os.path.join(given.save_dir, name)))
    finally:
        os.chdir(before)


def message(name, error):
    """What the command says of an InputError."""
    return error.text(load_script(name).create_parser().spell)
