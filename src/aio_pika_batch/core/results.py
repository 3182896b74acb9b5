"""The results that a handler can yield for a message, and why a message got its result."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum
from typing import TypeAlias, assert_never

from aio_pika_batch.core.message import Message


class MessageResult(Enum):
    """What to do with a message."""

    ACK = "ack"
    """It is done. Remove it from the queue."""
    NACK = "nack"
    """It is bad. Dead-letter it, without another attempt."""
    REQUEUE = "requeue"
    """It failed for now. Retry it from the back of the queue, after `requeue_delay`. After
    `max_requeue_attempts` retries it is dead-lettered."""
    REQUEUE_IMMEDIATE = "requeue_immediate"
    """Retry it from the front of the queue. Only the broker counts these retries, if it is new
    enough."""


@dataclass(frozen=True, slots=True)
class Nack:
    """`MessageResult.NACK` with a reason.

    Args:
        reason: The header `x-dead-letter-detail` of the dead letter.
    """

    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Requeue:
    """`MessageResult.REQUEUE` with a reason and a delay.

    Args:
        reason: The header `x-dead-letter-detail` of the dead letter, if this was the last attempt.
        delay: Seconds until the next attempt, or a timedelta. It is rounded up to the next
            available delay, and to at most `requeue_delay_max`. 0 retries at once. None uses
            `requeue_delay`.
    """

    reason: str | None = None
    delay: float | timedelta | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Raise an error for an invalid reason or delay, in the line that makes the mistake."""
        reason: object = self.reason
        delay: object = self.delay
        if reason is None and type(delay) is float and 0 <= delay < math.inf:
            return  # the common case, which occurs once for each message
        if reason is not None and not isinstance(reason, str):
            msg = f"reason must be a text, not {describe(reason)}; a delay is Requeue(delay=…)"
            raise TypeError(msg)
        if isinstance(delay, bool) or not isinstance(delay, int | float | timedelta | None):
            msg = f"delay must be a number of seconds or a timedelta, not {describe(delay)}"
            raise TypeError(msg)
        if self.seconds is not None and not 0 <= self.seconds < math.inf:
            raise ValueError(f"delay must be finite and at least 0 seconds, not {delay!r}")

    @property
    def seconds(self) -> float | None:
        """The delay in seconds; None if none was given."""
        delay = self.delay
        return delay.total_seconds() if isinstance(delay, timedelta) else delay


Result: TypeAlias = MessageResult | Nack | Requeue
"""The values that a handler can yield for a message."""


def is_retry(result: Result) -> bool:
    """Whether the result asks for another attempt."""
    match result:
        case MessageResult.REQUEUE | MessageResult.REQUEUE_IMMEDIATE | Requeue():
            return True
        case MessageResult.ACK | MessageResult.NACK | Nack():
            return False
        case unreachable:
            assert_never(unreachable)


class Cause(Enum):
    """Why a message got its result."""

    HANDLER = "handler"
    """The handler yielded it."""
    EXCEPTION = "exception"
    """The handler raised an exception before it yielded a result for this message."""
    TIMEOUT = "timeout"
    """The handler ran longer than `process_timeout`."""
    MISSING = "missing"
    """The handler ended without a result for this message."""
    INVALID = "invalid"
    """The handler yielded an invalid result."""
    UNDECODABLE = "undecodable"
    """The message cannot be decoded."""
    CRASHED = "crashed"
    """It came back too often without a result, and wasn't handled."""
    SHUTDOWN = "shutdown"
    """The time for a shutdown was over."""


# Not frozen: one is created for each failed message, see `Properties`.
@dataclass(slots=True)
class MessageOutcome:
    """A message and its result.

    Attributes:
        error: The exception that led to the result, if there was one.
    """

    message: Message
    result: Result
    cause: Cause = Cause.HANDLER
    error: BaseException | None = None


ExceptionResults: TypeAlias = Mapping[type[Exception], Result]


def result_for(error: BaseException, table: ExceptionResults) -> Result | None:
    """Look up an exception by its class, the most specific class first.

    Returns:
        None if the table lists neither its class nor a base class of it.
    """
    for cls in type(error).__mro__:
        if cls in table:
            return table[cls]
    return None


def describe(item: object) -> str:
    """Describe an invalid result for an error message."""
    if isinstance(item, tuple) and len(item) == 2:  # noqa: PLR2004  -- almost (message, result)
        return f"({_describe_one(item[0])}, {_describe_one(item[1])})"
    return _describe_one(item)


def _describe_one(item: object) -> str:
    # What a handler yields by mistake is often a message's body, and the error ends up in logs and
    # dead letters. So most values are described by their type only.
    match item:
        case None | bool() | float() | Message() | MessageResult():
            return repr(item)
        # Python refuses to convert integers of more than 4300 digits to text.
        case int() if abs(item) < 10**18:
            return repr(item)
        case str() if item.strip().upper() in MessageResult.__members__:
            return repr(item)
        case _:
            return f"something of {type(item)}"
