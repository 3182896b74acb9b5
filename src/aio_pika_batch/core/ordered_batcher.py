"""Collects messages into batches that keep the order of each key.

Laws:

- While a batch of a key is being handled, no other batch of this key is cut.
- Failed messages are retried one by one, each after its pause. Later messages of their key wait
  until all of them have a final result.
- Messages without a key (None) have no order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from heapq import heappop, heappush

from aio_pika_batch.core.batcher import Batch, Trigger
from aio_pika_batch.core.keyed_batcher import KeyedBatcher
from aio_pika_batch.core.message import Message
from aio_pika_batch.core.retry_in_place import Attempt


class _Retry:
    """A message to retry.

    Attributes:
        since: When it arrived.
        at: When its pause ends.
    """

    __slots__ = ("at", "message", "since")

    def __init__(self, message: Message, since: float, at: float) -> None:
        self.message = message
        self.since = since
        self.at = at


class OrderedBatcher:
    """Cuts batches as a :class:`KeyedBatcher` does, but only one of a key at a time.

    After a batch with a key has been handled, call `keep` if messages of it have failed, and then
    `release`.

    Args:
        keyed: Buffers the messages that have not failed.
    """

    __slots__ = ("_due", "_keyed", "_retries", "held")

    def __init__(self, keyed: KeyedBatcher) -> None:
        self._keyed = keyed
        self._retries: dict[Hashable, deque[_Retry]] = {}
        # The first retry of each key that is not being handled: when it is due, its tag, its key.
        self._due: list[tuple[float, int, Hashable]] = []
        self.held = 0
        """The number of messages that wait for their next attempt."""

    def __len__(self) -> int:
        """The number of buffered messages, including those that failed."""
        return len(self._keyed) + self.held

    @property
    def since(self) -> float | None:
        """When the oldest buffered message arrived; None if there is none."""
        times = [retry.since for retries in self._retries.values() for retry in retries]
        if self._keyed.since is not None:
            times.append(self._keyed.since)
        return min(times, default=None)

    @property
    def deadline(self) -> float | None:
        """When `poll` will return a batch at the latest; None if no batch can be cut."""
        if not self._due:
            return self._keyed.deadline
        retry = self._due[0][0]
        fresh = self._keyed.deadline
        return retry if fresh is None else min(retry, fresh)

    def add(
        self, chunk: Sequence[Message], now: float, keys: Sequence[Hashable | None] | None = None
    ) -> None:
        """Buffer messages that arrived at `now`, each with its key."""
        self._keyed.add(chunk, now, keys)

    def poll(self, now: float, *, exhausted: bool = False) -> Batch | None:
        """Cut a batch if one is due; retries of failed messages come first."""
        # Retries cannot starve other messages: their number is limited, and each one that is made
        # leaves fewer.
        if self._due and now >= self._due[0][0]:
            _, _, key = heappop(self._due)
            retry = self._retries[key].popleft()
            self.held -= 1
            return Batch([retry.message], Trigger.TIMEOUT, retry.since, key)
        return self._blocking(self._keyed.poll(now, exhausted=exhausted))

    def flush(self) -> Batch | None:
        """Cut a batch of messages that have not failed, because no more messages will arrive."""
        return self._blocking(self._keyed.flush())

    def clear(self) -> list[Message]:
        """Remove and return all buffered messages."""
        messages = self._keyed.clear()
        messages.extend(retry.message for retries in self._retries.values() for retry in retries)
        self._retries.clear()
        self._due.clear()
        self.held = 0
        return sorted(messages, key=lambda message: message.delivery_tag)

    def block(self, key: Hashable) -> None:
        """Cut no batch of a key that a handler of an earlier session is still working on."""
        self._keyed.block(key)

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
        self._keyed.put_back(batch.key, not_attempted, batch.since)

    def release(self, key: Hashable | None) -> None:
        """Allow the next batch of this key: the last one has been handled."""
        if key is None:
            return
        retries = self._retries.get(key)
        if retries:
            heappush(self._due, (retries[0].at, retries[0].message.delivery_tag, key))
        else:
            self._retries.pop(key, None)
            self._keyed.unblock(key)

    def _blocking(self, batch: Batch | None) -> Batch | None:
        if batch is not None and batch.key is not None:
            self._keyed.block(batch.key)
        return batch
