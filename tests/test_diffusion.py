"""The diffusion process: golden schedules and posteriors, plain formulas for every model type, loops and losses."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from conftest import LinearModel, golden, golden_index, golden_model_and_diffusion, golden_names
from hypothesis import given
from hypothesis import strategies as st

from guided_diffusion.errors import InputError
from guided_diffusion.gaussian_diffusion import GaussianDiffusion, LossType, ModelMeanType, ModelVarType
from guided_diffusion.gaussian_diffusion import get_named_beta_schedule as named_betas
from guided_diffusion.losses import discretized_gaussian_log_likelihood
from guided_diffusion.respace import matching_timestep, space_timesteps
from guided_diffusion.script_util import create_diffusion

STEPS = 40


def process(mean=ModelMeanType.EPSILON, var=ModelVarType.FIXED_SMALL, loss=LossType.MSE, steps=STEPS, **options):
    options = {"betas": named_betas("linear", steps), **options}
    return GaussianDiffusion(model_mean_type=mean, model_var_type=var, loss_type=loss, **options)


def images(n=4, seed=0, dtype=torch.float32):
    """x_0 on the 8-bit grid, noise, and a step index for each image: both ends and two between."""
    generator = torch.Generator().manual_seed(seed)
    x_start = torch.randint(0, 256, (n, 3, 6, 5), generator=generator).to(dtype) / 127.5 - 1
    noise = torch.randn(x_start.shape, generator=generator, dtype=dtype)
    return x_start, noise, torch.tensor([0, 1, STEPS // 2, STEPS - 1])[:n]


@pytest.mark.parametrize("name", golden_names("schedules"))
def test_golden_schedules(name):
    data = golden(name)
    processes = {}
    for key, expected in data.items():
        schedule, spacing, quantity = key.split("/")
        if (schedule, spacing) not in processes:
            flags = {"noise_schedule": schedule, "timestep_respacing": "" if spacing == "full" else spacing}
            processes[schedule, spacing] = create_diffusion(**flags)
        actual = np.array(getattr(processes[schedule, spacing], quantity))
        assert actual.shape == tuple(expected.shape), key
        assert np.abs(actual - expected.numpy()).max() <= 1e-12, key
    assert len(processes) == 14


@pytest.mark.parametrize("name", golden_names("p_mean_variance"))
def test_golden_posterior(name):
    data, config = golden(name), golden_index()[name]
    model, diffusion = golden_model_and_diffusion(config)
    with torch.no_grad():
        out = diffusion.p_mean_variance(model, data["input.x"], data["input.t"], config["clip_denoised"])
    assert set(out) == {"mean", "variance", "log_variance", "pred_xstart"}
    for key in ("mean", "variance", "log_variance"):
        torch.testing.assert_close(out[key], data[f"output.{key}"], atol=1e-4, rtol=1e-4)
    # x_0 is the network's output times sqrt(1/alpha_bar - 1), which is 157 at the last step: there it differs between
    # processors by their rounding errors (bit for bit equal on the kind of processor that made the file).
    amplified = torch.from_numpy(diffusion.sqrt_recipm1_alphas_cumprod)[data["input.t"]]
    error = (out["pred_xstart"] - data["output.pred_xstart"]).abs().flatten(1).amax(1)
    assert (error <= 1e-4 + 2e-6 * amplified).all(), error


@pytest.mark.parametrize("name", golden_names("ddim10"))
def test_golden_ddim(name):
    data, config = golden(name), golden_index()[name]
    model, diffusion = golden_model_and_diffusion(config)
    result = diffusion.ddim_sample_loop(model, data["noise"].shape, noise=data["noise"], eta=config["eta"])
    torch.testing.assert_close(result, data["output"], atol=1e-4, rtol=0)


# --- a process of given alpha_bars


def of_alpha_bars(alpha_bars, mean=ModelMeanType.START_X, **options):
    return GaussianDiffusion.from_alpha_bars(alpha_bars, model_mean_type=mean, **options)


def test_tables_of_alpha_bars_are_those_of_their_betas():
    full = process()
    diffusion = of_alpha_bars(full.alphas_cumprod)
    assert (diffusion.alphas_cumprod == full.alphas_cumprod).all()
    for name, values in vars(full).items():
        if isinstance(values, np.ndarray):
            np.testing.assert_allclose(getattr(diffusion, name), values, rtol=1e-8, err_msg=name)


@pytest.mark.parametrize("mean", [ModelMeanType.START_X, ModelMeanType.VELOCITY])
def test_alpha_bar_may_be_next_to_its_limits(mean):
    """A perfect model recovers the image from (nearly) pure noise, over (nearly) noiseless steps, for every eta."""
    last = 1e-30
    diffusion = of_alpha_bars([1 - 1e-12, 0.99, 0.5, 1e-3, last], mean)
    assert diffusion.alphas_cumprod[-1] == last and diffusion.alphas[-1] == last / 1e-3
    x_start, noise, _ = images(2)

    def model(x, t):
        if mean is ModelMeanType.START_X:
            return x_start
        signal, part = (diffusion.extract(f"sqrt_{name}alphas_cumprod", t) for name in ("", "one_minus_"))
        return (signal * x - x_start) / part

    for eta in (0.0, 0.5, 1.0):
        result = diffusion.ddim_sample_loop(model, noise.shape, noise=noise, eta=eta)
        torch.testing.assert_close(result, x_start, atol=1e-4, rtol=0)
    torch.testing.assert_close(diffusion.p_sample_loop(model, noise.shape, noise=noise), x_start, atol=1e-4, rtol=0)


def test_ddim_is_the_euler_step_of_flow_matching():
    """x = (1 - s) x_0 + s noise, divided by sqrt((1 - s)^2 + s^2), is a process with alpha_bar (1 - s)^2 over that."""
    s = np.linspace(0.02, 0.998, 12)
    size = np.sqrt((1 - s) ** 2 + s**2)
    diffusion = of_alpha_bars(((1 - s) / size) ** 2, timesteps=1000 * s)
    model, x = LinearModel(), torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    for i in reversed(range(1, len(s))):
        out = diffusion.ddim_sample(model, x / size[i], torch.full((2,), i), clip_denoised=False)
        x = x + (s[i - 1] - s[i]) * (x - out["pred_xstart"]) / s[i]
        torch.testing.assert_close(out["sample"] * size[i - 1], x, atol=2e-5, rtol=1e-5)
        assert model.timesteps[-1].tolist() == pytest.approx([1000 * s[i]] * 2)


def test_betas_and_alpha_bars_that_are_none():
    for betas in ([0.1, 0.0], [0.5, 1.1], [0.1, math.nan], [[0.1], [0.2]]):
        with pytest.raises(ValueError, match=r"values in \(0, 1\]"):
            process(betas=betas)
    for bad in ([], [0.5, 0.0], [0.5, 0.5], [1.0, 0.5], [0.5, math.nan], [[0.5]]):
        with pytest.raises(InputError, match="alpha_bars is .* below 1 and above 0, each smaller than the one before"):
            of_alpha_bars(bad)
    with pytest.raises(InputError, match="timesteps is .* one number for each of the 2 entries of alpha_bars"):
        of_alpha_bars([0.9, 0.1], timesteps=[1])


def test_space_timesteps():
    assert sorted(space_timesteps(20, " 2 ,3")) == [0, 9, 10, 14, 19]
    assert sorted(space_timesteps(5, [3])) == [0, 2, 4]


@given(st.integers(1, 4000), st.data())
def test_spacing_keeps_the_number_of_steps_and_both_ends(steps, data):
    count = data.draw(st.integers(1, steps))
    kept = space_timesteps(steps, str(count))
    assert len(kept) == count
    assert min(kept) == 0
    assert max(kept) == (steps - 1 if count > 1 else 0)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("", "it can be a number like 100"), ("ddim10,5", "it can be a number like 100"),
        ("0", "it asks for 0 steps out of 1000"), ("600,10", "it asks for 600 steps out of 500"),
        ("ddim999", "no integer stride"),
    ],
)  # fmt: skip
def test_spacings_that_do_not_fit(text, reason):
    with pytest.raises(InputError, match=f"timestep_respacing is '{text}'; {reason}"):
        space_timesteps(1000, text)


@pytest.mark.parametrize("rescale, factor", [(False, 1), (True, 2)])
def test_the_model_sees_original_timesteps(rescale, factor):
    diffusion = create_diffusion(diffusion_steps=500, timestep_respacing="3", rescale_timesteps=rescale)
    model = LinearModel()
    diffusion.p_mean_variance(model, images(3)[0], torch.tensor([2, 0, 1]))
    assert model.timesteps[0].tolist() == [499 * factor, 0, 250 * factor]
    assert model.timesteps[0].is_floating_point() == rescale
    plain = process(steps=500, rescale_timesteps=rescale)
    assert plain.model_timesteps(torch.tensor([0, 499])).tolist() == [0, 499 * factor]


def test_posterior_is_bayes_rule():
    """q(x_{t-1} | x_t, x_0) is the product of q(x_t | x_{t-1}) and q(x_{t-1} | x_0), normalised."""
    diffusion = process()
    x_start, noise, _ = images(3)
    t = torch.tensor([1, STEPS // 2, STEPS - 1])
    x_t = diffusion.q_sample(x_start, t, noise)
    mean, variance, log_variance = diffusion.q_posterior_mean_variance(x_start, x_t, t)
    torch.testing.assert_close(log_variance, variance.log())
    for n, i in enumerate(t.tolist()):
        alpha, beta, previous = diffusion.alphas[i], diffusion.betas[i], diffusion.alphas_cumprod_prev[i]
        precision = alpha / beta + 1 / (1 - previous)
        expected = (alpha**0.5 / beta * x_t[n] + previous**0.5 / (1 - previous) * x_start[n]) / precision
        torch.testing.assert_close(mean[n], expected, atol=1e-5, rtol=1e-5)
        assert float(variance[n].flatten()[0]) == pytest.approx(1 / precision, rel=1e-5)
    # At step 0 it is x_0 itself.
    mean, variance, _ = diffusion.q_posterior_mean_variance(x_start, x_t, torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(mean, x_start)
    assert not variance.any()


def plain_posterior(diffusion, output, x, i, clip):
    """mean, log-variance and x_0 of one image at step i from the model's output, in float64."""
    alpha_bar, previous = diffusion.alphas_cumprod[i], diffusion.alphas_cumprod_prev[i]
    alpha, beta = diffusion.alphas[i], diffusion.betas[i]
    prediction, values = output[:3], output[3:]
    coef1, coef2 = beta * previous**0.5 / (1 - alpha_bar), (1 - previous) * alpha**0.5 / (1 - alpha_bar)
    if diffusion.model_mean_type is ModelMeanType.EPSILON:
        x_start = (x - (1 - alpha_bar) ** 0.5 * prediction) / alpha_bar**0.5
    elif diffusion.model_mean_type is ModelMeanType.START_X:
        x_start = prediction
    else:
        x_start = alpha_bar**0.5 * x - (1 - alpha_bar) ** 0.5 * prediction
    x_start = x_start.clamp(-1, 1) if clip else x_start
    mean = coef1 * x_start + coef2 * x

    def small(i):
        return diffusion.betas[i] * (1 - diffusion.alphas_cumprod_prev[i]) / (1 - diffusion.alphas_cumprod[i])

    low = math.log(small(max(i, 1)))
    if diffusion.model_var_type is ModelVarType.FIXED_SMALL:
        log_variance = torch.full_like(mean, low)
    elif diffusion.model_var_type is ModelVarType.FIXED_LARGE:
        log_variance = torch.full_like(mean, math.log(beta) if i else low)
    else:
        log_variance = (1 + values) / 2 * math.log(beta) + (1 - values) / 2 * low
    return mean, log_variance, x_start


all_types = pytest.mark.parametrize("mean", ModelMeanType)
all_variances = pytest.mark.parametrize("var", ModelVarType)


def is_learned(var):
    return var is ModelVarType.LEARNED_RANGE


@all_types
@all_variances
@pytest.mark.parametrize("clip", [True, False])
def test_posterior_of_every_model_type(mean, var, clip):
    diffusion, model = process(mean, var), LinearModel(is_learned(var))
    x, _, t = images()
    out = diffusion.p_mean_variance(model, x, t, clip_denoised=clip)
    output = model(x, t)
    for n, i in enumerate(t.tolist()):
        expected = plain_posterior(diffusion, output[n].double(), x[n].double(), i, clip)
        for key, value in zip(("mean", "log_variance", "pred_xstart"), expected):
            torch.testing.assert_close(out[key][n].double(), value, atol=1e-5, rtol=1e-4)
    # The fixed small variance is that of the true posterior, 0 at t = 0, where its logarithm is clipped.
    exact = var is ModelVarType.FIXED_SMALL
    torch.testing.assert_close(out["variance"][exact:], out["log_variance"][exact:].exp())
    assert not exact or (t[0] == 0 and (out["variance"][0] == 0).all())
    assert all(value.shape == x.shape for value in out.values())


def test_denoised_fn_comes_before_clipping():
    diffusion, model = process(), LinearModel()
    x, _, t = images()
    plain = diffusion.p_mean_variance(model, x, t, clip_denoised=False)["pred_xstart"]
    out = diffusion.p_mean_variance(model, x, t, denoised_fn=lambda x: 3 * x)
    torch.testing.assert_close(out["pred_xstart"], (3 * plain).clamp(-1, 1))
    expected, _, _ = diffusion.q_posterior_mean_variance(out["pred_xstart"], x, t)
    torch.testing.assert_close(out["mean"], expected)


@pytest.mark.parametrize("var, channels", [(ModelVarType.FIXED_SMALL, 6), (ModelVarType.LEARNED_RANGE, 3)])
def test_wrong_number_of_output_channels(var, channels):
    x, _, t = images()
    with pytest.raises(ValueError, match=f"the model gives {channels} channels for 3 image channels; learn_sigma"):
        process(var=var).p_mean_variance(LinearModel(channels == 6), x, t)


def test_ddim_step():
    eta = 0.5
    diffusion, model = process(), LinearModel()
    x, noise, t = images()
    step = diffusion.ddim_sample(model, x, t, eta=eta, noise=noise)
    x_start = diffusion.p_mean_variance(model, x, t)["pred_xstart"].double()
    for n, i in enumerate(t.tolist()):
        alpha_bar, previous = diffusion.alphas_cumprod[i], diffusion.alphas_cumprod_prev[i]
        eps = (x[n].double() - alpha_bar**0.5 * x_start[n]) / (1 - alpha_bar) ** 0.5
        sigma = eta * ((1 - previous) / (1 - alpha_bar)) ** 0.5 * (1 - alpha_bar / previous) ** 0.5
        expected = previous**0.5 * x_start[n] + (1 - previous - sigma**2) ** 0.5 * eps + sigma * noise[n]
        torch.testing.assert_close(step["sample"][n].double(), expected, atol=1e-4, rtol=1e-4)


# --- losses


def plain_log_likelihood(grey, mean, scale):
    """log of a Gaussian's mass on the bin of a grey level 0..255, outer bins reaching to infinity."""
    gauss = NormalDist(mean, scale)
    x = grey / 127.5 - 1
    lower = 0.0 if grey == 0 else gauss.cdf(x - 1 / 255)
    upper = 1.0 if grey == 255 else gauss.cdf(x + 1 / 255)
    return math.log(max(upper - lower, 1e-12))


@pytest.mark.parametrize("scale", [0.003, 0.02, 0.3])
def test_discretised_likelihood(scale):
    grey = torch.tensor([0, 1, 100, 127, 128, 254, 255])
    x = grey.double() / 127.5 - 1
    for shift in (-0.01, 0.0, 0.004, 0.5):
        log_scales = torch.full_like(x, math.log(scale))
        actual = discretized_gaussian_log_likelihood(x, means=x + shift, log_scales=log_scales)
        expected = [plain_log_likelihood(int(g), float(v + shift), scale) for g, v in zip(grey, x)]
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-9)


def plain_bound(diffusion, output, x_start, x_t, i):
    """One image's term of the variational bound at step i in bits per dimension, in float64."""
    mean, log_variance, _ = plain_posterior(diffusion, output, x_t, i, clip=False)
    if i == 0:
        grey = ((x_start + 1) * 127.5).round().long().flatten().tolist()
        scales = (0.5 * log_variance).exp().flatten().tolist()
        terms = [-plain_log_likelihood(*values) for values in zip(grey, mean.flatten().tolist(), scales)]
        return sum(terms) / len(terms) / math.log(2)
    previous, alpha_bar = diffusion.alphas_cumprod_prev[i], diffusion.alphas_cumprod[i]
    alpha, beta = diffusion.alphas[i], diffusion.betas[i]
    true_mean = (beta * previous**0.5 * x_start + (1 - previous) * alpha**0.5 * x_t) / (1 - alpha_bar)
    true_variance = torch.full_like(mean, beta * (1 - previous) / (1 - alpha_bar))
    p = torch.distributions.Normal(true_mean, true_variance.sqrt())
    q = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    return float(torch.distributions.kl_divergence(p, q).mean()) / math.log(2)


@all_types
@all_variances
@pytest.mark.parametrize("loss", LossType)
def test_training_losses(mean, var, loss):
    diffusion, model = process(mean, var, loss), LinearModel(is_learned(var))
    x_start, noise, t = images(dtype=torch.float64)
    losses = diffusion.training_losses(model, x_start, t, noise=noise)
    x_t = diffusion.q_sample(x_start, t, noise)
    output = model(x_t, t)
    for n, i in enumerate(t.tolist()):
        arguments = output[n].double(), x_start[n].double(), x_t[n].double()
        bound = plain_bound(diffusion, *arguments, i)
        if loss is LossType.RESCALED_KL:
            expected = {"loss": bound * STEPS}
        else:
            alpha_bar = diffusion.alphas_cumprod[i]
            velocity = alpha_bar**0.5 * noise[n] - (1 - alpha_bar) ** 0.5 * x_start[n]
            target = {ModelMeanType.EPSILON: noise[n], ModelMeanType.START_X: x_start[n]}.get(mean, velocity)
            expected = {"mse": float((target - output[n, :3]).square().mean())}
            if is_learned(var):
                expected["vb"] = bound * (STEPS / 1000 if loss is LossType.RESCALED_MSE else 1)
            expected["loss"] = sum(expected.values())
        assert set(losses) == set(expected)
        for key, value in expected.items():
            assert float(losses[key][n]) == pytest.approx(value, rel=2e-3, abs=1e-6), (key, i)


def test_the_bound_trains_only_the_variance():
    """With a squared error beside it, the bound must not reach the prediction: it would change what the mean learns."""
    diffusion = process(var=ModelVarType.LEARNED_RANGE)
    x_start, noise, t = images()
    output = torch.zeros(4, 6, 6, 5, requires_grad=True)
    losses = diffusion.training_losses(lambda x, t: output, x_start, t, noise=noise)
    (grad,) = torch.autograd.grad(losses["vb"].sum(), output, retain_graph=True)
    assert not grad[:, :3].any()
    assert grad[1:, 3:].abs().sum() > 0
    (grad,) = torch.autograd.grad(losses["mse"].sum(), output)
    assert grad[:, :3].any() and not grad[:, 3:].any()


# ---- the timesteps of an encoder -------------------------------------------------------------------------------------

LINEAR = {"noise_schedule": "linear", "diffusion_steps": 1000, "rescale_timesteps": False}


SHORT = {**LINEAR, "diffusion_steps": 250, "rescale_timesteps": True}
COSINE = {**LINEAR, "diffusion_steps": 4000, "noise_schedule": "cosine"}


@pytest.mark.parametrize("encoder", [COSINE, SHORT], ids=str)
def test_encoders_are_asked_at_their_own_timestep_of_the_noise_level(encoder):
    assert matching_timestep(LINEAR, {**LINEAR, "noise_schedule": "linear:0.0001,0.02"}) is None
    timestep = matching_timestep(LINEAR, encoder)
    scale = 1000 / encoder["diffusion_steps"] if encoder["rescale_timesteps"] else 1
    own = create_diffusion(**encoder).alphas_cumprod
    assert [timestep(own[i]) for i in (0, 17, len(own) - 1)] == [i * scale for i in (0, 17, len(own) - 1)]
    between = timestep((own[100] * own[101]) ** 0.5)
    assert 100 * scale < between < 101 * scale
    assert (timestep(1 - 1e-12), timestep(1e-300)) == (0, (len(own) - 1) * scale)
    for alpha_bar in create_diffusion(**LINEAR).alphas_cumprod[::50]:
        assert 0 <= timestep(alpha_bar) <= (len(own) - 1) * scale


def test_unknown_schedule_of_an_encoder_is_an_error_that_names_both():
    with pytest.raises(InputError) as caught:
        matching_timestep({**LINEAR, "noise_schedule": "cosine"}, LINEAR, assumed=("noise_schedule",), name="dse.pt")
    for text in ("dse.pt", "linear, 1000 steps", "cosine, 1000 steps"):
        assert text in str(caught.value)
