"""The manifolds of SDDM: images with given block statistics (Sun et al. 2023, section 4).

The image plane is cut into blocks x blocks rectangles, and a tensor [N, C, H, W] is seen as [N, C, B, B, h, w]. Means
and variances per image, channel and block have shape [N, C, B, B, 1, 1], so they broadcast over that view.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from resizer import low_pass_filter

from .errors import InputError
from .registry import Registry

EPS = 1e-5

MANIFOLDS = Registry("manifold")
"""Makers of manifolds by name: make(ref, *, blocks, down_n), each of which takes the parameter that it needs.

A manifold has two methods, for x and vectors [N, C, H, W] and the reference noised to alpha_bar, a float:
restrict(x, alpha_bar) brings x to it; decompose(x, vector, alpha_bar) splits a vector at x into (tangent, normal),
whose sum is the vector.
"""


def check_blocks(size: Sequence[int], blocks: int, of: str = "image") -> None:
    """Raise InputError unless images of `size` = (H, W) can be cut into blocks x blocks of at least two pixels.

    of: what has this size, for the error.
    """
    height, width = size
    fit = [n for n in range(1, min(size) + 1) if height % n == width % n == 0 and height * width >= 2 * n * n]
    if blocks not in fit:
        near = sorted(fit, key=lambda n: (abs(n - blocks), -n))[:2]
        hint = f" ({' and '.join(map(str, near))} {'do' if len(near) > 1 else 'does'})" if near else ""
        reason = f"it must divide the {of} size {_sides(size)} into blocks of at least two pixels{hint}"
        raise InputError(reason, parameter="blocks", value=blocks)


def check_down_n(down_n: int, size: Sequence[int]) -> None:
    """Raise InputError unless down_n divides images of size (H, W)."""
    if down_n < 1 or size[0] % down_n or size[1] % down_n:
        reason = f"it must be at least 1 and divide the image size {_sides(size)}"
        raise InputError(reason, parameter="down_n", value=down_n)


def _sides(size):
    return f"{size[0]}" if size[0] == size[1] else f"{size[0]}x{size[1]}"


def to_blocks(x: Tensor, blocks: int) -> Tensor:
    """View [N, C, H, W] as [N, C, B, B, h, w] without copying."""
    return _rows(x, blocks).transpose(3, 4)


def from_blocks(x: Tensor) -> Tensor:
    """Undo `to_blocks`: [N, C, B, B, h, w] -> [N, C, H, W]."""
    n, c, rows, columns, h, w = x.shape
    return x.transpose(3, 4).reshape(n, c, rows * h, columns * w)


def _rows(x: Tensor, blocks: int) -> Tensor:
    """View [N, C, H, W] as [N, C, B, h, B, w], whose elements lie in memory order: arithmetic on it is fast."""
    n, c, height, width = x.shape
    return x.reshape(n, c, blocks, height // blocks, blocks, width // blocks)


def combine(x: Tensor, statistics: Sequence[Tensor], function: Callable[..., Tensor]) -> Tensor:
    """function(x, *statistics) with every pixel of x [N, C, H, W] beside the statistics of its block."""
    blocks = statistics[0].shape[2]
    return function(_rows(x, blocks), *(s.transpose(3, 4) for s in statistics)).reshape(x.shape)


def block_mean(x: Tensor, blocks: int) -> Tensor:
    """Mean of every block of x [N, C, H, W], as [N, C, B, B, 1, 1]."""
    return F.avg_pool2d(x, (x.shape[2] // blocks, x.shape[3] // blocks))[..., None, None]


def block_statistics(x: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance plus 1e-5 of every block of x [N, C, H, W], both [N, C, B, B, 1, 1]."""
    check_blocks(x.shape[2:], blocks)
    mean = block_mean(x, blocks)
    n = x.shape[2] * x.shape[3] // blocks**2
    deviation = combine(x, [mean], torch.sub)
    return mean, block_mean(deviation.square(), blocks) * (n / (n - 1)) + EPS


def diffuse_statistics(mean: Tensor, var: Tensor, alpha_bar: float) -> tuple[Tensor, Tensor]:
    """The expected block mean and variance of a reference with `mean` and `var` when noised to alpha_bar (a float)."""
    return alpha_bar**0.5 * mean, alpha_bar * var + (1 - alpha_bar)


def block_adain(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Restriction R: give every block of x [N, C, H, W] the target mean and variance.

    Per block, (x - mean(x)) / std(x) * std + mean (Huang & Belongie 2017, blockwise).
    """
    own_mean, own_var = block_statistics(x, mean.shape[2])
    return combine(x, [own_mean, (var / own_var).sqrt(), mean], lambda x, own, scale, mean: (x - own) * scale + mean)


def decompose(x: Tensor, vector: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Split a vector at x into its parts tangent and normal to the manifold with block means `mean`.

    x, vector: [N, C, H, W]; mean: [N, C, B, B, 1, 1]. Per block the mean is removed, then the component along x - mean,
    the direction in which the variance grows. Returns (tangent, normal), whose sum is the vector.
    """
    blocks = mean.shape[2]
    radius = combine(x, [mean], torch.sub)
    tangent = combine(vector, [block_mean(vector, blocks)], torch.sub)
    length = block_mean(radius.square(), blocks)
    # A block that is constant at its mean has no radial direction, and loses nothing.
    share = block_mean(tangent * radius, blocks) / torch.where(length == 0, 1, length)
    tangent = tangent - combine(radius, [share], torch.mul)
    return tangent, vector - tangent


split = decompose  # its name up to version 0.1


@MANIFOLDS.add("badain")
class BlockManifold:
    """SDDM's manifold M_i: images whose blocks have the means and variances of the noised reference [N, C, H, W]."""

    def __init__(self, ref: Tensor, blocks: int, down_n: Any = None) -> None:
        self.mean, self.var = block_statistics(ref, blocks)

    def restrict(self, x: Tensor, alpha_bar: float) -> Tensor:
        """Block AdaIN to the diffused statistics."""
        return block_adain(x, *diffuse_statistics(self.mean, self.var, alpha_bar))

    def decompose(self, x: Tensor, vector: Tensor, alpha_bar: float) -> tuple[Tensor, Tensor]:
        """The function `decompose` at the diffused means."""
        return decompose(x, vector, alpha_bar**0.5 * self.mean)


@MANIFOLDS.add("low_pass")
class LowPassManifold:
    """The paper's ablation: images with the low frequencies of the noised reference, sqrt(alpha_bar) phi(ref).

    phi is ILVR's low-pass filter by down_n, with its cubic kernel. It is no exact projection, so `restrict` comes close
    to the manifold rather than onto it (as in ILVR).
    """

    def __init__(self, ref: Tensor, down_n: int, blocks: Any = None) -> None:
        check_down_n(down_n, ref.shape[2:])
        self.phi = low_pass_filter(ref.shape[2:], down_n, "cubic")
        self.low = self.phi(ref)

    def restrict(self, x: Tensor, alpha_bar: float) -> Tensor:
        """x - phi(x) + sqrt(alpha_bar) phi(ref)."""
        return x - self.phi(x) + alpha_bar**0.5 * self.low

    def decompose(self, x: Tensor, vector: Tensor, alpha_bar: float) -> tuple[Tensor, Tensor]:
        """The vector's high and low frequencies."""
        normal = self.phi(vector)
        return vector - normal, normal
