"""Fewer steps than the model was trained with: a process over a subset of the original timesteps."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .errors import InputError, one_line
from .gaussian_diffusion import GaussianDiffusion, get_named_beta_schedule

SPACING_HELP = "a number like 100, a list like 10,10,5, ddim25, linspace25, leading25, leading25+1 or trailing25"


def space_timesteps(num_timesteps: int, section_counts: str | Sequence[int]) -> set[int]:
    """The original timesteps that a respaced process keeps.

    section_counts: "100" (evenly spaced), "10,10,5" (that many in each equal section) or "ddim25" (the fixed stride of
    the DDIM paper); "linspace25", "leading25" (or "leading25+1", shifted by 1) and "trailing25" are the lists of
    diffusers' schedulers; a sequence of counts works too. Raises InputError for `timestep_respacing`.
    """
    wrong: dict[str, Any] = {"parameter": "timestep_respacing", "value": section_counts}
    too_many = "it asks for {} steps out of {}; 1 to {} are available"
    if isinstance(section_counts, str):
        match = re.fullmatch(r"(ddim|linspace|leading|trailing)(-?\d{1,9})(?:\+(\d{1,9}))?", section_counts)
        if match and (match[3] is None or match[1] == "leading"):
            name, count = match[1], int(match[2])
            if name != "ddim" and not 1 <= count <= num_timesteps:
                raise InputError(too_many.format(count, num_timesteps, num_timesteps), **wrong)
            return _named_timesteps(num_timesteps, name, count, int(match[3] or 0), wrong)
        parts = section_counts.split(",")
        if not all(re.fullmatch(r"\s*-?\d{1,9}\s*", part) for part in parts):
            raise InputError(f"it can be {SPACING_HELP}", **wrong)
        section_counts = [int(part) for part in parts]
    size, extra = divmod(num_timesteps, len(section_counts))
    steps, start = set(), 0
    for i, count in enumerate(section_counts):
        length = size + (i < extra)
        if not 1 <= count <= length:
            raise InputError(too_many.format(count, length, length), **wrong)
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        # The stride is accumulated, not multiplied: published runs were made with the rounding that this gives.
        position = 0.0
        for _ in range(count):
            steps.add(start + round(position))
            position += stride
        start += length
    return steps


def _named_timesteps(total: int, name: str, count: int, offset: int, wrong: dict[str, Any]) -> set[int]:
    """The timesteps of a spacing that has a name, out of `total`; wrong: of an InputError."""
    if name == "ddim":
        for stride in range(1, total):
            if len(range(0, total, stride)) == count:
                return set(range(0, total, stride))
        raise InputError(f"no integer stride gives {count} steps out of {total}", **wrong)
    # These very numpy calls: their rounding decides ties, as it does in diffusers.
    if name == "linspace":
        steps = np.linspace(0, total - 1, count).round()
    elif name == "trailing":
        steps = np.round(np.arange(total, 0, -total / count)[:count]) - 1
    else:
        steps = np.arange(count) * (total // count) + offset
        if (beyond := int(steps[-1]) - (total - 1)) > 0:
            reason = f"it asks for step {steps[-1]} out of 0 to {total - 1}; an offset up to {offset - beyond} fits"
            raise InputError(reason, **wrong)
    return {int(step) for step in steps}


def matching_timestep(
    model: Mapping[str, Any], encoder: Mapping[str, Any], *, assumed: Iterable[str] = (), name: str = "the encoder"
) -> Callable[[float], float] | None:
    """How a classifier or extractor is asked at a noise level of a model that was trained on another schedule.

    model, encoder: their flags (`diffusion_steps`, `noise_schedule`, `rescale_timesteps`). Returns a function from
    alpha_bar to the encoder's timestep, exact where its schedule has the level, else fractional; None where both
    schedules are one. assumed: flags of the encoder that nothing told; name: its file. Raises InputError where one of
    them counts.
    """
    flags = model, encoder
    betas = [get_named_beta_schedule(each["noise_schedule"], each["diffusion_steps"]) for each in flags]
    scales = [1000 / len(b) if each["rescale_timesteps"] else 1.0 for b, each in zip(betas, flags)]
    if np.array_equal(betas[0], betas[1]) and scales[0] == scales[1]:
        return None
    unknown = {"diffusion_steps", "noise_schedule", "rescale_timesteps"} & set(assumed)
    if unknown:
        ours, theirs = (f"{one_line(f['noise_schedule'], 60)}, {f['diffusion_steps']} steps" for f in flags)
        raise InputError(
            f"{name} does not tell which schedule it was trained on ({theirs} is assumed), and the model has another "
            f"({ours}); save it as .safetensors with `noise_schedule` and `diffusion_steps` in its flags"
        )
    alpha_bars = np.cumprod(1 - betas[1])
    log_snr = np.log(alpha_bars) - np.log1p(-alpha_bars)

    def timestep(alpha_bar: float) -> float:
        nearest = int(np.abs(alpha_bars - alpha_bar).argmin())
        if math.isclose(alpha_bars[nearest], alpha_bar, rel_tol=1e-9):
            return nearest * scales[1]
        wanted = math.log(alpha_bar) - math.log1p(-alpha_bar)
        # It falls with the timestep; interpolation wants it rising. Beyond the schedule's ends, the end counts.
        return float(np.interp(-wanted, -log_snr, np.arange(len(alpha_bars)))) * scales[1]

    return timestep


class SpacedDiffusion(GaussianDiffusion):
    """A diffusion process over `use_timesteps`, a subset of the steps that `betas` describes.

    Its betas are chosen so that alpha_bar agrees at the kept steps. `timestep_map` [T'] are the original timesteps,
    ascending; `original_num_steps` is T. The model always sees original timesteps.
    """

    def __init__(self, use_timesteps: Iterable[int], *, betas: Any, **kwargs: Any) -> None:
        timesteps = sorted(use_timesteps)
        kept = np.cumprod(1.0 - np.array(betas, dtype=np.float64))[timesteps]
        super().__init__(betas=1 - kept / np.append(1.0, kept[:-1]), **kwargs)
        self.original_num_steps = len(betas)
        self.timestep_map = timesteps

    def _scale_timesteps(self, t):
        # As in guided-diffusion, where the model that a respaced process gets is wrapped to do it.
        return t
