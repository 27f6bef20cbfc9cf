"""The sampler's ablations: linear sum, low-pass manifold; and what is recorded of guided steps."""

import json

import pytest
import torch
from conftest import small_run

from guided_diffusion import energy as energies
from guided_diffusion.manifold import BlockManifold, LowPassManifold
from guided_diffusion.run import record as journal
from guided_diffusion.sddm import sample
from resizer import low_pass_filter

STEPS, RANGE_T = 8, 2


class Against:
    """An energy that wants the opposite of what the score wants."""

    def __init__(self, model, diffusion):
        self.model, self.diffusion = model, diffusion

    def prepare(self, ref):
        pass

    def energy_and_grad(self, x, t, alpha_bar):
        i = self.diffusion.timestep_map.index(int(t[0]))
        out = self.diffusion.p_mean_variance(self.model, x, torch.full((2,), i))
        return torch.zeros(2), out["mean"] - float(self.diffusion.alphas[i]) ** -0.5 * x


def columns(*told, **named):
    """The columns that a run records of a guided evaluation, by name."""
    found = journal.record_of(*told, **named)
    return {"tangent": found[:, 0], "normal": found[:, 1], "negative": found[:, 2].bool(), "weights": found[:, 3:]}


def run(energies=(), **options):
    """States by step, and what the guided evaluations did, [(i, record)]."""
    model, diffusion, ref, draws = small_run(STEPS)
    rest, states, records = list(draws), {}, []

    def keep(state):
        states[state["i"]] = state["x"]
        records.extend((state["i"], record) for record in state["guided"])

    options = {"blocks": 4, "range_t": RANGE_T, **options}
    sample(model, diffusion, ref, energies=energies, noise=lambda shape: rest.pop(0), callback=keep, **options)
    return states, records


# The low-pass manifold


def test_low_pass_manifold_is_its_formula():
    _, _, ref, draws = small_run(STEPS)
    x, g = draws[0], draws[1]
    phi = low_pass_filter((16, 16), 4, "cubic")
    m = LowPassManifold(ref, 4)
    torch.testing.assert_close(m.restrict(x, 0.25), x - phi(x) + 0.5 * phi(ref))
    tangent, normal = m.decompose(x, g, 0.25)
    torch.testing.assert_close(normal, phi(g))
    torch.testing.assert_close(tangent + normal, g)


def test_guided_steps_end_on_the_low_pass_manifold():
    """Nearer to the low frequencies asked for than plain sampling and than the block manifold."""
    states, _ = run([energies.dct(4)], manifold="low_pass", down_n=4)
    blockwise, _ = run([energies.dct(4)])
    free, _ = run(range_t=STEPS - 1)
    _, diffusion, ref, _ = small_run(STEPS)
    phi = low_pass_filter((16, 16), 4, "cubic")
    for i in range(RANGE_T + 1, STEPS):
        low = float(diffusion.alphas_cumprod[i - 1]) ** 0.5 * phi(ref)
        distance, elsewhere, freely = ((phi(each[i]) - low).norm() for each in (states, blockwise, free))
        assert distance < 0.5 * freely and distance < elsewhere, i
    assert not torch.allclose(states[0], blockwise[0], atol=1e-2)


# What the sampler tells of its guided steps


@pytest.mark.parametrize("variant, detail_merge", [("manifold", True), ("released", False)])
def test_records_of_guided_steps(variant, detail_merge):
    model, diffusion, ref, draws = small_run(STEPS)
    _, records = run([energies.dct(4), energies.low_pass(4)], variant=variant, detail_merge=detail_merge)
    guided = list(range(STEPS - 1, RANGE_T, -1))
    refinements = [RANGE_T + 1] * 4 if variant == "released" else []
    assert [i for i, _ in records] == guided + refinements
    for _, told in records:
        assert told["tangent"].shape == told["normal"].shape == told["move"].shape == ref.shape
        assert told["weights"].shape == ((2, 3, 4, 4, 3) if detail_merge else (2, 3, 3))
        torch.testing.assert_close(columns(**told)["weights"].sum(1), torch.ones(2))
    score = records[0][1]["tangent"] + records[0][1]["normal"]
    x = draws[0]
    if variant == "manifold":
        x = BlockManifold(ref, 4).restrict(x, diffusion.alphas_cumprod[-1])
    out = diffusion.p_mean_variance(model, x, torch.full((2,), STEPS - 1))
    expected = out["mean"] - x / float(diffusion.alphas[-1]) ** 0.5
    torch.testing.assert_close(score, expected, rtol=0, atol=1e-4)


def test_a_record_of_known_parts():
    """Norms over the whole image, weights meaned over channels and blocks, and the sign of the inner product."""
    tangent = torch.zeros(3, 1, 2, 2)
    tangent[:, 0, 0] = torch.tensor([3.0, 4.0])
    move = tangent * torch.tensor([2.0, -1.0, -1e-6])[:, None, None, None]
    for weights in (torch.tensor([[0.5, 0.5], [0.7, 0.3], [1.0, 0.0]])[:, None], torch.rand(3, 1, 4, 4, 2)):
        record = columns(tangent, 2 * tangent, move, weights)
        assert record["tangent"].tolist() == [5, 5, 5] and record["normal"].tolist() == [10, 10, 10]
        assert record["negative"].tolist() == [False, True, False]  # the last cancels up to rounding errors
        torch.testing.assert_close(record["weights"], weights.reshape(3, -1, 2).mean(1))


def test_the_sum_may_harm_the_score_and_the_minimum_norm_point_never_does():
    """An energy that wants the opposite is stronger than the score in a sum."""
    model, diffusion, _, _ = small_run(STEPS)
    _, linear = run([Against(model, diffusion)], moo="linear")
    _, merged = run([Against(model, diffusion)])
    assert len(linear) == len(merged) == STEPS - 1 - RANGE_T
    assert all(columns(**told)["negative"].all() for _, told in linear)
    assert not any(columns(**told)["negative"].any() for _, told in merged)


# What is recorded of a run


def record(i, n, value):
    """A guided evaluation of n images: norms `value` and 2 `value`, weights 3/4 and 1/4."""
    tangent = torch.zeros(n, 3, 4, 4)
    tangent[:, 0, 0, 0] = value
    weights = torch.tensor([0.75, 0.25]).expand(n, 3, 2)
    return i, journal.record_of(tangent, 2 * tangent, (-1 if value > 4.5 else 1) * tangent, weights)


def test_lines_of_images_add_up_to_means():
    steps = [*journal.steps_of([record(5, 4, 5.0), record(4, 4, 4.0)], 4), *journal.steps_of([record(5, 2, 3.0)], 2)]
    assert steps[0] == {"5": [1, 5, 10, 1, 0.75, 0.25], "4": [1, 4, 8, 0, 0.75, 0.25]}
    entries = [{"seconds": 1.5, "evaluations": 3, "steps": each} for each in steps]
    total = json.loads(json.dumps(journal.total(entries)))
    assert total["negative_impact"] == pytest.approx(4 / 10) and total["energy_weights"] == [0.25]
    assert total["model_evaluations"] == 3 and total["seconds_per_image"] == 1.5 and total["monitor"]["images"] == 6
    first, second = journal.curves(total)
    assert (first["i"], second["i"]) == (5, 4) and first["weights"] == second["weights"] == [0.75, 0.25]
    assert first["tangent"] == pytest.approx((4 * 5 + 2 * 3) / 6) and first["negative"] == pytest.approx(4 / 6)
    assert second["normal"] == 8
    empty = journal.total([])
    assert empty["model_evaluations"] is empty["seconds_per_image"] is empty["negative_impact"] is None
