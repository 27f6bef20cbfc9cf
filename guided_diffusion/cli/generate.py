"""What the commands of guided-diffusion's other jobs share: the network's flags, and their .npz file."""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..checkpoint import load_model
from ..checkpoint.reconcile import ModelFlags
from ..errors import InputError, display_name
from ..options import check, option
from ..run.files import write_bytes
from ..run.job import Job
from ..run.sources import npz_bytes
from ..runtime import DTYPES, PRECISIONS, memory_format, pick_device, pick_precision
from ..script_util import create_diffusion
from ..translator import Target
from .flags import NO_EFFECT, Given, Parser
from .main import say
from .sampling import TRAINING_FLAGS


@dataclass(frozen=True)
class NetworkOptions:
    """The checkpoint, and how it computes."""

    model_path: str | None = option(None, "checkpoint of the diffusion model", file=True, metavar="FILE")
    sigma_small: bool = option(False, "the posterior's variance where the model has none of its own")
    precision: str | None = option(None, "precision of the network (default fp32)", choices=PRECISIONS)
    device: str = option("auto", "cpu, cuda, cuda:1, mps or auto", runtime=True, metavar="NAME")

    def __post_init__(self) -> None:
        check(self)
        if self.model_path is None:
            raise InputError("give the checkpoint of a diffusion model", parameter="model_path")


def add_network(parser: Parser) -> None:
    """The flags of a network and how it computes."""
    parser.add(NetworkOptions, title="model")
    description = "read from the checkpoint where they are not given"
    parser.add(ModelFlags, title="network and diffusion process", description=description, without=TRAINING_FLAGS)
    parser.add(ModelFlags, title=NO_EFFECT, only=TRAINING_FLAGS)


def load_network(given: Given, local_rank: int) -> tuple[Target, dict[str, Any]]:
    """The diffusion model that the flags describe, and its settings for the record."""
    options, flags = given.options(NetworkOptions), given.options(ModelFlags)
    device = pick_device(options.device, local_rank)
    half = "fp16" if flags.use_fp16 else None
    precision = pick_precision(options.precision or half, device)
    model, info = load_model(str(options.model_path), device=device, dtype=DTYPES[precision], **flags.given())
    if info.model_type == "ENCODER":
        raise InputError("it is a classifier, not a diffusion model", parameter="model_path", value=options.model_path)
    model.to(memory_format=memory_format(device))  # type: ignore[call-overload]
    target = Target(
        model=model,
        diffusion=create_diffusion(**{**info.flags, "sigma_small": options.sigma_small}),
        info=info,
        device=device,
        precision=precision,
        sigma_small=options.sigma_small,
        clip_denoised=True,
    )
    return target, given.settings([options], **info.flags, precision=precision)


def write_npz(job: Job, image_size: int, labels: list[int] | None) -> None:
    """guided-diffusion's file: all images as arr_0, uint8 [N, H, W, 3], and their classes, if any, as arr_1 [N]."""
    images = np.stack([job.image(item, image_size) for item in job.items.values()])
    arrays = [images] if labels is None else [images, np.array(labels)]
    path = os.path.join(job.folder.path, f"samples_{'x'.join(map(str, images.shape))}.npz")
    write_bytes(path, npz_bytes(*arrays))
    say(f"all images are in {display_name(path)}")
