"""Training images in a reproducible endless order.

Every random choice of a training run is a function of the seed and of a *sample number*: sample n is the n-th image
that the run has seen, over all processes. Batch size, microbatches, loader workers and processes only cut this one
sequence into pieces, and a run that resumes needs nothing but the number of its next sample.
"""

import functools
import hashlib
import itertools
import math
import os
import posixpath
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from ..errors import InputError, display_name, shown
from ..image_datasets import ImageError, Reference, list_references, load_image, normalise
from ..options import fitting

CACHES = ("auto", "memory", "device", "none")
AUTO_CACHE_BYTES = 2 << 30
"""Sets that need no more than this as uint8 are kept decoded with cache="auto"."""


# ---- numbers instead of a generator's state -------------------------------------------------------------------------

# SplitMix64: the step of its counter, then rounds of (right shift, factor) and a last shift.
_COUNTER, _ROUNDS, _LAST = 0x9E3779B97F4A7C15, ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)), 31


def random_bits(seed: object, purpose: str, numbers: Any) -> np.ndarray:
    """Uniform 64-bit integers, uint64, one for every sample number: a SplitMix64 sequence of (seed, purpose).

    seed: integer; purpose: text, different purposes are independent; numbers: array of integers.
    """
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
    """Standard normal noise [N, *shape], float32; row i depends on the seed and numbers[i] alone.

    The draws of a GPU are others than those of a CPU.
    """
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


# ---- labels ---------------------------------------------------------------------------------------------------------


def class_labels(references: Sequence[Reference], names: Sequence[str] | None = None) -> tuple[np.ndarray, list[str]]:
    """Classes of a labelled folder: (labels [len(references)], names of the classes, sorted unless given).

    The class is the first folder of an image's relative path where all images lie in folders, otherwise the part of
    the file name before the first underscore (guided-diffusion's convention). Raises InputError for an image whose
    class is not among given names; and, where no names are given, for a file name without a class and for classes of
    which most have one image only: those are numbers, and no classes.
    """
    in_folders = all("/" in reference.name for reference in references)
    if in_folders:
        classes = [reference.name.split("/")[0] for reference in references]
    else:
        files = [posixpath.basename(reference.name) for reference in references]
        if names is None:
            _refuse_names_without_class(references, files)
        classes = [name.split("_")[0] for name in files]
    if names is None:
        counts = Counter(classes)
        alone = [name for name, count in counts.items() if count == 1]
        if len(counts) > 1 and len(alone) > len(references) / 2:
            where = "folders" if in_folders else "parts of the file names before the first underscore"
            raise InputError(
                f"{len(alone)} of its {len(references)} images would be classes of their own, by their {where}, like "
                f"{shown(alone[0])}; put the images of each class into a folder"
            )
        names = sorted(counts)
    index = {name: i for i, name in enumerate(names)}
    for reference, name in zip(references, classes):
        if name not in index:
            raise InputError(
                f"{display_name(reference.path)}: its class {shown(name)} is not among the training data's "
                f"{len(names)}: {listed(names)}"
            )
    return np.array([index[name] for name in classes]), list(names)


def _refuse_names_without_class(references: Sequence[Reference], files: Sequence[str]) -> None:
    for reference, name in zip(references, files):
        if "_" not in name:
            raise InputError(
                f"{display_name(reference.path)} belongs to no class: not all images lie in folders, and its name "
                "has no underscore after a class; put the images of each class into a folder"
            )


def listed(names: Sequence[str], longest: int = 8) -> str:
    """Names for a message, not all of them where there are many."""
    return ", ".join(display_name(name) for name in names[:longest]) + (
        f", … ({len(names)} in all)" if len(names) > longest else ""
    )


def list_domains(
    folders: str, parameter: str = "domains", classes: Sequence[str] | None = None
) -> tuple[list[Reference], np.ndarray, list[str]]:
    """Images of several domains: (references, labels, names of the domains) of comma-separated folders.

    The last folder is the target. Two domains are called source and target, more by their folders. classes: the
    names that the training data have, for held-out data, whose folders stand in the same order. Raises InputError for
    the parameter.
    """
    parts = [part.strip() for part in folders.split(",") if part.strip()]
    wrong: dict[str, Any] = {"parameter": parameter, "value": folders}
    if len(parts) < 2:
        raise InputError("it is two folders or more, the target last, like cats,dogs", **wrong)
    if classes is not None and len(classes) != len(parts):
        raise InputError(f"it must be {len(classes)} folders, as in `domains`", **wrong)
    places = [os.path.realpath(part) for part in parts]
    for i, place in enumerate(places):
        for j, other in enumerate(places):
            if i != j and is_inside(place, other):
                same = "the same folder" if place == other else f"inside {display_name(parts[j])}"
                raise InputError(f"{display_name(parts[i])} is {same}: its images would belong to both", **wrong)
    names = list(classes) if classes is not None else ["source", "target"] if len(parts) == 2 else folder_names(places)
    found = [list_images(part, parameter) for part in parts]
    references = [
        Reference(image.path, f"{name}/{image.name}") for name, images in zip(names, found) for image in images
    ]
    return references, np.repeat(np.arange(len(parts)), [len(images) for images in found]), names


def labelled_images(
    data_dir: str | None, domains: str | None
) -> tuple[list[Reference], Callable[[Sequence[str] | None], tuple[np.ndarray, list[str]]]]:
    """Images for a classifier, of a folder or of several domains, and the function that labels them.

    The function takes the names that number the classes, or None for those of the data, and gives the labels and the
    names. Raises InputError unless there are two classes.
    """
    if not data_dir and not domains:
        raise InputError("give a folder per class below it, or `domains`", parameter="data_dir")
    if data_dir and domains:
        raise InputError("it excludes `domains`; give one of them", parameter="data_dir", value=data_dir)
    if domains:
        references, labels, names = list_domains(domains)

        def label_domains(known: Sequence[str] | None) -> tuple[np.ndarray, list[str]]:
            if known is not None and list(known) != names:
                raise InputError(
                    f"the checkpoint has the domains {listed(known)}, in this order", parameter="domains", value=domains
                )
            return labels, names

        return references, label_domains
    references = list_images(data_dir)
    found = class_labels(references)
    if len(found[1]) < 2:
        raise InputError(
            f"it has one class only, {shown(found[1][0])}; it needs a folder per class",
            parameter="data_dir",
            value=data_dir,
        )
    return references, lambda known: found if known is None else class_labels(references, known)


def held_out_images(
    data_dir: str | None, domains: str | None, trained_on: str | None, classes: Sequence[str] | None
) -> tuple[list[Reference], np.ndarray] | None:
    """Held-out images and their labels, None where none are named; trained_on: the domains of the training images."""
    wrong, value, right = ("val_data_dir", data_dir, "domains") if trained_on else ("val_domains", domains, "data_dir")
    if value:
        raise InputError(f"it does not go with `{right}`", parameter=wrong, value=value)
    if domains:
        references, labels, _ = list_domains(domains, "val_domains", classes)
        return references, labels
    if data_dir:
        references = list_images(data_dir, "val_data_dir")
        return references, class_labels(references, classes)[0]
    return None


def folder_names(folders: Sequence[str]) -> list[str]:
    """Short names that tell folders apart: the last part of their paths in which all differ, or as many as it takes."""
    paths = [folder.strip("/").split("/") for folder in folders]
    depth = min(len(path) for path in paths)
    for place in range(1, depth + 1):
        column = [path[-place] for path in paths]
        if len(set(column)) == len(paths):
            return column
    for length in range(2, max(len(path) for path in paths) + 1):
        tails = ["-".join(path[-length:]) for path in paths]
        if len(set(tails)) == len(paths):
            return tails
    return [f"{i}-{path[-1]}" for i, path in enumerate(paths)]


def list_images(folder: str | None, parameter: str = "data_dir") -> list[Reference]:
    """`image_datasets.list_references`, whose errors name the parameter."""
    if not folder:
        raise InputError("give the folder of training images", parameter=parameter, value=folder)
    try:
        return list_references(folder)
    except InputError as error:
        reason = error.reason if error.parameter else error.reason.rpartition(": ")[2]
        raise InputError(reason, parameter=parameter, value=folder) from error


def is_inside(path: str, folder: str) -> bool:
    """Whether a path is a folder or lies in it; links are followed."""
    path, folder = os.path.realpath(path), os.path.realpath(folder)
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def refuse_own_outputs(save_dir: str, folder: str, references: Sequence[Reference]) -> None:
    """Raise InputError where a run would train on the sample grids that it writes itself."""
    wrong: dict[str, Any] = {"parameter": "save_dir", "value": save_dir}
    if os.path.isdir(folder) and is_inside(save_dir, folder):
        raise InputError(
            "it lies in `data_dir`, so that the run's sample grids would become training images; "
            "give a folder outside of it", **wrong,
        )  # fmt: skip
    samples = os.path.join(save_dir, "samples")
    # Links may lead there as well. There are few folders, and many images.
    for place in {os.path.dirname(reference.path) for reference in references}:
        if is_inside(place, samples):
            raise InputError(f"its sample grids are among the training images, in {display_name(place)}", **wrong)


# ---- the set --------------------------------------------------------------------------------------------------------


class TrainImages:
    """Images of one size, with labels or without, read from files or from a decoded copy in memory.

    references: what `list_images` gives. labels: integers [len(references)] or None. random_flip: half of the samples
    are mirrored. random_crop: images are read 5/4 as large and a random window is cut out. cache: "memory" and "device"
    keep all images decoded as uint8, on the CPU or on the device; "none" decodes in `num_workers` loader processes;
    "auto" keeps sets of up to 2 GiB on the device. background, resize: see `image_datasets.load_image`.
    """

    def __init__(
        self,
        references: Sequence[Reference],
        image_size: int,
        *,
        labels: Any = None,
        random_flip: bool = False,
        random_crop: bool = False,
        seed: int = 0,
        cache: str = "auto",
        num_workers: int = 2,
        resize: str = "crop",
        background: str = "white",
    ) -> None:
        if cache not in CACHES:
            raise InputError(fitting(cache, list(CACHES)), parameter="cache", value=cache)
        if num_workers < 0:
            raise InputError("it must be at least 0", parameter="num_workers", value=num_workers)
        self.references = references
        self.labels = None if labels is None else torch.as_tensor(labels, dtype=torch.long)
        self.image_size = image_size
        self.stored_size = image_size * 5 // 4 if random_crop else image_size
        self.random_flip = random_flip
        self.seed = seed
        self.num_workers = num_workers
        self._load = functools.partial(load_image, image_size=self.stored_size, resize=resize, background=background)
        if cache == "auto":
            cache = "device" if len(references) * 3 * self.stored_size**2 <= AUTO_CACHE_BYTES else "none"
        self.cache = cache
        self._cached: torch.Tensor | None = None
        self._permutations: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.references)

    def digest(self) -> str:
        """A short hash of the relative paths and labels: whether a resumed run sees the same set."""
        labels = [] if self.labels is None else self.labels.tolist()
        text = "\n".join(reference.name for reference in self.references) + f"\n{labels}"
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]

    def indices(self, numbers: Any) -> np.ndarray:
        """Which image each sample number stands for, [N]: every epoch is a permutation of its own."""
        epochs, positions = np.divmod(numbers, len(self))
        return np.array([self._permutation(int(epoch))[at] for epoch, at in zip(epochs, positions)])

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            while len(self._permutations) > 1:
                del self._permutations[min(self._permutations)]
            bits = random_bits(self.seed, f"order/{epoch}", np.arange(len(self)))
            self._permutations[epoch] = np.argsort(bits, kind="stable")
        return self._permutations[epoch]

    def batches(
        self, numbers: Iterator[np.ndarray], device: str | torch.device
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Batches for an iterator over arrays of sample numbers: images [N, 3, H, W] in [-1, 1], labels [N] or None."""
        numbers, ahead = itertools.tee(numbers)  # a loader fetches numbers ahead of its batches
        for raw, current in zip(self._raw_batches(ahead, device), numbers):
            if isinstance(raw, str):
                raise InputError(raw)
            yield self._augment(raw.to(device, non_blocking=True), current), self._labels(current, device)

    def ordered_batches(
        self, batch_size: int, device: str | torch.device, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[np.ndarray, torch.Tensor, torch.Tensor | None]]:
        """One pass in order, unaugmented, shared among ranks: yields (positions [N], images, labels)."""
        mine = np.arange(len(self))[rank::world_size]
        for at in range(0, len(mine), batch_size):
            part = mine[at : at + batch_size]
            raw = torch.stack([self.read(i) for i in part]).to(device)
            labels = None if self.labels is None else self.labels[part].to(device)
            yield part, self._normalise(self._crop(raw, None)), labels

    def _labels(self, numbers, device):
        return None if self.labels is None else self.labels[self.indices(numbers)].to(device, non_blocking=True)

    def _raw_batches(self, numbers, device):
        """uint8 [N, 3, S, S] for arrays of sample numbers, S the stored size."""
        if self.cache != "none":
            images = self._decoded(device if self.cache == "device" else "cpu")
            chosen = (torch.from_numpy(self.indices(current)) for current in numbers)
            return (images[indices.to(images.device, non_blocking=True)] for indices in chosen)
        workers: dict[str, Any] = {}
        if self.num_workers:
            workers = {"num_workers": self.num_workers, "prefetch_factor": 4, "worker_init_fn": _ignore_interrupts}
        return iter(
            torch.utils.data.DataLoader(
                _Samples(self),  # type: ignore[arg-type]
                sampler=numbers,
                batch_size=None,
                pin_memory=torch.device(device).type == "cuda",
                **workers,
            )
        )

    def _decoded(self, device):
        """All images as uint8 [len, 3, S, S]."""
        if self._cached is None:
            images = torch.empty(len(self), 3, self.stored_size, self.stored_size, dtype=torch.uint8)
            with ThreadPoolExecutor(max_workers=8) as pool:
                for i, image in enumerate(pool.map(self.read, range(len(self)))):
                    images[i] = image
            self._cached = images.to(device)
        return self._cached

    def read(self, index: int) -> torch.Tensor:
        """Image `index` decoded from its file, uint8 [3, S, S]. Raises InputError, naming the file."""
        reference = self.references[index]
        try:
            return torch.from_numpy(self._load(reference)).permute(2, 0, 1)
        except ImageError as error:
            raise InputError(
                f"{display_name(reference.path)}: {error.reason}; repair it or take it out of the folder"
            ) from error

    def _augment(self, raw, numbers):
        images = self._crop(raw, numbers)
        if self.random_flip:
            flip = torch.from_numpy(random_uniform(self.seed, "flip", numbers) < 0.5).to(raw.device, non_blocking=True)
            images = torch.where(flip[:, None, None, None], images.flip(-1), images)
        return self._normalise(images)

    def _crop(self, raw, numbers):
        """Windows of the image size: random ones, or those in the centre where numbers is None."""
        slack = self.stored_size - self.image_size
        if not slack:
            return raw
        if numbers is None:
            tops = lefts = np.full(len(raw), slack // 2)
        else:
            tops = (random_uniform(self.seed, "top", numbers) * (slack + 1)).astype(int)
            lefts = (random_uniform(self.seed, "left", numbers) * (slack + 1)).astype(int)
        size = self.image_size
        return torch.stack([image[:, y : y + size, x : x + size] for image, y, x in zip(raw, tops, lefts)])

    @staticmethod
    def _normalise(images):
        return normalise(images)


class _Samples:
    """What a loader process runs: an array of sample numbers in, their undistorted images out.

    Where an image cannot be read, the reason comes out instead: raised here, it would arrive with two tracebacks in it.
    """

    def __init__(self, images: TrainImages) -> None:
        self.images = images

    def __getitem__(self, numbers: np.ndarray) -> torch.Tensor | str:
        try:
            return torch.stack([self.images.read(i) for i in self.images.indices(numbers)])
        except InputError as error:
            return str(error)


def _ignore_interrupts(worker: int) -> None:
    # Ctrl-C reaches the whole process group; the loop wants to finish its step, for which the loader must live on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
