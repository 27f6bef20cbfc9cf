"""Optional packages, and what goes wrong in them, in one line."""

import contextlib
import importlib
import io
import socket
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from ..errors import InputError, first_line, one_line

PATIENCE = 20
"""Seconds after which a host that does not answer a download is given up."""


def library(module: str, package: str, purpose: str) -> Any:
    """An optional package's module; raises InputError that says how to install it."""
    try:
        found: ModuleType = importlib.import_module(module)
        return found
    except ImportError as error:
        raise InputError(f"{purpose} needs the package {package} ({reason(error)}): pip install {package}") from None


@contextlib.contextmanager
def quiet_download() -> Iterator[None]:
    """Nothing of a library's progress is printed, and a host that does not answer is given up after `PATIENCE`."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(before)


def reason(error: BaseException) -> str:
    """One line of an error's text: the first sentence, or what the traceback inside a TorchScript error ends with."""
    text = str(error).strip()
    line = text.rpartition("\n")[2] if "Traceback" in text else first_line(error)
    return one_line(line.split(". ")[0].strip(" .<>"))
