"""Block statistics, restriction and split: golden numbers, plain loops, and the identities that define them."""

import itertools
import statistics

import pytest
import torch
from conftest import golden, golden_index, golden_names
from hypothesis import given, settings
from hypothesis import strategies as st

from guided_diffusion.errors import InputError
from guided_diffusion.manifold import (
    EPS,
    block_adain,
    block_statistics,
    check_blocks,
    decompose,
    diffuse_statistics,
    from_blocks,
    to_blocks,
)
from guided_diffusion.script_util import create_diffusion

shapes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(2, 5), st.integers(1, 5))


def images(shape, seed, scale=1.0):
    """Two random tensors [N, C, B * h, B * w] in float64 for shape = (N, C, B, h, w)."""
    n, c, blocks, h, w = shape
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(2, n, c, blocks * h, blocks * w, generator=generator, dtype=torch.float64)).unbind()


@pytest.mark.parametrize("name", golden_names("block_ops_"))
def test_golden(name):
    data, config = golden(name), golden_index()[name]
    mean, var = block_statistics(data["ref"], config["blocks"])
    alpha_bar = float(
        create_diffusion(timestep_respacing=config["timestep_respacing"]).alphas_cumprod[config["t_index"]]
    )
    mean_t, var_t = diffuse_statistics(mean, var, alpha_bar)
    tangent, normal = decompose(data["x"], data["grad"], mean_t)
    results = {"block_mean": mean, "block_std": var.sqrt(), "mean_t": mean_t, "var_t": var_t}
    results |= {"badain_feat": block_adain(data["x"], mean, var), "tangent": tangent, "normal": normal}
    results |= {"badain_stats": block_adain(data["x"], mean_t, var_t)}
    for key, value in results.items():
        torch.testing.assert_close(value, data[key], atol=1e-5, rtol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


@settings(max_examples=30)
@given(shapes, st.integers(0, 2**32))
def test_statistics_of_every_block(shape, seed):
    x, _ = images(shape, seed)
    blocks = shape[2]
    mean, var = block_statistics(x, blocks)
    assert mean.shape == var.shape == (shape[0], shape[1], blocks, blocks, 1, 1)
    h, w = x.shape[2] // blocks, x.shape[3] // blocks
    for n, c, i, j in itertools.product(*map(range, mean.shape[:4])):
        values = x[n, c, i * h : (i + 1) * h, j * w : (j + 1) * w].flatten().tolist()
        assert float(mean[n, c, i, j]) == pytest.approx(statistics.mean(values), abs=1e-12)
        assert float(var[n, c, i, j]) == pytest.approx(statistics.variance(values) + 1e-5, rel=1e-10)


@settings(max_examples=30)
@given(shapes, st.integers(0, 2**32), st.floats(0, 1))
def test_restriction_lands_on_the_manifold_and_stays(shape, seed, alpha_bar):
    x, ref = images(shape, seed)
    target = diffuse_statistics(*block_statistics(ref, shape[2]), alpha_bar)
    there = block_adain(x, *target)
    mean, var = block_statistics(there, shape[2])
    own = block_statistics(x, shape[2])[1]
    torch.testing.assert_close(mean, target[0], atol=1e-10, rtol=0)
    # EPS keeps constant blocks finite, at the price of a little variance: var * (own - EPS) / own.
    torch.testing.assert_close(var - EPS, target[1] * (own - EPS) / own, atol=1e-10, rtol=1e-8)


@settings(max_examples=50)
@given(shapes, st.integers(0, 2**32))
def test_split_parts(shape, seed):
    x, vector = images(shape, seed)
    blocks = shape[2]
    mean, _ = block_statistics(images(shape, seed + 1)[0], blocks)
    tangent, normal = decompose(x, vector, mean)
    torch.testing.assert_close(tangent + normal, vector, atol=1e-12, rtol=0)
    # Removing the radial component of a mean-free vector: orthogonal to x - mean whatever the mean of x is.
    radius = to_blocks(x, blocks) - mean
    inner = (to_blocks(tangent, blocks) * radius).sum(dim=(4, 5))
    torch.testing.assert_close(inner, torch.zeros_like(inner), atol=1e-9, rtol=0)


@settings(max_examples=50)
@given(shapes, st.integers(0, 2**32))
def test_split_is_the_projection_on_the_tangent_space(shape, seed):
    """At a point of the manifold, moving along the tangent keeps means, and variances to first order."""
    x, vector = images(shape, seed)
    blocks = shape[2]
    mean, var = block_statistics(x, blocks)
    tangent, normal = decompose(x, vector, mean)
    torch.testing.assert_close(decompose(x, tangent, mean)[0], tangent, atol=1e-9, rtol=0)
    torch.testing.assert_close(decompose(x, normal, mean)[1], normal, atol=1e-9, rtol=0)
    step = 1e-4
    moved_mean, moved_var = block_statistics(x + step * tangent, blocks)
    torch.testing.assert_close(moved_mean, mean, atol=1e-11, rtol=0)
    second_order = block_statistics(tangent, blocks)[1] - EPS
    torch.testing.assert_close(moved_var, var + step**2 * second_order, atol=1e-11, rtol=0)


def test_diffused_statistics_are_those_of_a_noised_reference():
    generator = torch.Generator().manual_seed(0)
    ref = torch.rand(1, 3, 512, 512, generator=generator) * 2 - 1
    alpha_bar = 0.3
    noised = alpha_bar**0.5 * ref + (1 - alpha_bar) ** 0.5 * torch.randn(ref.shape, generator=generator)
    expected_mean, expected_var = diffuse_statistics(*block_statistics(ref, 2), alpha_bar)
    mean, var = block_statistics(noised, 2)
    torch.testing.assert_close(mean, expected_mean, atol=0.02, rtol=0)
    torch.testing.assert_close(var, expected_var, atol=0, rtol=0.03)


@pytest.mark.parametrize("value", [-1.0, 0.0])
def test_constant_blocks(value):
    constant = torch.full((2, 3, 8, 8), value)
    mean, var = block_statistics(constant, 4)
    torch.testing.assert_close(mean, torch.full_like(mean, value))
    torch.testing.assert_close(var, torch.full_like(var, 1e-5), atol=0, rtol=1e-6)
    # A constant block has no direction in which to grow: it gets the mean and stays constant.
    target = diffuse_statistics(*block_statistics(torch.rand(2, 3, 8, 8), 4), 0.5)
    restricted = block_adain(constant, *target)
    torch.testing.assert_close(restricted, from_blocks(target[0].expand(-1, -1, -1, -1, 2, 2)))
    # It loses only the mean of a vector.
    vector = torch.randn(2, 3, 8, 8)
    tangent, normal = decompose(constant, vector, mean)
    block_mean = block_statistics(vector, 4)[0].expand(-1, -1, -1, -1, 2, 2)
    torch.testing.assert_close(tangent, vector - from_blocks(block_mean))
    torch.testing.assert_close(normal, from_blocks(block_mean))


@pytest.mark.parametrize(
    "size, blocks, near", [((32, 32), 5, [4, 8]), ((32, 30), 16, [2, 1]), ((32, 32), 0, [1, 2]), ((8, 8), 8, [4, 2])]
)
def test_blocks_that_do_not_fit_are_refused_with_the_nearest_that_do(size, blocks, near):
    with pytest.raises(InputError, match=f"{near[0]} and {near[1]} do") as caught:
        block_statistics(torch.zeros(1, 3, *size), blocks)
    assert (caught.value.parameter, caught.value.value) == ("blocks", blocks)
    for fit in near:
        check_blocks(size, fit)
