"""Decides the prefetch count of a session while it consumes.

It begins with what the batches need. It grows to what keeps the connection busy, so that a network
read and a write carry many messages, and shrinks again when fewer messages succeed.

Laws:

- It is never below what the batches need.
- Above that, it is at most what the worker has acked in `WORK` seconds: a worker must not keep
  messages that another one could handle. Messages that fail don't count, and neither do held ones.
- Above that, the bodies of all prefetched messages have at most `MOST_BYTES`, as far as samples
  show.
- It is at least doubled or halved, and `INTERVAL` seconds lie between two changes.
"""

from __future__ import annotations

FIRST = 1.0
"""Seconds before the first change, and between two looks that change nothing."""

INTERVAL = 10.0
"""Seconds between two changes: each one interrupts the deliveries for a moment."""

WORK = 0.5
"""Seconds of work that a worker may prefetch. Handlers may become slower before the next change."""

MOST = 500
"""The largest count: beyond it a message costs no less."""

MOST_BYTES = 16 * 2**20


class AdaptivePrefetch:
    """The prefetch count of one session.

    Args:
        base: The count that the batches need.
        now: When the session began, in seconds.

    Attributes:
        current: The count in use.
    """

    __slots__ = ("_acked", "_base", "_bytes", "_samples", "_since", "_wait", "current")

    def __init__(self, base: int, now: float) -> None:
        self._base = base
        self._since = now
        self._wait = FIRST
        self._acked = 0
        self._bytes = 0
        self._samples = 0
        self.current = base

    def sample(self, size: int) -> None:
        """Note the size of a body."""
        self._bytes += size
        self._samples += 1

    def acked(self, count: int, now: float) -> int | None:
        """Note messages that were acked; return another prefetch count if it is time for one."""
        self._acked += count
        seconds = now - self._since
        if seconds < self._wait:
            return None
        wanted = self._wanted(self._acked / seconds)
        self._acked = self._bytes = self._samples = 0
        self._since = now
        if self.current < 2 * wanted and wanted < 2 * self.current:
            self._wait = FIRST
            return None
        self._wait = INTERVAL
        self.current = wanted
        return wanted

    def _wanted(self, rate: float) -> int:
        wanted = min(MOST, int(rate * WORK))
        if self._bytes:
            wanted = min(wanted, MOST_BYTES * self._samples // self._bytes)
        return max(self._base, wanted)
