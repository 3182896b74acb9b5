"""Tests can inject faults into the broker, and read what happened."""

from __future__ import annotations

import pytest

from aio_pika_batch.adapters.memory import Broker, ConnectFault, EventKind, PublishFault
from aio_pika_batch.adapters.memory.broker import BrokerUnreachable
from aio_pika_batch.adapters.memory.channel import CancelFrame, CloseFrame, ConfirmFrame
from aio_pika_batch.adapters.memory.rabbitmq import Refusal
from aio_pika_batch.core.publication import Outcome
from tests.unit.adapters.memory.client import Client, bodies


@pytest.fixture
def broker() -> Broker:
    """A broker that imitates RabbitMQ 4.0."""
    return Broker("4.0")


@pytest.fixture
def client(broker: Broker) -> Client:
    """A client with a queue."""
    client = Client(broker)
    client.queue("q")
    return client


def test_new_connections_can_be_refused(broker: Broker):
    """Open connections are not affected."""
    client = Client(broker)
    broker.faults.connect_fault = ConnectFault.UNREACHABLE
    with pytest.raises(BrokerUnreachable):
        broker.connect()
    broker.faults.connect_fault = ConnectFault.WRONG_PASSWORD
    with pytest.raises(Refusal, match="403 ACCESS_REFUSED - Login was refused"):
        broker.connect()
    broker.faults.connect_fault = ConnectFault.NONE
    broker.connect("late")
    client.queue("q")
    assert broker.connections == ["client", "late"]


def test_a_refused_publication_is_not_stored(broker: Broker, client: Client):
    """It is nacked."""
    broker.faults.on_publish(PublishFault.REFUSE, times=1)
    assert [client.publish(b"1", "q"), client.publish(b"2", "q")] == ["refused", "confirmed"]
    assert bodies(broker, "q") == [b"2"]


def test_a_lost_publication_is_neither_stored_nor_confirmed(broker: Broker, client: Client):
    """The publisher gets no answer."""
    broker.faults.on_publish(PublishFault.LOSE)
    assert client.publish(b"1", "q") == "silence"
    broker.faults.clear()
    assert client.publish(b"2", "q") == "confirmed"
    assert bodies(broker, "q") == [b"2"]


def test_an_unconfirmed_publication_is_stored(broker: Broker, client: Client):
    """Only its confirm is lost."""
    broker.faults.on_publish(PublishFault.UNCONFIRMED, times=2)
    assert [client.publish(body, "q") for body in (b"1", b"2", b"3")] == [
        "silence",
        "silence",
        "confirmed",
    ]
    assert bodies(broker, "q") == [b"1", b"2", b"3"]


def test_blocked_publications_wait_for_unblock(broker: Broker, client: Client):
    """Then they are stored and confirmed in order; those of a cut connection are lost."""
    other = Client(broker, "other")
    broker.faults.on_publish(PublishFault.BLOCK)
    assert [client.publish(b"1", "q"), other.publish(b"x", "q"), client.publish(b"2", "q")] == [
        "silence"
    ] * 3
    assert bodies(broker, "q") == []
    broker.cut("other")
    broker.unblock()
    assert bodies(broker, "q") == [b"1", b"2"]
    assert client.channel.take() == [
        ConfirmFrame(1, Outcome.CONFIRMED),
        ConfirmFrame(2, Outcome.CONFIRMED),
    ]
    assert client.publish(b"3", "q") == "confirmed"


def test_a_blocked_publication_is_refused_at_unblock(broker: Broker, client: Client):
    """It closes its channel then."""
    broker.faults.on_publish(PublishFault.BLOCK)
    client.publish(b"1", "k", "missing")
    client.publish(b"2", "q")
    broker.unblock()
    assert client.channel.close_reason == "404 NOT_FOUND - no exchange 'missing' in vhost '/'"
    assert bodies(broker, "q") == []


def test_a_publish_fault_can_be_limited_to_an_exchange_or_a_routing_key(
    broker: Broker, client: Client
):
    """Of several that match, the oldest counts."""
    client.exchange("x", "fanout")
    client.bind("q", "x")
    broker.faults.on_publish(PublishFault.REFUSE, exchange="x", times=1)
    broker.faults.on_publish(PublishFault.LOSE, routing_key="q")
    assert client.publish(b"1", "q", "x") == "refused"
    assert client.publish(b"2", "q", "x") == "silence"
    assert client.publish(b"3", "other", "x") == "confirmed"
    broker.faults.clear(PublishFault.REFUSE)
    assert client.publish(b"4", "q") == "silence"


def test_connections_can_be_cut(broker: Broker, client: Client):
    """Those of one name, or all; unacked messages return to their queues."""
    other = Client(broker, "other")
    client.publish(b"1", "q")
    client.consume("q")
    client.channel.take()
    assert broker.cut("client", "rats") == 1
    assert client.channel.take() == [CloseFrame("rats")]
    assert other.channel.close_reason is None
    assert bodies(broker, "q") == [b"1"]
    assert broker.connections == ["other"]
    assert broker.cut() == 1
    assert broker.cut() == 0


def test_connections_that_are_cut_together_do_not_get_each_others_messages(
    broker: Broker, client: Client
):
    """A message of the first is not delivered to the second."""
    other = Client(broker, "other")
    client.publish(b"1", "q")
    client.consume("q", prefetch=1)
    other.consume("q", prefetch=1)
    broker.cut()
    assert broker.journal.counts[EventKind.DELIVERED] == 1


def test_the_broker_can_cancel_consumers(broker: Broker, client: Client):
    """The client is notified, and may still settle its unacked messages."""
    client.publish(b"1", "q")
    client.consume("q", prefetch=1)
    client.deliveries()
    assert broker.cancel_consumers("q") == 1
    assert client.channel.take() == [CancelFrame("consumer")]
    client.publish(b"2", "q")
    client.channel.ack(1)
    assert bodies(broker, "q") == [b"2"]
    assert broker.consumers("q") == []


def test_exchanges_can_be_deleted(broker: Broker, client: Client):
    """Publishing to a deleted one is refused."""
    client.exchange("x")
    broker.delete_exchange("x")
    broker.delete_exchange("x")
    with pytest.raises(Refusal, match="no exchange 'x'"):
        client.publish(b"1", "k", "x")


def test_tests_can_read_and_fill_queues_without_a_client(broker: Broker, client: Client):
    """Also exclusive queues, and in spite of faults."""
    client.queue("mine", exclusive=True, max_length=9)
    broker.faults.on_publish(PublishFault.REFUSE)
    assert broker.put("mine", b"1", exchange="x", routing_key="k")
    (message,) = broker.ready("mine")
    assert (message.exchange, message.routing_key) == ("x", "k")
    assert broker.put("q", b"2")
    assert broker.ready("q")[0].routing_key == "q"
    assert broker.arguments("mine") == {"x-max-length": 9}
    assert broker.queues == ["q", "mine"]


def test_the_journal_records_the_events_of_a_message(broker: Broker, client: Client):
    """In order, and counts the events of each kind."""
    client.publish(b"1", "q")
    client.channel.nack(client.get("q").tag)
    client.channel.ack(client.get("q").tag)
    life = [event.kind for event in broker.journal.events if event.body == b"1"]
    assert life == [
        EventKind.PUBLISHED,
        EventKind.STORED,
        EventKind.DELIVERED,
        EventKind.REQUEUED,
        EventKind.DELIVERED,
        EventKind.ACKED,
    ]
    assert broker.journal.counts[EventKind.DELIVERED] == 2
    assert len(broker.journal.of(EventKind.CONSUMING, queue="q")) == 2
    assert broker.journal.of(EventKind.CONSUMING, queue="other") == []


def test_the_journal_keeps_a_limited_number_of_events():
    """The counts are not limited."""
    broker = Broker(journal_size=3)
    client = Client(broker)
    client.queue("q")
    for _ in range(5):
        client.publish(b"1", "q")
    assert len(broker.journal.events) == 3
    assert broker.journal.counts[EventKind.PUBLISHED] == 5


def test_time_never_runs_backwards(broker: Broker):
    """An earlier time is ignored."""
    broker.advance(5)
    broker.advance(3)
    assert broker.now == 5
