"""What would a worker do with these messages?

`process` hands messages to a consumer's handler as a worker does, by the same code: they are cut
into batches, handled, tried once more where the settings say so, judged and routed. Only the broker
is left out: what it would be told is the outcome.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from aio_pika_batch.core.batch_run import BatchDecisions
from aio_pika_batch.core.batcher import Batch
from aio_pika_batch.core.message import NO_HEADERS, Headers, Message, retry_count
from aio_pika_batch.core.publication import Outcome, Outgoing, Publication
from aio_pika_batch.core.results import MessageOutcome, MessageResult, Nack, Result
from aio_pika_batch.core.retry import DeadLetterReason, DelayedCopy
from aio_pika_batch.core.settlement import Disposition
from aio_pika_batch.core.settlement_plan import PendingCopy, SettlementPlan
from aio_pika_batch.core.topology import Topology
from aio_pika_batch.errors import ConfigurationError, SessionLost
from aio_pika_batch.lifecycle import BaseConsumer
from aio_pika_batch.observer import BatchCut, HandlerError, Observer, Observers, Origin
from aio_pika_batch.runtime.batching import BatchIntake
from aio_pika_batch.runtime.handler import HandlerRun
from aio_pika_batch.runtime.handler_events import Reporter
from aio_pika_batch.runtime.worker_config import WorkerConfig
from aio_pika_batch.runtime.worker_pool import WorkerInstance, WorkerPool, terms_of
from aio_pika_batch.testing.messages import delivered
from aio_pika_batch.transport import Publisher, Session, Subscription


@dataclass(frozen=True, slots=True)
class RequeuedMessage:
    """A message that would be tried again.

    Attributes:
        retry_count: Of the next attempt.
        delay: Seconds until then.
        immediate: Whether it goes to the front of the queue, uncounted (`REQUEUE_IMMEDIATE`).
    """

    message: Message
    retry_count: int
    delay: float = 0.0
    immediate: bool = False

    @property
    def body(self) -> bytes:
        """The message's body."""
        return self.message.body


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A dead letter that would be published.

    Attributes:
        message: The original.
        headers: The dead letter's.
    """

    message: Message
    reason: DeadLetterReason
    exchange: str
    routing_key: str
    headers: Headers

    @property
    def body(self) -> bytes:
        """The message's body."""
        return self.message.body


# Not frozen: it is filled batch by batch.
@dataclass(slots=True)
class BatchOutcome:
    """What became of some messages. All lists are in the order in which the messages were given.

    Each message is in exactly one of `acked`, `requeued`, `dead_lettered` and `discarded`.

    Attributes:
        acked: Done.
        nacked: Condemned by NACK, be it the handler's or what its failure means; each of them is in
            `dead_lettered` or in `discarded`, too.
        requeued: Would be tried again.
        dead_lettered: Would go to the dead-letter exchange: NACKed, or out of attempts.
        discarded: The same without a dead-letter exchange: gone, unless a policy of the broker says
            otherwise.
        results: What counted for each message: yielded, or what a failure made of it.
        errors: What went wrong with the handler, run by run, in the order in which it happened.
        batches: What the handler was given, run by run.
        published: What the handler and the hooks published.
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


def sum_up(
    outcome: BatchOutcome,
    messages: Sequence[Message],
    handled: BatchDecisions,
    plan: SettlementPlan,
    header: str,
) -> None:
    """Enter what was decided.

    Args:
        messages: All of them; their tags are their places, from 1.
        handled: Every message, judged.
        plan: The router's, for the verdicts.
        header: Counts the retries.
    """
    by_tag = {message.delivery_tag: message for message in messages}
    verdicts = {each.message.delivery_tag: each for each in handled.not_acked}
    settled = {tag: each.disposition for each in plan.settlements for tag in each.tags}
    copies = {each.tag: each for each in plan.copies}
    for tag, message in by_tag.items():
        verdict = verdicts.get(tag)
        if verdict is None:
            outcome.acked.append(message)
            outcome.results.append(MessageResult.ACK)
            continue
        outcome.results.append(verdict.result)
        if verdict.result is MessageResult.NACK or isinstance(verdict.result, Nack):
            outcome.nacked.append(message)
        if tag in copies:
            _enter_copy(outcome, message, copies[tag], header)
        elif settled[tag] is Disposition.REQUEUE:
            outcome.requeued.append(_at_once(message, verdict))
        else:
            outcome.discarded.append(message)


def _at_once(message: Message, verdict: MessageOutcome) -> RequeuedMessage:
    known = verdict.message.has_readable_headers
    return RequeuedMessage(message, verdict.message.retry_count if known else 0, immediate=True)


def _enter_copy(
    outcome: BatchOutcome, message: Message, republication: PendingCopy, header: str
) -> None:
    copy = republication.copy
    if republication.reason is None:
        count = retry_count(copy.add[header]) or 0
        delay = copy.level / 1000 if isinstance(copy, DelayedCopy) else 0.0
        outcome.requeued.append(RequeuedMessage(message, count, delay))
        return
    outcome.dead_lettered.append(
        DeadLetter(
            message,
            republication.reason,
            copy.exchange,
            copy.routing_key,
            copy.properties.headers or NO_HEADERS,
        )
    )


async def process(
    consumer: BaseConsumer[Any], messages: Iterable[bytes | Message], *, hooks: bool = True
) -> BatchOutcome:
    """Hand messages to a consumer as a worker does, and tell what it would tell the broker.

    They are cut into batches as the settings say, as if nothing more came; a `Consumer` gets them
    one by one. Batches are handled one after another. What is requeued is not handled again, but
    with `ordered_by_key`, where messages are tried again in place: without the waits in between.
    Nothing is sent anywhere; what is published counts as confirmed, and is in the outcome.

    Args:
        consumer: Not running.
        messages: Bodies, or messages of :func:`make_message`. They are numbered anew, from 1.
        hooks: Whether `on_start` and `on_stop` run around it.

    Returns:
        What the handler's errors mean is in it, too, and the errors themselves.

    Raises:
        ConfigurationError: The consumer is running.
        SessionLost: The handler went on for 5 s although it was cancelled, at `process_timeout`.
        DrainIncomplete: `on_stop` was cut off after `shutdown_timeout`.
        Exception: What a hook raises.
    """
    settings = consumer.settings
    if consumer.is_running:
        raise ConfigurationError(
            f"{type(consumer).__name__} is running: what it does is seen on its broker; process()"
            " is for consumers that have not been started"
        )
    rehearsal = _Rehearsal(
        consumer,
        delivered(
            messages,
            queue=settings.queue_name,
            retry_count_header=settings.retry_count_header,
        ),
    )
    life = consumer._life  # noqa: SLF001  -- our own
    try:
        await life.begin(
            rehearsal,
            on_start=consumer.on_start if hooks else _nothing,
            on_stop=consumer.on_stop if hooks else _nothing,
            seats=lambda: [consumer._seat(0)],  # noqa: SLF001  -- our own
            timeout=settings.shutdown_timeout,
        )
    finally:
        life.request_stop()
        incomplete = await life.drained()
    if incomplete is not None:
        raise incomplete
    return rehearsal.outcome


async def _nothing() -> None:
    """A hook that is left out."""


class _Rehearsal(WorkerPool):
    """A crew whose work is one worker's, on messages that are there already.

    Attributes:
        outcome: Complete once it has started.
    """

    def __init__(self, consumer: BaseConsumer[Any], messages: Sequence[Message]) -> None:
        name, settings, log = type(consumer).__name__, consumer.settings, consumer._log  # noqa: SLF001  -- our own
        self.outcome = BatchOutcome()
        observers = (_Witness(self.outcome), *consumer._observers)  # noqa: SLF001  -- our own
        super().__init__(name, settings, _Nowhere(self.outcome.published), observers, log)
        self._messages = messages
        origin = Origin(name, settings.queue_name, 0)
        self._reporter = Reporter(Observers(observers, origin, log), log)

    async def start(self, seats: Sequence[WorkerInstance]) -> None:
        """Handle all messages."""
        [seat] = seats
        terms = terms_of(self._settings, seat.exceptions)
        collector = BatchIntake(terms.cutting, seat.batch_key, terms.failure)
        now = asyncio.get_running_loop().time()
        together = BatchDecisions()
        refused = collector.add(self._messages, now)
        if refused is not None:
            self._reporter.refused(refused.not_acked)
            together.add(refused)
        # Whatever there is to wait for is over: the batch that does not fill, the pause of a retry.
        while (batch := collector.batcher.poll(math.inf)) is not None:
            keeps_failures = collector.keeps_failures(batch)
            handled = await self._handle(batch, seat, terms, keeps_failures=keeps_failures)
            self._reporter.kept(collector.take_back(batch, handled, now))
            collector.release(batch)
            together.add(handled)
        plan = terms.router.plan(together.not_acked, datetime.now(UTC))
        header = terms.router.retry.header
        sum_up(self.outcome, self._messages, together, plan, header)

    async def _handle(
        self, batch: Batch, seat: WorkerInstance, terms: WorkerConfig, *, keeps_failures: bool
    ) -> BatchDecisions:
        ignored = asyncio.get_running_loop().create_future()
        handling = HandlerRun(
            seat.process,
            batch,
            terms.failure,
            timeout=terms.process_timeout,
            on_ignored=lambda: ignored.set_result(None),
            on_yield=None,
            keeps_failures=keeps_failures,
            reporter=self._reporter,
        )
        running = asyncio.ensure_future(handling.run())
        try:
            await asyncio.wait({running, ignored}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            running.cancel()
            await asyncio.wait({running})
            raise
        if not running.done():
            running.cancel()
            raise SessionLost(
                "the handler goes on although it was cancelled, at process_timeout: a worker would"
                " give its session up, and the broker would deliver these messages again"
            )
        return await running


class _Witness(Observer):
    """Notes what the handler was given, and how it failed."""

    def __init__(self, outcome: BatchOutcome) -> None:
        self._outcome = outcome

    def batch_cut(self, origin: Origin, event: BatchCut) -> None:
        del origin
        self._outcome.batches.append(list(event.messages))

    def handler_error(self, origin: Origin, event: HandlerError) -> None:
        del origin
        self._outcome.errors.append(event.error)


class _Nowhere:
    """A transport that keeps what is published, and has nothing else to offer."""

    def __init__(self, published: list[Publication]) -> None:
        self._published = published

    async def declare(self, topology: Topology) -> None:
        """Everything is as declared."""

    def session(self, subscription: Subscription) -> AbstractAsyncContextManager[Session]:
        """Never called: messages are there already."""
        raise NotImplementedError(subscription)

    @asynccontextmanager
    async def publisher(self) -> AsyncIterator[Publisher]:
        """Confirm everything."""
        yield _Notes(self._published)


class _Notes:
    """A publisher that confirms everything."""

    is_open = True

    def __init__(self, published: list[Publication]) -> None:
        self._published = published

    async def publish(self, publications: Sequence[Outgoing]) -> Sequence[Outcome]:
        """Keep them."""
        self._published += [each for each in publications if isinstance(each, Publication)]
        return [Outcome.CONFIRMED] * len(publications)
