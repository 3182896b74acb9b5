"""What happens from the first delivery of a session to its last settlement?

The shell around the batcher, the handlers and the desk: it awaits, and decides nothing. Between
taking a chunk and cutting batches out of it there is no await, so there is no race. A session that
is lost ends its epoch: the buffer is dropped on purpose, since the broker delivers it again, and
handlers run on, but nobody listens to their results any more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

from aio_pika_batch.core.batch_run import BatchDecisions
from aio_pika_batch.core.batcher import Batch
from aio_pika_batch.core.message import Message
from aio_pika_batch.errors import SessionLost, TransportError
from aio_pika_batch.logs import KeywordLogger
from aio_pika_batch.observer import Observers
from aio_pika_batch.runtime.batching import BatchIntake, BatchKey
from aio_pika_batch.runtime.breaker import WorkerBreaker
from aio_pika_batch.runtime.early_settlement import EarlySettlement
from aio_pika_batch.runtime.handler import HandlerRun, Process
from aio_pika_batch.runtime.handler_events import Reporter
from aio_pika_batch.runtime.handler_slots import HandlerSlots, Shutdown, nobody_waits
from aio_pika_batch.runtime.publishing import ReconnectingPublisher
from aio_pika_batch.runtime.settlement_queue import PATIENCE
from aio_pika_batch.runtime.settler import Settler
from aio_pika_batch.runtime.worker_config import WorkerConfig
from aio_pika_batch.transport import PumpingSession, Session


class ConsumeLoop:
    """One session, consumed.

    Args:
        process: The handler, of the instance that this worker uses.
        batch_key: The same instance's; None if it has none.
        hands: The worker's, since handlers outlive epochs.
        fuse: The worker's breaker, if it has one.
        on_consuming: Called once messages are being received.

    Attributes:
        stop: Whether and by when to stop.
        was_consumed: Whether `consume` was ever called.
        cut_off: How many messages a drain cut off in mid-handling.
        last_progress: When something was last received or settled, in loop time.
    """

    def __init__(
        self,
        session: Session,
        *,
        terms: WorkerConfig,
        process: Process,
        batch_key: BatchKey | None,
        hands: HandlerSlots,
        fuse: WorkerBreaker | None,
        outbox: ReconnectingPublisher,
        stop: Shutdown,
        on_consuming: Callable[[], None],
        observers: Observers,
        log: KeywordLogger,
    ) -> None:
        self._session = session
        self._fuse = fuse
        self.stop = stop
        self._on_consuming = on_consuming
        self._terms = terms
        self._process = process
        self._hands = hands
        self._reporter = Reporter(observers, log)
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._collector = BatchIntake(terms.cutting, batch_key, terms.failure)
        self._batcher = self._collector.batcher
        self._settler = Settler(
            session,
            router=terms.router,
            hold=terms.hold,
            outbox=outbox,
            patience=terms.pace.patience if terms.pace else PATIENCE,
            on_failure=self.fail,
            on_room=self._dispatch,
            observers=observers,
            log=log,
        )
        self._early = (
            EarlySettlement(terms.pace.collect, self._settle_early) if terms.pace else None
        )
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._settling: dict[int, float] = {}
        self._failure: asyncio.Future[None] = self._loop.create_future()
        self._turn: asyncio.Future[None] = self._loop.create_future()
        self._is_draining = False
        self.was_consumed = False
        self.cut_off = 0
        self.last_progress = self._loop.time()

    # -- what is seen from outside ----------------------------------------------------------------

    @property
    def buffered(self) -> int:
        """Messages that wait for their batch."""
        return len(self._batcher) - self._collector.held

    @property
    def held(self) -> int:
        """Messages that wait for a confirmation that did not come at once, or to be tried again."""
        return self._settler.held + self._collector.held

    @property
    def oldest(self) -> float | None:
        """When the longest unsettled message arrived, in loop time; None if all are settled."""
        times = (
            self._batcher.since,
            self._hands.since,
            self._settler.since,
            *self._settling.values(),
        )
        return min((each for each in times if each is not None), default=None)

    @property
    def has_turned(self) -> bool:
        """Whether the breaker has ended it, so that another one begins."""
        return self._turn.done()

    # -- receiving --------------------------------------------------------------------------------

    async def consume(self) -> None:
        """Receive, batch, hand over and settle, until told to stop; then drain.

        It drains, too, when the breaker has opened, or has found that all is well again.

        Raises:
            TransportError: The session is lost.
        """
        self.was_consumed = True
        self._hands.on_free = self._on_free
        self._collector.begin(self._hands.keys)
        self._on_consuming()
        receiving = self._loop.create_task(self._receive())
        stopping = self._loop.create_task(self.stop.event.wait())
        try:
            waiting: set[asyncio.Future[Any]] = {receiving, stopping, self._failure, self._turn}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if self._failure.done():
                self._failure.result()
            if not self.stop.event.is_set() and not self.has_turned:
                await receiving
                msg = "the session ended although nobody asked it to"
                raise SessionLost(msg)
            await self._drain(receiving)
        finally:
            stopping.cancel()
            await self._let_go(receiving)

    async def _receive(self) -> None:
        # Pumped, messages come in a callback of the client library's: no place for users' code.
        if isinstance(self._session, PumpingSession) and not self._collector.runs_users_code:
            await self._session.pump(self._take)
        else:
            async for chunk in self._session:
                self._take(chunk)

    def _take(self, chunk: Sequence[Message]) -> None:
        self.last_progress = now = self._loop.time()
        refused = self._collector.add(chunk, now)
        if refused is not None:
            self._reporter.refused(refused.not_acked)
            self._go(self._settle(refused, now))
        if self._reporter.is_watched:
            self._reporter.received(len(chunk))
        self._dispatch()

    def _on_free(self, batch: Batch) -> None:
        self._collector.release(batch)
        self._dispatch()

    def _dispatch(self) -> None:
        """Hand over what is due to whoever is free, and set the timer for what is not."""
        if self._is_draining or self._settler.is_over:
            return
        now = self._loop.time()
        while self._hands.is_free:
            batch = self._batcher.poll(now, exhausted=self._is_exhausted())
            if batch is None:
                break
            self._hand_over(batch)
        self._arm()

    def _is_exhausted(self) -> bool:
        """Whether all that prefetch allows is in hand, not counting what is being settled."""
        prefetch = self._terms.prefetch
        return 0 < prefetch <= len(self._batcher) + self._hands.in_hand + self._settler.held

    def _arm(self) -> None:
        deadline = self._batcher.deadline if self._hands.is_free else None
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
        # A timer may fire a clock tick early; asked too early, the batcher would say "not yet".
        batch = self._batcher.poll(max(deadline, self._loop.time()))
        if batch is not None:
            self._hand_over(batch)
        self._dispatch()

    # -- handling ---------------------------------------------------------------------------------

    def _hand_over(self, batch: Batch) -> None:
        handling = HandlerRun(
            self._process,
            batch,
            self._terms.failure,
            timeout=self._terms.process_timeout,
            on_ignored=self._on_ignored_cancellation,
            on_yield=self._early.note if self._early else None,
            keeps_failures=self._collector.keeps_failures(batch),
            reporter=self._reporter,
        )
        self._hands.take(handling)
        self._go(self._handle(handling))

    def _go(self, work: Coroutine[Any, Any, None]) -> None:
        """Do it in a task that a drain waits for, and that may outlive the epoch."""
        task = self._loop.create_task(work)
        for tasks in (self._tasks, self._hands.tasks):
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    def _on_ignored_cancellation(self) -> None:
        self.fail(
            SessionLost("a handler goes on although it was cancelled: its session is given up")
        )

    async def _handle(self, handling: HandlerRun) -> None:
        batch = handling.batch
        try:
            try:
                handled = await handling.run()
                self._weigh(handled)
                if not self._settler.is_over:
                    kept = self._collector.take_back(batch, handled, self._loop.time())
                    self._reporter.kept(kept)
            finally:
                # Free first: the next batch may start while this one is being settled.
                self._hands.release(handling)
        except Exception as error:  # noqa: BLE001  -- as `_give_up` says
            self._give_up(error, len(batch.messages))
        else:
            await self._settle(handled, batch.since)

    def _settle_early(
        self, taken: BatchDecisions, counts: dict[HandlerRun, int], since: float
    ) -> None:
        for handling, count in counts.items():
            self._hands.settled(handling, count)
        self._weigh(taken)
        self._go(self._settle(taken, since))

    async def _settle(self, handled: BatchDecisions, since: float) -> None:
        self._settling[id(handled)] = since
        try:
            if self._settler.is_over and handled:
                self._settler.count_stale(len(handled))
            elif handled:
                await self._settler.settle(handled, since)
        except Exception as error:  # noqa: BLE001  -- as `_give_up` says
            self._give_up(error, len(handled))
        finally:
            del self._settling[id(handled)]
        self.last_progress = self._loop.time()

    def _give_up(self, error: Exception, count: int) -> None:
        """End the epoch: unsettled for ever is worse than delivered again."""
        if isinstance(error, TransportError):
            self._settler.count_stale(count)
            self.fail(error)
        else:
            self._log.error("a batch could not be settled", exc_info=error)
            self.fail(SessionLost(f"a batch could not be settled: {error!r}"))

    def _weigh(self, handled: BatchDecisions) -> None:
        """Let the breaker know; nothing more is begun if it wants another session.

        What was handled for a session that is gone is handled again, and counts then.
        """
        if self._fuse is None or self._settler.is_over or not self._fuse.record(handled):
            return
        self._is_draining = True
        self._disarm()
        if not self._turn.done():
            self._turn.set_result(None)

    # -- ending -----------------------------------------------------------------------------------

    def fail(self, error: TransportError) -> None:
        """End the epoch for this reason."""
        if not self._failure.done():
            self._failure.set_exception(error)
            # Whoever consumes raises it; nobody may, if it is draining.
            self._failure.exception()

    async def _let_go(self, receiving: asyncio.Task[None]) -> None:
        """End of the epoch, whatever ended it. Handlers run on, if there are any."""
        self._disarm()
        if self._early is not None:
            self._early.stop()
        self._batcher.clear()
        self._hands.on_free = nobody_waits
        await self._settler.abort()
        if not receiving.done():
            receiving.cancel()
        await asyncio.wait({receiving})
        if not receiving.cancelled():
            # Retrieved, so that asyncio does not complain about one that nobody awaited.
            receiving.exception()

    async def _drain(self, receiving: asyncio.Task[None]) -> None:
        """Take what is on its way, finish what was started, return the rest."""
        self._is_draining = True
        self._disarm()
        await self._cancel(receiving)
        may_begin = self._fuse is None or not self._fuse.is_open
        while may_begin and self._hands.is_free and (batch := self._batcher.flush()):
            self._hand_over(batch)
        await self._finish_batches()
        # Only now: what fails in these batches and is to be tried again is not tried again here.
        returned = self._batcher.clear()
        if not self._failure.done():
            await self._settler.close(returned, self._wait_to_settle)
        if self._failure.done():
            self._failure.result()

    async def _cancel(self, receiving: asyncio.Task[None]) -> None:
        """Ask for no more messages, and take what is on its way."""

        async def confirmed() -> None:
            await self._session.cancel()
            await receiving

        cancelling = self._loop.create_task(confirmed())
        try:
            await self._wait_to_settle({cancelling})
            if cancelling.done():
                await cancelling
                return
        finally:
            cancelling.cancel()
            await asyncio.wait({cancelling})
            if not cancelling.cancelled():
                # Retrieved, so that asyncio does not complain about one that nobody awaited.
                cancelling.exception()
        if self._failure.done():
            self._failure.result()
        msg = "the broker did not confirm in time that it sends no more messages"
        raise SessionLost(msg)

    async def _wait_to_settle(self, tasks: Iterable[asyncio.Future[Any]]) -> None:
        await self.stop.outlast(tasks, lambda: self.stop.settle_by, unless=self._failure)

    async def _finish_batches(self) -> None:
        """Wait for the batches at work; cut their handlers off when a stop leaves no more time."""
        if not self._tasks:
            return
        await self.stop.outlast(self._tasks, lambda: self.stop.handle_by, unless=self._failure)
        if self.stop.event.is_set():
            self.cut_off = self._hands.cut()
        if self._early is not None:
            # Whatever is settled from here on is settled by a task that is waited for below.
            self._early.stop()
        await self._wait_to_settle(self._tasks)
