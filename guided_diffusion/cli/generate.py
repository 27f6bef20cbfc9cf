"""What the commands of guided-diffusion's other jobs share: the network's flags, and an engine run with its words."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..checkpoint import load_model
from ..checkpoint.reconcile import ModelFlags
from ..errors import InputError, display_name
from ..options import check, option
from ..run.files import write_bytes
from ..run.job import Job
from ..run.sources import npz_bytes
from ..runtime import DTYPES, PRECISIONS, pick_device, pick_precision
from .flags import Given, Parser
from .main import DONE, FAILED, say


@dataclass(frozen=True)
class NetworkOptions:
    """The checkpoint, and how it computes."""

    model_path: str | None = option(None, "checkpoint of the diffusion model", file=True, metavar="FILE")
    sigma_small: bool = option(False, "the posterior's variance where the model has none of its own")
    precision: str | None = option(None, "precision of the network (default fp32)", choices=PRECISIONS)
    device: str = option("auto", "cpu, cuda, cuda:1, mps or auto", runtime=True)

    def __post_init__(self) -> None:
        check(self)
        if self.model_path is None:
            raise InputError("give the checkpoint of a diffusion model", parameter="model_path")


def add_network(parser: Parser) -> None:
    """The flags of a network and how it computes."""
    parser.add(NetworkOptions, title="network")
    description = "read from the checkpoint where they are not given"
    parser.add(ModelFlags, title="model and diffusion", description=description)


def load_network(given: Given, local_rank: int) -> tuple[torch.nn.Module, Any, torch.device, dict[str, Any]]:
    """(model on its device, its ModelInfo, the device, and the settings for the record) that the flags describe."""
    options, flags = given.options(NetworkOptions), given.options(ModelFlags)
    device = pick_device(options.device, local_rank)
    half = "fp16" if flags.use_fp16 else None
    precision = pick_precision(options.precision or half, device)
    model, info = load_model(str(options.model_path), device=device, dtype=DTYPES[precision], **flags.given())
    if info.model_type == "ENCODER":
        raise InputError("it is a classifier, not a diffusion model", parameter="model_path", value=options.model_path)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model, info, device, given.settings([options], **info.flags, precision=precision)


def make(job: Job, image_size: int, settings: dict[str, Any], sampler: Callable, steps: int, rank: int) -> int:
    """Run a job of the engine and say what came of it; returns the exit status."""
    job.prepare(image_size, settings)
    bar = progress_bar(job.image_steps(steps), rank)
    summary = job.run(sampler, steps, lambda image_steps, images: bar.update(image_steps))
    bar.close()
    job.finish()
    if rank == 0:
        counts = f"{summary.done} done, {summary.skipped} already present, {len(summary.failed)} failed"
        say(f"{counts}; the images are in {display_name(job.options.save_dir)}")
        for name, reason in summary.failed.items():
            say(f"failed: {display_name(name)}: {reason}")
    return FAILED if summary.failed else DONE


def progress_bar(total: int, rank: int) -> Any:
    """A bar on stderr where rank 0 has a terminal."""
    from tqdm.auto import tqdm

    return tqdm(total=total, unit="step", dynamic_ncols=True, disable=rank != 0 or not sys.stderr.isatty())


def write_npz(job: Job, labels: list[int] | None) -> None:
    """guided-diffusion's file: all images as arr_0, uint8 [N, H, W, 3], and their classes, if any, as arr_1 [N]."""
    from ..image_datasets import load_image

    images = np.stack([load_image(job.path(item), job.image_size) for item in job.items.values()])
    arrays = [images] if labels is None else [images, np.array(labels)]
    path = os.path.join(job.options.save_dir, f"samples_{'x'.join(map(str, images.shape))}.npz")
    write_bytes(path, npz_bytes(*arrays))
    say(f"all images are in {display_name(path)}")
