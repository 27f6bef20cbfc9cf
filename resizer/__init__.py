"""Antialiased image resizing as separable linear maps (the resizer of the ILVR and EGSDE releases).

Along each axis, an output sample is a weighted sum of input samples around its position; the kernel is stretched when
shrinking, so that it removes what the smaller image cannot hold. Borders are mirrored. Because the map is linear,
resizing is y = A x B^T with two small matrices, and so are its gradient and any chain of resizings.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn


def _cubic(x):
    """Keys' cubic convolution kernel with a = -1/2."""
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x <= 1, near, np.where(x <= 2, far, 0.0))


def _lanczos(order):
    def kernel(x):
        return np.where(np.abs(x) < order, np.sinc(x) * np.sinc(x / order), 0.0)

    return kernel


def _box(x):
    return np.where((x >= -0.5) & (x < 0.5), 1.0, 0.0)


def _linear(x):
    return np.clip(1 - np.abs(x), 0.0, None)


# kernel function and the width of its support
KERNELS = {
    "cubic": (_cubic, 4.0),
    "lanczos2": (_lanczos(2), 4.0),
    "lanczos3": (_lanczos(3), 6.0),
    "box": (_box, 1.0),
    "linear": (_linear, 2.0),
}


def resize_matrix(
    in_length: int, scale: float, kernel: str = "cubic", out_length: int | None = None, antialiasing: bool = True
) -> np.ndarray:
    """The matrix [out_length, in_length] (float64) that resizes one axis by `scale`; out_length: ceil(in * scale).

    antialiasing: stretch the kernel when shrinking, so that it averages what the smaller image cannot hold.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel is {kernel!r}; it can be {', '.join(KERNELS)}")
    if not scale > 0:
        raise ValueError(f"scale_factor is {scale}; it must be positive")
    function, width = KERNELS[kernel]
    stretch = min(scale, 1.0) if antialiasing else 1.0
    width = width / stretch
    out_length = out_length or math.ceil(in_length * scale * (1 - 1e-12))
    # Positions of the output samples in input coordinates; where out_length was rounded up, both grids share a centre.
    out = np.arange(1, out_length + 1) - (out_length - in_length * scale) / 2
    position = out / scale + 0.5 * (1 - 1 / scale)
    left = np.floor(position - width / 2)
    taps = left[:, None] + np.arange(math.ceil(width) + 2) - 1
    weights = stretch * function(stretch * (position[:, None] - taps - 1))
    total = weights.sum(axis=1, keepdims=True)
    weights = weights / np.where(total == 0, 1.0, total)
    # Mirrored without repeating period effects: ... 1 0 | 0 1 2 ... n-1 | n-1 n-2 ...
    folded = taps.astype(int) % (2 * in_length)
    source = np.minimum(folded, 2 * in_length - 1 - folded)
    matrix = np.zeros((out_length, in_length))
    np.add.at(matrix, (np.arange(out_length)[:, None], source), weights)
    return matrix


class Resizer(nn.Module):
    """Resize a tensor, with PyTorch-Resizer's interface.

    in_shape: shape of the tensors to come, at least the axes that are resized. scale_factor: one number for the last
    two axes, or a list for as many last axes as it has entries. output_shape: the resized shape, or its last entries.
    Of both, output_shape gives the lengths and scale_factor the positions. kernel: cubic (the default, also for None),
    lanczos2, lanczos3, box or linear. antialiasing: stretch the kernel when shrinking. Called on [..., H, W], it
    returns [..., H', W'] in the same dtype. Raises ValueError for what does not fit.
    """

    def __init__(
        self, in_shape: Sequence[int], scale_factor: float | Sequence[float] | None = None,
        output_shape: Sequence[int] | None = None, kernel: str | None = None, antialiasing: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_size = tuple(int(side) for side in in_shape)
        scales, sizes = _scales_and_sizes(self.in_size, scale_factor, output_shape)
        self._axes: dict[int, torch.Tensor] = {}
        for axis, (length, scale, size) in enumerate(zip(self.in_size, scales, sizes), -len(self.in_size)):
            if axis >= -2 or scale != 1 or size != length:
                matrix = resize_matrix(length, scale, kernel or "cubic", size, antialiasing)
                self._axes[axis] = torch.from_numpy(matrix)
        self._cast: dict[tuple[torch.dtype, torch.device], tuple[torch.Tensor, ...]] = {}

    def matrices(self, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The matrices [new, old length] of resized axes, rows and columns last, in a tensor's dtype and device."""
        key = like.dtype, like.device
        if key not in self._cast:
            self._cast[key] = tuple(matrix.to(like) for matrix in self._axes.values())
        return self._cast[key]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim < -min(self._axes) or any(x.shape[axis] != self.in_size[axis] for axis in self._axes):
            expected, found = self.in_size[-2:], tuple(x.shape[-2:])
            raise ValueError(f"the resizer was made for {expected} pixels and got {found}")
        *others, rows, columns = self.matrices(x)
        for axis, matrix in zip(self._axes, others):
            x = (x.transpose(axis, -1) @ matrix.T).transpose(axis, -1)
        return rows @ x @ columns.T


def _scales_and_sizes(
    in_shape: tuple[int, ...], scale_factor: float | Sequence[float] | None, output_shape: Sequence[int] | None
) -> tuple[list[float], list[int | None]]:
    """Scale and new length of every axis of in_shape."""
    n = len(in_shape)
    scales: list[float] = []
    sizes: list[int | None] = []
    if n < 2:
        raise ValueError(f"in_shape is {in_shape}; it must have at least two entries")
    if scale_factor is None and output_shape is None:
        raise ValueError("scale_factor is missing; give it, or output_shape")
    if output_shape is not None:
        if not 2 <= len(output_shape) <= n or not all(int(side) == side and side >= 1 for side in output_shape):
            raise ValueError(f"output_shape is {tuple(output_shape)}; it must be 2 to {n} positive whole numbers")
        sizes = [*in_shape[: n - len(output_shape)], *map(int, output_shape)]
        scales = [size / length for size, length in zip(sizes, in_shape) if size]
    if scale_factor is not None:
        given = [scale_factor] * 2 if isinstance(scale_factor, (int, float)) else list(scale_factor)
        if not 2 <= len(given) <= n:
            raise ValueError(f"scale_factor is {scale_factor}; it must be one number, or 2 to {n}")
        scales = [1.0] * (n - len(given)) + [float(scale) for scale in given]
    return scales, sizes or [None if scale != 1 else length for scale, length in zip(scales, in_shape)]


def low_pass_filter(size: Sequence[int], down_n: int, kernel: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """ILVR's filter phi for images of size (H, W): a function that shrinks by down_n, a divisor, and enlarges again."""
    down = Resizer(size, 1 / down_n, kernel=kernel)
    up = Resizer([side // down_n for side in size], down_n, kernel=kernel)
    return lambda x: up(down(x))
