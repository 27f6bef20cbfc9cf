"""Reading reference images: find them, decode any common format to RGB, and convert to and from tensors.

An image that cannot be read raises `ImageError`, whatever the decoder tripped over, so that a run can report it and
continue; a wrong option raises `InputError`. Nothing here changes Pillow's global state, so images may be read in any
thread. Threads that decode share one memory budget, `DECODING_BYTES`.
"""

import contextlib
import ctypes
import errno
import io
import logging
import math
import os
import posixpath
import random
import re
import stat
import struct
import threading
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any, TypeVar

import numpy as np
import torch
from PIL import Image, ImageColor, ImageFile, features
from PIL.BmpImagePlugin import BmpImageFile
from PIL.DdsImagePlugin import DdsImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.IcoImagePlugin import IcoImageFile
from PIL.Jpeg2KImagePlugin import Jpeg2KImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PcxImagePlugin import PcxImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.PsdImagePlugin import PsdImageFile
from PIL.QoiImagePlugin import QoiImageFile
from PIL.SgiImagePlugin import SgiImageFile
from PIL.TgaImagePlugin import TgaImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from .errors import InputError, display_name, first_line, one_line
from .options import fitting

try:
    from PIL.AvifImagePlugin import AvifImageFile
except ImportError:  # Pillow before 11.2
    AvifImageFile = None

log = logging.getLogger("sddm")

_AVIF = AvifImageFile if features.check("avif") else None
_JPEG2000 = Jpeg2KImageFile if features.check("jpg_2000") else None

IMAGE_SUFFIXES: tuple[str, ...] = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".pjpeg", ".pjp", ".mpo"),
    *(".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif"),
    *((".avif", ".avifs") if _AVIF else ()),
    *((".jp2", ".j2k", ".jpf", ".jpx", ".jpc", ".j2c") if _JPEG2000 else ()),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".tga", ".icb", ".vda", ".vst", ".ico"),
    *(".pcx", ".qoi", ".sgi", ".rgb", ".rgba", ".bw", ".dds", ".psd"),
)
RESIZE_MODES = ("crop", "pad", "stretch")

MAX_PIXELS = 178_956_970
"""Images of more pixels are refused before decoding. Pillow refuses them too; the number is its default limit."""

MAX_SIDE = 16_384
"""Images are not enlarged beyond this."""

DECODING_BYTES = 2**31
"""Memory that all threads together use for decoding. An image that needs more is decoded while no other is."""

_BYTES_PER_PIXEL = 16  # most that decoding takes; a plain RGB image takes 4 to 8
_LARGE = 2**28  # of these bytes; what larger images took is given back to the system at once
_ROWS_AT_ONCE = 2**20  # pixels that are laid over the background in one go

# Many paths to one folder, as links between folders make, are each followed up to this many entries in all.
_MOST_REPEATS = 300_000

# The decoder is chosen by the file's first bytes, not by its name, and called directly: Image.open would also try
# formats that run other programs (EPS and WMF), and warns about large images through global state.
_SIGNATURES: tuple[tuple[bytes, str, Any], ...] = (
    (rb"\x89PNG\r\n\x1a\n", "PNG", PngImageFile),
    (rb"\xff\xd8", "JPEG", JpegImageFile),
    (rb"RIFF....WEBP", "WebP", WebPImageFile),
    (rb"BM", "BMP", BmpImageFile),
    (rb"II\*\x00|MM\x00\*|II\+\x00|MM\x00\+", "TIFF", TiffImageFile),
    (rb"GIF8[79]a", "GIF", GifImageFile),
    (rb"....ftyp(avif|avis|mif1|msf1)", "AVIF", _AVIF),
    (rb"....ftyp(hei[cxms]|hev[cxms])", "HEIC", None),
    (rb"\xff\x4f\xff\x51|\x00\x00\x00\x0cjP  \r\n\x87\n", "JPEG 2000", _JPEG2000),
    (rb"P[1-6][\s#]|Pf\s", "PNM", PpmImageFile),
    (rb"\x00\x00\x01\x00", "ICO", IcoImageFile),
    (rb"qoif", "QOI", QoiImageFile),
    (rb"\x01\xda[\x00\x01][\x01\x02]", "SGI", SgiImageFile),
    (rb"DDS \x7c\x00\x00\x00", "DDS", DdsImageFile),
    (rb"8BPS\x00\x01", "PSD", PsdImageFile),
    (rb"\n[\x00\x02\x03\x05][\x00\x01][\x01\x02\x04\x08]", "PCX", PcxImageFile),
    # TGA has no signature: kinds of picture, sizes of an unused or used colour table, and bits per pixel that exist.
    (
        rb".(\x00[\x02\x03\n\x0b]\x00{5}|\x01[\x01\x09]....[\x0f\x10\x18\x20]).{8}[\x08\x0f\x10\x18\x20]",
        "TGA",
        TgaImageFile,
    ),
)
_HEAD = 32  # bytes of a file that are matched
_FORMATS = ", ".join(name for _, name, decoder in _SIGNATURES if decoder)

# EXIF's orientation 2 to 8: what turns the stored picture upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF_ORIENTATION = 0x0112
_TIFF_BITS_PER_SAMPLE = 258
_TIFF_PHOTOMETRIC = 262


class ImageError(Exception):
    """An image that cannot be read. The message is the reason, one line without the path."""


@dataclass(frozen=True)
class Reference:
    """One reference image: `path` opens it (a path or a blobfile URL), `name` identifies it in the run.

    `name` is relative to the folder that was searched, with "/" between its parts, and keeps its suffix.
    """

    path: str
    name: str

    @property
    def stem(self) -> str:
        """The name without its last suffix: the output's path relative to the save folder, less the suffix."""
        return posixpath.splitext(self.name)[0]


def is_url(path: str) -> bool:
    """Whether blobfile is to open this path: gs://, az:// or the https address of an Azure blob."""
    return re.match(r"gs://|az://|https://[^/]+\.blob\.core\.windows\.net/", path) is not None


# ---- finding the references -----------------------------------------------------------------------------------------


def list_references(base: str | os.PathLike[str], *, parameter: str = "base_samples") -> list[Reference]:
    """The images under the folder `base`, sorted by name; or `base` itself where it is a file (of any suffix).

    Folders are searched recursively and links to folders are followed, except back to a folder that is being searched.
    Entries whose name starts with a dot are left out, and so are files of other suffixes than `IMAGE_SUFFIXES`; one log
    line counts the latter. Links that lead nowhere, pipes and unreadable files stay in the list: `load_image` reports
    what is wrong with them.

    Raises InputError, naming `parameter`, for a missing path, an unreadable folder, a folder without images, and for
    folders that link to each other in so many ways that listing them would not end.
    """
    base = os.fspath(base)

    def refuse(reason: str) -> InputError:
        return InputError(reason, parameter=parameter, value=base)

    if is_url(base):
        found = _list_remote(base, refuse)
    elif re.match(r"[a-z][a-z0-9+.-]+://", base):
        raise refuse(
            "this is not an address that can be read; give a folder, an image, or a URL that starts with gs://, az:// "
            "or https://ACCOUNT.blob.core.windows.net/"
        )
    else:
        found = _list_local(base, refuse)
    return sorted(found, key=lambda reference: reference.name)


Refuse = Callable[[str], InputError]
Entry = tuple[str, str, bool]  # of a folder: name, path, whether it is a folder itself


def _list_local(base: str, refuse: Refuse) -> list[Reference]:
    try:
        mode = os.stat(base).st_mode
    except (OSError, ValueError) as error:
        raise refuse(f"{_os_reason(error, base)}; give a folder of images or one image") from error
    if stat.S_ISREG(mode):
        return [Reference(base, os.path.basename(base))]
    if not stat.S_ISDIR(mode):
        raise refuse(f"{_kind_of_file(mode)}; give a folder of images or one image")

    def scan(folder: str) -> list[Entry]:
        with os.scandir(folder) as entries:
            return [(entry.name, entry.path, _is_folder(entry)) for entry in entries]

    def identity(folder: str) -> Hashable:
        status = os.stat(folder)
        return status.st_dev, status.st_ino

    return _walk(base, refuse, scan, identity)


def _list_remote(base: str, refuse: Refuse) -> list[Reference]:
    try:
        import blobfile
    except ImportError as error:
        raise refuse("reading this address needs the package blobfile (pip install blobfile)") from error

    def scan(folder: str) -> list[Entry]:
        return [(entry.name, entry.path, entry.is_dir) for entry in blobfile.scandir(folder)]

    try:
        is_folder = blobfile.isdir(base)
        exists = is_folder or blobfile.exists(base)
    except Exception as error:  # each service has errors of its own: credentials, address, network
        raise refuse(f"cannot be read: {one_line(error) or type(error).__name__}") from error
    if not exists:
        raise refuse("no such file or folder; give a folder of images or one image")
    if not is_folder:
        return [Reference(base, posixpath.basename(base))]
    return _walk(base, refuse, scan, identity=str)


def _walk(
    base: str, refuse: Refuse, scan: Callable[[str], list[Entry]], identity: Callable[[str], Hashable]
) -> list[Reference]:
    """The images below `base`. `identity(folder)` is equal for two paths to one folder."""
    found: list[Reference] = []
    others: Counter[str] = Counter()
    pending: list[tuple[str, str, frozenset[Hashable]]] = [(base, "", frozenset())]
    seen: set[Hashable] = set()
    repeats = 0
    while pending:
        folder, prefix, above = pending.pop()
        try:
            this = identity(folder)
            entries = [] if this in above else scan(folder)
        except Exception as error:
            reason = _os_reason(error, folder) if isinstance(error, OSError) else one_line(error)
            raise refuse(f"cannot read the folder {display_name(folder)}: {reason}") from error
        if this in seen:
            repeats += 1 + len(entries)
            if repeats > _MOST_REPEATS:
                raise refuse(f"its folders link to each other in too many ways, as at {display_name(prefix)}")
        seen.add(this)
        for name, path, is_folder in entries:
            if name.startswith("."):
                continue
            if is_folder:
                pending.append((path, f"{prefix}{name}/", above | {this}))
            elif name.lower().endswith(IMAGE_SUFFIXES):
                found.append(Reference(path, prefix + name))
            else:
                others[posixpath.splitext(name)[1].lower()] += 1
    total = others.total()
    if not found:
        other = "no file at all" if total == 0 else f"{total} other file{'s' * (total > 1)} ({_kinds(others)})"
        raise refuse(f"no image in this folder; it and its subfolders have {other}; supported are {_FORMATS}")
    if total:
        log.info(
            "%s: left out %d file%s without an image's suffix: %s",
            display_name(base), total, "s" * (total > 1), _kinds(others),
        )  # fmt: skip
    return found


def _kinds(suffixes: Counter[str]) -> str:
    """How often suffixes occur, in words, the most frequent first."""
    words = [f"{count} {display_name(suffix) or 'without a suffix'}" for suffix, count in suffixes.most_common(6)]
    more = suffixes.total() - sum(count for _, count in suffixes.most_common(6))
    return ", ".join(words + [f"{more} more"] * (more > 0))


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links, or a target that may not be looked at
        return False


def find_collisions(
    references: Iterable[Reference], suffix: str = ".png", reserved: Iterable[str] = ()
) -> dict[str, str]:
    """Which references must not be translated, because their output `stem + suffix` would be written twice.

    Returns reference name -> reason (one line that names the other file). The first of two keeps its output. Paths are
    compared without regard to case and Unicode composition, because a save folder may lie on a file system that does
    not tell these apart. A clash between one output and the folder of another counts, and so does one with
    `reserved`, the relative paths that the run itself writes.
    """
    taken = {_fold(path) for path in reserved}
    files: dict[str, str] = {}
    folders: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for reference in references:
        output = reference.stem + suffix
        key = _fold(output)
        parents = [key[:at] for at, char in enumerate(key) if char == "/"]
        in_the_way = next((files[parent] for parent in parents if parent in files), None)
        shown = display_name(output)
        if key in taken:
            reasons[reference.name] = f"its output {shown} has the name of a file that the run itself writes"
        elif key in files:
            reasons[reference.name] = f"its output {shown} would overwrite that of {display_name(files[key])}"
        elif key in folders:
            reasons[reference.name] = (
                f"its output {shown} has the name of the folder for the output of {display_name(folders[key])}"
            )
        elif in_the_way is not None:
            reasons[reference.name] = (
                f"its output {shown} needs a folder where the output of {display_name(in_the_way)} lies"
            )
        else:
            files[key] = reference.name
            for parent in parents:
                folders.setdefault(parent, reference.name)
    return reasons


def _fold(path: str) -> str:
    return unicodedata.normalize("NFC", path.casefold())


# ---- reading one image ----------------------------------------------------------------------------------------------


def load_image(
    reference_or_path: Reference | str | os.PathLike[str],
    image_size: int,
    *,
    resize: str = "crop",
    background: str = "white",
) -> np.ndarray:
    """Read one image as uint8 [image_size, image_size, 3], RGB.

    `reference_or_path`: a `Reference`, a path, or a URL that `is_url` knows (read into memory as a whole).
    `resize`: "crop" as guided-diffusion does (box-downsample by 2 while the shorter side is at least 2·image_size,
    bicubic until it equals image_size, cut out the centre), "pad" (fit inside, `background` around it), or "stretch".
    `background`: what shows through transparent pixels; a colour name or #hex.

    The first frame or page counts; EXIF's orientation is applied; colour profiles are not. 16-bit greyscale is scaled
    to 8 bits, float greyscale is taken to span [0, 1], or [0, 255] where it has values above 1.

    Raises ImageError for whatever is wrong with the file, InputError for a wrong option.
    """
    colour = check_options(resize, background)
    if not 1 <= image_size <= MAX_SIDE:
        raise InputError(f"it must be from 1 to {MAX_SIDE}", parameter="image_size", value=image_size)
    path = reference_or_path.path if isinstance(reference_or_path, Reference) else os.fspath(reference_or_path)

    def fitted(image: Image.Image) -> np.ndarray:
        try:
            return np.array(_fit(image, image_size, resize, colour))
        except MemoryError as error:
            raise ImageError(f"not enough memory to resize {image.width} x {image.height} pixels") from error

    with _open_binary(path) as file:
        return _decode(file, colour, fitted)


def load_picture(
    picture: Image.Image, image_size: int, *, resize: str = "crop", background: str = "white"
) -> np.ndarray:
    """A Pillow image as `load_image` reads it from a file: uint8 [image_size, image_size, 3]. Raises ImageError."""
    colour = check_options(resize, background)
    try:
        image = _flatten(_turn_upright(picture), colour)
    except (OSError, ValueError, SyntaxError) as error:
        raise ImageError(f"cannot be decoded: {first_line(error)}") from None
    return np.array(_fit(image, image_size, resize, colour))


def decode_image(path: str | os.PathLike[str], background: str = "white") -> Image.Image:
    """The image of a file or URL at its own size as an RGB Pillow image; errors and the rest as in `load_image`."""
    colour = _opaque_colour(background)
    with _open_binary(os.fspath(path)) as file:
        return _decode(file, colour, lambda image: image)


def measure_image(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Width and height of an image file as it is stored, from its head alone. Raises ImageError."""
    name = "image"
    with _open_binary(os.fspath(path)) as file:
        try:
            head = file.read(_HEAD)
            file.seek(0)
            name, decoder = _identify(head)
            return _icon_size(file) if name == "ICO" else decoder(file).size
        except ImageError:
            raise
        except Exception as error:  # see _decode
            raise ImageError(_decoding_reason(name, error)) from error


def check_options(resize: str, background: str) -> tuple[int, int, int]:
    """The background as RGB; raises InputError for an option of `load_image` that it would refuse."""
    if resize not in RESIZE_MODES:
        raise InputError(fitting(resize, list(RESIZE_MODES)), parameter="resize", value=resize)
    return _opaque_colour(background)


def _opaque_colour(background: str) -> tuple[int, int, int]:
    wrong: dict[str, Any] = {"parameter": "background", "value": background}
    try:
        colour = ImageColor.getrgb(background)
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError("it must be a colour: a name such as white, or #rrggbb", **wrong) from error
    if len(colour) == 4 and colour[3] != 255:
        raise InputError("a transparent colour cannot be a background; give #rrggbb", **wrong)
    return colour[:3]


def _open_binary(path: str) -> IO[bytes]:
    if is_url(path):
        try:
            import blobfile

            with blobfile.BlobFile(path, "rb") as blob:
                return io.BytesIO(blob.read())
        except Exception as error:  # each service has errors of its own: credentials, address, network
            reason = _os_reason(error, path) if isinstance(error, OSError) else one_line(error)
            raise ImageError(f"cannot be read: {reason}") from error
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):  # opening a pipe would wait for a writer
            raise ImageError(_kind_of_file(mode))
        return open(path, "rb")
    except (OSError, ValueError) as error:
        raise ImageError(_os_reason(error, path)) from error


class _Budget:
    """An amount of memory that threads share. Who comes first is served first."""

    def __init__(self) -> None:
        self._turn, self._changed = threading.Lock(), threading.Condition()
        self._used, self._process = 0, os.getpid()

    @contextlib.contextmanager
    def reserve(self, amount: int) -> Iterator[None]:
        """Wait until `amount` bytes are free, or all are, and hold them."""
        if self._process != os.getpid():  # a forked process: the threads that hold memory are not in it
            self.__init__()
        with self._turn, self._changed:
            self._changed.wait_for(lambda: self._used == 0 or self._used + amount <= DECODING_BYTES)
            self._used += amount
        try:
            yield
        finally:
            with self._changed:
                self._used -= amount
                self._changed.notify_all()


_budget = _Budget()
Result = TypeVar("Result")


def _decode(file: IO[bytes], colour: tuple[int, int, int], finish: Callable[[Image.Image], Result]) -> Result:
    """`finish` of the first frame, upright, as mode RGB over `colour`. Raises nothing but ImageError."""
    name, size = "image", None
    try:
        head = file.read(_HEAD)
        file.seek(0)
        if not head:
            raise ImageError("the file is empty (0 bytes)")
        name, decoder = _identify(head)
        if name == "ICO":  # decoded as it is opened
            size = _icon_size(file)
            _check_size(size, name)
        elif name == "JPEG 2000":
            _check_codestream(file)
        with _budget.reserve(size[0] * size[1] * _BYTES_PER_PIXEL) if size else contextlib.nullcontext():
            image = decoder(file)
        size = image.size
        _check_size(size, name)
        amount = size[0] * size[1] * _BYTES_PER_PIXEL
        with _budget.reserve(amount):
            try:
                return finish(_upright_rgb(image, colour))
            finally:
                del image
                if amount > _LARGE:
                    _return_freed_memory()
    except ImageError:
        raise
    except MemoryError as error:
        what = "this image" if size is None else f"{size[0]} x {size[1]} pixels"
        raise ImageError(f"not enough memory to decode {what}") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, IndexError and more
        raise ImageError(_decoding_reason(name, error)) from error


def _upright_rgb(image: ImageFile.ImageFile, colour: tuple[int, int, int]) -> Image.Image:
    _scale_transparent_colour(image)
    image.load()
    return _flatten(_turn_upright(image), colour)


def _return_freed_memory() -> None:
    """Give the system what large images took. The C library keeps it otherwise, for each thread that decoded one."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def _identify(head: bytes) -> tuple[str, Any]:
    for signature, name, decoder in _SIGNATURES:
        if re.match(signature, head, re.DOTALL):
            if decoder is None:
                raise ImageError(f"Pillow cannot read {name} images here; convert it to PNG or JPEG")
            return name, decoder
    raise ImageError(f"not an image: begins with {head[:16]!r}, which is none of {_FORMATS}")


def _check_size(size: tuple[int, int], name: str) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise ImageError(
            f"{size[0] * size[1]} pixels, more than the limit of {MAX_PIXELS} (decompression bomb?): "
            f"{size[0]} x {size[1]} {name}"
        )


def _icon_size(file: IO[bytes]) -> tuple[int, int]:
    """Width and height of an icon file's largest picture, as the pictures' own headers give them."""
    largest = (0, 0)
    count = struct.unpack("<H", file.read(6)[4:])[0]
    for entry in range(count):
        file.seek(6 + 16 * entry + 12)
        file.seek(struct.unpack("<I", file.read(4))[0])
        header = file.read(24)
        if header[:4] == b"\x89PNG":
            width, height = struct.unpack(">II", header[16:24])
        else:
            width, height = (abs(side) for side in struct.unpack("<ii", header[4:12]))
        largest = max(largest, (width, height), key=lambda size: size[0] * size[1])
    file.seek(0)
    return largest


def _check_codestream(file: IO[bytes]) -> None:
    """Raise ImageError where a JPEG 2000 codestream lacks its end: the decoder would fill in the rest."""
    data = file.read()
    file.seek(0)
    if b"\xff\xd9" not in data[data.rfind(b"\xff\x93") :]:
        raise ImageError("truncated: the JPEG 2000 file ends too early (no end of codestream)")


def _scale_transparent_colour(image: ImageFile.ImageFile) -> None:
    """Give a PNG's transparent colour the depth of its pixels. Must be called before the pixels are loaded.

    The file has that colour in its own bit depth; Pillow brings the pixels to 8 bits and leaves the colour alone.
    """
    key = image.info.get("transparency")
    if image.format != "PNG" or key is None or not image.tile:
        return
    stored = image.tile[0][3]
    if stored in ("L;2", "L;4"):
        image.info["transparency"] = key * (85 if stored == "L;2" else 17)
    elif stored == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _turn_upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION)
    except Exception:  # damaged EXIF beside sound pixels: every viewer shows these as they are stored
        orientation = None
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _flatten(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """Any mode to RGB, transparent parts over `colour`."""
    if image.mode[0] in "IF":
        image = _grey_to_8_bits(image)
    if image.mode not in ("LA", "PA", "RGBA", "RGBa") and "transparency" not in image.info:
        return image if image.mode == "RGB" else image.convert("RGB")
    flat = Image.new("RGB", image.size)
    rows = max(1, _ROWS_AT_ONCE // image.width)  # a whole large image in RGBA several times over would take gigabytes
    for top in range(0, image.height, rows):
        part = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        canvas = Image.new("RGBA", part.size, colour)
        flat.paste(Image.alpha_composite(canvas, part).convert("RGB"), (0, top))
    return flat


def _grey_to_8_bits(image: Image.Image) -> Image.Image:
    """Modes I;16, I and F to L or, with a transparent grey level, to LA."""
    values = np.asarray(image)
    if image.mode == "F":
        if not np.isfinite(values).all():
            raise ImageError("float image with values that are NaN or infinite")
        scale = 255 if values.max() <= 1 else 1
        grey = np.rint(np.clip(values * scale, 0, 255)).astype(np.uint8)
    else:
        peak = 65535
        tags = getattr(image, "tag_v2", {})
        if tags.get(_TIFF_BITS_PER_SAMPLE) == (12,):
            peak = 4095
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > peak:
            raise ImageError(f"integer image with values from {low} to {high}; supported is 0 to {peak}")
        grey = ((values.astype(np.uint32) * 255 + peak // 2) // peak).astype(np.uint8)
        if tags.get(_TIFF_PHOTOMETRIC) == 0:  # "white is zero", which Pillow heeds at 8 bits only
            grey = 255 - grey
    result = Image.fromarray(grey)
    transparent = image.info.get("transparency")
    if transparent is not None:
        result.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return result


def _fit(image: Image.Image, size: int, resize: str, colour: tuple[int, int, int]) -> Image.Image:
    if resize == "stretch":
        return image.resize((size, size), Image.Resampling.BICUBIC)
    if resize == "pad":
        scale = size / max(image.size)
        width, height = (max(1, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        canvas = Image.new("RGB", (size, size), colour)
        canvas.paste(image, ((size - width) // 2, (size - height) // 2))
        return canvas
    image = _shrink(_trim_ribbon(image), size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _shrink(image: Image.Image, side: int) -> Image.Image:
    """Resize so that the shorter side becomes `side`: halved with a box filter while it is twice that, then bicubic."""
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def _trim_ribbon(image: Image.Image, aspect: int = 16) -> Image.Image:
    """Cut the ends off an image longer than `aspect` times its width, symmetrically.

    The centre crop discards them anyway; enlarging 1 x 100,000 pixels with them would take gigabytes.
    """
    limit = aspect * min(image.size)
    cut_x, cut_y = (max(0, side - limit) // 2 for side in image.size)
    return image.crop((cut_x, cut_y, image.width - cut_x, image.height - cut_y)) if cut_x or cut_y else image


# ---- words for what went wrong ---------------------------------------------------------------------------------------


def _os_reason(error: BaseException, path: str) -> str:
    """Why the system would not open `path`."""
    if isinstance(error, FileNotFoundError):
        if os.path.islink(path):
            return f"broken link to {display_name(os.readlink(path))}"
        return "no such file or folder"
    if isinstance(error, PermissionError):
        return "permission denied"
    if isinstance(error, OSError) and error.errno == errno.ELOOP:
        return "a link that leads back to itself"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    return one_line(error) or type(error).__name__


def _kind_of_file(mode: int) -> str:
    kinds = ((stat.S_ISDIR, "folder"), (stat.S_ISFIFO, "named pipe"), (stat.S_ISSOCK, "socket"))
    kind = next((word for test, word in kinds if test(mode)), "device")
    return f"a {kind}, not a regular file"


def _decoding_reason(name: str, error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be read: {_os_reason(error, '')}"
    message = one_line(error) or type(error).__name__
    if isinstance(error, Image.DecompressionBombError):
        return message
    if re.search(r"truncated|unpack|incomplete|index out of range", message, re.IGNORECASE):
        return f"truncated: the {name} file ends too early ({message})"
    if re.search(r"unsupported|not supported|unknown pixel mode", message, re.IGNORECASE):
        return f"unsupported kind of {name} file: {message}"
    return f"damaged or truncated {name} file: {message}"


# ---- guided-diffusion's loader --------------------------------------------------------------------------------------


def load_data(
    *,
    data_dir: str,
    batch_size: int,
    image_size: int,
    class_cond: bool = False,
    deterministic: bool = False,
    random_crop: bool = False,
    random_flip: bool = True,
) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """guided-diffusion's endless generator of training batches: (images [N, 3, H, W] in [-1, 1], {} or {"y": [N]}).

    class_cond: add the class, the first folder of an image's relative path where all images lie in folders, otherwise
    what comes before the first underscore of its name. deterministic: in the order of the names instead of shuffled.
    random_crop, random_flip: augmentation (deterministic does not turn it off). Ranks share the images. Order and
    augmentation follow torch's default generator, and in the first pass are those of guided-diffusion's loader. Every
    image is used in each pass: batches run on into the next one. Raises InputError for a folder without images and
    for an image that cannot be read.

    This project's own training uses `training.data`, which resumes in the middle.
    """
    from .dist_util import ranks

    if not data_dir:
        raise InputError("give a folder of images", parameter="data_dir")
    references = _by_folder(list_references(data_dir, parameter="data_dir"))
    labels = None
    if class_cond:
        names = class_names(references)
        numbers = {name: number for number, name in enumerate(sorted(set(names)))}
        labels = [numbers[name] for name in names]
    me = ranks()
    if len(references) < me.world_size:
        raise InputError(f"{len(references)} images are too few for {me.world_size} ranks", parameter="data_dir")
    part = range(me.rank, len(references), me.world_size)
    paths = [references[i].path for i in part]
    targets = None if labels is None else [labels[i] for i in part]
    return _batches(paths, targets, batch_size, image_size, deterministic, random_crop, random_flip)


def _batches(paths, labels, batch_size, image_size, deterministic, random_crop, random_flip):
    def read(batch):
        arrays = [_augmented(paths[i], image_size, random_crop, random_flip, generator) for i, generator in batch]
        images = normalise(torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous())
        return images, {} if labels is None else {"y": torch.tensor([labels[i] for i, _ in batch])}

    samples = []  # (index, generator) of what is left of a pass
    # One thread, as it draws from the generators in the order of the samples; it is a batch ahead.
    with ThreadPoolExecutor(max_workers=1) as pool:
        while True:
            # Drawn when the pass begins and not ahead of it, as training draws from the same generator.
            generator = random.Random(int(torch.empty((), dtype=torch.int64).random_()))
            order = range(len(paths))
            if not deterministic:
                seed = int(torch.empty((), dtype=torch.int64).random_())
                order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed)).tolist()
            samples += [(index, generator) for index in order]
            full = len(samples) // batch_size * batch_size
            batches, samples = [samples[i : i + batch_size] for i in range(0, full, batch_size)], samples[full:]
            pending = deque(pool.submit(read, batch) for batch in batches[:2])
            for batch in [*batches[2:], None, None][: len(batches)]:
                yield pending.popleft().result()
                if batch is not None:
                    pending.append(pool.submit(read, batch))


def _augmented(path, image_size, random_crop, random_flip, generator):
    try:
        image = decode_image(path)
    except ImageError as error:
        raise InputError(f"{display_name(path)} cannot be used: {error}") from error
    if random_crop:
        # As in guided-diffusion: the shorter side becomes 1 to 1.25 times the wanted one, at a random place.
        side = generator.randrange(image_size, math.ceil(image_size / 0.8) + 1)
        image = _shrink(_trim_ribbon(image), side)
        top = generator.randrange(image.height - image_size + 1)
        left = generator.randrange(image.width - image_size + 1)
        image = image.crop((left, top, left + image_size, top + image_size))
    else:
        image = _fit(image, image_size, "crop", (255, 255, 255))
    array = np.array(image)
    return array[:, ::-1] if random_flip and generator.random() < 0.5 else array


def _by_folder(references):
    """In the order in which a walk through sorted folders meets them, which is guided-diffusion's."""
    return sorted(references, key=lambda reference: reference.name.split("/"))


def _list_image_files_recursively(data_dir: str) -> list[str]:
    """The paths of all images below a folder, folder by folder in the order of the names."""
    return [reference.path for reference in _by_folder(list_references(data_dir, parameter="data_dir"))]


# ---- tensors --------------------------------------------------------------------------------------------------------


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
