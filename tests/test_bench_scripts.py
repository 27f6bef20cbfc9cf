"""The benchmarks of speed and reliability in their smallest form; their figures mean nothing here."""

import subprocess
import sys

from conftest import ROOT

# What `speed.py release` uses of the public release: a network, a process, and parts of its energy.
STAND_IN = {
    "__init__.py": "",
    "script_util.py": """
import torch
from .gaussian_diffusion import Process

def model_and_diffusion_defaults():
    return {"image_size": 64, "num_channels": 128, "class_cond": False}

def create_model_and_diffusion(image_size, num_channels, class_cond, timestep_respacing, **others):
    return torch.nn.Conv2d(3, 3, 3, padding=1), Process(int(timestep_respacing))
""",
    "gaussian_diffusion.py": """
from cv2 import norm
import torch

class StageVGG(torch.nn.Module):
    def __init__(self, path="/no/such/file"):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 4, 3, padding=1)
        self.layer.load_state_dict(torch.load(path))

    def forward(self, x):
        return self.layer(x)

def blockzation(x, blocks):
    return x.unflatten(-1, (blocks, -1)).unflatten(-3, (blocks, -1)).transpose(-2, -3)

def calc_mean_std(x):
    return x.mean(dim=(-1, -2), keepdim=True), x.std(dim=(-1, -2), keepdim=True)

def block_adaIN(x, ref, blocknum):
    return x - x.mean() + ref.mean()

class Process:
    def __init__(self, steps):
        self.steps = steps

    def p_sample_loop_progressive(self, model, shape, clip_denoised, model_kwargs, condition_kwargs, cond_fn, device):
        x = torch.randn(shape)
        assert condition_kwargs["ref_mean"].shape[2:4] == (condition_kwargs["area"],) * 2
        for i in reversed(range(self.steps)):
            with torch.no_grad():
                (grad,) = cond_fn(x, i, ref_img=model_kwargs["ref_img"])
                assert grad.shape == x.shape and not grad.requires_grad
                x = model(x) + (grad if i > condition_kwargs["range_t"] else 0)
            yield {"sample": x}
""",
}


def run(script, *flags):
    command = [sys.executable, ROOT / "benchmarks" / script, *flags]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


def rows_of(text, part):
    """The rows of a part's table, as dicts."""
    lines = [line for line in text.partition(f"## {part}\n")[2].partition("\n## ")[0].splitlines() if line[:1] == "|"]
    columns, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def test_speed(tmp_path):
    folder, out = tmp_path / "guided_diffusion", tmp_path / "speed.md"
    folder.mkdir()
    for name, text in STAND_IN.items():
        (folder / name).write_text(text)
    parts = ("evaluations", "steps", "runs", "release", "startup", "profile")
    small = ("--models", "tiny:1", "--rounds", 1, "--run_steps", 4, "--batches", 1, "--energies", "dct,low_pass")
    cases = ("--precisions", "fp32", "--ours", "fp32+fuse", "--cases", ";fuse=True;cache_interval=2")
    done = run("speed.py", *parts, *small, *cases, "--device", "cpu", "--release", tmp_path, "--out", out)
    assert done.returncode == 0, done.stderr
    text = out.read_text()
    errors = {row["mode"]: float(row["output error"]) for row in rows_of(text, "evaluations")}
    assert errors.keys() == {"eager", "eager+fuse"} and errors["eager"] == 0 < 1e-4 > errors["eager+fuse"]
    assert [row["step"] for row in rows_of(text, "steps")] == ["unguided", "guided, dct", "guided, low_pass"]
    plain, fused, cached = (float(row["RMS"]) for row in rows_of(text, "runs"))
    assert plain == 0 and fused < 0.1 < cached
    assert [(row["loop"], row["guided, times as fast"] == "1") for row in rows_of(text, "release")] == [
        ("release", True), ("fp32+fuse", False)
    ]  # fmt: skip
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
