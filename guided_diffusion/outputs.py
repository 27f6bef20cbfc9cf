"""Writing results: every file appears whole or not at all, and none of it keeps the sampler waiting."""

import contextlib
import errno
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from .errors import UserError

TEMPORARY = ".writing"
"""Suffix of files that are being written; they are hidden, and what a killed run leaves of them is removed."""


def write_atomically(path, write):
    """Call write(file) on a temporary file beside `path`, then rename it to `path`.

    Raises UserError naming --save_dir where the disk is full or the folder cannot be written.
    """
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{os.getpid()}-{threading.get_ident()}{TEMPORARY}")
    try:
        os.makedirs(folder or ".", exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                write(file)
                # Some file systems say only now that the disk is full; and a crash must not leave an empty file.
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            if os.path.exists(temporary):
                os.remove(temporary)
            raise
    except OSError as error:
        raise UserError(_disk_reason(path, error)) from error


def _disk_reason(path, error):
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"--save_dir: no room left to write {path} ({error.strerror}); make room and run the same command again"
    return f"--save_dir: cannot write {path}: {error.strerror or error}"


def remove_temporaries(folder):
    """Remove what killed runs left half written below `folder`."""
    for root, _, names in os.walk(folder):
        for name in names:
            if name.startswith(".") and name.endswith(TEMPORARY):
                with contextlib.suppress(OSError):
                    os.remove(os.path.join(root, name))


def lock(folder):
    """Take a folder for this process; raises UserError where another process has it.

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
        raise UserError(f"--save_dir {folder}: another run is writing there now; wait for it or give another folder") from None
    except OSError:
        os.close(handle)
        return None


def write_png(path, image):
    """Write uint8 [H, W, 3] as PNG."""
    write_atomically(path, lambda file: Image.fromarray(image).save(file, "PNG"))


def write_json(path, content):
    """Write a JSON file that people can read."""
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    # File names need not be valid UTF-8; they are written as the bytes that they are.
    write_atomically(path, lambda file: file.write(text.encode("utf-8", "surrogateescape")))


def write_animation(path, frames, seconds=4.0):
    """Write uint8 frames [H, W, 3] as an animated GIF that stays on the last frame for a while and repeats."""
    images = [Image.fromarray(frame) for frame in frames]
    durations = [max(20, int(1000 * seconds / len(images)))] * (len(images) - 1) + [1500]

    def save(file):
        images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=durations, loop=0)

    write_atomically(path, save)


def contact_sheet(rows, side, columns):
    """Rows of images side by side as one picture, on white.

    rows: lists of uint8 [H, W, 3] (a source and its translations); `columns` such lists stand beside each other in a
    row of the sheet; every image is shown `side` pixels wide. Returns uint8.
    """
    gap = max(2, side // 32)
    width = max(len(row) for row in rows)
    cell_width, cell_height = width * (side + gap) + 2 * gap, side + gap
    columns = min(columns, len(rows))
    lines = -(-len(rows) // columns)
    sheet = Image.new("RGB", (columns * cell_width - gap, lines * cell_height + gap), "white")
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            picture = Image.fromarray(image)
            if picture.size != (side, side):
                picture = picture.resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(picture, (i % columns * cell_width + gap + j * (side + gap), i // columns * cell_height + gap))
    return np.array(sheet)


class Writer:
    """Runs writing tasks on threads; at most `depth` of them wait, then `submit` does.

    The first error comes out of the next `submit` or of `close`; what was submitted after it is not written.
    """

    def __init__(self, threads=2, depth=64):
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="writer")
        self._room = threading.Semaphore(depth)
        self._error = None

    def submit(self, task, *arguments):
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

    def close(self):
        """Wait until everything is written."""
        self._pool.shutdown(wait=True)
        self._raise()
