"""scripts/evaluate.py on real folders: its numbers, its files, and its one line for everything that does not fit."""

import csv
import json
import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN_DIR, golden_index, golden_metrics
from PIL import Image
from scripts_in_process import load_script

from guided_diffusion import evaluation
from guided_diffusion.errors import InputError
from guided_diffusion.evaluation import Evaluation, Instruments

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "evaluate.py"
script = load_script("evaluate")


class BlockMeans(torch.nn.Module):
    """Means over a 2x2 grid: 12 features."""

    def forward(self, x):
        return torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


class Spatial(torch.nn.Module):
    """An image instead of features."""

    def forward(self, x):
        return x.mean(dim=1, keepdim=True)


def save_torchscript(module, path, size=16):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and still what users of older extractors have
        torch.jit.save(torch.jit.trace(module, torch.rand(2, 3, size, size)), path)
    return path


def write_images(folder, names, size=(16, 16), seed=0):
    rng = np.random.default_rng(seed)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folders of small images and an extractor of 12 features; no test writes here."""
    root = tmp_path_factory.mktemp("data")
    names = [f"{i:02d}.png" for i in range(20)]
    write_images(root / "outputs", names, seed=1)
    write_images(root / "sources", names, size=(32, 32), seed=2)
    write_images(root / "truth", ["gold-" + name for name in names], seed=3)
    write_images(root / "targets", [f"{i // 7}/{i}.png" for i in range(21)], seed=4)
    write_images(root / "few", names[:5], seed=5)
    write_images(root / "one", ["00.png"])
    write_images(root / "mixed", ["0.png", "1.png"])
    write_images(root / "mixed", ["2.png"], size=(24, 24))
    write_images(root / "broken", names[:4])
    (root / "broken" / "02.png").write_bytes((root / "broken" / "02.png").read_bytes()[:60])
    (root / "empty").mkdir()
    (root / "folder.npz").mkdir()
    (root / "folder.json").mkdir()
    save_torchscript(BlockMeans(), root / "blocks.pt")
    save_torchscript(Spatial(), root / "spatial.pt")
    torch.save({"weight": torch.zeros(2)}, root / "weights.pt")
    (root / "broken.py").write_text("import guided_diffusion.nowhere")
    (root / "text.npz").write_text("not an archive")
    np.savez(root / "narrow.npz", mu=np.zeros(11), sigma=np.eye(11))
    np.savez(root / "inception.npz", mu=np.zeros(12), sigma=np.eye(12), features="inception (pytorch-fid, 2048-d)")
    return root


def evaluate(monkeypatch, data, *flags):
    """Run the script's command in this process, in the folder of the data."""
    monkeypatch.chdir(data)
    flags = ["--lpips", "False", "--trust_features", "True", "--device", "cpu", *map(str, flags)]
    script.measure(script.create_parser().parse(flags))


def measured(monkeypatch, data, out, *flags):
    evaluate(monkeypatch, data, *flags, "--out", out / "result")
    return json.loads((out / "result.json").read_text())


def block_means(folder):
    values = []
    for path in sorted(folder.rglob("*.png"), key=lambda path: str(path.relative_to(folder))):
        with Image.open(path) as image:
            values.append(np.asarray(image, np.float64).reshape(2, 8, 2, 8, 3).mean(axis=(1, 3)) / 255)
    return np.stack(values).transpose(0, 3, 1, 2).reshape(len(values), -1)


def fid_by_eigenvalues(x, y):
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    overlap = np.sqrt(np.linalg.eigvals(cov_x @ cov_y).astype(complex)).real.sum()
    return np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(cov_x) + np.trace(cov_y) - 2 * overlap


def test_one_command_measures_everything(data, tmp_path):
    """A process of its own, elsewhere, without PYTHONPATH; a second extractor run gives the same numbers."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    flags = [f"--{name}={data / name}" for name in ("outputs", "sources", "targets", "truth")]
    flags += [f"--features={data / 'blocks.pt'}", "--trust_features", *["--image_size", "16", "--bootstrap", "40"]]
    flags += ["--lpips", "False", "--batch_size", "7", "--per_image", "True", "--out", "new/result", "--device", "cpu"]
    command = [sys.executable, str(SCRIPT), *flags]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "new" / "result.json").read_text())
    values, intervals = result["metrics"], result["intervals"]

    x, y = block_means(data / "outputs"), block_means(data / "targets")
    assert values["fid"] == pytest.approx(fid_by_eigenvalues(x, y), rel=1e-4)
    difference = []
    for i in range(20):
        with Image.open(data / "sources" / f"{i:02d}.png") as a, Image.open(data / "outputs" / f"{i:02d}.png") as b:
            source = np.asarray(a.resize((16, 16), Image.Resampling.BICUBIC), np.float64)
            difference.append(np.linalg.norm(source - np.asarray(b, np.float64)) / 255)
    assert values["source_l2"] == pytest.approx(np.mean(difference), rel=1e-6)
    assert result["std"]["source_l2"] == pytest.approx(np.std(difference, ddof=1), rel=1e-6)
    for name in ("kid", "source_ssim", "truth_l2", "truth_psnr", "truth_ssim"):
        assert math.isfinite(values[name])
    for name in ("source_msssim", "truth_msssim", "source_lpips", "negative_impact"):
        assert values[name] is None and name not in intervals
    paired = {f"{role}_{name}" for role in ("source", "truth") for name in ("l2", "mse", "psnr", "ssim")}
    assert set(intervals) == {"fid", "kid"} | paired
    assert all(low < values[name] < high for name, (low, high) in intervals.items())

    assert result["pairing"] == {"source": "stem", "truth": "order"}
    twenty = dict.fromkeys(["outputs", "sources", "truth", "source_pairs", "truth_pairs"], 20)
    assert result["counts"] == {**twenty, "targets": 21}
    assert result["sizes"]["sources"] == ["32x32"] and result["sizes"]["outputs"] == ["16x16"]
    assert result["protocol"]["features"].startswith("torchscript ") and result["protocol"]["dimensions"] == 12
    assert "16x16" in result["protocol"]["paired"]
    first = "00.png with gold-00.png, 01.png with gold-01.png, 02.png with gold-02.png, ..."
    assert f"warning: no file name in outputs occurs in truth: paired by order of names, {first}\n" in run.stderr
    assert "warning: MS-SSIM is left out: its scales need images of 161 pixels or more" in run.stderr

    (row,) = csv.DictReader((tmp_path / "new" / "result.csv").open())
    assert float(row["fid"]) == values["fid"] and float(row["fid_low"]) == intervals["fid"][0]
    assert row["source_lpips"] == "" and row["count_targets"] == "21"
    rows = list(csv.DictReader((tmp_path / "new" / "result_images.csv").open()))
    assert [row["output"] for row in rows] == [f"{i:02d}.png" for i in range(20)]
    assert [float(row["source_l2"]) for row in rows] == pytest.approx(difference, rel=1e-6)
    text = (tmp_path / "new" / "result.md").read_text()
    assert text == run.stdout
    assert f"| Fréchet | {values['fid']:.6g} |" in text and "| SSIM, truth |" in text and "paired by order" in text
    written = ["result.csv", "result.json", "result.md", "result_images.csv"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == written


@pytest.mark.parametrize("name", golden_metrics())
def test_golden_values_by_the_command(monkeypatch, tmp_path, name):
    entry = golden_index()[name]
    a, b = entry["folders"]
    result = measured(monkeypatch, GOLDEN_DIR, tmp_path, "--outputs", b, "--sources", a)
    for metric, expected in entry["values"].items():
        assert result["metrics"][f"source_{metric}"] == pytest.approx(expected, rel=1e-4), metric
    assert result["warnings"] == []


def test_identical_folders(monkeypatch, data, tmp_path):
    flags = ("--outputs", "outputs", "--targets", "outputs", "--truth", "outputs", "--features", "blocks.pt")
    result = measured(monkeypatch, data, tmp_path, *flags, "--image_size", 16)
    assert result["metrics"]["fid"] == pytest.approx(0, abs=1e-10)
    assert result["metrics"]["kid"] <= 0  # unbiased: an image is compared with itself between the sets only
    assert result["metrics"]["truth_ssim"] == pytest.approx(1)
    assert result["metrics"]["truth_psnr"] is None
    assert any("truth_psnr: PSNR of 20 of 20 images is infinite" in w for w in result["warnings"])


def test_statistics_file_in_place_of_a_folder(monkeypatch, data, tmp_path):
    flags = ("--features", "blocks.pt", "--image_size", 16)
    direct = measured(monkeypatch, data, tmp_path, "--outputs", "outputs", "--targets", "targets", *flags)
    evaluate(monkeypatch, data, "--targets", "targets", "--save_stats", tmp_path / "stats.npz", *flags)
    with np.load(tmp_path / "stats.npz") as file:
        np.testing.assert_allclose(file["mu"], block_means(data / "targets").mean(axis=0), rtol=1e-5)
        assert file["sigma"].shape == (12, 12)
    flags = (*flags, "--bootstrap", 20)
    result = measured(monkeypatch, data, tmp_path, "--outputs", "outputs", "--targets", tmp_path / "stats.npz", *flags)
    assert result["metrics"]["fid"] == pytest.approx(direct["metrics"]["fid"], rel=1e-6)
    low, high = result["intervals"]["fid"]
    assert low < result["metrics"]["fid"] < high
    assert result["metrics"]["kid"] is None and result["counts"]["targets"] == 21
    assert result["warnings"] == ["KID is left out: it needs the target images, not their statistics"]


def test_kid_by_subsets_and_too_few_images(monkeypatch, data, tmp_path):
    flags = ("--targets", "targets", "--features", "blocks.pt", "--image_size", 16)
    subsets = ("--kid_subset_size", 10, "--kid_subsets", 30)
    result = measured(monkeypatch, data, tmp_path, "--outputs", "outputs", *flags, *subsets)
    assert result["std"]["kid"] > 0 and "30 subsets of 10 images" in result["protocol"]["kid"]
    (warning,) = measured(monkeypatch, data, tmp_path, "--outputs", "few", *flags)["warnings"]
    assert warning.startswith("outputs: too few images for FID's rank: 5 images for 12 features")


def test_partial_and_sizes_are_said(monkeypatch, data, tmp_path):
    result = measured(
        monkeypatch, data, tmp_path, "--outputs", "outputs", "--truth", "few", "--partial", "True", "--image_size", 16
    )
    assert result["counts"]["truth_pairs"] == 5
    assert result["warnings"][0] == "partial: 5 pairs measured of 20 outputs and 5 in truth"
    result = measured(monkeypatch, data, tmp_path, "--outputs", "mixed", "--truth", "mixed", "--image_size", 16)
    assert "outputs: images of 2 sizes, 16x16, 24x24" in result["warnings"]


def test_folder_of_a_run(monkeypatch, tmp_path):
    """The run's overviews are no outputs; what run.json says of negative impact is carried into the result."""
    run = write_images(tmp_path / "run", ["a.png", "b/c.png", "grid.png"])
    write_images(tmp_path / "sources", ["a.png", "b/c.png"])
    flags = ("--outputs", "run", "--sources", "sources", "--image_size", 16)
    (run / "run.json").write_text(json.dumps({"negative_impact": 0.125, "seed": 3}))
    result = measured(monkeypatch, tmp_path, tmp_path, *flags)
    assert result["metrics"]["negative_impact"] == 0.125 and result["counts"]["outputs"] == 2
    assert "| negative impact | 0.125 |" in (tmp_path / "result.md").read_text()
    (run / "run.json").write_text("{}")
    assert measured(monkeypatch, tmp_path, tmp_path, *flags)["metrics"]["negative_impact"] is None
    (run / "run.json").write_text("[truncated")
    result = measured(monkeypatch, tmp_path, tmp_path, *flags)
    assert any("run.json: not the record of a run" in warning for warning in result["warnings"])


def test_several_translations_of_every_source(monkeypatch, data, tmp_path):
    """Each is paired with its source; FID is that of each set on its own, averaged."""
    names = [f"{i:02d}.png" for i in range(20)]
    run = tmp_path / "run"
    for k in range(3):
        write_images(run / f"sample_{k}", names, seed=10 + k)
    write_images(run, ["grid.png"])
    (run / "run.json").write_text(json.dumps({"settings": {"samples_per_image": 3}}))
    flags = ("--sources", "sources", "--targets", "targets", "--features", "blocks.pt", "--image_size", 16)
    result = measured(monkeypatch, data, tmp_path, "--outputs", run, *flags, "--bootstrap", 10)
    single = [
        measured(monkeypatch, data, tmp_path, "--outputs", run / f"sample_{k}", *flags)["metrics"] for k in range(3)
    ]
    for name in ("fid", "kid", "source_l2", "source_ssim"):
        values = [metrics[name] for metrics in single]
        assert result["metrics"][name] == pytest.approx(np.mean(values)), name
        if name in ("fid", "kid"):
            assert result["std"][name] == pytest.approx(np.std(values, ddof=1)) and name not in result["intervals"]
    assert result["counts"]["source_pairs"] == result["counts"]["outputs"] == 60
    assert result["pairing"] == {"source": "stem"} and result["protocol"]["translations"].startswith("3 of every")
    assert sum("outputs: too few images for FID's rank" in warning for warning in result["warnings"]) == 0
    (run / "sample_1" / "00.png").unlink()
    with pytest.raises(InputError, match="outputs has 19 images and sources 20, but 1 have no partner"):
        evaluate(monkeypatch, data, "--outputs", run, *flags)
    result = measured(monkeypatch, data, tmp_path, "--outputs", run, *flags, "--partial", "True")
    assert result["counts"]["source_pairs"] == 59
    assert "partial: 59 pairs measured of 59 outputs and 20 in sources" in result["warnings"]


def test_cached_target_features_change_nothing(data):
    folders = {"outputs": data / "outputs", "targets": data / "targets", "features": str(data / "blocks.pt")}
    options = Evaluation(**folders, image_size=16, trust_features=True, device="cpu")
    instruments = Instruments(options)
    direct, _ = evaluation.evaluate(options)
    first, _ = evaluation.evaluate(options, instruments=instruments)
    (key,) = instruments.targets
    instruments.targets[key][0][:] += 1  # what is found is what is used
    moved, _ = evaluation.evaluate(options, instruments=instruments)
    assert direct == first and len(instruments.targets) == 1
    assert moved["metrics"]["fid"] > first["metrics"]["fid"] + 5


def test_lpips_is_left_out_and_said_or_an_error(monkeypatch, data, tmp_path):
    """No weights in the cache and a proxy that refuses: what a machine without a network sees."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    flags = ("--outputs", "few", "--truth", "few", "--image_size", 16)
    result = measured(monkeypatch, data, tmp_path, *flags, "--lpips", "auto")
    assert result["metrics"]["truth_lpips"] is None
    assert sum(w.startswith("LPIPS is left out: the weights of the backbone 'alex'") for w in result["warnings"]) == 1
    with pytest.raises(InputError) as caught:
        evaluate(monkeypatch, data, *flags, "--lpips", "True", "--lpips_net", "vgg")
    assert (caught.value.parameter, caught.value.value) == ("lpips_net", "vgg")


def test_inception_without_weights_is_one_line(monkeypatch, data, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"could not be downloaded .*inception_path") as caught:
        evaluate(monkeypatch, data, "--outputs", "few", "--targets", "few")
    assert caught.value.parameter == "features"


BLOCKS = "--features blocks.pt --image_size 16"
ERRORS = {  # flags: the parameter that is named and its value, or the beginning of the text
    "": ("outputs", None),
    "--outputs outputs": ("outputs", "outputs"),
    "--outputs nowhere --truth few": ("outputs", "nowhere"),
    "--outputs outputs --sources empty": ("sources", "empty"),
    "--outputs blocks.pt --truth few": ("outputs", "blocks.pt"),
    "--outputs few --truth outputs": "outputs has 5 images and truth 20, but 15 have no partner of the same name",
    "--outputs broken --truth broken": "broken/02.png",
    f"--outputs one --targets few {BLOCKS}": ("outputs", "one"),
    f"--outputs few --targets mixed {BLOCKS} --native_size True": "mixed/2.png is 24x24 and mixed/0.png is 16x16",
    f"--outputs few --targets missing.npz {BLOCKS}": "missing.npz does not exist",
    f"--outputs few --targets text.npz {BLOCKS}": "text.npz is damaged or not",
    f"--outputs few --targets narrow.npz {BLOCKS}": ("targets", "narrow.npz"),
    f"--outputs few --targets inception.npz {BLOCKS}": ("targets", "inception.npz"),
    "--outputs few --targets few --features resnet": ("features", "resnet"),
    "--outputs few --targets few --features missing.pt": ("features", "missing.pt"),
    "--outputs few --targets few --features weights.pt": ("features", "weights.pt"),
    "--outputs few --targets few --features blocks.pt --trust_features False": ("features", "blocks.pt"),
    "--outputs few --targets few --features spatial.pt": ".*it returns .5, 1, 256, 256. for 5 images",
    "--outputs few --targets few --inception_path weights.pt": ("inception_path", "weights.pt"),
    f"--outputs few --targets few {BLOCKS} --inception_path weights.pt": ("inception_path", "weights.pt"),
    f"--outputs few --targets few {BLOCKS} --protocol egsde-male2female": ("protocol", "egsde-male2female"),
    "--outputs few --truth few --image_size 10": ("image_size", 10),
    "--outputs few --truth few --lpips maybe": ("lpips", "maybe"),
    "--outputs few --truth few --confidence nan": "confidence is nan",
    "--outputs few --truth few --per_image True": ("per_image", True),
    "--outputs few --truth few --out blocks.pt/x": ("out", "blocks.pt"),
    "--targets few --outputs few --save_stats x.npz": ("save_stats", "x.npz"),
    f"--targets few --save_stats folder.npz {BLOCKS}": "folder.npz cannot be written: .*[Dd]irectory",
    "--outputs few --truth few --extend missing.py": "missing.py does not exist",
    "--outputs few --truth few --extend broken.py": "broken.py is damaged or not a Python file that registers",
}


@pytest.mark.parametrize("flags", ERRORS)
def test_what_does_not_fit_is_one_line(flags, monkeypatch, data):
    with pytest.raises(InputError) as caught:
        evaluate(monkeypatch, data, *flags.split())
    error, wanted = caught.value, ERRORS[flags]
    if isinstance(wanted, str):
        assert re.match(wanted, str(error))
    else:
        parameter, value = wanted
        assert error.parameter == parameter and (str(error.value) if isinstance(value, str) else error.value) == value
    assert str(error).isprintable()


def test_the_process_ends_with_one_line_and_status_2(data):
    command = [sys.executable, str(SCRIPT), "--outputs", "few", "--truth", "nowhere"]
    run = subprocess.run(command, cwd=data, capture_output=True, text=True, timeout=600)
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr.startswith("error: --truth is 'nowhere'; ") and run.stderr.count("\n") == 1


GOOD = {"mu": np.zeros(12), "sigma": np.eye(12)}
IMPOSSIBLE = {
    "negative covariance": {"sigma": -np.eye(12)},
    "a negative eigenvalue": {"sigma": np.eye(12) - 0.2},
    "asymmetric covariance": {"sigma": np.triu(np.ones((12, 12)))},
    "complex means": {"mu": 1j * np.zeros(12)},
    "complex covariance": {"sigma": 1j * np.eye(12)},
    "texts": {"mu": np.array(["0"] * 12)},
    "truth values": {"sigma": np.eye(12) > 0},
    "objects": {"mu": np.array([None] * 12)},
    "NaN": {"mu": np.full(12, np.nan)},
    "infinity": {"sigma": np.diag([np.inf] + [1.0] * 11)},
    "wrong shapes": {"sigma": np.eye(11)},
    "a column": {"mu": np.zeros((12, 1))},
    "nothing": {"mu": np.zeros(0), "sigma": np.zeros((0, 0))},
    "no covariance": {"sigma": None},
    "a negative count": {"count": -5},
    "a count of one": {"count": 1},
    "half a picture": {"count": 2.5},
    "several counts": {"count": [21, 21]},
}


@pytest.mark.parametrize("change", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_statistics_that_no_pictures_can_have(change, monkeypatch, data, tmp_path):
    arrays = {name: value for name, value in {**GOOD, **change}.items() if value is not None}
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(InputError, match=r"s\.npz is damaged or not statistics of images") as caught:
        evaluate(monkeypatch, data, "--outputs", "few", "--targets", tmp_path / "s.npz", *BLOCKS.split())
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_statistics_of_few_pictures_and_halves_of_precision_are_fine(kind, monkeypatch, data, tmp_path):
    """A singular covariance with rounding errors; pytorch-fid writes no count."""
    x = np.random.default_rng(0).normal(size=(4, 12)).astype(kind)
    np.savez(tmp_path / "s.npz", mu=x.mean(0), sigma=np.cov(x, rowvar=False).astype(kind))
    flags = ("--outputs", "few", "--targets", tmp_path / "s.npz", *BLOCKS.split())
    assert measured(monkeypatch, data, tmp_path, *flags)["metrics"]["fid"] > 0
