"""What becomes of a failed message: again, or dead-lettered?

And how long one waits between attempts at anything: full jitter (Marc Brooker, "Exponential Backoff
And Jitter", AWS Architecture Blog) spreads the attempts of many clients over the whole interval.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from enum import Enum
from typing import TypeGuard

from aio_pika_batch.core.message import SHORT_STRING, FieldValue, Message, is_short_string
from aio_pika_batch.core.publication import Copy
from aio_pika_batch.core.results import Requeue, Result


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


NO_DELAY = 0
"""The level of what does not wait."""

LONGEST_WAIT = 4_294_967.0
"""Seconds. A queue's time to live is an unsigned 32-bit number of milliseconds."""

MAX_LEVELS = 100
"""Each level is a queue; nobody wants more of them by mistake."""

FIRST_ASKED_FOR = 1.0
"""Seconds: the lowest level where retries do not wait unless a handler asks for it."""

ORIGINAL_EXPIRATION = "x-original-expiration"
DEATHS = "x-death"

_LONGEST_EXPIRATION = 2**32 - 1


@dataclass(frozen=True, slots=True)
class DelaySteps:
    """The lengths of wait that there are; made by :func:`delay_steps`.

    In milliseconds, and none is shorter than the one before.

    Attributes:
        climbed: Those of the first retry, the second, and so on; the last one stays. Empty: retries
            do not wait.
        askable: Those that `Requeue(delay=…)` can have.
    """

    automatic: tuple[int, ...]
    requestable: tuple[int, ...]

    def level(self, result: Result, retries: int) -> int:
        """The wait that a result means for a message that was requeued so often."""
        if isinstance(result, Requeue) and result.seconds is not None:
            return self.at_least(result.seconds)
        automatic = self.automatic
        return automatic[min(retries, len(automatic) - 1)] if automatic else NO_DELAY

    def at_least(self, seconds: float) -> int:
        """The nearest level at or above; the highest, if there is none. Nothing stays nothing."""
        highest = self.requestable[-1]
        if seconds * 1000 >= highest:
            return highest
        # Beyond a microsecond a float is noise, which must not lift it to the next level.
        wanted = round(seconds * 1000, 3)
        return self.requestable[bisect_left(self.requestable, wanted)] if wanted > 0 else NO_DELAY

    def steps_for(self, attempts: int) -> tuple[int, ...]:
        """The levels that so many retries climb."""
        return tuple(dict.fromkeys(self.automatic[:attempts]))

    def total_seconds(self, attempts: int) -> float:
        """For how long so many retries wait, all in all, where no handler asks for more."""
        automatic = self.automatic[:attempts]
        more = max(0, attempts - len(self.automatic))
        return (sum(automatic) + more * sum(automatic[-1:])) / 1000


def make_delay_steps(first: float = 0.0, factor: float = 2.0, maximum: float = 300.0) -> DelaySteps:
    """Make a delay_steps.

    Args:
        first: Seconds before the first retry; 0: retries do not wait unless a handler asks for it.
        factor: By which each wait is longer than the one before, at least 1.
        maximum: Seconds of the longest wait, more than 0.

    Raises:
        ValueError: It would have too many levels, or begin above its end.
    """
    if first > maximum:
        raise ValueError(f"requeue_delay={first:g} must not exceed requeue_delay_max={maximum:g}")
    automatic = _steps(first, factor, maximum) if first else ()
    # Where retries climb nothing, or stay on one level, handlers may ask for more than that.
    requestable = (
        automatic if factor > 1 and automatic else _steps(first or FIRST_ASKED_FOR, 2.0, maximum)
    )
    return DelaySteps(automatic, tuple(dict.fromkeys(requestable)))


def _steps(first: float, factor: float, maximum: float) -> tuple[int, ...]:
    steps: list[int] = []
    wait = first
    while wait < maximum and len(steps) < MAX_LEVELS:
        steps.append(_milliseconds(wait))
        if factor <= 1:
            return tuple(steps)
        wait *= factor
    if wait < maximum:
        raise ValueError(
            f"from {first:g} s to {maximum:g} s by a factor of {factor:g} there are more than"
            f" {MAX_LEVELS} steps, and each is a queue: use a larger factor"
        )
    return (*steps, _milliseconds(maximum))


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def wait_queue_name(queue: str, level: int | str) -> str:
    """The queue in which messages wait for so many milliseconds, to go back to another."""
    return f"{queue}.retry.{level}"


def check_wait_queue_names(queue: str, steps: DelaySteps) -> None:
    """See that AMQP has a place for the name of each of a queue's wait queues.

    Raises:
        ValueError: It has not.
    """
    longest = wait_queue_name(queue, steps.requestable[-1])
    if not is_short_string(longest):
        raise ValueError(
            f"requeue_delay needs wait queues like {longest!r}, and that has more than"
            f" {SHORT_STRING} bytes, AMQP's limit: use a shorter queue_name"
        )


@dataclass(slots=True)
class DelayedCopy(Copy):
    """A copy that waits before it is delivered.

    Attributes:
        level: For how long, in milliseconds.
    """

    level: int = NO_DELAY


def delayed_copy(
    message: Message,
    queue: str,
    level: int,
    add: dict[str, FieldValue],
    drop: frozenset[str],
) -> DelayedCopy:
    """A copy that comes back to its queue after a while.

    Its `expiration` moves to a header: a shorter one than the wait would end it early, and all that
    wait behind it; and the broker takes it off anyway. `x-death` is left out: before 4.0 RabbitMQ
    takes a client's word for it, and drops what seems to go in circles.
    """
    expiration = message.properties.expiration
    if expiration is not None:
        add[ORIGINAL_EXPIRATION] = expiration
    return DelayedCopy(
        message,
        "",
        wait_queue_name(queue, level),
        add,
        drop | {DEATHS},
        keep_expiration=False,
        level=level,
    )


def immediate_copy(
    message: Message, queue: str, add: dict[str, FieldValue], drop: frozenset[str]
) -> Copy:
    """A copy that is delivered at once, with the `expiration` that was taken off for a wait."""
    expiration = message.headers.get(ORIGINAL_EXPIRATION)
    if not _is_expiration(expiration) or not _has_waited(message, queue):
        # Somebody else's header, or a dead letter's: what is dead must not expire.
        return Copy(message, "", queue, add, drop)
    drop |= {ORIGINAL_EXPIRATION}
    return Copy(message, "", queue, add, drop, keep_expiration=False, expiration=expiration)


def _is_expiration(value: FieldValue) -> TypeGuard[str]:
    return (
        isinstance(value, str)
        and value.isascii()
        and value.isdigit()
        and len(value) <= len(str(_LONGEST_EXPIRATION))
        and int(value) <= _LONGEST_EXPIRATION
    )


def _has_waited(message: Message, queue: str) -> bool:
    """Whether it comes from one of the queue's own wait queues, with nothing in between."""
    match message.headers.get(DEATHS):
        case [{"queue": str(died_in), "reason": "expired"}, *_]:
            return died_in.startswith(wait_queue_name(queue, level=""))
        case _:
            return False
