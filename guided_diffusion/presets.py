"""Recommended options by name: a model, and for every method the options that suit its data set.

The one place of these values. `cli` turns them into flags; help texts, the table of docs/usage.md, the shell scripts
and the notebook take them from here (`python docs/make.py presets` writes the table).
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import InputError
from .registry import Registry

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FILES = ("model_path", "encoder")
"""Options that name a file of the repository's folder models/."""

PRESETS = Registry("preset")


@dataclass(frozen=True)
class Preset:
    """Recommended options.

    about: what for, for help texts. model: the target domain's checkpoint. methods: options by a method's name, in
    Python's names.
    """

    about: str
    model: str
    methods: Mapping[str, Mapping[str, Any]]

    def options(self, method: str) -> dict[str, Any]:
        """The options for a method, with `model_path`. Raises InputError for a method without."""
        if method not in self.methods:
            name = next((name for name, preset in PRESETS.items() if preset is self), None)
            reason = f"it has no options for {method}; it has for {', '.join(self.methods)}"
            raise InputError(reason, parameter="preset", value=name)
        return {"model_path": self.model, **self.methods[method]}


def preset_options(name: str, method: str) -> dict[str, Any]:
    """A preset's options for a method, files where they are. Raises InputError for an unknown name or method."""
    options = PRESETS.pick(name).options(method)
    return {key: located(value) if key in FILES else value for key, value in options.items()}


def located(path: str) -> str:
    """A file of the repository, found from any working directory; as it is where the repository has none."""
    found = os.path.join(ROOT, path)
    return found if os.path.exists(found) else path


# Settings of the papers: T' = 100 with T0 = 0.5 T and 16x16 blocks; ILVR with N = 32; SDEdit and EGSDE with M = 0.5 T.
SDDM = {"timestep_respacing": "100", "blocks": 16, "range_t": 0.5}
ILVR = {"timestep_respacing": "100", "down_n": 32, "range_t": 0.2}
EGSDE = {"start": 0.5, "ls": 500.0, "li": 2.0}
BASELINES = {"ilvr": ILVR, "sdedit": {"start": 0.5}}
# Flat to 3D emoji, by eye: eyes and mouths stay, volume and highlights appear. Figures: benchmarks/emoji/variations.md.
# Energies make no difference there (energies.md).
EMOJI = {"timestep_respacing": "50", "blocks": 32, "range_t": 0.25, "start": 0.6, "details": 0.08, "energy": "none"}
FAST = {**EMOJI, "timestep_respacing": "25"}
DOG, DEMO, EXTRACTOR = "models/afhq_dog_4m.pt", "models/fluent3d_64.safetensors", "models/fluent3d_64_dse.safetensors"

PRESETS.add("cat2dog")(
    Preset(
        "cats to dogs (AFHQ, 256 px)",
        DOG,
        {"sddm": SDDM, **BASELINES, "egsde": {**EGSDE, "encoder": "models/cat2dog_dse.pt"}},
    )
)
PRESETS.add("wild2dog")(
    Preset(
        "wild animals to dogs (AFHQ, 256 px)",
        DOG,
        {"sddm": SDDM, **BASELINES, "egsde": {**EGSDE, "encoder": "models/wild2dog_dse.pt"}},
    )
)
PRESETS.add("male2female")(
    Preset(
        "men to women (CelebA-HQ, 256 px)",
        "models/celebahq_female_ddpm.pth",
        {"sddm": SDDM, **BASELINES, "egsde": {**EGSDE, "ls": 700.0, "li": 0.5, "encoder": "models/male2female_dse.pt"}},
    )
)
PRESETS.add("dog2cat")(Preset("dogs to cats (LSUN, 256 px)", "models/lsun_cat.pt", {"sddm": SDDM, **BASELINES}))
PRESETS.add("emoji")(
    Preset(
        "flat drawings to glossy 3D emoji (64 px)",
        DEMO,
        {
            "sddm": EMOJI,
            "ilvr": {"timestep_respacing": "100", "down_n": 4, "range_t": 0.4},
            "sdedit": {"timestep_respacing": "100", "start": 0.4},
            "egsde": {"start": 0.5, "ls": 30.0, "li": 2.0, "down_n": 8, "encoder": EXTRACTOR},
        },
    )
)
PRESETS.add("fast")(Preset("the same in fewer steps", DEMO, {"sddm": FAST}))
# The front of benchmarks/cells: as many cells judged functional as with SDEdit at 0.4 T, and more faithful.
PRESETS.add("cells")(
    Preset(
        "defective to functional solar cells (64 px)",
        "models/cells_64.safetensors",
        {
            "sddm": {"timestep_respacing": "25", "blocks": 16, "range_t": 0.3, "start": 0.4, "energy": "dct"},
            "ilvr": {"timestep_respacing": "25", "down_n": 8, "range_t": 0.2},
            "sdedit": {"timestep_respacing": "25", "start": 0.4},
        },
    )
)
