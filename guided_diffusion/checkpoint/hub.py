"""Models of the Hugging Face hub, through the package huggingface_hub where that is installed.

The client's own settings count: HF_HOME (where the cache is), HF_TOKEN, HF_HUB_OFFLINE. Only configurations and weights
are downloaded, never code. Processes that ask for the same model at once wait for each other in the client's cache.
"""

import logging
import os
import re
from typing import Any

from ..errors import InputError, display_name, first_line

log = logging.getLogger(__name__)

SCHEME = "hf://"
ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
FILES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".npz", ".json")
CONFIGURATION = (
    *("model_index.json", "config.json", "scheduler_config.json", "scheduler/scheduler_config.json"),
    *("unet/config.json", "diffusion_pytorch_model*.json", "unet/diffusion_pytorch_model*.json"),
)
WEIGHTS = ("diffusion_pytorch_model*.{}", "unet/diffusion_pytorch_model*.{}")

# Exceptions of the client by name, since their place changed between versions.
REASONS = {
    "RepositoryNotFoundError": "is neither a file here nor a model of the Hugging Face hub that you may read",
    "GatedRepoError": "needs its terms to be accepted on the Hugging Face hub, and HF_TOKEN set",
    "RevisionNotFoundError": "has no such revision",
    "LocalEntryNotFoundError": "is not in the local cache of the Hugging Face hub, and the hub cannot be reached",
    "OfflineModeIsEnabled": "is not in the local cache of the Hugging Face hub, and HF_HUB_OFFLINE is set",
    "HFValidationError": "is no name of a model on the Hugging Face hub",
}


def is_id(path: str) -> bool:
    """Whether a path names a model of the hub: hf://owner/name, or owner/name that is no path here."""
    if path.startswith(SCHEME):
        return True
    if os.path.exists(path) or not ID.fullmatch(path) or path.lower().endswith(FILES):
        return False
    return not os.path.isdir(path.split("/")[0])  # models/x is a file that is missing


def resolve(path: str) -> str:
    """The folder of a hub model, downloaded where it is missing; any other path as it is. Raises InputError."""
    return _snapshot(path) if is_id(path) else path


def identity(path: str) -> str:
    """owner/name@commit of a hub model that is in the cache."""
    name, _ = _parse(path)
    return f"{name}@{os.path.basename(_snapshot(path, quiet=True))}"


def _parse(path: str) -> tuple[str, str | None]:
    match = ID.fullmatch(path.removeprefix(SCHEME))
    if not match:
        written = f"it is written {SCHEME}owner/name@revision"
        raise InputError(f"{display_name(path)} is no model of the Hugging Face hub; {written}")
    return match[1], match[2]


def _snapshot(path: str, quiet: bool = False) -> str:
    name, revision = _parse(path)
    try:
        from huggingface_hub import snapshot_download  # type: ignore[import-not-found]
    except ImportError:
        raise InputError(
            f"{name} does not exist here; to load it from the Hugging Face hub, pip install huggingface_hub"
        ) from None
    options: dict[str, Any] = {"revision": revision}
    patterns = [*CONFIGURATION, *(pattern.format("safetensors") for pattern in WEIGHTS)]
    try:
        folder = snapshot_download(name, allow_patterns=patterns, **options)
        if not _holds(folder, ".safetensors"):
            # Not all models have safe weights; the pickles of others are read without running them.
            folder = snapshot_download(name, allow_patterns=[*patterns, *(p.format("bin") for p in WEIGHTS)], **options)
    except Exception as error:  # of the client, of its HTTP library, of the disk
        kind = next((base.__name__ for base in type(error).__mro__ if base.__name__ in REASONS), None)
        shown = name if revision is None else f"{name}@{revision}"
        reason = REASONS[kind] if kind else f"cannot be loaded from the Hugging Face hub: {first_line(error)}"
        raise InputError(f"{shown} {reason}") from None
    if not quiet:
        log.info("%s, commit %s, from the Hugging Face hub; cached in %s", name, os.path.basename(folder), folder)
    return folder


def _holds(folder: str, suffix: str) -> bool:
    places = (folder, os.path.join(folder, "unet"))
    return any(name.endswith(suffix) for place in places if os.path.isdir(place) for name in os.listdir(place))
