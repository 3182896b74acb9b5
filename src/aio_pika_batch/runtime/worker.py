"""Runs one worker: session after session, with backoff between them, until it is stopped.

A permanent refusal ends a worker that has never consumed, because a wrong configuration should be
seen at the start. Later it is retried like every other failure.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any, TypeVar

from aio_pika_batch.core.circuit_breaker import BreakerState, CircuitBreaker
from aio_pika_batch.errors import (
    BrokerUnavailable,
    ConfigurationError,
    SessionLost,
    TransportError,
)
from aio_pika_batch.logs import KeywordLogger, format_error
from aio_pika_batch.observer import (
    BreakerClosed,
    BreakerOpened,
    BreakerProbing,
    Connected,
    Load,
    Lost,
    Observers,
    WorkerStarted,
    WorkerStopped,
)
from aio_pika_batch.runtime.consume_loop import ConsumeLoop, WorkerInstance, WorkerResources
from aio_pika_batch.runtime.handler import HandlerSlots
from aio_pika_batch.runtime.quarantine import ALONE, DOUBT
from aio_pika_batch.runtime.shutdown import wait_until
from aio_pika_batch.runtime.worker_config import WorkerConfig
from aio_pika_batch.status import WorkerState, WorkerStatus
from aio_pika_batch.transport import ProvingSession, Session

STABLE_AFTER = 10.0
"""Seconds that a session must last for its end to count as a first failure again."""

PROBE = 1
"""The prefetch count of a worker that tries whether messages succeed again."""

# Tuples, because the hash of an enum costs more than the comparisons.
_WELL = (WorkerState.CONSUMING, WorkerState.PROBING, WorkerState.PAUSED)
"""States of a worker that has no trouble with its broker."""

_CONSUMES = (WorkerState.CONSUMING, WorkerState.PROBING)

T = TypeVar("T")


class _Stopped(Exception):
    """A stop was requested first."""


class Worker:
    """One consumer of the queue, with its own connection.

    Attributes:
        ready: Done once the worker has consumed for the first time; fails if it never can.
        slots: Its running handlers.
        cut_off: The number of messages whose handlers the drain cancelled.
        unproven: The number of settlements that the broker may not have received at the stop.
    """

    def __init__(
        self,
        index: int,
        config: WorkerConfig,
        instance: WorkerInstance,
        shared: WorkerResources,
        *,
        observers: Observers,
        log: KeywordLogger,
    ) -> None:
        self._index = index
        self._config = config
        self._instance = instance
        self._shared = shared
        self._shutdown = shared.shutdown
        self._observers = observers
        self._log = log
        self._breaker = None if config.breaker is None else CircuitBreaker(config.breaker)
        self._loop = asyncio.get_running_loop()
        self._state = WorkerState.CONNECTING
        self._current: ConsumeLoop | None = None
        self._session: Session | None = None
        self._epoch = 0
        self._failures = 0
        self._last_error: str | None = None
        self._complaint: str | None = None
        self.slots = HandlerSlots(config.concurrency)
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self.failed: asyncio.Future[None] = self._loop.create_future()
        self.raises_refusals = True
        self.cut_off = 0
        self.unproven = 0

    @property
    def is_well(self) -> bool:
        """Whether it consumes, as far as is known, or the breaker pauses it."""
        return self._visible_state in _WELL

    @property
    def _visible_state(self) -> WorkerState:
        if self._state not in _WELL:
            return self._state
        if self._shutdown.is_requested:
            return WorkerState.DRAINING
        return WorkerState.PAUSED if self._is_breaker(BreakerState.OPEN) else self._state

    def _is_breaker(self, state: BreakerState) -> bool:
        return self._breaker is not None and self._breaker.state is state

    @property
    def oldest(self) -> float | None:
        """Seconds since its longest unsettled message arrived; None if there is none."""
        return self._seconds_since(self._current.oldest if self._current else None)

    def _seconds_since(self, moment: float | None) -> float | None:
        return None if moment is None else self._loop.time() - moment

    @property
    def status(self) -> WorkerStatus:
        """A snapshot."""
        current, load = self._current, self._load()
        return WorkerStatus(
            index=self._index,
            state=self._visible_state,
            epoch=self._epoch,
            buffered=load.buffered,
            in_hand=load.in_hand,
            held=load.held,
            oldest=self.oldest,
            oldest_held=self._seconds_since(current.oldest_held if current else None),
            last_progress=self._loop.time() - current.last_progress if current else None,
            last_error=self._last_error,
            prefetch=current.prefetch if current else self._config.prefetch,
        )

    def _load(self) -> Load:
        current = self._current
        return Load(
            current.buffered if current else 0,
            self.slots.in_hand,
            self._visible_state in _CONSUMES,
            current.held if current else 0,
        )

    async def run(self) -> None:
        """Consume until a stop is requested.

        Raises:
            Exception: Why it has never consumed and never will.
        """
        self._observers.emit(WorkerStarted(self._load))
        try:
            while not self._shutdown.is_requested:
                failure = await self._run_session()
                if failure is not None:
                    self._handle_failure(failure)
                if self._breaker is not None and self._breaker.state is BreakerState.OPEN:
                    await self._pause_for(self._breaker)
                elif failure is not None:
                    await self._back_off()
            await self._finish_handlers()
        finally:
            self._state = WorkerState.STOPPED
            self._observers.emit(WorkerStopped())
            if not self.ready.done():
                self.ready.cancel()

    async def _run_session(self) -> Exception | None:
        """Run one session; return what ended it, unless that was a stop or the breaker."""
        try:
            await self._open_and_consume()
        except _Stopped:
            return None
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            # The event loop cancels this task when it is closed.
            if task is not None and task.cancelling():
                raise
            # Client libraries cancel what waited for a connection that was lost.
            return SessionLost(f"a hook was cancelled: {error!r}")
        except (KeyboardInterrupt, SystemExit):
            raise
        except Exception as error:  # noqa: BLE001  -- `_handle_failure` decides
            # Also if the session was only being opened: messages were on their way already.
            if isinstance(error, TransportError) and self._shared.quarantine is not None:
                self._shared.quarantine.doubt_until = self._loop.time() + DOUBT
            return error
        except BaseException as error:  # noqa: BLE001  -- a hook or a transport may raise anything
            failure = RuntimeError(f"the session was ended by {format_error(error)}")
            failure.__cause__ = error
            return failure
        finally:
            self._on_session_closed()
        return None

    def _on_session_closed(self) -> None:
        """Report what may be delivered again although the session was closed on purpose."""
        session: object = self._session
        self._session = None
        if not isinstance(session, ProvingSession) or not session.unproven:
            return
        by_itself = self._current is not None and self._current.needs_another
        if self._shutdown.is_requested or by_itself:
            self.unproven += session.unproven
            self._log.error(
                "settlements are not confirmed: these messages may be delivered again",
                messages=session.unproven,
            )

    async def _open_and_consume(self) -> None:
        if self._state not in _WELL:
            self._state = WorkerState.CONNECTING
        # Declared again each time: whatever ended the last session may have deleted the queue.
        await self._unless_stopped(self._shared.declare())
        self._epoch += 1
        epoch = self._epoch
        async with AsyncExitStack() as stack:
            config = self._config
            if self._is_breaker(BreakerState.HALF_OPEN):
                config = replace(config, prefetch=PROBE, adapts_prefetch=False)
            prefetch = config.prefetch if self._shared.quarantine is None else ALONE
            context = self._shared.session(self._index, epoch, prefetch)
            session = await self._unless_stopped(stack.enter_async_context(context))
            self._session = session
            self._current = current = ConsumeLoop(
                session,
                config,
                self._instance,
                self._shared,
                slots=self.slots,
                breaker=self._breaker,
                observers=self._observers,
                log=self._log.bind(epoch=epoch),
                on_consuming=self._on_consuming,
                on_breaker_changed=self._on_breaker_changed,
            )
            began = self._loop.time()
            try:
                await self._instance.attend(current, session, epoch, self._log)
            finally:
                self.cut_off += current.cut_off
                if self._shutdown.is_requested:
                    self._state = WorkerState.DRAINING
                elif not current.needs_another:
                    self._state = WorkerState.WAITING
                # Not as soon as it is open: a broker that accepts and then closes would be asked
                # again and again without a pause.
                if self._loop.time() - began >= STABLE_AFTER:
                    self._failures = 0
            if self._shutdown.is_requested or current.needs_another:
                return
            if not current.was_consumed:
                msg = "a hook returned without consuming: _run_internal must await super()'s"
                raise ConfigurationError(msg)
            raise SessionLost("the session's hook returned before the session's end")

    def _on_consuming(self) -> None:
        is_probing = self._is_breaker(BreakerState.HALF_OPEN)
        self._state = WorkerState.PROBING if is_probing else WorkerState.CONSUMING
        # The same failure after a working session is news again.
        self._complaint = None
        self._log.info("consuming", epoch=self._epoch)
        self._observers.emit(Connected(self._epoch))
        if not self.ready.done():
            self.ready.set_result(None)

    async def _unless_stopped(self, work: Coroutine[Any, Any, T]) -> T:
        """Run it, unless a stop is requested first."""
        # A connect may take `connect_timeout`, and a stop must not wait for that.
        task = self._loop.create_task(work)
        try:
            await self._shutdown.or_first_of((task,))
            if not task.done():
                raise _Stopped
            return await task
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})

    def _handle_failure(self, error: Exception) -> None:
        """Log a failure; raise it if it is permanent."""
        is_temporary = isinstance(error, SessionLost | BrokerUnavailable)
        # A wrong password or queue should be seen at the start. After that it may be a broker that
        # is being configured.
        if not is_temporary and self.raises_refusals and not self.ready.done():
            raise error
        if not self.failed.done():
            self.failed.set_result(None)
        text = format_error(error)
        is_repeated = text == self._complaint
        self._last_error = self._complaint = text
        self._failures += 1
        self._observers.emit(Lost(self._epoch, error))
        if is_repeated:
            self._log.debug("still not consuming", error=text, failures=self._failures)
        elif isinstance(error, TransportError):
            self._log.warning("not consuming", error=text)
        else:
            self._log.error("not consuming", exc_info=error, error=text)

    async def _back_off(self) -> None:
        self._state = WorkerState.WAITING
        # Jitter spreads load; it needn't be unpredictable.
        pause = self._config.reconnect.pause(self._failures, random.random())
        await self._shutdown.or_first_of((), timeout=pause)

    def _on_breaker_changed(self, breaker: CircuitBreaker) -> None:
        if breaker.state is BreakerState.OPEN:
            self._log.warning(
                "too many messages fail: consuming pauses",
                failed=breaker.failed,
                of=breaker.samples,
                pause=f"{breaker.pause:g} s",
            )
            self._observers.emit(BreakerOpened(breaker.failed, breaker.samples, breaker.pause))
        else:
            self._log.info("messages succeed again: consuming goes on")
            self._observers.emit(BreakerClosed())

    async def _pause_for(self, breaker: CircuitBreaker) -> None:
        self._state = WorkerState.PAUSED
        await self._shutdown.or_first_of((), timeout=breaker.pause)
        if not self._shutdown.is_requested:
            breaker.probe()
            self._log.info("one message at a time, until one succeeds or fails")
            self._observers.emit(BreakerProbing())

    async def _finish_handlers(self) -> None:
        """Wait for handlers of lost sessions: `on_stop` may close what they use."""
        if self.slots.tasks:
            self._state = WorkerState.DRAINING
            await wait_until(self.slots.tasks, self._shutdown.handle_by)
            self.cut_off += self.slots.cancel()
            await wait_until(self.slots.tasks, self._shutdown.settle_by)
            self.slots.abandon()
            await wait_until(self.slots.tasks, self._shutdown.deadline)
