"""Likelihood terms of the diffusion training loss (Nichol & Dhariwal 2021, section 2)."""

import torch


def normal_kl(
    mean1: torch.Tensor | float,
    logvar1: torch.Tensor | float,
    mean2: torch.Tensor | float,
    logvar2: torch.Tensor | float,
) -> torch.Tensor:
    """KL(N(mean1, exp(logvar1)) || N(mean2, exp(logvar2))), elementwise, in nats; at least one is a tensor."""
    like = next(value for value in (mean1, logvar1, mean2, logvar2) if isinstance(value, torch.Tensor))
    log1, log2 = (v if isinstance(v, torch.Tensor) else torch.tensor(v).to(like) for v in (logvar1, logvar2))
    return 0.5 * (-1.0 + log2 - log1 + torch.exp(log1 - log2) + (mean1 - mean2) ** 2 * torch.exp(-log2))


def approx_standard_normal_cdf(x: torch.Tensor) -> torch.Tensor:
    """The standard normal's distribution function; exact, where guided-diffusion's function of this name is not."""
    return torch.special.ndtr(x)


def discretized_gaussian_log_likelihood(
    x: torch.Tensor, *, means: torch.Tensor, log_scales: torch.Tensor
) -> torch.Tensor:
    """Log-probability of 8-bit images x in [-1, 1] under a Gaussian integrated over each grey level's bin."""
    centered = x - means
    inv_std = torch.exp(-log_scales)

    def mass_below(z):
        return torch.special.ndtr(z * inv_std)

    # By symmetry every bin is taken from the lower tail, where float32 resolves small probabilities.
    inner = mass_below(1 / 255 - centered.abs()) - mass_below(-1 / 255 - centered.abs())
    # The outermost bins reach to infinity.
    below, above = mass_below(centered + 1 / 255), mass_below(1 / 255 - centered)
    probability = torch.where(x < -0.999, below, torch.where(x > 0.999, above, inner))
    return probability.clamp(min=1e-12).log()
