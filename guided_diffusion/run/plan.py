"""Plan of a run: the outputs, where they are written, and the batches in which they are made."""

import os
import posixpath
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..image_datasets import Reference


@dataclass(frozen=True)
class Item:
    """One output to make: the `sample`-th translation of a reference. `key` identifies it in the run."""

    reference: Reference
    sample: int

    @property
    def key(self) -> str:
        """The reference's relative path and the sample's number."""
        return f"{self.reference.name}#{self.sample}"


@dataclass(frozen=True)
class Plan:
    """Outputs that are left to make in an open save folder.

    batches: keys in their company, those with at least one missing output. skipped: number of outputs that exist.
    record: the entries of run.json, on rank 0.
    """

    image_size: int
    batches: list[list[str]]
    skipped: int = 0
    record: dict[str, Any] = field(default_factory=dict)

    def image_steps(self, steps: int) -> int:
        """Number of image-steps of the whole run, over all ranks."""
        return steps * sum(map(len, self.batches))


def output_paths(save_dir: str, key: str, samples: int) -> tuple[str, str]:
    """Where the image of an item's key is written, and where its trajectory."""
    name, _, sample = key.rpartition("#")
    folder = "" if samples == 1 else f"sample_{sample}/"
    stem = f"{folder}{posixpath.splitext(name)[0]}"
    image, animation = f"{stem}.png", f"trajectory/{stem}.gif"
    return os.path.join(save_dir, *image.split("/")), os.path.join(save_dir, *animation.split("/"))


def exists(path: str) -> bool:
    """Whether an output is there: a file, and no link to one."""
    return os.path.isfile(path) and not os.path.islink(path)


def divide(keys: Iterable[str], batch_size: int, old_plan: Sequence[list[str]] = ()) -> list[list[str]]:
    """Divide keys into batches; an earlier plan's batches stay as they are, keys new to it are added."""
    placed = {key for batch in old_plan for key in batch}
    rest = [key for key in keys if key not in placed]
    return [*old_plan, *(rest[i : i + batch_size] for i in range(0, len(rest), batch_size))]


def without(plan: Iterable[list[str]], keys: Collection[str]) -> list[list[str]]:
    """A plan less some of its keys."""
    return [kept for batch in plan if (kept := [key for key in batch if key not in keys])]
