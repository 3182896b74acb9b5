"""An asyncio event loop with virtual time: sleeping takes no real time.

Its clock stands still while anything is ready to run, and then jumps to the next timer. If an
ordinary loop would hang, this one raises an error that says why:

- `NothingLeftToHappen`: nothing is ready, no timer is set, and the awaited future is not done;
- `TimeStandsStill`: the loop runs without time passing (a busy loop);
- `TimeRunsAway`: timers fire for a day, and the awaited future is still not done.

The loop waits in real time for work in threads (`asyncio.to_thread`, `run_in_executor`), while the
virtual clock stands still. It polls real sockets, but its clock does not wait for them.
"""

from __future__ import annotations

import asyncio
import math
import selectors
from collections import Counter
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from contextvars import Context
from typing import Any, TypeVar, TypeVarTuple

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

STANDSTILL = 1e-3
"""Seconds that must pass within `max_iterations`; anything less counts as a standstill."""


class VirtualTimeError(RuntimeError):
    """The test would hang on a real clock."""


class NothingLeftToHappen(VirtualTimeError):
    """Nothing is ready, no timer is set, and the main future is not done."""


class TimeStandsStill(VirtualTimeError):
    """The loop is busy: it runs again and again, and no time passes."""


class TimeRunsAway(VirtualTimeError):
    """Virtual time has reached the horizon, and the main future is not done."""


class _JumpingSelector(selectors.DefaultSelector):
    """Lets the loop jump in time when an ordinary selector would sleep."""

    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        # Poll first: another thread may have called `call_soon_threadsafe`.
        events = super().select(0)
        self._loop.count_round()
        if not events and timeout != 0:
            patience = self._loop.pass_time(timeout)
            if patience:
                events = super().select(patience)
                if not events:
                    self._loop.raise_thread_timeout()
        return events


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop that never sleeps.

    Args:
        start: The first value of `time()`.
        max_iterations: Rounds without time passing until `TimeStandsStill` is raised.
        horizon: Virtual seconds until `TimeRunsAway` is raised.
        thread_patience: Real seconds to wait for a thread when nothing else can happen.
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
        self._callback_counts: Counter[str] = Counter()
        super().__init__(_JumpingSelector(self))
        self._clock_resolution: float = max(1e-9, math.ulp(start))

    def time(self) -> float:
        """Return the virtual time in seconds."""
        return self._now

    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        """Schedule a callback; count the callbacks of the last rounds before `TimeStandsStill`."""
        # Only then, since describing each callback would make every test slower.
        if self._rounds * 10 >= self._max_iterations * 9:
            self._callback_counts[_describe_callback(callback)] += 1
        return super().call_soon(callback, *args, context=context)

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[*Ts], T], *args: *Ts
    ) -> asyncio.Future[T]:
        """Run a function in a thread; virtual time stands still until it is done."""
        # Threads work in real time. If the clock jumped meanwhile, timeouts would overtake them.
        future = super().run_in_executor(executor, func, *args)
        self._threads += 1
        future.add_done_callback(self._thread_done)
        return future

    async def shutdown_default_executor(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401  -- versions differ
        """Join the threads of the executor in real time."""
        self._threads += 1
        try:
            await super().shutdown_default_executor(*args, **kwargs)
        finally:
            self._threads -= 1

    def _thread_done(self, _future: asyncio.Future[Any]) -> None:
        self._threads -= 1

    def count_round(self) -> None:
        """Count a round of the event loop; the selector calls this.

        Raises:
            TimeStandsStill: There were `max_iterations` rounds without time passing.
        """
        self._rounds += 1
        if self._rounds > self._max_iterations:
            busiest = "".join(
                f"\n  {times} x {callback}"
                for callback, times in self._callback_counts.most_common(_SHOWN)
            )
            # Start again: cleaning up after this error may need many rounds, too.
            rounds, self._rounds = self._rounds - 1, 0
            self._callback_counts.clear()
            raise TimeStandsStill(
                f"time stands still at {self._now:g} s: {rounds} rounds of the event loop, and no"
                f" time has passed. Most frequent callbacks:{busiest}"
            )

    def pass_time(self, timeout: float | None) -> float | None:
        """Let virtual time pass when an ordinary loop would sleep; the selector calls this.

        Args:
            timeout: Seconds; None: until something happens.

        Returns:
            Real seconds to wait for a thread that is running, or None.

        Raises:
            NothingLeftToHappen: The loop would sleep forever.
            TimeRunsAway: The horizon is reached.
        """
        if self._threads:
            return self._thread_patience
        if timeout is None:
            raise NothingLeftToHappen(
                f"nothing left to happen at {self._now:g} s: no timer is set, and no task is ready."
                f" Still waiting:{self._waiting()}"
            )
        # A rounded sum must not keep a timer from being due. asyncio runs timers that are less than
        # one clock resolution away, so the resolution must grow with the time.
        self._now += timeout
        self._clock_resolution = max(self._clock_resolution, math.ulp(self._now))
        if self._now - self._mark >= STANDSTILL:
            self._mark = self._now
            self._rounds = 0
            self._callback_counts.clear()
        if self._now > self._end:
            # Cleaning up afterwards may need time, too.
            self._end = math.inf
            raise TimeRunsAway(
                f"virtual time has reached {self._now:g} s, and the main task isn't done."
                f" Still waiting:{self._waiting()}"
            )
        return None

    def raise_thread_timeout(self) -> None:
        """Raise `NothingLeftToHappen`: no thread has finished in time; the selector calls this."""
        raise NothingLeftToHappen(
            f"nothing left to happen at {self._now:g} s but {self._threads} jobs in threads,"
            f" none of which finished within {self._thread_patience:g} real seconds."
            f" Still waiting:{self._waiting()}"
        )

    def _waiting(self) -> str:
        tasks = sorted(asyncio.all_tasks(self), key=asyncio.Task.get_name)
        lines = [f"\n  {_describe_task(task)}" for task in tasks[:_SHOWN]]
        if len(tasks) > _SHOWN:
            lines.append(f"\n  and {len(tasks) - _SHOWN} more")
        return "".join(lines) or " no task at all"


_SHOWN = 20
"""How many tasks or callbacks an error lists."""


def _describe_task(task: asyncio.Task[Any]) -> str:
    coroutine: Any = task.get_coro()
    name = getattr(coroutine, "__qualname__", None) or repr(coroutine)
    return f"task {task.get_name()!r}: {name}{_location(coroutine)}"


def _location(coroutine: Any) -> str:  # noqa: ANN401  -- coroutines, generators, and similar objects
    """Return the innermost Python line in which a suspended coroutine waits."""
    location = ""
    inner = coroutine
    while inner is not None:
        frame = getattr(inner, "cr_frame", None) or getattr(inner, "ag_frame", None)
        if frame is not None:
            location = f", at {frame.f_code.co_filename}:{frame.f_lineno}"
        inner = getattr(inner, "cr_await", None) or getattr(inner, "ag_await", None)
    return location


def _describe_callback(callback: Any) -> str:  # noqa: ANN401  -- any callable
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
    """Run a coroutine in virtual time, in a new event loop, as `asyncio.run` does.

    The arguments are those of :class:`VirtualTimeLoop`.

    Raises:
        NothingLeftToHappen: It waits for an event that can't come.
        TimeStandsStill: Something runs in a busy loop.
        TimeRunsAway: It was not done when the horizon was reached.
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
