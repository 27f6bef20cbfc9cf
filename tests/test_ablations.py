"""The sampler's ablations, and the monitor: linear sum, low-pass manifold, and what is recorded of guided steps."""

import json
from functools import partial

import pytest
import torch
from conftest import LinearModel

from guided_diffusion import energy as energies
from guided_diffusion.errors import InputError
from guided_diffusion.manifold import BlockManifold, LowPassManifold, block_statistics, split
from guided_diffusion.run.monitor import Monitor, _record_of, curves
from guided_diffusion.script_util import create_diffusion
from guided_diffusion.sddm import LAMBDA, merge, sample
from resizer import low_pass_filter

STEPS, RANGE_T = 8, 2


class Towards:
    """E = |x - goal|^2 / 2: a gradient that is easy to work out."""

    def __init__(self, goal):
        self.goal = goal

    def prepare(self, ref):
        pass

    def energy_and_grad(self, x, t, alpha_bar):
        grad = x - self.goal
        return grad.square().flatten(1).sum(1) / 2, grad


def setup(n=2, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ref = torch.rand(n, 3, size, size, generator=generator) * 2 - 1
    draws = torch.randn(STEPS + 1, *ref.shape, generator=generator)
    return LinearModel(), create_diffusion(timestep_respacing=str(STEPS)), ref, draws


def run(energies=(), **options):
    """States by step, and what the guided evaluations did, [(i, record)]."""
    model, diffusion, ref, draws = setup()
    rest, states, records = list(draws), {}, []

    def keep(state):
        states[state["i"]] = state["x"]
        records.extend((state["i"], record) for record in state["guided"])

    options = {"blocks": 4, "range_t": RANGE_T, **options}
    sample(model, diffusion, ref, energies=energies, noise=lambda shape: rest.pop(0), callback=keep, **options)
    return states, records


# The low-pass manifold


def test_low_pass_manifold_is_its_formula():
    _, _, ref, draws = setup()
    x, g = draws[0], draws[1]
    phi = low_pass_filter((16, 16), 4, "cubic")
    m = LowPassManifold(ref, 4)
    torch.testing.assert_close(m.restrict(x, 0.25), x - phi(x) + 0.5 * phi(ref))
    tangent, normal = m.split(x, g, 0.25)
    torch.testing.assert_close(normal, phi(g))
    torch.testing.assert_close(tangent + normal, g)


def test_low_pass_manifold_gives_the_references_low_frequencies():
    """phi is nearly a projection: a restricted image has nearly the low frequencies asked for, the same high ones."""
    _, _, ref, draws = setup()
    phi = low_pass_filter((16, 16), 4, "cubic")
    x = draws[0]
    restricted = LowPassManifold(ref, 4).restrict(x, 1.0)
    assert (phi(restricted) - phi(ref)).norm() < 0.5 * (phi(x) - phi(ref)).norm()
    high, wanted = restricted - phi(restricted), x - phi(x)
    assert torch.nn.functional.cosine_similarity(high.flatten(), wanted.flatten(), dim=0) > 0.9


def test_filter_by_one_is_the_identity_and_constants_pass():
    x = torch.rand(1, 3, 12, 16)
    torch.testing.assert_close(low_pass_filter((12, 16), 1, "cubic")(x), x)
    flat = torch.full((1, 3, 12, 16), 0.3)
    torch.testing.assert_close(low_pass_filter((12, 16), 4, "cubic")(flat), flat)
    for down_n in (0, 3, 32):
        with pytest.raises(ValueError, match=f"down_n is {down_n}; .* divide the image size 12x16"):
            low_pass_filter((12, 16), down_n, "cubic")


def test_block_manifold_is_the_functions_of_its_module():
    _, _, ref, draws = setup()
    m = BlockManifold(ref, 4)
    mean, var = block_statistics(m.restrict(draws[0], 0.5), 4)
    ref_mean, ref_var = block_statistics(ref, 4)
    torch.testing.assert_close(mean, 0.5**0.5 * ref_mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(var, 0.5 * ref_var + 0.5, atol=1e-3, rtol=0)
    for part, expected in zip(m.split(draws[0], draws[1], 0.5), split(draws[0], draws[1], 0.5**0.5 * ref_mean)):
        torch.testing.assert_close(part, expected)


@pytest.mark.parametrize("variant", ["manifold", "released"])
def test_guided_steps_end_on_the_low_pass_manifold(variant):
    """Nearer to the low frequencies asked for than plain sampling and than the block manifold."""
    states, _ = run([energies.dct(4)], manifold="low_pass", down_n=4, variant=variant)
    blockwise, _ = run([energies.dct(4)], variant=variant)
    free, _ = run(range_t=STEPS - 1)
    _, diffusion, ref, _ = setup()
    phi = low_pass_filter((16, 16), 4, "cubic")
    for i in range(RANGE_T + 1, STEPS):
        low = float(diffusion.alphas_cumprod[i - 1]) ** 0.5 * phi(ref)
        distance, elsewhere, freely = ((phi(each[i]) - low).norm() for each in (states, blockwise, free))
        assert distance < 0.5 * freely and distance < elsewhere, i
    assert not torch.allclose(states[0], blockwise[0], atol=1e-2)


# The linear sum


@pytest.mark.parametrize("blocks", [None, 4])
def test_linear_merge_is_the_sum(blocks):
    directions = [torch.randn(2, 3, 8, 8) for _ in range(3)]
    merged, weights = merge(directions, blocks, "linear")
    torch.testing.assert_close(merged, sum(directions))
    assert weights.shape[-1] == 3 and (weights == 1).all()


def test_first_linear_step_is_worked_out():
    """One guided step with one energy, by the formula of the method."""
    model, diffusion, ref, draws = setup()
    goal = ref.flip(3)
    states, _ = run([Towards(goal)], moo="linear", range_t=STEPS - 2)
    i, m = STEPS - 1, BlockManifold(ref, 4)
    alpha, beta, alpha_bar = (float(v[i]) for v in (diffusion.alphas, diffusion.betas, diffusion.alphas_cumprod))
    x = m.restrict(draws[0], alpha_bar)
    out = diffusion.p_mean_variance(model, x, torch.full((2,), i))
    tangent, normal = m.split(x, out["mean"] - x / alpha**0.5, alpha_bar)
    e, _ = m.split(x, goal - x, alpha_bar)
    lengths = [v.flatten(2).norm(dim=2)[..., None, None] for v in (tangent, e)]
    e = e * LAMBDA * beta / alpha**0.5 * lengths[0] / lengths[1]
    x = m.restrict(x + tangent + e, alpha_bar) + normal + (1 / alpha**0.5 - 1) * x
    x = m.restrict(x + out["variance"].sqrt() * draws[1], float(diffusion.alphas_cumprod[i - 1]))
    torch.testing.assert_close(states[i], x, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["moo", "manifold", "variant"])
def test_unknown_choices_are_refused(name):
    with pytest.raises(InputError) as caught:
        run(**{name: "other"})
    assert (caught.value.parameter, caught.value.value) == (name, "other")


# What the sampler tells of its guided steps


@pytest.mark.parametrize("variant", ["manifold", "released"])
@pytest.mark.parametrize("detail_merge", [False, True])
def test_records_of_guided_steps(variant, detail_merge):
    model, diffusion, ref, draws = setup()
    _, records = run([energies.dct(4), energies.low_pass(4)], variant=variant, detail_merge=detail_merge)
    guided = list(range(STEPS - 1, RANGE_T, -1))
    refinements = [RANGE_T + 1] * 4 if variant == "released" else []
    assert [i for i, _ in records] == guided + refinements
    for _, told in records:
        assert told.keys() == {"tangent", "normal", "move", "weights"}
        assert told["tangent"].shape == told["normal"].shape == told["move"].shape == ref.shape
        assert told["weights"].shape == ((2, 3, 4, 4, 3) if detail_merge else (2, 3, 3))
        record = _record_of(**told)
        assert record["tangent"].shape == record["normal"].shape == record["negative"].shape == (2,)
        assert record["weights"].shape == (2, 3)
        torch.testing.assert_close(record["weights"].sum(1), torch.ones(2))
    start = (
        draws[0] if variant == "released" else BlockManifold(ref, 4).restrict(draws[0], diffusion.alphas_cumprod[-1])
    )
    out = diffusion.p_mean_variance(model, start, torch.full((2,), STEPS - 1))
    g = out["mean"] - start / float(diffusion.alphas[-1]) ** 0.5
    tangent, normal = BlockManifold(ref, 4).split(start, g, float(diffusion.alphas_cumprod[-1]))
    record = _record_of(**records[0][1])
    torch.testing.assert_close(record["tangent"], tangent.flatten(1).norm(dim=1), rtol=1e-3, atol=0)
    torch.testing.assert_close(record["normal"], normal.flatten(1).norm(dim=1), rtol=1e-3, atol=0)
    torch.testing.assert_close(records[0][1]["tangent"] + records[0][1]["normal"], g, rtol=0, atol=1e-4)


def test_a_record_of_known_parts():
    """Norms over the whole image, weights meaned over channels and blocks, and the sign of the inner product."""
    tangent = torch.zeros(3, 1, 2, 2)
    tangent[:, 0, 0] = torch.tensor([3.0, 4.0])
    move = tangent * torch.tensor([2.0, -1.0, -1e-6])[:, None, None, None]
    for weights in (torch.tensor([[0.5, 0.5], [0.7, 0.3], [1.0, 0.0]])[:, None], torch.rand(3, 1, 4, 4, 2)):
        record = _record_of(tangent, 2 * tangent, move, weights)
        assert record["tangent"].tolist() == [5, 5, 5] and record["normal"].tolist() == [10, 10, 10]
        assert record["negative"].tolist() == [False, True, False]  # the last cancels up to rounding errors
        torch.testing.assert_close(record["weights"], weights.reshape(3, -1, 2).mean(1))


def test_the_sum_may_harm_the_score_and_the_minimum_norm_point_never_does():
    """An energy that wants the opposite of what the score wants is stronger than it in a sum."""
    model, diffusion, ref, _ = setup()

    class Against(Towards):
        def energy_and_grad(self, x, t, alpha_bar):
            i = diffusion.timestep_map.index(int(t[0]))
            out = diffusion.p_mean_variance(model, x, torch.full((2,), i))
            return torch.zeros(2), out["mean"] - float(diffusion.alphas[i]) ** -0.5 * x

    _, linear = run([Against(ref)], moo="linear")
    _, merged = run([Against(ref)])
    assert len(linear) == len(merged) == STEPS - 1 - RANGE_T
    assert all(_record_of(**told)["negative"].all() for _, told in linear)
    assert not any(_record_of(**told)["negative"].any() for _, told in merged)


def test_a_callback_changes_nothing():
    model, diffusion, ref, draws = setup()
    watched, _ = run([energies.dct(4)])
    rest = list(draws)
    alone = sample(
        model, diffusion, ref, blocks=4, range_t=RANGE_T, energies=[energies.dct(4)], noise=lambda s: rest.pop(0)
    )
    assert torch.equal(watched[0], alone)


# The monitor of a run


def tell(i, n, value):
    """The state after a step of n images with known records: norms `value` and 2 `value`, weights 3/4 and 1/4."""
    tangent = torch.zeros(n, 3, 4, 4)
    tangent[:, 0, 0, 0] = value
    weights = torch.tensor([0.75, 0.25]).expand(n, 3, 2)
    sign = -1 if value > 4.5 else 1
    return {"i": i, "guided": [{"tangent": tangent, "normal": 2 * tangent, "move": sign * tangent, "weights": weights}]}


def sampler(model, ref, value=1.0, noise=None, callback=None):
    """Two guided steps with known records, a plain one, and three evaluations of the model."""
    for i in (5, 4):
        callback(tell(i, len(ref), value * i))
    callback({"i": 3, "guided": []})
    return model(model(model(ref)))


def opened(folder, name="0", earlier=None, overwrite=False):
    """The monitor of one process of a run; only rank 0 begins."""
    folder.mkdir(exist_ok=True)
    monitor = Monitor(str(folder), name)
    if name.startswith("0"):
        monitor.begin(earlier, overwrite)
    return monitor


def work(monitor, batches, value=1.0):
    watched = monitor.watch(partial(sampler, monitor.counted(lambda x: x), value=value))
    states = []
    for n in batches:
        watched(torch.zeros(n, 3, 4, 4), noise=None, callback=states.append)
    assert [state["i"] for state in states] == [5, 4, 3] * len(batches)


def finish(monitor):
    """What rank 0 does at the end: the sums go into the record, then their parts are removed."""
    record = json.loads(json.dumps(monitor.total()))
    monitor.forget(record["monitor"]["parts"])
    return record


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_sums_over_processes_and_restarts(tmp_path):
    """Two ranks, killed and started again, then a finished run that is resumed."""
    out = tmp_path / "out"
    monitors = [opened(out, name) for name in ("0-first", "1-first")]
    work(monitors[0], [4, 2], value=1.0)
    work(monitors[1], [3], value=3.0)
    assert names(out) == [".monitor-0-first.json", ".monitor-1-first.json"]

    monitors = [opened(out, name) for name in ("0-second", "1-second")]
    work(monitors[1], [3], value=1.0)
    record = finish(monitors[0])
    assert record["negative_impact"] == pytest.approx((12 + 3) / 24)  # all twelve at i = 5, and 3 · 4 > 4.5
    assert record["model_evaluations"] == 3 and record["monitor"]["images"] == 12
    assert record["seconds_per_image"] >= 0
    steps = curves(record)
    assert [step["i"] for step in steps] == [5, 4]
    assert steps[0]["tangent"] == pytest.approx((9 * 5 + 3 * 15) / 12) and steps[0]["normal"] == 2 * steps[0]["tangent"]
    assert steps[1]["weights"] == [0.75, 0.25] and steps[1]["negative"] == 0.25
    assert names(out) == []

    monitor = opened(out, "0-third", earlier=record["monitor"])
    work(monitor, [12])
    record = finish(monitor)
    assert record["monitor"]["images"] == 24 and record["negative_impact"] == pytest.approx((15 + 12) / 48)
    assert names(out) == []


def test_parts_that_are_counted_already_are_not_counted_twice(tmp_path):
    """A run that is killed between writing the sums and removing what they were made of."""
    out = tmp_path / "out"
    monitor = opened(out, "0-first")
    work(monitor, [5])
    record = json.loads(json.dumps(monitor.total()))
    assert names(out) == [".monitor-0-first.json"]
    monitor = opened(out, "0-second", earlier=record["monitor"])
    assert finish(monitor)["monitor"]["images"] == 5


def test_parts_of_a_killed_run_are_added_to_an_earlier_record(tmp_path):
    out = tmp_path / "out"
    monitor = opened(out, "0-first")
    work(monitor, [5])
    record = finish(monitor)
    work(opened(out, "0-killed", earlier=record["monitor"]), [3])
    assert names(out) == [".monitor-0-killed.json", ".monitor-earlier.json"]
    # Its record was lost with it, or still there: the earlier sums count once.
    for earlier in (None, record["monitor"]):
        assert opened(out, "0-again", earlier=earlier).total()["monitor"]["images"] == 8


def test_overwriting_starts_the_sums_over(tmp_path):
    out = tmp_path / "out"
    monitor = opened(out, "0-first")
    work(monitor, [5])
    monitor = opened(out, "0-second", earlier=monitor.total()["monitor"], overwrite=True)
    work(monitor, [2])
    assert finish(monitor)["monitor"]["images"] == 2


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", '{"images": 1, "seconds": 1, "evaluations": 1, "steps": {"a": [1]}}']
)
def test_parts_that_cannot_be_read_do_not_count(tmp_path, content):
    out = tmp_path / "out"
    monitor = opened(out, "0-first")
    (out / ".monitor-1-broken.json").write_text(content)
    work(monitor, [5])
    assert finish(monitor)["monitor"]["images"] == 5
    for earlier in (None, 3, [], {}, {"images": "many"}):
        assert opened(out, "0-second", earlier=earlier).total()["monitor"]["images"] == 0


def test_a_run_without_guidance_has_costs_only(tmp_path):
    monitor = opened(tmp_path / "out")
    watched = monitor.watch(lambda ref, noise, callback: monitor.counted(torch.neg)(ref))
    watched(torch.zeros(2, 3, 4, 4), noise=None, callback=lambda state: None)
    record = finish(monitor)
    assert record["negative_impact"] is None and record["model_evaluations"] == 1 and curves(record) == []
    assert curves({}) == []


def test_a_run_without_images_has_no_means(tmp_path):
    record = finish(opened(tmp_path / "out"))
    assert record["model_evaluations"] is record["seconds_per_image"] is record["negative_impact"] is None


def test_a_run_that_did_not_finish_is_left_alone(tmp_path):
    """Until rank 0 has written the record, the parts stay."""
    monitor = opened(tmp_path / "out", "0-first")
    work(monitor, [2])
    monitor.total()
    assert names(tmp_path / "out") == [".monitor-0-first.json"]


@pytest.mark.parametrize("variant", ["manifold", "released"])
def test_a_watched_run_is_measured(tmp_path, variant):
    """The sampler itself under a monitor: its evaluations, its guided steps, and the image that it gives alone."""
    model, diffusion, ref, draws = setup()
    monitor = opened(tmp_path / "out")
    options = {"blocks": 4, "range_t": RANGE_T, "energies": [energies.dct(4)], "variant": variant}

    def replay():
        rest = list(draws)
        return lambda shape: rest.pop(0)

    watched = monitor.watch(partial(sample, monitor.counted(model), diffusion, **options))
    result = watched(ref, noise=replay(), callback=lambda state: None)
    states, records = run([energies.dct(4)], variant=variant)
    assert torch.equal(result, states[0])
    record = finish(monitor)
    assert record["model_evaluations"] == STEPS + (3 if variant == "released" else 0)
    guided = [i for i, _ in records]
    assert record["monitor"]["steps"].keys() == {str(i) for i in guided}
    for step in curves(record):
        own = [_record_of(**told) for i, told in records if i == step["i"]]
        assert step["tangent"] == pytest.approx(float(torch.stack([each["tangent"] for each in own]).mean()))
        assert step["weights"] == pytest.approx(torch.stack([each["weights"] for each in own]).mean((0, 1)).tolist())
        assert record["monitor"]["steps"][str(step["i"])][0] == 2 * len(own)
