"""Plans how to settle the results of a batch: at once, or after a copy is confirmed.

If a session can modify messages in their queue, that takes the place of the copies that it can
express: then the original itself is retried or dead-lettered, and nothing can duplicate it.

Laws:

- The original of a message that is requeued or dead-lettered by a copy is acked only after the
  broker has confirmed the copy.
- Each message is in exactly one of the two parts of a plan.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Self, assert_never

from aio_pika_batch.core.hold_policy import HoldPolicy
from aio_pika_batch.core.message import (
    CRASH_COUNT,
    DEATH_REASON,
    DEATHS,
    DELIVERY_COUNT,
    NO_HEADERS,
    ORIGINAL_EXCHANGE,
    ORIGINAL_ROUTING_KEY,
    RETRY_QUEUE,
    RETURN_COUNT,
    FieldValue,
    Headers,
    Message,
    has_died,
    is_short_string,
    read_moment,
    readable_headers,
    retry_count,
    stated_retries,
)
from aio_pika_batch.core.publication import Copy, Outcome
from aio_pika_batch.core.quarantine import CrashPolicy, OwnRequeues, delivery_count
from aio_pika_batch.core.results import Cause, MessageOutcome, MessageResult, Nack, Requeue
from aio_pika_batch.core.retry import (
    LONGEST_WAIT,
    NO_DELAY,
    ORIGINAL_EXPIRATION,
    DeadLetterReason,
    DelayedCopy,
    DelaySteps,
    RetryPolicy,
    coming_death,
    delayed_copy,
    identify_death,
    latest_death,
    make_delay_steps,
    restore_expiration,
)
from aio_pika_batch.core.settlement import (
    NO_NATIVE_RETRIES,
    Disposition,
    Modification,
    NativeRetries,
    Settlement,
)
from aio_pika_batch.core.topology_options import DeadLetterTarget
from aio_pika_batch.errors import safe_str

FIRST_FAILED_AT = "x-first-failed-at"
ORIGINAL_QUEUE = "x-original-queue"
DETAIL = "x-dead-letter-detail"
DEAD_LETTERED_AT = "x-dead-lettered-at"
EXCEPTION_TYPE = "x-exception-type"
EXCEPTION_MESSAGE = "x-exception-message"
EARLIER_DEATH = "x-dead-letter-after"
"""Header of a dead letter with the latest entry that `x-death` had then. If it has another one
later, the broker has dead-lettered the message since, and its reason counts."""

EXCEPTION_MESSAGE_LIMIT = 1024
"""The maximum bytes of an exception's text in a dead letter: all headers share one frame, whose
size is limited (RabbitMQ's default is 128 KiB)."""

REMAINING_DELAY = "x-retry-remaining-delay"
"""Header of a copy whose delay isn't over: the rest of it, in milliseconds.

Not a moment in time: clocks differ, and a delay may be longer than asked for, but not shorter.
"""

BCC = "BCC"
"""Header with further routing keys, which the broker removes from the message."""

RETRY_REASON = "x-retry-reason"
"""Header of a retried message with the reason that the handler gave, if no copy was needed."""

_DELIVERY_TIME = "x-opt-delivery-time"
"""Header with the end of a delay, which the broker leaves in the message."""

DROPPED = frozenset(
    {
        "CC",
        BCC,
        DELIVERY_COUNT,
        "x-acquired-count",
        REMAINING_DELAY,
        CRASH_COUNT,
        RETURN_COUNT,
        RETRY_REASON,
        _DELIVERY_TIME,
    }
)
"""Headers that a copy leaves out: CC and BCC route to further queues, the broker counts, and a
message that got a result has not crashed its process."""

DEATH_COUNT = "x-dead-letter-count"
"""Header of a dead letter that was one before: how often this library has dead-lettered it."""

LOOP = 3
"""Dead letters of a message from which on they seem to come back. They are delayed then."""

SHORTEST_NATIVE = 1.0
"""Seconds until a retry without a delay, if no copy is needed: it returns to the front of the
queue, so that all its attempts would be spent within milliseconds."""

_DELAY_STEP = 10
"""Parts of a second to which delays without a copy are rounded up, so that messages share one."""

REWRITTEN = frozenset({DETAIL, EXCEPTION_TYPE, EXCEPTION_MESSAGE, EARLIER_DEATH, RETRY_QUEUE})
"""Headers that a new dead letter doesn't take over from an earlier one: they say why that one was
dead-lettered."""


SPARE = (
    EXCEPTION_MESSAGE,
    DETAIL,
    EXCEPTION_TYPE,
    FIRST_FAILED_AT,
    DEAD_LETTERED_AT,
    ORIGINAL_EXCHANGE,
    ORIGINAL_ROUTING_KEY,
)
"""Headers that are left out of a dead letter, in this order, if they don't fit into a frame."""


class CopyKind(StrEnum):
    """The purpose of a copy."""

    # Each copy's lane is hashed, and only a StrEnum is hashed without a call in Python.
    REQUEUE = "requeue"
    DEAD_LETTER = "dead-letter"
    FRESH_COUNT = "fresh-count"
    """The message has no result. The broker counts the deliveries of the copy from 0."""


# Not frozen: one is created for each failed message, see `Properties`.
@dataclass(slots=True)
class PendingCopy:
    """A copy that the broker must confirm before its original is acked, or what replaces it.

    Attributes:
        copy: The copy, or how to modify the original instead: without its tag, because messages
            that are modified alike share it.
        reason: Why the message is dead-lettered; None for a requeue.
        malformed_count: Whether the retry header holds something that isn't a count.
        hold: Seconds to hold the original before the copy is published, or it is modified.
        is_undeliverable: Whether the message is retried because it can't be dead-lettered.
        is_loop: Whether it is held because it is dead-lettered again and again.
        late: The outcome of a copy that wasn't confirmed in time, once it is known.
    """

    outcome: MessageOutcome
    copy: Copy | Modification
    kind: CopyKind
    reason: DeadLetterReason | None = None
    malformed_count: bool = False
    hold: float = 0.0
    is_undeliverable: bool = False
    is_loop: bool = False
    late: Outcome | None = None

    @property
    def tag(self) -> int:
        """The original's delivery tag."""
        return self.outcome.message.delivery_tag

    def of(self, outcome: MessageOutcome) -> PendingCopy:
        """The same decision about another message, which shares the modification."""
        return PendingCopy(
            outcome,
            self.copy,
            self.kind,
            self.reason,
            self.malformed_count,
            self.hold,
            self.is_undeliverable,
            self.is_loop,
        )

    def become(self, other: PendingCopy) -> None:
        """Take the place of another copy of the same message."""
        self.copy, self.kind, self.reason = other.copy, other.kind, other.reason

    @property
    def is_native(self) -> bool:
        """Whether the original itself is modified."""
        return isinstance(self.copy, Modification)

    @property
    def lane(self) -> object:
        """Copies with the same value are published together, others apart from them."""
        match self.copy:
            case DelayedCopy(level=level):
                return self.kind, level
            case Modification():
                return Modification
            case _:
                return self.kind

    @property
    def deliveries(self) -> int | None:
        """How often the original was delivered before; None if its queue doesn't count."""
        message = self.outcome.message
        return message.delivery_count if message.has_readable_headers else None


@dataclass(frozen=True, slots=True)
class SettlementPlan:
    """How to settle the results of one batch.

    Attributes:
        settlements: To send at once.
        copies: To publish; ack the original of each one after its copy is confirmed.
        discarded: Outcomes that are rejected without a known dead-letter destination: the broker
            discards the messages unless a policy dead-letters them.
    """

    settlements: Sequence[Settlement] = ()
    copies: Sequence[PendingCopy] = ()
    discarded: Sequence[MessageOutcome] = ()


@dataclass(frozen=True, slots=True)
class SettlementPlanner:
    """Makes plans from the outcomes of messages.

    Attributes:
        queue: The queue that the messages come from, and are requeued to.
        dead_letters: Where dead letters go; None if no destination is known. Then a NACK of the
            handler is left to the broker (`basic.reject`), which discards the message unless a
            policy dead-letters it. A message that failed for good is retried.
        reject_undeliverable: Whether a message that failed for good is left to the broker, too, if
            no destination is known (`without_dead_letter="reject"`).
        hold: How long the consumer holds messages before it publishes their retries.
        crashes: How often a message may come back without a result; None if that isn't counted.
        exception_message: Whether dead letters contain the text of the exception.
        delay_steps: The delays of retries.
        native: What the session can do without copies.
        dead_letters_differ: Whether the queue's own arguments lead its dead letters somewhere else
            than `dead_letters`.
    """

    # Dead letters are published where an exchange is known, because a broker's own dead-lettering
    # isn't confirmed, and doesn't know the original routing key of a requeued copy.

    queue: str
    retry: RetryPolicy
    dead_letters: DeadLetterTarget | None = None
    exception_message: bool = True
    delay_steps: DelaySteps = field(default_factory=make_delay_steps)
    reject_undeliverable: bool = False
    hold: HoldPolicy = field(default_factory=HoldPolicy)
    crashes: CrashPolicy | None = None
    native: NativeRetries = NO_NATIVE_RETRIES
    dead_letters_differ: bool = False

    def natively(self, native: NativeRetries) -> SettlementPlanner:
        """The planner for a session that can do this without copies."""
        # Without its header, nothing would count the attempts.
        can_count = native.headers and self.retry.header.startswith("x-")
        return replace(self, native=native) if can_count else self

    def plan(
        self, outcomes: Sequence[MessageOutcome], now: datetime, *, wait_queues: bool = True
    ) -> SettlementPlan:
        """Decide how to settle each outcome.

        Args:
            now: The time for the headers.
            wait_queues: Whether delayed retries can wait in queues. Otherwise they are held.
        """
        tags: dict[Disposition, list[int]] = {}
        copies: list[PendingCopy] = []
        discarded: list[MessageOutcome] = []
        # Decided once for messages that don't differ in what the decision depends on.
        shared: dict[Hashable, PendingCopy] = {}
        known = _PLANNED | {self.retry.header}
        for outcome in outcomes:
            key = _decided_by(outcome, known) if self.native.headers else None
            if key is not None and (same := shared.get(key)) is not None:
                copies.append(same.of(outcome))
                continue
            match self._step(outcome, now, wait_queues=wait_queues):
                case Disposition() as disposition:
                    tags.setdefault(disposition, []).append(outcome.message.delivery_tag)
                    if disposition is Disposition.REJECT:
                        discarded.append(outcome)
                case PendingCopy() as copy:
                    copies.append(copy)
                    if key is not None and copy.is_native:
                        shared[key] = copy
                case unreachable:
                    assert_never(unreachable)
        return SettlementPlan(
            [Settlement(disposition, tuple(group)) for disposition, group in tags.items()],
            copies,
            discarded,
        )

    def _step(
        self, outcome: MessageOutcome, now: datetime, *, wait_queues: bool
    ) -> Disposition | PendingCopy:
        match outcome.result:
            case MessageResult.ACK:
                return Disposition.ACK
            case MessageResult.REQUEUE_IMMEDIATE:
                if self.crashes is None or self.crashes.may_requeue(outcome.message):
                    return Disposition.REQUEUE
                # Counted as a retry: otherwise nothing would end a message that always gets it.
                return self._requeue(outcome, now, wait_queues=wait_queues)
            case MessageResult.NACK | Nack():
                return self._dead_letter(outcome, _reason(outcome), now)
            case MessageResult.REQUEUE | Requeue():
                return self._requeue(outcome, now, wait_queues=wait_queues)
            case unreachable:
                assert_never(unreachable)

    def _requeue(
        self, outcome: MessageOutcome, now: datetime, *, wait_queues: bool
    ) -> Disposition | PendingCopy:
        message = outcome.message
        headers = readable_headers(message)
        if headers is None:
            # Without readable headers its attempts cannot be counted.
            return self._dead_letter(outcome, DeadLetterReason.UNDECODABLE, now)
        stated = stated_retries(headers, self.retry.header, self.queue)
        read = None if stated is None else retry_count(stated)
        count = read or 0
        if not self.retry.may_retry(count):
            return self._dead_letter(outcome, DeadLetterReason.EXHAUSTED, now)
        malformed = stated is not None and read is None
        # A suspect that is put back stays one, and each time it is handled alone, the retries that
        # are held follow without their delay. A copy is counted from 0.
        if self.native.headers and self.may_return(message):
            pending = self._native_retry(outcome, headers, count, now)
            pending.malformed_count = malformed
            return pending
        add = _origin_headers(message, headers, now)
        add |= self._count_headers(headers, count + 1)
        seconds = outcome.result.seconds if isinstance(outcome.result, Requeue) else None
        level = self.delay_steps.level(seconds, count)
        hold = self.hold.retry_delay(count) if seconds is None else 0.0
        if level != NO_DELAY and not wait_queues:
            hold = level / 1000
        if hold or level == NO_DELAY:
            pending = self._held(outcome, headers, add, hold)
        else:
            copy = delayed_copy(message, self.queue, level, add, DROPPED)
            copy.spare = (FIRST_FAILED_AT,)
            pending = PendingCopy(outcome, copy, CopyKind.REQUEUE)
        pending.malformed_count = malformed
        return pending

    def _native_retry(
        self, outcome: MessageOutcome, headers: Headers, count: int, now: datetime
    ) -> PendingCopy:
        result = outcome.result
        seconds = result.seconds if isinstance(result, Requeue) else None
        if seconds is None:
            seconds = self.hold.retry_delay(count) or self.delay_steps.level(None, count) / 1000
        seconds = min(seconds, self.delay_steps.longest) or SHORTEST_NATIVE
        add = self._count_headers(headers, count + 1) | _first_failure(
            outcome.message, headers, now
        )
        if isinstance(result, Requeue) and result.reason is not None:
            add[RETRY_REASON] = _cut(result.reason)
        elif RETRY_REASON in headers:
            add[RETRY_REASON] = ""
        return self._put_back(outcome, headers, add, seconds, now)

    def _put_back(
        self,
        outcome: MessageOutcome,
        headers: Headers,
        add: dict[str, FieldValue],
        seconds: float,
        now: datetime,
    ) -> PendingCopy:
        """Let a message come back after a delay, without a copy.

        If the queue can't delay it, it is held first, in parts if one hold would be too long.
        """
        native = self.native
        hold, until, remaining = 0.0, None, 0
        if native.delays:
            until = now + timedelta(seconds=math.ceil(seconds * _DELAY_STEP) / _DELAY_STEP)
        else:
            hold = min(seconds, self.hold.longest)
            remaining = math.ceil((seconds - hold) * 1000)
        if remaining or REMAINING_DELAY in headers:
            add[REMAINING_DELAY] = remaining
        if not native.uncounted:
            add[RETURN_COUNT] = delivery_count(outcome.message) + 1
        add |= _cleared(headers, add)
        # Not counted as failed: this library counts its retries itself.
        change = Modification((), failed=False, until=until, headers=add)
        return PendingCopy(outcome, change, CopyKind.REQUEUE, hold=hold)

    def _held(
        self,
        outcome: MessageOutcome,
        headers: Headers,
        add: dict[str, FieldValue],
        hold: float,
    ) -> PendingCopy:
        """A retry whose original is held first, in parts if the delay is too long for one hold."""
        if hold > self.hold.longest:
            add[REMAINING_DELAY] = math.ceil((hold - self.hold.longest) * 1000)
            hold = self.hold.longest
        # Its origin is needed: a later dead letter is routed by it.
        copy = Copy(outcome.message, "", self.queue, add, DROPPED, spare=(FIRST_FAILED_AT,))
        if ORIGINAL_EXPIRATION in headers:
            restore_expiration(copy)
        return PendingCopy(outcome, copy, CopyKind.REQUEUE, hold=hold)

    def may_return(self, message: Message) -> bool:
        """Whether a message may be returned to the queue, rather than replaced by a copy."""
        # A copy is made only because returns count, and may be duplicated by a crash.
        if self.crashes is None or self.native.uncounted:
            return True
        return self.crashes.may_return(message)

    def plan_returns(
        self,
        messages: Sequence[Message],
        now: datetime,
        own: OwnRequeues | None = None,
        *,
        replace_all: bool = False,
    ) -> SettlementPlan:
        """Decide how to return messages that have no result.

        Args:
            own: What is known in favour of the messages.
            replace_all: Whether copies, which the broker counts from 0, replace all of them.
        """
        replaced = [each for each in messages if replace_all or not self.may_return(each)]
        copies = [self._fresh_copy(each, now, own) for each in replaced]
        replaced_tags = {each.tag for each in copies}
        tags = [tag for each in messages if (tag := each.delivery_tag) not in replaced_tags]
        return SettlementPlan([Settlement(Disposition.RETURN, tuple(tags))] if tags else (), copies)

    def _fresh_copy(self, message: Message, now: datetime, own: OwnRequeues | None) -> PendingCopy:
        """A copy of a message that has no result, which the broker counts from 0."""
        add = _origin_headers(message, readable_headers(message) or NO_HEADERS, now)
        # It hasn't failed. If it has before, the header is kept.
        add.pop(FIRST_FAILED_AT, None)
        if self.crashes is not None:
            add |= self.crashes.mark(message, own)
        outcome = MessageOutcome(message, MessageResult.REQUEUE)
        copy = Copy(message, "", self.queue, add, DROPPED)
        return PendingCopy(outcome, copy, CopyKind.FRESH_COUNT)

    def held_instead(self, pending: PendingCopy) -> PendingCopy:
        """The same retry without its wait queue, which turned out to be missing: it is held."""
        copy = pending.copy
        if not isinstance(copy, DelayedCopy):
            return pending
        headers = pending.outcome.message.headers
        return self._held(pending.outcome, headers, dict(copy.add), copy.level / 1000)

    def instead_of(self, pending: PendingCopy, now: datetime) -> PendingCopy | None:
        """The dead letter of a message whose retry can't be published; None if that can't be."""
        if self.dead_letters is None or pending.kind is not CopyKind.REQUEUE:
            return None
        letter = self._dead_letter(pending.outcome, DeadLetterReason.UNPUBLISHABLE, now)
        return letter if isinstance(letter, PendingCopy) else None

    def continued_delay(self, message: Message, now: datetime) -> PendingCopy | None:
        """Return how to go on with a delay that was too long for one hold; None if it is over."""
        headers = readable_headers(message) or NO_HEADERS
        remaining = headers.get(REMAINING_DELAY)
        if not isinstance(remaining, int) or not 0 < remaining <= LONGEST_WAIT * 1000:
            return None
        outcome = MessageOutcome(message, MessageResult.REQUEUE)
        if self.native.headers:
            return self._put_back(outcome, headers, {}, remaining / 1000, now)
        return self._held(outcome, headers, {}, remaining / 1000)

    def _retry_undeliverable(
        self, outcome: MessageOutcome, reason: DeadLetterReason, now: datetime
    ) -> PendingCopy:
        """A retry of a message that failed for good, because there is nowhere to put it."""
        message = outcome.message
        headers = readable_headers(message)
        if headers is None:
            # Its attempts can't be counted, so the delay doesn't grow.
            hold = self.hold.undeliverable_delay(self.retry.max_attempts)
            add: dict[str, FieldValue] = {}
        else:
            count = self._count(headers)
            spent = self.retry.max_attempts if reason is DeadLetterReason.EXHAUSTED else 0
            hold = self.hold.undeliverable_delay(max(0, count - spent))
            add = self._count_headers(headers, count + 1)
            if not self.native.headers:
                add |= _origin_headers(message, headers, now)
            else:
                add |= _first_failure(message, headers, now)
            if reason is DeadLetterReason.CRASHED and self.crashes is not None:
                # It is a suspect from the start: it must not take others along again.
                add |= self.crashes.mark(message)
        if not self.native.headers:
            drop = frozenset() if headers is None else DROPPED
            copy = Copy(message, "", self.queue, add, drop)
            pending = PendingCopy(outcome, copy, CopyKind.REQUEUE, hold=hold)
        else:
            pending = self._put_back(outcome, headers or NO_HEADERS, add, hold, now)
        pending.is_undeliverable = True
        return pending

    def _dead_letter(
        self, outcome: MessageOutcome, reason: DeadLetterReason, now: datetime
    ) -> Disposition | PendingCopy:
        target = self.dead_letters
        if self.native.dead_letters and not self.dead_letters_differ:
            return self._native_dead_letter(outcome, reason, now)
        if target is None:
            if reason is DeadLetterReason.REJECTED or self.reject_undeliverable:
                return Disposition.REJECT
            return self._retry_undeliverable(outcome, reason, now)
        message = outcome.message
        # All properties first: otherwise the headers would be decoded a second time with them.
        expiration = message.properties.expiration
        known = readable_headers(message)
        headers = NO_HEADERS if known is None else known
        routing_key = target.routing_key
        if routing_key is None:
            original = headers.get(ORIGINAL_ROUTING_KEY)
            routing_key = original if is_short_string(original) else message.routing_key
        add = _origin_headers(message, headers, now)
        add |= self._death_headers(outcome, reason, known)
        add[DEAD_LETTERED_AT] = now
        if target.also is not None:
            add[BCC] = [target.also]
        # A dead letter doesn't expire: it should still exist when someone has time to repair it.
        if expiration is not None:
            add[ORIGINAL_EXPIRATION] = expiration
        if (death := latest_death(headers)) is not None:
            add[EARLIER_DEATH] = identify_death(death)
        drop = DROPPED | REWRITTEN
        copy = Copy(
            message,
            target.exchange,
            routing_key,
            add,
            drop,
            keep_expiration=False,
            spare=SPARE,
            may_omit=True,
        )
        pending = PendingCopy(outcome, copy, CopyKind.DEAD_LETTER, reason)
        self._count_deaths(pending, headers, add)
        return pending

    def _count_deaths(
        self, pending: PendingCopy, headers: Headers, add: dict[str, FieldValue]
    ) -> None:
        if DEATH_REASON in headers:
            # It was moved back by hand, or belongs to a consumer of dead letters, or goes round.
            add[DEATH_COUNT] = deaths = (retry_count(headers.get(DEATH_COUNT)) or 1) + 1
            pending.is_loop = deaths >= LOOP
            if pending.is_loop:
                pending.hold = self.hold.undeliverable_delay(deaths - LOOP)

    def _native_dead_letter(
        self, outcome: MessageOutcome, reason: DeadLetterReason, now: datetime
    ) -> PendingCopy:
        """A dead letter that the queue itself delivers to its dead-letter exchange.

        It keeps the route of its message in `x-death`.
        """
        message = outcome.message
        known = readable_headers(message)
        headers = NO_HEADERS if known is None else known
        add = self._death_headers(outcome, reason, known)
        add |= _first_failure(message, headers, now)
        add[DEAD_LETTERED_AT] = _milliseconds(now)
        add[EARLIER_DEATH] = coming_death(headers, self.queue)
        change = Modification((), failed=False, dead=True, headers=add)
        pending = PendingCopy(outcome, change, CopyKind.DEAD_LETTER, reason)
        self._count_deaths(pending, headers, add)
        add |= _cleared(headers, add)
        return pending

    def _count(self, headers: Headers) -> int:
        return retry_count(stated_retries(headers, self.retry.header, self.queue)) or 0

    def _count_headers(self, headers: Headers, count: int) -> dict[str, FieldValue]:
        """The headers of a retry: a dead letter's count must not be taken for that of its death."""
        if RETRY_QUEUE in headers or has_died(headers, self.queue):
            return {self.retry.header: count, RETRY_QUEUE: self.queue}
        return {self.retry.header: count}

    def _death_headers(
        self, outcome: MessageOutcome, reason: DeadLetterReason, headers: Headers | None
    ) -> dict[str, FieldValue]:
        """The headers of any dead letter; `headers` are those of the message, if readable."""
        add: dict[str, FieldValue] = {DEATH_REASON: reason.value, ORIGINAL_QUEUE: self.queue}
        match outcome.result:
            case Nack(reason=str(text)) | Requeue(reason=str(text)):
                add[DETAIL] = _cut(text)
            case _:
                pass
        if outcome.error is not None:
            cls = type(outcome.error)
            add[EXCEPTION_TYPE] = _cut(f"{cls.__module__}.{cls.__qualname__}")
            if self.exception_message:
                add[EXCEPTION_MESSAGE] = _cut(safe_str(outcome.error))
        if headers is not None:
            add[self.retry.header] = self._count(headers)
        return add


def _milliseconds(moment: datetime) -> int:
    return int(moment.timestamp() * 1000)


def _first_failure(message: Message, headers: Headers, now: datetime) -> dict[str, FieldValue]:
    """The time of the first failure as AMQP 1.0 can express it, if it isn't known yet."""
    if read_moment(headers.get(FIRST_FAILED_AT)) is not None:
        return {}
    return {FIRST_FAILED_AT: _milliseconds(message.first_failed_at or now)}


def _cleared(headers: Headers, add: Headers) -> dict[str, FieldValue]:
    """Values for headers that a copy would leave out: those of the original can't be removed."""
    return {name: _CLEARED[name] for name in headers.keys() & _CLEARED.keys() if name not in add}


_CLEARED: Headers = {
    CRASH_COUNT: 0,
    REMAINING_DELAY: 0,
    RETRY_REASON: "",
    **dict.fromkeys(REWRITTEN, ""),
}


_PLANNED = frozenset(_CLEARED).union(
    (DEATHS, DEATH_COUNT, DEATH_REASON, DELIVERY_COUNT, FIRST_FAILED_AT, RETURN_COUNT)
)
"""Headers of a message that decide how it is modified, beside its retry count."""


def _decided_by(outcome: MessageOutcome, names: frozenset[str]) -> Hashable | None:
    """Return all that decides how the message is modified; None if it can't be compared.

    Args:
        names: The headers to compare.
    """
    message = outcome.message
    headers = readable_headers(message)
    if headers is None:
        return None
    values: tuple[Hashable, ...] = ()
    if not names.isdisjoint(headers):
        # With their types, because a count can be 1, but not True.
        values = tuple(
            (name, type(headers[name]), headers[name]) for name in names if name in headers
        )
    key = (outcome.result, outcome.cause, id(outcome.error), message.first_failed_at, values)
    try:
        hash(values)
    except TypeError:
        return None
    return key


def _origin_headers(message: Message, headers: Headers, now: datetime) -> dict[str, FieldValue]:
    """The headers that keep what the first copy would lose, if the message doesn't have them."""
    # An invalid value, such as a number as routing key, is replaced: readers would ignore it.
    origin: dict[str, FieldValue] = {}
    if ORIGINAL_EXCHANGE not in headers or not is_short_string(headers[ORIGINAL_EXCHANGE]):
        origin[ORIGINAL_EXCHANGE] = message.exchange
    if ORIGINAL_ROUTING_KEY not in headers or not is_short_string(headers[ORIGINAL_ROUTING_KEY]):
        origin[ORIGINAL_ROUTING_KEY] = message.routing_key
    if FIRST_FAILED_AT not in headers or read_moment(headers[FIRST_FAILED_AT]) is None:
        origin[FIRST_FAILED_AT] = message.first_failed_at or now
    return origin


def _reason(outcome: MessageOutcome) -> DeadLetterReason:
    match outcome.cause:
        case Cause.HANDLER:
            return DeadLetterReason.REJECTED
        case Cause.UNDECODABLE:
            return DeadLetterReason.UNDECODABLE
        case Cause.CRASHED:
            return DeadLetterReason.CRASHED
        case Cause.EXCEPTION | Cause.TIMEOUT | Cause.MISSING | Cause.INVALID | Cause.SHUTDOWN:
            return DeadLetterReason.HANDLER_ERROR
        case unreachable:
            assert_never(unreachable)


def _cut(text: str) -> str:
    """Shorten a text to `EXCEPTION_MESSAGE_LIMIT` bytes of UTF-8, between two characters."""
    raw = text.encode(errors="replace")
    if len(raw) <= EXCEPTION_MESSAGE_LIMIT:
        return raw.decode()
    ellipsis = "…"
    kept = raw[: EXCEPTION_MESSAGE_LIMIT - len(ellipsis.encode())]
    return kept.decode(errors="ignore") + ellipsis


@dataclass(frozen=True, slots=True)
class Pace:
    """The timing of results that are settled before their batch ends (`settle="yield"`).

    Settling several results together costs less than one by one. So results are collected first.
    Then the copies of the batch, and of others, have some time to be confirmed, so that one frame
    can settle them all.

    Attributes:
        collect: Seconds from the first result until the collected ones are settled.
        patience: The maximum seconds that a settlement then waits for confirmations of its own
            copies, and again for those of other batches.
    """

    collect: float
    patience: float

    @classmethod
    def within(cls, interval: float, *, longest: float) -> Self:
        """Divide the interval within which a result must be settled.

        Args:
            longest: The maximum of `patience` in seconds.
        """
        patience = min(longest, interval / 4)
        return cls(interval - 2 * patience, patience)
