"""Images for metrics: finding them, in folders and in the arrays that samplers write, and reading them."""

import contextlib
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .. import image_datasets
from ..errors import InputError, display_name, first_line
from ..image_datasets import Reference
from ..run import record as run_record

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OVERVIEWS = r"grid\.png|trajectory/.*"  # what a sampling script adds to its outputs
LARGEST_ARRAY = 10_000_000  # images in one file: their names are held in memory

Progress = Callable[[Sequence, str], Iterable]
"""A function (batches, description) -> iterable that sees the batches pass."""


class ImageArray:
    """The array `arr_0` of an .npz file, uint8 [N, H, W, 3], as image samplers write it; images are read one by one.

    Raises InputError, naming the file, where it is something else or damaged.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.shape = self._open()

    def __len__(self) -> int:
        return self.shape[0]

    def _open(self) -> tuple[int, int, int, int]:
        with naming(self.path):
            archive = zipfile.ZipFile(self.path)
            stream = archive.open("arr_0.npy")
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[np.lib.format.read_magic(stream)]
            shape, fortran_order, dtype = read_header(stream)
            total = archive.getinfo("arr_0.npy").file_size
        wanted = len(shape) == 4 and shape[3] == 3 and dtype == np.uint8 and not fortran_order
        if not wanted:
            raise InputError(f"{display_name(self.path)} holds {dtype} {list(shape)}; uint8 [N, H, W, 3] is needed")
        if min(shape) < 1 or shape[0] > LARGEST_ARRAY or shape[1] * shape[2] > image_datasets.MAX_PIXELS:
            raise InputError(
                f"{display_name(self.path)} holds images {list(shape)}, which is more than can be, or none"
            )
        if total != stream.tell() + math.prod(shape):
            raise InputError(f"{display_name(self.path)} is damaged: {total} bytes are not an array {list(shape)}")
        self._stream, self._next = stream, 0
        return shape[0], shape[1], shape[2], 3

    def read(self, index: int) -> Image.Image:
        """One image; fastest in their order."""
        size, data = math.prod(self.shape[1:]), b""
        with naming(self.path):
            if index < self._next:
                self._open()
            while self._next <= index:  # compressed arrays cannot be entered elsewhere
                data = self._stream.read(size)
                if len(data) != size:
                    raise ValueError("the file ends too early")
                self._next += 1
        return Image.fromarray(np.frombuffer(data, np.uint8).reshape(self.shape[1:]))


@dataclass(frozen=True)
class ArrayReference(Reference):
    """An image of an `ImageArray`."""

    array: ImageArray = field(compare=False, repr=False, kw_only=True)
    index: int = field(kw_only=True)


def is_npz(path: str | os.PathLike) -> bool:
    """Whether a path names an .npz file and no folder."""
    return Path(path).suffix == ".npz" and not os.path.isdir(path)


def npz_names(path: str | os.PathLike, parameter: str) -> set[str]:
    """Names of the arrays in an .npz file; raises InputError where it is none."""
    wrong: dict[str, Any] = {"parameter": parameter, "value": path}
    if not os.path.exists(path):
        raise InputError("no such file", **wrong)
    if not os.path.isfile(path):
        raise InputError("it is not a regular file", **wrong)
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except Exception as error:  # damaged archives raise many types
        raise InputError(f"it is not an .npz file ({first_line(error)})", **wrong) from None


def list_images(folder: str | os.PathLike, parameter: str, *, sampled: bool = False) -> list[Reference]:
    """References of the images in `folder`, sorted by name; or in an .npz file of samples, by number.

    sampled: in a folder that a sampling script wrote (it has a run.json), the overviews that the script adds are left
    out. Raises InputError for `parameter` where there are no images.
    """
    wrong: dict[str, Any] = {"parameter": parameter, "value": folder}
    if is_npz(folder):
        if "arr_0" not in npz_names(folder, parameter):
            raise InputError("it has no images: an array arr_0, uint8 [N, H, W, 3], is needed", **wrong)
        array = ImageArray(str(folder))
        names = [f"{i:06d}.png" for i in range(len(array))]
        return [ArrayReference(f"{folder}[{i}]", name, array=array, index=i) for i, name in enumerate(names)]
    if os.path.isfile(folder):
        raise InputError("it is a file; a folder of images or an .npz of samples is needed", **wrong)
    try:
        found = image_datasets.list_references(str(folder))
    except InputError as error:
        raise InputError(error.reason, **wrong) from None
    if sampled and os.path.isfile(Path(folder) / run_record.NAME):
        found = [reference for reference in found if not re.fullmatch(OVERVIEWS, reference.name)]
    if not found:
        raise InputError("it has no image but the run's own overviews", **wrong)
    return found


def read_image(
    image: Reference | str | os.PathLike,
    size: int | None = None,
    resize: str = "crop",
    seen: set[tuple[int, int]] | None = None,
) -> torch.Tensor:
    """An image as a float32 tensor [3, H, W] in [0, 1], transparent parts over white.

    size: the side wanted; None leaves the image as it is. A square image of another size is resized by PIL's bicubic
    filter, any other as the sampling scripts do it (`resize`: "crop", "pad" or "stretch"). The image's own (width,
    height) is added to the set `seen`. Raises InputError that names a file which cannot be read.
    """
    with naming(_path(image)):
        decoded = decode(image, seen)
        if size is None or decoded.size == (size, size):
            return _to_tensor(decoded)
        if decoded.width == decoded.height:
            return _to_tensor(decoded.resize((size, size), Image.Resampling.BICUBIC))
        if isinstance(image, ArrayReference):
            return _to_tensor(_resized(decoded, size, resize))
        return _to_tensor(image_datasets.load_image(image, size, resize=resize))


def read_male2female(image: Reference | str | os.PathLike, seen: set[tuple[int, int]] | None = None) -> torch.Tensor:
    """An image as EGSDE's male2female evaluation feeds it to Inception: float32 [3, 299, 299], ImageNet-normalised."""
    with naming(_path(image)):
        decoded = decode(image, seen)
    for side in (256, 299):
        decoded = decoded.resize((side, side), Image.Resampling.BILINEAR)
    mean, std = torch.tensor(IMAGENET_MEAN)[:, None, None], torch.tensor(IMAGENET_STD)[:, None, None]
    return (_to_tensor(decoded) - mean) / std


def decode(image: Reference | str | os.PathLike, seen: set[tuple[int, int]] | None = None) -> Image.Image:
    """An image at its own size, RGB."""
    if isinstance(image, ArrayReference):
        decoded = image.array.read(image.index)
    else:
        decoded = image_datasets.decode_image(_path(image))
    if seen is not None:
        seen.add(decoded.size)
    return decoded


def _path(image: Reference | str | os.PathLike) -> str:
    return image.path if isinstance(image, Reference) else os.fspath(image)


def _resized(image: Image.Image, size: int, resize: str) -> Image.Image:
    """An image that is in memory, resized as `load_image` does it."""
    return image_datasets._fit(image, size, resize, image_datasets.check_options(resize, "white"))


@contextlib.contextmanager
def naming(path: str) -> Iterator[None]:
    """Whatever decoders trip over becomes an InputError that names the file."""
    try:
        yield
    except InputError:
        raise
    except image_datasets.ImageError as error:
        raise InputError(f"{display_name(str(path))}: {error}") from None
    except Exception as error:  # zip files and arrays raise many types
        raise InputError(f"{display_name(str(path))} cannot be read: {first_line(error)}") from None


def _to_tensor(image: Image.Image | np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def in_batches(items: Sequence, batch_size: int, progress: Progress | None, description: str) -> Iterable[Sequence]:
    """Lists of at most `batch_size` items; `progress` sees them pass."""
    batches = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
    return batches if progress is None else progress(batches, description)


def size_words(shape: Sequence[int]) -> str:
    """WIDTHxHEIGHT of an image tensor's shape."""
    return f"{shape[-1]}x{shape[-2]}"
