"""Runs the user's generator for one batch in a slot of its worker, and passes on what it yields."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import (
    AsyncIterator,
    Callable,
    Coroutine,
    Generator,
    Hashable,
    Sequence,
)
from contextlib import suppress
from contextvars import Context, ContextVar
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from aio_pika_batch.core.batch_run import BatchDecisions, BatchRun, FailurePolicy, ResultCollector
from aio_pika_batch.core.batcher import Batch, Trigger
from aio_pika_batch.core.message import Message
from aio_pika_batch.core.results import Cause, Result, describe
from aio_pika_batch.errors import (
    ConfigurationError,
    HandlerTimeout,
    MessageDecodeError,
    ResultError,
)
from aio_pika_batch.logs import KeywordLogger, format_error
from aio_pika_batch.observer import (
    BatchCut,
    BatchHandled,
    DuplicatesDropped,
    HandlerError,
    Observers,
)

T = TypeVar("T")

IGNORED_CANCELLATION = 5.0
"""Seconds that a cancelled handler has to end before its session is given up."""


@dataclass(slots=True)
class ResultsAtOnce:
    """What processes a batch whose results come together, in place of an async iterator.

    Attributes:
        answer: Returns the results when it is awaited.
    """

    # An async generator costs more than everything else that is done for a message.
    answer: Coroutine[Any, Any, Sequence[object]]


Process: TypeAlias = Callable[[Any], AsyncIterator[object] | ResultsAtOnce]


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

    def commit(self, messages: Sequence[Message], results: Sequence[Result]) -> None:
        """Give the results of a committed transaction, which no failure of the handler changes."""
        self._batch_run.commit(messages, results)

    def dropped(self, inbox: str, messages: Sequence[Message]) -> None:
        """Tell observers that messages have taken effect before."""
        self._observers.emit(DuplicatesDropped(messages, inbox))


class HandlerCheck:
    """Ends a consumer whose handler can't work, before messages count as failed.

    A forgotten `return` looks like this. Once the handler has yielded a valid result, it works, and
    what is wrong later may be due to a message.

    Args:
        name: The consumer's class.

    Attributes:
        works: Whether it does, as far as is known.
        mistake: Why it can't work; None if nothing is known to be wrong.
        on_mistake: Called when `mistake` is set.
    """

    def __init__(self, name: str, log: KeywordLogger) -> None:
        self._name = name
        self._log = log
        self.works = False
        self.mistake: ConfigurationError | None = None
        self.on_mistake: Callable[[], None] = lambda: None

    def refuses(self, error: BaseException | None) -> bool:
        """Return whether the error ends the consumer."""
        is_mistake = not self.works and isinstance(error, HandlerMistake)
        if is_mistake and self.mistake is None:
            self.mistake = ConfigurationError(f"{self._name} can't handle messages: {error}")
            self._log.error("the handler can't work: the consumer stops", error=str(error))
            self.on_mistake()
        return is_mistake


current_context: ContextVar[HandlerContext | None] = ContextVar("aio_pika_batch_run", default=None)
"""Of the handler that is running; tasks that it starts are part of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HandlerOptions:
    """What all handlers of a session have in common.

    Attributes:
        process: The user's `process_messages`.
        failure: The results of messages that the handler leaves undecided.
        check: Whether the handler works at all. If it doesn't, the batch is returned.
        timeout: Seconds for the whole batch, however often it is run; None for no limit.
        on_ignored: Called if the handler continues for long after its cancellation.
        on_yield: Called when `take` has something new, and again only after the next `take`. None
            if results are settled together when the handler has ended.
    """

    process: Process
    failure: FailurePolicy
    check: HandlerCheck
    timeout: float | None
    on_ignored: Callable[[], None]
    on_yield: Callable[[HandlerRun], None] | None
    observers: Observers
    log: KeywordLogger


class HandlerRun:
    """One batch in a handler, run in the task that calls `run`.

    That task is the library's own: client libraries cancel their callbacks when a connection is
    lost, and handlers must not notice.

    Args:
        keeps_failures: Whether `take` leaves messages that failed to the end.
    """

    __slots__ = (
        "_batch_run",
        "_cancelled_by",
        "_collector",
        "_context",
        "_has_notified",
        "_is_abandoned",
        "_loop",
        "_options",
        "_task",
        "_timer",
        "batch",
    )

    def __init__(self, batch: Batch, options: HandlerOptions, *, keeps_failures: bool) -> None:
        self.batch = batch
        self._options = options
        self._has_notified = False
        self._batch_run = BatchRun(options.failure, keeps_failures=keeps_failures)
        self._context = HandlerContext(
            self._batch_run, options.observers, settles_early=options.on_yield is not None
        )
        self._collector = ResultCollector(batch.messages)
        self._loop = asyncio.get_running_loop()
        self._task: asyncio.Task[object] | None = None
        self._cancelled_by: Cause | None = None
        self._is_abandoned = False
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_cancelled(self) -> bool:
        """Whether the handler has been cancelled."""
        return self._cancelled_by is not None

    def cancel(self, cause: Cause) -> bool:
        """Cancel the handler; what it has yielded so far counts.

        Returns:
            False if it isn't running or has already been cancelled.
        """
        if self._task is None or self._cancelled_by is not None:
            return False
        self._cancelled_by = cause
        self._task.cancel()
        self._disarm()
        # Nothing ends a task that ignores this. But its session can be given up, so that the others
        # aren't held up by it.
        self._timer = self._loop.call_later(IGNORED_CANCELLATION, self._options.on_ignored)
        return True

    def abandon(self) -> None:
        """Let the next cancellation end the task, whatever happens to the batch."""
        self._is_abandoned = True

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def take(self) -> BatchDecisions:
        """Return what has been decided so far; `run` doesn't return it again."""
        if self._task is None:
            # `run` has returned everything.
            return BatchDecisions()
        self._has_notified = False
        return self._batch_run.take(self._collector)

    async def run(self) -> BatchDecisions:
        """Run the handler until every message of the batch is decided.

        Whatever leaves the handler is a failure of the batch, also a `BaseException` of an
        extension, or a cancellation that the handler has caused itself.

        Raises:
            asyncio.CancelledError: The batch was abandoned.
            KeyboardInterrupt, SystemExit: The handler raised it to end the process.
        """
        options = self._options
        observers = options.observers
        self._task = asyncio.current_task()
        # In the context of this run: handlers that run at the same time have contexts of their own.
        current_context.set(self._context)
        if options.timeout is not None:
            self._timer = self._loop.call_later(options.timeout, self.cancel, Cause.TIMEOUT)
        batch_run, trigger = self._batch_run, self.batch.trigger
        try:
            while True:
                began = self._loop.time() if observers.present else 0.0
                if BatchCut in observers.wanted:
                    waited = began - self.batch.since
                    observers.emit(BatchCut(self._collector.messages, trigger, waited))
                self._record(await self._iterate(self._collector), began, trigger)
                if batch_run.is_over:
                    break
                if self._cancelled_by is not None:
                    batch_run.stop(self._cut_off(self._cancelled_by), self._cancelled_by)
                    break
                if options.on_yield is not None:
                    self._notify()
                self._collector = ResultCollector(batch_run.next_run())
                trigger = Trigger.ISOLATE
        finally:
            self._disarm()
            task, self._task = self._task, None
            if task is not None and task.cancelling() and not self._is_abandoned:
                await _absorb_cancellation(task)
        if self._is_abandoned:
            raise asyncio.CancelledError
        return batch_run

    async def _iterate(self, collector: ResultCollector) -> BaseException | None:
        """Run the handler's generator once; return what went wrong, if anything."""
        is_early = self._options.on_yield is not None
        accept = self._accept_and_notify if is_early else collector.accept
        error: BaseException | None = None
        results = None
        swallowed = "the handler swallowed its cancellation"
        try:
            results = self._options.process(collector.given)
            if isinstance(results, ResultsAtOnce):
                items = await results.answer
                if self._cancelled_by is not None:
                    return asyncio.CancelledError(swallowed)
                self._accept_all(items)
                return None
            if not hasattr(results, "__aiter__"):
                return _not_iterable(results)
            async for item in results:
                if self._cancelled_by is not None:
                    # A task that catches its cancellation runs on, so it ends at its next result.
                    error = asyncio.CancelledError(swallowed)
                    break
                try:
                    accept(item)
                except ResultError as invalid:
                    error = (HandlerMistake if item is None else InvalidResult)(str(invalid))
                    break
        except BaseException as raised:  # noqa: BLE001  -- the user's code may raise anything
            error = self._as_failure(raised)
        # If the generator was left in the middle, its clean-up runs now.
        # A handler may return any asynchronous iterator; only generators can be closed.
        aclose = getattr(results, "aclose", None)
        if aclose is not None:
            try:
                await aclose()
            except BaseException as raised:  # noqa: BLE001  -- the same
                closing_error = self._as_failure(raised)
                error = error or closing_error
        return error

    def _as_failure(self, error: BaseException) -> BaseException:
        """Return an exception that is a failure of the batch; raise any other."""
        match error:
            case KeyboardInterrupt() | SystemExit():
                raise error
            case asyncio.CancelledError() if self._is_abandoned:
                raise error
            case _:
                return error

    def _record(self, raised: BaseException | None, began: float, trigger: Trigger) -> None:
        """Record a run that has ended, log a failure, and tell the observers."""
        collector, options = self._collector, self._options
        messages = collector.messages
        error: BaseException | None = None
        if raised is None and collector.all_acked:
            # The common case: messages are not looked at one by one.
            options.check.works = True
            self._batch_run.acked += [message.delivery_tag for message in messages]
        else:
            error = self._record_others(raised, trigger)
        observers = options.observers
        if observers.present:
            if error is not None:
                observers.emit(HandlerError(messages, error))
            if BatchHandled in observers.wanted:
                seconds = self._loop.time() - began
                observers.emit(BatchHandled(messages, seconds, error, trigger))

    def _record_others(
        self, raised: BaseException | None, trigger: Trigger
    ) -> BaseException | None:
        """Record a run that didn't simply ack all its messages; return its error, if any."""
        collector, check = self._collector, self._options.check
        error, cause = self._judge(raised)
        if collector.count:
            check.works = True
        if check.refuses(error):
            self._batch_run.returned += collector.messages
            return error
        is_bisected = self._batch_run.record_run(collector, error, cause)
        if error is not None:
            quietly = is_bisected and trigger is Trigger.ISOLATE
            self._log_failure(collector.messages, error, quietly=quietly)
        return error

    def _judge(self, raised: BaseException | None) -> tuple[BaseException | None, Cause]:
        """Return what is wrong with a run, if anything, and why its messages are undecided."""
        if isinstance(raised, InvalidResult):
            return raised, Cause.INVALID
        if self._collector.drop_misplaced():
            mistake = HandlerMistake(
                "process_messages changed its list of messages, so that results can't be assigned"
                " by position: work on a copy, or yield (message, result)"
            )
            return mistake, Cause.INVALID
        count, expected = self._collector.count, len(self._collector.messages)
        if raised is None and count == expected:
            return None, Cause.HANDLER
        if self._cancelled_by is not None:
            cut_off = self._cut_off(self._cancelled_by)
            # Its traceback shows where the handler was.
            cut_off.__cause__ = raised
            return cut_off, self._cancelled_by
        if raised is None:
            return MissingResults(f"{count} results for {expected} messages"), Cause.MISSING
        return raised, Cause.EXCEPTION

    def _cut_off(self, cause: Cause) -> HandlerTimeout:
        if cause is Cause.TIMEOUT:
            limit = f"process_timeout={self._options.timeout} s"
            return HandlerTimeout(f"the handler was cut off after {limit}")
        return HandlerTimeout("the handler was cut off: shutdown_timeout leaves no more time")

    def _log_failure(
        self, messages: Sequence[Message], error: BaseException, *, quietly: bool
    ) -> None:
        """Log a failed run.

        Args:
            quietly: Whether an earlier run of the batch was logged, and the message that causes
                this will be.
        """
        log = self._options.log
        context = {"messages": len(messages), "first_tag": messages[0].delivery_tag}
        if isinstance(error, MessageDecodeError):
            # About one message, and the traceback shows nothing that the text doesn't.
            log.error("a message can't be decoded", error=format_error(error))
        elif quietly:
            log.debug("a part of a failed batch failed", **context, error=format_error(error))
        else:
            log.error("a batch failed", exc_info=error, **context, error=format_error(error))

    def _accept_and_notify(self, item: object) -> None:
        if not self._context.takes_results:
            raise ResultError(
                "a result was yielded before the transaction of its effect was committed: yield it"
                " after the `async with` block"
            )
        self._collector.accept(item)
        self._notify()

    def _accept_all(self, items: Sequence[object]) -> None:
        if self._options.on_yield is None:
            self._collector.accept_all(items)
        else:
            for item in items:
                self._accept_and_notify(item)

    def _notify(self) -> None:
        on_yield = self._options.on_yield
        if on_yield is not None and not self._has_notified:
            self._has_notified = True
            on_yield(self)


def _not_iterable(results: object) -> HandlerMistake:
    """Return the error for what a handler returned in place of an async iterator."""
    if inspect.iscoroutine(results):
        # Otherwise Python warns that it was never awaited.
        results.close()
    return HandlerMistake(
        f"process_messages returned {describe(results)}: it must be an `async def` that yields a"
        " MessageResult for each message"
    )


async def _absorb_cancellation(task: asyncio.Task[object]) -> None:
    """Undo cancellations of the current task, also one that hasn't been raised yet.

    They were sent to the handler, which has ended, or the handler has caused them itself.
    """
    while task.cancelling():
        task.uncancel()
    with suppress(asyncio.CancelledError):
        await asyncio.sleep(0)


class InContext(Generic[T]):
    """Awaits a coroutine in a context of its own, without a task of its own.

    Args:
        on_await: Called when the coroutine awaits something for the first time.

    Attributes:
        has_awaited: Whether it has.
        cr_await: The coroutine, under the name that asyncio's objects have for it.
    """

    __slots__ = ("_on_await", "_run", "cr_await", "has_awaited")

    def __init__(
        self,
        coroutine: Coroutine[Any, Any, T],
        context: Context,
        on_await: Callable[[], None] = lambda: None,
    ) -> None:
        self._run = context.run
        self._on_await = on_await
        self.cr_await = coroutine
        self.has_awaited = False

    def __await__(self) -> Generator[Any, None, T]:
        return self  # type: ignore[return-value]  # it has what `await` uses of a generator

    def __next__(self) -> Any:  # noqa: ANN401  -- a future, or None
        awaited = self._run(self.cr_await.send, None)
        if not self.has_awaited:
            self.has_awaited = True
            self._on_await()
        return awaited

    def throw(self, *error: Any) -> Any:  # noqa: ANN401  -- as for a generator
        """Raise an error where the coroutine waits."""
        return self._run(self.cr_await.throw, *error)

    def close(self) -> None:
        """Close the coroutine."""
        self._run(self.cr_await.close)


class HandlerSlots:
    """The running handlers of a worker, `concurrency` at most.

    Handlers outlive their session: one whose session is lost runs on and keeps its slot, because
    cancelling it would undo work that is about to be repeated anyway.

    Attributes:
        tasks: The tasks that run handlers or settle their results.
        on_free: Called with the batch whenever a handler has ended.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._running: dict[HandlerRun, int] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self.on_free: Callable[[Batch], None] = ignore_batch

    @property
    def is_free(self) -> bool:
        """Whether another batch can be started."""
        return len(self._running) < self._limit

    @property
    def in_hand(self) -> int:
        """The number of messages in running handlers."""
        return sum(self._running.values())

    @property
    def not_cancelled(self) -> int:
        """The number of messages in handlers that haven't been cancelled."""
        return sum(count for each, count in self._running.items() if not each.is_cancelled)

    @property
    def since(self) -> float | None:
        """When collecting the oldest running batch began, in loop time; None without one."""
        return min((run.batch.since for run in self._running), default=None)

    @property
    def keys(self) -> list[Hashable]:
        """The keys of the running batches."""
        return [each.batch.key for each in self._running if each.batch.key is not None]

    def cancel(self) -> int:
        """Cancel all handlers; return the number of messages that they were handling."""
        return sum(count for each, count in self._running.items() if each.cancel(Cause.SHUTDOWN))

    def abandon(self) -> None:
        """Cancel all tasks; the broker delivers their messages again."""
        for run in self._running:
            run.abandon()
        for task in self.tasks:
            task.cancel()

    def add(self, run: HandlerRun) -> None:
        """Occupy a slot."""
        self._running[run] = len(run.batch.messages)

    def settled_early(self, run: HandlerRun, count: int) -> None:
        """Count this many messages of a running handler as settled."""
        self._running[run] -= count

    def release(self, run: HandlerRun) -> None:
        """Free a slot."""
        # First: the callback may start the next batch in this slot.
        del self._running[run]
        self.on_free(run.batch)


def ignore_batch(_: Batch) -> None:
    """Do nothing; stands in for `on_free` while no session waits for a free slot."""


class EarlySettlement:
    """Passes on what handlers have yielded while they still run (`settle="yield"`).

    All handlers of a session share one timer, so that what several of them have yielded is settled
    together.

    Args:
        collect: Seconds from the first yield until what has been yielded is passed on.
        settle: Takes the decisions, the number of messages of each handler, and when the oldest of
            their batches began, in loop time.
    """

    def __init__(
        self,
        collect: float,
        settle: Callable[[BatchDecisions, dict[HandlerRun, int], float], None],
    ) -> None:
        self._collect = collect
        self._settle = settle
        self._loop = asyncio.get_running_loop()
        self._waiting: list[HandlerRun] = []
        self._timer: asyncio.TimerHandle | None = None
        self._is_stopped = False

    def note(self, run: HandlerRun) -> None:
        """Remember that a handler has yielded something; it says so once until that is taken."""
        if self._is_stopped:
            return
        self._waiting.append(run)
        if self._timer is None:
            self._timer = self._loop.call_later(self._collect, self._pass_on)

    def _pass_on(self) -> None:
        self._timer = None
        together, counts = BatchDecisions(), {}
        waiting, self._waiting = self._waiting, []
        for run in waiting:
            taken = run.take()
            if taken:
                counts[run] = len(taken)
                together.add(taken)
        if together:
            # In the order of delivery, so that one `multiple` ack may cover all of them.
            together.acked.sort()
            self._settle(together, counts, min(run.batch.since for run in counts))

    def stop(self) -> None:
        """Pass nothing on any more: the rest is settled with its batch."""
        self._is_stopped = True
        self._waiting.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class InvalidResult(ResultError):
    """The handler yielded an invalid result. Raised here, never by the handler itself."""


class HandlerMistake(InvalidResult):
    """The handler's code is wrong: no message can be the reason, unless it has worked before."""


class MissingResults(ResultError):
    """The handler ended too early. Raised here, never by the handler itself."""
