"""The minimum-norm point: golden numbers, an independent solver, and the properties that define it."""

import pytest
import torch
from conftest import golden, golden_names, minimum_norm_point
from hypothesis import given, settings
from hypothesis import strategies as st

from guided_diffusion.errors import InputError
from guided_diffusion.moo import min_norm_point, min_norm_weights

METHODS = ("exact", "frank_wolfe")


def length(point):
    return point.double().flatten(-2).norm(dim=-1)


def random_vectors(count, components=24, seed=0, common=1.0, spread=0.0, dtype=torch.float64):
    """[K, components]: random vectors, the larger `common` the more alike, whose lengths span 10^spread."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(count, components, generator=generator, dtype=torch.float64)
    vectors += common * torch.randn(components, generator=generator, dtype=torch.float64)
    scales = 10 ** (spread * (torch.rand(count, 1, generator=generator, dtype=torch.float64) - 0.5))
    return (vectors * scales).to(dtype)


def reference_point(vectors):
    return torch.from_numpy(minimum_norm_point(vectors.double().numpy()))


vector_sets = st.builds(
    random_vectors,
    st.integers(1, 6),
    components=st.sampled_from([1, 2, 3, 24]),
    seed=st.integers(0, 2**32),
    common=st.sampled_from([0.0, 0.3, 1.0, 10.0]),
    spread=st.sampled_from([0.0, 1.0, 3.0]),
)


@pytest.mark.parametrize("name", golden_names("frank_wolfe_"))
def test_golden(name):
    data = golden(name)
    vectors, expected = data["vectors"], data["output"]
    dim = vectors.ndim - 3
    torch.testing.assert_close(min_norm_point(vectors, dim, "frank_wolfe"), expected, atol=1e-4, rtol=0)
    exact = min_norm_point(vectors, dim, "exact")
    assert (length(exact) <= length(expected) * (1 + 1e-6)).all()
    if vectors.shape[dim] == 2:
        torch.testing.assert_close(exact, expected, atol=1e-4, rtol=0)


@settings(max_examples=150)
@given(vector_sets)
def test_agrees_with_non_negative_least_squares(vectors):
    expected, largest = reference_point(vectors), float(vectors.norm(dim=1).max())
    result = min_norm_point(vectors, 0)
    assert result.norm() <= expected.norm() + 1e-6 * largest
    # The point is unique, but its position is only as certain as the square root of its norm's rounding.
    torch.testing.assert_close(result, expected, atol=1e-4 * largest, rtol=0)


@settings(max_examples=100)
@given(vector_sets)
def test_no_direction_is_harmed(vectors):
    """<d, v_k> >= |d|^2 for every k: this is what makes d the minimum-norm point."""
    result = min_norm_point(vectors, 0)
    inner = vectors @ result
    slack = 1e-6 * float(vectors.norm(dim=1).max()) ** 2
    assert (inner >= result.square().sum() - slack).all()


@settings(max_examples=100)
@given(vector_sets, st.sampled_from(METHODS))
def test_weights_are_convex(vectors, method):
    weights = min_norm_weights(vectors, 0, method)
    assert (weights >= 0).all()
    assert float(weights.sum()) == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(min_norm_point(vectors, 0, method), weights.to(vectors) @ vectors)


def test_many_vectors_are_nearly_exact():
    for seed in range(20):
        vectors = random_vectors(9, 40, seed, common=0.5 * (seed % 3))
        assert min_norm_point(vectors, 0).norm() <= 1.02 * reference_point(vectors).norm()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [1, 3])
def test_identical_opposite_and_zero_vectors(count, method):
    vector = torch.randn(2, 3, 1, 5, 4)
    result = min_norm_point(vector.expand(-1, -1, count, -1, -1), 2, method)
    torch.testing.assert_close(result, vector[:, :, 0], atol=1e-6, rtol=1e-5)
    assert torch.equal(min_norm_point(torch.zeros(2, count, 5), 1, method), torch.zeros(2, 5))
    cancelled = min_norm_point(torch.cat([vector, -1e3 * vector], dim=2), 2, method)
    torch.testing.assert_close(cancelled, torch.zeros_like(cancelled), atol=1e-3, rtol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [2, 3])
def test_problems_and_components_may_have_any_shape(count, method):
    """`dim` is counted from either end; the dimensions around it only change the view."""
    vectors = torch.randn(6, count, 20, generator=torch.Generator().manual_seed(1))
    weights, expected = min_norm_weights(vectors, 1, method), min_norm_point(vectors, 1, method)
    shaped = vectors.reshape(2, 3, count, 4, 5)
    for dim in (2, -3):
        torch.testing.assert_close(min_norm_weights(shaped, dim, method), weights.reshape(2, 3, count))
        torch.testing.assert_close(min_norm_point(shaped, dim, method), expected.reshape(2, 3, 4, 5))
    with pytest.raises(InputError) as caught:
        min_norm_point(shaped, 2, "newton")
    assert (caught.value.parameter, caught.value.value) == ("method", "newton")


def test_frank_wolfe_stops_by_the_mean_over_all_problems():
    """As in the release: a problem beside many that are done is left before it has converged."""
    slow = random_vectors(3, 16, 0, 0.0, 0.0, torch.float32)
    done = torch.eye(3, 16).expand(20_000, 3, 16)  # equal weights, from which it starts, are their solution
    alone = min_norm_weights(slow[None], 1, "frank_wolfe")[0]
    among = min_norm_weights(torch.cat([slow[None], done]), 1, "frank_wolfe")[0]
    assert (alone @ slow).norm() < (among @ slow).norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("count", [2, 4])
def test_other_precisions(count, dtype):
    vectors = torch.stack([random_vectors(count, 16, seed) for seed in range(20)])
    result = min_norm_point(vectors.to(dtype), 1).double()
    expected = torch.stack([reference_point(v) for v in vectors])
    error = (result - expected).norm(dim=1) / vectors.norm(dim=2).max(dim=1).values
    assert (error < 4 * torch.finfo(dtype).eps ** 0.5 + 1e-6).all()
