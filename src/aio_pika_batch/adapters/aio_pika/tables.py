"""Reads and writes AMQP header tables, and walks over their raw bytes."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from aio_pika_batch.adapters.aio_pika.amqp_spec import (
    ARRAY,
    BINARY,
    BOOLEAN,
    DECIMAL,
    DECIMAL_VALUE,
    DOUBLE,
    FIXED_SIZES,
    INT32,
    INT64,
    LENGTH,
    NESTED_TABLE,
    NUMBERS,
    SECONDS,
    TEXT,
    TIMESTAMP,
    VOID,
)
from aio_pika_batch.core.message import SHORT_STRING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aio_pika_batch.core.message import FieldValue, Headers

DEEPEST = 64
"""Levels of nested tables. RabbitMQ's own `x-death` has three; Python's stack ends at about 300."""

# A type and its value.
_TYPED_LENGTH = struct.Struct(">BI")
_TYPED_DECIMAL = struct.Struct(">BBi")
_TYPED_DOUBLE = struct.Struct(">Bd")
_TYPED_INT32 = struct.Struct(">Bi")
_TYPED_INT64 = struct.Struct(">Bq")
_TYPED_TIME = struct.Struct(">BQ")
_SHOWN = 80

_NESTED: Final = (ARRAY, NESTED_TABLE)
_WITH_LENGTH: Final = frozenset((TEXT, BINARY, *_NESTED))
_TOO_DEEP: Final = f"tables are nested more than {DEEPEST} levels deep"


class TableError(ValueError):
    """A table cannot be read, or a value cannot be written. The text begins with the key."""


def encode_text(text: str) -> bytes:
    """Encode as UTF-8.

    Lone surrogates become the bytes that they were decoded from, or an escape if they were not.
    """
    try:
        return text.encode()
    except UnicodeEncodeError:
        pass
    try:
        return text.encode(errors="surrogateescape")
    except UnicodeEncodeError:
        return text.encode(errors="backslashreplace")


# --- walking -------------------------------------------------------------------


def entries(raw: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int, int]]:
    """Yield (key, start of the entry, start of the value, end) of each entry in a range.

    Raises:
        TableError: From here on, the bytes are not a table.
    """
    at = start
    fixed, length_at = FIXED_SIZES, LENGTH.unpack_from
    while at < end:
        value_start = at + 1 + raw[at]
        key = raw[at + 1 : value_start]
        # As in `_items`, inlined: this loop runs twice for each header of each requeued message.
        try:
            kind = raw[value_start]
            if kind in fixed:
                value_end = value_start + 1 + fixed[kind]
            elif kind in _WITH_LENGTH:
                value_end = value_start + 5 + length_at(raw, value_start + 1)[0]
            else:
                value_end = end + 1
        except (IndexError, struct.error):
            value_end = end + 1
        if value_end > end:
            raise TableError(f"{_shown(key)}: {_describe_unreadable(raw, value_start, end)}")
        yield key, at, value_start, value_end
        at = value_end


def _describe_unreadable(raw: bytes, start: int, end: int) -> str:
    if start < end and raw[start] not in FIXED_SIZES and raw[start] not in _WITH_LENGTH:
        return f"there is no type {chr(raw[start])!r}"
    return "it is cut off"


def _shown(key: bytes) -> str:
    # Cut short: tables nest, so keys add up, and the text is logged.
    return repr(key[:_SHOWN].decode(errors="replace"))


def check_value(raw: bytes, start: int, end: int, depth: int = DEEPEST) -> None:
    """Check that a broker can read the value that begins with its type at *start*.

    Raises:
        TableError: It cannot be read. Publishing it would end the connection.
    """
    kind = raw[start]
    if kind in _NESTED:
        if not depth:
            raise TableError(_TOO_DEEP)
        if kind == NESTED_TABLE:
            for _, _, value, value_end in entries(raw, start + 5, end):
                check_value(raw, value, value_end, depth - 1)
        else:
            for value, value_end in _items(raw, start + 5, end):
                check_value(raw, value, value_end, depth - 1)


def _items(raw: bytes, at: int, end: int) -> Iterator[tuple[int, int]]:
    while at < end:
        kind = raw[at]
        value_end = end + 1
        if kind in FIXED_SIZES:
            value_end = at + 1 + FIXED_SIZES[kind]
        elif kind in _WITH_LENGTH and at + 5 <= end:
            value_end = at + 5 + LENGTH.unpack_from(raw, at + 1)[0]
        if value_end > end:
            raise TableError(_describe_unreadable(raw, at, end))
        yield at, value_end
        at = value_end


# --- reading -------------------------------------------------------------------


def read_table(raw: bytes, start: int, end: int, depth: int = DEEPEST) -> dict[str, Any]:
    """Read the table whose length begins at *start*.

    Raises:
        TableError: The table, or a value in it, cannot be read. The text says which.
    """
    table: dict[str, Any] = {}
    for key, _, value_start, value_end in entries(raw, start + 4, end):
        try:
            table[key.decode()] = _read_value(raw, value_start, value_end, depth)
        except UnicodeDecodeError as error:
            raise TableError(f"the key {key[:_SHOWN]!r} is not UTF-8") from error
        except TableError as error:
            raise TableError(f"{_shown(key)}: {error}") from error
    return table


def _read_value(raw: bytes, start: int, end: int, depth: int) -> FieldValue:
    kind = raw[start]
    if kind == TEXT:
        text = raw[start + 5 : end]
        try:
            return text.decode()
        except UnicodeDecodeError:
            # AMQP has one type for text and for bytes. The handler knows which it expects.
            return text
    number = NUMBERS.get(kind)
    if number is not None:
        value: FieldValue = number.unpack_from(raw, start + 1)[0]
        return value
    if kind in _NESTED:
        if not depth:
            raise TableError(_TOO_DEEP)
        if kind == NESTED_TABLE:
            return read_table(raw, start + 1, end, depth - 1)
        return [_read_value(raw, *item, depth - 1) for item in _items(raw, start + 5, end)]
    return _read_rare(kind, raw, start + 1, end)


def _read_rare(kind: int, raw: bytes, start: int, end: int) -> FieldValue:
    if kind == TIMESTAMP:
        seconds: int = SECONDS.unpack_from(raw, start)[0]
        try:
            return datetime.fromtimestamp(seconds, UTC)
        except (OverflowError, ValueError, OSError):
            # Probably milliseconds. One wrong header must not make the others unreadable.
            return seconds
    if kind == DECIMAL:
        places, digits = DECIMAL_VALUE.unpack_from(raw, start)
        return Decimal(digits).scaleb(-places)
    return raw[start + LENGTH.size : end] if kind == BINARY else None


# --- writing -------------------------------------------------------------------


def encode_table(table: Headers) -> bytes:
    """Return the table's bytes, beginning with their length.

    Raises:
        TableError: A key or a value cannot be written. The text says which.
    """
    data = b"".join([encode_entry(key, value) for key, value in table.items()])
    return LENGTH.pack(len(data)) + data


def encode_entry(key: str, value: FieldValue, depth: int = DEEPEST) -> bytes:
    """Return the bytes of a key and its value.

    Raises:
        TableError: One of them cannot be written.
    """
    try:
        return _encode_key(key) + _encode_value(value, depth)
    except TableError as error:
        raise TableError(f"{key!r}: {error}") from error


@lru_cache(maxsize=512)  # a program writes the same few keys again and again
def _encode_key(key: str) -> bytes:
    if not isinstance(key, str):
        raise TableError("a key must be a str")
    name = encode_text(key)
    if len(name) > SHORT_STRING:
        raise TableError(f"the key has {len(name)} bytes in UTF-8; AMQP allows {SHORT_STRING}")
    return bytes((len(name),)) + name


def _encode_value(value: FieldValue, depth: int) -> bytes:
    write = _WRITERS.get(type(value))
    if write is None:  # a subclass, an IntEnum for example
        write = next((each for kind, each in _WRITERS.items() if isinstance(value, kind)), None)
    if write is not None:
        return write(value)
    if not isinstance(value, Mapping | list | tuple):
        raise TableError(f"AMQP has no type for {type(value).__name__}")
    if not depth:
        raise TableError(_TOO_DEEP)
    if isinstance(value, Mapping):
        rows = [encode_entry(key, item, depth - 1) for key, item in value.items()]
        return _with_length(NESTED_TABLE, b"".join(rows))
    return _with_length(ARRAY, b"".join([_encode_value(item, depth - 1) for item in value]))


def _with_length(kind: int, data: bytes) -> bytes:
    return _TYPED_LENGTH.pack(kind, len(data)) + data


def _encode_int(value: int) -> bytes:
    # As most clients do: 32 bits if they suffice, else 64. Some read narrower types as bytes.
    try:
        if -(2**31) <= value < 2**31:
            return _TYPED_INT32.pack(INT32, value)
        return _TYPED_INT64.pack(INT64, value)
    except struct.error as error:
        raise TableError(f"{value} has more than 64 bits") from error


def to_seconds(value: datetime) -> int:
    """Return a time as AMQP writes it; one without a zone counts as UTC."""
    # Python would take it as a local time, which depends on the machine.
    return int((value if value.tzinfo is not None else value.replace(tzinfo=UTC)).timestamp())


def _encode_time(value: datetime) -> bytes:
    try:
        return _TYPED_TIME.pack(TIMESTAMP, to_seconds(value))
    except struct.error as error:
        raise TableError(f"{value} is before 1970, where AMQP's timestamps begin") from error


def _encode_decimal(value: Decimal) -> bytes:
    sign, digits, exponent = value.as_tuple()
    if isinstance(exponent, str):
        raise TableError(f"AMQP has no decimal {value}")
    number = int("".join(map(str, digits)))
    if exponent > 0:
        number *= 10**exponent
        exponent = 0
    try:
        return _TYPED_DECIMAL.pack(DECIMAL, -exponent, -number if sign else number)
    except struct.error as error:
        raise TableError(f"{value} has more digits than AMQP's decimal allows") from error


_WRITERS: Final[Mapping[type, Callable[[Any], bytes]]] = {
    str: lambda value: _with_length(TEXT, encode_text(value)),
    bool: lambda value: bytes((BOOLEAN, value)),  # before int: a bool is an int, too
    int: _encode_int,
    float: lambda value: _TYPED_DOUBLE.pack(DOUBLE, value),
    type(None): lambda _: bytes((VOID,)),
    bytes: lambda value: _with_length(BINARY, value),
    datetime: _encode_time,
    Decimal: _encode_decimal,
}
