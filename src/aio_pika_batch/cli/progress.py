"""How is it told how far a replay has got, and what has become of it?"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from aio_pika_batch.cli.exits import Exit
from aio_pika_batch.cli.places import interruptible
from aio_pika_batch.cli.printing import complain, console
from aio_pika_batch.dead_letters import Report
from aio_pika_batch.errors import TransportError

_TOLD_EACH = 1.0
"""Seconds between two lines of progress in a pipe."""


def with_progress(
    verb: str,
    work: Callable[[asyncio.Event, Callable[[Report], None]], Coroutine[Any, Any, Report]],
) -> int:
    """Do it, tell how far it has got, and in the end what has become of it.

    Args:
        verb: What happens to letters, as "replayed".
    """
    out = console()
    last: list[Report] = []
    with _Bar(out, verb) as bar:

        def told(report: Report) -> None:
            last[:] = [report]
            bar.told(report)

        try:
            report = interruptible(lambda stop: work(stop, told))
        except TransportError:
            for each in last:
                complain(f"{each.done} {verb}, and then:")
            raise
    total = "" if report.ready is None else f" of {report.ready}"
    failed = sum(report.failed.values())
    out.print(
        f"{report.done}{total} letters {verb}; {report.kept} not meant, {failed} failed",
        markup=False,
    )
    for why, count in report.failed.items():
        complain(f"{count} stay in {report.queue}: {why}")
    if report.ended is not None:
        complain(f"{report.queue}: ended early: {report.ended}")
    if report.ended == "interrupted":
        return Exit.INTERRUPTED
    return Exit.FAILED if failed or report.ended is not None else Exit.OK


class _Bar:
    """A bar on a terminal, a line now and then in a pipe."""

    def __init__(self, out: Console, verb: str) -> None:
        self._out = out
        self._verb = verb
        self._said = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            console=out,
            disable=not out.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task(verb, total=None)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def told(self, report: Report) -> None:
        """It has got so far."""
        self._bar.update(self._task, completed=report.done, total=report.ready)
        if not self._out.is_terminal and time.monotonic() - self._said >= _TOLD_EACH:
            self._said = time.monotonic()
            self._out.print(f"{report.done} {self._verb}, {report.seen} looked at …", markup=False)
