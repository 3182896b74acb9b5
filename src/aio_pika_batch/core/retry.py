"""Retries: how often, after which delay, and through which queue.

A delayed retry is published to a wait queue, expires there, and the broker dead-letters it back to
the queue that it came from. Each delay has a wait queue of its own, because a queue expires
messages only at its head, so a short delay would wait behind a long one. Holding the message in the
consumer instead would use prefetch and end with the process.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TypeGuard

from aio_pika_batch.core.message import (
    DEATHS,
    SHORT_STRING,
    UINT32,
    WAIT_QUEUE_SUFFIX,
    FieldValue,
    Headers,
    Message,
    is_short_string,
    retry_count,
)
from aio_pika_batch.core.publication import Copy

NO_DELAY = 0
"""The level of a message that is retried at once."""

LONGEST_WAIT = float(UINT32 // 1000)
"""The longest delay in seconds."""

MAX_LEVELS = 100
"""The maximum number of delays: each one needs a queue, and more are probably a mistake."""

FIRST_REQUESTED = 1.0
"""The shortest delay in seconds that a handler can request if no delay is configured."""

ORIGINAL_EXPIRATION = "x-original-expiration"


class DeadLetterReason(Enum):
    """Why a message was dead-lettered: the header `x-dead-letter-reason`."""

    REJECTED = "rejected"
    """The handler returned NACK."""
    EXHAUSTED = "exhausted"
    """It has no attempts left."""
    HANDLER_ERROR = "handler-error"
    """The handler failed, and the settings map the failure to NACK."""
    UNDECODABLE = "undecodable"
    """The message cannot be decoded."""
    UNPUBLISHABLE = "unpublishable"
    """Its retry can't be published: its headers don't fit into a frame, for example."""
    CRASHED = "crashed"
    """It came back `crash_limit` times without a result, and was not handled again."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often a message is requeued before it is dead-lettered.

    Attributes:
        max_attempts: The maximum number of requeues. A message is handled once more than that.
        header: The header that counts them.
    """

    max_attempts: int
    header: str

    def may_retry(self, retry_count: int) -> bool:
        """Whether a message that was requeued `retry_count` times can be requeued again."""
        return retry_count < self.max_attempts


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponentially growing pauses with full jitter.

    Full jitter spreads the attempts of many clients over the whole interval (Marc Brooker,
    "Exponential Backoff And Jitter", AWS Architecture Blog).

    Attributes:
        base: The longest first pause, in seconds.
        maximum: The longest of all pauses, in seconds.
    """

    base: float
    maximum: float

    def pause(self, failures: int, jitter: float) -> float:
        """Seconds to wait after this many consecutive failures.

        Args:
            failures: At least 1.
            jitter: A random number in [0, 1).
        """
        # The exponent is limited because 2.0**1024 overflows.
        return min(self.maximum, self.base * 2.0 ** min(failures - 1, 63)) * jitter

    def long_pause(self, failures: int, jitter: float) -> float:
        """Like :meth:`pause`, but never almost 0, as full jitter can be: at least half as long."""
        return self.pause(failures, 0.5 + jitter / 2)


@dataclass(frozen=True, slots=True)
class DelaySteps:
    """The available delays in milliseconds, in ascending order; see :func:`make_delay_steps`.

    Attributes:
        automatic: The delays of the first retry, the second, and so on. The last one is used for
            all later retries. Empty: retries have no delay.
        requestable: The delays that `Requeue(delay=…)` can have.
    """

    # Few steps and no jitter, because each delay needs a queue.
    automatic: tuple[int, ...]
    requestable: tuple[int, ...]

    def level(self, seconds: float | None, retries: int) -> int:
        """The delay of a message that was requeued this many times.

        Args:
            seconds: What its handler requests: it gets the next delay that is not shorter, or the
                longest one; 0 stays 0. None if it requests nothing.
        """
        if seconds is None:
            automatic = self.automatic
            return automatic[min(retries, len(automatic) - 1)] if automatic else NO_DELAY
        highest = self.requestable[-1]
        if seconds * 1000 >= highest:
            return highest
        # Below a microsecond a float is rounding noise, which must not select the next level.
        wanted = round(seconds * 1000, 3)
        return self.requestable[bisect_left(self.requestable, wanted)] if wanted > 0 else NO_DELAY

    @property
    def longest(self) -> float:
        """The longest delay that a handler can request, in seconds."""
        return self.requestable[-1] / 1000

    def steps_for(self, attempts: int) -> tuple[int, ...]:
        """The delays of this many retries, if no handler requests others."""
        return tuple(dict.fromkeys(self.automatic[:attempts]))

    def total_seconds(self, attempts: int) -> float:
        """The sum of the delays of this many retries, if no handler requests others."""
        automatic = self.automatic[:attempts]
        more = max(0, attempts - len(self.automatic))
        return (sum(automatic) + more * sum(automatic[-1:])) / 1000


def make_delay_steps(first: float = 0.0, factor: float = 2.0, maximum: float = 300.0) -> DelaySteps:
    """Make the delays that the settings describe.

    Args:
        first: Seconds before the first retry. 0: no delay unless a handler requests one.
        factor: Each delay is this many times as long as the one before; at least 1.
        maximum: The longest delay in seconds, more than 0.

    Raises:
        ValueError: There would be too many delays, or the first one is longer than the maximum.
    """
    if first > maximum:
        raise ValueError(f"requeue_delay={first:g} must not exceed requeue_delay_max={maximum:g}")
    automatic = _steps(first, factor, maximum) if first else ()
    # If retries have no delay, or always the same one, handlers can still request longer ones.
    requestable = (
        automatic if factor > 1 and automatic else _steps(first or FIRST_REQUESTED, 2.0, maximum)
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
    """The name of the queue in which messages of another queue wait for this many milliseconds."""
    return f"{queue}{WAIT_QUEUE_SUFFIX}{level}"


def check_wait_queue_names(queue: str, steps: DelaySteps) -> None:
    """Check that the names of a queue's wait queues are not too long for AMQP.

    Raises:
        ValueError: One of them is.
    """
    longest = wait_queue_name(queue, steps.requestable[-1])
    if not is_short_string(longest):
        raise ValueError(
            f"requeue_delay needs wait queues like {longest!r}, and that has more than"
            f" {SHORT_STRING} bytes, AMQP's limit: use a shorter queue_name"
        )


@dataclass(slots=True)
class DelayedCopy(Copy):
    """A copy that is delivered after a delay.

    Attributes:
        level: The delay in milliseconds.
    """

    level: int = NO_DELAY


def delayed_copy(
    message: Message,
    queue: str,
    level: int,
    add: dict[str, FieldValue],
    drop: frozenset[str],
) -> DelayedCopy:
    """Make a copy that returns to its queue after a delay."""
    # The broker applies the shorter of two times to live, but only at the head of the queue, so an
    # `expiration` could end the delay early, or block the messages behind. It moves to a header.
    expiration = message.properties.expiration
    if expiration is not None:
        add[ORIGINAL_EXPIRATION] = expiration
    return DelayedCopy(
        message,
        "",
        wait_queue_name(queue, level),
        add,
        # Before 4.0 RabbitMQ trusts a client's `x-death`, and drops a message that seems to be in a
        # cycle. Newer versions ignore it, and write their own.
        drop | {DEATHS},
        keep_expiration=False,
        level=level,
    )


def restore_expiration(copy: Copy) -> None:
    """Give a copy for the queue of its message the `expiration` that it had before a delay."""
    expiration = copy.message.headers.get(ORIGINAL_EXPIRATION)
    # Otherwise the header is another application's, or a dead letter's, which must not expire.
    if _is_expiration(expiration) and _has_waited(copy.message, copy.routing_key):
        copy.drop |= {ORIGINAL_EXPIRATION}
        copy.keep_expiration = False
        copy.expiration = expiration


def _is_expiration(value: FieldValue) -> TypeGuard[str]:
    return (
        isinstance(value, str)
        and value.isascii()
        and value.isdigit()
        and len(value) <= len(str(UINT32))
        and int(value) <= UINT32
    )


_WAIT_QUEUE = re.compile(rf".+{re.escape(WAIT_QUEUE_SUFFIX)}\d+")


def latest_death(headers: Headers) -> Headers | None:
    """The latest entry of `x-death` that isn't about a retry that waited; None without one."""
    deaths = headers.get(DEATHS)
    for death in deaths if isinstance(deaths, list) else ():
        if not isinstance(death, Mapping):
            continue
        queue = death.get("queue")
        is_wait = isinstance(queue, str) and _WAIT_QUEUE.fullmatch(queue)
        if not (is_wait and death.get("reason") == "expired"):
            return death
    return None


def identify_death(death: Headers) -> str:
    """A text that differs for each entry of `x-death`."""
    # Not by comparing times: those of brokers and consumers differ.
    return " ".join(str(death.get(name)) for name in ("queue", "reason", "count", "time"))


def coming_death(headers: Headers, queue: str) -> str:
    """A text for the entry of `x-death` that the broker is about to add or count."""
    deaths = headers.get(DEATHS)
    for death in deaths if isinstance(deaths, list) else ():
        match death:
            case {"queue": str(died_in), "reason": "rejected", "count": int(count)} if (
                died_in == queue
            ):
                return f"{queue} rejected {count + 1}"
            case _:
                pass
    return f"{queue} rejected 1"


def is_stated_death(death: Headers, stated: FieldValue) -> bool:
    """Whether an entry of `x-death` is what a dead letter states about it.

    Args:
        stated: Made by `identify_death`, or by `coming_death`. A broker that doesn't believe the
            `x-death` of a publisher counts from 1 again, so it may also count less than was stated.
    """
    if stated == identify_death(death):
        return True
    count = death.get("count")
    prefix = " ".join([*(str(death.get(name)) for name in ("queue", "reason")), ""])
    if not (isinstance(stated, str) and stated.startswith(prefix) and isinstance(count, int)):
        return False
    limit = retry_count(stated.removeprefix(prefix))
    return limit is not None and count <= limit


def _has_waited(message: Message, queue: str) -> bool:
    """Whether the message comes directly from one of the queue's own wait queues."""
    match message.headers.get(DEATHS):
        case [{"queue": str(died_in), "reason": "expired"}, *_]:
            return died_in.startswith(wait_queue_name(queue, level=""))
        case _:
            return False
