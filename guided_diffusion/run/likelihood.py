"""The likelihood of images under a model, in bits per dimension: image by image, resumable, over any number of ranks.

Every image's terms are a line of images.jsonl. At the end rank 0 writes guided-diffusion's files (vb_terms.npz,
mse_terms.npz, xstart_mse_terms.npz: means over images by step, from last to first) and bpd.csv, a row per image.
"""

import contextlib
import csv
import io
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ..errors import InputError, display_name
from ..image_datasets import Reference, class_names
from ..options import option
from ..target import Batch, Target
from . import record
from .files import write_atomically, write_text
from .job import Job, RunOptions
from .loop import NOT_FINITE, Loop
from .sources import Source

SUMS = ("vb", "mse", "xstart_mse")  # one value per step
ONES = ("total_bpd", "prior_bpd")  # one value


@dataclass(frozen=True)
class LikelihoodOptions(RunOptions):
    """Which images, and where the results go."""

    save_dir: str = option("output/nll", "output folder", runtime=True, metavar="DIR")
    data_dir: str = option(
        None, "folder of images, searched recursively, or a single image", runtime=True, metavar="PATH"
    )
    num_samples: int = option(1000, "maximum number of images to evaluate", least=1, runtime=True)
    batch_size: int | str = option(1, "images per batch, or auto", least=1, runtime=True, metavar="N")
    clip_denoised: bool = option(True, "clip the predicted x_0 to [-1, 1]")


def data_images(entries: list[Reference], classes: bool = False) -> Source:
    """Images, and with `classes` their classes, named as for training."""
    names = class_names(entries) if classes else []
    labels = np.unique(names, return_inverse=True)[1].tolist()
    return Source(entries, labels=dict(zip([entry.name for entry in entries], labels)))


class LikelihoodJob(Job):
    """The images whose terms are wanted; done are those that images.jsonl has. steps: of the model's process."""

    def __init__(self, *arguments: Any, steps: int) -> None:
        self.steps = steps
        super().__init__(*arguments)

    def paths(self, key: str, samples: int | None = None) -> tuple[str, ...]:
        return ()  # an image has no file of its own

    def own_files(self) -> list[str]:
        names = [*(f"{name}_terms.npz" for name in SUMS), "bpd.csv", record.IMAGES, record.NAME]
        return [os.path.join(self.options.save_dir, name) for name in names]

    def discard(self, keys: Iterable[str]) -> None:
        self._known.difference_update(keys)

    def exists(self, key: str) -> bool:
        return key in self._known

    @cached_property
    def _known(self) -> set[str]:
        return set(self.terms())

    def terms(self) -> dict[str, dict[str, np.ndarray]]:
        """The terms that are known, by key; damaged ones are left out."""
        found = {}
        for entry in record.entries(self.folder.path):
            with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError):
                terms = {name: np.array(entry[name], np.float64) for name in (*SUMS, *ONES)}
                if all(values.shape == ((self.steps,) if name in SUMS else ()) for name, values in terms.items()):
                    found[entry["key"]] = terms
        return found


def likelihood(target: Target, clip_denoised: bool = True) -> Callable[..., dict[str, torch.Tensor]]:
    """Function of (batch, noise) that gives the terms of `calc_bpd_loop`, for `LikelihoodLoop`."""

    def terms(batch: Batch, noise: Callable) -> dict[str, torch.Tensor]:
        kwargs = {} if batch.labels is None else {"y": batch.labels}
        x = target.codec.encode(batch.ref)
        return target.diffusion.calc_bpd_loop(target.model, x, clip_denoised, kwargs, noise=noise)

    return terms


class LikelihoodLoop(Loop):
    """One rank's share of a likelihood. `finish` tells the mean, `bits_per_dimension`."""

    job: LikelihoodJob

    def _translate(self, items: list) -> None:
        terms = self.sample(*self._inputs(items))
        # On the CPU first: not every device has float64.
        found = {name: terms[name].cpu().double() for name in (*SUMS, *ONES)}
        for n, (key, _, content) in enumerate(items):
            if not all(values[n].isfinite().all() for values in found.values()):
                self._fail(key, NOT_FINITE)
            elif not self.job.exists(key):
                lists = {name: values[n].tolist() for name, values in found.items()}
                self._journal.add({"key": key, "source": content, **lists})
                self._count(1)
        self._report(len(items))

    def _complete(self) -> dict[str, Any]:
        folder, known = self.job.folder, self.job.terms()
        terms = {reference.name: known[key] for key, reference in self.job.items.items() if key in known}
        if not terms:
            name, reason = next(iter(self.failed.items()))
            raise InputError(f"none of the images can be evaluated; the first: {display_name(name)}: {reason}")
        for name in SUMS:
            means = np.mean([each[name] for each in terms.values()], axis=0).astype(np.float32)
            path = os.path.join(folder.path, f"{name}_terms.npz")
            write_atomically(path, lambda file, means=means: np.savez(file, means), folder)
        rows = [[name, *(float(each[one]) for one in ONES)] for name, each in terms.items()]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([["name", *ONES], *rows])
        write_text(os.path.join(folder.path, "bpd.csv"), text.getvalue(), folder)
        return {"images": len(rows), "bits_per_dimension": float(np.mean([row[1] for row in rows]))}
