"""Decides how long the consumer holds a failed message, unsettled, before it publishes its retry.

A held message takes up prefetch, so an outage slows the intake down instead of using up attempts.

Laws:

- A hold ends by itself: none is longer than `longest` seconds. A longer delay goes on after a copy
  that doesn't count as an attempt.
- Messages that fail again and again can't starve the others: while messages succeed, the held ones
  take at most half of the prefetch window; beyond that the one that has been held longest is
  published early, at most one per second for each message above half.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

LONGEST_DEFAULT = 30.0
"""The longest delay in seconds if `requeue_delay` isn't set: 1, 2, 4, … up to this."""

LONGEST_HOLD = 600.0
"""Seconds that a message is held at most, and never longer than a third of the consumer timeout."""

SUCCESS_WINDOW = 30.0
"""Seconds for which one ACK means that messages succeed."""

RELEASE_INTERVAL = 1.0
"""Seconds between two retries that are published early, if one more than half are held.

With several above half it is shorter accordingly. Among p messages that always fail, and r early
releases per second, the others wait for about p / r seconds: one per second would be too few.
"""


def longest_hold(consumer_timeout: float) -> float:
    """Return how long a message may be held on a broker with this consumer timeout, in seconds."""
    return min(LONGEST_HOLD, consumer_timeout / 3)


@dataclass(frozen=True, slots=True)
class HoldPolicy:
    """How long failed messages are held.

    Attributes:
        by_default: Whether a retry without a delay of its own is held (`requeue_delay` isn't set).
        longest: No hold is longer, in seconds.
        longest_undeliverable: The longest delay of messages that failed for good and can't be
            dead-lettered, in seconds.
    """

    by_default: bool = False
    longest: float = LONGEST_HOLD
    longest_undeliverable: float = 300.0

    def retry_delay(self, retries: int) -> float:
        """The delay in seconds of a message that was retried so often, if none is configured."""
        return min(LONGEST_DEFAULT, 2.0 ** min(retries, 30)) if self.by_default else 0.0

    def undeliverable_delay(self, failures: int) -> float:
        """The delay in seconds of a message that can't be dead-lettered, from 1 s on."""
        return min(self.longest, self.longest_undeliverable, 2.0 ** min(failures, 30))


def early_release_at(
    *, held: int, limit: int, last_success: float, last_release: float, now: float
) -> float | None:
    """Return when the retry that has been held longest is published although it isn't due yet.

    Args:
        held: How many retries are held.
        limit: How many may be held while messages succeed.
        last_success: When a message last succeeded.
        last_release: When a retry was last published early.

    Returns:
        None if none has to be.
    """
    if held <= limit or now - last_success > SUCCESS_WINDOW:
        return None
    return max(now, last_release + RELEASE_INTERVAL / (held - limit))


NEVER = -math.inf
"""The time of something that hasn't happened."""
