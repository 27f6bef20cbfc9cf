"""DDIM and DPM-Solver++(2M) in the sampler: against theory, against the DDIM loop, and what must not change."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import LinearModel, run_states, small_run

from guided_diffusion import energy
from guided_diffusion.errors import InputError
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, ModelMeanType, ModelVarType
from guided_diffusion.manifold import block_statistics, diffuse_statistics
from guided_diffusion.solvers import DDIM, resolve_step

STEPS = 8


def setup():
    """(diffusion, references, draws) of a small run."""
    return small_run(STEPS)[1:]


def run(diffusion, ref, draws, model=None, **options):
    return run_states(model or LinearModel(), diffusion, ref, draws, **options)


@pytest.mark.parametrize("variant", ["manifold", "released"])
def test_full_ddim_noise_is_the_ancestral_step(variant):
    # Song et al. 2021, section 4.1: at eta = 1, mean and variance are those of the DDPM posterior.
    diffusion, ref, draws = setup()
    energies = [energy.dct(4), energy.low_pass(4)]
    options = {"clip_denoised": False, "variant": variant, "energies": energies}
    a, b = (run(diffusion, ref, draws, sampler=name, eta=1.0, **options) for name in ("ddim", "ancestral"))
    for i in a:
        torch.testing.assert_close(a[i], b[i], atol=2e-3, rtol=1e-3, msg=lambda m, i=i: f"step {i}: {m}")
    out = diffusion.p_mean_variance(LinearModel(), ref, torch.tensor([5, 5]), clip_denoised=False)
    ddim = DDIM(diffusion, 1.0).posterior(out, ref, 5)
    torch.testing.assert_close(ddim["mean"], out["mean"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ddim["log_variance"][0].exp(), out["variance"][0, :1, :1, :1], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_ddim_without_guidance_is_the_ddim_loop(eta):
    diffusion, ref, draws = setup()
    states = run(diffusion, ref, draws, sampler="ddim", eta=eta, range_t=STEPS - 1, variant="released")
    x, model = draws[0], LinearModel()
    for i in reversed(range(STEPS)):
        step = diffusion.ddim_sample(model, x, torch.full((2,), i), eta=eta, noise=draws[STEPS - i])
        x = step["sample"]
        torch.testing.assert_close(states[i], x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m"])
def test_guided_steps_are_ddim_and_end_on_the_next_manifold(name):
    diffusion, ref, draws = setup()
    states = run(diffusion, ref, draws, sampler=name, eta=0.3, energies=[energy.dct(4)])
    ddim = run(diffusion, ref, draws, sampler="ddim", eta=0.3, energies=[energy.dct(4)])
    statistics = block_statistics(ref, 4)
    for i in range(3, STEPS):
        assert torch.equal(states[i], ddim[i])
        mean, _ = diffuse_statistics(*statistics, float(diffusion.alphas_cumprod[i - 1]))
        torch.testing.assert_close(block_statistics(states[i], 4)[0], mean, atol=1e-5, rtol=0)


def gaussian_error(name, steps):
    """Distance from the exact solution of the probability-flow ODE for data N(0.4, 0.25), in `steps` steps.

    log-SNR goes evenly from -8 to 4, and one more entry of the schedule ends it: the state there is compared.
    """
    mean, variance = 0.4, 0.25
    log_snr = np.linspace(4, -8, steps + 1)
    alpha_bars = 1 / (1 + np.exp(-log_snr))
    betas = 1 - alpha_bars / np.append(1.0, alpha_bars[:-1])
    diffusion = GaussianDiffusion(
        betas=betas, model_mean_type=ModelMeanType.START_X, model_var_type=ModelVarType.FIXED_SMALL
    )

    def model(x, t):
        alpha_bar = torch.from_numpy(alpha_bars)[t][:, None, None, None]
        gain = alpha_bar.sqrt() * variance / (alpha_bar * variance + 1 - alpha_bar)
        return mean + gain * (x - alpha_bar.sqrt() * mean)

    x = torch.randn(1, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    states = run(
        diffusion, x.clamp(-1, 1), [x] * (steps + 2), model=model, sampler=name,
        range_t=steps, blocks=1,
        clip_denoised=False, variant="released",
    )  # fmt: skip

    def spread(i):
        return math.sqrt(alpha_bars[i] * variance + 1 - alpha_bars[i])

    # (x - sqrt(alpha_bar) mean) / spread does not change along the flow.
    exact = alpha_bars[0] ** 0.5 * mean + (x - alpha_bars[-1] ** 0.5 * mean) * spread(0) / spread(-1)
    return (states[1] - exact).abs().max().item()


def test_dpm_solver_converges_with_second_order():
    errors = [gaussian_error("dpmpp_2m", steps) for steps in (40, 80, 160)]
    for coarse, fine in itertools.pairwise(errors):
        assert 3.5 < coarse / fine < 4.5
    assert errors[0] < 0.1 * gaussian_error("ddim", 40)


@pytest.mark.parametrize("value, step", [(0, 0), (7, 7), (3.0, 3), (0.3, 2), (0.5, 4), (1e-9, 0), (1 - 1e-9, 7)])
def test_steps_and_shares(value, step):
    found = resolve_step(value, 8, "range_t")
    assert type(found) is int and found == step


def test_steps_outside_are_refused_with_what_fits():
    for value in (-1, 8, 2.5, math.nan, math.inf, True, "2", None):
        with pytest.raises(InputError) as caught:
            resolve_step(value, 8, "range_t")
        assert caught.value.parameter == "range_t" and caught.value.value is value
        assert "0 to 7" in caught.value.reason
    with pytest.raises(InputError) as caught:
        resolve_step(0, 8, "start", 1, 8)
    assert caught.value.parameter == "start" and "1 to 8" in caught.value.reason
