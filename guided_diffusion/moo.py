"""Multi-objective optimisation: the minimum-norm point of a convex hull (Désidéri 2012; Sener & Koltun 2018).

Moving along the minimum-norm point of the hull of several descent directions harms none of the objectives. All methods
work on the Gram matrix of the vectors, so that the pixels are read once.
"""

import functools
import itertools

import torch
from torch import Tensor

from .errors import check_choice

METHODS = ("exact", "frank_wolfe")


def min_norm_point(vectors: Tensor, dim: int, method: str = "exact") -> Tensor:
    """The point of smallest norm in the convex hull of the vectors.

    vectors: `dim` indexes them, all dimensions after it are their components, all before it are separate problems.
    method: `exact`, or `frank_wolfe` as the public release computes it. Returns vectors' shape without `dim`.
    """
    dim = dim % vectors.ndim
    weights = min_norm_weights(vectors, dim, method).to(vectors.dtype)
    return (weights.reshape(*weights.shape, *[1] * (vectors.ndim - dim - 1)) * vectors).sum(dim)


def min_norm_weights(vectors: Tensor, dim: int, method: str = "exact") -> Tensor:
    """Convex weights [..., K] of the minimum-norm point, for vectors as in `min_norm_point`."""
    check_choice("method", method, METHODS)
    flat = vectors.flatten(dim + 1) if vectors.ndim > dim + 1 else vectors[..., None]
    # The weights do not depend on a common scale; without it, squares of float16 and of extreme numbers stay in range.
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    largest = flat.abs().amax(dim=(-2, -1), keepdim=True)
    flat = flat / torch.where(largest > 0, largest, 1)
    gram = flat @ flat.transpose(-1, -2)
    if gram.shape[-1] == 2:
        return _two_vectors(gram)
    if method == "exact":
        return _best_face(gram) if gram.shape[-1] <= 8 else _frank_wolfe(gram, iterations=200, tolerance=0.0)
    return _frank_wolfe(gram)


def _two_vectors(gram: Tensor) -> Tensor:
    """Closed form: the foot of the perpendicular from 0 to the segment, kept within it."""
    a, b, ab = gram[..., 0, 0], gram[..., 1, 1], gram[..., 0, 1]
    distance = a + b - 2 * ab
    first = torch.where(distance > 0, (b - ab) / torch.where(distance > 0, distance, 1), 0.5).clamp(0, 1)
    return torch.stack([first, 1 - first], dim=-1)


def _best_face(gram: Tensor) -> Tensor:
    """Exact for any K: the shortest of the points of all faces, on each of which gram w = 1 up to scale."""
    # Weights below zero are cut off, which leaves a valid (if longer) candidate. The device never waits for the host,
    # except Apple's, which has no float64 and leaves this to the CPU.
    k, problems = gram.shape[-1], gram.shape[:-2]
    wide = (gram.cpu() if gram.device.type == "mps" else gram).double()
    matrix = wide.reshape(-1, k, k).permute(1, 2, 0)  # [K, K, P]: arithmetic along P is fast
    matrix = matrix / matrix.diagonal().mean(-1).clamp(min=1e-300)
    best, best_length = torch.zeros_like(matrix[0]), torch.full_like(matrix[0, 0], torch.inf)
    for size in range(1, k + 1):
        faces = _faces(k, size, wide.device)
        blocks = matrix[faces[:, None], faces[None]]  # [size, size, F, P]
        weights = _solve(blocks)
        length = ((blocks * weights).sum(1) * weights).sum(0)
        length, face = length.min(0)
        weights = weights.gather(1, face.expand(size, 1, -1))[:, 0]
        weights = torch.zeros_like(matrix[0]).scatter(0, faces[:, face], weights)
        best = torch.where(length < best_length, weights, best)
        best_length = torch.minimum(length, best_length)
    return best.T.reshape(*problems, k).to(gram)


@functools.cache
def _faces(k: int, size: int, device: torch.device) -> Tensor:
    """The vertices [size, F] of the faces of the hull of k vectors."""
    return torch.tensor(list(itertools.combinations(range(k), size)), device=device).T


def _solve(a: Tensor) -> Tensor:
    """Weights [K, F, P] that solve a [K, K, F, P] w = 1 up to scale, made convex, by Gaussian elimination."""
    k = len(a)
    a, b = a.clone(), torch.ones_like(a[0])
    a.diagonal().add_(1e-13)  # for dependent vectors, for which a smaller face holds the exact point
    for j in range(k - 1):
        factor = a[j + 1 :, j] / a[j, j]
        a[j + 1 :, j + 1 :] -= factor[:, None] * a[j, j + 1 :]
        b[j + 1 :] -= factor * b[j]
    for j in reversed(range(k)):
        b[j] = (b[j] - (a[j, j + 1 :] * b[j + 1 :]).sum(0)) / a[j, j]
    b = b.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp(min=0)
    total = b.sum(0)
    return torch.where(total > 0, b / torch.where(total > 0, total, 1), 1 / k)


def _frank_wolfe(gram: Tensor, iterations: int = 20, tolerance: float = 1e-4) -> Tensor:
    """Frank-Wolfe from equal weights with exact line search, towards the vertex with the smallest inner product.

    As in the release, all problems stop at the first step whose mean length is below the tolerance, often far from
    convergence; a flag on the device in place of a break keeps the host from waiting.
    """
    k = gram.shape[-1]
    weights = torch.full_like(gram[..., 0], 1 / k)
    running = torch.ones((), dtype=torch.bool, device=gram.device)
    for _ in range(iterations):
        inner = (gram @ weights[..., None])[..., 0]
        own = (weights * inner).sum(-1)
        smallest, vertex = inner.min(-1)
        vertex = torch.nn.functional.one_hot(vertex, k).to(gram.dtype)
        distance = own - 2 * smallest + (gram.diagonal(dim1=-2, dim2=-1) * vertex).sum(-1)
        # The line search's minimum is (own - smallest) / distance; 0/0 (all points equal) counts as a full step.
        gamma = ((own - smallest) / distance).nan_to_num(nan=1.0).clamp(0, 1)[..., None]
        weights = torch.where(running, (1 - gamma) * weights + gamma * vertex, weights)
        running = running & (gamma.abs().mean() >= tolerance)
    return weights
