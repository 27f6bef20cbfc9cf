"""Recommended options by name, for every method. `python docs/make.py presets` writes their table in docs/usage.md."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from .errors import InputError
from .registry import Registry

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FILES = ("model_path", "encoder")
"""Options that name a file of the repository's folder models/."""

PRESETS = Registry("preset")


class Preset(NamedTuple):
    """Recommended options: what for, the target domain's checkpoint, and options by a method's name."""

    about: str
    model: str
    methods: Mapping[str, Mapping[str, Any]]


def preset_options(name: str, method: str) -> dict[str, Any]:
    """A preset's options for a method, with `model_path`. Raises InputError for an unknown name or method."""
    preset = PRESETS.pick(name)
    if method not in preset.methods:
        reason = f"it has no options for {method}; it has for {', '.join(preset.methods)}"
        raise InputError(reason, parameter="preset", value=name)
    options = {"model_path": preset.model, **preset.methods[method]}
    return {key: located(value) if key in FILES else value for key, value in options.items()}


def located(path: str) -> str:
    """A file of the repository, found from any working directory; as it is where the repository has none."""
    found = os.path.join(ROOT, path)
    return found if os.path.exists(found) else path


def _add(name: str, about: str, model: str, **methods: Mapping[str, Any]) -> None:
    PRESETS.add(name)(Preset(about, f"models/{model}", methods))


# Settings of the papers: T' = 100 with T0 = 0.5 T and 16x16 blocks; ILVR with N = 32; SDEdit and EGSDE with M = 0.5 T.
PAPERS = {
    "sddm": {"timestep_respacing": "100", "blocks": 16, "range_t": 0.5},
    "ilvr": {"timestep_respacing": "100", "down_n": 32, "range_t": 0.2},
    "sdedit": {"start": 0.5},
}
# Flat to 3D emoji, by eye: eyes and mouths stay, volume and highlights appear. Figures: benchmarks/emoji/variations.md.
# Energies make no difference there (energies.md).
EMOJI = {"timestep_respacing": "50", "blocks": 32, "range_t": 0.25, "start": 0.6, "details": 0.08, "energy": "none"}


def _egsde(task: str, ls: float = 500.0, li: float = 2.0) -> dict[str, Any]:
    return {"start": 0.5, "ls": ls, "li": li, "encoder": f"models/{task}_dse.pt"}


_add("cat2dog", "cats to dogs (AFHQ, 256 px)", "afhq_dog_4m.pt", **PAPERS, egsde=_egsde("cat2dog"))
_add("wild2dog", "wild animals to dogs (AFHQ, 256 px)", "afhq_dog_4m.pt", **PAPERS, egsde=_egsde("wild2dog"))
_add(
    "male2female", "men to women (CelebA-HQ, 256 px)", "celebahq_female_ddpm.pth",
    **PAPERS, egsde=_egsde("male2female", 700.0, 0.5),
)  # fmt: skip
_add("dog2cat", "dogs to cats (LSUN, 256 px)", "lsun_cat.pt", **PAPERS)
_add(
    "emoji", "flat drawings to glossy 3D emoji (64 px)", "fluent3d_64.safetensors",
    sddm=EMOJI,
    ilvr={"timestep_respacing": "100", "down_n": 4, "range_t": 0.4},
    sdedit={"timestep_respacing": "100", "start": 0.4},
    egsde={"start": 0.5, "ls": 30.0, "li": 2.0, "down_n": 8, "encoder": "models/fluent3d_64_dse.safetensors"},
)  # fmt: skip
_add("fast", "the same in fewer steps", "fluent3d_64.safetensors", sddm={**EMOJI, "timestep_respacing": "25"})
# The front of benchmarks/cells: as many cells judged functional as with SDEdit at 0.4 T, and more faithful.
_add(
    "cells", "defective to functional solar cells (64 px)", "cells_64.safetensors",
    sddm={"timestep_respacing": "25", "blocks": 16, "range_t": 0.3, "start": 0.4, "energy": "dct"},
    ilvr={"timestep_respacing": "25", "down_n": 8, "range_t": 0.2},
    sdedit={"timestep_respacing": "25", "start": 0.4},
)  # fmt: skip
