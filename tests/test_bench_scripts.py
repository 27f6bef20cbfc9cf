"""The benchmarks of speed and reliability in their smallest form; their figures mean nothing here."""

import subprocess
import sys

from conftest import ROOT


def run(script, *flags):
    command = [sys.executable, ROOT / "benchmarks" / script, *flags]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


def rows_of(text, part):
    """The rows of a part's table, as dicts."""
    lines = [line for line in text.partition(f"## {part}\n")[2].partition("\n## ")[0].splitlines() if line[:1] == "|"]
    columns, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def test_speed(tmp_path):
    out = tmp_path / "speed.md"
    parts = ("evaluations", "steps", "runs", "release", "startup", "profile")
    small = ("--models", "tiny:1", "--rounds", 1, "--run_steps", 4, "--batches", 1, "--energies", "dct,low_pass")
    cases = ("--precisions", "fp32", "--ours", "fp32,fp32+fuse", "--cases", ";fuse=True;cache_interval=2")
    done = run("speed.py", *parts, *small, *cases, "--device", "cpu", "--out", out)
    assert done.returncode == 0, done.stderr
    text = out.read_text()
    errors = {row["mode"]: float(row["output error"]) for row in rows_of(text, "evaluations")}
    assert errors.keys() == {"eager", "eager+fuse"} and errors["eager"] == 0 < 1e-4 > errors["eager+fuse"]
    assert [row["step"] for row in rows_of(text, "steps")] == ["unguided", "guided, dct", "guided, low_pass"]
    plain, fused, cached = (float(row["RMS"]) for row in rows_of(text, "runs"))
    assert plain == 0 and fused < 0.1 < cached
    assert [row["loop"] for row in rows_of(text, "release")] == ["fp32", "fp32+fuse"]
    assert all(float(row["s"]) > 0 for row in rows_of(text, "startup"))
    assert any("convolution" in row["operation"] for row in rows_of(text, "profile"))


def test_bad_parts_and_folders_are_one_line(tmp_path):
    for flags, named in ((("sleep",), "PART is 'sleep'"), (("release", "--release", tmp_path), "--release is")):
        done = run("speed.py", *flags, "--device", "cpu")
        assert done.returncode == 1 and done.stderr.startswith("error: " + named) and done.stderr.count("\n") == 1


def test_reliability(tmp_path):
    small = ("--images", 3, "--steps", 3, "--batch_size", 1)
    killed = run("reliability.py", "kill", "--kills", 1, *small, "--out", tmp_path / "kill.md")
    assert killed.returncode == 0, killed.stdout + killed.stderr
    assert "| SIGKILLs | 1 |" in (tmp_path / "kill.md").read_text()
    long = run("reliability.py", "long", "--images", 9, "--steps", 9, "--batch_size", 1)
    assert long.returncode == 0, long.stderr
    assert "| images | 9 |" in long.stdout and "seconds left at 50 %" in long.stdout
