"""A queue delivers its messages in order, up to the prefetch, and expires them."""

from __future__ import annotations

import pytest

from aio_pika_batch.adapters.memory.broker import Broker
from aio_pika_batch.adapters.memory.channel import CancelFrame
from aio_pika_batch.adapters.memory.faults import EventKind
from aio_pika_batch.adapters.memory.rabbitmq import Refusal
from aio_pika_batch.core.refusals import ReplyCode
from tests.unit.adapters.memory.client import Client, bodies


@pytest.fixture
def broker() -> Broker:
    """A broker that imitates RabbitMQ 4.0."""
    return Broker("4.0")


@pytest.fixture
def client(broker: Broker) -> Client:
    """A connected client."""
    return Client(broker)


def fill(client: Client, queue: str, *contents: bytes) -> None:
    """Publish to a queue."""
    for body in contents:
        client.publish(body, queue)


def test_messages_are_delivered_in_order_up_to_the_prefetch(client: Client):
    """The next one is delivered when any of them is settled."""
    client.queue("q")
    fill(client, "q", b"1", b"2", b"3", b"4")
    client.consume("q", prefetch=2)
    assert client.bodies() == [b"1", b"2"]
    client.channel.ack(2)
    assert client.bodies() == [b"3"]
    client.channel.ack(3, multiple=True)
    assert client.bodies() == [b"4"]


def test_prefetch_0_means_unlimited(client: Client):
    """All messages are delivered at once."""
    client.queue("q")
    fill(client, "q", *(b"%d" % number for number in range(500)))
    client.consume("q", prefetch=0)
    assert len(client.bodies()) == 500


def test_qos_does_not_change_earlier_consumers(client: Client):
    """The prefetch count is that of the time when the consumer started."""
    client.queue("q")
    client.consume("q", prefetch=1)
    client.channel.qos(10)
    fill(client, "q", b"1", b"2")
    assert client.bodies() == [b"1"]


@pytest.mark.parametrize("prefetch", [-1, 65_536])
def test_a_prefetch_must_fit_into_16_bits(client: Client, prefetch: int):
    """Anything else raises."""
    with pytest.raises(ValueError, match="0 to 65535"):
        client.channel.qos(prefetch)


def test_consumers_take_turns(broker: Broker, client: Client):
    """A consumer at its prefetch is skipped."""
    other = Client(broker)
    client.queue("q")
    client.consume("q", prefetch=3)
    other.consume("q", prefetch=1)
    fill(client, "q", b"1", b"2", b"3", b"4", b"5")
    assert (client.bodies(), other.bodies()) == ([b"1", b"3", b"4"], [b"2"])


def test_higher_priority_consumers_come_first(broker: Broker, client: Client):
    """Others get messages only while those are at their prefetch."""
    other = Client(broker)
    client.queue("q")
    client.consume("q", prefetch=3)
    other.consume("q", prefetch=2, priority=5)
    fill(client, "q", b"1", b"2", b"3")
    assert (client.bodies(), other.bodies()) == ([b"3"], [b"1", b"2"])


def test_the_next_consumer_becomes_the_single_active_one(broker: Broker, client: Client):
    """When the active one is cancelled; its unacked messages follow when its channel is closed."""
    other = Client(broker)
    client.queue("q", single_active_consumer=True)
    client.consume("q", prefetch=1)
    other.consume("q", prefetch=5, priority=9)
    fill(client, "q", b"1", b"2")
    assert (client.bodies(), other.bodies()) == ([b"1"], [])
    client.channel.close()
    assert [(each.body, each.redelivered) for each in other.deliveries()] == [
        (b"1", True),
        (b"2", False),
    ]


def test_an_exclusive_consumer_is_the_only_one(broker: Broker, client: Client):
    """403 for a later consumer, and for an exclusive one beside others."""
    client.queue("q")
    client.consume("q", exclusive=True)
    for exclusive in (True, False):
        with pytest.raises(Refusal, match="queue 'q' in vhost '/' in exclusive use") as caught:
            Client(broker).consume("q", exclusive=exclusive)
        assert caught.value.code is ReplyCode.ACCESS_REFUSED
    client.queue("r")
    client.consume("r", "second")
    with pytest.raises(Refusal, match="in exclusive use"):
        Client(broker).consume("r", exclusive=True)
    client.queue("sac", single_active_consumer=True)
    with pytest.raises(Refusal, match="in exclusive use"):
        client.consume("sac", "third", exclusive=True)


def test_a_consumer_tag_is_used_once_in_a_channel(client: Client):
    """530 closes the connection; the tag of a cancelled consumer may be used again."""
    client.queue("q")
    client.consume("q", "t")
    client.channel.cancel("t")
    client.consume("q", "t")
    with pytest.raises(Refusal, match="530 NOT_ALLOWED - attempt to reuse consumer tag 't'"):
        client.consume("q", "t")


def test_a_consumers_priority_must_be_a_number(client: Client):
    """Otherwise 406."""
    client.queue("q")
    with pytest.raises(Refusal, match='"expected integer, got longstr"'):
        client.consume("q", priority="high")


def test_a_cancelled_consumer_gets_nothing_more_and_may_still_settle(client: Client):
    """Its unacked messages stay with the channel."""
    client.queue("q")
    fill(client, "q", b"1", b"2")
    client.consume("q", prefetch=1)
    client.channel.cancel("consumer")
    client.channel.cancel("consumer")
    client.channel.ack(1)
    assert client.bodies() == [b"1"]
    assert bodies(client.broker, "q") == [b"2"]


def test_requeued_messages_of_a_classic_queue_return_to_their_position(
    broker: Broker, client: Client
):
    """In whatever order they are requeued."""
    client.queue("q")
    fill(client, "q", b"1", b"2", b"3", b"4", b"5")
    client.consume("q", prefetch=4)
    client.channel.cancel("consumer")
    for tag in (3, 1, 4):
        client.channel.nack(tag)
    assert bodies(broker, "q") == [b"1", b"3", b"4", b"5"]
    client.channel.reject(2, requeue=True)
    assert bodies(broker, "q") == [b"1", b"2", b"3", b"4", b"5"]


def test_messages_of_a_higher_priority_come_first(broker: Broker, client: Client):
    """An absent priority is 0, and one above the maximum counts as the maximum."""
    client.queue("q", max_priority=5)
    for body, priority in ((b"none", None), (b"9", 9), (b"3", 3), (b"5", 5), (b"0", 0)):
        client.publish(body, "q", priority=priority)
    assert bodies(broker, "q") == [b"9", b"5", b"3", b"none", b"0"]
    client.consume("q", prefetch=2)
    client.channel.cancel("consumer")
    client.channel.nack(2, multiple=True)
    assert bodies(broker, "q") == [b"9", b"5", b"3", b"none", b"0"]


def test_a_queue_without_max_priority_ignores_priorities(broker: Broker, client: Client):
    """It is first in, first out."""
    client.queue("q")
    client.publish(b"low", "q", priority=1)
    client.publish(b"high", "q", priority=9)
    assert bodies(broker, "q") == [b"low", b"high"]


@pytest.mark.parametrize("kind", ["classic", "quorum"])
def test_messages_expire_after_the_queues_ttl_or_their_own(broker: Broker, client: Client, kind):
    """Whichever is shorter."""
    client.queue("q", queue_type=kind, message_ttl=2000)
    client.publish(b"own", "q", expiration="500")
    client.publish(b"queues", "q", expiration="9000")
    assert broker.next_event == 0.5
    broker.advance(0.49)
    assert bodies(broker, "q") == [b"own", b"queues"]
    broker.advance(0.5)
    assert bodies(broker, "q") == [b"queues"]
    broker.advance(2.0)
    assert bodies(broker, "q") == []
    assert broker.next_event is None


@pytest.mark.parametrize("kind", ["classic", "quorum"])
def test_messages_expire_only_at_the_head(broker: Broker, client: Client, kind):
    """A short ttl behind a long one takes as long."""
    client.queue("q", queue_type=kind)
    client.publish(b"long", "q", expiration="6000")
    client.publish(b"short", "q", expiration="500")
    broker.advance(5)
    assert bodies(broker, "q") == [b"long", b"short"]
    broker.advance(6)
    assert bodies(broker, "q") == []


def test_each_priority_has_a_head_that_expires(broker: Broker, client: Client):
    """As in RabbitMQ, where each priority is a queue of its own."""
    client.queue("q", max_priority=1)
    client.publish(b"high", "q", priority=1)
    client.publish(b"low", "q", priority=0, expiration="500")
    broker.advance(0.5)
    assert bodies(broker, "q") == [b"high"]


def test_unacked_messages_expire_only_after_they_are_requeued(broker: Broker, client: Client):
    """Their time to live goes on meanwhile."""
    client.queue("q")
    client.publish(b"1", "q", expiration="500")
    client.consume("q", prefetch=1)
    client.channel.cancel("consumer")
    broker.advance(10)
    assert broker.unacked("q")[0].body == b"1"
    client.channel.nack(1)
    assert bodies(broker, "q") == []
    assert [event.detail for event in broker.journal.of(EventKind.DROPPED)] == ["expired"]


def test_a_message_with_a_ttl_of_zero_reaches_only_a_waiting_consumer(
    broker: Broker, client: Client
):
    """Otherwise it expires at once."""
    client.queue("q")
    client.publish(b"1", "q", expiration="0")
    assert bodies(broker, "q") == []
    client.queue("r")
    client.consume("r")
    client.publish(b"2", "r", expiration="0")
    assert client.bodies() == [b"2"]


def test_a_full_queue_drops_its_head(broker: Broker, client: Client):
    """It confirms the new message; unacked messages do not count."""
    client.queue("q", max_length=2)
    client.consume("q", prefetch=1)
    fill(client, "q", b"held", b"1", b"2", b"3")
    assert client.bodies() == [b"held"]
    assert bodies(broker, "q") == [b"2", b"3"]
    assert [event.detail for event in broker.journal.of(EventKind.DROPPED)] == ["maxlen"]


def test_messages_behind_a_dropped_head_may_have_expired(broker: Broker, client: Client):
    """They expire at once."""
    client.queue("q", max_length=3)
    client.publish(b"1", "q")
    client.publish(b"late", "q", expiration="0")
    fill(client, "q", b"3", b"4")
    assert bodies(broker, "q") == [b"3", b"4"]
    died_of = [(event.body, event.detail) for event in broker.journal.of(EventKind.DROPPED)]
    assert died_of == [(b"1", "maxlen"), (b"late", "expired")]


def test_the_length_of_a_queue_may_be_limited_in_bytes(broker: Broker, client: Client):
    """Only bodies count."""
    client.queue("q", max_length_bytes=5)
    fill(client, "q", b"123", b"45", b"6")
    assert bodies(broker, "q") == [b"45", b"6"]


@pytest.mark.parametrize(
    ("kind", "taken"),
    [
        ("classic", ["confirmed", "confirmed", "refused", "refused"]),
        ("quorum", ["confirmed", "confirmed", "confirmed", "refused"]),
    ],
)
def test_a_full_queue_may_refuse_new_messages(broker: Broker, client: Client, kind, taken):
    """A quorum queue notices it one message late. A requeued message is always accepted."""
    client.queue("q", queue_type=kind, max_length=2, overflow="reject-publish")
    outcomes = [client.publish(body, "q", mandatory=True) for body in (b"1", b"2", b"3", b"4")]
    assert outcomes == taken
    client.consume("q", prefetch=1)
    client.channel.cancel("consumer")
    while client.publish(b"more", "q") == "confirmed":
        pass
    before = len(bodies(broker, "q"))
    client.channel.nack(1)
    assert len(bodies(broker, "q")) == before + 1


def test_a_publication_is_refused_if_one_of_its_queues_refuses(broker: Broker, client: Client):
    """The others store it."""
    client.exchange("x", "fanout")
    client.queue("a", max_length=0, overflow="reject-publish")
    client.queue("b")
    client.bind("a", "x")
    client.bind("b", "x")
    assert client.publish(b"1", "", "x") == "refused"
    assert (bodies(broker, "a"), bodies(broker, "b")) == ([], [b"1"])


def test_an_unused_queue_expires_with_its_messages(broker: Broker, client: Client):
    """Consuming and declaring count as use, publishing does not. Nothing is dead-lettered."""
    client.queue("dead")
    arguments = {"expires": 1000, "dead_letter_exchange": "", "dead_letter_routing_key": "dead"}
    client.queue("q", **arguments)
    broker.advance(0.6)
    client.publish(b"1", "q")
    client.queue("q", **arguments)
    broker.advance(1.5)
    assert "q" in broker.queues
    client.consume("q")
    broker.advance(5)
    client.channel.cancel("consumer")
    broker.advance(5.9)
    assert "q" in broker.queues
    assert broker.next_event == 6.0
    broker.advance(6)
    assert broker.queues == ["dead"]
    assert bodies(broker, "dead") == []


def test_the_consumers_of_a_deleted_queue_are_cancelled(broker: Broker, client: Client):
    """Settling their unacked messages has no effect."""
    client.queue("q")
    fill(client, "q", b"1", b"2")
    client.consume("q", prefetch=1)
    client.deliveries()
    broker.delete_queue("q")
    assert client.channel.take() == [CancelFrame("consumer")]
    client.channel.ack(1)
    assert client.channel.close_reason is None
    assert [event.detail for event in broker.journal.of(EventKind.DROPPED)] == ["queue deleted"] * 2


@pytest.mark.parametrize("how", ["reject", "requeue", "close"])
def test_unacked_messages_of_a_deleted_queue_are_dropped(broker: Broker, client: Client, how: str):
    """They reach neither its dead-letter exchange nor a new queue of that name."""
    client.queue("dead")
    client.queue("q", dead_letter_exchange="", dead_letter_routing_key="dead")
    fill(client, "q", b"1")
    client.consume("q", prefetch=1)
    broker.delete_queue("q")
    client.queue("q")
    if how == "close":
        client.channel.close()
    else:
        client.channel.reject(1, requeue=how == "requeue")
    assert bodies(broker, "dead") == bodies(broker, "q") == []


def test_the_next_event_is_the_next_expiry(broker: Broker, client: Client):
    """Of a message or of a queue."""
    client.queue("q", expires=2000)
    client.publish(b"late", "q", expiration="9000")
    assert broker.next_event == 2.0
    client.queue("r", expires=9000)
    client.publish(b"soon", "r", expiration="1000")
    assert broker.next_event == 1.0


def test_purging_drops_the_ready_messages(broker: Broker, client: Client):
    """Unacked ones stay."""
    client.queue("q")
    fill(client, "q", b"1", b"2", b"3")
    client.consume("q", prefetch=1)
    with client.channel.operation() as vhost:
        assert vhost.queue("q", None).purge() == 2
    assert bodies(broker, "q") == []
    assert [message.body for message in broker.unacked("q")] == [b"1"]


@pytest.mark.parametrize(("kind", "seen"), [("classic", [b"2"]), ("quorum", [b"1"])])
def test_a_classic_queue_drops_a_requeued_message_before_it_delivers_it_again(
    client: Client, kind: str, seen: list[bytes]
):
    """If the queue is beyond its length with it; a quorum queue delivers first."""
    client.queue("q", queue_type=kind, max_length=1)
    client.consume("q", prefetch=1)
    client.publish(b"1", "q")
    client.publish(b"2", "q")
    (first,) = client.deliveries()
    client.channel.reject(first.tag, requeue=True)
    assert client.bodies() == seen


def test_a_full_quorum_queue_refuses_until_it_is_down_to_80_percent_of_its_limit(client: Client):
    """One message less than its limit is not enough."""
    client.queue("q", queue_type="quorum", max_length=5, overflow="reject-publish")
    outcomes = [client.publish(b"%d" % number, "q") for number in range(7)]
    assert outcomes == ["confirmed"] * 6 + ["refused"]
    client.channel.ack(client.get("q").tag)
    assert client.publish(b"7", "q") == "refused"
    client.channel.ack(client.get("q").tag)
    assert client.publish(b"8", "q") == "confirmed"
