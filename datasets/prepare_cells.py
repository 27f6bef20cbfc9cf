"""Make the cells set: electroluminescence photographs of solar cells, functional (target) and defective (source).

    python datasets/prepare_cells.py --size 64 --out data/cells [--wheel FILE]

The photographs come from the PyPI package elpv-dataset (91 MB), which pip downloads; none of its code runs. Written are
grey PNG files `<out>/{train,test}/{functional,defective}/cellNNNN.png` and `<out>/manifest.json`. Cells whose defect
probability is neither 0 nor 1 are left out.

Cells of one module look alike, so that a random split would put near-copies on both sides. A group is a connected
component of cells whose thumbnails (16x16 box means, standardised) correlate above 0.98, doubtful cells included.
Groups in the order of sha256(first name) are held out until they hold 30 % of all cells.

The photographs are under CC BY-NC-SA 4.0 (Buerhop-Lutz et al. 2018, Deitsch et al. 2019 and 2021).
"""

import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # found from any working directory
from guided_diffusion.cli import main as command

command.start()

import numpy as np
from PIL import Image

from guided_diffusion.cli.flags import Given, Parser
from guided_diffusion.errors import InputError, one_line, reading
from guided_diffusion.options import check, option
from guided_diffusion.run.files import read_json_or_none, write_json

PACKAGE = "elpv-dataset==1.0.0.post1"
DATA = "elpv_dataset/data/"
CLASSES = {"0.0": "functional", "1.0": "defective"}
THUMBNAIL, SIMILAR, HELD_OUT = 16, 0.98, 0.3
MANIFEST = "manifest.json"


def download(folder: str) -> str:
    """Download the package's wheel with pip into a folder; return its path."""
    call = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "-d", folder, PACKAGE]
    completed = subprocess.run(call, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    wheels = [name for name in os.listdir(folder) if name.endswith(".whl")]
    if completed.returncode or not wheels:
        reason = one_line(completed.stderr.strip().rpartition("\n")[2]) or f"status {completed.returncode}"
        raise InputError(f"pip could not download {PACKAGE} ({reason}); give a downloaded wheel as `wheel`")
    return os.path.join(folder, wheels[0])


def read_wheel(path: str) -> dict[str, tuple[str, bytes]]:
    """{name of a cell: (defect probability, encoded photograph)} of the wheel. Raises InputError."""
    with reading(path, f"the wheel of {PACKAGE}"), zipfile.ZipFile(path) as archive:
        rows = [line.split() for line in archive.read(f"{DATA}labels.csv").decode().splitlines()]
        return {Path(row[0]).stem: (row[1], archive.read(DATA + row[0])) for row in rows}


def groups(photographs: list[Image.Image]) -> np.ndarray:
    """Number of each photograph's group of near-duplicates, [N]."""
    side = (THUMBNAIL, THUMBNAIL)
    thumbnails = np.stack([np.asarray(p.resize(side, Image.Resampling.BOX), np.float64) for p in photographs])
    x = thumbnails.reshape(len(photographs), -1)
    x = x - x.mean(1, keepdims=True)
    x /= np.linalg.norm(x, axis=1, keepdims=True) + 1e-12
    similar, numbers = x @ x.T > SIMILAR, np.full(len(x), -1)
    for first in range(len(x)):
        front = np.array([first]) if numbers[first] < 0 else np.array([], int)
        while len(front):
            numbers[front] = first
            front = np.flatnonzero(similar[front].any(0) & (numbers < 0))
    return numbers


def held_out(names: list[str], numbers: np.ndarray) -> set[str]:
    """Names of the test split: whole groups, in the order of a hash of their first names."""
    first = {number: hashlib.sha256(names[number].encode()).hexdigest() for number in set(numbers.tolist())}
    test: set[str] = set()
    for number in sorted(first, key=first.__getitem__):
        if len(test) >= HELD_OUT * len(names):
            break
        test |= {names[i] for i in np.flatnonzero(numbers == number)}
    return test


def write_set(cells: dict[str, tuple[str, bytes]], options: "Options", folder: Path) -> dict[str, int]:
    """Write the set into the empty folder; return the number of pictures by subfolder."""
    names = list(cells)
    with reading(PACKAGE, "set of photographs"):
        photographs = [Image.open(io.BytesIO(data), formats=("PNG",)).convert("L") for _, data in cells.values()]
    test, files = held_out(names, groups(photographs)), {}
    for name, photograph in zip(names, photographs):
        if label := CLASSES.get(cells[name][0]):
            path = f"{'test' if name in test else 'train'}/{label}/{name}.png"
            picture = photograph.resize((options.size, options.size), Image.Resampling.LANCZOS)
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            picture.save(folder / path)
            files[path] = hashlib.sha256(picture.tobytes()).hexdigest()
    counts = dict(sorted(Counter(os.path.dirname(path) for path in files).items()))
    manifest = {"settings": options.settings(), "counts": counts, "pixels_sha256": files}
    write_json(folder / MANIFEST, manifest)
    return counts


@dataclass(frozen=True)
class Options:
    """The set to make."""

    size: int = option(64, "side of the pictures in pixels", least=8, most=300)
    out: str = option("data/cells", "folder of the set", metavar="DIR")
    wheel: str | None = option(None, f"the wheel of {PACKAGE}; without it pip downloads it", metavar="FILE")

    def __post_init__(self) -> None:
        check(self)

    def settings(self) -> dict[str, object]:
        """Settings that decide every pixel and the split."""
        rule = {"thumbnail": THUMBNAIL, "similar": SIMILAR, "held_out": HELD_OUT}
        return {"format": 1, "package": PACKAGE, "size": self.size, **rule}


def present(options: Options) -> dict[str, int] | None:
    """Counts of the complete set at `out`; None where there is nothing. Raises InputError for anything else there."""
    out = Path(options.out)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    manifest = read_json_or_none(out / MANIFEST)
    same = isinstance(manifest, dict) and manifest.get("settings") == options.settings()
    if same and all((out / path).is_file() for path in manifest["pixels_sha256"]):
        return manifest["counts"]
    raise InputError("it holds something else; name a folder that is new or empty", parameter="out", value=options.out)


def prepare(options: Options) -> tuple[dict[str, int], bool]:
    """Make the set, or recognise that it is there: (pictures by subfolder, whether it was written now)."""
    counts = present(options)
    if counts is not None:
        return counts, False
    out = Path(os.path.realpath(options.out))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Beside `out`, hence on its file system: the last step is a rename.
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as work:
            if options.wheel is None:
                command.say(f"downloading {PACKAGE}", sys.stdout)
            cells = read_wheel(options.wheel or download(work))
            new = Path(work) / "new"
            new.mkdir()
            counts = write_set(cells, options, new)
            if out.exists():
                out.rmdir()
            new.rename(out)
    except OSError as error:
        reason = f"cannot be written: {error.strerror or error}"
        raise InputError(reason, parameter="out", value=options.out) from error
    return counts, True


def create_parser() -> Parser:
    parser = Parser("Make the cells set: photographs of functional and defective solar cells.")
    parser.usage = "python datasets/%(prog)s [flags]"
    parser.add(Options, title="the set")
    return parser


def main(given: Given) -> None:
    options = given.options(Options)
    counts, written = prepare(options)
    lines = [f"{options.out}: {'written' if written else 'already present with these settings, left alone'}"]
    command.say("\n".join([*lines, *(f"  {folder}: {number}" for folder, number in counts.items())]), sys.stdout)


if __name__ == "__main__":
    command.run(main, create_parser(), ranks="none")
