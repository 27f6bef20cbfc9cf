"""The benchmark's table: rows of methods, settings and commands, and the sampling scripts that they start."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import InputError, display_name, reading, shown
from ..evaluation.comparison import ROOT, Row, check_folder
from ..methods import EGSDE, ENERGIES
from ..options import check, flag_of, option
from .flags import preset_flags

SCRIPTS = os.path.join(ROOT, "scripts")
FILE_FLAGS = {  # of rows, looked for before anything is sampled
    f"--{flag_of(field)}"
    for options in (*ENERGIES.values(), EGSDE)
    for field in dataclasses.fields(options)
    if field.metadata.get("file")
}
OWN_FLAGS = ("model_path", "base_samples", "save_dir", "seed", "num_samples", "batch_size", "device")
"""Flags of a run that the benchmark gives itself, from its own of the same name."""
LARGEST_TABLE = 1 << 20  # characters
PATIENCE = 30  # seconds that a run has to end in when the benchmark is interrupted


@dataclass(frozen=True)
class Sampling:
    """How rows are sampled."""

    flags: str = option("", "flags for every row, as '--precision bf16'", metavar="TEXT")
    batch_size: int | str = option(8, "images at once, or auto", metavar="N", least=1, most=10**9, runtime=True)
    device: str = option("auto", "auto, cpu, cuda, ...", metavar="NAME", runtime=True)
    processes: int = option(1, "processes per run here", least=1, most=4096, runtime=True)
    launch: str = option("", "what starts each run, as 'srun' or 'mpiexec -n 8'", metavar="TEXT", runtime=True)

    def __post_init__(self) -> None:
        check(self)
        if isinstance(self.batch_size, str) and self.batch_size != "auto":
            raise InputError("it must be a whole number, or auto", parameter="batch_size", value=self.batch_size)
        if self.processes > 1 and self.launch:
            reason = f"it and `launch` {shown(self.launch)} exclude each other"
            raise InputError(reason, parameter="processes", value=self.processes)
        refuse_own_flags(self.words("flags"), "`flags`")
        self.words("launch")

    def words(self, name: str) -> list[str]:
        """A field's text as words of a command line."""
        try:
            return shlex.split(getattr(self, name))
        except ValueError as error:
            raise InputError(f"it cannot be read ({error})", parameter=name, value=getattr(self, name)) from None


def read_table(path: str) -> list[Row]:
    """The rows of the table in a file, or on standard input where the path is "-"."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError("it is not a regular file", parameter="table", value=path)
    with reading("standard input" if path == "-" else path, "a table"):
        if path == "-":
            return parse_table(sys.stdin.read(LARGEST_TABLE + 1))
        with open(path, encoding="utf-8") as file:
            return parse_table(file.read(LARGEST_TABLE + 1), display_name(path))


def parse_table(text: str, source: str = "--table") -> list[Row]:
    """The rows of a table; raises InputError that names the line which cannot be read."""
    rows: list[Row] = []
    folders: set[str] = set()
    if len(text) > LARGEST_TABLE:
        raise InputError(f"{source} is longer than {LARGEST_TABLE} characters")
    for number, line in enumerate(text.splitlines(), 1):
        line = re.sub(r"(^|\s)#.*", "", line).strip()
        if not line:
            continue
        try:
            row = parse_row(line)
            if row.folder.lower() in folders:
                raise InputError(f"a second row with the name {shown(row.name)}")
        except InputError as error:
            raise InputError(f"{source}, line {number}: {error}") from None
        rows.append(row)
        folders.add(row.folder.lower())
    if not rows:
        raise InputError(f"{source}: no row in it")
    return rows


def parse_row(line: str) -> Row:
    """A row from a line "method | setting | script and its flags | published FID | published SSIM"."""
    cells = [cell.strip() for cell in line.split("|")]
    if not 3 <= len(cells) <= 5:
        raise InputError(f"{len(cells)} columns; method | setting | command | FID | SSIM are needed")
    if not line.replace("\t", " ").isprintable():
        raise InputError(f"{shown(line)} has control characters")
    try:
        script, *flags = shlex.split(cells[2]) or [""]
    except ValueError as error:
        raise InputError(f"the command cannot be read ({error})") from None
    # A table is data, and may come from anywhere: it starts nothing but this project's own scripts.
    if not re.fullmatch(r"[a-z0-9_]+_sample\.py", script) or not os.path.isfile(os.path.join(SCRIPTS, script)):
        raise InputError(f"{shown(script)} is no sampling script, such as ae_sample.py")
    refuse_own_flags(flags, "the row")
    flags = expand_preset(script, flags)
    published = (*cells[3:], "", "")
    row = Row(cells[0], cells[1], script, tuple(flags), (published[0], published[1]))
    check_folder(row)
    return row


def expand_preset(script: str, flags: list[str]) -> list[str]:
    """A row's flags with what its preset sets in the preset's place, so that results are known by their values.

    The model is the benchmark's. Flags of the row follow and win.
    """
    joined = [part for flag in flags for part in (flag.split("=", 1) if flag.startswith("--preset=") else [flag])]
    if "--preset" not in joined:
        return flags
    at = joined.index("--preset")
    rest = [*joined[:at], *joined[at + 2 :]]
    method = {"ae": "sddm"}.get(script.removesuffix("_sample.py"), script.removesuffix("_sample.py"))
    words = preset_flags((*joined, "")[at + 1], method)
    kept = [(flag, value) for flag, value in zip(words[::2], words[1::2]) if flag not in ("--model_path", *rest)]
    return [word for pair in kept for word in pair] + rest


def refuse_own_flags(flags: Sequence[str], where: str) -> None:
    """Raise InputError where flags have one that the benchmark gives itself."""
    for flag in flags:
        name = flag.removeprefix("--").split("=")[0] if flag.startswith("--") else None
        if name in OWN_FLAGS:
            raise InputError(f"{where} has --{name}, which the benchmark gives to every row; give it to the benchmark")


def missing_files(rows: Sequence[Row]) -> list[str]:
    """Flags and paths of the rows' files that do not exist."""
    found = []
    for row in rows:
        for flag, value in zip(row.flags, (*row.flags[1:], None)):
            name, _, joined = flag.partition("=")
            path = joined or value
            if name in FILE_FLAGS and path and not os.path.exists(path) and "://" not in path:
                found.append(f"{name} {display_name(path)}")
    return list(dict.fromkeys(found))


class ScriptCommands:
    """Rows as processes of this project's sampling scripts; see `evaluation.comparison.Commands`."""

    def __init__(self, options: Sampling) -> None:
        self.options = options

    def flags(self, row: Row, settings: Mapping[str, Any]) -> list[str]:
        """The flags that determine the row's outputs."""
        number = settings.get("num_samples")
        given = {name: value for name, value in settings.items() if name != "num_samples"}
        flags = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        flags += [*row.flags, *self.options.words("flags")]
        return [*flags, "--num_samples", str(number)] if number else flags

    def command(self, row: Row, settings: Mapping[str, Any]) -> list[str]:
        """The whole command line."""
        options = self.options
        command = [sys.executable, os.path.join(SCRIPTS, row.script), *self.flags(row, settings)]
        command += ["--batch_size", str(options.batch_size), "--device", options.device]
        if options.processes > 1:
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(options.processes)]
            command[1:1] = torchrun
        return [*options.words("launch"), *command]

    def run(self, row: Row, settings: Mapping[str, Any]) -> None:
        """Sample in a process of its own; raises InputError where it ends with an error."""
        command = self.command(row, settings)
        status = run(command)
        if status not in (0, 1):
            name = f"{row.name}, seed {settings['seed']}"
            raise InputError(f"{name}: ended with status {status}: {shlex.join(command)}")

    def text(self, row: Row) -> str:
        """The script and its flags, files of the repository from its folder on."""
        words = [row.script, *row.flags, *self.options.words("flags")]
        return shlex.join(word.removeprefix(ROOT + os.sep) for word in words)


def run(command: Sequence[str]) -> int:
    """Run a command whose messages go to this process's stderr; it ends with this one."""
    try:
        process = subprocess.Popen(command, stdout=sys.stderr, stdin=subprocess.DEVNULL)
    except (OSError, ValueError) as error:
        raise InputError(f"{shown(command[0])} cannot be started: {error}") from None
    try:
        return process.wait()
    except BaseException:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise
