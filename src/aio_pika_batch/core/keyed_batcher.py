"""When is a batch full that may hold one key only, or so many bytes?

A lane for each key, and in it the rules of :mod:`~aio_pika_batch.core.batcher`: full, old enough,
or nothing more can come. Of several lanes that are due, the one with the oldest message goes first,
so that no key can starve another. Messages are told apart by their delivery tags, which grow.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Sequence
from heapq import heapify, heappop, heappush
from itertools import count, repeat

from aio_pika_batch.core.batcher import Batch, Trigger
from aio_pika_batch.core.message import Message


class _Lane:
    """The messages of one key, oldest first.

    Attributes:
        items: Each with the time of its arrival.
        count: How many of them the next batch has.
        bytes: How long their bodies are.
        full: Why the next batch can take no more; None while it has all that there are.
        is_blocked: Whether nothing of it may be cut.
    """

    __slots__ = ("bytes", "count", "full", "is_blocked", "items", "key")

    def __init__(self, key: Hashable | None) -> None:
        self.key = key
        self.items: deque[tuple[float, Message]] = deque()
        self.count = 0
        self.bytes = 0
        self.full: Trigger | None = None
        self.is_blocked = False


# When its head arrived, the head's tag, and a ticket, since lanes themselves have no order.
_Entry = tuple[float, int, int, _Lane]

_STALE = 64
"""So many stale entries are no reason to look for them."""


def _holds(entry: _Entry) -> bool:
    """Whether a lane may be cut, and begins with the message that it began with when offered."""
    _, tag, _, lane = entry
    return bool(lane.items) and not lane.is_blocked and lane.items[0][1].delivery_tag == tag


class KeyedBatcher:
    """Collects messages by their keys and cuts batches of one key each.

    Args:
        size: The most messages in a batch, at least 1.
        timeout: Seconds after which a batch is cut although it is not full.
        max_bytes: The most bytes of bodies in a batch; a message that is larger goes alone.
    """

    __slots__ = (
        "_ages",
        "_count",
        "_full",
        "_lanes",
        "_max_bytes",
        "_size",
        "_tickets",
        "_timeout",
    )

    def __init__(self, *, size: int, timeout: float, max_bytes: int | None = None) -> None:
        self._size = size
        self._timeout = timeout
        self._max_bytes = math.inf if max_bytes is None else max_bytes
        self._lanes: dict[Hashable | None, _Lane] = {}
        self._count = 0
        # Entries are not taken out when their lane moves on; stale ones are passed over.
        self._ages: list[_Entry] = []
        self._full: list[_Entry] = []
        self._tickets = count()

    def __len__(self) -> int:
        """How many messages are held."""
        return self._count

    @property
    def since(self) -> float | None:
        """When the oldest held message arrived; None if nothing is held."""
        heads = (lane.items[0][0] for lane in self._lanes.values() if lane.items)
        return min(heads, default=None)

    @property
    def deadline(self) -> float | None:
        """When `poll` has something at the latest; None if nothing is held that may be cut."""
        lane = self._first(self._ages)
        return None if lane is None else lane.items[0][0] + self._timeout

    def add(
        self, chunk: Sequence[Message], now: float, keys: Sequence[Hashable | None] | None = None
    ) -> None:
        """Take messages that arrived at `now`.

        Args:
            keys: One for each of them; None if none has a key.
        """
        for message, key in zip(chunk, keys or repeat(None), strict=False):
            lane = self._lane(key)
            was_empty, was_full = not lane.items, lane.full is not None
            lane.items.append((now, message))
            if not was_full:
                self._extend(lane, message)
            if was_empty or (lane.full is not None and not was_full):
                self._offer(lane)
        self._count += len(chunk)

    def poll(self, now: float, *, exhausted: bool = False) -> Batch | None:
        """Cut a batch if one is due.

        Args:
            now: Seconds, in the clock that `add` was given.
            exhausted: Whether the broker will send nothing more before something is settled.
        """
        oldest = self._first(self._ages)
        if oldest is None:
            return None
        if now >= oldest.items[0][0] + self._timeout:
            return self._cut(oldest, oldest.full or Trigger.TIMEOUT)
        due = self._first(self._full) or (oldest if exhausted else None)
        return None if due is None else self._cut(due, due.full or Trigger.PREFETCH)

    def flush(self) -> Batch | None:
        """Cut a batch, due or not, because nothing more will come."""
        oldest = self._first(self._ages)
        return None if oldest is None else self._cut(oldest, Trigger.DRAIN)

    def clear(self) -> list[Message]:
        """Give up everything that is held; what is blocked stays so."""
        messages = [message for lane in self._lanes.values() for _, message in lane.items]
        for lane in list(self._lanes.values()):
            lane.items.clear()
            self._measure(lane)
            self._forget_if_idle(lane)
        self._count = 0
        return sorted(messages, key=lambda message: message.delivery_tag)

    # -- one after another ------------------------------------------------------------------------

    def block(self, key: Hashable) -> None:
        """Cut nothing of this key until it is unblocked."""
        self._lane(key).is_blocked = True

    def unblock(self, key: Hashable) -> None:
        """Let batches of this key be cut again."""
        lane = self._lane(key)
        lane.is_blocked = False
        self._offer(lane)
        self._forget_if_idle(lane)

    def put_back(self, key: Hashable, messages: Sequence[Message], since: float) -> None:
        """Take messages that were cut, of a blocked key, before all that are held of it.

        Args:
            since: When they arrived.
        """
        lane = self._lane(key)
        lane.items.extendleft((since, message) for message in reversed(messages))
        self._count += len(messages)
        self._measure(lane)

    # -- inside -----------------------------------------------------------------------------------

    def _lane(self, key: Hashable | None) -> _Lane:
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = _Lane(key)
        return lane

    def _forget_if_idle(self, lane: _Lane) -> None:
        if not lane.items and not lane.is_blocked:
            del self._lanes[lane.key]

    def _extend(self, lane: _Lane, message: Message) -> bool:
        """Let the next batch take this one, too, if it can; returns whether it is full then."""
        size = lane.bytes + len(message.body)
        if not lane.count or size <= self._max_bytes:
            lane.count += 1
            lane.bytes = size
        if lane.count == self._size:
            lane.full = Trigger.SIZE
        elif size >= self._max_bytes:
            lane.full = Trigger.BYTES
        return lane.full is not None

    def _measure(self, lane: _Lane) -> None:
        """Find the next batch anew."""
        lane.count = lane.bytes = 0
        lane.full = None
        for _, message in lane.items:
            if self._extend(lane, message):
                break

    def _offer(self, lane: _Lane) -> None:
        if lane.items and not lane.is_blocked:
            arrived, message = lane.items[0]
            entry = (arrived, message.delivery_tag, next(self._tickets), lane)
            self._push(self._ages, entry)
            if lane.full is not None:
                self._push(self._full, entry)

    def _push(self, entries: list[_Entry], entry: _Entry) -> None:
        # A lane is offered anew at most a few times before it moves on.
        if len(entries) > 4 * len(self._lanes) + _STALE:
            entries[:] = filter(_holds, entries)
            heapify(entries)
        heappush(entries, entry)

    @staticmethod
    def _first(entries: list[_Entry]) -> _Lane | None:
        """The lane that has waited longest, of those that are still as they were offered."""
        while entries:
            if _holds(entries[0]):
                return entries[0][3]
            heappop(entries)
        return None

    def _cut(self, lane: _Lane, trigger: Trigger) -> Batch:
        since = lane.items[0][0]
        messages = [lane.items.popleft()[1] for _ in range(lane.count)]
        self._count -= len(messages)
        self._measure(lane)
        self._offer(lane)
        self._forget_if_idle(lane)
        return Batch(messages, trigger, since, lane.key)
