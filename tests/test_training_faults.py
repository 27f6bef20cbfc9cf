"""Training with inputs that do not fit, damaged files, full disks and kills: one line, and nothing lost or mixed up."""

import dataclasses
import functools
import json
import logging
import operator
import os
import resource
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny_training import RUN, draw, draw_pets, make_loop, train, train_step, words
from torch.utils._python_dispatch import TorchDispatchMode

from guided_diffusion.checkpoint import load_model
from guided_diffusion.errors import InputError
from guided_diffusion.options import field_types
from guided_diffusion.run.files import Folder
from guided_diffusion.training import config as options
from guided_diffusion.training import files
from guided_diffusion.training.config import TrainConfig
from guided_diffusion.training.start import DIFFUSION, ENCODER, check_network


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return draw_pets(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """A run of two steps."""
    save_dir = tmp_path_factory.mktemp("finished")
    assert train("image_train", "--data_dir", folder, "--save_dir", save_dir, *RUN, "--iterations", 2) == 0
    return save_dir


@pytest.fixture
def run(finished, tmp_path):
    """A copy of that run, to be damaged."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def resume(folder, run):
    """Resumes that run for one more step: resume(*flags)."""
    base = ["image_train", "--data_dir", folder, "--save_dir", run, *RUN, "--resume", "auto", "--iterations", 3]
    return lambda *flags: train(*base, *flags)


CLASSES = [
    TrainConfig,
    *(getattr(options, f"{name}Options") for name in ("Data", "Class", "Loss", "Grid", "Run", "Model", "Encoder")),
]
ANY = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.lists(st.integers(), max_size=2),
    st.sampled_from([-1, 0, 10**12, float("inf"), "0.9,0.9,1", "\0", "../..", "x" * 10**5]),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_value_of_any_option_is_taken_or_refused_by_name(data):
    cls = data.draw(st.sampled_from(CLASSES))
    field = data.draw(st.sampled_from(dataclasses.fields(cls)))
    value = data.draw(ANY)
    try:
        made = cls(**{field.name: value})
    except InputError as error:
        assert error.parameter == field.name and len(str(error)) < 1000 and "\n" not in str(error)
    else:
        kinds = field_types(field)
        assert isinstance(getattr(made, field.name), (*kinds, int) if float in kinds else kinds)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    kind=st.sampled_from([DIFFUSION, ENCODER]),
    size=st.integers(1, 70),
    mult=st.lists(st.sampled_from(["1", "2", "0.5", "3", "0.01", "1e9", "1e-9"]), min_size=1, max_size=5).map(",".join),
    width=st.integers(1, 100),
    heads=st.integers(-1, 40),
    sides=st.sampled_from(["", "4", "8,4", "999", "1"]),
)
@example(kind=ENCODER, size=100, mult="1,2,2,2", width=32, heads=32, sides="8")
def test_a_network_is_refused_before_anything_is_trained(kind, size, mult, width, heads, sides):
    flags = {
        **kind.defaults(), "image_size": size, "channel_mult": mult, kind.size: width, "num_head_channels": heads,
        kind.attention: sides, "num_res_blocks": 1, "classifier_depth": 1, "num_class": 3,
    }  # fmt: skip
    odd = size % 2 ** mult.count(",") != 0
    try:
        check_network(kind, flags)
    except InputError as error:
        assert "\n" not in str(error)
        assert error.parameter in ("image_size", "channel_mult") or not odd
    else:
        assert not odd


def test_classes_are_recorded_compared_and_keep_their_numbers(folder, tmp_path, caplog):
    base = ["image_train", "--save_dir", tmp_path / "run", *RUN, "--class_cond", "True", "--data_dir"]
    with caplog.at_level(logging.INFO):
        train(*base, folder, "--iterations", 1)
    assert "classes: cat (4), dog (4)" in caplog.text
    exported = tmp_path / "run" / "model.safetensors"
    assert json.loads(load_model(exported)[1].metadata["classes"]) == ["cat", "dog"]

    renamed = shutil.copytree(folder, tmp_path / "renamed")
    (renamed / "dog").rename(renamed / "ape")
    with pytest.raises(InputError, match=r"are ape, cat; the run of .* was trained with cat, dog"):
        train(*base, renamed, "--iterations", 2, "--resume", "auto")

    # Fine-tuned on one of its classes, a model keeps that class's number.
    (renamed / "ape").rename(renamed / "dog")
    shutil.rmtree(renamed / "cat")
    other = ["--data_dir", renamed, "--save_dir", tmp_path / "other", "--resume_checkpoint", exported]
    train("image_train", *other, "--iterations", 1, "--device", "cpu")
    assert files.read_run(str(tmp_path / "other")).classes == ["cat", "dog"]


def test_a_run_does_not_train_on_its_own_outputs(folder, tmp_path):
    data = shutil.copytree(folder, tmp_path / "data")
    (tmp_path / "linked").symlink_to(data)
    draw(tmp_path / "run" / "samples" / "000001.png")
    (data / "shots").symlink_to(tmp_path / "run" / "samples")
    for save_dir in (data, data / "out", tmp_path / "linked" / "out", tmp_path / "run"):
        with pytest.raises(InputError) as error:
            train("image_train", "--data_dir", data, "--save_dir", save_dir, *RUN, "--iterations", 1)
        assert error.value.parameter == "save_dir"


def test_a_folder_belongs_to_one_run(folder, resume, run, tmp_path):
    """An export does not overwrite what training starts from, and two trainings do not share a folder."""
    published = shutil.copy(run / "model.safetensors", tmp_path / "model.safetensors")
    base = ["--data_dir", folder, "--resume_checkpoint", published, "--iterations", 1, "--device", "cpu", "--save_dir"]
    for where in ([tmp_path], [tmp_path / "new", "--export", published]):
        with pytest.raises(InputError) as error:
            train("image_train", *base, *where)
        assert error.value.parameter == "resume_checkpoint"
    assert published.read_bytes() == (run / "model.safetensors").read_bytes()
    held = Folder(run)
    held.lock()
    with pytest.raises(InputError) as error:
        resume()
    assert error.value.parameter == "save_dir"
    held.release()
    assert resume() == 0


def test_rolling_back_mentions_the_checkpoints_that_stay(folder, run, caplog):
    base = ["--data_dir", folder, "--save_dir", run, "--iterations", 2, *RUN]
    train("image_train", *base, "--resume_checkpoint", run / "model000001.pt")
    assert "later checkpoints, up to step 2" in caplog.text


def test_a_run_killed_before_its_export_exports_when_resumed(folder, run):
    exported = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(exported[:1000])
    train("image_train", "--data_dir", folder, "--save_dir", run, *RUN, "--iterations", 2, "--resume", "auto")
    assert (run / "model.safetensors").read_bytes() == exported


def test_a_flag_spelt_in_another_way_is_the_same_flag(folder, tmp_path):
    """The network of 8 pixels and two levels has no map of 2 pixels; 32,64 channels are those of 1,2."""
    flags = words("--image_size 8 --num_channels 32 --num_res_blocks 1 --num_heads 1 --ema_rate 0.9 --batch_size 1")
    base = ["image_train", *flags, "--device", "cpu", "--data_dir", folder, "--save_dir", tmp_path, "--resume", "auto"]
    for iteration, (mult, sides) in enumerate([("1,2", "4"), ("1.0, 2.0", "2, 4"), ("", "")], 1):
        spelt = ["--channel_mult", mult, "--attention_resolutions", sides] if mult else []
        train(*base, *spelt, "--iterations", iteration)
    with pytest.raises(InputError) as error:
        train(*base, "--attention_resolutions", "8", "--iterations", 9)
    assert error.value.parameter == "attention_resolutions"


def test_an_average_is_found_however_its_rate_is_spelt(resume, run, caplog):
    assert resume("--ema_rate", "0.900") == 0
    (run / "ema_0.9_000003.pt").rename(run / "ema_0.900_000003.pt")  # as versions before 0.3 called it
    assert resume("--ema_rate", "0.900", "--iterations", "4") == 0 and "does not exist" not in caplog.text


DAMAGED = [
    ("train.json", b""), ("train.json", b"[" * 100_000), ("train.json", b'{"model": {}, "classes": [1, 2]}'),
    ("train.json", b'{"model": {"no_such_flag": 1}}'), ("train.json", os.mkfifo), ("progress.csv", os.mkdir),
    ("progress.csv", b"step,step\n1,2\n"), *((name, b"PK\3\4") for name in ("model000002.pt", "ema_0.9_000002.pt")),
    ("opt000002.pt", b"\x80\2" + b"]" * 5000 + b"."), ("opt000002.pt", os.mkfifo),
]  # fmt: skip


@pytest.mark.parametrize("name, damage", DAMAGED)
def test_a_damaged_file_is_named_in_one_line(resume, run, name, damage):
    (run / name).unlink()
    damage(run / name) if callable(damage) else (run / name).write_bytes(damage)
    with pytest.raises(InputError) as error:
        resume()
    text = str(error.value)
    assert name in text or error.value.parameter, text
    assert "\n" not in text and len(text) < 1500
    assert not (run / "model000003.pt").exists()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_in_an_optimizer_file_is_found(finished, tmp_path, data):
    params = make_loop(None, tmp_path, images=[0])[0].params
    blob, path = bytearray((finished / "opt000002.pt").read_bytes()), tmp_path / "opt000002.pt"
    blob[data.draw(st.integers(0, len(blob) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(blob)
    expected, _ = files.load_optimizer_file(str(finished / "opt000002.pt"), params)
    try:
        found, _ = files.load_optimizer_file(str(path), params)
    except InputError as error:
        assert path.name in str(error)
    else:  # in the archive's padding, or in a time of writing
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


OTHERS = {
    "moments of another shape": ("state.0.exp_avg", torch.zeros(1)),
    "no moment": ("state.0", {"step": torch.tensor(1.0)}),
    "NaN": ("state.0.exp_avg", lambda like: torch.full_like(like, float("nan"))),
    "a negative square": ("state.0.exp_avg_sq", lambda like: torch.full_like(like, -1.0)),
    "parameters in another order": ("param_groups.0.params", lambda numbers: numbers[::-1]),
    "negative samples": ("train.samples", -3),
    "losses of another process": ("train.schedule_sampler.losses", lambda table: table[:5]),
}


@pytest.mark.parametrize("keys, value", OTHERS.values(), ids=OTHERS)
def test_an_optimizer_file_of_another_run_is_refused(folder, tmp_path, keys, value):
    config = {"batch_size": 1, "schedule_sampler": "loss-second-moment"}
    make_loop(folder, tmp_path, iterations=1, **config)[0].run()
    path = tmp_path / "opt000001.pt"
    content = torch.load(path, weights_only=True)
    *above, last = (int(key) if key.isdigit() else key for key in keys.split("."))
    place = functools.reduce(operator.getitem, above, content)
    place[last] = value(place[last]) if callable(value) else value
    torch.save(content, path)
    with pytest.raises(InputError, match=r"opt000001\.pt"):
        make_loop(folder, tmp_path, **config)[0]._resume(str(tmp_path / "model000001.pt"))


@pytest.mark.parametrize("what", ["files.ProgressLog.write", "write_png"])
def test_a_disk_that_fills_up_does_not_lose_the_step(folder, tmp_path, monkeypatch, what):
    loop, _ = make_loop(folder, tmp_path, batch_size=1, iterations=5, log_interval=1, sample_interval=1)
    loop.sample = lambda model: np.zeros((1, 8, 8, 3), np.uint8)

    def fail(*arguments):
        if loop.step == 3:
            raise InputError("no room left to write it")

    monkeypatch.setattr(f"guided_diffusion.training.loop.{what}", fail)
    with pytest.raises(InputError, match="no room left"):
        loop.run()
    assert files.saved_steps(tmp_path) == [3]


def test_a_checkpoint_that_does_not_fit_is_one_line(resume, run):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # the system says what it says for a full disk
    try:
        with pytest.raises(InputError, match="no room left"):
            resume()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert files.saved_steps(str(run)) == [1, 2]
    assert resume() == 0


def test_tensorboard_that_fails_is_left_out(tmp_path, caplog, monkeypatch):
    def writer(folder, purge_step):
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=writer))
    log = files.ProgressLog(str(tmp_path), 0)
    log.write({"step": 1, "loss": 0.5})
    assert caplog.text.count("TensorBoard") == 1 and (tmp_path / "progress.csv").read_text().count("\n") == 2


def test_a_lack_of_memory_is_one_line(folder, tmp_path, monkeypatch):
    loop, _ = make_loop(folder, tmp_path, batch_size=1, iterations=2)

    def losses(*arguments):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(loop, "losses", losses)
    with pytest.raises(InputError) as error:
        loop.run()
    assert error.value.parameter == "batch_size"


class NoFloat64(TorchDispatchMode):
    """A device without float64, as Apple's is: no operation may give it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (list, tuple)) else [result]:
            assert not isinstance(value, torch.Tensor) or value.dtype != torch.float64, function
        return result


@pytest.mark.parametrize("sampler", ["loss-second-moment", "lognormal"])
def test_a_step_computes_nothing_in_float64(folder, tmp_path, sampler):
    loop, _ = make_loop(folder, tmp_path, batch_size=2, schedule_sampler=sampler, weighting={"p2_gamma": 1.0})
    train_step(loop, np.arange(2))
    with NoFloat64():
        train_step(loop, np.arange(2))
