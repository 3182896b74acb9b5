"""Decides which messages may have crashed their process, by the number of their deliveries.

A quorum queue counts how often a message came back without a result. A message that kills its
process takes the others that the process holds along, so all of them come back. It is told apart
by being handled alone: the others get their result, and only it goes on coming back.

Laws:

- What this process returned itself, or lost with a connection while it lived on, counts for
  nothing.
- A message that would come near the limit by a return of ours is not returned: a copy is published,
  which the broker counts from 0. So the limit isn't reached by returns, also not by those of other
  processes, which only the broker has counted.
- A header can make a message a suspect, but never a crashed one: anyone can publish it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from aio_pika_batch.core.message import (
    CRASH_COUNT,
    NO_HEADERS,
    FieldValue,
    Message,
    may_have_header,
    readable_headers,
    retry_count,
)

SPARE_RETURNS = 2
"""So many returns below the limit, a copy is published instead: a copy may fail, and a connection
may be lost, which counts before anything can be done about it."""

MAX_RECORDED = 10_000
"""How many messages a process remembers to have returned; the oldest ones are forgotten."""

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
    """Not yet: its count is used up, but not by crashes. A copy starts anew."""


@dataclass(frozen=True, slots=True)
class CrashPolicy:
    """How often a message may come back without a result.

    Attributes:
        suspect_after: So often, and it is handled alone.
        limit: So often, and it isn't handled any more; above `suspect_after`.
        may_copy: Whether copies may replace returns. They go to the back of the queue, which
            `ordered_by_key` doesn't allow.
    """

    suspect_after: int
    limit: int
    may_copy: bool = True

    def judge(self, message: Message, own: int) -> Suspicion:
        """Decide how to handle a message.

        Args:
            own: How many of its returns this process caused without a crash.
        """
        total = self._total(message)
        unexplained = total - own
        if unexplained >= self.limit:
            return Suspicion.CRASHED
        if total >= self.limit and self.may_copy:
            # Other processes don't know what this one did, and the broker has a limit as well.
            return Suspicion.WORN
        return Suspicion.SUSPECT if unexplained >= self.suspect_after else Suspicion.NONE

    def may_return(self, message: Message) -> bool:
        """Whether a message may be returned to the queue, rather than a copy of it."""
        return not self.may_copy or self._total(message) < self.limit - SPARE_RETURNS

    def mark(self, message: Message, own: int) -> dict[str, FieldValue]:
        """The header of a copy that keeps what is known against the message."""
        unexplained = min(self._total(message) - own, self.suspect_after)
        return {CRASH_COUNT: unexplained} if unexplained > 0 else {}

    def _total(self, message: Message) -> int:
        headers = readable_headers(message) or NO_HEADERS
        marked = min(retry_count(headers.get(CRASH_COUNT)) or 0, self.suspect_after)
        return delivery_count(message) + marked


def delivery_count(message: Message) -> int:
    """How often the broker counts that the message came back; 0 if that can't be read."""
    return (message.delivery_count or 0) if message.has_readable_headers else 0


def came_back(chunk: Sequence[Message]) -> Sequence[Message]:
    """The messages of a chunk that need a look: nearly always none.

    The broker marks a message that it has counted as redelivered, and our copies have a header.
    """
    if may_have_header(chunk, CRASH_COUNT):
        return chunk
    return [each for each in chunk if each.redelivered]


class OwnReturns:
    """Which returns of which messages this process caused, and survived.

    A message is recognized by its content, because a delivery has no identity that outlives it. For
    each one the counts at which it was returned are kept as the bits of a number: two messages of
    the same content can't explain more returns than there were.
    """

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}

    def note(self, message: Message) -> None:
        """Note that the message goes back now, although nothing crashed."""
        key = _fingerprint(message)
        # Removed first, so that the dict is ordered by the last return.
        counts = self._counts.pop(key, 0) | 1 << min(delivery_count(message), _MOST)
        self._counts[key] = counts
        if len(self._counts) > MAX_RECORDED:
            del self._counts[next(iter(self._counts))]

    def explained(self, message: Message) -> int:
        """How many of the returns that the broker has counted this process caused."""
        if not self._counts:
            return 0
        counts = self._counts.get(_fingerprint(message), 0)
        before = (1 << min(delivery_count(message), _MOST + 1)) - 1
        return (counts & before).bit_count()


def _fingerprint(message: Message) -> int:
    properties = message.properties
    return hash(
        (
            message.body,
            message.exchange,
            message.routing_key,
            properties.message_id,
            properties.correlation_id,
        )
    )
