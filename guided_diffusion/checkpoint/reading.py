"""Read a checkpoint file: bytes to tensors, without running anything that the file holds.

Files of torch.save (zip archives and the older pickles) and `.safetensors`, local or behind a URL. Memory is bounded by
the file's size, archives are checked against their checksums, and texts of a file reach an error line shortened.
"""

import contextlib
import io
import json
import os
import pickle
import re
import warnings
import zipfile
from typing import Any

import torch

from ..errors import InputError, display_name, first_line, one_line
from ..options import near_miss
from ..run.files import read_json

# Keys that hold the weights. EMA entries are tried first: they are the ones to sample with.
STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "net", "module")


LARGEST_JSON = 64 << 20
"""Bytes of a JSON file beyond which it is no configuration."""


class Placeholder:
    """What stands for harmless objects beside the weights (numpy scalars, parsed flags): it keeps and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Placeholder":
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


# Globals of pickles that become placeholders. What they would make is never looked at.
HARMLESS = (
    *("argparse.Namespace", "types.SimpleNamespace", "_codecs.encode"),
    *(f"numpy.{package}.multiarray.{name}" for package in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *("numpy.dtype", "numpy.ndarray"),
    *(f"numpy.dtypes.{kind}DType" for kind in ("Float16", "Float32", "Float64", "Bool")),
    *(f"numpy.dtypes.{sign}Int{bits}DType" for sign in ("", "U") for bits in (8, 16, 32, 64)),
    *("pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.Path", "pathlib._local.PosixPath", "pathlib._local.Path"),
)


def read(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors by name, metadata) of a .safetensors or torch file; metadata is {} for the latter.

    The tensors are in memory: what becomes of the file afterwards does not change them. Raises InputError.
    """
    path = os.fspath(path)
    shown = display_name(path)
    source, head = _open(path)
    if head[8:9] == b"{" or (path.endswith(".safetensors") and not head.startswith(b"PK")):
        return _read_safetensors(path, source, head)
    content = _read_pickle(path, source, head)
    state = _find_state(content)
    if state is None:
        names = (
            [one_line(name, 60) for name in list(content)[:8] if isinstance(name, str)]
            if isinstance(content, dict)
            else []
        )
        what = f"its entries are {', '.join(names)}" if names else f"it is a {type(content).__name__}"
        raise InputError(f"{shown} holds no weights: {one_line(what)}")
    return state, {}


def read_content(path: str | os.PathLike) -> Any:
    """The whole content of a file of torch.save, as an optimizer's state; checked like `read`. Raises InputError."""
    path = os.fspath(path)
    source, head = _open(path)
    return _read_pickle(path, source, head)


def read_json_object(path: str) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError, naming the file, for what is none."""
    shown = display_name(path)
    if not os.path.isfile(path):
        raise InputError(f"{shown} is missing or not a regular file")
    if os.path.getsize(path) > LARGEST_JSON:
        raise InputError(f"{shown} has {os.path.getsize(path)} bytes, too many for its kind")
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{shown} cannot be read: it is not a JSON object")
    return content


def _read_pickle(path: str, source: str | io.BytesIO, head: bytes) -> Any:
    shown = display_name(path)
    if not head.startswith((b"PK", b"\x80")):
        raise InputError(f"{shown} is not a checkpoint: {_looks_like(head)}")
    if head.startswith(b"PK"):
        _check_archive(shown, source)
    if path.endswith(".safetensors") and isinstance(source, str):
        # torch.load believes the name.
        with open(path, "rb") as file:
            source = io.BytesIO(file.read())
    harmless: list[Any] = [(Placeholder, name) for name in HARMLESS]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(harmless):
            warnings.simplefilter("ignore")  # about the age of the file's format, which is no concern of the reader's
            return torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise whatever the unpickler trips over
        raise InputError(f"{shown} {_why_not_loaded(error, source)}") from None


def _open(path: str) -> tuple[str | io.BytesIO, bytes]:
    """(what to read from: the path, or a buffer for a URL; its first bytes)."""
    if "://" in path:
        return _download(path)
    shown = display_name(path)
    try:
        if os.path.isdir(path):
            raise InputError(f"{shown} is a folder; a checkpoint file is needed")
        if os.path.exists(path) and not os.path.isfile(path):
            raise InputError(f"{shown} is not a regular file; a checkpoint file is needed")
        with open(path, "rb") as file:
            head = file.read(64)
    except FileNotFoundError:
        where = near_miss(path) or "; models/README.md says where checkpoints are available"
        raise InputError(f"{shown} does not exist{where}") from None
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path!r} cannot be read: {getattr(error, 'strerror', None) or first_line(error)}") from None
    if not head:
        raise InputError(f"{shown} is empty (0 bytes)")
    return path, head


def _download(url: str) -> tuple[io.BytesIO, bytes]:
    shown = display_name(url)
    try:
        import blobfile

        with blobfile.BlobFile(url, "rb") as file:
            data = file.read()
    except ImportError:
        raise InputError(f"{shown} cannot be read: the package blobfile is not installed") from None
    except Exception as error:  # blobfile raises types of its own, of several storage services and of urllib3
        raise InputError(f"{shown} cannot be read: {first_line(error)}") from None
    if not data:
        raise InputError(f"{shown} is empty (0 bytes)")
    return io.BytesIO(data), data[:64]


def _read_safetensors(
    path: str, source: str | io.BytesIO, head: bytes
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    from safetensors import safe_open
    from safetensors.torch import load

    shown = display_name(path)
    if head[8:9] != b"{":
        raise InputError(f"{shown} is not a safetensors file: {_looks_like(head)}")
    try:
        if not isinstance(source, str):
            data = source.getvalue()
            length = int.from_bytes(data[:8], "little")
            return load(data), json.loads(data[8 : 8 + length]).get("__metadata__") or {}
        with safe_open(source, framework="pt") as file:
            # The tensors are windows on the file, which may change.
            names = list(file.keys())
            return {key: file.get_tensor(key).clone() for key in names}, file.metadata() or {}
    except Exception as error:  # the library's errors have types of their own
        raise InputError(f"{shown} is truncated or not a safetensors file: {first_line(error)}") from None


def _size(source: str | io.BytesIO) -> int:
    return os.path.getsize(source) if isinstance(source, str) else source.getbuffer().nbytes


def _check_archive(shown: str, source: str | io.BytesIO) -> None:
    """Raise InputError for an archive that unpacks to far more than its size, or that differs from its checksums."""
    try:
        with zipfile.ZipFile(source) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > 4 * _size(source) + (64 << 20):
                raise InputError(
                    f"{shown} is refused: it would unpack to {unpacked} bytes, {_size(source)} are in the file"
                )
            for entry in archive.infolist():
                with archive.open(entry) as file:
                    while file.read(1 << 22):  # the end of an entry compares its checksum
                        pass
    except InputError:
        raise
    except zipfile.BadZipFile as error:
        if "CRC" in str(error):
            raise InputError(f"{shown} is damaged: {first_line(error)}; download or copy it again") from None
        raise InputError(f"{shown} is truncated or damaged: {first_line(error)}") from None
    except Exception as error:  # zipfile and zlib raise many types for a damaged archive
        raise InputError(f"{shown} is truncated or damaged: {first_line(error)}") from None
    finally:
        if not isinstance(source, str):
            source.seek(0)


def _why_not_loaded(error: Exception, source: str | io.BytesIO) -> str:
    """What an error of torch.load says about a file, as the rest of a sentence that begins with the file's name."""
    text = str(error)
    refused = re.search(r"GLOBAL (\S+)", text)
    if refused:
        return (
            f"holds more than tensors ({one_line(refused[1], 100)}), and loading that could run code: refused. "
            "Save its state dict alone"
        )
    if "TorchScript" in text:
        return "is a TorchScript program, which would be run: refused. Save its state dict alone"
    if isinstance(error, pickle.UnpicklingError):
        operand = re.search(r"Unsupported operand (\d+)", text)
        if operand:
            return (
                f"is damaged or was not written with torch.save's own pickle protocol, 2: it has the instruction "
                f"{operand[1]}, which is not known to be safe"
            )
        reason = re.search(r"WeightsUnpickler error: *(.+)", text)
        return f"is damaged or no torch checkpoint: {one_line(reason[1]) if reason else first_line(error)}"
    with contextlib.suppress(Exception), zipfile.ZipFile(source) as archive:
        if not any(name.endswith("/data.pkl") for name in archive.namelist()):
            return "is a zip archive, but not one of torch.save"
    return f"is truncated or damaged: {first_line(error)}"


def _looks_like(head: bytes) -> str:
    text = head.lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; run `git lfs pull`"
    if text.startswith((b"<!doctype", b"<html")):
        return "it is a web page, probably of a download that needs a click"
    return f"it begins with {head[:16]!r}"


def _find_state(content: Any, levels: int = 4, seen: set[int] | None = None) -> dict[str, torch.Tensor] | None:
    """The dictionary of tensors in what torch.load gave, averaged weights first; None where there is none.

    Counters and the like beside the weights do no harm; optimizer states, which are tensors too, are passed over. A
    container that was looked into, a file that contains itself for example, is not looked into again.
    """
    from .architecture import is_average

    seen = set() if seen is None else seen
    if id(content) in seen or not isinstance(content, (dict, list, tuple)):
        return None
    seen.add(id(content))
    if not isinstance(content, dict):
        # The ddim repository saves [model, optimizer, epoch, step, averaged model].
        states = (_find_state(item, levels - 1, seen) for item in reversed(content)) if levels else ()
        return next((state for state in states if state), None)
    names = [name for name in content if isinstance(name, str)]
    averaged = [name for name in names if is_average(name) and not name.startswith("opt")]
    for name in [*averaged, *STATE_DICT_KEYS] if levels else ():
        if isinstance(content.get(name), dict):
            state = _find_state(content[name], levels - 1, seen)
            if state:
                return state
    tensors = {name: content[name] for name in names if isinstance(content[name], torch.Tensor)}
    return tensors if any(value.ndim for value in tensors.values()) else None


__all__ = ["HARMLESS", "STATE_DICT_KEYS", "Placeholder", "read", "read_content"]
