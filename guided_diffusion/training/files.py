"""Files of a training run: checkpoints under guided-diffusion's names, exports, train.json and progress.csv.

A checkpoint of step N is `ema_{rate}_{N:06d}.pt`, `opt{N:06d}.pt` and, written last, `model{N:06d}.pt`: where the
model is, the others are complete. Every file is written whole or not at all.
"""

import contextlib
import csv
import io
import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from ..errors import InputError, first_line, log, reading, shown
from ..logger import CSVOutputFormat, tensorboard
from ..run.files import read_json, write_atomically, write_json, write_text
from ..run.record import now, versions

NAME = "train.json"
OPTIMIZER = "this model's optimizer state (without it, training continues with a fresh optimizer)"
OTHER_TASK = ("small_size", "noised")  # define what a network computes: a run is not resumed with other values


def checkpoint_path(folder: str, kind: str, step: int) -> str:
    """File of one part of a checkpoint: kind is `model`, `opt` or `ema_{rate}_`."""
    return os.path.join(folder, f"{kind}{step:06d}.pt")


def step_of_checkpoint(path: str) -> int | None:
    """Step in a name like model010000.pt; None for any other name."""
    match = re.fullmatch(r"model([0-9]{6,18})\.pt", os.path.basename(path))
    return int(match[1]) if match else None


def saved_steps(folder: str) -> list[int]:
    """Steps of the complete checkpoints in a folder, ascending; [] where there is no folder."""
    names = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    steps = [step_of_checkpoint(name) for name in names]
    return sorted(step for step in steps if step is not None and f"opt{step:06d}.pt" in names)


def save_checkpoint(folder: str, step: int, model: dict, averages: Mapping[str, dict], optimizer: dict) -> None:
    """Write the files of one checkpoint; averages: state dicts by rate, see `TrainConfig.ema_rates`."""
    states = {f"ema_{rate}_": state for rate, state in averages.items()}
    for kind, state in {**states, "opt": optimizer, "model": model}.items():
        write_atomically(checkpoint_path(folder, kind, step), lambda file, state=state: torch.save(state, file))


def remove_old_checkpoints(folder: str, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints; 0 keeps all."""
    for step in saved_steps(folder)[:-keep] if keep else ():
        parts = [name for name in os.listdir(folder) if re.fullmatch(rf"(ema_.*_|opt){step:06d}\.pt", name)]
        # The model goes first: without it the rest is no longer a checkpoint.
        for name in (f"model{step:06d}.pt", *parts):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(folder, name))


def load_optimizer_file(path: str, params: list[torch.Tensor]) -> tuple[dict[int, dict], dict[str, Any]]:
    """Read AdamW's state for `params` and the entry `train` ({} in files of other programs) of an opt*.pt.

    PyTorch itself takes moments of any shape and ignores checksums. Raises InputError, naming the file.
    """
    with reading(path, OPTIMIZER):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"the checksum of {shown(damaged)} does not match")
        content = torch.load(path, map_location="cpu", weights_only=True)
        numbers = [number for group in content["param_groups"] for number in group["params"]]
        if numbers != list(range(len(params))) or not content["state"].keys() <= set(numbers):
            raise ValueError(f"it is of {len(numbers)} parameters, the model has {len(params)}")
        moments: dict[int, dict] = {}
        for number, state in content["state"].items():
            found = {name: torch.as_tensor(state[name]) for name in ("step", "exp_avg", "exp_avg_sq")}
            found["step"] = found["step"].float()
            check_like(f"state.{number}", found, dict(zip(found, (torch.zeros(()), params[number], params[number]))))
            if found["step"] < 0 or (found["exp_avg_sq"] < 0).any():
                raise ValueError(f"state.{number} has a negative step or square")
            moments[number] = found
        return moments, dict(content.get("train", {}))


def check_like(entry: str, value: Any, like: Any) -> None:
    """Raise ValueError unless `value` has the entries, types, shapes and dtypes of `like`, and finite numbers >= 0."""
    if isinstance(like, dict):
        if not isinstance(value, dict) or value.keys() != like.keys():
            raise ValueError(f"{entry} does not have the entries {', '.join(map(str, like))}")
        for key in like:
            check_like(f"{entry}.{key}", value[key], like[key])
    elif not isinstance(like, torch.Tensor):
        if type(value) not in (int, float) or not 0 <= value < 1e18:
            raise ValueError(f"{entry} is {shown(value)}")
    elif not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_meta:
        raise ValueError(f"{entry} is no dense tensor")
    elif value.shape != like.shape or value.dtype != like.dtype:
        raise ValueError(f"{entry} is {value.dtype} {list(value.shape)}, not {like.dtype} {list(like.shape)}")
    elif not value.isfinite().all():
        raise ValueError(f"{entry} has values that are NaN or infinite")


@dataclass(frozen=True)
class RunRecord:
    """Content of train.json: flags of the model, its classes where it has any, and the options of the run."""

    model: dict[str, Any] = field(default_factory=dict)
    classes: list[str] | None = None
    options: dict[str, Any] = field(default_factory=dict)


def read_run(folder: str) -> RunRecord:
    """Read the record in a folder, an empty one where there is none. Raises InputError for one that is damaged."""
    path = os.path.join(folder, NAME)
    if not os.path.exists(path):
        return RunRecord()
    with reading(path, "a training's record (without it, all of the model's options must be given again)"):
        content = read_json(path)
        model, options = content["model"], content.get("flags", {})
        # Version 0.1 had the classes among the flags.
        classes = content.get("classes") or options.get("classes")
        if not all(isinstance(value, (str, int, float, type(None))) for value in model.values()):
            raise ValueError("an entry of model is no text and no number")
        if isinstance(classes, str) or not all(isinstance(name, str) for name in classes or ()):
            raise ValueError("classes is no list of texts")
        return RunRecord({name: value for name, value in model.items() if value is not None}, classes, options)


def write_run(
    folder: str, model_flags: dict, options: Sequence[Any], classes: list[str] | None = None, *, resumed: str = "",
    writes: bool = True,
) -> None:  # fmt: skip
    """Write train.json, and announce options that a resumed run changes; raises InputError for those of `OTHER_TASK`.

    options: options dataclasses. resumed: the checkpoint, if it is not in `folder`. writes: False only compares.
    """
    flags = {each.name: getattr(part, each.name) for part in options for each in fields(part)}
    free = {"use_checkpoint", *(each.name for part in options for each in fields(part) if each.metadata.get("runtime"))}
    before = os.path.dirname(resumed) if step_of_checkpoint(resumed) is not None else folder
    recorded = read_run(before) if saved_steps(before) else RunRecord()
    old, new = {**recorded.options, **recorded.model}, {**flags, **model_flags}
    changed = [name for name in new if name not in free and name in old and old[name] != new[name]]
    for name in set(changed) & set(OTHER_TASK):
        reason = f"the run that is resumed has {old[name]}; train another model in another folder"
        raise InputError(reason, parameter=name, value=new[name])
    if changed:
        listed = ", ".join(f"{name} {shown(new[name])} (before {shown(old[name])})" for name in changed)
        log.warning("resumed with other options, so not as it would have continued: %s", listed)
    if writes:
        record = {"model": model_flags, "flags": flags, "versions": versions(), "started": now()}
        write_json(os.path.join(folder, NAME), {**record, "classes": classes} if classes else record)


class ProgressLog:
    """progress.csv, one row per logged step, and the same for TensorBoard where it is installed. Raises InputError.

    step: where the run starts; later rows, which a killed run may have left, are dropped.
    """

    def __init__(self, folder: str, step: int) -> None:
        path, kept = os.path.join(folder, "progress.csv"), io.StringIO()
        if os.path.exists(path):
            with reading(path, "a log of training (move it away to resume)"):
                with open(path, newline="", encoding="utf-8") as file:
                    columns, *rows = list(csv.reader(file)) or [["step"]]
                if columns.count("step") != 1 or len(set(columns)) != len(columns):
                    raise ValueError("its columns are wrong")
                at = columns.index("step")
                # A kill can cut the last row off in the middle.
                whole = [row for row in rows if len(row) == len(columns) and re.fullmatch("[0-9]{1,18}", row[at])]
                rows = [row for row in whole if int(row[at]) <= step]
                csv.writer(kept, lineterminator="\n").writerows([columns, *rows] if rows else [])
        write_text(path, kept.getvalue())
        self.table, self.tensorboard = CSVOutputFormat(path), None
        with self._convenience(), contextlib.suppress(InputError):
            self.tensorboard = tensorboard(os.path.join(folder, "tensorboard"), purge_step=step + 1)

    @contextlib.contextmanager
    def _convenience(self) -> Iterator[None]:
        """Continue without TensorBoard's log where it cannot be written."""
        try:
            yield
        except Exception as error:
            self.tensorboard = None
            log.warning("TensorBoard's log cannot be written: %s", first_line(error))

    def write(self, row: Mapping[str, float]) -> None:
        """Add a row: numbers by column, among them `step`."""
        self.table.writekvs({name: v if isinstance(v, int) else f"{v:.9g}" for name, v in row.items()})
        with self._convenience():
            if self.tensorboard is not None:
                self.tensorboard({name: row[name] for name in row if name != "step"}, row["step"])
