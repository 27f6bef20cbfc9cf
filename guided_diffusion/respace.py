"""Fewer steps than the model was trained with: a process over a subset of the original timesteps."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from .errors import InputError
from .gaussian_diffusion import GaussianDiffusion

SPACING_HELP = "a number like 100, a list like 10,10,5, ddim25, linspace25, leading25, leading25+1 or trailing25"


def space_timesteps(num_timesteps: int, section_counts: str | Sequence[int]) -> set[int]:
    """The original timesteps that a respaced process keeps.

    section_counts: "100" (evenly spaced), "10,10,5" (that many in each equal section) or "ddim25" (the fixed stride of
    the DDIM paper); "linspace25", "leading25" (or "leading25+1", shifted by 1) and "trailing25" are the lists of
    diffusers' schedulers; a sequence of counts works too. Raises InputError for `timestep_respacing`.
    """
    given = section_counts
    if isinstance(section_counts, str):
        match = re.fullmatch(r"(ddim|linspace|leading|trailing)(-?\d{1,9})(?:\+(\d{1,9}))?", section_counts)
        if match and (match[3] is None or match[1] == "leading"):
            return set(_named_timesteps(num_timesteps, match[1], int(match[2]), int(match[3] or 0), section_counts))
        parts = section_counts.split(",")
        if not all(re.fullmatch(r"\s*-?\d{1,9}\s*", part) for part in parts):
            raise InputError(f"it can be {SPACING_HELP}", parameter="timestep_respacing", value=given)
        section_counts = [int(part) for part in parts]
    size, extra = divmod(num_timesteps, len(section_counts))
    steps, start = [], 0
    for i, count in enumerate(section_counts):
        length = size + (1 if i < extra else 0)
        if not 1 <= count <= length:
            raise InputError(
                f"it asks for {count} steps out of {length}; 1 to {length} are available",
                parameter="timestep_respacing",
                value=given,
            )
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        # The stride is accumulated, not multiplied: published runs were made with the rounding that this gives.
        position = 0.0
        for _ in range(count):
            steps.append(start + round(position))
            position += stride
        start += length
    return set(steps)


def _named_timesteps(total: int, name: str, count: int, offset: int, text: str) -> list[int]:
    """The timesteps of a spacing that has a name, out of `total`; text: how it was asked for."""
    wrong: dict[str, Any] = {"parameter": "timestep_respacing", "value": text}
    if name == "ddim":
        for stride in range(1, total):
            if len(range(0, total, stride)) == count:
                return list(range(0, total, stride))
        raise InputError(f"no integer stride gives {count} steps out of {total}", **wrong)
    if not 1 <= count <= total:
        raise InputError(f"it asks for {count} steps out of {total}; 1 to {total} are available", **wrong)
    # These very numpy calls: their rounding decides ties, as it does in diffusers.
    if name == "linspace":
        steps = np.linspace(0, total - 1, count).round()
    elif name == "leading":
        steps = np.arange(count) * (total // count) + offset
        if steps[-1] >= total:
            most = offset - (int(steps[-1]) - (total - 1))
            raise InputError(
                f"it asks for step {steps[-1]} out of 0 to {total - 1}; an offset up to {most} fits", **wrong
            )
    else:
        steps = np.round(np.arange(total, 0, -total / count)[:count]) - 1
    return [int(step) for step in steps]


class SpacedDiffusion(GaussianDiffusion):
    """A diffusion process over `use_timesteps`, a subset of the steps that `betas` describes.

    Its betas are chosen so that alpha_bar agrees at the kept steps. `timestep_map` [T'] are the original timesteps,
    ascending; `original_num_steps` is T. The model always sees original timesteps.
    """

    def __init__(self, use_timesteps: Iterable[int], *, betas: Any, **kwargs: Any) -> None:
        self.original_num_steps = len(betas)
        self.timestep_map = sorted(use_timesteps)
        alphas_cumprod = np.cumprod(1.0 - np.array(betas, dtype=np.float64))
        kept = alphas_cumprod[self.timestep_map]
        super().__init__(betas=1 - kept / np.append(1.0, kept[:-1]), **kwargs)
        self._maps = {}

    def model_timesteps(self, t: torch.Tensor) -> torch.Tensor:
        """Step indices t [N] as original timesteps, long, or float and rescaled with `rescale_timesteps`."""
        if t.device not in self._maps:
            self._maps[t.device] = torch.tensor(self.timestep_map, device=t.device)
        original = self._maps[t.device][t]
        return original.float() * (1000.0 / self.original_num_steps) if self.rescale_timesteps else original

    def _scale_timesteps(self, t):
        # As in guided-diffusion, where the model that a respaced process gets is wrapped to do it.
        return t
