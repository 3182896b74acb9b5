"""Whose turn is it, where each key keeps its order?

While a batch of a key is at work, nothing else of this key is handed over. Of what failed, each
message is handed over again alone, once its pause is over, and until all of them are through,
everything that came after them waits. Messages without a key (None) have no order to keep.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from heapq import heappop, heappush

from aio_pika_batch.core.batcher import Batch, Trigger
from aio_pika_batch.core.keyed_batcher import KeyedBatcher
from aio_pika_batch.core.message import Message
from aio_pika_batch.core.retry_in_place import Attempt


class _Kept:
    """A message to be tried again.

    Attributes:
        since: When it arrived.
        at: When its pause is over.
    """

    __slots__ = ("at", "message", "since")

    def __init__(self, message: Message, since: float, at: float) -> None:
        self.message = message
        self.since = since
        self.at = at


class OrderedBatcher:
    """Cuts batches as a :class:`KeyedBatcher` does, and never two of a key at a time.

    Whoever takes a batch with a key gives the key free again by `release`, after `keep` if messages
    of it have failed.

    Args:
        keyed: Holds what has not failed.
    """

    __slots__ = ("_due", "_kept", "_keyed", "held")

    def __init__(self, keyed: KeyedBatcher) -> None:
        self._keyed = keyed
        self._kept: dict[Hashable, deque[_Kept]] = {}
        # The first one of each key that is not at work: when it is due, its tag, its key.
        self._due: list[tuple[float, int, Hashable]] = []
        self.held = 0
        """How many messages wait for another attempt."""

    def __len__(self) -> int:
        """How many messages are held, those that failed included."""
        return len(self._keyed) + self.held

    @property
    def since(self) -> float | None:
        """When the oldest held message arrived; None if nothing is held."""
        times = [kept.since for each in self._kept.values() for kept in each]
        if self._keyed.since is not None:
            times.append(self._keyed.since)
        return min(times, default=None)

    @property
    def deadline(self) -> float | None:
        """When `poll` has something at the latest; None if nothing is held that may be cut."""
        if not self._due:
            return self._keyed.deadline
        again = self._due[0][0]
        fresh = self._keyed.deadline
        return again if fresh is None else min(again, fresh)

    def add(
        self, chunk: Sequence[Message], now: float, keys: Sequence[Hashable | None] | None = None
    ) -> None:
        """Take messages that arrived at `now`, each with its key."""
        self._keyed.add(chunk, now, keys)

    def poll(self, now: float, *, exhausted: bool = False) -> Batch | None:
        """Cut a batch if one is due; the next attempts of what has failed come first.

        They can starve nobody: each message has so many, and no more fail while they are made.
        """
        if self._due and now >= self._due[0][0]:
            _, _, key = heappop(self._due)
            kept = self._kept[key].popleft()
            self.held -= 1
            return Batch([kept.message], Trigger.TIMEOUT, kept.since, key)
        return self._blocking(self._keyed.poll(now, exhausted=exhausted))

    def flush(self) -> Batch | None:
        """Cut a batch of what has not failed, due or not, because nothing more will come."""
        return self._blocking(self._keyed.flush())

    def clear(self) -> list[Message]:
        """Give up everything that is held."""
        messages = self._keyed.clear()
        messages.extend(kept.message for each in self._kept.values() for kept in each)
        self._kept.clear()
        self._due.clear()
        self.held = 0
        return sorted(messages, key=lambda message: message.delivery_tag)

    def block(self, key: Hashable) -> None:
        """Hand out nothing of a key that somebody has been at work at since an earlier session."""
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
            attempts: Each to be handed over again, alone, in this order.
            unreached: To be handed over again as if they had never been, after those.
            now: The time, in seconds, from which the pauses run.
        """
        if attempts:
            again = [_Kept(each.message, batch.since, now + each.pause) for each in attempts]
            self._kept.setdefault(batch.key, deque()).extendleft(reversed(again))
            self.held += len(again)
        self._keyed.put_back(batch.key, not_attempted, batch.since)

    def release(self, key: Hashable | None) -> None:
        """A batch of this key is no longer at work."""
        if key is None:
            return
        kept = self._kept.get(key)
        if kept:
            heappush(self._due, (kept[0].at, kept[0].message.delivery_tag, key))
        else:
            self._kept.pop(key, None)
            self._keyed.unblock(key)

    def _blocking(self, batch: Batch | None) -> Batch | None:
        if batch is not None and batch.key is not None:
            self._keyed.block(batch.key)
        return batch
