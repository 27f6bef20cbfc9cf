"""The judge of the emoji benchmark: trained and resumed; its metrics in an evaluation; files that are not judges."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT
from judge import DEFAULT_PATH, load_judge
from judge_train import JudgeImages, JudgeOptions, create_parser, judge_images, train
from PIL import Image
from safetensors.torch import save_file
from scripts_in_process import load_script

from guided_diffusion.checkpoint import read
from guided_diffusion.dist_util import Ranks
from guided_diffusion.errors import InputError
from guided_diffusion.evaluation import Evaluation, evaluate
from guided_diffusion.evaluation.features import feature_extractor
from guided_diffusion.training.data import batch_numbers

VENDORS = ("flat", "dotted", "shiny")
SIZE, STEPS = 16, 150
RUN = ["--vendors", ",".join(VENDORS), "--image_size", str(SIZE), "--width", "8", "--batch_size", "8", "--ema_rate",
       "0.8", "--iterations", str(STEPS), "--save_interval", "30", "--log_interval", "50", "--lr", "5e-3", "--device",
       "cpu"]  # fmt: skip


def write(folder, codes, vendor):
    """Four coloured squares that are the code point's, drawn in the vendor's way."""
    folder.mkdir(parents=True)
    for code in codes:
        pixels = np.random.default_rng(code).integers(0, 256, (2, 2, 3)).repeat(SIZE // 2, 0).repeat(SIZE // 2, 1)
        if vendor == "dotted":
            pixels[::2, ::2] = 0
        if vendor == "shiny":
            pixels = (pixels + 255) // 2
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{code:04x}.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures by three vendors as datasets/prepare_emoji.py lays them out: 24 code points, 8 of them held out."""
    folder = tmp_path_factory.mktemp("data")
    for vendor in VENDORS:
        write(folder / vendor / "train", range(16), vendor)
        write(folder / vendor / "test", range(16, 24), vendor)
    return folder


def start(*flags):
    return train(create_parser().parse(list(map(str, flags))), Ranks())


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """The folder of a run from beginning to end."""
    folder = tmp_path_factory.mktemp("run") / "judge"
    assert start("--data_dir", data, "--save_dir", folder, *RUN) == 0
    return folder


@pytest.fixture(scope="module")
def path(run):
    return run / "model.safetensors"


@pytest.fixture(scope="module")
def truth(data):
    """The target's held-out pictures, eight."""
    return data / "shiny" / "test"


def test_it_learns_to_tell_vendors_and_code_points(run):
    rows = list(csv.DictReader((run / "progress.csv").open()))
    assert float(rows[-1]["acc"]) > 0.9 and float(rows[-1]["val_acc"]) > 0.9
    # By chance, one in eight.
    assert float(rows[-1]["val_retrieval"]) > 0.5 and float(rows[-1]["contrast"]) < float(rows[0]["contrast"])


def test_a_resumed_run_ends_with_the_same_weights_and_keeps_its_vendors(data, run, tmp_path):
    flags = ["--data_dir", data, "--save_dir", tmp_path / "judge", *RUN]
    assert start(*flags, "--iterations", "60") == 0
    assert start(*flags, "--resume", "auto") == 0
    assert (tmp_path / "judge" / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    for other, word in ((["--vendors", "dotted,flat,shiny"], "vendors"), (["--width", "16"], "width")):
        with pytest.raises(InputError, match=f"has {word} "):
            start(*flags, "--resume", "auto", *other)


def test_a_code_points_pictures_are_moved_and_mirrored_together(data):
    parts = judge_images(JudgeOptions(data_dir=str(data), vendors="flat,shiny", image_size=SIZE), "train").parts
    images = JudgeImages([parts[0].references] * 2, SIZE)
    _, x, _ = next(images.batches(batch_numbers(0, 32), "cpu"))
    assert x.shape == (32, 6, SIZE, SIZE) and torch.equal(x[:, :3], x[:, 3:])
    still = torch.cat([x for _, x, _ in images.ordered_batches(8, "cpu")])
    chosen = images.indices(np.arange(32))
    assert not torch.equal(x, still[chosen])
    # Nothing but moving: every colour of a picture is one that it had.
    for moved, index in zip(x, chosen):
        assert set(moved.unique().tolist()) <= set(still[index].unique().tolist())


@pytest.mark.parametrize("name, value, named", [
    ("data_dir", None, "data_dir"), ("vendors", "flat,glossy", "data_dir"), ("vendors", "flat", "vendors"),
    ("width", 12, "width"),
])  # fmt: skip
def test_options_that_do_not_fit(data, name, value, named):
    with pytest.raises(InputError, match=f"^{named} is "):
        judge_images(JudgeOptions(**{"data_dir": str(data), "vendors": "flat,shiny", name: value}), "train")


def test_truths_are_all_found_and_the_targets(path, truth, tmp_path, capsys):
    """By the command, which loads the judge's metrics: the distance is 0."""
    script = load_script("evaluate")
    flags = ["--outputs", truth, "--truth", truth, "--targets", truth, "--features", path, "--bootstrap", "20",
             "--lpips", "False", "--image_size", "16", "--device", "cpu", "--out", tmp_path / "r"]  # fmt: skip
    script.measure(script.create_parser().parse(list(map(str, flags))))
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["metrics"]["content"] == 1 and result["metrics"]["target_vendor"] == 1
    assert result["metrics"]["fid"] == pytest.approx(0, abs=1e-6) and result["intervals"]["content"] == [1, 1]
    assert result["protocol"]["features"].startswith("judge of flat, dotted")
    assert "| content found again | 1 |" in capsys.readouterr().out


def measured(path, outputs, **options):
    options = {"image_size": 16, "lpips": "False", "device": "cpu", **options}
    return evaluate(Evaluation(outputs=outputs, features=path, **options))


def test_permuted_outputs_and_other_vendors_are_seen(data, path, truth, tmp_path):
    names = sorted(each.name for each in truth.iterdir())
    permuted, half = tmp_path / "permuted", tmp_path / "half"
    permuted.mkdir()
    for name, other in zip(names, [*names[2:], *names[1::-1]]):
        shutil.copy(truth / other, permuted / name)
    assert measured(path, permuted, truth=truth)[0]["metrics"]["content"] == 0
    shutil.copytree(data / "flat" / "test", half)
    for name in names[:2]:  # two of the eight in the target's way
        shutil.copy(truth / name, half / name)
    result, images = measured(path, half, truth=truth, bootstrap=50)
    assert result["metrics"]["target_vendor"] == pytest.approx(0.25, abs=0.13)
    assert [row["target_vendor"] for row in images][:2] == [1, 1]
    low, high = result["intervals"]["target_vendor"]
    assert low < result["metrics"]["target_vendor"] < high


def test_some_of_many_truths_and_none(data, path, truth, tmp_path):
    """The nearest is sought among all images of the folder, also among those without an output."""
    name, other = sorted(each.name for each in truth.iterdir())[:2]
    for shown, content in ((other, 0), (name, 1)):
        shutil.copy(truth / shown, tmp_path / name)
        result, _ = measured(path, tmp_path, truth=truth, partial=True)
        assert result["metrics"]["content"] == content and result["counts"]["truth_pairs"] == 1
    result, images = measured(path, data / "flat" / "test", targets=truth)
    assert result["metrics"]["content"] is None and result["metrics"]["target_vendor"] < 0.5
    assert result["metrics"]["fid"] > 0 and {"target_vendor"} == set(images[0]) - {"output"}
    # No other features have its metrics; without targets, no Inception is loaded.
    result, _ = measured("inception", truth, truth=truth)
    assert result["metrics"]["content"] is result["metrics"]["target_vendor"] is None


def test_the_repositorys_judge():
    """The committed file's outputs are those of version 0.2, for a picture that is the same everywhere."""
    judge = load_judge()
    assert judge.vendors == ["twitter", "google", "fluent3d"] and judge.image_size == 64
    assert DEFAULT_PATH.stat().st_size < 5e6 and DEFAULT_PATH.with_suffix(".md").is_file()
    images = (torch.arange(3 * 64 * 64).view(1, 3, 64, 64) % 97) / 97
    features, embeddings, vendors = judge.judge(images)
    expected = json.loads((ROOT / "tests" / "golden" / "judge.json").read_text())
    assert features[0, :4].tolist() == pytest.approx(expected["features"], abs=1e-4)
    assert embeddings[0, :4].tolist() == pytest.approx(expected["embeddings"], abs=1e-4)
    assert vendors[0].tolist() == pytest.approx(expected["vendors"], abs=1e-4)
    found = feature_extractor(str(DEFAULT_PATH)).extract(images)
    assert torch.equal(found["features"], features) and torch.equal(found["vendors"], vendors)
    logits, again = judge(images * 2 - 1)  # in training
    assert torch.allclose(logits.softmax(1), vendors) and torch.allclose(again, embeddings)


@pytest.mark.parametrize("change", [
    {"vendors": '["flat", "dotted"]'},
    {"content.bias": torch.full((128,), float("nan"))},
    {"model_type": "OTHER"},
])  # fmt: skip
def test_a_file_that_does_not_fit_is_refused_in_one_line(path, tmp_path, change):
    tensors, metadata = read(path)
    parts = {name: value for name, value in {**tensors, **metadata, **change}.items() if value is not None}
    metadata = {name: value for name, value in parts.items() if isinstance(value, str)}
    save_file({n: v for n, v in parts.items() if n not in metadata}, tmp_path / "j.safetensors", metadata)
    with pytest.raises(InputError, match=r"j\.safetensors") as caught:
        load_judge(tmp_path / "j.safetensors")
    assert "\n" not in str(caught.value)
