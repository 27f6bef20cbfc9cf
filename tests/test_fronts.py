"""Fronts of settings: what they keep, the area under them, and comparisons at matched faithfulness."""

import itertools
import math

from fronts import distance_at, front, hypervolume
from hypothesis import given
from hypothesis import strategies as st

SIDE = 8
GRID = st.integers(0, SIDE).map(float)
POINTS = st.lists(st.tuples(GRID, GRID), max_size=6)


def beats(a, b):
    return a[0] >= b[0] and a[1] <= b[1]


@given(POINTS)
def test_a_front_has_what_nothing_beats_and_beats_the_rest(points):
    kept = front(points)
    assert kept == sorted(set(kept)) and set(kept) <= set(points)
    assert all(any(beats(k, p) for k in kept) for p in points)
    assert not any(beats(a, b) for a, b in itertools.permutations(kept, 2))


@given(POINTS)
def test_hypervolume_counts_the_cells_that_some_point_beats(points):
    """Points on whole numbers: the area is the number of unit cells left of and above some point."""
    cells = sum(
        any(beats(p, (x + 1, y)) for p in points) for x in range(SIDE) for y in range(SIDE)
    )  # a cell's best corner is (x + 1, y)
    assert hypervolume(points, (0.0, float(SIDE))) == cells


@given(POINTS, POINTS)
def test_more_settings_never_shrink_the_volume(points, others):
    reference = (0.0, float(SIDE))
    assert hypervolume(points + others, reference) >= hypervolume(points, reference)


@given(POINTS, GRID)
def test_matched_comparisons_are_the_best_of_those_that_qualify(points, faithfulness):
    assert distance_at(points, faithfulness) == min([y for x, y in points if x >= faithfulness], default=math.inf)


def test_a_worked_example():
    sddm, sdedit = [(0.38, 1.7), (0.36, 1.4)], [(0.35, 1.8), (0.34, 1.3)]
    assert front([*sddm, *sdedit]) == [(0.34, 1.3), (0.36, 1.4), (0.38, 1.7)]
    assert distance_at(sddm, 0.37) == 1.7 and distance_at(sddm, 0.4) == math.inf
    assert math.isclose(hypervolume(sddm, (0.3, 2.0)), 0.06 * 0.6 + 0.02 * 0.3)
