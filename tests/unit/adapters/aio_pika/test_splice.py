"""A copy keeps every byte that it was not asked to change."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aio_pika_batch.adapters.aio_pika.properties import (
    decode,
    encode,
    fields,
    splice,
)
from aio_pika_batch.adapters.aio_pika.tables import DEEPEST, encode_table, entries
from aio_pika_batch.core.message import Headers, Properties
from aio_pika_batch.core.publication import UNDECODABLE_HEADERS, Copy
from aio_pika_batch.errors import PublishError
from tests.unit.adapters.aio_pika.broker_frames import message
from tests.unit.adapters.aio_pika.test_properties import properties
from tests.unit.adapters.aio_pika.test_tables import tables

USER = b"guest"


def copied(raw: bytes, add: Headers, *drop: str, **more: Any) -> bytes:
    """The property list of a copy."""
    return splice(raw, Copy(message(raw), "", "q", add, frozenset(drop), **more), USER)


def parts(raw: bytes) -> dict[str, bytes]:
    """The bytes of each property."""
    return {name: raw[start:end] for _, name, _, start, end in fields(raw)}


def rows(table: bytes) -> list[tuple[bytes, bytes]]:
    """The bytes of each header."""
    return [(key, table[at:end]) for key, at, _, end in entries(table, 4, len(table))]


@given(properties, tables, st.data())
def test_only_what_was_asked_for_changes(
    values: Properties, add: Headers, data: st.DataObject
) -> None:
    """Every other property and header keeps its bytes and its place."""
    raw = encode(values)
    known = sorted(values.headers or {})
    drop = data.draw(st.lists(st.sampled_from(known), unique=True)) if known else []

    before, after = parts(raw), parts(copied(raw, add, *drop))

    table, new = before.pop("headers", None), after.pop("headers", None)
    if values.user_id != USER.decode():
        before.pop("user_id", None)
    assert before == after
    gone = {key.encode() for key in (*drop, *add)}
    kept = [row for row in rows(table or encode_table({})) if row[0] not in gone]
    added = rows(encode_table(add))
    assert (None if table is None and not add else [*kept, *added]) == (
        None if new is None else rows(new)
    )


@given(properties)
def test_without_changes_the_bytes_are_the_same(values: Properties) -> None:
    """Absent stays absent, empty stays empty."""
    raw = encode(
        Properties(
            **{name: getattr(values, name) for name in parts(encode(values)) if name != "user_id"}
        )
    )

    assert raw == copied(raw, {})


def test_types_that_decoding_would_change_survive() -> None:
    """A float32, a narrow integer, a text that isn't UTF-8, a repeated key."""
    table = (
        b"\x01ff\x3f\x80\x00\x00"
        b"\x01bb\x07"
        b"\x01sS\x00\x00\x00\x02\xff\xfe"
        b"\x01dV\x01dt\x01"
        b"\x01TT" + b"\x00\x00\x01\x9b" + bytes(4)
    )
    raw = struct.pack(">HI", 1 << 13, len(table)) + table

    new = copied(raw, {"x-retry-count": 1}, "nothing")

    count = b"\x0dx-retry-countI\x00\x00\x00\x01"
    assert struct.pack(">HI", 1 << 13, len(table + count)) + table + count == new


def test_keys_within_a_nested_table_are_not_changed() -> None:
    """`x-death` contains tables with keys of the same names."""
    raw = encode(Properties(headers={"x-death": [{"x-retry-count": 5}], "x-retry-count": 1}))

    assert {"x-death": [{"x-retry-count": 5}], "x-retry-count": 2} == decode(
        copied(raw, {"x-retry-count": 2})
    ).headers


def test_properties_that_cannot_be_decoded_are_copied() -> None:
    """A binary correlation id, a time in the far future."""
    raw = struct.pack(">H", 1 << 10 | 1 << 6) + b"\x02\xff\xfe" + b"\xff" * 8

    new = copied(raw, {"a": None})

    assert (
        struct.pack(">H", 1 << 13 | 1 << 10 | 1 << 6) + b"\x00\x00\x00\x03\x01aV" + raw[2:] == new
    )


@pytest.mark.parametrize(("user", "kept"), [("guest", "guest"), ("other", None), (None, None)])
def test_another_users_id_is_left_out(user: str | None, kept: str | None) -> None:
    """A broker closes the channel over a user_id that isn't the connection's."""
    assert kept == decode(copied(encode(Properties(user_id=user)), {})).user_id


@pytest.mark.parametrize(("keep", "kept"), [(True, "5000"), (False, None)])
def test_expiration_is_dropped_on_demand(*, keep: bool, kept: str | None) -> None:
    """A dead letter must not expire."""
    assert (
        kept
        == decode(
            copied(encode(Properties(expiration="5000")), {}, keep_expiration=keep)
        ).expiration
    )


@given(properties, tables, st.integers(0, 2**32 - 1).map(str))
def test_an_expiration_is_inserted_in_its_place(
    values: Properties, add: Headers, expiration: str
) -> None:
    """In the order of the properties, and instead of another."""
    before = decode(copied(encode(values), add, keep_expiration=False))

    after = decode(copied(encode(values), add, keep_expiration=False, expiration=expiration))

    assert before.expiration is None
    assert replace(before, expiration=expiration) == after


@pytest.mark.parametrize("add", [{}, {"x-retry-count": 1}])
@pytest.mark.parametrize(
    "bad",
    [
        b"\x01kZ",
        b"\x01kS\x00\x00\x00\x09x",
        b"\x01kF\x00\x00\x00\x03\x01iZ",
        b"\x01kV\x05x",
        b"\x01k" + b"F\x00\x00\x00\x00" * 0 + b"A\x00\x00\x00\x01Z",
    ],
)
def test_a_malformed_table_is_kept_as_bytes(bad: bytes, add: dict[str, int]) -> None:
    """In a header of its own. A broker would end the connection over the table."""
    raw = struct.pack(">HI", 1 << 13 | 1 << 3, len(bad)) + bad + b"\x03app"

    new = decode(copied(raw, add))

    assert Properties(headers={UNDECODABLE_HEADERS: bad, **add}, app_id="app") == new


def test_a_table_that_is_too_deep_is_kept_as_bytes() -> None:
    """It could not be decoded again."""
    value = b"V"
    for _ in range(DEEPEST + 1):
        value = b"F" + struct.pack(">I", len(value) + 2) + b"\x01k" + value
    bad = b"\x01k" + value
    raw = struct.pack(">HI", 1 << 13, len(bad)) + bad

    assert {UNDECODABLE_HEADERS: bad} == decode(copied(raw, {})).headers


@pytest.mark.parametrize(
    ("raw", "headers"),
    [
        (b"", {UNDECODABLE_HEADERS: b""}),
        (b"\x80\x08\x03a/b\x09cut", {UNDECODABLE_HEADERS: b"\x80\x08\x03a/b\x09cut"}),
        (b"\x20\x08\x00\x00\x00\x00\x09cut", {}),
    ],
)
def test_a_truncated_list_keeps_what_it_has(raw: bytes, headers: dict[str, bytes]) -> None:
    """All of it is kept as bytes, too, if the headers cannot be found."""
    new = decode(copied(raw, {"a": 1}))

    assert {**headers, "a": 1} == new.headers
    assert not new.undecodable


@given(st.binary(max_size=80))
def test_a_broker_can_read_a_copy_of_any_bytes(noise: bytes) -> None:
    """The structure of the copy is valid, even if a text in it isn't UTF-8."""
    new = copied(noise, {"a": 1})

    assert list(fields(new))
    assert not {why for why in decode(new).undecodable.values() if "cut off" in why}


def test_a_header_that_cannot_be_added_is_named() -> None:
    """Before anything is sent."""
    with pytest.raises(PublishError, match="header 'x': AMQP has no type for object"):
        copied(b"\x00\x00", {"x": object()})  # type: ignore[dict-item]
