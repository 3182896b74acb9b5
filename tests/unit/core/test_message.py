"""A delivery as the handler sees it: decoded when asked, and never told in full to a log."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aio_pika_batch.core.message import Message, Properties, retry_count
from aio_pika_batch.errors import AioPikaBatchError, MessageDecodeError
from aio_pika_batch.testing.strategies import UNDECODABLE, field_values, sound_properties
from tests.unit.core.strategies import StubSource, a_message, messages

PLAIN = (
    "content_type",
    "content_encoding",
    "delivery_mode",
    "priority",
    "correlation_id",
    "reply_to",
    "message_id",
    "timestamp",
    "type",
    "user_id",
    "app_id",
)
READ_FROM_HEADERS = ("retry_count", "delivery_count", "original_exchange", "original_routing_key")


@given(messages(of=sound_properties))
def test_properties_read_as_they_stood_on_the_wire(message):
    """Nothing is converted but the expiration; what is absent is None."""
    for name in PLAIN:
        assert getattr(message.properties, name) == getattr(message, name)
    assert (message.properties.headers or {}) == message.headers


@pytest.mark.parametrize("name", [*PLAIN, "headers", "expiration"])
def test_a_property_that_cannot_be_decoded_costs_only_who_reads_it(name):
    """It raises an error that names the message, the property and the reason; others are read."""
    properties = Properties(app_id="a", type="t", undecodable={name: UNDECODABLE})
    message = Message(StubSource(), 5, False, b"{}", ("", "jobs"), properties)

    with pytest.raises(MessageDecodeError) as caught:
        getattr(message, name)

    assert (message, name) == (caught.value.message, caught.value.field)
    assert f"{name} of {message!r} cannot be decoded: {UNDECODABLE}" == str(caught.value)
    assert "t" == message.type if name != "type" else "a" == message.app_id
    assert {} == message.json()


@pytest.mark.parametrize("name", READ_FROM_HEADERS)
def test_what_is_read_from_headers_needs_headers(name):
    """Nobody is told 0 retries where nobody knows."""
    message = a_message(undecodable={"headers": UNDECODABLE})

    with pytest.raises(MessageDecodeError, match=r"^headers of "):
        getattr(message, name)


def test_an_undecodable_timestamp_has_no_age():
    """An age is read from it."""
    with pytest.raises(MessageDecodeError, match=r"^timestamp of "):
        _ = a_message(undecodable={"timestamp": UNDECODABLE}).age


def test_a_decode_error_is_a_value_error_of_this_library():
    """Either may be caught."""
    assert issubclass(MessageDecodeError, ValueError)
    assert issubclass(MessageDecodeError, AioPikaBatchError)


def test_properties_are_decoded_on_first_use_and_once():
    """A message that nobody asks costs nothing for them."""
    source = StubSource(decoded=Properties(message_id="m", headers={"a": 1}))
    message = Message(source, 1, True, b"x", ("", "jobs"), b"raw")
    assert b"raw" == message.raw_properties
    assert (b"x", 1, True) == (message.body, message.delivery_tag, message.redelivered)
    assert [] == source.seen

    assert "m" == message.message_id
    assert {"a": 1} == message.headers

    assert [b"raw"] == source.seen


def test_a_route_is_decoded_on_first_use_and_once():
    """Exchange and routing key come out of the same bytes."""
    source = StubSource(route=("events", "order.created"))
    message = Message(source, 1, False, b"", b"route", Properties())
    assert [] == source.seen

    assert ("events", "order.created") == (message.exchange, message.routing_key)

    assert [b"route"] == source.seen


def test_what_came_decoded_has_no_raw_properties():
    """An adapter without bytes has none to splice."""
    source = StubSource()
    message = a_message(source=source, message_id="m")

    assert message.raw_properties is None
    assert "m" == message.message_id
    assert [] == source.seen


def test_queue_and_consumer_tag_are_the_session_s():
    """They are held once for all its messages."""
    message = a_message(source=StubSource(queue="q", consumer_tag="c"))

    assert ("q", "c") == (message.queue, message.consumer_tag)


@given(st.binary(min_size=4, max_size=40), messages(of=sound_properties))
def test_a_representation_never_shows_the_body(body, like):
    """It ends up in logs, and so do the errors that name a message."""
    route = (like.exchange, like.routing_key)
    one, other = (
        Message(StubSource(), 3, False, each, route, like.properties)
        for each in (body, bytes(len(body)))
    )

    assert repr(other) == repr(one)
    assert f"{len(body)} bytes" in repr(one)
    assert "<Message 3 from queue 'jobs', routing key " in repr(one)


def test_headers_are_decoded_once():
    """However often they are asked for."""
    source = StubSource(decoded=Properties(headers={"a": 1}))
    message = Message(source, 1, False, b"", b"route", b"raw")

    assert [{"a": 1}, {"a": 1}] == [message.headers, message.headers]
    assert [b"raw"] == source.seen


def test_headers_that_are_absent_read_as_empty():
    """And nobody can write to what all such messages share."""
    headers = a_message().headers

    assert 0 == len(headers)
    with pytest.raises(TypeError):
        headers["x"] = 1  # type: ignore[index]


@pytest.mark.parametrize(
    ("value", "count"),
    [
        (0, 0),
        (7, 7),
        (2**63 - 1, 2**63 - 1),
        ("7", 7),
        ("007", 7),
        ("123456789", 123456789),
        ("1234567890", None),
        ("9" * 5000, None),
        ("", None),
        ("-1", None),
        ("+1", None),
        (" 1", None),
        ("1.0", None),
        ("²", None),
        ("٣", None),
        (-1, None),
        (1.0, None),
        (True, None),
        (False, None),
        (None, None),
        (b"1", None),
        ([1], None),
        ({"count": 1}, None),
    ],
)
def test_what_is_a_retry_count(value, count):
    """A number of requeues, or its digits; anything else is none, and reads as 0."""
    assert count == retry_count(value)
    assert (count or 0) == a_message(headers={"x-retry-count": value}).retry_count


@given(field_values)
def test_no_header_value_makes_a_retry_count_fail(value):
    """Any client may have written it."""
    count = a_message(headers={"x-retry-count": value}).retry_count

    assert 0 <= count
    assert int is type(count)


def test_the_header_that_counts_is_the_session_s():
    """`retry_count_header` is a setting."""
    source = StubSource(retry_count_header="attempts")

    assert 2 == a_message(source=source, headers={"attempts": 2, "x-retry-count": 9}).retry_count
    assert 0 == a_message(source=source, headers={"x-retry-count": 9}).retry_count


@pytest.mark.parametrize(
    ("headers", "count"),
    [(None, None), ({}, None), ({"x-delivery-count": 3}, 3), ({"x-delivery-count": "3"}, None)],
)
def test_the_delivery_count_is_the_broker_s(headers, count):
    """None where the broker does not count."""
    assert count == a_message(headers=headers).delivery_count


@pytest.mark.parametrize(
    ("headers", "original"),
    [
        (None, ("events", "order.created")),
        ({"x-original-exchange": "first"}, ("first", "order.created")),
        ({"x-original-routing-key": "key"}, ("events", "key")),
        ({"x-original-exchange": "", "x-original-routing-key": ""}, ("", "")),
        ({"x-original-exchange": 1, "x-original-routing-key": b"k"}, ("events", "order.created")),
    ],
)
def test_the_original_route_is_the_first_one_known(headers, original):
    """Out of the headers if they hold it, else the message's own."""
    message = a_message(headers=headers)

    assert original == (message.original_exchange, message.original_routing_key)


@pytest.mark.parametrize(
    ("expiration", "seconds"), [(None, None), ("0", 0), ("1", 0.001), ("60000", 60)]
)
def test_an_expiration_is_in_seconds(expiration, seconds):
    """On the wire it is milliseconds, in a string."""
    assert seconds == a_message(expiration=expiration).expiration


@pytest.mark.parametrize("expiration", ["", "-1", "1.5", "soon", "²"])
def test_an_expiration_that_is_no_number_is_undecodable(expiration):
    """The error quotes it."""
    with pytest.raises(MessageDecodeError, match=r"^expiration of .*not a number of milliseconds"):
        _ = a_message(expiration=expiration).expiration


def test_an_age_runs_from_the_timestamp():
    """By the clock of the session; None where nobody said when."""
    source = StubSource(clock=1_000_030.5)
    published = datetime.fromtimestamp(1_000_000, UTC)

    assert 30.5 == a_message(source=source, timestamp=published).age
    assert a_message(source=source).age is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(json_values, st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]))
def test_a_body_of_json_is_its_value(value, encoding):
    """In every encoding that JSON may have."""
    assert value == a_message(body=json.dumps(value).encode(encoding)).json()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"{'a': 1}",
        b"\xff\xfe\xff",
        b'"\xe9"',
        b"1" * 5000,
        b"[" * 200_000,
    ],
    ids=["empty", "open", "python", "half", "latin-1", "too many digits", "too deep"],
)
def test_a_body_that_is_no_json_is_undecodable(body):
    """Whatever is wrong with it, there is one error, with its cause and without the body."""
    message = a_message(9, body=body)

    with pytest.raises(
        MessageDecodeError, match=r"^body of <Message 9 .* not valid JSON: "
    ) as caught:
        message.json()

    assert "body" == caught.value.field
    assert message is caught.value.message
    assert isinstance(caught.value.__cause__, (ValueError, RecursionError))
    assert 300 > len(str(caught.value))
