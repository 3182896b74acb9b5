"""Decides what to do with an original whose copy is not confirmed.

The consumer holds the original unsettled, and publishes its copy again after growing pauses. The
broker may have stored a copy whose confirm is missing. So the publisher replaces a connection that
sent no answer, which allows one attempt for each connection.

Laws:

- An original is held for `hold_seconds` at most, and at most `max_held` originals are held at a
  time. After that it is returned to the broker.
- Before an original is returned, it is held for a pause, or for `hold_seconds` if that is shorter.
  Otherwise the broker would deliver it again immediately, in a busy loop.
"""

from __future__ import annotations

from dataclasses import dataclass

from aio_pika_batch.core.retry import Backoff


@dataclass(frozen=True, slots=True)
class Pending:
    """An original whose copy is not confirmed.

    Attributes:
        since: When its copy first failed.
        failures: How often its copy has failed, at least once.
    """

    since: float
    failures: int


@dataclass(frozen=True, slots=True)
class Republish:
    """Publish the copy again at `at`."""

    at: float


@dataclass(frozen=True, slots=True)
class Return:
    """Return the original to the broker at `at`."""

    at: float


@dataclass(frozen=True, slots=True)
class UnconfirmedPolicy:
    """Decides how long an original is held.

    Attributes:
        hold_seconds: The maximum time since the first failure.
        max_held: The maximum number of originals at a time.
        backoff: The pauses between attempts.
    """

    hold_seconds: float
    max_held: int
    backoff: Backoff

    def next_step(
        self, pending: Pending, *, now: float, jitter: float, held: int
    ) -> Republish | Return:
        """Decide what to do after a failed attempt.

        Args:
            now: Seconds, by the clock of `Pending.since`.
            jitter: A random number in [0, 1).
            held: The number of originals that are held now, including this one.
        """
        # At least half of the longest pause, because full jitter can be almost 0: a busy loop.
        at = now + self.backoff.pause(pending.failures, 0.5 + jitter / 2)
        end = max(now, pending.since + self.hold_seconds)
        if held > self.max_held or at >= end:
            return Return(min(at, end))
        return Republish(at)
