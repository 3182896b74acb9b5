"""What does a broker say when it says no?

The codes are AMQP 0-9-1's, the words RabbitMQ's, so that a test which reads them reads the same
ones in production. Codes from 500 on end the whole connection, the others the channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aio_pika_batch.core.message import FieldValue


class Code(Enum):
    """A reply code."""

    CONNECTION_FORCED = 320
    ACCESS_REFUSED = 403
    NOT_FOUND = 404
    RESOURCE_LOCKED = 405
    PRECONDITION_FAILED = 406
    COMMAND_INVALID = 503
    NOT_ALLOWED = 530
    NOT_IMPLEMENTED = 540
    INTERNAL_ERROR = 541


_FIRST_HARD = 500


class Refusal(Exception):
    """The broker's no. The channel that it answers is closed."""

    def __init__(self, code: Code, words: str) -> None:
        super().__init__(f"{code.value} {code.name} - {words}")
        self.code = code
        self.words = words

    @property
    def closes_connection(self) -> bool:
        """Whether it ends the connection, and not only the channel."""
        return self.code.value >= _FIRST_HARD or self.code is Code.CONNECTION_FORCED


def no_queue(name: str) -> Refusal:
    """There is no such queue."""
    return Refusal(Code.NOT_FOUND, f"no queue '{name}' in vhost '/'")


def no_exchange(name: str) -> Refusal:
    """There is no such exchange."""
    return Refusal(Code.NOT_FOUND, f"no exchange '{name}' in vhost '/'")


def locked(name: str) -> Refusal:
    """The queue belongs to another connection."""
    return Refusal(
        Code.RESOURCE_LOCKED,
        f"cannot obtain exclusive access to locked queue '{name}' in vhost '/'. It could be"
        " originally declared on another connection or the exclusive property value does not match"
        " that of the original declaration.",
    )


def in_exclusive_use(name: str) -> Refusal:
    """Another consumer wants it for itself, or this one does and cannot."""
    return Refusal(Code.ACCESS_REFUSED, f"queue '{name}' in vhost '/' in exclusive use")


def unequal(argument: str, entity: str, received: str, current: str) -> Refusal:
    """It exists, and is not what was declared."""
    return Refusal(
        Code.PRECONDITION_FAILED,
        f"inequivalent arg '{argument}' for {entity} in vhost '/':"
        f" received {received} but current is {current}",
    )


def invalid(argument: str, queue: str, why: str) -> Refusal:
    """No broker would have it so."""
    return Refusal(
        Code.PRECONDITION_FAILED,
        f"invalid arg '{argument}' for queue '{queue}' in vhost '/': {why}",
    )


def told(value: FieldValue) -> str:
    """A value in the words of a refusal."""
    return "none" if value is None else f"the value '{_plain(value)}' of type '{type_name(value)}'"


def _plain(value: FieldValue) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def type_name(value: FieldValue) -> str:
    """What RabbitMQ calls the type of a value; of a whole number, the smallest that holds it."""
    if isinstance(value, int) and not isinstance(value, bool):
        return next((name for limit, name in _WIDTHS if value.bit_length() < limit), "long")
    return next(name for kind, name in _TYPES if isinstance(value, kind))


_WIDTHS = ((8, "byte"), (16, "short"), (32, "signedint"))
_TYPES = (
    (bool, "bool"),
    ((str, bytes), "longstr"),
    (float, "double"),
    (list, "array"),
    (Mapping, "table"),
    (datetime, "timestamp"),
    (Decimal, "decimal"),
    (object, "void"),
)
