"""Evaluation and benchmark where files are damaged, hostile or of other kinds; and metrics that come from outside."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from guided_diffusion.errors import InputError
from guided_diffusion.evaluation import (
    METRICS,
    Evaluation,
    Instruments,
    comparison,
    evaluate,
    features,
    images,
    paired_metric,
    pairs,
    set_distance,
    table,
    target_statistics,
)

SIZE = 16


def pictures(count, seed=0, size=SIZE):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


def write(folder, array):
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(array):
        Image.fromarray(picture).save(folder / f"{i:06d}.png")
    return folder


def means(x):
    """A cheap extractor: means over a 2x2 grid."""
    return torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


EXTRACTOR = features.Extractor("means", means)


def measured(**options):
    options = Evaluation(**{"image_size": SIZE, "lpips": "False", "device": "cpu", **options})
    return evaluate(options, instruments=Instruments(options, EXTRACTOR))


# Samples in one array


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_samples_npz_is_what_its_pictures_are(tmp_path, save):
    """What image_sample and guided-diffusion write, as outputs, as targets and for statistics."""
    made, wanted = pictures(9), pictures(8, seed=1)
    save(tmp_path / "samples_9x16x16x3.npz", made, np.zeros(9))
    save(tmp_path / "targets.npz", wanted)
    folders = {"outputs": write(tmp_path / "made", made), "targets": write(tmp_path / "wanted", wanted)}
    arrays = {"outputs": tmp_path / "samples_9x16x16x3.npz", "targets": tmp_path / "targets.npz"}
    truth = write(tmp_path / "truth", pictures(9, seed=2))
    expected, rows = measured(**folders, truth=truth, batch_size=4)
    result, found = measured(**arrays, truth=truth, batch_size=4)
    assert result["metrics"] == expected["metrics"] and repr(found) == repr(rows)  # NaN is not equal to itself
    assert result["counts"] == expected["counts"] and result["sizes"] == expected["sizes"]
    resized, _ = measured(**arrays, image_size=24)
    assert resized["metrics"] == measured(**folders, image_size=24)[0]["metrics"]
    options = Evaluation(targets=arrays["targets"], image_size=SIZE, device="cpu")
    target_statistics(options, tmp_path / "statistics.npz", instruments=Instruments(options, EXTRACTOR))
    again, _ = measured(outputs=arrays["outputs"], targets=tmp_path / "statistics.npz")
    assert again["metrics"]["fid"] == pytest.approx(expected["metrics"]["fid"], rel=1e-6)
    assert again["metrics"]["kid"] is None


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, SIZE, SIZE, 3), np.float32),
        np.zeros((4, SIZE, SIZE), np.uint8),
        np.zeros((0, SIZE, SIZE, 3), np.uint8),
        np.array({"a": 1}),
        np.array(["text"]),
    ],
    ids=lambda array: f"{array.dtype}{list(array.shape)}",
)
def test_other_arrays_are_refused(tmp_path, array):
    np.savez(tmp_path / "samples.npz", array)
    with pytest.raises(InputError, match=r"samples\.npz"):
        measured(outputs=tmp_path / "samples.npz", truth=tmp_path / "samples.npz")


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_damaged_npz_files_are_one_line(tmp_path_factory, data):
    """Bytes of a file of samples and of a statistics file are changed, removed or repeated."""
    root = tmp_path_factory.mktemp("damaged")
    folder = write(root / "made", pictures(3))
    if data.draw(st.booleans()):
        save = data.draw(st.sampled_from([np.savez, np.savez_compressed]))
        save(root / "x.npz", pictures(3, seed=1))
    else:
        features.save_statistics(root / "x.npz", np.random.default_rng(0).normal(size=(5, 12)), "means; ?")
    content = bytearray((root / "x.npz").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        how = data.draw(st.sampled_from(["flip", "cut", "insert"]))
        if how == "flip":
            content[place] ^= data.draw(st.integers(1, 255))
        elif how == "cut":
            del content[place : place + data.draw(st.integers(1, 2000))]
            content = content or bytearray(b"P")
        else:
            content[place:place] = data.draw(st.binary(min_size=1, max_size=20))
    (root / "x.npz").write_bytes(content)
    for options in ({"targets": root / "x.npz"}, {"truth": root / "x.npz"}):
        try:
            result, _ = measured(outputs=folder, **options)
            assert math.isfinite(result["metrics"]["fid"] or 0)
        except InputError as error:
            assert str(error).isprintable() and len(str(error)) < 5000


@pytest.mark.parametrize("kind", ["fifo", "folder", "text", "empty"])
@pytest.mark.parametrize("role", ["outputs", "targets"])
def test_other_kinds_of_npz_are_one_line(tmp_path, kind, role):
    path = tmp_path / "x.npz"
    {"fifo": os.mkfifo, "folder": os.mkdir, "text": lambda p: p.write_text("no"), "empty": Path.touch}[kind](path)
    options = {"outputs": write(tmp_path / "made", pictures(3)), "truth": tmp_path / "made", role: path}
    with pytest.raises(InputError, match=r"x\.npz"):
        measured(**options)


def test_statistics_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """A full disk leaves what was there."""
    path = tmp_path / "statistics.npz"
    path.write_bytes(b"of before")

    def full(file, **arrays):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(InputError, match="no room left"):
        features.save_statistics(path, np.zeros((3, 2)), "x")
    assert path.read_bytes() == b"of before" and os.listdir(tmp_path) == ["statistics.npz"]


# Records of runs

RECORDS = {
    "list": "[1]",
    "truncated": '{"settings"',
    "nested": '{"a":' * 200_000,
    "bytes": "\udcff\udcfe",
    "settings": '{"settings": [1]}',
    "count": '{"settings": {"samples_per_image": "many"}}',
    "large count": '{"settings": {"samples_per_image": 1000000000000}}',
    "impact": '{"negative_impact": "x", "settings": {}}',
    "infinite impact": '{"negative_impact": Infinity}',
    "digits": '{"negative_impact": 1' + "0" * 10_000 + "}",
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_damaged_record_costs_its_values_only(tmp_path, name):
    folder = write(tmp_path / "made", pictures(3))
    (folder / "run.json").write_bytes(RECORDS[name].encode("utf-8", "surrogateescape"))
    result, _ = measured(outputs=folder, truth=folder)
    assert result["metrics"]["negative_impact"] is None and result["metrics"]["truth_l2"] == 0
    assert all(warning.isprintable() for warning in result["warnings"])


GOOD = {"settings": {"energy": ["vgg", "dct"]}, "counts": {"references": 2, "failed": 0}, "finished": "now"}
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=7) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(GOOD)), ANYTHING, st.booleans())
def test_records_of_other_kinds_are_not_taken_for_runs(tmp_path_factory, key, value, deeper):
    """One entry of a good record is replaced: it is refused, or the values that are read of it are sound."""
    record = {**GOOD, key: {**GOOD[key], next(iter(GOOD[key])): value} if deeper and key != "finished" else value}
    folder = tmp_path_factory.mktemp("run")
    (folder / "run.json").write_text(json.dumps(record))
    found = comparison.read_record(str(folder))
    assert found is None or all(name.isprintable() for name in comparison.energy_names(found))
    (folder / "run.json").write_text(json.dumps(GOOD))
    assert comparison.read_record(str(folder)) == GOOD


# Metrics from outside


@pytest.fixture
def outside():
    """Two metrics that somebody adds in a file of their own."""
    known = dict(METRICS)

    @paired_metric("mae", "mean error", format=".4f", lower_is_better=True)
    def mae(a, b):
        return (a - b).abs().flatten(1).mean(1)

    @set_distance("gap", "gap", factor=10, lower_is_better=True)
    def gap(x, y):
        return float(np.abs(x.mean(0) - y.mean(0)).max())

    yield
    METRICS._entries.clear()
    METRICS._entries.update(known)


def test_metrics_from_outside_are_in_results_and_comparisons(outside, tmp_path):
    made, truth = pictures(5), pictures(5, seed=1)
    folders = {"outputs": write(tmp_path / "made", made), "truth": write(tmp_path / "truth", truth)}
    result, rows = measured(**folders, targets=tmp_path / "truth", bootstrap=20)
    values = np.abs(made / 255 - truth / 255).reshape(5, -1).mean(1)
    assert [row["truth_mae"] for row in rows] == pytest.approx(values, rel=1e-5)
    assert result["metrics"]["source_mae"] is None and result["metrics"]["gap"] > 0
    for key in ("truth_mae", "gap"):
        low, high = result["intervals"][key]
        assert low < result["metrics"][key] < high
    assert "| mean error, truth |" in table.markdown(result) and "| gap |" in table.markdown(result)
    row = {"method": "A", "setting": "", "std": dict.fromkeys(result["metrics"]), "counts": {"outputs": 5},
           "published": {"fid": "", "source_ssim": ""}, "protocol": {"dimensions": 12}}  # fmt: skip
    row["mean"] = {key: value for key, value in result["metrics"].items() if value is not None}
    headings, ((*cells,),) = comparison.table_of([row])
    assert cells[headings.index("mean error to truth ↓")] == (f"{values.mean():.4f}", True)  # five are few
    assert cells[headings.index("gap·10¹ ↓")][0] == f"{10 * result['metrics']['gap']:.3f}"


@pytest.mark.parametrize("counts, few", [
    ({"outputs": 9}, {"ssim", "fid", "kid"}),
    ({"outputs": 12, "targets": 100}, {"fid"}),
    ({"outputs": 100, "targets": 12}, {"fid"}),
    ({"outputs": 100, "targets": 9}, {"fid", "kid"}),
    ({"outputs": 13, "targets": None}, set()),
])  # fmt: skip
def test_values_from_too_few_images(counts, few):
    names = ("ssim", "fid", "kid", "seconds_per_image")
    assert few == {n for n in names if table.is_unreliable(table.Value(table.METRICS[n]), counts, 12)}


def test_a_metric_that_returns_something_else_is_named(outside, tmp_path):
    @paired_metric("wrong", "wrong")
    def wrong(a, b):
        return (a - b).mean()

    folder = write(tmp_path / "made", pictures(3))
    with pytest.raises(InputError, match="the metric wrong returns"):
        measured(outputs=folder, truth=folder)


# Devices and memory


def test_nothing_on_the_device_becomes_float64(tmp_path, monkeypatch):
    """Apple's MPS has no float64. Tensors of the meta device stand for it: they cannot be computed by mistake."""
    double = torch.Tensor.double

    def only_here(tensor):
        assert tensor.device.type == "cpu"
        return double(tensor)

    class Elsewhere(torch.Tensor):
        """A tensor of the CPU that says that it is elsewhere until .cpu() is called."""

        @staticmethod
        def __new__(cls, tensor):
            return torch.Tensor._make_subclass(cls, tensor)

        @classmethod
        def __torch_function__(cls, function, kinds, arguments=(), options=None):
            if function is torch.Tensor.double:
                raise TypeError("Cannot convert a MPS Tensor to float64")
            result = super().__torch_function__(function, kinds, arguments, options or {})
            return result.as_subclass(torch.Tensor) if function is torch.Tensor.cpu else result

    monkeypatch.setattr(torch.Tensor, "double", only_here)
    a, b = (Elsewhere(torch.rand(2, 3, 170, 170)) for _ in range(2))
    with pytest.raises((TypeError, AssertionError)):
        a.double()
    for metric in table.of_kind(table.PairedMetric):
        if metric.compute:
            value = pairs.measure(metric.name, metric.compute, a, b)
            assert type(value) is torch.Tensor and value.dtype == torch.float64

    def stack(tensors):
        return Elsewhere(torch.stack(tensors))

    folder = write(tmp_path / "made", pictures(3))
    monkeypatch.setattr(features.torch, "stack", lambda tensors: Elsewhere(torch.cat([t[None] for t in tensors])))
    found = features.extract_features(images.list_images(folder, "outputs"), EXTRACTOR, images.read_image)
    assert found["features"].dtype == np.float64 and found["features"].shape == (3, 12)


# Trust


def test_torchscript_does_not_run_without_leave(tmp_path, monkeypatch):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(means, torch.rand(1, 3, SIZE, SIZE)), str(tmp_path / "means.pt"))
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: pytest.fail("it was loaded"))
    with pytest.raises(InputError) as caught:
        features.feature_extractor(str(tmp_path / "means.pt"))
    assert caught.value.parameter == "features" and "`trust_features`" in caught.value.reason
    torch.save({"a": 1}, tmp_path / "weights.pt")  # no leave helps where it is no program
    with pytest.raises(InputError, match="not a TorchScript module"):
        features.feature_extractor(str(tmp_path / "weights.pt"))
