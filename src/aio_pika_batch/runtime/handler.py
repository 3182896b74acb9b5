"""What did the handler say about each message of a batch?

Runs a user's generator in the task that calls it, which is the library's own, and hands whatever
comes of it to the batch's trial: an exception, silence, nonsense and time running out each have
their cause there. As long as the trial wants another run, the handler is run again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeAlias

from aio_pika_batch.core.batch_run import BatchDecisions, BatchRun, FailurePolicy
from aio_pika_batch.core.batcher import Batch, Trigger
from aio_pika_batch.core.message import Message
from aio_pika_batch.core.results import Cause, ResultCollector
from aio_pika_batch.errors import HandlerTimeout, ResultError
from aio_pika_batch.runtime.handler_events import Reporter

IGNORED_CANCELLATION = 5.0
"""Seconds that a cancelled handler has to end; then its session is given up."""

Process: TypeAlias = Callable[[Sequence[Message]], AsyncIterator[object]]


class HandlerRun:
    """One batch in the hands of a handler.

    Args:
        process: The user's `process_messages`.
        timeout: Seconds for the whole batch, however often it is run; None for no limit.
        on_ignored: Called if the handler goes on for long after its cancellation.
        on_yield: Called when there is something for `take`, and again only after that; None where
            nothing is settled before the end.
        keeps_failures: Whether `take` leaves what failed to the end.
    """

    def __init__(
        self,
        process: Process,
        batch: Batch,
        policy: FailurePolicy,
        *,
        timeout: float | None,
        on_ignored: Callable[[], None],
        on_yield: Callable[[HandlerRun], None] | None,
        keeps_failures: bool,
        reporter: Reporter,
    ) -> None:
        self.batch = batch
        self._process = process
        self._timeout = timeout
        self._on_ignored = on_ignored
        self._on_yield = on_yield
        self._has_told = False
        self._reporter = reporter
        self._trial = BatchRun(policy, keeps_failures=keeps_failures)
        self._collector = ResultCollector(batch.messages)
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

    def take(self) -> BatchDecisions:
        """Hand out what is decided so far; `run` does not return it again."""
        if self._task is None:
            # What `run` has returned is not handed out again either.
            return BatchDecisions()
        self._has_told = False
        return self._trial.take(self._collector)

    async def run(self) -> BatchDecisions:
        """Run the handler to its end.

        Raises:
            asyncio.CancelledError: The calling task was cancelled, by other means than `cut`.
        """
        self._task = asyncio.current_task()
        if self._timeout is not None:
            self._timer = self._loop.call_later(self._timeout, self.cut, Cause.TIMEOUT)
        trial = self._trial
        try:
            await self._run_once(self._collector, self.batch.trigger)
            while not trial.is_over:
                if self._cut_by is not None:
                    trial.stop(self._cut_off(self._cut_by), self._cut_by)
                    break
                if self._on_yield is not None:
                    self._tell()
                self._collector = ResultCollector(trial.next_run())
                await self._run_once(self._collector, Trigger.ISOLATE)
        finally:
            self._disarm()
            task, self._task = self._task, None
            if self._cut_by is not None and task is not None:
                # The cancellation was for the handler, and has been dealt with.
                task.uncancel()
        return trial

    async def _run_once(self, collector: ResultCollector, trigger: Trigger) -> None:
        messages = collector.messages
        began = self._loop.time()
        if self._reporter.is_watched:
            self._reporter.begins(messages, trigger, began - self.batch.since)
        error = await self._drive(collector)
        if error is None and collector.all_acked:
            self._trial.acked += [message.delivery_tag for message in messages]
        else:
            is_passing = self._trial.record_run(collector, error, self._cause(error))
            if error is not None:
                seconds = self._loop.time() - began
                quietly = is_passing and trigger is Trigger.ISOLATE
                self._reporter.failed(messages, seconds, error, trigger, quietly=quietly)
                return
        if self._reporter.is_watched:
            self._reporter.ended(messages, self._loop.time() - began, trigger)

    def _cause(self, error: BaseException | None) -> Cause:
        match error:
            case None:
                return Cause.HANDLER
            case InvalidResult():
                return Cause.INVALID
            case _ if self._cut_by is not None:
                return self._cut_by
            case MissingResults():
                return Cause.MISSING
            case _:
                return Cause.EXCEPTION

    async def _drive(self, collector: ResultCollector) -> BaseException | None:
        """Run the handler once; returns what went wrong with it, if anything."""
        error = await self._caught(self._iterate(collector))
        if isinstance(error, InvalidResult):
            return error
        count, wanted = collector.count, len(collector.messages)
        if error is None and count == wanted:
            return None
        if self._cut_by is not None:
            cut_off = self._cut_off(self._cut_by)
            # It shows where the handler was.
            cut_off.__cause__ = error
            return cut_off
        return error or MissingResults(f"{count} results for {wanted} messages")

    def _cut_off(self, cause: Cause) -> HandlerTimeout:
        if cause is Cause.TIMEOUT:
            limit = f"process_timeout={self._timeout} s"
            return HandlerTimeout(f"the handler was cut off after {limit}")
        return HandlerTimeout("the handler was cut off: shutdown_timeout leaves no more time")

    async def _iterate(self, collector: ResultCollector) -> BaseException | None:
        results = self._process(collector.messages)
        accept = collector.accept if self._on_yield is None else self._accept_and_tell
        error: BaseException | None = None
        try:
            async for item in results:
                if self._cut_by is not None:
                    error = asyncio.CancelledError("it was swallowed")
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

    def _accept_and_tell(self, item: object) -> None:
        self._collector.accept(item)
        self._tell()

    def _tell(self) -> None:
        if self._on_yield is not None and not self._has_told:
            self._has_told = True
            self._on_yield(self)

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


class MissingResults(ResultError):
    """Raised by us about a handler that ended too early, as against by the handler itself."""
