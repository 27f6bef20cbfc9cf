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
import itertools
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .dist_util import ranks
from .errors import InputError, check_choice, library
from .run.files import write_text, writing

DEBUG, INFO, WARN, ERROR = 10, 20, 30, 40


@dataclass
class Logger:
    """The values of the next row, and the functions that write rows and messages. CURRENT: the one in use."""

    dir: str
    write_row: list[Callable[[Mapping[str, Any]], None]] = field(default_factory=list)
    write_text: list[Callable[[str], None]] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    CURRENT: ClassVar["Logger | None"] = None


class CSVOutputFormat:
    """Rows as CSV. A new name adds a column, empty in the rows above; a resumed run continues its table."""

    def __init__(self, filename: str) -> None:
        self.filename = filename
        with _open(filename, "a+") as file:  # a run without rows has a file, too
            file.seek(0)
            self.keys: list[str] = next(csv.reader(file), [])

    def writekvs(self, kvs: Mapping[str, Any]) -> None:
        """Add a row; raises InputError where the file cannot be written."""
        new = [key for key in kvs if key not in self.keys]
        with writing(self.filename):
            if new:
                with _open(self.filename, "r") as file:
                    rows = list(csv.reader(file))[1:]
                self.keys += new
                table = io.StringIO()
                csv.writer(table, lineterminator="\n").writerows([self.keys, *(row + [""] * len(new) for row in rows)])
                write_text(self.filename, table.getvalue())
            row = ["" if kvs.get(key) is None else _plain(kvs[key]) for key in self.keys]
            with _open(self.filename, "a") as file:
                csv.writer(file, lineterminator="\n").writerow(row)


def tensorboard(folder: str, **options: Any) -> Callable[..., None]:
    """A function of (row, step) that writes a row's numbers for TensorBoard; step: by default the row's number.

    options: of `SummaryWriter`. Raises InputError where the package is missing.
    """
    writer = library("torch.utils.tensorboard", "tensorboard", "TensorBoard's log").SummaryWriter(folder, **options)
    steps = itertools.count(1)

    def write(row: Mapping[str, Any], step: int | None = None) -> None:
        step = next(steps) if step is None else step
        for key, value in row.items():
            if isinstance(_plain(value), (int, float)):
                writer.add_scalar(key, _plain(value), step)
        writer.flush()

    return write


def _open(path: str, mode: str) -> Any:
    return open(path, mode, encoding="utf-8", errors="backslashreplace", newline="")


def _append(path: str, line: str) -> None:
    with _open(path, "a") as file:
        file.write(line + "\n")


def _table(row: Mapping[str, Any]) -> str:
    texts = {key: f"{value:<8.3g}" if hasattr(value, "__float__") else str(value) for key, value in row.items()}
    cells = {_cut(key): _cut(text) for key, text in texts.items()}
    width, value_width = max(map(len, cells)), max(map(len, cells.values()))
    rule = "-" * (width + value_width + 7)
    rows = [f"| {key:<{width}} | {cells[key]:<{value_width}} |" for key in sorted(cells, key=str.lower)]
    return "\n".join([rule, *rows, rule])


def _cut(text: str) -> str:
    return text[:27] + "..." if len(text) > 30 else text


def _plain(value: Any) -> Any:
    """Numbers of numpy and torch as Python's; others, unless they are a plain value, as text."""
    if hasattr(value, "dtype"):
        return float(value)
    return value if isinstance(value, (int, float, str)) or value is None else str(value)


def configure(dir: str | None = None, format_strs: Iterable[str] | None = None) -> None:
    """Write to the folder `dir` from now on, by default OPENAI_LOGDIR of the environment or a new temporary folder.

    format_strs: see the module. Raises InputError for an unknown format, and for a folder that cannot be written.
    """
    stamp = datetime.datetime.now().strftime("openai-%Y-%m-%d-%H-%M-%S-%f")
    dir = os.path.expanduser(dir or os.getenv("OPENAI_LOGDIR") or os.path.join(tempfile.gettempdir(), stamp))
    rank = ranks().rank
    if format_strs is None:
        variable, default = ("OPENAI_LOG_FORMAT_MPI", "log") if rank else ("OPENAI_LOG_FORMAT", "stdout,log,csv")
        format_strs = os.getenv(variable, default).split(",")
    end = f"-rank{rank:03d}" if rank else ""
    text, lines, table, folder = (
        os.path.join(dir, name) for name in (f"log{end}.txt", f"progress{end}.json", f"progress{end}.csv", f"tb{end}")
    )
    texts = {"stdout": functools.partial(print, flush=True), "log": functools.partial(_append, text)}
    rows = {
        "json": lambda: lambda row: _append(lines, json.dumps({key: _plain(row[key]) for key in row})),
        "csv": lambda: CSVOutputFormat(table).writekvs,
        "tensorboard": lambda: tensorboard(folder),
    }
    names = list(filter(None, format_strs))
    for name in names:
        check_choice("format_strs", name, [*texts, *rows])
    try:
        os.makedirs(dir, exist_ok=True)
        logger = Logger(dir, [rows[name]() for name in names if name in rows], [texts[n] for n in names if n in texts])
        for write in logger.write_text:
            write(f"Logging to {dir}")
    except OSError as error:
        raise InputError(f"it cannot be written: {error.strerror or error}", parameter="dir", value=dir) from None
    Logger.CURRENT = logger


@contextlib.contextmanager
def scoped_configure(dir: str | None = None, format_strs: Iterable[str] | None = None) -> Iterator[None]:
    """`configure` for the length of a with-block."""
    previous = Logger.CURRENT
    configure(dir, format_strs)
    try:
        yield
    finally:
        Logger.CURRENT = previous


def get_current() -> Logger:
    """The logger in use; the first call configures one."""
    if Logger.CURRENT is None:
        configure()
    assert Logger.CURRENT is not None
    return Logger.CURRENT


def logkv(key: str, val: Any) -> None:
    """Note a value for the next row; of several, the last counts."""
    get_current().values[key] = val


def logkv_mean(key: str, val: Any) -> None:
    """Note a value for the next row; of several, the mean counts."""
    logger = get_current()
    mean, count = logger.values.get(key, 0.0), logger.counts[key]
    logger.values[key] = mean * count / (count + 1) + val / (count + 1)
    logger.counts[key] += 1


def logkvs(d: Mapping[str, Any]) -> None:
    """Note several values for the next row."""
    get_current().values.update(d)


@contextlib.contextmanager
def profile_kv(scopename: str) -> Iterator[None]:
    """Add the seconds that a with-block takes to the value `wait_NAME` of the next row."""
    start = time.time()
    try:
        yield
    finally:
        values = get_current().values
        values[f"wait_{scopename}"] = values.get(f"wait_{scopename}", 0.0) + time.time() - start


def dumpkvs() -> dict[str, Any]:
    """Write the row, forget its values and return them."""
    logger = get_current()
    row, logger.values, logger.counts = logger.values, {}, Counter()
    if row:
        for write in logger.write_row:
            write(row)
        for write in logger.write_text:
            write(_table(row))
    return row


def getkvs() -> dict[str, Any]:
    """The values of the next row."""
    return get_current().values


def log(*args: Any, level: int = INFO) -> None:
    """Write a message of a level from INFO on, its parts separated by spaces, to stdout and log.txt."""
    for write in get_current().write_text if level >= INFO else ():
        write(" ".join(map(str, args)))


debug, info, warn, error = (functools.partial(log, level=level) for level in (DEBUG, INFO, WARN, ERROR))


def get_dir() -> str:
    """The folder that is written to."""
    return get_current().dir
