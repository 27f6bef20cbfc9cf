"""An extension from outside of the package, in one file: a metric per image that needs no reference.

On the command line. The same file adds a kind of feature network, with a metric of what it returns.
"""

import csv
import json
import subprocess
import sys

import pytest
import tiny
import torch
from conftest import ROOT
from safetensors.torch import save_file

OWN = """
import torch
from safetensors.torch import load_file

from guided_diffusion.evaluation import NETWORKS, Extractor, feature_metric, image_metric


@image_metric("sharpness", "sharpness", lower_is_better=False)
def sharpness(images):
    return images.diff(dim=3).abs().flatten(1).mean(1)


@NETWORKS.add("PATCHES")
def patches(path, device):
    weight = load_file(path)["weight"].to(device)

    def extract(images):
        seen = torch.nn.functional.conv2d(images, weight, stride=4)
        return {"features": seen.mean((2, 3)), "darkest": images.flatten(1).min(1).values}

    return Extractor("patches", extract)


@feature_metric("darkest", "darkest value", needs=("darkest",), needs_truth=False)
def darkest(outputs, truths, own):
    return outputs["darkest"]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("own")
    (root / "own_metrics.py").write_text(OWN)
    metadata = {"model_type": "PATCHES"}
    save_file({"weight": torch.randn(5, 3, 4, 4)}, root / "patches.safetensors", metadata)
    tiny.make_references(root / "outputs", ["a.png", "b.png", "c.png"])
    return root


def evaluate(folder, *flags):
    command = [sys.executable, ROOT / "scripts" / "evaluate.py", "--outputs", "outputs", "--extend", "own_metrics.py"]
    command += ["--image_size", "16", "--lpips", "False", "--device", "cpu", "--out", "r", "--per_image", *flags]
    done = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((folder / "r_images.csv").open()))
    return json.loads((folder / "r.json").read_text()), rows, done.stdout


def pixels(folder):
    return torch.stack([torch.as_tensor(p) for p in tiny.pictures(folder / "outputs").values()]).double() / 255


def test_a_metric_of_single_images_needs_nothing_else(folder):
    """No folder to compare with; its mean, deviation, interval and values per image are in every output."""
    result, rows, printed = evaluate(folder, "--bootstrap", 50)
    expected = pixels(folder).diff(dim=2).abs().mean((1, 2, 3))
    assert [float(row["sharpness"]) for row in rows] == pytest.approx(expected.tolist(), rel=1e-5)
    assert result["metrics"]["sharpness"] == pytest.approx(expected.mean().item(), rel=1e-5)
    assert result["std"]["sharpness"] == pytest.approx(expected.std().item(), rel=1e-4)
    low, high = result["intervals"]["sharpness"]
    assert low <= result["metrics"]["sharpness"] <= high and "| sharpness | " in printed
    (row,) = csv.DictReader((folder / "r.csv").open())
    assert float(row["sharpness"]) == result["metrics"]["sharpness"]


def test_a_kind_of_feature_network_and_a_metric_of_it(folder):
    result, rows, printed = evaluate(folder, "--features", "patches.safetensors", "--targets", "outputs")
    assert result["protocol"]["features"].startswith("patches; ") and result["protocol"]["dimensions"] == 5
    assert result["metrics"]["fid"] == pytest.approx(0, abs=1e-9)
    expected = pixels(folder).flatten(1).min(1).values
    assert [float(row["darkest"]) for row in rows] == pytest.approx(expected.tolist(), rel=1e-5)
    assert "| darkest value | " in printed and "sharpness" in rows[0]
