"""What sampling costs and what its guided steps do, for run.json: summed over images, processes and restarts.

Every process keeps its sums in a hidden file of its own in the save folder, rewritten after each batch, so that a
killed run loses none; at the end rank 0 adds them up. Nothing is read from the device before a batch is done.
"""

import contextlib
import glob
import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from . import files

COLUMNS = ("count", "tangent", "normal", "negative")  # of a step's sums; the weights of the directions follow
EMPTY: dict[str, Any] = {"images": 0, "seconds": 0.0, "evaluations": 0, "steps": {}}


class Monitor:
    """The sums of one process in the save folder of a run. `begin`; then `counted` and `watch`; `total` at the end.

    own: a name for this process's part, unlike that of any other process of the run.
    """

    def __init__(self, folder: str, own: str) -> None:
        self.folder = folder
        self.own = self._part(own)
        self.sums, self.calls = EMPTY, 0

    def _part(self, name: str) -> str:
        return os.path.join(self.folder, f".monitor-{name}.json")

    def _parts(self) -> list[str]:
        return glob.glob(os.path.join(glob.escape(self.folder), ".monitor-*.json"))

    def begin(self, earlier: Any, overwrite: bool = False) -> None:
        """Take over the sums of earlier runs; earlier: the entry `monitor` of their record, if any. For one process."""
        sums = _valid(earlier)
        # Parts that the record's sums contain are left over from a run that was killed while it removed them.
        names = earlier.get("parts") if sums else None
        counted = {self._part(str(name)) for name in names} if isinstance(names, list) else set()
        for path in self._parts():
            if overwrite or path in counted:
                _remove(path)
        if sums and not overwrite:
            files.write_json(self._part("earlier"), sums)

    def counted(self, model: Callable) -> Callable:
        """The model, its evaluations counted."""
        return _Counted(model, self)

    def watch(self, sampler: Callable) -> Callable:
        """A sampler of (ref, noise=, callback=) whose batches are measured."""

        def run(ref: torch.Tensor, *, callback: Callable[[dict], None], **options: Any) -> torch.Tensor:
            steps: list[tuple[int, dict]] = []
            self.calls, started = 0, time.monotonic()

            def watching(state: dict[str, Any]) -> None:
                steps.extend((state["i"], _record_of(**guided)) for guided in state["guided"])
                callback(state)

            x = sampler(ref, callback=watching, **options)
            x.flatten()[-1].item()  # a GPU has not finished before
            done = {
                "images": len(ref),
                "seconds": time.monotonic() - started,
                "evaluations": self.calls * len(ref),
                "steps": _sums_of_steps(steps),
            }
            self.sums = _added([self.sums, done])
            files.check_present(self.folder, "save_dir")
            files.write_json(self.own, self.sums)
            return x

        return run

    def total(self) -> dict[str, Any]:
        """What all processes measured, as entries of run.json."""
        parts = self._parts()
        total = _added([sums for path in parts if (sums := _valid(files.read_json_or_none(path)))])
        images = total["images"]
        names = [os.path.basename(path)[len(".monitor-") : -len(".json")] for path in parts]
        return {
            "negative_impact": _share_of_negative(total["steps"].values()),
            "model_evaluations": total["evaluations"] / images if images else None,
            "seconds_per_image": round(total["seconds"] / images, 6) if images else None,
            "monitor": {**total, "parts": names},
        }

    def forget(self, parts: Iterable[str]) -> None:
        """Remove parts whose sums a record has; by name, as in its entry `parts`."""
        for name in parts:
            _remove(self._part(name))


@dataclass(frozen=True)
class _Counted:
    """A model that counts its evaluations."""

    model: Callable
    monitor: Monitor

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.monitor.calls += 1
        return self.model(*arguments, **options)


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.remove(path)


def _record_of(
    tangent: torch.Tensor, normal: torch.Tensor, move: torch.Tensor, weights: torch.Tensor
) -> dict[str, torch.Tensor]:
    """What is summed of one guided evaluation, per image, on its device.

    Euclidean norms of the score's parts `tangent` and `normal`, `weights` of the merged directions (mean over channels
    and blocks), and `negative`: whether the move has a negative inner product with the score's tangent part.
    """
    inner, square = (move * tangent).flatten(1).sum(1), tangent.square().flatten(1).sum(1)
    return {
        "tangent": square.sqrt(),
        "normal": normal.flatten(1).norm(dim=1),
        "weights": weights.flatten(1, -2).mean(1),
        "negative": inner < -1e-4 * square,  # a move that cancels to rounding errors has either sign
    }


def _valid(sums: Any) -> dict[str, Any] | None:
    """The sums of a part or record; None where they are not of that form."""
    if not isinstance(sums, dict) or not isinstance(sums.get("steps"), dict):
        return None
    numbers = [sums.get(name) for name in ("images", "seconds", "evaluations")]
    rows = list(sums["steps"].values())
    if not all(isinstance(row, list) and len(row) >= len(COLUMNS) for row in rows):
        return None
    if not all(_is_number(number) for number in [*numbers, *(n for row in rows for n in row)]):
        return None
    if not all(re.fullmatch("0|[1-9][0-9]{0,8}", str(name)) for name in sums["steps"]):
        return None
    return {name: sums[name] for name in EMPTY}


def _is_number(value: Any) -> bool:
    """Whether a value can be summed; whole numbers without bound cannot become floats."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 63)


def curves(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Means over images of what a run's guided steps did, in the order of sampling.

    record: the content of a run.json. Returns a list of dicts: `i`, `tangent` and `normal` (Euclidean norms of the
    score's parts), `negative` (share of negative inner products), `weights` (of the score and of every energy).
    """
    steps = (_valid(record.get("monitor")) or EMPTY)["steps"]
    result = []
    for i in sorted(map(int, steps), reverse=True):
        count, tangent, normal, negative, *weights = steps[str(i)]
        if not count:
            continue
        means = {"tangent": tangent / count, "normal": normal / count, "negative": negative / count}
        result.append({"i": i, **means, "weights": [weight / count for weight in weights]})
    return result


def _sums_of_steps(steps: list[tuple[int, dict]]) -> dict[str, list[float]]:
    """Sums over images of the records of one batch: step -> [count, tangent, normal, negative, *weights]."""
    if not steps:
        return {}
    tables = {
        name: torch.stack([record[name].float() for _, record in steps]).sum(1).tolist()
        for name in ("tangent", "normal", "negative", "weights")
    }
    sums: dict[str, list[float]] = {}
    for row, (i, record) in enumerate(steps):
        values = [len(record["tangent"]), *(tables[name][row] for name in COLUMNS[1:]), *tables["weights"][row]]
        sums[str(i)] = [a + b for a, b in zip(sums[str(i)], values)] if str(i) in sums else values
    return sums


def _added(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The sum of several processes' sums."""
    total = {**EMPTY, "steps": {}}
    for part in parts:
        for name in ("images", "seconds", "evaluations"):
            total[name] += part[name]
        for i, values in part["steps"].items():
            known = total["steps"].get(i)
            total["steps"][i] = values if known is None else [a + b for a, b in zip(known, values)]
    return total


def _share_of_negative(steps: Iterable[list[float]]) -> float | None:
    steps = list(steps)
    count = sum(values[0] for values in steps)
    return sum(values[COLUMNS.index("negative")] for values in steps) / count if count else None
