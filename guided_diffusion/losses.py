"""Likelihood terms of the diffusion training loss (Nichol & Dhariwal 2021, section 2)."""

import torch
from torch import Tensor


def normal_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor | float, logvar2: Tensor | float) -> Tensor:
    """KL(N(mean1, exp(logvar1)) || N(mean2, exp(logvar2))), elementwise, in nats."""
    logvar2 = torch.as_tensor(logvar2).to(logvar1)
    return 0.5 * (-1.0 + logvar2 - logvar1 + torch.exp(logvar1 - logvar2) + (mean1 - mean2) ** 2 * torch.exp(-logvar2))


def discretized_gaussian_log_likelihood(x: Tensor, *, means: Tensor, log_scales: Tensor) -> Tensor:
    """Log-probability of 8-bit images x in [-1, 1] under a Gaussian integrated over each grey level's bin."""
    centered, inv_std = x - means, torch.exp(-log_scales)

    def mass_below(z):
        return torch.special.ndtr(z * inv_std)

    # By symmetry every bin is taken from the lower tail, where float32 resolves small probabilities.
    inner = mass_below(1 / 255 - centered.abs()) - mass_below(-1 / 255 - centered.abs())
    # The outermost bins reach to infinity.
    below, above = mass_below(centered + 1 / 255), mass_below(1 / 255 - centered)
    probability = torch.where(x < -0.999, below, torch.where(x > 0.999, above, inner))
    return probability.clamp(min=1e-12).log()
