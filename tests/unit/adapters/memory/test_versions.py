"""What differs between versions of RabbitMQ, as it was seen on real ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from aio_pika_batch.adapters.memory.broker import Broker
from aio_pika_batch.adapters.memory.refusals import Refusal
from tests.unit.adapters.memory.client import Client, bodies

NEVER = 60
"""A message that has come back so often comes back for ever."""


def reject(client: Client, tag: int) -> Client:
    """One way to give a message back."""
    client.channel.reject(tag, requeue=True)
    return client


def nack(client: Client, tag: int) -> Client:
    """Another."""
    client.channel.nack(tag, requeue=True)
    return client


def close_channel(client: Client, _tag: int) -> Client:
    """Another: forget it, and the channel."""
    client.channel.close()
    client.channel = client.connection.channel()
    return client


def cut(client: Client, _tag: int) -> Client:
    """Another, by accident."""
    client.broker.cut()
    return Client(client.broker)


def lives(version: str, back: Callable[[Client, int], Client], **arguments: object) -> int:
    """How often a quorum queue delivers a message that always comes back."""
    client = Client(Broker(version))
    client.queue("dead")
    client.queue(
        "q",
        queue_type="quorum",
        dead_letter_exchange="",
        dead_letter_routing_key="dead",
        **arguments,
    )
    client.publish(b"1", "q")
    for delivered in range(1, NEVER + 1):
        client = back(client, client.get("q").tag)
        if bodies(client.broker, "dead"):
            (letter,) = client.broker.ready("dead")
            assert letter.headers["x-first-death-reason"] == "delivery_limit"
            return delivered
    return NEVER


@pytest.mark.parametrize(
    ("version", "back", "deliveries"),
    [
        ("3.10", nack, NEVER),
        ("3.10", reject, NEVER),
        ("4.0", nack, 21),
        ("4.0", reject, 21),
        ("4.3", nack, NEVER),
        ("4.3", reject, 21),
    ],
)
def test_without_a_limit_of_its_own(version: str, back, deliveries: int):
    """Since 4.0 there are 20 deliveries in vain; since 4.3 a nack is none."""
    assert lives(version, back) == deliveries


@pytest.mark.parametrize("version", ["3.10", "4.0", "4.3"])
@pytest.mark.parametrize("back", [reject, close_channel, cut])
def test_a_limit_of_three_means_four_deliveries(version: str, back):
    """By reject, and by a channel or connection that closes."""
    assert lives(version, back, delivery_limit=3) == 4


@pytest.mark.parametrize(("version", "deliveries"), [("3.10", 4), ("4.0", 4), ("4.3", NEVER)])
def test_a_limit_of_three_and_nacks(version: str, deliveries: int):
    """4.3 never gets there."""
    assert lives(version, nack, delivery_limit=3) == deliveries


@pytest.mark.parametrize("version", ["4.0", "4.3"])
def test_a_negative_limit_is_none(version: str):
    """It takes the default off."""
    assert lives(version, reject, delivery_limit=-1) == NEVER


@pytest.mark.parametrize(
    ("version", "first", "after_reject", "after_nack"),
    [
        (
            "3.10",
            {"x-delivery-count": 0},
            {"x-delivery-count": 1},
            {"x-delivery-count": 2},
        ),
        ("4.0", {}, {"x-delivery-count": 1}, {"x-delivery-count": 2}),
        (
            "4.3",
            {},
            {"x-delivery-count": 1, "x-acquired-count": 1},
            {"x-delivery-count": 1, "x-acquired-count": 2},
        ),
    ],
)
def test_what_quorum_queues_tell_of_deliveries(version: str, first, after_reject, after_nack):
    """In headers, which the broker owns."""
    client = Client(Broker(version))
    client.queue("q", queue_type="quorum")
    client.publish(b"1", "q", headers={})
    seen = []
    for back in (reject, nack, nack):
        delivery = client.get("q")
        seen.append((delivery.redelivered, delivery.properties.headers))
        back(client, delivery.tag)
    assert seen == [(False, first), (True, after_reject), (True, after_nack)]


@pytest.mark.parametrize(("version", "told"), [("3.10", 0), ("4.0", 7), ("4.3", 7)])
def test_a_count_that_a_client_claims(version: str, told: int):
    """Is delivered until the broker has a count of its own."""
    client = Client(Broker(version))
    client.queue("q", queue_type="quorum")
    client.publish(b"1", "q", headers={"x-delivery-count": 7})
    delivery = client.get("q")
    assert delivery.properties.headers == {"x-delivery-count": told}
    client.channel.reject(delivery.tag)
    headers = client.get("q").properties.headers
    assert headers is not None
    assert headers["x-delivery-count"] == 1


@pytest.mark.parametrize("version", ["3.10", "4.0", "4.3"])
def test_classic_queues_count_nothing(version: str):
    """They only remember that it was delivered before."""
    client = Client(Broker(version))
    client.queue("q")
    client.publish(b"1", "q")
    client.channel.reject(client.get("q").tag)
    delivery = client.get("q")
    assert (delivery.redelivered, delivery.properties.headers) == (True, None)


@pytest.mark.parametrize(
    ("version", "arguments", "order"),
    [
        ("3.8", {}, [b"1", b"0", b"2", b"3", b"4"]),
        ("3.10", {}, [b"3", b"4", b"1", b"0", b"2"]),
        ("3.10", {"delivery_limit": 9}, [b"1", b"0", b"2", b"3", b"4"]),
        ("4.0", {}, [b"1", b"0", b"2", b"3", b"4"]),
        ("4.3", {}, [b"1", b"0", b"2", b"3", b"4"]),
    ],
)
def test_where_returned_messages_go_in_a_quorum_queue(version: str, arguments, order):
    """Before all others in the order of their return; in 3.10 without a limit, to the end."""
    client = Client(Broker(version))
    client.queue("q", queue_type="quorum", **arguments)
    for number in range(5):
        client.publish(b"%d" % number, "q")
    client.consume("q", prefetch=3)
    client.channel.cancel("consumer")
    client.channel.nack(2)
    client.channel.nack(1)
    client.channel.reject(3)
    assert bodies(client.broker, "q") == order


@pytest.mark.parametrize("version", ["3.10", "4.0", "4.3"])
@pytest.mark.parametrize("kind", ["classic", "quorum"])
def test_a_closed_channel_gives_back_to_the_front(version: str, kind: str):
    """In order, and marked as redelivered."""
    client = Client(Broker(version))
    client.queue("q", queue_type=kind)
    for number in range(4):
        client.publish(b"%d" % number, "q")
    client.consume("q", prefetch=2)
    client.channel.close()
    assert bodies(client.broker, "q") == [b"0", b"1", b"2", b"3"]
    other = Client(client.broker)
    other.consume("q")
    assert [each.redelivered for each in other.deliveries()] == [True, True, False, False]


@pytest.mark.parametrize(
    ("version", "remembered"), [("3.10", False), ("4.0", False), ("4.3", True)]
)
@pytest.mark.parametrize("kind", ["classic", "quorum"])
def test_whether_a_dead_letter_counts_as_redelivered(version: str, kind: str, remembered: bool):
    """Since 4.3, if a consumer has had it."""
    client = Client(Broker(version))
    arguments = {"dead_letter_exchange": "", "dead_letter_routing_key": "dead"}
    client.queue("q", queue_type=kind, **arguments)
    client.queue("dead")
    client.publish(b"1", "q")
    client.channel.reject(client.get("q").tag, requeue=False)
    client.publish(b"2", "q", expiration="0")
    assert [client.get("dead").redelivered for _ in range(2)] == [remembered, False]


@pytest.mark.parametrize(
    ("argument", "value"), [("message_ttl", 1000), ("overflow", "reject-publish")]
)
def test_old_quorum_queues_know_no_time_to_live_and_no_refusal(argument: str, value: object):
    """As 3.8 says it; classic queues know both."""
    client = Client(Broker("3.8"))
    client.queue("classic", **{argument: value})
    words = f"invalid arg 'x-{argument.replace('_', '-')}' for queue 'q' in vhost '/'$"
    with pytest.raises(Refusal, match=words):
        client.queue("q", queue_type="quorum", **{argument: value})


def test_old_quorum_queues_ignore_an_expiration():
    """The message stays, and keeps the property."""
    client = Client(Broker("3.8"))
    client.queue("q", queue_type="quorum")
    client.publish(b"1", "q", expiration="10")
    client.broker.advance(60)
    assert bodies(client.broker, "q") == [b"1"]
    assert client.get("q").properties.expiration == "10"


def test_an_old_broker_takes_a_strategy_that_it_does_not_know():
    """Whatever it says: nothing is kept."""
    client = Client(Broker("3.8"))
    strategy = {"dead_letter_exchange": "", "dead_letter_strategy": "at-least-once"}
    client.queue("q", queue_type="quorum", dead_letter_routing_key="gone", **strategy)
    client.publish(b"1", "q")
    client.channel.reject(client.get("q").tag, requeue=False)
    assert client.broker.pending_dead_letters("q") == []
