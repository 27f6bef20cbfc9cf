"""The benchmarks of speed run as they are documented, at sizes that take seconds; their figures mean nothing here."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from guided_diffusion.nn import GroupNorm32, norm_silu

# What bench_release.py uses of the public release: a network, a process, and parts of its energy.
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
SMALL = {"image_size": 16, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2", "num_head_channels": 32}


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release")
    (folder / "guided_diffusion").mkdir()
    for name, text in STAND_IN.items():
        (folder / "guided_diffusion" / name).write_text(text)
    return folder


def run(script, *flags):
    command = [sys.executable, ROOT / "benchmarks" / script, *flags]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240)


def test_beside_the_release(tmp_path, release):
    out = tmp_path / "out"
    flags = ("--ours", "fp32,bf16+fuse+cache2", "--batches", "1,2", "--rounds", 2, "--blocks", 4, "--out", out)
    done = run("bench_release.py", "--release", release, *flags, "--architecture", json.dumps(SMALL))
    assert done.returncode == 0, done.stderr
    result = json.loads(out.with_suffix(".json").read_text())
    rows = {(row["loop"], row["batch"], row["step"]): row for row in result["rows"]}
    assert len(rows) == len(result["rows"]) == 3 * 2 * 2
    assert all(row["seconds"] > 0 and row["peak_mib"] > 10 for row in rows.values())
    assert {row["ratio"] for row in rows.values() if row["loop"] == "release"} == {1.0}
    text = out.with_suffix(".md").read_text()
    assert text.count("| release |") == 4 + 2 and "times as fast" in text and "images/s" in text
    alone = run(
        "bench_release.py", *flags[:2], "--batches", 1, "--rounds", 1, *flags[6:], "--architecture", json.dumps(SMALL)
    )
    assert alone.returncode == 0, alone.stderr
    rows = json.loads(out.with_suffix(".json").read_text())["rows"]
    loops = {batch: {row["loop"] for row in rows if row["batch"] == batch} for batch in (1, 2)}
    ours = {"fp32", "bf16+fuse+cache2"}
    assert loops == {1: ours, 2: ours | {"release"}}  # of the same machine, the other batch size stays
    missing = run("bench_release.py", "--release", tmp_path, "--out", out)
    assert (
        missing.returncode == 1 and missing.stderr.startswith("error: --release is") and missing.stderr.count("\n") == 1
    )


def test_gpu_table_without_a_gpu(tmp_path, release):
    out = tmp_path / "gpu"
    flags = ("--device", "cpu", "--dry_run", "--rounds", 1, "--batch", 1, "--release", release, "--out", out)
    none = run("bench_gpu.py", *flags, "--minutes", 0)
    assert none.returncode == 0 and "start again" in none.stdout and not out.with_suffix(".json").exists()
    done = run("bench_gpu.py", *flags)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.with_suffix(".json").read_text())
    assert len(result["done"]) == 7 and result["missing"] == {}
    assert [(row["batch"], row["precision"], row["mode"]) for row in result["forward"]] == [
        (1, "fp32", "eager"), (1, "fp32", "eager+fuse"), (1, "bf16", "eager"), (1, "bf16", "eager+fuse"),
        (2, "fp32", "eager"),
    ]  # fmt: skip
    assert {row["energy"] for row in result["overhead"]} == {"none", "dct", "plain step"}
    assert [row["energy"] for row in result["in_place"]] == ["none", "dct", "vgg", "late start"]
    assert [row["precision"] for row in result["whole_run"]] == ["fp32", "bf16"]
    assert "12 guided steps" in (tmp_path / "gpu_profile.txt").read_text()
    text = out.with_suffix(".md").read_text()
    assert "no GPU was available" in text and "## Beside the public release" in text
    again = run("bench_gpu.py", *flags)
    assert (again.returncode, again.stdout) == (0, "") and out.with_suffix(".md").read_text() == text


def test_cheaper_evaluations(tmp_path):
    out = tmp_path / "cheaper"
    flags = ("--batches", 1, "--rounds", 1, "--steps", 4, "--range_t", 2, "--out", out)
    for precision, cases in (("fp32", "fuse;cache_interval 2"), ("bf16", "norms in one pass;vgg, bf16")):
        done = run("bench_cheaper.py", *flags, "--precisions", precision, "--cases", cases)
        assert done.returncode == 0, done.stderr
    rows = {(row["precision"], row["case"]): row for row in json.loads(out.with_suffix(".json").read_text())["rows"]}
    assert len(rows) == 3 + 4 and all(row["images_per_s"] > 0 for row in rows.values())
    assert rows["fp32", "fuse"]["twin"] == "dct" and 0 <= rows["fp32", "fuse"]["rms_grey_levels"] < 0.1
    assert 0.01 < rows["fp32", "cache_interval 2"]["rms_grey_levels"] < 50
    assert rows["bf16", "norms in one pass"]["rms_grey_levels"] < 3


def test_sampling_speed(tmp_path):
    out = tmp_path / "speed"
    flags = ("--device", "cpu", "--cases", "tiny:1", "--precisions", "fp32", "--energies", "dct,low_pass")
    done = run("bench_sampling.py", *flags, "--modes", "eager,eager+fuse", "--rounds", 1, "--out", out)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(out.with_suffix(".json").read_text())["overhead"]) == 2 * 2 + 1


def test_norms_of_the_benchmark_are_the_networks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench_cheaper

    torch.manual_seed(0)
    norm, x = GroupNorm32(32, 64), torch.randn(2, 64, 8, 8)
    scale, shift = torch.randn(2, 2, 64, 1, 1)
    with torch.no_grad():
        assert torch.equal(bench_cheaper.one_pass(norm, x, scale, shift), norm_silu(norm, x, scale, shift))
        found, wanted = (f(norm, x.bfloat16(), scale, shift) for f in (bench_cheaper.one_pass, norm_silu))
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=2**-7)
