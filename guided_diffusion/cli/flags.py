"""Options as flags: the parser of all commands."""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import os
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from ..errors import InputError, shown
from ..options import field_types, flag_of, type_words
from ..presets import PRESETS, ROOT, preset_options

METAVARS = {bool: "BOOL", int: "N", float: "X", str: "TEXT"}
NO_EFFECT = "flags of the public release that have no effect"
YES, NO = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")  # as in guided-diffusion


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Paragraphs filled to the terminal's width, and examples as they are written."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        written = re.compile(r"^ |: python ", re.MULTILINE).search
        parts = (part if written(part) else textwrap.fill(part, width) for part in text.split("\n\n"))
        return textwrap.indent("\n\n".join(parts), indent)


class Parser(argparse.ArgumentParser):
    """A parser whose flags come from options dataclasses; it raises InputError.

    spelling, defaults: by field name, in place of the fields' own flags and defaults.
    """

    def __init__(
        self, description: str | None, *, usage: str = "[flags]", spelling: dict[str, str] | None = None,
        defaults: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            description=textwrap.dedent(description or "").strip(),
            usage=f"python scripts/%(prog)s {usage}",
            formatter_class=functools.partial(HelpFormatter, max_help_position=30),
            allow_abbrev=False,
        )
        self.spelling, self.defaults = dict(spelling or {}), dict(defaults or {})
        self.added: dict[type, dict[str, str]] = {}  # options class -> flags by field name
        self.fields: dict[str, dataclasses.Field] = {}  # by flag
        self.without_effect: dict[str, Any] = {}  # flag -> the value that is not reported
        self.method: str | None = None  # whose options presets set

    def spell(self, parameter: str) -> str:
        """The flag of a Python parameter."""
        return "--" + self.spelling.get(parameter, parameter)

    def add(
        self, *classes: type, title: str, description: str | None = None, only: Sequence[str] | None = None,
        without: Iterable[str] = (),
    ) -> None:  # fmt: skip
        """Add a group with a flag for every field of options dataclasses, or for those in `only`, in that order.

        A flag that several classes share is one flag. without: fields that get no flag.
        """
        group = self._group(title, description)
        found = [(field, cls) for cls in classes for field in dataclasses.fields(cls) if field.name not in without]
        if only is not None:
            found = [each for name in only for each in found if each[0].name == name]
        for field, cls in found:
            flag = self.spelling.setdefault(field.name, flag_of(field))
            self.added.setdefault(cls, {})[field.name] = flag
            if flag not in self.fields:
                self.fields[flag] = field
                self._add_flag(group, flag, field, self.defaults.get(field.name, field.default))

    def _group(self, title: str, description: str | None = None) -> Any:
        """The group of that title, made where it is missing."""
        known = {group.title: group for group in self._action_groups}
        return known.get(title) or self.add_argument_group(title, description)

    def _add_flag(self, group: Any, flag: str, field: dataclasses.Field, default: Any) -> None:
        kinds, meta = field_types(field), field.metadata
        listed = f"{{{','.join(map(str, meta['choices']))}}}" if meta.get("choices") else METAVARS.get(kinds[0], "TEXT")
        text = re.sub(r"`(\w+)`", lambda match: self.spell(match[1]), meta.get("help", ""))
        if default is not None:
            text = re.sub(r" ?\(default [^)]*\)$", "", text)  # of the field, where the command has another
            text = f"{text} (default {shown_default(default)})".strip()
        group.add_argument(
            f"--{flag}", type=functools.partial(read, kinds), default=default, metavar=meta.get("metavar") or listed,
            help=text.replace("%", "%%"), **({"nargs": "?", "const": True} if bool in kinds else {}),
        )  # fmt: skip

    def add_preset(self, method: str) -> None:
        """Add the flag `preset` in a group that lists the presets of a method."""
        self.method = method
        group = self.add_argument_group("presets", "\n".join(preset_lines(method)))
        group.add_argument("--preset", metavar="NAME", help="recommended flags by name; other flags override them")

    def add_without_effect(self, **usual: Any) -> None:
        """Add flags of the public release that do nothing; by name, the value for which the log does not say so."""
        group = self._group(NO_EFFECT)
        for name in usual:
            group.add_argument(f"--{name}", metavar="VALUE", help="has no effect")
        self.without_effect |= usual

    def parse(self, arguments: Sequence[str] | None = None) -> "Given":
        """Parse a command line; a preset's values take the place of defaults. Raises InputError."""
        given = self.parse_args(arguments, Given(self))
        if self.method is not None and given.preset is not None:
            options = preset_options(given.preset, self.method)
            chosen = {self.spelling.get(name, name): value for name, value in options.items()}
            given = self.parse_args(arguments, Given(self, **chosen))
        return given

    def format_help(self) -> str:
        """The help text. --help itself and the flags without effect come last."""
        self._action_groups.sort(key=lambda group: (group is self._optionals) + 2 * (group.title == NO_EFFECT))
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        if unknown := re.match(r"unrecognized arguments: (--[\w-]+)", message):
            close = difflib.get_close_matches(unknown[1], self._option_string_actions, 1)
            message += f"; did you mean {close[0]}?" if close else ""
        raise InputError(f"{message} (see --help)")


class Given(argparse.Namespace):
    """The flags of one command line, as attributes."""

    def __init__(self, parser: Parser, **values: Any) -> None:
        super().__init__(**values)
        self._parser = parser

    def spell(self, field: dataclasses.Field) -> str:
        """The flag of a field."""
        return self._parser.spelling.get(field.name) or flag_of(field)

    def options(self, cls: type, **values: Any) -> Any:
        """An instance of an options class; values: fields by name, in place of flags. Raises InputError."""
        given = {name: getattr(self, flag) for name, flag in self._parser.added.get(cls, {}).items()}
        return cls(**{**given, **values})

    def ignored(self) -> dict[str, str]:
        """Flags without effect that are given, but for their usual values."""
        given = {name: (getattr(self, name), str(usual)) for name, usual in self._parser.without_effect.items()}
        return {name: value for name, (value, usual) in given.items() if value not in (None, usual)}

    def digestible(self) -> dict[str, str]:
        """The flags that the ranks of a run have in common, as texts."""
        return {name: str(value) for name, value in vars(self).items() if name not in ("_parser", "device")}


def read(kinds: tuple[type, ...], text: str) -> Any:
    """A text as a value of the first of these types that it fits."""
    if bool in kinds and text.lower() in (*YES, *NO):
        return text.lower() in YES
    if int in kinds and re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        return int(text)
    if float in kinds:
        with contextlib.suppress(ValueError):
            return float(text)
    if str in kinds:
        return text
    raise argparse.ArgumentTypeError(f"{shown(text)} is not {type_words(kinds)}")


def shown_default(value: Any) -> str:
    """A default as help texts show it: files of the repository from its folder on."""
    return str(value).removeprefix(ROOT + os.sep) or "empty"


def preset_flags(name: str, method: str) -> list[str]:
    """A preset as words of a method's command line. Raises InputError for an unknown name or method."""
    from ..methods import ENERGIES, METHODS  # which load torch

    classes = (*ENERGIES.values(), METHODS.pick(method))
    spelling = {field.name: flag_of(field) for cls in classes for field in dataclasses.fields(cls)}
    words = []
    for option, value in preset_options(name, method).items():
        words += [f"--{spelling.get(option, option)}", f"{value:g}" if isinstance(value, float) else str(value)]
    return words


def preset_lines(method: str) -> list[str]:
    """Presets of a method for help texts: a line that says what for, and one or two of flags."""
    lines = []
    for name, preset in PRESETS.items():
        if method in preset.methods:
            words = " ".join(shown_default(word) for word in preset_flags(name, method)).replace(" --", "\n--")
            pairs = [pair.replace(" ", "\0") for pair in words.splitlines()]  # each stays on one line
            filled = textwrap.wrap(" ".join(pairs), 74, break_long_words=False, break_on_hyphens=False)
            lines += [f"{name:12} {preset.about}", *(f"  {line}".replace("\0", " ") for line in filled)]
    return lines
