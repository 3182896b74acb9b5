"""Whatever can go wrong on a broker can be made to."""

from __future__ import annotations

import pytest

from aio_pika_batch.adapters.memory import Broker, ConnectFault, EventKind, PublishFault
from aio_pika_batch.adapters.memory.broker import BrokerUnreachable
from aio_pika_batch.adapters.memory.channel import CancelFrame, CloseFrame, ConfirmFrame
from aio_pika_batch.adapters.memory.refusals import Refusal
from tests.unit.adapters.memory.client import Client, bodies


@pytest.fixture
def broker() -> Broker:
    """A broker as of 4.0."""
    return Broker("4.0")


@pytest.fixture
def client(broker: Broker) -> Client:
    """Somebody with a queue."""
    client = Client(broker)
    client.queue("q")
    return client


def test_no_broker_and_no_entry(broker: Broker):
    """Connections that are there already stay."""
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
    """Nothing is heard of it."""
    broker.faults.on_publish(PublishFault.LOSE)
    assert client.publish(b"1", "q") == "silence"
    broker.faults.clear()
    assert client.publish(b"2", "q") == "confirmed"
    assert bodies(broker, "q") == [b"2"]


def test_a_lost_confirmation_does_not_mean_a_lost_message(broker: Broker, client: Client):
    """It is stored all the same."""
    broker.faults.on_publish(PublishFault.UNCONFIRMED, times=2)
    assert [client.publish(body, "q") for body in (b"1", b"2", b"3")] == [
        "silence",
        "silence",
        "confirmed",
    ]
    assert bodies(broker, "q") == [b"1", b"2", b"3"]


def test_blocked_publications_wait(broker: Broker, client: Client):
    """And are stored and confirmed in their order, or lost with their connection."""
    other = Client(broker, "other")
    broker.faults.on_publish(PublishFault.BLOCK)
    assert [client.publish(b"1", "q"), other.publish(b"x", "q"), client.publish(b"2", "q")] == [
        "silence"
    ] * 3
    assert bodies(broker, "q") == []
    broker.cut("other")
    broker.unblock()
    assert bodies(broker, "q") == [b"1", b"2"]
    assert client.channel.take() == [ConfirmFrame(1, True), ConfirmFrame(2, True)]
    assert client.publish(b"3", "q") == "confirmed"


def test_a_blocked_mistake_is_found_when_it_is_read(broker: Broker, client: Client):
    """It closes the channel then, and not the broker."""
    broker.faults.on_publish(PublishFault.BLOCK)
    client.publish(b"1", "k", "missing")
    client.publish(b"2", "q")
    broker.unblock()
    assert client.channel.close_reason == "404 NOT_FOUND - no exchange 'missing' in vhost '/'"
    assert bodies(broker, "q") == []


def test_a_fault_may_be_for_some_publications_only(broker: Broker, client: Client):
    """By exchange, or by routing key; the oldest that fits counts."""
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
    """Those of one name, or all; what was unsettled goes back."""
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


def test_what_is_cut_at_once_is_not_handed_around(broker: Broker, client: Client):
    """A message of one cut connection does not visit another that is cut with it."""
    other = Client(broker, "other")
    client.publish(b"1", "q")
    client.consume("q", prefetch=1)
    other.consume("q", prefetch=1)
    broker.cut()
    assert broker.journal.counts[EventKind.DELIVERED] == 1


def test_consumers_can_be_cancelled(broker: Broker, client: Client):
    """They are told; what they hold they may settle."""
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
    """Publishing to one is a mistake then."""
    client.exchange("x")
    broker.delete_exchange("x")
    broker.delete_exchange("x")
    with pytest.raises(Refusal, match="no exchange 'x'"):
        client.publish(b"1", "k", "x")


def test_tests_can_look_and_put_behind_the_clients_back(broker: Broker, client: Client):
    """Also into queues that are full of faults, and into another's exclusive one."""
    client.queue("mine", exclusive=True, max_length=9)
    broker.faults.on_publish(PublishFault.REFUSE)
    assert broker.put("mine", b"1", exchange="x", routing_key="k")
    (message,) = broker.ready("mine")
    assert (message.exchange, message.routing_key) == ("x", "k")
    assert broker.put("q", b"2")
    assert broker.ready("q")[0].routing_key == "q"
    assert broker.arguments("mine") == {"x-max-length": 9}
    assert broker.queues == ["q", "mine"]


def test_the_journal_tells_a_messages_life(broker: Broker, client: Client):
    """Event by event, and counts them all."""
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


def test_the_journal_keeps_only_so_much():
    """The counts go on."""
    broker = Broker(journal_size=3)
    client = Client(broker)
    client.queue("q")
    for _ in range(5):
        client.publish(b"1", "q")
    assert len(broker.journal.events) == 3
    assert broker.journal.counts[EventKind.PUBLISHED] == 5


def test_time_never_runs_backwards(broker: Broker):
    """An earlier time is no time."""
    broker.advance(5)
    broker.advance(3)
    assert broker.now == 5
