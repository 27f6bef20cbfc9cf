"""Options as frozen dataclasses.

A field made by `option` knows its help text and what values fit. `cli.flags` makes flags of the fields; `check` refuses
the same values for people who write Python.
"""

import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Iterable
from typing import Any

from .errors import InputError, display_name
from .registry import fitting


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
    flag: str | None = None,
) -> Any:
    """A dataclass field with a help text.

    choices: the values that fit, a sequence or a `Registry`. least, most: bounds of a number; above: a bound that it
    must exceed. file: the value is the path of a file whose content determines the outputs. runtime: the value says how
    to run, not what to make, so it may change between a run and its restart. metavar: the word for the value in help.
    flag: the name on the command line, where it differs from the field's.
    """
    metadata = {"help": help, "choices": choices, "least": least, "most": most, "above": above}
    metadata |= {"file": file, "runtime": runtime, "metavar": metavar, "flag": flag}
    return dataclasses.field(default=default, metadata=metadata)


def flag_of(field: dataclasses.Field) -> str:
    """The name of a field on the command line and in records."""
    return field.metadata.get("flag") or field.name


def flags_of(*classes: type) -> dict[str, str]:
    """The names on the command line of the fields of options classes, by field name."""
    return {field.name: flag_of(field) for cls in classes for field in dataclasses.fields(cls)}


def check_names(classes: Iterable[type]) -> None:
    """Raise TypeError where options that can be given together share a name but not its default.

    The one value of such a name would mean two things.
    """
    known: dict[str, tuple[Any, type]] = {}
    for cls in classes:
        for field in dataclasses.fields(cls):
            default, owner = known.setdefault(flag_of(field), (field.default, cls))
            if default != field.default:
                raise TypeError(
                    f"the option {flag_of(field)} has the default {default!r} in {owner.__name__} and "
                    f"{field.default!r} in {cls.__name__}; give one of them another name"
                )


def check(options: Any) -> None:
    """Raise InputError for the first field of an options dataclass whose value does not fit."""
    for field in dataclasses.fields(options):
        check_value(field, getattr(options, field.name))


@dataclasses.dataclass(frozen=True)
class Checked:
    """Base of options that raise InputError when they are made with a value that does not fit."""

    def __post_init__(self) -> None:
        check(self)


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
    """Words for values of these types."""
    words = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", type(None): ""}
    named = (words.get(kind, kind.__name__) for kind in kinds if kind is not int or float not in kinds)
    return " or ".join(filter(None, named))


def bound_words(least: float | None, most: float | None, above: float | None = None) -> str:
    """Words for numbers within bounds."""
    low = f"above {above:g}" if above is not None else f"at least {least:g}" if least is not None else ""
    if low and most is not None:
        return f"from {least:g} to {most:g}" if above is None else f"{low} and at most {most:g}"
    return low or f"at most {most:g}"


def near_miss(path: str) -> str:
    """Suggestion for a path that does not exist: "; did you mean X?" for a similar name beside it, else "".

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
