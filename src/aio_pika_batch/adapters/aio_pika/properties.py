"""Reads and writes a message's property list.

A property list is kept as raw bytes and is decoded on first use. Client libraries decode it and
encode it again with losses: doubles become floats, absent priorities become 0, and one string that
is not UTF-8 ends the connection.

Laws:

- Reading never raises. A property that cannot be read is listed in `undecodable` with the reason,
  and the others are read all the same.
- A float is written as a double, never narrower. An absent property is not written at all.
- A value that AMQP has no type for is refused with the property's name, before anything is sent.
"""

from __future__ import annotations

import struct
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from aio_pika_batch.adapters.aio_pika.amqp_spec import (
    FLAGS,
    HEADERS_FLAG,
    LENGTH,
    OCTET,
    PROPERTIES,
    SECONDS,
    SHORT,
    TABLE,
    UNDEFINED_FLAGS,
)
from aio_pika_batch.adapters.aio_pika.tables import (
    TableError,
    encode_table,
    encode_text,
    read_table,
)
from aio_pika_batch.core.message import SHORT_STRING, Properties
from aio_pika_batch.errors import PublishError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class PropertyListError(ValueError):
    """A property list ends before its properties do."""


@lru_cache(maxsize=256)  # the messages of a queue have the same few sets of properties
def _announced(flags: int) -> tuple[tuple[int, str, int], ...]:
    """Return the properties that a list with these flags has."""
    return tuple(each for each in PROPERTIES if flags & each[0])


def fields(raw: bytes) -> Iterator[tuple[int, str, int, int, int]]:
    """Yield (flag, name, type, start, end) of each property that is present.

    Raises:
        PropertyListError: From here on, nothing can be found.
    """
    size = len(raw)
    if size < FLAGS.size:
        raise PropertyListError("the property list has no flags")
    present: int = FLAGS.unpack_from(raw)[0]
    if present & UNDEFINED_FLAGS:
        raise PropertyListError("the property list has flags that AMQP 0-9-1 does not define")
    at = FLAGS.size
    for flag, name, kind in _announced(present):
        if at >= size:
            raise PropertyListError(f"the property list is cut off in {name}")
        if kind == SHORT:
            end = at + 1 + raw[at]
        elif kind != TABLE:
            end = at + (1 if kind == OCTET else SECONDS.size)
        elif at + LENGTH.size <= size:
            end = at + LENGTH.size + LENGTH.unpack_from(raw, at)[0]
        else:
            end = size + 1
        if end > size:
            raise PropertyListError(f"the property list is cut off in {name}")
        yield flag, name, kind, at, end
        at = end


@lru_cache(maxsize=256)  # as above
def _around_headers(flags: int) -> tuple[int, tuple[int, ...]]:
    """Return the number of short strings before the headers, and the sizes of what follows them.

    A size of 0 stands for a short string.
    """
    after: list[int] = []
    before = 0
    for flag, _, kind in _announced(flags):
        if flag > HEADERS_FLAG:
            before += 1
        elif flag < HEADERS_FLAG:
            after.append(0 if kind == SHORT else 1 if kind == OCTET else SECONDS.size)
    return before, tuple(after)


def header_table(raw: bytes) -> tuple[int, int]:
    """Return where the header table begins, with its length, and ends; (0, 0) without headers.

    Raises:
        PropertyListError: The list ends before the table does.
    """
    # Finds what `fields` would find, but skips the rest: each failed message is read here.
    try:
        flags = raw[0] << 8 | raw[1]
        if not flags & UNDEFINED_FLAGS:
            if not flags & HEADERS_FLAG:
                return 0, 0
            start = FLAGS.size
            for _ in range(_around_headers(flags)[0]):
                start += 1 + raw[start]
            end: int = start + 4 + LENGTH.unpack_from(raw, start)[0]
            if end <= len(raw):
                return start, end
    except (IndexError, struct.error):
        pass
    for _, _, kind, start, end in fields(raw):
        if kind == TABLE:
            return start, end
    return 0, 0


def is_complete_after(raw: bytes, end: int) -> bool:
    """Return whether the properties after the header table, which ends at *end*, are complete."""
    at = end
    try:
        for size in _around_headers(raw[0] << 8 | raw[1])[1]:
            at += size or 1 + raw[at]
    except IndexError:
        return False
    return at <= len(raw)


def decode(raw: bytes) -> Properties:
    """Read a property list. Never raises."""
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
                undecodable[name] = f"{raw[start + 1 : end]!r} is not UTF-8: {error.reason}"
            except (OverflowError, ValueError, OSError):
                seconds = SECONDS.unpack_from(raw, start)[0]
                undecodable[name] = f"{seconds} is not a time in seconds that a datetime can hold"
    except PropertyListError as error:
        flags = int.from_bytes(raw[:2], "big") if len(raw) >= FLAGS.size else UNDEFINED_FLAGS
        for flag, name, _ in PROPERTIES if flags & UNDEFINED_FLAGS else _announced(flags):
            if not seen & flag:
                undecodable[name] = str(error)
    if undecodable:
        properties.undecodable = undecodable
    return properties


def decode_headers(raw: bytes) -> dict[str, Any] | None:
    """Read only the headers of a property list; None without headers.

    Raises:
        ValueError: The headers cannot be read.
    """
    start, end = header_table(raw)
    return read_table(raw, start, end) if end else None


@lru_cache(maxsize=256)  # as above
def _before_message_id(flags: int) -> tuple[int, ...] | None:
    """Return the sizes of the properties before the id; None without an id.

    A size of 0 stands for a short string, and -1 for a table.
    """
    before: list[int] = []
    for _, name, kind in _announced(flags):
        if name == "message_id":
            return tuple(before)
        before.append({SHORT: 0, TABLE: -1, OCTET: 1}.get(kind, SECONDS.size))
    return None


def decode_message_id(raw: bytes) -> str | None:
    """Read only the message id of a property list; None without one.

    Raises:
        ValueError: It cannot be read.
    """
    # An inbox needs nothing else of each message, and decoding all properties takes ten times as
    # long.
    try:
        flags = raw[0] << 8 | raw[1]
        before = None if flags & UNDEFINED_FLAGS else _before_message_id(flags)
        if before is None and not flags & UNDEFINED_FLAGS:
            return None
        at = FLAGS.size
        for size in before or ():
            if size > 0:
                at += size
            elif size == 0:
                at += 1 + raw[at]
            else:
                at += LENGTH.size + LENGTH.unpack_from(raw, at)[0]
        end = at + 1 + raw[at]
        if before is not None and end <= len(raw):
            return raw[at + 1 : end].decode()
    except (IndexError, struct.error):
        pass
    raise PropertyListError("the message id cannot be read")


def _read_short(raw: bytes, start: int, end: int) -> str:
    return raw[start + 1 : end].decode()


def _read_octet(raw: bytes, start: int, _: int) -> int:
    return raw[start]


def _read_time(raw: bytes, start: int, _: int) -> datetime:
    return datetime.fromtimestamp(SECONDS.unpack_from(raw, start)[0], UTC)


# In the order of the types: SHORT, TABLE, OCTET, TIME.
_READERS: Final[tuple[Callable[[bytes, int, int], Any], ...]] = (
    _read_short,
    read_table,
    _read_octet,
    _read_time,
)


def decode_route(raw: bytes) -> tuple[str, str]:
    """Read exchange and routing key. Never raises.

    Bytes that are not UTF-8 become lone surrogates, and become the same bytes when written again.
    """
    exchange_end = 1 + raw[0] if raw else 1
    exchange = raw[1:exchange_end]
    key_at = exchange_end + 1
    # Use the key's length, not the end: other bytes may follow the key.
    routing_key = raw[key_at : key_at + raw[exchange_end]] if key_at < len(raw) else b""
    return exchange.decode(errors="surrogateescape"), routing_key.decode(errors="surrogateescape")


def encode_short(name: str, text: str) -> bytes:
    """Return the bytes of a short string.

    Raises:
        PublishError: The text is too long.
    """
    data = encode_text(text)
    if len(data) > SHORT_STRING:
        raise PublishError(f"{name} has {len(data)} bytes in UTF-8; AMQP allows {SHORT_STRING}")
    return bytes((len(data),)) + data


def encode(properties: Properties) -> bytes:
    """Return the bytes of a property list.

    Raises:
        PublishError: AMQP has no type for the value of a property or a header. The text names it.
    """
    present = 0
    parts = [b""]
    for flag, name, kind in PROPERTIES:
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
    parts[0] = FLAGS.pack(present)
    return b"".join(parts)


def _write_table(_: str, value: Any) -> bytes:  # noqa: ANN401  -- as the properties are
    return encode_table(value)


def _write_octet(_: str, value: int) -> bytes:
    return bytes((value,))


def _write_time(_: str, value: datetime) -> bytes:
    if value.tzinfo is None:
        value = value.replace(tzinfo=UTC)
    return SECONDS.pack(int(value.timestamp()))


# In the order of the types, as above.
_WRITERS: Final[tuple[Callable[[str, Any], bytes], ...]] = (
    encode_short,
    _write_table,
    _write_octet,
    _write_time,
)
