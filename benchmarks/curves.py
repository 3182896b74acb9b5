"""Draws curves over time as SVG, one below the other.

They share the time axis. Each has its own scale, which begins at 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.chart import MARGIN, TOP, WIDTH, ground, line, scale, text

LEFT, HEIGHT, GAP, BOTTOM = 72, 96, 40, 44
MOST_POINTS = 400
"""Of more points than this, an even choice is drawn, and what is highest between them."""


@dataclass(frozen=True)
class Curve:
    """One quantity: points of seconds and values."""

    name: str
    points: Sequence[tuple[float, float]]


def curves(title: str, drawn: Sequence[Curve], marks: Sequence[float]) -> str:
    """Draw them from top to bottom, with a mark at the bottom for each event."""
    height = TOP + len(drawn) * (HEIGHT + GAP) + BOTTOM
    seconds = max(at for curve in drawn for at, _ in curve.points)
    step, most = scale(max(seconds / 60, 1))
    pixels = (WIDTH - LEFT - MARGIN) / (most * 60)
    said = "; ".join(
        f"{curve.name}: at most {max(value for _, value in curve.points):.0f}" for curve in drawn
    )
    parts = ground(title, said, height)
    foot = TOP + len(drawn) * (HEIGHT + GAP)
    for index in range(round(most / step) + 1):
        x = LEFT + index * step * 60 * pixels
        parts += [
            line("grid", (x, TOP), (x, foot)),
            text("tick", x, foot + 22, f"{index * step:g}", "middle"),
        ]
    parts.append(text("tick", WIDTH - MARGIN, foot + 36, "minutes", "end"))
    for index, curve in enumerate(drawn):
        parts += _panel(curve, TOP + index * (HEIGHT + GAP), pixels)
    for at in marks:
        x = LEFT + at * pixels
        parts.append(line("mark", (x, foot), (x, foot + 7)))
    return "\n".join([*parts, "</svg>", ""])


def _panel(curve: Curve, top: float, pixels: float) -> list[str]:
    _, most = scale(max(1, *(value for _, value in curve.points)))
    base = top + GAP / 2 + HEIGHT
    parts = [text("label mine", LEFT, top + GAP / 2 - 6, curve.name)]
    for value in (0.0, most):
        y = base - value / most * HEIGHT
        parts += [
            line("grid", (LEFT, y), (WIDTH - MARGIN, y)),
            text("tick", LEFT - 8, y + 4, f"{value:g}", "end"),
        ]
    places = " ".join(
        f"{LEFT + at * pixels:.1f},{base - value / most * HEIGHT:.1f}"
        for at, value in _thinned(curve.points)
    )
    return [*parts, f'<polyline class="curve" points="{places}"/>']


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the highest of every few points, so that no peak is lost."""
    few = -(-len(points) // MOST_POINTS)
    return [
        max(points[start : start + few], key=lambda point: point[1])
        for start in range(0, len(points), few)
    ]
