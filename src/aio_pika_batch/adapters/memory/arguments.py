"""What do the arguments of a queue say, and are they the same as those it was declared with?

Checked when a queue is declared, as RabbitMQ does: an argument that the queue's type does not know,
or a value out of its range, is refused; an argument that RabbitMQ has never heard of is taken and
ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from aio_pika_batch.adapters.memory.refusals import (
    Refusal,
    invalid,
    told,
    type_name,
    unequal,
)
from aio_pika_batch.core.refusals import ReplyCode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aio_pika_batch.adapters.memory.versions import Dialect
    from aio_pika_batch.core.message import FieldValue, Headers


class QueueType(Enum):
    """A kind of queue; streams are not imitated."""

    CLASSIC = "classic"
    QUORUM = "quorum"


class Overflow(Enum):
    """What happens at `x-max-length`."""

    DROP_HEAD = "drop-head"
    REJECT_PUBLISH = "reject-publish"
    REJECT_PUBLISH_DLX = "reject-publish-dlx"


TYPE = "x-queue-type"
_BOTH = frozenset(
    {
        TYPE,
        "x-dead-letter-exchange",
        "x-dead-letter-routing-key",
        "x-message-ttl",
        "x-max-length",
        "x-max-length-bytes",
        "x-overflow",
        "x-expires",
        "x-single-active-consumer",
    }
)
_ONLY = {
    QueueType.CLASSIC: frozenset({"x-max-priority", "x-queue-mode", "x-queue-version"}),
    QueueType.QUORUM: frozenset({"x-delivery-limit", "x-dead-letter-strategy"}),
}
_KNOWN = _BOTH.union(*_ONLY.values())
_OVERFLOWS = tuple(each.value for each in Overflow)
_LONGEST_TTL = 4_294_967_295
_HIGHEST_PRIORITY = 255


@dataclass(frozen=True, slots=True)
class Spec:
    """What a queue's arguments say, in the broker's own terms.

    Attributes:
        message_ttl: Seconds.
        expires: Seconds without use after which the queue goes.
        delivery_limit: None: no limit.
        at_least_once: Whether a dead letter stays until its new queue has it.
    """

    type: QueueType
    message_ttl: float | None
    expires: float | None
    max_length: int | None
    max_bytes: int | None
    overflow: Overflow
    dead_letter_exchange: str | None
    dead_letter_routing_key: str | None
    delivery_limit: int | None
    max_priority: int
    single_active: bool
    at_least_once: bool


def queue_type(name: str, arguments: Headers) -> QueueType:
    """The type that a queue's arguments ask for.

    Raises:
        Refusal: It is not known, or not imitated.
    """
    stated = arguments.get(TYPE, QueueType.CLASSIC.value)
    if stated == "stream":
        raise Refusal(
            ReplyCode.NOT_IMPLEMENTED,
            "the broker in memory has no streams; use a classic or a quorum queue",
        )
    try:
        return QueueType(stated)
    except ValueError:
        words = f"\"unsupported queue type '{stated!s}'\""
        raise invalid(TYPE, name, words) from None


def spec(name: str, arguments: Headers, dialect: Dialect) -> Spec:
    """Read and check arguments.

    Raises:
        Refusal: One of them cannot be had.
    """
    of_type = queue_type(name, arguments)
    for other, only in _ONLY.items():
        for argument in sorted(only & arguments.keys()):
            if other is not of_type:
                raise Refusal(
                    ReplyCode.PRECONDITION_FAILED,
                    f"invalid arg '{argument}' for queue '{name}' in vhost '/' of queue type"
                    f" rabbit_{of_type.value}_queue",
                )
    read = _Reader(name, arguments)
    keeps_all = of_type is QueueType.QUORUM and not dialect.quorum_expires
    if keeps_all and "x-message-ttl" in arguments:
        raise _unknown("x-message-ttl", name)
    exchange = read.text("x-dead-letter-exchange")
    routing_key = read.text("x-dead-letter-routing-key")
    if routing_key is not None and exchange is None:
        raise invalid("x-dead-letter-routing-key", name, "routing_key_but_no_dlx_defined")
    overflow = Overflow(read.choice("x-overflow", _OVERFLOWS) or Overflow.DROP_HEAD)
    if keeps_all and overflow is not Overflow.DROP_HEAD:
        raise _unknown("x-overflow", name)
    if of_type is QueueType.QUORUM and overflow is Overflow.REJECT_PUBLISH_DLX:
        # RabbitMQ takes it, and drops the head.
        overflow = Overflow.DROP_HEAD
    strategy = read.choice("x-dead-letter-strategy", ("at-most-once", "at-least-once"))
    limit = dialect.quorum_limit if of_type is QueueType.QUORUM else None
    stated = read.number("x-delivery-limit", least=-1)
    if stated is not None:
        limit = None if stated < 0 else stated
    return Spec(
        type=of_type,
        message_ttl=_seconds(read.number("x-message-ttl", most=_LONGEST_TTL)),
        expires=_seconds(read.number("x-expires", least=1, most=_LONGEST_TTL)),
        max_length=read.number("x-max-length"),
        max_bytes=read.number("x-max-length-bytes"),
        overflow=overflow,
        dead_letter_exchange=exchange,
        dead_letter_routing_key=routing_key,
        delivery_limit=limit,
        max_priority=read.number("x-max-priority", most=_HIGHEST_PRIORITY) or 0,
        single_active=read.flag("x-single-active-consumer"),
        # Without reject-publish RabbitMQ falls back to at-most-once, with a line in its log.
        at_least_once=(
            dialect.quorum_expires
            and strategy == "at-least-once"
            and exchange is not None
            and overflow is Overflow.REJECT_PUBLISH
        ),
    )


def check_same_arguments(name: str, received: Headers, current: Headers) -> None:
    """Compare the arguments of two declarations of one queue.

    Raises:
        Refusal: They are not the same.
    """
    for argument in sorted((received.keys() | current.keys()) & _KNOWN):
        default = QueueType.CLASSIC.value if argument == TYPE else None
        one, other = received.get(argument, default), current.get(argument, default)
        if type(one) is type(other) and one == other:
            continue
        words = (f"'{one!s}'", f"'{other!s}'") if argument == TYPE else (told(one), told(other))
        raise unequal(argument, f"queue '{name}'", *words)


def _unknown(argument: str, queue: str) -> Refusal:
    return Refusal(
        ReplyCode.PRECONDITION_FAILED, f"invalid arg '{argument}' for queue '{queue}' in vhost '/'"
    )


def _seconds(milliseconds: int | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


class _Reader:
    """Reads values out of arguments, each with its check."""

    def __init__(self, queue: str, arguments: Headers) -> None:
        self._queue = queue
        self._arguments = arguments

    def number(self, name: str, *, least: int = 0, most: int | None = None) -> int | None:
        value = self._arguments.get(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong_type(name, "integer", value)
        if value < least:
            raise invalid(name, self._queue, f"{{value_{'negative' if value else 'zero'},{value}}}")
        if most is not None and value > most:
            raise invalid(name, self._queue, f"{{value_too_large,{value}}}")
        return value

    def text(self, name: str) -> str | None:
        value = self._arguments.get(name)
        if value is None or isinstance(value, str):
            return value
        raise self._wrong_type(name, "longstr", value)

    def choice(self, name: str, choices: Sequence[str]) -> str | None:
        value = self.text(name)
        if value is None or value in choices:
            return value
        raise invalid(name, self._queue, f"invalid_{name.removeprefix('x-').replace('-', '_')}")

    def flag(self, name: str) -> bool:
        value = self._arguments.get(name, False)
        if isinstance(value, bool):
            return value
        raise self._wrong_type(name, "boolean", value)

    def _wrong_type(self, name: str, expected: str, value: FieldValue) -> Refusal:
        return invalid(name, self._queue, f'"expected {expected}, got {type_name(value)}"')
