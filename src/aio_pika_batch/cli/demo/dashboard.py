"""Draws the statistics in a terminal: one panel for each stage, as wide as the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from aio_pika_batch.cli.demo.stats import PipelineStats, StageStats
from aio_pika_batch.status import ConsumerStatus, WorkerState, WorkerStatus

_BARS = " ▁▂▃▄▅▆▇█"
_STATES = {
    WorkerState.CONNECTING: "yellow",
    WorkerState.CONSUMING: "green",
    WorkerState.WAITING: "yellow",
    WorkerState.PAUSED: "yellow",
    WorkerState.PROBING: "yellow",
    WorkerState.DRAINING: "cyan",
    WorkerState.STOPPED: "dim",
}
_RESULTS = {
    "ACK": "green",
    "NACK": "red",
    "REQUEUE": "yellow",
    "REQUEUE_IMMEDIATE": "yellow",
    "returned": "dim",
}
NARROW = 100
"""Below this number of columns, the stages are stacked."""


def sparkline(counts: Sequence[int]) -> str:
    """Return counts as a row of bars, scaled to the highest."""
    top = max(counts, default=0)
    if not top:
        return " " * len(counts)
    heights = [math.ceil(count * (len(_BARS) - 1) / top) for count in counts]
    return "".join(_BARS[height] for height in heights)


def describe_activity(worker: WorkerStatus) -> str:
    """Return in a word or two what a worker is doing."""
    if worker.state is not WorkerState.CONSUMING:
        return str(worker.state.value)
    if worker.in_hand:
        return f"handling {worker.in_hand}"
    if worker.held:
        return f"holding {worker.held}"
    if worker.buffered:
        return f"collecting {worker.buffered}"
    return "idle"


@dataclass(frozen=True, slots=True)
class Dashboard:
    """The dashboard: shows the statistics at the time when it is drawn.

    Attributes:
        limits: `batch_size` of each stage, by the consumer's class name.
        statuses: Status of each stage, by the consumer's class name.
        footer: Text of the bottom line.
    """

    title: str
    stats: PipelineStats
    limits: Mapping[str, int]
    statuses: Mapping[str, ConsumerStatus]
    footer: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        del console
        width = options.max_width
        stages = Table.grid(expand=True)
        drawn = [self._stage(name, limit) for name, limit in self.limits.items()]
        if width < NARROW:
            for stage in drawn:
                stages.add_row(stage)
        else:
            for _ in drawn:
                stages.add_column(ratio=1)
            stages.add_row(*drawn)
        yield Panel(
            Group(stages, self._totals()),
            title=Text(self.title, style="bold"),
            subtitle=Text(self.footer, style="dim"),
            width=width,
            padding=0,
            border_style="blue",
        )

    def _stage(self, name: str, limit: int) -> Panel:
        stage = self.stats.stage(name)
        past = stage.rate.past(self.stats.now, 30)
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column(style="dim", width=8, no_wrap=True)
        table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        now = past[-1] if past else 0
        table.add_row(
            "rate", Text().append(f"{now:>6,}/s ", "bold").append(sparkline(past), "green")
        )
        table.add_row("batches", self._batches(stage, limit))
        table.add_row("triggers", _counted(stage.triggers, {}))
        table.add_row("results", _counted(stage.settled, _RESULTS))
        table.add_row("retries", Text(f"{stage.retries:,}"))
        table.add_row("dead", _counted(stage.dead, {}, "red"))
        status = self.statuses.get(name)
        for worker in status.workers if status else ():
            table.add_row(f"worker {worker.index}", _worker(worker))
        return Panel(table, title=name, title_align="left", border_style="dim")

    @staticmethod
    def _batches(stage: StageStats, limit: int) -> Text:
        full = min(10, round(stage.batch_size / limit * 10))
        text = Text().append("█" * full, "blue").append("░" * (10 - full), "dim")
        return text.append(f" {stage.batch_size:.0f} of {limit}")

    def _totals(self) -> Text:
        text = Text(" ")
        text.append("latency ", "dim")
        latency = self.stats.latency
        if latency is None:
            text.append("none yet")
        else:
            text.append(
                f"median {latency.median * 1000:.0f} ms, 95 % {latency.p95 * 1000:.0f} ms,"
                f" worst {latency.worst:.2f} s"
            )
        lost = self.stats.lost_connections
        return text.append("   connections lost ", "dim").append(str(lost))


def _worker(worker: WorkerStatus) -> Text:
    text = Text().append("● ", _STATES[worker.state]).append(describe_activity(worker))
    if worker.epoch > 1:
        text.append(f"  session {worker.epoch}", "dim")
    return text


def _counted(counts: Mapping[str, int], styles: Mapping[str, str], style: str = "") -> Text:
    if not counts:
        return Text("none", "dim")
    text = Text()
    for name, count in sorted(counts.items(), key=lambda each: -each[1]):
        text.append(f"{count:,} ", "bold").append(f"{name}  ", styles.get(name, style))
    text.rstrip()
    return text
