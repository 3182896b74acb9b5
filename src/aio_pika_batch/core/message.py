"""The messages that a consumer receives, and their properties.

A message's properties and its route may arrive as raw bytes, which are decoded on first use. A
property that cannot be decoded raises only when it is read, and affects only its own message.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from types import MappingProxyType
from typing import (
    Any,
    NoReturn,
    Protocol,
    Self,
    TypeAlias,
    TypeGuard,
    TypeVar,
    Union,
    cast,
    overload,
)

from aio_pika_batch.core.content_encoding import MAX_BYTES, charset_of, decompress
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
"""The values that an AMQP 0-9-1 header can have (section 4.2.5.5 of the specification)."""

Headers: TypeAlias = Mapping[str, FieldValue]

NO_HEADERS: Headers = MappingProxyType({})

# The numbers of AMQP 0-9-1 that core needs (section 4.2.5).
SHORT_STRING = 255
"""The maximum number of bytes in a short string: names of queues and exchanges, routing keys."""
UINT32 = 2**32 - 1
"""The largest unsigned 32-bit number, RabbitMQ's limit for times to live in milliseconds."""

# Headers that RabbitMQ sets.
DEATHS = "x-death"
DELIVERY_COUNT = "x-delivery-count"

# Headers that this library sets.
ORIGINAL_EXCHANGE = "x-original-exchange"
ORIGINAL_ROUTING_KEY = "x-original-routing-key"
RETRY_COUNT_HEADER = "x-retry-count"
"""The header that counts the retries of a message, unless a setting names another one."""
CRASH_COUNT = "x-crash-count"
RETRY_QUEUE = "x-retry-queue"
RETURN_COUNT = "x-retry-deliveries"
"""The broker's count of deliveries up to which this library has put a message back itself."""
DEATH_REASON = "x-dead-letter-reason"

WAIT_QUEUE_SUFFIX = ".retry."
"""Between the name of a queue and the delay in the names of its wait queues."""


# Not frozen: a frozen dataclass sets each field through a function call, which tripled the time to
# create one, and was a third of the time to decode a message.
@dataclass(slots=True, kw_only=True)
class Properties:
    """The properties of AMQP's basic class, as received.

    `None` means absent, which is not the same as empty: a copy of a message keeps the difference.

    Attributes:
        expiration: Milliseconds, as the decimal string that AMQP uses.
        undecodable: The reason for each property that could not be decoded. Such a property is
            `None` here, and reading it from its :class:`Message` raises an error.
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
    """What all messages of one session have in common, stored once for all of them."""

    @property
    def queue(self) -> str:
        """The queue that the session consumes from."""

    @property
    def consumer_tag(self) -> str:
        """The consumer tag of the session."""

    @property
    def retry_count_header(self) -> str:
        """The header that counts the retries of a message."""

    def decode_properties(self, raw: bytes, /) -> Properties:
        """Decode a property list. Never raises: see :attr:`Properties.undecodable`."""

    def decode_headers(self, raw: bytes, /) -> Headers | None:
        """Decode only the headers of a property list; None if it has none.

        Raises:
            ValueError: They cannot be decoded. The text says why.
        """

    def decode_route(self, raw: bytes, /) -> tuple[str, str]:
        """Decode the exchange and the routing key. Never raises."""

    def now(self) -> float:
        """Seconds since the Unix epoch."""


def _refuse_raw(raw: bytes, /) -> NoReturn:
    del raw  # not in the text, because errors end up in logs
    raise NotImplementedError("a message of a DecodedSource was created with raw bytes")


@dataclass(frozen=True, slots=True)
class DecodedSource:
    """A :class:`Source` for transports whose client library or broker has decoded the properties.

    Create its messages with a pair as their route, and with `Properties`.

    Attributes:
        wall_clock: Returns seconds since the Unix epoch, such as `time.time`; for `Message.age`.
    """

    queue: str
    consumer_tag: str
    retry_count_header: str
    wall_clock: Callable[[], float]

    # Its messages have nothing raw to decode.
    decode_properties = staticmethod(_refuse_raw)
    decode_headers = staticmethod(_refuse_raw)
    decode_route = staticmethod(_refuse_raw)

    def now(self) -> float:
        """Seconds since the Unix epoch."""
        return self.wall_clock()


def is_short_string(value: object) -> TypeGuard[str]:
    """Whether the value can be the name of an exchange or a queue, or a routing key."""
    return isinstance(value, str) and len(value.encode(errors="replace")) <= SHORT_STRING


def retry_count(value: object) -> int | None:
    """Read a retry count from the value of a header; None if it isn't one.

    Other clients write other types, so a string of digits is accepted as well.
    """
    match value:
        case bool():
            return None
        case int() if value >= 0:
            return value
        case str() if value.isascii() and value.isdigit() and len(value) < 10:  # noqa: PLR2004  -- converting millions of digits would take seconds
            return int(value)
        case _:
            return None


def read_moment(value: object) -> datetime | None:
    """Read a time from the value of a header; None if it isn't one.

    Over AMQP 1.0 a time can only be written as a number of milliseconds since 1970. Other tools
    write texts.
    """
    match value:
        case datetime():
            return value
        case int() if not isinstance(value, bool) and 0 <= value < _MAX_MILLISECONDS:
            return datetime.fromtimestamp(value / 1000, UTC)
        case str():
            try:
                return datetime.fromisoformat(value)
            except ValueError:
                return None
        case _:
            return None


_MAX_MILLISECONDS = 253_402_300_800_000
"""The year 10000, where Python's times end."""


def stated_retries(headers: Headers, header: str, queue: str) -> FieldValue:
    """The value of the header that counts retries; None if it isn't about this queue.

    A dead letter has the count of the queue that it died in. Its next consumer begins at 0.
    """
    value = headers.get(header)
    if value is None:
        return None
    counted_in = headers.get(RETRY_QUEUE)
    if counted_in is None:
        return None if has_died(headers, queue) else value
    return value if counted_in == queue else None


def has_died(headers: Headers, queue: str) -> bool:
    """Whether a message in this queue is a dead letter of this library, or of another queue."""
    if DEATH_REASON in headers:
        return True
    match headers.get(DEATHS):
        case [{"queue": str(died_in)}, *_]:
            return died_in != queue and not died_in.startswith(f"{queue}{WAIT_QUEUE_SUFFIX}")
        case _:
            return False


ValueT_co = TypeVar("ValueT_co", covariant=True)


class _Property(Protocol[ValueT_co]):
    """The type of an attribute that reads one AMQP property."""

    @overload
    def __get__(self, message: None, owner: type) -> Self: ...
    @overload
    def __get__(self, message: Message, owner: type) -> ValueT_co | None: ...


def _property(name: str, kind: type[ValueT_co], doc: str) -> _Property[ValueT_co]:
    def read(message: Message) -> object:
        return message._decoded(name)  # noqa: SLF001  -- of the class below

    read.__annotations__["return"] = kind | None  # for the reference
    return cast("_Property[ValueT_co]", property(read, doc=doc))


_AIO_PIKA_NAMES = {
    "ack": "yield MessageResult.ACK",
    "nack": "yield MessageResult.NACK, or REQUEUE",
    "reject": "yield MessageResult.NACK, or REQUEUE",
    "process": "yield MessageResult.ACK; what raises is retried",
    "channel": "use publish() of the consumer, or on_session",
    "body_size": "use len(message.body)",
    "headers_raw": "use headers",
}
"""Names of aio-pika's messages, which handlers of 0.1.0 got, and what to write instead."""


class Message:
    """One delivery, as `process_messages` receives it.

    Attributes:
        body: The payload, unchanged.
        delivery_tag: The broker's number for this delivery. It is valid in its session only.
        redelivered: Whether the broker has delivered it before, to any consumer.
    """

    first_failed_at: datetime | None = None
    """When it first failed, if this process is retrying it without having republished it."""

    __slots__ = (
        "_properties",
        "_read",
        "_route",
        "_source",
        "body",
        "delivery_tag",
        "redelivered",
    )

    def __init__(  # noqa: PLR0917  -- positional: one is created for every delivery
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
        # What has been decoded so far: nothing (most handlers), the headers only, or everything.
        self._read: Headers | Properties | None = None

    def __repr__(self) -> str:
        # Without the body, because representations end up in logs.
        return (
            f"<Message {self.delivery_tag} from queue {self._source.queue!r},"
            f" routing key {self.routing_key!r}, {len(self.body)} bytes>"
        )

    @property
    def raw_properties(self) -> bytes | None:
        """The property list as received; None if it was received decoded. For adapters."""
        return self._properties if isinstance(self._properties, bytes) else None

    @property
    def properties(self) -> Properties:
        """All properties as values, decoded on first use."""
        # Client libraries decode each property list, and encode it again for a copy, with losses:
        # doubles become floats, and an absent priority becomes 0. So the bytes are kept.
        read = self._read
        if not isinstance(read, Properties):
            raw = self._properties
            self._read = read = (
                self._source.decode_properties(raw) if isinstance(raw, bytes) else raw
            )
        return read

    def _decoded(self, name: str) -> Any:  # noqa: ANN401  -- each property states its type
        properties = self.properties
        if name in properties.undecodable:
            raise MessageDecodeError(self, name, properties.undecodable[name])
        return getattr(properties, name)

    @property
    def queue(self) -> str:
        """The queue that delivered the message."""
        return self._source.queue

    @property
    def consumer_tag(self) -> str:
        """The tag of the consumer that received the message."""
        return self._source.consumer_tag

    def _decoded_route(self) -> tuple[str, str]:
        if isinstance(self._route, bytes):
            self._route = self._source.decode_route(self._route)
        return self._route

    @property
    def exchange(self) -> str:
        """The exchange to which the message was published; empty for the default exchange."""
        return self._decoded_route()[0]

    @property
    def routing_key(self) -> str:
        """The routing key with which the message was published; for a retry, its queue's name."""
        return self._decoded_route()[1]

    @property
    def headers(self) -> Headers:
        """The headers; empty if there are none. Raises MessageDecodeError."""
        read = self._read
        if read is None:
            raw = self._properties
            if isinstance(raw, bytes):
                # Handlers that read anything mostly read a header, and nothing else.
                try:
                    headers = self._source.decode_headers(raw)
                except ValueError as error:
                    raise MessageDecodeError(self, "headers", str(error)) from error
                self._read = read = NO_HEADERS if headers is None else headers
                return read
        elif not isinstance(read, Properties):
            return read
        all_headers: Headers | None = self._decoded("headers")
        return NO_HEADERS if all_headers is None else all_headers

    @property
    def has_readable_headers(self) -> bool:
        """Whether the headers can be decoded."""
        return readable_headers(self) is not None

    content_type = _property(
        "content_type",
        str,
        "The MIME type of the body. Raises MessageDecodeError, as all properties do.",
    )
    content_encoding = _property("content_encoding", str, "The MIME encoding of the body.")
    delivery_mode = _property("delivery_mode", int, "1 means transient, 2 persistent.")
    priority = _property("priority", int, "0 to 255; a larger number is delivered sooner.")
    correlation_id = _property("correlation_id", str, "The request that this message answers.")
    reply_to = _property("reply_to", str, "Where to send the answer.")

    @property
    def message_id(self) -> str | None:
        """The publisher's identifier for this message."""
        raw = self._properties
        if self._read is None and isinstance(raw, bytes):
            # Some adapters can read it without decoding all other properties.
            decode = getattr(self._source, "decode_message_ids", None)
            if decode is not None:
                try:
                    found: str | None = decode([raw])[0]
                except ValueError:
                    pass  # raised below, with its reason
                else:
                    return found
        value: str | None = self._decoded("message_id")
        return value

    timestamp = _property(
        "timestamp",
        datetime,
        "When it was published, in UTC and to the second, if its publisher set it.",
    )
    type = _property("type", str, "The publisher's name for this kind of message.")
    user_id = _property("user_id", str, "The user who published it. The broker has validated it.")
    app_id = _property("app_id", str, "The application that published it.")

    @property
    def expiration(self) -> float | None:
        """Time to live in seconds."""
        value: str | None = self._decoded("expiration")
        if value is None:
            return None
        if not (value.isascii() and value.isdigit()):
            reason = f"{value!r} is not a number of milliseconds"
            raise MessageDecodeError(self, "expiration", reason)
        return int(value) / 1000

    @property
    def retry_count(self) -> int:
        """How often it was retried in this queue; 0 if the header holds no count."""
        source = self._source
        stated = stated_retries(self.headers, source.retry_count_header, source.queue)
        return retry_count(stated) or 0

    @property
    def delivery_count(self) -> int | None:
        """How many deliveries by a quorum queue have failed; None if the queue doesn't count."""
        value = self.headers.get(DELIVERY_COUNT)
        return value if isinstance(value, int) else None

    @property
    def original_exchange(self) -> str:
        """The exchange of the first publication, also after retries."""
        return self._original(ORIGINAL_EXCHANGE, self.exchange)

    @property
    def original_routing_key(self) -> str:
        """The routing key of the first publication, also after retries."""
        return self._original(ORIGINAL_ROUTING_KEY, self.routing_key)

    def _original(self, header: str, otherwise: str) -> str:
        value = self.headers.get(header)
        return value if is_short_string(value) else otherwise

    @property
    def age(self) -> float | None:
        """Seconds since its :attr:`timestamp`.

        None if its publisher set none, or one that isn't a valid time, such as milliseconds: an
        optional property that is wrong doesn't justify a failure.
        """
        if "timestamp" in self.properties.undecodable or self.timestamp is None:
            return None
        return self._source.now() - self.timestamp.timestamp()

    def json(self, *, max_bytes: int = MAX_BYTES) -> Any:  # noqa: ANN401  -- JSON has no narrower type
        """The body as JSON, decompressed if `content_encoding` is gzip, deflate or zstd.

        Args:
            max_bytes: The largest decompressed body; 64 MiB by default.

        Raises:
            MessageDecodeError: The body isn't valid JSON, its encoding is unknown, or it is too
                large. If your handler doesn't catch the error, only this message is dead-lettered.
        """
        try:
            # Tried first, since reading `content_encoding` takes longer than most bodies do. A
            # compressed body is never valid JSON.
            return json.loads(self.body)
        except (ValueError, RecursionError) as error:
            if not self.content_encoding:
                raise MessageDecodeError(self, "body", f"not valid JSON: {error}") from error
        try:
            return json.loads(self.text(max_bytes=max_bytes))
        except MessageDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            raise MessageDecodeError(self, "body", f"not valid JSON: {error}") from error

    def text(self, *, max_bytes: int = MAX_BYTES) -> str:
        """The body as text, decompressed if `content_encoding` is gzip, deflate or zstd.

        The character set is the one that `content_type` or `content_encoding` names, else UTF-8.

        Args:
            max_bytes: The largest decompressed body; 64 MiB by default.

        Raises:
            MessageDecodeError: It can't be decoded, its encoding is unknown, or it is too large.
        """
        _, _, charset = (self.content_type or "").lower().partition("charset=")
        charset = charset.partition(";")[0].strip(" \"'")
        try:
            body = decompress(self.body, self.content_encoding, max_bytes)
            return body.decode(charset or charset_of(self.content_encoding) or "utf-8")
        except (ValueError, LookupError) as error:
            raise MessageDecodeError(self, "body", str(error)) from error


def _refuse_name(name: str, instead: str) -> property:
    def refuse(message: Message) -> NoReturn:
        msg = f"a message has no attribute {name!r}, unlike aio-pika's: {instead}"
        raise AttributeError(msg, name=name, obj=message)

    return property(refuse)


# Not by `__getattr__`, which would make every attribute of a message three times as slow.
for _name, _instead in _AIO_PIKA_NAMES.items():
    setattr(Message, _name, _refuse_name(_name, _instead))


def message_ids(messages: Sequence[Message]) -> list[str | None]:
    """The `message_id` of each message. Raises MessageDecodeError."""
    # As the property does, but together: an inbox needs the ids of whole batches.
    if len({id(each._source) for each in messages}) == 1:  # noqa: SLF001  -- of the class above
        source: Any = messages[0]._source  # noqa: SLF001  -- the same
        try:
            # Raises AttributeError or TypeError if only the property can read one.
            ids: list[str | None] = source.decode_message_ids(
                [each._properties for each in messages]  # noqa: SLF001  -- the same
            )
        except (AttributeError, TypeError, ValueError):
            pass
        else:
            return ids
    return [each.message_id for each in messages]


def readable_headers(message: Message) -> Headers | None:
    """The headers of a message; None if they cannot be decoded."""
    try:
        return message.headers
    except MessageDecodeError:
        return None
