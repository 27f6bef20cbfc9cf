"""Files of a run: each appears whole or not at all, and none of them keeps the sampler waiting."""

import contextlib
import errno
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import InputError, display_name, first_line, one_line

TEMPORARY = ".writing"
"""Suffix of files that are being written; they are hidden, and a later run removes what a killed one leaves."""

LARGEST_RECORD = 512 << 20
"""Bytes of a JSON file beyond which it is none of ours."""


def write_atomically(path: str | os.PathLike, write: Callable[[BinaryIO], Any], root: str | None = None) -> None:
    """Call write(file) on a temporary file beside `path`, then rename it to `path`.

    Missing folders are made; where `root` is given, those below it alone, so that a folder that somebody removes stays
    removed. Raises InputError, naming the file, where the disk is full or the folder cannot be written.
    """
    path = os.fspath(path)
    folder, name = os.path.split(path)
    # Short, since file systems bound a name's length, and the final name may just fit.
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:12]
    temporary = os.path.join(folder, f".{digest}.{os.getpid()}-{threading.get_ident()}{TEMPORARY}")
    try:
        _make_folders(folder or ".", root)
        try:
            with open(temporary, "wb") as file:
                write(file)
                # Some file systems report a full disk only now; and a crash must not leave an empty file.
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.remove(temporary)
            raise
    except OSError as error:
        raise InputError(_disk_reason(path, error)) from error


def _make_folders(folder: str, root: str | None) -> None:
    if root is None:
        os.makedirs(folder, exist_ok=True)
        return
    for parent in (*reversed(Path(folder).parents), Path(folder)):
        if Path(root) in parent.parents and not parent.is_dir():
            parent.mkdir(exist_ok=True)


def _disk_reason(path: str, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"no room left to write {display_name(path)} ({error.strerror}); make room and run the same command again"
        )
    return f"{display_name(path)} cannot be written: {error.strerror or first_line(error)}"


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Write a file atomically."""
    write_atomically(path, lambda file: file.write(data))


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a UTF-8 file atomically. File names need not be valid UTF-8: their bytes are written."""
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write a JSON file that people can read."""
    write_text(path, json_text(content))


def json_text(content: Any) -> str:
    """What `write_json` writes."""
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def read_json(path: str | os.PathLike) -> Any:
    """The content of a JSON file.

    Raises FileNotFoundError where there is none, and InputError, naming the file, where it cannot be read or is none.
    """
    path = os.fspath(path)
    try:
        if not os.path.isfile(path) and os.path.exists(path):
            raise InputError(f"{display_name(path)} is not a regular file")
        if os.path.getsize(path) > LARGEST_RECORD:
            raise InputError(f"{display_name(path)} is too large to be a record ({os.path.getsize(path)} bytes)")
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return json.load(file)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{display_name(path)} cannot be read: {one_line(error)}") from None


def read_json_or_none(path: str | os.PathLike) -> Any:
    """The content of a JSON file; None where there is none that can be read."""
    try:
        return read_json(path)
    except (FileNotFoundError, InputError):
        return None


def make_folder(folder: str | os.PathLike, parameter: str) -> None:
    """Make a folder that is to be written to, and try it out; raises InputError for the parameter that names it."""
    folder = os.fspath(folder)
    wrong = {"parameter": parameter, "value": folder}
    if "://" in folder:
        raise InputError("outputs are written to a local folder only", **wrong)
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise InputError("it is a file; give a folder", **wrong)
    try:
        os.makedirs(folder, exist_ok=True)
        # Other ranks, on other machines perhaps, try at the same time, and rank 0 removes temporary files.
        descriptor, probe = tempfile.mkstemp(prefix=".probe-", suffix=TEMPORARY, dir=folder)
        os.close(descriptor)
        with contextlib.suppress(FileNotFoundError):
            os.remove(probe)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"it cannot be written: {reason}", **wrong) from None


def check_present(folder: str, parameter: str) -> None:
    """Raise InputError where the folder of a run is gone: what is written later would be half a run."""
    if not os.path.isdir(folder):
        raise InputError("it was removed while the run was writing to it", parameter=parameter, value=folder)


def remove_temporaries(folder: str) -> None:
    """Remove the half-written files of killed runs below `folder`."""
    for root, _, names in os.walk(folder):
        for name in names:
            if name.startswith(".") and name.endswith(TEMPORARY):
                with contextlib.suppress(OSError):
                    os.remove(os.path.join(root, name))


def lock(folder: str | os.PathLike, parameter: str = "save_dir") -> int | None:
    """Take a folder for this process; raises InputError where another process has it.

    Returns the descriptor that holds the lock until it is closed, or None where the file system has no locks.
    """
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return handle
    except BlockingIOError:
        os.close(handle)
        reason = "another run is writing there now; wait for it or give another folder"
        raise InputError(reason, parameter=parameter, value=folder) from None
    except OSError:
        os.close(handle)
        return None


def write_png(path: str, image: np.ndarray, root: str | None = None) -> None:
    """Write uint8 [H, W, 3] as PNG; root as in `write_atomically`."""
    from PIL import Image

    write_atomically(path, lambda file: Image.fromarray(image).save(file, "PNG"), root)


def write_animation(path: str, frames: Sequence[np.ndarray], seconds: float = 4.0, root: str | None = None) -> None:
    """Write uint8 frames [H, W, 3] as an animated GIF that stays on the last frame for a while and repeats.

    root: as in `write_atomically`.
    """
    from PIL import Image

    images = [Image.fromarray(frame) for frame in frames]
    durations = [max(20, int(1000 * seconds / len(images)))] * (len(images) - 1) + [1500]

    def save(file):
        images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0)

    write_atomically(path, save, root)


class Writer:
    """Runs writing tasks on threads; at most `depth` of them wait, then `submit` does.

    The first error comes out of the next `submit` or of `close`; what was submitted after it is not written.
    """

    def __init__(self, threads: int = 2, depth: int = 64) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="writer")
        self._room = threading.Semaphore(depth)
        self._error: BaseException | None = None

    def submit(self, task: Callable, *arguments: Any) -> None:
        """Run task(*arguments) soon; raises the first error of an earlier task."""
        self._raise()
        self._room.acquire()
        self._pool.submit(self._run, task, arguments)

    def _run(self, task, arguments):
        try:
            if self._error is None:
                task(*arguments)
        except BaseException as error:
            self._error = self._error or error
        finally:
            self._room.release()

    def _raise(self):
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Wait until everything is written."""
        self._pool.shutdown(wait=True)
        self._raise()
