"""Checkpoints: find out what a file is, load it safely, and save one that describes itself.

Files are read as published: guided-diffusion, ILVR and P2-weighting `.pt`, DDPM `.pth`, classifiers and domain-specific
extractors, `.safetensors` of any of them, and models of diffusers (folders, and ids of the Hugging Face hub). Nothing
in a file is executed. The architecture is read from names and shapes of its tensors; what these cannot tell comes from
flags, from metadata, or from a table of published models.

Modules: `reading` (bytes to tensors), `architecture` (tensors to flags), `published` (what else is known of published
models), `reconcile` (tensors, metadata and flags together), `diffusers` and `diffusers_tensors` (models of diffusers),
`remote` (downloading), `loading` (the kinds of checkpoints; build, fill, save), `export` (writing other formats).
"""

from .loading import CHECKPOINTS, Network, Source, fingerprint, identify, load_model, load_state_dict, save_model
from .reading import read
from .reconcile import RUNTIME_FLAGS, ModelFlags, ModelInfo

__all__ = [
    "CHECKPOINTS",
    "RUNTIME_FLAGS",
    "ModelFlags",
    "ModelInfo",
    "Network",
    "Source",
    "fingerprint",
    "identify",
    "load_model",
    "load_state_dict",
    "read",
    "save_model",
]
