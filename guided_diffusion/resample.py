"""Which timesteps to train on: uniformly, more often where the loss is large (Nichol & Dhariwal 2021, sec. 3.3), or
around a noise level (Karras et al. 2022, table 1)."""

import math

import numpy as np
import torch

from .errors import UserError

SCHEDULE_SAMPLERS = ("uniform", "loss-second-moment", "lognormal")


def create_named_schedule_sampler(name, diffusion, sigma_mean=-0.3, sigma_std=1.2):
    """The sampler that --schedule_sampler names, for the steps of `diffusion`; sigma_*: see LogNormalSampler."""
    if name == "uniform":
        return UniformSampler(diffusion.num_timesteps)
    if name == "loss-second-moment":
        return LossSecondMomentResampler(diffusion.num_timesteps)
    if name == "lognormal":
        return LogNormalSampler(diffusion.alphas_cumprod, sigma_mean, sigma_std)
    raise UserError(f"--schedule_sampler is {name!r}; it can be {' or '.join(SCHEDULE_SAMPLERS)}")


class UniformSampler:
    """All timesteps alike."""

    needs_losses = False

    def __init__(self, num_timesteps):
        self.num_timesteps = num_timesteps

    def weights(self):
        """Relative frequency of the timesteps, float64 [T]."""
        return np.ones(self.num_timesteps)

    def sample(self, batch_size, device, uniform=None):
        """Timesteps t [N] and the weights [N] of their losses, which keep the expected loss that of uniform timesteps.

        uniform: numbers in [0, 1) [N] that decide; drawn by numpy if None.
        """
        uniform = np.random.random(batch_size) if uniform is None else uniform
        weights = self.weights()
        cumulative = np.cumsum(weights)
        t = np.searchsorted(cumulative / cumulative[-1], uniform, side="right")
        return torch.from_numpy(t).to(device), torch.from_numpy(self.importance(weights, t)).to(device, torch.float32)

    def importance(self, weights, t):
        """What the losses of timesteps t [N], drawn by `weights` [T], are multiplied with: float64 [N]."""
        return weights.sum() / (self.num_timesteps * weights[t])

    def state_dict(self):
        """What a checkpoint keeps."""
        return {}

    def load_state_dict(self, state):
        """Take over what `state_dict` gave; an empty dict leaves the sampler as it is."""


class LossSecondMomentResampler(UniformSampler):
    """p(t) proportional to sqrt(E[loss_t^2]) over the last `history` losses of every timestep.

    Uniform until every timestep has `history` losses; a share `uniform_prob` of the draws stays uniform for ever.
    """

    needs_losses = True

    def __init__(self, num_timesteps, history=10, uniform_prob=0.001):
        super().__init__(num_timesteps)
        self.uniform_prob = uniform_prob
        self.losses = np.zeros((num_timesteps, history))
        self.counts = np.zeros(num_timesteps, dtype=np.int64)

    def weights(self):
        if (self.counts < self.losses.shape[1]).any():
            return super().weights()
        rms = np.sqrt((self.losses**2).mean(axis=1))
        return rms / rms.sum() * (1 - self.uniform_prob) + self.uniform_prob / self.num_timesteps

    def update_with_all_losses(self, timesteps, losses):
        """Record the losses of a batch, over all processes: two sequences of the same length."""
        for t, loss in zip(timesteps, losses):
            self.losses[t, self.counts[t] % self.losses.shape[1]] = loss
            self.counts[t] += 1

    def state_dict(self):
        return {"losses": torch.from_numpy(self.losses.copy()), "counts": torch.from_numpy(self.counts.copy())}

    def load_state_dict(self, state):
        if state:
            self.losses = state["losses"].numpy().copy()
            self.counts = state["counts"].numpy().copy()


class LogNormalSampler(UniformSampler):
    """ln sigma ~ N(sigma_mean, sigma_std^2), where sigma = sqrt((1 - alpha_bar) / alpha_bar) is the noise of a step.

    p(t) is that density times the step in ln sigma. It is not divided out of the loss: training puts its effort, and
    its weight, where the density lies. alphas_cumprod: [T], falling.
    """

    def __init__(self, alphas_cumprod, sigma_mean, sigma_std):
        super().__init__(len(alphas_cumprod))
        if not math.isfinite(sigma_mean):
            raise UserError(f"--sigma_mean is {sigma_mean}; it must be a finite number, the mean of ln sigma")
        if not (sigma_std > 0 and math.isfinite(sigma_std)):
            raise UserError(f"--sigma_std is {sigma_std}; it must be positive")
        log_sigma = 0.5 * np.log((1 - alphas_cumprod) / alphas_cumprod)
        step = np.gradient(log_sigma) if len(log_sigma) > 1 else np.ones(1)
        exponent = -0.5 * ((log_sigma - sigma_mean) / sigma_std) ** 2
        # The largest exponent becomes 0, so that levels far from the schedule's do not make all weights vanish.
        self._weights = np.exp(exponent - exponent.max()) * step

    def weights(self):
        return self._weights

    def importance(self, weights, t):
        return np.ones(len(t))
