"""Passes SIGINT and SIGTERM on to all running consumers of the process.

A signal handler belongs to the process, so one object serves all consumers. The first signal asks
them to drain, the second to abandon the drain. When the last consumer has stopped, the previous
handlers are restored. Outside the main thread, where Python allows no handlers, nothing is set.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(slots=True, eq=False)
class _Listener:
    loop: asyncio.AbstractEventLoop
    drain: Callable[[], None]
    abandon: Callable[[], None]
    is_draining: bool = False


class SignalDispatcher:
    """Passes signals on to its listeners."""

    def __init__(self) -> None:
        self._listeners: list[_Listener] = []
        self._previous: dict[signal.Signals, Any] = {}

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
        try:
            yield
        finally:
            self._listeners.remove(listener)
            if not self._listeners:
                for number, handler in self._previous.items():
                    # None stands for a handler that wasn't set from Python and can't be restored.
                    signal.signal(number, signal.SIG_DFL if handler is None else handler)

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
        del number, frame
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
