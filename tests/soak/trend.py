"""Decides whether a curve grows, by the straight line through its second half.

In the first half caches fill, and the allocator finds its size. The line is the Theil-Sen
estimator: the median of the slopes between all pairs of points. A mean, or the difference of the
first and the last point, would depend on when the last fault was; the median does not.
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
class Trend:
    """What happened to a measure in the second half.

    Attributes:
        rise: From the beginning of the line to its end.
    """

    measure: Measure
    middle: float
    greatest: float
    rise: float

    @property
    def is_flat(self) -> bool:
        """Whether it rises by no more than allowed."""
        return self.rise <= self.measure.allowed

    def __str__(self) -> str:
        measure = self.measure
        return (
            f"{measure.name}: {'flat' if self.is_flat else 'NOT FLAT'}, rose by {self.rise:.2f} of"
            f" at most {measure.allowed:g} {measure.unit}".rstrip()
            + f" (middle {self.middle:.1f}, greatest {self.greatest:.1f})"
        )


def trend_of(measure: Measure, points: Sequence[Point]) -> Trend:
    """Return the trend of the second half of a curve.

    Raises:
        ValueError: There is no line through less than two points.
    """
    half = (points[0][0] + points[-1][0]) / 2 if points else 0.0
    second = [point for point in points if point[0] >= half]
    if len(second) < 2:
        raise ValueError(f"there are not enough samples of {measure.name}: {len(points)}")
    values = [value for _, value in second]
    rise = slope(second) * (second[-1][0] - second[0][0])
    return Trend(measure, median(values), max(values), rise)


def slope(points: Sequence[Point]) -> float:
    """Return the median of the slopes between all pairs of points."""
    chosen = points[:: -(-len(points) // MOST_POINTS)]
    return median(
        (later[1] - earlier[1]) / (later[0] - earlier[0])
        for earlier, later in combinations(chosen, 2)
    )
