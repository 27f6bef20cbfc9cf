"""The sampler: golden runs of the `released` variant, a slow twin of `manifold`, and what every run must keep."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from conftest import (
    Counted,
    Replay,
    golden,
    golden_encoder,
    golden_index,
    golden_model_and_diffusion,
    golden_names,
    minimum_norm_point,
)
from conftest import run_states as run
from conftest import small_run as setup

from guided_diffusion import energy as energies
from guided_diffusion.baselines import egsde, ilvr, sdedit
from guided_diffusion.errors import InputError
from guided_diffusion.manifold import BlockManifold, block_statistics, diffuse_statistics
from guided_diffusion.methods import SDDM
from guided_diffusion.sddm import REFINEMENTS, sample, thin_features
from guided_diffusion.solvers import SOLVERS

VARIANTS = ("manifold", "released")
both_variants = pytest.mark.parametrize("variant", VARIANTS)


class Quadratic:
    """E = |x - sqrt(alpha_bar) ref|^2 / 2 per image, the simplest energy; it remembers where it was asked."""

    def __init__(self, weight=1.0):
        self.weight, self.prepared, self.asked = weight, 0, []

    def prepare(self, ref):
        self.prepared += 1
        self.ref = ref

    def energy_and_grad(self, x, t, alpha_bar):
        self.asked.append((t.tolist(), alpha_bar))
        grad = self.weight * (x - alpha_bar**0.5 * self.ref)
        return grad.square().flatten(1).sum(1) / 2, grad


class Zero:
    """An energy without a wish."""

    def prepare(self, ref):
        pass

    def energy_and_grad(self, x, t, alpha_bar):
        return torch.zeros(x.shape[0]), torch.zeros_like(x)


def energy_of(name, blocks):
    """The energies of the golden runs, with the settings under which these were made."""
    if name == "vgg":
        data = golden("energy_vgg_badain")
        return energies.vgg({key: value for key, value in data.items() if key.startswith("encoder.")}, blocks)
    return energies.dse(golden_encoder()) if name == "dse" else energies.low_pass(8)


@pytest.mark.parametrize("name", golden_names("sddm_"))
def test_golden(name):
    data, config = golden(name), golden_index()[name]
    model, diffusion = golden_model_and_diffusion(config)
    model = Counted(model)
    options = {name: config[name] for name in ("blocks", "range_t", "detail_merge")}
    options["energies"] = [energy_of(energy, config["blocks"]) for energy in config["energies"]]
    states = run(model, diffusion, data["ref"], data["noise"], variant="released", **options)
    assert list(states) == list(reversed(range(diffusion.num_timesteps)))
    assert diffusion.num_timesteps < model.calls <= diffusion.num_timesteps + REFINEMENTS
    for (i, state), expected in zip(states.items(), data["samples"], strict=True):
        torch.testing.assert_close(state, expected, atol=1e-3, rtol=0, msg=lambda m, i=i: f"step {i}: {m}")


# --- a slow twin of the method as DESIGN describes it: float64, one image, channel and block at a time


def each_block(shape, blocks):
    """Indices of the blocks of an array [N, C, H, W], one by one."""
    h, w = shape[2] // blocks, shape[3] // blocks
    for n, c, i, j in itertools.product(*map(range, (*shape[:2], blocks, blocks))):
        yield n, c, slice(i * h, (i + 1) * h), slice(j * w, (j + 1) * w)


class Twin:
    """The variants `manifold` and `released` without what makes the sampler fast, in float64."""

    def __init__(self, model, diffusion, ref, blocks, detail_merge, moo, energies):
        self.model, self.diffusion, self.ref = model, diffusion, ref.numpy()
        self.blocks, self.detail_merge, self.moo, self.energies = blocks, detail_merge, moo, energies

    def restrict(self, x, alpha_bar):
        result = x.copy()
        for block in each_block(x.shape, self.blocks):
            pixels, wanted = x[block], self.ref[block]
            spread = (alpha_bar * (wanted.var(ddof=1) + 1e-5) + 1 - alpha_bar) / (pixels.var(ddof=1) + 1e-5)
            result[block] = (pixels - pixels.mean()) * spread**0.5 + alpha_bar**0.5 * wanted.mean()
        return result

    def tangent(self, x, g, alpha_bar):
        result = g.copy()
        for block in each_block(x.shape, self.blocks):
            part, radius = g[block] - g[block].mean(), x[block] - alpha_bar**0.5 * self.ref[block].mean()
            if radius.any():
                part = part - (part * radius).sum() / (radius * radius).sum() * radius
            result[block] = part
        return result

    def direction(self, x, i, posterior_mean):
        """(d, normal part, drift) at x."""
        alpha, alpha_bar = float(self.diffusion.alphas[i]), float(self.diffusion.alphas_cumprod[i])
        g = posterior_mean - x / alpha**0.5
        vectors = [self.tangent(x, g, alpha_bar)]
        t = torch.full((len(x),), self.diffusion.timestep_map[i])
        # A hundred steps' length in the variant `manifold`, whatever their number.
        a = alpha if self.variant == "released" else alpha ** (self.diffusion.num_timesteps / 100)
        for energy in self.energies:
            _, grad = energy.energy_and_grad(torch.from_numpy(x).float(), t, alpha_bar)
            e = self.tangent(x, -grad.double().numpy(), alpha_bar)
            for plane in np.ndindex(x.shape[:2]):
                length = np.linalg.norm(e[plane])
                e[plane] *= (1 - a) / a**0.5 * np.linalg.norm(vectors[0][plane]) / length * 25 if length else 0
            vectors.append(e)
        d = sum(vectors)
        for block in each_block(x.shape, self.blocks if self.detail_merge else 1) if self.moo == "min_norm" else ():
            parts = np.stack([vector[block] for vector in vectors])
            d[block] = minimum_norm_point(parts.reshape(len(parts), -1)).reshape(parts.shape[1:])
        return d, g - vectors[0], (alpha**-0.5 - 1) * x

    def posterior(self, x, i):
        t = torch.full((len(x),), i)
        out = self.diffusion.p_mean_variance(self.model, torch.from_numpy(x).float(), t)
        return out["mean"].double().numpy(), out["variance"].double().sqrt().numpy() if i else 0.0

    def run(self, draws, range_t, variant):
        self.variant = variant
        draws = [draw.double().numpy() for draw in draws]
        alpha_bars = self.diffusion.alphas_cumprod
        for energy in self.energies:
            energy.prepare(torch.from_numpy(self.ref).float())
        x, states = draws[0], {}
        if variant == "manifold":
            x = self.restrict(x, alpha_bars[-1])
        for draw, i in zip(draws[1:], reversed(range(self.diffusion.num_timesteps))):
            after = alpha_bars[i - 1] if i else 1.0
            mean, sigma = self.posterior(x, i)
            if i <= range_t:
                x = mean + sigma * draw
            elif variant == "manifold":
                d, normal, drift = self.direction(x, i, mean)
                there = self.restrict(x + d, alpha_bars[i])
                x = self.restrict(there + normal + drift + sigma * draw, after)
            else:
                if i == range_t + 1:
                    for _ in range(4):
                        mean, sigma = self.posterior(x, i)
                        x = x + sum(self.direction(x, i, mean))
                x = self.restrict(x + sum(self.direction(x, i, mean)) + sigma * draw, after)
            states[i] = x
        return states


@pytest.mark.parametrize(
    "variant, detail_merge, learn_sigma, moo",
    [*((v, d, d, "min_norm") for v in VARIANTS for d in (False, True)), ("manifold", False, False, "linear")],
)
@pytest.mark.parametrize(
    "make_energies", [lambda: [], lambda: [Quadratic()], lambda: [energies.dct(4), energies.low_pass(4)]]
)
def test_equals_the_slow_twin(variant, detail_merge, learn_sigma, moo, make_energies):
    if variant == "released" and len(make_energies()) > 1:
        make_energies = lambda: [energies.dct(4)]  # noqa: E731  Frank-Wolfe's unfinished results have golden runs
    model, diffusion, ref, draws = setup(learn_sigma=learn_sigma)
    options = {"blocks": 4, "detail_merge": detail_merge, "moo": moo}
    states = run(model, diffusion, ref, draws, variant=variant, energies=make_energies(), **options)
    twin = Twin(model, diffusion, ref.double(), energies=make_energies(), **options)
    expected = twin.run(draws, 2, variant)
    assert list(states) == list(expected)
    for i, state in states.items():
        assert np.abs(state.numpy() - expected[i]).max() < 2e-4, i


# --- properties


@both_variants
@pytest.mark.parametrize("range_t", [0, 3, 6, 7])
def test_evaluations_of_model_and_energies(variant, range_t):
    model, diffusion, ref, draws = setup()
    model, energy = Counted(model), Quadratic()
    run(model, diffusion, ref, draws, variant=variant, range_t=range_t, energies=[energy])
    guided = [i for i in reversed(range(8)) if i > range_t]
    refined = [range_t + 1] * REFINEMENTS if variant == "released" and guided else []
    # The refinements' first evaluation is the step's own.
    assert model.calls == 8 + max(len(refined) - 1, 0)
    assert model.calls <= 8 + REFINEMENTS
    expected = sorted(guided + refined, reverse=True)
    assert energy.asked == [([diffusion.timestep_map[i]] * 2, float(diffusion.alphas_cumprod[i])) for i in expected]
    assert energy.prepared == 0  # each run prepares a copy of its own


@pytest.mark.parametrize("detail_merge", [False, True])
def test_images_of_a_batch_do_not_see_each_other(detail_merge):
    model, diffusion, ref, draws = setup(n=3)
    options = {"energies": [energies.dct(4), energies.low_pass(4), Quadratic()], "detail_merge": detail_merge}
    together = run(model, diffusion, ref, draws, **options)[0]
    for n in range(3):
        alone = run(model, diffusion, ref[n : n + 1], draws[:, n : n + 1], **options)[0]
        torch.testing.assert_close(alone[0], together[n], atol=1e-5, rtol=0)


@both_variants
@pytest.mark.parametrize("blocks, detail_merge", [(1, False), (8, True)])
def test_flat_references_give_finite_images(variant, detail_merge, blocks):
    model, diffusion, ref, draws = setup(learn_sigma=True)
    ref = torch.full_like(ref, -1.0)
    ref[0, :, 4, 4] = 1.0
    options = {"blocks": blocks, "range_t": 0, "variant": variant, "detail_merge": detail_merge}
    options["energies"] = [energies.dct(blocks), energies.low_pass(4), Quadratic()]
    states = run(model, diffusion, ref, draws, **options)
    assert all(state.isfinite().all() for state in states.values())
    # Every step but the last is guided, which ends on the manifold of the reference with next to no noise.
    mean, _ = diffuse_statistics(*block_statistics(ref, blocks), float(diffusion.alphas_cumprod[0]))
    torch.testing.assert_close(block_statistics(states[1], blocks)[0], mean, atol=1e-5, rtol=0)


@both_variants
@pytest.mark.parametrize("detail_merge", [False, True])
def test_constant_states_and_zero_gradients(variant, detail_merge):
    """A constant x, a model that wants nothing and an energy without a gradient: everything is 0/0 here."""
    _, diffusion, ref, draws = setup()
    draws = torch.zeros_like(draws)
    for reference in (ref, torch.zeros_like(ref)):
        for asked in ([], [Zero()], [Zero(), Quadratic()]):
            options = {"variant": variant, "energies": asked, "detail_merge": detail_merge}
            states = run(lambda x, t: torch.zeros_like(x), diffusion, reference, draws, **options)
            assert all(state.isfinite().all() for state in states.values())


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_an_energys_scale_does_not_matter(scale):
    model, diffusion, ref, draws = setup()
    a, b = (run(model, diffusion, ref, draws, energies=[Quadratic(weight)])[0] for weight in (1.0, scale))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


# --- refusals


@pytest.mark.parametrize(
    "parameter, value, options",
    [
        *((name, "fast", {}) for name in ("variant", "moo", "manifold", "sampler")),
        *(("blocks", value, {}) for value in (3, 16)),
        *(("down_n", value, {"manifold": "low_pass"}) for value in (0, 3)),
        *(("range_t", value, {}) for value in (-1, 8, math.nan)),
        ("start", 9, {}),
        ("details", 9, {}),
        ("eta", 1.5, {}),
        ("blocks", 4, {"energies": [Quadratic(), energies.dct(8)]}),
    ],
)
def test_options_that_do_not_fit_are_refused(parameter, value, options):
    model, diffusion, ref, _ = setup()
    options = {"blocks": 4, "range_t": 2, **options, parameter: value}
    with pytest.raises(InputError) as caught:
        sample(model, diffusion, ref, **options)
    assert caught.value.parameter == parameter and caught.value.value is value
    assert not model.timesteps
    if "energies" not in options:  # `SDDM` refuses it, too, before a network is loaded
        with pytest.raises(InputError) as caught:
            SDDM(**options).check_fit((16, 16), 8)
        assert caught.value.parameter == parameter


@pytest.mark.parametrize(
    "change", [lambda ref: (ref + 1) * 127.5, lambda ref: ref / 0, lambda ref: ref.to(torch.uint8), lambda ref: ref[:0]]
)
def test_references_that_are_none_are_refused(change):
    model, diffusion, ref, _ = setup()
    guidance = {"ls": 0.0, "li": 1.0, "encoder": None, "down_n": 4}
    for method in (
        partial(sample, blocks=4, range_t=2), partial(ilvr, down_n=4, range_t=2), partial(sdedit, start=4),
        partial(egsde, start=4, **guidance),
    ):  # fmt: skip
        with pytest.raises(InputError, match=r"\[-1, 1\]") as caught:
            method(model, diffusion, change(ref))
        assert caught.value.parameter == "ref" and not model.timesteps


# --- details


def test_thin_features_are_what_has_no_bulk():
    picture = torch.full((1, 3, 64, 64), -1.0)
    picture[:, :, 10:50, 10:50] = 1
    picture[:, 1, 20:23, 20:23] = 0  # an eye, in one channel
    picture[:, :, 40:42, 18:42] = -1  # a mouth
    picture[:, :, 30:34, 18:42] -= 0.2  # a shade
    seen = thin_features(picture)
    expected = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    expected[:, :, 19:24, 19:24] = expected[:, :, 39:43, 17:43] = True
    assert torch.equal(seen, expected)
    larger = thin_features(picture.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert torch.equal(larger[:, :, 1::2, 1::2], expected)
    assert not thin_features(torch.zeros(1, 3, 64, 64)).any()


@both_variants
@pytest.mark.parametrize("details", [4, 0.125])
def test_details_are_the_noised_reference_until_their_step(variant, details):
    model, diffusion, ref, draws = setup()
    ref = torch.zeros_like(ref)
    ref[:, :, 4:6, 4:6] = 1
    mask, last = thin_features(ref).expand_as(ref), round(details * 8) if details < 1 else details
    draws = torch.cat([draws, draws[: 7 - last].flip(2)])  # one more for each step that keeps them
    states = run(model, diffusion, ref, draws, variant=variant, details=details)
    drawn = iter(draws[1:])
    for i in reversed(range(8)):
        next(drawn)
        if i > last:
            kept = diffusion.q_sample(ref, torch.full((2,), i - 1), next(drawn))
            assert torch.equal(states[i][mask], kept[mask])
            assert not torch.isclose(states[i][~mask], kept[~mask]).all()


# --- late start


@both_variants
@pytest.mark.parametrize("start, solver", [(1, "ddim"), (5, "ancestral"), (8, "dpmpp_2m")])
def test_late_start_begins_at_the_noised_reference(variant, start, solver):
    model, diffusion, ref, draws = setup()
    options = {"start": start, "variant": variant, "sampler": solver, "energies": [Quadratic()]}
    states = run(model, diffusion, ref, draws[: start + 1], **options)  # one draw, then one per step
    assert list(states) == list(reversed(range(start)))
    first = diffusion.q_sample(ref, torch.full((2,), start - 1), draws[0])
    if variant == "manifold":
        first = BlockManifold(ref, 4).restrict(first, float(diffusion.alphas_cumprod[start - 1]))
    assert torch.equal(model.inputs[0], first)
    assert len(model.inputs) == start + (REFINEMENTS - 1 if variant == "released" and start > 3 else 0)


@pytest.mark.parametrize("solver", SOLVERS)
@both_variants
def test_late_start_with_a_perfect_model_recovers_the_image(variant, solver):
    _, diffusion, ref, draws = setup()
    start = 4

    def perfect(x, t):
        i = torch.tensor([diffusion.timestep_map.index(int(step)) for step in t])
        return diffusion.eps_from_xstart(x, i, ref)

    states = run(perfect, diffusion, ref, draws[: start + 1], variant=variant, sampler=solver, start=start)
    torch.testing.assert_close(states[0], ref, atol=1e-4, rtol=0)


# --- the generator of the steps and its callbacks


@both_variants
def test_steps_are_what_the_callback_sees(variant):
    model, diffusion, ref, draws = setup()
    options = {"blocks": 4, "range_t": 2, "variant": variant, "energies": [Quadratic()]}
    told, given = [], (ref.clone(), draws.clone())
    result = sample(model, diffusion, ref, noise=Replay(draws), callback=told.append, **options)  # a builtin of one
    assert torch.equal(ref, given[0]) and torch.equal(draws, given[1])
    for i, a in zip(reversed(range(8)), sample.steps(model, diffusion, ref, noise=Replay(draws), **options)):
        b = told.pop(0)  # which no later step has overwritten
        assert a.keys() == b.keys() == {"i", "x", "pred_xstart", "guided"} and a["i"] == b["i"] == i
        assert torch.equal(a["x"], b["x"]) and torch.equal(a["pred_xstart"], b["pred_xstart"])
        refined = REFINEMENTS if variant == "released" and i == 3 else 0
        assert len(a["guided"]) == (1 + refined if i > 2 else 0) and not a["x"].requires_grad
        assert all(record.keys() == {"tangent", "normal", "move", "weights"} for record in a["guided"])
    assert not told and torch.equal(a["x"], result)


@both_variants
def test_steps_may_be_closed_early(variant):
    model, diffusion, ref, draws = setup()
    model = Counted(model)
    steps = sample.steps(model, diffusion, ref, blocks=4, range_t=2, variant=variant, noise=Replay(draws))
    assert model.calls == 0  # nothing is computed before it is asked for
    with torch.enable_grad():
        for _ in range(2):
            next(steps)
            assert torch.is_grad_enabled()  # gradients are off inside alone
        steps.close()
    assert model.calls == 2 and list(steps) == []


def test_a_callback_gets_what_it_has_parameters_for():
    """(i, x) with two, else the state."""
    model, diffusion, ref, draws = setup()
    for make in (
        lambda seen: lambda i, x: seen.append(i),
        lambda seen: lambda state, verbose=False: seen.append(state["i"]),
        lambda seen: partial(lambda log, i, x: log.append(i), seen),
    ):
        seen = []
        sample(model, diffusion, ref, blocks=4, range_t=2, noise=Replay(draws), callback=make(seen))
        assert seen == list(reversed(range(8)))
