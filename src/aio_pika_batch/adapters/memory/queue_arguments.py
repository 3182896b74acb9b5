"""Parses and checks the arguments of a queue, and compares them with those of an earlier declare.

As RabbitMQ does, it refuses an argument that the queue's type does not support or a value that is
out of range, and ignores an argument that RabbitMQ does not know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from aio_pika_batch.adapters.memory.rabbitmq import (
    Refusal,
    VersionRules,
    amqp_type_name,
    format_value,
    inequivalent_argument,
    invalid_argument,
)
from aio_pika_batch.core.message import FieldValue, Headers
from aio_pika_batch.core.refusals import ReplyCode


class QueueType(Enum):
    """A type of queue; streams are not imitated."""

    CLASSIC = "classic"
    QUORUM = "quorum"


class Overflow(Enum):
    """What a queue does when it is at its `x-max-length`."""

    DROP_HEAD = "drop-head"
    REJECT_PUBLISH = "reject-publish"
    REJECT_PUBLISH_DLX = "reject-publish-dlx"


_TYPE = "x-queue-type"
_OF_ALL_TYPES = frozenset(
    {
        _TYPE,
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
_OF_ONE_TYPE = {
    QueueType.CLASSIC: frozenset({"x-max-priority", "x-queue-mode", "x-queue-version"}),
    QueueType.QUORUM: frozenset({"x-delivery-limit", "x-dead-letter-strategy"}),
}
# Two declarations are compared by these arguments only.
_KNOWN = _OF_ALL_TYPES.union(*_OF_ONE_TYPE.values())
_OVERFLOWS = tuple(each.value for each in Overflow)
_STRATEGIES = ("at-most-once", "at-least-once")
_MAX_TTL = 4_294_967_295
_MAX_PRIORITY = 255


@dataclass(frozen=True, slots=True)
class QueueSpec:
    """A queue's arguments, parsed.

    Attributes:
        message_ttl: Seconds.
        expires: Seconds without use after which the queue is deleted.
        delivery_limit: None: no limit.
        at_least_once: Whether a dead letter is kept until another queue has taken it.
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


def parse_arguments(queue: str, arguments: Headers, rules: VersionRules) -> QueueSpec:
    """Parse and check the arguments of a queue.

    Raises:
        Refusal: One of them is not supported, or its value is invalid.
    """
    queue_type = _parse_type(queue, arguments)
    is_quorum = queue_type is QueueType.QUORUM
    for other_type, names in _OF_ONE_TYPE.items():
        for name in sorted(names & arguments.keys()):
            if other_type is not queue_type:
                raise Refusal(
                    ReplyCode.PRECONDITION_FAILED,
                    f"invalid arg '{name}' for queue '{queue}' in vhost '/' of queue type"
                    f" rabbit_{queue_type.value}_queue",
                )
    parser = _ArgumentParser(queue, arguments)
    never_expires = is_quorum and not rules.quorum_expires
    if never_expires and "x-message-ttl" in arguments:
        raise invalid_argument("x-message-ttl", queue)
    exchange = parser.text("x-dead-letter-exchange")
    routing_key = parser.text("x-dead-letter-routing-key")
    if routing_key is not None and exchange is None:
        raise invalid_argument("x-dead-letter-routing-key", queue, "routing_key_but_no_dlx_defined")
    overflow = Overflow(parser.choice("x-overflow", _OVERFLOWS) or Overflow.DROP_HEAD)
    if never_expires and overflow is not Overflow.DROP_HEAD:
        raise invalid_argument("x-overflow", queue)
    if is_quorum and overflow is Overflow.REJECT_PUBLISH_DLX:
        # RabbitMQ accepts it and drops the head.
        overflow = Overflow.DROP_HEAD
    strategy = parser.choice("x-dead-letter-strategy", _STRATEGIES)
    delivery_limit = rules.default_delivery_limit if is_quorum else None
    stated_limit = parser.number("x-delivery-limit", minimum=-1)
    if stated_limit is not None:
        # -1 lifts the default limit. Before 4.0 there is none, and every return is above -1.
        is_lifted = stated_limit < 0 and rules.default_delivery_limit is not None
        delivery_limit = None if is_lifted else stated_limit
    return QueueSpec(
        type=queue_type,
        message_ttl=_to_seconds(parser.number("x-message-ttl", maximum=_MAX_TTL)),
        expires=_to_seconds(parser.number("x-expires", minimum=1, maximum=_MAX_TTL)),
        max_length=parser.number("x-max-length"),
        max_bytes=parser.number("x-max-length-bytes"),
        overflow=overflow,
        dead_letter_exchange=exchange,
        dead_letter_routing_key=routing_key,
        delivery_limit=delivery_limit,
        max_priority=parser.number("x-max-priority", maximum=_MAX_PRIORITY) or 0,
        single_active=parser.flag("x-single-active-consumer"),
        # Without reject-publish RabbitMQ logs a warning and falls back to at-most-once.
        at_least_once=(
            rules.quorum_expires
            and strategy == "at-least-once"
            and exchange is not None
            and overflow is Overflow.REJECT_PUBLISH
        ),
    )


def _parse_type(queue: str, arguments: Headers) -> QueueType:
    stated = arguments.get(_TYPE, QueueType.CLASSIC.value)
    if stated == "stream":
        raise Refusal(
            ReplyCode.NOT_IMPLEMENTED,
            "the broker in memory has no streams; use a classic or a quorum queue",
        )
    try:
        return QueueType(stated)
    except ValueError:
        reason = f"\"unsupported queue type '{stated!s}'\""
        raise invalid_argument(_TYPE, queue, reason) from None


def _to_seconds(milliseconds: int | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def check_same_arguments(queue: str, received: Headers, current: Headers) -> None:
    """Compare the arguments of two declarations of one queue.

    Raises:
        Refusal: They differ.
    """
    for name in sorted((received.keys() | current.keys()) & _KNOWN):
        # A classic queue may be declared with or without its type.
        default = QueueType.CLASSIC.value if name == _TYPE else None
        one, other = received.get(name, default), current.get(name, default)
        # 1 and True are equal in Python but not in AMQP.
        if type(one) is type(other) and one == other:
            continue
        shown = (
            (f"'{one!s}'", f"'{other!s}'")
            if name == _TYPE
            else (format_value(one), format_value(other))
        )
        raise inequivalent_argument(name, f"queue '{queue}'", *shown)


class _ArgumentParser:
    """Reads single arguments, and checks their types and ranges."""

    def __init__(self, queue: str, arguments: Headers) -> None:
        self._queue = queue
        self._arguments = arguments

    def number(self, name: str, *, minimum: int = 0, maximum: int | None = None) -> int | None:
        value = self._arguments.get(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong_type(name, "integer", value)
        reason = None
        if value < minimum:
            reason = f"{{value_{'negative' if value else 'zero'},{value}}}"
        elif maximum is not None and value > maximum:
            reason = f"{{value_too_large,{value}}}"
        if reason is not None:
            raise invalid_argument(name, self._queue, reason)
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
        reason = f"invalid_{name.removeprefix('x-').replace('-', '_')}"
        raise invalid_argument(name, self._queue, reason)

    def flag(self, name: str) -> bool:
        value = self._arguments.get(name, False)
        if isinstance(value, bool):
            return value
        raise self._wrong_type(name, "boolean", value)

    def _wrong_type(self, name: str, expected: str, value: FieldValue) -> Refusal:
        reason = f'"expected {expected}, got {amqp_type_name(value)}"'
        return invalid_argument(name, self._queue, reason)
