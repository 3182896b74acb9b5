"""Declarations are checked as RabbitMQ checks them, and refused with its texts."""

from __future__ import annotations

import pytest

from aio_pika_batch.adapters.memory.broker import Broker
from aio_pika_batch.adapters.memory.rabbitmq import Refusal
from aio_pika_batch.core.refusals import ReplyCode
from tests.unit.adapters.memory.client import Client


@pytest.fixture
def client() -> Client:
    """A client of a broker that imitates RabbitMQ 4.0."""
    return Client(Broker("4.0"))


def test_declaring_the_same_again_is_accepted(client: Client):
    """An argument that RabbitMQ does not know is not compared."""
    client.queue("q", message_ttl=5, queue_type="classic")
    client.queue("q", message_ttl=5, unheard_of=1)
    client.exchange("x", "topic")
    client.exchange("x", "topic")
    assert client.channel.close_reason is None


@pytest.mark.parametrize(
    ("again", "code", "words"),
    [
        (
            {"message_ttl": 6},
            406,
            (
                "'x-message-ttl' for queue 'q' in vhost '/': received the value"
                " '6' of type 'byte' but current is the value '5' of type 'byte'"
            ),
        ),
        (
            {},
            406,
            (
                "'x-message-ttl' for queue 'q' in vhost '/': received none but current is the"
                " value '5' of type 'byte'"
            ),
        ),
        (
            {"message_ttl": 5, "max_length": 70_000},
            406,
            (
                "'x-max-length' for queue 'q' in vhost '/':"
                " received the value '70000' of type 'signedint' but current is none"
            ),
        ),
        (
            {"message_ttl": 5, "queue_type": "quorum"},
            406,
            "'x-queue-type' for queue 'q' in vhost '/': received 'quorum' but current is 'classic'",
        ),
        (
            {"message_ttl": 5, "durable": False},
            406,
            "'durable' for queue 'q' in vhost '/': received 'false' but current is 'true'",
        ),
        (
            {"message_ttl": 5, "auto_delete": True},
            406,
            "'auto_delete' for queue 'q' in vhost '/': received 'true' but current is 'false'",
        ),
        (
            {"message_ttl": 5, "exclusive": True},
            405,
            "cannot obtain exclusive access to locked queue 'q' in vhost '/'",
        ),
    ],
)
def test_declaring_a_queue_differently_is_refused(client: Client, again, code, words):
    """The refusal says what differs, and the channel is closed."""
    client.queue("q", message_ttl=5)
    with pytest.raises(Refusal) as caught:
        client.queue("q", **again)
    assert words in str(caught.value)
    assert caught.value.code.value == code
    assert client.channel.close_reason == str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"message_ttl": -1},
            "invalid arg 'x-message-ttl' for queue 'q' in vhost '/': {value_negative,-1}",
        ),
        (
            {"message_ttl": "5"},
            "x-message-ttl' for queue 'q' in vhost '/': \"expected integer, got longstr\"",
        ),
        ({"message_ttl": True}, "expected integer, got bool"),
        ({"message_ttl": 1 << 40}, "value_too_large"),
        ({"expires": 0}, "{value_zero,0}"),
        (
            {"overflow": "explode"},
            "invalid arg 'x-overflow' for queue 'q' in vhost '/': invalid_overflow",
        ),
        ({"queue_type": "pile"}, "unsupported queue type 'pile'"),
        ({"dead_letter_routing_key": "k"}, "routing_key_but_no_dlx_defined"),
        ({"dead_letter_exchange": 1}, "expected longstr, got byte"),
        ({"single_active_consumer": 1}, "expected boolean, got byte"),
        ({"delivery_limit": 3}, "of queue type rabbit_classic_queue"),
        ({"dead_letter_strategy": "at-least-once"}, "of queue type rabbit_classic_queue"),
        ({"queue_type": "quorum", "max_priority": 3}, "of queue type rabbit_quorum_queue"),
        ({"queue_type": "quorum", "durable": False}, "invalid property 'non-durable'"),
        ({"queue_type": "quorum", "exclusive": True}, "invalid property 'exclusive-owner'"),
        ({"queue_type": "quorum", "auto_delete": True}, "invalid property 'auto-delete'"),
    ],
)
def test_invalid_arguments_of_a_queue_are_refused(client: Client, arguments, words):
    """With 406, and nothing is created."""
    with pytest.raises(Refusal) as caught:
        client.queue("q", **arguments)
    assert caught.value.code is ReplyCode.PRECONDITION_FAILED
    assert words in str(caught.value)
    assert client.broker.queues == []


def test_streams_are_refused(client: Client):
    """With 540, which closes the connection."""
    with pytest.raises(Refusal, match="540 NOT_IMPLEMENTED"):
        client.queue("q", queue_type="stream")
    assert client.connection.close_reason is not None


@pytest.mark.parametrize("type_", ["bogus", "x-delayed-message"])
@pytest.mark.parametrize(("version", "code"), [("3.10", 503), ("4.0", 406), ("4.3", 406)])
def test_an_unknown_exchange_type_is_refused(version, code, type_):
    """3.10 closes the connection, later versions the channel."""
    client = Client(Broker(version))
    with pytest.raises(Refusal, match=f"unknown exchange type '{type_}'") as caught:
        client.exchange("x", type_)
    assert caught.value.code.value == code
    assert (client.connection.close_reason is not None) is (code == 503)


@pytest.mark.parametrize(
    ("again", "words"),
    [
        (
            {"type_": "fanout"},
            "'type' for exchange 'x' in vhost '/': received 'fanout' but current is 'direct'",
        ),
        ({"durable": False}, "'durable' for exchange 'x' in vhost '/': received 'false'"),
        ({"auto_delete": True}, "'auto_delete' for exchange 'x' in vhost '/': received 'true'"),
        (
            {"alternate_exchange": "z"},
            "received the value 'z' of type 'longstr' but current is none",
        ),
    ],
)
def test_declaring_an_exchange_differently_is_refused(client: Client, again, words):
    """The refusal says what differs."""
    client.exchange("x", "direct")
    with pytest.raises(Refusal) as caught:
        client.exchange("x", **again)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda c: c.queue("amq.mine"), "queue name 'amq.mine' contains reserved prefix"),
        (lambda c: c.exchange("amq.mine"), "exchange name 'amq.mine' contains reserved prefix"),
        (lambda c: c.exchange(""), "operation not permitted on the default exchange"),
        (lambda c: (c.queue("q"), c.bind("q", "", "k")), "not permitted on the default exchange"),
        (lambda c: (c.queue("q"), c.bind("q", "nope", "k")), "no exchange 'nope' in vhost '/'"),
        (lambda c: (c.exchange("x"), c.bind("nope", "x", "k")), "no queue 'nope' in vhost '/'"),
        (lambda c: c.consume("nope"), "no queue 'nope' in vhost '/'"),
    ],
)
def test_reserved_and_missing_names_are_refused(client: Client, act, words):
    """With RabbitMQ's texts."""
    with pytest.raises(Refusal) as caught:
        act(client)
    assert words in str(caught.value)


def test_a_queue_without_a_name_gets_one_from_the_broker(client: Client):
    """A different one each time."""
    one, other = client.queue("", exclusive=True), client.queue("", exclusive=True)
    assert one != other
    assert one.startswith("amq.gen-")


def test_an_exclusive_queue_belongs_to_its_connection():
    """Others can publish to it but not consume it, and it is deleted with the connection."""
    broker = Broker("4.0")
    owner, stranger = Client(broker), Client(broker)
    owner.queue("q", exclusive=True)
    with pytest.raises(Refusal, match="RESOURCE_LOCKED"):
        stranger.consume("q")
    stranger = Client(broker)
    assert stranger.publish(b"1", "q", mandatory=True) == "confirmed"
    owner.connection.close()
    assert stranger.publish(b"1", "q", mandatory=True) == "returned"


def test_an_auto_delete_queue_is_deleted_with_its_last_consumer(client: Client):
    """Not before it has had one."""
    client.queue("q", auto_delete=True)
    client.consume("q", "a")
    client.consume("q", "b")
    client.channel.cancel("a")
    assert client.broker.queues == ["q"]
    client.channel.cancel("b")
    assert client.broker.queues == []


def test_a_version_that_is_not_imitated_is_refused():
    """The error lists those that are."""
    with pytest.raises(ValueError, match=r"RabbitMQ '2'; use one of 3\.8, 3\.10, 4\.0, 4\.3"):
        Broker("2")
