"""Is what the handler works with out of order, so that it is better to wait than to fail?

A breaker, as in an electric line: *closed* while all is well; *open* once the share of failed
messages has reached a threshold, and nothing is handled for a while; *half-open* after that, when
one message at a time shows whether it is worth going on. A pure state machine over counts and the
time it is given; whoever holds it does the waiting.
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
"""Into how many parts a window is cut: what is kept is a count for each part, not each message."""


class BreakerState(Enum):
    """How a breaker is."""

    CLOSED = "closed"
    """Messages flow."""
    OPEN = "open"
    """Nothing flows: it waits."""
    HALF_OPEN = "half-open"
    """One message at a time, until one succeeds or fails."""


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """When a breaker opens, and for how long.

    Attributes:
        threshold: The share of failures at which it opens, above 0 and at most 1.
        window: Seconds that are looked back upon.
        min_samples: With fewer messages in the window it stays closed; at least 1.
        pause: How long it stays open, by how often it has opened in a row.
    """

    threshold: float
    window: float
    min_samples: int
    pause: Backoff


@dataclass(slots=True)
class _Slice:
    """What happened in one part of a window."""

    number: int
    samples: int = 0
    failed: int = 0


class CircuitBreaker:
    """One worker's breaker.

    Attributes:
        state: How it is.
        samples: How many messages were looked at when it was last asked.
        failed: How many of those had failed.
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
        """Seconds to wait while it is open: longer with each probe that failed."""
        # Without jitter: a probe is one message for each worker, no herd that must be scattered.
        return self._policy.pause.pause(max(1, self._opened), 1.0)

    def record(self, *, succeeded: int, failed: int, now: float) -> bool:
        """Take note of messages that were handled.

        Args:
            now: Seconds, in a clock that never goes back.

        Returns:
            Whether this has changed its state.
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
                # Handled before it opened, and late: what is known already.
                return False
            case unreachable:
                assert_never(unreachable)
        return True

    def probe(self) -> None:
        """The pause is over: let one message at a time through."""
        if self.state is BreakerState.OPEN:
            self.state = BreakerState.HALF_OPEN

    def _open(self) -> None:
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
        return enough and self.failed / self.samples >= policy.threshold


def is_failure(outcome: MessageOutcome, exceptions: ExceptionResults) -> bool:
    """Whether a outcome that is no ACK tells of trouble that other messages would meet, too.

    What is to be tried again does. A NACK does only where nobody meant it for this message: a
    handler that yields one, or an exception that `exceptions` makes one of, has judged the message.

    Args:
        exceptions: Which results the consumer gives to exceptions.
    """
    match outcome.result:
        case MessageResult.ACK:
            return False
        case MessageResult.REQUEUE | MessageResult.REQUEUE_IMMEDIATE | Requeue():
            return True
        case MessageResult.NACK | Nack():
            return _is_unmeant(outcome, exceptions)
        case unreachable:
            assert_never(unreachable)


def _is_unmeant(outcome: MessageOutcome, exceptions: ExceptionResults) -> bool:
    match outcome.cause:
        case Cause.HANDLER | Cause.UNDECODABLE | Cause.SHUTDOWN:
            return False
        case Cause.EXCEPTION | Cause.TIMEOUT:
            error = outcome.error
            return error is None or result_for(error, exceptions) is not MessageResult.NACK
        case Cause.MISSING | Cause.INVALID:
            return True
        case unreachable:
            assert_never(unreachable)
