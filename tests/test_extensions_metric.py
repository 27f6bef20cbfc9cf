"""An extension from outside of the package, in one file: a metric of single images, a kind of feature network, and a
metric of what it returns."""

import csv
import json
import subprocess
import sys

import pytest
import tiny
import torch
from conftest import ROOT
from safetensors.torch import save_file

FLAGS = "--outputs outputs --extend own_metrics.py --features patches.safetensors --image_size 16 --bootstrap 9 --out r"
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


def test_metrics_and_a_feature_network_of_one_file(tmp_path):
    """Its mean, deviation, interval and values per image are in every output, without any folder to compare with."""
    (tmp_path / "own_metrics.py").write_text(OWN)
    weights = {"weight": torch.randn(5, 3, 4, 4)}
    save_file(weights, tmp_path / "patches.safetensors", {"model_type": "PATCHES"})
    outputs = tiny.make_references(tmp_path / "outputs", ["a.png", "b.png", "c.png"])
    command = [sys.executable, str(ROOT / "scripts" / "evaluate.py"), *FLAGS.split(), "--per_image"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result, rows = json.loads((tmp_path / "r.json").read_text()), list(csv.DictReader(open(tmp_path / "r_images.csv")))
    pixels = torch.stack([torch.as_tensor(picture) for picture in tiny.pictures(outputs).values()]).double() / 255
    sharpness, darkest = pixels.diff(dim=2).abs().mean((1, 2, 3)), pixels.flatten(1).min(1).values
    for name, expected in (("sharpness", sharpness), ("darkest", darkest)):
        assert [float(row[name]) for row in rows] == pytest.approx(expected.tolist(), rel=1e-5)
        assert result["metrics"][name] == pytest.approx(expected.mean().item(), rel=1e-5)
        assert result["std"][name] == pytest.approx(expected.std().item(), rel=1e-4)
        low, high = result["intervals"][name]
        assert low <= result["metrics"][name] <= high
    assert result["protocol"]["features"].startswith("patches; ") and result["protocol"]["dimensions"] == 5
    assert "| sharpness | " in done.stdout and "| darkest value | " in done.stdout
