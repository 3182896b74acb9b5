"""What would a worker tell the broker about these messages?

Pure: verdicts and the router's plans in, lists that read well in an assertion out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from aio_pika_batch.core.batch_run import BatchDecisions
from aio_pika_batch.core.message import NO_HEADERS, Headers, Message, retry_count
from aio_pika_batch.core.publication import Publication
from aio_pika_batch.core.results import MessageOutcome, MessageResult, Nack, Result
from aio_pika_batch.core.retry import DeadLetterReason, DelayedCopy
from aio_pika_batch.core.settlement import Disposition
from aio_pika_batch.core.settlement_plan import PendingCopy, SettlementPlan


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
