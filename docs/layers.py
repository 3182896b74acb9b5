"""Draw the layers from the contract that holds them, and what imports what from the code.

`python docs/layers.py` writes `docs/layers.svg`; a unit test says when that is due. An arrow is
left out where a longer way of arrows says the same.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path

import grimp

PACKAGE = "aio_pika_batch"
HERE = Path(__file__).parent
PICTURE = HERE / "layers.svg"

WIDTH, ROW, HEIGHT, GAP, MARGIN = 860, 74, 34, 34, 24
LETTER = 7.3
"""Pixels that a letter takes, on average, in a sans-serif of 13."""

SHORTEST = 56
"""Pixels that the number of modules takes."""

STEPS = (0.3, 0.5, 0.7, 0.5)
"""Where in its row a layer stands, one after another: parts of the room that it leaves."""

STYLE = (
    "text{font:13px sans-serif;fill:#222;text-anchor:middle}.n{font-size:10px;fill:#666}"
    "rect{fill:#f4f6fa;stroke:#8794ab;rx:5}path{fill:none;stroke:#7c89a0;stroke-opacity:.6}"
    ".band{fill:#fafafa;stroke:#e6e6e6}"
)

MARKER = (
    '<defs><marker id="a" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7"'
    ' orient="auto"><path d="M0 0 8 4 0 8z" style="fill:#7c89a0;stroke:none"/></marker></defs>'
)


@dataclass(frozen=True, slots=True)
class Box:
    """A module's or a package's place."""

    name: str
    modules: int
    x: float
    y: float
    width: float


def layers() -> list[list[str]]:
    """The modules of each layer, as the contract has them, the highest first."""
    found = tomllib.loads((HERE.parent / "pyproject.toml").read_text())
    [contract] = [
        each
        for each in found["tool"]["importlinter"]["contracts"]
        if each.get("containers") == [PACKAGE]
    ]
    return [[name.strip() for name in layer.split("|")] for layer in contract["layers"]]


def sizes_and_imports() -> tuple[dict[str, int], dict[str, set[str]]]:
    """Of each top-level module: how many files it is, and what else there it imports."""
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    sizes: dict[str, int] = {}
    imports: dict[str, set[str]] = {}
    for module in graph.modules - {PACKAGE}:
        top = _top(module)
        sizes[top] = sizes.get(top, 0) + 1
        imported = graph.find_modules_directly_imported_by(module) - {PACKAGE}
        imports.setdefault(top, set()).update(map(_top, imported))
    return sizes, {top: found - {top} for top, found in imports.items()}


def _top(module: str) -> str:
    return module.split(".")[1]


def reduced(imports: Mapping[str, set[str]]) -> list[tuple[str, str]]:
    """The imports that no longer way says already."""

    def reach(name: str) -> set[str]:
        return imports[name].union(*(reach(each) for each in imports[name]))

    reached = {name: reach(name) for name in imports}
    return sorted(
        (name, other)
        for name, found in imports.items()
        for other in found
        if not any(other in reached[between] for between in found - {other})
    )


def place(rows: Iterable[Iterable[str]], sizes: Mapping[str, int]) -> dict[str, Box]:
    """Give every module its box; short rows step aside, so that long arrows find a way past."""
    boxes = {}
    for number, row in enumerate(rows):
        names = list(row)
        widths = [max(len(name) * LETTER, SHORTEST) + 24 for name in names]
        room = WIDTH - sum(widths) - GAP * (len(names) - 1)
        x = room * STEPS[number % len(STEPS)]
        for name, width in zip(names, widths, strict=True):
            boxes[name] = Box(name, sizes[name], x, MARGIN + number * ROW, width)
            x += width + GAP
    return boxes


def draw() -> str:
    """The picture."""
    rows = layers()
    sizes, imports = sizes_and_imports()
    boxes = place(rows, sizes)
    arrows = reduced(imports)
    height = 2 * MARGIN + (len(rows) - 1) * ROW + HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
        f"<title>{PACKAGE}: every module imports downwards only</title>",
        f"<style>{STYLE}</style>",
        MARKER,
    ]
    parts += [
        f'<rect class="band" x="4" y="{MARGIN + number * ROW - 8}" width="{WIDTH - 8}"'
        f' height="{HEIGHT + 16}"/>'
        for number in range(len(rows))
    ]
    parts += [_arrow(boxes[name], boxes[other], arrows) for name, other in arrows]
    for box in boxes.values():
        middle = f"{box.x + box.width / 2:.1f}"
        is_package = box.modules > 1
        parts.append(
            f'<rect x="{box.x:.1f}" y="{box.y}" width="{box.width:.1f}" height="{HEIGHT}"/>'
            f'<text x="{middle}" y="{box.y + (16 if is_package else 21)}">{escape(box.name)}</text>'
        )
        if is_package:
            parts.append(
                f'<text class="n" x="{middle}" y="{box.y + 28}">{box.modules} modules</text>'
            )
    return "\n".join([*parts, "</svg>", ""])


def _arrow(box: Box, other: Box, arrows: list[tuple[str, str]]) -> str:
    """A curve from below one box to the top of another; several share an edge evenly."""
    leaving = [each for each in arrows if each[0] == box.name]
    coming = [each for each in arrows if each[1] == other.name]
    this = (box.name, other.name)
    x = box.x + box.width * (leaving.index(this) + 1) / (len(leaving) + 1)
    to = other.x + other.width * (coming.index(this) + 1) / (len(coming) + 1)
    y, end = box.y + HEIGHT, other.y
    bend = min(60.0, (end - y) / 2)
    points = [(x, y), (x, y + bend), (to, end - bend), (to, end)]
    curve = " ".join(f"{one:.1f} {two:.1f}" for one, two in points[1:])
    return f'<path d="M{x:.1f} {y:.1f}C{curve}" marker-end="url(#a)"/>'


if __name__ == "__main__":
    PICTURE.write_text(draw())
