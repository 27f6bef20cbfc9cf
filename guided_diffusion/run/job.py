"""The one engine under all sampling commands: a folder of references in, a folder of translations out.

Files, ranks, seeds, resuming and progress live here; the sampler is a function of tensors. What is done is what exists
on disk: outputs appear whole, so a killed run resumes when started again. Ranks take batches from a common counter and
share nothing else.
"""

import contextlib
import errno
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..dist_util import Peers
from ..errors import InputError, display_name, one_line
from ..image_datasets import (
    RESIZE_MODES,
    ImageError,
    Reference,
    check_options,
    find_collisions,
    is_url,
    list_references,
    load_image,
    to_tensor,
    to_uint8,
)
from ..options import check, option
from ..runtime import is_out_of_memory
from . import files, record
from .grid import contact_sheet
from .monitor import Monitor
from .noise import ImageNoise, image_key
from .plan import Item, output_paths, plan, without

AUTO_BATCH = {"cuda": 32, "mps": 8, "cpu": 8}
"""First batch size tried with batch_size="auto"; it is halved while memory does not suffice."""

TRAJECTORY_FRAMES = 48
MOST_IMAGES = 1_000_000

# Errors of a file system that concern one name alone: too long, or with characters that it does not take.
NAME_ERRORS = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)

log = logging.getLogger("sddm")


@dataclass(frozen=True)
class OutputOptions:
    """Where outputs go, and how a run is made."""

    save_dir: str = option("output", "folder for the outputs", runtime=True, metavar="DIR")
    save_trajectory: bool = option(False, "also write the denoising of every image as an animation to trajectory/")
    trajectory: str = option("x0", "what the animation shows: the predicted x_0, or x_t", choices=("x0", "xt"))
    grid: int = option(24, "images shown in grid.png, 0 for none", least=0, most=10_000, runtime=True)
    overwrite: bool = option(False, "start over where the save folder holds another run", runtime=True)
    batch_size: int | str = option(4, "images at once, or auto", least=1, runtime=True, metavar="N")
    seed: int = option(0, "with an image's relative path, determines its noise")

    def __post_init__(self) -> None:
        check(self)
        if isinstance(self.batch_size, str) and self.batch_size != "auto":
            raise InputError("it must be a whole number above 0 or auto", parameter="batch_size", value=self.batch_size)

    def ignored(self) -> set[str]:
        """Fields that have no effect with these values; version 0.1 showed x_0 and recorded no choice."""
        return set() if self.save_trajectory and self.trajectory != "x0" else {"trajectory"}


@dataclass(frozen=True)
class JobOptions(OutputOptions):
    """The references of a run besides."""

    base_samples: str = option(
        None, "a folder of references (searched recursively), or one image", runtime=True, metavar="PATH"
    )
    num_samples: int | None = option(
        None, "translate only the first so many references", least=1, most=MOST_IMAGES, runtime=True
    )
    samples_per_image: int = option(1, "translations of every reference", least=1, most=10_000)
    resize: str = option("crop", "how images that are not square become so", choices=RESIZE_MODES)
    background: str = option("white", "colour behind transparent pixels", metavar="COLOUR")
    strict: bool = option(False, "stop at the first unreadable image", runtime=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self.resize, self.background)


@dataclass
class Summary:
    """What became of the references: counts of outputs, and a reason for every reference that failed."""

    done: int = 0
    skipped: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


class References:
    """The images that a job translates, listed once for all ranks and read when their turn comes."""

    def __init__(self, options: JobOptions, peers: Peers) -> None:
        self.options = options
        if peers.rank == 0:
            found = list_references(options.base_samples)[: options.num_samples]
            peers.publish("references", [(reference.path, reference.name) for reference in found])
        else:
            found = [Reference(*entry) for entry in peers.wait_for("references")]
        # Several samples have folders of their own.
        reserved = ["grid.png"] if options.samples_per_image == 1 else []
        self.failed = find_collisions(found, reserved=reserved)
        self.entries = [reference for reference in found if reference.name not in self.failed]

    def read(self, reference: Reference, image_size: int) -> np.ndarray:
        """One reference as uint8 [H, W, 3]; raises ImageError."""
        return load_image(reference, image_size, resize=self.options.resize, background=self.options.background)

    def row(self, reference: Reference, made: list[np.ndarray], image_size: int) -> list[np.ndarray]:
        """What grid.png shows of a reference with its outputs."""
        return [self.read(reference, image_size), *made]

    def layout(self, rows: int, image_size: int) -> tuple[int, int]:
        """The side of the pictures in grid.png and how many rows stand beside each other."""
        width = 1 + self.options.samples_per_image
        return min(256, max(128, image_size)), max(1, round((rows / width) ** 0.5))


class Numbers:
    """Numbers in the place of references, for images of a model's own: 000000.png, 000001.png, …"""

    def __init__(self, count: int) -> None:
        names = [f"{number:06d}.png" for number in range(count)]
        self.entries = [Reference(name, name) for name in names]
        self.failed: dict[str, str] = {}

    def read(self, reference: Reference, image_size: int) -> np.ndarray:
        """A black picture: only its size counts."""
        return np.zeros((image_size, image_size, 3), np.uint8)

    def row(self, reference: Reference, made: list[np.ndarray], image_size: int) -> list[np.ndarray]:
        """What grid.png shows: the image alone."""
        return made

    def layout(self, rows: int, image_size: int) -> tuple[int, int]:
        """As for `References`."""
        return min(256, image_size), math.ceil(rows**0.5)


class Job:
    """A folder of references and the outputs wanted of it, checked before any model is loaded.

    source: what is translated, by default the references that the options name. Then, in this order: `prepare`, `run`,
    `finish`. Raises InputError for what can be known to fail.
    """

    def __init__(
        self,
        options: OutputOptions,
        peers: Peers,
        device: torch.device,
        source: References | Numbers | None = None,
    ) -> None:
        self.options, self.peers, self.device = options, peers, device
        self.samples_per_image = getattr(options, "samples_per_image", 1)
        self.strict = getattr(options, "strict", False)
        base = getattr(options, "base_samples", None)
        self._check_folders(base)
        self.source = source or References(options, peers)  # type: ignore[arg-type]
        self.summary = Summary(failed=dict(self.source.failed))
        if self.strict and self.summary.failed:
            name, reason = next(iter(self.summary.failed.items()))
            raise InputError(f"{display_name(name)}: {reason}")
        entries = self.source.entries
        items = [Item(reference, k) for k in range(self.samples_per_image) for reference in entries]
        self.items = {item.key: item for item in items}
        self._limit: int | None = None
        self._count_lock = threading.Lock()
        self._steps_reported, self._unreported, self._reported_at, self._seen = 0, 0, 0.0, 0
        self._check_inside()
        self._sources = self._find_sources(base)
        self._refuse_sources(self._own_files() + [path for item in items for path in self._paths(item.key)])

    # ---- folders ----------------------------------------------------------------------------------------------------

    def _check_folders(self, base: str | None) -> None:
        save_dir = self.options.save_dir
        if base is not None and not is_url(base):
            references, outputs = os.path.realpath(base), os.path.realpath(save_dir)
            if os.path.isdir(base) and os.path.commonpath([references, outputs]) == references:
                reason = "it lies in `base_samples`, and outputs would become references; move it"
                raise InputError(reason, parameter="save_dir", value=save_dir)
        files.make_folder(save_dir, "save_dir")

    def _find_sources(self, base: str | None) -> dict[str, str]:
        """The files that are translated: real path -> name. Those that fail are somebody's pictures, too."""
        if base is None or is_url(base):
            return {}
        if not os.path.isdir(base):
            return {os.path.realpath(base): os.path.basename(base)}
        failed = {os.path.realpath(os.path.join(base, name)): name for name in self.source.failed}
        return failed | {os.path.realpath(reference.path): reference.name for reference in self.source.entries}

    def _refuse_sources(self, paths: list[str]) -> None:
        """Raise InputError where a file that the run writes or removes is one of the references."""
        for path in paths if self._sources else ():
            if os.path.lexists(path) and (source := self._sources.get(os.path.realpath(path))) is not None:
                output = display_name(os.path.relpath(path, self.options.save_dir))
                reason = f"the output {output} would replace the reference {display_name(source)}"
                raise InputError(f"{reason}; give another folder", parameter="save_dir", value=self.options.save_dir)

    def _check_inside(self) -> None:
        """Raise InputError where a link in the save folder leads an output out of it."""
        root = os.path.realpath(self.options.save_dir)
        for folder in {os.path.dirname(path) for item in self.items.values() for path in self._paths(item.key)}:
            real = os.path.realpath(folder)
            if os.path.commonpath([root, real]) != root:
                reason = (
                    f"its folder {display_name(os.path.relpath(folder, self.options.save_dir))} is a link out of it"
                )
                raise InputError(f"{reason}; remove the link", parameter="save_dir", value=self.options.save_dir)

    def path(self, item: Item) -> str:
        """Where an item's image is written."""
        return self._paths(item.key)[0]

    def _paths(self, key: str, samples_per_image: int | None = None) -> tuple[str, str]:
        return output_paths(self.options.save_dir, key, samples_per_image or self.samples_per_image)

    def _exists(self, item: Item) -> bool:
        path = self.path(item)
        return os.path.isfile(path) and not os.path.islink(path)

    def _own_files(self) -> list[str]:
        return [os.path.join(self.options.save_dir, name) for name in ("grid.png", record.NAME)]

    # ---- before the run ---------------------------------------------------------------------------------------------

    def prepare(self, image_size: int, settings: dict[str, Any]) -> None:
        """Open the save folder: check it against run.json, plan the batches, and write the record.

        image_size: side of the images; settings: all that determines the outputs, for the record (rank 0's count).
        """
        self.image_size = image_size
        self.monitor = Monitor(self.options.save_dir, f"{self.peers.rank}-{os.getpid()}-{time.time_ns()}")
        if self.peers.rank:
            self.batches = self.peers.wait_for("plan")
            return
        if (handle := files.lock(self.options.save_dir)) is not None:
            self._unlock = weakref.finalize(self, os.close, handle)  # in case that nobody comes to call it
        try:
            self._open(settings)
        except BaseException:
            self._unlock()
            raise

    def _open(self, settings: dict[str, Any]) -> None:
        """What `prepare` does once this process has the folder."""
        options = self.options
        automatic = AUTO_BATCH.get(self.device.type, AUTO_BATCH["cpu"])
        batch_size = automatic if isinstance(options.batch_size, str) else options.batch_size
        old = None
        if options.overwrite:
            self._forget()
        else:
            old = record.read(options.save_dir)
        if old is not None:
            record.check_same(options.save_dir, old["settings"], settings)
            _report_versions(old.get("versions", {}))
        else:
            self._refuse_foreign()
        files.remove_temporaries(options.save_dir)
        missing = {key for key, item in self.items.items() if not self._exists(item)}
        self.summary.skipped = len(self.items) - len(missing)
        old_plan = old["plan"] if old else []
        if old and old["batch_size"] != batch_size:
            old_plan = without(old_plan, missing)
        batches = plan(list(self.items), batch_size, old_plan)
        self.record: dict[str, Any] = {
            "format": record.FORMAT,
            "settings": settings,
            "versions": record.versions(),
            "base_samples": getattr(options, "base_samples", os.devnull),
            "device": str(self.device),
            "processes": self.peers.world_size,
            "started": old["started"] if old else _now(),
            "seconds": old["seconds"] if old else 0.0,
            "finished": None,
            "batch_size": batch_size,
            "plan": batches,
        }
        self._write_record()
        self.monitor.begin(old.get("monitor") if old else None, options.overwrite)
        # References that are gone stay in the plan, so that it lists all that the run wrote, but are not wanted.
        self.batches = [
            [key for key in batch if key in self.items] for batch in batches if not missing.isdisjoint(batch)
        ]
        self.peers.publish("plan", self.batches)

    def _write_record(self) -> None:
        files.write_json(os.path.join(self.options.save_dir, record.NAME), self.record)

    def _refuse_foreign(self) -> None:
        """Raise InputError where an output of a new run would replace a file."""
        for path in [self.path(item) for item in self.items.values()] + self._own_files():
            if os.path.lexists(path):
                name = display_name(os.path.relpath(path, self.options.save_dir))
                reason = f"{name} is already present, and no {record.NAME} of a run that wrote it"
                reason += "; give another folder, or `overwrite` True"
                raise InputError(reason, parameter="save_dir", value=self.options.save_dir)

    def _forget(self) -> None:
        """Remove what an earlier run wrote, so that nothing of it is taken for this one's."""
        old = None
        with contextlib.suppress(InputError):
            old = record.read(self.options.save_dir)
        wanted = [self.path(item) for item in self.items.values()]
        if old is not None:
            count = old["settings"].get("samples_per_image", 1)
            wanted += [path for batch in old["plan"] for key in batch for path in self._paths(key, count)]
        self._refuse_sources(wanted)
        root = os.path.realpath(self.options.save_dir)
        # The record goes last: a run that is killed in here is still known for what it is.
        for path in wanted + self._own_files():
            folder = os.path.realpath(os.path.dirname(path))
            try:
                if os.path.commonpath([root, folder]) == root and os.path.lexists(path):
                    os.remove(path)
            except OSError as error:
                raise InputError(f"{display_name(path)} cannot be removed: {error.strerror}") from None

    # ---- the run ----------------------------------------------------------------------------------------------------

    def run(self, sampler: Callable[..., torch.Tensor], steps: int, progress: Callable[[int, int], None]) -> Summary:
        """Make what is missing with sampler(ref, noise=, callback=), which calls back `steps` times an image.

        progress(image_steps, images): called while it runs, on rank 0, with the image-steps done since the last call,
        over all ranks, and the outputs that exist; `image_steps(steps)` is what the former add up to.
        """
        started = time.monotonic()
        self.steps, self.progress = steps, progress
        self.writer = files.Writer()
        sampler = self.monitor.watch(sampler)
        try:
            while (index := self.peers.count("claimed") - 1) < len(self.batches):
                batch = self.batches[index]
                items = self._read(batch)
                # Where only broken references are missing, the others of the batch are not made again.
                if all(self._exists(item) for item, _ in items):
                    items = []
                self._sample(items, sampler)
                self._report((len(batch) - len(items)) * steps)
            self.writer.close()
        except BaseException:
            # What is finished is kept; the first error is the one to report.
            with contextlib.suppress(BaseException):
                self.writer.close()
            self._unlock()
            raise
        self._gather()
        self.summary.seconds = time.monotonic() - started
        return self.summary

    def _read(self, batch: list[str]) -> list[tuple[Item, np.ndarray]]:
        """The readable items of a batch with their images: [(item, uint8 [H, W, 3])]; failures are noted."""

        def read(item: Item) -> tuple[Item, np.ndarray | ImageError]:
            try:
                return item, self.source.read(item.reference, self.image_size)
            except ImageError as error:
                return item, error

        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(read, [self.items[key] for key in batch]))
        readable = []
        for item, result in results:
            if isinstance(result, ImageError):
                self._fail(item, str(result))
            else:
                readable.append((item, result))
        return readable

    def _fail(self, item: Item, reason: str) -> None:
        """Note that an image cannot be translated; raises InputError with strict."""
        if self.strict:
            raise InputError(f"{display_name(item.reference.name)}: {reason}")
        self.summary.failed[item.reference.name] = reason

    def _sample(self, items: list[tuple[Item, np.ndarray]], sampler: Callable) -> None:
        """Translate a batch; with batch_size="auto", in parts of half the size once memory has not sufficed."""
        while items:
            size = min(len(items), self._limit or len(items))
            reported = self._steps_reported
            try:
                self._translate(items[:size], sampler)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            else:
                items = items[size:]
                continue
            # Outside of the handler, which keeps the failed attempt's tensors alive.
            self._report(reported - self._steps_reported)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            failed = f"out of memory at batch size {size} on {self.device}"
            if size == 1:
                raise InputError(f"{failed}: one image does not fit; another `precision` or `device` may")
            self._limit = (size + 1) // 2
            if self.options.batch_size != "auto":
                raise InputError(f"{failed}; give `batch_size` {self._limit} or less, or auto")
            log.info("%s; continuing with %d", failed, self._limit)

    def _translate(self, items: list[tuple[Item, np.ndarray]], sampler: Callable) -> None:
        ref = to_tensor([image for _, image in items]).to(self.device)
        names = [image_key(self.options.seed, item.reference.name, item.sample) for item, _ in items]
        noise = ImageNoise(names, self.device)
        frames: list[np.ndarray] = []
        kept = trajectory_steps(self.steps) if self.options.save_trajectory else set()
        shown = "pred_xstart" if self.options.trajectory == "x0" else "x"
        step = 0

        def callback(state: dict[str, Any]) -> None:
            nonlocal step
            if step in kept:
                frames.append(to_uint8(state[shown].nan_to_num()))
            step += 1
            self._report(len(items))

        x = sampler(ref, noise=noise, callback=callback)
        valid = x.isfinite().flatten(1).all(1).tolist()
        images = to_uint8(x.nan_to_num())
        for n, (item, _) in enumerate(items):
            if not valid[n]:
                self._fail(item, "the model gave values that are NaN or infinite (too low a precision for it?)")
            elif not self._exists(item):
                self.writer.submit(self._write, item, images[n], [frame[n] for frame in frames])

    def _write(self, item: Item, image: np.ndarray, frames: Sequence[np.ndarray]) -> None:
        path, animation = self._paths(item.key)
        root = self.options.save_dir
        try:
            # The image goes last: where it exists, all is written.
            if frames:
                files.write_animation(animation, frames, root=root)
            files.write_png(path, image, root)
        except InputError as error:
            files.check_present(root, "save_dir")
            if getattr(error.__cause__, "errno", None) not in NAME_ERRORS:
                raise
            self._fail(item, f"its output cannot be written: {os.strerror(error.__cause__.errno)}")  # type: ignore[union-attr]
            return
        with self._count_lock:
            self.summary.done += 1

    def image_steps(self, steps: int) -> int:
        """How many image-steps the whole run has before it, over all ranks."""
        return steps * sum(map(len, self.batches))

    def made(self) -> int:
        """How many of the wanted outputs exist."""
        return sum(map(self._exists, self.items.values()))

    def _unlock(self) -> None:
        """Release the save folder's lock; replaced where this process holds it."""

    def _report(self, image_steps: int) -> None:
        """Report progress of this rank: at once if alone, at most twice a second among others."""
        self._steps_reported += image_steps
        self._unreported += image_steps
        if self.peers.world_size == 1 or time.monotonic() - self._reported_at > 0.5:
            self._flush()

    def _flush(self) -> None:
        self.peers.watch()
        total = self.peers.count("image_steps", self._unreported)
        images = self.peers.count("images", self.summary.done - self._images_counted)
        self._images_counted = self.summary.done
        self._unreported, self._reported_at = 0, time.monotonic()
        if self.peers.rank == 0:
            self.progress(total - self._seen, images + self.summary.skipped)
            self._seen = total

    _images_counted = 0

    def _gather(self) -> None:
        """Rank 0 waits for the others' last batches and collects what they did."""
        self._flush()
        if self.peers.rank:
            self.peers.publish(f"summary/{self.peers.rank}", [self.summary.done, self.summary.failed])
            self.peers.count("finished")
            return
        while self.peers.count("finished", 0) < self.peers.world_size - 1:
            time.sleep(0.1)
            self._flush()
        self._flush()
        for rank in range(1, self.peers.world_size):
            done, failed = self.peers.wait_for(f"summary/{rank}")
            self.summary.done += done
            self.summary.failed.update(failed)

    # ---- after the run ----------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Write grid.png, complete run.json and release the folder, in this order (rank 0)."""
        if self.peers.rank:
            return
        try:
            files.check_present(self.options.save_dir, "save_dir")
            self._note_lost()
            self._write_grid()
            self.record |= {
                "finished": _now(),
                "counts": {
                    "references": len({r.name for r in self.source.entries} | self.summary.failed.keys()),
                    "outputs": self.made(),
                    "failed": len(self.summary.failed),
                },
                "failed": self.summary.failed,
                "seconds": round(self.record["seconds"] + self.summary.seconds, 3),
                **self.monitor.total(),
            }
            self._write_record()
            self.monitor.forget(self.record["monitor"]["parts"])
        finally:
            self._unlock()

    def _note_lost(self) -> None:
        """Outputs that were written and do not exist any more count as failed."""
        for item in self.items.values():
            if item.reference.name not in self.summary.failed and not self._exists(item):
                self.summary.failed[item.reference.name] = "its output was removed while the run was going"

    def _write_grid(self) -> None:
        rows = []
        for reference in self.source.entries:
            if len(rows) == self.options.grid:
                break
            made = [self.items[f"{reference.name}#{k}"] for k in range(self.samples_per_image)]
            if reference.name in self.summary.failed or not all(self._exists(item) for item in made):
                continue
            with contextlib.suppress(ImageError):  # made earlier, and changed by somebody since
                images = [load_image(self.path(item), self.image_size) for item in made]
                rows.append(self.source.row(reference, images, self.image_size))
        if rows:
            sheet = contact_sheet(rows, *self.source.layout(len(rows), self.image_size))
            files.write_png(os.path.join(self.options.save_dir, "grid.png"), sheet)


def trajectory_steps(steps: int) -> set[int]:
    """Which of a run's steps an animation shows, counted from its start: few of the noisy half, most of the rest."""
    early, half = TRAJECTORY_FRAMES // 4, steps // 2
    first = _spread(0, half - 1, early)
    return first | _spread(half, steps - 1, TRAJECTORY_FRAMES - early)


def _spread(low: int, high: int, count: int) -> set[int]:
    """About `count` whole numbers from low to high, both among them."""
    return {round(low + i * (high - low) / max(1, count - 1)) for i in range(count)} if high >= low else set()


def _report_versions(old: dict[str, str]) -> None:
    new = record.versions()
    changed = [f"{name} {old.get(name)} -> {version}" for name, version in new.items() if old.get(name) != version]
    if changed:
        log.info("other versions than the run began with: %s", one_line(", ".join(changed)))


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


__all__ = ["Job", "JobOptions", "Numbers", "OutputOptions", "References", "Summary", "trajectory_steps"]
