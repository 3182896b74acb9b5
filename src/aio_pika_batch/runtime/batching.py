"""Collects deliveries into batches for one session, with the batcher that the settings need."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterable, Sequence
from datetime import UTC, datetime
from typing import TypeAlias

from aio_pika_batch.core.batch_run import BatchDecisions, FailurePolicy
from aio_pika_batch.core.batcher import Batch, Batcher, BatchIntake
from aio_pika_batch.core.keyed_batcher import KeyedBatcher, OrderedBatcher
from aio_pika_batch.core.message import Message
from aio_pika_batch.core.results import Cause, MessageOutcome, MessageResult
from aio_pika_batch.core.retry_in_place import RetryInPlace
from aio_pika_batch.errors import MessageDecodeError
from aio_pika_batch.logs import KeywordLogger
from aio_pika_batch.observer import HandlerError, Observers, Requeued
from aio_pika_batch.runtime.worker_config import WorkerConfig

BatchKey: TypeAlias = Callable[[Message], Hashable | None]


class KeyedIntake(BatchIntake):
    """Collects deliveries by the key that the user's `batch_key` returns.

    A message whose `batch_key` raises can't be part of any batch. It is treated as if its handler
    had raised, and the other messages are collected as usual: the worker must not end by it.
    """

    batcher: KeyedBatcher
    runs_users_code = True

    def __init__(
        self,
        batcher: KeyedBatcher,
        batch_key: BatchKey,
        failure: FailurePolicy,
        *,
        observers: Observers,
        log: KeywordLogger,
    ) -> None:
        super().__init__(batcher)
        self._batch_key = batch_key
        self._failure = failure
        self._observers = observers
        self._log = log

    def add(self, chunk: Sequence[Message], now: float) -> BatchDecisions | None:
        """Ask for the key of each message, and collect it."""
        messages: list[Message] = []
        keys: list[Hashable | None] = []
        failed: list[MessageOutcome] = []
        for message in chunk:
            try:
                key = self._batch_key(message)
                # A key that isn't hashable is its message's failure, and not the batcher's.
                hash(key)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # noqa: BLE001  -- the user's code may raise anything
                failed.append(self._outcome(message, error))
            else:
                messages.append(message)
                keys.append(key)
        self.batcher.add(messages, now, keys)
        if not failed:
            return None
        # One traceback is enough: they arrived together, and mostly fail for the same reason.
        self._log.error("batch_key failed", exc_info=failed[0].error, messages=len(failed))
        if self._observers.present:
            for each in failed:
                if each.error is not None:
                    self._observers.emit(HandlerError([each.message], each.error))
        return BatchDecisions(not_acked=failed)

    def _outcome(self, message: Message, error: BaseException) -> MessageOutcome:
        if isinstance(error, MessageDecodeError) and error.message is message:
            return MessageOutcome(message, MessageResult.NACK, Cause.UNDECODABLE, error)
        cause = Cause.EXCEPTION
        return MessageOutcome(message, self._failure.result(error, cause), cause, error)


class OrderedIntake(KeyedIntake):
    """Collects deliveries by key, keeps the order of each key, and retries in place."""

    batcher: OrderedBatcher

    def __init__(
        self,
        batcher: OrderedBatcher,
        batch_key: BatchKey,
        failure: FailurePolicy,
        *,
        in_place: RetryInPlace,
        observers: Observers,
        log: KeywordLogger,
    ) -> None:
        super().__init__(batcher, batch_key, failure, observers=observers, log=log)
        self._in_place = in_place

    @property
    def held(self) -> int:
        """The number of messages that wait to be retried in place."""
        return self.batcher.held

    def begin(self, keys: Iterable[Hashable]) -> None:
        """Hold back these keys: handlers of an earlier session still work on them."""
        for key in keys:
            self.batcher.block(key)

    def keeps_failures(self, batch: Batch) -> bool:
        """Return True if the batch has a key."""
        return batch.key is not None

    def take_back(self, batch: Batch, decisions: BatchDecisions, now: float) -> None:
        """Keep messages that are retried in place, and remove them from the decisions."""
        if batch.key is None or not decisions.not_acked:
            return
        # Jitter spreads load; it needn't be unpredictable.
        found = self._in_place.decide(
            decisions.not_acked, decisions.waiting, now=datetime.now(UTC), jitter=random.random()
        )
        decisions.not_acked, decisions.waiting = found.final, []
        self.batcher.keep(batch, found.attempts, found.not_attempted, now)
        if self._observers.present:
            for each in found.attempts:
                message = each.message
                self._observers.emit(Requeued(message, message.retry_count, in_place=True))

    def release(self, batch: Batch) -> None:
        """Note that a batch, of this session or an earlier one, has been handled."""
        self.batcher.release(batch.key)


def open_intake(
    config: WorkerConfig, batch_key: BatchKey | None, observers: Observers, log: KeywordLogger
) -> BatchIntake:
    """Return the simplest intake that does what is configured.

    Without keys and a limit of bytes no message is looked at: features cost only those who use
    them.

    Args:
        batch_key: The user's; None if the consumer doesn't override it.
    """
    size, timeout = config.batch_size, config.batch_timeout
    if batch_key is None and config.batch_max_bytes is None:
        return BatchIntake(Batcher(size=size, timeout=timeout))
    keyed = KeyedBatcher(size=size, timeout=timeout, max_bytes=config.batch_max_bytes)
    if batch_key is None:
        return BatchIntake(keyed)
    if config.in_place is None:
        return KeyedIntake(keyed, batch_key, config.failure, observers=observers, log=log)
    return OrderedIntake(
        OrderedBatcher(size=size, timeout=timeout, max_bytes=config.batch_max_bytes),
        batch_key,
        config.failure,
        in_place=config.in_place,
        observers=observers,
        log=log,
    )
