"""Training as people run it: processes that are killed and go on, several ranks, and flags that do not fit."""

import csv
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from guided_diffusion.checkpoint import load_model, read
from guided_diffusion.energy import dse

MODEL = "--image_size 8 --num_channels 32 --num_res_blocks 1 --channel_mult 1 --attention_resolutions 4".split()
# Everything that keeps a state of its own: two averages, dropout, loss-aware timesteps, loader processes, annealing.
RUN = [
    *MODEL,
    *"--dropout 0.2 --diffusion_steps 4 --noise_schedule cosine --schedule_sampler loss-second-moment".split(),
    *"--batch_size 6 --microbatch 4 --cache none --num_workers 2 --lr_anneal_steps 30 --lr_warmup_steps 3".split(),
    *"--lr 1e-3 --save_interval 4 --log_interval 3 --grad_clip 1 --weight_decay 0.01 --ema_rate 0.9,0.5".split(),
    *"--learn_sigma True --sample_interval 10 --sample_respacing 2 --device cpu".split(),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten dark and ten bright pictures in two folders."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, low in (("dark", 0), ("bright", 128)):
        (folder / name).mkdir()
        for i in range(10):
            squares = rng.integers(low, low + 128, (2, 2, 3), dtype=np.uint8)
            Image.fromarray(squares).resize((8, 8), Image.Resampling.NEAREST).save(folder / name / f"{i}.png")
    return folder


def start(*command, **options):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True, **options
    )


def train(folder, save_dir, *flags):
    return start("scripts/image_train.py", "--data_dir", folder, "--save_dir", save_dir, *RUN, *flags)


def finish(process, status=0):
    """What the process wrote to stderr; its exit status must be as expected."""
    _, text = process.communicate(timeout=120)
    assert process.returncode == status, text
    return text


def losses_by_step(save_dir):
    with open(save_dir / "progress.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k != "images_per_second"} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    save_dir = tmp_path_factory.mktemp("undisturbed")
    finish(train(folder, save_dir))
    return save_dir


@pytest.mark.parametrize("number, status", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_interrupted_run_ends_with_the_weights_of_an_undisturbed_one(folder, undisturbed, tmp_path, number, status):
    process = train(folder, tmp_path)
    while not (tmp_path / "model000008.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    text = finish(process, status)
    stopped_at = max(int(path.stem[5:]) for path in tmp_path.glob("model*.pt"))
    assert 8 <= stopped_at < 30
    if number == signal.SIGINT:
        assert f"stopped after step {stopped_at}; the same command with --resume auto goes on" in text
    finish(train(folder, tmp_path, "--resume", "auto"))

    for name in ("model000030.pt", "ema_0.9_000030.pt", "ema_0.5_000030.pt", "model.safetensors"):
        expected, actual = read(str(undisturbed / name))[0], read(str(tmp_path / name))[0]
        assert list(expected) == list(actual)
        assert all(torch.equal(expected[key], actual[key]) for key in expected), name
    expected, actual = (torch.load(path / "opt000030.pt", weights_only=True) for path in (undisturbed, tmp_path))
    for i, state in expected["state"].items():
        assert all(torch.equal(value, actual["state"][i][key]) for key, value in state.items())
    assert losses_by_step(tmp_path) == losses_by_step(undisturbed)
    assert len(losses_by_step(tmp_path)) == 10
    for name in ("000010.png", "000020.png", "000030.png"):
        assert (tmp_path / "samples" / name).read_bytes() == (undisturbed / "samples" / name).read_bytes()


def test_two_ranks_give_the_gradient_of_one(folder, tmp_path, monkeypatch):
    script = tmp_path / "gradient.py"
    script.write_text(
        f"""
import sys
import numpy as np, torch
sys.path[:0] = [{str(ROOT)!r}]
from guided_diffusion import dist_util, train_util
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.script_util import create_model_and_diffusion
from guided_diffusion.train_data import TrainImages, batch_numbers, list_images
from guided_diffusion.train_losses import diffusion_loss

ranks, device = dist_util.ranks(), torch.device("cpu")
torch.manual_seed(0)
model, diffusion = create_model_and_diffusion(
    image_size=8, num_channels=32, num_res_blocks=1, channel_mult="1", attention_resolutions="4", diffusion_steps=30
)
for p in model.parameters():
    torch.nn.init.normal_(p, std=0.05)
config = train_util.TrainConfig(
    batch_size=6 // ranks.world_size, microbatch=2, save_dir={str(tmp_path)!r}, schedule_sampler="loss-second-moment"
)
with train_util.process_group(ranks, device):
    loop = train_util.TrainLoop(
        model, diffusion_loss(diffusion), TrainImages(list_images({str(folder)!r}), 8, random_flip=True), config,
        create_named_schedule_sampler(config.schedule_sampler, diffusion), device=device, ranks=ranks,
    )
    numbers = next(batch_numbers(0, config.batch_size, ranks.rank, ranks.world_size))
    loop.backward(numbers, *next(loop.images.batches(iter([numbers]), device)))
    state = {{name: p.grad for name, p in model.named_parameters()}}
    state["losses"] = torch.from_numpy(loop.schedule_sampler.losses)
    torch.save(state, sys.argv[1] + f"{{ranks.rank}}of{{ranks.world_size}}.pt")
"""
    )
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    two = start(*launcher, script, tmp_path / "gradient")
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "gradient")])
    runpy.run_path(str(script))
    finish(two)
    joint = torch.load(tmp_path / "gradient0of1.pt")
    assert all(joint[name].abs().max() > 0 for name in joint)
    for rank in (0, 1):
        shared = torch.load(tmp_path / f"gradient{rank}of2.pt")
        for name in joint:
            torch.testing.assert_close(shared[name], joint[name], rtol=1e-4, atol=1e-6)


def test_extractor_of_two_domains_trains_measures_and_loads(folder, tmp_path):
    domains = f"{folder}/dark,{folder}/bright"
    flags = (
        "--image_size 8 --classifier_width 32 --classifier_depth 1 --channel_mult 1,2"
        " --classifier_attention_resolutions 4 --diffusion_steps 100 --device cpu"
        " --batch_size 8 --iterations 40 --eval_interval 20 --log_interval 20 --lr 1e-3"
    ).split()
    finish(
        start(
            "scripts/classifier_train.py",
            "--domains",
            domains,
            "--val_domains",
            domains,
            "--save_dir",
            tmp_path,
            *flags,
        )
    )
    last = losses_by_step(tmp_path)[-1]
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


# ---- flags ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def error_line(monkeypatch, capfd):
    """Runs a script's main in this process and returns its error line."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))

    def run(script, *flags):
        module = importlib.import_module(script)
        training = importlib.import_module("_training")
        monkeypatch.setattr(sys, "argv", [script, "--iterations", "1", *map(str, flags)])
        with pytest.raises(SystemExit) as end:
            training.run(module.train, module.parse_flags)
        lines = capfd.readouterr().err.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert end.value.code == 2 and len(errors) == 1 and lines[-1] == errors[0]
        return errors[0]

    return run


@pytest.mark.parametrize(
    "flags, message",
    [
        ("", "--data_dir is needed"),
        ("--data_dir nowhere", "--data_dir nowhere: no such file or folder"),
        ("--data_dir {folder} --batch_size 0", "--batch_size is 0; it must be at least 1"),
        ("--data_dir {folder} --batch_size many", "--batch_size: invalid int value: 'many'"),
        ("--data_dir {folder} --microbatch 0", "--microbatch is 0; it must be at least 1, or -1"),
        ("--data_dir {folder} --lr -1", "--lr is -1.0; it must be positive"),
        ("--data_dir {folder} --lr nan", "--lr is nan; it must be positive"),
        (
            "--data_dir {folder} --ema_rate 0.9,1.5",
            "--ema_rate is '0.9,1.5'; it is a list of numbers from 0 to below 1",
        ),
        ("--data_dir {folder} --precision fp8", "--precision is 'fp8'; it can be fp32 or bf16 or fp16"),
        ("--data_dir {folder} --use_fp16 True --precision bf16", "--use_fp16 True contradicts --precision bf16"),
        (
            "--data_dir {folder} --p2_gamma 1 --min_snr_gamma 5",
            "--p2_gamma 1.0 and --min_snr_gamma 5.0 exclude each other",
        ),
        (
            "--data_dir {folder} --p2_gamma 1 --use_kl True",
            "--p2_gamma weights a squared error, and --use_kl True has none",
        ),
        (
            "--data_dir {folder} --p2_gamma 1 --predict_xstart True",
            "--p2_gamma is defined for models that predict the noise",
        ),
        ("--data_dir {folder} --schedule_sampler often", "--schedule_sampler is 'often'; it can be uniform or"),
        ("--data_dir {folder} --schedule_sampler lognormal --sigma_std 0", "--sigma_std is 0.0; it must be positive"),
        ("--data_dir {folder} --schedule_sampler lognormal --sigma_mean nan", "--sigma_mean is nan; it must be a finite"),
        ("--data_dir {folder} --cache disk", "--cache is 'disk'; it can be auto, memory, device, none"),
        ("--data_dir {folder} --device cuda:77", "--device cuda:77: cannot be used here"),
        ("--data_dir {folder} --export model.pt", "--export model.pt: the name must end in .safetensors"),
        ("--data_dir {folder} --resume maybe", "--resume is 'maybe'; it can be empty or auto"),
        ("--data_dir {folder} --resume_checkpoint missing.pt", "missing.pt does not exist"),
        (
            "--data_dir {folder} --sample_interval 1 --sample_respacing ddim400",
            "--sample_respacing is ddim400; no integer stride",
        ),
        ("--data_dir {folder} --diffusion_steps 8", "--diffusion_steps 8 is too few for the linear schedule, which needs more than 20"),
        ("--data_dir {folder} --num_channels 40", "the model's flags do not go together: "),
        ("--data_dir {folder} --no_such_flag 1", "unrecognized arguments: --no_such_flag 1"),
    ],
)
def test_wrong_flags_get_one_line(error_line, folder, tmp_path, flags, message):
    line = error_line("image_train", *MODEL, *flags.format(folder=folder).split(), "--save_dir", tmp_path / "out")
    assert message in line


def test_another_run_is_not_overwritten_and_its_flags_are_kept(error_line, folder, undisturbed):
    base = ["--data_dir", folder, "--save_dir", undisturbed]
    assert "has checkpoints already, the newest of step 30: give --resume auto" in error_line("image_train", *base)
    line = error_line("image_train", *base, "--resume", "auto", "--noise_schedule", "linear")
    assert "--noise_schedule linear does not fit" in line and "noise_schedule=cosine" in line
    line = error_line("image_train", *base, "--resume", "auto", "--num_channels", "64")
    assert "--num_channels 64 does not fit" in line


def test_kinds_of_models_are_not_mixed_up(error_line, folder, undisturbed, tmp_path):
    domains = ["--domains", f"{folder}/dark,{folder}/bright", "--save_dir", tmp_path]
    line = error_line("classifier_train", *domains, "--resume_checkpoint", undisturbed / "model.safetensors")
    assert "is a diffusion model; scripts/image_train.py trains these" in line


@pytest.mark.parametrize(
    "flags, message",
    [
        ("", "--data_dir (a folder per class) or --domains (source,target) is needed"),
        ("--data_dir {folder} --domains a,b", "and only one of them"),
        ("--domains {folder}/dark", "it is two folders, source,target"),
        ("--domains {folder}/dark,{folder}/gone", "--domains {folder}/gone: no such file or folder"),
        ("--data_dir {folder} --val_domains a,b", "--val_domains a,b does not go with --data_dir"),
        ("--data_dir {folder}/dark/0.png", "has one class only"),
        ("--data_dir {folder} --classifier_pool max", "the model's flags do not go together: pool is 'max'"),
    ],
)
def test_wrong_flags_of_the_classifier_get_one_line(error_line, folder, tmp_path, flags, message):
    line = error_line("classifier_train", *flags.format(folder=folder).split(), "--save_dir", tmp_path / "out")
    assert message.format(folder=folder) in line
