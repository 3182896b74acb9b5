"""How is a header table read, written and walked over?

The types are those that RabbitMQ reads and writes, which differ from AMQP 0-9-1's own list
(`s` is a short integer, `x` is binary); `L` is read as other clients write it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from decimal import Decimal
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aio_pika_batch.core.message import FieldValue, Headers

DEEPEST = 64
"""Tables within tables. RabbitMQ's own `x-death` has three; Python's stack ends at about 300."""

_LENGTH = struct.Struct(">I")
_SECONDS = struct.Struct(">Q")
_DECIMAL = struct.Struct(">Bi")
_DOUBLE = struct.Struct(">cd")
_INT = struct.Struct(">ci")
_LONG = struct.Struct(">cq")
_TIME = struct.Struct(">cQ")
_LONGEST_KEY = 255
_SHOWN = 80
_LONGEST = 0xFFFF_FFFF

_NUMBERS: Final = {
    ord(letter): struct.Struct(layout)
    for letter, layout in {
        "b": ">b",
        "B": ">B",
        "s": ">h",
        "u": ">H",
        "I": ">i",
        "i": ">I",
        "l": ">q",
        "L": ">q",
        "f": ">f",
        "d": ">d",
        "t": "?",
    }.items()
}

_FIXED: Final = {
    **{letter: layout.size for letter, layout in _NUMBERS.items()},
    ord("T"): 8,
    ord("D"): 5,
    ord("V"): 0,
}
_TEXT, _BINARY, _ARRAY, _TABLE = ord("S"), ord("x"), ord("A"), ord("F")
_NESTED: Final = (_ARRAY, _TABLE)
_COUNTED: Final = frozenset((_TEXT, _BINARY, *_NESTED))
_TIMESTAMP, _DECIMALS = ord("T"), ord("D")
_TOO_DEEP: Final = f"tables stand more than {DEEPEST} deep in each other"


class TableError(ValueError):
    """A table cannot be read, or a value cannot be written; the text begins with the name."""


def encode_text(text: str) -> bytes:
    """Write a text in UTF-8; what UTF-8 cannot carry goes as it came, or as an escape."""
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
    """Walk over the entries between *start* and *end*: (key, entry's start, value's start, end).

    Raises:
        TableError: The bytes are no table's from here on.
    """
    at = start
    fixed, length_at = _FIXED, _LENGTH.unpack_from
    while at < end:
        value_start = at + 1 + raw[at]
        key = raw[at + 1 : value_start]
        # `_value_end`, written out: every requeue comes by here twice for each header.
        try:
            kind = raw[value_start]
            if kind in fixed:
                value_end = value_start + 1 + fixed[kind]
            elif kind in _COUNTED:
                value_end = value_start + 5 + length_at(raw, value_start + 1)[0]
            else:
                value_end = end + 1
        except (IndexError, struct.error):
            value_end = end + 1
        if value_end > end:
            raise TableError(f"{_shown(key)}: {_why_not(raw, value_start, end)}")
        yield key, at, value_start, value_end
        at = value_end


def _value_end(raw: bytes, start: int, end: int) -> int:
    """Where the value that begins with its type at *start* ends; beyond *end* if it cannot."""
    if start < end:
        kind = raw[start]
        fixed = _FIXED.get(kind)
        if fixed is not None:
            return start + 1 + fixed
        if kind in _COUNTED and start + 5 <= end:
            length: int = _LENGTH.unpack_from(raw, start + 1)[0]
            return start + 5 + length
    return end + 1


def _why_not(raw: bytes, start: int, end: int) -> str:
    if start < end and raw[start] not in _FIXED and raw[start] not in _COUNTED:
        return f"there is no type {chr(raw[start])!r}"
    return "it is cut off"


def _shown(key: bytes) -> str:
    # Tables nest, and their keys add up, in a text that goes into logs.
    return repr(key[:_SHOWN].decode(errors="replace"))


def check_value(raw: bytes, start: int, end: int, depth: int = DEEPEST) -> None:
    """Look whether a broker could read the value that begins with its type at *start*.

    Raises:
        TableError: It could not; publishing it would end the connection.
    """
    kind = raw[start]
    if kind in _NESTED:
        if not depth:
            raise TableError(_TOO_DEEP)
        if kind == _TABLE:
            for _, _, value, value_end in entries(raw, start + 5, end):
                check_value(raw, value, value_end, depth - 1)
        else:
            for value, value_end in _items(raw, start + 5, end):
                check_value(raw, value, value_end, depth - 1)


def _items(raw: bytes, at: int, end: int) -> Iterator[tuple[int, int]]:
    while at < end:
        value_end = _value_end(raw, at, end)
        if value_end > end:
            raise TableError(_why_not(raw, at, end))
        yield at, value_end
        at = value_end


# --- reading -------------------------------------------------------------------


def read_table(raw: bytes, start: int, end: int, depth: int = DEEPEST) -> dict[str, Any]:
    """Read the table whose length stands at *start*.

    Raises:
        TableError: It, or a value of it, cannot be read; the text says which.
    """
    table: dict[str, Any] = {}
    for key, _, value_start, value_end in entries(raw, start + 4, end):
        try:
            table[key.decode()] = _read_value(raw, value_start, value_end, depth)
        except UnicodeDecodeError as error:
            raise TableError(f"the key {key[:_SHOWN]!r} is no UTF-8") from error
        except TableError as error:
            raise TableError(f"{_shown(key)}: {error}") from error
    return table


def _read_value(raw: bytes, start: int, end: int, depth: int) -> FieldValue:
    kind = raw[start]
    if kind == _TEXT:
        text = raw[start + 5 : end]
        try:
            return text.decode()
        except UnicodeDecodeError:
            # The wire has one type for text and for bytes, and its users know which it is.
            return text
    number = _NUMBERS.get(kind)
    if number is not None:
        value: FieldValue = number.unpack_from(raw, start + 1)[0]
        return value
    if kind in _NESTED:
        if not depth:
            raise TableError(_TOO_DEEP)
        if kind == _TABLE:
            return read_table(raw, start + 1, end, depth - 1)
        return [_read_value(raw, *item, depth - 1) for item in _items(raw, start + 5, end)]
    return _read_rare(kind, raw, start + 1, end)


def _read_rare(kind: int, raw: bytes, start: int, end: int) -> FieldValue:
    if kind == _TIMESTAMP:
        seconds: int = _SECONDS.unpack_from(raw, start)[0]
        try:
            return datetime.fromtimestamp(seconds, UTC)
        except (OverflowError, ValueError, OSError):
            # Milliseconds, most likely. One odd header must not make all of them unreadable.
            return seconds
    if kind == _DECIMALS:
        places, digits = _DECIMAL.unpack_from(raw, start)
        return Decimal(digits).scaleb(-places)
    return raw[start + 4 : end] if kind == _BINARY else None


# --- writing -------------------------------------------------------------------


def encode_table(table: Headers) -> bytes:
    """Write a table, with its length.

    Raises:
        TableError: A key or a value cannot be written; the text says which.
    """
    data = b"".join([encode_entry(key, value) for key, value in table.items()])
    return _LENGTH.pack(len(data)) + data


def encode_entry(key: str, value: FieldValue, depth: int = DEEPEST) -> bytes:
    """Write a key and its value.

    Raises:
        TableError: As above.
    """
    try:
        return _encode_key(key) + _encode_value(value, depth)
    except TableError as error:
        raise TableError(f"{key!r}: {error}") from error


@lru_cache(maxsize=512)  # the same few keys, again and again
def _encode_key(key: str) -> bytes:
    if not isinstance(key, str):
        raise TableError("a key must be a str")
    name = encode_text(key)
    if len(name) > _LONGEST_KEY:
        raise TableError(f"the key has {len(name)} bytes in UTF-8; AMQP allows 255")
    return bytes((len(name),)) + name


def _encode_value(value: FieldValue, depth: int) -> bytes:
    write = _WRITERS.get(type(value))
    if write is None:
        write = next((each for kind, each in _WRITERS.items() if isinstance(value, kind)), None)
    if write is not None:
        return write(value)
    if not isinstance(value, Mapping | list | tuple):
        raise TableError(f"AMQP has no type for {type(value).__name__}")
    if not depth:
        raise TableError(_TOO_DEEP)
    if isinstance(value, Mapping):
        rows = [encode_entry(key, item, depth - 1) for key, item in value.items()]
        return _counted(b"F", b"".join(rows))
    return _counted(b"A", b"".join([_encode_value(item, depth - 1) for item in value]))


def _counted(kind: bytes, data: bytes) -> bytes:
    return kind + _LENGTH.pack(len(data)) + data


def _encode_int(value: int) -> bytes:
    # As most clients do: `I` where it fits, else `l`; narrower types are read as bytes by some.
    try:
        return _INT.pack(b"I", value) if -(2**31) <= value < 2**31 else _LONG.pack(b"l", value)
    except struct.error as error:
        raise TableError(f"{value} has more than 64 bits") from error


def _encode_time(value: datetime) -> bytes:
    moment = value if value.tzinfo is not None else value.replace(tzinfo=UTC)
    try:
        return _TIME.pack(b"T", int(moment.timestamp()))
    except struct.error as error:
        raise TableError(f"{value} is before 1970; AMQP counts from there") from error


def _encode_decimal(value: Decimal) -> bytes:
    sign, digits, exponent = value.as_tuple()
    if isinstance(exponent, str):
        raise TableError(f"AMQP has no decimal {value}")
    number = int("".join(map(str, digits)))
    if exponent > 0:
        number *= 10**exponent
        exponent = 0
    try:
        return b"D" + _DECIMAL.pack(-exponent, -number if sign else number)
    except struct.error as error:
        raise TableError(f"{value} has more digits than AMQP's decimal") from error


_WRITERS: Final[Mapping[type, Callable[[Any], bytes]]] = {
    str: lambda value: _counted(b"S", encode_text(value)),
    bool: lambda value: b"t\x01" if value else b"t\x00",  # before int, which it is too
    int: _encode_int,
    float: lambda value: _DOUBLE.pack(b"d", value),
    type(None): lambda _: b"V",
    bytes: lambda value: _counted(b"x", value),
    datetime: _encode_time,
    Decimal: _encode_decimal,
}
