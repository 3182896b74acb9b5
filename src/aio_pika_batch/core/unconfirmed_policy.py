"""What happens to an original whose copy is not confirmed?

It is held, unsettled, and its copy is tried again after growing pauses. Where nothing was heard of
a copy, it may well be stored: whoever publishes gives up a connection that kept silent, so that
there is one more attempt for each new connection, and no more. An original is not held for ever:
after `hold_seconds`, or once half of the prefetch is held, it goes back to the broker; and never at
once, since it would come back at once, in a hot loop.
"""

from __future__ import annotations

from dataclasses import dataclass

from aio_pika_batch.core.retry import Backoff


@dataclass(frozen=True, slots=True)
class Pending:
    """An original in the waiting room.

    Attributes:
        since: When its copy first failed.
        failures: How often its copy has failed, at least 1.
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
        hold_seconds: Seconds, at most, from the first failure on.
        max_held: How many originals may be held at a time.
        backoff: The pauses between attempts.
    """

    hold_seconds: float
    max_held: int
    backoff: Backoff

    def next_step(
        self, pending: Pending, *, now: float, jitter: float, held: int
    ) -> Republish | Return:
        """Decide after a failed attempt.

        Args:
            now: Seconds, in the clock of `Pending.since`.
            jitter: A random number in [0, 1).
            held: How many originals are held now, this one included.
        """
        # At least half of the longest pause: full jitter may come out at nothing, and nothing is a
        # hot loop.
        at = now + self.backoff.pause(pending.failures, 0.5 + jitter / 2)
        end = max(now, pending.since + self.hold_seconds)
        if held > self.max_held or at >= end:
            return Return(min(at, end))
        return Republish(at)
