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
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE]  # found from any working directory
from guided_diffusion.cli import main as command

command.start()

import numpy as np
from PIL import Image
from prepared import fetch, prepare, report

from guided_diffusion.cli.flags import Given, Parser
from guided_diffusion.errors import reading
from guided_diffusion.options import Checked, option

PACKAGE = "elpv-dataset==1.0.0.post1"
DATA = "elpv_dataset/data/"
CLASSES = {"0.0": "functional", "1.0": "defective"}
THUMBNAIL, SIMILAR, HELD_OUT = 16, 0.98, 0.3


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


def write_set(cells: dict[str, tuple[str, bytes]], size: int, folder: Path) -> dict[str, object]:
    """Write the set into the empty folder; return its manifest."""
    with reading(PACKAGE, "set of photographs"):
        photographs = [Image.open(io.BytesIO(data), formats=("PNG",)).convert("L") for _, data in cells.values()]
    test, files = held_out(list(cells), groups(photographs)), {}
    for name, photograph in zip(cells, photographs):
        if label := CLASSES.get(cells[name][0]):
            path = f"{'test' if name in test else 'train'}/{label}/{name}.png"
            picture = photograph.resize((size, size), Image.Resampling.LANCZOS)
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            picture.save(folder / path)
            files[path] = hashlib.sha256(picture.tobytes()).hexdigest()
    return {"pixels_sha256": files}


@dataclass(frozen=True)
class Options(Checked):
    """The set to make."""

    size: int = option(64, "side of the pictures in pixels", least=8, most=300)
    out: str = option("data/cells", "folder of the set", metavar="DIR")
    overwrite: bool = option(False, "replace another cells set in the folder")
    wheel: str | None = option(None, f"the wheel of {PACKAGE}; without it pip downloads it", metavar="FILE")

    def settings(self) -> dict[str, object]:
        """Settings that decide every pixel and the split."""
        rule = {"thumbnail": THUMBNAIL, "similar": SIMILAR, "held_out": HELD_OUT}
        return {"format": 1, "package": PACKAGE, "size": self.size, **rule}


def create_parser() -> Parser:
    parser = Parser("Make the cells set: photographs of functional and defective solar cells.")
    parser.usage = "python datasets/%(prog)s [flags]"
    parser.add(Options, title="the set")
    return parser


def main(given: Given) -> None:
    options = given.options(Options)
    call = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", PACKAGE, "-d"]

    def write(folder: Path, work: Path) -> dict:
        advice = "give a downloaded wheel as `wheel`"
        wheel = options.wheel or fetch(PACKAGE, [*call, str(work)], work, "*.whl", advice)
        return write_set(read_wheel(str(wheel)), options.size, folder)

    report(options.out, *prepare(options.out, options.settings(), write, ("train", "test"), options.overwrite))


if __name__ == "__main__":
    command.run(main, create_parser(), ranks="none")
