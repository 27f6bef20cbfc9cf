"""Files of images: list them, open them, and say why one cannot be opened."""

import functools
import io
import os
import posixpath
import re
import stat
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any

from PIL import features

from .errors import InputError, display_name, log, one_line

# None of these runs another program, as Pillow's readers of EPS and WMF do. TGA has no signature and is tried last.
FORMATS = [
    *("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", *(["AVIF"] if "avif" in features.modules else []), "JPEG2000"),
    *("PPM", "ICO", "QOI", "SGI", "DDS", "PSD", "PCX", "TGA"),
]
IMAGE_SUFFIXES: tuple[str, ...] = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".pjpeg", ".pjp", ".mpo", ".webp", ".bmp", ".dib"),
    *(".tif", ".tiff", ".gif", ".avif", ".avifs", ".jp2", ".j2k", ".jpf", ".jpx", ".jpc", ".j2c", ".ppm", ".pgm"),
    *(".pbm", ".pnm", ".pfm", ".tga", ".icb", ".vda", ".vst", ".ico", ".pcx", ".qoi", ".sgi", ".rgb", ".rgba", ".bw"),
    *(".dds", ".psd"),
)
_MOST_FOLDERS = 1_000_000  # are searched; links between folders can make paths without end


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
    """Whether blobfile opens this path: gs://, az:// or the https address of an Azure blob."""
    return re.match(r"gs://|az://|https://[^/]+\.blob\.core\.windows\.net/", path) is not None


def list_references(base: str | os.PathLike[str], *, parameter: str = "base_samples") -> list[Reference]:
    """List the images under the folder `base`, sorted by name; or `base` itself where it is a file of any suffix.

    Links to folders are followed, except back to a folder that is being searched. Hidden entries are left out, and so
    are files of other suffixes than `IMAGE_SUFFIXES`, which one log line counts. Broken links and unreadable files are
    listed: `load_image` says what is wrong with them. Raises InputError, naming `parameter`.
    """
    base = os.fspath(base)
    wrong: dict[str, Any] = {"parameter": parameter, "value": base}
    if re.match(r"[a-z][a-z0-9+.-]+://", base) and not is_url(base):
        urls = "gs://, az:// or https://ACCOUNT.blob.core.windows.net/"
        raise InputError(f"it is no address that can be read; give a folder, an image, or a URL of {urls}", **wrong)
    found: list[Reference] = []
    others: Counter[str] = Counter()
    try:
        if not _is_folder(base):
            return [Reference(base, posixpath.basename(base))]
        for prefix, entries in _walk(base):
            for name, path in entries:
                if name.lower().endswith(IMAGE_SUFFIXES):
                    found.append(Reference(path, prefix + name))
                else:
                    others[posixpath.splitext(name)[1].lower()] += 1
    except Exception as error:  # each service has errors of its own: credentials, address, network
        raise InputError(f"{reason_of(error, base)}; give a folder of images or one image", **wrong) from error
    total = others.total()
    kinds = ", ".join(f"{n} {display_name(suffix) or 'without a suffix'}" for suffix, n in others.most_common(6))
    count = f"{total or 'no'} other file{'s' * (total != 1)}{f' ({kinds})' if total else ''}"
    if not found:
        reason = f"no image in this folder; it and its subfolders have {count}; supported are {', '.join(FORMATS)}"
        raise InputError(reason, **wrong)
    if total:
        log.info("%s: left out %s without an image's suffix", display_name(base), count)
    return sorted(found, key=lambda reference: reference.name)


def _walk(base: str) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """The prefix of the names in every folder below `base`, and the (name, path) of its files."""
    pending: list[tuple[str, str, frozenset[Hashable]]] = [(base, "", frozenset())]
    for _ in range(_MOST_FOLDERS):
        if not pending:
            return
        folder, prefix, above = pending.pop()
        this = folder if is_url(folder) else os.stat(folder)[1:3]  # inode and device
        entries = [] if this in above else [entry for entry in _entries(folder) if not entry[0].startswith(".")]
        pending += [(path, f"{prefix}{name}/", above | {this}) for name, path, is_folder in entries if is_folder]
        yield prefix, [(name, path) for name, path, is_folder in entries if not is_folder]
    raise OSError(f"more than {_MOST_FOLDERS} folders, or links between them without end, as at {display_name(prefix)}")


def _is_folder(base: str) -> bool:
    if is_url(base):
        import blobfile

        if not blobfile.isdir(base) and not blobfile.exists(base):
            raise FileNotFoundError
        return blobfile.isdir(base)
    if not os.path.isdir(base):
        _check_regular(base)
    return os.path.isdir(base)


def _check_regular(path: str) -> None:
    """Raise OSError for what is no regular file: opening a pipe would wait for a writer."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "folder", stat.S_IFIFO: "named pipe", stat.S_IFSOCK: "socket"}
        raise OSError(f"a {kinds.get(stat.S_IFMT(mode), 'device')}, not a regular file")


def _entries(folder: str) -> list[tuple[str, str, bool]]:
    """The (name, path, whether it is a folder) of everything in a folder."""
    if is_url(folder):
        import blobfile

        return [(entry.name, entry.path, entry.is_dir) for entry in blobfile.scandir(folder)]
    with os.scandir(folder) as entries:
        return [(entry.name, entry.path, os.path.isdir(entry.path)) for entry in entries]


def find_collisions(references: Iterable[Reference], reserved: Iterable[str] = ()) -> dict[str, str]:
    """Reasons, by name, for references whose output (`stem` + ".png") would be written twice or need a folder that is a
    file. The first of two keeps its output. Case and Unicode composition do not count, as some file systems do not tell
    these apart. reserved: relative paths that the run itself writes.
    """
    files: dict[str, str] = {}
    folders: dict[str, str] = {}
    reasons: dict[str, str] = {}
    taken = {_fold(path) for path in reserved}
    for reference in references:
        output = reference.stem + ".png"
        key = _fold(output)
        parents = [key[:at] for at, char in enumerate(key) if char == "/"]
        in_the_way = next((files[parent] for parent in parents if parent in files), None)
        if key in taken:
            reason = "has the name of a file that the run itself writes"
        elif key in files:
            reason = f"would overwrite that of {display_name(files[key])}"
        elif key in folders:
            reason = f"has the name of the folder for the output of {display_name(folders[key])}"
        elif in_the_way is not None:
            reason = f"needs a folder where the output of {display_name(in_the_way)} lies"
        else:
            files[key] = reference.name
            for parent in parents:
                folders.setdefault(parent, reference.name)
            continue
        reasons[reference.name] = f"its output {display_name(output)} {reason}"
    return reasons


def _fold(path: str) -> str:
    return unicodedata.normalize("NFC", path.casefold())


def natural(name: str) -> tuple[tuple[bool, int, str], ...]:
    """A sort key in which the numbers in a name compare as numbers."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return tuple((False, int(part), "") if part.isdigit() else (True, 0, part) for part in parts)


def archive_of(path: str) -> str:
    """The .zip file that holds a path like set.zip/a/b.png, or ""."""
    heads = (path[: match.end()] for match in re.finditer(r"\.zip(?=/)", path, re.IGNORECASE))
    return next(filter(os.path.isfile, heads), "")


@functools.lru_cache(maxsize=8)
def _archive(path: str, modified: int) -> zipfile.ZipFile:
    """An open .zip file; modified: its time of change, which tells a new file from an old one."""
    return zipfile.ZipFile(path)


def open_binary(path: str) -> IO[bytes]:
    """Open a local file, a file in a .zip archive, or one behind an address, which blobfile reads."""
    if "://" in path:
        import blobfile

        with blobfile.BlobFile(path, "rb") as blob:
            return io.BytesIO(blob.read())
    if archive := archive_of(path):
        return io.BytesIO(_archive(archive, os.stat(archive).st_mtime_ns).read(path[len(archive) + 1 :]))
    _check_regular(path)
    return open(path, "rb")


def reason_of(error: BaseException, path: str, otherwise: str = "cannot be read") -> str:
    """Why the system or blobfile cannot open `path`; `otherwise` stands before the message of any other error."""
    if isinstance(error, ImportError):
        return "reading this address needs the package blobfile (pip install blobfile)"
    if isinstance(error, FileNotFoundError):
        link = os.path.islink(path)
        return f"broken link to {display_name(os.readlink(path))}" if link else "no such file or folder"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    message = one_line(error) or type(error).__name__
    return message if message.endswith("not a regular file") else f"{otherwise}: {message}"
