"""The manifolds of SDDM: images with given block statistics (Sun et al. 2023, section 4).

The image plane is cut into blocks x blocks rectangles. A tensor [N, C, H, W] is seen as [N, C, B, B, h, w]; means and
variances per image, channel and block have shape [N, C, B, B, 1, 1], so they broadcast over that view.
"""

import torch

EPS = 1e-5


def check_blocks(size, blocks):
    """Raise ValueError unless images of `size` = (H, W) can be cut into blocks x blocks of at least two pixels."""
    height, width = size
    if blocks < 1 or height % blocks or width % blocks:
        raise ValueError(f"{height}x{width} pixels cannot be cut into {blocks}x{blocks} equal blocks")
    if (height // blocks) * (width // blocks) < 2:
        raise ValueError(f"{blocks}x{blocks} blocks of {height}x{width} pixels have one pixel each, and so no variance")


def to_blocks(x, blocks):
    """View [N, C, H, W] as [N, C, B, B, h, w] without copying."""
    n, c, height, width = x.shape
    return x.reshape(n, c, blocks, height // blocks, blocks, width // blocks).transpose(3, 4)


def from_blocks(x):
    """Undo `to_blocks`: [N, C, B, B, h, w] -> [N, C, H, W]."""
    n, c, rows, columns, h, w = x.shape
    return x.transpose(3, 4).reshape(n, c, rows * h, columns * w)


def block_statistics(x, blocks):
    """Mean and unbiased variance plus 1e-5 of every block.

    x: [N, C, H, W], H and W divisible by blocks. Returns two tensors [N, C, B, B, 1, 1].
    """
    check_blocks(x.shape[2:], blocks)
    var, mean = torch.var_mean(to_blocks(x, blocks), dim=(4, 5), keepdim=True)
    return mean, var + EPS


def diffuse_statistics(mean, var, alpha_bar):
    """Statistics on which a reference with `mean` and `var` concentrates when noised to alpha_bar (a float)."""
    return alpha_bar**0.5 * mean, alpha_bar * var + (1 - alpha_bar)


def block_adain(x, mean, var):
    """Restriction to the manifold: give every block of x [N, C, H, W] the target mean and variance.

    Per block, (x - mean(x)) / std(x) * std + mean (Huang & Belongie 2017, blockwise).
    """
    blocks = mean.shape[2]
    own_mean, own_var = block_statistics(x, blocks)
    return from_blocks((to_blocks(x, blocks) - own_mean) * (var / own_var).sqrt() + mean)


def split(x, vector, mean):
    """Split a vector at x into its parts tangent and normal to the manifold with block means `mean`.

    x, vector: [N, C, H, W]; mean: [N, C, B, B, 1, 1]. Per block the mean is removed, then the component along x - mean,
    the direction in which the variance grows: what is left is tangent at an x on the manifold. Returns
    (tangent, normal), whose sum is the vector.
    """
    blocks = mean.shape[2]
    radius = to_blocks(x, blocks) - mean
    tangent = to_blocks(vector, blocks)
    tangent = tangent - tangent.mean(dim=(4, 5), keepdim=True)
    length = radius.square().sum(dim=(4, 5), keepdim=True)
    # A block that is constant at its mean has no radial direction, and loses nothing.
    share = (tangent * radius).sum(dim=(4, 5), keepdim=True) / torch.where(length == 0, 1, length)
    tangent = from_blocks(tangent - share * radius)
    return tangent, vector - tangent
