"""What goes in and what goes out: a delivery as the handler sees it, a publication as a broker gets
it.

A message's properties and its route may arrive as raw bytes and are decoded on first use; one that
cannot be decoded costs that message only, and only when somebody asks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from types import MappingProxyType
from typing import Any, Protocol, TypeAlias, TypeGuard, Union

from aio_pika_batch.errors import MessageDecodeError

FieldValue: TypeAlias = Union[
    bool,
    int,
    float,
    str,
    bytes,
    Decimal,
    datetime,
    "list[FieldValue]",
    "Mapping[str, FieldValue]",
    None,
]
"""What an AMQP 0-9-1 header may hold (section 4.2.5.5 of the specification)."""

Headers: TypeAlias = Mapping[str, FieldValue]

NO_HEADERS: Headers = MappingProxyType({})

SHORT_STRING = 255
"""Bytes in the longest short string (AMQP 0-9-1, section 4.2.5.3)."""

ORIGINAL_EXCHANGE = "x-original-exchange"
ORIGINAL_ROUTING_KEY = "x-original-routing-key"
DELIVERY_COUNT = "x-delivery-count"


# Not frozen: one is made for each decoded message, and freezing makes that three times as dear.
@dataclass(slots=True, kw_only=True)
class Properties:
    """The properties of AMQP's basic class, as they stood on the wire.

    `None` means absent, which is not the same as empty: a copy of a message keeps the difference.

    Attributes:
        expiration: Milliseconds, as the decimal string that AMQP uses.
        undecodable: For each property that could not be decoded, the reason. Such a property is
            `None` here and raises when it is read from its :class:`Message`.
    """

    content_type: str | None = None
    content_encoding: str | None = None
    headers: Headers | None = None
    delivery_mode: int | None = None
    priority: int | None = None
    correlation_id: str | None = None
    reply_to: str | None = None
    expiration: str | None = None
    message_id: str | None = None
    timestamp: datetime | None = None
    type: str | None = None
    user_id: str | None = None
    app_id: str | None = None
    cluster_id: str | None = None
    undecodable: Mapping[str, str] = field(default_factory=dict)


class Source(Protocol):
    """What all messages of one session share, held once instead of by each of them."""

    @property
    def queue(self) -> str:
        """The queue that the session consumes from."""

    @property
    def consumer_tag(self) -> str:
        """The consumer tag of the session."""

    @property
    def retry_count_header(self) -> str:
        """The header in which retries are counted."""

    def decode_properties(self, raw: bytes, /) -> Properties:
        """Decode a property list. Never raises: see :attr:`Properties.undecodable`."""

    def decode_headers(self, raw: bytes, /) -> Headers | None:
        """Decode the headers of a property list alone; None where it has none.

        Raises:
            ValueError: They cannot be decoded; the text says why.
        """

    def decode_route(self, raw: bytes, /) -> tuple[str, str]:
        """Decode exchange and routing key. Never raises."""

    def now(self) -> float:
        """Seconds since the epoch."""


def is_short_string(value: object) -> TypeGuard[str]:
    """Whether it could be an exchange's name or a routing key, whoever wrote it."""
    return isinstance(value, str) and len(value.encode(errors="replace")) <= SHORT_STRING


def retry_count(value: object) -> int | None:
    """Read a retry count out of a header's value; None where it is no count.

    Other clients write other types: digits in a string count too.
    """
    match value:
        case bool():
            return None
        case int() if value >= 0:
            return value
        case str() if value.isascii() and value.isdigit() and len(value) < 10:  # noqa: PLR2004  -- no bomb of digits
            return int(value)
        case _:
            return None


class Message:
    """One delivery, as `process_messages` gets it.

    Attributes:
        body: The payload, untouched.
        delivery_tag: The broker's number for this delivery, valid in its session only.
        redelivered: Whether the broker delivered it before, to whomever.
    """

    first_failed_at: datetime | None = None
    """When it first failed, if it is being tried again without having left this process."""

    __slots__ = (
        "_properties",
        "_read",
        "_route",
        "_source",
        "body",
        "delivery_tag",
        "redelivered",
    )

    def __init__(  # noqa: PLR0917  -- positional, because one is made for every delivery
        self,
        source: Source,
        delivery_tag: int,
        redelivered: bool,  # noqa: FBT001
        body: bytes,
        route: bytes | tuple[str, str],
        properties: bytes | Properties,
    ) -> None:
        self._source = source
        self.delivery_tag = delivery_tag
        self.redelivered = redelivered
        self.body = body
        self._route = route
        self._properties = properties
        # What somebody has asked for: the headers, or all properties; most ask for neither.
        self._read: Headers | Properties | None = None

    def __repr__(self) -> str:
        # Never the body: a representation ends up in logs.
        return (
            f"<Message {self.delivery_tag} from queue {self._source.queue!r},"
            f" routing key {self.routing_key!r}, {len(self.body)} bytes>"
        )

    @property
    def raw_properties(self) -> bytes | None:
        """The property list as it came, or None where it came decoded. For adapters."""
        return self._properties if isinstance(self._properties, bytes) else None

    @property
    def properties(self) -> Properties:
        """All properties as values, decoded on first use."""
        read = self._read
        if not isinstance(read, Properties):
            raw = self._properties
            self._read = read = (
                self._source.decode_properties(raw) if isinstance(raw, bytes) else raw
            )
        return read

    def _property(self, name: str) -> Any:  # noqa: ANN401  -- each property below states its type
        properties = self.properties
        if name in properties.undecodable:
            raise MessageDecodeError(self, name, properties.undecodable[name])
        return getattr(properties, name)

    @property
    def queue(self) -> str:
        """The queue it was delivered from."""
        return self._source.queue

    @property
    def consumer_tag(self) -> str:
        """The tag of the consumer it was delivered to."""
        return self._source.consumer_tag

    def _routed(self) -> tuple[str, str]:
        if isinstance(self._route, bytes):
            self._route = self._source.decode_route(self._route)
        return self._route

    @property
    def exchange(self) -> str:
        """The exchange it was published to; empty for the default exchange."""
        return self._routed()[0]

    @property
    def routing_key(self) -> str:
        """The routing key it was published with; of a requeued copy, the queue's name."""
        return self._routed()[1]

    @property
    def headers(self) -> Headers:
        """The headers; empty where there are none. Raises MessageDecodeError."""
        read = self._read
        if read is None:
            raw = self._properties
            if isinstance(raw, bytes):
                # Nearly everybody who asks for anything asks for a header, and for nothing else.
                try:
                    headers = self._source.decode_headers(raw)
                except ValueError as error:
                    raise MessageDecodeError(self, "headers", str(error)) from error
                self._read = read = NO_HEADERS if headers is None else headers
                return read
        elif not isinstance(read, Properties):
            return read
        all_headers: Headers | None = self._property("headers")
        return NO_HEADERS if all_headers is None else all_headers

    @property
    def has_readable_headers(self) -> bool:
        """Whether the headers can be decoded."""
        try:
            return self.headers is not None
        except MessageDecodeError:
            return False

    @property
    def content_type(self) -> str | None:
        """MIME type of the body. Raises MessageDecodeError, as all properties do."""
        value: str | None = self._property("content_type")
        return value

    @property
    def content_encoding(self) -> str | None:
        """MIME encoding of the body."""
        value: str | None = self._property("content_encoding")
        return value

    @property
    def delivery_mode(self) -> int | None:
        """1: transient, 2: persistent."""
        value: int | None = self._property("delivery_mode")
        return value

    @property
    def priority(self) -> int | None:
        """0 to 255, the larger the sooner."""
        value: int | None = self._property("priority")
        return value

    @property
    def correlation_id(self) -> str | None:
        """The request that this message answers."""
        value: str | None = self._property("correlation_id")
        return value

    @property
    def reply_to(self) -> str | None:
        """Where an answer should go."""
        value: str | None = self._property("reply_to")
        return value

    @property
    def expiration(self) -> float | None:
        """Time to live in seconds."""
        value: str | None = self._property("expiration")
        if value is None:
            return None
        if not (value.isascii() and value.isdigit()):
            raise MessageDecodeError(self, "expiration", f"{value!r} is no number of milliseconds")
        return int(value) / 1000

    @property
    def message_id(self) -> str | None:
        """The publisher's name for this message."""
        value: str | None = self._property("message_id")
        return value

    @property
    def timestamp(self) -> datetime | None:
        """When it was published, in UTC, to the second, if its publisher said so."""
        value: datetime | None = self._property("timestamp")
        return value

    @property
    def type(self) -> str | None:
        """The publisher's name for this kind of message."""
        value: str | None = self._property("type")
        return value

    @property
    def user_id(self) -> str | None:
        """The user who published it, as validated by the broker."""
        value: str | None = self._property("user_id")
        return value

    @property
    def app_id(self) -> str | None:
        """The application that published it."""
        value: str | None = self._property("app_id")
        return value

    @property
    def retry_count(self) -> int:
        """How often it has been tried again by this library; 0 where the header holds no count."""
        return retry_count(self.headers.get(self._source.retry_count_header)) or 0

    @property
    def delivery_count(self) -> int | None:
        """How often a quorum queue has delivered it in vain; None where nobody counts."""
        value = self.headers.get(DELIVERY_COUNT)
        return value if isinstance(value, int) else None

    @property
    def original_exchange(self) -> str:
        """The exchange of the first publication; it survives requeues."""
        return self._original(ORIGINAL_EXCHANGE, self.exchange)

    @property
    def original_routing_key(self) -> str:
        """The routing key of the first publication; it survives requeues."""
        return self._original(ORIGINAL_ROUTING_KEY, self.routing_key)

    def _original(self, header: str, otherwise: str) -> str:
        value = self.headers.get(header)
        return value if is_short_string(value) else otherwise

    @property
    def age(self) -> float | None:
        """Seconds since its :attr:`timestamp`; None where its publisher gave none."""
        published = self.timestamp
        return None if published is None else self._source.now() - published.timestamp()

    def json(self) -> Any:  # noqa: ANN401  -- JSON has no narrower type
        """The body as JSON.

        Raises:
            MessageDecodeError: The body is no JSON; the handler may let it pass, and this message
                alone is dead-lettered.
        """
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError) as error:
            raise MessageDecodeError(self, "body", f"no JSON: {error}") from error


@dataclass(frozen=True, slots=True)
class DecodedSource:
    """A :class:`~aio_pika_batch.core.message.Source` that has nothing to decode.

    Its messages are made with a route that is a pair, and with `Properties`.

    Attributes:
        wall_clock: Seconds since the epoch, such as `time.time`; for `Message.age`.
    """

    queue: str
    consumer_tag: str
    retry_count_header: str
    wall_clock: Callable[[], float]

    def decode_properties(self, raw: bytes, /) -> Properties:
        """Never called: messages come decoded."""
        raise NotImplementedError("a message of a DecodedSource was made with raw properties")

    def decode_headers(self, raw: bytes, /) -> Headers | None:
        """Never called either."""
        raise NotImplementedError("a message of a DecodedSource was made with raw properties")

    def decode_route(self, raw: bytes, /) -> tuple[str, str]:
        """Never called either."""
        raise NotImplementedError("a message of a DecodedSource was made with a raw route")

    def now(self) -> float:
        """Seconds since the epoch."""
        return self.wall_clock()
