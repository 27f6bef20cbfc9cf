"""The benchmark's table: rows of methods, settings and commands of this project's sampling scripts."""

import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from guided_diffusion.cli.flags import preset_flags
from guided_diffusion.errors import InputError, display_name, reading, shown
from guided_diffusion.presets import ROOT

SCRIPTS = os.path.join(ROOT, "scripts")
OWN_FLAGS = ("model_path", "base_samples", "save_dir", "seed", "num_samples", "batch_size", "device")
"""Flags of a run that the benchmark sets itself, from its own of the same name."""


@dataclass(frozen=True)
class Row:
    """One line of the table; published: FID and SSIM as printed, "" where there is none."""

    method: str
    setting: str
    script: str
    flags: tuple[str, ...]
    published: tuple[str, str]

    @property
    def name(self) -> str:
        """Method and setting."""
        return f"{self.method}, {self.setting}" if self.setting else self.method

    @property
    def folder(self) -> str:
        """Name of the row's folder in the save folder."""
        return re.sub(r"[^\w.=+-]+", "_", self.name).strip("_")


def read_table(path: str) -> list[Row]:
    """The rows of the table in a file, or on standard input where the path is "-"."""
    if path == "-":
        with reading("standard input", "a table"):
            return parse_table(sys.stdin.read())
    with reading(path, "a table"), open(path, encoding="utf-8") as file:
        return parse_table(file.read(), display_name(path))


def parse_table(text: str, source: str = "--table") -> list[Row]:
    """The rows of a table; raises InputError that names the line which cannot be read."""
    rows: dict[str, Row] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = re.sub(r"(^|\s)#.*", "", line).strip()
        if not line:
            continue
        try:
            row = parse_row(line)
            if rows.setdefault(row.folder.lower(), row) is not row:
                raise InputError(f"a second row with the name {shown(row.name)}")
        except InputError as error:
            raise InputError(f"{source}, line {number}: {error}") from None
    if not rows:
        raise InputError(f"{source}: no row in it")
    return list(rows.values())


def parse_row(line: str) -> Row:
    """A row from a line "method | setting | script and its flags | published FID | published SSIM"."""
    cells = [cell.strip() for cell in line.split("|")]
    if not 3 <= len(cells) <= 5:
        raise InputError(f"{len(cells)} columns; method | setting | command | FID | SSIM are needed")
    if not line.replace("\t", " ").isprintable():
        raise InputError(f"{shown(line)} has control characters")
    try:
        script, *flags = shlex.split(cells[2].replace("--preset=", "--preset ")) or [""]
    except ValueError as error:
        raise InputError(f"the command cannot be read ({error})") from None
    # A table is data, and may come from anywhere: it starts nothing but this project's own scripts.
    if not re.fullmatch(r"[a-z0-9_]+_sample\.py", script) or not os.path.isfile(os.path.join(SCRIPTS, script)):
        raise InputError(f"{shown(script)} is no sampling script, such as ae_sample.py")
    refuse_own_flags(flags, "the row")
    published = (*cells[3:], "", "")
    row = Row(cells[0], cells[1], script, tuple(expand_preset(script, flags)), (published[0], published[1]))
    if not row.folder.strip("."):
        raise InputError(f"a row cannot be called {shown(row.name)}: its outputs would have no folder of their own")
    return row


def expand_preset(script: str, flags: list[str]) -> list[str]:
    """A row's flags with what its preset sets in the preset's place, so that results are known by their values.

    The model is the benchmark's. Flags of the row follow and win.
    """
    if "--preset" not in flags:
        return flags
    at, script = flags.index("--preset"), script.removesuffix("_sample.py")
    name, rest = (*flags, "")[at + 1], flags[:at] + flags[at + 2 :]
    words = preset_flags(name, {"ae": "sddm"}.get(script, script))
    pairs = [pair for pair in zip(words[::2], words[1::2]) if pair[0] not in ("--model_path", *rest)]
    return [word for pair in pairs for word in pair] + rest


def refuse_own_flags(flags: Sequence[str], where: str) -> None:
    """Raise InputError where flags have one that the benchmark sets itself."""
    for flag in flags:
        name = flag.removeprefix("--").split("=")[0]
        if flag.startswith("--") and name in OWN_FLAGS:
            raise InputError(f"{where} has --{name}, which the benchmark sets itself")
