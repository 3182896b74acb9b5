"""Writes the figures into ``reliability.md``: one table for each broker, between two marks.

Everything outside the marks is written by hand, and stays.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from tests.faults.figures import ROOT, Figures, Kept, Machine

PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"
_HEADS = ("fault", "wire", "messages", "handled", "duplicated", "lost", "seconds to recover")


def write(kept: Kept, page: Path = PAGE) -> None:
    """Write the stored figures into the page."""
    page.write_text(between_marks(page.read_text(), render(kept)))


def between_marks(text: str, new: str, *, begin: str = BEGIN, end: str = END) -> str:
    """Replace the text between the marks."""
    before, has_begin, rest = text.partition(begin)
    _, has_end, after = rest.partition(end)
    if not (has_begin and has_end):
        raise ValueError(f"the page has no place for the figures: {begin} and {end}")
    return f"{before}{begin}\n\n{new.strip()}\n\n{end}{after}"


def render(kept: Kept) -> str:
    """Return all figures as Markdown."""
    parts = []
    for broker, entries in groupby(kept.values(), key=lambda entry: entry[0].broker):
        of_broker = list(entries)
        figures = [each for each, _ in of_broker]
        parts += [
            f"### RabbitMQ {broker}",
            _taken_on(machine for _, machine in of_broker),
            _table(figures),
            _legend(figures),
        ]
    return "\n\n".join(parts)


def _taken_on(machines: Iterable[Machine]) -> str:
    told = {
        f"revision {each.revision}, {each.processors} processors, Python {each.python}": None
        for each in machines
    }
    return f"Taken on {'; '.join(told)}."


def _table(figures: Iterable[Figures]) -> str:
    form = ("---", "---", *["---:"] * (len(_HEADS) - 2))
    return "\n".join(f"| {' | '.join(line)} |" for line in (_HEADS, form, *map(_line, figures)))


def _line(figures: Figures) -> tuple[str, ...]:
    return (
        figures.fault,
        figures.wire,
        f"{figures.messages:,}",
        f"{figures.handled:,}",
        f"{figures.duplicated:,}",
        f"**{figures.lost:,}**",
        "–" if figures.recovery is None else f"{figures.recovery:.1f}",
    )


def _legend(figures: Iterable[Figures]) -> str:
    """Return a sentence for each fault, with its remarks."""
    told: dict[str, list[str]] = {}
    for each in figures:
        remarks = told.setdefault(each.fault, [each.did])
        if each.remark and each.remark not in remarks:
            remarks.append(each.remark)
    return "\n".join(f"- **{fault}**: {' '.join(remarks)}" for fault, remarks in told.items())
