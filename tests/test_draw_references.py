"""datasets/draw_references.py draws the committed ref_imgs, and says in one line what is wrong with its flags."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "datasets" / "draw_references.py"
REFERENCES = sorted((ROOT / "ref_imgs").glob("*.png"))


def draw_references(*flags, cwd):
    command = [sys.executable, str(SCRIPT), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def pixels(path):
    with Image.open(path) as image:
        assert image.mode == "RGB"
        return np.asarray(image, dtype=np.float64)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The folder that the script makes when it is run without flags."""
    folder = tmp_path_factory.mktemp("drawn")
    run = draw_references(cwd=folder)
    assert run.returncode == 0, run.stderr
    return folder / "ref_imgs"


def test_draws_exactly_the_committed_pictures(drawn):
    assert 12 <= len(REFERENCES) <= 14
    assert sorted(path.name for path in drawn.iterdir()) == [path.name for path in REFERENCES]


@pytest.mark.parametrize("committed", REFERENCES, ids=lambda path: path.stem)
def test_reproduces_the_committed_pixels(committed, drawn):
    # Pillow versions may antialias differently, hence a mean below one grey level and not equality.
    difference = np.abs(pixels(committed) - pixels(drawn / committed.name))
    assert difference.mean() < 1
    assert (difference.max(axis=2) > 64).mean() < 0.001


@pytest.mark.parametrize("committed", REFERENCES, ids=lambda path: path.stem)
def test_motif_fills_the_frame_on_white(committed):
    image = pixels(committed)
    assert image.shape == (256, 256, 3)
    for row in (slice(0, 4), slice(-4, None)):
        for column in (slice(0, 4), slice(-4, None)):
            assert (image[row, column] == 255).all()
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    assert (border == 255).all(), "the motif is cut off by the frame"
    rows, columns = np.nonzero((image < 240).any(axis=2))
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert min(height, width) >= 0.85 * 256
    assert max(height, width) >= 0.90 * 256


def test_two_runs_write_identical_bytes_at_the_asked_size(tmp_path):
    for folder in ("first", "nested/second"):
        run = draw_references("--out", folder, "--size", 64, cwd=tmp_path)
        assert run.returncode == 0, run.stderr
    first = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()}
    second = {path.name: path.read_bytes() for path in (tmp_path / "nested" / "second").iterdir()}
    assert first == second
    for path in (tmp_path / "first").iterdir():
        assert pixels(path).shape == (64, 64, 3)


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--size", "12.5"], "--size"),
        (["--size", "many"], "--size"),
        (["--size", "15"], "from 16 to 1024"),
        (["--size", "1025"], "from 16 to 1024"),
        (["--size", "-64"], "--size"),
        (["--size"], "--size"),
        (["--out", ""], "--out"),
        (["--out", "a_file"], "--out is 'a_file'"),
        (["--out", "a_file/inside"], "--out is 'a_file/inside'"),
        (["--colour", "red"], "--colour"),
        (["stray"], "stray"),
    ],
)
def test_bad_flags_give_one_line(flags, named, tmp_path):
    (tmp_path / "a_file").write_text("not a folder")
    run = draw_references(*flags, cwd=tmp_path)
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
    assert named in run.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a_file"]


def test_a_file_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "pictures" / "apple.png").mkdir(parents=True)
    run = draw_references("--out", "pictures", cwd=tmp_path)
    assert run.returncode == 2
    assert run.stderr.startswith("error: --out is 'pictures'; ") and run.stderr.count("\n") == 1
    assert "apple.png" in run.stderr
