"""Training as people run it: processes that are killed and go on, several ranks, and flags that do not fit."""

import json
import shutil
import signal

import pytest
import torch
from conftest import ROOT
from tiny_training import EXTRACTOR, MODEL, draw, end_at, finish, gradients, make_loop, rows, start, train, words

from guided_diffusion.checkpoint import load_model, load_state_dict
from guided_diffusion.energy import dse
from guided_diffusion.errors import InputError

# Everything that keeps a state of its own: two averages, dropout, loss-aware timesteps, reading threads, annealing.
RUN = [
    *MODEL,
    *words("--dropout 0.2 --diffusion_steps 4 --noise_schedule cosine --schedule_sampler loss-second-moment"),
    *words("--batch_size 6 --microbatch 4 --cache none --num_workers 2 --lr_anneal_steps 30 --lr_warmup_steps 3"),
    *words("--lr 1e-3 --save_interval 4 --log_interval 3 --grad_clip 1 --weight_decay 0.01 --ema_rate 0.9,0.5"),
    *words("--learn_sigma True --sample_interval 10 --sample_respacing 2 --device cpu"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten dark and ten bright pictures in two folders."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(10):
        draw(folder / "dark" / f"{i}.png", i, high=128)
        draw(folder / "bright" / f"{i}.png", 10 + i, low=128)
    return folder


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    save_dir = tmp_path_factory.mktemp("undisturbed")
    train("image_train", "--data_dir", folder, "--save_dir", save_dir, *RUN)
    return save_dir


def test_a_run_killed_and_interrupted_ends_with_the_weights_of_an_undisturbed_one(folder, undisturbed, tmp_path):
    flags = ["--data_dir", folder, "--save_dir", tmp_path, *RUN, "--resume", "auto"]
    for number, least, status in ((signal.SIGKILL, 8, -signal.SIGKILL), (signal.SIGINT, 16, 130)):
        process = start("scripts/image_train.py", *flags)
        end_at(process, tmp_path / f"model{least:06d}.pt", number)
        text = finish(process, status)
        stopped_at = max(int(path.stem[5:]) for path in tmp_path.glob("model*.pt"))
        assert least <= stopped_at < 30
    assert " of 30: loss" in text and " left" in text
    assert f"stopped after step {stopped_at}, which is saved" in text and "with --resume auto" in text
    train("image_train", *flags)

    for name in ("model000030.pt", "ema_0.9_000030.pt", "ema_0.5_000030.pt"):
        expected, actual = (load_state_dict(path / name) for path in (undisturbed, tmp_path))
        assert list(expected) == list(actual)
        assert all(torch.equal(expected[key], actual[key]) for key in expected), name
    expected, actual = (torch.load(path / "opt000030.pt", weights_only=True) for path in (undisturbed, tmp_path))
    for i, state in expected["state"].items():
        assert all(torch.equal(value, actual["state"][i][key]) for key, value in state.items())
    assert rows(tmp_path) == rows(undisturbed)
    assert [int(row["step"]) for row in rows(tmp_path)] == [*range(1, 11), *range(12, 31, 3)]
    for name in ("model.safetensors", "samples/000010.png", "samples/000020.png", "samples/000030.png"):
        assert (tmp_path / name).read_bytes() == (undisturbed / name).read_bytes()


def test_two_ranks_give_the_gradient_of_one(folder, tmp_path):
    script = tmp_path / "gradient.py"
    script.write_text(
        f"""
import sys, torch
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from tiny_training import gradients, make_loop
from guided_diffusion.dist_util import ranks
from guided_diffusion.training.loop import process_group

me = ranks()
with process_group(me, torch.device("cpu")):
    size = 6 // me.world_size
    loop, _ = make_loop(sys.argv[1], sys.argv[2], batch_size=size, microbatch=2, schedule_sampler="loss-second-moment",
                        ranks=me)
    torch.save([*gradients(loop)[0], torch.from_numpy(loop.schedule_sampler.losses)], sys.argv[2] + f"/{{me.rank}}.pt")
"""
    )
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    finish(start(*launcher, script, folder, tmp_path))
    loop, _ = make_loop(folder, tmp_path, batch_size=6, microbatch=2, schedule_sampler="loss-second-moment")
    joint = [*gradients(loop)[0], torch.from_numpy(loop.schedule_sampler.losses)]
    assert all(gradient.abs().max() > 0 for gradient in joint)
    for rank in (0, 1):
        for shared, alone in zip(torch.load(tmp_path / f"{rank}.pt"), joint, strict=True):
            torch.testing.assert_close(shared, alone, rtol=1e-4, atol=1e-6)


def test_extractor_of_two_domains_trains_measures_and_loads(folder, tmp_path):
    domains = f"{folder}/dark,{folder}/bright"
    flags = [*EXTRACTOR, *words("--iterations 40 --eval_interval 20 --log_interval 20 --lr 1e-3")]
    train("classifier_train", "--domains", domains, "--val_domains", domains, "--save_dir", tmp_path, *flags)
    last = rows(tmp_path)[-1]
    assert float(last["val_acc_q0"]) > 0.9 and float(last["val_acc_q0"]) >= float(last["val_acc_q3"])
    encoder, info = load_model(tmp_path / "model.safetensors")
    assert info.model_type == "ENCODER" and encoder.head == "I2Iout"
    assert info.flags["num_class"] == 2 and info.flags["diffusion_steps"] == 100
    assert not info.assumed  # the file states what its tensors do not tell
    assert json.loads(info.metadata["classes"]) == ["source", "target"]
    energy = dse(encoder)
    energy.prepare(torch.zeros(1, 3, 8, 8))
    value, gradient = energy.energy_and_grad(torch.rand(1, 3, 8, 8), torch.tensor([10]), 0.9)
    assert value.isfinite().all() and gradient.abs().max() > 0


def test_extractor_of_three_domains(folder, tmp_path):
    shutil.copytree(folder / "dark", tmp_path / "third")
    flags = [*words("--eval_interval 1 --save_dir"), tmp_path / "out", *EXTRACTOR, "--domains"]
    domains = f"{folder}/dark,{tmp_path}/third,{folder}/bright"
    train("classifier_train", *flags, domains, "--val_domains", domains, "--iterations", 1)
    encoder, info = load_model(tmp_path / "out" / "model.safetensors")
    assert encoder.head == "I2Iout" and info.flags["num_class"] == 3
    with pytest.raises(InputError, match="dark, third, bright"):  # the same domains in another order
        other = f"{tmp_path}/third,{folder}/dark,{folder}/bright"
        train("classifier_train", *flags, other, "--resume", "auto", "--iterations", 2)


def refused(script, *flags):
    """The InputError of a script's function for flags that it must refuse."""
    with pytest.raises(InputError) as error:
        train(script, "--iterations", "1", *flags)
    return error.value


def test_another_run_is_not_overwritten_and_its_flags_are_kept(folder, undisturbed):
    base = ["--data_dir", folder, "--save_dir", undisturbed]
    error = refused("image_train", *base)
    assert error.parameter == "save_dir" and "newest of step 30" in str(error)
    error = refused("image_train", *base, "--resume", "auto", "--noise_schedule", "linear")
    assert error.parameter == "noise_schedule" and "noise_schedule=cosine" in str(error)
    assert refused("image_train", *base, "--resume", "auto", "--num_channels", "64").parameter == "num_channels"
    exported = ["--resume_checkpoint", undisturbed / "model.safetensors"]
    assert refused("image_train", *base, *exported).parameter == "save_dir"


IMAGES = [  # a flag for each check of the options, the data and the network
    ("", "data_dir", "folder of training images"),
    ("--data_dir nowhere", "data_dir", "no such file"),
    ("--data_dir {folder} --ema_rate 0.99999999999999999999", "ema_rate", "below 1"),  # 1 as a float
    ("--data_dir {folder} --use_fp16 True --precision bf16", "precision", "use_fp16"),
    ("--data_dir {folder} --p2_gamma 1 --min_snr_gamma 5", "p2_gamma", "min_snr_gamma"),
    ("--data_dir {folder} --device cuda:77", "device", "cannot be used"),
    ("--data_dir {folder} --p2_gamma 50 --p2_k 1e10", "p2_gamma", "0, so that nothing would be trained"),
    ("--data_dir {folder} --resume_checkpoint missing.pt", None, "missing.pt does not exist"),
    ("--data_dir {folder} --sample_interval 1 --sample_respacing ddim400", "sample_respacing", "stride"),
    ("--data_dir {folder} --num_channels 40", None, "do not go together"),
    ("--data_dir {folder} --image_size 9 --channel_mult 1,2,2", "image_size", "a multiple of 4, like 8 or 12"),
    ("--data_dir {folder} --channel_mult 1e300", "channel_mult", "like 1,2,4"),
    ("--data_dir {folder} --num_channels 16384 --num_res_blocks 64", None, "memory"),
    ("--data_dir {folder} --save_dir {folder}/out", "save_dir", "training images"),
    ("--data_dir {folder} --save_dir /proc/none", "save_dir", "cannot be written"),
]
TWO = "--domains {folder}/dark,{folder}/bright"
CLASSIFIERS = [
    ("", "data_dir", "folder per class"),
    ("--data_dir {folder} --domains a,b", "data_dir", "domains"),
    ("--domains {folder}/dark", "domains", "two folders or more"),
    ("--domains {folder}/dark,{folder}", "domains", "would belong to both"),
    (f"{TWO} --val_domains {{folder}}/dark,{{folder}}/bright,x", "val_domains", "2 folders"),
    (f"{TWO} --classifier_pool max", None, "pool is 'max'"),
    (f"{TWO} --save_dir {{folder}}/dark/out", "save_dir", "training images"),
    (f"{TWO} --resume_checkpoint {{model}}", None, "is a diffusion model, and a classifier is to be trained"),
]


@pytest.mark.parametrize("flags, parameter, text", [*IMAGES, *CLASSIFIERS])
def test_flags_that_do_not_fit(folder, undisturbed, tmp_path, flags, parameter, text):
    given = flags.format(folder=folder, model=undisturbed / "model.safetensors").split()
    save_dir = [] if "--save_dir" in given else ["--save_dir", tmp_path / "out"]
    script = ["image_train", *MODEL] if (flags, parameter, text) in IMAGES else ["classifier_train"]
    error = refused(*script, *given, *save_dir)
    assert error.parameter == parameter and text in str(error)
