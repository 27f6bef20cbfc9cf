"""The sampler's ablations and its monitor: linear sum, low-pass manifold, and what is recorded of the guided steps."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import LinearModel

from guided_diffusion import energy as energies
from guided_diffusion.errors import InputError
from guided_diffusion.manifold import BlockManifold, LowPassManifold, block_statistics, split
from guided_diffusion.run.monitor import Monitor, curves
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
    """States by step and the monitor's records [(i, record)]."""
    model, diffusion, ref, draws = setup()
    rest, states, records = list(draws), {}, []
    sample(
        model, diffusion, ref, energies=energies, noise=lambda shape: rest.pop(0), callback=states.__setitem__,
        monitor=lambda i, record: records.append((i, record)), **{"blocks": 4, "range_t": RANGE_T, **options},
    )
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
    free, _ = run(range_t=STEPS)
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
    with pytest.raises(ValueError, match=f"{name} is 'other'; it can be "):
        run(**{name: "other"})


# The monitor of the sampler


@pytest.mark.parametrize("variant", ["manifold", "released"])
@pytest.mark.parametrize("detail_merge", [False, True])
def test_records_of_guided_steps(variant, detail_merge):
    model, diffusion, ref, draws = setup()
    _, records = run([energies.dct(4), energies.low_pass(4)], variant=variant, detail_merge=detail_merge)
    guided = list(range(STEPS - 1, RANGE_T, -1))
    refinements = [RANGE_T + 1] * 4 if variant == "released" else []
    assert [i for i, _ in records] == guided + refinements
    for _, record in records:
        assert record["tangent"].shape == record["normal"].shape == record["negative"].shape == (2,)
        assert record["weights"].shape == (2, 3)
        torch.testing.assert_close(record["weights"].sum(1), torch.ones(2))
    start = draws[0] if variant == "released" else BlockManifold(ref, 4).restrict(draws[0], diffusion.alphas_cumprod[-1])
    out = diffusion.p_mean_variance(model, start, torch.full((2,), STEPS - 1))
    g = out["mean"] - start / float(diffusion.alphas[-1]) ** 0.5
    tangent, normal = BlockManifold(ref, 4).split(start, g, float(diffusion.alphas_cumprod[-1]))
    torch.testing.assert_close(records[0][1]["tangent"], tangent.flatten(1).norm(dim=1), rtol=1e-3, atol=0)
    torch.testing.assert_close(records[0][1]["normal"], normal.flatten(1).norm(dim=1), rtol=1e-3, atol=0)


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
    assert all(record["negative"].all() for _, record in linear)
    assert not any(record["negative"].any() for _, record in merged)


def test_a_monitor_changes_nothing():
    model, diffusion, ref, draws = setup()
    watched, _ = run([energies.dct(4)])
    rest = list(draws)
    alone = sample(
        model, diffusion, ref, blocks=4, range_t=RANGE_T, energies=[energies.dct(4)], noise=lambda s: rest.pop(0)
    )
    assert torch.equal(watched[0], alone)


# The monitor of a run


def job(folder, rank=0, overwrite=False):
    """What a Monitor needs of an engine.Job."""
    folder.mkdir(exist_ok=True)
    options = SimpleNamespace(save_dir=str(folder), overwrite=overwrite)
    return SimpleNamespace(options=options, peers=SimpleNamespace(rank=rank), record={"finished": None})


def sampler(model, ref, value=1.0, noise=None, callback=None, monitor=None):
    """Two guided steps with known records and three evaluations of the model."""
    n = len(ref)
    for i in (5, 4):
        weights = torch.tensor([[0.75, 0.25]]).expand(n, 2)
        norms = torch.full((n,), value * i)
        monitor(i, {"tangent": norms, "normal": 2 * norms, "weights": weights, "negative": norms > 4.5})
    return model(model(model(ref)))


def work(monitor, batches, value=1.0):
    watched = monitor.watch(partial(sampler, monitor.counted(lambda x: x), value=value), guided=True)
    for n in batches:
        watched(torch.zeros(n, 3, 4, 4), noise=None, callback=None)


def finish(job, monitor, folder):
    job.record["finished"] = "now"
    monitor.finish()
    return json.loads((folder / "run.json").read_text())


def test_sums_over_processes_and_restarts(tmp_path):
    """Two ranks, one of them killed and started again, then a finished run that is resumed."""
    jobs = [job(tmp_path / "out", rank) for rank in (0, 1)]
    monitors = [Monitor(each) for each in jobs]
    for monitor in monitors:
        monitor.begin()
    work(monitors[0], [4, 2], value=1.0)
    work(monitors[1], [3], value=3.0)
    assert not (tmp_path / "out" / "run.json").exists()

    jobs = [job(tmp_path / "out", rank) for rank in (0, 1)]
    monitors = [Monitor(each) for each in jobs]
    for monitor in monitors:
        monitor.begin()
    work(monitors[1], [3], value=1.0)
    record = finish(jobs[0], monitors[0], tmp_path / "out")
    assert record["negative_impact"] == pytest.approx((12 + 3) / 24)  # all twelve at i = 5, and 3 · 4 > 4.5
    assert record["model_evaluations"] == 3 and record["monitor"]["images"] == 12
    assert record["seconds_per_image"] > 0
    steps = curves(record)
    assert [step["i"] for step in steps] == [5, 4]
    assert steps[0]["tangent"] == pytest.approx((9 * 5 + 3 * 15) / 12) and steps[0]["normal"] == 2 * steps[0]["tangent"]
    assert steps[1]["weights"] == [0.75, 0.25] and steps[1]["negative"] == 0.25
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run.json"]

    again = job(tmp_path / "out")
    monitor = Monitor(again)
    (tmp_path / "out" / "run.json").write_text("{}")  # what Job.prepare does: a new record
    monitor.begin()
    work(monitor, [12])
    record = finish(again, monitor, tmp_path / "out")
    assert record["monitor"]["images"] == 24 and record["negative_impact"] == pytest.approx((15 + 12) / 48)


def test_parts_that_are_counted_already_are_not_counted_twice(tmp_path):
    """A run that is killed between writing the sums and removing what they were made of."""
    first = job(tmp_path / "out")
    monitor = Monitor(first)
    monitor.begin()
    work(monitor, [5])
    part = next((tmp_path / "out").glob(".monitor-*"))
    content = part.read_text()
    finish(first, monitor, tmp_path / "out")
    part.write_text(content)
    second = job(tmp_path / "out")
    monitor = Monitor(second)
    monitor.begin()
    assert finish(second, monitor, tmp_path / "out")["monitor"]["images"] == 5


def test_overwriting_starts_the_sums_over(tmp_path):
    first = job(tmp_path / "out")
    monitor = Monitor(first)
    monitor.begin()
    work(monitor, [5])
    second = job(tmp_path / "out", overwrite=True)
    monitor = Monitor(second)
    monitor.begin()
    work(monitor, [2])
    assert finish(second, monitor, tmp_path / "out")["monitor"]["images"] == 2


def test_a_run_without_guidance_has_costs_only(tmp_path):
    one = job(tmp_path / "out")
    monitor = Monitor(one)
    monitor.begin()
    watched = monitor.watch(lambda ref, noise, callback: monitor.counted(torch.neg)(ref))
    watched(torch.zeros(2, 3, 4, 4), noise=None, callback=None)
    record = finish(one, monitor, tmp_path / "out")
    assert record["negative_impact"] is None and record["model_evaluations"] == 1 and curves(record) == []
    assert curves({}) == []


def test_a_run_that_did_not_finish_is_left_alone(tmp_path):
    one = job(tmp_path / "out")
    monitor = Monitor(one)
    monitor.begin()
    work(monitor, [2])
    monitor.finish()
    assert [path.name.startswith(".monitor-") for path in (tmp_path / "out").iterdir()] == [True]


def test_bad_start_of_a_baseline_names_the_flag():
    from guided_diffusion.baselines import check_start

    check_start(1, 10)
    check_start(10, 10)
    for start in (0, 11):
        with pytest.raises(InputError, match=f"--t is {start}; it can be 1 to 10"):
            check_start(start, 10)
