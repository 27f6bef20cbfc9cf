"""The manifolds of SDDM: images with given block statistics (Sun et al. 2023, section 4).

A `Manifold` is made from a reference; `MANIFOLDS` has the classes by name.

The functions compute with blocks: the image plane is cut into blocks x blocks rectangles. A tensor [N, C, H, W] is seen
as [N, C, B, B, h, w]; means and variances per image, channel and block have shape [N, C, B, B, 1, 1], so they broadcast
over that view.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch.nn import functional as F

from resizer import low_pass_filter

from .errors import InputError
from .registry import Registry

EPS = 1e-5

MANIFOLDS = Registry("manifold")
"""Makers of manifolds, `make(ref, *, blocks, down_n) -> Manifold`, each of which takes the parameter it needs."""


class Manifold(Protocol):
    """Interface of the manifold of a reference noised to alpha_bar. x and vectors are [N, C, H, W].

    `restrict` brings x to it. `decompose` splits a vector at x into parts (tangent, normal), whose sum is the vector.
    """

    def restrict(self, x: torch.Tensor, alpha_bar: float) -> torch.Tensor: ...

    def decompose(
        self, x: torch.Tensor, vector: torch.Tensor, alpha_bar: float
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


def check_blocks(size: Sequence[int], blocks: int, of: str = "image") -> None:
    """Raise InputError unless images of `size` = (H, W) can be cut into blocks x blocks of at least two pixels.

    of: what has this size, for the error.
    """
    height, width = size
    fit = [n for n in range(1, min(size) + 1) if height % n == width % n == 0 and height * width >= 2 * n * n]
    if blocks in fit:
        return
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


def to_blocks(x: torch.Tensor, blocks: int) -> torch.Tensor:
    """View [N, C, H, W] as [N, C, B, B, h, w] without copying."""
    return _rows(x, blocks).transpose(3, 4)


def from_blocks(x: torch.Tensor) -> torch.Tensor:
    """Undo `to_blocks`: [N, C, B, B, h, w] -> [N, C, H, W]."""
    n, c, rows, columns, h, w = x.shape
    return x.transpose(3, 4).reshape(n, c, rows * h, columns * w)


def _rows(x: torch.Tensor, blocks: int) -> torch.Tensor:
    """View [N, C, H, W] as [N, C, B, h, B, w], whose elements lie in memory order: arithmetic on it is fast."""
    n, c, height, width = x.shape
    return x.reshape(n, c, blocks, height // blocks, blocks, width // blocks)


def combine(x: torch.Tensor, statistics: Sequence[torch.Tensor], function: Callable[..., torch.Tensor]) -> torch.Tensor:
    """function(x, *statistics) with every pixel of x [N, C, H, W] beside the statistics of its block."""
    blocks = statistics[0].shape[2]
    return function(_rows(x, blocks), *(s.transpose(3, 4) for s in statistics)).reshape(x.shape)


def block_mean(x: torch.Tensor, blocks: int) -> torch.Tensor:
    """Mean of every block of x [N, C, H, W], as [N, C, B, B, 1, 1]."""
    return F.avg_pool2d(x, (x.shape[2] // blocks, x.shape[3] // blocks))[..., None, None]


def block_statistics(x: torch.Tensor, blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and unbiased variance plus 1e-5 of every block.

    x: [N, C, H, W], H and W divisible by blocks. Returns two tensors [N, C, B, B, 1, 1].
    """
    check_blocks(x.shape[2:], blocks)
    mean = block_mean(x, blocks)
    n = x.shape[2] * x.shape[3] // blocks**2
    deviation = combine(x, [mean], torch.sub)
    return mean, block_mean(deviation.square(), blocks) * (n / (n - 1)) + EPS


def diffuse_statistics(mean: torch.Tensor, var: torch.Tensor, alpha_bar: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the expected mean and variance of a reference with `mean` and `var` when noised to alpha_bar (a float)."""
    return alpha_bar**0.5 * mean, alpha_bar * var + (1 - alpha_bar)


def block_adain(x: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
    """Restriction to the manifold: give every block of x [N, C, H, W] the target mean and variance.

    Per block, (x - mean(x)) / std(x) * std + mean (Huang & Belongie 2017, blockwise).
    """
    own_mean, own_var = block_statistics(x, mean.shape[2])
    return combine(x, [own_mean, (var / own_var).sqrt(), mean], lambda x, own, scale, mean: (x - own) * scale + mean)


def decompose(x: torch.Tensor, vector: torch.Tensor, mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split a vector at x into its parts tangent and normal to the manifold with block means `mean`.

    x, vector: [N, C, H, W]; mean: [N, C, B, B, 1, 1]. Per block the mean is removed, then the component along x - mean,
    the direction in which the variance grows: what is left is tangent at an x on the manifold. Returns
    (tangent, normal), whose sum is the vector.
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


class BlockManifold:
    """SDDM's manifold: images whose blocks have the means and variances of the noised reference.

    ref: [N, C, H, W]; blocks: the image plane is cut into blocks x blocks.
    """

    def __init__(self, ref: torch.Tensor, blocks: int) -> None:
        self.mean, self.var = block_statistics(ref, blocks)

    def restrict(self, x: torch.Tensor, alpha_bar: float) -> torch.Tensor:
        """Apply block AdaIN to the diffused statistics."""
        return block_adain(x, *diffuse_statistics(self.mean, self.var, alpha_bar))

    def decompose(self, x: torch.Tensor, vector: torch.Tensor, alpha_bar: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Split the vector by `decompose` at the diffused means."""
        return decompose(x, vector, alpha_bar**0.5 * self.mean)

    split = decompose  # its name up to version 0.1


class LowPassManifold:
    """The paper's ablation: images with the low frequencies of the reference, sqrt(alpha_bar) phi(ref).

    ref: [N, C, H, W]; phi is ILVR's low-pass filter by down_n, with its cubic kernel. phi is no exact projection, so
    `restrict` comes close to the manifold rather than onto it (as in ILVR).
    """

    def __init__(self, ref: torch.Tensor, down_n: int) -> None:
        check_down_n(down_n, ref.shape[2:])
        self.phi = low_pass_filter(ref.shape[2:], down_n, "cubic")
        self.low = self.phi(ref)

    def restrict(self, x: torch.Tensor, alpha_bar: float) -> torch.Tensor:
        """Return x - phi(x) + sqrt(alpha_bar) phi(ref)."""
        return x - self.phi(x) + alpha_bar**0.5 * self.low

    def decompose(self, x: torch.Tensor, vector: torch.Tensor, alpha_bar: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Split the vector into its high and its low frequencies."""
        normal = self.phi(vector)
        return vector - normal, normal


MANIFOLDS.add("badain")(lambda ref, *, blocks, down_n: BlockManifold(ref, blocks))
MANIFOLDS.add("low_pass")(lambda ref, *, blocks, down_n: LowPassManifold(ref, down_n))
