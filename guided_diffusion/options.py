"""Options as frozen dataclasses, and registries of the parts that options name.

A field made by `option` knows its help text and what values fit. `cli.flags` makes flags of the fields; `check` refuses
the same values for people who write Python.
"""

import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .errors import InputError, display_name


def option(
    default: Any,
    help: str,
    *,
    choices: Any = None,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    file: bool = False,
    runtime: bool = False,
    metavar: str | None = None,
) -> Any:
    """A dataclass field with a help text.

    choices: the values that fit, a sequence or a `Registry`. least, most: bounds of a number; above: a bound that it
    must exceed. file: the value is the path of a file whose content determines the outputs. runtime: the value says how
    to run, not what to make, so it may change between a run and its restart. metavar: the word for the value in help.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "least": least,
        "most": most,
        "above": above,
        "file": file,
        "runtime": runtime,
        "metavar": metavar,
    }
    return dataclasses.field(default=default, metadata=metadata)


def check(options: Any) -> None:
    """Raise InputError for the first field of an options dataclass whose value does not fit."""
    for field in dataclasses.fields(options):
        check_value(field, getattr(options, field.name))


def check_value(field: dataclasses.Field, value: Any) -> None:
    """Raise InputError unless a value fits the field's type, choices and bounds."""
    kinds, meta = field_types(field), field.metadata
    if value is None:
        if type(None) in kinds:
            return
        raise InputError(f"it is needed: {meta.get('help', 'a value')}", parameter=field.name)
    wrong: dict[str, Any] = {"parameter": field.name, "value": value}
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if choices := meta.get("choices"):
        if value not in choices:
            raise InputError(fitting(value, list(choices)), **wrong)
    elif not (
        (isinstance(value, kinds) and (number or not isinstance(value, bool) or bool in kinds))
        or (number and float in kinds)
    ):
        raise InputError(f"it must be {type_words(kinds)}", **wrong)
    if number:
        if not math.isfinite(value):
            raise InputError("it must be a finite number", **wrong)
        least, most, above = meta.get("least"), meta.get("most"), meta.get("above")
        low = (least is not None and value < least) or (above is not None and value <= above)
        if low or (most is not None and value > most):
            raise InputError(f"it must be {bound_words(least, most, above)}", **wrong)


def field_types(field: dataclasses.Field) -> tuple[type, ...]:
    """The types that a field takes, NoneType among them where None means "not given"."""
    kind = field.type
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return typing.get_args(kind)
    return (kind,)  # type: ignore[return-value]


def type_words(kinds: tuple[type, ...]) -> str:
    """What values of these types are called."""
    words = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}
    return " or ".join(words.get(kind, kind.__name__) for kind in kinds if kind is not type(None))


def bound_words(least: float | None, most: float | None, above: float | None = None) -> str:
    """What numbers within bounds are called."""
    low = f"above {above:g}" if above is not None else f"at least {least:g}" if least is not None else ""
    if low and most is not None:
        return f"from {least:g} to {most:g}" if above is None else f"{low} and at most {most:g}"
    return low or f"at most {most:g}"


def fitting(value: object, names: list) -> str:
    """What would fit where a name is none of `names`, with the closest one where it looks like a slip."""
    known = [str(name) for name in names]
    close = difflib.get_close_matches(str(value), known, 1)
    listed = known[0] if len(known) == 1 else f"{', '.join(known[:-1])} or {known[-1]}"
    return f"it can be {listed}" + (f"; did you mean {close[0]}?" if close else "")


def near_miss(path: str) -> str:
    """What a path may have been meant to be: "; did you mean X?" for a similar name beside it, else "".

    Names compare whole first, then without their suffixes.
    """
    folder, name = os.path.split(path)
    try:
        names = os.listdir(folder or ".")
    except (OSError, ValueError):
        return ""
    stems = {os.path.splitext(other)[0]: other for other in names}
    close = difflib.get_close_matches(name, names, 1, 0.7)
    close = close or [stems[s] for s in difflib.get_close_matches(os.path.splitext(name)[0], list(stems), 1, 0.8)]
    return f"; did you mean {display_name(os.path.join(folder, close[0]))}?" if close else ""


class Registry(Mapping[str, Any]):
    """Parts of one kind by name. parameter: the option that names one of them, for errors."""

    def __init__(self, parameter: str) -> None:
        self.parameter = parameter
        self._entries: dict[str, Any] = {}

    def add(self, name: str) -> Callable[[Any], Any]:
        """A decorator that registers what it decorates; another entry of that name is replaced."""

        def register(entry: Any) -> Any:
            self._entries[name] = entry
            return entry

        return register

    def pick(self, name: str) -> Any:
        """The entry of that name; raises InputError that lists the names."""
        if name not in self._entries:
            raise InputError(fitting(name, list(self._entries)), parameter=self.parameter, value=name)
        return self._entries[name]

    def __getitem__(self, name: str) -> Any:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
