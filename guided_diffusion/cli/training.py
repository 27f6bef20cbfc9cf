"""Flags of the training loop, and the part that all training commands share."""

import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch

from ..dist_util import Ranks, ranks
from ..errors import display_name
from ..resample import create_named_schedule_sampler
from ..runtime import pick_device, pick_precision
from ..training.config import ClassifierRunOptions, RunOptions, TrainConfig, precision
from ..training.data import TrainImages
from ..training.files import write_run
from ..training.loop import Trainer, process_group
from ..training.losses import Loss
from ..training.start import Start, describe
from .flags import Given, Parser
from .main import DONE, INTERRUPTED, say

FROM_CHECKPOINT = "if not given: as in the checkpoint that training starts from, or the default"


def add_loop(parser: Parser, run: type, *, without: Sequence[str], defaults: dict[str, Any] | None = None) -> None:
    """The flags of the loop and of how it runs, with other defaults for some. OPENAI_LOGDIR names the save folder."""
    defaults = dict(defaults or {})
    if folder := os.environ.get("OPENAI_LOGDIR"):
        defaults["save_dir"] = folder
    parser.add(TrainConfig, run, title="training", without=without, defaults=defaults)


def loop_config(given: Given, run: RunOptions) -> TrainConfig:
    """Options of the loop: guided-diffusion's spellings resolved, and `auto` replaced by the device's precision."""
    device = pick_device(run.device, ranks().local_rank)
    chosen = pick_precision(precision(run, given.precision), device)
    config = given.options(TrainConfig, precision=chosen)
    if isinstance(run, ClassifierRunOptions) and run.anneal_lr:
        config = dataclasses.replace(config, lr_anneal_steps=config.iterations)
    return config


def train(
    start: Start,
    images: TrainImages,
    losses: Loss,
    diffusion: Any,
    config: TrainConfig,
    record: Sequence[Any],
    ranks: Ranks,
    device: torch.device,
    use: str,
    **hooks: Any,
) -> int:
    """Train a network and say where it is and how to use it; returns the exit status.

    diffusion: anything with the `num_timesteps` of the process. record: all options of the run. use: a command with
    {path}. hooks: `evaluate` and `sample` of `Trainer`.
    """
    write_run(config.save_dir, start.flags, record, start.classes, resumed=start.checkpoint, writes=ranks.rank == 0)
    describe(start, images, device, config)
    sampler = create_named_schedule_sampler(config.schedule_sampler, diffusion, config.sigma_mean, config.sigma_std)
    with process_group(ranks, device):
        trainer = Trainer(
            start.model, losses, images, config, sampler, device=device, ranks=ranks, checkpoint=start.checkpoint,
            metadata=start.metadata(), progress=sys.stderr.isatty(), **hooks,
        )  # fmt: skip
        finished = trainer.run()
    path = display_name(config.export_path())
    if ranks.rank == 0 and finished:
        say(f"done: the model is {path}; use it with\n  {use.replace('{path}', path)}")
    elif ranks.rank == 0:
        say("to resume, run the same command with --resume auto")
    return DONE if finished else INTERRUPTED
