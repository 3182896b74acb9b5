"""Which answer belongs to which message?

The i-th yield is the i-th message's, or a handler that works out of order yields `(message,
result)`; a batch sees one form or the other. What was validly decided before a mistake stays
decided, and a result that is missing is never an ACK.
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
    """What shall become of a message."""

    ACK = "ack"
    """Done: remove it from the queue."""
    NACK = "nack"
    """Bad: dead-letter it, do not try again."""
    REQUEUE = "requeue"
    """Failed for now: try again from the back of the queue, after the wait that `requeue_delay`
    asks for; `max_requeue_attempts` times at most."""
    REQUEUE_IMMEDIATE = "requeue_immediate"
    """Try again from the front of the queue, counted by nobody but (newer) brokers themselves."""


@dataclass(frozen=True, slots=True)
class Nack:
    """`MessageResult.NACK`, and why.

    Args:
        reason: Goes into the header `x-dead-letter-detail` of the dead letter.
    """

    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Requeue:
    """`MessageResult.REQUEUE`, and why, and when.

    Args:
        reason: Goes into the header `x-dead-letter-detail`, should this have been the last attempt.
        delay: Seconds to wait for the next attempt, or a timedelta: the nearest level at or above,
            at most `requeue_delay_max`. 0: at once. None: as `requeue_delay` says.
    """

    reason: str | None = None
    delay: float | timedelta | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse what is no reason and no delay, where it is made."""
        reason: object = self.reason
        delay: object = self.delay
        if reason is not None and not isinstance(reason, str):
            msg = f"reason must be a text, not {_named(reason)}: a delay is Requeue(delay=…)"
            raise TypeError(msg)
        if isinstance(delay, bool) or not isinstance(delay, int | float | timedelta | None):
            msg = f"delay must be a number of seconds or a timedelta, not {_named(delay)}"
            raise TypeError(msg)
        if self.seconds is not None and not 0 <= self.seconds < math.inf:
            msg = f"delay must be 0 or more seconds, and finite, not {delay!r}"
            raise ValueError(msg)

    @property
    def seconds(self) -> float | None:
        """The delay in seconds, if one is given."""
        delay = self.delay
        return delay.total_seconds() if isinstance(delay, timedelta) else delay


Result: TypeAlias = MessageResult | Nack | Requeue
"""What a handler may yield for a message."""


def is_retry(result: Result) -> bool:
    """Whether it asks for another attempt."""
    match result:
        case MessageResult.REQUEUE | MessageResult.REQUEUE_IMMEDIATE | Requeue():
            return True
        case MessageResult.ACK | MessageResult.NACK | Nack():
            return False
        case unreachable:
            assert_never(unreachable)


class Cause(Enum):
    """Who decided a result."""

    HANDLER = "handler"
    """The handler yielded it."""
    EXCEPTION = "exception"
    """The handler raised before it decided this one."""
    TIMEOUT = "timeout"
    """The handler ran into `process_timeout`."""
    MISSING = "missing"
    """The handler ended without deciding this one."""
    INVALID = "invalid"
    """The handler yielded something that is no answer."""
    UNDECODABLE = "undecodable"
    """The message itself cannot be decoded."""
    SHUTDOWN = "shutdown"
    """A shutdown ran out of time."""


# Not frozen: one is made for each failed message, and freezing makes that three times as dear.
@dataclass(slots=True)
class MessageOutcome:
    """A message and what was decided about it.

    Attributes:
        error: The exception behind the decision, if there was one.
    """

    message: Message
    result: Result
    cause: Cause = Cause.HANDLER
    error: BaseException | None = None


ExceptionResults: TypeAlias = Mapping[type[Exception], MessageResult]


def result_for(error: BaseException, table: ExceptionResults) -> MessageResult | None:
    """Look an exception up by its class, the most specific class first.

    Returns:
        None where neither its class nor a base class of it is listed.
    """
    for cls in type(error).__mro__:
        if cls in table:
            return table[cls]
    return None


class ResultCollector:
    """Takes what a handler yields for one batch, and refuses what is no answer to it."""

    __slots__ = ("_by_position", "_index", "_pairs", "_room", "_taken", "messages")

    def __init__(self, messages: Sequence[Message]) -> None:
        self.messages = messages
        self._by_position: list[Result] = []
        self._room = len(messages)
        self._pairs: dict[int, Result] = {}
        self._index: dict[int, int] | None = None
        self._taken = 0

    def accept(self, item: object) -> None:
        """Take the next yield.

        Raises:
            ResultError: It is no result, one too many, for a foreign message or for the same
                message again, or it mixes the two forms. Nothing decided before is changed.
        """
        if type(item) is MessageResult and not self._pairs and self._room:
            # What nearly always happens, once for each message.
            self._by_position.append(item)
            self._room -= 1
            return
        match item:
            case MessageResult() | Nack() | Requeue():
                self._accept_next(item)
            case (Message() as message, MessageResult() | Nack() | Requeue() as result):
                self._accept_pair(message, result)
            case _:
                msg = (
                    f"{_named(item)} is no result: yield a MessageResult, Nack(…) or Requeue(…) for"
                    " each message in turn, or (message, result)"
                )
                raise ResultError(msg)

    def _accept_next(self, result: Result) -> None:
        if self._pairs:
            msg = (
                f"{result!r} came without its message after (message, result):"
                " the two forms do not mix in one batch"
            )
            raise ResultError(msg)
        if not self._room:
            count = len(self.messages)
            found = f"result {count + 1}, {result!r}, for a batch of {count}"
            msg = f"{found}: yield one for each message"
            raise ResultError(msg)
        self._by_position.append(result)
        self._room -= 1

    def _accept_pair(self, message: Message, result: Result) -> None:
        if self._by_position:
            msg = (
                f"({message!r}, {result!r}) came after a result without its message:"
                " the two forms do not mix in one batch"
            )
            raise ResultError(msg)
        if self._index is None:
            self._index = {id(each): at for at, each in enumerate(self.messages)}
        at = self._index.get(id(message))
        if at is None:
            msg = f"{message!r} is not in this batch: yield results for the messages you were given"
            raise ResultError(msg)
        if at in self._pairs:
            found = f"a second result, {result!r}, for {message!r}"
            msg = f"{found}: the first, {self._pairs[at]!r}, stays"
            raise ResultError(msg)
        self._pairs[at] = result

    @property
    def count(self) -> int:
        """How many messages are decided."""
        return len(self._by_position) or len(self._pairs)

    @property
    def all_acked(self) -> bool:
        """Whether the i-th yield was an ACK for each i, and none of them has been taken; a cheap
        question for the common case.
        """
        return (
            not self._room
            and not self._taken
            and self._by_position.count(MessageResult.ACK) == len(self.messages)
        )

    def decided(self) -> list[tuple[Message, Result]]:
        """The messages with a result, in the order of the batch."""
        if self._pairs:
            return [(self.messages[at], self._pairs[at]) for at in sorted(self._pairs)]
        return list(zip(self.messages, self._by_position, strict=False))

    def take(self) -> list[tuple[Message, Result]]:
        """The messages that have got a result since this was last asked, in the order of the batch.

        They are decided all the same.
        """
        taken, self._taken = self._taken, self.count
        if self._pairs:
            fresh = sorted(islice(self._pairs, taken, None))
            return [(self.messages[at], self._pairs[at]) for at in fresh]
        if not taken:
            return self.decided()
        return list(zip(self.messages[taken:], self._by_position[taken:], strict=False))

    def undecided(self) -> list[Message]:
        """The messages without one, in the order of the batch."""
        if self._pairs:
            return [each for at, each in enumerate(self.messages) if at not in self._pairs]
        return list(self.messages[len(self._by_position) :])


def _named(item: object) -> str:
    """Name what is no answer, without what may be a message's body: that would go into logs."""
    if isinstance(item, tuple) and len(item) == 2:  # noqa: PLR2004  -- (message, result), nearly
        return f"({_word_for(item[0])}, {_word_for(item[1])})"
    return _word_for(item)


def _word_for(item: object) -> str:
    match item:
        case None | bool() | float() | Message() | MessageResult():
            return repr(item)
        case int() if abs(item) < 10**18:
            return repr(item)
        case str() if item.strip().upper() in MessageResult.__members__:
            return repr(item)
        case _:
            return f"something of {type(item)}"
