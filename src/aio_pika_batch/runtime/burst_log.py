"""Logs what comes in bursts: the first event at once, the others as a number once a minute."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

INTERVAL = 60.0
"""Seconds between two lines about the same thing."""


class BurstLog:
    """One kind of log line.

    Args:
        log: Logs the number of messages that the line is about.
    """

    def __init__(self, log: Callable[[int], None]) -> None:
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._count = 0
        self._timer: asyncio.TimerHandle | None = None

    def note(self, count: int) -> None:
        """Log now if nothing was logged in the last minute, and otherwise when it is over."""
        if self._timer is not None:
            self._count += count
            return
        self._log(count)
        self._timer = self._loop.call_later(INTERVAL, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        count, self._count = self._count, 0
        if count:
            self.note(count)

    def flush(self) -> None:
        """Log what hasn't been logged; nothing more will come."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        count, self._count = self._count, 0
        if count:
            self._log(count)
