"""Collects messages into batches by number and by time.

Laws:

- Whether a batch is due depends only on the buffered messages and the given time, so a deadline
  cannot become outdated.
- The age of a batch counts from its own first message, not from the previous batch.
- A batch is cut only on demand (`poll`), so it goes on growing while all handler slots are in use.
  Backpressure needs no queue of batches: the prefetch count limits the buffer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from aio_pika_batch.core.batch_run import BatchDecisions
from aio_pika_batch.core.message import Message


class Trigger(Enum):
    """Why a batch was cut."""

    SIZE = "size"
    """It reached `batch_size`."""
    TIMEOUT = "timeout"
    """Its first message had waited for `batch_timeout`."""
    BYTES = "bytes"
    """Another message would have exceeded `batch_max_bytes`."""
    PREFETCH = "prefetch"
    """The consumer held all messages that the prefetch count allows, so no more could arrive."""
    DRAIN = "drain"
    """The consumer is stopping."""
    ISOLATE = "isolate"
    """It is a part of a failed batch, run again to find the message that made it fail."""


# Not frozen: one is created for each batch, see `Properties`.
@dataclass(slots=True)
class Batch:
    """Messages to handle together, oldest first; at least one.

    Attributes:
        since: When its first message arrived, by the clock of `Batcher.add`.
        key: The batch key of all its messages; None if they have none.
    """

    messages: Sequence[Message]
    trigger: Trigger
    since: float
    key: Hashable | None = None


class Batcher:
    """Collects chunks of messages and cuts batches from them.

    Args:
        size: The maximum number of messages in a batch, at least 1.
        timeout: Seconds after which a batch is cut even if it isn't full.
    """

    __slots__ = ("_chunks", "_count", "_size", "_taken", "_timeout")

    def __init__(self, *, size: int, timeout: float) -> None:
        self._size = size
        self._timeout = timeout
        # The messages of one network read arrived at the same time, so they are kept as one chunk
        # and never touched one by one.
        self._chunks: deque[tuple[float, Sequence[Message]]] = deque()
        # How many messages of the first chunk are in batches already.
        self._taken = 0
        self._count = 0

    def __len__(self) -> int:
        """The number of buffered messages."""
        return self._count

    @property
    def since(self) -> float | None:
        """When the oldest buffered message arrived; None if there is none."""
        return self._chunks[0][0] if self._chunks else None

    @property
    def deadline(self) -> float | None:
        """When `poll` will return a batch at the latest; None if nothing is buffered."""
        return self._chunks[0][0] + self._timeout if self._chunks else None

    def add(self, chunk: Sequence[Message], now: float) -> None:
        """Buffer messages that arrived at `now`."""
        if chunk:
            self._chunks.append((now, chunk))
            self._count += len(chunk)

    def poll(self, now: float, *, exhausted: bool = False) -> Batch | None:
        """Cut a batch if one is due.

        Args:
            now: Seconds, by the clock of `add`.
            exhausted: Whether the broker sends nothing more until something is settled.
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
        """Cut a batch even if none is due, because no more messages will arrive."""
        return self._cut(Trigger.DRAIN) if self._chunks else None

    def clear(self) -> list[Message]:
        """Remove and return all buffered messages."""
        messages = [message for _, chunk in self._chunks for message in chunk][self._taken :]
        self._chunks.clear()
        self._taken = self._count = 0
        return messages

    def _cut(self, trigger: Trigger) -> Batch:
        since, first = self._chunks[0]
        end = self._taken + self._size
        if end < len(first):
            messages = first[self._taken : end]
            self._taken = end
            self._count -= self._size
            return Batch(messages, trigger, since)
        messages = first[self._taken :] if self._taken else first
        self._chunks.popleft()
        self._taken = 0
        if self._chunks and len(messages) < self._size:
            messages = list(messages)
            while self._chunks and (missing := self._size - len(messages)):
                chunk = self._chunks[0][1]
                messages.extend(chunk[:missing])
                if len(chunk) > missing:
                    self._taken = missing
                    break
                self._chunks.popleft()
        self._count -= len(messages)
        return Batch(messages, trigger, since)


class BatchIntake:
    """Collects deliveries without an order of keys; the base of the one that has it.

    Attributes:
        batcher: Returns the batches.
        runs_users_code: Whether `add` calls the user's `batch_key`.
    """

    runs_users_code = False

    def __init__(self, batcher: Batcher) -> None:
        self.batcher = batcher

    @property
    def held(self) -> int:
        """The number of messages that wait to be retried in place."""
        return 0

    def add(self, chunk: Sequence[Message], now: float) -> BatchDecisions | None:
        """Take messages that arrived at `now`.

        Returns:
            Decisions about messages whose `batch_key` failed; None if there are none.
        """
        self.batcher.add(chunk, now)
        return None

    def begin(self, keys: Iterable[Hashable]) -> None:
        """Hold back these keys: handlers of an earlier session still work on them."""

    def keeps_failures(self, batch: Batch) -> bool:  # noqa: ARG002  -- for the subclass
        """Whether messages of this batch that fail are retried in place after its handler ended."""
        return False

    def take_back(self, batch: Batch, decisions: BatchDecisions, now: float) -> None:
        """Keep messages that are retried in place, and remove them from the decisions."""

    def release(self, batch: Batch) -> None:
        """Note that a batch, of this session or an earlier one, has been handled."""
