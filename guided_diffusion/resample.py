"""Distributions of training timesteps: uniform, by the size of the loss, or lognormal in the noise level.

Sources: Nichol & Dhariwal 2021, section 3.3; Karras et al. 2022, table 1.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .errors import InputError, check_choice


def create_named_schedule_sampler(
    name: str, diffusion: Any, sigma_mean: float = -0.3, sigma_std: float = 1.2
) -> "ScheduleSampler":
    """Make a sampler of the timesteps of `diffusion`. sigma_*: see `LogNormalSampler`. Raises InputError for a name."""
    check_choice("schedule_sampler", name, SCHEDULE_SAMPLERS)
    return SCHEDULE_SAMPLERS[name](diffusion, *((sigma_mean, sigma_std) if name == "lognormal" else ()))


class ScheduleSampler(ABC):
    """A distribution of training timesteps; subclasses give its `weights`. diffusion: anything with `num_timesteps`."""

    def __init__(self, diffusion: Any) -> None:
        self.diffusion, self.num_timesteps = diffusion, diffusion.num_timesteps

    @abstractmethod
    def weights(self) -> np.ndarray:
        """Relative frequency of the timesteps, positive float64 [T], not necessarily normalised."""

    def sample(
        self, batch_size: int, device: torch.device | str, uniform: np.ndarray | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw timesteps t [N], and the weights [N] of their losses that keep the expected loss of uniform timesteps.

        uniform: numbers in [0, 1) [N] to draw with; numpy's if None.
        """
        uniform = np.random.random(batch_size) if uniform is None else uniform
        weights = self.weights()
        cumulative = np.cumsum(weights)
        t = np.searchsorted(cumulative / cumulative[-1], uniform, side="right")
        importance = self.importance(weights, t).astype(np.float32)  # not every device has float64
        # Copies that do not wait for the device, which may still compute the step before.
        return tuple(torch.from_numpy(a).to(device, non_blocking=True) for a in (t, importance))  # type: ignore[return-value]

    def importance(self, weights: np.ndarray, t: np.ndarray) -> np.ndarray:
        """Factors of the losses of timesteps t [N] drawn by `weights` [T]: float64 [N]."""
        return weights.sum() / (len(weights) * weights[t])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """State for a checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:  # noqa: B027 - most samplers have no state
        """Restore a state; an empty dict changes nothing."""


class UniformSampler(ScheduleSampler):
    """All timesteps with the same probability."""

    def weights(self) -> np.ndarray:
        return np.ones(self.num_timesteps)


class LossAwareSampler(ScheduleSampler):
    """A sampler that adapts to the training losses."""

    def update_with_local_losses(self, local_ts: torch.Tensor, local_losses: torch.Tensor) -> None:
        """Record the losses [N] of timesteps [N] of every process; all processes of the default group must call it.

        Their batches may differ in size.
        """
        dist, batch = torch.distributed, (local_ts.tolist(), local_losses.tolist())
        batches: list[Any] = [batch]
        if dist.is_available() and dist.is_initialized():
            batches *= dist.get_world_size()
            dist.all_gather_object(batches, batch)
        ts, losses = (list(itertools.chain.from_iterable(parts)) for parts in zip(*batches))
        self.update_with_all_losses(ts, losses)

    @abstractmethod
    def update_with_all_losses(self, ts: Sequence[int], losses: Sequence[float]) -> None:
        """Record the losses of a batch, over all processes: two sequences of the same length."""


class LossSecondMomentResampler(LossAwareSampler):
    """p(t) proportional to sqrt(E[loss_t^2]) over the last `history_per_term` losses of every timestep.

    Uniform until every timestep has that many losses; a share `uniform_prob` of the draws stays uniform.
    """

    def __init__(self, diffusion: Any, history_per_term: int = 10, uniform_prob: float = 0.001) -> None:
        super().__init__(diffusion)
        self.uniform_prob = uniform_prob
        self.losses = np.zeros((self.num_timesteps, history_per_term))
        self.counts = np.zeros(self.num_timesteps, dtype=np.int64)

    def weights(self) -> np.ndarray:
        if (self.counts < self.losses.shape[1]).any():
            return np.ones(self.num_timesteps)
        rms = np.sqrt((self.losses**2).mean(axis=1))
        return rms / rms.sum() * (1 - self.uniform_prob) + self.uniform_prob / self.num_timesteps

    def update_with_all_losses(self, ts: Sequence[int], losses: Sequence[float]) -> None:
        for t, loss in zip(ts, losses):
            self.losses[t, self.counts[t] % self.losses.shape[1]] = loss
            self.counts[t] += 1

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"losses": torch.from_numpy(self.losses.copy()), "counts": torch.from_numpy(self.counts.copy())}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        if state:
            self.losses, self.counts = (state[name].numpy().copy() for name in ("losses", "counts"))


class LogNormalSampler(ScheduleSampler):
    """ln sigma ~ N(sigma_mean, sigma_std^2), where sigma = sqrt((1 - alpha_bar) / alpha_bar) is the noise of a step.

    p(t) is that density times the step in ln sigma. It is not divided out of the loss: training puts its effort, and
    its weight, where the density lies. diffusion: has `alphas_cumprod` [T], falling, besides `num_timesteps`.
    """

    def __init__(self, diffusion: Any, sigma_mean: float, sigma_std: float) -> None:
        super().__init__(diffusion)
        if not (np.isfinite(sigma_mean) and 0 < sigma_std < np.inf):
            raise InputError(
                f"`sigma_mean` {sigma_mean} and `sigma_std` {sigma_std} must be finite, the latter above 0"
            )
        log_sigma = 0.5 * np.log((1 - diffusion.alphas_cumprod) / diffusion.alphas_cumprod)
        step = np.gradient(log_sigma) if len(log_sigma) > 1 else np.ones(1)
        exponent = -0.5 * ((log_sigma - sigma_mean) / sigma_std) ** 2
        # The largest exponent becomes 0, so that levels far from the schedule's do not make all weights vanish.
        self._weights = np.exp(exponent - exponent.max()) * step

    def weights(self) -> np.ndarray:
        return self._weights

    def importance(self, weights: np.ndarray, t: np.ndarray) -> np.ndarray:
        return np.ones(len(t))


SCHEDULE_SAMPLERS: dict[str, Any] = {
    "uniform": UniformSampler, "loss-second-moment": LossSecondMomentResampler, "lognormal": LogNormalSampler
}  # fmt: skip
