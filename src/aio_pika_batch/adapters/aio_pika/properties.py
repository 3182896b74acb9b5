"""What do a message's raw property bytes say, and how is a value written so that a broker reads it?

Laws:

- Reading never raises. A property that cannot be read stands in `undecodable`, with the reason, and
  the others are read all the same.
- A float is written as a double, never narrower; an absent property is not written at all.
- A value that AMQP has no type for is refused by name, before anything is sent.

The layout is that of AMQP 0-9-1, section 4.2; the table's types are those that RabbitMQ reads.
"""

from __future__ import annotations

import struct
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from aio_pika_batch.adapters.aio_pika.tables import (
    TableError,
    encode_table,
    encode_text,
    read_table,
)
from aio_pika_batch.core.message import Properties
from aio_pika_batch.errors import PublishError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_FLAGS = struct.Struct(">H")
_LENGTH = struct.Struct(">I")
_SECONDS = struct.Struct(">Q")
_LONGEST_SHORT = 255

SHORT, TABLE, OCTET, TIME = range(4)

FIELDS: Final = (
    (1 << 15, "content_type", SHORT),
    (1 << 14, "content_encoding", SHORT),
    (1 << 13, "headers", TABLE),
    (1 << 12, "delivery_mode", OCTET),
    (1 << 11, "priority", OCTET),
    (1 << 10, "correlation_id", SHORT),
    (1 << 9, "reply_to", SHORT),
    (1 << 8, "expiration", SHORT),
    (1 << 7, "message_id", SHORT),
    (1 << 6, "timestamp", TIME),
    (1 << 5, "type", SHORT),
    (1 << 4, "user_id", SHORT),
    (1 << 3, "app_id", SHORT),
    (1 << 2, "cluster_id", SHORT),
)
"""The flag, the name and the type of each property, in the order of the wire."""

HEADERS_FLAG = 1 << 13
EXPIRATION_FLAG = 1 << 8
_UNKNOWN_FLAGS = 0b11  # a property that nobody has defined, and "more flags follow"


class PropertyListError(ValueError):
    """A property list ends before its properties do."""


@lru_cache(maxsize=256)  # a queue's messages have the same few sets of properties
def _announced(flags: int) -> tuple[tuple[int, str, int], ...]:
    """The properties that a list with these flags has."""
    return tuple(field for field in FIELDS if flags & field[0])


def fields(raw: bytes) -> Iterator[tuple[int, str, int, int, int]]:
    """Walk over the properties that are present: (flag, name, type, start, end) of each.

    Raises:
        PropertyListError: From here on nothing can be found.
    """
    size = len(raw)
    if size < _FLAGS.size:
        raise PropertyListError("the property list has no flags")
    present: int = _FLAGS.unpack_from(raw)[0]
    if present & _UNKNOWN_FLAGS:
        raise PropertyListError("the property list has flags that AMQP 0-9-1 does not define")
    at = _FLAGS.size
    for flag, name, kind in _announced(present):
        if at >= size:
            raise PropertyListError(f"the property list is cut off in {name}")
        if kind == SHORT:
            end = at + 1 + raw[at]
        elif kind != TABLE:
            end = at + (1 if kind == OCTET else 8)
        elif at + 4 <= size:
            end = at + 4 + _LENGTH.unpack_from(raw, at)[0]
        else:
            end = size + 1
        if end > size:
            raise PropertyListError(f"the property list is cut off in {name}")
        yield flag, name, kind, at, end
        at = end


@lru_cache(maxsize=256)  # as above
def _around_headers(flags: int) -> tuple[int, tuple[int, ...]]:
    """How many short strings stand before the headers; and what follows them: sizes, 0 for a short
    string.
    """
    after: list[int] = []
    before = 0
    for flag, _, kind in _announced(flags):
        if flag > HEADERS_FLAG:
            before += 1
        elif flag < HEADERS_FLAG:
            after.append(0 if kind == SHORT else 1 if kind == OCTET else 8)
    return before, tuple(after)


def header_table(raw: bytes) -> tuple[int, int]:
    """Where the header table begins, with its length, and where it ends; (0, 0) if there is none.

    Raises:
        PropertyListError: The list ends before.
    """
    # What `fields` would find, without walking on: every failed message is asked for a header.
    try:
        flags = raw[0] << 8 | raw[1]
        if not flags & _UNKNOWN_FLAGS:
            if not flags & HEADERS_FLAG:
                return 0, 0
            start = 2
            for _ in range(_around_headers(flags)[0]):
                start += 1 + raw[start]
            end: int = start + 4 + _LENGTH.unpack_from(raw, start)[0]
            if end <= len(raw):
                return start, end
    except (IndexError, struct.error):
        pass
    for _, _, kind, start, end in fields(raw):
        if kind == TABLE:
            return start, end
    return 0, 0


def is_whole_after(raw: bytes, end: int) -> bool:
    """Whether all that a list announces behind its header table, which ends there, is there."""
    at = end
    try:
        for size in _around_headers(raw[0] << 8 | raw[1])[1]:
            at += size or 1 + raw[at]
    except IndexError:
        return False
    return at <= len(raw)


def decode(raw: bytes) -> Properties:
    """Read a property list; never raises."""
    properties = Properties()
    undecodable: dict[str, str] = {}
    seen = 0
    try:
        for flag, name, kind, start, end in fields(raw):
            seen |= flag
            try:
                if kind == SHORT:
                    setattr(properties, name, raw[start + 1 : end].decode())
                else:
                    setattr(properties, name, _READERS[kind](raw, start, end))
            except TableError as error:
                undecodable[name] = str(error)
            except UnicodeDecodeError as error:
                undecodable[name] = f"{raw[start + 1 : end]!r} is no UTF-8: {error.reason}"
            except (OverflowError, ValueError, OSError):
                seconds = _SECONDS.unpack_from(raw, start)[0]
                undecodable[name] = f"{seconds} is no time in seconds that a datetime can hold"
    except PropertyListError as error:
        flags = int.from_bytes(raw[:2], "big") if len(raw) >= _FLAGS.size else _UNKNOWN_FLAGS
        for flag, name, _ in FIELDS if flags & _UNKNOWN_FLAGS else _announced(flags):
            if not seen & flag:
                undecodable[name] = str(error)
    if undecodable:
        properties.undecodable = undecodable
    return properties


def decode_headers(raw: bytes) -> dict[str, Any] | None:
    """Read the headers of a property list alone; None where it has none.

    Raises:
        ValueError: They cannot be read.
    """
    start, end = header_table(raw)
    return read_table(raw, start, end) if end else None


def _read_short(raw: bytes, start: int, end: int) -> str:
    return raw[start + 1 : end].decode()


def _read_octet(raw: bytes, start: int, _: int) -> int:
    return raw[start]


def _read_time(raw: bytes, start: int, _: int) -> datetime:
    return datetime.fromtimestamp(_SECONDS.unpack_from(raw, start)[0], UTC)


_READERS: Final[tuple[Callable[[bytes, int, int], Any], ...]] = (
    _read_short,
    read_table,
    _read_octet,
    _read_time,
)


def decode_route(raw: bytes) -> tuple[str, str]:
    """Read exchange and routing key; never raises.

    Bytes that are no UTF-8 become lone surrogates, and the same bytes again when they are written.
    """
    exchange_end = 1 + raw[0] if raw else 1
    exchange = raw[1:exchange_end]
    key_at = exchange_end + 1
    # By its length: something may stand behind it, and no key has more than 255 bytes.
    routing_key = raw[key_at : key_at + raw[exchange_end]] if key_at < len(raw) else b""
    return exchange.decode(errors="surrogateescape"), routing_key.decode(errors="surrogateescape")


def encode_short(name: str, text: str) -> bytes:
    """Write a short string.

    Raises:
        PublishError: It is longer than 255 bytes.
    """
    data = encode_text(text)
    if len(data) > _LONGEST_SHORT:
        raise PublishError(f"{name} has {len(data)} bytes in UTF-8; AMQP allows 255")
    return bytes((len(data),)) + data


def encode(properties: Properties) -> bytes:
    """Write a property list.

    Raises:
        PublishError: A property or a header has a value that AMQP cannot carry; its name is told.
    """
    present = 0
    parts = [b""]
    for flag, name, kind in FIELDS:
        value = getattr(properties, name)
        if value is None:
            continue
        present |= flag
        try:
            parts.append(_WRITERS[kind](name, value))
        except TableError as error:
            raise PublishError(f"header {error}") from error
        except (struct.error, ValueError, TypeError, AttributeError, OverflowError) as error:
            raise PublishError(f"{name} cannot be {value!r}: {error}") from error
    parts[0] = _FLAGS.pack(present)
    return b"".join(parts)


def _write_table(_: str, value: Any) -> bytes:  # noqa: ANN401  -- as the properties are
    return encode_table(value)


def _write_octet(_: str, value: int) -> bytes:
    return bytes((value,))


def _write_time(_: str, value: datetime) -> bytes:
    if value.tzinfo is None:
        value = value.replace(tzinfo=UTC)
    return _SECONDS.pack(int(value.timestamp()))


_WRITERS: Final[tuple[Callable[[str, Any], bytes], ...]] = (
    encode_short,
    _write_table,
    _write_octet,
    _write_time,
)
