"""Defines messages as the broker stores them, checks publications, and makes dead letters.

A publication is checked and copied on its way in, and copied again on its way out, so that neither
a publisher nor a consumer can change what is stored. Values stay exactly the same, and absent ones
stay absent; only a timestamp loses its fraction of a second, as it does in AMQP.

Dead letters follow RabbitMQ: `x-death` has one table for each queue and reason, the latest first,
with a count. A message that would return to a queue without having been rejected on its way is
dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum

from aio_pika_batch.adapters.memory.rabbitmq import Refusal, VersionRules, amqp_type_name
from aio_pika_batch.core.message import SHORT_STRING, FieldValue, Headers, Properties
from aio_pika_batch.core.refusals import ReplyCode

_OCTETS = ("priority", "delivery_mode")
_SHORT_STRINGS = [
    each.name
    for each in fields(Properties)
    if each.name not in {*_OCTETS, "headers", "timestamp", "undecodable"}
]
_MAX_OCTET = 255
_INTEGER_BITS = 64
_MAX_EXPIRATION = 4_294_967_295


class DeathReason(Enum):
    """Why a message was dead-lettered."""

    REJECTED = "rejected"
    EXPIRED = "expired"
    MAXLEN = "maxlen"
    DELIVERY_LIMIT = "delivery_limit"


@dataclass(frozen=True, slots=True)
class Death:
    """One table of `x-death`; the fields are its keys.

    Attributes:
        reason: The value of a :class:`DeathReason`, or what a client has written there.
        original_expiration: The message's own expiration, which dead-lettering removes.
    """

    queue: str
    reason: str
    count: int
    exchange: str
    routing_keys: tuple[str, ...]
    time: datetime
    original_expiration: str | None = None

    @property
    def table(self) -> dict[str, FieldValue]:
        """The table in the header."""
        table: dict[str, FieldValue] = {
            "count": self.count,
            "exchange": self.exchange,
            "queue": self.queue,
            "reason": self.reason,
            "routing-keys": list(self.routing_keys),
            "time": self.time,
        }
        if self.original_expiration is not None:
            table["original-expiration"] = self.original_expiration
        return table


@dataclass(frozen=True, slots=True)
class StoredMessage:
    """A message as the broker stores it.

    Attributes:
        routing_keys: The publication's own routing key, then those in its `CC` and `BCC` headers.
        deaths: Where and how often it was dead-lettered, the latest first.
        delivery_count: How many deliveries by other queues have failed, if this is counted.
    """

    body: bytes
    properties: Properties
    exchange: str
    routing_keys: tuple[str, ...]
    deaths: tuple[Death, ...] = ()
    delivery_count: int = 0

    @property
    def routing_key(self) -> str:
        """The routing key that consumers see."""
        return self.routing_keys[0]

    @property
    def ttl(self) -> float | None:
        """The message's own time to live, in seconds."""
        # A string of digits, as `store_publication` has checked.
        expiration = self.properties.expiration
        return None if expiration is None else int(expiration) / 1000

    @property
    def headers(self) -> Headers:
        """The headers, not to be changed; empty if there are none."""
        return self.properties.headers or {}

    def with_headers(self, headers: Headers) -> StoredMessage:
        """The same message with further headers, which replace its own of the same name."""
        if not headers:
            return self
        properties = replace(self.properties, headers={**self.headers, **headers})
        return replace(self, properties=properties)


# --- publications --------------------------------------------------------------


def check_publication(
    exchange: str, routing_key: str, body: bytes, properties: Properties
) -> StoredMessage:
    """Check what a client library would fail to encode, and return a copy, as it leaves its client.

    Raises:
        TypeError: A value is of a type that AMQP does not have.
        ValueError: A value is out of the range that AMQP allows.
    """
    if not isinstance(body, bytes | bytearray | memoryview):
        raise TypeError(f"a body must be bytes, not {type(body).__name__}")
    check_short_string("an exchange", exchange)
    check_short_string("a routing key", routing_key)
    return StoredMessage(bytes(body), _check_properties(properties), exchange, (routing_key,))


def store_publication(publication: StoredMessage, user: str) -> StoredMessage:
    """Check what the broker would refuse, and return the message to store.

    Raises:
        Refusal: The broker closes the channel.
    """
    properties = publication.properties
    expiration = properties.expiration
    if expiration is not None and not (
        expiration.isascii() and expiration.isdigit() and int(expiration) <= _MAX_EXPIRATION
    ):
        reason = f"{{value_negative,{expiration}}}" if expiration[:1] == "-" else "no_integer"
        raise Refusal(ReplyCode.PRECONDITION_FAILED, f"invalid expiration '{expiration}': {reason}")
    if properties.user_id is not None and properties.user_id != user:
        raise Refusal(
            ReplyCode.PRECONDITION_FAILED,
            f"user_id property set to '{properties.user_id}' but authenticated user was '{user}'",
        )
    headers = publication.headers
    more_keys = _routing_keys_in(headers, "CC") + _routing_keys_in(headers, "BCC")
    if "BCC" in headers:
        # A blind copy: the broker removes the header before it routes the message.
        headers = {name: value for name, value in headers.items() if name != "BCC"}
        properties = replace(properties, headers=headers)
    return replace(
        publication, properties=properties, routing_keys=publication.routing_keys + more_keys
    )


def _routing_keys_in(headers: Headers, header: str) -> tuple[str, ...]:
    value = headers.get(header)
    if not (value is None or isinstance(value, list)):
        raise Refusal(
            ReplyCode.PRECONDITION_FAILED,
            f'invalid message: {{unacceptable_type_in_header,"{header}",{amqp_type_name(value)}}}',
        )
    return _strings(value)


def _strings(value: FieldValue) -> tuple[str, ...]:
    return tuple(each for each in value if isinstance(each, str)) if isinstance(value, list) else ()


def check_short_string(what: str, value: object) -> str:
    """Return a value that AMQP can encode as a short string.

    Raises:
        TypeError: It is not a string.
        ValueError: It is too long, or can't be encoded.
    """
    if not isinstance(value, str):
        raise TypeError(f"{what} must be a str, not {value!r}")
    size = len(value.encode())
    if size > SHORT_STRING:
        raise ValueError(f"{what} has {size} bytes; AMQP allows {SHORT_STRING}")
    return value


def _check_properties(properties: Properties) -> Properties:
    for name in _SHORT_STRINGS:
        value = getattr(properties, name)
        if value is not None:
            check_short_string(name, value)
    for name in _OCTETS:
        value = getattr(properties, name)
        if value is not None and not (type(value) is int and 0 <= value <= _MAX_OCTET):
            raise ValueError(f"{name} must be an int from 0 to {_MAX_OCTET}, not {value!r}")
    timestamp = properties.timestamp
    headers = properties.headers
    return replace(
        properties,
        timestamp=None if timestamp is None else _check_timestamp(timestamp),
        headers=None if headers is None else _check_table(headers, "headers"),
        undecodable={},
    )


def _check_timestamp(value: object) -> datetime:
    if not isinstance(value, datetime):
        raise TypeError(f"a timestamp must be a datetime, not {value!r}")
    if value.tzinfo is None:
        # AMQP's timestamps have no zone, and Python would assume the local one.
        value = value.replace(tzinfo=UTC)
    return value.astimezone(UTC).replace(microsecond=0)


def _check_table(table: Headers, path: str) -> dict[str, FieldValue]:
    if not isinstance(table, Mapping):
        raise TypeError(f"{path} must be a mapping, not {table!r}")
    return {
        check_short_string(f"a name in {path}", name): _check_value(value, f"{path}[{name!r}]")
        for name, value in table.items()
    }


def _check_value(value: FieldValue, path: str) -> FieldValue:
    match value:
        # A bool comes before the integers, among which Python counts it.
        case None | bool() | float() | str() | bytes() | Decimal():
            return value
        case int():
            # The widest integer type is signed.
            if value.bit_length() >= _INTEGER_BITS:
                raise ValueError(f"{path} does not fit into 64 bits: {value}")
            return value
        case datetime():
            return _check_timestamp(value)
        case list():
            return [_check_value(item, f"{path}[{index}]") for index, item in enumerate(value)]
        case Mapping():
            return _check_table(value, path)
    raise TypeError(f"{path}: AMQP has no type for {value!r}")


def copy_headers(headers: Headers) -> dict[str, FieldValue]:
    """Return a deep copy."""
    return {name: _copy_value(value) for name, value in headers.items()}


def _copy_value(value: FieldValue) -> FieldValue:
    match value:
        case list():
            return [_copy_value(item) for item in value]
        case Mapping():
            return copy_headers(value)
        case _:
            return value


# --- dead letters --------------------------------------------------------------


def make_dead_letter(  # noqa: PLR0917  -- a dead letter is made of all of them
    message: StoredMessage,
    queue: str,
    reason: DeathReason,
    exchange: str,
    routing_key: str | None,
    now: float,
    rules: VersionRules,
) -> StoredMessage:
    """Return the message that is published to a dead-letter exchange.

    Args:
        routing_key: The queue's `x-dead-letter-routing-key`; None: the message keeps its own.
        now: The broker's time; it counts from 1970.
    """
    properties = message.properties
    headers: dict[str, FieldValue] = dict(message.headers)
    death = Death(
        queue=queue,
        reason=reason.value,
        count=1,
        exchange=message.exchange,
        # Those in `BCC` stay hidden.
        routing_keys=(message.routing_key, *_strings(message.headers.get("CC"))),
        time=datetime.fromtimestamp(int(now), UTC),
        original_expiration=properties.expiration,
    )
    # The first death stays as it is, also one that a client claims, if this version believes it.
    stated = [] if message.deaths else ["first"]
    if rules.sends_last_death:
        stated.append("last")
    for which in stated:
        headers[f"x-{which}-death-reason"] = reason.value
        headers[f"x-{which}-death-queue"] = queue
        headers[f"x-{which}-death-exchange"] = message.exchange
    deaths = _add_death(message.deaths, death)
    headers["x-death"] = [each.table for each in deaths]
    routing_keys = message.routing_keys
    if routing_key is not None:
        routing_keys = (routing_key,)
        if not rules.keeps_cc:
            headers.pop("CC", None)
    # Without its expiration, a dead letter does not expire again in the next queue.
    properties = replace(properties, headers=headers, expiration=None)
    return StoredMessage(
        message.body, properties, exchange, routing_keys, deaths, message.delivery_count
    )


def _add_death(deaths: tuple[Death, ...], latest: Death) -> tuple[Death, ...]:
    """Put the latest death first; one of the same queue and reason is counted instead of added."""
    others = []
    for death in deaths:
        if (death.queue, death.reason) == (latest.queue, latest.reason):
            # RabbitMQ keeps the other fields of the first time.
            latest = replace(death, count=death.count + 1)
        else:
            others.append(death)
    return (latest, *others)


def is_dead_letter_cycle(deaths: tuple[Death, ...], queue: str) -> bool:
    """Return whether a dead letter was in this queue before and was not rejected since.

    Args:
        deaths: Its deaths, including the one that sends it to the queue.
    """
    for index, death in enumerate(deaths):
        if death.queue == queue:
            return all(each.reason != DeathReason.REJECTED.value for each in deaths[: index + 1])
    return False


def parse_x_death(value: FieldValue) -> tuple[Death, ...]:
    """Return the deaths that a client has published in `x-death`; invalid ones are left out."""
    if not isinstance(value, list):
        return ()
    deaths: dict[tuple[str, str], Death] = {}
    for table in value:
        if not isinstance(table, Mapping):
            continue
        queue, reason = table.get("queue"), table.get("reason")
        if isinstance(queue, str) and isinstance(reason, str):
            death = _parse_death(table, queue, reason)
            if (before := deaths.get((queue, reason))) is not None:
                death = replace(before, count=before.count + death.count)
            deaths[queue, reason] = death
    return tuple(deaths.values())


def _parse_death(table: Mapping[str, FieldValue], queue: str, reason: str) -> Death:
    count, exchange, time = table.get("count"), table.get("exchange"), table.get("time")
    expiration = table.get("original-expiration")
    return Death(
        queue=queue,
        reason=reason,
        count=count if isinstance(count, int) else 1,
        exchange=exchange if isinstance(exchange, str) else "",
        routing_keys=_strings(table.get("routing-keys")),
        time=time if isinstance(time, datetime) else datetime.fromtimestamp(0, UTC),
        original_expiration=expiration if isinstance(expiration, str) else None,
    )
