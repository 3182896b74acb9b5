"""What is said about a batch while it is handled, and to whom?

Observers hear of every run of the handler. The log gets what somebody should read: how a batch
failed, and whoever failed alone; not every step on the way from one to the other.
"""

from __future__ import annotations

from collections.abc import Sequence

from aio_pika_batch.core.batcher import Trigger
from aio_pika_batch.core.message import Message
from aio_pika_batch.core.results import MessageOutcome
from aio_pika_batch.logs import KeywordLogger, format_error
from aio_pika_batch.observer import (
    BatchCut,
    BatchHandled,
    HandlerError,
    Observers,
    Received,
    Requeued,
)


class Reporter:
    """Tells observers and the log about the runs of one session's handlers.

    Attributes:
        is_watched: Whether anybody wants to know of runs that go well.
    """

    def __init__(self, observers: Observers, log: KeywordLogger) -> None:
        self._observers = observers
        self._log = log
        self.is_watched = bool(observers)

    def begins(self, messages: Sequence[Message], trigger: Trigger, waited: float) -> None:
        """Tell that a handler is given these."""
        self._observers.emit(BatchCut(messages, trigger, waited))

    def received(self, count: int) -> None:
        """Tell that messages have arrived."""
        self._observers.emit(Received(count))

    def ended(self, messages: Sequence[Message], seconds: float, trigger: Trigger) -> None:
        """Tell that a handler is done with these, and that all went well."""
        self._observers.emit(BatchHandled(messages, seconds, None, trigger))

    def failed(
        self,
        messages: Sequence[Message],
        seconds: float,
        error: BaseException,
        trigger: Trigger,
        *,
        quietly: bool,
    ) -> None:
        """Tell that a handler failed.

        Args:
            quietly: Whether there was a failure before this one, and a culprit's will follow.
        """
        where = {"messages": len(messages), "first_tag": messages[0].delivery_tag}
        if quietly:
            self._log.debug("a part of a failed batch failed", **where, error=format_error(error))
        else:
            self._log.error("a batch failed", exc_info=error, **where, error=format_error(error))
        if self.is_watched:
            self._observers.emit(HandlerError(messages, error))
            self._observers.emit(BatchHandled(messages, seconds, error, trigger))

    def refused(self, verdicts: Sequence[MessageOutcome]) -> None:
        """Tell that messages come to no handler, since their `batch_key` failed."""
        # One traceback says it: they came together, and mostly fail for the same reason.
        self._log.error("batch_key failed", exc_info=verdicts[0].error, messages=len(verdicts))
        if self.is_watched:
            for verdict in verdicts:
                if verdict.error is not None:
                    self._observers.emit(HandlerError([verdict.message], verdict.error))

    def kept(self, messages: Sequence[Message]) -> None:
        """Tell that these are tried again in place."""
        if self.is_watched:
            for message in messages:
                self._observers.emit(Requeued(message, message.retry_count, in_place=True))
