"""The running handler, as the inbox sees it when the handler calls it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextvars import ContextVar

from aio_pika_batch.core.batch_run import BatchRun
from aio_pika_batch.core.message import Message
from aio_pika_batch.core.results import Result
from aio_pika_batch.observer import DuplicatesDropped, Observers


class HandlerContext:
    """What the inbox may ask of the handler's run in which it is called, and tell it.

    Args:
        settles_early: Whether results are settled while the handler runs.
    """

    __slots__ = ("_batch_run", "_observers", "_settles_early", "_transactions")

    def __init__(self, batch_run: BatchRun, observers: Observers, *, settles_early: bool) -> None:
        self._batch_run = batch_run
        self._observers = observers
        self._settles_early = settles_early
        self._transactions = 0

    @property
    def is_atomic(self) -> bool:
        """Whether a failure voids the ACKs that were yielded before."""
        return self._batch_run.is_atomic

    @property
    def takes_results(self) -> bool:
        """False while results would be settled before the effects behind them are committed."""
        return not (self._settles_early and self._transactions)

    def begins_transaction(self) -> None:
        """Note that effects are being written that may be rolled back."""
        self._transactions += 1
        if not self._settles_early:
            # An ACK that is yielded before the commit must not outlive its failure.
            self._batch_run.is_atomic = True

    def ends_transaction(self) -> None:
        """Note that they are committed, or rolled back."""
        self._transactions -= 1

    def commit(self, results: Iterable[tuple[Message, Result]]) -> None:
        """Give the results of a committed transaction, which no failure of the handler changes."""
        self._batch_run.commit(results)

    def dropped(self, inbox: str, messages: Sequence[Message]) -> None:
        """Tell observers that messages have taken effect before."""
        self._observers.emit(DuplicatesDropped(messages, inbox))


current_context: ContextVar[HandlerContext | None] = ContextVar("aio_pika_batch_run", default=None)
"""Of the handler that is running; tasks that it starts are part of it."""
