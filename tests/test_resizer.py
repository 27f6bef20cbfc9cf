"""The antialiased resizer: golden numbers, and what any resizing must keep."""

import numpy as np
import pytest
import torch
from conftest import golden, golden_names
from hypothesis import given, settings
from hypothesis import strategies as st

from resizer import KERNELS, Resizer, resize_matrix

kernels = st.sampled_from(sorted(KERNELS))
lengths = st.integers(2, 40)
scales = st.sampled_from([1 / 8, 1 / 4, 0.37, 0.5, 0.9, 1.0, 1.5, 2.0, 3.0, 4.0])


@pytest.mark.parametrize("name", golden_names("resizer"))
def test_golden(name):
    data = golden(name)
    cases = sorted(key.removesuffix("/in") for key in data if key.endswith("/in"))
    assert cases
    for case in cases:
        kernel, _, scale = case.split("/")
        x = data[f"{case}/in"]
        found, expected = Resizer(x.shape, float(scale), kernel=kernel)(x), data[f"{case}/out"]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0, msg=lambda m, case=case: f"{case}: {m}")


def plain_resize(line, scale, kernel):
    """Resize a list of numbers sample by sample, by the definition: a stretched kernel over mirrored samples."""
    function, width = KERNELS[kernel]
    n = len(line)
    count = int(np.ceil(n * scale))
    stretch = min(scale, 1.0)
    result = []
    for k in range(count):
        # Pixel centres: sample k of the output is at (k + 1/2) / scale - 1/2, less half of what rounding up added.
        centre = (k + 0.5 - (count - n * scale) / 2) / scale - 0.5
        reach = int(np.ceil(width / stretch)) + 1
        taps = range(int(np.floor(centre)) - reach, int(np.floor(centre)) + reach + 1)
        weights = np.array([float(function(stretch * (centre - tap))) for tap in taps])
        mirrored = [min(tap % (2 * n), 2 * n - 1 - tap % (2 * n)) for tap in taps]
        result.append(float(weights @ np.array([line[i] for i in mirrored]) / weights.sum()))
    return result


@pytest.mark.parametrize("kernel", sorted(KERNELS))
@pytest.mark.parametrize("length, scale", [(16, 0.25), (17, 0.5), (24, 0.37), (9, 3.0), (8, 4.0), (5, 1.3), (3, 0.125)])
def test_equals_the_definition(kernel, length, scale):
    line = np.random.default_rng(length).normal(size=length)
    # A box's edge may fall exactly on a sample, where rounding decides; move to scales at which it does not.
    if kernel == "box":
        scale *= 0.9871
    np.testing.assert_allclose(
        resize_matrix(length, scale, kernel) @ line, plain_resize(list(line), scale, kernel), atol=1e-12
    )


@settings(max_examples=60)
@given(kernels, lengths, lengths, scales, st.floats(-2, 2))
def test_constants_are_kept(kernel, height, width, scale, value):
    x = torch.full((1, 3, height, width), value, dtype=torch.float64)
    result = Resizer(x.shape, scale, kernel=kernel)(x)
    assert result.shape == (1, 3, int(np.ceil(height * scale)), int(np.ceil(width * scale)))
    torch.testing.assert_close(result, torch.full_like(result, value), atol=1e-12, rtol=0)


@settings(max_examples=30)
@given(kernels, lengths, lengths, scales, st.integers(0, 2**32))
def test_gradient_is_the_transposed_matrices(kernel, height, width, scale, seed):
    """<R x, y> = <x, R* y> with R* y = A^T y B, and autograd gives the same."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(height, width, generator=generator, dtype=torch.float64, requires_grad=True)
    resize = Resizer(x.shape, scale, kernel=kernel)
    result = resize(x)
    y = torch.randn(result.shape, generator=generator, dtype=torch.float64)
    rows, columns = resize.matrices(x)
    adjoint = rows.T @ y @ columns
    product = (result * y).sum()
    product.backward()
    torch.testing.assert_close(x.grad, adjoint, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(product, (x * adjoint).sum(), atol=1e-9, rtol=0)


def test_any_leading_dimensions_and_dtypes():
    resize = Resizer((8, 12), 0.5)
    x = torch.randn(2, 5, 3, 8, 12)
    result = resize(x)
    assert result.shape == (2, 5, 3, 4, 6)
    torch.testing.assert_close(result[1, 2, 0], resize(x[1, 2, 0]))
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.bfloat16, 0.05), (torch.float16, 0.01)):
        cast = resize(x.to(dtype))
        assert cast.dtype == dtype
        torch.testing.assert_close(cast.float(), result, atol=tolerance, rtol=tolerance)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"made for \(8, 8\) pixels and got"):
        Resizer((8, 8), 0.5)(torch.zeros(1, 3, 8, 9))
    with pytest.raises(ValueError, match="scale_factor is 0"):
        resize_matrix(8, 0)
    with pytest.raises(ValueError, match="'sinc'; it can be cubic, lanczos2, lanczos3, box, linear"):
        Resizer((8, 8), 0.5, kernel="sinc")
