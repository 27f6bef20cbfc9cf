"""The one engine under all sampling scripts: a folder of references in, a folder of translations out.

Files, ranks, seeds, resuming and progress live here; the sampler is a function of tensors. What is done is what exists
on disk: outputs appear whole, so a killed run is gone on with by starting it again. Ranks take batches from a common
counter and meet nowhere else.
"""

import contextlib
import hashlib
import logging
import os
import posixpath
import re
import tempfile
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from . import files as outputs
from . import record as run_record
from ..errors import UserError
from ..image_datasets import (
    ImageError,
    Reference,
    check_options,
    display_name,
    find_collisions,
    is_url,
    list_references,
    load_image,
    to_tensor,
    to_uint8,
)

AUTO_BATCH = {"cuda": 32, "mps": 8, "cpu": 8}
"""First batch size tried with --batch_size auto; it is halved while memory does not suffice."""

TRAJECTORY_FRAMES = 48

log = logging.getLogger("sddm")


@dataclass
class Options:
    """What a run does besides sampling; the fields are the flags of the same names (see scripts/common.py)."""

    base_samples: str
    save_dir: str
    batch_size: int | str = 4
    seed: int = 0
    samples_per_image: int = 1
    num_samples: int | None = None
    resize: str = "crop"
    background: str = "white"
    strict: bool = False
    overwrite: bool = False
    save_trajectory: bool = False
    grid: int = 24
    device: torch.device = torch.device("cpu")


@dataclass
class Summary:
    """What became of the references: counts of outputs, and a reason for every reference that failed."""

    done: int = 0
    skipped: int = 0
    failed: dict = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Item:
    """One output to make: the `sample`-th translation of a reference. `key` identifies it in the run."""

    reference: object
    sample: int

    @property
    def key(self):
        return f"{self.reference.name}#{self.sample}"


def _output(key, samples_per_image):
    """The path below the save folder at which the image of an item's key is written, with "/" between its parts."""
    name, _, sample = key.rpartition("#")
    folder = "" if samples_per_image == 1 else f"sample_{sample}/"
    return f"{folder}{posixpath.splitext(name)[0]}.png"


class Job:
    """A folder of references and the outputs wanted of it, checked before any model is loaded.

    peers: dist_util.Peers. Then, in this order: `prepare`, `run`, `finish`.
    Raises UserError for what can be known to fail.
    """

    def __init__(self, options, peers):
        self.options, self.peers = options, peers
        self.summary = Summary()
        check_options(options.resize, options.background)
        _check_folders(options)
        if peers.rank == 0:
            references = list_references(options.base_samples)[: options.num_samples]
            peers.share("references", [(r.path, r.name) for r in references])
        else:
            references = [Reference(*entry) for entry in peers.shared("references")]
        # Several samples have folders of their own.
        collisions = find_collisions(references, reserved=["grid.png"] if options.samples_per_image == 1 else [])
        if options.strict and collisions:
            name, reason = next(iter(collisions.items()))
            raise UserError(f"{display_name(name)}: {reason}")
        self.summary.failed.update(collisions)
        self.references = [r for r in references if r.name not in collisions]
        items = [Item(r, k) for k in range(options.samples_per_image) for r in self.references]
        self.items = {item.key: item for item in items}
        self._limit = None

    def path(self, item):
        """Where an item's image is written."""
        return self._paths(item.key, self.options.samples_per_image)[0]

    def _paths(self, key, samples_per_image):
        """Where the image of an item's key is written, and where its trajectory."""
        output = _output(key, samples_per_image)
        animation = f"trajectory/{output.removesuffix('.png')}.gif"
        return [os.path.join(self.options.save_dir, *path.split("/")) for path in (output, animation)]

    def prepare(self, image_size, settings):
        """Open the save folder: check it against run.json, plan the batches, and write the record.

        image_size: side of the images; settings: all that determines the outputs, for the record (rank 0's count).
        """
        self.image_size = image_size
        if self.peers.rank:
            self.batches = self.peers.shared("plan")
            return
        options = self.options
        if (lock := outputs.lock(options.save_dir)) is not None:
            self._unlock = weakref.finalize(self, os.close, lock)  # in case that nobody comes to call it
        automatic = AUTO_BATCH.get(options.device.type, AUTO_BATCH["cpu"])
        batch_size = automatic if options.batch_size == "auto" else options.batch_size
        old = None
        if options.overwrite:
            self._forget()
        else:
            old = run_record.read(options.save_dir)
        if old is not None:
            run_record.check_same(options.save_dir, old["settings"], settings)
            changed = [
                f"{name} {old['versions'].get(name)} -> {version}"
                for name, version in run_record.versions().items()
                if old.get("versions", {}).get(name) != version
            ]
            if changed:
                log.info("other versions than the run began with: %s", ", ".join(changed))
        else:
            self._refuse_foreign()
        outputs.remove_temporaries(options.save_dir)
        missing = {key for key, item in self.items.items() if not self._exists(item)}
        self.summary.skipped = len(self.items) - len(missing)
        old_plan = old["plan"] if old else []
        if old and old["batch_size"] != batch_size:
            old_plan = run_record.without(old_plan, missing)
        plan = run_record.plan(list(self.items), batch_size, old_plan)
        self.record = {
            "format": run_record.FORMAT,
            "settings": settings,
            "versions": run_record.versions(),
            "base_samples": options.base_samples,
            "device": str(options.device),
            "processes": self.peers.world_size,
            "started": old["started"] if old else _now(),
            "seconds": old["seconds"] if old else 0.0,
            "finished": None,
            "batch_size": batch_size,
            "plan": plan,
        }
        self._write_record()
        # References that are gone stay in the plan, so that it lists all that the run wrote, but are not wanted.
        self.batches = [
            [key for key in batch if key in self.items] for batch in plan if not missing.isdisjoint(batch)
        ]
        self.peers.share("plan", self.batches)

    def _write_record(self):
        outputs.write_json(os.path.join(self.options.save_dir, run_record.NAME), self.record)

    def _exists(self, item):
        return os.path.isfile(self.path(item))

    def _own_files(self):
        return [os.path.join(self.options.save_dir, name) for name in ("grid.png", run_record.NAME)]

    def _refuse_foreign(self):
        """Raise UserError where an output of a new run would replace a file."""
        for path in [self.path(item) for item in self.items.values()] + self._own_files():
            if os.path.lexists(path):
                raise UserError(
                    f"--save_dir {self.options.save_dir} has {display_name(os.path.relpath(path, self.options.save_dir))} "
                    f"already, and no {run_record.NAME} of a run that wrote it; give another folder, or --overwrite True"
                )

    def _forget(self):
        """Remove what an earlier run wrote, so that nothing of it is taken for this one's."""
        old = None
        with contextlib.suppress(UserError):
            old = run_record.read(self.options.save_dir)
        wanted = [self.path(item) for item in self.items.values()]
        if old is not None:
            count = old["settings"].get("samples_per_image", 1)
            wanted += [path for batch in old["plan"] for key in batch for path in self._paths(key, count)]
        # The record goes last: a run that is killed in here is still known for what it is.
        for path in wanted + self._own_files():
            inside = os.path.relpath(os.path.abspath(path), os.path.abspath(self.options.save_dir))
            try:
                if not inside.startswith(os.pardir) and os.path.lexists(path):
                    os.remove(path)
            except OSError as error:
                raise UserError(f"--overwrite True cannot remove {display_name(path)}: {error.strerror}") from None

    def run(self, sampler, steps, progress):
        """Sample every batch that is left and write it; returns the Summary (complete on rank 0).

        sampler(ref, noise, callback): see `sddm.sample`. steps: number of callbacks per batch. progress(n) is told of n
        more image-steps done, over all ranks (on rank 0); `image_steps(steps)` is what they add up to.
        """
        started = time.monotonic()
        self.steps, self.progress = steps, progress
        self.writer = outputs.Writer()
        try:
            while (index := self.peers.count("claimed") - 1) < len(self.batches):
                batch = self.batches[index]
                items = self._read(batch)
                # Where only broken references are missing, the others of the batch are not made again.
                if all(self._exists(item) for item, _ in items):
                    items = []
                self._sample(items, sampler)
                self._tell((len(batch) - len(items)) * steps)
            self.writer.close()
        except BaseException:
            # What is finished is kept; the first error is the one to tell.
            with contextlib.suppress(BaseException):
                self.writer.close()
            self._unlock()
            raise
        self._gather()
        self.summary.seconds = time.monotonic() - started
        return self.summary

    def _read(self, batch):
        """The readable items of a batch with their images: [(item, uint8 [H, W, 3])]; failures are noted."""
        options = self.options

        def read(item):
            try:
                return item, load_image(
                    item.reference, self.image_size, resize=options.resize, background=options.background
                )
            except ImageError as error:
                return item, error

        with ThreadPoolExecutor(8) as pool:
            results = list(pool.map(read, [self.items[key] for key in batch]))
        for item, result in results:
            if isinstance(result, ImageError):
                self._fail(item, result)
        return [(item, result) for item, result in results if not isinstance(result, ImageError)]

    def _fail(self, item, reason):
        """Note that an image cannot be translated; raises UserError with --strict True."""
        if self.options.strict:
            raise UserError(f"{display_name(item.reference.name)}: {reason}")
        self.summary.failed[item.reference.name] = str(reason)

    def _sample(self, items, sampler):
        """Translate a batch; with --batch_size auto, in parts of half the size once memory has not sufficed."""
        while items:
            size = min(len(items), self._limit or len(items))
            told = self._steps_told
            try:
                self._translate(items[:size], sampler)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            else:
                items = items[size:]
                continue
            # Outside of the handler, which keeps the failed attempt's tensors alive.
            self._tell(told - self._steps_told)
            if self.options.device.type == "cuda":
                torch.cuda.empty_cache()
            failed = f"out of memory at batch size {size} on {self.options.device}"
            if size == 1:
                raise UserError(f"{failed}: one image does not fit; another --precision or --device may")
            self._limit = (size + 1) // 2
            if self.options.batch_size != "auto":
                raise UserError(f"{failed}; give --batch_size {self._limit} or less, or auto")
            log.info("%s; going on with %d", failed, self._limit)

    def _translate(self, items, sampler):
        ref = to_tensor([image for _, image in items]).to(self.options.device)
        noise = ImageNoise([f"{self.options.seed}/{item.key}" for item, _ in items], self.options.device)
        frames = []
        kept = {round(i * (self.steps - 1) / (TRAJECTORY_FRAMES - 1)) for i in range(TRAJECTORY_FRAMES)}
        step = 0

        def callback(i, x):
            nonlocal step
            if self.options.save_trajectory and step in kept:
                frames.append(to_uint8(x.nan_to_num()))
            step += 1
            self._tell(len(items))

        x = sampler(ref, noise=noise, callback=callback)
        valid = x.isfinite().flatten(1).all(1).tolist()
        images = to_uint8(x.nan_to_num())
        for n, (item, _) in enumerate(items):
            if not valid[n]:
                self._fail(item, "the model gave values that are NaN or infinite (too little --precision for it?)")
            elif not self._exists(item):
                self.writer.submit(self._write, item, images[n], [frame[n] for frame in frames])
                self.summary.done += 1

    def _write(self, item, image, frames):
        path, animation = self._paths(item.key, self.options.samples_per_image)
        # The image goes last: that it is there says that all is.
        if frames:
            outputs.write_animation(animation, frames)
        outputs.write_png(path, image)

    def image_steps(self, steps):
        """How many image-steps the whole run has before it, over all ranks."""
        return steps * sum(map(len, self.batches))

    def made(self):
        """How many of the wanted outputs there are."""
        return sum(map(self._exists, self.items.values()))

    def _unlock(self):
        """Give the save folder free for other runs; replaced where this process holds a lock on it."""

    _steps_told, _untold, _told_at, _seen = 0, 0, 0.0, 0

    def _tell(self, image_steps):
        """Report progress of this rank: at once if alone, at most twice a second among others."""
        self._steps_told += image_steps
        self._untold += image_steps
        if self.peers.world_size == 1 or time.monotonic() - self._told_at > 0.5:
            self._flush()

    def _flush(self):
        self.peers.watch()
        total = self.peers.count("image_steps", self._untold)
        self._untold, self._told_at = 0, time.monotonic()
        if self.peers.rank == 0:
            self.progress(total - self._seen)
            self._seen = total

    def _gather(self):
        """Rank 0 waits for the others' last batches and collects what they did."""
        self._flush()
        if self.peers.rank:
            self.peers.share(f"summary/{self.peers.rank}", [self.summary.done, self.summary.failed])
            self.peers.count("finished")
            return
        while self.peers.count("finished", 0) < self.peers.world_size - 1:
            time.sleep(0.1)
            self._flush()
        for rank in range(1, self.peers.world_size):
            done, failed = self.peers.shared(f"summary/{rank}")
            self.summary.done += done
            self.summary.failed.update(failed)
        self._flush()

    def finish(self):
        """Write grid.png and complete run.json (rank 0)."""
        if self.peers.rank:
            return
        self._write_grid()
        self.record |= {
            "finished": _now(),
            "counts": {
                "references": len({r.name for r in self.references} | self.summary.failed.keys()),
                "outputs": self.made(),
                "failed": len(self.summary.failed),
            },
            "failed": self.summary.failed,
            "seconds": round(self.record["seconds"] + self.summary.seconds, 3),
        }
        self._write_record()
        self._unlock()

    def _write_grid(self):
        options = self.options
        rows = []
        for reference in self.references:
            made = [self.items[f"{reference.name}#{k}"] for k in range(options.samples_per_image)]
            if len(rows) == options.grid:
                break
            if reference.name in self.summary.failed or not all(self._exists(item) for item in made):
                continue
            try:
                source = load_image(
                    reference, self.image_size, resize=options.resize, background=options.background
                )
                rows.append([source] + [load_image(self.path(item), self.image_size) for item in made])
            except ImageError:  # made earlier, and changed by somebody since
                continue
        if rows:
            side = min(256, max(128, self.image_size))
            columns = max(1, round((len(rows) / (1 + options.samples_per_image)) ** 0.5))
            sheet = outputs.contact_sheet(rows, side, columns)
            outputs.write_png(os.path.join(options.save_dir, "grid.png"), sheet)


class ImageNoise:
    """Random draws for a batch, each image's from a generator of its own, on the CPU so that every device sees them.

    names: one string per image, which determines its draws. Calling with the batch's shape gives the next draw. On a
    GPU the draw after it is made ready meanwhile.
    """

    def __init__(self, names, device):
        self.generators = [torch.Generator().manual_seed(seed_of(name)) for name in names]
        self.device = device
        self._pool = ThreadPoolExecutor(1) if device.type == "cuda" else None
        self._next = None

    def __call__(self, shape):
        if self._pool is None:
            return self._draw(shape).to(self.device)
        draw = self._next.result() if self._next is not None else self._draw(shape)
        self._next = self._pool.submit(self._draw, shape)
        return draw.to(self.device, non_blocking=True)

    def _draw(self, shape):
        draw = torch.empty(shape, pin_memory=self._pool is not None)
        for row, generator in zip(draw, self.generators):
            torch.randn(shape[1:], generator=generator, out=row)
        return draw


def seed_of(name):
    """A 63-bit seed from a string, the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big") >> 1


def _check_folders(options):
    save_dir = options.save_dir
    if "://" in save_dir:
        raise UserError(f"--save_dir {save_dir}: outputs are written to a local folder only")
    if os.path.exists(save_dir) and not os.path.isdir(save_dir):
        raise UserError(f"--save_dir {save_dir} is a file; give a folder")
    if not is_url(options.base_samples):
        base, save = os.path.realpath(options.base_samples), os.path.realpath(save_dir)
        if os.path.isdir(base) and os.path.commonpath([base, save]) == base:
            raise UserError(f"--save_dir {save_dir} lies in --base_samples, and outputs would become references; move it")
    try:
        os.makedirs(save_dir, exist_ok=True)
        # Other ranks, on other machines perhaps, try at the same time, and rank 0 removes what looks left over.
        descriptor, probe = tempfile.mkstemp(prefix=".probe-", suffix=outputs.TEMPORARY, dir=save_dir)
        os.close(descriptor)
        with contextlib.suppress(FileNotFoundError):
            os.remove(probe)
    except OSError as error:
        raise UserError(f"--save_dir {save_dir} cannot be written: {error.strerror}") from None


def is_out_of_memory(error):
    """Whether an exception says that memory did not suffice, in the words of any backend."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or bool(
        re.search("out of memory|not enough memory|ALLOC_FAILED", str(error), re.IGNORECASE)
    )


def _now():
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
