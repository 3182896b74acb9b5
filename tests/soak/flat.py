"""When is a curve flat? When the straight line through its second half hardly rises.

The first half is for warming up: caches fill, and the allocator finds its size. The line is Theil's
and Sen's, the median of the slopes between all pairs of points: what happens for a moment, as in a
fault, does not move it, however far it goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

Point = tuple[float, float]
"""When, in seconds, and how much."""

MOST_POINTS = 600
"""Of more points an even choice is taken: there are half as many pairs as their square."""


@dataclass(frozen=True, slots=True)
class Measure:
    """Something that must not grow.

    Attributes:
        allowed: How much the line through the second half may rise over its whole length.
    """

    name: str
    unit: str
    allowed: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was seen of a measure in the second half.

    Attributes:
        rise: From the beginning of the line to its end.
    """

    measure: Measure
    middle: float
    greatest: float
    rise: float

    @property
    def is_flat(self) -> bool:
        """Whether it rises by no more than it may."""
        return self.rise <= self.measure.allowed

    def __str__(self) -> str:
        measure = self.measure
        return (
            f"{measure.name}: {'flat' if self.is_flat else 'NOT FLAT'}, rose by {self.rise:.2f} of"
            f" at most {measure.allowed:g} {measure.unit}".rstrip()
            + f" (middle {self.middle:.1f}, greatest {self.greatest:.1f})"
        )


def judge(measure: Measure, points: Sequence[Point]) -> Verdict:
    """Look at the second half of a curve.

    Raises:
        ValueError: There is no line through less than two points.
    """
    half = (points[0][0] + points[-1][0]) / 2 if points else 0.0
    second = [point for point in points if point[0] >= half]
    if len(second) < 2:
        raise ValueError(f"there are not enough samples of {measure.name}: {len(points)}")
    values = [value for _, value in second]
    rise = slope(second) * (second[-1][0] - second[0][0])
    return Verdict(measure, median(values), max(values), rise)


def slope(points: Sequence[Point]) -> float:
    """The median of the slopes between all pairs of points, whose times differ."""
    chosen = points[:: -(-len(points) // MOST_POINTS)]
    return median(
        (later[1] - earlier[1]) / (later[0] - earlier[0])
        for earlier, later in combinations(chosen, 2)
    )
