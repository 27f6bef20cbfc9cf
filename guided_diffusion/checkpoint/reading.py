"""Read a checkpoint file: bytes to tensors, without running anything that the file holds.

Files of torch.save (zip archives and the older pickles) and `.safetensors`, local or behind a URL. Memory is bounded by
the file's size, archives are checked against their checksums, and texts of a file reach an error line shortened.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import re
import stat
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import torch

from ..errors import InputError, display_name, first_line, one_line, reading
from ..options import near_miss
from ..run.files import read_json

log = logging.getLogger(__name__)

STATE_DICT_KEYS = ("state_dict", "model_state_dict", "model", "net", "module")
"""Keys that hold the weights. Averaged weights (`is_average`), the ones to sample with, are tried before them."""


class Placeholder:
    """Stands for harmless objects beside the weights (numpy arrays and numbers, parsed flags): keeps what made them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args: tuple[Any, ...] = args
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def plain(value: Any) -> Any:
    """The dictionary, array or number that a placeholder stands for; other values as they are."""
    if not isinstance(value, Placeholder):
        return value
    if isinstance(value.state, dict):
        return value.state
    with contextlib.suppress(Exception):  # of other objects, and of damaged ones
        array = isinstance(value.state, tuple)
        dtype, raw = (value.state[2], value.state[4]) if array else value.args
        text, encoding = raw.args if isinstance(raw, Placeholder) else (raw.decode("latin1"), "latin1")
        found = np.frombuffer(text.encode(encoding), dtype.args[0]).copy()
        return found if array else found[0].item()
    return value


# Globals of pickles that become placeholders.
HARMLESS = (
    *("argparse.Namespace", "types.SimpleNamespace", "_codecs.encode"),
    *(f"numpy.{package}.multiarray.{name}" for package in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *("numpy.dtype", "numpy.ndarray"),
    *(f"numpy.dtypes.{kind}DType" for kind in ("Float16", "Float32", "Float64", "Bool")),
    *(f"numpy.dtypes.{sign}Int{bits}DType" for sign in ("", "U") for bits in (8, 16, 32, 64)),
    *("pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.Path", "pathlib._local.PosixPath", "pathlib._local.Path"),
)


@dataclass(frozen=True)
class Contents:
    """Everything that is used of a checkpoint file, in memory: later changes of the file do not matter.

    tensors: the weights by name, the averaged ones where the file has several sets. metadata: texts of a .safetensors
    file. beside: the other entries of a torch file (hyper-parameters, betas, counters). sha256: of the bytes that were
    read; None for a URL.
    """

    path: str
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    beside: Mapping[str, Any] = field(default_factory=dict)
    sha256: str | None = None

    @property
    def fingerprint(self) -> str | None:
        """The identity of the file in a run's record."""
        return f"sha256 {self.sha256}" if self.sha256 else None


def read_file(path: str | os.PathLike) -> Contents:
    """Read a .safetensors or torch file. Raises InputError for a file that is damaged, unsafe, or holds no weights."""
    path = os.fspath(path)
    content, metadata, digest = _read(path)
    found = (content, {}) if metadata is not None else _find_state(content)
    if found is None:
        names = [one_line(name, 60) for name in content if isinstance(name, str)] if isinstance(content, dict) else []
        what = f"its entries are {', '.join(names[:8])}" if names else f"it is a {type(content).__name__}"
        raise InputError(f"{display_name(path)} holds no weights: {one_line(what)}")
    for name, value in found[0].items():
        if value.is_nested or value.layout != torch.strided or value.is_quantized or value.is_meta:
            what = "nested" if value.is_nested else "on the device meta" if value.is_meta else value.layout
            what = value.dtype if value.is_quantized else what
            raise InputError(f"{display_name(path)}: the tensor {one_line(name, 100)} is {what}; a dense one is needed")
    return Contents(path, found[0], metadata or {}, found[1], digest)


def read(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors by name, metadata) of a .safetensors or torch file; metadata is {} for the latter. Raises InputError."""
    contents = read_file(path)
    return dict(contents.tensors), dict(contents.metadata)


def read_json_object(path: str) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError, naming the file, for anything else."""
    _check_place(path)
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{display_name(path)} cannot be read: it is not a JSON object")
    return content


def hash_file(path: str, digest: Any = None) -> str:
    """SHA-256 of a file's bytes as hexadecimal digits; digest: a hash to continue. Raises InputError."""
    digest = digest or hashlib.sha256()
    with reading(path), open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_average(name: str) -> bool:
    """Whether a name, like "ema_0.9999" or "model_ema.", is one of averaged weights."""
    return re.search(r"(?<![a-z])ema(?![a-z])", name, re.IGNORECASE) is not None


def _read(path: str) -> tuple[Any, dict[str, str] | None, str | None]:
    """(content, metadata of a .safetensors file, SHA-256 of a local file)."""
    if "://" in path:
        return *_parse(path, _download(path)), None
    _check_place(path)
    with reading(path), open(path, "rb") as file:
        before, digest = os.fstat(file.fileno()), hash_file(path)
        parsed, after = _parse(path, file), os.stat(path)
    if any(getattr(before, name) != getattr(after, name) for name in ("st_ino", "st_dev", "st_size", "st_mtime_ns")):
        raise InputError(f"{display_name(path)} was changed while it was read; run the same command again")
    return *parsed, digest


def _check_place(path: str) -> None:
    """Raise InputError where there is no regular file at a path."""
    shown = display_name(path)
    with reading(path):
        try:
            mode = os.stat(path).st_mode
        except FileNotFoundError:
            where = near_miss(path) or "; models/README.md says where checkpoints are available"
            raise InputError(f"{shown} does not exist{where}") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise InputError(f"{shown} is {kind}; a checkpoint file is needed")


def _download(url: str) -> io.BytesIO:
    log.info("downloading %s; without a network, this fails only after a minute or two", display_name(url))
    with reading(url):
        import blobfile

        with blobfile.BlobFile(url, "rb") as file:
            return io.BytesIO(file.read())


def _parse(path: str, file: BinaryIO) -> tuple[Any, dict[str, str] | None]:
    """(content, metadata of a .safetensors file) of an open file; the format is told by its first bytes."""
    file.seek(0)
    head = file.read(64)
    shown = display_name(path)
    if not head:
        raise InputError(f"{shown} is empty (0 bytes)")
    if head[8:9] == b"{":
        return _read_safetensors(path, file)
    if not head.startswith((b"PK", b"\x80")):
        kind = "a safetensors file" if path.endswith(".safetensors") else "a checkpoint"
        raise InputError(f"{shown} is not {kind}: {_looks_like(head)}")
    if head.startswith(b"PK"):
        _check_archive(path, file)
    file.seek(0)
    harmless: list[Any] = [(Placeholder, name) for name in HARMLESS]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(harmless):
            warnings.simplefilter("ignore")  # about the age of the file's format, which is no concern of the reader's
            return torch.load(file, map_location="cpu", weights_only=True), None
    except Exception as error:  # damaged files raise whatever the unpickler trips over
        raise InputError(f"{shown} {_why_not_loaded(error)}") from None


def _read_safetensors(path: str, file: BinaryIO) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    from safetensors import safe_open
    from safetensors.torch import load

    with reading(path, "a safetensors file"):
        if isinstance(file, io.BytesIO):
            data = file.getvalue()
            length = int.from_bytes(data[:8], "little")
            return load(data), json.loads(data[8 : 8 + length]).get("__metadata__") or {}
        with safe_open(path, framework="pt") as opened:
            # The tensors are windows on the file, which may change.
            return {key: opened.get_tensor(key).clone() for key in opened.keys()}, opened.metadata() or {}  # noqa: SIM118


def _check_archive(path: str, file: BinaryIO) -> None:
    """Raise InputError for an archive that unpacks to far more than its size, or that differs from its checksums."""
    size = file.seek(0, os.SEEK_END)
    with reading(path, "a whole archive"), zipfile.ZipFile(file) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > 4 * size + (64 << 20):
            what = f"it would unpack to {unpacked} bytes, {size} are in the file"
            raise InputError(f"{display_name(path)} is refused: {what}")
        for entry in archive.infolist():
            with archive.open(entry) as part:
                while part.read(1 << 22):  # the end of an entry compares its checksum
                    pass


def _why_not_loaded(error: Exception) -> str:
    """The reason of an error of torch.load, as the rest of a sentence that begins with the file's name."""
    text = str(error)
    if refused := re.search(r"GLOBAL (\S+)", text):
        what = f"holds more than tensors ({one_line(refused[1], 100)}), and loading that could run code"
    elif "TorchScript" in text:
        what = "is a TorchScript program, which would be run"
    else:
        reason = re.search(r"WeightsUnpickler error:\s*(.+)", text)
        return f"is damaged or not a torch checkpoint: {one_line(reason[1]) if reason else first_line(error)}"
    return f"{what}: refused. Save its state dict alone"


def _looks_like(head: bytes) -> str:
    text = head.lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; run `git lfs pull`"
    if text.startswith((b"<!doctype", b"<html")):
        return "it is a web page, probably of a download that needs a click"
    return f"it begins with {head[:16]!r}"


def _find_state(
    content: Any, levels: int = 4, seen: set[int] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """(the tensors by name, what stands beside them) in what torch.load gave, averaged weights first.

    None where there are no weights. Optimizer states, which are tensors too, are passed over. A container that was
    looked into, as in a file that contains itself, is not looked into again.
    """
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
        found = _find_state(content[name], levels - 1, seen) if isinstance(content.get(name), dict) else None
        if found:
            return found[0], {**{other: content[other] for other in names if other != name}, **found[1]}
    tensors = {name: content[name] for name in names if isinstance(content[name], torch.Tensor)}
    beside = {name: content[name] for name in names if name not in tensors}
    return (tensors, beside) if any(value.dim() for value in tensors.values()) else None
