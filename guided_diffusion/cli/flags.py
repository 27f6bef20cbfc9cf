"""Options as flags: the one parser of all commands, and the spelling of Python parameters on the command line."""

import argparse
import dataclasses
import difflib
import os
import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from ..errors import InputError, shown
from ..options import check, field_types, flag_of, flags_of
from ..presets import PRESETS, ROOT, preset_options

METAVARS = {bool: "BOOL", int: "N", float: "X", str: "TEXT"}
NO_EFFECT = "flags of the public release that have no effect"
PRESET_HELP = "recommended flags by name; flags that are given win"


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Flags in two columns, paragraphs filled to the terminal's width, and examples as they are written."""

    def __init__(self, prog: str, **options: Any) -> None:
        width = max(60, min(shutil.get_terminal_size().columns - 2, 118))
        super().__init__(prog, **{"width": width, "max_help_position": 34 if width > 98 else 26, **options})

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = []
        for paragraph in text.split("\n\n"):
            written = re.search(r"^ |^\w+: +python |\\$", paragraph, re.MULTILINE)
            filled = paragraph if written else textwrap.fill(" ".join(paragraph.split()), width - len(indent))
            paragraphs.append(textwrap.indent(filled, indent))
        return "\n\n".join(paragraphs)


class Parser(argparse.ArgumentParser):
    """A parser whose flags come from options dataclasses. Errors are InputErrors; flags cannot be abbreviated."""

    def __init__(self, description: str, *, usage: str = "[flags]", spelling: dict[str, str] | None = None) -> None:
        super().__init__(
            description=textwrap.dedent(description).strip(),
            usage=f"python scripts/%(prog)s {usage}",
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        self._renamed = spelling or {}  # of this command alone, by field name
        self.spelling: dict[str, str] = dict(self._renamed)  # flags by field name
        self.owners: dict[str, list[type]] = {}  # flag -> the options classes that have it
        self.fields: dict[str, dataclasses.Field] = {}
        self.without_effect: dict[str, Any] = {}  # flag -> the value that is not reported
        self.method: str | None = None  # whose options presets set

    def spell(self, parameter: str) -> str:
        """The flag of a Python parameter."""
        return "--" + self.spelling.get(parameter, parameter)

    def add(
        self,
        *classes: type,
        title: str,
        description: str | None = None,
        only: Sequence[str] | None = None,
        without: Iterable[str] = (),
        defaults: dict[str, Any] | None = None,
    ) -> None:
        """A group with a flag for every field of options dataclasses; a flag that several classes share is one flag.

        only: the fields that become flags, in this order; the others can be added to another group. without: fields
        that are no flags here. defaults: defaults by field name, in place of the fields' own.
        """
        group = self._group(title, description)
        found = [(field, cls) for cls in classes for field in dataclasses.fields(cls) if field.name not in without]
        if only is not None:
            found = [each for name in only for each in found if each[0].name == name]
        for field, cls in found:
            flag = self.spelling[field.name] = self._renamed.get(field.name) or flag_of(field)
            owners = self.owners.setdefault(flag, [])
            if cls not in owners:
                owners.append(cls)
            if flag not in self.fields:
                self.fields[flag] = field
                self._add_flag(group, flag, field, (defaults or {}).get(field.name, field.default))
            elif self.fields[flag].default != field.default and field.name not in (defaults or {}):
                raise TypeError(f"--{flag} has two defaults, {self.fields[flag].default!r} and {field.default!r}")

    def _group(self, title: str, description: str | None = None) -> Any:
        """The group of that title, made where it is missing."""
        known = (group for group in self._action_groups if group.title == title)
        return next(known, None) or self.add_argument_group(title, description)

    def add_preset(self, method: str, title: str = "presets") -> None:
        """The flag `preset` in a group of its own, whose description lists the presets of a method."""
        self.method = method
        group = self.add_argument_group(title, "\n".join(preset_lines(method)))
        group.add_argument("--preset", metavar="NAME", help=PRESET_HELP)

    def _add_flag(self, group: Any, flag: str, field: dataclasses.Field, default: Any) -> None:
        kinds, meta = field_types(field), field.metadata
        choices = meta.get("choices")
        listed = f"{{{','.join(map(str, choices))}}}" if choices else None
        metavar = meta.get("metavar") or listed or METAVARS.get(kinds[0], "TEXT")
        text = re.sub(r"`(\w+)`", lambda match: self.spell(match[1]), meta.get("help", ""))
        if default is not None:
            text = re.sub(r" ?\(default [^)]*\)$", "", text)  # of the field, where the command has another
            text = f"{text} (default {shown_default(default)})".strip()
        optional: dict[str, Any] = {"nargs": "?", "const": True} if bool in kinds else {}
        group.add_argument(
            f"--{flag}", type=_reader(kinds), default=default, metavar=metavar, help=text.replace("%", "%%"), **optional
        )

    def add_without_effect(self, **usual: Any) -> None:
        """Flags of the public release that are accepted and do nothing; by name the value that is not reported."""
        group = self._group(NO_EFFECT)
        for name in usual:
            group.add_argument(f"--{name}", metavar="VALUE", help="has no effect")
        self.without_effect |= usual

    def parse(self, arguments: Sequence[str] | None = None) -> "Given":
        """The flags of a command line; raises InputError for those that cannot be read.

        A preset's values take the place of defaults: flags that are given win.
        """
        values = self.parse_args(arguments)
        if self.method is not None and values.preset is not None:
            options = preset_options(values.preset, self.method)
            chosen = {self.spelling.get(name, name): value for name, value in options.items()}
            values = self.parse_args(arguments, argparse.Namespace(**chosen))
        return Given(self, values)

    def format_help(self) -> str:
        """The help text. --help itself and the flags without effect come last."""
        self._action_groups.sort(key=lambda group: (group is self._optionals) + 2 * (group.title == NO_EFFECT))
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            close = difflib.get_close_matches(unknown[1], known, 1)
            message += f"; did you mean {close[0]}?" if close else ""
        raise InputError(f"{message} (see --help)")


class Given:
    """The flags of one command line, by name."""

    def __init__(self, parser: Parser, values: argparse.Namespace) -> None:
        self._parser, self._values = parser, vars(values)

    def __getattr__(self, flag: str) -> Any:
        try:
            return self.__dict__["_values"][flag]
        except KeyError:
            raise AttributeError(flag) from None

    def values(self, cls: type) -> dict[str, Any]:
        """The values of an options class's fields that are flags here, by field name."""
        spelling = self._parser.spelling
        named = {field.name: spelling.get(field.name, "") for field in dataclasses.fields(cls)}
        return {
            name: self._values[flag] for name, flag in named.items() if cls in self._parser.owners.get(str(flag), ())
        }

    def options(self, cls: type, **values: Any) -> Any:
        """An instance of an options class; values: fields by name, in place of flags. Raises InputError."""
        options = cls(**{**self.values(cls), **values})
        check(options)
        return options

    def ignored(self) -> dict[str, str]:
        """Flags without effect that are given with another value than the usual, with that value."""
        given = {name: self._values[name] for name in self._parser.without_effect}
        usual = self._parser.without_effect
        return {name: value for name, value in given.items() if value is not None and value != str(usual[name])}

    def digestible(self) -> dict[str, Any]:
        """The flags as texts, but for those that may differ between the ranks of a run."""
        return {name: str(value) for name, value in sorted(self._values.items()) if name != "device"}

    def settings(self, used: Iterable[Any], **found: Any) -> dict[str, Any]:
        """All that determines the outputs, for run.json, by the names of flags.

        used: the options that count. Files stand with their hashes; what is None, says how to run, or has no effect (by
        the options' method `ignored`) is left out. found: values that were read from files or resolved, by flag.
        """
        from ..checkpoint import fingerprint

        settings: dict[str, Any] = {}
        for options in used:
            left_out = options.ignored() if hasattr(options, "ignored") else ()
            for field in dataclasses.fields(options):
                value = getattr(options, field.name)
                if field.name in left_out or field.metadata.get("runtime"):
                    continue
                if field.metadata.get("file") and value is not None:
                    value = fingerprint(value)
                settings[self._parser.spelling.get(field.name) or flag_of(field)] = value
        settings |= found
        return {name: value for name, value in settings.items() if value is not None}


def _reader(kinds: tuple[type, ...]) -> Any:
    """A function for argparse that reads a value of one of these types."""
    if bool in kinds:
        return read_bool
    numbers = [kind for kind in (int, float) if kind in kinds]

    def read(text: str) -> Any:
        for kind in numbers:
            try:
                return read_int(text) if kind is int else read_float(text)
            except argparse.ArgumentTypeError:
                if kind is numbers[-1] and str not in kinds:
                    raise
        return text

    return read


def read_bool(text: str) -> bool:
    """True or False, in the spellings that guided-diffusion takes."""
    lowered = text.lower()
    if lowered in ("yes", "true", "t", "y", "1"):
        return True
    if lowered in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{shown(text)} is neither True nor False")


def read_int(text: str) -> int:
    """A whole number of up to 18 digits."""
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", text):
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number")
    return int(text)


def read_float(text: str) -> float:
    """A number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a number") from None


def shown_default(value: Any) -> str:
    """A default as help texts show it: files of the repository from its folder on."""
    text = str(value).removeprefix(ROOT + os.sep)
    return text if text else "empty"


def preset_flags(name: str, method: str) -> list[str]:
    """A preset as words of a method's command line. Raises InputError for an unknown name or method."""
    from ..methods import ENERGIES, METHODS  # which load torch

    spelling = flags_of(*ENERGIES.values(), METHODS.pick(method))
    words = []
    for option, value in preset_options(name, method).items():
        text = f"{value:g}" if isinstance(value, float) else str(value)
        words += [f"--{spelling.get(option, option)}", text]
    return words


def preset_lines(method: str) -> list[str]:
    """Presets of a method for help texts: a line that says what for, and one or two of flags."""
    lines = []
    for name, preset in PRESETS.items():
        if method in preset.methods:
            words = [word.removeprefix(ROOT + os.sep) for word in preset_flags(name, method)]
            pairs = [f"{flag} {value}" for flag, value in zip(words[::2], words[1::2])]
            filled = textwrap.wrap(
                " ".join(pair.replace(" ", "\0") for pair in pairs), 74, break_long_words=False, break_on_hyphens=False
            )
            lines += [f"{name:12} {preset.about}", *("  " + line.replace("\0", " ") for line in filled)]
    return lines
