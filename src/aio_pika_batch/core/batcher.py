"""When is a batch full, and when has it waited long enough?

A pure state machine: what is due is a function of what is held and of the time it is given, so a
deadline cannot go stale. The age of a batch runs from its own first message, not from the last cut.
A batch is cut only when somebody can take it (`poll`), so that it goes on growing while all hands
are busy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from enum import Enum

from aio_pika_batch.core.message import Message


class Trigger(Enum):
    """Why a batch was cut."""

    SIZE = "size"
    """It was full."""
    TIMEOUT = "timeout"
    """Its first message had waited long enough."""
    BYTES = "bytes"
    """Another message would have been too much for it."""
    PREFETCH = "prefetch"
    """Every message that the prefetch count allows was in hand: no more could come."""
    DRAIN = "drain"
    """The consumer is stopping."""
    ISOLATE = "isolate"
    """It is what a failed batch left undecided, run again to find out whose fault it was."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Messages to be handled together, oldest first, never empty.

    Attributes:
        since: When its first message arrived, in the clock that `Batcher.add` was given.
        key: What its messages have in common; None if that is nothing.
    """

    messages: Sequence[Message]
    trigger: Trigger
    since: float
    key: Hashable | None = None


class Batcher:
    """Collects chunks of messages and cuts batches out of them.

    Args:
        size: The most messages in a batch, at least 1.
        timeout: Seconds after which a batch is cut although it is not full.
    """

    __slots__ = ("_chunks", "_count", "_size", "_timeout")

    def __init__(self, *, size: int, timeout: float) -> None:
        self._size = size
        self._timeout = timeout
        # A chunk arrived at one moment; the messages of one read are never touched one by one.
        self._chunks: deque[tuple[float, Sequence[Message]]] = deque()
        self._count = 0

    def __len__(self) -> int:
        """How many messages are held."""
        return self._count

    @property
    def since(self) -> float | None:
        """When the oldest held message arrived; None if nothing is held."""
        return self._chunks[0][0] if self._chunks else None

    @property
    def deadline(self) -> float | None:
        """When `poll` has something at the latest; None if nothing is held."""
        return self._chunks[0][0] + self._timeout if self._chunks else None

    def add(self, chunk: Sequence[Message], now: float) -> None:
        """Take messages that arrived at `now`."""
        if chunk:
            self._chunks.append((now, chunk))
            self._count += len(chunk)

    def poll(self, now: float, *, exhausted: bool = False) -> Batch | None:
        """Cut a batch if one is due.

        Args:
            now: Seconds, in the clock that `add` was given.
            exhausted: Whether the broker will send nothing more before something is settled.
        """
        if self._count >= self._size:
            return self._cut(Trigger.SIZE)
        if not self._chunks:
            return None
        if now >= self._chunks[0][0] + self._timeout:
            return self._cut(Trigger.TIMEOUT)
        if exhausted:
            return self._cut(Trigger.PREFETCH)
        return None

    def flush(self) -> Batch | None:
        """Cut a batch, due or not, because nothing more will come."""
        return self._cut(Trigger.DRAIN) if self._chunks else None

    def clear(self) -> list[Message]:
        """Give up everything that is held."""
        messages = [message for _, chunk in self._chunks for message in chunk]
        self._chunks.clear()
        self._count = 0
        return messages

    def _cut(self, trigger: Trigger) -> Batch:
        since, first = self._chunks[0]
        if len(first) == self._size or (len(self._chunks) == 1 and len(first) < self._size):
            self._chunks.popleft()
            self._count -= len(first)
            return Batch(first, trigger, since)
        messages: list[Message] = []
        while self._chunks and (missing := self._size - len(messages)):
            arrived, chunk = self._chunks.popleft()
            messages.extend(chunk[:missing])
            if len(chunk) > missing:
                self._chunks.appendleft((arrived, chunk[missing:]))
        self._count -= len(messages)
        return Batch(messages, trigger, since)
