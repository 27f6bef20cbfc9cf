"""Small images to enlarge, for `job.Job`: a folder of images, or an .npz file as guided-diffusion writes it."""

import io
import zipfile

import numpy as np
from PIL import Image

from ..errors import InputError, display_name, first_line
from ..image_datasets import Reference, find_collisions, list_references, load_image


class SmallImages:
    """The images to enlarge to side large_size, and their classes: `labels` by name, or None.

    base: a folder, searched recursively, or an image; or an .npz file whose first array is uint8 [N, H, W, 3] and whose
    second are the classes [N]. count: take only the first so many. Raises InputError for `base_samples`.
    """

    def __init__(self, base: str, small_size: int, count: int | None = None) -> None:
        self.small_size = small_size
        self.array: np.ndarray | None = None
        self.labels: dict[str, int] | None = None
        if base.endswith(".npz"):
            self.array, labels = _read_npz(base)
            names = [f"{number:06d}.png" for number in range(len(self.array))][:count]
            self.entries = [Reference(name, name) for name in names]
            self.failed: dict[str, str] = {}
            if labels is not None:
                self.labels = {name: int(label) for name, label in zip(names, labels)}
        else:
            found = list_references(base)[:count]
            self.failed = find_collisions(found, reserved=["grid.png"])
            self.entries = [reference for reference in found if reference.name not in self.failed]

    def read(self, reference: Reference, image_size: int) -> np.ndarray:
        """A small image as uint8 [h, w, 3]; raises ImageError."""
        if self.array is None:
            return load_image(reference, self.small_size)
        return self.array[int(reference.name.removesuffix(".png"))]

    def row(self, reference: Reference, made: list[np.ndarray], image_size: int) -> list[np.ndarray]:
        """What grid.png shows: the small image, its pixels enlarged, and what was made of it."""
        small = Image.fromarray(self.read(reference, image_size))
        return [np.asarray(small.resize((image_size, image_size), Image.Resampling.NEAREST)), *made]

    def layout(self, rows: int, image_size: int) -> tuple[int, int]:
        """The side of the pictures in grid.png and how many rows stand beside each other."""
        return min(256, max(128, image_size)), max(1, round((rows / 2) ** 0.5))


def _read_npz(path: str) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = [file[name] for name in file.files[:2]]
    except (OSError, ValueError, zipfile.BadZipFile, KeyError) as error:
        raise InputError(f"{display_name(path)} cannot be read: {first_line(error)}") from None
    images = arrays[0] if arrays else np.empty(0)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not len(images):
        raise InputError(
            f"{display_name(path)} does not hold images: its first array is {images.dtype} {list(images.shape)}, uint8 "
            "[N, H, W, 3] is needed"
        )
    labels = arrays[1] if len(arrays) > 1 else None
    if labels is not None and (labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer)):
        raise InputError(f"{display_name(path)} has {labels.dtype} {list(labels.shape)} for classes of its images")
    return images, labels


def npz_bytes(*arrays: np.ndarray, **named: np.ndarray) -> bytes:
    """Arrays as the content of an .npz file, those without a name as arr_0, arr_1, …"""
    buffer = io.BytesIO()
    np.savez(buffer, *arrays, **named)  # type: ignore[arg-type]
    return buffer.getvalue()
