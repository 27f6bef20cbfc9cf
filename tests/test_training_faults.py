"""Training with inputs that do not fit, damaged files, full disks and kills: one line, and nothing lost or mixed up."""

import contextlib
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
from PIL import Image
from test_training import make_loop
from test_training_runs import EXTRACTOR, MODEL, load_command, words
from torch.utils._python_dispatch import TorchDispatchMode

from guided_diffusion.checkpoint import load_model
from guided_diffusion.errors import InputError
from guided_diffusion.options import field_types
from guided_diffusion.run.files import Folder
from guided_diffusion.script_util import create_gaussian_diffusion
from guided_diffusion.training import config as options
from guided_diffusion.training import files
from guided_diffusion.training.config import TrainConfig
from guided_diffusion.training.data import class_labels, folder_names, list_domains, list_images
from guided_diffusion.training.files import ProgressLog
from guided_diffusion.training.losses import loss_weights, means_by_quarter
from guided_diffusion.training.start import DIFFUSION, ENCODER, check_network

SMALL = [
    *MODEL,
    *words("--diffusion_steps 30 --batch_size 2 --device cpu --ema_rate 0.9 --save_interval 1 --log_interval 1"),
]


def draw(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four pictures in each of two folders."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(8):
        draw(folder / ("cat" if i < 4 else "dog") / f"{i}.png", i)
    return folder


@pytest.fixture(scope="module")
def command():
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield load_command(monkeypatch)


@pytest.fixture(scope="module")
def finished(folder, command, tmp_path_factory):
    """A run of two steps."""
    save_dir = tmp_path_factory.mktemp("finished")
    assert command("image_train", "--data_dir", folder, "--save_dir", save_dir, *SMALL, "--iterations", 2) == 0
    return save_dir


@pytest.fixture
def run(finished, tmp_path):
    """A copy of that run, to be damaged."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def resume(command, folder, run):
    """Resumes that run for one more step: resume(*flags)."""

    def again(*flags):
        base = ["--data_dir", folder, "--save_dir", run, "--resume", "auto", "--iterations", 3]
        return command("image_train", *base, *SMALL, *flags)

    return again


# ---- options --------------------------------------------------------------------------------------------------------

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


# ---- the loss's weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", [{"p2_gamma": float("inf")}, {"p2_gamma": 50, "p2_k": 1e10}])
def test_weights_that_train_nothing_are_refused(weighting):
    with pytest.raises(InputError) as error:
        loss_weights(create_gaussian_diffusion(steps=50, noise_schedule="cosine"), **weighting)
    assert error.value.parameter in weighting


# ---- networks that cannot be ----------------------------------------------------------------------------------------


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
        kind.attention: sides,
    }  # fmt: skip
    flags |= {"num_res_blocks": 1, "classifier_depth": 1, "num_class": 3}
    levels = mult.count(",") + 1
    try:
        check_network(kind, flags)
    except InputError as error:
        assert "\n" not in str(error)
        if size % 2 ** (levels - 1):
            assert error.parameter in ("image_size", "channel_mult")
    else:
        assert size % 2 ** (levels - 1) == 0


# ---- classes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        [f"{i:04d}_small.png" for i in range(6)],
        [f"video{i}/frame.png" for i in range(6)],
        ["cat_1.png", "cat_2.png", "dog.png"],
    ],
)
def test_pictures_that_would_be_classes_of_their_own_are_refused(tmp_path, names):
    for name in names:
        draw(tmp_path / name)
    with pytest.raises(InputError, match="into a folder"):
        class_labels(list_images(str(tmp_path)))


def test_classes_are_recorded_compared_and_keep_their_numbers(command, folder, tmp_path, caplog):
    base = ["--save_dir", tmp_path / "run", *SMALL, "--class_cond", "True"]
    with caplog.at_level(logging.INFO):
        command("image_train", "--data_dir", folder, *base, "--iterations", 1)
    assert "classes: cat (4), dog (4)" in caplog.text
    assert files.read_run(str(tmp_path / "run")).classes == ["cat", "dog"]
    exported = tmp_path / "run" / "model.safetensors"
    assert json.loads(load_model(exported)[1].metadata["classes"]) == ["cat", "dog"]

    renamed = shutil.copytree(folder, tmp_path / "renamed")
    (renamed / "dog").rename(renamed / "ape")
    with pytest.raises(InputError, match=r"are ape, cat; the run of .* was trained with cat, dog"):
        command("image_train", "--data_dir", renamed, *base, "--iterations", 2, "--resume", "auto")

    # Fine-tuned on one of its classes, a model keeps that class's number.
    (renamed / "ape").rename(renamed / "dog")
    shutil.rmtree(renamed / "cat")
    other = ["--data_dir", renamed, "--save_dir", tmp_path / "other", "--resume_checkpoint", exported]
    command("image_train", *other, *words("--iterations 1 --device cpu --log_interval 1"))
    assert files.read_run(str(tmp_path / "other")).classes == ["cat", "dog"]


def test_classes_of_version_0_1_are_read(tmp_path):
    record = {"model": {"num_class": 2}, "flags": {"classes": ["a", "b"]}}
    (tmp_path / "train.json").write_text(json.dumps(record))
    assert files.read_run(str(tmp_path)).classes == ["a", "b"]


def test_domains_are_called_by_what_tells_their_folders_apart(folder, tmp_path):
    assert folder_names(["/a/cat", "/b/dog"]) == ["cat", "dog"]
    assert folder_names(["/e/cat/train", "/e/dog/train", "/e/fox/train"]) == ["cat", "dog", "fox"]
    assert folder_names(["/a/x", "/a/y", "/b/x"]) == ["a-x", "a-y", "b-x"]
    assert list_domains(f"{folder}/cat,{folder}/dog")[2] == ["source", "target"]
    shutil.copytree(folder / "cat", tmp_path / "wild")
    references, labels, names = list_domains(f"{folder}/cat,{tmp_path}/wild,{folder}/dog")
    assert names == ["cat", "wild", "dog"] and labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert [reference.name.split("/")[0] for reference in references] == [names[label] for label in labels]
    link = tmp_path / "link"
    link.symlink_to(folder / "cat")
    with pytest.raises(InputError) as error:
        list_domains(f"{folder}/cat,{link}")
    assert error.value.parameter == "domains"


# ---- folders --------------------------------------------------------------------------------------------------------


def test_a_run_does_not_train_on_its_own_sample_grids(command, folder, tmp_path):
    data = shutil.copytree(folder, tmp_path / "data")
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "inside").symlink_to(data)
    for inside in (data, data / "out", linked / "inside" / "out"):
        with pytest.raises(InputError) as error:
            command("image_train", "--data_dir", data, "--save_dir", inside, *SMALL, "--iterations", 1)
        assert error.value.parameter == "save_dir"
    draw(tmp_path / "run" / "samples" / "000001.png")
    (data / "shots").symlink_to(tmp_path / "run" / "samples")
    with pytest.raises(InputError, match="sample grids are among"):
        command("image_train", "--data_dir", data, "--save_dir", tmp_path / "run", *SMALL, "--iterations", 1)


def test_an_export_does_not_overwrite_what_training_starts_from(command, folder, run, tmp_path):
    published = tmp_path / "model.safetensors"
    shutil.copy(run / "model.safetensors", published)
    base = ["--data_dir", folder, "--resume_checkpoint", published, "--iterations", 1, "--device", "cpu"]
    with pytest.raises(InputError) as error:
        command("image_train", *base, "--save_dir", tmp_path)
    assert error.value.parameter == "resume_checkpoint"
    with pytest.raises(InputError):
        command("image_train", *base, "--save_dir", tmp_path / "new", "--export", published)
    assert published.read_bytes() == (run / "model.safetensors").read_bytes()


def test_two_trainings_do_not_share_a_folder(resume, run):
    held = Folder(run)
    held.lock()
    with pytest.raises(InputError) as error:
        resume()
    assert error.value.parameter == "save_dir"
    held.release()
    assert resume() == 0


def test_rolling_back_mentions_the_checkpoints_that_stay(command, folder, run, caplog):
    base = ["--data_dir", folder, "--save_dir", run, "--iterations", 2, *SMALL]
    command("image_train", *base, "--resume_checkpoint", run / "model000001.pt")
    assert "later checkpoints, of step 2" in caplog.text


# ---- killed, and resumed --------------------------------------------------------------------------------------------


def test_a_run_killed_before_its_export_exports_when_resumed(command, folder, run):
    exported = (run / "model.safetensors").read_bytes()
    again = ["--data_dir", folder, "--save_dir", run, *SMALL, "--iterations", 2, "--resume", "auto"]
    (run / "model.safetensors").unlink()
    for _ in range(2):
        assert command("image_train", *again) == 0
        assert (run / "model.safetensors").read_bytes() == exported
        (run / "model.safetensors").write_bytes(exported[:1000])


def test_a_resumed_classifier_exports_the_same_bytes(command, folder, tmp_path):
    flags = [*EXTRACTOR, *words("--log_interval 1 --save_interval 1 --ema_rate 0.9 --data_dir"), folder, "--save_dir"]
    command("classifier_train", *flags, tmp_path / "a", "--iterations", 2)
    for iterations in (1, 2):
        command("classifier_train", *flags, tmp_path / "b", "--iterations", iterations, "--resume", "auto")
    whole, resumed = (tmp_path / name / "model.safetensors" for name in "ab")
    assert whole.read_bytes() == resumed.read_bytes()


def test_the_same_model_exports_the_same_bytes():
    state = {"b": torch.ones(3), "a": torch.arange(4.0)}
    texts = {name: name for name in ("flags", "classes", "training", "model_type")}
    first = files.exported_bytes(state, texts, torch.float16)
    assert all(files.exported_bytes(state, dict(texts), torch.float16) == first for _ in range(5))
    from safetensors.torch import load

    assert {name: value.tolist() for name, value in load(first).items()} == {"a": [0, 1, 2, 3], "b": [1, 1, 1]}


def test_a_flag_spelt_in_another_way_is_the_same_flag(command, folder, tmp_path):
    """The network of 8 pixels and two levels has no map of 2 pixels; 32,64 channels are those of 1,2."""
    flags = words("--image_size 8 --num_channels 32 --num_res_blocks 1 --num_heads 1 --ema_rate 0.9 --batch_size 1")
    flags += words("--device cpu --log_interval 1 --data_dir")
    base = [*flags, folder, "--save_dir", tmp_path, "--resume", "auto"]
    for iteration, (mult, sides) in enumerate([("1,2", "4"), ("1.0, 2.0", "2, 4"), ("", "")], 1):
        spelt = ["--channel_mult", mult, "--attention_resolutions", sides] if mult else []
        command("image_train", *base, *spelt, "--iterations", iteration)
    with pytest.raises(InputError) as error:
        command("image_train", *base, "--attention_resolutions", "8", "--iterations", 9)
    assert error.value.parameter == "attention_resolutions"


def test_an_average_is_found_however_its_rate_is_spelt(resume, run, caplog):
    expected = torch.load(run / "ema_0.9_000002.pt")
    assert files.find_ema(str(run), "0.900", 2) == str(run / "ema_0.9_000002.pt")
    assert resume("--ema_rate", "0.900") == 0
    assert "does not exist" not in caplog.text
    moved = torch.load(run / "ema_0.900_000003.pt")
    assert all((moved[name] - value).abs().max() < 0.01 for name, value in expected.items())


# ---- damaged files --------------------------------------------------------------------------------------------------


DAMAGED = [
    ("train.json", b""), ("train.json", b"[" * 100_000), ("train.json", b'{"model": {}, "classes": [1, 2]}'),
    ("train.json", b'{"model": {"no_such_flag": 1}}'), ("train.json", b'{"model": {"image_size": "eight"}}'),
    ("train.json", b'{"model": {}, "flags": [1]}'), ("train.json", b'{"model": {"image_size": 1e308}}'),
    ("progress.csv", b"\xff\xfe\0\0"), ("progress.csv", b"a,b\n1,2\n"), ("progress.csv", b"step,step\n1,2\n"),
    *((name, b"PK\3\4") for name in ("model000002.pt", "opt000002.pt", "ema_0.9_000002.pt")),
    ("opt000002.pt", b"\x80\2" + b"]" * 5000 + b"."),
]  # fmt: skip


@pytest.mark.parametrize("name, data", DAMAGED, ids=[f"{name}-{data[:12]!r}" for name, data in DAMAGED])
def test_a_damaged_file_is_named_in_one_line(resume, run, name, data):
    (run / name).write_bytes(data)
    with pytest.raises(InputError) as error:
        resume()
    text = str(error.value)
    assert name in text or error.value.parameter, text
    assert "\n" not in text and len(text) < 1500
    assert not (run / "model000003.pt").exists()


@pytest.mark.parametrize("put", [os.mkdir, os.mkfifo], ids=["folder", "fifo"])
@pytest.mark.parametrize("name", ["train.json", "progress.csv", "opt000002.pt"])
def test_something_else_in_the_place_of_a_file(resume, run, name, put):
    (run / name).unlink()
    put(run / name)
    with pytest.raises(InputError):
        resume()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_in_an_optimizer_file_is_found(finished, tmp_path, data):
    loop, _ = make_loop(None, tmp_path, images=[0])
    blob = bytearray((finished / "opt000002.pt").read_bytes())
    place = data.draw(st.integers(0, len(blob) - 1))
    blob[place] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path / "opt000002.pt"
    path.write_bytes(blob)
    expected, _ = files.load_optimizer_file(str(finished / "opt000002.pt"), loop.params)
    try:
        found, _ = files.load_optimizer_file(str(path), loop.params)
    except InputError as error:
        assert path.name in str(error)
    else:  # in the archive's padding, or in a time of writing
        for number, entries in expected.items():
            assert all(torch.equal(value, found[number][name]) for name, value in entries.items())


OTHERS = {
    "moments of another shape": (("state", 0, "exp_avg"), torch.zeros(1)),
    "a sparse moment": (("state", 0, "exp_avg"), torch.zeros(3, 3).to_sparse()),
    "no moment": (("state", 0), {"step": torch.tensor(1.0)}),
    "a parameter too many": (("state", 999), {}),
    "NaN": (("state", 0, "exp_avg"), lambda like: torch.full_like(like, float("nan"))),
    "a negative square": (("state", 0, "exp_avg_sq"), lambda like: torch.full_like(like, -1.0)),
    "a negative step": (("state", 0, "step"), torch.tensor(-5.0)),
    "parameters in another order": (("param_groups", 0, "params"), lambda numbers: numbers[::-1]),
    "groups of texts": (("param_groups",), ["x"]),
    "train as text": (("train",), "x"),
    "negative samples": (("train", "samples"), -3),
    "totals of another shape": (("train", "totals"), {"loss": torch.zeros(2)}),
}


@pytest.mark.parametrize("keys, value", OTHERS.values(), ids=OTHERS)
def test_an_optimizer_file_of_another_network_is_refused(resume, run, keys, value):
    path = run / "opt000002.pt"
    content = torch.load(path, weights_only=True)
    place = functools.reduce(operator.getitem, keys[:-1], content)
    place[keys[-1]] = value(place[keys[-1]]) if callable(value) else value
    torch.save(content, path)
    with pytest.raises(InputError, match=r"opt000002\.pt"):
        resume()


def test_state_of_a_schedule_sampler_of_another_process_is_refused(command, folder, tmp_path):
    flags = [*MODEL, *words("--batch_size 2 --device cpu --schedule_sampler loss-second-moment --ema_rate 0.9")]
    base = ["--data_dir", folder, "--save_dir", tmp_path, "--diffusion_steps", 30, *flags]
    command("image_train", *base, "--iterations", 1)
    path = tmp_path / "opt000001.pt"
    content = torch.load(path, weights_only=True)
    table = content["train"]["schedule_sampler"]["losses"]
    for wrong in (table[:5], torch.full_like(table, float("nan"))):
        content["train"]["schedule_sampler"]["losses"] = wrong
        torch.save(content, path)
        with pytest.raises(InputError, match="schedule_sampler"):
            command("image_train", *base, "--iterations", 2, "--resume", "auto")


def test_hyperparameters_in_an_optimizer_file_do_not_count(resume, run):
    path = run / "opt000002.pt"
    content = torch.load(path, weights_only=True)
    content["param_groups"][0] |= {"betas": "x", "eps": -1, "fused": "maybe", "lr": None, "amsgrad": True}
    torch.save(content, path)
    assert resume() == 0


# ---- a full disk ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def full_disk(left):
    """Files cannot grow beyond `left` bytes within the context: the system says so as it does for a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (left, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_log_that_cannot_grow_is_one_line(tmp_path):
    log = ProgressLog(str(tmp_path), 0)
    log.write({"step": 1, "loss": 0.5})
    size = (tmp_path / "progress.csv").stat().st_size
    with full_disk(size + 2), pytest.raises(InputError, match=r"progress\.csv"):
        log.write({"step": 2, "loss": 0.5})
    again = ProgressLog(str(tmp_path), 1)
    assert [row["step"] for row in again.rows] == ["1"]


@pytest.mark.parametrize("what", ["log", "grid"])
def test_a_disk_that_fills_up_does_not_lose_the_step(folder, tmp_path, monkeypatch, what):
    loop, _ = make_loop(folder, tmp_path, batch_size=1, iterations=5, log_interval=1, sample_interval=1)
    loop.sample = lambda model: np.zeros((1, 8, 8, 3), np.uint8)

    def fail(*arguments):
        if loop.step == 3:
            raise InputError("no room left to write it")

    if what == "log":
        monkeypatch.setattr(ProgressLog, "write", lambda log, row: fail())
    else:
        monkeypatch.setattr("guided_diffusion.training.loop.write_png", fail)
    with pytest.raises(InputError, match="no room left"):
        loop.run()
    assert files.saved_steps(tmp_path) == [3]


def test_a_checkpoint_that_does_not_fit_is_one_line(resume, run):
    with full_disk(4096), pytest.raises(InputError, match="no room left"):
        resume()
    assert files.saved_steps(str(run)) == [1, 2]
    assert resume() == 0


def test_tensorboard_that_fails_is_left_out(tmp_path, caplog, monkeypatch):
    class Broken:
        def __init__(self, folder, purge_step):
            pass

        def add_scalar(self, *arguments):
            raise OSError(28, "No space left on device")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Broken))
    log = ProgressLog(str(tmp_path), 0)
    log.write({"step": 1, "loss": 0.5})
    log.write({"step": 2, "loss": 0.5})
    log.close()
    assert caplog.text.count("TensorBoard") == 1 and (tmp_path / "progress.csv").read_text().count("\n") == 3


# ---- images, processes, devices -------------------------------------------------------------------------------------


@pytest.mark.parametrize("raised, parameter", [
    (torch.OutOfMemoryError("CUDA out of memory"), "batch_size"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory"), "batch_size"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), None),
])  # fmt: skip
def test_what_pytorch_raises_for_the_machine_is_one_line(folder, tmp_path, raised, parameter):
    loop, _ = make_loop(folder, tmp_path, batch_size=1, iterations=2)

    def losses(*arguments):
        raise raised

    loop.losses = losses
    with pytest.raises(InputError) as error:
        loop.run()
    assert error.value.parameter == parameter


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
    numbers = np.arange(2)
    loop.train_step(numbers, *next(loop.images.batches(iter([numbers]), "cpu")))
    with NoFloat64():
        loop.train_step(numbers, *next(loop.images.batches(iter([numbers]), "cpu")))


def test_means_are_taken_on_the_cpu():
    class OnDevice:
        def double(self):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

        def cpu(self):
            return torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 2.0], [0.0, 0.0]])

    assert means_by_quarter({"loss": OnDevice()}) == {"loss": 1.0, "loss_q0": 0.5, "loss_q2": 1.5}
