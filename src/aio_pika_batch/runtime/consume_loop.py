"""Consumes one session: receives, batches, runs handlers, settles, and drains.

Between taking deliveries and cutting batches out of them nothing is awaited, so nothing can happen
in between. If the session is lost, its buffer is dropped on purpose, because the broker delivers
everything again. Handlers run on, but their results are discarded.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from contextvars import Context, copy_context
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from aio_pika_batch.core.adaptive_prefetch import AdaptivePrefetch
from aio_pika_batch.core.batch_run import BatchDecisions
from aio_pika_batch.core.batcher import Batch, Trigger
from aio_pika_batch.core.circuit_breaker import BreakerState, CircuitBreaker, is_failure
from aio_pika_batch.core.message import Message
from aio_pika_batch.core.results import Cause, MessageOutcome, MessageResult
from aio_pika_batch.errors import SessionLost, TransportError
from aio_pika_batch.logs import KeywordLogger
from aio_pika_batch.observer import Observers, Received
from aio_pika_batch.runtime.batching import BatchKey, open_intake
from aio_pika_batch.runtime.handler import (
    EarlySettlement,
    HandlerCheck,
    HandlerOptions,
    HandlerRun,
    HandlerSlots,
    InContext,
    Process,
    ignore_batch,
)
from aio_pika_batch.runtime.publishing import CopyPublishers
from aio_pika_batch.runtime.quarantine import Quarantine, SuspectGate
from aio_pika_batch.runtime.settler import Settler
from aio_pika_batch.runtime.shutdown import Shutdown, cancel_and_wait
from aio_pika_batch.runtime.worker_config import WorkerConfig
from aio_pika_batch.transport import (
    AdjustableSession,
    ConfirmingSession,
    ExpiringSession,
    PumpingSession,
    Session,
)

CANCEL_TIMEOUT = 10.0
"""Seconds that a broker has to confirm a cancel, or the settlements before the end of a session, if
no stop is requested."""

TURN = 0.005
"""Seconds after which handlers that await nothing let the event loop run."""


@dataclass(frozen=True, slots=True)
class WorkerInstance:
    """What a worker needs of the consumer instance that it works for.

    Attributes:
        process: The instance's `process_messages`.
        batch_key: The instance's `batch_key`; None if its class doesn't override it.
        attend: Runs the instance's hooks around a session.
    """

    process: Process
    batch_key: BatchKey | None
    attend: Callable[[ConsumeLoop, Session, int, KeywordLogger], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerResources:
    """What the workers of a consumer share.

    Attributes:
        declare: Declares the topology.
        session: Opens the session of a worker, for its index, the session's number, and a prefetch
            count.
        publishers: Publish retries and dead letters.
        quarantine: None if the queue doesn't count deliveries.
        check: Whether the handler works at all.
    """

    declare: Callable[[], Coroutine[Any, Any, None]]
    session: Callable[[int, int, int], AbstractAsyncContextManager[Session]]
    publishers: CopyPublishers
    quarantine: Quarantine | None
    shutdown: Shutdown
    check: HandlerCheck


class ConsumeLoop:
    """One session, consumed.

    Args:
        slots: The worker's.
        breaker: The worker's; None if it has none.
        on_consuming: Called once messages are being received.
        on_breaker_changed: Called when the breaker opens or closes.

    Attributes:
        shutdown: Whether and by when to stop.
        was_consumed: Whether `consume` was ever called.
        cut_off: The number of messages whose handlers a drain cancelled.
        last_progress: When something was last received or settled, in loop time.
    """

    def __init__(
        self,
        session: Session,
        config: WorkerConfig,
        instance: WorkerInstance,
        shared: WorkerResources,
        *,
        slots: HandlerSlots,
        breaker: CircuitBreaker | None,
        observers: Observers,
        log: KeywordLogger,
        on_consuming: Callable[[], None],
        on_breaker_changed: Callable[[CircuitBreaker], None],
    ) -> None:
        self._session = session
        self._config = config
        self._slots = slots
        self._breaker = breaker
        self._observers = observers
        self._log = log
        self._on_consuming = on_consuming
        self._on_breaker_changed = on_breaker_changed
        self.shutdown = shared.shutdown
        self._loop = asyncio.get_running_loop()
        self._intake = open_intake(config, instance.batch_key, observers, log)
        self._batcher = self._intake.batcher
        self._settler = Settler(
            session,
            config,
            shared.publishers,
            on_failure=self.fail,
            on_settled_late=self._dispatch,
            own=shared.quarantine.own if shared.quarantine else None,
            observers=observers,
            log=log,
        )
        self._gate = (
            SuspectGate(session, shared.quarantine, self, slots, prefetch=config.prefetch)
            if shared.quarantine is not None and isinstance(session, AdjustableSession)
            else None
        )
        self._gating: asyncio.Task[None] | None = None
        self._adaptive = (
            AdaptivePrefetch(config.prefetch, self._loop.time())
            if config.adapts_prefetch and isinstance(session, AdjustableSession)
            else None
        )
        pace = config.pace
        self._early = EarlySettlement(pace.collect, self._settle_early) if pace else None
        self._handler_options = HandlerOptions(
            process=instance.process,
            failure=config.failure,
            check=shared.check,
            timeout=config.process_timeout,
            on_ignored=self._on_ignored_cancellation,
            on_yield=self._early.note if self._early else None,
            observers=observers,
            log=log,
        )
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        # By identity: decisions can be equal, and aren't hashable.
        self._settling: dict[int, float] = {}
        self._context = copy_context()
        self._decided: tuple[BatchDecisions, float, Context] | None = None
        self._settles_soon = False
        self._takes_next = False
        self._next: HandlerRun | None = None
        self._failure: asyncio.Future[None] = self._loop.create_future()
        self._breaker_changed: asyncio.Future[None] = self._loop.create_future()
        self._is_draining = False
        self._has_expired = False
        self.was_consumed = False
        self.cut_off = 0
        self.last_progress = self._loop.time()

    # -- what is seen from outside ----------------------------------------------------------------

    @property
    def buffered(self) -> int:
        """The number of messages that wait for their batch."""
        suspects = len(self._gate.suspects) if self._gate else 0
        return len(self._batcher) - self._intake.held + suspects

    @property
    def held(self) -> int:
        """The number of messages that wait for a late confirm, or for a retry in place."""
        return len(self._settler.held.messages) + self._intake.held

    @property
    def prefetch(self) -> int:
        """The prefetch count in use; 0 means no limit."""
        return self._config.prefetch if self._adaptive is None else self._adaptive.current

    @property
    def oldest_held(self) -> float | None:
        """When the oldest held message arrived, in loop time; None without one."""
        return self._settler.held.oldest

    @property
    def oldest(self) -> float | None:
        """When the longest unsettled message arrived, in loop time; None if all are settled."""
        times = (
            self._batcher.since,
            self._slots.since,
            self._settler.held.since,
            self._decided[1] if self._decided else None,
            *self._settling.values(),
        )
        return min((each for each in times if each is not None), default=None)

    @property
    def needs_another(self) -> bool:
        """Whether the breaker opened or closed, or the session expired: another one follows."""
        return self._breaker_changed.done() or self._has_expired

    # -- receiving --------------------------------------------------------------------------------

    async def consume(self) -> None:
        """Receive, batch, handle and settle until a stop is requested; then drain.

        It also drains if the breaker opens or closes, because the next session has another prefetch
        count, and if the session expires.

        Raises:
            TransportError: The session is lost.
        """
        self.was_consumed = True
        # Of the worker and its hooks: no handler sees what another one has set.
        self._context = copy_context()
        self._slots.on_free = self._on_free
        self._intake.begin(self._slots.keys)
        self._on_consuming()
        if self._gate is not None:
            self._gating = self._loop.create_task(self._gate.run())
            self._gating.add_done_callback(self._on_gate_end)
        # A task of its own: a drain goes on receiving until the broker has confirmed its cancel.
        receiving = self._loop.create_task(self._receive())
        try:
            await self.shutdown.or_first_of((receiving, self._failure, self._breaker_changed))
            if self._failure.done():
                self._failure.result()
            if not self.shutdown.is_requested and not self.needs_another:
                await receiving
                session: object = self._session
                self._has_expired = isinstance(session, ExpiringSession) and session.is_expired
                if not self._has_expired:
                    # Otherwise the worker would take this for a drain, and stop consuming for good.
                    raise SessionLost("the session ended although no stop was requested")
            await self._drain(receiving)
        finally:
            await self._close(receiving)

    async def _receive(self) -> None:
        # A pumping session calls `_take` as soon as messages arrive, without waking a task for each
        # read. Its callback is the client library's, where users' code must not run.
        if isinstance(self._session, PumpingSession) and not self._intake.runs_users_code:
            await self._session.pump(self._take)
        else:
            async for chunk in self._session:
                self._take(chunk)

    def _take(self, chunk: Sequence[Message]) -> None:
        self.last_progress = now = self._loop.time()
        if Received in self._observers.wanted:
            self._observers.emit(Received(len(chunk)))
        if self._adaptive is not None and chunk:
            # One of each chunk is enough for an estimate.
            self._adaptive.sample(len(chunk[0].body))
        if self._config.may_continue_delays:
            chunk = self._hold_early(chunk, now)
        if self._gate is not None:
            chunk = self._gate.sort(chunk)
        failed = self._intake.add(chunk, now)
        if failed is not None:
            self._start(self._settle(failed, now))
        self._dispatch()

    def _hold_early(self, chunk: Sequence[Message], now: float) -> Sequence[Message]:
        """Hold the messages whose delay was too long for one hold; return the others."""
        due = []
        time_of_day = datetime.now(UTC)
        for message in chunk:
            copy = self._settler.planner.continued_delay(message, time_of_day)
            if copy is None:
                due.append(message)
            else:
                self._settler.hold(copy, now)
        return due

    def _on_free(self, batch: Batch) -> None:
        self._intake.release(batch)
        self._dispatch()

    def _dispatch(self) -> None:
        """Start handlers for the batches that are due, and set the timer for the next one.

        Batches are cut on demand: while all slots are busy, a batch goes on growing. The buffer is
        bounded by the prefetch count, so that backpressure needs no queue of batches.
        """
        if self._gate is not None:
            self._gate.changed.set()
        if self._is_draining or self._settler.is_over:
            return
        if not len(self._batcher):
            # A single message is settled sooner if nothing is looked for here.
            self._disarm()
            return
        now = self._loop.time()
        while self._slots.is_free:
            batch = self._batcher.poll(now)
            if batch is None and self._is_exhausted():
                batch = self._batcher.poll(now, exhausted=True)
            if batch is None:
                break
            self._start_handler(batch)
        self._arm()

    def _is_exhausted(self) -> bool:
        """Whether the prefetch count allows no more deliveries, so that waiting is pointless.

        Messages that are being settled don't count: more can be delivered in a moment.
        """
        if self._gate is not None and self._gate.is_pausing:
            return True
        prefetch, held = self.prefetch, len(self._settler.held.messages)
        return 0 < prefetch <= len(self._batcher) + self._slots.in_hand + held

    def _arm(self) -> None:
        deadline = self._batcher.deadline if self._slots.is_free else None
        if self._timer is not None:
            if self._timer.when() == deadline:
                return
            self._disarm()
        if deadline is not None:
            self._timer = self._loop.call_at(deadline, self._on_deadline, deadline)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_deadline(self, deadline: float) -> None:
        self._timer = None
        # A timer may fire a clock tick early, when the batch isn't due yet.
        batch = self._batcher.poll(max(deadline, self._loop.time()))
        if batch is not None:
            self._start_handler(batch)
        self._dispatch()

    # -- handling ---------------------------------------------------------------------------------

    def _start_handler(self, batch: Batch) -> None:
        keeps_failures = self._intake.keeps_failures(batch)
        run = HandlerRun(batch, self._handler_options, keeps_failures=keeps_failures)
        self._slots.add(run)
        if self._takes_next:
            self._takes_next, self._next = False, run
        else:
            self._start(self._handle(run), self._context)

    def _start(self, work: Coroutine[Any, Any, None], context: Context | None = None) -> None:
        """Run it in a task that a drain waits for, and that may outlive the session."""
        task = self._loop.create_task(work, context=context)
        # A drain waits for those of its session; the worker, at its end, for those of all sessions.
        self._tasks.add(task)
        self._slots.tasks.add(task)
        task.add_done_callback(self._on_end)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        """End the session if a task has ended otherwise than it should: its messages would wait."""
        self._tasks.discard(task)
        self._slots.tasks.discard(task)
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is not None:
            self._give_up(error)
        if self._gate is not None:
            self._gate.changed.set()

    def _on_ignored_cancellation(self) -> None:
        self.fail(
            SessionLost("a handler continues although it was cancelled: its session is given up")
        )

    async def _handle(self, run: HandlerRun | None) -> None:
        """Handle a batch, and those that are due after it as long as no handler awaits anything.

        A handler that has awaited something keeps its task to itself: what still refers to the task
        after its end, such as a timer that cancels it, must not reach the next handler. For the
        same reason a handler that leaves a reference behind is the last one in the task.
        """
        task = asyncio.current_task()
        references = sys.getrefcount(task)
        until = self._loop.time() + TURN
        while run is not None:
            context = self._context.copy()
            handling = InContext(run.run(), context, self._settle_soon)
            try:
                decisions = await handling
                self._record(decisions)
                if not self._settler.is_over:
                    self._intake.take_back(run.batch, decisions, self._loop.time())
                self._add_decided(decisions, run.batch.since, context)
                self._takes_next = (
                    not (handling.has_awaited or self.shutdown.event.is_set())
                    and self._loop.time() < until
                    and sys.getrefcount(task) == references
                )
            except Exception as error:  # noqa: BLE001  -- ends the session, see `_give_up`
                self._give_up(error, len(run.batch.messages))
            finally:
                # The slot is free before the batch is settled: the next batch starts while confirms
                # are awaited, and the prefetch count bounds what can pile up.
                self._slots.release(run)
                run, self._next, self._takes_next = self._next, None, False
        # The results of other handlers may come in this turn of the event loop, too.
        if self._is_draining or self._config.concurrency == 1 or not self._slots.in_hand:
            await self._settle_decided()
        else:
            self._settle_soon()

    def _add_decided(self, decisions: BatchDecisions, since: float, context: Context) -> None:
        """Add what is settled at the end of this turn of the event loop."""
        if self._decided is None:
            self._decided = decisions, since, context
        else:
            together, earliest, first = self._decided
            together.add(decisions)
            self._decided = together, min(earliest, since), first

    def _settle_soon(self) -> None:
        """Settle what is decided in the next turn of the event loop."""
        if self._decided is not None and not self._settles_soon:
            self._settles_soon = True
            self._start(self._settle_decided())

    async def _settle_decided(self) -> None:
        """Settle what the handlers of this turn have decided together."""
        self._settles_soon = False
        if self._decided is None:
            return
        (decided, since, context), self._decided = self._decided, None
        # In the order of delivery, so that one `multiple` ack may cover all of them.
        decided.acked.sort()
        settling = self._settle(decided, since)
        if decided.not_acked or self._observers.present:
            # Traces show the settlement as a part of the first handler.
            await InContext(settling, context)
        else:
            await settling

    def _settle_early(
        self, decisions: BatchDecisions, counts: dict[HandlerRun, int], since: float
    ) -> None:
        for run, count in counts.items():
            self._slots.settled_early(run, count)
        self._record(decisions)
        self._start(self._settle(decisions, since))

    async def _settle(self, decisions: BatchDecisions, since: float) -> None:
        count = len(decisions)
        self._settling[id(decisions)] = since
        try:
            if count and self._settler.is_over:
                self._settler.count_stale(count)
            elif count:
                await self._settler.settle(decisions, since)
                if self._adaptive is not None:
                    self._adapt(self._adaptive, len(decisions.acked))
        except Exception as error:  # noqa: BLE001  -- ends the session, see `_give_up`
            self._give_up(error, count)
        finally:
            del self._settling[id(decisions)]
        self.last_progress = self._loop.time()

    def _adapt(self, adaptive: AdaptivePrefetch, acked: int) -> None:
        """Change the prefetch count if it is time for another one."""
        wanted = adaptive.acked(acked, self._loop.time())
        if wanted is None:
            return
        self._log.debug("the prefetch count adapts to what is acked", prefetch=wanted)
        if self._gate is not None:
            # It pauses the session itself, and knows when it may.
            self._gate.full = wanted
        elif isinstance(self._session, AdjustableSession) and not self._is_draining:
            self._start(self._change_prefetch(self._session, wanted))

    async def _change_prefetch(self, session: AdjustableSession, prefetch: int) -> None:
        try:
            await session.pause()
            await session.resume(prefetch)
        except TransportError as error:
            self.fail(error)

    def _give_up(self, error: BaseException, count: int = 0) -> None:
        """End the session: otherwise messages would stay unsettled.

        Args:
            count: The number of messages whose results come too late.
        """
        if isinstance(error, TransportError):
            self._settler.count_stale(count)
            self.fail(error)
            return
        if not isinstance(error, asyncio.CancelledError):
            self._log.error("a batch could not be settled", exc_info=error)
        self.fail(SessionLost(f"a batch could not be settled: {error!r}"))

    def _record(self, decisions: BatchDecisions) -> None:
        """Count results for the breaker; start nothing more if it needs another session.

        Results for a session that is gone don't count: the messages are handled again.
        """
        breaker = self._breaker
        if breaker is None or self._settler.is_over:
            return
        others, exceptions = decisions.not_acked, self._config.failure.exceptions
        failed = sum(is_failure(each, exceptions) for each in others)
        succeeded = len(decisions.acked)
        succeeded += sum(each.result is MessageResult.ACK for each in others)
        if not breaker.record(succeeded=succeeded, failed=failed, now=self._loop.time()):
            return
        self._on_breaker_changed(breaker)
        self._is_draining = True
        self._disarm()
        if not self._breaker_changed.done():
            self._breaker_changed.set_result(None)

    # -- suspects, see `GatedLoop` ----------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Whether everything that was delivered is settled, apart from what the gate has."""
        # Copies that are refused don't count: a broker that is blocked would stop the intake.
        return not (self._tasks or len(self._batcher) or self._settler.held.retries)

    def finish_early(self) -> None:
        """Handle what is buffered, and publish the retries that are held, without a delay."""
        self._settler.held.release_retries()
        self._dispatch()

    async def handle_alone(self, message: Message) -> None:
        """Handle a message, and return when it is settled or held. A slot must be free."""
        self._start_handler(Batch([message], Trigger.PREFETCH, self._loop.time()))
        while self._tasks:
            await asyncio.wait(set(self._tasks))

    def replace_by_copies(self, messages: Sequence[Message], *, holds_copies: bool) -> None:
        """Begin to replace messages by copies that the broker counts from 0."""
        self._start(self._replace_by_copies(messages, holds_copies=holds_copies))

    async def _replace_by_copies(self, messages: Sequence[Message], *, holds_copies: bool) -> None:
        self._log.debug("copies replace messages, to be counted from 0", messages=len(messages))
        try:
            left = await self._settler.replace_by_copies(messages, holds_copies=holds_copies)
            if left and self._gate is not None:
                self._gate.suspects += left
        except Exception as error:  # noqa: BLE001  -- ends the session, see `_give_up`
            self._give_up(error, len(messages))

    def dead_letter_crashed(self, messages: Sequence[Message]) -> None:
        """Dead-letter messages that came back too often."""
        nack, cause = MessageResult.NACK, Cause.CRASHED
        outcomes = [MessageOutcome(each, nack, cause) for each in messages]
        self._start(self._settle(BatchDecisions(not_acked=outcomes), self._loop.time()))

    def _on_gate_end(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self._give_up(error)

    # -- ending -----------------------------------------------------------------------------------

    def fail(self, error: TransportError) -> None:
        """End the session for this reason."""
        if not self._failure.done():
            # Only the first reason: the later ones are its consequences.
            self._failure.set_exception(error)
            # Marks it as retrieved: `consume` may be draining already.
            self._failure.exception()

    async def _close(self, receiving: asyncio.Task[None]) -> None:
        """End the session, for whatever reason. Running handlers go on."""
        self._disarm()
        if self._early is not None:
            self._early.stop()
        if self._gating is not None:
            await cancel_and_wait(self._gating)
        self._batcher.clear()
        self._slots.on_free = ignore_batch
        # Before receiving ends: what still arrives must not be settled in this session.
        await self._settler.abort()
        await cancel_and_wait(receiving)

    async def _drain(self, receiving: asyncio.Task[None]) -> None:
        """Take what is on its way, finish what was started, and return the rest."""
        self._is_draining = True
        self._disarm()
        if self._gating is not None:
            await cancel_and_wait(self._gating)
        await self._cancel_consumer(receiving)
        # While the breaker is open, more batches would only fail; the broker keeps their messages.
        may_start = self._breaker is None or self._breaker.state is not BreakerState.OPEN
        while may_start and self._slots.is_free and (batch := self._batcher.flush()):
            self._start_handler(batch)
        await self._finish_batches()
        # Cleared only now: a retry in place that these batches ask for isn't made any more.
        unstarted = self._batcher.clear()
        if self._gate is not None:
            unstarted += self._gate.suspects
        if not self._failure.done():
            await self._settler.close(unstarted, self._wait_to_settle)
            if isinstance(self._session, ConfirmingSession):
                await self._is_done_in_time(self._session.settled())
        if self._failure.done():
            self._failure.result()

    async def _cancel_consumer(self, receiving: asyncio.Task[None]) -> None:
        """Ask for no more messages, and take what is on its way."""

        async def confirmed() -> None:
            await self._session.cancel()
            await receiving

        # A queue without a leader leaves the answer out, and heartbeats go on.
        if await self._is_done_in_time(confirmed()):
            return
        if self._failure.done():
            self._failure.result()
        raise SessionLost("the broker did not confirm in time that it sends no more messages")

    async def _is_done_in_time(self, work: Coroutine[Any, Any, None]) -> bool:
        """Run it while there is time to settle; return whether it has ended."""
        task = self._loop.create_task(work)
        try:
            await self._wait_to_settle({task}, CANCEL_TIMEOUT)
            if task.done():
                await task
                return True
        finally:
            await cancel_and_wait(task)
        return False

    async def _wait_to_settle(
        self, tasks: Iterable[asyncio.Future[Any]], patience: float | None = None
    ) -> None:
        await self.shutdown.wait_for(
            tasks, lambda: self.shutdown.settle_by, unless=self._failure, patience=patience
        )

    async def _finish_batches(self) -> None:
        """Wait for running batches; cancel their handlers when a stop leaves no more time."""
        if not self._tasks:
            return
        await self.shutdown.wait_for(
            self._tasks, lambda: self.shutdown.handle_by, unless=self._failure
        )
        if self.shutdown.is_requested:
            # Not before a stop: handlers of a lost session finish, and only their results are
            # stale.
            self.cut_off = self._slots.cancel()
        if self._early is not None:
            # From here on everything is settled by tasks that are awaited below.
            self._early.stop()
        await self._wait_to_settle(self._tasks)
