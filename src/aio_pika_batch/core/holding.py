"""What happens to an original whose copy is not confirmed?

It is held, unsettled, and its copy is tried again: after growing pauses where the broker said no, and
once for each new publisher connection where nothing was heard, since that copy may well be stored.
It is not held for ever: after `hold` seconds, or once half of the prefetch is held, the original goes
back to the broker; and never at once, since it would come back at once, in a hot loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

from aio_pika_batch.core.message import Outcome
from aio_pika_batch.core.retry import Backoff


@dataclass(frozen=True, slots=True)
class Held:
    """An original in the waiting room.

    Attributes:
        since: When its copy first failed.
        failures: How often its copy has failed.
        attempted_on: The publisher connection that its copy was last sent on, as a number.
        outcome: How the last attempt ended.
    """

    since: float
    failures: int
    attempted_on: int
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class TryAgain:
    """Publish the copy again at `at`; if `after_connection`, on a later publisher connection only."""

    at: float
    after_connection: int | None = None


@dataclass(frozen=True, slots=True)
class GiveBack:
    """Return the original to the broker at `at`."""

    at: float


@dataclass(frozen=True, slots=True)
class HoldPolicy:
    """Decides how long an original is held.

    Attributes:
        hold: Seconds, at most, from the first failure on.
        room: How many originals may be held at a time.
        backoff: The pauses between attempts.
    """

    hold: float
    room: int
    backoff: Backoff

    def next_step(self, held: Held, *, now: float, jitter: float, waiting: int) -> TryAgain | GiveBack:
        """Decide after a failed attempt.

        Args:
            now: Seconds, in the clock of `Held.since`.
            jitter: A random number in [0, 1).
            waiting: How many originals are held now, this one included.
        """
        # At least half of the longest pause: full jitter may come out at nothing, and nothing is a
        # hot loop.
        at = now + self.backoff.pause(held.failures, 0.5 + jitter / 2)
        if waiting > self.room:
            return GiveBack(at)
        if at >= held.since + self.hold:
            return GiveBack(max(now, held.since + self.hold))
        match held.outcome:
            case Outcome.UNKNOWN:
                return TryAgain(at, after_connection=held.attempted_on)
            case Outcome.RETURNED | Outcome.REFUSED:
                return TryAgain(at)
            case Outcome.CONFIRMED:
                msg = "a confirmed copy's original is not held"
                raise ValueError(msg)
            case unreachable:
                assert_never(unreachable)
