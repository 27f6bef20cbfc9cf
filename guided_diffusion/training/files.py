"""What a training run leaves in its folder: checkpoints under guided-diffusion's names, exports, and progress.csv.

A checkpoint of step N is `ema_{rate}_{N:06d}.pt`, `opt{N:06d}.pt` and, written last, `model{N:06d}.pt`: where the
model is, the others are whole. Every file appears at once or not at all.
"""

import contextlib
import csv
import io
import json
import logging
import math
import os
import re
import struct
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..errors import InputError, display_name, first_line, shown
from ..run.files import Folder, make_folder, read_json, write_bytes, write_json
from ..run.record import versions
from .config import TrainConfig

log = logging.getLogger(__name__)

NAME = "train.json"


@contextlib.contextmanager
def owned(config: TrainConfig, writes: bool = True) -> Iterator[None]:
    """Make the folders of a run, and keep other runs out of its save folder within the context.

    writes: whether this process is the one that writes. Raises InputError where a folder cannot be written, or another
    run is in it.
    """
    folder = Folder(config.save_dir)
    make_folder(os.path.dirname(config.export_path()) or ".", "export" if config.export else "save_dir")
    if writes:
        folder.lock()
    try:
        yield
    finally:
        folder.release()


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def checkpoint_path(folder: str, kind: str, step: int) -> str:
    """File of one part of a checkpoint: kind is `model`, `opt` or `ema_{rate}_`."""
    return os.path.join(folder, f"{kind}{step:06d}.pt")


def step_of_checkpoint(path: str) -> int | None:
    """The step in a name like model010000.pt; None for any other name."""
    match = re.fullmatch(r"model([0-9]{6,18})\.pt", os.path.basename(path))
    return int(match[1]) if match else None


def saved_steps(folder: str) -> list[int]:
    """Steps of the complete checkpoints in a folder, ascending; [] where there is no folder."""
    names = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    steps = [step_of_checkpoint(name) for name in names]
    return sorted(step for step in steps if step is not None and f"opt{step:06d}.pt" in names)


def find_ema(folder: str, rate: str, step: int) -> str | None:
    """The file of an average of that rate, however its name spells the rate; None where there is none."""
    path = checkpoint_path(folder, f"ema_{rate}_", step)
    if os.path.exists(path):
        return path
    for name in sorted(os.listdir(folder or ".")):
        match = re.fullmatch(rf"ema_([0-9.]{{1,32}})_{step:06d}\.pt", name)
        if match and _number(match[1]) == float(rate):
            return os.path.join(folder, name)
    return None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def save_checkpoint(
    folder: str, step: int, model_state: dict, ema_states: Mapping[str, dict], optimizer_state: dict
) -> None:
    """Write the files of one checkpoint; ema_states: state dicts by the rate as its option spells it."""
    states = {f"ema_{rate}_": state for rate, state in ema_states.items()}
    for kind, state in {**states, "opt": optimizer_state, "model": model_state}.items():
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_bytes(checkpoint_path(folder, kind, step), buffer.getvalue())


def remove_old_checkpoints(folder: str, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints; 0 keeps all."""
    for step in saved_steps(folder)[:-keep] if keep else ():
        parts = [name for name in os.listdir(folder) if re.fullmatch(rf"(ema_.*_|opt){step:06d}\.pt", name)]
        # The model goes first: without it the rest is no checkpoint any more.
        for name in (f"model{step:06d}.pt", *parts):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(folder, name))


def load_archive(path: str) -> Any:
    """What torch.save wrote to a file: tensors and plain values only, on the CPU. Raises InputError, naming the file.

    The checksums in the archive are compared, so that no damaged number is read.
    """
    where = display_name(path)
    try:
        if not os.path.isfile(path):
            raise InputError(f"{where} is no regular file" if os.path.exists(path) else f"{where} does not exist")
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if sum(entry.file_size for entry in archive.infolist()) > 2 * os.path.getsize(path) + (1 << 20):
                    raise InputError(f"{where} is a compressed archive, which torch.save does not write")
                damaged = archive.testzip()
            if damaged:
                raise InputError(f"{where} is damaged: the checksum of {shown(damaged)} does not match")
        return torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # truncated and foreign files raise whatever the unpickler trips over
        raise InputError(f"{where} cannot be read as a file of torch.save: {first_line(error)}") from error


def load_optimizer_file(path: str, params: list[torch.Tensor]) -> tuple[dict[int, dict], dict[str, Any]]:
    """AdamW's state for `params` and the entry `train` ({} in files of other programs) of an opt*.pt.

    Every entry is checked: PyTorch itself would take moments of any shape, and the step after would read beyond them.
    Raises InputError, naming the file.
    """
    content = load_archive(path)
    where = display_name(path)
    if not isinstance(content, dict) or not {"state", "param_groups"} <= set(content):
        raise InputError(f"{where} is no optimizer state: it lacks the entries state and param_groups")
    state, groups, extra = content["state"], content["param_groups"], content.get("train", {})
    unfit = f"{where} does not fit the model's parameters"
    again = "move it away to start with a fresh optimizer"
    if not isinstance(state, dict) or not isinstance(groups, list) or not all(isinstance(g, dict) for g in groups):
        raise InputError(f"{where} is no optimizer state: its entries state and param_groups are of the wrong kind")
    if not isinstance(extra, dict):
        raise InputError(f"{where}: its entry train is of the wrong kind; {again}")
    numbers = [number for group in groups for number in _list(group.get("params"))]
    if numbers != list(range(len(params))):
        raise InputError(f"{unfit}: it is of {len(numbers)} parameters, the model has {len(params)}; {again}")
    checked: dict[int, dict] = {}
    for number, entries in state.items():
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < len(params):
            raise InputError(f"{unfit}: there is no parameter {shown(number)}; {again}")
        if not isinstance(entries, dict) or not {"step", "exp_avg", "exp_avg_sq"} <= set(entries):
            raise InputError(f"{unfit}: parameter {number} lacks the entries step, exp_avg and exp_avg_sq; {again}")
        like = params[number]
        for name in ("exp_avg", "exp_avg_sq"):
            value = entries[name]
            if not _plain(value) or value.shape != like.shape or value.dtype != like.dtype:
                raise InputError(
                    f"{unfit}: {name} of parameter {number} is {_kind(value)}, {_kind(like)} is needed; {again}"
                )
            if not value.isfinite().all():
                raise InputError(f"{where} is damaged: {name} of parameter {number} is not finite; {again}")
        if (entries["exp_avg_sq"] < 0).any():
            raise InputError(f"{where} is damaged: exp_avg_sq of parameter {number} is negative; {again}")
        step = entries["step"]
        step = step.item() if _plain(step) and step.numel() == 1 and step.dtype != torch.bool else step
        if isinstance(step, bool) or not isinstance(step, (int, float)) or not 0 <= step < 1e18:
            raise InputError(f"{where} is damaged: the step of parameter {number} is {shown(step)}; {again}")
        checked[number] = {
            "step": torch.tensor(float(step), dtype=torch.float32),
            **{name: entries[name] for name in ("exp_avg", "exp_avg_sq")},
        }
    return checked, extra


def _list(value: Any) -> list:
    return value if isinstance(value, list) else [None]


def _plain(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta


def _kind(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return f"of type {type(value).__name__}"
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def check_same_kind(path: str, entry: str, value: Any, like: Any) -> None:
    """Raise InputError unless a value of an opt*.pt has the structure of another: entries, kinds, shapes and dtypes."""
    if isinstance(like, torch.Tensor):
        good = _plain(value) and value.shape == like.shape and value.dtype == like.dtype
        good = good and bool(value.isfinite().all())
    elif isinstance(like, dict):
        good = isinstance(value, dict) and value.keys() == like.keys()
        for key in like if good else ():
            check_same_kind(path, f"{entry}.{key}", value[key], like[key])
    elif isinstance(like, (int, float)):
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    else:
        good = isinstance(value, type(like))
    if not good:
        raise InputError(
            f"{display_name(path)}: its entry {entry} does not fit this run; "
            "move the file away to start with a fresh optimizer"
        )


# ---- exports --------------------------------------------------------------------------------------------------------


def exported_bytes(state: Mapping[str, torch.Tensor], metadata: Mapping[str, str], dtype: torch.dtype) -> bytes:
    """A .safetensors file that `checkpoint.load_model` reads without flags; metadata: texts by name.

    The same model gives the same bytes: safetensors itself writes metadata in random order.
    """
    from safetensors.torch import save

    tensors = {
        name: value.detach().to("cpu", dtype if value.is_floating_point() else None).contiguous()
        for name, value in state.items()
    }
    data = save(tensors)
    (length,) = struct.unpack("<Q", data[:8])
    header = {"__metadata__": {"format": "pt", **metadata}, **json.loads(data[8 : 8 + length])}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def export_model(path: str, state: Mapping[str, torch.Tensor], metadata: Mapping[str, str], dtype: torch.dtype) -> None:
    """Write `exported_bytes`, unless the file has them already."""
    data = exported_bytes(state, metadata, dtype)
    with contextlib.suppress(OSError):
        if os.path.getsize(path) == len(data):
            with open(path, "rb") as file:
                if file.read() == data:
                    return
    write_bytes(path, data)


# ---- train.json -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunRecord:
    """What train.json says of a run: the flags of its model, and its classes where it has any."""

    model: dict[str, Any] = field(default_factory=dict)
    classes: list[str] | None = None


def read_run(folder: str) -> RunRecord:
    """The record in a folder, an empty one where there is none. Raises InputError for one that is damaged."""
    path = os.path.join(folder, NAME)
    try:
        content = read_json(path)
    except FileNotFoundError:
        return RunRecord()
    where = f"{display_name(path)} is damaged"
    fix = "delete it and give all of the model's options again"
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict):
        raise InputError(f"{where}: it has no entry model; {fix}")
    for name, value in model.items():
        if not isinstance(value, (str, int, float, type(None))):
            raise InputError(f"{where}: {shown(name)} of its entry model is of the wrong kind; {fix}")
    # Version 0.1 had the classes among the flags.
    flags = content.get("flags")
    classes = content.get("classes") or (flags.get("classes") if isinstance(flags, dict) else None)
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise InputError(f"{where}: its entry classes is of the wrong kind; {fix}")
    return RunRecord({name: value for name, value in model.items() if value is not None}, classes)


def write_run(folder: str, model_flags: dict, options: Sequence[Any], classes: list[str] | None = None) -> None:
    """Write train.json, the record of a run: flags of its model, all others, classes, and the versions it runs with.

    options: options dataclasses.
    """
    flags = {name: value for part in options for name, value in asdict(part).items()}
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    record = {"model": model_flags, "flags": flags, "versions": versions(), "started": started}
    write_json(os.path.join(folder, NAME), {**record, "classes": classes} if classes else record)


# ---- progress -------------------------------------------------------------------------------------------------------


class ProgressLog:
    """progress.csv, one row per logged step, and the same numbers for TensorBoard where it is installed.

    step: where the run starts; later rows, which a killed run may have left, are dropped. tensorboard: what
    `find_tensorboard` gave. Raises InputError for a file that is no such log, and where it cannot be written.
    """

    def __init__(self, folder: str, step: int, tensorboard: Any = None) -> None:
        self.path = os.path.join(folder, "progress.csv")
        self.rows = [row for row in self._read() if int(row["step"]) <= step]
        self.columns = list(self.rows[0]) if self.rows else []
        self._rewrite()
        self.tensorboard = None
        if tensorboard:
            with self._without_tensorboard():
                self.tensorboard = tensorboard(os.path.join(folder, "tensorboard"), purge_step=step + 1)

    def _read(self) -> list[dict[str, str]]:
        where = display_name(self.path)
        if not os.path.lexists(self.path):
            return []
        if not os.path.isfile(self.path):
            raise InputError(f"{where} is no regular file; move it away")
        try:
            with open(self.path, newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file, restval=None)  # type: ignore[arg-type]
                columns = list(reader.fieldnames or ())
                rows = list(reader)
        except (OSError, ValueError, csv.Error) as error:
            raise InputError(f"{where} cannot be read: {first_line(error)}; move it away to resume") from error
        if columns and ("step" not in columns or len(set(columns)) != len(columns)):
            raise InputError(f"{where} is no log of training: its columns are wrong; move it away to resume")
        # A kill can cut the last row off in the middle.
        return [
            row
            for row in rows
            if list(row) == columns and None not in row.values() and re.fullmatch("[0-9]{1,18}", row["step"])
        ]

    def write(self, row: Mapping[str, float]) -> None:
        """Add a row: numbers by column, among them `step`."""
        self.rows.append({name: _text(value) for name, value in row.items()})
        new = [name for name in row if name not in self.columns]
        if new:
            self.columns += new
            self._rewrite()
        else:
            try:
                with open(self.path, "a", newline="", encoding="utf-8") as file:
                    csv.DictWriter(file, self.columns, restval="", lineterminator="\n").writerow(self.rows[-1])
            except OSError:
                # Written as a whole it fits after all, or is refused in the words of every other file.
                self._rewrite()
        with self._without_tensorboard():
            for name, value in row.items() if self.tensorboard else ():
                if name != "step":
                    self.tensorboard.add_scalar(name, value, row["step"])  # type: ignore[union-attr]

    def _rewrite(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="", lineterminator="\n")
        if self.columns:
            writer.writeheader()
        writer.writerows(self.rows)
        write_bytes(self.path, text.getvalue().encode())

    @contextlib.contextmanager
    def _without_tensorboard(self) -> Iterator[None]:
        """TensorBoard's own files are a convenience: where they cannot be written, the run does without."""
        try:
            yield
        except Exception as error:
            self.tensorboard = None
            log.warning("TensorBoard's log cannot be written: %s", first_line(error))

    def close(self) -> None:
        """Flush what TensorBoard has not written yet."""
        with self._without_tensorboard():
            if self.tensorboard:
                self.tensorboard.close()


def _text(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.9g}"


def find_tensorboard() -> Any:
    """TensorBoard's SummaryWriter, or None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter
