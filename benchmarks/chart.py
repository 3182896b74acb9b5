"""Draws bar charts as SVG, on a linear scale that begins at 0.

A chart has its own background, light or dark as the reader prefers, so that it can be read on any
page. It needs no script and no font, and loads nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, LABELS, MARGIN, VALUES = 880, 332, 20, 64
ROW, THICK, TOP, BOTTOM = 26, 16, 56, 40

_STYLE = """
  .ground { fill: #ffffff; stroke: #d0d7de; }
  .title { fill: #1f2328; font-weight: 600; font-size: 15px; }
  .label, .value { fill: #1f2328; font-size: 12.5px; }
  .mine { font-weight: 600; }
  .tick { fill: #59636e; font-size: 11px; }
  .grid { stroke: #d8dee4; stroke-width: 1; }
  .spread { stroke: #1f2328; stroke-width: 1.2; opacity: 0.55; }
  .ours { fill: #d9480f; }
  .theirs { fill: #8ea3b8; }
  .curve { fill: none; stroke: #d9480f; stroke-width: 1.4; }
  .mark { stroke: #8ea3b8; stroke-width: 1; }
  text { font-family: system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; }
  @media (prefers-color-scheme: dark) {
    .ground { fill: #0d1117; stroke: #30363d; }
    .title, .label, .value { fill: #e6edf3; }
    .tick { fill: #9198a1; }
    .grid { stroke: #262c36; }
    .spread { stroke: #e6edf3; }
    .ours { fill: #ff8a4c; }
    .theirs { fill: #5b7187; }
    .curve { stroke: #ff8a4c; }
    .mark { stroke: #5b7187; }
  }
"""


@dataclass(frozen=True)
class Bar:
    """One bar, with its spread."""

    name: str
    value: float
    low: float
    high: float
    is_ours: bool


def bars(title: str, rows: Sequence[Bar]) -> str:
    """Draw them, from top to bottom."""
    height = TOP + ROW * len(rows) + BOTTOM
    step, most = scale(max(row.high for row in rows))
    room = WIDTH - LABELS - MARGIN - VALUES
    said = "; ".join(f"{row.name}: {_number(row.value)}" for row in rows)
    parts = ground(title, said, height)
    for index in range(round(most / step) + 1):
        x = LABELS + index * step * room / most
        parts += [
            line("grid", (x, TOP - 6), (x, height - BOTTOM)),
            text("tick", x, height - BOTTOM + 18, f"{index * step:g}", "middle"),
        ]
    for index, row in enumerate(rows):
        parts += _row(row, TOP + index * ROW, room / most)
    return "\n".join([*parts, "</svg>", ""])


def ground(title: str, said: str, height: float) -> list[str]:
    """Begin a drawing with its title, its description and its background."""
    size = f'viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" height="{height:g}"'
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
        f"<title>{escape(title)}</title>",
        f"<desc>{escape(said)}</desc>",
        f"<style>{_STYLE}</style>",
        box("ground", 0.5, 0.5, (WIDTH - 1, height - 1), 8),
        text("title", MARGIN, 32, title),
    ]


def scale(most: float) -> tuple[float, float]:
    """Return a round step, and the round number at which the scale ends."""
    rough = most / 6
    power = 10 ** math.floor(math.log10(rough))
    step = next(each * power for each in (1, 2, 5, 10) if each * power >= rough)
    return step, step * math.ceil(most / step)


def _row(row: Bar, y: float, pixels: float) -> list[str]:
    kind, mine = ("ours", " mine") if row.is_ours else ("theirs", "")
    middle, baseline = y + THICK / 2, y + THICK / 2 + 4
    low, high = LABELS + row.low * pixels, LABELS + row.high * pixels
    return [
        text(f"label{mine}", LABELS - 8, baseline, row.name, "end"),
        box(kind, LABELS, y, (max(row.value * pixels, 1), THICK), 2),
        line("spread", (low, middle), (high, middle)),
        text(f"value{mine}", high + 6, baseline, _number(row.value)),
    ]


def _number(value: float) -> str:
    return f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def text(kind: str, x: float, y: float, said: str, anchor: str = "start") -> str:
    """Return a text at a place."""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {place}>{escape(said)}</text>'


def line(kind: str, start: tuple[float, float], end: tuple[float, float]) -> str:
    """Return a straight line."""
    (x1, y1), (x2, y2) = start, end
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def box(kind: str, x: float, y: float, size: tuple[float, float], radius: int) -> str:
    """Return a rectangle with round corners."""
    width, height = size
    extent = f'width="{width:.1f}" height="{height:.1f}" rx="{radius}"'
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" {extent}/>'
