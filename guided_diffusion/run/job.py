"""The outputs that a run is to make, and a plan of those that are missing.

`Job` is what is wanted, checked before any model is loaded. `opened` locks its save folder and finds out what is
missing, and `loop.Loop` makes that. Outputs appear whole, so what exists on disk is done.
"""

import contextlib
import glob
import os
import posixpath
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..dist_util import Peers
from ..errors import InputError, display_name, log, reading
from ..image_datasets import RESIZE_MODES, check_options, load_image
from ..options import Checked, option
from . import record
from .files import Folder, inside, remove_files, remove_temporaries
from .sources import Source, references

MOST_IMAGES = 1_000_000


@dataclass(frozen=True)
class RunOptions(Checked):
    """Where the results of a run go, and how it is made."""

    save_dir: str = option("output", "output folder", runtime=True, metavar="DIR")
    overwrite: bool = option(False, "discard another run in the output folder and start over", runtime=True)
    batch_size: int | str = option(4, "images per batch, or auto", least=1, runtime=True, metavar="N")
    seed: int = option(0, "seed of the noise; an image's noise depends on it and on the image's relative path")

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.batch_size, str) and self.batch_size != "auto":
            raise InputError("it must be a whole number above 0 or auto", parameter="batch_size", value=self.batch_size)


@dataclass(frozen=True)
class OutputOptions(RunOptions):
    """Options of a run that makes images."""

    save_trajectory: bool = option(False, "also save an animation of each image's denoising in trajectory/")
    trajectory: str = option("x0", "what the animation shows: the predicted x_0, or x_t", choices=("x0", "xt"))
    grid: int = option(24, "number of images in grid.png; 0 for no grid", least=0, most=10_000, runtime=True)

    def ignored(self) -> set[str]:
        """Fields that have no effect with these values; version 0.1 showed x_0 and recorded no choice."""
        return set() if self.save_trajectory and self.trajectory != "x0" else {"trajectory"}


@dataclass(frozen=True)
class JobOptions(OutputOptions):
    """Options of a run that translates references."""

    base_samples: str = option(
        None, "folder of reference images, searched recursively, or a single image", runtime=True, metavar="PATH"
    )
    num_samples: int | None = option(
        None, "maximum number of references to translate", least=1, most=MOST_IMAGES, runtime=True
    )
    samples_per_image: int = option(1, "number of translations of each reference", least=1, most=10_000)
    resize: str = option("crop", "how non-square images are made square", choices=RESIZE_MODES)
    background: str = option("white", "colour behind transparent pixels", metavar="COLOUR")
    white_level: int | None = option(
        None, "white level of 16-bit greyscale references, such as 4095 for 12 bits (default 65535)",
        least=1, most=2**31 - 1, metavar="N",
    )  # fmt: skip
    strict: bool = option(False, "stop at the first image that cannot be read", runtime=True)

    def ignored(self) -> set[str]:
        # Records of version 0.2 have no white_level.
        return super().ignored() | ({"white_level"} if self.white_level is None else set())

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self.resize, self.background)

    def source(self, peers: Peers, class_index: Any = None) -> Source:
        """The references."""
        reserved = ["grid.png"] if self.samples_per_image == 1 else []  # several have their folders
        entries, failed = references(self.base_samples, self.num_samples, peers, reserved)
        options = {"resize": self.resize, "background": self.background, "white_level": self.white_level}
        return Source(entries, failed, {}, self.base_samples, self.samples_per_image, self.strict, options)


class Job:
    """The outputs wanted of a source, and the `folder` that they go to.

    items: references by the keys of their outputs, such as "a/tom.jpg#0" for the first sample. Raises InputError for a
    folder that cannot be written, and an output that would replace a source or lie outside of the folder.
    """

    def __init__(self, options: RunOptions, peers: Peers, device: torch.device, source: Source) -> None:
        self.options, self.peers, self.device, self.source = options, peers, device, source
        if source.strict and source.failed:
            name, reason = next(iter(source.failed.items()))
            raise InputError(f"{display_name(name)}: {reason}")
        base, sources = source.base, {}
        if base is not None and os.path.isdir(base) and inside(options.save_dir, base):
            reason = "it lies in `base_samples`, and outputs would become references; move it"
            raise InputError(reason, parameter="save_dir", value=options.save_dir)
        self.folder = Folder(options.save_dir)
        if base is not None:  # with files that cannot be used: they must not be overwritten either
            sources = {base: os.path.basename(base), **{os.path.join(base, name): name for name in source.failed}}
            sources |= {reference.path: reference.name for reference in source.entries}
        self._sources = {os.path.realpath(path): name for path, name in sources.items()}
        self.items = {f"{each.name}#{k}": each for k in range(source.samples) for each in source.entries}
        outputs = [path for key in self.items for path in self.paths(key)]
        for folder in {os.path.dirname(path) for path in outputs}:
            if not inside(folder, options.save_dir):
                name = display_name(os.path.relpath(folder, options.save_dir))
                raise self.folder.refuse(f"its folder {name} is a link out of it; remove the link")
        self.refuse_sources(self.own_files() + outputs)

    def paths(self, key: str, samples: int | None = None) -> tuple[str, ...]:
        """Where a key's image and its trajectory are written; samples: of each reference, by default this job's."""
        name, _, sample = key.rpartition("#")
        folder = "" if (samples or self.source.samples) == 1 else f"sample_{sample}/"
        stem = f"{folder}{posixpath.splitext(name)[0]}"
        names = f"{stem}.png", f"trajectory/{stem}.gif"
        return tuple(os.path.join(self.options.save_dir, *each.split("/")) for each in names)

    def own_files(self) -> list[str]:
        """Files that a run writes besides the outputs, the record last."""
        return [os.path.join(self.options.save_dir, name) for name in ("grid.png", record.IMAGES, record.NAME)]

    def exists(self, key: str) -> bool:
        """Whether a key's image is there: a file, and no link to one."""
        path = self.paths(key)[0]
        return os.path.isfile(path) and not os.path.islink(path)

    def discard(self, keys: Iterable[str]) -> None:
        """Remove the outputs of keys."""
        remove_files(path for key in keys for path in self.paths(key))

    def made(self) -> int:
        """How many of the wanted outputs exist."""
        return sum(map(self.exists, self.items))

    def image(self, key: str, side: int) -> np.ndarray:
        """An output as uint8 [side, side, 3]; raises InputError, naming the file, where it is none of ours any more."""
        path = self.paths(key)[0]
        with reading(path):
            return load_image(path, side)

    def refuse_sources(self, paths: Iterable[str]) -> None:
        """Raise InputError where a file that the run writes or removes is one of its sources."""
        for path in paths if self._sources else ():
            if os.path.lexists(path) and (source := self._sources.get(os.path.realpath(path))) is not None:
                output = display_name(os.path.relpath(path, self.options.save_dir))
                reason = f"the output {output} would replace the reference {display_name(source)}"
                raise self.folder.refuse(f"{reason}; give another folder")


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


@contextlib.contextmanager
def opened(job: Job, image_size: int, settings: dict[str, Any]) -> Iterator[Plan]:
    """Context in which a job's folder is locked, with what is left to make there.

    settings: all that determines the outputs, for the record. Rank 0 checks the folder against run.json and writes it,
    the others wait. Raises InputError for a folder that is in use, or holds another run.
    """
    try:
        if job.peers.rank:
            plan = Plan(image_size, job.peers.wait_for("plan"))
            job.folder.watch()
        else:
            job.folder.lock()
            plan = _open(job, image_size, settings)
            job.peers.publish("plan", plan.batches)
        yield plan
    finally:
        job.folder.release()


def _open(job: Job, image_size: int, settings: dict[str, Any]) -> Plan:
    folder, batch_size = job.folder, job.options.batch_size
    if isinstance(batch_size, str):
        batch_size = 32 if job.device.type == "cuda" else 8  # the loop halves it while memory does not suffice
    if job.options.overwrite:
        _forget(job)
    old = record.read(folder.path)
    if old is not None:
        record.check_same(folder.path, old["settings"], settings)
    else:
        for path in [*(path for key in job.items for path in job.paths(key)[:1]), *job.own_files()]:
            if os.path.lexists(path):
                name = display_name(os.path.relpath(path, folder.path))
                reason = f"{name} is already present, and no {record.NAME} of a run that wrote it"
                raise folder.refuse(f"{reason}; give another folder, or `overwrite` True")
        old = {"plan": [], "batch_size": batch_size, "started": record.now(), "seconds": 0.0}
    remove_temporaries(folder.path)
    remove_files(glob.glob(os.path.join(glob.escape(folder.path), ".monitor-*.json")))  # of version 0.2
    present = _discard_changed(job, {key for key in job.items if job.exists(key)})
    missing = job.items.keys() - present
    record.gather(folder, keep=lambda entry: entry["key"] not in missing)
    batches = old["plan"]
    if old["batch_size"] != batch_size:
        batches = [kept for batch in batches if (kept := [key for key in batch if key not in missing])]
    # The batches of an earlier plan stay as they are; keys that are new to it are added.
    placed = {key for batch in batches for key in batch}
    rest = [key for key in job.items if key not in placed]
    batches = [*batches, *(rest[i : i + batch_size] for i in range(0, len(rest), batch_size))]
    content = {
        "format": record.FORMAT,
        "settings": settings,
        "versions": record.versions(),
        "base_samples": job.source.base or os.devnull,
        "device": str(job.device),
        "processes": job.peers.world_size,
        "started": old["started"],
        "seconds": old["seconds"],
        "finished": None,
        "batch_size": batch_size,
        "plan": batches,
    }
    record.write(folder, content)
    # References that are gone stay in the plan, so that it lists all that the run wrote, but are not wanted.
    wanted = [[key for key in batch if key in job.items] for batch in batches if not missing.isdisjoint(batch)]
    return Plan(image_size, wanted, len(present), content)


def _discard_changed(job: Job, present: set[str]) -> set[str]:
    """Remove the outputs whose sources have other content than they were made from; returns the keys of the others.

    Outputs without a recorded source, as version 0.2 left them, and those whose source cannot be read any more, stay.
    """
    recorded = {entry["key"]: entry["source"] for entry in record.entries(job.folder.path)}
    unique = {job.items[key].name: job.items[key] for key in present}
    with ThreadPoolExecutor(8) as pool:
        found = dict(zip(unique, pool.map(job.source.fingerprint, unique.values())))
    contents = {key: found[job.items[key].name] for key in present}
    known = {key for key, content in contents.items() if content is not None}
    changed = {key for key in known & recorded.keys() if recorded[key] != contents[key]}
    for words, keys in (("made again, because their sources have changed", changed),
                        ("kept, although their sources are not recorded", known - recorded.keys())):  # fmt: skip
        if keys:
            example = display_name(job.items[min(keys)].name)
            log.warning("outputs that are %s: %d, such as %s", words, len(keys), example)
    job.discard(changed)
    return present - changed


def _forget(job: Job) -> None:
    """Remove what an earlier run wrote, so that nothing of it is taken for this one's."""
    outputs = [path for key in job.items for path in job.paths(key)]
    with contextlib.suppress(InputError):
        if old := record.read(job.folder.path):
            samples = old["settings"].get("samples_per_image", 1)
            outputs += [path for batch in old["plan"] for key in batch for path in job.paths(key, samples)]
    job.refuse_sources(outputs)
    own = [path for path in outputs if inside(os.path.dirname(path), job.folder.path)]
    # The record goes last: a run that is killed in here is still known for what it is.
    remove_files([*own, *record.parts(job.folder.path), *job.own_files()])
