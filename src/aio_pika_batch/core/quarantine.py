"""Decides which messages may have crashed their process, by the number of their deliveries.

A quorum queue counts how often a message came back without a result. A message that kills its
process takes the others that the process holds along, so all of them come back. It is distinguished
by being handled alone: the others get their result, and only it goes on coming back.

Laws:

- A suspect is never returned: a copy takes its place, which the broker counts from 0. So returns
  make suspects, but no message reaches the limit by them.
- What a handler requeued in this process counts for nothing, also after a retry that needed no
  copy: the broker's count goes on then.
- Soon after a process has lost a connection and survived, it believes no counts: what it gets is
  probably what it lost, or what others lost. So a copy takes the place of a suspect.
- A header can make a message a suspect, but never a crashed one: anyone can publish it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from aio_pika_batch.core.message import (
    CRASH_COUNT,
    NO_HEADERS,
    RETURN_COUNT,
    FieldValue,
    Headers,
    Message,
    readable_headers,
    retry_count,
    stated_retries,
)

MAX_RECORDED = 10_000
"""How many requeued messages a process remembers; the oldest ones are forgotten."""

_MARK = CRASH_COUNT.encode()

_MOST = 1000
"""Counts above this are treated alike."""


class Suspicion(Enum):
    """How to handle a message."""

    NONE = "none"
    """Like any other."""
    SUSPECT = "suspect"
    """Alone, while the process holds no other message."""
    CRASHED = "crashed"
    """Not at all: it goes to the dead letters."""
    WORN = "worn"
    """Not yet: the count can't be believed. A copy starts at 0."""


@dataclass(frozen=True, slots=True)
class CrashPolicy:
    """How often a message may come back without a result.

    Attributes:
        suspect_after: So often, and it is handled alone.
        limit: So often, and it isn't handled any more; above `suspect_after`.
        requeues_to_the_end: Whether REQUEUE_IMMEDIATE may use up the queue's own delivery limit,
            because the owner of the queue set it as low as this.
    """

    suspect_after: int
    limit: int
    requeues_to_the_end: bool = False

    def judge(self, message: Message, own: OwnRequeues, *, in_doubt: bool = False) -> Suspicion:
        """Decide how to handle a message that the broker delivers.

        Args:
            own: What handlers in this process requeued.
            in_doubt: Whether this process has lost a connection lately.
        """
        total = self._total(message)
        if total < self.suspect_after:
            return Suspicion.NONE
        if in_doubt:
            # At once: where connections are lost again and again, it comes back before the others
            # are finished and it can be handled alone. A copy that has never come back doesn't need
            # another one.
            return Suspicion.WORN if delivery_count(message) else Suspicion.SUSPECT
        unexplained = total - own.count(message)
        if unexplained >= self.limit:
            return Suspicion.CRASHED
        return Suspicion.SUSPECT if unexplained >= self.suspect_after else Suspicion.NONE

    def may_return(self, message: Message) -> bool:
        """Whether a message may be returned to the queue, rather than a copy of it."""
        return self._total(message) < self.suspect_after

    def may_requeue(self, message: Message) -> bool:
        """Whether a handler's REQUEUE_IMMEDIATE may put the message back itself."""
        # Beyond half of the way, other processes might take it for a crashed one.
        half = (self.suspect_after + self.limit) // 2
        return self.requeues_to_the_end or self._total(message) < half

    def mark(self, message: Message, own: OwnRequeues | None = None) -> dict[str, FieldValue]:
        """The header of a copy that keeps what is known against the message."""
        total = self._total(message)
        if own is not None:
            total -= own.count(message)
        unexplained = min(total, self.suspect_after)
        return {CRASH_COUNT: unexplained} if unexplained > 0 else {}

    def _total(self, message: Message) -> int:
        headers = readable_headers(message)
        if headers is None:
            return 0
        marked = min(retry_count(headers.get(CRASH_COUNT)) or 0, self.suspect_after)
        deliveries = delivery_count(message)
        if deliveries and RETURN_COUNT in headers:
            # Put back by AMQP 1.0 before RabbitMQ 4.3, which counts that. At most as often as it
            # was retried: anyone can publish that header, too.
            returned = retry_count(headers[RETURN_COUNT]) or 0
            deliveries -= min(returned, message.retry_count, deliveries)
        return deliveries + marked


def delivery_count(message: Message) -> int:
    """How often the broker counts that the message came back; 0 if that can't be read."""
    return (message.delivery_count or 0) if message.has_readable_headers else 0


def came_back(chunk: Sequence[Message]) -> Sequence[Message]:
    """The messages of a chunk that need a look: nearly always none.

    The broker marks a message that it has counted as redelivered, and our copies have a header.
    Nothing is decoded to find it: that would cost more than all the rest of a delivery.
    """
    if chunk and isinstance(chunk[0]._properties, bytes):  # noqa: SLF001  -- see above
        raw: list[Any] = [each._properties for each in chunk]  # noqa: SLF001  -- see above
        # One search in all of them costs a tenth of a search in each.
        if b"".join(raw).find(_MARK) >= 0:
            return chunk
        return [each for each in chunk if each.redelivered]
    return [
        each
        for each in chunk
        if each.redelivered or CRASH_COUNT in (readable_headers(each) or NO_HEADERS)
    ]


class OwnRequeues:
    """How often handlers in this process requeued a message at once (REQUEUE_IMMEDIATE).

    A message is recognized by its content, because a delivery has no identity that outlives it. For
    each one the counts at which it went back are kept as the bits of a number: two messages of the
    same content can't explain more returns than there were.
    """

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}

    def note(self, message: Message) -> None:
        """Note that the message goes back now."""
        self._record(_fingerprint(message), 1 << min(delivery_count(message), _MOST))

    def note_retry(self, message: Message, changed: Headers) -> None:
        """Note that the message goes back with these headers, and that its count goes on."""
        # Nearly always nothing is known, and a fingerprint needs all properties.
        if self._counts and delivery_count(message):
            counts = self._counts.get(_fingerprint(message))
            if counts is not None:
                self._record(_fingerprint(message, changed), counts)

    def _record(self, key: int, counts: int) -> None:
        # Removed first, so that the dict is ordered by the last return.
        self._counts[key] = self._counts.pop(key, 0) | counts
        if len(self._counts) > MAX_RECORDED:
            del self._counts[next(iter(self._counts))]

    def forget(self, message: Message) -> None:
        """Forget a message whose copy starts at 0."""
        self._counts.pop(_fingerprint(message), None)

    def count(self, message: Message) -> int:
        """How many of the returns that the broker has counted were noted here."""
        if not self._counts:
            return 0
        before = (1 << min(delivery_count(message), _MOST + 1)) - 1
        return (self._counts.get(_fingerprint(message), 0) & before).bit_count()


def _fingerprint(message: Message, changed: Headers = NO_HEADERS) -> int:
    headers = {**(readable_headers(message) or NO_HEADERS), **changed}
    properties = message.properties
    # The retry count and the mark tell a copy from its original, which was counted on its own.
    mark = retry_count(headers.get(CRASH_COUNT))
    source = message._source  # noqa: SLF001  -- of what the message will be
    retries = retry_count(stated_retries(headers, source.retry_count_header, source.queue)) or 0
    ids = (properties.message_id, properties.correlation_id)
    return hash((message.body, message.exchange, message.routing_key, ids, retries, mark))
