"""Options as frozen dataclasses, whose fields know their help texts and the values that fit."""

import contextlib
import dataclasses
import difflib
import math
import os
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from .errors import InputError, display_name, fitting


def option(
    default: Any, help: str, *, choices: Any = None, least: float | None = None, most: float | None = None,
    above: float | None = None, file: bool = False, runtime: bool = False, metavar: str | None = None,
    flag: str | None = None,
) -> Any:  # fmt: skip
    """A dataclass field with a help text.

    choices: a sequence or a `Registry`. least, most, above: bounds of a number, the last exclusive. file: the content
    of this file determines the outputs. runtime: the value does not determine the outputs, so a restart may
    change it. metavar: the word for the value in help. flag: the name on the command line, if not the field's.
    """
    metadata = {"help": help, "choices": choices, "least": least, "most": most, "above": above}
    metadata |= {"file": file, "runtime": runtime, "metavar": metavar, "flag": flag}
    return dataclasses.field(default=default, metadata=metadata)


def flag_of(field: dataclasses.Field) -> str:
    """The name of a field on the command line and in records."""
    return field.metadata.get("flag") or field.name


def check_names(classes: Iterable[type]) -> None:
    """Raise TypeError where options that can be given together share a name but not its default."""
    known: dict[str, tuple[Any, type]] = {}
    for cls in classes:
        for field in dataclasses.fields(cls):
            default, owner = known.setdefault(flag_of(field), (field.default, cls))
            if default != field.default:
                both = f"{default!r} in {owner.__name__} and {field.default!r} in {cls.__name__}"
                raise TypeError(f"{flag_of(field)} has the default {both}; give one of them another name")


@dataclasses.dataclass(frozen=True)
class Checked:
    """Base of options that raise InputError when they are made with a value that does not fit."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_value(field, getattr(self, field.name))


def check_value(field: dataclasses.Field, value: Any) -> None:
    """Raise InputError unless a value fits the field's type, choices and bounds."""
    kinds, meta = field_types(field), field.metadata
    if value is None and type(None) in kinds:
        return
    if value is None:
        raise InputError(f"it is required: {meta.get('help', 'a value')}", parameter=field.name)
    if reason := _misfit(kinds, meta, value):
        raise InputError(reason, parameter=field.name, value=value)


def _misfit(kinds: tuple[type, ...], meta: Mapping[str, Any], value: Any) -> str | None:
    """Words for what would fit in place of a value that does not."""
    if choices := list(meta.get("choices") or ()):  # a list: values may be unhashable
        return None if value in choices else fitting(value, choices)
    if isinstance(value, bool):
        return None if bool in kinds else f"it must be {type_words(kinds)}"
    number = isinstance(value, (int, float))
    if not isinstance(value, kinds) and not (number and float in kinds):
        return f"it must be {type_words(kinds)}"
    if number and not math.isfinite(value):
        return "it must be a finite number"
    least, most, above = meta.get("least"), meta.get("most"), meta.get("above")
    low = number and ((least is not None and value < least) or (above is not None and value <= above))
    if low or (number and most is not None and value > most):
        bounds = {"at least": least, "above": above, "at most": most}
        words = " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)
        return f"it must be from {least:g} to {most:g}" if None not in (least, most) else f"it must be {words}"
    return None


def field_types(field: dataclasses.Field) -> tuple[type, ...]:
    """The types that a field takes, NoneType among them where None means "not given"."""
    return typing.get_args(field.type) or (field.type,)  # type: ignore[return-value]


def type_words(kinds: tuple[type, ...]) -> str:
    """Words for values of these types."""
    words = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", type(None): ""}
    named = (words.get(kind, kind.__name__) for kind in kinds if kind is not int or float not in kinds)
    return " or ".join(filter(None, named))


def near_miss(path: str) -> str:
    """Suggestion for a path that does not exist: "; did you mean X?" for a similar name beside it, else ""."""
    folder, name = os.path.split(path)
    with contextlib.suppress(OSError, ValueError):
        stems = {os.path.splitext(other)[0]: other for other in os.listdir(folder or ".")}
        for close in difflib.get_close_matches(os.path.splitext(name)[0], stems, 1, 0.7):
            return f"; did you mean {display_name(os.path.join(folder, stems[close]))}?"
    return ""
