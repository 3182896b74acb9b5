"""The messages that a consumer publishes: new ones, and copies of those it received.

A body can be split over several frames, but headers can't. A message whose headers nearly fill a
frame leaves no room for the headers of its retry or dead letter. Then such a copy could never be
published, and its message would never end. So copies are made to fit. Laws:

- What a copy needs is never left out: its retry count, and where and why it was dead-lettered.
- Headers of the original are left out of dead letters only, the largest ones first, and the dead
  letter lists their names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import TypeAlias, assert_never

from aio_pika_batch.core.message import (
    NO_HEADERS,
    SHORT_STRING,
    FieldValue,
    Headers,
    Message,
    Properties,
    readable_headers,
)

DIRECT_REPLY_TO = "amq.rabbitmq.reply-to."
"""How the addresses of RabbitMQ's direct reply-to begin."""


def _milliseconds(expiration: float | timedelta | None) -> str | None:
    if expiration is None:
        return None
    seconds = expiration.total_seconds() if isinstance(expiration, timedelta) else expiration
    return str(max(0, round(seconds * 1000)))


@dataclass(frozen=True, slots=True)
class Publication:
    """A message to publish.

    Args:
        body: The payload.
        exchange: Empty for the default exchange, which routes by queue name.
        routing_key: At most 255 bytes.
        mandatory: Whether the broker returns a message that no queue is bound for
            (`Outcome.RETURNED`). By default it does, except for a direct reply-to address: before
            4.0, RabbitMQ returns such an answer even though it has delivered it.
        headers: They must fit into one frame.
        delivery_mode: 2, the default, means persistent.
        expiration: Time to live in seconds, or a timedelta.
        timestamp: A datetime without a time zone is taken as UTC.
    """

    # Not in the representation, because representations end up in logs.
    body: bytes = field(repr=False)
    exchange: str = field(default="", kw_only=True)
    routing_key: str = field(default="", kw_only=True)
    # None until `__post_init__` has looked at the address.
    mandatory: bool = field(default=None, kw_only=True)  # type: ignore[assignment]
    headers: Headers | None = field(default=None, kw_only=True)
    content_type: str | None = field(default=None, kw_only=True)
    content_encoding: str | None = field(default=None, kw_only=True)
    delivery_mode: int | None = field(default=2, kw_only=True)
    priority: int | None = field(default=None, kw_only=True)
    correlation_id: str | None = field(default=None, kw_only=True)
    reply_to: str | None = field(default=None, kw_only=True)
    expiration: float | timedelta | None = field(default=None, kw_only=True)
    message_id: str | None = field(default=None, kw_only=True)
    timestamp: datetime | None = field(default=None, kw_only=True)
    type: str | None = field(default=None, kw_only=True)
    user_id: str | None = field(default=None, kw_only=True)
    app_id: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Raise an error for a value that no broker accepts, before anything is sent."""
        body: object = self.body
        if not isinstance(body, bytes | bytearray | memoryview):
            raise TypeError(f"body must be bytes, not {type(body).__name__}: encode it first")
        if not isinstance(body, bytes):
            # A view may have items of several bytes, and may change until it is sent. So copy it.
            object.__setattr__(self, "body", bytes(body))
        given: bool | None = self.mandatory
        if given is None:
            is_reply = not self.exchange and self.routing_key.startswith(DIRECT_REPLY_TO)
            object.__setattr__(self, "mandatory", not is_reply)  # the class is frozen
        for name, value in (("exchange", self.exchange), ("routing_key", self.routing_key)):
            if len(value.encode()) > SHORT_STRING:
                msg = f"{name} has more than {SHORT_STRING} bytes, AMQP's limit: {value[:40]}…"
                raise ValueError(msg)

    @property
    def properties(self) -> Properties:
        """The properties to send."""
        timestamp = self.timestamp
        if timestamp is not None and timestamp.tzinfo is None:
            timestamp = timestamp.replace(tzinfo=UTC)
        return Properties(
            content_type=self.content_type,
            content_encoding=self.content_encoding,
            headers=self.headers,
            delivery_mode=self.delivery_mode,
            priority=self.priority,
            correlation_id=self.correlation_id,
            reply_to=self.reply_to,
            expiration=_milliseconds(self.expiration),
            message_id=self.message_id,
            timestamp=timestamp,
            type=self.type,
            user_id=self.user_id,
            app_id=self.app_id,
        )


# Not frozen: one is created for each requeued message, see `Properties`.
@dataclass(slots=True)
class Copy:
    """A received message, to publish again with a few headers changed.

    A transport that has the raw properties splices the changes into them, which keeps absent
    properties absent and the types of headers. Other transports use :attr:`properties`. The
    publisher leaves out a `user_id` other than that of its connection, because the broker would
    close the channel.

    Attributes:
        add: Headers to set; each replaces one of the same name.
        drop: Headers to leave out.
        keep_expiration: Whether the copy keeps the original's `expiration` property.
        expiration: If it doesn't: the copy's own, in milliseconds; None for none.
        spare: Headers of `add` that are left out, one after the other, if the copy doesn't fit into
            a frame.
        may_omit: Whether the largest headers of the original are left out if that isn't enough; see
            :func:`fit`.
    """

    message: Message
    exchange: str
    routing_key: str
    add: Headers
    drop: frozenset[str] = frozenset()
    keep_expiration: bool = True
    mandatory: bool = True
    expiration: str | None = None
    spare: tuple[str, ...] = ()
    may_omit: bool = False

    @property
    def body(self) -> bytes:
        """The original's body."""
        return self.message.body

    @property
    def properties(self) -> Properties:
        """The copy's properties as values, without those that cannot be decoded."""
        was = self.message.properties
        headers = {key: value for key, value in (was.headers or {}).items() if key not in self.drop}
        headers.update(self.add)
        return replace(
            was,
            headers=headers if headers or was.headers is not None else None,
            expiration=was.expiration if self.keep_expiration else self.expiration,
            undecodable={},
        )


class StoredPublication(Message):
    """A publication that was stored, such as a row of an outbox, and is delivered as a message.

    It is published as it is: by an object of its own, each would cost twice as much. Many share a
    template, so that a transport can encode it once.

    Attributes:
        template: Its properties, but for the id. Never changed.
    """

    __slots__ = ("exchange", "mandatory", "message_id", "routing_key", "template")

    exchange: str
    routing_key: str
    mandatory: bool
    template: Properties
    message_id: str

    @property
    def properties(self) -> Properties:
        """The properties of the template, with the id."""
        headers = self.template.headers
        headers = None if headers is None else dict(headers)
        return replace(self.template, headers=headers, message_id=self.message_id)

    @property
    def headers(self) -> Headers:
        """The headers; empty if there are none."""
        return self.properties.headers or NO_HEADERS


Outgoing: TypeAlias = Publication | Copy | StoredPublication
"""What a publisher can publish."""


class Outcome(Enum):
    """The broker's answer to one publication."""

    CONFIRMED = "confirmed"
    """The broker has taken responsibility for it, in at least one queue if it was mandatory."""
    RETURNED = "returned"
    """No queue is bound for it, so the broker has returned it."""
    REFUSED = "refused"
    """The broker refused it, and did not store it. A queue is full (`reject-publish`), the exchange
    is missing, or the user may not publish to it."""
    UNKNOWN = "unknown"
    """No answer in time, or the connection was lost. The broker may or may not have stored it."""
    UNSENT = "unsent"
    """It was not sent, so it is certainly not stored."""
    UNPUBLISHABLE = "unpublishable"
    """It can't be encoded, so no attempt can succeed: its headers don't fit into a frame, or the
    client refuses a name or a value. It was not sent."""


def describe_outcome(outcome: Outcome, publication: Outgoing, timeout: float | None = None) -> str:
    """Return why a publication is not confirmed, although it waited for that many seconds."""
    silent = "silent" if timeout is None else f"silent for {timeout} s"
    where = f"exchange {publication.exchange!r}, routing key {publication.routing_key!r}"
    match outcome:
        case Outcome.RETURNED:
            return f"returned: no queue is bound for {where}"
        case Outcome.REFUSED:
            return (
                f"refused by the broker ({where}): a full queue, no such exchange, or no"
                " permission; it is not stored"
            )
        case Outcome.UNSENT:
            return f"not sent ({where}): there is no connection to the broker"
        case Outcome.UNPUBLISHABLE:
            return f"can't be encoded ({where}): a name, a property or a header is not valid"
        case Outcome.UNKNOWN | Outcome.CONFIRMED:
            return (
                f"unconfirmed ({where}): the connection or channel was lost, or the broker was"
                f" {silent}; it may or may not be stored"
            )
        case _:
            assert_never(outcome)


# --- copies that fit into a frame ------------------------------------------------------------

OMITTED = "x-omitted-headers"
"""Header of a dead letter: the names of the original's headers that didn't fit into a frame."""

UNDECODABLE_HEADERS = "x-undecodable-headers"
"""Contains what cannot be read of the original: its header table, or its whole property list."""

LONGEST_LIST = 1000
"""Bytes of names in `OMITTED`, at most."""

_LONG = 5
"""Bytes of the type and the length of a long value."""

_FIXED = 9
"""Bytes of the largest value of a fixed length, with its type."""


def fit(copy: Copy, limit: int, size: Callable[[Copy], int]) -> Copy | None:
    """Return a copy whose property list has at most `limit` bytes, with as much as fits.

    Args:
        size: Returns the bytes of a copy's property list.

    Returns:
        None if that can't be.
    """
    if size(copy) <= limit:
        return copy
    smaller, add = copy, dict(copy.add)
    for name in copy.spare:
        if add.pop(name, None) is not None:
            smaller = replace(copy, add=dict(add))
            if size(smaller) <= limit:
                return smaller
    return _without_large_headers(copy, smaller, limit, size) if copy.may_omit else None


def _without_large_headers(
    copy: Copy, smallest: Copy, limit: int, size: Callable[[Copy], int]
) -> Copy | None:
    headers = readable_headers(copy.message)
    if headers is None:
        # What can't be read is kept whole, in one header.
        names = [UNDECODABLE_HEADERS]
    else:
        weights = {
            name: header_size(name, value)
            for name, value in headers.items()
            if name not in copy.add and name not in copy.drop
        }
        names = sorted(weights, key=weights.__getitem__, reverse=True)
    count = 0
    while count < len(names):
        # Twice as many each time, since each attempt makes a whole new list. If one large header
        # is the cause, which it mostly is, no other is left out.
        count = min(len(names), max(1, 2 * count))
        omitted = names[:count]
        # With so much room our own headers fit again, unless many small ones are the cause.
        for each in (copy, smallest):
            smaller = replace(
                each,
                add={**each.add, OMITTED: _shortened(omitted)},
                drop=copy.drop | frozenset(omitted),
            )
            if size(smaller) <= limit:
                return smaller
    return None


def _shortened(names: list[str]) -> list[FieldValue]:
    listed: list[FieldValue] = []
    left = LONGEST_LIST
    for name in names:
        left -= len(name.encode(errors="replace"))
        if left < 0:
            return [*listed, "…"]
        listed.append(name)
    return listed


def header_size(name: str, value: FieldValue) -> int:
    """Return about how many bytes a header takes in a table."""
    return 1 + len(name.encode(errors="replace")) + _value_size(value)


def _value_size(value: FieldValue) -> int:
    match value:
        case str():
            return _LONG + len(value.encode(errors="replace"))
        case bytes():
            return _LONG + len(value)
        case list():
            return _LONG + sum(map(_value_size, value))
        case Mapping():
            return _LONG + _table_size(value)
        case _:
            return _FIXED


def _table_size(headers: Headers) -> int:
    return sum(header_size(name, value) for name, value in headers.items())


def property_list_size(properties: Properties) -> int:
    """Return about how many bytes a property list takes, for a broker that encodes nothing."""
    texts = sum(
        1 + len(value.encode(errors="replace"))
        for name in Properties.__slots__
        if isinstance(value := getattr(properties, name), str)
    )
    return 2 + _LONG + texts + 2 * _FIXED + _table_size(properties.headers or NO_HEADERS)
