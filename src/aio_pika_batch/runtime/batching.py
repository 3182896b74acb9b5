"""Who collects what a session delivers, and what is taken back from a handler?

Without keys and bytes, chunks are collected as they come. Otherwise each message is looked at, and
asked for its key. One whose `batch_key` fails, fails alone, as if it had been a batch of its own
whose handler raised; the others are collected as ever.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeAlias

from aio_pika_batch.core.batch_run import BatchDecisions, FailurePolicy
from aio_pika_batch.core.batcher import Batch, Batcher
from aio_pika_batch.core.keyed_batcher import KeyedBatcher
from aio_pika_batch.core.message import Message
from aio_pika_batch.core.ordered_batcher import OrderedBatcher
from aio_pika_batch.core.results import Cause, MessageOutcome, MessageResult, result_for
from aio_pika_batch.core.retry_in_place import RetryInPlace
from aio_pika_batch.errors import ConfigurationError, MessageDecodeError

BatchKey: TypeAlias = Callable[[Message], Hashable | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cutting:
    """How batches are cut, as the settings say.

    Attributes:
        in_place: Given if each key keeps its order.
    """

    size: int
    timeout: float
    max_bytes: int | None
    in_place: RetryInPlace | None


class BatchIntake:
    """Collects for one session.

    Args:
        batch_key: The user's; None if there is none.
        failure: What becomes of a message that it raises for.

    Attributes:
        batcher: Whom to ask for batches.
        add: Takes messages that have arrived, and the time; returns those that have no place in a
            batch, judged; None if there is none.
        runs_users_code: Whether `add` does.
    """

    def __init__(
        self, cutting: Cutting, batch_key: BatchKey | None, failure: FailurePolicy
    ) -> None:
        self._in_place = cutting.in_place
        self._ordered: OrderedBatcher | None = None
        self.batcher: Batcher | KeyedBatcher | OrderedBatcher
        self.add: Callable[[Sequence[Message], float], BatchDecisions | None]
        self.runs_users_code = batch_key is not None
        if batch_key is None and cutting.max_bytes is None:
            self.batcher = plain = Batcher(size=cutting.size, timeout=cutting.timeout)
            self.add = plain.add
            return
        self.batcher = keyed = KeyedBatcher(
            size=cutting.size, timeout=cutting.timeout, max_bytes=cutting.max_bytes
        )
        if cutting.in_place is not None:
            self.batcher = self._ordered = OrderedBatcher(keyed)
        if batch_key is None:
            self.add = keyed.add
        else:
            self.add = _KeyReader(batch_key, self.batcher, failure).add

    @property
    def held(self) -> int:
        """Messages that wait for their next attempt in place."""
        return 0 if self._ordered is None else self._ordered.held

    def begin(self, keys: Iterable[Hashable]) -> None:
        """Wait with these: handlers have been at work at them since an earlier session."""
        if self._ordered is not None:
            for key in keys:
                self._ordered.block(key)

    def keeps_failures(self, batch: Batch) -> bool:
        """Whether what fails in this batch is tried again in place, once its handler is done."""
        return self._ordered is not None and batch.key is not None

    def take_back(self, batch: Batch, handled: BatchDecisions, now: float) -> Sequence[Message]:
        """Keep what is to be tried again in place, and take it out of `handled`.

        Args:
            now: The time, in the clock of `add`.

        Returns:
            Those that are kept because they have failed.
        """
        in_place, ordered = self._in_place, self._ordered
        if in_place is None or ordered is None or batch.key is None or not handled.not_acked:
            return ()
        # Jitter spreads load; nobody gains by predicting it.
        found = in_place.decide(handled.not_acked, now=datetime.now(UTC), jitter=random.random())
        handled.not_acked = found.final
        ordered.keep(batch, found.attempts, found.not_attempted, now)
        return [each.message for each in found.attempts]

    def release(self, batch: Batch) -> None:
        """A batch, of this session or an earlier one, is no longer at work."""
        if self._ordered is not None:
            self._ordered.release(batch.key)


class _KeyReader:
    """Asks for the key of each message before it is collected."""

    def __init__(
        self,
        batch_key: BatchKey,
        batcher: KeyedBatcher | OrderedBatcher,
        failure: FailurePolicy,
    ) -> None:
        self._batch_key = batch_key
        self._batcher = batcher
        self._failure = failure

    def add(self, chunk: Sequence[Message], now: float) -> BatchDecisions | None:
        messages: list[Message] = []
        keys: list[Hashable | None] = []
        failed = BatchDecisions()
        for message in chunk:
            try:
                key = self._batch_key(message)
                hash(key)
            except Exception as error:  # noqa: BLE001  -- the user's code may raise anything
                failed.not_acked.append(self._verdict(message, error))
            else:
                messages.append(message)
                keys.append(key)
        self._batcher.add(messages, now, keys)
        return failed or None

    def _verdict(self, message: Message, error: Exception) -> MessageOutcome:
        if isinstance(error, MessageDecodeError) and error.message is message:
            return MessageOutcome(message, MessageResult.NACK, Cause.UNDECODABLE, error)
        policy = self._failure
        result = result_for(error, policy.exceptions) or policy.action
        return MessageOutcome(message, result, Cause.EXCEPTION, error)


def check_batch_key(
    name: str, method: Callable[..., object], *, overridden: bool, ordered: bool
) -> None:
    """Refuse a `batch_key` that cannot work.

    Args:
        name: Of the consumer's class.
        overridden: Whether the method is its own.
        ordered: Whether `ordered_by_key` is wanted.

    Raises:
        ConfigurationError: As said.
    """
    if inspect.iscoroutinefunction(method):
        msg = f"{name}.batch_key is a coroutine: it must be a plain `def` that returns the key"
        raise ConfigurationError(msg)
    if ordered and not overridden:
        msg = (
            f"ordered_by_key=True keeps the order of each key, and {name} has no keys: override"
            " batch_key(self, message)"
        )
        raise ConfigurationError(msg)
