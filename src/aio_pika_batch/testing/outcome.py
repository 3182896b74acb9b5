"""The outcome of `process`: what a worker would do with some messages, made from its plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from aio_pika_batch.core.batch_run import BatchDecisions
from aio_pika_batch.core.message import (
    NO_HEADERS,
    Headers,
    Message,
    readable_headers,
    retry_count,
)
from aio_pika_batch.core.publication import Copy, Publication
from aio_pika_batch.core.results import MessageOutcome, MessageResult, Nack, Result
from aio_pika_batch.core.retry import DeadLetterReason, DelayedCopy
from aio_pika_batch.core.settlement import Disposition, Modification
from aio_pika_batch.core.settlement_plan import PendingCopy, SettlementPlan
from aio_pika_batch.core.topology_options import DEAD_LETTER_EXCHANGE, DEAD_LETTER_ROUTING_KEY


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


@dataclass(frozen=True, slots=True)
class PlanContext:
    """What a plan doesn't contain.

    Attributes:
        header: The header that counts the retries.
        arguments: The arguments of the queue.
        now: The time of the plan.
    """

    header: str
    arguments: Headers
    now: datetime


def fill(
    outcome: BatchOutcome,
    messages: Sequence[Message],
    handled: BatchDecisions,
    plan: SettlementPlan,
    context: PlanContext,
) -> None:
    """Add all messages to the outcome.

    Args:
        messages: All messages, in order.
        handled: The decisions of all batches.
        plan: The plan for the messages that are not acked.
    """
    decisions = {each.message.delivery_tag: each for each in handled.not_acked}
    settled = {tag: each.disposition for each in plan.settlements for tag in each.tags}
    copies = {each.tag: each for each in plan.copies}
    for message in messages:
        tag = message.delivery_tag
        decision = decisions.get(tag)
        if decision is None:
            outcome.acked.append(message)
            outcome.results.append(MessageResult.ACK)
            continue
        outcome.results.append(decision.result)
        if decision.result is MessageResult.NACK or isinstance(decision.result, Nack):
            outcome.nacked.append(message)
        if tag in copies:
            _add_pending(outcome, message, copies[tag], context)
        elif settled[tag] is Disposition.REQUEUE:
            outcome.requeued.append(_requeued_immediately(message, decision))
        else:
            outcome.discarded.append(message)


def _requeued_immediately(message: Message, decision: MessageOutcome) -> RequeuedMessage:
    known = decision.message.has_readable_headers
    return RequeuedMessage(message, decision.message.retry_count if known else 0, immediate=True)


def _add_pending(
    outcome: BatchOutcome, message: Message, pending: PendingCopy, context: PlanContext
) -> None:
    if pending.reason is None:
        outcome.requeued.append(_requeued(message, pending, context))
    else:
        outcome.dead_lettered.append(_dead_letter(message, pending.reason, pending.copy, context))


def _requeued(message: Message, pending: PendingCopy, context: PlanContext) -> RequeuedMessage:
    copy = pending.copy
    if isinstance(copy, Modification):
        count = retry_count(copy.headers.get(context.header)) or 0
        delay = (copy.until - context.now).total_seconds() if copy.until else pending.hold
        return RequeuedMessage(message, count, delay, native=True)
    count = retry_count(copy.add.get(context.header)) or 0
    delay = copy.level / 1000 if isinstance(copy, DelayedCopy) else pending.hold
    return RequeuedMessage(message, count, delay)


def _dead_letter(
    message: Message,
    reason: DeadLetterReason,
    copy: Copy | Modification,
    context: PlanContext,
) -> DeadLetter:
    if isinstance(copy, Modification):
        headers = {**(readable_headers(message) or NO_HEADERS), **copy.headers}
        exchange = str(context.arguments.get(DEAD_LETTER_EXCHANGE))
        key = str(context.arguments.get(DEAD_LETTER_ROUTING_KEY, message.routing_key))
        return DeadLetter(message, reason, exchange, key, headers, native=True)
    headers = dict(copy.properties.headers or NO_HEADERS)
    return DeadLetter(message, reason, copy.exchange, copy.routing_key, headers)
