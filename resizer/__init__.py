"""Antialiased image resizing as separable linear maps (the resizer of the ILVR and EGSDE releases).

Along each axis, an output sample is a weighted sum of input samples around its position; the kernel is stretched when
shrinking, so that it removes what the smaller image cannot hold. Borders are mirrored. Because the map is linear,
resizing is y = A x B^T with two small matrices, and so are its gradient and any chain of resizings.
"""

import math

import numpy as np
import torch


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
    return np.where((-0.5 <= x) & (x < 0.5), 1.0, 0.0)


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


def resize_matrix(in_length, scale, kernel="linear"):
    """The matrix [out_length, in_length] (float64) that resizes one axis by `scale`; out_length = ceil(in * scale)."""
    if kernel not in KERNELS:
        raise ValueError(f"kernel is {kernel!r}; it can be {', '.join(KERNELS)}")
    if not scale > 0:
        raise ValueError(f"scale_factor is {scale}; it must be positive")
    function, width = KERNELS[kernel]
    stretch = min(scale, 1.0)
    width = width / stretch
    out_length = math.ceil(in_length * scale * (1 - 1e-12))
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


class Resizer:
    """Resize the last two axes of a tensor.

    in_shape: shape of the tensors to come, at least their last two entries. scale_factor: one number for both axes.
    kernel: cubic, lanczos2, lanczos3, box or linear. Called on [..., H, W] it returns [..., H', W'] in the same dtype.
    """

    def __init__(self, in_shape, scale_factor, kernel="linear"):
        height, width = in_shape[-2:]
        self.in_size = (height, width)
        self.rows = torch.from_numpy(resize_matrix(height, scale_factor, kernel))
        self.columns = torch.from_numpy(resize_matrix(width, scale_factor, kernel))
        self._cast = {}

    def matrices(self, like):
        """The two matrices (rows [H', H], columns [W', W]) in the dtype and on the device of a tensor."""
        key = like.dtype, like.device
        if key not in self._cast:
            self._cast[key] = self.rows.to(like), self.columns.to(like)
        return self._cast[key]

    def __call__(self, x):
        if tuple(x.shape[-2:]) != self.in_size:
            raise ValueError(f"the resizer was made for {self.in_size} pixels and got {tuple(x.shape[-2:])}")
        rows, columns = self.matrices(x)
        return rows @ x @ columns.T


def low_pass_filter(size, down_n, kernel):
    """ILVR's filter phi for images of size (H, W): a function that shrinks by down_n and enlarges again.

    Raises ValueError unless down_n divides the size.
    """
    height, width = size
    if down_n < 1 or height % down_n or width % down_n:
        raise ValueError(f"down_n is {down_n}; it must be at least 1 and divide the image size {height}x{width}")
    down = Resizer((height, width), 1 / down_n, kernel)
    up = Resizer((height // down_n, width // down_n), down_n, kernel)
    return lambda x: up(down(x))
