"""The command `demo`: runs the pipeline, shows its progress, and checks the counts at the end."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from aio_pika_batch.cli.app import Exit, Flag, run_interruptible
from aio_pika_batch.cli.demo.orders import PipelineStats, StageStats
from aio_pika_batch.cli.demo.pipeline import DRAIN_TIMEOUT, DemoOptions, Orders, Pipeline
from aio_pika_batch.errors import BrokerUnavailable, ConfigurationError
from aio_pika_batch.masking import mask_url
from aio_pika_batch.status import ConsumerStatus, WorkerState, WorkerStatus
from aio_pika_batch.transport import scheme_of

START_TIMEOUT = 10.0
"""Seconds within which all consumers must have started."""

PICTURE_WIDTH = 110


def demo(
    *,
    url: str = "memory://demo",
    plain: Flag = False,
    save_svg: Annotated[Path | None, Parameter(show=False)] = None,
    options: DemoOptions | None = None,
) -> int:
    """Run a pipeline of two consumers under load, with live statistics.

    Args:
        url: Broker URL; by default a broker in memory.
        plain: Print a line per second instead of a dashboard, as in a pipe.
        save_svg: Save a picture of the dashboard here.
        options: The load and the pipeline.
    """
    options = options or DemoOptions()
    check_options(url, options)
    # The queue of dead letters has no dead-letter exchange, and --chaos cuts connections: the
    # warnings about both would disturb the dashboard.
    logging.disable(logging.CRITICAL)
    pipeline = Pipeline(url, options)
    # The first Ctrl-C ends publishing, so that the summary follows. The second ends it all.
    return run_interruptible(_run(pipeline, is_plain=plain, save_svg=save_svg), pipeline.stop)


def check_options(url: str, options: DemoOptions) -> None:
    """Check the options.

    Raises:
        ConfigurationError: One of them is invalid.
    """
    if options.chaos and scheme_of(url) != "memory":
        raise ConfigurationError("--chaos: works on memory:// only; leave out --url")
    for name in ("rate", "seconds", "batch_size", "workers"):
        value = getattr(options, name)
        if value <= 0:
            option = name.replace("_", "-")
            raise ConfigurationError(f"--{option}: must be greater than 0, not {value}")


async def _run(pipeline: Pipeline, *, is_plain: bool, save_svg: Path | None) -> Exit:
    console = Console()
    async with AsyncExitStack() as stack:
        if scheme_of(pipeline.url) != "memory":
            print(f"Connecting to {mask_url(pipeline.url)} …", flush=True)
        try:
            async with asyncio.timeout(START_TIMEOUT):
                await pipeline.start(stack)
        except TimeoutError as error:
            url = mask_url(pipeline.url)
            msg = f"{url} could not be reached within {START_TIMEOUT:g} s; check --url"
            raise BrokerUnavailable(msg) from error
        if console.is_terminal and not is_plain:
            # Its last state stays on the terminal.
            draw = partial(dashboard, pipeline)
            stack.enter_context(Live(get_renderable=draw, console=console, refresh_per_second=8))
        else:
            await stack.enter_async_context(_lines(pipeline))
        await pipeline.publish()
        # While the last orders are still in the pipeline, so that the picture shows activity.
        if save_svg is not None:
            _save(dashboard(pipeline), save_svg)
        in_time = await pipeline.wait_finished()
    checks = pipeline.check_counts()
    is_ok = all(each.is_ok for each in checks)
    print("\nWhat was published, and what happened to it:")
    for each in checks:
        print(f"  {each}")
    print("All orders are accounted for." if is_ok else "Some orders are NOT accounted for.")
    if not in_time:
        print(f"Not finished {DRAIN_TIMEOUT:g} s after the last order.", file=sys.stderr)
    return Exit.OK if is_ok and in_time else Exit.FAILED


def dashboard(pipeline: Pipeline) -> Dashboard:
    """Return the dashboard of a pipeline as of now."""
    return Dashboard(
        f"aio-pika-batch on {mask_url(pipeline.url)}",
        pipeline.stats,
        {type(each).__name__: each.settings.batch_size for each in pipeline.stages},
        pipeline.statuses(),
        f"{pipeline.stats.elapsed:.0f} s, {pipeline.published:,} orders published,"
        f" {pipeline.finished:,} finished",
    )


@asynccontextmanager
async def _lines(pipeline: Pipeline) -> AsyncIterator[None]:
    """Print a line per second."""
    options = pipeline.options
    print(
        f"Publishing {options.rate:,} orders per second for {options.seconds:g} s to"
        f" {mask_url(pipeline.url)}.\nGood orders become invoices, the others dead letters.",
        flush=True,
    )
    printing = asyncio.ensure_future(_print_lines(pipeline))
    try:
        yield
    finally:
        printing.cancel()
        await asyncio.wait({printing})


async def _print_lines(pipeline: Pipeline) -> None:
    while True:
        await asyncio.sleep(1)
        stats = pipeline.stats
        orders = stats.stage(Orders.__name__)
        [rate] = orders.rate.past(stats.now, 1)
        latency = stats.latency
        print(
            f"{stats.elapsed:4.0f} s  {pipeline.published:>7,} published"
            f"  {pipeline.finished:>7,} finished  {rate:>6,}/s  batches of {orders.batch_size:.0f}"
            f"  retries {orders.retries:,}  dead letters {orders.dead.total():,}"
            f"  lost connections {orders.lost_connections}"
            + (f"  latency {latency.median * 1000:.0f} ms" if latency else ""),
            flush=True,
        )


def _save(drawing: Dashboard, path: Path) -> None:
    """Save a picture of the dashboard as SVG."""
    console = Console(record=True, width=PICTURE_WIDTH, file=StringIO(), force_terminal=True)
    console.print(drawing)
    picture = console.export_svg(title="aio-pika-batch demo")
    # Rich's template loads a font from the web. Any font of fixed width will do.
    picture = re.sub(r"@font-face\s*{.*?}\s*", "", picture, flags=re.DOTALL)
    path.write_text(picture.replace("Fira Code", "DejaVu Sans Mono"))


# --- the dashboard ---------------------------------------------------------------

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
