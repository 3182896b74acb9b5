"""The versions of RabbitMQ differ as they were observed to."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from aio_pika_batch.adapters.memory.broker import Broker
from aio_pika_batch.adapters.memory.rabbitmq import Refusal
from tests.unit.adapters.memory.client import Client, bodies

NEVER = 60
"""A message that was delivered so often is taken to be delivered without end."""


def reject(client: Client, tag: int, *, requeue: bool = True) -> Client:
    """Requeue or dead-letter a message by `basic.reject`."""
    client.channel.reject(tag, requeue=requeue)
    return client


def nack(client: Client, tag: int, *, requeue: bool = True) -> Client:
    """Requeue or dead-letter it by `basic.nack`."""
    client.channel.nack(tag, requeue=requeue)
    return client


def close_channel(client: Client, _tag: int) -> Client:
    """Requeue it by closing the channel."""
    client.channel.close()
    client.channel = client.connection.channel()
    return client


def cut(client: Client, _tag: int) -> Client:
    """Requeue it by cutting the connection."""
    client.broker.cut()
    return Client(client.broker)


def count_deliveries(
    version: str, back: Callable[[Client, int], Client], **arguments: object
) -> int:
    """Return how often a quorum queue delivers a message that is always requeued."""
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
def test_the_default_delivery_limit(version: str, back, deliveries: int):
    """20 since 4.0; nacks do not count since 4.3."""
    assert count_deliveries(version, back) == deliveries


@pytest.mark.parametrize("version", ["3.10", "4.0", "4.3"])
@pytest.mark.parametrize("back", [reject, close_channel, cut])
def test_a_delivery_limit_of_three_allows_four_deliveries(version: str, back):
    """With rejects, and when a channel or a connection is closed."""
    assert count_deliveries(version, back, delivery_limit=3) == 4


@pytest.mark.parametrize(("version", "deliveries"), [("3.10", 4), ("4.0", 4), ("4.3", NEVER)])
def test_nacks_count_towards_a_delivery_limit_before_4_3(version: str, deliveries: int):
    """Since 4.3 they do not."""
    assert count_deliveries(version, nack, delivery_limit=3) == deliveries


@pytest.mark.parametrize("version", ["4.0", "4.3"])
def test_a_negative_delivery_limit_lifts_the_default(version: str):
    """Since 4.0, which has a default."""
    assert count_deliveries(version, reject, delivery_limit=-1) == NEVER


@pytest.mark.parametrize("version", ["3.8", "3.10"])
def test_a_negative_delivery_limit_drops_a_message_at_its_first_return_before_4_0(version: str):
    """It is not the way to say that there is no limit there."""
    assert count_deliveries(version, reject, delivery_limit=-1) == 1


@pytest.mark.parametrize(
    ("version", "first", "after_reject", "after_nack"),
    [
        (
            "3.10",
            {},
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
def test_quorum_queues_count_deliveries_in_headers(version: str, first, after_reject, after_nack):
    """Which headers, depends on the version. The 0 of `basic.get` in 3.10 is not for consumers."""
    client = Client(Broker(version))
    client.queue("q", queue_type="quorum")
    client.publish(b"1", "q", headers={})
    seen = []
    for back in (reject, nack, nack):
        delivery = client.get("q")
        seen.append((delivery.redelivered, delivery.properties.headers))
        back(client, delivery.tag)
    assert seen == [(False, first), (True, after_reject), (True, after_nack)]


@pytest.mark.parametrize("version", ["3.10", "4.0", "4.3"])
def test_a_delivery_count_that_a_client_publishes(version: str):
    """Is delivered until the broker has a count of its own."""
    client = Client(Broker(version))
    client.queue("q", queue_type="quorum")
    client.publish(b"1", "q", headers={"x-delivery-count": 7})
    delivery = client.get("q")
    assert delivery.properties.headers == {"x-delivery-count": 7}
    client.channel.reject(delivery.tag)
    headers = client.get("q").properties.headers
    assert headers is not None
    assert headers["x-delivery-count"] == 1


@pytest.mark.parametrize("version", ["3.10", "4.0", "4.3"])
def test_classic_queues_do_not_count_deliveries(version: str):
    """They only mark a message as redelivered."""
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
def test_the_position_of_requeued_messages_in_a_quorum_queue(version: str, arguments, order):
    """The front, in the order of their return; in 3.10 without a delivery limit, the back."""
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
def test_messages_of_a_closed_channel_return_to_the_front(version: str, kind: str):
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
def test_a_dead_letter_counts_as_redelivered_since_4_3(version: str, kind: str, remembered: bool):
    """If it was delivered to a consumer before."""
    client = Client(Broker(version))
    arguments = {"dead_letter_exchange": "", "dead_letter_routing_key": "dead"}
    client.queue("q", queue_type=kind, **arguments)
    client.queue("dead")
    client.publish(b"1", "q")
    client.channel.reject(client.get("q").tag, requeue=False)
    client.publish(b"2", "q", expiration="0")
    assert [client.get("dead").redelivered for _ in range(2)] == [remembered, False]


@pytest.mark.parametrize(
    ("version", "back", "counts"),
    [
        ("3.10", reject, {}),
        ("4.0", reject, {"x-delivery-count": 1}),
        ("4.0", nack, {"x-delivery-count": 1}),
        ("4.3", reject, {"x-delivery-count": 1, "x-acquired-count": 1}),
        ("4.3", nack, {}),
    ],
)
def test_the_failures_of_a_dead_letter_count_in_the_next_quorum_queue(version: str, back, counts):
    """Since 4.0; since 4.3 a nack isn't a failure. Its next delivery counts as a redelivery."""
    client = Client(Broker(version))
    client.queue("q", queue_type="quorum", dead_letter_exchange="", dead_letter_routing_key="dead")
    client.queue("dead", queue_type="quorum")
    client.publish(b"1", "q")
    back(client, client.get("q").tag, requeue=False)
    delivery = client.get("dead")
    headers = delivery.properties.headers or {}
    assert {name: headers[name] for name in headers if name.endswith("-count")} == counts
    assert delivery.redelivered is bool(counts)


@pytest.mark.parametrize(("version", "order"), [("3.10", b"21"), ("4.0", b"21"), ("4.3", b"12")])
def test_what_a_quorum_queue_drops_at_once_is_dead_lettered_in_reverse_before_4_3(
    version: str, order: bytes
):
    """When a channel is closed, for example, and its messages return to a full queue."""
    client = Client(Broker(version))
    dead_letters = {"dead_letter_exchange": "", "dead_letter_routing_key": "dead"}
    client.queue("q", queue_type="quorum", max_length=0, **dead_letters)
    client.queue("dead")
    client.consume("q")
    for body in (b"1", b"2"):
        client.publish(body, "q")
    client.channel.close()
    assert b"".join(bodies(client.broker, "dead")) == order


@pytest.mark.parametrize(
    ("argument", "value"), [("message_ttl", 1000), ("overflow", "reject-publish")]
)
def test_quorum_queues_of_3_8_refuse_a_ttl_and_reject_publish(argument: str, value: object):
    """Classic queues accept both."""
    client = Client(Broker("3.8"))
    client.queue("classic", **{argument: value})
    words = f"invalid arg 'x-{argument.replace('_', '-')}' for queue 'q' in vhost '/'$"
    with pytest.raises(Refusal, match=words):
        client.queue("q", queue_type="quorum", **{argument: value})


def test_quorum_queues_of_3_8_ignore_an_expiration():
    """The message stays, and keeps the property."""
    client = Client(Broker("3.8"))
    client.queue("q", queue_type="quorum")
    client.publish(b"1", "q", expiration="10")
    client.broker.advance(60)
    assert bodies(client.broker, "q") == [b"1"]
    assert client.get("q").properties.expiration == "10"


def test_3_8_ignores_the_dead_letter_strategy():
    """It accepts the argument, but keeps no dead letter."""
    client = Client(Broker("3.8"))
    strategy = {"dead_letter_exchange": "", "dead_letter_strategy": "at-least-once"}
    client.queue("q", queue_type="quorum", dead_letter_routing_key="gone", **strategy)
    client.publish(b"1", "q")
    client.channel.reject(client.get("q").tag, requeue=False)
    assert client.broker.pending_dead_letters("q") == []
