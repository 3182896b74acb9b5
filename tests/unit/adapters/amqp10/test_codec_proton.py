"""Qpid Proton, the reference, reads what is written here and writes what is read here."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aio_pika_batch.adapters.amqp10 import codec
from aio_pika_batch.adapters.amqp10.codec import Array, Described, NotText, read, write
from tests.unit.adapters.amqp10.test_codec import same
from tests.unit.adapters.amqp10.values import kinds, values

proton = pytest.importorskip("proton", reason="`nox -s proton` installs python-qpid-proton")

PAIRS = {
    codec.UByte: proton.ubyte,
    codec.UShort: proton.ushort,
    codec.UInt: proton.uint,
    codec.ULong: proton.ulong,
    codec.Byte: proton.byte,
    codec.Short: proton.short,
    codec.Int: proton.int32,
    codec.Float: proton.float32,
    codec.Timestamp: proton.timestamp,
    codec.Symbol: proton.symbol,
}
BACK = {theirs: ours for ours, theirs in PAIRS.items()}
DECIMALS = {4: proton.decimal32, 8: proton.decimal64, 16: proton.decimal128}
SIZES = {kind: size for size, kind in DECIMALS.items()}


def to_proton(value: Any) -> Any:
    """The same in Proton's types."""
    match value:
        case codec.Decimal():
            number = bytes(value) if len(value) == 16 else int.from_bytes(value, "big")
            return DECIMALS[len(value)](number)
        case codec.Char():
            return proton.char(chr(value))
        case Described():
            return proton.Described(to_proton(value.descriptor), to_proton(value.value))
        case list():
            return [*map(to_proton, value)]
        case dict():
            return {to_proton(key): to_proton(item) for key, item in value.items()}
        case _:
            kind = PAIRS.get(type(value))
            return value if kind is None else kind(value)


def from_proton(value: Any) -> Any:  # noqa: PLR0911  -- one for each kind of value
    """The same in ours."""
    match value:
        case proton.decimal32() | proton.decimal64():
            return codec.Decimal(int(value).to_bytes(SIZES[type(value)], "big"))
        case proton.decimal128():
            return codec.Decimal(value)
        case proton.char():
            return codec.Char(ord(value))
        case memoryview():
            return bytes(value)
        case proton.Described():
            return Described(from_proton(value.descriptor), from_proton(value.value))
        case proton.Array():
            items = map(from_proton, value.elements)
            if value.descriptor is not proton.UNDESCRIBED:
                items = (Described(from_proton(value.descriptor), item) for item in items)
            return Array(items)
        case list():
            return [*map(from_proton, value)]
        case dict():
            return {from_proton(key): from_proton(item) for key, item in value.items()}
        case _:
            kind = BACK.get(type(value))
            return value if kind is None else kind(value)


def is_known_to_proton(value: Any) -> bool:
    """Not all is: it takes no surrogate for a char, and only text that is ASCII for a symbol."""
    match value:
        case codec.Char():
            return not 0xD800 <= value < 0xE000
        case Described():
            # What stands behind a described value in a described value is lost there.
            return all(map(is_known_to_proton, value)) and not isinstance(value.value, Described)
        case list():
            return all(map(is_known_to_proton, value))
        case dict():
            # Its binaries cannot be hashed.
            return all(
                is_known_to_proton(key) and is_known_to_proton(item) and not isinstance(key, bytes)
                for key, item in value.items()
            )
        case _:
            return not isinstance(value, NotText)


known = values.filter(is_known_to_proton)


def decoded(raw: bytes) -> Any:
    """What Proton reads; its binaries are views of memory that goes with `data`."""
    data = proton.Data()
    assert len(raw) == data.decode(raw)
    data.rewind()
    data.next()
    return from_proton(data.get_object())


def encoded(value: Any) -> bytes:
    """What Proton writes."""
    data = proton.Data()
    data.put_object(value)
    return bytes(data.encode())


@given(known)
def test_proton_reads_what_is_written(value):
    """And finds the same value, of the same type."""
    assert same(value, decoded(write(value)))


@given(known)
def test_what_proton_writes_is_read(value):
    """The encodings that it chooses are others."""
    raw = encoded(to_proton(value))

    assert same(value, read(raw, 0, len(raw))[0])


AMQP_TYPES = ["BOOL", "UBYTE", "USHORT", "UINT", "ULONG", "BYTE", "SHORT", "INT", "LONG", "DOUBLE"]
AMQP_TYPES += ["FLOAT", "CHAR", "TIMESTAMP", "DECIMAL32", "DECIMAL64", "DECIMAL128", "UUID"]
AMQP_TYPES += ["BINARY", "STRING", "SYMBOL"]


@given(st.data(), st.booleans())
def test_arrays_that_proton_writes_are_read(data, is_described):
    """Of each type, with and without a descriptor."""
    at = data.draw(st.integers(0, len(kinds) - 1))
    items = data.draw(st.lists(kinds[at].filter(is_known_to_proton), min_size=1, max_size=6))
    descriptor = proton.ulong(5) if is_described else proton.UNDESCRIBED
    kind = getattr(proton.Data, AMQP_TYPES[at])
    raw = encoded(proton.Array(descriptor, kind, *map(to_proton, items)))

    expected = Array(Described(codec.ULong(5), each) if is_described else each for each in items)
    assert same(expected, read(raw, 0, len(raw))[0])
