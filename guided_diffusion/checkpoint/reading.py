"""Read a checkpoint file: bytes to tensors, without running anything that the file holds.

Files of torch.save (zip archives and the older pickles) and `.safetensors`, local or behind a URL. Memory is bounded by
the file's size, archives are checked against their checksums, and texts of a file reach an error line shortened.
"""

import contextlib
import hashlib
import json
import os
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
import torch

from ..errors import InputError, display_name, first_line, log, one_line, reading
from ..options import near_miss
from ..references import open_binary
from ..run.files import read_json

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
    *("argparse.Namespace", "types.SimpleNamespace", "_codecs.encode", "numpy.dtype", "numpy.ndarray"),
    *(f"numpy.{package}.multiarray.{name}" for package in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"numpy.dtypes.{kind}DType" for kind in ("Float16", "Float32", "Float64", "Bool")),
    *(f"numpy.dtypes.{sign}Int{bits}DType" for sign in ("", "U") for bits in (8, 16, 32, 64)),
    *("pathlib.PosixPath", "pathlib.WindowsPath", "pathlib.Path", "pathlib._local.PosixPath", "pathlib._local.Path"),
)


@dataclass(frozen=True)
class Source:
    """The contents of a file, in memory: later changes of it do not matter. A folder has nothing but its path.

    tensors: the weights by name, the averaged ones where the file has several sets. metadata: texts of a .safetensors
    file. beside: the other entries of a torch file (hyper-parameters, betas, counters). sha256: of the file's bytes.
    """

    path: str
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    beside: Mapping[str, Any] = field(default_factory=dict)
    sha256: str = ""

    @property
    def fingerprint(self) -> str:
        """The identity of the file in a run's record."""
        return f"sha256 {self.sha256}" if self.sha256 and "://" not in self.path else self.path


def read_file(path: str | os.PathLike) -> Source:
    """Read a .safetensors or torch file. Raises InputError for a file that is damaged, unsafe, or holds no weights."""
    path = os.fspath(path)
    with _open(path) as file:
        digest = _hash(path, file)
        content, metadata = _parse(path, file)
    found = _find_state(content)
    if found is None:
        names = [one_line(name, 60) for name in content if isinstance(name, str)] if isinstance(content, dict) else []
        what = f"its entries are {', '.join(names[:8])}" if names else f"it is a {type(content).__name__}"
        raise InputError(f"{display_name(path)} holds no weights: {one_line(what)}")
    for name, value in found[0].items():
        if value.is_nested or value.layout != torch.strided or value.is_quantized or value.is_meta:
            what = "nested" if value.is_nested else f"{value.layout} {value.dtype} on {value.device}"
            raise InputError(f"{display_name(path)}: the tensor {one_line(name, 100)} is {what}; a dense one is needed")
    return Source(path, found[0], metadata, found[1], digest)


def read(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """(tensors by name, metadata) of a .safetensors or torch file; metadata is {} for the latter. Raises InputError."""
    source = read_file(path)
    return dict(source.tensors), dict(source.metadata)


def read_json_object(path: str) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError, naming the file, for anything else."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{display_name(path)} cannot be read: it is not a JSON object")
    return content


def hash_file(path: str, digest: Any = None) -> str:
    """SHA-256 of a file's bytes as hexadecimal digits; digest: a hash to continue. Raises InputError."""
    with reading(path), open(path, "rb") as file:
        return _hash(path, file, digest)


def _hash(path: str, file: IO[bytes], digest: Any = None) -> str:
    digest = digest or hashlib.sha256()
    with reading(path):
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_average(name: str) -> bool:
    """Whether a name, like "ema_0.9999" or "model_ema.", is one of averaged weights."""
    return re.search(r"(?<![a-z])ema(?![a-z])", name, re.IGNORECASE) is not None


def _open(path: str) -> IO[bytes]:
    """A local file, or the content of one behind a URL."""
    if "://" in path:
        log.info("downloading %s; without a network, this fails only after a minute or two", display_name(path))
    with reading(path):
        try:
            return open_binary(path)
        except FileNotFoundError:
            where = near_miss(path) or "; models/README.md says where checkpoints are available"
            raise InputError(f"{display_name(path)} does not exist{where}") from None


def _parse(path: str, file: IO[bytes]) -> tuple[Any, dict[str, str]]:
    """(content, metadata of a .safetensors file) of an open file; its first bytes tell the format."""
    file.seek(0)
    head = file.read(40)
    file.seek(0)
    if head[8:9] == b"{":
        from safetensors.torch import load

        with reading(path, "a safetensors file"):
            data = file.read()
            header = data[8 : 8 + int.from_bytes(data[:8], "little")]
            return load(data), json.loads(header).get("__metadata__") or {}
    if head.startswith(b"PK"):
        _check_archive(path, file)
    elif not head.startswith(b"\x80"):
        what = f"it begins with {head!r}" if head else "it is empty"  # a web page, a pointer of Git LFS, …
        raise InputError(f"{display_name(path)} is not a checkpoint: {what}")
    harmless: list[Any] = [(Placeholder, name) for name in HARMLESS]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(harmless):
            warnings.simplefilter("ignore")  # about the age of the file's format, which is no concern of the reader's
            return torch.load(file, map_location="cpu", weights_only=True), {}
    except Exception as error:  # damaged files raise whatever the unpickler trips over
        raise InputError(f"{display_name(path)} {_why_not_loaded(error)}") from None


def _check_archive(path: str, file: IO[bytes]) -> None:
    """Raise InputError for an archive that unpacks to far more than its size, or that differs from its checksums."""
    size = file.seek(0, os.SEEK_END)
    with reading(path, "a whole archive"), zipfile.ZipFile(file) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > 4 * size + (64 << 20):
            raise InputError(f"{display_name(path)} is refused: its {size} bytes would unpack to {unpacked}")
        if name := archive.testzip():
            raise ValueError(f"the checksum of its entry {name} differs")
    file.seek(0)


def _why_not_loaded(error: Exception) -> str:
    """The reason of an error of torch.load, as the rest of a sentence that begins with the file's name."""
    if refused := re.search(r"GLOBAL (\S+)", str(error)):
        what = f"holds more than tensors ({one_line(refused[1], 100)}), and loading that could run code"
        return f"{what}: refused. Save its state dict alone"
    reason = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    return f"is damaged or not a torch checkpoint: {one_line(reason[1]) if reason else first_line(error)}"


def _find_state(
    content: Any, levels: int = 5, seen: set[int] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """(the tensors by name, what stands beside them) in what a file holds, averaged weights first; None without any.

    Optimizer states, which are tensors too, are passed over, and so is what was looked into before: a file may contain
    itself.
    """
    seen = set() if seen is None else seen
    if id(content) in seen or not levels:
        return None
    seen.add(id(content))
    if isinstance(content, (list, tuple)):
        # The ddim repository saves [model, optimizer, epoch, step, averaged model].
        return next(filter(None, (_find_state(item, levels - 1, seen) for item in reversed(content))), None)
    if not isinstance(content, dict):
        return None
    names = [name for name in content if isinstance(name, str)]
    averaged = [name for name in names if is_average(name) and not name.startswith("opt")]
    for name in [*averaged, *STATE_DICT_KEYS]:
        found = _find_state(content[name], levels - 1, seen) if isinstance(content.get(name), dict) else None
        if found:
            return found[0], {**{other: content[other] for other in names if other != name}, **found[1]}
    tensors = {name: content[name] for name in names if isinstance(content[name], torch.Tensor)}
    beside = {name: content[name] for name in names if name not in tensors}
    return (tensors, beside) if any(value.dim() for value in tensors.values()) else None
