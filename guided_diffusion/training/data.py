"""Training images in a reproducible endless order.

Every random choice of a training run is a function of the seed and of a *sample number*: sample n is the n-th image
that the run has seen, over all processes. Batch size, microbatches, reading threads and processes only cut this one
sequence into pieces, and a run that resumes needs nothing but the number of its next sample.
"""

import collections
import functools
import hashlib
import itertools
import json
import math
import os
import posixpath
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..codec import grey
from ..errors import InputError, display_name, log, reading, shown
from ..image_datasets import ImageError, class_names, load_image, normalise
from ..references import IMAGE_SUFFIXES, Reference, archive_of, list_references, natural
from ..run.files import inside

CACHES = ("auto", "memory", "device", "none")
AUTO_CACHE_BYTES = 2 << 30  # cache="auto" keeps sets of at most this size as uint8
AHEAD = 4  # batches that are read in advance, without a cache
SPLITS = {"train", "training", "val", "valid", "validation", "test", "eval"}  # dubious names of classes

# SplitMix64: the step of its counter, then rounds of (right shift, factor) and a last shift.
_COUNTER, _ROUNDS, _LAST = 0x9E3779B97F4A7C15, ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)), 31


def random_bits(seed: object, purpose: str, numbers: Any) -> np.ndarray:
    """Uniform uint64 [N] for sample numbers [N]: a SplitMix64 sequence of the seed, an own one for every purpose."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    start = np.array([int.from_bytes(digest[:8], "little")], dtype=np.uint64)
    x = np.asarray(numbers).astype(np.uint64) * np.uint64(_COUNTER) + start
    for shift, factor in _ROUNDS:
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(_LAST))


def random_uniform(seed: object, purpose: str, numbers: Any) -> np.ndarray:
    """`random_bits` as float64 in [0, 1)."""
    return (random_bits(seed, purpose, numbers) >> np.uint64(11)) * 2.0**-53


def sample_noise(seed: object, numbers: Any, shape: Sequence[int], device: str | torch.device) -> torch.Tensor:
    """Standard normal noise [N, *shape], float32; row i depends on the seed, numbers[i] and the kind of device."""
    keys = random_bits(seed, "noise", numbers)
    if torch.device(device).type == "cuda":
        return counter_noise(keys, shape, device)
    noise = torch.empty(len(keys), *shape, device=device)
    generator = torch.Generator(device)
    for row, key in zip(noise, keys):
        row.normal_(generator=generator.manual_seed(int(key)))
    return noise


def counter_noise(keys: np.ndarray, shape: Sequence[int], device: str | torch.device) -> torch.Tensor:
    """Standard normal noise [N, *shape], float32, of uint64 keys [N]: SplitMix64 bits, made normal by Box and Muller.

    All rows at once: a generator for every row would take hundreds of launches, more than a step of a small model.
    """
    pairs = (math.prod(shape) + 1) // 2
    counters = torch.arange(1, pairs + 1, device=device) * _signed(_COUNTER)
    x = torch.from_numpy(keys.view(np.int64)).to(device, non_blocking=True)[:, None] + counters
    for shift, factor in _ROUNDS:
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * _signed(factor)  # the mask makes the shift a logical one
    x = x ^ (x >> _LAST & (1 << 64 - _LAST) - 1)
    radius = (((x >> 32 & 0xFFFFFFFF) + 1).float() * 2.0**-32).log().mul(-2).sqrt()
    angle = (x & 0xFFFFFFFF).float() * (2 * math.pi * 2.0**-32)
    noise = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
    return noise[:, : math.prod(shape)].reshape(len(keys), *shape)


def _signed(bits: int) -> int:
    """64 bits as the signed integer that PyTorch takes them for."""
    return bits - (1 << 64) if bits >> 63 else bits


def batch_numbers(start: int, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[np.ndarray]:
    """Endless iterator over the sample numbers [batch_size] of this rank's batches, the first joint one at `start`."""
    while True:
        first = start + rank * batch_size
        yield np.arange(first, first + batch_size)
        start += world_size * batch_size


@dataclass(frozen=True)
class TrainReference(Reference):
    """An image of a data set; label: its class by dataset.json, "" for none; None without that file."""

    label: str | None = None


Labels = tuple[np.ndarray, list[str]]
"""Labels [N] of images, and the names of their classes."""
Label = Callable[[Sequence[str] | None], Labels]
"""Function that labels the training images; names: those that number the classes, if given."""


def list_images(folder: str | None, parameter: str = "data_dir") -> list[TrainReference]:
    """List the images of a folder or .zip file, with the labels of its dataset.json (StyleGAN's and EDM's) if any.

    Raises InputError for the parameter.
    """
    if not folder:
        raise InputError("give the folder of training images", parameter=parameter, value=folder)
    where, stated, labels = f"{folder}/dataset.json", None, None
    if archive_of(where) == os.fspath(folder):
        with reading(folder, "a .zip data set"), zipfile.ZipFile(folder) as archive:
            names = sorted(archive.namelist())
            stated = archive.read("dataset.json") if "dataset.json" in names else None
        found = [Reference(f"{folder}/{name}", name) for name in names if name.lower().endswith(IMAGE_SUFFIXES)]
        if not found:
            raise InputError("there is no image in this file", parameter=parameter, value=folder)
    else:
        found = list_references(folder, parameter=parameter)
        if os.path.isfile(where):
            with reading(where):
                stated = Path(where).read_bytes()
    if stated is not None:
        with reading(where, 'a data set\'s labels: {"labels": [[name, class], …]}'):
            labels = {name: str(int(label)) for name, label in json.loads(stated)["labels"] or ()}
    stated_label = (lambda name: None) if labels is None else (lambda name: labels.get(name, ""))
    return [TrainReference(each.path, each.name, stated_label(each.name)) for each in found]


def class_labels(references: Sequence[TrainReference], names: Sequence[str] | None = None) -> Labels:
    """Labels of images and the names of their classes, in natural order unless given.

    The class of an image is that of dataset.json, where the set has one, else that of `image_datasets.class_names`.
    Raises InputError for an image of no or of an unknown class, and where most images would be classes of their own.
    """
    classes, where = [reference.label for reference in references], "its entry in dataset.json"
    if all(label is None for label in classes):
        classes = class_names(references)
        where = "the first folder of its path or, where not all images lie in folders, its name before an underscore"
    fix = f"the class of an image is {where}; put the images of each class into a folder"
    for reference, name in zip(references, classes):
        if not name or (names is None and name == posixpath.basename(reference.name)):
            raise InputError(f"{display_name(reference.path)} has no class: {fix}")
        if names is not None and name not in names:
            reason = f"its class {shown(name)} is not among the training data's {len(names)}: {listed(names)}"
            raise InputError(f"{display_name(reference.path)}: {reason}")
    if names is None:
        counts = collections.Counter(classes)
        alone = [name for name, count in counts.items() if count == 1]
        if len(counts) > 1 and len(alone) > len(references) / 2:
            number = f"{len(alone)} of its {len(references)} images"
            raise InputError(f"{number} would be classes of their own, like {shown(alone[0])}: {fix}")
        names = sorted(filter(None, counts), key=natural)
        if splits := [name for name in names if name.lower() in SPLITS]:
            log.warning("%s taken for classes; for one part of the set, give its own folder", listed(splits))
    index = {name: i for i, name in enumerate(names)}
    return np.array([index[str(name)] for name in classes]), list(names)


def listed(names: Sequence[str], longest: int = 8) -> str:
    """Names for a message; of many, the first ones and their number."""
    more = f", … ({len(names)} in all)" if len(names) > longest else ""
    return ", ".join(map(display_name, names[:longest])) + more


def folders_in(text: str | None) -> list[str]:
    """The folders in a comma-separated list."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def labelled_images(
    data_dir: str | None, domains: str | None, classes: Sequence[str] | None = None, prefix: str = ""
) -> tuple[list[TrainReference], Label]:
    """Images for a classifier, of a data set or of comma-separated folders, the domains; and the labels' function.

    Two domains are called source and target, more by their folders; the last is the target. classes: those of the
    training data, for held-out data, whose folders stand in the same order. prefix: of the parameters' names. Raises
    InputError for the parameter.
    """
    if bool(data_dir) == bool(domains):
        reason = "give one of it and `domains`: a folder per class below it, or a folder per domain"
        raise InputError(reason, parameter="data_dir", value=data_dir or None)
    if not domains:
        references = list_images(data_dir, f"{prefix}data_dir")
        return references, functools.partial(class_labels, references)
    folders, reason = folders_in(domains), ""
    if len(folders) < 2:
        reason = "it is two folders or more, the target last, like cats,dogs"
    elif classes is not None and len(classes) != len(folders):
        reason = f"it must be {len(classes)} folders, as in `domains`"
    for folder, other in itertools.permutations(folders, 2):
        if inside(folder, other):
            reason = f"images of {display_name(folder)} would belong to both it and {display_name(other)}"
    if reason:
        raise InputError(reason, parameter=f"{prefix}domains", value=domains)
    default = ["source", "target"] if len(folders) == 2 else folder_names([os.path.realpath(f) for f in folders])
    names = list(classes or default)
    found = [(i, image) for i, folder in enumerate(folders) for image in list_images(folder, f"{prefix}domains")]
    references = [TrainReference(image.path, f"{names[i]}/{image.name}") for i, image in found]
    labels = np.array([i for i, _ in found])

    def label(known: Sequence[str] | None) -> Labels:
        if known is not None and list(known) != names:
            reason = f"the checkpoint has the domains {listed(known)}, in this order"
            raise InputError(reason, parameter="domains", value=domains)
        return labels, names

    return references, label


def folder_names(folders: Sequence[str]) -> list[str]:
    """Short names that tell folders apart: the last part of their paths in which all differ, else several parts."""
    paths = [folder.strip("/").split("/")[::-1] for folder in folders]
    tails = (["-".join(path[length::-1]) for path in paths] for length in range(1, max(map(len, paths))))
    return list(next(names for names in itertools.chain(zip(*paths), tails) if len(set(names)) == len(names)))


def refuse_own_outputs(save_dir: str, folders: str | None, references: Sequence[TrainReference]) -> None:
    """Raise InputError where a run would train on files that it writes itself; folders: comma-separated."""
    around = [f for f in (folders or "", *folders_in(folders)) if os.path.isdir(f) and inside(save_dir, f)]
    # Links may lead to sample grids as well. There are few folders, and many images.
    places = {os.path.dirname(reference.path) for reference in references}
    around += [place for place in places if inside(place, os.path.join(save_dir, "samples"))]
    if around:
        reason = f"the run's files would be training images, as those in {display_name(around[0])} are"
        raise InputError(f"{reason}; give a folder outside of it", parameter="save_dir", value=save_dir)


@functools.lru_cache(maxsize=4)
def permutation(seed: object, epoch: int, length: int) -> np.ndarray:
    """The order of an epoch, [length]."""
    return np.argsort(random_bits(seed, f"order/{epoch}", np.arange(length)), kind="stable")


Batch = tuple[np.ndarray, torch.Tensor, torch.Tensor | None]
"""Numbers [N], images [N, C, H, W] in [-1, 1], labels [N] or None."""


class TrainImages:
    """Images of one size, with labels or without, read from files or from a decoded copy in memory.

    references: as `list_images` gives them. labels: integers [len(references)] or None. random_flip: mirror half of the
    samples. cache: "memory" and "device" keep all images as uint8, on the CPU or on the device; "none" reads them in
    `num_workers` threads; "auto" keeps sets of up to 2 GiB on the device. skip_damaged: replace an image that cannot be
    read by the next one of its class, and note why in `damaged`. channels: 3, or 1 for grey images.
    """

    REPAIR = "repair it or give `skip_damaged`"

    def __init__(
        self, references: Sequence[TrainReference], image_size: int, *, labels: Any = None, random_flip: bool = False,
        seed: int = 0, cache: str = "auto", num_workers: int = 2, resize: str = "crop", background: str = "white",
        skip_damaged: bool = False, channels: int = 3,
    ) -> None:  # fmt: skip
        self.references, self.image_size, self.channels, self.seed = references, image_size, channels, seed
        self.labels = None if labels is None else torch.as_tensor(labels, dtype=torch.long)
        self.random_flip, self.num_workers, self.skip_damaged = random_flip, num_workers, skip_damaged
        self.damaged: dict[int, str] = {}
        self._options: dict[str, Any] = {"resize": resize, "background": background}
        fits = len(references) * channels * image_size**2 <= AUTO_CACHE_BYTES
        self.cache = ("device" if fits else "none") if cache == "auto" else cache
        self._cached: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.references)

    def digest(self) -> str:
        """Short hash of the relative paths and labels: whether a resumed run sees the same set."""
        labels = [] if self.labels is None else self.labels.tolist()
        text = "\n".join(reference.name for reference in self.references) + f"\n{labels}"
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]

    @functools.cached_property
    def bytes(self) -> int:
        """Bytes of up to 10,000 of the files: whether their content is likely to be the same."""
        some = self.references[:: -(-len(self) // 10_000)]
        paths = {archive_of(reference.path) or reference.path for reference in some}
        return sum(os.path.getsize(path) for path in paths if os.path.isfile(path))

    def indices(self, numbers: Any) -> np.ndarray:
        """Index of the image of each sample number, [N]: every epoch is a permutation of its own."""
        epochs, positions = np.divmod(numbers, len(self))
        return np.array([permutation(self.seed, int(epoch), len(self))[at] for epoch, at in zip(epochs, positions)])

    def batches(self, numbers: Iterator[np.ndarray], device: str | torch.device) -> Iterator[Batch]:
        """Batches for an iterator over arrays of sample numbers: (numbers [N], images, labels)."""
        for current, raw in self._raw_batches(numbers, device):
            labels = None if self.labels is None else self.labels[self.indices(current)].to(device, non_blocking=True)
            images = raw.to(device, non_blocking=True)
            if self.random_flip:
                flip = torch.from_numpy(random_uniform(self.seed, "flip", current) < 0.5)
                flip = flip.to(images.device, non_blocking=True)[:, None, None, None]
                images = torch.where(flip, images.flip(-1), images)
            yield current, normalise(images), labels

    def ordered_batches(
        self, batch_size: int, device: str | torch.device, rank: int = 0, world_size: int = 1
    ) -> Iterator[Batch]:
        """One pass in order, unaugmented, shared among ranks: (positions [N], images, labels)."""
        mine = np.arange(len(self))[rank::world_size]
        for at in range(0, len(mine), batch_size):
            part = mine[at : at + batch_size]
            raw = torch.stack([self.read(i) for i in part]).to(device)
            labels = None if self.labels is None else self.labels[part].to(device)
            yield part, normalise(raw), labels

    def _raw_batches(
        self, numbers: Iterator[np.ndarray], device: str | torch.device
    ) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        """Arrays of sample numbers with their images, uint8 [N, C, S, S]."""
        if self.cache != "none":
            images = self._decoded(device if self.cache == "device" else "cpu")
            for current in numbers:
                yield current, images[torch.from_numpy(self.indices(current)).to(images.device, non_blocking=True)]
            return
        pool = ThreadPoolExecutor(max(1, self.num_workers))
        jobs = ((current, pool.map(self.read, self.indices(current))) for current in numbers)
        ahead = collections.deque(itertools.islice(jobs, AHEAD))
        try:
            while ahead:
                current, read = ahead.popleft()
                ahead.extend(itertools.islice(jobs, 1))
                raw = torch.stack(list(read))
                yield current, raw.pin_memory() if torch.device(device).type == "cuda" else raw
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _decoded(self, device: str | torch.device) -> torch.Tensor:
        """All images as uint8 [len, C, S, S]."""
        if self._cached is None:
            images = torch.empty(len(self), self.channels, self.image_size, self.image_size, dtype=torch.uint8)
            with ThreadPoolExecutor(max_workers=8) as pool:
                for i, image in enumerate(pool.map(self.read, range(len(self)))):
                    images[i] = image
            self._cached = images.to(device)
        return self._cached

    def read(self, index: int) -> torch.Tensor:
        """Decode image `index` from its file, uint8 [C, S, S]. Raises InputError, naming the file."""
        for at in self._from(int(index)):
            path = display_name(self.references[at].path)
            try:
                array = load_image(self.references[at], self.image_size, **self._options)
            except ImageError as error:
                reason = f"{path}: {error.reason}"
                if not self.skip_damaged:
                    raise InputError(f"{reason}; {self.REPAIR}") from error
                if self.damaged.setdefault(at, reason) is reason:
                    log.warning("skipped %s", reason)
            else:
                pixels = torch.from_numpy(array).permute(2, 0, 1)
                return pixels if self.channels == 3 else grey(pixels)
        raise InputError(f"no image of {display_name(self.references[index].path)}'s class can be read")

    def _from(self, index: int) -> Iterator[int]:
        """`index` and, from there on and round, the others of its class."""
        yield index
        same = np.arange(len(self)) if self.labels is None else np.flatnonzero(self.labels == self.labels[index])
        yield from np.roll(same, -int(np.searchsorted(same, index)))[1:].tolist()
