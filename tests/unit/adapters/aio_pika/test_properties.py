"""Properties survive encoding and decoding, and one bad property leaves the others readable."""

from __future__ import annotations

import re
import struct
from dataclasses import fields as fields_of
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp.header import ContentHeader

from aio_pika_batch.adapters.aio_pika.amqp_spec import PROPERTIES
from aio_pika_batch.adapters.aio_pika.consumer_channel import RawSource
from aio_pika_batch.adapters.aio_pika.properties import (
    decode,
    decode_headers,
    decode_message_ids,
    decode_route,
    encode,
    encode_around_id,
    encode_short,
)
from aio_pika_batch.core.message import Message, Properties
from aio_pika_batch.core.publication import Publication
from aio_pika_batch.errors import MessageDecodeError, PublishError
from tests.unit.adapters.aio_pika.broker_frames import raw_properties
from tests.unit.adapters.aio_pika.test_tables import tables

short = st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
octet = st.none() | st.integers(0, 255)
moment = st.none() | st.integers(0, 2**32 - 1).map(
    lambda seconds: datetime.fromtimestamp(seconds, UTC)
)
properties = st.builds(
    Properties,
    content_type=short,
    content_encoding=short,
    headers=st.none() | tables,
    delivery_mode=octet,
    priority=octet,
    correlation_id=short,
    reply_to=short,
    expiration=short,
    message_id=short,
    timestamp=moment,
    type=short,
    user_id=short,
    app_id=short,
    cluster_id=short,
    undecodable=st.just({}),
)
NAMES = [name for _, name, _ in PROPERTIES]
SIMILAR = [
    b"\x90\x80\x04text\x02\x04id-1",
    b"\x90\x80\x04text\x02\x01x",
    b"\x90\x80\x04tex!\x02\x02id",
]
"""Property lists whose bytes before the message id are the same, or nearly."""


def test_all_properties_are_there() -> None:
    """None is missing."""
    assert {*NAMES, "undecodable"} == {each.name for each in fields_of(Properties)}


@given(properties)
def test_decoding_inverts_encoding(values: Properties) -> None:
    """Absent stays absent, empty stays empty."""
    assert values == decode(encode(values))


@given(properties)
def test_pamqp_reads_what_is_written(values: Properties) -> None:
    """With the same values, unless it cannot represent them."""
    header = ContentHeader()
    header.unmarshal(b"\x00\x3c\x00\x00" + bytes(8) + encode(replace(values, cluster_id=None)))

    read = {
        name: getattr(header.properties, "message_type" if name == "type" else name)
        for name in NAMES
        if name != "cluster_id"
    }
    assert {name: getattr(values, name) for name in read} == read


def test_what_pamqp_writes_is_read() -> None:
    """With the same values."""
    raw = raw_properties(
        content_type="a/b",
        priority=0,
        headers={},
        message_type="t",
        timestamp=datetime(2026, 1, 1, tzinfo=UTC),
    )

    expected = Properties(
        content_type="a/b",
        priority=0,
        headers={},
        type="t",
        timestamp=datetime(2026, 1, 1, tzinfo=UTC),
    )
    assert expected == decode(raw)


@pytest.mark.parametrize(
    ("flag", "bad", "name", "why"),
    [
        (1 << 10, b"\x02\xff\xfe", "correlation_id", "not UTF-8"),
        (1 << 6, struct.pack(">Q", 1_700_000_000_000_000), "timestamp", "not a time in seconds"),
        (1 << 13, b"\x00\x00\x00\x03\x01kZ", "headers", "no type 'Z'"),
    ],
)
def test_one_bad_property_leaves_the_others_readable(
    flag: int, bad: bytes, name: str, why: str
) -> None:
    """The reason is kept."""
    order = [
        (1 << 13, b"\x00\x00\x00\x00"),
        (1 << 10, b"\x01c"),
        (1 << 6, bytes(8)),
        (1 << 3, b"\x03app"),
    ]
    flags = sum(each for each, _ in order)
    raw = struct.pack(">H", flags) + b"".join(bad if each == flag else good for each, good in order)

    read = decode(raw)

    assert [name] == list(read.undecodable)
    assert why in read.undecodable[name]
    assert getattr(read, name) is None
    assert "app" == read.app_id


@pytest.mark.parametrize("cut", [0, 1, 3, 7, 8, 14])
def test_a_truncated_list_loses_only_its_end(cut: int) -> None:
    """What is announced but missing is undecodable, not absent."""
    raw = encode(Properties(content_type="a/b", headers={"a": 1}, app_id="app"))[:cut]

    read = decode(raw)

    assert {"headers", "app_id"} <= read.undecodable.keys()
    assert all("cut off" in why or "no flags" in why for why in read.undecodable.values())


def test_undefined_flags_make_everything_undecodable() -> None:
    """What follows them is unknown."""
    assert set(NAMES) == decode(b"\x00\x01").undecodable.keys()


@given(st.binary(max_size=80))
def test_arbitrary_bytes_raise_nothing(noise: bytes) -> None:
    """Reading never raises."""
    decode(noise)
    decode_route(noise)


@given(short.filter(bool), short.filter(bool))
def test_a_route_is_decoded(exchange: str, routing_key: str) -> None:
    """Exchange and routing key, as a delivery has them."""
    raw = encode_short("exchange", exchange) + encode_short("routing_key", routing_key)

    assert (exchange, routing_key) == decode_route(raw)


@pytest.mark.parametrize(
    ("raw", "route"),
    [
        (b"\x01e\x01kmore", ("e", "k")),
        (b"\x01e\x00more", ("e", "")),
        (b"\x01e\x09cut", ("e", "cut")),
        (b"\x01e\x09", ("e", "")),
        (b"\x01e", ("e", "")),
        (b"\x09cut", ("cut", "")),
        (b"", ("", "")),
    ],
)
def test_bytes_after_a_route_are_ignored(raw: bytes, route: tuple[str, str]) -> None:
    """A key has at most 255 bytes."""
    assert route == decode_route(raw)


def test_a_route_that_is_not_utf8_is_encoded_to_the_same_bytes() -> None:
    """It survives being a str."""
    _, routing_key = decode_route(b"\x00\x02\xff\xfe")

    assert b"\x02\xff\xfe" == encode_short("routing_key", routing_key)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"message_id": "x" * 256}, "message_id has 256 bytes"),
        ({"priority": 256}, "priority cannot be 256"),
        ({"timestamp": datetime(1960, 1, 1, tzinfo=UTC)}, "timestamp cannot be"),
        ({"content_type": 5}, "content_type cannot be 5"),
        ({"headers": {"x-a": {"b": object()}}}, "header 'x-a': 'b': AMQP has no type for object"),
    ],
)
def test_a_value_that_cannot_be_encoded_is_named(wrong: dict[str, Any], why: str) -> None:
    """Before anything is sent."""
    with pytest.raises(PublishError, match=why):
        encode(Properties(**wrong))


@pytest.mark.parametrize("wrong", [3.0, {3}])
def test_a_value_is_refused_although_an_equal_one_was_encoded(wrong: Any) -> None:
    """What is encoded once is kept by type; what can't be kept is refused as before."""
    encode(Properties(priority=3))

    with pytest.raises(PublishError, match=re.escape(f"priority cannot be {wrong}")):
        encode(Properties(priority=wrong))


@given(properties, st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
def test_copies_of_a_template_differ_in_their_id(template: Properties, message_id: str) -> None:
    """Its bytes stand around the id, whatever else there is."""
    before, after = encode_around_id(template)

    expected = encode(replace(template, message_id=message_id))
    assert expected == before + encode_short("message_id", message_id) + after


def test_the_defaults_of_a_publication() -> None:
    """Persistent unless stated otherwise; a naive time is UTC; seconds become milliseconds."""
    publication = Publication(b"", timestamp=datetime(2026, 1, 1), expiration=1.5)  # noqa: DTZ001

    expected = Properties(
        delivery_mode=2, expiration="1500", timestamp=datetime(2026, 1, 1, tzinfo=UTC)
    )
    assert expected == decode(encode(publication.properties))


def test_a_naive_time_is_utc() -> None:
    """Even if the properties are encoded directly."""
    naive, aware = datetime(2026, 1, 1), datetime(2026, 1, 1, tzinfo=UTC)  # noqa: DTZ001

    assert encode(Properties(timestamp=aware)) == encode(Properties(timestamp=naive))


@given(st.binary(max_size=120) | properties.map(encode))
def test_headers_decoded_alone_are_the_same(raw: bytes) -> None:
    """The same values, or the same error."""
    whole = decode(raw)
    if "headers" in whole.undecodable:
        with pytest.raises(ValueError, match=re.escape(whole.undecodable["headers"])):
            decode_headers(raw)
    else:
        # By their looks, since a NaN is not equal to itself.
        assert repr(whole.headers) == repr(decode_headers(raw))


@given(st.binary(max_size=120) | properties.map(encode))
def test_a_message_id_decoded_alone_is_the_same(raw: bytes) -> None:
    """The same text, or an error too; the message raises the one that has the reason."""
    whole = decode(raw)
    message = Message(RawSource("queue", "tag", "x-retry-count"), 1, False, b"", ("", ""), raw)
    if "message_id" in whole.undecodable:
        with pytest.raises(ValueError, match=r"flags|cut off|decode"):
            decode_message_ids([raw])
        with pytest.raises(MessageDecodeError) as caught:
            message.message_id  # noqa: B018  -- that it raises
        assert whole.undecodable["message_id"] in str(caught.value)
    else:
        assert [whole.message_id] == decode_message_ids([raw])
        assert whole.message_id == message.message_id


@given(st.lists(properties.map(encode) | st.sampled_from(SIMILAR), max_size=6))
def test_message_ids_of_a_batch_are_those_of_each(raws: list[bytes]) -> None:
    """Also where a list begins like the one before it."""
    assert [decode(raw).message_id for raw in raws] == decode_message_ids(raws)


@pytest.mark.parametrize("end", range(2, len(SIMILAR[0])))
def test_the_message_id_of_a_later_list_may_be_cut_off(end: int) -> None:
    """After one that begins with the same bytes."""
    with pytest.raises(ValueError, match="cut off"):
        decode_message_ids([SIMILAR[0], SIMILAR[0][:end]])
