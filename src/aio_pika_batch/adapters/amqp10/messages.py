"""Reads an AMQP 1.0 message as an AMQP 0-9-1 consumer would see it.

RabbitMQ translates a message that was published over the other protocol. For messages published
over 0-9-1, this module reverses that. For others it does what RabbitMQ does for 0-9-1 consumers. So
a handler sees the same over both protocols. RabbitMQ's translation leaves out `cluster_id`, and
tables and arrays in headers whose names don't begin with `x-`.

The sections before the body are kept as they came, and decoded on first use.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from dataclasses import field as attribute
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import unquote
from uuid import UUID

from aio_pika_batch.adapters.amqp10 import spec
from aio_pika_batch.adapters.amqp10.codec import (
    Byte,
    Char,
    CodecError,
    Decimal,
    Float,
    Int,
    NotText,
    Short,
    Symbol,
    Timestamp,
    UByte,
    UInt,
    ULong,
    UShort,
)
from aio_pika_batch.adapters.amqp10.sections import field, section, section_at, sections
from aio_pika_batch.core.message import SHORT_STRING, Headers, Message, Properties

ENCODED: Final = "amqp-1.0"
"""The `type` of a message whose body is a value of AMQP 1.0's type system, in its encoding."""

_EXCHANGE, _ROUTING_KEY = "x-exchange", "x-routing-key"
_TYPE = "x-basic-type"
_INTERNAL: Final = "x-basic-"
_ROUTE: Final = frozenset((_EXCHANGE, _ROUTING_KEY))
"""Annotations that aren't headers."""

_CC: Final = "x-cc"
"""An annotation whose header has another name."""

_FEW: Final = 64
_SHORT_SECTION: Final = 512
"""How many sections are remembered, of how many bytes at most."""

_QUEUES: Final = "/queues/"

_DURABLE, _PRIORITY, _TTL = 0, 1, 2
_MESSAGE_ID, _USER_ID, _REPLY_TO, _CORRELATION_ID = 0, 1, 4, 5
_CONTENT_TYPE, _CONTENT_ENCODING, _CREATION_TIME, _GROUP_ID = 6, 7, 9, 10
"""Positions in the lists of the header and properties sections."""

_PLAIN: Final = frozenset((bool, int, float, str))
_SIMPLE: Final[dict[type, Callable[[Any], Any]]] = {
    **{kind: kind for kind in _PLAIN},
    **dict.fromkeys((UByte, UShort, UInt, ULong, Byte, Short, Int, Char), int),
    Float: float,
    Symbol: str,
}
"""How to convert the simple values of AMQP 1.0 to those of AMQP 0-9-1."""

_UNUSUAL_IDS: Final = re.compile(rb"[\xa0\xb0\xb1]")
"""Constructors of binaries and of long strings."""


# --- routes and headers ----------------------------------------------------------


def decode_route(head: bytes) -> tuple[str, str]:
    """Read exchange and routing key. Never raises."""
    try:
        annotations = section(head, spec.MESSAGE_ANNOTATIONS, dict)
    except CodecError:
        return "", ""
    return _route(annotations.get(_EXCHANGE)), _route(annotations.get(_ROUTING_KEY))


def _route(value: Any) -> str:  # noqa: ANN401
    # As over 0-9-1: lone surrogates, which become the same bytes when they are written.
    if isinstance(value, NotText):
        return value.decode(errors="surrogateescape")
    return value if isinstance(value, str) else ""


def decode_headers(
    head: bytes, known: dict[bytes, dict[str, Any]] | None = None
) -> dict[str, Any] | None:
    """Read the headers that a 0-9-1 consumer would see; None if there are none.

    Args:
        known: Remembers sections and their headers, because most messages have the same ones.

    Raises:
        ValueError: They cannot be read.
    """
    headers: dict[str, Any] = {}
    for code, start, end in sections(head):
        if code == spec.PROPERTIES:
            if _UNUSUAL_IDS.search(head, start, end):
                headers.update(_ids(section_at(head, start, end, list)))
            continue
        read = _HEADER_READERS.get(code)
        if read is None:
            continue
        raw = head[start:end]
        found = None if known is None else known.get(raw)
        if found is None:
            found = read(section_at(raw, 0, len(raw), dict))
            if known is not None:
                _remember(known, raw, found)
        # An annotation was written later than an application property of the same name.
        if code == spec.MESSAGE_ANNOTATIONS or headers.keys().isdisjoint(found):
            headers.update(found)
        else:
            headers.update({name: found[name] for name in found if name not in headers})
    return headers or None


def _remember(known: dict[bytes, dict[str, Any]], raw: bytes, found: dict[str, Any]) -> None:
    # Not what a handler could change, such as a list.
    if len(raw) <= _SHORT_SECTION and all(type(each) in _PLAIN for each in found.values()):
        if len(known) == _FEW:
            known.clear()
        known[raw] = found


def _annotation_headers(annotations: dict[Any, Any]) -> dict[str, Any]:
    headers: dict[str, Any] = {}
    for key, value in annotations.items():
        if key in _ROUTE:
            continue
        if type(key) is not str or type(value) not in _PLAIN or key == _CC:
            headers.update(_annotated(key, value))
        elif key.startswith("x-") and not key.startswith(_INTERNAL):
            headers[key] = value
    return headers


def _property_headers(properties: dict[Any, Any]) -> dict[str, Any]:
    headers: dict[str, Any] = {}
    for key, value in properties.items():
        if type(key) is str and type(value) in _PLAIN:
            headers.setdefault(key, value)
        elif not isinstance(value, Decimal):
            headers.setdefault(_key(key), _plain(value))
    return headers


_HEADER_READERS: Final = {
    spec.MESSAGE_ANNOTATIONS: _annotation_headers,
    spec.APPLICATION_PROPERTIES: _property_headers,
}


def _annotated(key: Any, value: Any) -> Iterator[tuple[str, Any]]:  # noqa: ANN401
    """Yield the header of an annotation, if it has one."""
    if not isinstance(key, str | NotText) or isinstance(value, Decimal):
        return
    name = _key(key)
    if not name.startswith("x-") or name.startswith(_INTERNAL):
        return
    match name, value:
        case "x-cc", _:
            yield "CC", _plain(value)
        case "x-opt-rabbitmq-received-time", Timestamp():
            yield "timestamp_in_ms", int(value)
        case "x-opt-deaths", list():
            yield "x-death", [_death(each) for each in value if isinstance(each, dict)]
        case _:
            yield name, _plain(value)


def _ids(fields: list[Any]) -> Iterator[tuple[str, Any]]:
    """Yield the ids that 0-9-1 has no property for: binary, or longer than a short string."""
    for place, name in ((_MESSAGE_ID, "x-message-id"), (_CORRELATION_ID, "x-correlation-id")):
        value = field(fields, place)
        if isinstance(value, bytes) or (isinstance(value, str) and _is_long(value)):
            yield name, bytes(value) if isinstance(value, bytes) else value


def _is_long(text: str) -> bool:
    return len(text.encode()) > SHORT_STRING


def _key(key: Any) -> str:  # noqa: ANN401
    if isinstance(key, NotText):
        raise CodecError(f"the key {bytes(key[:80])!r} is not UTF-8")
    return str(key)


def _plain(value: Any) -> Any:  # noqa: ANN401, PLR0911  -- one for each kind of value
    """Return the value that a 0-9-1 consumer would find in a header."""
    if value is None:
        return None
    simple = _SIMPLE.get(type(value))
    if simple is not None:
        return simple(value)
    match value:
        case list():
            return [_plain(each) for each in value]
        case dict():
            return {_key(key): _plain(each) for key, each in value.items()}
        case bytes():
            # The broker doesn't check that a long string is text.
            try:
                return value.decode()
            except UnicodeDecodeError:
                return bytes(value)
        case UUID():
            return value.urn
        case Timestamp():
            return _moment(value)
    raise CodecError(f"{value!r} has no counterpart in AMQP 0-9-1")


def _moment(milliseconds: int) -> datetime | int:
    seconds = milliseconds // 1000
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, ValueError, OSError):
        # Probably milliseconds that were taken for seconds.
        return seconds


def _death(entry: dict[Any, Any]) -> dict[str, Any]:
    """Return an entry of `x-death` as over AMQP 0-9-1."""
    death = {_key(key): _plain(value) for key, value in entry.items()}
    death.pop("last-time", None)
    if "first-time" in death:
        death["time"] = death.pop("first-time")
    if "ttl" in death:
        death["original-expiration"] = str(death.pop("ttl"))
    return death


# --- properties ------------------------------------------------------------------


def decode_properties(head: bytes, *, has_addresses: bool = True) -> Properties:
    """Read all properties. Never raises, see `Properties.undecodable`.

    Args:
        head: The sections before the body.
        has_addresses: Whether `reply_to` is an address: `/queues/` and the queue's quoted name.
    """
    properties = Properties()
    undecodable: dict[str, str] = {}

    def fill(name: str, convert: Callable[[Any], Any], value: Any) -> None:  # noqa: ANN401
        try:
            setattr(properties, name, None if value is None else convert(value))
        except ValueError as error:
            undecodable[name] = str(error)

    for code, table in _FIELDS.items():
        try:
            fields = section(head, code, list)
        except CodecError as error:
            undecodable.update(dict.fromkeys((name for name, _, _ in table), str(error)))
            continue
        for name, place, convert in table:
            fill(name, convert, field(fields, place))
    if has_addresses and (properties.reply_to or "").startswith(_QUEUES):
        properties.reply_to = unquote(str(properties.reply_to).removeprefix(_QUEUES))
    fill("headers", decode_headers, head)
    fill("type", _type, head)
    if properties.headers is not None and "x-death" in properties.headers:
        # Dead-lettering ends a time to live, but the header section still has it.
        properties.expiration = None
    if undecodable:
        properties.undecodable = undecodable
    return properties


def _type(head: bytes) -> str | None:
    value = section(head, spec.MESSAGE_ANNOTATIONS, dict).get(_TYPE)
    return None if value is None else _text(value)


def _text(value: Any) -> str:  # noqa: ANN401
    if isinstance(value, NotText):
        raise CodecError(f"{bytes(value)!r} is not UTF-8")
    if not isinstance(value, str):
        raise CodecError(f"{value!r} is not text")
    return str(value)


def _number(value: Any) -> int:  # noqa: ANN401
    if not isinstance(value, int):
        raise CodecError(f"{value!r} is not a number")
    return int(value)


def _id(value: Any) -> str | None:  # noqa: ANN401
    match value:
        case UUID():
            return value.urn
        case int():
            return str(int(value))
        case bytes() if not isinstance(value, NotText):
            return None  # a header, see `_ids`
    return _short(value)


def _user(value: Any) -> str | None:  # noqa: ANN401
    try:
        return bytes(value).decode() if isinstance(value, bytes) else None
    except UnicodeDecodeError:
        return None


def _short(value: Any) -> str | None:  # noqa: ANN401
    text = _text(value)
    return None if _is_long(text) else text


def _time(value: Any) -> datetime:  # noqa: ANN401
    moment = _moment(_number(value))
    if not isinstance(moment, datetime):
        raise CodecError(f"{moment!r} is not a time in seconds that a datetime can hold")
    return moment


_FIELDS: Final[dict[int, tuple[tuple[str, int, Callable[[Any], Any]], ...]]] = {
    spec.HEADER: (
        # Others had a delivery mode of 1, or none, which means the same.
        ("delivery_mode", _DURABLE, lambda durable: 2 if durable is True else None),
        ("priority", _PRIORITY, _number),
        ("expiration", _TTL, lambda ttl: str(_number(ttl))),
    ),
    spec.PROPERTIES: (
        ("message_id", _MESSAGE_ID, _id),
        ("user_id", _USER_ID, _user),
        ("reply_to", _REPLY_TO, _short),
        ("correlation_id", _CORRELATION_ID, _id),
        ("content_type", _CONTENT_TYPE, _text),
        ("content_encoding", _CONTENT_ENCODING, _text),
        ("timestamp", _CREATION_TIME, _time),
        ("app_id", _GROUP_ID, _short),
    ),
}
"""For each section its properties: the name, the position, and how to read it."""


class SectionMessage(Message):
    """A message whose properties are sections, which a publisher cannot splice."""

    __slots__ = ()

    @property
    def raw_properties(self) -> None:
        """None: the properties aren't a property list of AMQP 0-9-1."""
        return


@dataclass(frozen=True, slots=True)
class MessageSource:
    """Implements :class:`~aio_pika_batch.core.message.Source` for the messages of one session.

    Attributes:
        has_addresses: As in `decode_properties`.
    """

    queue: str
    consumer_tag: str
    retry_count_header: str
    has_addresses: bool = True
    _known: dict[bytes, dict[str, Any]] = attribute(default_factory=dict, repr=False, compare=False)

    def decode_properties(self, raw: bytes, /) -> Properties:
        """Read all properties."""
        return decode_properties(raw, has_addresses=self.has_addresses)

    def decode_headers(self, raw: bytes, /) -> Headers | None:
        """Read the headers alone."""
        return decode_headers(raw, self._known)

    def decode_route(self, raw: bytes, /) -> tuple[str, str]:
        """Read exchange and routing key."""
        return decode_route(raw)

    def now(self) -> float:
        """Seconds since the epoch."""
        return time.time()
