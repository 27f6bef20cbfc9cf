"""images.jsonl: a line of JSON for every image that a run made, with its source, its cost and its guided steps.

While a run is going, every rank appends to a file of its own, so that a killed run loses no line. Rank 0 gathers the
lines into one file when it opens the folder and when the run ends.
"""

import contextlib
import glob
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch

from ..errors import InputError, reading
from .files import Folder, check_regular, disk_reason, write_bytes

NAME = "images.jsonl"

COLUMNS = ("count", "tangent", "normal", "negative")
"""Columns of a guided step: evaluations, and sums over these; sums of the weights of score and energies follow."""


class Journal:
    """The file of one rank, open for appending."""

    def __init__(self, folder: Folder, rank: int) -> None:
        self._path, self._lock = os.path.join(folder.path, f"images-{rank}.jsonl"), threading.Lock()
        with contextlib.suppress(FileNotFoundError):
            os.remove(self._path)
        try:
            self._file = open(self._path, "xb", buffering=0)  # noqa: SIM115 - closed by `close`
        except OSError as error:
            folder.check()
            raise InputError(disk_reason(self._path, error)) from error

    def add(self, entry: dict[str, Any]) -> None:
        """Append a line; entry has `key`, the output's key in the plan, and `source`, the source's fingerprint."""
        line = json.dumps(entry, ensure_ascii=False).encode("utf-8", "surrogateescape") + b"\n"
        try:
            with self._lock:
                while line:  # a full disk takes a part first
                    line = line[self._file.write(line) or 0 :]
        except OSError as error:
            raise InputError(disk_reason(self._path, error)) from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def gather(folder: Folder, keep: Callable[[dict[str, Any]], bool] = lambda entry: True) -> None:
    """Move the lines of all ranks into images.jsonl, the last one of each key, less those that are not to be kept."""
    lines = {entry["key"]: line for line, entry in _lines(folder.path) if keep(entry)}
    write_bytes(os.path.join(folder.path, NAME), b"".join(lines.values()), folder)
    for path in parts(folder.path):
        with contextlib.suppress(OSError):
            os.remove(path)


def entries(folder: str) -> Iterator[dict[str, Any]]:
    """The entries in a folder. Lines that are damaged, as of a process that was killed, are left out."""
    return (entry for _, entry in _lines(folder))


def parts(folder: str) -> list[str]:
    """The files of ranks."""
    return sorted(glob.glob(os.path.join(glob.escape(folder), "images-*.jsonl")))


def _lines(folder: str) -> Iterator[tuple[bytes, dict[str, Any]]]:
    for path in (os.path.join(folder, NAME), *parts(folder)):
        if not os.path.exists(path):
            continue
        check_regular(path)
        with reading(path), open(path, "rb") as file:
            for line in file:
                with contextlib.suppress(ValueError, RecursionError):
                    entry = json.loads(line.decode("utf-8", "surrogateescape"))
                    if isinstance(entry, dict) and {"key", "source"} <= entry.keys() and isinstance(entry["key"], str):
                        yield line.rstrip(b"\n") + b"\n", entry


# ---- what guided steps did ------------------------------------------------------------------------------------------


def record_of(tangent: torch.Tensor, normal: torch.Tensor, move: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Columns of one guided evaluation for every image, [N, 3 + M], on its device.

    Euclidean norms of the score's parts `tangent` and `normal`; whether the move has a negative inner product with the
    score's tangent part; and the M `weights` of the merged directions, score first (means over channels and blocks).
    """
    inner, square = (move * tangent).flatten(1).sum(1), tangent.square().flatten(1).sum(1)
    negative = inner < -1e-4 * square  # a move that cancels to rounding errors has either sign
    columns = torch.stack([square.sqrt(), normal.flatten(1).norm(dim=1), negative], dim=1)
    return torch.cat([columns, weights.flatten(1, -2).mean(1)], dim=1).float()


def steps_of(guided: Iterable[tuple[int, torch.Tensor]], count: int) -> list[dict[str, list[float]]]:
    """The guided steps of each of `count` images: step -> `COLUMNS` and the weights, summed over its evaluations.

    guided: the steps' numbers with what `record_of` gives.
    """
    guided = list(guided)
    rows = torch.stack([record for _, record in guided]).cpu().double().numpy() if guided else []
    steps: list[dict[str, list[float]]] = []
    for n in range(count):
        sums: dict[str, np.ndarray] = {}
        for (i, _), row in zip(guided, rows):
            sums[str(i)] = sums.get(str(i), 0) + np.array([1, *row[n]])
        steps.append({i: [float(f"{value:.7g}") for value in values] for i, values in sums.items()})
    return steps


def total(found: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Sums of entries, as entries of run.json; those without numbers do not count.

    `negative_impact`: share of guided evaluations whose move opposes the score's tangent part. `energy_weights`: mean
    weight of each energy in guided evaluations. `model_evaluations` and `seconds_per_image` are means over images.
    """
    images, costs = 0, np.zeros(2)  # seconds and evaluations
    sums: dict[int, np.ndarray] = {}
    for entry in found:
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError, OverflowError):
            cost = np.array([entry["seconds"], entry["evaluations"]], float)
            steps = {int(i): np.array(values, float) for i, values in entry["steps"].items()}
            merged = {i: values + sums.get(i, 0) for i, values in steps.items()}
            if all(np.isfinite(values).all() for values in (cost, *merged.values())):
                images, costs, sums = images + 1, costs + cost, {**sums, **merged}
    seconds, evaluations = costs.tolist()
    count, *others = np.sum([*sums.values()], axis=0).tolist() if sums else [0.0]
    means = [value / count for value in others] if count else []
    return {
        "negative_impact": means[COLUMNS.index("negative") - 1] if means else None,
        "energy_weights": means[len(COLUMNS) :],
        "model_evaluations": evaluations / images if images else None,
        "seconds_per_image": round(seconds / images, 6) if images else None,
        "monitor": {
            "images": images,
            "seconds": seconds,
            "evaluations": evaluations,
            "steps": {str(i): sums[i].tolist() for i in sorted(sums, reverse=True)},
        },
    }


def curves(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Means over images of what a run's guided steps did, in the order of sampling; [] for a damaged record.

    record: the content of a run.json. Returns a list of dicts: `i`, `tangent` and `normal` (Euclidean norms of the
    score's parts), `negative` (share of negative inner products), `weights` (of the score and of every energy).
    """
    try:
        steps = sorted((int(i), values) for i, values in record["monitor"]["steps"].items())
        rows = [(i, *(float(value / values[0]) for value in values[1:])) for i, values in reversed(steps)]
        return [
            {"i": i, "tangent": tangent, "normal": normal, "negative": negative, "weights": weights}
            for i, tangent, normal, negative, *weights in rows
        ]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, ZeroDivisionError):
        return []
