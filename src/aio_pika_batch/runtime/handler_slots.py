"""The handler slots of one worker, including handlers of sessions that are gone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable

from aio_pika_batch.core.batcher import Batch
from aio_pika_batch.core.results import Cause
from aio_pika_batch.runtime.handler import HandlerRun


class HandlerSlots:
    """The running handlers of a worker, `concurrency` at most.

    Handlers outlive their session: one whose session is lost runs on and keeps its slot, because
    cancelling it would undo work that is about to be repeated anyway.

    Attributes:
        tasks: The tasks that run handlers or settle their results.
        on_free: Called with the batch whenever a handler has ended.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._running: dict[HandlerRun, int] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self.on_free: Callable[[Batch], None] = ignore_batch

    @property
    def is_free(self) -> bool:
        """Whether another batch can be started."""
        return len(self._running) < self._limit

    @property
    def in_hand(self) -> int:
        """The number of messages in running handlers."""
        return sum(self._running.values())

    @property
    def not_cancelled(self) -> int:
        """The number of messages in handlers that haven't been cancelled."""
        return sum(count for each, count in self._running.items() if not each.is_cancelled)

    @property
    def since(self) -> float | None:
        """When collecting the oldest running batch began, in loop time; None without one."""
        return min((run.batch.since for run in self._running), default=None)

    @property
    def keys(self) -> list[Hashable]:
        """The keys of the running batches."""
        return [each.batch.key for each in self._running if each.batch.key is not None]

    def cancel(self) -> int:
        """Cancel all handlers; return the number of messages that they were handling."""
        return sum(count for each, count in self._running.items() if each.cancel(Cause.SHUTDOWN))

    def abandon(self) -> None:
        """Cancel all tasks; the broker delivers their messages again."""
        for run in self._running:
            run.abandon()
        for task in self.tasks:
            task.cancel()

    def add(self, run: HandlerRun) -> None:
        """Occupy a slot."""
        self._running[run] = len(run.batch.messages)

    def settled_early(self, run: HandlerRun, count: int) -> None:
        """Count so many messages of a running handler as settled."""
        self._running[run] -= count

    def release(self, run: HandlerRun) -> None:
        """Free a slot."""
        del self._running[run]
        self.on_free(run.batch)


def ignore_batch(_: Batch) -> None:
    """Do nothing; stands in for `on_free` while no session waits for a free slot."""
