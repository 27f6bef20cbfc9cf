"""Distances between two sets of features, float64 [N, D]: Fréchet and kernel distance, and bootstrap intervals."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .table import set_distance

TOLERANCE = 1e-4  # of a covariance's symmetry and smallest eigenvalue, relative to its largest entry or eigenvalue
KERNEL_ROWS = 512  # rows of a kernel matrix held in memory at once
RESAMPLED = 2**25  # entries of the matrices of counts held in memory at once: 256 MiB

Gaussian = tuple[np.ndarray, np.ndarray]
"""Mean [D] and root R [R, D] with RᵀR the covariance."""


def frechet_of_roots(mean1: np.ndarray, root1: np.ndarray, mean2: np.ndarray, root2: np.ndarray) -> float:
    """Fréchet distance |mean1 - mean2|² + Tr(cov1 + cov2 - 2 (cov1 cov2)^½) of two Gaussians (Heusel et al. 2017).

    mean [D], root R [R, D] with RᵀR the covariance, float64 -> float >= 0. The trace of the square root is the nuclear
    norm of R1 R2ᵀ, so singular covariances are no special case.
    """
    overlap = np.linalg.svd(root1 @ root2.T, compute_uv=False).sum()
    distance = np.sum((mean1 - mean2) ** 2) + np.sum(root1**2) + np.sum(root2**2) - 2 * overlap
    return max(float(distance), 0.0)


def root_of_covariance(cov: np.ndarray) -> np.ndarray:
    """R [D, D] with RᵀR = cov [D, D]; raises ValueError where cov is not symmetric and positive semidefinite.

    Negative eigenvalues of at most `TOLERANCE` times the largest are rounding errors and count as 0.
    """
    values, vectors = np.linalg.eigh(cov)
    if values[0] < -TOLERANCE * max(values[-1], 0) or np.abs(cov - cov.T).max() > TOLERANCE * np.abs(cov).max():
        raise ValueError("sigma is no covariance: it is not symmetric, or has a negative eigenvalue")
    return np.sqrt(np.clip(values, 0, None))[:, None] * vectors.T


def gaussian_of_features(features: np.ndarray) -> Gaussian:
    """Mean [D] and R [min(N, D), D] with RᵀR the unbiased covariance of features [N, D], N >= 2."""
    mean = features.mean(axis=0)
    root = (features - mean) / math.sqrt(len(features) - 1)
    return mean, np.asarray(np.linalg.qr(root, mode="r")) if len(features) > features.shape[1] else root


def kernel_distance(
    x: np.ndarray, y: np.ndarray, *, subset_size: int = 1000, subsets: int = 100, seed: int = 0
) -> tuple[float, float]:
    """Kernel Inception distance: unbiased MMD² with the kernel (x·y/D + 1)³ (Bińkowski et al. 2018, equation 4).

    x [N, D], y [M, D] float64 -> (mean, standard deviation) over `subsets` random subsets without replacement. Where
    both sets are no larger than `subset_size`, there is one value, and NaN. Unbiased: it can be negative.
    """
    size_x, size_y = min(subset_size, len(x)), min(subset_size, len(y))
    if (size_x, size_y) == (len(x), len(y)):
        return float(_mmd2(x, y, np.ones((1, len(x))), np.ones((1, len(y))))[0]), math.nan
    rng = np.random.default_rng(seed)

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        counts = np.zeros((count, len(x))), np.zeros((count, len(y)))
        for row in range(count):
            for each, size in zip(counts, (size_x, size_y)):
                each[row, rng.choice(each.shape[1], size, replace=False)] = 1
        return counts

    found = _mmd2_of_draws(x, y, subsets, draw)
    return float(found.mean()), float(found.std(ddof=1)) if subsets > 1 else math.nan


def _mmd2_of_draws(
    x: np.ndarray, y: np.ndarray, total: int, draw: Callable[[int], tuple[np.ndarray, np.ndarray]]
) -> np.ndarray:
    """Unbiased MMD² of `total` resamplings [total]; draw(count) gives the counts of `_mmd2` of as many as fit."""
    most = max(1, RESAMPLED // (len(x) + len(y)))
    parts = [min(most, total - start) for start in range(0, total, most)]
    return np.concatenate([_mmd2(x, y, *draw(count)) for count in parts])


def _mmd2(x: np.ndarray, y: np.ndarray, counts_x: np.ndarray, counts_y: np.ndarray) -> np.ndarray:
    """Unbiased MMD² of R resamplings at once: counts [R, N] and [R, M] say how often each row is taken -> [R]."""
    size_x, size_y = counts_x.sum(axis=1), counts_y.sum(axis=1)
    within_x = (_kernel_form(x, x, counts_x, counts_x) - counts_x @ _kernel_diagonal(x)) / (size_x * (size_x - 1))
    within_y = (_kernel_form(y, y, counts_y, counts_y) - counts_y @ _kernel_diagonal(y)) / (size_y * (size_y - 1))
    return within_x + within_y - 2 * _kernel_form(x, y, counts_x, counts_y) / (size_x * size_y)


def _kernel_form(x: np.ndarray, y: np.ndarray, counts_x: np.ndarray, counts_y: np.ndarray) -> np.ndarray:
    total = np.zeros(len(counts_x))
    for start in range(0, len(x), KERNEL_ROWS):
        rows = slice(start, start + KERNEL_ROWS)
        kernel = (x[rows] @ y.T / x.shape[1] + 1) ** 3
        total += ((counts_x[:, rows] @ kernel) * counts_y).sum(axis=1)
    return total


def _kernel_diagonal(x: np.ndarray) -> np.ndarray:
    return (np.sum(x**2, axis=1) / x.shape[1] + 1) ** 3


# Confidence


def bootstrap_mean(
    values: np.ndarray, *, replicates: int, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval (low, high) of the mean of finite values [N] (Efron 1979)."""
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(replicates)]
    return _quantiles(np.array(means), confidence)


def bootstrap_distance(
    compute: Callable[[np.ndarray, Any], Any], x: np.ndarray, y: np.ndarray | Gaussian, estimate: float, *,
    replicates: int, confidence: float = 0.95, seed: int = 0,
) -> tuple[float, float]:  # fmt: skip
    """Bootstrap interval (low, high) of a distance compute(x, y); features x [N, D] and y [M, D] are resampled.

    A resample repeats images, which shifts most distances; the replicates are moved to have `estimate` as their mean.
    """
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(replicates):
        resampled = x[rng.integers(len(x), size=len(x))]
        values.append(compute(resampled, y if isinstance(y, tuple) else y[rng.integers(len(y), size=len(y))]))
    low, high = _quantiles(np.array(values) - np.mean(values) + estimate, confidence)
    return (max(low, 0.0) if min(values) >= 0 else low), high


def bootstrap_kernel(
    x: np.ndarray, y: np.ndarray, estimate: float, *, replicates: int, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """`bootstrap_distance` of the kernel distance, as many replicates at once as fit in memory."""
    rng = np.random.default_rng(seed)

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:  # how often each row is taken in each resample
        a, b = (rng.multinomial(n, np.full(n, 1 / n), size=count).astype(float) for n in (len(x), len(y)))
        return a, b

    found = _mmd2_of_draws(x, y, replicates, draw)
    return _quantiles(found - found.mean() + estimate, confidence)


def _quantiles(values: np.ndarray, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


# The registered distances


@set_distance("fid", "FID", general_label="Fréchet", format=".2f", lower_is_better=True, of_gaussian=True)
def fid(x: np.ndarray, target: np.ndarray | Gaussian) -> float:
    """Fréchet distance of features x [N, D] from other features [M, D] or their Gaussian."""
    known = target if isinstance(target, tuple) else gaussian_of_features(target)
    return frechet_of_roots(*gaussian_of_features(x), *known)


@set_distance(
    "kid", "KID", general_label="kernel", format=".2f", factor=1000, lower_is_better=True,
    options=("kid_subsets", "kid_subset_size", "seed"), interval=bootstrap_kernel,
)  # fmt: skip
def kid(x: np.ndarray, y: np.ndarray, kid_subsets: int, kid_subset_size: int, seed: int) -> tuple[float, float, str]:
    """`kernel_distance` with the evaluation's options."""
    value, std = kernel_distance(x, y, subset_size=kid_subset_size, subsets=kid_subsets, seed=seed)
    mean = f", mean of {kid_subsets} subsets of {kid_subset_size} images, seed {seed}"
    return value, std, "unbiased MMD² with kernel (x·y/D + 1)³" + (" of all images" if math.isnan(std) else mean)
