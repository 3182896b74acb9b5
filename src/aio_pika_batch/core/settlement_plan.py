"""Results become a plan: what may be settled at once, and what is published first.

An original is settled as ACK after a requeue or a dead letter only once the broker has confirmed
its copy. A plan therefore has two parts, and nothing stands in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Self, assert_never

from aio_pika_batch.core.message import (
    DELIVERY_COUNT,
    NO_HEADERS,
    ORIGINAL_EXCHANGE,
    ORIGINAL_ROUTING_KEY,
    FieldValue,
    Headers,
    Message,
    is_short_string,
    retry_count,
)
from aio_pika_batch.core.publication import Copy
from aio_pika_batch.core.results import Cause, MessageOutcome, MessageResult, Nack, Requeue
from aio_pika_batch.core.retry import (
    NO_DELAY,
    ORIGINAL_EXPIRATION,
    DeadLetterReason,
    DelaySteps,
    RetryPolicy,
    delayed_copy,
    immediate_copy,
    make_delay_steps,
)
from aio_pika_batch.core.settlement import Disposition, Settlement
from aio_pika_batch.errors import MessageDecodeError, safe_str

FIRST_FAILED_AT = "x-first-failed-at"
ORIGINAL_QUEUE = "x-original-queue"
REASON = "x-dead-letter-reason"
DETAIL = "x-dead-letter-detail"
DEAD_LETTERED_AT = "x-dead-lettered-at"
EXCEPTION_TYPE = "x-exception-type"
EXCEPTION_MESSAGE = "x-exception-message"

EXCEPTION_MESSAGE_LIMIT = 1024
"""Bytes of an exception's text that a dead letter carries: headers share one frame (128 KiB)."""

_ORIGIN = (ORIGINAL_EXCHANGE, ORIGINAL_ROUTING_KEY, FIRST_FAILED_AT)

DROPPED = frozenset({"CC", "BCC", DELIVERY_COUNT, "x-acquired-count"})
"""What a copy must not repeat: CC and BCC name further queues, counts are the broker's."""

REWRITTEN = frozenset({DETAIL, EXCEPTION_TYPE, EXCEPTION_MESSAGE})
"""Headers of an earlier death: a dead letter that came back must not die of its old cause again."""


class CopyKind(Enum):
    """What a copy is for."""

    REQUEUE = "requeue"
    DEAD_LETTER = "dead-letter"


# Not frozen: one is made for each failed message, and freezing makes that three times as dear.
@dataclass(slots=True)
class PendingCopy:
    """A copy to be confirmed before its original may be acked.

    Attributes:
        reason: Of a dead letter, why.
        malformed_count: Whether the retry header held something that is no count.
    """

    outcome: MessageOutcome
    copy: Copy
    kind: CopyKind
    reason: DeadLetterReason | None = None
    malformed_count: bool = False

    @property
    def tag(self) -> int:
        """The original's delivery tag."""
        return self.outcome.message.delivery_tag


@dataclass(frozen=True, slots=True)
class SettlementPlan:
    """What to do about the results of one batch.

    Attributes:
        settlements: May go out at once.
        republications: Publish, and ack the original of each once its copy is confirmed.
    """

    settlements: Sequence[Settlement] = ()
    copies: Sequence[PendingCopy] = ()


@dataclass(frozen=True, slots=True)
class DeadLetterTarget:
    """Where dead letters go.

    Attributes:
        exchange: The dead-letter exchange.
        routing_key: None keeps each message's original one.
    """

    exchange: str
    routing_key: str | None = None


@dataclass(frozen=True, slots=True)
class SettlementPlanner:
    """Turns outcomes into a plan.

    Attributes:
        queue: The queue that is consumed from, and requeued to.
        dead_letters: None leaves dead-lettering to the broker (`basic.reject`), which discards
            where the queue has no dead-letter exchange.
        exception_message: Whether a dead letter carries the text of the exception.
        delay_steps: How long retries wait.
    """

    queue: str
    retry: RetryPolicy
    dead_letters: DeadLetterTarget | None = None
    exception_message: bool = True
    drop: frozenset[str] = field(default=DROPPED)
    delay_steps: DelaySteps = field(default_factory=make_delay_steps)

    def plan(self, outcomes: Sequence[MessageOutcome], now: datetime) -> SettlementPlan:
        """Decide what is done about each outcome.

        Args:
            now: The time, for the headers that say when.
        """
        tags: dict[Disposition, list[int]] = {}
        copies: list[PendingCopy] = []
        for outcome in outcomes:
            match self._step(outcome, now):
                case Disposition() as disposition:
                    tags.setdefault(disposition, []).append(outcome.message.delivery_tag)
                case PendingCopy() as republication:
                    copies.append(republication)
                case unreachable:
                    assert_never(unreachable)
        return SettlementPlan(
            [Settlement(disposition, tuple(some)) for disposition, some in tags.items()],
            copies,
        )

    def _step(self, outcome: MessageOutcome, now: datetime) -> Disposition | PendingCopy:
        match outcome.result:
            case MessageResult.ACK:
                return Disposition.ACK
            case MessageResult.REQUEUE_IMMEDIATE:
                return Disposition.REQUEUE
            case MessageResult.NACK | Nack():
                return self._dead_letter(outcome, _reason(outcome), now)
            case MessageResult.REQUEUE | Requeue():
                return self._requeue(outcome, now)
            case unreachable:
                assert_never(unreachable)

    def _requeue(self, outcome: MessageOutcome, now: datetime) -> Disposition | PendingCopy:
        message = outcome.message
        try:
            headers = message.headers
        except MessageDecodeError:
            # Without headers nobody can count its attempts.
            return self._dead_letter(outcome, DeadLetterReason.UNDECODABLE, now)
        stated = headers.get(self.retry.header)
        read = None if stated is None else retry_count(stated)
        count = read or 0
        if not self.retry.may_retry(count):
            return self._dead_letter(outcome, DeadLetterReason.EXHAUSTED, now)
        add = _origin(message, headers, now)
        add[self.retry.header] = count + 1
        level = self.delay_steps.level(outcome.result, count)
        if level != NO_DELAY:
            copy: Copy = delayed_copy(message, self.queue, level, add, self.drop)
        elif ORIGINAL_EXPIRATION in headers:
            copy = immediate_copy(message, self.queue, add, self.drop)
        else:
            copy = Copy(message, "", self.queue, add, self.drop)
        return PendingCopy(
            outcome,
            copy,
            CopyKind.REQUEUE,
            malformed_count=stated is not None and read is None,
        )

    def _dead_letter(
        self, outcome: MessageOutcome, reason: DeadLetterReason, now: datetime
    ) -> Disposition | PendingCopy:
        target = self.dead_letters
        if target is None:
            return Disposition.REJECT
        message = outcome.message
        properties = message.properties
        known = message.has_readable_headers
        routing_key = target.routing_key
        if routing_key is None:
            routing_key = message.original_routing_key if known else message.routing_key
        add = {
            **_origin(message, message.headers if known else NO_HEADERS, now),
            REASON: reason.value,
            ORIGINAL_QUEUE: self.queue,
            DEAD_LETTERED_AT: now,
            **self._why(outcome),
        }
        if known:
            add[self.retry.header] = message.retry_count
        if properties.expiration is not None:
            add[ORIGINAL_EXPIRATION] = properties.expiration
        drop = self.drop | REWRITTEN
        copy = Copy(message, target.exchange, routing_key, add, drop, keep_expiration=False)
        return PendingCopy(outcome, copy, CopyKind.DEAD_LETTER, reason)

    def _why(self, outcome: MessageOutcome) -> dict[str, FieldValue]:
        why: dict[str, FieldValue] = {}
        match outcome.result:
            case Nack(reason=str(text)) | Requeue(reason=str(text)):
                why[DETAIL] = _cut(text)
            case _:
                pass
        if outcome.error is not None:
            cls = type(outcome.error)
            why[EXCEPTION_TYPE] = f"{cls.__module__}.{cls.__qualname__}"
            if self.exception_message:
                why[EXCEPTION_MESSAGE] = _cut(safe_str(outcome.error))
        return why


def _origin(message: Message, headers: Headers, now: datetime) -> dict[str, FieldValue]:
    """What would be forgotten by the first republication; what is there already stays.

    A value that no reader would take for one, say a number where a routing key should be, is none:
    it would hide what it stands in for.
    """
    origin: dict[str, FieldValue] = {
        ORIGINAL_EXCHANGE: message.exchange,
        ORIGINAL_ROUTING_KEY: message.routing_key,
        FIRST_FAILED_AT: message.first_failed_at or now,
    }
    for name in _ORIGIN:
        if name in headers and _could_be(headers[name], origin[name]):
            del origin[name]
    return origin


def _could_be(found: object, like: FieldValue) -> bool:
    return is_short_string(found) if isinstance(like, str) else isinstance(found, type(like))


def _reason(outcome: MessageOutcome) -> DeadLetterReason:
    match outcome.cause:
        case Cause.HANDLER:
            return DeadLetterReason.REJECTED
        case Cause.UNDECODABLE:
            return DeadLetterReason.UNDECODABLE
        case Cause.EXCEPTION | Cause.TIMEOUT | Cause.MISSING | Cause.INVALID | Cause.SHUTDOWN:
            return DeadLetterReason.HANDLER_ERROR
        case unreachable:
            assert_never(unreachable)


def _cut(text: str) -> str:
    """At most `EXCEPTION_MESSAGE_LIMIT` bytes of UTF-8, cut between characters."""
    raw = text.encode(errors="replace")
    if len(raw) <= EXCEPTION_MESSAGE_LIMIT:
        return raw.decode()
    ellipsis = "…"
    kept = raw[: EXCEPTION_MESSAGE_LIMIT - len(ellipsis.encode())]
    return kept.decode(errors="ignore") + ellipsis


@dataclass(frozen=True, slots=True)
class Pace:
    """How an interval is divided.

    Attributes:
        collect: Seconds from the first yield until what has been yielded goes on its way.
        patience: Seconds that a settlement then waits for confirmations, at most, and as many are
            kept in reserve.
    """

    collect: float
    patience: float

    @classmethod
    def within(cls, interval: float, *, longest: float) -> Self:
        """Divide an interval.

        Args:
            longest: Seconds for confirmations that are enough, however long the interval.
        """
        patience = min(longest, interval / 4)
        return cls(interval - 2 * patience, patience)
