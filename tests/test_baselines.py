"""ILVR, SDEdit and EGSDE equal the published systems' runs and keep what their definitions promise."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    Replay,
    TimedEncoder,
    golden,
    golden_encoder,
    golden_index,
    golden_model_and_diffusion,
    golden_names,
    small_run,
)

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


# What follows needs no golden data.

STEPS, FIRST = 12, {"start": 7}
OPTIONS = {
    ilvr: {"down_n": 4, "range_t": 3},
    sdedit: FIRST,
    egsde: {**FIRST, "ls": 5.0, "li": 0.1, "encoder": TimedEncoder(), "down_n": 4},
}
every_sampler = pytest.mark.parametrize("method", OPTIONS, ids=lambda method: method.__name__)


def setup(n=2):
    """Model, process, references and more draws than a run takes."""
    model, diffusion, ref, draws = small_run(STEPS, n)
    return model, diffusion, ref, torch.cat([draws, draws.flip(0)])


@every_sampler
def test_constant_references_give_finite_images(method):
    model, diffusion, ref, _ = setup()
    output = method(model, diffusion, torch.full_like(ref, -1.0), **OPTIONS[method])
    assert output.shape == ref.shape and output.isfinite().all()


@every_sampler
def test_images_of_a_batch_do_not_influence_each_other(method):
    model, diffusion, ref, draws = setup(4)
    together = method(model, diffusion, ref, noise=Replay(draws), **OPTIONS[method])
    assert (together[0] - together[1]).abs().max() > 0.1
    for rows in (slice(0, 1), slice(1, 4)):
        alone = method(model, diffusion, ref[rows], noise=Replay(draws[:, rows]), **OPTIONS[method])
        torch.testing.assert_close(alone, together[rows], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "method, parameter, value",
    [
        (ilvr, "down_n", 3),
        (ilvr, "range_t", 12),
        *((method, "start", 13) for method in (ilvr, sdedit, egsde)),
        (sdedit, "variance", "learned"),
        (egsde, "down_n", 3),
        (egsde, "down_n", None),
        (egsde, "encoder", None),
        (partial(unconditional, use_ddim=True), "eta", 2),
    ],
)
def test_options_are_refused_before_any_step(method, parameter, value):
    model, diffusion, ref, _ = setup()
    with pytest.raises(InputError) as caught:
        method(model, diffusion, ref, **{**OPTIONS.get(method, {}), parameter: value})
    assert (caught.value.parameter, caught.value.value) == (parameter, value)
    assert model.timesteps == []


@pytest.mark.parametrize("start, steps", [(1, 1), (0.5, 6)])
def test_late_start_of_ilvr(start, steps):
    """From the reference noised to the step before; one draw, then those of the steps that are taken."""
    model, diffusion, ref, draws = setup()
    states = run(
        ilvr, model, diffusion, ref, draws=draws[: 1 + steps + max(steps - 4, 0)], start=start, **OPTIONS[ilvr]
    )
    assert list(states) == list(reversed(range(steps)))
    assert torch.equal(model.inputs[0], diffusion.q_sample(ref, torch.full((2,), steps - 1), draws[0]))


def test_the_encoder_sees_state_and_reference_once_per_step_at_original_timesteps():
    (model, diffusion, ref, _), encoder = setup(), TimedEncoder()
    egsde(model, diffusion, ref, **{**OPTIONS[egsde], "encoder": encoder})
    assert torch.equal(torch.stack(encoder.timesteps), torch.stack(model.timesteps).repeat_interleave(2, 0))


@pytest.mark.parametrize("use_ddim, eta", [(False, 0.0), (True, 0.5)])
def test_unconditional_is_the_loop_of_the_process(use_ddim, eta):
    model, diffusion, ref, (x, *draws) = setup()
    output = unconditional(model, diffusion, ref, use_ddim=use_ddim, eta=eta, noise=Replay([x, *draws]))
    step = partial(diffusion.ddim_sample, eta=eta) if use_ddim else diffusion.p_sample
    for i, draw in zip(reversed(range(STEPS)), draws):
        x = step(model, x, torch.tensor([i, i]), noise=draw)["sample"]
    assert torch.equal(output, x)


def test_bound_options_are_those_of_the_function():
    model, diffusion, ref, draws = setup()
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
        result = bound(model, diffusion, ref, noise=Replay(draws))
        assert torch.equal(result, expected(model, diffusion, ref, noise=Replay(draws)))
        *_, last = bound.steps(model, diffusion, ref, noise=Replay(draws))
        assert torch.equal(last["x"], result)
