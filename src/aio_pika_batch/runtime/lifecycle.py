"""Who may begin a consumer's life, who may end it, and who waits for whom?

One life, shared by all instances of a consumer: whichever of them a handler runs on, its `stop` is
the consumer's. Users' code may ask for the end from wherever it is called, and must not be waited
for by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar

from aio_pika_batch.errors import DrainIncomplete, StartInterrupted
from aio_pika_batch.logs import KeywordLogger
from aio_pika_batch.runtime.worker_pool import WorkerInstance, WorkerPool

RESERVE = 1.5
"""Seconds of a drain that are kept for settlements, and as many again for closing connections."""

Hook = Callable[[], Awaitable[None]]


class Lifecycle:
    """From a start to the end of its drain, and again.

    Attributes:
        crew: Those who work; None before a start and after the end.
    """

    def __init__(self, log: KeywordLogger) -> None:
        self._log = log
        self._timeout = 0.0
        self._on_stop: Hook | None = None
        self._begun = asyncio.Event()
        self._starter: asyncio.Task[object] | None = None
        self._limit: asyncio.Timeout | None = None
        self._drain: asyncio.Task[DrainIncomplete | None] | None = None
        self.crew: WorkerPool | None = None

    async def begin(
        self,
        crew: WorkerPool,
        *,
        on_start: Hook,
        on_stop: Hook,
        seats: Callable[[], Sequence[WorkerInstance]],
        timeout: float,
    ) -> None:
        """Run `on_start`, and let the crew work.

        Args:
            crew: Of this life only.
            on_start: Cut off if it takes too long after a stop.
            on_stop: Run at the end, if `on_start` has finished.
            seats: Called after `on_start`.
            timeout: Seconds that the drain may take.

        Raises:
            StartInterrupted: A stop came first.
            Exception: Whatever else keeps it from working.
        """
        self.crew = crew
        self._timeout = timeout
        self._on_stop = None
        self._begun = asyncio.Event()
        self._drain = None
        try:
            await self._start_up(on_start)
            self._on_stop = on_stop
            inside = _INSIDE.set(self)
            try:
                await crew.start(seats())
            finally:
                _INSIDE.reset(inside)
        except BaseException:
            self._begun.set()
            self.request_stop()
            await self.drained()
            raise
        self._begun.set()

    async def _start_up(self, on_start: Hook) -> None:
        self._starter = asyncio.current_task()
        try:
            if not await self._in_time(on_start):
                msg = "stopped while on_start was running, and it took too long to end"
                raise StartInterrupted(msg)
        finally:
            self._starter = None

    def request_stop(self) -> None:
        """Begin to drain, without waiting for it."""
        crew = self.crew
        if crew is None or crew.stop.event.is_set():
            return
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout
        crew.stop.request(deadline, reserve=min(RESERVE, self._timeout / 10))
        self._log.info("draining", within=f"{self._timeout} s")
        self._cut_by(deadline)
        self._drain = loop.create_task(self._finish(crew))

    def abandon(self) -> None:
        """Give up the drain, or begin one that is given up at once."""
        self.request_stop()
        if self.crew is not None:
            self._log.warning("the drain is abandoned")
            self.crew.abandon()
            self._cut_by(asyncio.get_running_loop().time())

    async def stop(self) -> None:
        """Drain; whoever is part of what is waited for does not wait."""
        self.request_stop()
        is_inside = _INSIDE.get() is self or asyncio.current_task() is self._starter
        if self.crew is not None and not is_inside:
            await self.drained()

    async def drained(self) -> DrainIncomplete | None:
        """Wait for the end; returns what is to be complained of."""
        return None if self._drain is None else await asyncio.shield(self._drain)

    async def _finish(self, crew: WorkerPool) -> DrainIncomplete | None:
        _INSIDE.set(self)
        try:
            await self._begun.wait()
            incomplete = await crew.finish()
            if self._on_stop is not None:
                loop = asyncio.get_running_loop()
                by = max(crew.stop.deadline, loop.time() + RESERVE)
                if not await self._in_time(self._on_stop, by):
                    self._log.error("on_stop took too long, and was cut off")
                    incomplete = incomplete or DrainIncomplete("on_stop was cut off")
        finally:
            await crew.close()
            self.crew = None
            self._log.info("stopped")
        return incomplete

    async def _in_time(self, hook: Hook, deadline: float | None = None) -> bool:
        """Run a hook, unless `_cut_by` cuts it off; returns whether it has finished."""
        try:
            async with asyncio.timeout_at(deadline) as limit:
                self._limit = limit
                await hook()
        except TimeoutError:
            if not limit.expired():
                raise
            return False
        finally:
            self._limit = None
        return True

    def _cut_by(self, deadline: float) -> None:
        if self._limit is not None:
            self._limit.reschedule(deadline)


_INSIDE: ContextVar[Lifecycle | None] = ContextVar("aio_pika_batch_inside", default=None)
"""Whose hooks and handlers are running; tasks that they start are part of them."""
