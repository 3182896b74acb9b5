"""What becomes of a failed message: again, or dead-lettered?

And how long one waits between attempts at anything: full jitter (Marc Brooker, "Exponential Backoff
And Jitter", AWS Architecture Blog) spreads the attempts of many clients over the whole interval.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class DeadLetterReason(Enum):
    """Why a message is dead, as the header `x-dead-letter-reason` says it."""

    REJECTED = "rejected"
    """The handler said NACK."""
    EXHAUSTED = "exhausted"
    """All attempts are spent."""
    HANDLER_ERROR = "handler-error"
    """The handler failed, and failures are configured to be NACKs."""
    UNDECODABLE = "undecodable"
    """The message itself cannot be decoded."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often a message is requeued before it is dead-lettered.

    Attributes:
        max_attempts: The most requeues; a message is handled once more than that.
        header: The header that counts them.
    """

    max_attempts: int
    header: str

    def may_retry(self, retry_count: int) -> bool:
        """Whether a message that was requeued `retry_count` times may be requeued again."""
        return retry_count < self.max_attempts


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponentially growing pauses with full jitter.

    Attributes:
        base: The longest first pause, in seconds.
        maximum: The longest pause of all, in seconds.
    """

    base: float
    maximum: float

    def pause(self, failures: int, jitter: float) -> float:
        """Seconds to wait after so many failures in a row.

        Args:
            failures: At least 1.
            jitter: A random number in [0, 1).
        """
        # The exponent is capped, since 2.0**1024 is no float any more.
        return min(self.maximum, self.base * 2.0 ** min(failures - 1, 63)) * jitter
