"""How do the figures look in a terminal?

One panel for each stage of the pipeline, and one for the whole; as wide as the terminal is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from aio_pika_batch.cli.demo.figures import Figures, Stage
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
"""Columns below which the stages stand one below the other."""


def sparkline(counts: Sequence[int]) -> str:
    """Draw counts as a row of bars, the highest of them full."""
    top = max(counts, default=0)
    if not top:
        return " " * len(counts)
    heights = [math.ceil(count * (len(_BARS) - 1) / top) for count in counts]
    return "".join(_BARS[height] for height in heights)


def what_it_does(worker: WorkerStatus) -> str:
    """Say in a word what a worker is doing."""
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
    """The figures as they are when it is drawn.

    Attributes:
        limits: `batch_size` of each stage, by its consumer's class.
        statuses: How each consumer is.
        foot: What is told below.
    """

    title: str
    figures: Figures
    limits: Mapping[str, int]
    statuses: Mapping[str, ConsumerStatus]
    foot: str

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
            Group(stages, self._whole()),
            title=Text(self.title, style="bold"),
            subtitle=Text(self.foot, style="dim"),
            width=width,
            padding=0,
            border_style="blue",
        )

    def _stage(self, name: str, limit: int) -> Panel:
        figures = self.figures
        stage = figures.stage(name)
        past = stage.rate.past(figures.now, 30)
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column(style="dim", width=8, no_wrap=True)
        table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        now = past[-1] if past else 0
        table.add_row(
            "rate", Text().append(f"{now:>6,}/s ", "bold").append(sparkline(past), "green")
        )
        table.add_row("batches", self._batches(stage, limit))
        table.add_row("cut by", _counted(stage.triggers, {}))
        table.add_row("results", _counted(stage.settled, _RESULTS))
        table.add_row("retries", Text(f"{stage.retries:,}"))
        table.add_row("dead", _counted(stage.dead, {}, "red"))
        status = self.statuses.get(name)
        for worker in status.workers if status else ():
            table.add_row(f"worker {worker.index}", _worker(worker))
        return Panel(table, title=name, title_align="left", border_style="dim")

    @staticmethod
    def _batches(stage: Stage, limit: int) -> Text:
        full = min(10, round(stage.fill / limit * 10))
        text = Text().append("█" * full, "blue").append("░" * (10 - full), "dim")
        return text.append(f" {stage.fill:.0f} of {limit}")

    def _whole(self) -> Text:
        figures = self.figures
        text = Text(" ")
        text.append("latency ", "dim")
        latency = figures.latency
        if latency is None:
            text.append("not yet")
        else:
            text.append(
                f"median {latency.median * 1000:.0f} ms, 95 % {latency.p95 * 1000:.0f} ms,"
                f" worst {latency.worst:.2f} s"
            )
        losses = sum(stage.losses for stage in figures.stages.values())
        return text.append("   connections lost ", "dim").append(str(losses))


def _worker(worker: WorkerStatus) -> Text:
    text = Text().append("● ", _STATES[worker.state]).append(what_it_does(worker))
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
