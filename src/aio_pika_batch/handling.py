"""What did the handler say about each message of a batch?

Runs a user's generator in the task that calls it, which is the library's own, and turns whatever
comes of it into verdicts: an exception, silence, nonsense and time running out each have theirs. A
message that cannot be decoded is judged alone; the others are handed to the handler again at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from aio_pika_batch.core.batcher import Batch
from aio_pika_batch.core.message import Message
from aio_pika_batch.core.results import (
    Cause,
    ExceptionResults,
    MessageResult,
    ResultCollector,
    Verdict,
    result_for,
)
from aio_pika_batch.errors import HandlerTimeout, MessageDecodeError, ResultError

IGNORED_CANCELLATION = 5.0
"""Seconds that a cancelled handler has to end; then its session is given up."""

Process: TypeAlias = Callable[[Sequence[Message]], AsyncIterator[object]]


@dataclass(frozen=True, slots=True)
class FailurePolicy:
    """What becomes of messages that a handler left undecided.

    Attributes:
        action: For whatever `exceptions` does not list.
        exceptions: By the exception that left the handler.
    """

    action: MessageResult
    exceptions: ExceptionResults


@dataclass(slots=True)
class Handled:
    """A batch, judged: each message stands in exactly one of the three lists.

    Attributes:
        acked: The delivery tags of those that went well, in order.
        verdicts: All that were decided otherwise.
        returned: Those that a shutdown left undecided.
        errors: What the handler raised or yielded wrongly, for the log.
    """

    acked: list[int] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    returned: list[Message] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)


class Handling:
    """One batch in the hands of a handler.

    Args:
        process: The user's `process_messages`.
        timeout: Seconds for the whole batch; None for no limit.
        on_ignored: Called if the handler goes on for long after its cancellation.
    """

    def __init__(
        self,
        process: Process,
        batch: Batch,
        policy: FailurePolicy,
        *,
        timeout: float | None,
        on_ignored: Callable[[], None],
    ) -> None:
        self.batch = batch
        self._process = process
        self._policy = policy
        self._timeout = timeout
        self._on_ignored = on_ignored
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[object] | None = None
        self._cut_by: Cause | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_cut(self) -> bool:
        """Whether its handler has been cancelled."""
        return self._cut_by is not None

    def cut(self, cause: Cause) -> bool:
        """Cancel the handler; what it has yielded so far stays.

        Returns:
            False if it is not running, or has been cancelled before.
        """
        if self._task is None or self._cut_by is not None:
            return False
        self._cut_by = cause
        self._task.cancel()
        self._disarm()
        self._timer = self._loop.call_later(IGNORED_CANCELLATION, self._on_ignored)
        return True

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def run(self) -> Handled:
        """Run the handler to its end.

        Raises:
            asyncio.CancelledError: The calling task was cancelled, by other means than `cut`.
        """
        self._task = asyncio.current_task()
        if self._timeout is not None:
            self._timer = self._loop.call_later(self._timeout, self.cut, Cause.TIMEOUT)
        handled = Handled()
        try:
            messages = self.batch.messages
            while messages:
                messages = await self._run_once(messages, handled)
        finally:
            self._disarm()
            task, self._task = self._task, None
            if self._cut_by is not None and task is not None:
                # The cancellation was for the handler, and has been dealt with.
                task.uncancel()
        return handled

    async def _run_once(self, messages: Sequence[Message], handled: Handled) -> Sequence[Message]:
        """Run the handler over some messages; returns those that it is to be given again."""
        collector = ResultCollector(messages)
        error = await self._drive(messages, collector)
        if error is None and collector.all_acked:
            handled.acked.extend([message.delivery_tag for message in messages])
            return ()
        for message, result in collector.decided():
            if result is MessageResult.ACK:
                handled.acked.append(message.delivery_tag)
            else:
                handled.verdicts.append(Verdict(message, result))
        if error is None and collector.count == len(messages):
            return ()
        undecided = collector.undecided()
        cause = self._cause(error)
        if error is None:
            error = ResultError(f"{collector.count} results for {len(messages)} messages")
        handled.errors.append(error)
        if cause is Cause.SHUTDOWN:
            handled.returned.extend(undecided)
            return ()
        if isinstance(error, MessageDecodeError) and any(
            each is error.message for each in undecided
        ):
            return self._without_culprit(undecided, error, handled)
        result = self._policy.action
        if cause in (Cause.EXCEPTION, Cause.TIMEOUT):
            result = result_for(error, self._policy.exceptions) or result
        for message in undecided:
            handled.verdicts.append(Verdict(message, result, cause, error))
        return ()

    def _without_culprit(
        self, undecided: Sequence[Message], error: MessageDecodeError, handled: Handled
    ) -> Sequence[Message]:
        for message in undecided:
            if message is error.message:
                verdict = Verdict(message, MessageResult.NACK, Cause.UNDECODABLE, error)
                handled.verdicts.append(verdict)
        return [message for message in undecided if message is not error.message]

    def _cause(self, error: BaseException | None) -> Cause:
        match error:
            case InvalidResult():
                return Cause.INVALID
            case _ if self._cut_by is not None:
                return self._cut_by
            case None:
                return Cause.MISSING
            case _:
                return Cause.EXCEPTION

    async def _drive(
        self, messages: Sequence[Message], collector: ResultCollector
    ) -> BaseException | None:
        """Run the handler once; returns what went wrong with it, if anything."""
        error = await self._caught(self._iterate(messages, collector))
        is_cut_short = collector.count < len(messages) and not isinstance(error, InvalidResult)
        if self._cut_by is Cause.TIMEOUT and is_cut_short:
            limit = f"process_timeout={self._timeout} s"
            return HandlerTimeout(f"the handler was cut off after {limit}")
        if self._cut_by is Cause.SHUTDOWN and is_cut_short:
            return HandlerTimeout("the handler was cut off: shutdown_timeout leaves no more time")
        return error

    async def _iterate(
        self, messages: Sequence[Message], collector: ResultCollector
    ) -> BaseException | None:
        results = self._process(messages)
        accept = collector.accept
        error: BaseException | None = None
        try:
            async for item in results:
                if self._cut_by is not None:
                    break
                try:
                    accept(item)
                except ResultError as wrong:
                    error = InvalidResult(str(wrong))
                    break
        finally:
            # Only now does the handler's own clean-up run, if it was left in the middle.
            left_open = getattr(results, "aclose", None)
            if left_open is not None:
                closing_error = await self._caught(left_open())
                error = error or closing_error
        return error

    async def _caught(self, work: Awaitable[BaseException | None]) -> BaseException | None:
        """Do it, and return what it raises: the user's code may raise anything."""
        try:
            return await work
        except asyncio.CancelledError as cancelled:
            if not self._is_for_the_handler():
                raise
            return cancelled
        except Exception as raised:  # noqa: BLE001  -- as said
            return raised

    def _is_for_the_handler(self) -> bool:
        """Whether a cancellation is `cut`'s, or the handler's own: not that of the whole task."""
        return self._cut_by is not None or self._task is None or not self._task.cancelling()


class InvalidResult(ResultError):
    """Raised by us about what a handler yielded, as against by the handler itself."""
