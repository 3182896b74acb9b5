"""Values survive the wire, and no bytes do more than raise `CodecError`."""

from __future__ import annotations

import math
import struct
import tracemalloc
import uuid
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aio_pika_batch.adapters.amqp10.codec import (
    DEEPEST,
    Array,
    Byte,
    Char,
    CodecError,
    Decimal,
    Described,
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
    end_of,
    read,
    write,
)
from tests.unit.adapters.amqp10.values import scalars, values


def once(data: bytes) -> Any:
    """The one value that these bytes are."""
    value, end = read(data, 0, len(data))
    assert len(data) == end
    return value


def same(one: Any, other: Any) -> bool:
    """Equal, and of the same types all the way down; NaN equals NaN."""
    if type(one) is not type(other):
        return False
    match one:
        case dict():
            return len(one) == len(other) and all(
                same(*pair)
                for mine, yours in zip(one.items(), other.items(), strict=True)
                for pair in zip(mine, yours, strict=True)
            )
        case list() | Described():
            return len(one) == len(other) and all(map(same, one, other))
        case float():
            return one == other or (math.isnan(one) and math.isnan(other))
        case _:
            return bool(one == other)


def has_array(value: Any) -> bool:
    """Whether there is one in it, at any depth."""
    match value:
        case Array():
            return True
        case list() | Described():
            return any(map(has_array, value))
        case dict():
            return any(has_array(each) for entry in value.items() for each in entry)
        case _:
            return False


@given(values)
def test_what_is_written_is_read_again(value):
    """With the same type, and it ends where it ends."""
    data = write(value)

    assert same(value, once(data))
    assert len(data) == end_of(data, 0, len(data))


@given(values, st.binary(max_size=5), st.binary(max_size=5))
def test_what_stands_around_a_value_does_not_matter(value, before, after):
    """It is read where it stands, and not further."""
    data = before + write(value) + after

    found, end = read(data, len(before), len(data))

    assert same(value, found)
    assert len(data) - len(after) == end


@given(values, st.data())
def test_a_value_that_is_cut_off_is_refused(value, data):
    """Wherever it is cut."""
    whole = write(value)
    end = data.draw(st.integers(0, len(whole) - 1))

    for function in (read, end_of):
        with pytest.raises(CodecError):
            function(whole[:end], 0, end)


@given(st.binary(max_size=200) | st.builds(bytes.__add__, values.map(write), st.binary(max_size=9)))
def test_any_bytes_are_a_value_or_an_error(data):
    """And what is a value is written again."""
    try:
        value, end = read(data, 0, len(data))
    except CodecError:
        return
    assert end == end_of(data, 0, len(data)) <= len(data)
    if not has_array(value):
        assert same(value, once(write(value)))


@given(values, st.data())
def test_one_wrong_byte_is_a_value_or_an_error(value, data):
    """Sizes, counts and constructors that lie are found out."""
    raw = bytearray(write(value))
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))

    try:
        read(bytes(raw), 0, len(raw))
    except CodecError:
        return


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        ("40", None),
        ("41", True),
        ("5601", True),
        ("42", False),
        ("5600", False),
        ("43", UInt(0)),
        ("52ff", UInt(255)),
        ("70ffffffff", UInt(2**32 - 1)),
        ("44", ULong(0)),
        ("5305", ULong(5)),
        ("80ffffffffffffffff", ULong(2**64 - 1)),
        ("5080", UByte(128)),
        ("60ffff", UShort(65535)),
        ("51ff", Byte(-1)),
        ("61ffff", Short(-1)),
        ("54ff", Int(-1)),
        ("7180000000", Int(-(2**31))),
        ("55ff", -1),
        ("818000000000000000", -(2**63)),
        ("723fc00000", Float(1.5)),
        ("823ff8000000000000", 1.5),
        ("730001f600", Char(0x1F600)),
        ("830000018bcfe5687b", Timestamp(1_700_000_000_123)),
        ("7422500001", Decimal(b"\x22\x50\x00\x01")),
        (
            "98" + "00112233445566778899aabbccddeeff",
            uuid.UUID(int=0x00112233445566778899AABBCCDDEEFF),
        ),
        ("a003000102", b"\x00\x01\x02"),
        ("b0000000020001", b"\x00\x01"),
        ("a102c3bc", "ü"),
        ("b100000001" + "61", "a"),
        ("a10161", "a"),
        ("a302682d", Symbol("h-")),
        ("a101ff", NotText(b"\xff")),
        ("a301ff", NotText(b"\xff")),
        ("45", []),
        ("c0020140", [None]),
        ("d0000000050000000141", [True]),
        ("c10100", {}),
        ("c10602a101615502", {"a": 2}),
        ("d10000000900000002a101615502", {"a": 2}),
        ("e0040250" + "0102", Array([UByte(1), UByte(2)])),
        ("f00000000700000002500102", Array([UByte(1), UByte(2)])),
        ("e00802a3" + "0161" + "0362" + "6364", Array([Symbol("a"), Symbol("bcd")])),
        (
            "e0070200530550" + "0102",
            Array([Described(ULong(5), UByte(1)), Described(ULong(5), UByte(2))]),
        ),
        ("00532445", Described(ULong(0x24), [])),
        ("00a3016145", Described(Symbol("a"), [])),
    ],
)
def test_known_bytes(raw, value):
    """Each constructor of the specification (section 1.6), and lists, maps and arrays of both
    sizes.
    """
    assert same(value, once(bytes.fromhex(raw)))


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        ("", "a value is missing at byte 0"),
        ("00", "a value is missing at byte 1"),
        ("3f", "AMQP has no type 0x3f, as at byte 0"),
        ("46", "no type 0x46"),
        ("57ff", "no type 0x57"),
        ("99" + "00" * 16, "no type 0x99"),
        ("a200", "no type 0xa2"),
        ("c20100", "no type 0xc2"),
        ("e1020040", "no type 0xe1"),
        ("f0", "cut off"),
        ("7000", "the value at byte 0 is cut off"),
        ("a105616263", "cut off"),
        ("b1ffffffff61", "cut off"),
        ("c000", "too short for its count"),
        ("d00000000100", "cut off|too short for its count"),
        ("c0020240", "announces 2 items|a value is missing"),
        ("c0ff", "cut off"),
        ("d000000005ffffffff40", "announces 4294967295 items"),
        ("c003014040", "1 bytes too many"),
        ("c1020140", "a key without a value"),
        ("c1030245" + "40", "a list or a map as key"),
        ("f000000005ffffffff40", "announces 4294967295 items"),
        ("e0020440", "announces 4 items"),
        ("e00101", "a value is missing"),
    ],
)
def test_an_error_names_its_place(raw, why):
    """So that a trace of the wire can be read beside it."""
    data = bytes.fromhex(raw)
    with pytest.raises(CodecError, match=why):
        read(data, 0, len(data))


@pytest.mark.parametrize("wrap", ["list", "map", "described", "array"])
def test_nesting_has_a_limit(wrap):
    """Which Python's stack survives."""

    def nested(levels: int) -> bytes:
        data = b"\x40"
        for _ in range(levels):
            match wrap:
                case "list":
                    data = b"\xd0" + struct.pack(">II", len(data) + 4, 1) + data
                case "map":
                    data = b"\xd1" + struct.pack(">II", len(data) + 5, 2) + b"\x40" + data
                case "described":
                    data = b"\x00\x40" + data
                case _:
                    data = b"\xf0" + struct.pack(">II", len(data) + 4, 1) + data
        return data

    once(nested(DEEPEST - 1))
    for levels in (DEEPEST + 1, 500, 10_000):
        data = nested(levels)
        with pytest.raises(CodecError, match="nested more than 64 deep"):
            read(data, 0, len(data))


def test_descriptors_of_an_array_have_the_same_limit():
    """They are nested without a list in between."""
    data = b"\x00\x40" * 5000 + b"\x40"
    data = b"\xf0" + struct.pack(">II", len(data) + 4, 1) + data
    with pytest.raises(CodecError, match="nested more than 64 deep"):
        read(data, 0, len(data))


def test_a_chain_of_descriptors_is_stepped_over_without_recursion():
    """Or refused: in no case does it exhaust the stack."""
    data = b"\x00" * 50_000
    for function in (read, end_of):
        with pytest.raises(CodecError):
            function(data, 0, len(data))


def test_nothing_is_set_aside_for_what_is_announced():
    """Out of a hundred bytes, neither billions of nulls nor gigabytes of text."""
    hostile = [
        b"\xf0" + struct.pack(">II", 5, 2**32 - 1) + b"\x40",
        b"\xb0" + struct.pack(">I", 2**32 - 1) + b"x" * 50,
        b"\xd0" + struct.pack(">II", 50, 2**31) + b"\x40" * 46,
    ]
    tracemalloc.start()
    try:
        for data in hostile:
            with pytest.raises(CodecError):
                read(data, 0, len(data))
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "value",
    [
        range(1),
        2**63,
        -(2**63) - 1,
        UInt(-1),
        UInt(2**32),
        UByte(256),
        Int(2**31),
        Float(1e300),
        "\ud800",
        Symbol("\ud800"),
        Array([1]),
        Decimal(b"abc"),
        [range(1)],
        {"a": range(1)},
    ],
    ids=repr,
)
def test_what_amqp_has_no_type_for_is_refused(value):
    """And what is out of the range of its type."""
    with pytest.raises(CodecError):
        write(value)


@given(scalars)
def test_an_encoding_is_no_longer_than_it_must_be(value):
    """A short string costs two bytes more than its text, a small number one."""
    data = write(value)
    match value:
        case str() | bytes() if not isinstance(value, Decimal):
            content = value.encode() if isinstance(value, str) else value
            assert len(content) + (2 if len(content) < 256 else 5) == len(data)
        case bool() | None:
            assert len(data) == 1
        case UInt() | ULong() if value < 256:
            assert len(data) == (2 if value else 1)
        case Int() | int() if -128 <= value < 128 and type(value) in (int, Int):
            assert len(data) == 2
