"""The one engine under all sampling scripts: a folder of references in, a folder of translations out.

Files, ranks, seeds, resuming and progress live here; the sampler is a function of tensors. What is done is what exists
on disk: outputs appear whole, so a killed run is gone on with by starting it again. Ranks take batches from a common
counter and meet nowhere else.
"""

import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from . import outputs, run_record
from .errors import UserError
from .image_datasets import (
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
    """One output to make: the `sample`-th translation of a reference, written to `output` below the save folder."""

    reference: object
    sample: int
    output: str

    @property
    def key(self):
        return f"{self.reference.name}#{self.sample}"


class Job:
    """A folder of references and the outputs wanted of it, checked before any model is loaded.

    me: dist_util.Ranks; store: the ranks' common store or None. Then, in this order: `prepare`, `run`, `finish`.
    Raises UserError for what can be known to fail.
    """

    def __init__(self, options, me, store=None):
        self.options, self.me, self.store = options, me, store
        self.summary = Summary()
        check_options(options.resize, options.background)
        _check_folders(options)
        if me.rank == 0:
            references = list_references(options.base_samples)[: options.num_samples]
            self._share("references", [(r.path, r.name) for r in references])
        else:
            references = [Reference(*entry) for entry in self._shared("references")]
        reserved = [run_record.NAME, "grid.png"] + (["trajectory"] if options.save_trajectory else [])
        collisions = find_collisions(references, reserved=reserved)
        self.summary.failed.update(collisions)
        self.references = [r for r in references if r.name not in collisions]
        self.items = {
            item.key: item
            for k in range(options.samples_per_image)
            for item in (Item(r, k, self._output(r, k)) for r in self.references)
        }
        if options.strict and collisions:
            name, reason = next(iter(collisions.items()))
            raise UserError(f"{display_name(name)}: {reason}")

    def _output(self, reference, sample):
        folder = "" if self.options.samples_per_image == 1 else f"sample_{sample}/"
        return f"{folder}{reference.stem}.png"

    def path(self, item):
        """Where an item's image is written."""
        return os.path.join(self.options.save_dir, *item.output.split("/"))

    def _trajectory_path(self, item):
        stem = item.output.removesuffix(".png")
        return os.path.join(self.options.save_dir, "trajectory", *f"{stem}.gif".split("/"))

    def _share(self, key, value):
        if self.store is not None:
            self.store.set(key, json.dumps(value))

    def _shared(self, key):
        return json.loads(self.store.get(key))

    def prepare(self, image_size, settings):
        """Open the save folder: check it against run.json, plan the batches, and write the record.

        image_size: side of the images; settings: the flags that determine the outputs, with what was read from files in
        their place. Rank 0 does this, the others get the plan.
        """
        self.image_size = image_size
        if self.me.rank:
            self.batches = self._shared("plan")
            return
        options = self.options
        batch_size = AUTO_BATCH[options.device.type] if options.batch_size == "auto" else options.batch_size
        old = None
        if options.overwrite:
            self._forget()
        else:
            old = run_record.read(options.save_dir)
        if old is not None:
            run_record.check_same(options.save_dir, old["settings"], settings)
        elif existing := [item for item in self.items.values() if os.path.exists(self.path(item))]:
            raise UserError(
                f"--save_dir {options.save_dir} has {existing[0].output} already, which no run with a "
                f"{run_record.NAME} wrote; give another folder, or --overwrite True"
            )
        outputs.remove_temporaries(options.save_dir)
        missing = [item for item in self.items.values() if not self._exists(item)]
        self.summary.skipped = len(self.items) - len(missing)
        if old is None or old["batch_size"] == batch_size:
            plan = run_record.plan(list(self.items), batch_size, old["plan"] if old else ())
        else:
            plan = run_record.plan([item.key for item in missing], batch_size)
        self.record = {
            "settings": settings,
            "versions": run_record.versions(),
            "started": old["started"] if old else _now(),
            "seconds": old["seconds"] if old else 0.0,
            "finished": None,
            "batch_size": batch_size,
            "plan": plan,
        }
        outputs.write_json(os.path.join(options.save_dir, run_record.NAME), self.record)
        missing = {item.key for item in missing}
        self.batches = [batch for batch in plan if not missing.isdisjoint(batch)]
        self._share("plan", self.batches)

    def _exists(self, item):
        return os.path.exists(self.path(item))

    def _forget(self):
        """Remove what an earlier run wrote, so that nothing of it is taken for this one's."""
        old = None
        try:
            old = run_record.read(self.options.save_dir)
        except UserError:
            pass
        wanted = [self.path(item) for item in self.items.values()]
        if old is not None:
            count = old["settings"].get("samples_per_image", 1)
            for key in (key for batch in old["plan"] for key in batch):
                name, _, sample = key.rpartition("#")
                stem = os.path.splitext(name)[0]
                folder = "" if count == 1 else f"sample_{sample}"
                wanted.append(os.path.join(self.options.save_dir, folder, *f"{stem}.png".split("/")))
                wanted.append(os.path.join(self.options.save_dir, "trajectory", folder, *f"{stem}.gif".split("/")))
        wanted += [os.path.join(self.options.save_dir, name) for name in (run_record.NAME, "grid.png")]
        for path in wanted:
            if os.path.lexists(path):
                os.remove(path)

    def run(self, sampler, steps, progress):
        """Sample every batch that is left and write it; returns the Summary (complete on rank 0).

        sampler(ref, noise, callback): see `sddm.sample`. steps: number of callbacks per batch. progress(n) is told of n
        more image-steps done, over all ranks (on rank 0); `image_steps(steps)` is what they add up to.
        """
        started = time.monotonic()
        self.steps, self.progress = steps, progress
        writer = outputs.Writer()
        try:
            for batch in self._claims():
                items = self._read(batch)
                # Where only broken references are missing, the others of the batch are not made again.
                if not all(self._exists(item) for item, _ in items):
                    self._sample(items, sampler, writer)
                self._tell((len(batch) - len(items)) * steps)
            writer.close()
        except BaseException:
            # What is finished is kept; the first error is the one to tell.
            try:
                writer.close()
            except BaseException:
                pass
            raise
        self._gather()
        self.summary.seconds = time.monotonic() - started
        return self.summary

    def _claims(self):
        """Batches for this rank, each taken from the common counter when the last one is done."""
        if self.store is None:
            yield from self.batches
            return
        while (index := self.store.add("claimed", 1) - 1) < len(self.batches):
            yield self.batches[index]

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
                if options.strict:
                    raise UserError(f"{display_name(item.reference.name)}: {result}") from result
                self.summary.failed[item.reference.name] = str(result)
        return [(item, result) for item, result in results if not isinstance(result, ImageError)]

    def _sample(self, items, sampler, writer):
        """Translate one batch; with --batch_size auto, in halves where memory does not suffice."""
        try:
            self._translate(items, sampler, writer)
        except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            failed = f"out of memory at batch size {len(items)} on {self.options.device}"
            if self.options.batch_size != "auto" or len(items) == 1:
                hint = "give a smaller --batch_size, or auto" if len(items) > 1 else "one image does not fit"
                raise UserError(f"{failed}; {hint}") from None
        else:
            return
        if self.options.device.type == "cuda":
            torch.cuda.empty_cache()
        half = (len(items) + 1) // 2
        self._sample(items[:half], sampler, writer)
        self._sample(items[half:], sampler, writer)

    def _translate(self, items, sampler, writer):
        ref = to_tensor([image for _, image in items]).to(self.options.device)
        noise = ImageNoise([f"{self.options.seed}/{item.key}" for item, _ in items], self.options.device)
        frames = []
        kept = {round(i * (self.steps - 1) / (TRAJECTORY_FRAMES - 1)) for i in range(TRAJECTORY_FRAMES)}
        step = 0

        def callback(i, x):
            nonlocal step
            if self.options.save_trajectory and step in kept:
                frames.append(to_uint8(x))
            step += 1
            self._tell(len(items))

        images = to_uint8(sampler(ref, noise=noise, callback=callback))
        for n, (item, _) in enumerate(items):
            if self._exists(item):
                continue
            if self.options.save_trajectory:
                writer.submit(outputs.write_animation, self._trajectory_path(item), [f[n] for f in frames])
            writer.submit(outputs.write_png, self.path(item), images[n])
            self.summary.done += 1

    def image_steps(self, steps):
        """How many image-steps the whole run has before it, over all ranks."""
        return steps * sum(map(len, self.batches))

    _untold, _told_at, _seen = 0, 0.0, 0

    def _tell(self, image_steps):
        """Report progress: at once alone, through the common counter and at most twice a second among others."""
        if self.store is None:
            self.progress(image_steps)
            return
        self._untold += image_steps
        if time.monotonic() - self._told_at > 0.5:
            self._flush()

    def _flush(self):
        total = self.store.add("image_steps", self._untold)
        self._untold, self._told_at = 0, time.monotonic()
        if self.me.rank == 0:
            self.progress(total - self._seen)
            self._seen = total

    def _gather(self):
        """Rank 0 waits for the others' last batches and collects what they did."""
        if self.store is None:
            return
        self._flush()
        if self.me.rank:
            self._share(f"summary/{self.me.rank}", [self.summary.done, self.summary.failed])
            self.store.add("finished", 1)
            # The store lives in rank 0 or the launcher: leave only when everyone has been heard.
            self.store.get("all finished")
            return
        while self.store.add("finished", 0) < self.me.world_size - 1:
            time.sleep(0.2)
            self._flush()
        for rank in range(1, self.me.world_size):
            done, failed = self._shared(f"summary/{rank}")
            self.summary.done += done
            self.summary.failed.update(failed)
        self._flush()
        self.store.set("all finished", "1")

    def finish(self):
        """Write grid.png and complete run.json (rank 0)."""
        if self.me.rank:
            return
        self._write_grid()
        self.record |= {
            "finished": _now(),
            "counts": {
                "references": len({r.name for r in self.references} | self.summary.failed.keys()),
                "outputs": sum(map(self._exists, self.items.values())),
                "failed": len(self.summary.failed),
            },
            "failed": self.summary.failed,
            "seconds": round(self.record["seconds"] + self.summary.seconds, 3),
        }
        outputs.write_json(os.path.join(self.options.save_dir, run_record.NAME), self.record)

    def _write_grid(self):
        options = self.options
        rows = []
        for reference in self.references:
            made = [self.items[f"{reference.name}#{k}"] for k in range(options.samples_per_image)]
            if len(rows) == options.grid:
                break
            if reference.name in self.summary.failed or not all(self._exists(item) for item in made):
                continue
            source = load_image(
                reference, self.image_size, resize=options.resize, background=options.background
            )
            rows.append([source] + [load_image(self.path(item), self.image_size) for item in made])
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
        probe = os.path.join(save_dir, f".probe-{os.getpid()}{outputs.TEMPORARY}")
        with open(probe, "wb"):
            pass
        os.remove(probe)
    except OSError as error:
        raise UserError(f"--save_dir {save_dir} cannot be written: {error.strerror}") from None


def _is_out_of_memory(error):
    text = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "not enough memory" in text or (
        "DefaultCPUAllocator" in text
    )


def _now():
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
