"""How is a header table read, written and walked over?

The types are those that RabbitMQ reads and writes, which differ from AMQP 0-9-1's own list
(`s` is a short integer, `x` is binary); `L` is read as other clients write it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from datetime import UTC, datetime
from decimal import Decimal
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
_COUNTED: Final = frozenset((_TEXT, _BINARY, _ARRAY, _TABLE))
_TIMESTAMP, _DECIMALS, _VOID = ord("T"), ord("D"), ord("V")


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
    while at < end:
        value_start = at + 1 + raw[at]
        if value_start >= end:
            raise TableError(f"a key at byte {at - start} is cut off")
        key = raw[at + 1 : value_start]
        try:
            value_end = _value_end(raw, value_start, end)
        except TableError as error:
            raise TableError(f"{key.decode(errors='replace')!r}: {error}") from error
        yield key, at, value_start, value_end
        at = value_end


def _value_end(raw: bytes, start: int, end: int) -> int:
    """Where the value that begins with its type at *start* ends."""
    kind = raw[start]
    fixed = _FIXED.get(kind)
    if fixed is not None:
        value_end = start + 1 + fixed
    elif kind not in _COUNTED:
        raise TableError(f"there is no type {chr(kind)!r}")
    elif start + 5 > end:
        raise TableError("a value is cut off")
    else:
        value_end = start + 5 + _LENGTH.unpack_from(raw, start + 1)[0]
    if value_end > end:
        raise TableError("a value is cut off")
    return value_end


def check_value(raw: bytes, start: int, end: int, depth: int = DEEPEST) -> None:
    """Look whether a broker could read the value that begins with its type at *start*.

    Raises:
        TableError: It could not; publishing it would end the connection.
    """
    kind = raw[start]
    if kind in (_TABLE, _ARRAY):
        if not depth:
            raise TableError(f"tables stand more than {DEEPEST} deep in each other")
        if kind == _TABLE:
            for _, _, value, value_end in entries(raw, start + 5, end):
                check_value(raw, value, value_end, depth - 1)
        else:
            at = start + 5
            while at < end:
                value_end = _value_end(raw, at, end)
                check_value(raw, at, value_end, depth - 1)
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
            name = key.decode()
        except UnicodeDecodeError as error:
            raise TableError(f"the key {key!r} is no UTF-8") from error
        try:
            table[name] = _read_value(raw, value_start, value_end, depth)
        except TableError as error:
            raise TableError(f"{name!r}: {error}") from error
    return table


def _read_value(raw: bytes, start: int, end: int, depth: int) -> FieldValue:  # noqa: PLR0911
    kind = raw[start]
    start += 1
    number = _NUMBERS.get(kind)
    if number is not None:
        value: FieldValue = number.unpack_from(raw, start)[0]
        return value
    match kind:
        case _ if kind == _TEXT:
            text = raw[start + 4 : end]
            try:
                return text.decode()
            except UnicodeDecodeError:
                # The wire has one type for text and for bytes, and its users know which it is.
                return text
        case _ if kind == _BINARY:
            return raw[start + 4 : end]
        case _ if kind == _TIMESTAMP:
            return _read_time(raw, start)
        case _ if kind == _DECIMALS:
            places, digits = _DECIMAL.unpack_from(raw, start)
            return Decimal(digits).scaleb(-places)
        case _ if kind == _VOID:
            return None
    if not depth:
        raise TableError(f"tables stand more than {DEEPEST} deep in each other")
    if kind == _TABLE:
        return read_table(raw, start, end, depth - 1)
    return _read_array(raw, start + 4, end, depth - 1)


def _read_array(raw: bytes, at: int, end: int, depth: int) -> list[FieldValue]:
    array: list[FieldValue] = []
    while at < end:
        value_end = _value_end(raw, at, end)
        array.append(_read_value(raw, at, value_end, depth))
        at = value_end
    return array


def _read_time(raw: bytes, start: int) -> datetime | int:
    seconds: int = _SECONDS.unpack_from(raw, start)[0]
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, ValueError, OSError):
        # Milliseconds, most likely. One odd header must not make all of them unreadable.
        return seconds


# --- writing -------------------------------------------------------------------


def encode_table(table: Headers) -> bytes:
    """Write a table, with its length.

    Raises:
        TableError: A key or a value cannot be written; the text says which.
    """
    data = b"".join(encode_entry(key, value) for key, value in table.items())
    return _LENGTH.pack(len(data)) + data


def encode_entry(key: str, value: FieldValue, depth: int = DEEPEST) -> bytes:
    """Write a key and its value.

    Raises:
        TableError: As above.
    """
    if not isinstance(key, str):
        raise TableError(f"{key!r}: a key must be a str")
    name = encode_text(key)
    if len(name) > _LONGEST_KEY:
        raise TableError(f"{key[:40]!r}…: the key has {len(name)} bytes in UTF-8; AMQP allows 255")
    try:
        return bytes((len(name),)) + name + _encode_value(value, depth)
    except TableError as error:
        raise TableError(f"{key!r}: {error}") from error


def _encode_value(value: FieldValue, depth: int) -> bytes:  # noqa: C901, PLR0911  -- one case for each type
    match value:
        case str():
            return _counted(_TEXT, encode_text(value))
        case bool():
            return b"t\x01" if value else b"t\x00"
        case int():
            return _encode_int(value)
        case float():
            return _DOUBLE.pack(b"d", value)
        case None:
            return b"V"
        case bytes():
            return _counted(_BINARY, value)
        case datetime():
            return _encode_time(value)
        case Decimal():
            return _encode_decimal(value)
        case Mapping() | list() | tuple() if not depth:
            raise TableError(f"tables stand more than {DEEPEST} deep in each other")
        case Mapping():
            rows = (encode_entry(key, item, depth - 1) for key, item in value.items())
            return _counted(_TABLE, b"".join(rows))
        case list() | tuple():
            return _counted(_ARRAY, b"".join(_encode_value(item, depth - 1) for item in value))
    raise TableError(f"AMQP has no type for {type(value).__name__}")


def _counted(kind: int, data: bytes) -> bytes:
    return bytes((kind,)) + _LENGTH.pack(len(data)) + data


def _encode_int(value: int) -> bytes:
    # As most clients do: `I` where it fits, else `l`; narrower types are read as bytes by some.
    for letter, layout in ((b"I", _INT), (b"l", _LONG)):
        try:
            return layout.pack(letter, value)
        except struct.error:
            continue
    raise TableError(f"{value} has more than 64 bits")


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
