"""Messages: the one exception for bad input, which speaks of Python parameters, and the package's one log."""

import contextlib
import difflib
import importlib
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

AGAIN = "run the same command again to resume"
log = logging.getLogger("sddm")

LONGEST = 200  # characters of a value or of another program's message that an error line shows


class InputError(ValueError):
    """A parameter, file or environment that cannot be used; the message is one line.

    parameter: its name in Python, or None. reason: what would fit, or the whole message if there is no parameter; names
    in backticks are parameters, which the command line spells as flags.
    """

    def __init__(self, reason: str, *, parameter: str | None = None, value: object = None) -> None:
        super().__init__(reason, parameter, value)
        self.reason, self.parameter, self.value = reason, parameter, value

    def __str__(self) -> str:
        return self.text()

    def text(self, spell: Callable[[str], str] = str) -> str:
        """The message, with `spell(name)` in place of each parameter's name."""
        reason = one_line(re.sub(r"`(\w+)`", lambda match: spell(match[1]), self.reason), longest=4000)
        if self.parameter is None:
            return reason
        found = "missing" if self.value is None else shown(self.value)
        return f"{spell(self.parameter)} is {found}; {reason}"


def shown(value: object) -> str:
    """A value for an error line: texts in quotes, control characters escaped, long ones cut."""
    text = str(value) if isinstance(value, (bool, int, float)) else repr(str(value))
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def display_name(name: str) -> str:
    """A file's name as it is, or quoted with escapes where it would break a line of output or cannot be encoded."""
    return name if name.isprintable() else repr(name)


def one_line(text: object, longest: int = LONGEST) -> str:
    """A text on one line: white space folded, other control characters escaped, cut to a length."""
    folded = "".join(
        char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode()
        for char in " ".join(str(text).split())
    )
    return folded if len(folded) <= longest else f"{folded[: longest - 1]}…"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type where it has none."""
    lines = str(error).strip().splitlines()
    return one_line(lines[0]) if lines else type(error).__name__


def fitting(value: object, names: Iterable) -> str:
    """List the names that fit, with the closest one where it looks like a slip."""
    known = [str(name) for name in names]
    close = difflib.get_close_matches(str(value), known, 1)
    listed = known[0] if len(known) == 1 else f"{', '.join(known[:-1])} or {known[-1]}"
    return f"it can be {listed}" + (f"; did you mean {close[0]}?" if close else "")


def check_choice(parameter: str, value: object, names: Iterable) -> None:
    """Raise InputError, listing the names, for a value that is none of them."""
    known = list(names)
    if value not in known:
        raise InputError(fitting(value, known), parameter=parameter, value=value)


@contextlib.contextmanager
def reading(path: str | os.PathLike, kind: str | None = None) -> Iterator[None]:
    """Context in which a file is opened and parsed: any exception becomes one `InputError` that names the file.

    The messages are "PATH does not exist", "PATH cannot be read: …" and "PATH is damaged or not KIND: …". An InputError
    inside passes unchanged.
    """
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):  # opening a pipe would wait for ever
        raise InputError(f"{display_name(os.fspath(path))} is not a regular file")
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        file = display_name(os.fspath(path))
        if isinstance(error, FileNotFoundError):
            raise InputError(f"{file} does not exist") from error
        if isinstance(error, OSError) and error.strerror:
            raise InputError(f"{file} cannot be read: {error.strerror}") from error
        reason = f"it has no entry {one_line(error, 60)}" if isinstance(error, KeyError) else first_line(error)
        if hasattr(error, "path"):  # an ImageError, which names the file itself
            reason = getattr(error, "reason", reason)
        raise InputError(f"{file} {f'is damaged or not {kind}' if kind else 'cannot be read'}: {reason}") from error


@contextlib.contextmanager
def renaming(names: Mapping[str, str]) -> Iterator[None]:
    """Give InputErrors that are raised inside another name of their parameter, where `names` has one."""
    try:
        yield
    except InputError as error:
        error.parameter = names.get(str(error.parameter), error.parameter)
        raise


def library(module: str, package: str, purpose: str) -> Any:
    """Import an optional package's module; raises InputError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        install = f"pip install {package}"
        raise InputError(f"{purpose} needs the package {package} ({first_line(error)}): {install}") from None
