"""Reading reference images: find them, decode any common format to RGB, and convert to and from tensors.

An image that cannot be read raises `ImageError`, whatever the decoder tripped over, so that a run can report it and go
on; a wrong flag raises `UserError`. Nothing here changes Pillow's global state, so images may be read in any thread.
"""

import errno
import io
import math
import os
import posixpath
import random
import re
import stat
import unicodedata
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageColor
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from .errors import InputError, UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".webp", ".bmp", ".tif", ".tiff", ".gif")
RESIZE_MODES = ("crop", "pad", "stretch")

MAX_PIXELS = 178_956_970
"""Images of more pixels are refused before decoding. Pillow refuses them too; the number is its default limit."""

# The decoder is chosen by the file's first bytes, not by its name, and called directly: Image.open would also try
# formats that nobody means to feed in (EPS runs an interpreter), and warns about large images through global state.
_SIGNATURES = (
    (rb"\x89PNG\r\n\x1a\n", "PNG", PngImageFile),
    (rb"\xff\xd8", "JPEG", JpegImageFile),
    (rb"RIFF....WEBP", "WebP", WebPImageFile),
    (rb"BM", "BMP", BmpImageFile),
    (rb"II\*\0|MM\0\*|II\+\0|MM\0\+", "TIFF", TiffImageFile),
    (rb"GIF8[79]a", "GIF", GifImageFile),
)
_FORMATS = ", ".join(name for _, name, _ in _SIGNATURES)

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
    """An image that cannot be read: the message is the reason alone, one line without the path."""


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


def display_name(name: str) -> str:
    """The name as it is, or quoted with escapes where it would break a line of output or cannot be encoded."""
    return name if name.isprintable() else repr(name)


def is_url(path: str) -> bool:
    """Whether blobfile is to open this path: gs://, az:// or the https address of an Azure blob."""
    return re.match(r"gs://|az://|https://[^/]+\.blob\.core\.windows\.net/", path) is not None


# ---- finding the references -----------------------------------------------------------------------------------------


def list_references(base: str, *, flag: str = "--base_samples") -> list[Reference]:
    """The images under the folder `base`, sorted by name; or `base` itself where it is a file (of any suffix).

    Folders are searched recursively and links to folders are followed, except back to a folder that is being searched.
    Entries whose name starts with a dot and files of other suffixes than `IMAGE_SUFFIXES` are left out. Links that
    lead nowhere, pipes and unreadable files stay in the list: `load_image` says what is wrong with them.

    Raises UserError, naming `flag`, for a missing path, an unreadable folder and a folder without images.
    """
    base = os.fspath(base)
    where = f"{flag} {display_name(base)}"
    if is_url(base):
        found = _list_remote(base, where)
    elif re.match(r"[a-z][a-z0-9+.-]+://", base):
        raise UserError(
            f"{where}: not an address that can be read; give a folder, an image, or a URL that starts "
            "with gs://, az:// or https://ACCOUNT.blob.core.windows.net/"
        )
    else:
        found = _list_local(base, where)
    return sorted(found, key=lambda reference: reference.name)


def _list_local(base: str, where: str) -> list[Reference]:
    try:
        mode = os.stat(base).st_mode
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: {_os_reason(error, base)}; give a folder of images or one image") from error
    if stat.S_ISREG(mode):
        return [Reference(base, os.path.basename(base))]
    if not stat.S_ISDIR(mode):
        raise UserError(f"{where}: {_kind_of_file(mode)}; give a folder of images or one image")

    def scan(folder: str):
        with os.scandir(folder) as entries:
            return [(entry.name, entry.path, _is_folder(entry)) for entry in entries]

    def identity(folder: str):
        status = os.stat(folder)
        return status.st_dev, status.st_ino

    return _walk(base, where, scan, identity)


def _list_remote(base: str, where: str) -> list[Reference]:
    try:
        import blobfile
    except ImportError as error:
        raise UserError(f"{where}: reading this address needs the package blobfile (pip install blobfile)") from error

    def scan(folder: str):
        return [(entry.name, entry.path, entry.is_dir) for entry in blobfile.scandir(folder)]

    try:
        is_folder = blobfile.isdir(base)
        exists = is_folder or blobfile.exists(base)
    except Exception as error:  # each service has errors of its own: credentials, address, network
        raise UserError(f"{where}: cannot be read: {_one_line(error)}") from error
    if not exists:
        raise UserError(f"{where}: no such file or folder; give a folder of images or one image")
    if not is_folder:
        return [Reference(base, posixpath.basename(base))]
    return _walk(base, where, scan, identity=str)


def _walk(base: str, where: str, scan, identity) -> list[Reference]:
    """The images below `base`. `scan(folder)` lists (name, path, is a folder); `identity(folder)` is equal for two
    paths to one folder."""
    found, others = [], 0
    pending = [(base, "", frozenset())]
    while pending:
        folder, prefix, above = pending.pop()
        try:
            this = identity(folder)
            entries = [] if this in above else scan(folder)
        except Exception as error:
            reason = _os_reason(error, folder) if isinstance(error, OSError) else _one_line(error)
            raise UserError(f"{where}: cannot read the folder {display_name(folder)}: {reason}") from error
        for name, path, is_folder in entries:
            if name.startswith("."):
                continue
            if is_folder:
                pending.append((path, f"{prefix}{name}/", above | {this}))
            elif name.lower().endswith(IMAGE_SUFFIXES):
                found.append(Reference(path, prefix + name))
            else:
                others += 1
    if not found:
        seen = "found no file at all" if others == 0 else f"found {others} other file{'s' * (others > 1)}"
        raise UserError(
            f"{where}: no image in this folder; searched it and its subfolders for "
            f"{' '.join(IMAGE_SUFFIXES)} and {seen}"
        )
    return found


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links, or a target that may not be looked at
        return False


def find_collisions(references, suffix: str = ".png", reserved=()) -> dict[str, str]:
    """Which references must not be translated, because their output `stem + suffix` would be written twice.

    Returns reference name -> reason (one line that names the other file). The first of two keeps its output. Paths are
    compared without regard to case and Unicode composition, because a save folder may lie on a file system that does
    not tell these apart. A clash between one output and the folder of another counts, and so does one with
    `reserved`, the relative paths that the run itself writes.
    """
    reserved = {_fold(path) for path in reserved}
    files, folders, reasons = {}, {}, {}
    for reference in references:
        output = reference.stem + suffix
        key = _fold(output)
        parents = [key[:at] for at, char in enumerate(key) if char == "/"]
        in_the_way = next((files[parent] for parent in parents if parent in files), None)
        shown = display_name(output)
        if key in reserved:
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


def load_image(reference_or_path, image_size: int, *, resize: str = "crop", background: str = "white") -> np.ndarray:
    """Read one image as uint8 [image_size, image_size, 3], RGB.

    `reference_or_path`: a `Reference`, a path, or a URL that `is_url` knows (read into memory as a whole).
    `resize`: "crop" as guided-diffusion does (box-downsample by 2 while the shorter side is at least 2·image_size,
    bicubic until it equals image_size, cut out the centre), "pad" (fit inside, `background` around it), or "stretch".
    `background`: what shows through transparent pixels; a colour name or #hex.

    The first frame or page counts; EXIF's orientation is applied; colour profiles are not. 16-bit greyscale is scaled
    to 8 bits, float greyscale is taken to span [0, 1], or [0, 255] where it has values above 1.

    Raises ImageError for whatever is wrong with the file, UserError for a wrong option.
    """
    colour = check_options(resize, background)
    if image_size < 1:
        raise UserError(f"--image_size {image_size}: must be at least 1")
    path = reference_or_path.path if isinstance(reference_or_path, Reference) else os.fspath(reference_or_path)
    image = decode_image(path, background)
    try:
        return np.array(_fit(image, image_size, resize, colour))
    except MemoryError as error:
        raise ImageError(f"not enough memory to resize {image.width} x {image.height} pixels") from error


def decode_image(path: str, background: str = "white") -> Image.Image:
    """The image of a file or URL at its own size as an RGB Pillow image; errors and the rest as in `load_image`."""
    colour = _opaque_colour(background)
    with _open_binary(os.fspath(path)) as file:
        return _decode(file, colour)


def check_options(resize: str, background: str) -> tuple[int, int, int]:
    """The background as RGB; raises UserError for an option of `load_image` that it would refuse."""
    if resize not in RESIZE_MODES:
        raise UserError(f"--resize {resize}: not a way to resize; use one of {', '.join(RESIZE_MODES)}")
    return _opaque_colour(background)


def _opaque_colour(background: str) -> tuple[int, int, int]:
    try:
        colour = ImageColor.getrgb(background)
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"--background {background}: not a colour; give a name such as white, or #rrggbb") from error
    if len(colour) == 4 and colour[3] != 255:
        raise UserError(f"--background {background}: a transparent colour cannot be a background; give #rrggbb")
    return colour[:3]


def _open_binary(path: str):
    if is_url(path):
        try:
            import blobfile

            with blobfile.BlobFile(path, "rb") as blob:
                return io.BytesIO(blob.read())
        except Exception as error:  # each service has errors of its own: credentials, address, network
            reason = _os_reason(error, path) if isinstance(error, OSError) else _one_line(error)
            raise ImageError(f"cannot be read: {reason}") from error
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):  # opening a pipe would wait for a writer
            raise ImageError(_kind_of_file(mode))
        return open(path, "rb")
    except (OSError, ValueError) as error:
        raise ImageError(_os_reason(error, path)) from error


def _decode(file, colour: tuple[int, int, int]) -> Image.Image:
    """The first frame, upright, as mode RGB over `colour`. Raises nothing but ImageError."""
    name, size = "image", None
    try:
        head = file.read(16)
        file.seek(0)
        if not head:
            raise ImageError("the file is empty (0 bytes)")
        name, decoder = _identify(head)
        image = decoder(file)
        size = image.size
        if size[0] * size[1] > MAX_PIXELS:
            raise ImageError(
                f"{size[0] * size[1]} pixels, more than the limit of {MAX_PIXELS} "
                f"(decompression bomb?): {size[0]} x {size[1]} {name}"
            )
        _scale_transparent_colour(image)
        image.load()
        return _flatten(_turn_upright(image), colour)
    except ImageError:
        raise
    except MemoryError as error:
        what = "this image" if size is None else f"{size[0]} x {size[1]} pixels"
        raise ImageError(f"not enough memory to decode {what}") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, IndexError and more
        raise ImageError(_decoding_reason(name, error)) from error


def _identify(head: bytes):
    for signature, name, decoder in _SIGNATURES:
        if re.match(signature, head, re.DOTALL):
            return name, decoder
    raise ImageError(f"not an image: begins with {head!r}, which is none of {_FORMATS}")


def _scale_transparent_colour(image: Image.Image) -> None:
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
        return image.convert("RGB")
    image = image.convert("RGBA")
    canvas = Image.new("RGBA", image.size, colour)
    return Image.alpha_composite(canvas, image).convert("RGB")


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


# ---- saying what went wrong -----------------------------------------------------------------------------------------


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


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
    return _one_line(error)


def _kind_of_file(mode: int) -> str:
    kinds = ((stat.S_ISDIR, "folder"), (stat.S_ISFIFO, "named pipe"), (stat.S_ISSOCK, "socket"))
    kind = next((word for test, word in kinds if test(mode)), "device")
    return f"a {kind}, not a regular file"


def _decoding_reason(name: str, error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be read: {_os_reason(error, '')}"
    message = _one_line(error)
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
    references = _by_folder(list_references(data_dir))
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
        images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1
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


def class_names(references: Sequence[Reference]) -> list[str]:
    """The class of each image: the first folder of its relative path where all images lie in folders, otherwise what
    comes before the first underscore of its name."""
    if all("/" in reference.name for reference in references):
        return [reference.name.split("/")[0] for reference in references]
    return [posixpath.basename(reference.name).split("_")[0] for reference in references]


def _by_folder(references):
    """In the order in which a walk through sorted folders meets them, which is guided-diffusion's."""
    return sorted(references, key=lambda reference: reference.name.split("/"))


def _list_image_files_recursively(data_dir: str) -> list[str]:
    """The paths of all images below a folder, folder by folder in the order of the names."""
    return [reference.path for reference in _by_folder(list_references(data_dir))]


# ---- tensors --------------------------------------------------------------------------------------------------------


def to_tensor(images) -> torch.Tensor:
    """uint8 images [N, H, W, 3] (an array, or a list of [H, W, 3]) to float32 [N, 3, H, W] in [-1, 1]."""
    array = np.array(images)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
        raise ValueError(f"expected uint8 [N, H, W, 3], got {array.dtype} {list(array.shape)}")
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


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
