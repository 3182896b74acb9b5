"""The results that a handler yields, and which message each one belongs to.

The i-th result belongs to the i-th message. A handler that works out of order yields pairs of
`(message, result)` instead. One batch can use only one of the two forms.

Laws:

- A message without a result is never acknowledged.
- An invalid result changes nothing that was decided before it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum
from itertools import islice
from typing import TypeAlias, assert_never

from aio_pika_batch.core.message import Message
from aio_pika_batch.errors import ResultError


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
        if reason is not None and not isinstance(reason, str):
            msg = f"reason must be a text, not {_describe(reason)}; a delay is Requeue(delay=…)"
            raise TypeError(msg)
        if isinstance(delay, bool) or not isinstance(delay, int | float | timedelta | None):
            msg = f"delay must be a number of seconds or a timedelta, not {_describe(delay)}"
            raise TypeError(msg)
        if self.seconds is not None and not 0 <= self.seconds < math.inf:
            msg = f"delay must be finite and at least 0 seconds, not {delay!r}"
            raise ValueError(msg)

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


ExceptionResults: TypeAlias = Mapping[type[Exception], MessageResult]


def result_for(error: BaseException, table: ExceptionResults) -> MessageResult | None:
    """Look up an exception by its class, the most specific class first.

    Returns:
        None if the table lists neither its class nor a base class of it.
    """
    for cls in type(error).__mro__:
        if cls in table:
            return table[cls]
    return None


class ResultCollector:
    """Collects the results that a handler yields for one batch, and refuses invalid ones."""

    __slots__ = ("_by_position", "_index", "_missing", "_pairs", "_taken", "messages")

    def __init__(self, messages: Sequence[Message]) -> None:
        self.messages = messages
        self._by_position: list[Result] = []
        self._missing = len(messages)
        self._pairs: dict[int, Result] = {}
        self._index: dict[int, int] | None = None
        self._taken = 0

    def accept(self, item: object) -> None:
        """Take the next yielded item.

        Raises:
            ResultError: It isn't a result, it is one too many, it is for a message of another batch
                or for the same message again, or it mixes the two forms.
        """
        if type(item) is MessageResult and not self._pairs and self._missing:
            # The common case, which occurs once for each message.
            self._by_position.append(item)
            self._missing -= 1
            return
        match item:
            case MessageResult() | Nack() | Requeue():
                self._accept_next(item)
            case (Message() as message, MessageResult() | Nack() | Requeue() as result):
                self._accept_pair(message, result)
            case _:
                msg = (
                    f"{_describe(item)} is not a result: yield a MessageResult, Nack(…) or"
                    " Requeue(…) for each message in turn, or (message, result)"
                )
                raise ResultError(msg)

    def _accept_next(self, result: Result) -> None:
        if self._pairs:
            msg = (
                f"{result!r} was yielded without its message after (message, result):"
                " use one of the two forms for the whole batch"
            )
            raise ResultError(msg)
        if not self._missing:
            count = len(self.messages)
            found = f"result {count + 1}, {result!r}, for a batch of {count}"
            msg = f"{found}: yield one for each message"
            raise ResultError(msg)
        self._by_position.append(result)
        self._missing -= 1

    def _accept_pair(self, message: Message, result: Result) -> None:
        if self._by_position:
            msg = (
                f"({message!r}, {result!r}) was yielded after a result without its message:"
                " use one of the two forms for the whole batch"
            )
            raise ResultError(msg)
        # By identity: a message of another batch can be equal to one of this batch.
        if self._index is None:
            self._index = {id(each): at for at, each in enumerate(self.messages)}
        at = self._index.get(id(message))
        if at is None:
            msg = f"{message!r} is not in this batch: yield results for the messages of the batch"
            raise ResultError(msg)
        if at in self._pairs:
            found = f"a second result, {result!r}, for {message!r}"
            msg = (
                f"{found}: the first one, {self._pairs[at]!r}, is used; yield one for each message"
            )
            raise ResultError(msg)
        self._pairs[at] = result

    @property
    def count(self) -> int:
        """The number of messages that have a result."""
        return len(self._by_position) or len(self._pairs)

    @property
    def all_acked(self) -> bool:
        """Whether every message got an ACK by position, and none of them has been taken.

        A fast check for the common case.
        """
        return (
            not self._missing
            and not self._taken
            and self._by_position.count(MessageResult.ACK) == len(self.messages)
        )

    def decided(self) -> list[tuple[Message, Result]]:
        """The messages with a result, in the order of the batch."""
        if self._pairs:
            return [(self.messages[at], self._pairs[at]) for at in sorted(self._pairs)]
        return list(zip(self.messages, self._by_position, strict=False))

    def take(self) -> list[tuple[Message, Result]]:
        """The messages that got a result since the last call, in the order of the batch.

        :meth:`decided` still returns them.
        """
        taken, self._taken = self._taken, self.count
        if self._pairs:
            fresh = sorted(islice(self._pairs, taken, None))
            return [(self.messages[at], self._pairs[at]) for at in fresh]
        if not taken:
            return self.decided()
        return list(zip(self.messages[taken:], self._by_position[taken:], strict=False))

    def undecided(self) -> list[Message]:
        """The messages without a result, in the order of the batch."""
        if self._pairs:
            return [each for at, each in enumerate(self.messages) if at not in self._pairs]
        return list(self.messages[len(self._by_position) :])


def _describe(item: object) -> str:
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
