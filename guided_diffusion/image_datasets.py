"""Reference images: list them, decode any common format to 8-bit sRGB, and convert to and from tensors.

An image that cannot be read raises `ImageError`, so that a run can report it and continue; a wrong option raises
`InputError`. Images may be read in any thread.
"""

import contextlib
import functools
import io
import itertools
import math
import os
import posixpath
import random
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageCms, ImageColor, ImageOps, UnidentifiedImageError

from .errors import InputError, check_choice, display_name, log, one_line, reading
from .references import (
    FORMATS,
    Reference,
    find_collisions,  # noqa: F401 - offered here, too, as are the next ones
    is_url,  # noqa: F401
    list_references,
    open_binary,
    reason_of,
)

RESIZE_MODES = ("crop", "pad", "stretch")

MAX_SIDE = 16_384  # images are not enlarged beyond this

_TIFF_BITS, _TIFF_PHOTOMETRIC = 258, 262


class ImageError(Exception):
    """An image that cannot be read. `reason` is one line without the path."""

    def __init__(self, reason: str, path: str | None = None) -> None:
        super().__init__(reason, path)
        self.reason, self.path = reason, path

    def __str__(self) -> str:
        return self.reason if self.path is None else f"{display_name(self.path)}: {self.reason}"


def load_image(
    source: Reference | str | os.PathLike[str] | Image.Image, image_size: int | None, *, resize: str = "crop",
    background: str = "white", white_level: int | None = None,
) -> np.ndarray:  # fmt: skip
    """Read one image as uint8 [image_size, image_size, 3], sRGB: the first frame, turned upright by EXIF's orientation.

    source: a `Reference`, a path, also into a .zip file, a URL that `is_url` knows, or a Pillow image. image_size: None
    for the image's own. resize: "crop" (see `center_crop_arr`), "pad" (fit inside `background`) or "stretch".
    background: colour behind transparent pixels, a name or #hex. white_level: value of white in grey images of 16 or 32
    bits; None for 65535, and in float images 1, or 255 where a value is above 1. What looks wrong with values, profile
    or transparency is logged. Raises ImageError for whatever is wrong with the image, InputError for a wrong option.
    """
    folder: str | None = None
    if isinstance(source, Image.Image):
        path = os.fsdecode(getattr(source, "filename", "")) or "a PIL image"
        opened: Any = contextlib.nullcontext(source)
    else:
        path = source.path if isinstance(source, Reference) else os.fspath(source)
        folder = path.removesuffix(source.name) if isinstance(source, Reference) else posixpath.dirname(path)
        opened = _opened(path)
    with _naming(path), opened as image:
        return _convert(image, image_size, functools.partial(_report, path, folder), resize, background, white_level)


def measure_image(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Read the width and height of an image file as it is stored, from its head alone. Raises ImageError."""
    with _naming(os.fspath(path)), _opened(os.fspath(path)) as image:
        return image.size


def check_options(resize: str, background: str, white_level: int | None = None) -> tuple[int, int, int]:
    """Return the background as RGB; raise InputError for an option of `load_image` that it would refuse."""
    check_choice("resize", resize, RESIZE_MODES)
    if white_level is not None and not (isinstance(white_level, int) and 1 <= white_level < 2**31):
        raise InputError("it must be a whole number above 0", parameter="white_level", value=white_level)
    try:
        colour = ImageColor.getrgb(background)
        if colour[3:] not in ((), (255,)):
            raise ValueError("transparent")
    except (ValueError, AttributeError, TypeError) as error:
        reason = "it must be an opaque colour: a name such as white, or #rrggbb"
        raise InputError(reason, parameter="background", value=background) from error
    return colour[:3]


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """Turn any exception of a decoder into an ImageError that names the file."""
    try:
        yield
    except InputError:
        raise
    except ImageError as error:
        raise ImageError(error.reason, path) from error.__cause__
    except MemoryError as error:
        raise ImageError("not enough memory to decode it", path) from error
    except Exception as error:  # OSError, SyntaxError, ValueError, struct.error, IndexError and more
        raise ImageError(reason_of(error, path, "damaged, truncated or unsupported"), path) from error


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """Open an image file by its content, whatever its suffix."""
    with open_binary(path) as file:
        head = file.read(32)
        if not head:
            raise ImageError("the file is empty (0 bytes)")
        try:
            image = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError as error:
            reason = f"not an image, or damaged at its head: begins with {head[:16]!r}; supported are "
            raise ImageError(f"{reason}{', '.join(FORMATS)}") from error
        if image.format == "JPEG2000":  # decoded from a part without a word; the codestream's end is missing
            file.seek(0)
            data = file.read()
            if b"\xff\xd9" not in data[data.rfind(b"\xff\x93") :]:
                raise ImageError("truncated: its codestream has no end")
        yield image


_reported: dict[Hashable, object] = {}


def _report(path: str, folder: str | None, text: str, kind: str | None = None) -> None:
    """Log a line about an image: one of each `kind` for a folder; without a kind, or a folder, for each image."""
    mine = object()
    key = (path, text) if kind is None else (folder, kind)
    if folder is None or _reported.setdefault(key, mine) is mine:  # one step, as threads read side by side
        more = "; other images of its folder get no such line" if kind and folder else ""
        log.warning("%s: %s%s", display_name(path), text, more)


def _convert(
    image: Image.Image, size: int | None, report: Callable[..., None], resize: str, background: str,
    white_level: int | None,
) -> np.ndarray:  # fmt: skip
    """An image of any mode as uint8 [H, W, 3], sRGB: upright, over the background, and of a size unless it is None."""
    colour = check_options(resize, background, white_level)
    if size is not None and not 1 <= size <= MAX_SIDE:
        raise InputError(f"it must be from 1 to {MAX_SIDE}", parameter="image_size", value=size)
    if 0 in image.size:
        raise ImageError(f"it has no pixels: {image.width} x {image.height}")
    tiles: Any = getattr(image, "tile", None)
    key, raw_mode = image.info.get("transparency"), tiles[0][3] if tiles else None
    if image.format == "PNG" and key is not None:  # Pillow scales the pixels to 8 bits, and not this colour
        if raw_mode in ("L;2", "L;4"):
            image.info["transparency"] = key * (85 if raw_mode == "L;2" else 17)
        elif raw_mode == "RGB;16B":
            image.info["transparency"] = tuple(value >> 8 for value in key)
    deep = image.mode[0] not in "IF" and ";16" in str(tiles)
    image.load()
    info, tags = image.info, getattr(image, "tag_v2", {})
    with contextlib.suppress(Exception):  # damaged EXIF beside sound pixels: viewers show these as they are stored
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        image = _grey_to_8_bits(image, tags, white_level, report)
    grey, alpha = image.mode in ("1", "L", "LA", "La"), None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    image = _to_srgb(image, info, grey, report)
    highest = max(np.array(image.getextrema()).flat) if deep else 255
    if highest < 128 or (deep and white_level):
        text = f"is read at 8 of its 16 bits a channel, where it uses 0 to {highest} of 255, and `white_level` does not"
        report(f"{text} count; store it with 8 bits a channel", "depth")
    if alpha is not None:
        canvas = Image.new("RGB", image.size, colour)
        canvas.paste(image, mask=alpha)
        image = canvas
    array = np.array(image) if size is None else _fit(image, size, resize, colour)
    if alpha is not None and np.abs(array - np.array(colour, np.int16)).max() <= 2:
        report("blank on its background: what is not transparent has the background's colour")
    return array


def _grey_to_8_bits(image: Image.Image, tags: Any, white_level: int | None, report: Callable[..., None]) -> Image.Image:
    """Modes I;16, I and F to L or, with a transparent grey level, to LA."""
    values = np.asarray(image)
    low, high = values.min().item(), values.max().item()
    if image.mode == "F":
        if not math.isfinite(low) or not math.isfinite(high):
            raise ImageError("float image with values that are NaN or infinite")
        white = white_level or (1 if high <= 1 else 255)
        if high > white and white_level is None:
            report(f"has float values up to {high:g}; those above 255 are white. Give `white_level`", "levels")
        grey = np.rint(np.clip(values * (255 / white), 0, 255))
    else:
        white = white_level or (4095 if tags.get(_TIFF_BITS) == (12,) else 65535)
        if low < 0 or (high > white and white_level is None):
            reason = f"integer image with values from {low} to {high}; supported is 0 to {white}"
            raise ImageError(reason if low < 0 else f"{reason}, or the value of white as `white_level`")
        if white_level is None and 0 < high <= white // 2:
            text = f"uses 0 to {high} of {white}, so it is dark; if it has {high.bit_length()} bits, give `white_level`"
            report(f"{text} {2 ** high.bit_length() - 1}", "levels")
        grey = (np.minimum(values, white).astype(np.uint64) * 255 + white // 2) // white
        if tags.get(_TIFF_PHOTOMETRIC) == 0:  # "white is zero", which Pillow heeds at 8 bits only
            grey = 255 - grey
    result = Image.fromarray(grey.astype(np.uint8))
    if (transparent := image.info.get("transparency")) is not None:
        result.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return result


def _to_srgb(image: Image.Image, info: dict[Any, Any], grey: bool, report: Callable[..., None]) -> Image.Image:
    """Mode RGB by the ICC profile in `info` or a PNG's gamma; without them, the colours are sRGB."""
    profile, gamma = info.get("icc_profile"), info.get("gamma", 1 / 2.2)
    if profile or image.mode == "LAB":
        try:
            mode, transform = _transform(None if image.mode == "LAB" else profile)
            if (mode == "L" and not grey) or (image.mode == "CMYK") != (mode == "CMYK"):
                raise ValueError(f"it is for {mode}, not for {image.mode}")
            if transform is not None:
                image = image if image.mode == mode else image.convert(mode)
                return ImageCms.applyTransform(image, transform)  # type: ignore[return-value]
        except Exception as error:  # of many types
            text = f"its colour profile cannot be used ({one_line(error)}); its colours are taken for sRGB"
            report(text, "profile")
    elif "srgb" not in info and gamma > 0 and abs(gamma * 2.2 - 1) > 0.05:
        light = np.linspace(0, 1, 256) ** (1 / gamma)
        levels = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
        return image.convert("RGB").point(np.rint(levels * 255).astype(int).tolist() * 3)
    return image if image.mode == "RGB" else image.convert("RGB")


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes | None) -> tuple[str, Any]:
    """The mode that an ICC profile is for (None: that of Lab), and its transform to sRGB; None where it is sRGB."""
    opened: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile) if profile else ImageCms.createProfile("LAB"))
    mode = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}[opened.profile.xcolor_space.strip()]
    intent: Any = ImageCms.Intent.RELATIVE_COLORIMETRIC
    no_cache: Any = 0x40  # the cache is not safe between threads
    transform = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB", intent, no_cache)
    if mode in ("RGB", "L"):  # many are sRGB, under many names, and must not change a pixel: a cube of colours tells
        colours = np.stack(np.meshgrid(*[np.arange(0, 256, 15, dtype=np.uint8)] * 3), -1).reshape(18, -1, 3)
        cube = Image.fromarray(colours).convert(mode)
        change = np.asarray(ImageCms.applyTransform(cube, transform), np.int16) - np.asarray(cube.convert("RGB"))
        transform = None if np.abs(change).max() <= 2 else transform
    return mode, transform


def _fit(image: Image.Image, size: int, resize: str, colour: tuple[int, int, int]) -> np.ndarray:
    if resize == "stretch":
        return np.array(image.resize((size, size), Image.Resampling.BICUBIC))
    if resize == "pad":
        width, height = (max(1, round(side * (size / max(image.size)))) for side in image.size)
        canvas = Image.new("RGB", (size, size), colour)
        fitted = image.resize((width, height), Image.Resampling.BICUBIC)
        canvas.paste(fitted, ((size - width) // 2, (size - height) // 2))
        return np.array(canvas)
    return center_crop_arr(image, size)


def _shrink(image: Image.Image, side: int) -> Image.Image:
    """Resize so that the shorter side becomes `side`: halved with a box filter while it is twice that, then bicubic.

    The ends of an image longer than 16 times its width are cut off first: enlarging 1 x 100,000 pixels with them would
    take gigabytes, and a crop discards them.
    """
    limit = 16 * min(image.size)
    cut_x, cut_y = (max(0, length - limit) // 2 for length in image.size)
    if cut_x or cut_y:
        image = image.crop((cut_x, cut_y, image.width - cut_x, image.height - cut_y))
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def center_crop_arr(pil_image: Image.Image, image_size: int) -> np.ndarray:
    """guided-diffusion's centre crop of a Pillow image: uint8 [image_size, image_size, channels]."""
    image = _shrink(pil_image, image_size)
    left, top = (image.width - image_size) // 2, (image.height - image_size) // 2
    return np.array(image.crop((left, top, left + image_size, top + image_size)))


def random_crop_arr(
    pil_image: Image.Image, image_size: int, min_crop_frac: float = 0.8, max_crop_frac: float = 1.0,
    generator: Any = random,
) -> np.ndarray:  # fmt: skip
    """guided-diffusion's random crop: the crop takes between the two fractions of the shorter side."""
    smallest, largest = math.ceil(image_size / max_crop_frac), math.ceil(image_size / min_crop_frac)
    image = _shrink(pil_image, generator.randrange(smallest, largest + 1))
    top = generator.randrange(image.height - image_size + 1)
    left = generator.randrange(image.width - image_size + 1)
    return np.array(image.crop((left, top, left + image_size, top + image_size)))


def load_data(
    *, data_dir: str, batch_size: int, image_size: int, class_cond: bool = False, deterministic: bool = False,
    random_crop: bool = False, random_flip: bool = True,
) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:  # fmt: skip
    """guided-diffusion's endless generator of training batches: (images [N, 3, H, W] in [-1, 1], {} or {"y": [N]}).

    class_cond: add the class, see `class_names`. deterministic: in the order of the names instead of shuffled. Ranks
    share the images. Order and augmentation follow torch's default generator, and in the first pass are those of
    guided-diffusion's loader; batches run on into the next pass. Raises InputError for what cannot be read.
    """
    from .dist_util import ranks

    if not data_dir:
        raise InputError("give a folder of images", parameter="data_dir")
    references, me = _by_folder(data_dir), ranks()
    if len(references) < me.world_size:
        raise InputError(f"{len(references)} images are too few for {me.world_size} ranks", parameter="data_dir")
    names = class_names(references) if class_cond else []
    numbers = {name: number for number, name in enumerate(sorted(set(names)))}

    def samples() -> Iterator[tuple[int, random.Random]]:
        while True:
            generator = random.Random(int(torch.empty((), dtype=torch.int64).random_()))
            part = range(me.rank, len(references), me.world_size)
            order: Iterable[int] = range(len(part))
            if not deterministic:
                seed = int(torch.empty((), dtype=torch.int64).random_())
                order = torch.randperm(len(part), generator=torch.Generator().manual_seed(seed)).tolist()
            yield from ((part[i], generator) for i in order)

    def read(batch: list[tuple[int, random.Random]]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        arrays = []
        for i, generator in batch:
            with reading(references[i].path):
                image = Image.fromarray(load_image(references[i], None))
            crop = functools.partial(random_crop_arr, generator=generator) if random_crop else center_crop_arr
            array = crop(image, image_size)
            arrays.append(array[:, ::-1] if random_flip and generator.random() < 0.5 else array)
        return to_tensor(arrays), {"y": torch.tensor([numbers[names[i]] for i, _ in batch])} if class_cond else {}

    def batches() -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        stream = samples()
        with ThreadPoolExecutor(max_workers=1) as pool:  # one thread, which draws in the order of the samples
            ahead = pool.submit(read, list(itertools.islice(stream, batch_size)))
            while True:
                ready, ahead = ahead, pool.submit(read, list(itertools.islice(stream, batch_size)))
                yield ready.result()

    return batches()


def _by_folder(data_dir: str) -> list[Reference]:
    """The images of a folder in the order in which a walk through sorted folders meets them: guided-diffusion's."""
    return sorted(list_references(data_dir, parameter="data_dir"), key=lambda reference: reference.name.split("/"))


def _list_image_files_recursively(data_dir: str) -> list[str]:
    return [reference.path for reference in _by_folder(data_dir)]


def class_names(references: Sequence[Reference]) -> list[str]:
    """The class of each image: the first folder of its relative path where all images lie in folders, otherwise what
    comes before the first underscore of its name."""
    if all("/" in reference.name for reference in references):
        return [reference.name.split("/")[0] for reference in references]
    return [posixpath.basename(reference.name).split("_")[0] for reference in references]


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Grey levels 0 to 255 as float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_tensor(images: np.ndarray | Sequence[np.ndarray]) -> torch.Tensor:
    """uint8 images [N, H, W, 3] (an array, or a list of [H, W, 3]) to float32 [N, 3, H, W] in [-1, 1]."""
    array = np.array(images)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
        raise ValueError(f"expected uint8 [N, H, W, 3], got {array.dtype} {list(array.shape)}")
    return normalise(torch.from_numpy(array).permute(0, 3, 1, 2).contiguous())


def to_uint8(x: torch.Tensor) -> np.ndarray:
    """A tensor [N, 3, H, W] in [-1, 1] to uint8 images [N, H, W, 3]: nearest grey level, values outside clipped.

    Raises ValueError, naming the images, where there is a NaN.
    """
    x = x.detach().float()
    bad = torch.isnan(x).flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(f"NaN in image {', '.join(map(str, bad))} of a batch of {len(x)}")
    levels = ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
