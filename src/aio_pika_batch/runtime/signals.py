"""Who owns SIGINT and SIGTERM?

One object for the whole process, since a signal handler is the process's own. The first signal asks
everybody to drain, the second to abandon the drain; when the last consumer has left, the handlers
that stood before are put back. Outside the main thread, where Python allows no handlers, nothing is
set.
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
    is_told: bool = False


class SignalDesk:
    """Passes signals on to whoever listens."""

    def __init__(self) -> None:
        self._listeners: list[_Listener] = []
        self._previous: dict[signal.Signals, Any] = {}

    @contextmanager
    def listen(self, drain: Callable[[], None], abandon: Callable[[], None]) -> Iterator[None]:
        """Be told of signals while this is open, on the running loop.

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
                    # None stands for a handler that was not set from Python, and cannot be put
                    # back.
                    signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def drain(self) -> None:
        """Ask those who were not asked yet, as a first signal would."""
        for listener in self._listeners:
            if not listener.is_told:
                self._tell(listener)

    def abandon(self) -> None:
        """Ask all of them to give up their drains, as a second signal would."""
        self.drain()
        for listener in self._listeners:
            self._tell(listener)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        for listener in self._listeners:
            self._tell(listener)

    @staticmethod
    def _tell(listener: _Listener) -> None:
        tell = listener.abandon if listener.is_told else listener.drain
        listener.is_told = True
        # Runs between two bytecodes of whatever was running: only this call is safe, and it wakes
        # the loop.
        listener.loop.call_soon_threadsafe(tell)


process_signals = SignalDesk()
"""The one of this process."""
