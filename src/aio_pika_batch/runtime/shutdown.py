"""Signals that request a graceful shutdown, its deadlines, and waiting that it interrupts."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeAlias

Wait: TypeAlias = Callable[[Iterable[asyncio.Future[Any]]], Awaitable[None]]
"""Waits for all of these, as long as the shutdown's deadlines allow."""


class Shutdown:
    """Whether a consumer should stop, and by when.

    Attributes:
        event: Set once a stop was requested.
        deadline: When everything must be finished, in loop time.
    """

    def __init__(self) -> None:
        self.event = asyncio.Event()
        self.deadline = math.inf
        self._reserve = 0.0
        self._requested: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def is_requested(self) -> bool:
        """Whether a stop was requested."""
        return self.event.is_set()

    def request(self, deadline: float, *, reserve: float) -> None:
        """Request a stop, once: handlers finish first, then settlements, then connections.

        Args:
            deadline: When everything must be finished, in loop time.
            reserve: Seconds kept for the settlements, and as many again for the connections.
        """
        self.deadline = deadline
        self._reserve = reserve
        self.event.set()
        self._requested.set_result(None)

    @property
    def handle_by(self) -> float:
        """When handlers must have ended, in loop time."""
        return self.deadline - 2 * self._reserve

    @property
    def settle_by(self) -> float:
        """When everything must be settled, in loop time."""
        return self.deadline - self._reserve

    async def or_first_of(
        self, futures: Iterable[asyncio.Future[Any]], *, timeout: float | None = None
    ) -> None:
        """Wait until a stop is requested, one of these is done, or `timeout` seconds have passed.

        Nothing is cancelled and nothing is raised: the caller looks at what has happened.
        """
        # `asyncio.wait` neither cancels nor raises, unlike `gather`, `wait_for` and `timeout`.
        await asyncio.wait(
            {self._requested, *futures}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED
        )

    async def wait_for(
        self,
        tasks: Iterable[asyncio.Future[Any]],
        by: Callable[[], float],
        *,
        unless: asyncio.Future[Any],
        patience: float | None = None,
    ) -> None:
        """Wait for all of these, for `patience` seconds; once a stop is requested, until `by`.

        Args:
            by: Returns the limit in loop time; called once a stop is requested.
            unless: Its end also ends the wait, as long as no stop is requested.
            patience: None for no limit.
        """
        pending = {task for task in tasks if not task.done()}
        if pending and not self.is_requested:
            all_done = asyncio.ensure_future(asyncio.wait(pending))
            try:
                await self.or_first_of((all_done, unless), timeout=patience)
            finally:
                # This cancels the waiting, and none of the tasks.
                all_done.cancel()
        if self.is_requested:
            await wait_until(pending, by())


async def wait_until(tasks: Iterable[asyncio.Future[Any]], deadline: float) -> None:
    """Wait for all of these, but no longer than until a moment in loop time."""
    pending = {task for task in tasks if not task.done()}
    if pending:
        left = deadline - asyncio.get_running_loop().time()
        await asyncio.wait(pending, timeout=None if math.isinf(left) else max(0.0, left))


async def cancel_and_wait(*tasks: asyncio.Task[None]) -> None:
    """Cancel these unless they are done, and wait for their ends."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            # Marks an exception as retrieved: asyncio would report it otherwise.
            task.exception()


SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(slots=True, eq=False)
class _Listener:
    loop: asyncio.AbstractEventLoop
    drain: Callable[[], None]
    abandon: Callable[[], None]
    is_draining: bool = False


class SignalDispatcher:
    """Passes SIGINT and SIGTERM on to all running consumers of the process.

    A signal handler belongs to the process, so one object serves all consumers. The first signal
    asks them to drain, the second to abandon the drain. When the last consumer has stopped, the
    previous handlers are restored, and called for the signals that came: a web server ends by its
    own handler. Outside the main thread, where Python allows no handlers, nothing is set.
    """

    def __init__(self) -> None:
        self._listeners: list[_Listener] = []
        self._previous: dict[signal.Signals, Any] = {}
        self._received: set[int] = set()
        self._blocked: dict[int, set[int]] = {}
        self._only_drains = False
        self._was_signalled = False

    def only_drain(self) -> None:
        """Make every signal ask for a drain and nothing else, as in a supervised process.

        One that comes before there are listeners counts for the first of them. Several, as sent to
        a whole process group after the supervisor has asked for a drain, don't abandon it.
        """
        self._only_drains = True
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    @contextmanager
    def listen(self, drain: Callable[[], None], abandon: Callable[[], None]) -> Iterator[None]:
        """Receive signals inside this context, on the running loop.

        Args:
            drain: Called at the first signal from now on.
            abandon: Called at each further one.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        listener = _Listener(asyncio.get_running_loop(), drain, abandon)
        if not self._listeners:
            self._previous = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        self._listeners.append(listener)
        if self._was_signalled:
            self._notify(listener)
        try:
            yield
        finally:
            # A forked child has no listeners any more.
            if listener in self._listeners:
                self._listeners.remove(listener)
            if not self._listeners:
                self._restore()
                received, self._received = self._received, set()
                for number, handler in self._previous.items():
                    if number in received and self._is_of_the_program(handler):
                        handler(number, None)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            # Other code may have set a handler since.
            if signal.getsignal(number) == self._on_signal:
                # None stands for a handler that wasn't set from Python and can't be restored.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _is_of_the_program(self, handler: object) -> bool:
        """Return whether a handler is neither Python's, asyncio's nor this library's.

        Those of Python and asyncio would turn a graceful shutdown into a KeyboardInterrupt.
        """
        runner = getattr(getattr(handler, "func", None), "__self__", None)
        return (
            callable(handler)
            and handler is not signal.default_int_handler
            and not isinstance(runner, asyncio.Runner)
            # Such as the command line's, for signals that come before its consumer runs.
            and not getattr(handler, "__module__", "").startswith("aio_pika_batch.")
        )

    # A signal that reaches a forked child before its handlers are restored would be lost, so they
    # are blocked from before the fork until then.

    def before_fork(self) -> None:
        """Block signals in this thread, which is about to fork."""
        if self._listeners:
            blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            self._blocked[threading.get_ident()] = blocked

    def after_fork(self) -> None:
        """Take signals again."""
        blocked = self._blocked.pop(threading.get_ident(), None)
        if blocked is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def after_fork_in_child(self) -> None:
        """Leave signals to the program: the child has no consumers."""
        if self._listeners:
            self._listeners.clear()
            self._restore()
        self.after_fork()

    def drain(self) -> None:
        """Ask the listeners that don't drain yet to drain, as a first signal would."""
        for listener in self._listeners:
            if not listener.is_draining:
                self._notify(listener)

    def abandon(self) -> None:
        """Ask all listeners to abandon their drains, as a second signal would."""
        self.drain()
        for listener in self._listeners:
            self._notify(listener)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._received.add(number)
        if self._only_drains:
            self._was_signalled = True
            self.drain()
            return
        for listener in self._listeners:
            self._notify(listener)

    @staticmethod
    def _notify(listener: _Listener) -> None:
        callback = listener.abandon if listener.is_draining else listener.drain
        listener.is_draining = True
        # This runs between two bytecodes of whatever was running. Only this call is safe there, and
        # it wakes the loop.
        listener.loop.call_soon_threadsafe(callback)


process_signals = SignalDispatcher()
"""The one of this process."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=process_signals.before_fork,
        after_in_parent=process_signals.after_fork,
        after_in_child=process_signals.after_fork_in_child,
    )
