"""Optional packages, and their errors in one line."""

import contextlib
import importlib
import io
import socket
from collections.abc import Iterator
from typing import Any

from ..errors import InputError, first_line, one_line

PATIENCE = 20  # seconds to wait for a host that does not answer a download


def library(module: str, package: str, purpose: str) -> Any:
    """Import an optional package's module; raises InputError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{purpose} needs the package {package} ({reason(error)}): pip install {package}") from None


@contextlib.contextmanager
def quiet_download() -> Iterator[None]:
    """Hide a library's progress, and limit its wait for a host to `PATIENCE`."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(before)


def reason(error: BaseException) -> str:
    """One line of an error's text: the first sentence, or the last line of the traceback in a TorchScript error."""
    text = str(error).strip()
    line = text.rpartition("\n")[2] if "Traceback" in text else first_line(error)
    return one_line(line.split(". ")[0].strip(" .<>"))
