"""Defines the refusals with which the broker closes a channel or a connection.

The texts are RabbitMQ's, so a test that reads them reads the same ones in production.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from decimal import Decimal

from aio_pika_batch.core.message import FieldValue
from aio_pika_batch.core.refusals import ReplyCode, refusal_error

_FIRST_CONNECTION_CODE = 500


class Refusal(Exception):
    """The broker refuses what a client asks for, and closes its channel or its connection."""

    def __init__(self, code: ReplyCode, reason: str) -> None:
        self.code = code
        self.text = f"{code.name} - {reason}"
        super().__init__(f"{code} {self.text}")

    @property
    def closes_connection(self) -> bool:
        """Whether it closes the connection and not only the channel."""
        # AMQP 0-9-1 calls these hard errors, and 320 is the only one of them below 500.
        return self.code >= _FIRST_CONNECTION_CODE or self.code is ReplyCode.CONNECTION_FORCED


@contextmanager
def translate_refusals(
    subject: str, if_unequal: str | None = None, if_missing: str | None = None
) -> Iterator[None]:
    """Raise refusals inside the context as the port's errors, with advice."""
    try:
        yield
    except Refusal as refusal:
        code, text = refusal.code, refusal.text
        raise refusal_error(code, text, subject, if_unequal, if_missing) from refusal


def queue_not_found(name: str) -> Refusal:
    """Return the refusal for a queue that does not exist."""
    return Refusal(ReplyCode.NOT_FOUND, f"no queue '{name}' in vhost '/'")


def exchange_not_found(name: str) -> Refusal:
    """Return the refusal for an exchange that does not exist."""
    return Refusal(ReplyCode.NOT_FOUND, f"no exchange '{name}' in vhost '/'")


def default_exchange_not_permitted() -> Refusal:
    """Return the refusal for declaring, binding or unbinding the default exchange."""
    return Refusal(ReplyCode.ACCESS_REFUSED, "operation not permitted on the default exchange")


def queue_locked(name: str) -> Refusal:
    """Return the refusal for using another connection's exclusive queue."""
    return Refusal(
        ReplyCode.RESOURCE_LOCKED,
        f"cannot obtain exclusive access to locked queue '{name}' in vhost '/'. It could be"
        " originally declared on another connection or the exclusive property value does not match"
        " that of the original declaration.",
    )


def queue_in_exclusive_use(name: str) -> Refusal:
    """Return the refusal for a consumer beside an exclusive one, or an exclusive one beside it."""
    return Refusal(ReplyCode.ACCESS_REFUSED, f"queue '{name}' in vhost '/' in exclusive use")


def inequivalent_argument(argument: str, entity: str, received: str, current: str) -> Refusal:
    """Return the refusal for declaring something that exists with another argument."""
    return Refusal(
        ReplyCode.PRECONDITION_FAILED,
        f"inequivalent arg '{argument}' for {entity} in vhost '/':"
        f" received {received} but current is {current}",
    )


def invalid_argument(argument: str, queue: str, reason: str | None = None) -> Refusal:
    """Return the refusal for an argument that the queue does not support, or not with its value."""
    text = f"invalid arg '{argument}' for queue '{queue}' in vhost '/'"
    return Refusal(ReplyCode.PRECONDITION_FAILED, text if reason is None else f"{text}: {reason}")


def format_flag(flag: bool) -> str:  # noqa: FBT001
    """Return a flag as refusals show it."""
    return f"'{str(flag).lower()}'"


def format_value(value: FieldValue) -> str:
    """Return an argument's value and type as refusals show them."""
    if value is None:
        return "none"
    shown = str(value).lower() if isinstance(value, bool) else str(value)
    return f"the value '{shown}' of type '{amqp_type_name(value)}'"


def amqp_type_name(value: FieldValue) -> str:
    """Return RabbitMQ's name for a value's type; an integer has the smallest type that holds it."""
    if isinstance(value, int) and not isinstance(value, bool):
        return next((name for bits, name in _INTEGER_TYPES if value.bit_length() < bits), "long")
    return next(name for types, name in _OTHER_TYPES if isinstance(value, types))


# The types are signed: a byte holds seven bits and the sign.
_INTEGER_TYPES = ((8, "byte"), (16, "short"), (32, "signedint"))
_OTHER_TYPES = (
    (bool, "bool"),
    ((str, bytes), "longstr"),
    (float, "double"),
    (list, "array"),
    (Mapping, "table"),
    (datetime, "timestamp"),
    (Decimal, "decimal"),
    (object, "void"),
)
