"""Does it do what it says, and how does that look?

A load through a pipeline of consumers, on a broker in memory or on a real one; at the end the books
are balanced.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.console import Console

from aio_pika_batch.cli.demo.pipeline import PATIENCE, Load, Pipeline
from aio_pika_batch.cli.demo.show import dashboard, lines, live, save
from aio_pika_batch.cli.exits import Exit
from aio_pika_batch.errors import BrokerUnavailable, ConfigurationError
from aio_pika_batch.masking import mask_url
from aio_pika_batch.transport import scheme_of

START = 10.0
"""Seconds in which all consumers must have started."""


def demo(
    *,
    url: str = "memory://demo",
    plain: Annotated[bool, Parameter(negative="")] = False,
    save_svg: Annotated[Path | None, Parameter(show=False)] = None,
    load: Load | None = None,
) -> int:
    """Watch a load go through a pipeline of consumers, and the books balance at its end.

    Args:
        url: The broker; by default one in memory, within this process.
        plain: A line a second instead of a dashboard; so it is where the output is no terminal.
        save_svg: Where a picture of the dashboard goes.
        load: What goes through.
    """
    load = load or Load()
    check(url, load)
    # The dead letters' own queue has no dead-letter exchange, and needs no warning about it; nor
    # does a connection that is cut on purpose. What matters is on the board.
    logging.disable(logging.CRITICAL)
    return asyncio.run(_run(Pipeline(url, load), is_plain=plain, save_svg=save_svg))


def check(url: str, load: Load) -> None:
    """See whether such a load can be run.

    Raises:
        ConfigurationError: It cannot.
    """
    if load.chaos and scheme_of(url) != "memory":
        raise ConfigurationError("--chaos: only a broker in memory can be cut; leave out --url")
    for name in ("rate", "seconds", "batch_size", "workers"):
        if getattr(load, name) <= 0:
            option = name.replace("_", "-")
            raise ConfigurationError(f"--{option}: must be more than 0, not {getattr(load, name)}")


async def _run(pipeline: Pipeline, *, is_plain: bool, save_svg: Path | None) -> Exit:
    console = Console()
    async with AsyncExitStack() as stack:
        try:
            async with asyncio.timeout(START):
                await pipeline.start(stack)
        except TimeoutError as error:
            msg = f"{mask_url(pipeline.url)} could not be reached within {START:g} s"
            raise BrokerUnavailable(msg) from error
        is_live = console.is_terminal and not is_plain
        async with live(pipeline, console) if is_live else lines(pipeline):
            await pipeline.publish()
            if save_svg is not None:
                save(dashboard(pipeline), save_svg)
            in_time = await pipeline.drained()
    rows = pipeline.books()
    print()
    for row in rows:
        print(f"  {row}")
    is_balanced = all(row.is_balanced for row in rows)
    print("It adds up." if is_balanced else "It does NOT add up.")
    if not in_time:
        print(f"Not done {PATIENCE:g} s after the last order.", file=sys.stderr)
    return Exit.OK if is_balanced and in_time else Exit.FAILED
