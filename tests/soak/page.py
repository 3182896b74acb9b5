"""Writes the result of a soak into ``reliability.md``: a table between two marks, and a plot."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.curves import Curve, curves
from tests.faults.figures import Machine
from tests.faults.report import between_marks
from tests.soak.trend import Measure, Point, Trend, trend_of

BEGIN, END = "<!-- soak: begin -->", "<!-- soak: end -->"
PLOT = "reliability-soak.svg"

MEASURES = {
    "memory": Measure("resident memory", "MiB", 2.0),
    "tasks": Measure("asyncio tasks", "", 2.0),
    "files": Measure("open file descriptors", "", 2.0),
    "depth": Measure("messages waiting in the queue", "", 100.0),
}


@dataclass(frozen=True, kw_only=True)
class Soak:
    """What was seen.

    Attributes:
        minutes: How long it took.
        messages: How many the publisher has had confirmed.
        handled: How many of these were acknowledged by the handler, or are dead letters.
        duplicated: How often a message was handled, or became a dead letter, without need.
        lost: How many were neither handled nor dead-lettered.
        left: How many were still in the queue after a graceful stop.
        exit_code: The consumer's.
        faults: Seconds from the beginning, and what was done.
        curves: Samples of each of ``MEASURES``.
    """

    minutes: float
    broker: str
    machine: Machine
    messages: int
    handled: int
    duplicated: int
    lost: int
    left: int
    exit_code: int
    faults: Sequence[tuple[float, str]]
    curves: Mapping[str, Sequence[Point]]

    @property
    def trends(self) -> list[Trend]:
        """Whether each measure stayed flat."""
        return [trend_of(measure, self.curves[name]) for name, measure in MEASURES.items()]

    @property
    def is_well(self) -> bool:
        """Whether nothing was lost, nothing has grown, and the consumer ended as it should."""
        is_whole = self.lost == self.left == self.exit_code == 0
        return is_whole and all(trend.is_flat for trend in self.trends)


def write(soak: Soak, folder: Path) -> None:
    """Write the page's section, and the plot beside it."""
    page = folder / "reliability.md"
    page.write_text(between_marks(page.read_text(), render(soak), begin=BEGIN, end=END))
    drawn = [Curve(_named(measure), soak.curves[name]) for name, measure in MEASURES.items()]
    title = f"{soak.minutes:.0f} minutes, {len(soak.faults)} faults (marks at the foot)"
    plot = curves(title, drawn, [at for at, _ in soak.faults])
    (folder / PLOT).write_text(plot)


def render(soak: Soak) -> str:
    """What was seen, as Markdown."""
    machine = soak.machine
    kinds = Counter(name for _, name in soak.faults)
    faults = ", ".join(f"{name} ({count})" for name, count in sorted(kinds.items()))
    lines = [
        "| in the second half | median | greatest | rise | allowed | flat |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
        *(_line(trend) for trend in soak.trends),
    ]
    run = (
        f"The last run took {soak.minutes:.0f} minutes, on RabbitMQ {soak.broker}, revision"
        f" {machine.revision}, {machine.processors} processors, Python {machine.python}, with"
        f" {len(soak.faults)} faults: {faults}."
    )
    messages = (
        f"{soak.messages:,} messages were confirmed to their publisher, {soak.handled:,} of them"
        f" handled, {soak.duplicated:,} duplicated, **{soak.lost:,} lost**."
    )
    plot = f"![Memory, tasks, file descriptors and queue length over time]({PLOT})"
    return "\n\n".join([run, messages, "\n".join(lines), plot])


def _named(measure: Measure) -> str:
    return f"{measure.name}, {measure.unit}" if measure.unit else measure.name


def _line(trend: Trend) -> str:
    return (
        f"| {_named(trend.measure)} | {trend.middle:.1f} | {trend.greatest:.1f}"
        f" | {trend.rise:+.2f} | {trend.measure.allowed:g}"
        f" | {'yes' if trend.is_flat else '**no**'} |"
    )
