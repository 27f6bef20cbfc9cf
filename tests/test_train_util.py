"""guided-diffusion's TrainLoop as its scripts call it: files, log, resumption, and gradients of microbatches."""

import csv
import itertools

import numpy as np
import pytest
import torch

from guided_diffusion import logger, train_util
from guided_diffusion.errors import InputError
from guided_diffusion.fp16_util import convert_module_to_f16, convert_module_to_f32
from guided_diffusion.resample import create_named_schedule_sampler
from guided_diffusion.script_util import create_model_and_diffusion
from guided_diffusion.train_util import TrainLoop, log_loss_dict, parse_resume_step_from_filename


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(logger.Logger, "CURRENT", None)
    logger.configure(dir=str(tmp_path), format_strs=["csv", "log"])
    return tmp_path


def make(seed=0, class_cond=False, sampler="uniform", **changes):
    torch.manual_seed(seed)
    np.random.seed(seed)
    model, diffusion = create_model_and_diffusion(
        image_size=8, num_channels=32, num_res_blocks=1, channel_mult="1", attention_resolutions="4",
        diffusion_steps=30, class_cond=class_cond,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    batches = ((torch.rand(4, 3, 8, 8, generator=generator), {}) for _ in itertools.count())
    if class_cond:
        batches = ((batch, {"y": torch.arange(4)}) for batch, _ in batches)
    settings = {
        "batch_size": 4, "microbatch": -1, "lr": 1e-3, "ema_rate": "0.9,0.5", "log_interval": 2, "save_interval": 3,
        "resume_checkpoint": "", "lr_anneal_steps": 6,
    } | changes  # fmt: skip
    schedule = create_named_schedule_sampler(sampler, diffusion)
    return TrainLoop(model=model, diffusion=diffusion, data=batches, schedule_sampler=schedule, **settings)


def test_a_run_writes_guided_diffusions_files_and_resumes(folder):
    loop = make(class_cond=True, sampler="loss-second-moment")
    before = [p.detach().clone() for p in loop.model.parameters()]
    loop.run_loop()
    names = {path.name for path in folder.glob("*.pt")}
    assert names == {f"{kind}{step:06d}.pt" for kind in ("model", "opt", "ema_0.9_", "ema_0.5_") for step in (0, 3, 6)}
    assert any(not torch.equal(a, b) for a, b in zip(before, loop.model.parameters()))
    with open(folder / "progress.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "2", "4"] and [row["samples"] for row in rows] == ["4", "12", "20"]
    assert all(float(row["loss"]) > 0 and float(row["grad_norm"]) > 0 for row in rows)

    again = make(seed=9, class_cond=True, resume_checkpoint=str(folder / "model000003.pt"))
    assert again.resume_step == 3
    saved = torch.load(folder / "model000003.pt")
    assert all(torch.equal(value, saved[name]) for name, value in again.model.state_dict().items())
    average = torch.load(folder / "ema_0.5_000003.pt")
    assert all(
        torch.equal(p, average[name]) for (name, _), p in zip(again.model.named_parameters(), again.ema_params[1])
    )
    moments = torch.load(folder / "opt000003.pt")["state"]
    assert all(torch.equal(again.opt.state_dict()["state"][i]["exp_avg"], moments[i]["exp_avg"]) for i in moments)
    again.run_loop()
    assert again.step + again.resume_step == 6


def test_microbatches_give_the_gradient_of_the_batch(folder):
    def gradients(microbatch):
        loop = make(microbatch=microbatch)
        for parameter in loop.model.parameters():
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(3))
        loop.diffusion.training_losses = lambda model, x, t, model_kwargs: {
            "loss": (model(x, 0 * t) - x).square().mean((1, 2, 3))
        }
        loop.forward_backward(*next(loop.data))
        return [p.grad for p in loop.model.parameters()]

    for whole, parts in zip(gradients(-1), gradients(3), strict=True):
        assert whole.abs().max() > 0
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_files_that_do_not_fit_are_one_line(folder):
    make().run_loop()
    torch.save({"state": {}, "param_groups": []}, folder / "opt000006.pt")
    with pytest.raises(InputError, match=r"opt000006\.pt"):
        make(resume_checkpoint=str(folder / "model000006.pt"))
    torch.save({"x": torch.zeros(1)}, folder / "other.pt")
    with pytest.raises(InputError, match=r"other\.pt does not fit"):
        make(resume_checkpoint=str(folder / "other.pt"))
    with pytest.raises(InputError):
        make(resume_checkpoint=str(folder / "missing.pt"))


def test_helpers(folder):
    names = {"path/to/model010000.pt": 10000, "amodel12.pt": 12, "model.pt": 0, "models/model000007.pt": 7, "": 0}
    assert {name: parse_resume_step_from_filename(name) for name in names} == names
    log_loss_dict(make().diffusion, torch.tensor([0, 29, 8]), {"mse": torch.tensor([1.0, 2.0, 6.0])})
    assert logger.dumpkvs() == {"mse": 3.0, "mse_q0": 1.0, "mse_q1": 6.0, "mse_q3": 2.0}


def test_convolutions_alone_are_converted_to_half_precision_and_back():
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), torch.nn.Linear(1, 1))
    steps = convert_module_to_f16, convert_module_to_f32
    dtypes = [[p.dtype for p in network.apply(step).parameters()] for step in steps]
    assert dtypes == [[torch.float16] * 2 + [torch.float32] * 2, [torch.float32] * 4]


def test_scripts_find_their_own_checkpoints_by_replacing_the_function(folder, monkeypatch):
    assert train_util.get_blob_logdir() == str(folder) and train_util.find_resume_checkpoint() is None
    make(ema_rate=0.9).run_loop()
    model = str(folder / "model000006.pt")
    assert train_util.find_ema_checkpoint(model, 6, 0.9) == str(folder / "ema_0.9_000006.pt")
    assert train_util.find_ema_checkpoint(model, 7, 0.9) is train_util.find_ema_checkpoint(None, 6, 0.9) is None
    monkeypatch.setattr(train_util, "find_resume_checkpoint", lambda: model)
    assert make(ema_rate=0.9).resume_step == 6
