"""Checkpoints: recognise a file, load it safely, and save one that describes itself.

`reading` (bytes to tensors), `architecture` (tensors to flags), `reconcile` (all that is known of a network),
`diffusers` (its models, in and out), `remote` (downloading), `loading` (kinds of checkpoints; build, fill, save,
convert), `targets` and `pipelines` (ready to sample).
"""

from .loading import CHECKPOINTS, Network, convert, fingerprint, load_model, load_state_dict, recognise, save_model
from .reading import Source, read, read_file
from .reconcile import ModelFlags, ModelInfo

__all__ = [
    "CHECKPOINTS", "ModelFlags", "ModelInfo", "Network", "Source", "convert", "fingerprint", "load_model",
    "load_state_dict", "read", "read_file", "recognise", "save_model",
]  # fmt: skip
