"""Circuit breaker: stops handling messages while too many of them fail.

The breaker is *closed* in normal operation. When the share of failed messages reaches a threshold,
it *opens*, and no messages are handled during a pause. Then it is *half-open*: single messages show
whether to go on. This is a state machine over counts and times; its caller waits.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import assert_never

from aio_pika_batch.core.results import (
    Cause,
    ExceptionResults,
    MessageOutcome,
    MessageResult,
    Nack,
    Requeue,
    result_for,
)
from aio_pika_batch.core.retry import Backoff

SLICES = 10
"""The number of slices of the window. Only a count for each slice is kept, so memory doesn't depend
on the rate of messages, and the window is exact to a tenth."""


class BreakerState(Enum):
    """The state of a breaker."""

    CLOSED = "closed"
    """Messages are handled."""
    OPEN = "open"
    """No messages are handled during a pause."""
    HALF_OPEN = "half-open"
    """One message at a time is handled, until one succeeds or fails."""


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """When a breaker opens, and for how long.

    Attributes:
        threshold: The share of failures at which it opens, above 0 and at most 1.
        window: The period in seconds for which messages are counted.
        min_samples: With fewer messages in the window it stays closed; at least 1.
        pause: How long it stays open; longer each time it opens without closing in between.
    """

    threshold: float
    window: float
    min_samples: int
    pause: Backoff


@dataclass(slots=True)
class _Slice:
    """The counts of one slice of the window."""

    number: int
    samples: int = 0
    failed: int = 0


class CircuitBreaker:
    """The breaker of one worker.

    Attributes:
        state: Its current state.
        samples: The number of messages in its last decision.
        failed: The number of those that failed.
    """

    __slots__ = ("_opened", "_policy", "_slices", "failed", "samples", "state")

    def __init__(self, policy: BreakerPolicy) -> None:
        self._policy = policy
        self._slices: deque[_Slice] = deque()
        self._opened = 0
        self.state = BreakerState.CLOSED
        self.samples = 0
        self.failed = 0

    @property
    def pause(self) -> float:
        """Seconds to stay open; longer after each failed probe."""
        # Without jitter: a probe is one message per worker, which isn't a burst of load, and the
        # observed pause is the configured one.
        return self._policy.pause.pause(max(1, self._opened), 1.0)

    def record(self, *, succeeded: int, failed: int, now: float) -> bool:
        """Count messages that were handled.

        Args:
            now: Seconds of a monotonic clock.

        Returns:
            Whether the state has changed.
        """
        match self.state:
            case BreakerState.CLOSED:
                self._count(succeeded, failed, now)
                if not self._is_too_much:
                    return False
                self._open()
            case BreakerState.HALF_OPEN:
                if not succeeded and not failed:
                    return False
                self.samples, self.failed = succeeded + failed, failed
                if failed:
                    self._open()
                else:
                    self._opened = 0
                    self.state = BreakerState.CLOSED
            case BreakerState.OPEN:
                # Results of batches that began before it opened say nothing new.
                return False
            case unreachable:
                assert_never(unreachable)
        return True

    def probe(self) -> None:
        """End the pause: allow one message at a time."""
        if self.state is BreakerState.OPEN:
            self.state = BreakerState.HALF_OPEN

    def _open(self) -> None:
        # Otherwise the old failures would open it again after the first success.
        self._slices.clear()
        self._opened += 1
        self.state = BreakerState.OPEN

    def _count(self, succeeded: int, failed: int, now: float) -> None:
        number = int(now * SLICES / self._policy.window)
        while self._slices and self._slices[0].number <= number - SLICES:
            self._slices.popleft()
        if not self._slices or self._slices[-1].number != number:
            self._slices.append(_Slice(number))
        self._slices[-1].samples += succeeded + failed
        self._slices[-1].failed += failed
        self.samples = sum(each.samples for each in self._slices)
        self.failed = sum(each.failed for each in self._slices)

    @property
    def _is_too_much(self) -> bool:
        policy = self._policy
        enough = self.samples >= policy.min_samples
        # Reached, not exceeded, so that a threshold of 1.0 means "all of them".
        return enough and self.failed / self.samples >= policy.threshold


def is_failure(outcome: MessageOutcome, exceptions: ExceptionResults) -> bool:
    """Whether an outcome indicates a problem that other messages would have as well.

    Every retry does. A NACK that the handler yields, or that `exceptions` maps an exception to, is
    about the message only: it is neither a failure nor a success. A handler that validates its
    messages before it writes them goes on yielding NACKs while its database is down.

    Args:
        exceptions: The results that the consumer maps exceptions to.
    """
    match outcome.result:
        case MessageResult.ACK:
            return False
        case MessageResult.REQUEUE | MessageResult.REQUEUE_IMMEDIATE | Requeue():
            return True
        case MessageResult.NACK | Nack():
            return not _is_about_message(outcome, exceptions)
        case unreachable:
            assert_never(unreachable)


def _is_about_message(outcome: MessageOutcome, exceptions: ExceptionResults) -> bool:
    """Whether a NACK was a decision about its message."""
    match outcome.cause:
        case Cause.HANDLER | Cause.UNDECODABLE | Cause.CRASHED | Cause.SHUTDOWN:
            return True
        case Cause.EXCEPTION | Cause.TIMEOUT:
            error = outcome.error
            given = None if error is None else result_for(error, exceptions)
            return given is MessageResult.NACK or isinstance(given, Nack)
        case Cause.MISSING | Cause.INVALID:
            return False
        case unreachable:
            assert_never(unreachable)
