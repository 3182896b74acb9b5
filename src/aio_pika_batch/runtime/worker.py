"""One worker's life, epoch after epoch.

It connects, consumes until the session ends, and comes back after a pause, until it is told to
stop. A permanent refusal is fatal as long as it has never consumed: what is wrong with the
configuration must be seen at the start. Later it is retried like everything else.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any, TypeVar

from aio_pika_batch.core.retry import Backoff
from aio_pika_batch.errors import (
    BrokerUnavailable,
    ConfigurationError,
    SessionLost,
    TransportError,
)
from aio_pika_batch.logs import KeywordLogger, format_error
from aio_pika_batch.observer import Connected, Load, Lost, Observers, WorkerStarted, WorkerStopped
from aio_pika_batch.runtime.batching import BatchKey
from aio_pika_batch.runtime.breaker import PROBE, WorkerBreaker
from aio_pika_batch.runtime.consume_loop import ConsumeLoop
from aio_pika_batch.runtime.handler import Process
from aio_pika_batch.runtime.handler_slots import HandlerSlots, Shutdown, wait_until
from aio_pika_batch.runtime.publishing import ReconnectingPublisher
from aio_pika_batch.runtime.worker_config import WorkerConfig
from aio_pika_batch.status import WorkerState, WorkerStatus
from aio_pika_batch.transport import Session, Subscription, Transport

STABLE_AFTER = 10.0
"""Seconds that a session must last before its end counts as a first failure again."""

_WELL = frozenset({WorkerState.CONSUMING, WorkerState.PROBING, WorkerState.PAUSED})
"""What a worker does while nothing is wrong with it, or its way to the broker."""

_CONSUMES = frozenset({WorkerState.CONSUMING, WorkerState.PROBING})

T = TypeVar("T")


def is_being_cancelled() -> bool:
    """Whether the current task is; otherwise a cancellation is none of ours."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class _Stopped(Exception):
    """The stop came first."""


class Worker:
    """One consumer of the queue, with a connection of its own.

    Args:
        attend: Runs the user's hooks around `Epoch.consume`.

    Attributes:
        ready: Done once it has consumed for the first time; fails if it never can.
        cut_off: How many messages the drain cut off in mid-handling.
    """

    def __init__(
        self,
        index: int,
        *,
        transport: Transport,
        declare: Callable[[], Coroutine[Any, Any, None]],
        subscription: Callable[[int], Subscription],
        terms: WorkerConfig,
        backoff: Backoff,
        process: Process,
        batch_key: BatchKey | None,
        attend: Callable[[ConsumeLoop, Session, int, KeywordLogger], Awaitable[None]],
        outbox: ReconnectingPublisher,
        stop: Shutdown,
        observers: Observers,
        log: KeywordLogger,
    ) -> None:
        self._index = index
        self._transport = transport
        self._declare = declare
        self._subscription = subscription
        self._terms = terms
        self._fuse = (
            None
            if terms.breaker is None
            else WorkerBreaker(terms.breaker, terms.failure.exceptions, observers, log)
        )
        self._backoff = backoff
        self._process = process
        self._batch_key = batch_key
        self._attend = attend
        self._outbox = outbox
        self._stop = stop
        self._observers = observers
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._state = WorkerState.CONNECTING
        self._epoch: ConsumeLoop | None = None
        self._number = 0
        self._failures = 0
        self._last_error: str | None = None
        self._complaint: str | None = None
        self.hands = HandlerSlots(terms.concurrency)
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self.cut_off = 0

    @property
    def is_well(self) -> bool:
        """Whether messages come in, as far as is known, or are kept out by the breaker."""
        return self._seen_state in _WELL

    @property
    def _seen_state(self) -> WorkerState:
        """What it is doing: who was told to stop consumes no more, and drains."""
        if self._state not in _WELL:
            return self._state
        if self._stop.event.is_set():
            return WorkerState.DRAINING
        if self._fuse is not None and self._fuse.is_open:
            return WorkerState.PAUSED
        return self._state

    @property
    def oldest(self) -> float | None:
        """Seconds since its longest unsettled message arrived; None if there is none."""
        times = (self._epoch.oldest if self._epoch else None, self.hands.since)
        since = min((each for each in times if each is not None), default=None)
        return None if since is None else self._loop.time() - since

    @property
    def status(self) -> WorkerStatus:
        """A snapshot."""
        epoch = self._epoch
        return WorkerStatus(
            index=self._index,
            state=self._seen_state,
            epoch=self._number,
            buffered=epoch.buffered if epoch else 0,
            in_hand=self.hands.in_hand,
            held=epoch.held if epoch else 0,
            oldest=self.oldest,
            last_progress=self._loop.time() - epoch.last_progress if epoch else None,
            last_error=self._last_error,
        )

    def _load(self) -> Load:
        buffered = self._epoch.buffered if self._epoch else 0
        return Load(buffered, self.hands.in_hand, self._seen_state in _CONSUMES)

    async def run(self) -> None:
        """Live until told to stop.

        Raises:
            Exception: It has never consumed, and never will: the reason.
        """
        self._observers.emit(WorkerStarted(self._load))
        try:
            while not self._stop.event.is_set():
                failure: Exception | None = None
                try:
                    await self._live_through_one()
                except _Stopped:
                    break
                except asyncio.CancelledError as error:
                    if is_being_cancelled():
                        raise
                    # Somebody else's: client libraries cancel what waited for a lost connection.
                    failure = SessionLost(f"a hook was cancelled: {error!r}")
                except Exception as error:  # noqa: BLE001  -- judged below
                    failure = error
                if failure is not None:
                    self._judge(failure)
                if self._fuse is not None and self._fuse.is_open:
                    await self._rest(self._fuse)
                elif failure is not None:
                    await self._pause()
            await self._finish_handlers()
        finally:
            self._state = WorkerState.STOPPED
            self._observers.emit(WorkerStopped())
            if not self.ready.done():
                self.ready.cancel()

    async def _live_through_one(self) -> None:
        if self._state not in _WELL:
            self._state = WorkerState.CONNECTING
        # Each time, since whatever ended the last epoch may have taken the queue with it.
        await self._unless_stopped(self._declare())
        self._number += 1
        number = self._number
        async with AsyncExitStack() as stack:
            subscription, terms = self._subscription(number), self._terms
            if self._fuse is not None and self._fuse.is_probing:
                subscription = replace(subscription, prefetch=PROBE)
                terms = replace(terms, prefetch=PROBE)
            context = self._transport.session(subscription)
            session = await self._unless_stopped(stack.enter_async_context(context))
            self._epoch = epoch = ConsumeLoop(
                session,
                terms=terms,
                process=self._process,
                batch_key=self._batch_key,
                hands=self.hands,
                fuse=self._fuse,
                outbox=self._outbox,
                stop=self._stop,
                on_consuming=self._on_consuming,
                observers=self._observers,
                log=self._log.bind(epoch=number),
            )
            began = self._loop.time()
            try:
                await self._attend(epoch, session, number, self._log)
            finally:
                self.cut_off += epoch.cut_off
                if self._stop.event.is_set():
                    self._state = WorkerState.DRAINING
                elif not epoch.has_turned:
                    self._state = WorkerState.WAITING
                if self._loop.time() - began >= STABLE_AFTER:
                    self._failures = 0
            if self._stop.event.is_set() or epoch.has_turned:
                return
            if not epoch.was_consumed:
                msg = "a hook returned without consuming: _run_internal must await super()'s"
                raise ConfigurationError(msg)
            msg = "the session's hook returned before the session's end"
            raise SessionLost(msg)

    def _on_consuming(self) -> None:
        is_probing = self._fuse is not None and self._fuse.is_probing
        self._state = WorkerState.PROBING if is_probing else WorkerState.CONSUMING
        self._complaint = None
        self._log.info("consuming", epoch=self._number)
        if self._observers:
            self._observers.emit(Connected(self._number))
        if not self.ready.done():
            self.ready.set_result(None)

    async def _unless_stopped(self, work: Coroutine[Any, Any, T]) -> T:
        """Do it, but let a stop interrupt it."""
        doing = self._loop.create_task(work)
        stopping = self._loop.create_task(self._stop.event.wait())
        try:
            await asyncio.wait({doing, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if not doing.done():
                raise _Stopped
            return await doing
        finally:
            stopping.cancel()
            if not doing.done():
                doing.cancel()
                await asyncio.wait({doing})

    def _judge(self, error: Exception) -> None:
        """Fatal, or worth another attempt?"""
        passing = isinstance(error, SessionLost | BrokerUnavailable)
        if not passing and not self.ready.done():
            raise error
        text = format_error(error)
        repeated = text == self._complaint
        self._last_error = self._complaint = text
        self._failures += 1
        if self._observers:
            self._observers.emit(Lost(self._number, error))
        if repeated:
            self._log.debug("still not consuming", error=text, failures=self._failures)
        elif isinstance(error, TransportError):
            self._log.warning("not consuming", error=text)
        else:
            self._log.error("not consuming", exc_info=error, error=text)

    async def _pause(self) -> None:
        self._state = WorkerState.WAITING
        # Jitter spreads load; nobody gains by predicting it.
        await self._wait(self._backoff.pause(self._failures, random.random()))

    async def _rest(self, fuse: WorkerBreaker) -> None:
        """Let the breaker's pause go by."""
        self._state = WorkerState.PAUSED
        await self._wait(fuse.pause)
        if not self._stop.event.is_set():
            fuse.probe()

    async def _wait(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._stop.event.wait()
        except TimeoutError:
            pass

    async def _finish_handlers(self) -> None:
        """Wait for the handlers of epochs that were lost: `on_stop` may take away what they use."""
        if self.hands.tasks:
            self._state = WorkerState.DRAINING
            await wait_until(self.hands.tasks, self._stop.handle_by)
            self.cut_off += self.hands.cut()
            await wait_until(self.hands.tasks, self._stop.settle_by)
            for task in self.hands.tasks:
                task.cancel()
            await wait_until(self.hands.tasks, self._stop.deadline)
