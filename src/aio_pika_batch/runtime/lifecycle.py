"""Starts and stops a consumer: hooks, the drain, and who waits for whom.

All instances of a consumer share one lifecycle: a handler that calls `stop` on its own instance
stops the whole consumer. A hook or handler that asks for the stop doesn't wait for it, because the
drain waits for the hook or handler.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from typing import TypeAlias

from aio_pika_batch.errors import AioPikaBatchError, DrainIncomplete, StartInterrupted
from aio_pika_batch.logs import KeywordLogger
from aio_pika_batch.runtime.consume_loop import WorkerInstance
from aio_pika_batch.runtime.worker_pool import WorkerPool

RESERVE = 1.5
"""Seconds of a drain that are kept for settlements, and as many again for closing connections."""

Hook: TypeAlias = Callable[[], Awaitable[None]]


class Lifecycle:
    """From a start to the end of its drain, any number of times.

    Attributes:
        pool: The running workers; None before a start and after the drain.
    """

    def __init__(self, log: KeywordLogger) -> None:
        self._log = log
        self._timeout = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_stop: Hook | None = None
        self._has_begun = asyncio.Event()
        self._starter: asyncio.Task[object] | None = None
        self._hook_limit: asyncio.Timeout | None = None
        self._drain: asyncio.Task[AioPikaBatchError | None] | None = None
        self.pool: WorkerPool | None = None

    async def begin(
        self,
        pool: WorkerPool,
        *,
        on_start: Hook,
        on_stop: Hook,
        instances: Callable[[], Sequence[WorkerInstance]],
        timeout: float,
        patience: float | None = None,
    ) -> None:
        """Run `on_start`, then start the pool.

        Args:
            pool: A new pool.
            on_start: Cut off if it takes too long after a stop was requested.
            on_stop: Runs at the end, if `on_start` has finished.
            instances: Called after `on_start`.
            timeout: Seconds that the drain may take.
            patience: Seconds to wait for the workers if the broker is away; None for no limit.

        Raises:
            StartInterrupted: A stop was requested first.
            Exception: Whatever else prevents the start.
        """
        self.pool = pool
        self._loop = asyncio.get_running_loop()
        pool.check.on_mistake = self.request_stop
        self._timeout = timeout
        self._on_stop = None
        self._has_begun = asyncio.Event()
        self._drain = None
        try:
            await self._run_on_start(on_start)
            self._on_stop = on_stop
            inside = _INSIDE.set(self)
            try:
                await pool.start(instances(), patience=patience)
            finally:
                _INSIDE.reset(inside)
        # Also after a cancellation: what has been started must not run on without an owner.
        except BaseException:
            self._has_begun.set()
            self.request_stop()
            await self.drained()
            # Like a mistake that is found after the start, it is logged, and `run` raises it.
            if pool.check.mistake is None:
                raise
        self._has_begun.set()

    async def _run_on_start(self, on_start: Hook) -> None:
        self._starter = asyncio.current_task()
        try:
            if not await self._run_hook(on_start):
                msg = "stopped while on_start was running, and it took too long to end"
                raise StartInterrupted(msg)
        finally:
            self._starter = None

    def request_stop(self) -> None:
        """Begin to drain, without waiting for it."""
        pool, loop = self.pool, self._loop
        if pool is None or loop is None or pool.shutdown.is_requested:
            return
        if asyncio._get_running_loop() is not loop:  # noqa: SLF001  -- None outside of loops
            # Called by another thread, or between two steps of the loop.
            loop.call_soon_threadsafe(self.request_stop)
            return
        deadline = loop.time() + self._timeout
        pool.shutdown.request(deadline, reserve=min(RESERVE, self._timeout / 10))
        self._log.info("draining", within=f"{self._timeout} s")
        self._limit_hook(deadline)
        self._drain = loop.create_task(self._finish(pool))

    def abandon(self) -> None:
        """Give up the drain, or begin one that is given up at once."""
        self.request_stop()
        if self.pool is not None:
            self._log.warning("the drain is abandoned")
            self.pool.abandon()
            self._limit_hook(asyncio.get_running_loop().time())

    async def stop(self) -> None:
        """Drain, and wait for it unless the drain waits for the caller."""
        loop = self._loop
        if self.pool is not None and loop is not None and asyncio.get_running_loop() is not loop:
            # Called in another thread: what the drain waits for belongs to the consumer's loop.
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self.stop(), loop))
            return
        self.request_stop()
        is_inside = _INSIDE.get() is self or asyncio.current_task() is self._starter
        if self.pool is not None and not is_inside:
            await self.drained()

    async def drained(self) -> AioPikaBatchError | None:
        """Wait for the end; return a mistake of the handler, or what the drain left unfinished."""
        # Several callers may wait for the same drain, and each of them may be cancelled.
        return None if self._drain is None else await asyncio.shield(self._drain)

    async def _finish(self, pool: WorkerPool) -> AioPikaBatchError | None:
        _INSIDE.set(self)
        try:
            # A stop during the start: workers that are still being started would be missed.
            await self._has_begun.wait()
            incomplete = await pool.finish()
            if self._on_stop is not None:
                loop = asyncio.get_running_loop()
                # Handlers may have used up all of the time; a hook that closes a pool needs some,
                # too.
                by = max(pool.shutdown.deadline, loop.time() + RESERVE)
                if not await self._run_hook(self._on_stop, by):
                    self._log.error("on_stop took too long, and was cut off")
                    incomplete = incomplete or DrainIncomplete("on_stop was cut off")
        finally:
            await pool.close()
            self.pool = None
            self._log.info("stopped")
        return pool.check.mistake or incomplete

    async def _run_hook(self, hook: Hook, deadline: float | None = None) -> bool:
        """Run a hook, unless `_limit_hook` cuts it off; return whether it has finished."""
        try:
            async with asyncio.timeout_at(deadline) as limit:
                self._hook_limit = limit
                await hook()
        except TimeoutError:
            if not limit.expired():
                raise
            return False
        finally:
            self._hook_limit = None
        return True

    def _limit_hook(self, deadline: float) -> None:
        if self._hook_limit is not None:
            self._hook_limit.reschedule(deadline)


_INSIDE: ContextVar[Lifecycle | None] = ContextVar("aio_pika_batch_inside", default=None)
"""The consumer whose hooks and handlers are running, also for tasks that they start."""
