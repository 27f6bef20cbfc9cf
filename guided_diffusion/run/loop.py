"""Make what a plan lacks: batches of references through a sampler, and their outputs to disk.

Ranks take batches from a common counter and share nothing else. The sampler is a function of tensors.
"""

import contextlib
import errno
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from ..errors import InputError, display_name, log
from ..image_datasets import ImageError, to_tensor, to_uint8
from ..runtime import is_out_of_memory
from ..solvers import NotFiniteError
from ..target import Batch, count_evaluations
from . import files, record
from .grid import contact_sheet
from .job import Job, OutputOptions, Plan
from .noise import ImageNoise

TRAJECTORY_FRAMES = 48
NOT_FINITE = "the model gave values that are NaN or infinite (too low a precision for it?)"

# Errors of a file system that concern one name alone: too long, or with characters that it does not take.
NAME_ERRORS = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


@dataclass
class Loop:
    """One rank's share of a run. `run` makes what is missing; then `finish` completes the folder.

    sample(batch, noise=, callback=): images [N, 3, S, S] in [-1, 1] for a `Batch`; noise(shape) is the next draw, and
    callback(state) gets `i`, `x`, `pred_xstart` and `guided` (arguments of `record.record_of`) after every step.
    `done` and `skipped` are numbers of outputs, `failed` has a reason for each failure, by name.
    """

    job: Job
    plan: Plan
    sample: Callable[..., Any]
    steps: int  # calls of callback per image
    progress: Callable[[int, int], Any] = lambda image_steps, images: None  # those done since; outputs that exist
    picture: Callable[[torch.Tensor], torch.Tensor] = lambda x: x  # states [N, C, H, W] to pictures [N, 3, S, S]
    grey: bool = False  # whether outputs become grey PNG files

    def __post_init__(self) -> None:
        self.done, self.skipped, self.failed = 0, self.plan.skipped, dict(self.job.source.failed)
        self.seconds = 0.0
        self._journal = record.Journal(self.job.folder, self.job.peers.rank)
        self._writing: list[Future] = []
        self._limit: int | None = None  # of a batch's size
        # Image-steps of this rank, those that it has not told yet, when it told others, and those of all ranks.
        self._steps, self._untold, self._told_at, self._all_steps = 0, 0, 0.0, 0

    def run(self) -> None:
        """Make what is missing; on rank 0, learns what all ranks did."""
        started, job, batches = time.monotonic(), self.job, self.plan.batches
        try:
            with ThreadPoolExecutor(2) as self._writers:  # what is finished is written, whatever comes
                while (index := job.peers.count("claimed") - 1) < len(batches):
                    items = self._read(batches[index])
                    # Where only broken references are missing, the others of the batch are not made again.
                    if all(job.exists(key) for key, *_ in items):
                        items = []
                    self._make(items)
                    self._report((len(batches[index]) - len(items)) * self.steps)
                self._wait_for_writing()
            self._gather()
        finally:
            self._journal.close()
        self.seconds = time.monotonic() - started

    def _read(self, keys: list[str]) -> list[tuple[str, np.ndarray, str | None]]:
        """The readable keys with their images, uint8 [H, W, 3], and fingerprints; notes the others as failed."""
        source, items = self.job.source, []

        def read(key: str) -> tuple[Any, str | None]:
            reference = self.job.items[key]
            content = source.fingerprint(reference)  # first: if the file is replaced in between, the next run sees it
            try:
                return source.read(reference, self.plan.image_size), content
            except ImageError as error:
                return error, content

        with ThreadPoolExecutor(8) as pool:
            for key, (image, content) in zip(keys, pool.map(read, keys)):
                if isinstance(image, ImageError):
                    self._fail(key, image.reason)
                else:
                    items.append((key, image, content))
        return items

    def _fail(self, key: str, reason: str) -> None:
        name = self.job.items[key].name
        if self.job.source.strict:
            raise InputError(f"{display_name(name)}: {reason}")
        self.failed[name] = reason

    def _make(self, items: list) -> None:
        """Translate a batch; with batch_size="auto", in parts of half the size once memory has not sufficed."""
        device = self.job.device
        while items:
            size, before = min(len(items), self._limit or len(items)), self._steps
            try:
                self._translate(items[:size])
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            else:
                items = items[size:]
                continue
            # Outside of the handler, which keeps the failed attempt's tensors alive.
            self._report(before - self._steps)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            failed = f"out of memory at batch size {size} on {device}"
            if size == 1:
                raise InputError(f"{failed}: one image does not fit; another `precision` or `device` may")
            self._limit = (size + 1) // 2
            if self.job.options.batch_size != "auto":
                raise InputError(f"{failed}; give `batch_size` {self._limit} or less, or auto")
            log.info("%s; continuing with %d", failed, self._limit)

    def _inputs(self, items: list) -> tuple[Batch, ImageNoise]:
        device, source, seed = self.job.device, self.job.source, self.job.options.seed
        names = tuple(self.job.items[key].name for key, *_ in items)
        labels = torch.tensor([source.labels[name] for name in names], device=device) if source.labels else None
        batch = Batch(to_tensor([image for _, image, _ in items]).to(device), names, labels)
        return batch, ImageNoise([f"{seed}/{key}" for key, *_ in items], device)  # as `image_key` gives it

    def _translate(self, items: list) -> None:
        options, started = cast(OutputOptions, self.job.options), time.monotonic()
        kept = trajectory_steps(self.steps) if options.save_trajectory else set()
        shown = "pred_xstart" if options.trajectory == "x0" else "x"
        frames: list[np.ndarray] = []
        guided: list[tuple[int, torch.Tensor]] = []
        step = 0

        def callback(state: dict[str, Any]) -> None:
            nonlocal step
            guided.extend((state["i"], record.record_of(**each)) for each in state["guided"])
            if step in kept:
                frames.append(to_uint8(self.picture(state[shown]).nan_to_num()))
            step += 1
            self._report(len(items))

        batch, noise = self._inputs(items)
        with count_evaluations() as count:
            try:
                x = self.sample(batch, noise=noise, callback=callback)
                finite = x.isfinite().flatten(1).all(1)
            except NotFiniteError as error:  # some images may be sound
                x, finite = error.x, error.finite
        valid = finite.tolist()  # a GPU has not finished before
        cost = {"seconds": (time.monotonic() - started) / len(items), "evaluations": count.total / len(items)}
        images, did = to_uint8(x.nan_to_num()), record.steps_of(guided, len(items))
        self._wait_for_writing()  # of the batch before
        for n, (key, _, content) in enumerate(items):
            if not valid[n]:
                self._fail(key, NOT_FINITE)
            elif not self.job.exists(key):
                entry = {"key": key, "source": content, **cost, "steps": did[n]}
                shots = [frame[n] for frame in frames]
                self._writing.append(self._writers.submit(self._write, key, images[n], shots, entry))

    def _write(self, key: str, image: np.ndarray, frames: Sequence[np.ndarray], entry: dict[str, Any]) -> bool:
        path, animation = self.job.paths(key)
        try:
            self._journal.add(entry)
            # The image goes last: where it exists, all is written.
            if frames:
                files.write_animation(animation, frames, self.job.folder)
            files.write_png(path, image[..., 0] if self.grey else image, self.job.folder)
            return True
        except InputError as error:
            number = getattr(error.__cause__, "errno", None)
            if number not in NAME_ERRORS:
                raise
            self._fail(key, f"its output cannot be written: {os.strerror(number)}")
            return False

    def _wait_for_writing(self) -> None:
        while self._writing:
            self._count(self._writing.pop(0).result())

    def _count(self, images: int) -> None:
        self.done += images
        self.job.peers.count("images", images)

    def _report(self, image_steps: int) -> None:
        """Report progress of this rank: at once if alone, at most twice a second among others."""
        self._steps += image_steps
        self._untold += image_steps
        if self.job.peers.world_size == 1 or time.monotonic() - self._told_at > 0.5:
            self._tell()

    def _tell(self) -> None:
        peers = self.job.peers
        peers.watch()
        steps, self._untold, self._told_at = peers.count("image_steps", self._untold), 0, time.monotonic()
        if peers.rank == 0:
            self.progress(steps - self._all_steps, peers.count("images", 0) + self.skipped)
            self._all_steps = steps

    def _gather(self) -> None:
        """Rank 0 waits for the others' last batches and collects what they did."""
        self._tell()
        peers = self.job.peers
        if peers.rank:
            peers.publish(f"failed/{peers.rank}", self.failed)
            return
        for rank in range(1, peers.world_size):
            self.failed |= peers.wait_for(f"failed/{rank}")
        self._tell()
        self.done = peers.count("images", 0)

    def finish(self) -> dict[str, Any]:
        """Complete the outputs and run.json, on rank 0; returns what the record tells of the end."""
        if self.job.peers.rank:
            return {}
        self.job.folder.check()
        record.gather(self.job.folder)
        ended = {**self._complete(), "finished": record.now(), "failed": self.failed}
        record.write(self.job.folder, {**self.plan.record, **ended})
        return ended

    def _complete(self) -> dict[str, Any]:
        """Write what shows the whole run, grid.png; returns its entries of the record."""
        job, failed = self.job, self.failed
        for key, reference in job.items.items():
            if reference.name not in failed and not job.exists(key):
                failed[reference.name] = "its output was removed while the run was going"
        self._write_grid()
        totals = record.total(record.entries(job.folder.path))
        self._say_idle(totals["energy_weights"])
        references = len({r.name for r in job.source.entries} | failed.keys())
        counts = {"references": references, "outputs": job.made(), "failed": len(failed)}
        seconds = round(self.plan.record["seconds"] + self.seconds, 3)
        return {"counts": counts, "seconds": seconds, **totals}

    def _say_idle(self, weights: list[float]) -> None:
        """Log energies that had next to no weight in this run's guided steps."""
        names = self.plan.record["settings"].get("energy")
        names = names if isinstance(names, list) and len(names) == len(weights) else range(len(weights))
        idle = [f"{name} {100 * weight:.2g} %" for name, weight in zip(names, weights) if weight < 0.01]
        if idle:
            log.info("energies that hardly acted, by their mean weight in guided steps: %s", ", ".join(idle))

    def _write_grid(self) -> None:
        job, size, rows = self.job, self.plan.image_size, []
        for reference in job.source.entries:
            if len(rows) == cast(OutputOptions, job.options).grid:
                break
            made = [f"{reference.name}#{k}" for k in range(job.source.samples)]
            if reference.name not in self.failed and all(map(job.exists, made)):
                with contextlib.suppress(ImageError, InputError):  # made earlier, and changed by somebody since
                    rows.append([*job.source.beside(reference, size), *(job.image(key, size) for key in made)])
        if rows:
            if len(rows[0]) == 1:  # samples without a reference: as they are, in a square
                columns, side = math.ceil(len(rows) ** 0.5), size
            else:
                columns, side = max(1, round((len(rows) / len(rows[0])) ** 0.5)), max(128, size)
            sheet = contact_sheet(rows, min(256, side), columns)
            files.write_png(os.path.join(job.folder.path, "grid.png"), sheet, job.folder)


def trajectory_steps(steps: int) -> set[int]:
    """Which of a run's steps an animation shows, counted from its start: few of the noisy half, most of the rest."""
    early, half = TRAJECTORY_FRAMES // 4, steps // 2
    frames = [*np.linspace(0, half - 1, early), *np.linspace(half, steps - 1, TRAJECTORY_FRAMES - early)]
    return set(np.rint(frames).astype(int).tolist())
