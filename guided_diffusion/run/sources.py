"""Sources of a run: references, small images to enlarge, or nothing but numbers."""

import contextlib
import hashlib
import io
from typing import Any

import numpy as np
from PIL import Image

from ..dist_util import Peers
from ..errors import reading
from ..image_datasets import Reference, find_collisions, is_url, list_references, load_image
from .files import check_regular


class Source:
    """The entries of a run, and how they are read.

    entries: what is made, with names relative to the save folder. failed: reasons for others, by name. base: the file
    or folder that they lie in, if any. samples: outputs of each. strict: whether the first failure ends the run.
    """

    def __init__(self, entries: list[Reference], failed: dict[str, str] | None = None) -> None:
        self.entries, self.failed = entries, failed or {}
        self.base: str | None = None
        self.samples, self.strict = 1, False

    def read(self, reference: Reference, image_size: int) -> np.ndarray:
        """An image as uint8 [h, w, 3]; raises ImageError. Here black: only its size counts."""
        return np.zeros((image_size, image_size, 3), np.uint8)

    def fingerprint(self, reference: Reference) -> str | None:
        """A text that is equal for equal content, whatever its path; None where there is none that can be read."""
        return None

    def label(self, reference: Reference) -> int | None:
        """The class of an image, where it has one of its own."""
        return None

    def beside(self, reference: Reference, image_size: int) -> list[np.ndarray]:
        """The pictures that grid.png shows before an entry's outputs."""
        return []


class Numbers(Source):
    """Images of a model's own, made from nothing but noise: 000000.png, 000001.png, …"""

    def __init__(self, count: int) -> None:
        super().__init__(_numbered(count))


class References(Source):
    """The images below a folder or an address, or a single one, listed once for all ranks.

    count: take only the first so many. resize, background: as in `load_image`.
    """

    def __init__(
        self, base: str, peers: Peers, count: int | None = None, samples: int = 1, strict: bool = False, **options: Any
    ) -> None:
        found = listed(base, count, peers)
        failed = find_collisions(found, reserved=["grid.png"] if samples == 1 else [])  # several have their folders
        super().__init__([reference for reference in found if reference.name not in failed], failed)
        self.base, self.samples, self.strict, self._options = base, samples, strict, options

    def read(self, reference: Reference, image_size: int) -> np.ndarray:
        return load_image(reference, image_size, **self._options)

    def fingerprint(self, reference: Reference) -> str | None:
        return fingerprint(reference.path)

    def beside(self, reference: Reference, image_size: int) -> list[np.ndarray]:
        return [self.read(reference, image_size)]


class SmallImages(References):
    """Small images to enlarge, and their classes, if any.

    base: a folder, searched recursively, or an image; or an .npz file whose first array is uint8 [N, H, W, 3] and whose
    second are the classes [N]. small_size: side to which images of files are brought. class_index: the class of all.
    Raises InputError for `base`.
    """

    def __init__(
        self, base: str, peers: Peers, small_size: int, count: int | None = None, class_index: int | None = None
    ) -> None:
        self.small_size, self.class_index = small_size, class_index
        self.array, self.labels = _read_npz(base) if base.endswith(".npz") else (None, None)
        if self.array is None:
            super().__init__(base, peers, count)
        else:
            Source.__init__(self, _numbered(len(self.array))[:count])

    def read(self, reference: Reference, image_size: int) -> np.ndarray:
        return load_image(reference, self.small_size) if self.array is None else self.array[_number(reference)]

    def fingerprint(self, reference: Reference) -> str | None:
        if self.array is None:
            return fingerprint(reference.path)
        image = self.read(reference, 0)  # the class belongs to the content
        return _digest(image.tobytes(), f"{image.shape} {self.label(reference)}")

    def label(self, reference: Reference) -> int | None:
        if self.class_index is not None or self.labels is None:
            return self.class_index
        return int(self.labels[_number(reference)])

    def beside(self, reference: Reference, image_size: int) -> list[np.ndarray]:
        small = Image.fromarray(self.read(reference, image_size))
        return [np.asarray(small.resize((image_size, image_size), Image.Resampling.NEAREST))]


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


def _number(reference):
    return int(reference.name.removesuffix(".png"))


def fingerprint(path: str) -> str | None:
    """Size and hash of a file's bytes, or of what is at an address; None where it cannot be read."""
    with contextlib.suppress(Exception):  # each service has errors of its own; decoding says what is wrong
        if is_url(path):
            import blobfile

            with blobfile.BlobFile(path, "rb") as blob:
                return _digest(blob.read())
        check_regular(path)
        with open(path, "rb") as file:
            return _digest(file.read())
    return None


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


def npz_bytes(*arrays: np.ndarray, **named: np.ndarray) -> bytes:
    """Arrays as the content of an .npz file, those without a name as arr_0, arr_1, …"""
    buffer = io.BytesIO()
    np.savez(buffer, *arrays, **named)  # type: ignore[arg-type]
    return buffer.getvalue()
