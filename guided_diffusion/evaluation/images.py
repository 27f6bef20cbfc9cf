"""Images for metrics: list and read them, from folders and from the arrays that samplers write."""

import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .. import image_datasets
from ..errors import InputError, reading
from ..image_datasets import Reference
from ..run import record as run_record

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OVERVIEWS = r"grid\.png|trajectory/.*"  # written by a sampling script beside its outputs

Progress = Callable[[Sequence, str], Iterable]  # (batches, description) -> iterable that sees the batches pass


@dataclass(frozen=True)
class ArrayReference(Reference):
    """An image of an array that is in memory."""

    pixels: np.ndarray = field(compare=False, repr=False, kw_only=True)


def is_npz(path: str | os.PathLike) -> bool:
    """Whether a path names an .npz file and no folder."""
    return Path(path).suffix == ".npz" and not os.path.isdir(path)


@contextlib.contextmanager
def open_npz(path: str | os.PathLike, kind: str) -> Iterator[Mapping[str, np.ndarray]]:
    """Context with the arrays of an .npz file by name; errors inside name the file: missing, damaged or not `kind`."""
    with reading(path, kind), np.load(path, allow_pickle=False) as file:
        yield file


def list_images(folder: str | os.PathLike, parameter: str, *, sampled: bool = False, least: int = 1) -> list[Reference]:
    """The images in a folder as references by name; or those in an .npz file of samples, by number.

    The .npz has an array `arr_0`, uint8 [N, H, W, 3]. sampled: leave out the overviews in a folder that a sampling
    script wrote. Raises InputError for `parameter` where there are fewer than `least` images.
    """
    wrong: dict[str, Any] = {"parameter": parameter, "value": folder}
    found: list[Reference]
    if is_npz(folder):
        with open_npz(folder, "an .npz file of images") as file:
            array = file["arr_0"]
            if array.ndim != 4 or array.shape[3] != 3 or array.dtype != np.uint8 or 0 in array.shape:
                raise ValueError(f"arr_0 is {array.dtype} {list(array.shape)}; uint8 [N, H, W, 3] is needed")
        found = [ArrayReference(f"{folder}[{i}]", f"{i:06d}.png", pixels=pixels) for i, pixels in enumerate(array)]
    elif os.path.isfile(folder):
        raise InputError("it is a file; a folder of images or an .npz of samples is needed", **wrong)
    else:
        found = image_datasets.list_references(str(folder), parameter=parameter)
        if sampled and os.path.isfile(Path(folder) / run_record.NAME):
            found = [reference for reference in found if not re.fullmatch(OVERVIEWS, reference.name)]
    if len(found) < least:
        needed = "distances need 2 or more" if least > 1 else "the run's own overviews do not count"
        raise InputError(f"it has {len(found)} image{'s' * (len(found) != 1)}; {needed}", **wrong)
    return found


def read_image(
    image: Reference | str | os.PathLike,
    size: int | None = None,
    resize: str = "crop",
    seen: set[tuple[int, int]] | None = None,
) -> torch.Tensor:
    """Read an image as a float32 tensor [3, H, W] in [0, 1], with transparent parts over white.

    size: the side; None keeps the image's own size. A square image of another size is resized by Pillow's bicubic
    filter, any other as the sampling scripts do it (`resize`: "crop", "pad" or "stretch"). The image's own (width,
    height) is added to the set `seen`. Raises InputError that names a file which cannot be read.
    """
    decoded = decode(image, seen)
    if size is not None and decoded.width == decoded.height != size:
        decoded = decoded.resize((size, size), Image.Resampling.BICUBIC)
    elif size is not None and decoded.size != (size, size):
        source = decoded if isinstance(image, ArrayReference) else image
        return _to_tensor(image_datasets.load_image(source, size, resize=resize))
    return _to_tensor(decoded)


def read_male2female(image: Reference | str | os.PathLike, seen: set[tuple[int, int]] | None = None) -> torch.Tensor:
    """Read an image as EGSDE's male2female evaluation feeds it to Inception: [3, 299, 299], ImageNet-normalised."""
    decoded = decode(image, seen)
    for side in (256, 299):
        decoded = decoded.resize((side, side), Image.Resampling.BILINEAR)
    mean, std = torch.tensor(IMAGENET_MEAN)[:, None, None], torch.tensor(IMAGENET_STD)[:, None, None]
    return (_to_tensor(decoded) - mean) / std


def decode(image: Reference | str | os.PathLike, seen: set[tuple[int, int]] | None = None) -> Image.Image:
    """An image at its own size, RGB; raises InputError that names a file which cannot be read."""
    if isinstance(image, ArrayReference):
        decoded = Image.fromarray(image.pixels)
    else:
        path = image.path if isinstance(image, Reference) else os.fspath(image)
        with reading(path):
            decoded = Image.fromarray(image_datasets.load_image(path, None))
    if seen is not None:
        seen.add(decoded.size)
    return decoded


def _to_tensor(image: Image.Image | np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def in_batches(items: Sequence, batch_size: int, progress: Progress | None, description: str) -> Iterable[Sequence]:
    """Lists of at most `batch_size` items; `progress` sees them pass."""
    batches = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
    return batches if progress is None else progress(batches, description)
