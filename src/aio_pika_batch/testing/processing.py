"""`process` runs a consumer's handler on messages, and returns what a worker would do with them.

It runs a worker's own code to batch and handle messages, to retry them in place and to plan their
settlement. Only the session is missing, and what it would be asked to do is the outcome.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from aio_pika_batch.adapters.memory.rabbitmq import NEWEST
from aio_pika_batch.consumer import BaseConsumer
from aio_pika_batch.core.batch_run import BatchDecisions
from aio_pika_batch.core.batcher import Batch
from aio_pika_batch.core.message import (
    NO_HEADERS,
    Headers,
    Message,
    readable_headers,
    retry_count,
)
from aio_pika_batch.core.publication import Copy, Outcome, Outgoing, Publication
from aio_pika_batch.core.results import MessageResult, Nack, Result
from aio_pika_batch.core.retry import DeadLetterReason, DelayedCopy
from aio_pika_batch.core.settlement import (
    NO_NATIVE_RETRIES,
    Disposition,
    Modification,
    NativeRetries,
)
from aio_pika_batch.core.settlement_plan import PendingCopy
from aio_pika_batch.core.topology import (
    Topology,
    Version,
    amqp10_obstacle,
    native_retries,
    parse_version,
)
from aio_pika_batch.core.topology_options import (
    DEAD_LETTER_EXCHANGE,
    DEAD_LETTER_ROUTING_KEY,
    declared_arguments,
    effective_queue_type,
)
from aio_pika_batch.errors import ConfigurationError, SessionLost
from aio_pika_batch.observer import BatchCut, HandlerError, Observer, Observers, Origin
from aio_pika_batch.runtime.batching import open_intake
from aio_pika_batch.runtime.consume_loop import WorkerInstance
from aio_pika_batch.runtime.handler import HandlerOptions, HandlerRun
from aio_pika_batch.runtime.worker_config import WorkerConfig
from aio_pika_batch.runtime.worker_pool import WorkerPool
from aio_pika_batch.testing.messages import delivered
from aio_pika_batch.transport import Publisher, Session, Subscription


@dataclass(frozen=True, slots=True)
class RequeuedMessage:
    """A message that would be tried again.

    Attributes:
        retry_count: The retry count of the next attempt.
        delay: Seconds until the next attempt.
        immediate: Whether it goes to the front of the queue, uncounted (`REQUEUE_IMMEDIATE`).
        native: Whether the original waits in its queue, without a copy (`wire="amqp10"`).
    """

    message: Message
    retry_count: int
    delay: float = 0.0
    immediate: bool = False
    native: bool = False

    @property
    def body(self) -> bytes:
        """The message's body."""
        return self.message.body


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A dead letter that would be published.

    Attributes:
        message: The original message.
        headers: The headers of the dead letter, but those that only the broker adds.
        native: Whether the queue itself dead-letters the original, without a copy
            (`wire="amqp10"`).
    """

    message: Message
    reason: DeadLetterReason
    exchange: str
    routing_key: str
    headers: Headers
    native: bool = False

    @property
    def body(self) -> bytes:
        """The message's body."""
        return self.message.body


# Not frozen: it is filled batch by batch.
#
# A message that a NACK would discard is not listed as dead-lettered. A test that expects a dead
# letter must fail if no dead-letter exchange is known, since the message would be gone.
@dataclass(slots=True)
class BatchOutcome:
    """What happened to some messages. All lists are in the order in which the messages were given.

    Each message is in exactly one of `acked`, `requeued`, `dead_lettered` and `discarded`.

    Attributes:
        acked: Messages that would be acknowledged.
        nacked: Messages whose result is a NACK, yielded or caused by a failure. Each is also in
            `dead_lettered` or `discarded`.
        requeued: Messages that would be tried again.
        dead_lettered: Messages that would go to the dead-letter exchange: NACKed, or without
            attempts left.
        discarded: The same messages if no dead-letter exchange is known: they are gone, unless a
            policy of the broker dead-letters them.
        results: The final result of each message, yielded or caused by a failure.
        errors: The errors of all runs of the handler, in order.
        batches: The messages of all runs of the handler, in order.
        published: The publications of the handler and the hooks.
    """

    acked: list[Message] = field(default_factory=list)
    nacked: list[Message] = field(default_factory=list)
    requeued: list[RequeuedMessage] = field(default_factory=list)
    dead_lettered: list[DeadLetter] = field(default_factory=list)
    discarded: list[Message] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)
    batches: list[list[Message]] = field(default_factory=list)
    published: list[Publication] = field(default_factory=list)


async def process(
    consumer: BaseConsumer[Any],
    messages: Iterable[bytes | Message],
    *,
    hooks: bool = True,
    version: str = NEWEST,
) -> BatchOutcome:
    """Run a consumer's handler on messages as a worker does, and return what the worker would do.

    The settings decide about the batches; a `Consumer` gets its messages one by one. Batches are
    handled one after another. A requeued message is not handled again, except with
    `ordered_by_key`, which retries in place; the pauses are left out. Nothing is sent: what the
    handler publishes counts as confirmed, and is part of the outcome.

    Args:
        consumer: A consumer that is not running.
        messages: Bodies, or messages of :func:`make_message`. Their delivery tags become 1, 2, ….
        hooks: Whether `on_start` and `on_stop` run around it.
        version: The RabbitMQ version. With `wire="amqp10"`, it decides what needs no copy.

    Returns:
        The outcome; it includes the handler's errors, and what they mean for the messages.

    Raises:
        ConfigurationError: The consumer is running, or its handler can't work.
        SessionLost: The handler was cancelled at `process_timeout`, and still ran 5 s later.
        DrainIncomplete: `on_stop` took longer than `shutdown_timeout`.
        Exception: What a hook raises.
    """
    if consumer.is_running:
        raise ConfigurationError(
            f"{type(consumer).__name__} is running; call process() on a consumer that has not been"
            " started"
        )
    settings = consumer.settings
    pool = _OfflinePool(
        consumer,
        delivered(
            messages, queue=settings.queue_name, retry_count_header=settings.retry_count_header
        ),
        parse_version("RabbitMQ", version),
    )
    lifecycle = consumer._lifecycle  # noqa: SLF001  -- the library's own
    try:
        await lifecycle.begin(
            pool,
            on_start=consumer.on_start if hooks else _nothing,
            on_stop=consumer.on_stop if hooks else _nothing,
            instances=lambda: [consumer._instance(0)],  # noqa: SLF001  -- the library's own
            timeout=settings.shutdown_timeout,
        )
    finally:
        lifecycle.request_stop()
        failure = await lifecycle.drained()
    if failure is not None:
        raise failure
    return pool.outcome


async def _nothing() -> None:
    """Replace a hook that is left out."""


class _OfflinePool(WorkerPool):
    """A worker pool that handles given messages, with the code of one worker.

    A second implementation would sooner or later differ from what a worker does; a property test
    compares the two. The outcome is complete once the pool has started.
    """

    def __init__(
        self, consumer: BaseConsumer[Any], messages: Sequence[Message], version: Version | None
    ) -> None:
        name, settings, log = type(consumer).__name__, consumer.settings, consumer._log  # noqa: SLF001  -- the library's own
        self.outcome = BatchOutcome()
        observers = (_OutcomeObserver(self.outcome), *consumer._observers)  # noqa: SLF001  -- the library's own
        config = consumer._config()  # noqa: SLF001  -- the library's own
        super().__init__(name, config, _OfflineTransport(self.outcome.published), observers, log)
        self._messages = messages
        self._native = _native_retries(settings.wire, config, version)
        origin = Origin(name, settings.queue_name, 0)
        self._events = Observers(observers, origin, log)

    async def start(
        self, instances: Sequence[WorkerInstance], *, patience: float | None = None
    ) -> None:
        """Handle all messages."""
        del patience
        [instance] = instances
        intake = open_intake(self._config, instance.batch_key, self._events, self._log)
        now = asyncio.get_running_loop().time()
        together = BatchDecisions()
        failed = intake.add(self._messages, now)
        if failed is not None:
            together.add(failed)
        # At the end of time, batches that do not fill and pauses of retries in place are due, too.
        # Not one batch of all messages: the handler must not see in a test what it never sees in
        # production, such as more than `batch_size` messages.
        while (batch := intake.batcher.poll(math.inf)) is not None:
            keeps_failures = intake.keeps_failures(batch)
            decisions = await self._handle(batch, instance, keeps_failures=keeps_failures)
            if self.check.mistake is not None:
                return
            intake.take_back(batch, decisions, now)
            intake.release(batch)
            together.add(decisions)
        self._plan(together)

    async def _handle(
        self, batch: Batch, instance: WorkerInstance, *, keeps_failures: bool
    ) -> BatchDecisions:
        # As in a worker, a handler that ignores its cancellation must not block this forever.
        ignored: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        options = HandlerOptions(
            process=instance.process,
            failure=self._config.failure,
            check=self.check,
            timeout=self._config.process_timeout,
            on_ignored=lambda: ignored.set_result(None),
            on_yield=None,
            observers=self._events,
            log=self._log,
        )
        run = HandlerRun(batch, options, keeps_failures=keeps_failures)
        running = asyncio.ensure_future(run.run())
        try:
            futures: set[asyncio.Future[Any]] = {running, ignored}
            await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            # The test was cancelled: the handler must clean up before `on_stop` runs.
            running.cancel()
            await asyncio.wait({running})
            raise
        if not running.done():
            running.cancel()
            raise SessionLost(
                "the handler was cancelled at process_timeout and still runs: a worker would give"
                " up its session, and the broker would deliver these messages again"
            )
        return await running

    def _plan(self, handled: BatchDecisions) -> None:
        """Plan the settlement of all messages, and add each to the outcome."""
        outcome, now = self.outcome, datetime.now(UTC)
        planner = self._config.planner.natively(self._native)
        arguments = declared_arguments(self._config.topology)
        plan = planner.plan(handled.not_acked, now)
        decisions = {each.message.delivery_tag: each for each in handled.not_acked}
        settled = {tag: each.disposition for each in plan.settlements for tag in each.tags}
        copies = {each.tag: each for each in plan.copies}
        for message in self._messages:
            tag = message.delivery_tag
            decision = decisions.get(tag)
            if decision is None:
                outcome.acked.append(message)
                outcome.results.append(MessageResult.ACK)
                continue
            outcome.results.append(decision.result)
            if decision.result is MessageResult.NACK or isinstance(decision.result, Nack):
                outcome.nacked.append(message)
            pending = copies.get(tag)
            if pending is not None and pending.reason is not None:
                dead = _dead_letter(message, pending.reason, pending.copy, arguments)
                outcome.dead_lettered.append(dead)
            elif pending is not None:
                outcome.requeued.append(_requeued(message, pending, planner.retry.header, now))
            elif settled[tag] is Disposition.REQUEUE:
                known = decision.message.has_readable_headers
                count = decision.message.retry_count if known else 0
                outcome.requeued.append(RequeuedMessage(message, count, immediate=True))
            else:
                outcome.discarded.append(message)


def _requeued(
    message: Message, pending: PendingCopy, header: str, now: datetime
) -> RequeuedMessage:
    copy = pending.copy
    if isinstance(copy, Modification):
        count = retry_count(copy.headers.get(header)) or 0
        delay = (copy.until - now).total_seconds() if copy.until else pending.hold
        return RequeuedMessage(message, count, delay, native=True)
    count = retry_count(copy.add.get(header)) or 0
    delay = copy.level / 1000 if isinstance(copy, DelayedCopy) else pending.hold
    return RequeuedMessage(message, count, delay)


def _dead_letter(
    message: Message, reason: DeadLetterReason, copy: Copy | Modification, arguments: Headers
) -> DeadLetter:
    if isinstance(copy, Modification):
        headers = {**(readable_headers(message) or NO_HEADERS), **copy.headers}
        exchange = str(arguments.get(DEAD_LETTER_EXCHANGE))
        key = str(arguments.get(DEAD_LETTER_ROUTING_KEY, message.routing_key))
        return DeadLetter(message, reason, exchange, key, headers, native=True)
    headers = dict(copy.properties.headers or NO_HEADERS)
    return DeadLetter(message, reason, copy.exchange, copy.routing_key, headers)


def _native_retries(wire: str, config: WorkerConfig, version: Version | None) -> NativeRetries:
    """What a session would do without copies, if the queue is as the settings say."""
    options = config.topology
    obstacle = amqp10_obstacle(
        version,
        effective_queue_type(options),
        options.queue_arguments,
        config.consumer_arguments,
    )
    if wire != "amqp10" or version is None or obstacle is not None:
        return NO_NATIVE_RETRIES
    return native_retries(version, declared_arguments(options))


class _OutcomeObserver(Observer):
    """Adds the batches and errors of the handler to the outcome."""

    def __init__(self, outcome: BatchOutcome) -> None:
        self._outcome = outcome

    def batch_cut(self, origin: Origin, event: BatchCut) -> None:
        del origin
        self._outcome.batches.append(list(event.messages))

    def handler_error(self, origin: Origin, event: HandlerError) -> None:
        del origin
        self._outcome.errors.append(event.error)


class _OfflineTransport:
    """A transport without sessions, and its only publisher, which confirms everything."""

    is_open = True

    def __init__(self, published: list[Publication]) -> None:
        self._published = published

    async def declare(self, topology: Topology) -> None:
        """Accept any topology."""

    def session(self, subscription: Subscription) -> AbstractAsyncContextManager[Session]:
        """Never called: the messages are given."""
        raise NotImplementedError(subscription)

    @asynccontextmanager
    async def publisher(self) -> AsyncIterator[Publisher]:
        """Open the publisher."""
        yield self

    async def publish(self, publications: Sequence[Outgoing]) -> Sequence[Outcome]:
        """Keep the publications, and confirm them."""
        self._published += [each for each in publications if isinstance(each, Publication)]
        return [Outcome.CONFIRMED] * len(publications)
