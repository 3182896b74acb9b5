"""Where do the figures go while it runs: a dashboard, or a line a second?"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from io import StringIO
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.live import Live

from aio_pika_batch.cli.demo.dashboard import Dashboard
from aio_pika_batch.cli.demo.load import Orders
from aio_pika_batch.cli.demo.pipeline import Pipeline
from aio_pika_batch.masking import mask_url

PICTURE_WIDTH = 110


def dashboard(pipeline: Pipeline) -> Dashboard:
    """Draw a pipeline as it is now."""
    return Dashboard(
        f"aio-pika-batch on {mask_url(pipeline.url)}",
        pipeline.figures,
        {type(each).__name__: each.settings.batch_size for each in pipeline.stages},
        pipeline.statuses(),
        f"{pipeline.figures.elapsed:.0f} s, {pipeline.came:,} orders in,"
        f" {pipeline.ended:,} at their end",
    )


@asynccontextmanager
async def live(pipeline: Pipeline, console: Console) -> AsyncIterator[None]:
    """Keep a dashboard up to date; its last state stays on the terminal."""
    with Live(get_renderable=lambda: dashboard(pipeline), console=console, refresh_per_second=8):
        yield


@asynccontextmanager
async def lines(pipeline: Pipeline) -> AsyncIterator[None]:
    """Print a line a second."""
    print(f"a pipeline on {mask_url(pipeline.url)}", flush=True)
    printing = asyncio.ensure_future(_print_lines(pipeline))
    try:
        yield
    finally:
        printing.cancel()
        await asyncio.wait({printing})


async def _print_lines(pipeline: Pipeline) -> None:
    while True:
        await asyncio.sleep(1)
        figures = pipeline.figures
        orders = figures.stage(Orders.__name__)
        [rate] = orders.rate.past(figures.now, 1)
        latency = figures.latency
        print(
            f"{figures.elapsed:4.0f} s  {pipeline.came:>7,} in  {pipeline.ended:>7,} at their end"
            f"  {rate:>6,}/s  fill {orders.fill:.0f}  retries {orders.retries:,}"
            f"  dead {orders.dead.total():,}  lost connections {orders.losses}"
            + (f"  latency {latency.median * 1000:.0f} ms" if latency else ""),
            flush=True,
        )


def save(drawing: Dashboard, path: Path) -> None:
    """Keep a picture of the dashboard. It asks nobody for a font: any with fixed widths will do."""
    console = Console(record=True, width=PICTURE_WIDTH, file=StringIO(), force_terminal=True)
    console.print(drawing)
    font = re.compile(r"@font-face\s*{{.*?}}\s*", re.DOTALL)
    code_format = font.sub("", CONSOLE_SVG_FORMAT).replace("Fira Code", "DejaVu Sans Mono")
    path.write_text(console.export_svg(title="aio-pika-batch demo", code_format=code_format))
