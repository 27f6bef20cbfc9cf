"""Flags of the training loop, and the last lines of a training command."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from ..dist_util import Ranks, ranks
from ..errors import display_name
from ..runtime import pick_device, pick_precision
from ..training.config import ClassifierRunOptions, RunOptions, TrainConfig, precision
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


def end(finished: bool, config: TrainConfig, me: Ranks, use: str) -> int:
    """Say where the model is and how to use it; returns the exit status. use: a command with {path}."""
    path = config.export_path()
    if me.rank == 0 and finished:
        say(f"done: the model is {display_name(path)}; use it with\n  {use.replace('{path}', display_name(path))}")
    elif me.rank == 0:
        say("to resume, run the same command with --resume auto")
    return DONE if finished else INTERRUPTED
