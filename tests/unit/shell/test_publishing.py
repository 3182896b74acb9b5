"""`publish` and `publish_many` of a consumer."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest

from aio_pika_batch import Outcome, Publication, PublishError
from aio_pika_batch.adapters.memory import ConnectFault, PublishFault
from tests.unit.shell.helpers import (
    ACK,
    REQUEUE,
    RecordingConsumer,
    ack,
    answering,
    first_then,
    numbered,
)
from tests.unit.shell.scripted_transport import ScriptedTransport


@pytest.fixture
async def consumer(rabbit):
    """A running consumer, and a queue to publish to."""
    rabbit.declare("sink")
    rabbit.bind("sink", "events", "created")
    made = RecordingConsumer(transport=rabbit.transport)
    async with made:
        yield made


async def test_a_publication_arrives_unchanged(rabbit, consumer):
    """Body, headers and properties; persistent by default."""
    moment = datetime(2025, 3, 4, tzinfo=UTC)
    await consumer.publish(
        b"0",
        exchange="events",
        routing_key="created",
        headers={"h": [1]},
        message_id="m",
        expiration=60,
        timestamp=moment,
    )
    [message] = rabbit.broker.ready("sink")
    assert (b"0", "events", "created") == (message.body, message.exchange, message.routing_key)
    properties = message.properties
    assert {"h": [1]} == properties.headers
    assert ("m", "60000", moment, 2) == (
        properties.message_id,
        properties.expiration,
        properties.timestamp,
        properties.delivery_mode,
    )


async def test_an_unknown_property_raises_a_type_error(consumer):
    """Python itself raises it."""
    with pytest.raises(TypeError, match="colour"):
        await consumer.publish(b"0", routing_key="sink", colour="red")


async def test_an_unroutable_publication_is_an_error(consumer):
    """Unless `mandatory=False`."""
    with pytest.raises(PublishError, match="no queue is bound for exchange 'events', routing key"):
        await consumer.publish(b"0", exchange="events", routing_key="lost")
    await consumer.publish(b"0", exchange="events", routing_key="lost", mandatory=False)


async def test_a_refused_publication_is_an_error(rabbit, consumer):
    """The queue is full, or the exchange is missing."""
    rabbit.broker.faults.on_publish(PublishFault.REFUSE)
    with pytest.raises(PublishError, match=r"refused by the broker .*routing key 'sink'"):
        await consumer.publish(b"0", routing_key="sink")


async def test_a_publication_without_a_confirm_is_an_error(rabbit, consumer):
    """It may be stored or not; the error says how long it was waited for."""
    rabbit.broker.faults.on_publish(PublishFault.LOSE)
    with pytest.raises(PublishError, match=r"10(\.0)? s.*may or may not be stored"):
        await consumer.publish(b"0", routing_key="sink")
    assert 10 == asyncio.get_running_loop().time()


async def test_an_unreachable_broker_is_an_error(rabbit, consumer):
    """At once; the next publication connects again."""
    rabbit.broker.faults.connect_fault = ConnectFault.UNREACHABLE
    rabbit.broker.cut()
    with pytest.raises(PublishError, match="connection"):
        await consumer.publish(b"0", routing_key="sink")
    rabbit.broker.faults.connect_fault = ConnectFault.NONE
    await consumer.publish(b"1", routing_key="sink")
    assert [b"1"] == rabbit.waiting("sink")


async def test_publish_many_returns_one_outcome_each(rabbit, consumer):
    """In order, and without raising."""
    rabbit.broker.faults.on_publish(PublishFault.REFUSE, routing_key="full")
    outcomes = await consumer.publish_many(
        [
            Publication(b"0", routing_key="sink"),
            Publication(b"1", routing_key="nowhere"),
            Publication(b"2", routing_key="full"),
            Publication(b"3", exchange="events", routing_key="created"),
        ]
    )
    assert [Outcome.CONFIRMED, Outcome.RETURNED, Outcome.REFUSED, Outcome.CONFIRMED] == outcomes
    assert [b"0", b"3"] == rabbit.waiting("sink")
    assert [] == await consumer.publish_many([])


async def test_a_missing_exchange_costs_nothing_but_the_publication(rabbit, consumer):
    """It closes a channel; requeues have another one, and the next publication opens a new one."""
    consumer.answer = first_then(answering(REQUEUE), ack)
    with pytest.raises(PublishError, match="no such exchange"):
        await consumer.publish(b"0", exchange="missing", routing_key="x")
    await consumer.publish(b"1", routing_key="sink")
    rabbit.put(b"2")
    await asyncio.sleep(11)
    assert [b"1"] == rabbit.waiting("sink")
    assert [[b"2"], [b"2"]] == consumer.batches
    assert 1 == consumer.status().workers[0].epoch


async def test_publications_share_one_connection(rabbit, consumer):
    """Also if they begin at the same time; it is closed at the end."""
    before = len(rabbit.broker.connections)
    await asyncio.gather(*(consumer.publish(body, routing_key="sink") for body in numbered(9)))
    assert before + 1 == len(rabbit.broker.connections)
    assert sorted(numbered(9)) == sorted(rabbit.waiting("sink"))


async def test_a_lost_connection_is_replaced(rabbit, consumer):
    """Before the next publication, if the loss is known by then."""
    await consumer.publish(b"0", routing_key="sink")
    rabbit.broker.cut()
    await consumer.publish(b"1", routing_key="sink")
    assert numbered(2) == rabbit.waiting("sink")


async def test_a_handler_may_publish(rabbit):
    """A pipeline: the message is acked after the confirm."""
    rabbit.declare("sink")

    async def answer(messages):
        await consumer.publish_many(
            [Publication(message.body, routing_key="sink") for message in messages]
        )
        for _ in messages:
            yield ACK

    rabbit.put(*numbered(5))
    consumer = RecordingConsumer(answer, transport=rabbit.transport, batch_size=5)
    async with consumer:
        await asyncio.sleep(1)
    assert numbered(5) == rabbit.waiting("sink")


async def test_an_error_while_closing_the_publisher_is_ignored(caplog):
    """It is gone either way."""
    script = ScriptedTransport()

    async def fail():
        raise PublishError("hung up")

    script.on_publisher_leave = fail
    consumer = RecordingConsumer(transport=script)
    async with consumer:
        await consumer.publish(b"0", routing_key="sink")
    assert "leave publisher" == script.steps[-1]
