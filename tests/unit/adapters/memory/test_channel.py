"""A mistake closes the channel, and stored messages are copies."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal

import pytest

from aio_pika_batch.adapters.memory.broker import Broker
from aio_pika_batch.adapters.memory.channel import ChannelIsClosed, CloseFrame
from aio_pika_batch.adapters.memory.rabbitmq import Refusal
from aio_pika_batch.core.refusals import ReplyCode
from tests.unit.adapters.memory.client import Client, bodies


@pytest.fixture
def broker() -> Broker:
    """A broker that imitates RabbitMQ 4.0."""
    return Broker("4.0")


@pytest.fixture
def client(broker: Broker) -> Client:
    """A client with three unacked messages of five."""
    client = Client(broker)
    client.queue("q")
    for number in range(1, 6):
        client.publish(b"%d" % number, "q")
    client.consume("q", prefetch=3)
    client.deliveries()
    return client


@pytest.mark.parametrize("multiple", [False, True])
@pytest.mark.parametrize("tag", [0, 4, 99, -1])
@pytest.mark.parametrize("how", ["ack", "nack"])
def test_settling_an_unknown_delivery_tag_closes_the_channel(client: Client, how, tag, multiple):
    """With 406, also for tag 0; all unacked messages return to the queue."""
    with pytest.raises(Refusal, match=f"unknown delivery tag {tag}") as caught:
        getattr(client.channel, how)(tag, multiple=multiple)
    assert caught.value.code is ReplyCode.PRECONDITION_FAILED
    assert client.channel.unsettled == ()
    assert client.channel.take() == [
        CloseFrame(f"406 PRECONDITION_FAILED - unknown delivery tag {tag}")
    ]
    assert bodies(client.broker, "q") == [b"1", b"2", b"3", b"4", b"5"]
    assert client.connection.close_reason is None


def test_a_delivery_tag_is_settled_once(client: Client):
    """Also if it was settled by `multiple`."""
    client.channel.ack(2, multiple=True)
    with pytest.raises(Refusal, match="unknown delivery tag 1"):
        client.channel.ack(1)


def test_multiple_settles_all_tags_up_to_the_given_one(client: Client):
    """Tags that were settled in between do not matter."""
    client.channel.reject(1, requeue=False)
    client.channel.ack(2, multiple=True)
    assert client.channel.unsettled == (3, 4, 5)
    client.channel.nack(4, multiple=True, requeue=False)
    assert client.channel.unsettled == (5,)


def test_every_call_on_a_closed_channel_raises_the_reason(client: Client):
    """The connection can still open others."""
    client.channel.close()
    for act in (
        lambda: client.channel.ack(1),
        lambda: client.publish(b"", "q"),
        lambda: client.consume("q", "other"),
        lambda: client.queue("r"),
    ):
        with pytest.raises(ChannelIsClosed, match="closed by the client"):
            act()
    client.channel.close()
    assert client.connection.channel().close_reason is None


def test_a_channel_of_a_closed_connection_is_closed(client: Client):
    """From the start; closing twice is harmless."""
    client.connection.close()
    client.connection.close()
    with pytest.raises(ChannelIsClosed, match="closed by the client"):
        client.connection.channel().ack(1)


def test_another_users_user_id_closes_the_channel(client: Client):
    """The own one is accepted."""
    assert client.publish(b"1", "q", user_id="guest") == "confirmed"
    words = "user_id property set to 'bob' but authenticated user was 'guest'"
    with pytest.raises(Refusal, match=words):
        client.publish(b"1", "q", user_id="bob")


@pytest.mark.parametrize(
    ("expiration", "words"),
    [
        ("abc", "invalid expiration 'abc': no_integer"),
        ("", "invalid expiration '': no_integer"),
        ("-1", "invalid expiration '-1': {value_negative,-1}"),
        ("99999999999", "invalid expiration"),
    ],
)
def test_an_expiration_must_be_a_number_of_milliseconds(client: Client, expiration, words):
    """In decimal digits; otherwise the channel is closed."""
    with pytest.raises(Refusal) as caught:
        client.publish(b"1", "q", expiration=expiration)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("properties", "error"),
    [
        ({"priority": 256}, ValueError),
        ({"priority": True}, ValueError),
        ({"delivery_mode": -1}, ValueError),
        ({"message_id": "m" * 256}, ValueError),
        ({"message_id": 5}, TypeError),
        ({"timestamp": 5}, TypeError),
        ({"headers": [("a", 1)]}, TypeError),
        ({"headers": {"n" * 256: 1}}, ValueError),
        ({"headers": {1: 1}}, TypeError),
        ({"headers": {"a": 2**63}}, ValueError),
        ({"headers": {"a": object()}}, TypeError),
        ({"headers": {"a": [{"b": {1, 2}}]}}, TypeError),
    ],
)
def test_properties_that_amqp_cannot_encode_raise(client: Client, properties, error):
    """The channel stays open, since nothing was sent."""
    with pytest.raises(error):
        client.publish(b"1", "q", **properties)
    assert client.channel.close_reason is None


def test_a_body_must_be_bytes_and_a_routing_key_short(client: Client):
    """Otherwise nothing is sent."""
    with pytest.raises(TypeError, match="a body must be bytes, not str"):
        client.publish("text", "q")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a routing key has 256 bytes; AMQP allows 255"):
        client.publish(b"", "é" * 128)


VALUES = {
    "none": None,
    "bool": True,
    "int": -(2**62),
    "float": 1.1,
    "str": "é",
    "bytes": b"\xff\x00",
    "decimal": Decimal("1.50"),
    "time": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
    "list": [1, "a", [2], {"deep": [3]}],
    "table": {"a": {"b": None}},
}


def test_properties_arrive_with_the_same_types_and_values(broker: Broker):
    """Absent ones stay absent."""
    client = Client(broker)
    client.queue("q")
    client.publish(b"1", "q", headers=VALUES, priority=0, message_id="")
    client.publish(b"2", "q")
    client.publish(b"3", "q", headers={})
    client.consume("q")
    full, bare, empty = (each.properties for each in client.deliveries())
    assert full.headers == VALUES
    assert full.headers is not None
    assert [type(value) for value in full.headers.values()] == [
        type(value) for value in VALUES.values()
    ]
    assert (full.priority, full.message_id, full.type) == (0, "", None)
    assert (bare.headers, bare.priority, bare.delivery_mode) == (None, None, None)
    assert empty.headers == {}


def test_timestamps_are_whole_seconds_in_utc(broker: Broker):
    """As in AMQP; one without a zone counts as UTC."""
    client = Client(broker)
    client.queue("q")
    there = timezone(timedelta(hours=2))
    client.publish(
        b"1",
        "q",
        timestamp=datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=there),
        headers={"naive": datetime(2026, 1, 2, 3, 4, 5)},  # noqa: DTZ001  -- that is the point
    )
    properties = client.get("q").properties
    assert properties.timestamp == datetime(2026, 1, 2, 1, 4, 5, tzinfo=UTC)
    assert properties.headers == {"naive": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)}


def test_neither_publisher_nor_consumer_can_change_a_stored_message(broker: Broker):
    """At any depth of its headers."""
    client = Client(broker)
    client.queue("q")
    headers = {"list": [1, {"deep": [2]}], "table": {"a": 1}}
    as_it_was = {"list": [1, {"deep": [2]}], "table": {"a": 1}}
    body = bytearray(b"body")
    client.publish(body, "q", headers=headers)  # type: ignore[arg-type]
    headers["list"][1]["deep"].append("changed")  # type: ignore[index]
    body[:] = b"ruin"
    first = client.get("q")
    assert (first.body, first.properties.headers) == (b"body", as_it_was)
    assert first.properties.headers is not None
    first.properties.headers["list"][1]["deep"].append("changed")
    first.properties.headers["table"]["more"] = 1
    client.channel.nack(first.tag)
    assert client.get("q").properties.headers == as_it_was


def test_a_channel_notifies_its_client_of_each_frame(broker: Broker):
    """So that a session can wait meanwhile."""
    noticed = []
    channel = broker.connect().channel(lambda: noticed.append(len(channel.received)))
    Client(broker).queue("q")
    channel.qos(0)
    channel.consume("q", "t")
    broker.put("q", b"1")
    broker.put("q", b"2")
    broker.cut()
    assert noticed == [1, 2, 3]
