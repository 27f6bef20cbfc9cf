"""A method as a curve: what its settings reach together, and how two methods compare at the same faithfulness.

A setting is a point (faithfulness, distance): the first is better when larger (SSIM), the second when smaller (a
Fréchet distance). All functions take sequences of such pairs of floats.
"""

import math
from collections.abc import Sequence

Point = tuple[float, float]
"""Faithfulness and distance of a setting."""


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats in both, sorted by faithfulness; equal points count once."""

    def is_beaten(x: float, y: float) -> bool:
        return any(a >= x and b <= y and (a, b) != (x, y) for a, b in points)

    return sorted({point for point in points if not is_beaten(*point)})


def hypervolume(points: Sequence[Point], reference: Point) -> float:
    """Area of what the points beat and that beats `reference`, (lowest faithfulness, largest distance) that counts.

    Two methods compare only with the same reference. Points that do not beat it add nothing.
    """
    area, reached = 0.0, reference[0]
    # Along a front, distances rise with faithfulness: each point owns the strip from its predecessor to itself.
    for x, y in front([point for point in points if point[0] > reference[0] and point[1] < reference[1]]):
        area += (x - reached) * (reference[1] - y)
        reached = x
    return area


def distance_at(points: Sequence[Point], faithfulness: float) -> float:
    """The smallest distance of a point that is at least as faithful; infinity where there is none."""
    return min((y for x, y in points if x >= faithfulness), default=math.inf)


def faithfulness_at(points: Sequence[Point], distance: float) -> float:
    """The largest faithfulness of a point that is at most as distant; minus infinity where there is none."""
    return max((x for x, y in points if y <= distance), default=-math.inf)


def encloses(points: Sequence[Point], others: Sequence[Point]) -> bool:
    """Whether every one of the others is matched or beaten in both by one of the points."""
    return all(distance_at(points, x) <= y for x, y in others)
