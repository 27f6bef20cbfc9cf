"""Which timesteps to train on: uniformly, more often where the loss is large (Nichol & Dhariwal 2021, sec. 3.3), or
around a noise level (Karras et al. 2022, table 1)."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .errors import InputError
from .registry import fitting

SCHEDULE_SAMPLERS = ("uniform", "loss-second-moment", "lognormal")


def create_named_schedule_sampler(
    name: str, diffusion: Any, sigma_mean: float = -0.3, sigma_std: float = 1.2
) -> "ScheduleSampler":
    """The sampler of that name for the steps of `diffusion`; sigma_*: see LogNormalSampler. Raises InputError."""
    if name == "uniform":
        return UniformSampler(diffusion)
    if name == "loss-second-moment":
        return LossSecondMomentResampler(diffusion)
    if name == "lognormal":
        return LogNormalSampler(diffusion, sigma_mean, sigma_std)
    raise InputError(fitting(name, list(SCHEDULE_SAMPLERS)), parameter="schedule_sampler", value=name)


class ScheduleSampler(ABC):
    """A distribution over the steps of a diffusion process, to train on; subclasses give its `weights`.

    diffusion: anything with `num_timesteps`.
    """

    needs_losses = False

    def __init__(self, diffusion: Any) -> None:
        self.diffusion = diffusion

    @property
    def num_timesteps(self) -> int:
        return self.diffusion.num_timesteps

    @abstractmethod
    def weights(self) -> np.ndarray:
        """Relative frequency of the timesteps, positive float64 [T], not necessarily normalised."""

    def sample(
        self, batch_size: int, device: torch.device | str, uniform: np.ndarray | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Timesteps t [N] and the weights [N] of their losses, which keep the expected loss that of uniform timesteps.

        uniform: numbers in [0, 1) [N] that decide; drawn by numpy if None.
        """
        uniform = np.random.random(batch_size) if uniform is None else uniform
        weights = self.weights()
        cumulative = np.cumsum(weights)
        t = np.searchsorted(cumulative / cumulative[-1], uniform, side="right")
        importance = self.importance(weights, t).astype(np.float32)  # not every device has float64
        # Copies that do not wait for the device, which may still compute the step before.
        return (
            torch.from_numpy(t).to(device, non_blocking=True),
            torch.from_numpy(importance).to(device, non_blocking=True),
        )

    def importance(self, weights: np.ndarray, t: np.ndarray) -> np.ndarray:
        """What the losses of timesteps t [N], drawn by `weights` [T], are multiplied with: float64 [N]."""
        return weights.sum() / (len(weights) * weights[t])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps."""
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:  # noqa: B027 - most samplers have no state
        """Take over what `state_dict` gave; an empty dict leaves the sampler as it is."""


class UniformSampler(ScheduleSampler):
    """All timesteps alike."""

    def weights(self) -> np.ndarray:
        return np.ones(self.num_timesteps)


class LossAwareSampler(ScheduleSampler):
    """A sampler that learns from the losses of the training."""

    needs_losses = True

    def update_with_local_losses(self, local_ts: torch.Tensor, local_losses: torch.Tensor) -> None:
        """Record this process's losses [N] of timesteps [N]; all processes of a process group must call it, each with
        a batch of any size, and all then know the losses of all."""
        import torch.distributed as dist

        ts, losses = [local_ts], [local_losses]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            size = torch.tensor([len(local_ts)], device=local_ts.device)
            sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size())]
            dist.all_gather(sizes, size)
            largest = max(int(n) for n in sizes)
            ts, losses = (_gathered(values, sizes, largest) for values in (local_ts, local_losses))
        self.update_with_all_losses(torch.cat(ts).tolist(), torch.cat(losses).tolist())

    @abstractmethod
    def update_with_all_losses(self, ts: Sequence[int], losses: Sequence[float]) -> None:
        """Record the losses of a batch, over all processes: two sequences of the same length."""


def _gathered(values: torch.Tensor, sizes: list[torch.Tensor], largest: int) -> list[torch.Tensor]:
    """The tensors [sizes[i]] of all processes: gathering wants equal sizes, so they are padded."""
    import torch.distributed as dist

    padded = torch.zeros(largest, dtype=values.dtype, device=values.device)
    padded[: len(values)] = values
    gathered = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(gathered, padded)
    return [tensor[: int(size)] for tensor, size in zip(gathered, sizes)]


class LossSecondMomentResampler(LossAwareSampler):
    """p(t) proportional to sqrt(E[loss_t^2]) over the last `history_per_term` losses of every timestep.

    Uniform until every timestep has that many losses; a share `uniform_prob` of the draws stays uniform for ever.
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
            self.losses = state["losses"].numpy().copy()
            self.counts = state["counts"].numpy().copy()


class LogNormalSampler(ScheduleSampler):
    """ln sigma ~ N(sigma_mean, sigma_std^2), where sigma = sqrt((1 - alpha_bar) / alpha_bar) is the noise of a step.

    p(t) is that density times the step in ln sigma. It is not divided out of the loss: training puts its effort, and
    its weight, where the density lies. diffusion: has `alphas_cumprod` [T], falling, besides `num_timesteps`.
    """

    def __init__(self, diffusion: Any, sigma_mean: float, sigma_std: float) -> None:
        super().__init__(diffusion)
        if not math.isfinite(sigma_mean):
            raise InputError(
                "it must be a finite number, the mean of ln sigma", parameter="sigma_mean", value=sigma_mean
            )
        if not (sigma_std > 0 and math.isfinite(sigma_std)):
            raise InputError("it must be positive", parameter="sigma_std", value=sigma_std)
        alphas_cumprod = diffusion.alphas_cumprod
        log_sigma = 0.5 * np.log((1 - alphas_cumprod) / alphas_cumprod)
        step = np.gradient(log_sigma) if len(log_sigma) > 1 else np.ones(1)
        exponent = -0.5 * ((log_sigma - sigma_mean) / sigma_std) ** 2
        # The largest exponent becomes 0, so that levels far from the schedule's do not make all weights vanish.
        self._weights = np.exp(exponent - exponent.max()) * step

    def weights(self) -> np.ndarray:
        return self._weights

    def importance(self, weights: np.ndarray, t: np.ndarray) -> np.ndarray:
        return np.ones(len(t))
