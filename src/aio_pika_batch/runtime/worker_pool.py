"""The workers of one consumer, from start to stop.

Built anew for each start, so that a stopped consumer can be started again.
"""

from __future__ import annotations

import asyncio
import functools
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from aio_pika_batch.core.batch_run import FailurePolicy
from aio_pika_batch.core.results import ExceptionResults
from aio_pika_batch.core.retry import Backoff, RetryPolicy
from aio_pika_batch.core.retry_in_place import RetryInPlace
from aio_pika_batch.core.settlement_plan import Pace, SettlementPlanner
from aio_pika_batch.core.topology import build_topology, dead_letter_target, split_exclusive
from aio_pika_batch.core.unconfirmed_policy import UnconfirmedPolicy
from aio_pika_batch.errors import DrainIncomplete, StartInterrupted
from aio_pika_batch.logs import KeywordLogger
from aio_pika_batch.observer import Observer, Observers, Origin
from aio_pika_batch.runtime.batching import BatchKey, Cutting
from aio_pika_batch.runtime.consume_loop import ConsumeLoop
from aio_pika_batch.runtime.delayed_publishing import DelayedPublisher
from aio_pika_batch.runtime.handler import IGNORED_CANCELLATION, Process
from aio_pika_batch.runtime.handler_slots import Shutdown, wait_until
from aio_pika_batch.runtime.publishing import ReconnectingPublisher
from aio_pika_batch.runtime.settlement_queue import PATIENCE
from aio_pika_batch.runtime.worker import Worker
from aio_pika_batch.runtime.worker_config import WorkerConfig
from aio_pika_batch.settings import ConsumerSettings
from aio_pika_batch.status import WorkerStatus
from aio_pika_batch.transport import Session, Subscription, Transport, server_of

RECHECK = Backoff(0.5, 5.0)
"""Pauses between attempts to publish a copy that was returned or refused."""

IN_PLACE = Backoff(0.2, 5.0)
"""Pauses between attempts in place, where `requeue_delay` is 0."""

Attend = Callable[[ConsumeLoop, Session, int, KeywordLogger], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class WorkerInstance:
    """What one worker needs of the consumer instance that it works for.

    Attributes:
        process: `process_messages`, of this instance.
        batch_key: Its `batch_key`, if its class has one.
        attend: Runs the instance's hooks around a session.
        exceptions: `exception_results`.
    """

    process: Process
    batch_key: BatchKey | None
    attend: Attend
    exceptions: ExceptionResults


def terms_of(settings: ConsumerSettings, exceptions: ExceptionResults) -> WorkerConfig:
    """On which terms these settings want a worker to work."""
    wanted = settings.wanted
    prefetch = settings.effective_prefetch
    retry = RetryPolicy(settings.max_requeue_attempts, settings.retry_count_header)
    interval = settings.seconds_until_settled
    return WorkerConfig(
        cutting=Cutting(
            size=settings.messages_per_batch,
            timeout=settings.seconds_per_batch,
            max_bytes=settings.bytes_per_batch,
            in_place=RetryInPlace(retry, IN_PLACE, settings.delay_steps)
            if settings.ordered_by_key
            else None,
        ),
        prefetch=prefetch,
        concurrency=settings.concurrency,
        process_timeout=settings.process_timeout,
        failure=FailurePolicy(
            settings.unhandled_exception_action,
            exceptions,
            isolate=settings.culprits_per_batch,
            is_atomic=settings.is_atomic,
        ),
        router=SettlementPlanner(
            settings.queue_name,
            retry,
            dead_letter_target(wanted),
            settings.dead_letter_exception_message,
            delay_steps=settings.delay_steps,
        ),
        # Without a limit on what is delivered, none on what is held but memory's own would remain.
        hold=UnconfirmedPolicy(settings.requeue_hold, prefetch // 2 if prefetch else 1000, RECHECK),
        pace=None if interval is None else Pace.within(interval, longest=PATIENCE),
        breaker=settings.breaker,
    )


class WorkerPool:
    """All workers of one consumer, and what they share.

    Args:
        name: The consumer's class, for logs, tags and observers.

    Attributes:
        outbox: Requeues and dead letters.
        post: What users publish; apart, since their mistakes may cost the channel.
        stop: Whether and by when all shall have stopped.
    """

    def __init__(
        self,
        name: str,
        settings: ConsumerSettings,
        transport: Transport,
        observers: Sequence[Observer],
        log: KeywordLogger,
    ) -> None:
        self._name = name
        self._settings = settings
        self._transport = transport
        self._observers = observers
        self._log = log
        self._topology, self._own = split_exclusive(build_topology(settings.wanted))
        self._workers: list[Worker] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._declaring: asyncio.Future[None] | None = None
        self._is_abandoned = False
        self._abandoned = 0
        self.outbox = DelayedPublisher(transport, log, settings.wanted)
        self.post = ReconnectingPublisher(transport, log)
        self.stop = Shutdown()

    @property
    def statuses(self) -> tuple[WorkerStatus, ...]:
        """A snapshot of each worker."""
        return tuple(worker.status for worker in self._workers)

    def is_healthy(self) -> bool:
        """Whether each worker consumes, or pauses on purpose, and none holds a message too long."""
        is_well = bool(self._workers) and all(worker.is_well for worker in self._workers)
        return is_well and not self.is_stuck()

    def is_stuck(self) -> bool:
        """Whether some worker has held a message for too long."""
        limit = self._settings.effective_stuck_after
        return any((worker.oldest or 0.0) > limit for worker in self._workers)

    async def start(self, seats: Sequence[WorkerInstance]) -> None:
        """Start a worker for each seat, and wait until all of them consume.

        Raises:
            TransportError: The broker says no, for good.
            StartInterrupted: A stop came first.
            Exception: A session's hook failed.
        """
        settings = self._settings
        terms = terms_of(settings, seats[0].exceptions)
        for index, seat in enumerate(seats):
            log = self._log.bind(worker=index)
            origin = Origin(self._name, settings.queue_name, index, server_of(settings.url))
            worker = Worker(
                index,
                transport=self._transport,
                declare=self._declare,
                subscription=functools.partial(self._subscription, index),
                terms=terms,
                backoff=Backoff(settings.reconnect_delay, settings.reconnect_delay_max),
                process=seat.process,
                batch_key=seat.batch_key,
                attend=seat.attend,
                outbox=self.outbox,
                stop=self.stop,
                observers=Observers(self._observers, origin, log),
                log=log,
            )
            self._workers.append(worker)
            self._tasks.append(asyncio.ensure_future(worker.run()))
        ready = asyncio.ensure_future(asyncio.wait([worker.ready for worker in self._workers]))
        stopping = asyncio.ensure_future(self.stop.event.wait())
        try:
            waiting: set[asyncio.Future[Any]] = {ready, stopping, *self._tasks}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in self._tasks:
                if task.done() and not task.cancelled():
                    await task
            if self.stop.event.is_set():
                msg = "stopped before every worker consumed"
                raise StartInterrupted(msg)
            await ready
        finally:
            ready.cancel()
            stopping.cancel()

    def _subscription(self, index: int, epoch: int) -> Subscription:
        settings = self._settings
        place = f"{socket.gethostname()}-{os.getpid()}-w{index}-e{epoch}"
        return Subscription(
            queue=settings.queue_name,
            prefetch=settings.effective_prefetch,
            # A consumer tag is a short string: 255 bytes (AMQP 0-9-1, section 4.2.5.3).
            consumer_tag=f"{self._name.encode()[:100].decode(errors='ignore')}-{place[-150:]}",
            arguments=settings.consumer_arguments or {},
            retry_count_header=settings.retry_count_header,
            own=self._own,
        )

    async def _declare(self) -> None:
        """Declare the topology; workers that want it at the same time share one attempt."""
        if self._declaring is None or self._declaring.done():
            self._declaring = asyncio.ensure_future(self._transport.declare(self._topology))
            # Retrieved, for the case that whoever waited has been told to stop meanwhile.
            self._declaring.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.shield(self._declaring)

    async def watch(self) -> None:
        """Wait for the stop, or for the end of a worker that nobody asked to stop.

        Raises:
            Exception: That worker's; a bug, since workers live through everything else.
        """
        stopping = asyncio.ensure_future(self.stop.event.wait())
        waiting: set[asyncio.Future[Any]] = {stopping, *self._tasks}
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
        if not self.stop.event.is_set():
            for task in self._tasks:
                if task.done():
                    await task

    async def finish(self) -> DrainIncomplete | None:
        """Wait until every worker has stopped; returns what is to be complained of."""
        await wait_until(self._tasks, self.stop.deadline)
        late = [task for task in self._tasks if not task.done()]
        if late:
            self._log.warning("the drain took too long; connections are cut", workers=len(late))
            self.abandon()
            # A hook may ignore its cancellation, too.
            await asyncio.wait(late, timeout=IGNORED_CANCELLATION)
        cut_off = self._abandoned + sum(worker.cut_off for worker in self._workers)
        if cut_off:
            return DrainIncomplete(
                f"the drain was cut short: {cut_off} messages were in mid-handling,"
                " and will be delivered again"
            )
        return DrainIncomplete("the drain was cut short") if self._is_abandoned else None

    def abandon(self) -> None:
        """Give up the drain: close connections, cancel handlers."""
        if self._is_abandoned:
            return
        self._is_abandoned = True
        self._abandoned = sum(worker.hands.uncut for worker in self._workers)
        for task in (*self._tasks, *(task for each in self._workers for task in each.hands.tasks)):
            task.cancel()

    async def close(self) -> None:
        """Close what the workers shared."""
        if self._declaring is not None and not self._declaring.done():
            self._declaring.cancel()
            await wait_until({self._declaring}, self.stop.deadline)
        deadline = max(self.stop.deadline, asyncio.get_running_loop().time() + 1)
        await asyncio.gather(self.outbox.close(deadline), self.post.close(deadline))
