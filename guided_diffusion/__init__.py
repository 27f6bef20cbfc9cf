"""SDDM: score-decomposed diffusion models on manifolds, for unpaired image-to-image translation.

The package keeps guided-diffusion's module names and adds the method's own: `sddm`, `manifold`, `moo`, `energy`,
`baselines`. `Translator` and `load_model` are imported when they are first used, so that the import costs nothing.
"""

import importlib
from typing import Any

__version__ = "0.3.0"
__all__ = ["Translator", "load_model"]


def __getattr__(name: str) -> Any:
    modules = {"Translator": ".translator", "load_model": ".checkpoint"}
    if name in modules:
        return getattr(importlib.import_module(modules[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
