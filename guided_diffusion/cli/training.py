"""Flags of the training loop, and the part that all training commands share."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..dist_util import Ranks
from ..errors import InputError, display_name, log
from ..gaussian_diffusion import GaussianDiffusion
from ..resample import create_named_schedule_sampler
from ..run.files import Folder, make_folder
from ..runtime import pick_device, pick_precision
from ..script_util import create_diffusion
from ..training.config import ClassifierRunOptions, DataOptions, ModelOptions, RunOptions, TrainConfig
from ..training.data import TrainImages, class_labels, list_images, listed, refuse_own_outputs
from ..training.files import write_run
from ..training.loop import Trainer, process_group
from ..training.losses import Loss
from ..training.start import Kind, Start, begin
from .flags import Given, Parser
from .main import DONE, INTERRUPTED, say

FROM_CHECKPOINT = "By default as in the checkpoint that training starts from, if any."


def add_loop(parser: Parser, run: type = RunOptions, *, without: Sequence[str]) -> None:
    """The flags of the loop and of how it runs. OPENAI_LOGDIR in the environment names the save folder."""
    if folder := os.environ.get("OPENAI_LOGDIR"):
        parser.defaults["save_dir"] = folder
    parser.add(TrainConfig, run, title="training", without=without)


class Run:
    """A training run of this process: the options of its loop, `config`, and the device.

    guided-diffusion's spellings of options are resolved, and precision `auto` is the device's. kind: class of the
    options of how it runs.
    """

    def __init__(self, given: Given, ranks: Ranks, kind: type[RunOptions] = RunOptions) -> None:
        self.given, self.ranks, self.options = given, ranks, given.options(kind)
        self.device = pick_device(self.options.device, ranks.local_rank)
        half = next((name for name in ("use_fp16", "classifier_use_fp16") if getattr(self.options, name, False)), None)
        if half and given.precision == "bf16":
            raise InputError(f"`{half}` True contradicts it; give one of them", parameter="precision", value="bf16")
        chosen = pick_precision("fp16" if half else given.precision, self.device)
        self.config: TrainConfig = given.options(TrainConfig, precision=chosen)
        if isinstance(self.options, ClassifierRunOptions) and self.options.anneal_lr:
            self.config = dataclasses.replace(self.config, lr_anneal_steps=self.config.iterations)

    @contextlib.contextmanager
    def folder(self) -> Iterator[None]:
        """Make the folders of the run, and keep other runs out of its save folder within the context."""
        folder, config = Folder(self.config.save_dir), self.config
        make_folder(os.path.dirname(config.export_path()) or ".", "export" if config.export else "save_dir")
        if self.ranks.rank == 0:
            folder.lock()
        try:
            yield
        finally:
            folder.release()

    @contextlib.contextmanager
    def model(
        self, data: DataOptions, kind: Kind, **fixed: Any
    ) -> Iterator[tuple[Start, TrainImages, GaussianDiffusion]]:
        """Context of `folder` with a diffusion model, its training images and its process; fixed: see `begin`."""
        flags, references = self.given.options(ModelOptions).given(), list_images(data.data_dir)
        refuse_own_outputs(self.config.save_dir, data.data_dir, references)
        with self.folder():
            start = begin(self.config, kind, flags, lambda names: class_labels(references, names), **fixed)
            reading = {"seed": self.config.seed, "channels": start.channels, **data.reading()}
            images = TrainImages(references, start.flags["image_size"], labels=start.labels, **reading)
            yield start, images, create_diffusion(**start.flags)

    def train(
        self, start: Start, images: TrainImages, losses: Loss, process: GaussianDiffusion | None,
        options: Sequence[Any], use: str, **hooks: Any,
    ) -> int:  # fmt: skip
        """Train a network and say where it is and how to use it; returns the exit status.

        process: None where it is no diffusion model. options: the others of the run. use: a command with {path}. hooks:
        `evaluate` and `sample` of `Trainer`.
        """
        config, first = self.config, self.ranks.rank == 0
        options = [*options, self.options, config]
        write_run(config.save_dir, start.flags, options, start.classes, resumed=start.checkpoint, writes=first)
        millions = sum(p.numel() for p in start.model.parameters()) / 1e6
        log.info("%d images, %.2f M parameters, %s, %s", len(images), millions, self.device, config.precision)
        if start.classes is not None:
            counts = np.bincount(start.labels, minlength=len(start.classes))
            log.info("classes: %s", listed([f"{name} ({count})" for name, count in zip(start.classes, counts)]))
        steps = process or SimpleNamespace(num_timesteps=1)
        sampler = create_named_schedule_sampler(config.schedule_sampler, steps, config.sigma_mean, config.sigma_std)
        with process_group(self.ranks, self.device):
            trainer = Trainer(
                start.model, losses, images, config, sampler, device=self.device, ranks=self.ranks,
                checkpoint=start.checkpoint, metadata=start.metadata(), progress=sys.stderr.isatty(), **hooks,
            )  # fmt: skip
            finished = trainer.run()
        path = display_name(config.export_path())
        if first and finished:
            say(f"done: the model is {path}; use it with\n  {use.replace('{path}', path)}")
        elif first:
            say("to resume, run the same command with --resume auto")
        return DONE if finished else INTERRUPTED
