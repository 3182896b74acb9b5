"""How can a test wait for minutes without taking any?

An asyncio event loop whose clock stands still while anything is ready to run, and jumps to the next
timer as soon as nothing is. Where an ordinary loop would hang, this one raises and says why:

- *nothing left to happen*: nothing is ready, no timer is set, and the awaited future is not done;
- *time stands still*: the loop goes round and round without time passing (a hot loop);
- *time runs away*: timers fire for days, and the awaited future is still not done.

Work in threads (`asyncio.to_thread`, `run_in_executor`) is waited for in real time, while the
virtual clock stands still. Real sockets are polled, but the clock does not wait for them.
"""

from __future__ import annotations

import asyncio
import math
import selectors
from collections import Counter
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from concurrent.futures import Executor
    from contextvars import Context

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

STANDSTILL = 1e-3
"""Seconds that must pass within `max_iterations`; less is as good as nothing."""


class VirtualTimeError(RuntimeError):
    """A test would have hung."""


class NothingLeftToHappen(VirtualTimeError):
    """No timer, nothing ready, and the main future is not done: somebody waits in vain."""


class TimeStandsStill(VirtualTimeError):
    """The loop runs hot: it goes round and round, and no time passes."""


class TimeRunsAway(VirtualTimeError):
    """Time passes, and the main future is never done."""


class _JumpingSelector(selectors.DefaultSelector):
    """Asks its loop what to do where an ordinary selector would sleep."""

    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        # What is there comes first: another thread may have called `call_soon_threadsafe`.
        events = super().select(0)
        self._loop.count_round()
        if not events and timeout != 0:
            patience = self._loop.pass_time(timeout)
            if patience:
                events = super().select(patience)
                if not events:
                    self._loop.lose_patience()
        return events


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop that never sleeps.

    Args:
        start: What `time()` says at first.
        max_iterations: After so many rounds without time passing, `TimeStandsStill` is raised.
        horizon: After so many (virtual) seconds, `TimeRunsAway` is raised.
        thread_patience: For how many (real) seconds a thread is waited for when nothing else can
            happen.
    """

    def __init__(
        self,
        *,
        start: float = 0.0,
        max_iterations: int = 100_000,
        horizon: float = 86_400.0,
        thread_patience: float = 30.0,
    ) -> None:
        self._now = start
        self._end = start + horizon
        self._max_iterations = max_iterations
        self._thread_patience = thread_patience
        self._threads = 0
        self._mark = start
        self._rounds = 0
        self._census: Counter[str] = Counter()
        super().__init__(_JumpingSelector(self))
        self._clock_resolution: float = max(1e-9, math.ulp(start))

    def time(self) -> float:
        """The virtual time, in seconds."""
        return self._now

    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        """Schedule a callback; in the last rounds before a standstill is told, note whose it is."""
        if self._rounds * 10 >= self._max_iterations * 9:
            self._census[_describe_callback(callback)] += 1
        return super().call_soon(callback, *args, context=context)

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[*Ts], T], *args: *Ts
    ) -> asyncio.Future[T]:
        """Run in a thread; virtual time stands still until it is done."""
        future = super().run_in_executor(executor, func, *args)
        self._threads += 1
        future.add_done_callback(self._thread_done)
        return future

    async def shutdown_default_executor(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401  -- versions differ
        """Join the threads of the executor, in real time."""
        self._threads += 1
        try:
            await super().shutdown_default_executor(*args, **kwargs)
        finally:
            self._threads -= 1

    def _thread_done(self, _future: asyncio.Future[Any]) -> None:
        self._threads -= 1

    def count_round(self) -> None:
        """The selector says: another round.

        Raises:
            TimeStandsStill: One too many.
        """
        self._rounds += 1
        if self._rounds > self._max_iterations:
            busiest = "".join(
                f"\n  {times} x {who}" for who, times in self._census.most_common(_SHOWN)
            )
            rounds, self._rounds = self._rounds - 1, 0
            self._census.clear()
            raise TimeStandsStill(
                f"time stands still at {self._now:g} s: {rounds} rounds of the event loop, and no"
                f" time has passed. Busiest of late:{busiest}"
            )

    def pass_time(self, timeout: float | None) -> float | None:
        """The selector says: an ordinary loop would sleep now.

        Args:
            timeout: For how long; None: until something happens.

        Returns:
            For how long to wait really, since a thread is at work; None: not at all.

        Raises:
            NothingLeftToHappen: It would be forever.
            TimeRunsAway: The horizon is reached.
        """
        if self._threads:
            return self._thread_patience
        if timeout is None:
            raise NothingLeftToHappen(
                f"nothing left to happen at {self._now:g} s: no timer is set and nothing is ready."
                f" Still waiting:{self._waiting()}"
            )
        # Rounding must not keep a timer from being due: asyncio takes as due what is less than one
        # tick of the clock away, and late on a clock its tick is too small to count.
        self._now += timeout
        self._clock_resolution = max(self._clock_resolution, math.ulp(self._now))
        if self._now - self._mark >= STANDSTILL:
            self._mark = self._now
            self._rounds = 0
            self._census.clear()
        if self._now > self._end:
            # Whoever cleans up afterwards needs time, too.
            self._end = math.inf
            raise TimeRunsAway(
                f"time runs away: it is {self._now:g} s, and the main future is still not done."
                f" Still waiting:{self._waiting()}"
            )
        return None

    def lose_patience(self) -> None:
        """The selector says: no thread has finished within our patience."""
        raise NothingLeftToHappen(
            f"nothing left to happen at {self._now:g} s but {self._threads} jobs in threads, none"
            f" of them done within {self._thread_patience:g} real seconds."
            f" Still waiting:{self._waiting()}"
        )

    def _waiting(self) -> str:
        tasks = sorted(asyncio.all_tasks(self), key=asyncio.Task.get_name)
        told = [f"\n  {_describe_task(task)}" for task in tasks[:_SHOWN]]
        if len(tasks) > _SHOWN:
            told.append(f"\n  and {len(tasks) - _SHOWN} more")
        return "".join(told) or " no task at all"


_SHOWN = 20
"""How many tasks a diagnosis names; more would not be read."""


def _describe_task(task: asyncio.Task[Any]) -> str:
    coroutine: Any = task.get_coro()
    name = getattr(coroutine, "__qualname__", None) or repr(coroutine)
    return f"task {task.get_name()!r}: {name}{_where(coroutine)}"


def _where(coroutine: Any) -> str:  # noqa: ANN401  -- coroutines, generators, and what imitates them
    """The innermost line in Python that a suspended coroutine waits in."""
    place = ""
    inner = coroutine
    while inner is not None:
        frame = getattr(inner, "cr_frame", None) or getattr(inner, "ag_frame", None)
        if frame is not None:
            place = f", at {frame.f_code.co_filename}:{frame.f_lineno}"
        inner = getattr(inner, "cr_await", None) or getattr(inner, "ag_await", None)
    return place


def _describe_callback(callback: Any) -> str:  # noqa: ANN401  -- anything that can be called
    owner = getattr(callback, "__self__", None)
    if isinstance(owner, asyncio.Task):
        return _describe_task(owner)
    name = getattr(callback, "__qualname__", None) or repr(callback)
    return f"callback {name}"


def run(
    main: Coroutine[Any, Any, T],
    *,
    start: float = 0.0,
    max_iterations: int = 100_000,
    horizon: float = 86_400.0,
    thread_patience: float = 30.0,
    debug: bool | None = None,
) -> T:
    """Run a coroutine in virtual time, in a loop of its own, as `asyncio.run` does.

    The arguments are those of :class:`VirtualTimeLoop`.

    Raises:
        NothingLeftToHappen: It waits for what will never come.
        TimeStandsStill: Something runs hot.
        TimeRunsAway: It was still not done when the horizon was reached.
    """

    def loop() -> VirtualTimeLoop:
        return VirtualTimeLoop(
            start=start,
            max_iterations=max_iterations,
            horizon=horizon,
            thread_patience=thread_patience,
        )

    with asyncio.Runner(debug=debug, loop_factory=loop) as runner:
        return runner.run(main)
