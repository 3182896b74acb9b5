"""Collects messages into batches that have one key each, and a limit on their bytes.

If the order of each key has to be kept, only one batch of it is handled at a time.

Each key has a buffer of its own, with the rules of :mod:`~aio_pika_batch.core.batcher`. It is a
separate class because keys and sizes need a look at every message, which the plain batcher avoids.
Delivery tags, which only increase, identify the messages.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import count, repeat

from aio_pika_batch.core.batcher import Batch, Batcher, Trigger
from aio_pika_batch.core.message import Message
from aio_pika_batch.core.retry_in_place import Attempt


class _KeyBuffer:
    """The buffered messages of one key, oldest first.

    Attributes:
        items: The messages, each with the time of its arrival.
        count: The number of messages in the next batch.
        bytes: The total size of their bodies.
        full: Why the next batch can take no more messages; None while it can.
        is_blocked: Whether no batch may be cut from this buffer.
    """

    __slots__ = ("bytes", "count", "full", "is_blocked", "items", "key")

    def __init__(self, key: Hashable | None) -> None:
        self.key = key
        self.items: deque[tuple[float, Message]] = deque()
        self.count = 0
        self.bytes = 0
        self.full: Trigger | None = None
        self.is_blocked = False


# When the oldest message of the buffer arrived, its delivery tag, and a number that breaks ties,
# because buffers cannot be compared.
_Entry = tuple[float, int, int, _KeyBuffer]

_STALE = 64
"""The heaps may hold this many outdated entries before they are cleaned up."""


def _holds(entry: _Entry) -> bool:
    """Whether the buffer can be cut, and still begins with the same message."""
    _, tag, _, buffer = entry
    return bool(buffer.items) and not buffer.is_blocked and buffer.items[0][1].delivery_tag == tag


class KeyedBatcher(Batcher):
    """Collects messages by their keys and cuts batches of one key each.

    Args:
        size: The maximum number of messages in a batch, at least 1.
        timeout: Seconds after which a batch is cut even if it isn't full.
        max_bytes: The maximum total size of the bodies in a batch. A larger message gets a batch of
            its own.
    """

    __slots__ = ("_ages", "_buffers", "_full", "_max_bytes", "_tickets")

    def __init__(self, *, size: int, timeout: float, max_bytes: int | None = None) -> None:
        super().__init__(size=size, timeout=timeout)
        self._max_bytes = math.inf if max_bytes is None else max_bytes
        self._buffers: dict[Hashable | None, _KeyBuffer] = {}
        # Heaps. An entry stays in them when its buffer changes, and is skipped later.
        self._ages: list[_Entry] = []
        self._full: list[_Entry] = []
        self._tickets = count()

    @property
    def since(self) -> float | None:
        """When the oldest buffered message arrived; None if there is none."""
        heads = (buffer.items[0][0] for buffer in self._buffers.values() if buffer.items)
        return min(heads, default=None)

    @property
    def deadline(self) -> float | None:
        """When `poll` will return a batch at the latest; None if no batch can be cut."""
        buffer = self._first(self._ages)
        return None if buffer is None else buffer.items[0][0] + self._timeout

    def add(
        self, chunk: Sequence[Message], now: float, keys: Sequence[Hashable | None] | None = None
    ) -> None:
        """Buffer messages that arrived at `now`.

        Args:
            keys: One key for each message; None if no message has one.
        """
        for message, key in zip(chunk, keys or repeat(None), strict=False):
            buffer = self._buffer(key)
            was_empty, was_full = not buffer.items, buffer.full is not None
            buffer.items.append((now, message))
            if not was_full:
                self._extend(buffer, message)
            if was_empty or (buffer.full is not None and not was_full):
                self._offer(buffer)
        self._count += len(chunk)

    def poll(self, now: float, *, exhausted: bool = False) -> Batch | None:
        """Cut a batch if one is due, as `Batcher.poll` does."""
        # Of several keys that are due, the one with the oldest message goes first, full or not: a
        # key that always has messages cannot starve another. A full buffer that isn't due by age
        # comes after those that are.
        oldest = self._first(self._ages)
        if oldest is None:
            return None
        if now >= oldest.items[0][0] + self._timeout:
            return self._cut_from(oldest, oldest.full or Trigger.TIMEOUT)
        due = self._first(self._full) or (oldest if exhausted else None)
        return None if due is None else self._cut_from(due, due.full or Trigger.PREFETCH)

    def flush(self) -> Batch | None:
        """Cut a batch even if none is due, because no more messages will arrive."""
        oldest = self._first(self._ages)
        return None if oldest is None else self._cut_from(oldest, Trigger.DRAIN)

    def clear(self) -> list[Message]:
        """Remove and return all buffered messages. Blocked keys stay blocked."""
        messages = [message for buffer in self._buffers.values() for _, message in buffer.items]
        for buffer in list(self._buffers.values()):
            buffer.items.clear()
            self._measure(buffer)
            self._remove_if_idle(buffer)
        self._count = 0
        return sorted(messages, key=lambda message: message.delivery_tag)

    # -- for batches of one key that are handled one after another --------------------------------

    def block(self, key: Hashable) -> None:
        """Cut no batch of this key until it is unblocked."""
        self._buffer(key).is_blocked = True

    def unblock(self, key: Hashable) -> None:
        """Allow batches of this key again."""
        buffer = self._buffer(key)
        buffer.is_blocked = False
        self._offer(buffer)
        self._remove_if_idle(buffer)

    def put_back(self, key: Hashable, messages: Sequence[Message], since: float) -> None:
        """Put messages of an earlier batch of a blocked key in front of its buffered messages.

        Args:
            since: When they arrived.
        """
        buffer = self._buffer(key)
        buffer.items.extendleft((since, message) for message in reversed(messages))
        self._count += len(messages)
        self._measure(buffer)

    # -- internals --------------------------------------------------------------------------------

    def _buffer(self, key: Hashable | None) -> _KeyBuffer:
        buffer = self._buffers.get(key)
        if buffer is None:
            buffer = self._buffers[key] = _KeyBuffer(key)
        return buffer

    def _remove_if_idle(self, buffer: _KeyBuffer) -> None:
        if not buffer.items and not buffer.is_blocked:
            del self._buffers[buffer.key]

    def _extend(self, buffer: _KeyBuffer, message: Message) -> bool:
        """Add the message to the next batch if it fits, and return whether the batch is full."""
        size = buffer.bytes + len(message.body)
        if not buffer.count or size <= self._max_bytes:
            buffer.count += 1
            buffer.bytes = size
        if buffer.count == self._size:
            buffer.full = Trigger.SIZE
        elif size >= self._max_bytes:
            buffer.full = Trigger.BYTES
        return buffer.full is not None

    def _measure(self, buffer: _KeyBuffer) -> None:
        """Determine the next batch."""
        buffer.count = buffer.bytes = 0
        buffer.full = None
        for _, message in buffer.items:
            if self._extend(buffer, message):
                break

    def _offer(self, buffer: _KeyBuffer) -> None:
        if buffer.items and not buffer.is_blocked:
            arrived, message = buffer.items[0]
            entry = (arrived, message.delivery_tag, next(self._tickets), buffer)
            self._push(self._ages, entry)
            if buffer.full is not None:
                self._push(self._full, entry)

    def _push(self, entries: list[_Entry], entry: _Entry) -> None:
        # A buffer is offered at most a few times before it changes.
        if len(entries) > 4 * len(self._buffers) + _STALE:
            entries[:] = filter(_holds, entries)
            heapify(entries)
        heappush(entries, entry)

    @staticmethod
    def _first(entries: list[_Entry]) -> _KeyBuffer | None:
        """The buffer with the oldest message; outdated entries are removed on the way."""
        while entries:
            if _holds(entries[0]):
                return entries[0][3]
            heappop(entries)
        return None

    def _cut_from(self, buffer: _KeyBuffer, trigger: Trigger) -> Batch:
        since = buffer.items[0][0]
        messages = [buffer.items.popleft()[1] for _ in range(buffer.count)]
        self._count -= len(messages)
        self._measure(buffer)
        self._offer(buffer)
        self._remove_if_idle(buffer)
        return Batch(messages, trigger, since, buffer.key)


@dataclass(slots=True)
class _Retry:
    """A message to retry.

    Attributes:
        since: When it arrived.
        at: When its pause ends.
    """

    message: Message
    since: float
    at: float


class OrderedBatcher(KeyedBatcher):
    """Cuts only one batch of a key at a time, and keeps the order of each key.

    After a batch with a key has been handled, call `keep` if messages of it have failed, and then
    `release`. Laws:

    - While a batch of a key is being handled, no other batch of this key is cut.
    - Failed messages are retried one by one, each after its pause. Later messages of their key wait
      until all of them have a final result.
    - Messages without a key (None) have no order.
    """

    __slots__ = ("_due", "_retries", "held")

    def __init__(self, *, size: int, timeout: float, max_bytes: int | None = None) -> None:
        super().__init__(size=size, timeout=timeout, max_bytes=max_bytes)
        self._retries: dict[Hashable, deque[_Retry]] = {}
        # The first retry of each key that is not being handled: when it is due, its tag, its key.
        self._due: list[tuple[float, int, Hashable]] = []
        self.held = 0
        """The number of messages that wait for their next attempt."""

    def __len__(self) -> int:
        """The number of buffered messages, including those that failed."""
        return super().__len__() + self.held

    @property
    def since(self) -> float | None:
        """When the oldest buffered message arrived; None if there is none."""
        times = [retry.since for retries in self._retries.values() for retry in retries]
        fresh = super().since
        return min(times if fresh is None else [*times, fresh], default=None)

    @property
    def deadline(self) -> float | None:
        """When `poll` will return a batch at the latest; None if no batch can be cut."""
        fresh = super().deadline
        if not self._due:
            return fresh
        retry = self._due[0][0]
        return retry if fresh is None else min(retry, fresh)

    def poll(self, now: float, *, exhausted: bool = False) -> Batch | None:
        """Cut a batch if one is due; retries of failed messages come first."""
        # Retries cannot starve other messages: their number is limited, and each one that is made
        # leaves fewer.
        if self._due and now >= self._due[0][0]:
            _, _, key = heappop(self._due)
            retry = self._retries[key].popleft()
            self.held -= 1
            return Batch([retry.message], Trigger.TIMEOUT, retry.since, key)
        return self._blocking(super().poll(now, exhausted=exhausted))

    def flush(self) -> Batch | None:
        """Cut a batch of messages that have not failed, because no more messages will arrive."""
        return self._blocking(super().flush())

    def clear(self) -> list[Message]:
        """Remove and return all buffered messages."""
        messages = super().clear()
        messages.extend(retry.message for retries in self._retries.values() for retry in retries)
        self._retries.clear()
        self._due.clear()
        self.held = 0
        return sorted(messages, key=lambda message: message.delivery_tag)

    def keep(
        self,
        batch: Batch,
        attempts: Sequence[Attempt],
        not_attempted: Sequence[Message],
        now: float,
    ) -> None:
        """Take messages of a batch back, before `release`.

        Args:
            attempts: To be retried one by one, in this order.
            not_attempted: To be buffered again, after the attempts.
            now: The time in seconds at which the pauses begin.
        """
        if attempts:
            retries = [_Retry(each.message, batch.since, now + each.pause) for each in attempts]
            self._retries.setdefault(batch.key, deque()).extendleft(reversed(retries))
            self.held += len(retries)
        self.put_back(batch.key, not_attempted, batch.since)

    def release(self, key: Hashable | None) -> None:
        """Allow the next batch of this key: the last one has been handled."""
        if key is None:
            return
        retries = self._retries.get(key)
        if retries:
            heappush(self._due, (retries[0].at, retries[0].message.delivery_tag, key))
        else:
            self._retries.pop(key, None)
            self.unblock(key)

    def _blocking(self, batch: Batch | None) -> Batch | None:
        if batch is not None and batch.key is not None:
            self.block(batch.key)
        return batch
