"""Sources of a run: references, small images to enlarge, or nothing but numbers."""

import contextlib
import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from ..dist_util import Peers
from ..errors import reading
from ..image_datasets import Reference, find_collisions, list_references, load_image
from ..references import open_binary


@dataclass
class Source:
    """The images that a run begins with, and how they are read."""

    entries: list[Reference]
    failed: dict[str, str] = field(default_factory=dict)  # reasons for those of which nothing can be made, by name
    labels: dict[str, int] = field(default_factory=dict)  # classes by name, for images that have some
    base: str | None = None  # the file or folder that they lie in, if any
    samples: int = 1  # outputs of each
    strict: bool = False  # whether the first failure ends the run
    options: dict[str, Any] = field(default_factory=dict)  # of `load_image`

    def read(self, reference: Reference, image_size: int) -> np.ndarray:
        """An image as uint8 [h, w, 3]; raises ImageError."""
        return load_image(reference, **{"image_size": image_size, **self.options})

    def fingerprint(self, reference: Reference) -> str | None:
        """A text that is equal for equal content, whatever its path; None where there is none that can be read."""
        with contextlib.suppress(Exception), open_binary(reference.path) as file:  # `read` says what is wrong
            found = _digest(file.read())
            return f"{found} {self.labels[reference.name]}" if self.labels else found
        return None

    def beside(self, reference: Reference, image_size: int) -> list[np.ndarray]:
        """The pictures that grid.png shows before an entry's outputs."""
        image = Image.fromarray(self.read(reference, image_size))
        return [np.asarray(image.resize((image_size, image_size), Image.Resampling.NEAREST))]


class Numbers(Source):
    """Images of a model's own, made from nothing but noise: 000000.png, 000001.png, …"""

    def __init__(self, count: int) -> None:
        super().__init__(_numbered(count))

    def read(self, reference: Reference, image_size: int) -> np.ndarray:
        return np.zeros((image_size, image_size, 3), np.uint8)  # only its size counts

    def fingerprint(self, reference: Reference) -> None:
        return None

    def beside(self, reference: Reference, image_size: int) -> list[np.ndarray]:
        return []


class SmallImages(Source):
    """Small images to enlarge, and their classes, if any; raises InputError for `base`.

    base: a folder, an image, or an .npz file of images, uint8 [N, H, W, 3], and classes [N]. small_size: side to which
    images of files are brought. class_index: the class of all.
    """

    def __init__(
        self, base: str, peers: Peers, small_size: int, count: int | None = None, class_index: int | None = None
    ) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        if base.endswith(".npz"):
            images, classes = _read_npz(base)
            super().__init__(_numbered(len(images))[:count])
            names = [entry.name for entry in self.entries]
            self.arrays, self.labels = dict(zip(names, images)), dict(zip(names, classes))
        else:
            entries, failed = references(base, count, peers, ["grid.png"])
            super().__init__(entries, failed, base=base, options={"image_size": small_size})
        if class_index is not None:
            self.labels = {entry.name: class_index for entry in self.entries}

    def read(self, reference: Reference, image_size: int) -> np.ndarray:
        return self.arrays[reference.name] if self.arrays else super().read(reference, image_size)

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


def references(
    base: str, count: int | None, peers: Peers, reserved: list[str]
) -> tuple[list[Reference], dict[str, str]]:
    """Those of `listed` with an output each, and reasons for the others by name; reserved: names of other files."""
    found = listed(base, count, peers)
    failed = find_collisions(found, reserved=reserved)
    return [reference for reference in found if reference.name not in failed], failed


def _numbered(count):
    names = [f"{number:06d}.png" for number in range(count)]
    return [Reference(name, name) for name in names]


def _digest(data: bytes, more: str = "") -> str:
    return f"{len(data)} {hashlib.blake2b(data + more.encode(), digest_size=16).hexdigest()}"


def _read_npz(path: str) -> tuple[np.ndarray, list[int]]:
    """Images [N, H, W, 3] and their classes, or []."""
    with reading(path, "an .npz file of images"), np.load(path, allow_pickle=False) as file:
        images, labels = ([file[name] for name in file.files[:2]] + [None, None])[:2]
        if images is None or images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not len(images):
            found = "nothing" if images is None else f"{images.dtype} {list(images.shape)}"
            raise ValueError(f"its first array is {found}, uint8 [N, H, W, 3] is needed")
        if labels is not None and (labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer)):
            raise ValueError(f"it has {labels.dtype} {list(labels.shape)} for classes of its images")
    return images, [] if labels is None else labels.tolist()
