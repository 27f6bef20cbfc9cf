"""guided-diffusion's training loop, for scripts written for it: `TrainLoop(model=..., ...).run_loop()`.

Files, names and log entries are guided-diffusion's. This project's own loop is `training.loop.Trainer`, which resumes
to the same bits, also in the middle of the data.
"""

import contextlib
import copy
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from . import dist_util, logger
from .errors import InputError, display_name, first_line
from .fp16_util import MixedPrecisionTrainer
from .gaussian_diffusion import GaussianDiffusion
from .nn import update_ema
from .resample import LossAwareSampler, UniformSampler
from .run.files import write_atomically
from .training.files import load_optimizer_file

Batch = tuple[torch.Tensor, dict[str, torch.Tensor]]


class TrainLoop:
    """Trains a model on batches of an iterator; files go to `logger.get_dir()`, rows of numbers to `logger`.

    data: yields (images [N, C, H, W] in [-1, 1], keyword arguments of the model [N, ...]). ema_rate: one number, or
    several separated by commas. resume_checkpoint: a model*.pt to resume, whose name gives the step, with ema*.pt and
    opt*.pt beside it; or other weights to start from. Ranks of `dist_util.setup_dist` average gradients.
    """

    def __init__(
        self, *, model: torch.nn.Module, diffusion: GaussianDiffusion, data: Iterator[Batch], batch_size: int,
        microbatch: int, lr: float, ema_rate: float | str, log_interval: int, save_interval: int,
        resume_checkpoint: str, use_fp16: bool = False, fp16_scale_growth: float = 1e-3, schedule_sampler: Any = None,
        weight_decay: float = 0.0, lr_anneal_steps: int = 0,
    ) -> None:  # fmt: skip
        self.model, self.diffusion, self.data, self.batch_size = model, diffusion, data, batch_size
        self.microbatch = microbatch if microbatch > 0 else batch_size
        self.lr, self.lr_anneal_steps = lr, lr_anneal_steps
        self.ema_rate = [float(rate) for rate in ema_rate.split(",")] if isinstance(ema_rate, str) else [ema_rate]
        self.log_interval, self.save_interval = log_interval, save_interval
        self.schedule_sampler = schedule_sampler or UniformSampler(diffusion)
        grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = torch.distributed.get_rank() if grouped else 0
        self.world_size = torch.distributed.get_world_size() if grouped else 1
        self.global_batch = batch_size * self.world_size
        self.step = 0
        self.resume_checkpoint = find_resume_checkpoint() or resume_checkpoint
        self.resume_step = parse_resume_step_from_filename(self.resume_checkpoint)
        if self.resume_checkpoint:
            self._load(model, self.resume_checkpoint)
        dist_util.sync_params(model.parameters())
        self.mp_trainer = MixedPrecisionTrainer(model=model, use_fp16=use_fp16, fp16_scale_growth=fp16_scale_growth)
        self.opt = torch.optim.AdamW(self.mp_trainer.master_params, lr=lr, weight_decay=weight_decay)
        optimizer_path = os.path.join(os.path.dirname(self.resume_checkpoint), f"opt{self.resume_step:06}.pt")
        if self.resume_step and os.path.exists(optimizer_path):
            moments, _ = load_optimizer_file(optimizer_path, list(self.mp_trainer.master_params))
            self.opt.load_state_dict({**self.opt.state_dict(), "state": moments})
        self.ema_params = [self._average(rate) for rate in self.ema_rate]
        self.ddp_model: Any = model
        if self.world_size > 1:
            gpus = [dist_util.dev()] if dist_util.dev().type == "cuda" else None
            ddp = torch.nn.parallel.DistributedDataParallel
            self.ddp_model = ddp(model, device_ids=gpus, broadcast_buffers=False)

    def _load(self, model: torch.nn.Module, path: str) -> None:
        if self.rank == 0:
            logger.log(f"loading {path}...")
        try:
            model.load_state_dict(dist_util.load_state_dict(path, map_location="cpu"))
        except (RuntimeError, TypeError, AttributeError) as error:
            raise InputError(f"{display_name(path)} does not fit the model: {first_line(error)}") from error

    def _average(self, rate: float) -> list[torch.Tensor]:
        """The average of a rate beside the checkpoint that is resumed, or the model's parameters."""
        averaged, path = self.model, find_ema_checkpoint(self.resume_checkpoint, self.resume_step, rate)
        if self.resume_step and path:
            averaged = copy.deepcopy(self.model)
            self._load(averaged, path)
        params = [p.detach().clone() for p in averaged.parameters()]
        dist_util.sync_params(params)
        return params

    def run_loop(self) -> None:
        """Train for `lr_anneal_steps`, or without end if 0, and save the last step."""
        while not self.lr_anneal_steps or self.step + self.resume_step < self.lr_anneal_steps:
            batch, cond = next(self.data)
            self.run_step(batch, cond)
            if self.step % self.log_interval == 0:
                logger.dumpkvs()
            if self.step % self.save_interval == 0:
                self.save()
            self.step += 1
        if self.step and (self.step - 1) % self.save_interval != 0:
            self.save()

    def run_step(self, batch: torch.Tensor, cond: dict[str, torch.Tensor]) -> None:
        """Take and log one optimizer step on a batch."""
        self.forward_backward(batch, cond)
        if self.mp_trainer.optimize(self.opt):
            for rate, params in zip(self.ema_rate, self.ema_params):
                update_ema(params, self.mp_trainer.master_params, rate=rate)
        for group in self.opt.param_groups if self.lr_anneal_steps else ():
            group["lr"] = self.lr * (1 - (self.step + self.resume_step) / self.lr_anneal_steps)
        self.log_step()

    def forward_backward(self, batch: torch.Tensor, cond: dict[str, torch.Tensor]) -> None:
        """Compute the gradient of a batch's mean loss in microbatches."""
        self.mp_trainer.zero_grad()
        for at in range(0, len(batch), self.microbatch):
            part = slice(at, at + self.microbatch)
            micro = batch[part].to(dist_util.dev())
            micro_cond = {name: value[part].to(dist_util.dev()) for name, value in cond.items()}
            last = at + self.microbatch >= len(batch)
            t, weights = self.schedule_sampler.sample(len(micro), dist_util.dev())
            with contextlib.nullcontext() if last or self.world_size == 1 else self.ddp_model.no_sync():
                losses = self.diffusion.training_losses(self.ddp_model, micro, t, model_kwargs=micro_cond)
                if isinstance(self.schedule_sampler, LossAwareSampler):
                    self.schedule_sampler.update_with_local_losses(t, losses["loss"].detach())
                log_loss_dict(self.diffusion, t, {name: value * weights for name, value in losses.items()})
                self.mp_trainer.backward((losses["loss"] * weights).sum() / len(batch))

    def log_step(self) -> None:
        """Log the number of the step and of the samples so far."""
        logger.logkv("step", self.step + self.resume_step)
        logger.logkv("samples", (self.step + self.resume_step + 1) * self.global_batch)

    def save(self) -> None:
        """Write ema_{rate}_{step}.pt, opt{step}.pt and model{step}.pt; all processes must call it."""
        if self.rank == 0:
            step, state_dict = self.step + self.resume_step, self.mp_trainer.master_params_to_state_dict
            averages = {f"ema_{rate}_": state_dict(params) for rate, params in zip(self.ema_rate, self.ema_params)}
            model = state_dict(self.mp_trainer.master_params)
            for kind, state in {**averages, "opt": self.opt.state_dict(), "model": model}.items():
                logger.log(f"saving {kind}{step:06d}.pt...")
                path = os.path.join(get_blob_logdir(), f"{kind}{step:06d}.pt")
                write_atomically(path, lambda file, state=state: torch.save(state, file))
        if self.world_size > 1:
            torch.distributed.barrier()


def parse_resume_step_from_filename(filename: str) -> int:
    """The step in a name like path/to/model010000.pt; 0 for any other name."""
    _, found, rest = filename.rpartition("model")
    number = rest.split(".")[0]
    return int(number) if found and number.isascii() and number.isdigit() and len(number) <= 18 else 0


def get_blob_logdir() -> str:
    """The folder of a run's files."""
    return logger.get_dir() or "."


def find_resume_checkpoint() -> str | None:
    """A checkpoint to resume from, found automatically: none. Scripts replace this function."""
    return None


def find_ema_checkpoint(main_checkpoint: str | None, step: int, rate: float | str) -> str | None:
    """The average of a rate that lies beside a checkpoint of a step, or None."""
    path = os.path.join(os.path.dirname(main_checkpoint or ""), f"ema_{rate}_{step:06d}.pt")
    return path if main_checkpoint and os.path.exists(path) else None


def log_loss_dict(diffusion: GaussianDiffusion, ts: torch.Tensor, losses: dict[str, torch.Tensor]) -> None:
    """Log the means of losses [N] at timesteps ts [N], over all and by quarter of the timesteps (q0 to q3)."""
    for key, values in losses.items():
        values = values.detach().cpu()
        logger.logkv_mean(key, values.mean().item())
        for step, loss in zip(ts.cpu().tolist(), np.asarray(values.float())):
            logger.logkv_mean(f"{key}_q{int(4 * step / diffusion.num_timesteps)}", loss)
