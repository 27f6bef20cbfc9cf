"""ILVR, SDEdit and EGSDE equal the published systems' runs and keep what their definitions promise."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import Replay, golden, golden_encoder, golden_index, golden_model_and_diffusion, golden_names

from guided_diffusion.baselines import egsde, ilvr, sdedit, unconditional
from guided_diffusion.errors import InputError
from guided_diffusion.methods import EGSDE, ILVR, METHODS, SDDM, SDEdit, Unconditional
from guided_diffusion.script_util import create_diffusion
from guided_diffusion.sddm import sample


def run(method, *arguments, draws, **options):
    """The states of a run, by step; the draws must be used up."""
    noise, states = Replay(draws), {}
    result = method(*arguments, noise=noise, callback=states.__setitem__, **options)
    assert not noise.draws and torch.equal(result, states[0])
    return states


@pytest.mark.parametrize("name", golden_names("ilvr_"))
def test_ilvr_trace(name):
    data, settings = golden(name), golden_index()[name]
    model, diffusion = golden_model_and_diffusion(settings)
    options = {"down_n": settings["down_N"], "range_t": settings["range_t"]}
    states = run(ilvr, model, diffusion, data["ref"], draws=data["noise"], **options)
    assert list(states) == list(reversed(range(diffusion.num_timesteps)))
    torch.testing.assert_close(torch.stack(list(states.values())), data["samples"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("name", golden_names("egsde_") + golden_names("sdedit_"))
def test_egsde_and_sdedit_traces(name, learn_sigma):
    """The golden model gives a variance; it is ignored whether or not the process was made to use it."""
    data, settings = golden(name), golden_index()[name]
    variance = {"fixedsmall": "fixed_small", "fixedlarge": "fixed_large"}[settings["var_type"]]
    options = {"start": settings["M"], "variance": variance, "draws": data["noise"]}
    diffusion = create_diffusion(learn_sigma=learn_sigma)
    arguments, given = (golden_model_and_diffusion(settings)[0], diffusion, data["ref"]), diffusion.model_var_type
    if settings["kind"] == "sdedit_trace":
        states = run(sdedit, *arguments, **options)
    else:
        guidance = {"ls": settings["ls"], "li": settings["li"], "down_n": settings["down_N"]}
        states = run(egsde, *arguments, **options, **guidance, encoder=golden_encoder())
    assert list(states) == list(reversed(range(settings["M"]))) and diffusion.model_var_type is given
    kept = torch.stack([list(states.values())[k] for k in settings["kept_steps"]])
    torch.testing.assert_close(kept, data["samples"], atol=1e-4, rtol=0)


# What follows needs no golden data. The model is the exact one for images of independent standard normal pixels.


ALPHAS_CUMPROD = torch.from_numpy(create_diffusion().alphas_cumprod)


class GaussianModel:
    """eps = sqrt(1 - alpha_bar) x, the noise to expect where x_0 is standard normal; records its calls."""

    def __init__(self):
        self.inputs, self.timesteps = [], []

    def __call__(self, x, t):
        assert not torch.is_grad_enabled()
        self.inputs.append(x)
        self.timesteps.append(int(t[0]))
        return (1 - ALPHAS_CUMPROD[t]).sqrt().to(x)[:, None, None, None] * x


class PatchEncoder(torch.nn.Module):
    """A small stand-in for the domain-specific extractor, in which the timestep matters; records its calls."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.convolution = torch.nn.Conv2d(3, 8, 4, stride=4)
        self.timesteps = []

    def middle_features(self, x, t):
        self.timesteps.append(int(t[0]))
        return torch.tanh(self.convolution(x) + t.float()[:, None, None, None] / 1000)


def references(n=2, size=16):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def seeded(seed, rows=slice(None), n=4):
    """A noise source that draws for n images and hands out the given rows."""
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(n, *shape[1:], generator=generator)[rows]


def started(method, steps="12", **defaults):
    return lambda model, ref, **more: method(
        model, create_diffusion(timestep_respacing=steps), ref, **{**defaults, **more}
    )


SAMPLERS = {
    "ilvr": started(ilvr, down_n=4, range_t=3),
    "sdedit": started(sdedit, start=7),
    "egsde": started(egsde, start=7, ls=5.0, li=0.1, encoder=PatchEncoder(), down_n=4),
}
every_sampler = pytest.mark.parametrize("method", list(SAMPLERS))
SAMPLERS["unconditional"] = started(unconditional, "3", use_ddim=True)


@every_sampler
def test_constant_references_give_finite_images(method):
    output = SAMPLERS[method](GaussianModel(), torch.full((2, 3, 16, 16), -1.0))
    assert output.shape == (2, 3, 16, 16)
    assert output.isfinite().all()


@every_sampler
def test_images_of_a_batch_do_not_influence_each_other(method):
    ref = references(4)
    together = SAMPLERS[method](GaussianModel(), ref, noise=seeded(5))
    assert (together[0] - together[1]).abs().max() > 0.1
    for rows in (slice(0, 1), slice(1, 4)):
        alone = SAMPLERS[method](GaussianModel(), ref[rows], noise=seeded(5, rows))
        torch.testing.assert_close(alone, together[rows], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "method, parameter, value",
    [
        ("ilvr", "down_n", 3),
        ("ilvr", "range_t", 12),
        ("ilvr", "start", 13),
        *((method, "start", 13) for method in ("sdedit", "egsde")),
        ("sdedit", "variance", "learned"),
        ("egsde", "down_n", 3),
        ("egsde", "down_n", None),
        ("egsde", "encoder", None),
        ("unconditional", "eta", 2),
    ],
)
def test_options_are_refused_before_any_step(method, parameter, value):
    model = GaussianModel()
    with pytest.raises(InputError) as caught:
        SAMPLERS[method](model, references(), **{parameter: value})
    assert (caught.value.parameter, caught.value.value) == (parameter, value)
    assert model.timesteps == []


@pytest.mark.parametrize("start, steps", [(1, 1), (0.5, 6)])
def test_late_start_of_ilvr(start, steps):
    """From the reference noised to the step before; one draw, then those of the steps that are taken."""
    diffusion, ref, draws, states = create_diffusion(timestep_respacing="12"), references(), [], {}
    model = GaussianModel()

    def noise(shape):
        draws.append(torch.randn(shape))
        return draws[-1]

    SAMPLERS["ilvr"](model, ref, start=start, noise=noise, callback=states.__setitem__)
    assert list(states) == list(reversed(range(steps)))
    assert torch.equal(model.inputs[0], diffusion.q_sample(ref, torch.full((2,), steps - 1), draws[0]))
    assert len(draws) == 1 + steps + max(steps - 4, 0)


def test_the_encoder_sees_state_and_reference_once_per_step_at_original_timesteps():
    encoder, model = PatchEncoder(), GaussianModel()
    SAMPLERS["egsde"](model, references(), encoder=encoder)
    assert encoder.timesteps == [t for t in model.timesteps for _ in ("reference", "state")]


@pytest.mark.parametrize("use_ddim, eta", [(False, 0.0), (True, 0.5)])
def test_unconditional_is_the_loop_of_the_process(use_ddim, eta):
    diffusion, noise = create_diffusion(timestep_respacing="12"), seeded(4, slice(2))
    x = noise((2, 3, 16, 16))
    with torch.no_grad():
        for i in reversed(range(12)):
            step = partial(diffusion.ddim_sample, eta=eta) if use_ddim else diffusion.p_sample
            x = step(GaussianModel(), x, torch.tensor([i, i]), noise=noise(x.shape))["sample"]
    options = {"use_ddim": use_ddim, "eta": eta, "noise": seeded(4, slice(2))}
    assert torch.equal(unconditional(GaussianModel(), diffusion, references(), **options), x)


def test_bound_options_are_those_of_the_function():
    diffusion, ref = create_diffusion(timestep_respacing="12"), references()
    noise = lambda: seeded(1, slice(2))  # noqa: E731
    guided = {"range_t": 3, "blocks": 4, "variant": "released", "start": 6}
    for options, expected in (
        (SDDM(**guided), partial(sample, **guided)),
        (ILVR(down_n=4, range_t=3, start=9), partial(ilvr, down_n=4, range_t=3, start=9)),
        (SDEdit(start=0.5), partial(sdedit, start=6)),
        (EGSDE(start=6, ls=0.0, li=0.1, down_n=4), partial(egsde, start=6, ls=0, li=0.1, encoder=None, down_n=4)),
        (Unconditional(use_ddim=True), partial(unconditional, use_ddim=True)),
    ):
        assert type(options) is METHODS.pick(type(options).__name__.lower())
        bound = options.bind(SimpleNamespace(clip_denoised=True, sigma_small=True, codec=None))
        result = bound(GaussianModel(), diffusion, ref, noise=noise())
        assert torch.equal(result, expected(GaussianModel(), diffusion, ref, noise=noise()))
        *_, last = bound.steps(GaussianModel(), diffusion, ref, noise=noise())
        assert torch.equal(last["x"], result)
