"""What does a broker say when it says no?

The codes are AMQP 0-9-1's, the words RabbitMQ's, so that a test which reads them reads the same
ones in production. Codes from 500 on end the whole connection, the others the channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING

from aio_pika_batch.core.refusals import ReplyCode

if TYPE_CHECKING:
    from aio_pika_batch.core.message import FieldValue


_FIRST_HARD = 500


class Refusal(Exception):
    """The broker's no. The channel that it answers is closed."""

    def __init__(self, code: ReplyCode, words: str) -> None:
        self.code = code
        self.text = f"{code.name} - {words}"
        super().__init__(f"{code} {self.text}")

    @property
    def closes_connection(self) -> bool:
        """Whether it ends the connection, and not only the channel."""
        return self.code >= _FIRST_HARD or self.code is ReplyCode.CONNECTION_FORCED


def no_queue(name: str) -> Refusal:
    """There is no such queue."""
    return Refusal(ReplyCode.NOT_FOUND, f"no queue '{name}' in vhost '/'")


def no_exchange(name: str) -> Refusal:
    """There is no such exchange."""
    return Refusal(ReplyCode.NOT_FOUND, f"no exchange '{name}' in vhost '/'")


def on_default_exchange() -> Refusal:
    """The default exchange cannot be declared, bound or unbound."""
    return Refusal(ReplyCode.ACCESS_REFUSED, "operation not permitted on the default exchange")


def locked(name: str) -> Refusal:
    """The queue belongs to another connection."""
    return Refusal(
        ReplyCode.RESOURCE_LOCKED,
        f"cannot obtain exclusive access to locked queue '{name}' in vhost '/'. It could be"
        " originally declared on another connection or the exclusive property value does not match"
        " that of the original declaration.",
    )


def in_exclusive_use(name: str) -> Refusal:
    """Another consumer wants it for itself, or this one does and cannot."""
    return Refusal(ReplyCode.ACCESS_REFUSED, f"queue '{name}' in vhost '/' in exclusive use")


def unequal(argument: str, entity: str, received: str, current: str) -> Refusal:
    """It exists, and is not what was declared."""
    return Refusal(
        ReplyCode.PRECONDITION_FAILED,
        f"inequivalent arg '{argument}' for {entity} in vhost '/':"
        f" received {received} but current is {current}",
    )


def invalid(argument: str, queue: str, why: str) -> Refusal:
    """No broker would have it so."""
    return Refusal(
        ReplyCode.PRECONDITION_FAILED,
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
