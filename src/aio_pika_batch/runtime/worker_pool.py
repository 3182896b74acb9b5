"""The workers of one consumer, from a start to the stop, and the topology that they need."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace

from aio_pika_batch.core.publication import Copy, Outcome
from aio_pika_batch.core.topology import (
    Topology,
    UnfulfilledWishes,
    build_topology,
    exchange_to_look_up,
    split_exclusive,
)
from aio_pika_batch.core.topology_options import effective_queue_type, policy_command
from aio_pika_batch.errors import DrainIncomplete, SessionLost, StartInterrupted, TransportError
from aio_pika_batch.logs import BURST_INTERVAL, KeywordLogger, format_error
from aio_pika_batch.observer import Observer, Observers, Origin
from aio_pika_batch.runtime.consume_loop import WorkerInstance, WorkerResources
from aio_pika_batch.runtime.handler import IGNORED_CANCELLATION, HandlerCheck
from aio_pika_batch.runtime.publishing import (
    CopyPublisher,
    CopyPublishers,
    DelayedPublisher,
    SharedPublisher,
)
from aio_pika_batch.runtime.quarantine import Quarantine
from aio_pika_batch.runtime.shutdown import Shutdown, wait_until
from aio_pika_batch.runtime.worker import Worker
from aio_pika_batch.runtime.worker_config import WorkerConfig
from aio_pika_batch.status import WorkerStatus
from aio_pika_batch.transport import (
    InspectingTransport,
    Session,
    Subscription,
    Transport,
    VersionedTransport,
)

REDECLARE_AFTER = 5.0
"""Minimum seconds between two declarations because of dead letters that came back."""


class WorkerPool:
    """All workers of one consumer, and what they share. Each start makes a new pool.

    Args:
        name: The consumer's class, for logs, consumer tags and observers.
        server: The broker's host and port for observers, if the URL names just one.
        on_running: Called once, when the first worker consumes for the first time.

    Attributes:
        publisher: Publishes what the user publishes. Retries and dead letters have others: a
            missing exchange closes a channel, and leaves everything in flight on it in doubt.
        shutdown: Whether and by when the workers should stop.
        check: Whether the handler works at all.
    """

    def __init__(
        self,
        name: str,
        config: WorkerConfig,
        transport: Transport,
        observers: Sequence[Observer],
        log: KeywordLogger,
        *,
        server: tuple[str, int] | None = None,
        on_running: Callable[[], None] = lambda: None,
    ) -> None:
        self._name = name
        self._config = config
        self._transport = transport
        self._observers = observers
        self._log = log
        self._server = server
        self._on_running = on_running
        self._workers: list[Worker] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._is_watched = False
        self._abandoned: int | None = None
        # None uses a consuming connection: under a memory alarm the broker stops reading from
        # connections that have published, and acks behind the publishes would wait.
        self._copies = CopyPublishers(
            DelayedPublisher(transport, log, config.topology), CopyPublisher(transport, log)
        )
        self._declarer = TopologyDeclarer(transport, config, self._copies, log)
        self.publisher = SharedPublisher(transport, log)
        crashes = config.planner.crashes
        # Other brokers may not be able to change the prefetch count of a session.
        counts = crashes is not None and isinstance(transport, VersionedTransport)
        self._quarantine = Quarantine(crashes, log) if crashes is not None and counts else None
        self.shutdown = Shutdown()
        self.check = HandlerCheck(name, log)

    @property
    def statuses(self) -> tuple[WorkerStatus, ...]:
        """A snapshot of each worker."""
        return tuple(worker.status for worker in self._workers)

    def is_healthy(self) -> bool:
        """Return whether each worker consumes or pauses on purpose, and none is stuck."""
        is_well = bool(self._workers) and all(worker.is_well for worker in self._workers)
        return is_well and not self.is_stuck()

    def is_stuck(self) -> bool:
        """Return whether a worker holds a message for longer than `stuck_after`."""
        return any((worker.oldest or 0.0) > self._config.stuck_after for worker in self._workers)

    async def start(
        self, instances: Sequence[WorkerInstance], *, patience: float | None = None
    ) -> None:
        """Start a worker for each instance, and wait until all of them consume.

        Args:
            patience: Seconds to wait if the broker is slow, and not at all after a failed attempt
                to connect: the workers go on in the background. None waits without a limit.

        Raises:
            TransportError: The broker refuses for good.
            StartInterrupted: A stop was requested first.
            Exception: A session's hook failed.
        """
        shared = WorkerResources(
            declare=self._declarer.declare,
            session=self._session,
            publishers=self._copies,
            quarantine=self._quarantine,
            shutdown=self.shutdown,
            check=self.check,
        )
        for index, instance in enumerate(instances):
            log = self._log.bind(worker=index)
            origin = Origin(self._name, self._config.queue_name, index, self._server)
            observers = Observers(self._observers, origin, log)
            worker = Worker(index, self._config, instance, shared, observers=observers, log=log)
            self._workers.append(worker)
            self._tasks.append(asyncio.ensure_future(worker.run()))
            self._tasks[-1].add_done_callback(self._on_worker_done)
        self._workers[0].ready.add_done_callback(self._on_first_ready)
        ready = asyncio.ensure_future(asyncio.wait([worker.ready for worker in self._workers]))
        try:
            failed = () if patience is None else (each.failed for each in self._workers)
            await self.shutdown.or_first_of((ready, *self._tasks, *failed), timeout=patience)
            # Of all, since what isn't looked at is logged by asyncio.
            ended = [task for task in self._tasks if task.done() and not task.cancelled()]
            for failure in [task.exception() for task in ended]:
                if failure is not None:
                    raise failure
            if self.shutdown.is_requested:
                raise StartInterrupted("stopped before every worker consumed")
            if patience is not None and not ready.done():
                for worker in self._workers:
                    worker.raises_refusals = False
                return
            await ready
        finally:
            ready.cancel()

    def _on_first_ready(self, ready: asyncio.Future[None]) -> None:
        if not ready.cancelled() and ready.exception() is None:
            self._on_running()

    def _on_worker_done(self, task: asyncio.Task[None]) -> None:
        # asyncio.run cancels the tasks that are left when the main coroutine has ended. In `run`
        # that isn't the fault of a start() that returns.
        if task.cancelled() and not (self.shutdown.is_requested or self._is_watched):
            self._is_watched = True  # one line for all workers
            self._log.warning(
                "the program ended without stop(): start() returns; use run() to wait"
            )

    def _session(
        self, index: int, epoch: int, prefetch: int
    ) -> AbstractAsyncContextManager[Session]:
        place = f"{socket.gethostname()}-{os.getpid()}-w{index}-e{epoch}"
        subscription = Subscription(
            queue=self._config.queue_name,
            prefetch=prefetch,
            # A consumer tag is a short string: 255 bytes (AMQP 0-9-1, section 4.2.5.3).
            consumer_tag=f"{self._name.encode()[:100].decode(errors='ignore')}-{place[-150:]}",
            arguments=self._config.consumer_arguments,
            retry_count_header=self._config.planner.retry.header,
            own=self._declarer.own,
            queue_type=effective_queue_type(self._config.topology),
        )
        return self._transport.session(subscription)

    async def watch(self) -> None:
        """Wait for the stop, or for a worker that ends without one.

        Raises:
            Exception: That worker's; a bug, because workers survive everything else.
        """
        self._is_watched = True
        await self.shutdown.or_first_of(self._tasks)
        if not self.shutdown.is_requested:
            for task in self._tasks:
                if task.cancelled():
                    raise SessionLost("a worker's task was cancelled, but not by this library")
                if task.done():
                    await task

    async def finish(self) -> DrainIncomplete | None:
        """Wait until every worker has stopped; return an error if the drain was cut short."""
        await wait_until(self._tasks, self.shutdown.deadline)
        late = [task for task in self._tasks if not task.done()]
        if late:
            self._log.warning("the drain took too long; connections are cut", workers=len(late))
            self.abandon()
            # A hook may ignore its cancellation.
            await asyncio.wait(late, timeout=IGNORED_CANCELLATION)
        cut_off = (self._abandoned or 0) + sum(worker.cut_off for worker in self._workers)
        unproven = sum(worker.unproven for worker in self._workers)
        reasons = []
        if cut_off:
            reasons.append(
                f"{cut_off} messages were still being handled, and will be delivered again"
            )
        if unproven:
            reasons.append(
                f"{unproven} messages are settled, but the broker has not confirmed it in time;"
                " they may be delivered again"
            )
        if reasons:
            return DrainIncomplete(f"the drain was cut short: {'; '.join(reasons)}")
        return None if self._abandoned is None else DrainIncomplete("the drain was cut short")

    def abandon(self) -> None:
        """Give up the drain: cancel handlers and close connections."""
        if self._abandoned is not None:
            return
        # Counted now: in a moment all of them are cancelled.
        self._abandoned = sum(worker.slots.not_cancelled for worker in self._workers)
        for task in self._tasks:
            task.cancel()
        for worker in self._workers:
            worker.slots.abandon()

    async def close(self) -> None:
        """Close what the workers shared."""
        if self._quarantine is not None:
            self._quarantine.close()
        await self._declarer.close(self.shutdown.deadline)
        # Even if the time is up: RabbitMQ logs an error for a connection that ends without a close.
        deadline = max(self.shutdown.deadline, asyncio.get_running_loop().time() + 1)
        await asyncio.gather(self._copies.close(deadline), self.publisher.close(deadline))


class TopologyDeclarer:
    """Declares the topology of one consumer: before each session, and if dead letters come back.

    Whatever ended the last session, or returned a dead letter, may have deleted a queue or a
    binding.

    Args:
        copies: Say which dead letters came back, and declare delay queues.

    Attributes:
        own: What each session must declare on its own connection.
    """

    def __init__(
        self,
        transport: Transport,
        config: WorkerConfig,
        copies: CopyPublishers,
        log: KeywordLogger,
    ) -> None:
        self._transport = transport
        # Wait queues are declared apart, since the consumer can do without them.
        self._options = replace(config.topology, wait_levels=())
        self._vhost = config.vhost
        self._log = log
        self._copies = copies
        copies.dead_letters.on_undelivered = self._on_undelivered
        self._exchange_type: str | None = None
        self._declaring: asyncio.Future[None] | None = None
        self._has_declared = False
        self._redeclaring: asyncio.Task[None] | None = None
        self._redeclared_at = -BURST_INTERVAL
        self._complained_at = -BURST_INTERVAL
        self.own = Topology()

    async def declare(self) -> None:
        """Declare the topology; workers that need it at the same time share one attempt.

        Raises:
            TransportError: It can't be declared.
        """
        if self._declaring is None or self._declaring.done():
            self._declaring = asyncio.ensure_future(self._declare())
            # Marks an exception as retrieved: all who wait may have been stopped meanwhile.
            self._declaring.add_done_callback(lambda done: done.cancelled() or done.exception())
        await asyncio.shield(self._declaring)

    async def _declare(self) -> None:
        exchange = exchange_to_look_up(self._options)
        if (
            exchange is not None
            and self._exchange_type is None
            and isinstance(self._transport, InspectingTransport)
        ):
            self._exchange_type = await self._transport.exchange_type(exchange)
        topology = build_topology(self._options, dead_letter_exchange_type=self._exchange_type)
        shared, self.own = split_exclusive(topology)
        if self._has_declared:
            # Once is enough to find a user without permission, and it takes a publish.
            shared = replace(shared, publishes=())
        unfulfilled = await self._transport.declare(shared)
        if not self._has_declared:
            self._has_declared = True
            self._warn(unfulfilled or {})
        if exchange is not None and self._exchange_type is None:
            # It was missing, and is there now.
            self._exchange_type = exchange.type
        await self._copies.retries.declare_delay_queues()

    def _warn(self, unfulfilled: Mapping[str, UnfulfilledWishes]) -> None:
        for name, wishes in unfulfilled.items():
            if wishes.differing:
                self._log.warning(
                    "queue has other dead-letter arguments: what the broker gives up goes there",
                    arguments=dict(wishes.differing),
                )
            else:
                self._log.warning(
                    "queue lacks dead-letter arguments: what the broker gives up may be lost"
                    " without this policy",
                    lacking=sorted(wishes.lacking),
                    policy=policy_command(name, wishes.lacking, self._vhost),
                )

    def _on_undelivered(self, copy: Copy, outcome: Outcome) -> None:
        """Log why a dead letter did not arrive, and declare its queue again."""
        now = asyncio.get_running_loop().time()
        if now - self._complained_at >= BURST_INTERVAL:
            self._complained_at = now
            reason = "no queue is bound for its routing key"
            if outcome is Outcome.REFUSED:
                reason = "its queue is full, or its exchange is missing"
            self._log.error(
                "a dead letter did not arrive: its message is held, and it is published again",
                reason=reason,
                exchange=copy.exchange,
                routing_key=copy.routing_key,
            )
        if self._redeclaring is None and now - self._redeclared_at >= REDECLARE_AFTER:
            self._redeclared_at = now
            self._redeclaring = asyncio.get_running_loop().create_task(self._redeclare())

    async def _redeclare(self) -> None:
        # The exchange may have been deleted and created again, with another type.
        self._exchange_type = None
        try:
            await self.declare()
        except Exception as error:  # noqa: BLE001  -- the next dead letter that comes back tries again
            expected = isinstance(error, TransportError)
            self._log.warning(
                "the topology can't be declared again",
                error=format_error(error),
                exc_info=None if expected else error,
            )
        finally:
            self._redeclaring = None

    async def close(self, deadline: float) -> None:
        """Stop declaring."""
        pending = {each for each in (self._declaring, self._redeclaring) if each is not None}
        for each in pending:
            each.cancel()
        await wait_until(pending, deadline)
