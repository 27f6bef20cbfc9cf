"""What all tests share: golden data and the models built from it."""

import json
import os
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR") or ROOT / "tests" / "golden")


@lru_cache(maxsize=None)
def golden_index():
    """The settings of every golden file, by its name."""
    return json.loads((GOLDEN_DIR / "index.json").read_text())


def golden(name):
    """Tensors of the golden file `name`; a missing file is an error and fails the test."""
    return load_file(GOLDEN_DIR / f"{name}.safetensors")


def golden_names(prefix, committed):
    """Names of golden files with a prefix: those committed with the repository and all others that GOLDEN_DIR has."""
    found = {path.stem for path in GOLDEN_DIR.glob(f"{prefix}*.safetensors")}
    return sorted(found | set(committed))
