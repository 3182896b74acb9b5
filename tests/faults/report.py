"""Writes the figures into ``reliability.md``: one table of faults and brokers, between two marks.

Everything outside the marks is written by hand, and stays.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path

from tests.faults.figures import ROOT, Figures, Kept, Machine

PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"
_RAW = "[raw figures](../tests/faults/figures.jsonl)"
_QUEUE_TYPES = (", classic", ", quorum")


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
    figures = [each for each, _ in kept.values()]
    brokers = list(dict.fromkeys(each.broker for each in figures))
    taken = _taken_on(machine for _, machine in kept.values())
    heads = ("fault", *(f"RabbitMQ {broker}" for broker in brokers))
    lines = [
        (
            fault,
            *(_cell([e for e in figures if (_row(e), e.broker) == (fault, b)]) for b in brokers),
        )
        for fault in sorted({_row(each) for each in figures})
    ]
    table = [heads, ["---"] * len(heads), *lines]
    shown = "\n".join(f"| {' | '.join(line)} |" for line in table)
    return "\n\n".join([taken, shown, _legend(figures)])


def _row(figures: Figures) -> str:
    """Return the row of some figures, which both queue types share if only they differ."""
    for each in _QUEUE_TYPES:
        if figures.fault.endswith(each):
            return figures.fault.removesuffix(each)
    return figures.fault


def _taken_on(machines: Iterable[Machine]) -> str:
    told = {
        f"revision {each.revision}, {each.processors} processors, Python {each.python}": None
        for each in machines
    }
    return f"Measured on {'; '.join(told)} ({_RAW})."


def _cell(some: list[Figures]) -> str:
    """Return the sums of all wires and queue types, and the longest recovery."""
    if not some:
        return "–"
    lost, repeated, messages = (
        sum(getattr(each, name) for each in some) for name in ("lost", "duplicated", "messages")
    )
    times = [each.recovery for each in some if each.recovery is not None]
    recovery = f"; {max(times):.1f} s" if times else ""
    return f"**{lost:,} lost**; {repeated:,} of {messages:,} repeated{recovery}"


def _legend(figures: Iterable[Figures]) -> str:
    """Return a sentence for each fault or group of faults, with its remarks."""
    told: dict[str, dict[str, None]] = {}
    remarks: dict[str, dict[str, None]] = {}
    for each in figures:
        told.setdefault(each.did, {})[_row(each)] = None
        if each.remark:
            remarks.setdefault(each.did, {})[each.remark] = None
    lines = {
        _name(list(faults)): " ".join([did, *remarks.get(did, ())]) for did, faults in told.items()
    }
    return "\n".join(f"- **{name}**: {text}" for name, text in sorted(lines.items()))


def _name(faults: list[str]) -> str:
    """Return the fault, or the words with which several begin."""
    if len(faults) == 1:
        return faults[0]
    words = zip(*(each.split() for each in faults), strict=False)
    shared = [some[0] for some in takewhile(lambda some: len(set(some)) == 1, words)]
    return f"{' '.join(shared).rstrip(',')} …"
