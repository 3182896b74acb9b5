"""What may a message hold, and whose is it?

The broker's: what comes in is checked and copied, and what goes out is a copy again, so that
neither a publisher nor a consumer can change what is stored. Values survive exactly, and what is
absent stays absent; only a timestamp loses its fraction of a second, as it does on the wire.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING

from aio_pika_batch.adapters.memory.refusals import Refusal, type_name
from aio_pika_batch.core.message import SHORT_STRING, FieldValue, Headers, Properties
from aio_pika_batch.core.refusals import ReplyCode

if TYPE_CHECKING:
    from aio_pika_batch.adapters.memory.dead_lettering import Death

_SHORT_STRINGS = (
    "content_type",
    "content_encoding",
    "correlation_id",
    "reply_to",
    "expiration",
    "message_id",
    "type",
    "user_id",
    "app_id",
    "cluster_id",
)
_OCTET = 255
_LONGEST_INTEGER = 64
_LONGEST_EXPIRATION = 4_294_967_295


@dataclass(frozen=True, slots=True)
class Stored:
    """A message as the broker keeps it.

    Attributes:
        routing_keys: The publication's own key, then those in its `CC` and `BCC`.
        deaths: How often and where it was dead-lettered; the latest first.
        seen: Whether a consumer has had it before, in another queue.
    """

    body: bytes
    properties: Properties
    exchange: str
    routing_keys: tuple[str, ...]
    deaths: tuple[Death, ...] = ()
    seen: bool = False

    @property
    def routing_key(self) -> str:
        """The key that consumers see."""
        return self.routing_keys[0]

    @property
    def ttl(self) -> float | None:
        """Its own time to live, in seconds."""
        expiration = self.properties.expiration
        return None if expiration is None else int(expiration) / 1000

    @property
    def headers(self) -> Headers:
        """The headers; empty where there are none. Not to be changed."""
        return self.properties.headers or {}


def short(what: str, value: object) -> str:
    """Check a short string.

    Raises:
        TypeError: It is no string.
        ValueError: It is too long, or not to be encoded.
    """
    if not isinstance(value, str):
        raise TypeError(f"{what} is a str, not {value!r}")
    if len(value.encode()) > SHORT_STRING:
        raise ValueError(f"{what} has {len(value.encode())} bytes; AMQP allows {SHORT_STRING}")
    return value


def _checked(properties: Properties) -> Properties:
    for name in _SHORT_STRINGS:
        value = getattr(properties, name)
        if value is not None:
            short(name, value)
    for name in ("priority", "delivery_mode"):
        value = getattr(properties, name)
        if value is not None and not (type(value) is int and 0 <= value <= _OCTET):
            raise ValueError(f"{name} is an int from 0 to {_OCTET}, not {value!r}")
    timestamp = properties.timestamp
    headers = properties.headers
    return replace(
        properties,
        timestamp=None if timestamp is None else _to_the_second(timestamp),
        headers=None if headers is None else _checked_table(headers, "headers"),
        undecodable={},
    )


def _to_the_second(value: object) -> datetime:
    if not isinstance(value, datetime):
        raise TypeError(f"a timestamp is a datetime, not {value!r}")
    if value.tzinfo is None:
        value = value.replace(tzinfo=UTC)
    return value.astimezone(UTC).replace(microsecond=0)


def _checked_table(table: Headers, where: str) -> dict[str, FieldValue]:
    if not isinstance(table, Mapping):
        raise TypeError(f"{where} is a mapping, not {table!r}")
    return {
        short(f"a name in {where}", name): _checked_value(value, f"{where}[{name!r}]")
        for name, value in table.items()
    }


def _checked_value(value: FieldValue, where: str) -> FieldValue:
    match value:
        case None | bool() | float() | str() | bytes() | Decimal():
            return value
        case int():
            if value.bit_length() >= _LONGEST_INTEGER:
                raise ValueError(f"{where} has no place in 64 bits: {value}")
            return value
        case datetime():
            return _to_the_second(value)
        case list():
            return [_checked_value(item, f"{where}[{at}]") for at, item in enumerate(value)]
        case Mapping():
            return _checked_table(value, where)
    raise TypeError(f"{where}: AMQP has no type for {value!r}")


def copied_headers(headers: Headers) -> dict[str, FieldValue]:
    """A copy that its owner may change at will."""
    return {name: _copied(value) for name, value in headers.items()}


def _copied(value: FieldValue) -> FieldValue:
    match value:
        case list():
            return [_copied(item) for item in value]
        case Mapping():
            return copied_headers(value)
        case _:
            return value


@dataclass(frozen=True, slots=True)
class Letter:
    """A publication as it leaves its client: checked, and the broker's own copy."""

    exchange: str
    routing_key: str
    body: bytes
    properties: Properties


def letter(exchange: str, routing_key: str, body: bytes, properties: Properties) -> Letter:
    """Check and copy a publication.

    Raises:
        TypeError: A value is of a type that AMQP does not have.
        ValueError: A value is out of the range that AMQP allows.
    """
    if not isinstance(body, bytes | bytearray | memoryview):
        raise TypeError(f"a body is bytes, not {type(body).__name__}")
    return Letter(
        short("an exchange", exchange),
        short("a routing key", routing_key),
        bytes(body),
        _checked(properties),
    )


def stored(letter: Letter, user: str) -> Stored:
    """What the broker keeps of a publication.

    Raises:
        Refusal: The broker closes the channel over it.
    """
    own = letter.properties
    expiration = own.expiration
    if expiration is not None and not (
        expiration.isascii() and expiration.isdigit() and int(expiration) <= _LONGEST_EXPIRATION
    ):
        why = f"{{value_negative,{expiration}}}" if expiration[:1] == "-" else "no_integer"
        raise Refusal(ReplyCode.PRECONDITION_FAILED, f"invalid expiration '{expiration}': {why}")
    if own.user_id is not None and own.user_id != user:
        raise Refusal(
            ReplyCode.PRECONDITION_FAILED,
            f"user_id property set to '{own.user_id}' but authenticated user was '{user}'",
        )
    keys = (letter.routing_key, *_more_keys(own, "CC"), *_more_keys(own, "BCC"))
    if own.headers is not None and "BCC" in own.headers:
        # Blind: no consumer sees it.
        own = replace(own, headers={k: v for k, v in own.headers.items() if k != "BCC"})
    return Stored(letter.body, own, letter.exchange, keys)


def _more_keys(properties: Properties, header: str) -> tuple[str, ...]:
    value = (properties.headers or {}).get(header)
    if value is None:
        return ()
    if not isinstance(value, list):
        raise Refusal(
            ReplyCode.PRECONDITION_FAILED,
            f'invalid message: {{unacceptable_type_in_header,"{header}",{type_name(value)}}}',
        )
    return tuple(key for key in value if isinstance(key, str))
