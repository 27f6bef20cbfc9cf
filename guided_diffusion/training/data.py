"""Training images in a reproducible endless order.

Every random choice of a training run is a function of the seed and of a *sample number*: sample n is the n-th image
that the run has seen, over all processes. Batch size, microbatches, loader workers and processes only cut this one
sequence into pieces, and a run that goes on from a checkpoint needs nothing but the number of its next sample.
"""

import functools
import hashlib
import itertools
import posixpath
import signal
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from ..errors import UserError
from ..image_datasets import ImageError, display_name, list_references, load_image

CACHES = ("auto", "memory", "device", "none")
AUTO_CACHE_BYTES = 2 << 30
"""Sets that need no more than this as uint8 are kept decoded with cache="auto"."""


# ---- numbers instead of a generator's state -------------------------------------------------------------------------


def random_bits(seed, purpose, numbers):
    """Uniform 64-bit integers, uint64, one for every sample number: a SplitMix64 sequence of (seed, purpose).

    seed: integer; purpose: text, different purposes are independent; numbers: array of integers.
    """
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    start = np.array([int.from_bytes(digest[:8], "little")], dtype=np.uint64)
    x = np.asarray(numbers).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + start
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def random_uniform(seed, purpose, numbers):
    """`random_bits` as float64 in [0, 1)."""
    return (random_bits(seed, purpose, numbers) >> np.uint64(11)) * 2.0**-53


def sample_noise(seed, numbers, shape, device):
    """Standard normal noise [N, *shape], float32; row i depends on the seed and numbers[i] alone."""
    noise = torch.empty(len(numbers), *shape, device=device)
    generator = torch.Generator(device)
    for row, key in zip(noise, random_bits(seed, "noise", numbers)):
        row.normal_(generator=generator.manual_seed(int(key)))
    return noise


def batch_numbers(start, batch_size, rank=0, world_size=1):
    """Endless iterator over the sample numbers [batch_size] of this rank's batches, the first joint one at `start`."""
    while True:
        first = start + rank * batch_size
        yield np.arange(first, first + batch_size)
        start += world_size * batch_size


# ---- labels ---------------------------------------------------------------------------------------------------------


def class_labels(references, names=None):
    """Classes of a labelled folder: (labels [len(references)], names of the classes, sorted unless given).

    The class is the first folder of an image's relative path where all images lie in folders, otherwise the part of
    the file name before the first underscore (guided-diffusion's convention). Raises UserError for an image whose
    class is not among given names.
    """
    if all("/" in reference.name for reference in references):
        classes = [reference.name.split("/")[0] for reference in references]
    else:
        classes = [posixpath.basename(reference.name).split("_")[0] for reference in references]
    names = sorted(set(classes)) if names is None else names
    index = {name: i for i, name in enumerate(names)}
    for reference, name in zip(references, classes):
        if name not in index:
            raise UserError(
                f"{display_name(reference.path)}: its class {name!r} is not among the training data's {len(names)}: "
                f"{', '.join(names[:8])}{' …' * (len(names) > 8)}"
            )
    return np.array([index[name] for name in classes]), names


def list_images(folder, flag="--data_dir"):
    """`image_datasets.list_references` whose errors name `flag`."""
    try:
        return list_references(folder)
    except UserError as error:
        raise UserError(str(error).replace("--base_samples", flag, 1)) from error


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
        references,
        image_size,
        *,
        labels=None,
        random_flip=False,
        random_crop=False,
        seed=0,
        cache="auto",
        num_workers=2,
        resize="crop",
        background="white",
    ):
        if cache not in CACHES:
            raise UserError(f"--cache is {cache!r}; it can be {', '.join(CACHES)}")
        if num_workers < 0:
            raise UserError(f"--num_workers is {num_workers}; it must be 0 or more")
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
        self._cached = None
        self._permutations = {}

    def __len__(self):
        return len(self.references)

    def digest(self):
        """A short hash of the relative paths and labels: whether a resumed run sees the same set."""
        labels = [] if self.labels is None else self.labels.tolist()
        text = "\n".join(reference.name for reference in self.references) + f"\n{labels}"
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]

    def indices(self, numbers):
        """Which image each sample number stands for, [N]: every epoch is a permutation of its own."""
        epochs, positions = np.divmod(numbers, len(self))
        return np.array([self._permutation(int(epoch))[at] for epoch, at in zip(epochs, positions)])

    def _permutation(self, epoch):
        if epoch not in self._permutations:
            while len(self._permutations) > 1:
                del self._permutations[min(self._permutations)]
            bits = random_bits(self.seed, f"order/{epoch}", np.arange(len(self)))
            self._permutations[epoch] = np.argsort(bits, kind="stable")
        return self._permutations[epoch]

    def batches(self, numbers, device):
        """Batches for an iterator over arrays of sample numbers: images [N, 3, H, W] in [-1, 1], labels [N] or None."""
        numbers, ahead = itertools.tee(numbers)  # a loader fetches numbers ahead of its batches
        for raw, current in zip(self._raw_batches(ahead, device), numbers):
            yield self._augment(raw.to(device, non_blocking=True), current), self._labels(current, device)

    def ordered_batches(self, batch_size, device, rank=0, world_size=1):
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
            return (images[torch.from_numpy(self.indices(current)).to(images.device)] for current in numbers)
        workers = {}
        if self.num_workers:
            workers = dict(num_workers=self.num_workers, prefetch_factor=4, worker_init_fn=_ignore_interrupts)
        return iter(
            torch.utils.data.DataLoader(
                _Samples(self),
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

    def read(self, index):
        """Image `index` decoded from its file, uint8 [3, S, S]. Raises UserError, naming the file."""
        reference = self.references[index]
        try:
            return torch.from_numpy(self._load(reference)).permute(2, 0, 1)
        except ImageError as error:
            raise UserError(
                f"{display_name(reference.path)}: {error}; repair it or take it out of the folder"
            ) from error

    def _augment(self, raw, numbers):
        images = self._crop(raw, numbers)
        if self.random_flip:
            flip = torch.from_numpy(random_uniform(self.seed, "flip", numbers) < 0.5).to(raw.device)
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
        return images.float() / 127.5 - 1


class _Samples:
    """What a loader process runs: an array of sample numbers in, their undistorted images out."""

    def __init__(self, images):
        self.images = images

    def __getitem__(self, numbers):
        return torch.stack([self.images.read(i) for i in self.images.indices(numbers)])


def _ignore_interrupts(worker):
    # Ctrl-C reaches the whole process group; the loop wants to finish its step, for which the loader must live on.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def load_data(
    *,
    data_dir,
    batch_size,
    image_size,
    class_cond=False,
    deterministic=False,
    random_crop=False,
    random_flip=True,
    seed=0,
    start=0,
    rank=0,
    world_size=1,
    device="cpu",
    **options,
):
    """guided-diffusion's endless generator of (images, kwargs).

    images: float32 [batch_size, 3, H, W] in [-1, 1]; kwargs: {"y": labels [batch_size]} with class_cond, see
    `class_labels`, else {}. deterministic: in the order of names instead of shuffled. start: the first sample number.
    options go to `TrainImages`.
    """
    references = list_images(data_dir)
    labels = class_labels(references)[0] if class_cond else None
    images = TrainImages(
        references, image_size, labels=labels, random_flip=random_flip, random_crop=random_crop, seed=seed, **options
    )
    if deterministic:
        images.indices = lambda numbers: np.asarray(numbers) % len(images)
    numbers = batch_numbers(start, batch_size, rank, world_size)
    for x, y in images.batches(numbers, device):
        yield x, {} if y is None else {"y": y}
