"""Who is busy, and has anybody said stop?

A worker's handlers outlive its epochs: one that was handed a batch of a lost session runs on, and
its slot is taken until it is done.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Hashable, Iterable
from typing import Any, TypeAlias

from aio_pika_batch.core.batcher import Batch
from aio_pika_batch.core.results import Cause
from aio_pika_batch.runtime.handler import HandlerRun

Wait: TypeAlias = Callable[[Iterable[asyncio.Future[Any]]], Awaitable[None]]
"""Waits for all of these, as long as the caller has patience."""


class Shutdown:
    """Whether and by when a consumer shall have stopped.

    Attributes:
        event: Set once it shall stop.
        deadline: When the drain must be over, in loop time.
    """

    def __init__(self) -> None:
        self.event = asyncio.Event()
        self.deadline = math.inf
        self._reserve = 0.0

    def request(self, deadline: float, *, reserve: float) -> None:
        """Stop, in this order: handlers, settlements, connections.

        Args:
            deadline: When all must be over, in loop time.
            reserve: Seconds to keep for the settlements, and as many for the connections.
        """
        self.deadline = deadline
        self._reserve = reserve
        self.event.set()

    @property
    def handle_by(self) -> float:
        """When handlers must be done, in loop time."""
        return self.deadline - 2 * self._reserve

    @property
    def settle_by(self) -> float:
        """When the broker must have been told, in loop time."""
        return self.deadline - self._reserve

    async def outlast(
        self,
        tasks: Iterable[asyncio.Future[Any]],
        by: Callable[[], float],
        *,
        unless: asyncio.Future[Any],
    ) -> None:
        """Wait for all of these: as long as it takes, but once a stop is requested not beyond `by`.

        Args:
            by: `handle_by` or `settle_by`, asked for when there is a stop.
            unless: Before a stop, its end is the end of the wait, too.
        """
        pending = {task for task in tasks if not task.done()}
        if pending and not self.event.is_set():
            done = asyncio.ensure_future(asyncio.wait(pending))
            stopping = asyncio.ensure_future(self.event.wait())
            enough: set[asyncio.Future[Any]] = {done, stopping, unless}
            try:
                await asyncio.wait(enough, return_when=asyncio.FIRST_COMPLETED)
            finally:
                done.cancel()
                stopping.cancel()
        if self.event.is_set():
            await wait_until(pending, by())


class HandlerSlots:
    """A worker's handlers at work, of this epoch and of those before it.

    Attributes:
        on_free: Called whenever one is done, with its batch.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._busy: dict[HandlerRun, int] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self.on_free: Callable[[Batch], None] = nobody_waits

    @property
    def is_free(self) -> bool:
        """Whether another batch can be taken."""
        return len(self._busy) < self._limit

    @property
    def in_hand(self) -> int:
        """How many messages are being handled."""
        return sum(self._busy.values())

    @property
    def uncut(self) -> int:
        """How many messages are in the hands of handlers that were not cut off."""
        return sum(count for each, count in self._busy.items() if not each.is_cut)

    @property
    def since(self) -> float | None:
        """When the oldest batch at work began to be collected; None if there is none."""
        return min((handling.batch.since for handling in self._busy), default=None)

    @property
    def keys(self) -> list[Hashable]:
        """The keys of the batches at work."""
        return [each.batch.key for each in self._busy if each.batch.key is not None]

    def cut(self) -> int:
        """Cut all of them off; returns how many messages those were handling."""
        return sum(count for each, count in self._busy.items() if each.cut(Cause.SHUTDOWN))

    def take(self, handling: HandlerRun) -> None:
        """Enter a batch."""
        self._busy[handling] = len(handling.batch.messages)

    def settled(self, handling: HandlerRun, count: int) -> None:
        """So many of its messages are in nobody's hands any more; its handler goes on."""
        self._busy[handling] -= count

    def release(self, handling: HandlerRun) -> None:
        """Strike it off."""
        del self._busy[handling]
        self.on_free(handling.batch)


async def wait_until(tasks: Iterable[asyncio.Future[Any]], deadline: float) -> None:
    """Wait for all of these, but not beyond a moment in loop time."""
    pending = {task for task in tasks if not task.done()}
    if pending:
        left = deadline - asyncio.get_running_loop().time()
        await asyncio.wait(pending, timeout=None if math.isinf(left) else max(0.0, left))


def nobody_waits(_: Batch) -> None:
    """What is called when a hand is free, and nobody has anything for it."""
