"""Fewer steps than the model was trained with: a process over a subset of the original timesteps."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch

from .errors import InputError
from .gaussian_diffusion import GaussianDiffusion


def space_timesteps(num_timesteps: int, section_counts: str | Sequence[int]) -> set[int]:
    """The original timesteps that a respaced process keeps.

    section_counts: "100" (evenly spaced), "10,10,5" (that many in each equal section) or "ddim25" (the fixed stride of
    the DDIM paper); a list of counts works too. Returns a set of integers.
    """
    given = section_counts if isinstance(section_counts, str) else ",".join(map(str, section_counts))
    if isinstance(section_counts, str):
        try:
            if given.startswith("ddim"):
                stride_steps = int(given.removeprefix("ddim"))
            else:
                section_counts = [int(part) for part in given.split(",")]
        except ValueError:
            raise InputError(
                "it can be a number like 100, a list like 10,10,5 or ddim25",
                parameter="timestep_respacing",
                value=given,
            ) from None
        if given.startswith("ddim"):
            return _ddim_timesteps(num_timesteps, stride_steps)
    size, extra = divmod(num_timesteps, len(section_counts))
    steps, start = [], 0
    for i, count in enumerate(section_counts):
        length = size + (1 if i < extra else 0)
        if not 1 <= count <= length:
            raise InputError(
                f"{count} steps out of {length} are not possible, 1 to {length} are",
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


def _ddim_timesteps(num_timesteps, count):
    for stride in range(1, num_timesteps):
        if len(range(0, num_timesteps, stride)) == count:
            return set(range(0, num_timesteps, stride))
    raise InputError(
        f"no integer stride gives {count} steps out of {num_timesteps}",
        parameter="timestep_respacing",
        value=f"ddim{count}",
    )


class SpacedDiffusion(GaussianDiffusion):
    """A diffusion process over `use_timesteps`, a subset of the steps that `betas` describes.

    Its betas are chosen so that alpha_bar agrees at the kept steps. `timestep_map` [T'] are the original timesteps,
    ascending; `original_num_steps` is T. The model always sees original timesteps.
    """

    def __init__(self, use_timesteps: Collection[int], *, betas: Sequence[float] | np.ndarray, **kwargs: Any) -> None:
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
