"""The record of a run in its save folder: run.json and images.jsonl.

run.json holds the settings (all that determines the outputs), versions, counts, times, and the plan: the batches of the
outputs, so that a restarted run computes each image in the same company, and to the same last bit. images.jsonl has a
line for every image: source, cost, guided steps. Every rank appends to a file of its own; rank 0 gathers them into one.
"""

import contextlib
import glob
import json
import os
import platform
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from typing import Any

import numpy as np
import torch

from ..errors import InputError, display_name, reading, shown
from .files import Folder, json_text, read_json, write_json, write_text, writing

NAME, IMAGES = "run.json", "images.jsonl"
FORMAT = 2  # format 1, of version 0.2, can be resumed, too
COLUMNS = ("count", "tangent", "normal", "negative")
"""Columns of a guided step: evaluations, and sums over these; sums of the weights of score and energies follow."""


def sha256(path: str | os.PathLike) -> str | None:
    """Hash of a file as hexadecimal digits; None for an address that is no local file."""
    from ..checkpoint.reading import hash_file

    return hash_file(os.fspath(path)) if os.path.isfile(path) else None


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    names = ("torch", "numpy", "pillow")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


def now() -> str:
    """The time in UTC, as records have it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def read(save_dir: str | os.PathLike) -> dict[str, Any] | None:
    """The record in a folder, or None. Raises InputError where it cannot be resumed."""
    path = os.path.join(save_dir, NAME)
    if not os.path.exists(path):
        return None
    try:
        with reading(path, "the record of a run"):
            found = read_json(path)
            if found["format"] not in (1, FORMAT):
                known = f"this version reads formats 1 to {FORMAT}"
                raise InputError(f"{display_name(path)} has format {shown(found['format'])}, and {known}")
            kinds = {"settings": dict, "versions": dict, "plan": list, "batch_size": int, "started": str}
            for name, kind in kinds.items():
                if not isinstance(found[name], kind):
                    raise ValueError(f"its entry {name} is of another type")
            if not 0 <= found["seconds"] < 1e12 or found["settings"].get("samples_per_image", 1) < 1:
                raise ValueError("its numbers are out of range")
            if not all(re.fullmatch(r"[^\0]*#[0-9]+", key) for batch in found["plan"] for key in batch):
                raise ValueError("its plan names what cannot be outputs")
            json_text(found).encode("utf-8", "surrogateescape")  # as it will be written again
            return found
    except InputError as error:
        raise InputError(f"{error.reason}; it cannot be resumed, and `overwrite` True starts over") from None


def write(folder: Folder, record: dict[str, Any]) -> None:
    """Write the record of a run into its folder."""
    write_json(os.path.join(folder.path, NAME), record, folder)


def check_same(save_dir: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Raise InputError with the list of differences unless two records' settings are equal."""
    new = json.loads(json.dumps(new))  # tuples and the like become what they are in the file
    differences = []
    for name in sorted({*old, *new}):
        was, now = (shown(each[name]) if name in each else "not recorded" for each in (old, new))
        if not (name in old and name in new and old[name] == new[name]):
            differences.append(f"`{name}` was {was} and is {now}")
    if differences:
        reason = f"it holds a run with other settings: {'; '.join(differences)}. Give another folder"
        raise InputError(f"{reason}, or `overwrite` True to start over", parameter="save_dir", value=save_dir)


class Journal:
    """The file of one rank, open for appending."""

    def __init__(self, folder: Folder, rank: int) -> None:
        self._path, self._lock = os.path.join(folder.path, f"images-{rank}.jsonl"), threading.Lock()
        with writing(self._path, folder):
            self._file = open(self._path, "xb")  # noqa: SIM115 - closed by `close`

    def add(self, entry: dict[str, Any]) -> None:
        """Append a line; entry has `key`, the output's key in the plan, and `source`, the source's fingerprint."""
        with self._lock, writing(self._path):
            self._file.write(_line(entry).encode("utf-8", "surrogateescape"))
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # of a full disk, which `add` has reported
            self._file.close()


def _line(entry):
    return json.dumps(entry, ensure_ascii=False) + "\n"


def parts(folder: str) -> list[str]:
    """The files of ranks."""
    return sorted(glob.glob(os.path.join(glob.escape(folder), "images-*.jsonl")))


def entries(folder: str) -> Iterator[dict[str, Any]]:
    """The entries in a folder. Lines that are damaged, as of a process that was killed, are left out."""
    for path in filter(os.path.exists, (os.path.join(folder, IMAGES), *parts(folder))):
        with reading(path), open(path, "rb") as file:
            for line in file:
                with contextlib.suppress(ValueError, RecursionError):
                    entry = json.loads(line.decode("utf-8", "surrogateescape"))
                    if isinstance(entry, dict) and "source" in entry and isinstance(entry.get("key"), str):
                        yield entry


def gather(folder: Folder, keep: Callable[[dict[str, Any]], bool] = lambda entry: True) -> None:
    """Move the entries of all ranks into images.jsonl, the last of each key, less those that are not to be kept."""
    lines = {entry["key"]: _line(entry) for entry in entries(folder.path) if keep(entry)}
    write_text(os.path.join(folder.path, IMAGES), "".join(lines.values()), folder)
    for path in parts(folder.path):
        with contextlib.suppress(OSError):
            os.remove(path)


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
    numbers, records = zip(*guided) if guided else ((), ())
    rows = torch.stack(records).cpu().double().numpy() if records else []
    steps: list[dict[str, list[float]]] = []
    for n in range(count):
        sums: dict[str, np.ndarray] = {}
        for i, row in zip(numbers, rows):
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
    steps = {str(i): sums[i].tolist() for i in sorted(sums, reverse=True)}
    return {
        "negative_impact": means[COLUMNS.index("negative") - 1] if means else None,
        "energy_weights": means[len(COLUMNS) :],
        "model_evaluations": evaluations / images if images else None,
        "seconds_per_image": round(seconds / images, 6) if images else None,
        "monitor": {"images": images, "seconds": seconds, "evaluations": evaluations, "steps": steps},
    }


def curves(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Means over images of what a run's guided steps did, in the order of sampling; [] for a damaged record.

    record: the content of a run.json. Returns a list of dicts: `i`, `tangent` and `normal` (Euclidean norms of the
    score's parts), `negative` (share of negative inner products), `weights` (of the score and of every energy).
    """
    try:
        steps = sorted(((int(i), values) for i, values in record["monitor"]["steps"].items()), reverse=True)
        rows = [(i, *(float(value / values[0]) for value in values[1:])) for i, values in steps]
        return [
            {"i": i, "tangent": tangent, "normal": normal, "negative": negative, "weights": weights}
            for i, tangent, normal, negative, *weights in rows
        ]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, ZeroDivisionError):
        return []
