"""A message as the handler sees it: decoded on demand, and without its body in logs."""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aio_pika_batch.core.message import Message, Properties, message_ids, retry_count
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
def test_properties_have_the_received_values(message):
    """Only the expiration is converted. An absent property is None."""
    for name in PLAIN:
        assert getattr(message.properties, name) == getattr(message, name)
    assert (message.properties.headers or {}) == message.headers


def test_a_property_of_the_class_is_its_descriptor():
    """For tools that look at the class."""
    assert vars(Message)["priority"] is Message.priority


@pytest.mark.parametrize("name", ["ack", "nack", "reject", "process", "channel", "body_size"])
def test_a_name_of_aio_pikas_messages_says_what_to_write(name):
    """Handlers of 0.1.0 got aio-pika's messages."""
    message = a_message()
    with pytest.raises(
        AttributeError, match=rf"'{name}', unlike aio-pika's: (yield|use) "
    ) as caught:
        getattr(message, name)
    assert (name, message) == (caught.value.name, caught.value.obj)
    with pytest.raises(AttributeError, match="has no attribute 'acks'"):
        message.acks  # noqa: B018
    assert not hasattr(message, name)


@pytest.mark.parametrize("name", [*PLAIN, "headers", "expiration"])
def test_an_undecodable_property_raises_only_when_it_is_read(name):
    """The error has the message, the property and the reason. Other properties can be read."""
    properties = Properties(app_id="a", type="t", undecodable={name: UNDECODABLE})
    message = Message(StubSource(), 5, False, b"{}", ("", "jobs"), properties)

    with pytest.raises(MessageDecodeError) as caught:
        getattr(message, name)

    assert (message, name) == (caught.value.message, caught.value.field)
    assert f"{name} of {message!r} cannot be decoded: {UNDECODABLE}" == str(caught.value)
    assert "t" == message.type if name != "type" else "a" == message.app_id
    assert {} == message.json()


@pytest.mark.parametrize("name", READ_FROM_HEADERS)
def test_values_from_undecodable_headers_raise(name):
    """There is no count of 0 if the count is unknown."""
    message = a_message(undecodable={"headers": UNDECODABLE})

    with pytest.raises(MessageDecodeError, match=r"^headers of "):
        getattr(message, name)


def test_properties_are_documented_on_the_class():
    """As attributes of the class, for help() and the reference."""
    assert "The publisher's name for this kind of message." == Message.type.__doc__


def test_undecodable_raw_headers_raise_the_reason_of_the_source():
    """Also if no other property is read."""
    source = StubSource(decoded=Properties(undecodable={"headers": UNDECODABLE}))
    message = Message(source, 1, False, b"", ("", "jobs"), b"raw")

    with pytest.raises(MessageDecodeError, match=rf"^headers of .*{UNDECODABLE}"):
        _ = message.headers


def test_an_invalid_timestamp_has_no_age():
    """Milliseconds where seconds belong don't dead-letter a message."""
    assert None is a_message(undecodable={"timestamp": UNDECODABLE}).age


def test_a_decode_error_is_also_a_value_error():
    """Both can be caught."""
    assert issubclass(MessageDecodeError, ValueError)
    assert issubclass(MessageDecodeError, AioPikaBatchError)


def test_properties_are_decoded_once_on_first_use():
    """A message whose properties are not read has no cost for them."""
    source = StubSource(decoded=Properties(message_id="m", headers={"a": 1}))
    message = Message(source, 1, True, b"x", ("", "jobs"), b"raw")
    assert b"raw" == message.raw_properties
    assert (b"x", 1, True) == (message.body, message.delivery_tag, message.redelivered)
    assert [] == source.seen

    assert "m" == message.message_id
    assert {"a": 1} == message.headers

    assert [b"raw"] == source.seen


def test_a_route_is_decoded_once_on_first_use():
    """Exchange and routing key together."""
    source = StubSource(route=("events", "order.created"))
    message = Message(source, 1, False, b"", b"route", Properties())
    assert [] == source.seen

    assert ("events", "order.created") == (message.exchange, message.routing_key)

    assert [b"route"] == source.seen


def test_a_decoded_message_has_no_raw_properties():
    """An adapter has no bytes to splice then."""
    source = StubSource()
    message = a_message(source=source, message_id="m")

    assert message.raw_properties is None
    assert "m" == message.message_id
    assert [] == source.seen


def test_queue_and_consumer_tag_are_those_of_the_session():
    """They are stored once for all its messages."""
    message = a_message(source=StubSource(queue="q", consumer_tag="c"))

    assert ("q", "c") == (message.queue, message.consumer_tag)


@given(st.binary(min_size=4, max_size=40), messages(of=sound_properties))
def test_a_representation_never_shows_the_body(body, like):
    """It ends up in logs, and so do errors that name a message."""
    route = (like.exchange, like.routing_key)
    one, other = (
        Message(StubSource(), 3, False, each, route, like.properties)
        for each in (body, bytes(len(body)))
    )

    assert repr(other) == repr(one)
    assert f"{len(body)} bytes" in repr(one)
    assert "<Message 3 from queue 'jobs', routing key " in repr(one)


def test_headers_are_decoded_once():
    """However often they are read."""
    source = StubSource(decoded=Properties(headers={"a": 1}))
    message = Message(source, 1, False, b"", b"route", b"raw")

    assert [{"a": 1}, {"a": 1}] == [message.headers, message.headers]
    assert [b"raw"] == source.seen


def test_absent_headers_are_empty():
    """And immutable, because all such messages share them."""
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
    """A number of requeues, or its digits. Anything else reads as 0."""
    assert count == retry_count(value)
    assert (count or 0) == a_message(headers={"x-retry-count": value}).retry_count


@given(field_values)
def test_any_header_value_can_be_read_as_a_retry_count(value):
    """Other clients can write anything."""
    count = a_message(headers={"x-retry-count": value}).retry_count

    assert 0 <= count
    assert int is type(count)


def test_the_retry_count_header_is_that_of_the_session():
    """`retry_count_header` is a setting."""
    source = StubSource(retry_count_header="attempts")

    assert 2 == a_message(source=source, headers={"attempts": 2, "x-retry-count": 9}).retry_count
    assert 0 == a_message(source=source, headers={"x-retry-count": 9}).retry_count


@pytest.mark.parametrize(
    ("headers", "count"),
    [(None, None), ({}, None), ({"x-delivery-count": 3}, 3), ({"x-delivery-count": "3"}, None)],
)
def test_the_delivery_count_is_that_of_the_broker(headers, count):
    """None if the broker does not count."""
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
def test_the_original_route_is_the_first_known_one(headers, original):
    """From the headers, or else that of the message."""
    message = a_message(headers=headers)

    assert original == (message.original_exchange, message.original_routing_key)


@pytest.mark.parametrize(
    ("expiration", "seconds"), [(None, None), ("0", 0), ("1", 0.001), ("60000", 60)]
)
def test_an_expiration_is_in_seconds(expiration, seconds):
    """AMQP has milliseconds in a string."""
    assert seconds == a_message(expiration=expiration).expiration


@pytest.mark.parametrize("expiration", ["", "-1", "1.5", "soon", "²"])
def test_an_expiration_that_is_not_a_number_raises(expiration):
    """The error contains it."""
    with pytest.raises(MessageDecodeError, match=r"^expiration of .*not a number of milliseconds"):
        _ = a_message(expiration=expiration).expiration


def test_the_age_counts_from_the_timestamp():
    """By the clock of the session. None without a timestamp."""
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
def test_a_json_body_is_decoded(value, encoding):
    """In all encodings of JSON."""
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
def test_a_body_that_is_not_json_raises(body):
    """One error for all mistakes, with its cause and without the body."""
    message = a_message(9, body=body)

    with pytest.raises(
        MessageDecodeError, match=r"^body of <Message 9 .* not valid JSON: "
    ) as caught:
        message.json()

    assert "body" == caught.value.field
    assert message is caught.value.message
    assert isinstance(caught.value.__cause__, (ValueError, RecursionError))
    assert 300 > len(str(caught.value))


def compressed(body, encoding):
    """Compress a body as its publisher does."""
    match encoding:
        case "gzip" | "x-gzip" | "GZIP":
            return gzip.compress(body)
        case "deflate":
            return zlib.compress(body)
        case "raw deflate":
            return zlib.compress(body, wbits=-zlib.MAX_WBITS)
        case "deflate, gzip":
            return gzip.compress(zlib.compress(body))
        case "two members":
            return gzip.compress(body[:1]) + gzip.compress(body[1:])
    return body


ENCODINGS = {
    "gzip": "gzip",
    "x-gzip": "x-gzip",
    "GZIP": "GZIP",
    "deflate": "deflate",
    "raw deflate": "deflate",
    "deflate, gzip": "deflate, gzip",
    "two members": "gzip",
    "utf-8": "utf-8",
    "identity": "identity",
    "binary": "binary",
}


@given(json_values, st.sampled_from(list(ENCODINGS)))
def test_a_compressed_body_is_decoded(value, encoding):
    """By `json` and by `text`; kombu's character sets aren't compressions."""
    body = json.dumps(value)
    message = a_message(
        body=compressed(body.encode(), encoding), content_encoding=ENCODINGS[encoding]
    )
    assert value == message.json()
    assert body == message.text()


@pytest.mark.parametrize(
    ("body", "properties", "text"),
    [
        (b"caf\xe9", {"content_type": "text/plain; charset=ISO-8859-1"}, "caf\xe9"),
        (b"caf\xe9", {"content_type": 'text/plain;charset="latin-1";x=y'}, "caf\xe9"),
        (b"caf\xe9", {"content_encoding": "latin-1"}, "caf\xe9"),
        (b"caf\xc3\xa9", {}, "caf\xe9"),
        (b"", {"content_type": "text/plain; charset="}, ""),
    ],
)
def test_text_is_decoded_by_its_character_set(body, properties, text):
    """UTF-8 if none is named."""
    assert text == a_message(body=body, **properties).text()


@pytest.mark.parametrize(
    ("body", "properties", "why"),
    [
        (
            b"\x1b\x05",
            {"content_encoding": "br"},
            "content_encoding 'br': only gzip, deflate and zstd are known",
        ),
        (
            b"{{{",
            {"content_encoding": "gzip"},
            "content_encoding 'gzip': the body is not encoded so",
        ),
        (
            gzip.compress(b"[1]", mtime=0)[:-9],
            {"content_encoding": "gzip"},
            "the body is incomplete",
        ),
        (
            gzip.compress(b"0" * 9, mtime=0),
            {"content_encoding": "gzip"},
            "larger than 8 bytes .*max_bytes",
        ),
        (
            gzip.compress(b"0" * 5, mtime=0) + gzip.compress(b"0" * 4, mtime=0),
            {"content_encoding": "gzip"},
            "larger than 8 bytes",
        ),
        (b"\xff", {"content_type": "text/plain"}, "can't decode byte"),
        (b"x", {"content_type": "text/plain; charset=klingon"}, "unknown encoding: klingon"),
        (gzip.compress(b"{", mtime=0), {"content_encoding": "gzip"}, "not valid JSON"),
    ],
)
def test_a_body_that_cannot_be_decoded_says_why(body, properties, why):
    """The encoding is named, so that the reader of the log knows what to ask the publisher for."""
    message = a_message(body=body, **properties)
    with pytest.raises(MessageDecodeError, match=why):
        message.json(max_bytes=8) if properties.get("content_encoding") else message.text()


@pytest.mark.parametrize("encoding", list(ENCODINGS))
def test_each_encoding_is_decoded(encoding):
    """By name, in any case, several of them, and several members."""
    body = compressed(b"[1, 2]", encoding)
    assert [1, 2] == a_message(body=body, content_encoding=ENCODINGS[encoding]).json()


class FakeZstd:
    """As much of `compression.zstd` of Python 3.14 as is used; it decodes to the same bytes."""

    class ZstdError(Exception):
        """As that of the module."""

    class ZstdDecompressor:
        """As that of the module."""

        eof = True

        def decompress(self, data, max_length):
            """Return the data, if it isn't marked as broken or as cut off."""
            if data == b"broken":
                raise FakeZstd.ZstdError("no frame")
            self.eof = data != b"cut"
            return data[:max_length]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"broken", r"not encoded so \(no frame\)"),
        (b"cut", "incomplete"),
        (b"123456789", "larger than 8 bytes"),
    ],
)
def test_zstd_is_decoded_where_python_has_it(monkeypatch, body, why):
    """With the same errors as other encodings."""
    monkeypatch.setitem(sys.modules, "compression.zstd", FakeZstd)
    assert "[1]" == a_message(body=b"[1]", content_encoding="zstd").text()
    with pytest.raises(MessageDecodeError, match=why):
        a_message(body=body, content_encoding="zstd").text(max_bytes=8)


def test_without_zstd_the_error_says_so(monkeypatch):
    """Before Python 3.14."""
    monkeypatch.setitem(sys.modules, "compression.zstd", None)
    with pytest.raises(MessageDecodeError, match=r"'zstd': it needs Python 3\.14"):
        a_message(body=b"(", content_encoding="zstd").json()


class ReadsIds(StubSource):
    """A source that reads an id without the other properties, as the adapter's does."""

    def decode_message_ids(self, raws):
        """Return the raw bytes as ids, unless they are broken."""
        if b"broken" in raws:
            raise ValueError("cut off")
        return [raw.decode() for raw in raws]

    def decode_properties(self, raw):
        """Read everything."""
        return Properties(message_id=None, undecodable={"message_id": "cut off"})


SOURCE = ReadsIds()


def test_ids_are_read_together():
    """One by one only if that fails, so that the message says why."""
    messages = [Message(SOURCE, 1, False, b"", ("", "jobs"), raw) for raw in (b"id-1", b"id-2")]
    assert ["id-1", "id-2"] == message_ids(messages)
    broken = Message(SOURCE, 1, False, b"", ("", "jobs"), b"broken")
    with pytest.raises(MessageDecodeError, match="cut off"):
        message_ids([*messages, broken])


def test_ids_of_several_sources_are_read_one_by_one():
    """They may be written differently."""
    decoded = Message(StubSource(), 1, False, b"", ("", "jobs"), Properties(message_id="id-2"))
    first = Message(SOURCE, 1, False, b"", ("", "jobs"), b"id-1")
    assert ["id-1", "id-2"] == message_ids([first, decoded])
    assert ["id-2"] == message_ids([decoded])


def test_an_id_is_read_without_the_other_properties():
    """If that fails, all of them say why."""
    assert "id-1" == Message(ReadsIds(), 1, False, b"", ("", "jobs"), b"id-1").message_id
    with pytest.raises(MessageDecodeError, match="cut off"):
        Message(ReadsIds(), 1, False, b"", ("", "jobs"), b"broken").message_id  # noqa: B018
