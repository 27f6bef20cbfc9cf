"""Checkpoints: find out what a file is, load it safely, and save one that describes itself.

Files are read as published: guided-diffusion, ILVR and P2-weighting `.pt`, DDPM `.pth`, classifiers and domain-specific
extractors, `.safetensors` of any of them, and models of diffusers (folders, and ids of the Hugging Face hub). Nothing
in a file is executed. The architecture is read from names and shapes of its tensors; what these cannot tell comes from
flags, from metadata, or from a table of published models.

Modules: `reading` (bytes to tensors), `architecture` (tensors to flags), `published` (what tensors cannot tell of the
published models), `reconcile` (tensors, metadata and flags together), `diffusers_format` (models of diffusers), `hub`
(downloading them), `export` (writing them), `loading` (build, fill, save).
"""

from .loading import fingerprint, identify, load_model, load_state_dict, save_model
from .reading import read
from .reconcile import RUNTIME_FLAGS, ModelFlags, ModelInfo

__all__ = [
    "RUNTIME_FLAGS",
    "ModelFlags",
    "ModelInfo",
    "fingerprint",
    "identify",
    "load_model",
    "load_state_dict",
    "read",
    "save_model",
]
