"""The cells set (datasets/prepare_cells.py) and its benchmark, on a small wheel of drawn cells."""

import importlib.util
import io
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def cells():
    spec = importlib.util.spec_from_file_location("cells", ROOT / "benchmarks" / "cells" / "cells.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """40 cells of 10 modules: those of a module are near-copies; labels 0, 1 and in between."""
    rng = np.random.default_rng(0)
    modules = rng.integers(40, 200, (10, 6, 6)).astype(np.uint8)
    path = tmp_path_factory.mktemp("wheel") / "elpv_dataset-1.whl"
    with zipfile.ZipFile(path, "w") as archive:
        lines = []
        for k in range(40):
            array = np.asarray(Image.fromarray(modules[k % 10]).resize((300, 300)))
            array = np.clip(array + rng.normal(0, 3, array.shape), 0, 255).astype(np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(array).save(buffer, "PNG")
            archive.writestr(f"elpv_dataset/data/images/cell{k:04d}.png", buffer.getvalue())
            label = ("0.0", "1.0", "0.3333333333333333", "0.0")[k // 10]
            lines.append(f"images/cell{k:04d}.png  {label}  mono")
        archive.writestr("elpv_dataset/data/labels.csv", "\n".join(lines) + "\n")
    return path


def prepare(*flags):
    command = [sys.executable, str(ROOT / "datasets" / "prepare_cells.py"), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True)


def test_near_copies_stay_on_one_side_and_doubtful_cells_are_left_out(wheel, tmp_path):
    done = prepare("--wheel", wheel, "--out", tmp_path / "set", "--size", 32)
    assert done.returncode == 0, done.stderr
    files = sorted(path.relative_to(tmp_path / "set").as_posix() for path in (tmp_path / "set").rglob("*.png"))
    side = {int(name[-8:-4]): name.split("/")[0] for name in files}
    label = {int(name[-8:-4]): name.split("/")[1] for name in files}
    assert sorted(side) == [*range(20), *range(30, 40)]
    assert all(label[k] == ("defective" if 10 <= k < 20 else "functional") for k in label)
    assert all(side[k] == side[k % 10] for k in side)
    assert {"train", "test"} == set(side.values()) and 9 <= sum(s == "test" for s in side.values()) <= 12
    picture = Image.open(tmp_path / "set" / files[0])
    assert (picture.mode, picture.size) == ("L", (32, 32))
    again = prepare("--out", tmp_path / "set", "--size", 32)
    assert again.returncode == 0 and "already present" in again.stdout
    other = prepare("--wheel", wheel, "--out", tmp_path / "set", "--size", 64)
    assert other.returncode == 2 and "--out is" in other.stderr


def test_a_wheel_that_is_none_is_one_line_and_nothing_is_left(wheel, tmp_path):
    (tmp_path / "none.whl").write_bytes(b"no archive")
    cut = tmp_path / "cut.whl"
    with zipfile.ZipFile(cut, "w") as archive:
        archive.writestr("elpv_dataset/data/labels.csv", "images/cell0001.png 0.0 mono\n")
    for name in ("none.whl", "cut.whl", "missing.whl"):
        done = prepare("--wheel", tmp_path / name, "--out", tmp_path / "set")
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and name in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.whl", "none.whl"]


def test_auroc_is_the_share_of_ordered_pairs(cells):
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 8, 30).astype(float), rng.integers(0, 6, 20).astype(float)
    pairs = [(x > y) + (x == y) / 2 for x in a for y in b]
    assert cells.auroc(a, b) == pytest.approx(np.mean(pairs))
    low, high = cells.auroc_interval(a, b)
    assert low < cells.auroc(a, b) < high
    assert cells.auroc_interval(b + 10, a) == (1, 1)


def test_the_map_is_bright_where_the_repair_changed_something(cells, wheel, tmp_path):
    prepare("--wheel", wheel, "--out", tmp_path / "set", "--size", 32)
    source, repaired = (cells.Cells(tmp_path / "set" / "test") for _ in range(2))
    repaired.images["defective"] = source.images["defective"].clone()
    repaired.images["defective"][:, :, 8:16, 8:16] += 0.25
    picture = np.asarray(cells.sheet(source, repaired, [0, 1]).convert("L"), float)
    shown = picture[2 * cells.CELL :, cells.LABEL : cells.LABEL + cells.CELL]
    scale = cells.CELL // 32
    assert shown[10 * scale : 14 * scale, 10 * scale : 14 * scale].min() > 60
    assert shown[20 * scale :, 20 * scale :].max() < 5


def test_every_row_of_the_table_is_a_command(cells):
    rows = cells.tables.read_table(str(ROOT / "benchmarks" / "cells" / "table.txt"))
    assert len({row.folder for row in rows}) == len(rows)
    assert {row.script for row in rows} == {f"{m}_sample.py" for m in ("ae", "sdedit", "ilvr", "egsde")}
