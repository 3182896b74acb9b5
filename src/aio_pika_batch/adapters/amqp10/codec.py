"""Reads and writes the values of AMQP 1.0's type system.

Laws:

- For any bytes, reading raises nothing but `CodecError`. Memory grows with the bytes, and not with
  what they announce.
- A value that was read is written with the same type again.
- A value without a type in AMQP is refused.

Python's own types represent the common ones: `int` is a long, `float` a double, `str` a string,
`bytes` a binary, `list` and `dict` a list and a map. The classes here represent the others.
"""

from __future__ import annotations

import struct
from typing import Any, Final, NamedTuple
from uuid import UUID

DEEPEST: Final = 64
"""The deepest nesting of values. RabbitMQ's own dead-letter history has three levels."""


class CodecError(ValueError):
    """The bytes aren't a value of AMQP 1.0, or a value cannot be written."""


class UByte(int):
    """An unsigned integer of 8 bits."""


class UShort(int):
    """An unsigned integer of 16 bits."""


class UInt(int):
    """An unsigned integer of 32 bits."""


class ULong(int):
    """An unsigned integer of 64 bits."""


class Byte(int):
    """A signed integer of 8 bits."""


class Short(int):
    """A signed integer of 16 bits."""


class Int(int):
    """A signed integer of 32 bits."""


class Char(int):
    """A code point of Unicode."""


class Timestamp(int):
    """Milliseconds since the epoch."""


class Float(float):
    """A floating-point number of 32 bits."""


class Decimal(bytes):
    """A decimal number, as its 4, 8 or 16 bytes. RabbitMQ doesn't deliver any."""


class Symbol(str):
    """A name from an agreed set, such as a map's key."""

    __slots__ = ()


class NotText(bytes):
    """A string or symbol that isn't UTF-8. RabbitMQ passes on what a publisher wrote."""


class Array(list[Any]):
    """Values of one type."""


class Described(NamedTuple):
    """A value with a descriptor, which identifies its type."""

    descriptor: Any
    value: Any


_BYTE = struct.Struct(">B")
_LENGTH = struct.Struct(">I")

_DESCRIBED: Final = 0x00
_NULL, _TRUE, _FALSE, _UINT_0, _ULONG_0, _EMPTY_LIST = 0x40, 0x41, 0x42, 0x43, 0x44, 0x45
_BINARY, _STRING, _SYMBOL = 0x0, 0x1, 0x3
_MAP8, _LONG, _SMALL_LONG = 0xC1, 0x81, 0x55
_SHORT_TEXTS: Final = frozenset((0xA1, 0xA3))
_TRUTHS: Final = frozenset((_TRUE, _FALSE))
_LIST, _MAP = 0x0, 0x1

# The upper half of a constructor says how much follows (section 1.2 of the specification).
_WIDTHS: Final = {0x4: 0, 0x5: 1, 0x6: 2, 0x7: 4, 0x8: 8, 0x9: 16}
_SHORT_SIZES: Final = frozenset((0xA, 0xC, 0xE))
_LONG_SIZES: Final = frozenset((0xB, 0xD, 0xF))
_BLOBS: Final = frozenset((0xA, 0xB))
_COMPOUNDS: Final = frozenset((0xC, 0xD))

_CONSTANTS: Final[dict[int, Any]] = {
    _NULL: None,
    _TRUE: True,
    _FALSE: False,
    _UINT_0: UInt(0),
    _ULONG_0: ULong(0),
}

_FIXED: Final[dict[int, tuple[struct.Struct, Any]]] = {
    code: (struct.Struct(layout), kind)
    for code, layout, kind in (
        (0x50, ">B", UByte),
        (0x51, ">b", Byte),
        (0x52, ">B", UInt),
        (0x53, ">B", ULong),
        (0x54, ">b", Int),
        (0x55, ">b", int),
        (0x56, "?", bool),
        (0x60, ">H", UShort),
        (0x61, ">h", Short),
        (0x70, ">I", UInt),
        (0x71, ">i", Int),
        (0x72, ">f", Float),
        (0x73, ">I", Char),
        (0x74, "4s", Decimal),
        (0x80, ">Q", ULong),
        (0x81, ">q", int),
        (0x82, ">d", float),
        (0x83, ">q", Timestamp),
        (0x84, "8s", Decimal),
        (0x94, "16s", Decimal),
        (0x98, "16s", lambda data: UUID(bytes=data)),
    )
}


# --- reading -------------------------------------------------------------------


def end_of(data: bytes, at: int, end: int) -> int:
    """Return where the value at *at* ends, without decoding it.

    Raises:
        CodecError: It is incomplete, or its type is unknown.
    """
    code, at = _constructor(data, at, end)
    missing = 0
    # A descriptor may itself be described. Each descriptor needs two values instead of one.
    while code == _DESCRIBED or missing:
        if code == _DESCRIBED:
            missing += 1
        else:
            at = _end(code, data, at, end)
            missing -= 1
        code, at = _constructor(data, at, end)
    return _end(code, data, at, end)


def read(data: bytes, at: int, end: int, depth: int = DEEPEST) -> tuple[Any, int]:
    """Read the value at *at*; return it and where it ends.

    Raises:
        CodecError: It is incomplete, malformed, or nested too deep.
    """
    code, at = _constructor(data, at, end)
    if code == _DESCRIBED:
        if not depth:
            raise _too_deep(at)
        descriptor, at = read(data, at, end, depth - 1)
        value, at = read(data, at, end, depth - 1)
        return Described(descriptor, value), at
    stop = _end(code, data, at, end)
    return _value(code, data, at, stop, depth), stop


def _constructor(data: bytes, at: int, end: int) -> tuple[int, int]:
    if at >= end:
        raise CodecError(f"a value is missing at byte {at}")
    return data[at], at + 1


def _end(code: int, data: bytes, at: int, end: int) -> int:
    """Return where a value ends whose content begins at *at*."""
    family = code >> 4
    width = _WIDTHS.get(family)
    if width is not None:
        stop = at + width
    elif family in _SHORT_SIZES and at < end:
        stop = at + 1 + data[at]
    elif family in _LONG_SIZES and at + 4 <= end:
        stop = at + 4 + int(_LENGTH.unpack_from(data, at)[0])
    elif family in _SHORT_SIZES or family in _LONG_SIZES:
        stop = end + 1
    else:
        raise CodecError(f"AMQP has no type 0x{code:02x}, as at byte {at - 1}")
    if stop > end:
        raise CodecError(f"the value at byte {at - 1} is cut off")
    return stop


def _value(code: int, data: bytes, at: int, stop: int, depth: int) -> Any:  # noqa: ANN401
    """Read the content of a value with this constructor, which ends at *stop*."""
    fixed = _FIXED.get(code)
    if fixed is not None:
        layout, kind = fixed
        return kind(layout.unpack_from(data, at)[0])
    if code in _CONSTANTS:
        return _CONSTANTS[code]
    if code == _EMPTY_LIST:
        return []
    family, kind = code >> 4, code & 0xF
    if family in _BLOBS:
        return _text_or_bytes(
            kind, data[at + (1 if family in _SHORT_SIZES else 4) : stop], code, at
        )
    if not depth:
        raise _too_deep(at)
    if family in _COMPOUNDS and kind in (_LIST, _MAP):
        count, at = _count(code, data, at, stop)
        items = []
        for _ in range(count):
            item, at = read(data, at, stop, depth - 1)
            items.append(item)
        _is_used_up(at, stop)
        return items if kind == _LIST else _mapped(items, stop)
    if kind == 0 and (family in _SHORT_SIZES or family in _LONG_SIZES):
        return _array(code, data, at, stop, depth)
    raise CodecError(f"AMQP has no type 0x{code:02x}, as at byte {at - 1}")


def _text_or_bytes(kind: int, content: bytes, code: int, at: int) -> bytes | str:
    if kind == _BINARY:
        return content
    if kind not in (_STRING, _SYMBOL):
        raise CodecError(f"AMQP has no type 0x{code:02x}, as at byte {at - 1}")
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return NotText(content)
    return text if kind == _STRING else Symbol(text)


def _count(code: int, data: bytes, at: int, stop: int) -> tuple[int, int]:
    """Return how many items a list, map or array announces, and where they begin."""
    layout = _BYTE if code >> 4 in _SHORT_SIZES else _LENGTH
    first = at + 2 * layout.size
    if first > stop:
        raise CodecError(f"the value at byte {at - 1} is too short for its count")
    count: int = layout.unpack_from(data, at + layout.size)[0]
    # Each item takes at least a byte. In an array, nulls take none, but RabbitMQ doesn't send such
    # arrays, and a few bytes could announce billions of items.
    if count > stop - at:
        raise CodecError(f"the value at byte {at - 1} announces {count} items, more than it holds")
    return count, first


def _mapped(items: list[Any], stop: int) -> dict[Any, Any]:
    if len(items) % 2:
        raise CodecError(f"the map that ends at byte {stop} has a key without a value")
    try:
        return dict(zip(items[::2], items[1::2], strict=True))
    except TypeError as error:
        raise CodecError(f"the map that ends at byte {stop} has a list or a map as key") from error


def _array(code: int, data: bytes, at: int, stop: int, depth: int) -> Array:
    count, at = _count(code, data, at, stop)
    descriptors = []
    kind, at = _constructor(data, at, stop)
    while kind == _DESCRIBED:
        descriptor, at = read(data, at, stop, depth - 1)
        descriptors.append(descriptor)
        kind, at = _constructor(data, at, stop)
    if len(descriptors) > depth:
        raise _too_deep(at)
    items = Array()
    for _ in range(count):
        after = _end(kind, data, at, stop)
        item = _value(kind, data, at, after, depth - 1)
        for descriptor in reversed(descriptors):
            item = Described(descriptor, item)
        items.append(item)
        at = after
    _is_used_up(at, stop)
    return items


def _is_used_up(at: int, stop: int) -> None:
    if at != stop:
        raise CodecError(f"the value that ends at byte {stop} has {stop - at} bytes too many")


def _too_deep(at: int) -> CodecError:
    return CodecError(f"values are nested more than {DEEPEST} deep at byte {at - 1}")


def read_map(data: bytes, at: int, end: int) -> Any:  # noqa: ANN401
    """Read the value between *at* and *end*, quickly if it is a map of texts and usual values.

    Keys and texts are `str`, whether they are strings or symbols. Raises what `read` raises.
    """
    # Written in one loop, because it runs for the headers of each message that is retried.
    items: dict[Any, Any] = {}
    try:
        size, count, start = data[at + 1], data[at + 2], at + 3
        if data[at] != _MAP8 or at + 2 + size != end:
            return read(data, at, end)[0]
        place = start
        for _ in range(count // 2):
            if data[place] in _SHORT_TEXTS:
                after = place + 2 + data[place + 1]
                key = data[place + 2 : after].decode()
            else:
                key, after = read(data, place, end, DEEPEST - 1)
            kind = data[after]
            if kind in _SHORT_TEXTS:
                place = after + 2 + data[after + 1]
                items[key] = data[after + 2 : place].decode()
            elif kind in _TRUTHS:
                place = after + 1
                items[key] = kind == _TRUE
            elif kind == _SMALL_LONG:
                place = after + 2
                items[key] = (data[after + 1] ^ 0x80) - 0x80
            elif kind == _LONG:
                place = after + 9
                items[key] = int.from_bytes(data[after + 1 : place], signed=True)
            else:
                items[key], place = read(data, after, end, DEEPEST - 1)
        if place == end and count % 2 == 0:
            return items
    except (IndexError, UnicodeDecodeError, TypeError):
        pass  # read says what is wrong, and reads texts that aren't UTF-8
    return read(data, at, end)[0]


# --- writing -------------------------------------------------------------------

# A type's encodings, the narrowest first.
_ENCODINGS: Final[dict[type, list[tuple[int, struct.Struct]]]] = {}
for _code, (_layout, _kind) in _FIXED.items():
    if isinstance(_kind, type):
        _ENCODINGS.setdefault(_kind, []).append((_code, _layout))

_SHORTEST_LONG: Final = 0x100


def write(value: Any) -> bytes:  # noqa: ANN401, PLR0911  -- one for each family of types
    """Return a value in its narrowest encoding.

    Arrays are only read, because a receiver doesn't send any.

    Raises:
        CodecError: AMQP has no type for it, or it is out of its type's range.
    """
    encodings = _ENCODINGS.get(type(value))
    if encodings is not None:
        return _fixed(value, encodings)
    match value:
        case str():
            try:
                content = value.encode()
            except UnicodeEncodeError as error:
                raise CodecError(f"{value!r} cannot be written in UTF-8") from error
            return _blob(_SYMBOL if isinstance(value, Symbol) else _STRING, content)
        case None:
            return bytes((_NULL,))
        case UUID():
            return b"\x98" + value.bytes
        case bytes():
            return _blob(_STRING if isinstance(value, NotText) else _BINARY, value)
        case Described():
            return b"\x00" + write(value.descriptor) + write(value.value)
        case dict():
            return _compound(_MAP, [write(each) for entry in value.items() for each in entry])
        case list() if not isinstance(value, Array):
            return _compound(_LIST, [write(each) for each in value])
    raise CodecError(f"AMQP 1.0 has no type for {type(value).__name__}")


def _fixed(value: Any, encodings: list[tuple[int, struct.Struct]]) -> bytes:  # noqa: ANN401
    if isinstance(value, bool):
        return bytes((_TRUE if value else _FALSE,))
    if value == 0 and isinstance(value, UInt | ULong):
        return bytes((_UINT_0 if isinstance(value, UInt) else _ULONG_0,))
    for code, layout in encodings:
        try:
            packed = layout.pack(value)
        except (struct.error, OverflowError):
            continue
        # struct would pad a decimal that is too short.
        if not isinstance(value, Decimal) or packed == value:
            return bytes((code,)) + packed
    raise CodecError(f"{value!r} is out of range for {type(value).__name__}")


def _blob(kind: int, content: bytes) -> bytes:
    size = len(content)
    if size < _SHORTEST_LONG:
        return bytes((0xA0 | kind, size)) + content
    return bytes((0xB0 | kind,)) + _LENGTH.pack(size) + content


def _compound(kind: int, items: list[bytes]) -> bytes:
    if kind == _LIST and not items:
        return bytes((_EMPTY_LIST,))
    content = b"".join(items)
    size, count = len(content) + 1, len(items)
    if size < _SHORTEST_LONG and count < _SHORTEST_LONG:
        return bytes((0xC0 | kind, size, count)) + content
    return bytes((0xD0 | kind,)) + struct.pack(">II", size + 3, count) + content
