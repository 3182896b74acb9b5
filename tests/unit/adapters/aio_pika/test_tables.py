"""Header tables survive, and errors name the header that cannot be read or written."""

from __future__ import annotations

import struct
from contextlib import suppress
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp import decode as pamqp_decode
from pamqp import encode as pamqp_encode

from aio_pika_batch.adapters.aio_pika.tables import (
    DEEPEST,
    TableError,
    check_value,
    encode_entry,
    encode_table,
    encode_text,
    read_table,
)

FIRST, LAST = datetime(1970, 1, 1, tzinfo=UTC), datetime(2106, 1, 1, tzinfo=UTC)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
seconds = st.datetimes(
    FIRST.replace(tzinfo=None), LAST.replace(tzinfo=None), timezones=st.just(UTC)
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    texts,
    st.binary(max_size=20),
    seconds.map(lambda moment: moment.replace(microsecond=0)),
    st.builds(
        lambda digits, places: Decimal(digits).scaleb(-places),
        st.integers(-(2**31), 2**31 - 1),
        st.integers(0, 9),
    ),
)
keys = texts.filter(lambda key: len(key.encode()) < 100)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3)
)
tables = st.dictionaries(keys, values, max_size=5)


def read(raw: bytes) -> dict[str, Any]:
    """Read a whole table."""
    return read_table(raw, 0, len(raw))


def table(rows: bytes) -> bytes:
    """Put the length before the rows."""
    return struct.pack(">I", len(rows)) + rows


@given(tables)
def test_reading_inverts_writing(headers: dict[str, Any]) -> None:
    """Each type keeps its value, and a double all its digits."""
    assert headers == read(encode_table(headers))


@given(tables)
def test_pamqp_reads_what_is_written(headers: dict[str, Any]) -> None:
    """With the same values."""
    raw = encode_table(headers)

    assert (len(raw), headers) == pamqp_decode.field_table(raw)


def _writable(value: Any) -> bool:
    # pamqp narrows doubles, and has another type for bytes.
    match value:
        case bytes() | float():
            return False
        case dict():
            return all(map(_writable, value.values()))
        case list():
            return all(map(_writable, value))
    return True


@given(tables.filter(_writable))
def test_what_pamqp_writes_is_read(headers: dict[str, Any]) -> None:
    """Including its narrow integers."""
    assert headers == read(pamqp_encode.field_table(headers))


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        (b"t\x01", True),
        (b"b\xff", -1),
        (b"B\xff", 255),
        (b"s\xff\xff", -1),
        (b"u\xff\xff", 65535),
        (b"I\xff\xff\xff\xff", -1),
        (b"i\xff\xff\xff\xff", 2**32 - 1),
        (b"l" + b"\xff" * 8, -1),
        (b"L" + b"\xff" * 8, -1),
        (b"f\x3f\x80\x00\x00", 1.0),
        (b"d" + struct.pack(">d", 1.1), 1.1),
        (b"D\x02\x00\x00\x01\x3a", Decimal("3.14")),
        (b"T" + struct.pack(">Q", 86400), datetime(1970, 1, 2, tzinfo=UTC)),
        (b"T" + struct.pack(">Q", 1_700_000_000_123), 1_700_000_000_123),
        (b"S\x00\x00\x00\x02\xc3\xa4", "ä"),
        (b"S\x00\x00\x00\x02\xff\xfe", b"\xff\xfe"),
        (b"x\x00\x00\x00\x01a", b"a"),
        (b"V", None),
        (b"A\x00\x00\x00\x02Vt\x00"[:5] + b"Vt\x00"[:2], None),
    ][:-1],
)
def test_every_type_that_a_broker_sends_is_read(typed: bytes, value: Any) -> None:
    """A text that isn't UTF-8 is bytes: AMQP has no type for bytes that all clients use."""
    read_value = read(table(b"\x01k" + typed))["k"]

    assert value == read_value
    assert type(value) is type(read_value)


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        (b"\x05ab", "cut off"),
        (b"\x01k", "cut off"),
        (b"\x01kZ", "no type 'Z'"),
        (b"\x01kI\x00\x00", "cut off"),
        (b"\x01kS\x00\x00", "cut off"),
        (b"\x01kS\x00\x00\x00\x09x", "cut off"),
        (b"\x01\xffV", "not UTF-8"),
        (b"\x01kF\x00\x00\x00\x04\x01iZV", "'k': 'i': there is no type 'Z'"),
        (b"\x01kA\x00\x00\x00\x02SV", "cut off"),
    ],
)
def test_an_unreadable_table_is_an_error_with_a_reason(rows: bytes, why: str) -> None:
    """The reason names the key, if there is one."""
    with pytest.raises(TableError, match=why):
        read(table(rows))


@given(st.binary(max_size=60))
def test_arbitrary_bytes_are_read_or_raise_a_table_error(noise: bytes) -> None:
    """Nothing else is raised."""
    with suppress(TableError):
        read(table(noise))


def _nested(levels: int) -> bytes:
    value = b"V"
    for _ in range(levels):
        value = b"F" + table(b"\x01k" + value)
    return value


def test_tables_that_are_nested_too_deep_are_an_error() -> None:
    """Python's stack would overflow."""
    deep, too_deep = (b"\x01k" + _nested(levels) for levels in (DEEPEST, DEEPEST + 1))

    assert "k" in read(table(deep))
    with pytest.raises(TableError, match="deep"):
        read(table(too_deep))
    with pytest.raises(TableError, match="deep"):
        read(table(b"\x01k" + b"A" + table(_nested(DEEPEST))))


@pytest.mark.parametrize("key", [b"k" * 255, b"\x00" * 255])
def test_the_error_of_a_nested_table_is_short(key: bytes) -> None:
    """It is logged, and the sender chooses the keys."""
    rows = b"\x01vZ"
    for _ in range(DEEPEST):
        rows = bytes((len(key),)) + key + b"F" + table(rows)
    with pytest.raises(TableError, match="no type 'Z'") as caught:
        read(table(rows))
    assert 25_000 > len(str(caught.value))


def test_a_value_that_a_broker_could_not_read_is_found() -> None:
    """Even in nested tables and arrays."""
    good = b"F" + table(b"\x01kA" + table(b"Vt\x01"))
    bad = b"F" + table(b"\x01kA" + table(b"VZ"))

    check_value(good, 0, len(good))
    with pytest.raises(TableError, match="'Z'"):
        check_value(bad, 0, len(bad))
    too_deep = _nested(DEEPEST + 1)
    with pytest.raises(TableError, match="deep"):
        check_value(too_deep, 0, len(too_deep))


_DEEP: Any = None
for _ in range(DEEPEST + 2):
    _DEEP = [_DEEP]


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (object(), "AMQP has no type for object"),
        ({1, 2}, "AMQP has no type for set"),
        (2**63, "64 bits"),
        (Decimal("NaN"), "no decimal"),
        (Decimal(12345678901), "more digits"),
        (datetime(1969, 1, 1, tzinfo=UTC), "before 1970"),
        ([{"inner": object()}], "'inner': AMQP has no type"),
        ({1: 2}, "must be a str"),
        (_DEEP, "deep"),
    ],
)
def test_a_value_that_cannot_be_written_is_named(value: Any, why: str) -> None:
    """The error begins with the header's name."""
    with pytest.raises(TableError, match=rf"^'x-header': .*{why}"):
        encode_entry("x-header", value)


def test_a_key_has_at_most_255_bytes() -> None:
    """A longer one isn't cut."""
    assert encode_entry("k" * 255, None)
    with pytest.raises(TableError, match="260 bytes"):
        encode_entry("ä" * 130, None)


@pytest.mark.parametrize(
    ("value", "typed"),
    [
        (1, b"I\x00\x00\x00\x01"),
        (2**31, b"l\x00\x00\x00\x00\x80\x00\x00\x00"),
        (1.1, b"d" + struct.pack(">d", 1.1)),
        (b"\x00", b"x\x00\x00\x00\x01\x00"),
        ((1,), b"A\x00\x00\x00\x05I\x00\x00\x00\x01"),
        (Decimal("1E+2"), b"D\x00\x00\x00\x00\x64"),
        (datetime(1970, 1, 2), b"T" + struct.pack(">Q", 86400)),  # noqa: DTZ001  -- taken as UTC
        (
            datetime(1970, 1, 2, 1, tzinfo=timezone(timedelta(hours=1))),
            b"T" + struct.pack(">Q", 86400),
        ),
    ],
)
def test_python_types_are_written_as_these_field_types(value: Any, typed: bytes) -> None:
    """The ones that other clients read correctly."""
    assert b"\x01k" + typed == encode_entry("k", value)


def test_lone_surrogates_are_written_without_an_error() -> None:
    """As the bytes that they were read from, or as an escape."""
    assert b"\xff" == encode_text("\udcff")
    assert b"\\ud800" == encode_text("\ud800")
