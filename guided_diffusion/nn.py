"""Building blocks that both networks share."""

import math

import torch
from torch import nn
from torch.nn import functional as F


class GroupNorm32(nn.GroupNorm):
    """Group normalisation computed in float32 whatever the type of its input, which it gives back."""

    def forward(self, x):
        if x.dtype == torch.float32:
            return super().forward(x)
        return F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


def normalization(channels):
    """The normalisation of the ADM networks: 32 groups, eps 1e-5."""
    return GroupNorm32(32, channels)


def zero_module(module):
    """Set all parameters of a module to zero and return it: a residual branch that starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def timestep_embedding(timesteps, dim, max_period=10000):
    """Sinusoidal embedding of (possibly fractional) timesteps, cosines first.

    timesteps: [N]; returns float32 [N, dim]. Frequencies fall geometrically from 1 to 1 / max_period.
    """
    half = dim // 2
    frequencies = torch.exp(
        torch.arange(half, dtype=torch.float32, device=timesteps.device) * (-math.log(max_period) / half)
    )
    angles = timesteps.float()[:, None] * frequencies
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return F.pad(embedding, (0, dim % 2))


def mean_flat(x):
    """Mean over all dimensions but the first: [N, ...] -> [N]."""
    return x.flatten(1).mean(dim=1)


@torch.no_grad()
def update_ema(target_params, source_params, rate=0.99):
    """Move an exponential moving average one step: target <- rate * target + (1 - rate) * source."""
    for target, source in zip(target_params, source_params):
        target.lerp_(source.to(target.dtype), 1 - rate)
