"""Orders the ready messages of a queue: which is delivered next, and which may expire.

Higher priorities come first (classic queues with `x-max-priority`), then older messages. A requeued
message returns to its original position (classic queues), or to the front or the back (quorum
queues, by version).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from operator import attrgetter
from typing import assert_never

from aio_pika_batch.adapters.memory.stored_message import StoredMessage


@dataclass(slots=True, eq=False)
class QueueEntry:
    """One message in one queue.

    Attributes:
        position: Its number in the order of arrival.
        expires_at: None: never.
        delivery_count: How many of its deliveries have failed.
        acquired_count: How often it was returned.
    """

    message: StoredMessage
    position: int
    expires_at: float | None
    delivery_count: int
    acquired_count: int = 0
    redelivered: bool = False


class RequeuePosition(Enum):
    """Where a requeued message goes."""

    ORIGINAL = "original"
    FRONT = "front"
    BACK = "back"


class ReadyList:
    """The ready messages of a queue.

    Args:
        max_priority: 0: priorities are ignored.
        all_heads_expire: Whether the first message of each priority may expire (classic queues), or
            only the first of all (quorum queues).
    """

    def __init__(self, *, max_priority: int, all_heads_expire: bool) -> None:
        self._levels: tuple[deque[QueueEntry], ...] = tuple(
            deque() for _ in range(max_priority + 1)
        )
        # What was requeued to the front; it comes before all priorities.
        self._requeued: deque[QueueEntry] = deque()
        self._all_heads_expire = all_heads_expire
        self._count = 0
        self.bytes = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[QueueEntry]:
        for level in self._in_delivery_order():
            yield from level

    def append(self, entry: QueueEntry) -> None:
        """Add a new message."""
        self._levels[self._priority(entry)].append(entry)
        self._added(entry)

    def requeue(self, entries: Sequence[QueueEntry], position: RequeuePosition) -> None:
        """Add returned messages, in the given order."""
        for entry in entries:
            self._added(entry)
        match position:
            case RequeuePosition.FRONT:
                # Behind those that were requeued earlier: quorum queues deliver what was returned
                # in the order of its return.
                self._requeued.extend(entries)
            case RequeuePosition.BACK:
                for entry in entries:
                    self._levels[self._priority(entry)].append(entry)
            case RequeuePosition.ORIGINAL:
                for priority, level in enumerate(self._levels):
                    _merge(level, [each for each in entries if self._priority(each) == priority])
            case never:
                assert_never(never)

    def pop(self) -> QueueEntry:
        """Remove and return the next message; the list must not be empty."""
        level = next(level for level in self._in_delivery_order() if level)
        return self._removed(level.popleft())

    def pop_expired(self, now: float) -> Iterator[QueueEntry]:
        """Remove and yield the expired messages at the front."""
        for level in self._expiring():
            while level and (at := level[0].expires_at) is not None and at <= now:
                yield self._removed(level.popleft())

    def next_expiry(self) -> float | None:
        """Return when the next message at the front expires."""
        return min(
            (at for level in self._expiring() if level and (at := level[0].expires_at) is not None),
            default=None,
        )

    def clear(self) -> list[QueueEntry]:
        """Remove and return all messages."""
        entries = list(self)
        for level in self._in_delivery_order():
            level.clear()
        self._count = self.bytes = 0
        return entries

    def _in_delivery_order(self) -> Iterator[deque[QueueEntry]]:
        yield self._requeued
        yield from reversed(self._levels)

    def _expiring(self) -> Iterable[deque[QueueEntry]]:
        if self._all_heads_expire:
            return self._in_delivery_order()
        # Lazily: the messages behind the requeued ones may expire once those are removed.
        return (
            level
            for level in self._in_delivery_order()
            if level and (level is self._requeued or not self._requeued)
        )

    def _priority(self, entry: QueueEntry) -> int:
        return min(entry.message.properties.priority or 0, len(self._levels) - 1)

    def _added(self, entry: QueueEntry) -> None:
        self._count += 1
        self.bytes += len(entry.message.body)

    def _removed(self, entry: QueueEntry) -> QueueEntry:
        self._count -= 1
        self.bytes -= len(entry.message.body)
        return entry


def _merge(level: deque[QueueEntry], returned: list[QueueEntry]) -> None:
    """Insert returned messages at their original positions."""
    if not returned:
        return
    last = max(entry.position for entry in returned)
    # Only older messages are moved, so requeuing is cheap however long the queue is.
    while level and level[0].position < last:
        returned.append(level.popleft())
    returned.sort(key=attrgetter("position"))
    level.extendleft(reversed(returned))
