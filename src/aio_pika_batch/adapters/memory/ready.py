"""In what order does a queue hand out what waits in it?

Higher priorities first (classic queues with `x-max-priority`), then older ones. What a consumer
returns comes back to where it was (classic), before everything else or at the very end (quorum, by
version).
"""

from __future__ import annotations

from collections import deque
from enum import Enum
from typing import TYPE_CHECKING, assert_never

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from aio_pika_batch.adapters.memory.stored_message import Stored


class Entry:
    """One message in one queue.

    Attributes:
        position: Its place in the queue; the order of arrival.
        expires_at: When its time is over; None: never.
        deliveries: How often it was handed out in vain, as far as that counts (quorum queues).
        handed_out: Whether a consumer has had it.
        acquired: How often it was handed out in vain at all.
    """

    __slots__ = (
        "acquired",
        "deliveries",
        "expires_at",
        "handed_out",
        "message",
        "position",
        "redelivered",
    )

    def __init__(self, message: Stored, position: int, expires_at: float | None) -> None:
        self.message = message
        self.position = position
        self.expires_at = expires_at
        self.redelivered = message.seen
        self.handed_out = False
        self.deliveries = 0
        self.acquired = 0


class Place(Enum):
    """Where a returned message goes."""

    ORIGINAL = "original"
    FRONT = "front"
    BACK = "back"


class Ready:
    """What waits in a queue.

    Args:
        max_priority: 0: priorities do not matter.
        all_heads_expire: Whether each priority is a queue of its own when it comes to time to live.
    """

    def __init__(self, *, max_priority: int, all_heads_expire: bool) -> None:
        self._levels: tuple[deque[Entry], ...] = tuple(deque() for _ in range(max_priority + 1))
        self._returned: deque[Entry] = deque()
        self._all_heads_expire = all_heads_expire
        self._count = 0
        self.bytes = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Entry]:
        for line in self._lines():
            yield from line

    def append(self, entry: Entry) -> None:
        """Let a new one wait."""
        self._levels[self._level(entry)].append(entry)
        self._count_in(entry)

    def put_back(self, entries: Sequence[Entry], place: Place) -> None:
        """Let returned ones wait again; they are given in their order."""
        for entry in entries:
            self._count_in(entry)
        match place:
            case Place.FRONT:
                self._returned.extend(entries)
            case Place.BACK:
                for entry in entries:
                    self._levels[self._level(entry)].append(entry)
            case Place.ORIGINAL:
                for level, line in enumerate(self._levels):
                    _merge(line, [entry for entry in entries if self._level(entry) == level])
            case never:
                assert_never(never)

    def pop(self) -> Entry:
        """Take the next one. There is one."""
        line = next(line for line in self._lines() if line)
        return self._count_out(line.popleft())

    def pop_expired(self, now: float) -> Iterator[Entry]:
        """Take what stands at a head and whose time is over."""
        for line in self._expiring():
            while line and (at := line[0].expires_at) is not None and at <= now:
                yield self._count_out(line.popleft())

    def next_expiry(self) -> float | None:
        """When the next one at a head expires."""
        return min(
            (at for line in self._expiring() if line and (at := line[0].expires_at) is not None),
            default=None,
        )

    def clear(self) -> list[Entry]:
        """Take everything."""
        everything = list(self)
        for line in self._lines():
            line.clear()
        self._count = self.bytes = 0
        return everything

    def _lines(self) -> Iterator[deque[Entry]]:
        yield self._returned
        yield from reversed(self._levels)

    def _expiring(self) -> Iterable[deque[Entry]]:
        if self._all_heads_expire:
            return self._lines()
        # One head only; as it goes, what was returned makes way for what is behind it.
        return (
            line
            for line in self._lines()
            if line and (line is self._returned or not self._returned)
        )

    def _level(self, entry: Entry) -> int:
        return min(entry.message.properties.priority or 0, len(self._levels) - 1)

    def _count_in(self, entry: Entry) -> None:
        self._count += 1
        self.bytes += len(entry.message.body)

    def _count_out(self, entry: Entry) -> Entry:
        self._count -= 1
        self.bytes -= len(entry.message.body)
        return entry


def _merge(line: deque[Entry], returned: list[Entry]) -> None:
    """Put entries back between those that wait, by position."""
    if not returned:
        return
    returned = sorted(returned, key=_position)
    last = returned[-1].position
    # Only those that came before the last returned one are in its way; mostly there are none.
    while line and line[0].position < last:
        returned.append(line.popleft())
    returned.sort(key=_position)
    line.extendleft(reversed(returned))


def _position(entry: Entry) -> int:
    return entry.position
