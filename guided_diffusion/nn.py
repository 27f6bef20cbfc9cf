"""Building blocks that both networks share."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook


class GroupNorm32(nn.GroupNorm):
    """Group normalisation computed in float32 whatever the type of its input, which it gives back."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return super().forward(x)
        return F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


def normalization(channels: int, groups: int = 32, eps: float = 1e-5) -> GroupNorm32:
    """The normalisation of the ADM networks: 32 groups, eps 1e-5; networks of diffusers may have others."""
    return GroupNorm32(groups, channels, eps=eps)


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2, followed by a 3x3 convolution if `use_conv`."""

    def __init__(self, channels: int, use_conv: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if use_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def u_shaped(stages: tuple[Sequence[Any], Any, Sequence[Any]], h: Tensor, emb: Tensor) -> Tensor:
    """Run the stages (down, middle, up) of a UNet, functions of (h, emb), with its skip connections."""
    down, middle, up = stages
    skips = []
    for stage in down:
        h = stage(h, emb)
        skips.append(h)
    h = middle(h, emb)
    for stage in up:
        h = stage(torch.cat([h, skips.pop()], dim=1), emb)
    return h


def hooked(*modules: nn.Module | None) -> bool:
    """Whether calling one of the modules would run a hook, which a fast path around that call would leave out."""
    return bool(_has_any_global_hook()) or any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        for module in modules
        if module is not None
    )


def norm_silu(
    norm: nn.GroupNorm, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None,
    silu: nn.Module | None = None,
) -> Tensor:  # fmt: skip
    """SiLU(norm(x) (1 + scale) + shift) in x's dtype, without the affine part where scale is None.

    x: [N, C, H, W]; scale, shift: [N, C, 1, 1]. silu: the module to call for it, if the network has one. Where no
    gradient is wanted and no hook is set on a module, it all happens in one buffer, and on a CPU for half precision
    mostly in float32 with one rounding at the end. In float32 both ways give the same bits.
    """
    if torch.is_grad_enabled() or hooked(norm, silu):
        h = norm(x)
        if scale is not None and shift is not None:
            h = h * (1 + scale.to(x.dtype)) + shift.to(x.dtype)
        return F.silu(h) if silu is None else silu(h)
    if halves := _parameters_for_halves(norm, x):
        h = F.group_norm(x, norm.num_groups, *halves, norm.eps)
    else:
        h = F.group_norm(x.float(), norm.num_groups, norm.weight.float(), norm.bias.float(), norm.eps)
    if scale is not None and shift is not None:
        h.mul_((1 + scale).to(h.dtype)).add_(shift.to(h.dtype))
    return F.silu(h, inplace=True).to(x.dtype)


def _parameters_for_halves(norm, x):
    """Weight and bias for the kernel that reads x in half precision, with float32 sums inside.

    None where x is float32, or where a float32 copy of x is faster: on CPUs with few channels a group, and on small
    maps, which the kernel does not share well among cores.
    """
    if x.dtype == torch.float32:
        return None
    if x.device.type == "cuda":
        return norm.weight.to(x.dtype), norm.bias.to(x.dtype)
    large = norm.num_channels >= 4 * norm.num_groups and x.shape[2] * x.shape[3] >= 1024
    return (norm.weight, norm.bias) if large and x.device.type == "cpu" and x.dtype == torch.bfloat16 else None


@torch.no_grad()
def folded_upsampling(conv: nn.Conv2d) -> nn.ConvTranspose2d:
    """Nearest-neighbour upsampling by 2 and a 3x3 convolution as one transposed convolution, equal up to rounding.

    Every output pixel sees 2x2 different pixels, so 4 of 9 products are left.
    """
    kernel = conv.weight.new_zeros(conv.out_channels, conv.in_channels, 4, 4, dtype=torch.float32)
    for row in (0, 1):
        for column in (0, 1):
            kernel[:, :, row : row + 3, column : column + 3] += conv.weight
    shape, place = (conv.in_channels, conv.out_channels), {"device": conv.weight.device, "dtype": conv.weight.dtype}
    folded = nn.ConvTranspose2d(*shape, 4, stride=2, padding=1, bias=conv.bias is not None, **place)
    folded.weight.copy_(kernel.flip(2, 3).transpose(0, 1))
    if conv.bias is not None and folded.bias is not None:
        folded.bias.copy_(conv.bias)
    return folded.requires_grad_(False).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


def zero_module(module: nn.Module) -> nn.Module:
    """Set all parameters of a module to zero and return it: a residual branch that starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000, sines_first: bool = False) -> Tensor:
    """Sinusoidal embedding of (possibly fractional) timesteps [N], cosines first: float32 [N, dim].

    Frequencies fall geometrically from 1 towards 1 / max_period. sines_first: DDPM's embedding instead, sines first and
    the last frequency exactly 1 / max_period.
    """
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    frequencies = torch.exp(steps * (-math.log(max_period) / (max(half - 1, 1) if sines_first else half)))
    angles = timesteps.float()[:, None] * frequencies
    parts = [angles.sin(), angles.cos()] if sines_first else [angles.cos(), angles.sin()]
    return F.pad(torch.cat(parts, dim=-1), (0, dim % 2))


def mean_flat(x: Tensor) -> Tensor:
    """Mean over all dimensions but the first: [N, ...] -> [N]."""
    return x.flatten(1).mean(dim=1)


@torch.no_grad()
def update_ema(target_params: Iterable[Tensor], source_params: Iterable[Tensor], rate: float = 0.99) -> None:
    """Move an exponential moving average one step: target <- rate * target + (1 - rate) * source."""
    pairs = [(target, source.to(target.dtype)) for target, source in zip(target_params, source_params)]
    if pairs:
        targets, sources = map(list, zip(*pairs))
        # On a GPU a few kernels instead of one a parameter.
        torch._foreach_lerp_(targets, sources, 1 - rate)  # type: ignore[attr-defined]
