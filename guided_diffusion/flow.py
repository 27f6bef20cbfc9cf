"""Other processes as variance-preserving ones: flow matching, x = (1 - s) x_0 + s eps, and EDM, x = x_0 + s eps.

Every process x = a x_0 + s eps becomes variance preserving after division by sqrt(a^2 + s^2), with
alpha_bar = a^2 / (a^2 + s^2). `FlowMatching` and `EDM` wrap a network: they undo the division, call it at its own time,
and return its prediction of x_0. A DDIM step with eta = 0 on the result is the Euler step of the original process.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .gaussian_diffusion import GaussianDiffusion, ModelMeanType

LEAST_ALPHA_BAR = 1e-5  # of pure noise, s = 1 of flow matching: a process divides by its root

Network = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class FlowMatching:
    """A velocity network v(x, t) = eps - x_0 (Lipman et al. 2023) as a prediction of x_0; t = s * steps."""

    network: Network
    steps: float = 1000.0

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        s = (t.double() / self.steps if t.device.type != "mps" else t / self.steps).to(x.dtype)[:, None, None, None]
        own = x * ((1 - s).square() + s.square()).sqrt()
        return own - s * self.network(own, t)


@dataclass(frozen=True)
class EDM:
    """A network with the preconditioning of Karras et al. (2022) as a prediction of x_0; t = log(s) / 4.

    sigma_data: standard deviation of the data. velocity: the network predicts v, as in diffusers' `v_prediction`.
    """

    network: Network
    sigma_data: float = 0.5
    velocity: bool = False

    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        s = torch.exp(4 * t.to(x.dtype))[:, None, None, None]
        own, total = x * (1 + s.square()).sqrt(), s.square() + self.sigma_data**2
        out = self.network(own / total.sqrt(), t)
        scale = s * self.sigma_data / total.sqrt()
        return own * self.sigma_data**2 / total + (-scale if self.velocity else scale) * out


def process(
    kind: type[FlowMatching] | type[EDM], sigmas: Sequence[float], timesteps: Sequence[float]
) -> GaussianDiffusion:
    """The variance-preserving process of a list of s, without the last 0, from noise to image; its model predicts x_0.

    timesteps: what the network is called with at each s. Raises InputError for a list that does not fall.
    """
    s = np.asarray(sigmas, dtype=np.float64)[::-1]
    signal = (1 - s) ** 2 if kind is FlowMatching else np.ones_like(s)
    alpha_bars = np.maximum(signal / (signal + s**2), LEAST_ALPHA_BAR)
    return GaussianDiffusion.from_alpha_bars(
        alpha_bars, model_mean_type=ModelMeanType.START_X, timesteps=[float(t) for t in reversed(timesteps)]
    )
