"""Files of a run: each is written whole or not at all, into the folder that the run began in."""

import contextlib
import errno
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import InputError, display_name, first_line, log, reading

TEMPORARY = ".writing"  # suffix of files that are being written; the next run removes those of a killed one


class Folder:
    """A folder to write to, made and tried out. Raises InputError for `parameter` where it cannot be written."""

    def __init__(self, path: str | os.PathLike, parameter: str = "save_dir") -> None:
        self.path, self._parameter = os.fspath(path), parameter
        self._lock_file = os.path.join(self.path, ".lock")
        self._lock: Any = None
        self._known: tuple[int, int] | None = None
        make_folder(path, parameter)

    def refuse(self, reason: str) -> InputError:
        """An error that names the folder."""
        return InputError(reason, parameter=self._parameter, value=self.path)

    def lock(self) -> None:
        """Keep other runs out until `release`; raises InputError where one is in it.

        A file system without locks, such as NFS without a lock service, keeps nothing out.
        """
        import filelock

        lock = filelock.FileLock(self._lock_file, thread_local=False)
        try:
            lock.acquire(blocking=False)
            if not os.path.exists(self._lock_file):  # another run ended between opening and locking
                lock.release()
                raise filelock.Timeout(self._lock_file)
            self._lock = lock
        except filelock.Timeout:
            raise self.refuse("another run is writing there now; wait for it or give another folder") from None
        except (OSError, NotImplementedError) as error:
            log.info("%s cannot be locked: %s", display_name(self.path), first_line(error))
        self.watch()

    def watch(self) -> None:
        """Remember which folder it is, for `check`."""
        self._known = self._identity()

    def _identity(self) -> tuple[int, int]:
        # The lock's file stays open, so no other one gets its number; a folder's is given away at once.
        status = os.stat(self._lock_file if os.path.exists(self._lock_file) else self.path)
        return status.st_dev, status.st_ino

    def check(self) -> None:
        """Raise InputError where the folder is gone, or another one than at `lock` or `watch`."""
        try:
            same = self._known is None or self._identity() == self._known
        except OSError:
            same = False
        if not same:
            raise self.refuse("it was removed while the run was writing to it")

    def release(self) -> None:
        """Let other runs in; nothing happens where the folder is not locked."""
        if self._lock is not None:
            with contextlib.suppress(InputError, OSError):
                self.check()
                os.remove(self._lock_file)
            self._lock.release()
        self._lock = self._known = None


def inside(path: str, folder: str) -> bool:
    """Whether a path lies in a folder once links are followed."""
    root = os.path.realpath(folder)
    return os.path.commonpath([root, os.path.realpath(path)]) == root


def make_folder(folder: str | os.PathLike, parameter: str) -> None:
    """Make a folder that is to be written to, and try it out; raises InputError for the parameter that names it."""
    folder = os.fspath(folder)
    wrong: dict[str, Any] = {"parameter": parameter, "value": folder}
    if "://" in folder:
        raise InputError("outputs are written to a local folder only", **wrong)
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise InputError("it is a file; give a folder", **wrong)
    try:
        os.makedirs(folder, exist_ok=True)
        # Other ranks, on other machines perhaps, try at the same time, and rank 0 removes temporary files.
        probe: dict[str, Any] = {"prefix": ".probe-", "suffix": TEMPORARY, "dir": folder}
        with contextlib.suppress(FileNotFoundError), tempfile.NamedTemporaryFile(**probe):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"it cannot be written: {reason}", **wrong) from None


@contextlib.contextmanager
def writing(path: str, folder: Folder | None = None) -> Iterator[None]:
    """Context in which a file is written: an OSError becomes an InputError that names the file, or else `folder`."""
    try:
        yield
    except OSError as error:
        if folder is not None:
            folder.check()
        reason = f"{display_name(path)} cannot be written: {error.strerror or first_line(error)}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            room = f"no room left to write {display_name(path)} ({error.strerror})"
            reason = f"{room}; make room and run the same command again"
        raise InputError(reason) from error


def write_atomically(path: str | os.PathLike, write: Callable[[BinaryIO], Any], folder: Folder | None = None) -> None:
    """Call write(file) on a temporary file beside `path`, then rename it to `path`.

    Missing folders are made. With `folder`, only those below it, and nothing is written once it is another folder.
    Raises InputError, naming the file, where the disk is full or the file cannot be written.
    """
    path = os.fspath(path)
    parent, name = os.path.split(path)
    # Short because file systems limit a name's length, and the final name may just fit.
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:12]
    temporary = os.path.join(parent, f".{digest}.{os.getpid()}-{threading.get_ident()}{TEMPORARY}")
    with writing(path, folder):
        if folder is None:
            os.makedirs(parent or ".", exist_ok=True)
        else:
            for each in (*reversed(Path(parent).parents), Path(parent)):
                if Path(folder.path) in each.parents and not each.is_dir():
                    each.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        try:
            with open(temporary, "xb") as file:  # never through a link
                write(file)
                # Some file systems report a full disk only now; and a crash must not leave an empty file.
                file.flush()
                os.fsync(file.fileno())
            # Where the folder is replaced after this, the temporary file is gone, too, and renaming fails.
            if folder is not None:
                folder.check()
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(temporary)
            raise


def write_bytes(path: str | os.PathLike, data: bytes, folder: Folder | None = None) -> None:
    """Write a file; folder as in `write_atomically`."""
    write_atomically(path, lambda file: file.write(data), folder)


def write_text(path: str | os.PathLike, text: str, folder: Folder | None = None) -> None:
    """Write a UTF-8 file. File names in it need not be valid UTF-8: their bytes are written."""
    write_bytes(path, text.encode("utf-8", "surrogateescape"), folder)


def write_json(path: str | os.PathLike, content: Any, folder: Folder | None = None) -> None:
    """Write a JSON file that people can read."""
    write_text(path, json_text(content), folder)


def json_text(content: Any) -> str:
    """The text that `write_json` writes."""
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def write_png(path: str, image: np.ndarray, folder: Folder | None = None) -> None:
    """Write uint8 [H, W, 3], or grey [H, W], as PNG; folder as in `write_atomically`."""
    from PIL import Image

    write_atomically(path, lambda file: Image.fromarray(image).save(file, "PNG"), folder)


def write_animation(path: str, frames: Sequence[np.ndarray], folder: Folder | None = None) -> None:
    """Write uint8 frames [H, W, 3] as an animated GIF of about four seconds that shows the last frame for longer."""
    from PIL import Image

    first, *rest = [Image.fromarray(frame) for frame in frames]
    durations = [max(20, 4000 // len(frames))] * len(rest) + [1500]
    options: dict[str, Any] = {"save_all": True, "append_images": rest, "duration": durations, "loop": 0}
    write_atomically(path, lambda file: first.save(file, "GIF", **options), folder)


def read_json(path: str | os.PathLike) -> Any:
    """The content of a JSON file; raises InputError, naming the file, where it cannot be read."""
    with reading(path), open(path, encoding="utf-8", errors="surrogateescape") as file:
        return json.load(file)


def read_json_or_none(path: str | os.PathLike) -> Any:
    """The content of a JSON file; None where there is none that can be read."""
    with contextlib.suppress(InputError):
        return read_json(path)


def remove_files(paths: Iterable[str]) -> None:
    """Remove files and links that exist; raises InputError for one that cannot be removed."""
    for path in paths:
        try:
            if os.path.lexists(path):
                os.remove(path)
        except OSError as error:
            raise InputError(f"{display_name(path)} cannot be removed: {error.strerror}") from None


def remove_temporaries(folder: str | os.PathLike) -> None:
    """Remove the half-written files of killed runs below `folder`."""
    for path in Path(folder).rglob(f".*{TEMPORARY}"):
        with contextlib.suppress(OSError):
            path.unlink()
