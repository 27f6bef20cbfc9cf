"""Sources of a run: references, small images to enlarge, or nothing but numbers."""

import contextlib
import hashlib
from typing import Any

import numpy as np
from PIL import Image

from ..dist_util import Peers
from ..errors import reading
from ..image_datasets import Reference, find_collisions, list_references, load_image
from ..references import open_binary
from .files import check_regular


class Source:
    """The entries of a run, and how they are read. Here each is black: only its size counts.

    entries: what is made, with names relative to the save folder. failed: reasons for others, by name. labels: classes,
    by name, of those that have one. base: the file or folder that the entries lie in, if any. samples: outputs of each.
    strict: whether the first failure ends the run.
    """

    base: str | None = None
    samples = 1
    strict = False

    def __init__(
        self, entries: list[Reference], failed: dict[str, str] | None = None, labels: dict[str, int] | None = None
    ) -> None:
        self.entries, self.failed, self.labels = entries, failed or {}, labels or {}

    def read(self, reference: Reference, image_size: int) -> np.ndarray:
        """An image as uint8 [h, w, 3]; raises ImageError."""
        return np.zeros((image_size, image_size, 3), np.uint8)

    def fingerprint(self, reference: Reference) -> str | None:
        """A text that is equal for equal content, whatever its path; None where there is none that can be read."""
        return None

    def beside(self, reference: Reference, image_size: int) -> list[np.ndarray]:
        """The pictures that grid.png shows before an entry's outputs."""
        return []


class Numbers(Source):
    """Images of a model's own, made from nothing but noise: 000000.png, 000001.png, …"""

    def __init__(self, count: int) -> None:
        super().__init__(_numbered(count))


class Images(Source):
    """Files of images. options: of `load_image`."""

    def __init__(
        self,
        entries: list[Reference],
        failed: dict[str, str] | None = None,
        labels: dict[str, int] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(entries, failed, labels)
        self.options = options

    def read(self, reference: Reference, image_size: int) -> np.ndarray:
        return load_image(reference, image_size, **self.options)

    def fingerprint(self, reference: Reference) -> str | None:
        """Size and hash of a file's bytes, and its class, which depends on the other folders."""
        with contextlib.suppress(Exception), open_binary(reference.path) as file:  # `read` says what is wrong
            found = _digest(file.read())
            return f"{found} {self.labels[reference.name]}" if self.labels else found
        return None

    def beside(self, reference: Reference, image_size: int) -> list[np.ndarray]:
        image = Image.fromarray(self.read(reference, image_size))
        return [np.asarray(image.resize((image_size, image_size), Image.Resampling.NEAREST))]


class References(Images):
    """The images below a folder or an address, or a single one, listed once for all ranks.

    count: take only the first so many. options: of `load_image`.
    """

    def __init__(
        self, base: str, peers: Peers, count: int | None = None, samples: int = 1, strict: bool = False, **options: Any
    ) -> None:
        found = listed(base, count, peers)
        failed = find_collisions(found, reserved=["grid.png"] if samples == 1 else [])  # several have their folders
        super().__init__([reference for reference in found if reference.name not in failed], failed, **options)
        self.base, self.samples, self.strict = base, samples, strict


class SmallImages(References):
    """Small images to enlarge, and their classes, if any.

    base: a folder, searched recursively, or an image; or an .npz file whose first array is uint8 [N, H, W, 3] and whose
    second are the classes [N]. small_size: side to which images of files are brought. class_index: the class of all.
    Raises InputError for `base`.
    """

    def __init__(
        self, base: str, peers: Peers, small_size: int, count: int | None = None, class_index: int | None = None
    ) -> None:
        self.small_size, self.arrays = small_size, {}
        if base.endswith(".npz"):
            images, classes = _read_npz(base)
            Source.__init__(self, _numbered(len(images))[:count])
            names = [entry.name for entry in self.entries]
            self.arrays = dict(zip(names, images))
            self.labels = {} if classes is None else dict(zip(names, classes.tolist()))
        else:
            super().__init__(base, peers, count)
        if class_index is not None:
            self.labels = {entry.name: class_index for entry in self.entries}

    def read(self, reference: Reference, image_size: int) -> np.ndarray:
        return self.arrays[reference.name] if self.arrays else load_image(reference, self.small_size)

    def fingerprint(self, reference: Reference) -> str | None:
        if not self.arrays:
            return super().fingerprint(reference)
        image = self.arrays[reference.name]  # the class belongs to the content
        return _digest(image.tobytes(), f"{image.shape} {self.labels.get(reference.name)}")


def listed(base: str, count: int | None, peers: Peers, parameter: str = "base_samples") -> list[Reference]:
    """The first `count` images below a folder or address, as rank 0 finds them; errors name `parameter`."""
    if peers.rank:
        return [Reference(*entry) for entry in peers.wait_for("references")]
    found = list_references(base, parameter=parameter)[:count]
    peers.publish("references", [(reference.path, reference.name) for reference in found])
    return found


def _numbered(count):
    names = [f"{number:06d}.png" for number in range(count)]
    return [Reference(name, name) for name in names]


def _digest(data: bytes, more: str = "") -> str:
    return f"{len(data)} {hashlib.blake2b(data + more.encode(), digest_size=16).hexdigest()}"


def _read_npz(path: str) -> tuple[np.ndarray, np.ndarray | None]:
    check_regular(path)
    with reading(path, "an .npz file of images"), np.load(path, allow_pickle=False) as file:
        images, labels = ([file[name] for name in file.files[:2]] + [None, None])[:2]
        if images is None or images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not len(images):
            found = "nothing" if images is None else f"{images.dtype} {list(images.shape)}"
            raise ValueError(f"its first array is {found}, uint8 [N, H, W, 3] is needed")
        if labels is not None and (labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer)):
            raise ValueError(f"it has {labels.dtype} {list(labels.shape)} for classes of its images")
    return images, labels
