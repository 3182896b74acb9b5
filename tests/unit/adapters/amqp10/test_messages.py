"""A message over AMQP 1.0 is read as a consumer over 0-9-1 would see it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aio_pika_batch.adapters.amqp10 import spec
from aio_pika_batch.adapters.amqp10.codec import (
    Decimal,
    Float,
    NotText,
    Symbol,
    Timestamp,
    UByte,
    UInt,
    ULong,
)
from aio_pika_batch.adapters.amqp10.messages import (
    MessageSource,
    SectionMessage,
    decode_headers,
    decode_properties,
    decode_route,
)
from aio_pika_batch.adapters.amqp10.sections import split
from aio_pika_batch.core.message import Properties
from aio_pika_batch.errors import MessageDecodeError
from tests.unit.adapters.amqp10.spoken import SOURCE, section
from tests.unit.adapters.amqp10.values import names, text, values

WHEN = datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)
MILLISECONDS = Timestamp(1_700_000_000_123)
CODES = {
    "header": spec.HEADER,
    "delivery": spec.DELIVERY_ANNOTATIONS,
    "annotations": spec.MESSAGE_ANNOTATIONS,
    "properties": spec.PROPERTIES,
    "application": spec.APPLICATION_PROPERTIES,
}


def head(**sections: Any) -> bytes:
    """These sections, in this order."""
    return b"".join(section(CODES[key], value) for key, value in sections.items())


def annotated(**annotations: Any) -> bytes:
    """Message annotations, whose names begin with `x-`."""
    named = {Symbol(f"x-{key.replace('_', '-')}"): value for key, value in annotations.items()}
    return head(annotations=named)


# --- bodies --------------------------------------------------------------------------------

DATA = section(spec.DATA, b"body")


@pytest.mark.parametrize(
    ("payload", "body", "is_encoded"),
    [
        (DATA, b"body", False),
        (DATA + DATA, b"bodybody", False),
        (DATA + section(spec.FOOTER, {}), b"body", False),
        (section(spec.DATA, b""), b"", False),
        (section(spec.DATA, b"x" * 300), b"x" * 300, False),
        (section(spec.AMQP_VALUE, "v"), section(spec.AMQP_VALUE, "v"), True),
        (section(spec.AMQP_SEQUENCE, [1]) * 2, section(spec.AMQP_SEQUENCE, [1]) * 2, True),
        (
            section(spec.AMQP_VALUE, "v") + section(spec.FOOTER, {}),
            section(spec.AMQP_VALUE, "v") + section(spec.FOOTER, {}),
            True,
        ),
        (section(spec.DATA, "text"), section(spec.DATA, "text"), True),
        (DATA + b"rest", DATA + b"rest", True),
        (DATA[:-1], DATA[:-1], True),
    ],
)
def test_a_body_is_bytes_or_an_encoded_value(payload, body, is_encoded):
    """What cannot be divided is handed out as it is, and ends nothing."""
    before = head(header=[True], annotations={Symbol("x-a"): 1})

    content = split(before + payload)

    assert (body, is_encoded) == (content.body, content.is_encoded)
    assert before == content.head


@pytest.mark.parametrize("rest", [b"", b"\x00", b"\x00\x53", b"rest"])
def test_what_has_no_body_is_handed_out_all_the_same(rest):
    """A broker sends none of it."""
    before = head(header=[True])
    content = split(before + rest)
    assert (before, rest, True) == (content.head, content.body, content.is_encoded)


@pytest.mark.parametrize(
    ("header", "redelivered"),
    [
        ([True, None, None, False], True),
        ([True, None, None, True], False),
        ([True], False),
        ([], False),
        ({}, False),
        (None, False),
    ],
)
def test_a_message_that_was_acquired_before_is_redelivered(header, redelivered):
    """What says nothing about it is new."""
    assert redelivered == split(head(header=header) + DATA).redelivered
    assert not split(DATA).redelivered


# --- properties ----------------------------------------------------------------------------


def test_each_property_is_where_0_9_1_has_it():
    """The whole table."""
    raw = head(
        header=[True, UByte(5), UInt(60_000), False, UInt(3)],
        delivery={Symbol("x-ignored"): 1},
        annotations={
            Symbol("x-exchange"): "exchange",
            Symbol("x-routing-key"): "key",
            Symbol("x-basic-type"): "type",
            Symbol("x-retry-count"): 2,
            Symbol("other"): 1,
            ULong(5): 1,
        },
        properties=[
            "message-id",
            b"user",
            "to",
            "subject",
            "/queues/my%20queue",
            "correlation-id",
            Symbol("text/plain"),
            Symbol("gzip"),
            None,
            MILLISECONDS,
            "group",
        ],
        application={"a": "text"},
    )
    expected = Properties(
        content_type="text/plain",
        content_encoding="gzip",
        headers={"x-retry-count": 2, "a": "text"},
        delivery_mode=2,
        priority=5,
        correlation_id="correlation-id",
        reply_to="my queue",
        expiration="60000",
        message_id="message-id",
        timestamp=WHEN,
        type="type",
        user_id="user",
        app_id="group",
    )
    assert expected == decode_properties(raw)
    assert {"x-retry-count": 2, "a": "text"} == decode_headers(raw)
    assert ("exchange", "key") == decode_route(raw)
    assert "/queues/my%20queue" == decode_properties(raw, has_addresses=False).reply_to


def test_what_is_absent_stays_absent():
    """An empty head has nothing, and no headers are None."""
    assert Properties() == decode_properties(b"")
    assert Properties() == decode_properties(head(header=[False], annotations={}, properties=[]))
    assert decode_headers(b"") is None
    assert ("", "") == decode_route(b"")


@pytest.mark.parametrize(
    ("value", "found", "header"),
    [
        ("text", "text", None),
        (ULong(2**63), "9223372036854775808", None),
        (UUID(int=1), "urn:uuid:00000000-0000-0000-0000-000000000001", None),
        (b"\xff", None, b"\xff"),
        (b"text", None, b"text"),
        ("x" * 256, None, "x" * 256),
        ("x" * 255, "x" * 255, None),
        ("ü" * 128, None, "ü" * 128),
    ],
)
def test_ids_of_any_type_are_text_or_headers(value, found, header):
    """As RabbitMQ has it for consumers over 0-9-1."""
    raw = head(properties=[value, None, None, None, None, value])
    read = decode_properties(raw)
    assert (found, found) == (read.message_id, read.correlation_id)
    headers = None if header is None else {"x-message-id": header, "x-correlation-id": header}
    assert headers == decode_headers(raw) == read.headers


def test_what_has_no_counterpart_is_left_out():
    """A user that isn't text, texts that are longer than 0-9-1 allows, decimals."""
    long = "x" * 256
    raw = head(
        properties=[None, b"\xff", None, None, long, None, None, None, None, None, long],
        annotations={Symbol("x-d"): Decimal(b"1234")},
        application={"d": Decimal(b"1234")},
    )
    assert Properties() == decode_properties(raw)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (None, None),
        (True, True),
        (5, 5),
        (UByte(5), 5),
        (1.5, 1.5),
        (Float(1.5), 1.5),
        ("text", "text"),
        (Symbol("symbol"), "symbol"),
        (b"\xff", b"\xff"),
        (b"long text", "long text"),
        (NotText(b"\xff"), b"\xff"),
        (MILLISECONDS, WHEN),
        (Timestamp(1_700_000_000_123_000), 1_700_000_000_123),
        (UUID(int=1), "urn:uuid:00000000-0000-0000-0000-000000000001"),
        ([Symbol("a"), [UInt(1)]], ["a", [1]]),
        ({Symbol("a"): {Symbol("b"): b"c"}}, {"a": {"b": "c"}}),
    ],
)
def test_a_header_has_a_type_that_python_and_0_9_1_have(value, found):
    """Annotations and application properties alike, and of no class of the codec."""
    for raw in (annotated(h=value), head(application={"x-h": value})):
        headers = decode_headers(raw)
        assert {"x-h": found} == headers
        assert headers is not None
        assert type(found) is type(headers["x-h"])


def test_headers_are_renamed_as_rabbitmq_does():
    """Internal ones are left out; an annotation shadows a property of its name."""
    death = {
        Symbol("ttl"): UInt(100),
        Symbol("queue"): "q",
        Symbol("reason"): Symbol("expired"),
        Symbol("count"): ULong(1),
        Symbol("first-time"): MILLISECONDS,
        Symbol("last-time"): MILLISECONDS,
        Symbol("exchange"): "e",
        Symbol("routing-keys"): ["k"],
    }
    raw = head(
        header=[True, None, UInt(100)],
        annotations={
            Symbol("x-exchange"): "e",
            Symbol("x-routing-key"): "k",
            Symbol("x-basic-type"): "t",
            Symbol("x-cc"): ["another"],
            Symbol("x-opt-rabbitmq-received-time"): MILLISECONDS,
            Symbol("x-opt-deaths"): [death],
            Symbol("x-shadows"): "annotation",
        },
        application={"x-shadows": "property"},
    )
    expected = {
        "CC": ["another"],
        "timestamp_in_ms": 1_700_000_000_123,
        "x-death": [
            {
                "queue": "q",
                "reason": "expired",
                "count": 1,
                "time": WHEN,
                "exchange": "e",
                "routing-keys": ["k"],
                "original-expiration": "100",
            }
        ],
        "x-shadows": "annotation",
    }
    assert expected == decode_headers(raw)
    assert decode_properties(raw).expiration is None, "a dead letter's time to live has ended"


# --- what cannot be read -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "names", "why"),
    [
        (head(properties=[NotText(b"\xff")]), {"message_id"}, "is not UTF-8"),
        (head(properties=[None] * 6 + [NotText(b"\xff")]), {"content_type"}, "is not UTF-8"),
        (head(properties=[None] * 6 + [5]), {"content_type"}, "5 is not text"),
        (head(properties=[None] * 9 + [Timestamp(2**62)]), {"timestamp"}, "not a time in seconds"),
        (head(properties=[None] * 9 + ["now"]), {"timestamp"}, "'now' is not a number"),
        (head(header=[True, "high"]), {"priority"}, "'high' is not a number"),
        (annotated(basic_type=NotText(b"\xff")), {"type"}, "is not UTF-8"),
        (head(application={NotText(b"\xff"): 1}), {"headers"}, "key b'\\xff' is not UTF-8"),
        (head(application=[1]), {"headers"}, "section 0x74 is not a dict"),
        (head(annotations=[1]), {"headers", "type"}, "section 0x72 is not a dict"),
        (head(header={}), {"delivery_mode", "priority", "expiration"}, "0x70 is not a list"),
    ],
)
def test_an_undecodable_property_leaves_the_others_readable(raw, names, why):
    """The others can be read."""
    read = decode_properties(raw + head(application={}))
    assert names == set(read.undecodable)
    assert all(why in reason for reason in read.undecodable.values())


def test_a_head_that_cannot_be_divided_makes_all_undecodable():
    """But nothing else."""
    read = decode_properties(b"\x00\x53\x70")
    assert {"headers", "message_id", "priority", "type"} <= set(read.undecodable)
    assert ("", "") == decode_route(b"\x00\x53\x70")


def test_a_route_that_isnt_text_becomes_the_same_bytes_again():
    """As over 0-9-1."""
    exchange, key = decode_route(annotated(exchange=NotText(b"e\xff"), routing_key=5))
    assert b"e\xff" == exchange.encode(errors="surrogateescape")
    assert "" == key


any_section = st.builds(
    section,
    st.sampled_from(list(CODES.values())),
    st.lists(values, max_size=13) | st.dictionaries(names | text, values, max_size=5) | values,
)


@given(st.lists(any_section, max_size=4).map(b"".join) | st.binary(max_size=80), st.data())
def test_nothing_that_is_read_raises_anything_else(raw, data):
    """Whatever a publisher wrote, and whatever byte of it is wrong."""
    if raw and data.draw(st.booleans()):
        broken = bytearray(raw)
        broken[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        raw = bytes(broken)
    read = decode_properties(raw)
    decode_route(raw)
    split(raw)
    try:
        headers = decode_headers(raw)
    except ValueError:
        assert "headers" in read.undecodable
    else:
        assert "headers" not in read.undecodable
        assert repr(headers) == repr(read.headers)


def test_a_message_reads_its_sections_when_asked():
    """And says that no publisher can splice them."""
    raw = annotated(retry_count=2, routing_key="k") + head(properties=["m"])
    message = SectionMessage(SOURCE, 1, False, b"body", raw, raw)
    assert (2, "k", "m", "q") == (
        message.retry_count,
        message.routing_key,
        message.message_id,
        message.queue,
    )
    assert message.raw_properties is None
    assert message.age is None
    broken = SectionMessage(SOURCE, 1, False, b"", b"\x00", b"\x00")
    with pytest.raises(MessageDecodeError, match="no section begins at byte 0"):
        _ = broken.headers


def test_the_age_of_a_message_is_by_the_clock():
    """Of this machine."""
    now = MessageSource("q", "c", "x").now()
    raw = head(properties=[None] * 9 + [Timestamp(int(now - 100) * 1000)])
    age = SectionMessage(SOURCE, 1, False, b"", raw, raw).age
    assert age is not None
    assert 99 < age < 110
