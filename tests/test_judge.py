"""The judge: trained by its script, killed and resumed; its metrics in an evaluation; files that are not judges."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import save_file
from scripts_in_process import load_script

from guided_diffusion.checkpoint import read
from guided_diffusion.errors import InputError
from guided_diffusion.evaluation import METRICS, Evaluation, Instruments, evaluate, table
from guided_diffusion.evaluation.features import feature_extractor
from guided_diffusion.evaluation.judge import DEFAULT_PATH, load_judge
from guided_diffusion.training.data import batch_numbers
from guided_diffusion.training.judge import JudgeImages, JudgeOptions, judge_images

VENDORS = ("flat", "dotted", "shiny")
SIZE, STEPS = 16, 150
RUN = ["--vendors", ",".join(VENDORS), "--image_size", str(SIZE), "--width", "8", "--batch_size", "8", "--ema_rate",
       "0.8", "--iterations", str(STEPS), "--save_interval", "30", "--log_interval", "50", "--lr", "5e-3", "--device",
       "cpu"]  # fmt: skip


def picture(code, vendor):
    """Four coloured squares that are the code point's, drawn in the vendor's way."""
    colours = np.random.default_rng(code).integers(0, 256, (2, 2, 3))
    pixels = colours.repeat(SIZE // 2, 0).repeat(SIZE // 2, 1).astype(float)
    if vendor == "dotted":
        pixels[::2, ::2] = 0
    if vendor == "shiny":
        pixels = (pixels + 255) / 2
    return Image.fromarray(pixels.astype(np.uint8))


def write(folder, codes, vendor):
    folder.mkdir(parents=True)
    for code in codes:
        picture(code, vendor).save(folder / f"{code:04x}.png")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures by three vendors as datasets/prepare_emoji.py lays them out: 24 code points, 8 of them held out."""
    folder = tmp_path_factory.mktemp("data")
    for vendor in VENDORS:
        write(folder / vendor / "train", range(16), vendor)
        write(folder / vendor / "test", range(16, 24), vendor)
    return folder


def start(*flags):
    command = [sys.executable, str(ROOT / "scripts" / "judge_train.py"), *map(str, flags)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """The folder of a run from beginning to end, and what it said."""
    folder = tmp_path_factory.mktemp("run") / "judge"
    process = start("--data_dir", data, "--save_dir", folder, *RUN)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    return folder, said


@pytest.fixture(scope="module")
def path(run):
    return run[0] / "model.safetensors"


def test_it_learns_to_tell_vendors_and_code_points(run):
    folder, said = run
    assert f"use it with\n  python scripts/evaluate.py --features {folder / 'model.safetensors'}" in said
    rows = list(csv.DictReader((folder / "progress.csv").open()))
    assert float(rows[-1]["acc"]) > 0.9 and float(rows[-1]["val_acc"]) > 0.9
    # By chance, one in eight.
    assert float(rows[-1]["val_retrieval"]) > 0.5 and float(rows[-1]["contrast"]) < float(rows[0]["contrast"])


def test_a_killed_run_ends_with_the_same_weights(data, run, tmp_path):
    folder = tmp_path / "judge"
    flags = ["--data_dir", data, "--save_dir", folder, *RUN]
    process = start(*flags)
    deadline = time.monotonic() + 60
    while not list(folder.glob("model*.pt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL and not (folder / f"model{STEPS:06d}.pt").exists()
    process = start(*flags, "--resume", "auto")
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert (folder / "model.safetensors").read_bytes() == (run[0] / "model.safetensors").read_bytes()


def test_a_run_keeps_its_vendors_and_size(data, run, tmp_path):
    shutil.copytree(run[0], tmp_path / "judge")
    script = load_script("judge_train")
    flags = ["--data_dir", data, "--save_dir", tmp_path / "judge", *RUN, "--resume", "auto"]
    from guided_diffusion.dist_util import Ranks

    for other, word in ((["--vendors", "dotted,flat,shiny"], "vendors"), (["--width", "16"], "width")):
        with pytest.raises(InputError, match=f"has {word} "):
            script.train(script.create_parser().parse([*map(str, flags), *other]), Ranks())


def test_a_code_points_pictures_are_moved_and_mirrored_together(data):
    options = JudgeOptions(data_dir=str(data), vendors="flat,flat2", image_size=SIZE)
    parts = judge_images(JudgeOptions(data_dir=str(data), vendors="flat,shiny", image_size=SIZE), "train").parts
    images = JudgeImages([parts[0].references] * 2, options.image_size)
    x, _ = next(images.batches(batch_numbers(0, 32), "cpu"))
    assert x.shape == (32, 6, SIZE, SIZE) and torch.equal(x[:, :3], x[:, 3:])
    still = torch.cat([x for _, x, _ in images.ordered_batches(8, "cpu")])
    chosen = images.indices(np.arange(32))
    assert not torch.equal(x, still[chosen])
    # Nothing but moving: every colour of a picture is one that it had.
    for moved, index in zip(x, chosen):
        assert set(moved.unique().tolist()) <= set(still[index].unique().tolist())


@pytest.mark.parametrize(
    "options, parameter",
    [
        ({"data_dir": None}, "data_dir"),
        ({"vendors": "flat,glossy"}, "data_dir"),
        ({"vendors": "flat"}, "vendors"),
        ({"vendors": "flat,flat"}, "vendors"),
        ({"image_size": 24}, "image_size"),
        ({"width": 12}, "width"),
    ],
)
def test_options_that_do_not_fit(data, options, parameter):
    with pytest.raises(InputError) as caught:
        judge_images(JudgeOptions(**{"data_dir": str(data), "vendors": "flat,shiny", **options}), "train")
    assert caught.value.parameter == parameter


# ---- in an evaluation -----------------------------------------------------------------------------------------------


def test_the_command_writes_the_judges_metrics(data, path, tmp_path, capsys):
    """Truths themselves: every content is found, all are the target's, and the distance is 0."""
    truth, script = data / "shiny" / "test", load_script("evaluate")
    flags = ["--outputs", truth, "--truth", truth, "--targets", truth, "--features", path, "--bootstrap", "20",
             "--lpips", "False", "--image_size", "16", "--per_image", "True", "--device", "cpu",
             "--out", tmp_path / "r"]  # fmt: skip
    script.measure(script.create_parser().parse(list(map(str, flags))))
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["metrics"]["content"] == 1 and result["metrics"]["target_vendor"] == 1
    assert result["metrics"]["fid"] == pytest.approx(0, abs=1e-6)
    assert result["intervals"]["content"] == [1, 1] and result["protocol"]["features"].startswith(
        "judge of flat, dotted"
    )
    (row,) = csv.DictReader((tmp_path / "r.csv").open())
    assert row["content"] == "1.0" and row["target_vendor_low"] == "1.0"
    assert [line["content"] for line in csv.DictReader((tmp_path / "r_images.csv").open())] == ["1.0"] * 8
    for text in ((tmp_path / "r.md").read_text(), capsys.readouterr().out):
        assert "| content found again | 1 |" in text and "| taken for the target | 1 |" in text and "Fréchet" in text


def measured(path, outputs, truth, **options):
    options = {"image_size": 16, "lpips": "False", "device": "cpu", **options}
    return evaluate(Evaluation(outputs=str(outputs), truth=str(truth), features=str(path), **options))


def test_permuted_outputs_and_other_vendors_are_seen(data, path, tmp_path):
    truth = data / "shiny" / "test"
    permuted = tmp_path / "permuted"
    permuted.mkdir()
    names = sorted(each.name for each in truth.iterdir())
    for name, other in zip(names, [*names[2:], *names[1::-1]]):
        shutil.copy(truth / other, permuted / name)
    assert measured(path, permuted, truth)[0]["metrics"]["content"] == 0
    half = tmp_path / "half"  # two of the eight in the target's way
    shutil.copytree(data / "flat" / "test", half)
    for name in names[:2]:
        shutil.copy(truth / name, half / name)
    result, images = measured(path, half, truth, bootstrap=50)
    assert result["metrics"]["target_vendor"] == pytest.approx(0.25, abs=0.13)
    assert [row["target_vendor"] for row in images][:2] == [1, 1]
    low, high = result["intervals"]["target_vendor"]
    assert low < result["metrics"]["target_vendor"] < high


def test_some_of_many_truths(data, path, tmp_path):
    """The nearest is sought among all images of the folder, also among those without an output."""
    truth, few = data / "shiny" / "test", tmp_path / "few"
    few.mkdir()
    name, other = sorted(each.name for each in truth.iterdir())[:2]
    shutil.copy(truth / other, few / name)
    result, _ = measured(path, few, truth, partial=True)
    assert result["metrics"]["content"] == 0 and result["counts"]["truth_pairs"] == 1
    shutil.copy(truth / name, few / name)
    assert measured(path, few, truth, partial=True)[0]["metrics"]["content"] == 1


def test_without_a_truth_there_is_no_content(data, path):
    options = Evaluation(outputs=str(data / "flat" / "test"), targets=str(data / "shiny" / "test"), features=str(path))
    result, images = evaluate(options, instruments=Instruments(options))
    assert result["metrics"]["content"] is None and result["metrics"]["target_vendor"] < 0.5
    assert result["metrics"]["fid"] > 0 and {"target_vendor"} == set(images[0]) - {"output"}


def test_no_other_features_have_its_metrics(data):
    """And where nothing but a truth is given, no extractor is loaded."""
    folder = str(data / "shiny" / "test")
    result, _ = evaluate(Evaluation(outputs=folder, truth=folder, image_size=16, lpips="False", device="cpu"))
    assert result["metrics"]["content"] is None and result["metrics"]["target_vendor"] is None
    assert result["metrics"]["truth_ssim"] == 1


def test_its_metrics_are_registered():
    assert [metric.name for metric in table.judged()] == ["content", "target_vendor"]
    assert all(METRICS[name].lower_is_better is False for name in ("content", "target_vendor"))
    assert {"content", "target_vendor"} <= {column.key for column in table.columns()}


# ---- its file -------------------------------------------------------------------------------------------------------


def test_one_call_gives_all_that_it_says(path):
    judge = load_judge(path)
    assert judge.vendors == list(VENDORS) and judge.image_size == SIZE
    images = torch.rand(3, 3, SIZE, SIZE)
    features, embeddings, vendors = judge.judge(images)
    assert features.shape == (3, 192) and vendors.shape == (3, 3)
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(3)) and torch.allclose(vendors.sum(1), torch.ones(3))
    assert torch.equal(feature_extractor(str(path), device="cpu").extract(images), features)
    logits, again = judge(images * 2 - 1)  # what training sees
    assert torch.allclose(logits.softmax(1), vendors) and torch.allclose(again, embeddings)


def test_the_repositorys_judge():
    """`judge` means the committed file, which knows a flat picture of its training from a glossy one."""
    judge = feature_extractor("judge", device="cpu").judge
    assert judge.vendors == ["twitter", "google", "fluent3d"] and judge.image_size == 64
    assert DEFAULT_PATH.stat().st_size < 5e6 and DEFAULT_PATH.with_suffix(".md").is_file()


def changed(tensors, metadata, **change):
    """A judge's file with another metadata entry or tensor; None takes it away."""
    parts = {**tensors, **metadata}
    parts.update(change)
    parts = {name: value for name, value in parts.items() if value is not None}
    texts = {name: value for name, value in parts.items() if isinstance(value, str)}
    return {name: value for name, value in parts.items() if name not in texts}, texts


@pytest.mark.parametrize(
    "change, words",
    [
        ({"vendors": "flat"}, "not JSON"),
        ({"vendors": '["flat"]'}, "2 to 64 different vendors"),
        (
            {"vendors": '["flat", "dotted"]', "target": "dotted"},
            "vendor.weight is float16 [3, 192], [2, 192] is needed",
        ),
        ({"target": "flat"}, "not the last of its vendors"),
        ({"flags": "[1]"}, "metadata flags must be"),
        ({"flags": '{"image_size": 16, "width": 1000000, "features": 192, "embedding": 128}'}, "width is 1000000"),
        ({"flags": '{"image_size": 20, "width": 8, "features": 192, "embedding": 128}'}, "a multiple of 16"),
        ({"flags": '{"image_size": true, "width": 8, "features": 192, "embedding": 128}'}, "image_size is True"),
        ({"content.bias": None}, "'content.bias' is missing"),
        ({"more.bias": torch.zeros(3)}, "'more.bias' is unknown"),
        ({"content.bias": torch.full((128,), float("nan"))}, "NaN or infinite"),
        ({"content.bias": torch.zeros(128, dtype=torch.int32)}, "int32 [128]"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_one_line(path, tmp_path, change, words):
    tensors, metadata = changed(*read(path), **change)
    save_file(tensors, tmp_path / "j.safetensors", metadata)
    with pytest.raises(InputError) as caught:
        feature_extractor(str(tmp_path / "j.safetensors"), device="cpu")
    assert words in str(caught.value) and "\n" not in str(caught.value) and caught.value.parameter == "features"


def test_what_is_no_judge_at_all(path, tmp_path):
    tensors, _ = read(path)
    save_file(tensors, tmp_path / "bare.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-7])
    for name, words in (("bare", "is not a judge"), ("cut", "truncated"), ("none", "does not exist")):
        with pytest.raises(InputError, match=words):
            load_judge(tmp_path / f"{name}.safetensors")
        with pytest.raises(InputError):
            feature_extractor(str(tmp_path / f"{name}.safetensors"), device="cpu")
