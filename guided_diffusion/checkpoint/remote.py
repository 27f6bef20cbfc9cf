"""Checkpoints that are elsewhere: models of the Hugging Face hub, and the published files that have a name here.

Models of the hub go through the package huggingface_hub, where it is installed, with its own settings: HF_HOME (the
cache), HF_TOKEN, HF_HUB_OFFLINE. Only configurations and weights are downloaded, never code. Processes that ask for the
same model at once wait for each other in the client's cache.
"""

import glob
import os
import re
import tempfile

import torch

from ..errors import InputError, display_name, first_line, fitting, log, shown
from .reading import read_file

SCHEME = "hf://"
ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?")
SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".npz", ".json")
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
    if os.path.exists(path) or not ID.fullmatch(path) or path.lower().endswith(SUFFIXES):
        return False
    return not os.path.isdir(path.split("/")[0])  # models/x is a file that is missing


def resolve(path: str) -> tuple[str, str | None]:
    """(the folder of a hub model, downloaded where it is missing, and owner/name@commit); (path, None) for other paths.

    Raises InputError.
    """
    if not is_id(path):
        return path, None
    match = ID.fullmatch(path.removeprefix(SCHEME))
    if not match:
        written = f"it is written {SCHEME}owner/name@revision"
        raise InputError(f"{display_name(path)} is no model of the Hugging Face hub; {written}")
    name, revision = match.groups()
    try:
        from huggingface_hub import snapshot_download  # type: ignore[import-not-found]
    except ImportError:
        install = "to load it from the Hugging Face hub, pip install huggingface_hub"
        raise InputError(f"{name} does not exist here; {install}") from None
    patterns = [*CONFIGURATION, *(pattern.format("safetensors") for pattern in WEIGHTS)]
    try:
        folder = snapshot_download(name, allow_patterns=patterns, revision=revision)
        if not glob.glob(f"{glob.escape(folder)}/**/*.safetensors", recursive=True):
            # Not all models have safe weights; the pickles of others are read without running them.
            patterns += [pattern.format("bin") for pattern in WEIGHTS]
            folder = snapshot_download(name, allow_patterns=patterns, revision=revision)
    except Exception as error:  # of the client, of its HTTP library, of the disk
        kind = next((base.__name__ for base in type(error).__mro__ if base.__name__ in REASONS), None)
        reason = REASONS[kind] if kind else f"cannot be loaded from the Hugging Face hub: {first_line(error)}"
        raise InputError(f"{name}{f'@{revision}' if revision else ''} {reason}") from None
    commit = os.path.basename(folder)
    log.info("%s, commit %s, from the Hugging Face hub; cached in %s", name, commit, folder)
    return folder, f"{name}@{commit}"


OPENAI = "https://openaipublic.blob.core.windows.net/diffusion/"
ADAIN = "https://github.com/naoto0804/pytorch-AdaIN/releases/download/v0.0.0/"
GUIDED = (
    *(f"{size}x{size}_{kind}.pt" for kind in ("diffusion", "classifier") for size in (64, 128, 256, 512)),
    *("256x256_diffusion_uncond.pt", "lsun_bedroom.pt", "lsun_cat.pt", "lsun_horse.pt", "lsun_horse_nodropout.pt"),
)
IMPROVED = (
    *("imagenet64_uncond_100M_1500K.pt", "imagenet64_uncond_vlb_100M_1500K.pt", "imagenet64_cond_270M_250K.pt"),
    *("cifar10_uncond_50M_500K.pt", "cifar10_uncond_vlb_50M_500K.pt"),
    *("lsun_uncond_100M_1200K_bs128.pt", "lsun_uncond_100M_2400K_bs64.pt"),
)
FILES = {
    **{name: f"{OPENAI}jul-2021/{name}" for name in GUIDED},
    **{name: f"{OPENAI}march-2021/{name}" for name in IMPROVED},
    "vgg_normalised.pth": f"{ADAIN}vgg_normalised.pth",
}
"""Addresses of published files by name."""


def fetch(name: str, folder: str | os.PathLike, *, url: str | None = None, progress: bool = False) -> str:
    """Download a published file into a folder and return its path; a file that is already present is only read.

    url: its address, default that of `FILES`. progress: show a bar on stderr. The file gets its name once it was read,
    which compares it with its checksums, so that it is whole or missing. Raises InputError.
    """
    if url is None:
        name = next((known for known in FILES if name in (known, os.path.splitext(known)[0])), name)
        if name not in FILES:
            raise InputError(f"{shown(name)} is not a published file that is known: {fitting(name, list(FILES))}")
        url = FILES[name]
    path, source = os.path.join(folder, name), f" (downloaded from {url})"
    try:
        if os.path.lexists(path):
            source = "; delete it to download it again"
            read_file(path)
            log.info("%s is already present", display_name(path))
            return path
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as place:
            part = os.path.join(place, name)
            torch.hub.download_url_to_file(url, part, progress=progress)
            read_file(part)
            os.replace(part, path)
    except InputError as error:
        raise InputError(f"{error}{source}") from None
    except Exception as error:  # of urllib, of http.client, of the disk, and of answers that they do not expect
        raise InputError(f"{name} cannot be downloaded from {url} to {path}: {first_line(error)}") from None
    return path
