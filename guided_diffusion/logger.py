"""Key-value logging with guided-diffusion's interface: rows of numbers as tables, CSV, JSON lines and TensorBoard.

`logkv("loss", x)` notes a value, `dumpkvs()` writes the row. Formats are `stdout`, `log` (log.txt), `csv`
(progress.csv), `json` (progress.json, an object per line) and `tensorboard` (the folder tb); by default those of the
environment variable OPENAI_LOG_FORMAT, in ranks above 0 of OPENAI_LOG_FORMAT_MPI, with "-rankNNN" in the names.
"""

import contextlib
import csv
import datetime
import functools
import io
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TextIO

from .errors import InputError
from .registry import fitting
from .run.files import disk_reason, write_text

DEBUG, INFO, WARN, ERROR, DISABLED = 10, 20, 30, 40, 50


class HumanOutputFormat:
    """Messages and rows as tables, in a file (a path) or on a stream."""

    def __init__(self, filename_or_file: str | TextIO) -> None:
        self.own_file = isinstance(filename_or_file, str)
        self.file: Any = _open(filename_or_file, "a") if isinstance(filename_or_file, str) else filename_or_file

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        texts = {key: f"{value:<8.3g}" if hasattr(value, "__float__") else str(value) for key, value in kvs.items()}
        cells = {_cut(key): _cut(text) for key, text in texts.items()}
        width, value_width = max(map(len, cells)), max(map(len, cells.values()))
        rule = "-" * (width + value_width + 7)
        rows = [f"| {key:<{width}} | {cells[key]:<{value_width}} |" for key in sorted(cells, key=str.lower)]
        self.writeseq(["\n".join([rule, *rows, rule])])

    def writeseq(self, seq: Iterable[str]) -> None:
        self.file.write(" ".join(seq) + "\n")
        self.file.flush()

    def close(self) -> None:
        if self.own_file:
            self.file.close()


class JSONOutputFormat:
    """A row as one JSON object a line."""

    def __init__(self, filename: str) -> None:
        self.file = _open(filename, "a")

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        self.file.write(json.dumps({key: _plain(value) for key, value in kvs.items()}) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class CSVOutputFormat:
    """Rows as CSV. A new name adds a column, empty in the rows above; a resumed run continues its table."""

    def __init__(self, filename: str) -> None:
        self.filename = filename
        with _open(self.filename, "a+") as file:  # a run without rows has a file, too
            file.seek(0)
            self.keys: list[str] = next(csv.reader(file), [])

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        try:
            if new := [key for key in kvs if key not in self.keys]:
                with _open(self.filename, "r") as file:
                    rows = list(csv.reader(file))[1:]
                self.keys += new
                table = io.StringIO()
                csv.writer(table, lineterminator="\n").writerows([self.keys, *(row + [""] * len(new) for row in rows)])
                write_text(self.filename, table.getvalue())
            row = ["" if kvs.get(key) is None else _plain(kvs[key]) for key in self.keys]
            with _open(self.filename, "a") as file:
                csv.writer(file, lineterminator="\n").writerow(row)
        except OSError as error:
            raise InputError(disk_reason(self.filename, error)) from error

    def close(self) -> None:
        """Do nothing: no file is left open."""


class TensorBoardOutputFormat:
    """Numbers as TensorBoard's scalars; the step is the row's number, as in guided-diffusion."""

    def __init__(self, dir: str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            reason = "it needs a package (pip install tensorboard)"
            raise InputError(reason, parameter="format_strs", value="tensorboard") from None
        self.writer, self.step = SummaryWriter(dir), 1

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        for key, value in kvs.items():
            if isinstance(_plain(value), (int, float)):
                self.writer.add_scalar(key, _plain(value), self.step)
        self.writer.flush()
        self.step += 1

    def close(self) -> None:
        self.writer.close()


def _open(path: str, mode: str) -> Any:
    return open(path, mode, encoding="utf-8", errors="backslashreplace", newline="")


def _plain(value: Any) -> Any:
    """Numbers of numpy and torch as Python's; others, unless they are a plain value, as text."""
    if hasattr(value, "dtype"):
        return float(value)
    return value if isinstance(value, (int, float, str)) or value is None else str(value)


def _cut(text: str) -> str:
    return text[:27] + "..." if len(text) > 30 else text


FORMATS: dict[str, Callable[[str, str], Any]] = {
    "stdout": lambda folder, suffix: HumanOutputFormat(sys.stdout),
    "log": lambda folder, suffix: HumanOutputFormat(os.path.join(folder, f"log{suffix}.txt")),
    "json": lambda folder, suffix: JSONOutputFormat(os.path.join(folder, f"progress{suffix}.json")),
    "csv": lambda folder, suffix: CSVOutputFormat(os.path.join(folder, f"progress{suffix}.csv")),
    "tensorboard": lambda folder, suffix: TensorBoardOutputFormat(os.path.join(folder, f"tb{suffix}")),
}


class Logger:
    """Values of the next row, and the formats that rows and messages go to.

    The module's functions use CURRENT; DEFAULT is what `reset` goes back to. comm: an mpi4py communicator over which
    rows are averaged, or None.
    """

    DEFAULT: "Logger | None" = None
    CURRENT: "Logger | None" = None

    def __init__(self, dir: str | None, output_formats: list[Any], comm: Any = None) -> None:
        self.name2val: dict[str, Any] = defaultdict(float)
        self.name2cnt: dict[str, int] = defaultdict(int)
        self.level = INFO
        self.dir = dir
        self.output_formats = output_formats
        self.comm = comm

    def logkv(self, key: str, val: Any) -> None:
        self.name2val[key] = val

    def logkv_mean(self, key: str, val: Any) -> None:
        mean, count = self.name2val[key], self.name2cnt[key]
        self.name2val[key] = mean * count / (count + 1) + val / (count + 1)
        self.name2cnt[key] = count + 1

    def dumpkvs(self) -> dict[str, Any]:
        row = dict(self.name2val)
        if self.comm is not None:
            row = mpi_weighted_mean(self.comm, {name: (row[name], self.name2cnt.get(name, 1)) for name in row})
        for output in self.output_formats if row else ():
            output.writekvs(row)
        self.name2val.clear()
        self.name2cnt.clear()
        return row

    def log(self, *args: Any, level: int = INFO) -> None:
        for output in self.output_formats if self.level <= level else ():
            if isinstance(output, HumanOutputFormat):
                output.writeseq(map(str, args))

    def close(self) -> None:
        for output in self.output_formats:
            output.close()


def mpi_weighted_mean(comm: Any, local_name2valcount: dict[str, tuple[Any, int]]) -> dict[str, float]:
    """Means of {name: (value, count)} over the ranks of an mpi4py communicator, on rank 0; elsewhere nothing."""
    sums, counts = defaultdict(float), defaultdict(float)
    for name, (value, count) in (item for row in comm.gather(local_name2valcount) or () for item in row.items()):
        with contextlib.suppress(TypeError, ValueError):  # a text has no mean
            sums[name] += float(value) * count
            counts[name] += count
    return {name: sums[name] / counts[name] for name in counts}


def configure(
    dir: str | None = None, format_strs: Iterable[str] | None = None, comm: Any = None, log_suffix: str = ""
) -> None:
    """Write to the folder `dir` from now on, by default OPENAI_LOGDIR of the environment or a new temporary folder.

    format_strs: see the module. comm: see `Logger`. Raises InputError for an unknown format, and for a folder that
    cannot be written.
    """
    from .dist_util import ranks

    stamp = datetime.datetime.now().strftime("openai-%Y-%m-%d-%H-%M-%S-%f")
    dir = os.path.expanduser(dir or os.getenv("OPENAI_LOGDIR") or os.path.join(tempfile.gettempdir(), stamp))
    rank = ranks().rank
    if rank:
        log_suffix += f"-rank{rank:03d}"
    if format_strs is None:
        variable, default = ("OPENAI_LOG_FORMAT_MPI", "log") if rank else ("OPENAI_LOG_FORMAT", "stdout,log,csv")
        format_strs = os.getenv(variable, default).split(",")
    names = list(filter(None, format_strs))
    for name in names:
        if name not in FORMATS:
            raise InputError(fitting(name, list(FORMATS)), parameter="format_strs", value=name)
    try:
        os.makedirs(dir, exist_ok=True)
        outputs = [FORMATS[name](dir, log_suffix) for name in names]
    except OSError as error:
        raise InputError(f"it cannot be written: {error.strerror or error}", parameter="dir", value=dir) from None
    Logger.CURRENT = Logger(dir, outputs, comm)
    if outputs:
        log(f"Logging to {dir}")


def get_current() -> Logger:
    """The logger in use; the first call configures one."""
    if Logger.CURRENT is None:
        configure()
        Logger.DEFAULT = Logger.CURRENT
    assert Logger.CURRENT is not None
    return Logger.CURRENT


def reset() -> None:
    """Close the logger in use and go back to the default one."""
    if Logger.CURRENT is not None and Logger.CURRENT is not Logger.DEFAULT:
        Logger.CURRENT.close()
        Logger.CURRENT = Logger.DEFAULT
        log("Reset logger")


@contextlib.contextmanager
def scoped_configure(
    dir: str | None = None, format_strs: Iterable[str] | None = None, comm: Any = None
) -> Iterator[None]:
    """`configure` for the length of a with-block."""
    previous = Logger.CURRENT
    configure(dir, format_strs, comm)
    try:
        yield
    finally:
        get_current().close()
        Logger.CURRENT = previous


def logkv(key: str, val: Any) -> None:
    """Note a value for the next row; of several, the last counts."""
    get_current().logkv(key, val)


def logkv_mean(key: str, val: Any) -> None:
    """Note a value for the next row; of several, the mean counts."""
    get_current().logkv_mean(key, val)


def logkvs(d: Mapping[str, Any]) -> None:
    """Note several values for the next row."""
    for key, value in d.items():
        logkv(key, value)


def dumpkvs() -> dict[str, Any]:
    """Write the row, forget its values and return them."""
    return get_current().dumpkvs()


def getkvs() -> dict[str, Any]:
    """The values of the next row."""
    return get_current().name2val


def log(*args: Any, level: int = INFO) -> None:
    """Write a message, its parts separated by spaces, to the formats for people."""
    get_current().log(*args, level=level)


debug, info, warn, error = (functools.partial(log, level=level) for level in (DEBUG, INFO, WARN, ERROR))


def set_level(level: int) -> None:
    """Leave out messages below a level."""
    get_current().level = level


def get_dir() -> str | None:
    """The folder that is written to."""
    return get_current().dir


record_tabular = logkv
dump_tabular = dumpkvs


@contextlib.contextmanager
def profile_kv(scopename: str) -> Iterator[None]:
    """Add the seconds that a with-block takes to the value `wait_NAME` of the next row."""
    start = time.time()
    try:
        yield
    finally:
        get_current().name2val[f"wait_{scopename}"] += time.time() - start
