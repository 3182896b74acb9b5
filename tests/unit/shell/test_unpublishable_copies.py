"""Copies that can't be published, whatever the queue does: too large, or not allowed."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from aio_pika_batch import MessageResult, TopologyError
from aio_pika_batch.adapters.memory import EventKind, PublishFault
from aio_pika_batch.core.message import Properties
from tests.unit.shell.helpers import ACK, NACK, REQUEUE, QueueBroker, RecordingConsumer, answering

QUEUE = "work"
DEAD = "work.dead"
FRAME = 131_072


def with_headers(size):
    """Properties whose headers nearly fill a frame."""
    return Properties(headers={"token": "t" * (FRAME - size), "small": "s"})


async def by_body(messages):
    """Do with each message what its body says."""
    for message in messages:
        yield MessageResult[message.body.decode()]


@pytest.mark.parametrize("kind", ["classic", "quorum"])
@pytest.mark.parametrize("room", [100, 160, 200, 400, 1000])
async def test_a_dead_letter_leaves_out_what_does_not_fit(rabbit, kind, room):
    """Our headers that only inform first, and the largest of the message's own if need be."""
    async with RecordingConsumer(
        by_body,
        transport=rabbit.transport,
        queue_name=QUEUE,
        queue_type=kind,
        dead_letter_queue=DEAD,
        batch_size=2,
    ) as consumer:
        rabbit.put(b"NACK", properties=with_headers(room), queue=QUEUE)
        rabbit.put(b"NACK", queue=QUEUE)
        await asyncio.sleep(60)
    assert 2 == len(consumer.handled)
    [large] = [
        each for each in rabbit.broker.ready(DEAD) if "small" in (each.properties.headers or {})
    ]
    headers = large.properties.headers
    assert "rejected" == headers["x-dead-letter-reason"]
    assert QUEUE == headers["x-original-queue"]
    assert ("token" in headers) != (["token"] == headers.get("x-omitted-headers"))
    assert [] == rabbit.waiting(QUEUE)


async def test_a_retry_that_does_not_fit_is_dead_lettered(rabbit):
    """Its attempts could never be counted. The rest of its batch is retried."""
    async with RecordingConsumer(
        by_body,
        transport=rabbit.transport,
        queue_name=QUEUE,
        dead_letter_queue=DEAD,
        batch_size=2,
        max_requeue_attempts=1,
    ) as consumer:
        rabbit.put(b"REQUEUE", properties=with_headers(110), queue=QUEUE)
        rabbit.put(b"REQUEUE", queue=QUEUE)
        await asyncio.sleep(60)
    assert 3 == len(consumer.handled)
    reasons = [
        each.properties.headers["x-dead-letter-reason"] for each in rabbit.broker.ready(DEAD)
    ]
    assert ["exhausted", "unpublishable"] == sorted(reasons)


async def test_without_a_destination_what_cannot_be_retried_is_held(rabbit, caplog):
    """It isn't lost, and handled at a low rate; the log says so now and then."""
    async with RecordingConsumer(
        by_body,
        transport=rabbit.transport,
        queue_name=QUEUE,
        batch_size=1,
        without_dead_letter="retry",
    ) as consumer:
        rabbit.put(b"REQUEUE", properties=with_headers(110), queue=QUEUE)
        await asyncio.sleep(3600)
        assert 1 == len(rabbit.unsettled(QUEUE)) + len(rabbit.waiting(QUEUE))
        assert len(consumer.handled) <= 7
        assert consumer.is_healthy
        lines = [each for each in caplog.records if "can't be encoded" in each.getMessage()]
        assert 1 <= len(lines) <= 60
    assert 1 == len(rabbit.waiting(QUEUE))


@pytest.mark.parametrize(("exchange", "result"), [("", REQUEUE), ("work.dlx", NACK)])
async def test_a_user_without_permission_is_refused_at_start(rabbit, exchange, result):
    """Before anything is handled; nothing is published to find out."""
    rabbit.broker.faults.on_publish(PublishFault.FORBID, exchange=exchange)
    rabbit.declare(QUEUE)
    rabbit.put(b"0", queue=QUEUE)
    consumer = RecordingConsumer(
        answering(result), transport=rabbit.transport, queue_name=QUEUE, dead_letter_queue=DEAD
    )
    with pytest.raises(TopologyError, match=r"write permission.*set_permissions"):
        await consumer.start()
    assert [] == consumer.handled
    assert [] == rabbit.times(EventKind.PUBLISHED)


@pytest.mark.untraced
@pytest.mark.parametrize("kind", ["classic", "quorum"])
@pytest.mark.parametrize(("exchange", "result"), [("", b"REQUEUE"), ("work.dlx", b"NACK")])
async def test_a_permission_that_is_revoked_while_consuming_loses_nothing(
    rabbit, kind, exchange, result, caplog
):
    """Attempts, deliveries and log lines are bounded. Then everything goes on."""
    async with RecordingConsumer(
        by_body,
        transport=rabbit.transport,
        queue_name=QUEUE,
        queue_type=kind,
        dead_letter_queue=DEAD,
        batch_size=10,
        max_requeue_attempts=1,
    ) as consumer:
        await asyncio.sleep(1)
        rabbit.broker.faults.on_publish(PublishFault.FORBID, exchange=exchange)
        rabbit.put(*[result] * 5, b"ACK", queue=QUEUE)
        connections = len(rabbit.times(EventKind.CONNECTED))
        await asyncio.sleep(1200)
        assert 5 == len(rabbit.unsettled(QUEUE)) + len(rabbit.waiting(QUEUE))
        # One copy is tried every half a minute, on a connection of its own, and then the topology.
        assert len(rabbit.times(EventKind.CONNECTED)) - connections < 1200 / 5
        assert Counter(consumer.handled)[result] <= 5 * 1200 / 15
        assert len(caplog.records) < 200
        rabbit.broker.faults.clear()
        await asyncio.sleep(3600)
    assert [result] * 5 == rabbit.waiting(DEAD)
    assert [] == rabbit.waiting(QUEUE)


@pytest.mark.untraced
@pytest.mark.parametrize("limit", [1, 2, 5, 20])
@pytest.mark.parametrize("fault", [PublishFault.FORBID, PublishFault.REFUSE, PublishFault.LOSE])
async def test_no_return_pushes_a_message_over_its_delivery_limit(limit, fault):
    """It is held instead, so the broker never drops it. RabbitMQ 4.0 counts each return."""
    rabbit = QueueBroker("4.0")
    async with RecordingConsumer(
        answering(NACK),
        transport=rabbit.transport,
        queue_name=QUEUE,
        queue_type="quorum",
        queue_arguments={"x-delivery-limit": limit},
        dead_letter_queue=DEAD,
        broker_dead_letters=False,
        batch_size=1,
        requeue_hold=1,
    ):
        await asyncio.sleep(1)
        rabbit.broker.faults.on_publish(fault, exchange="work.dlx")
        rabbit.put(b"0", queue=QUEUE)
        await asyncio.sleep(1800)
        assert [] == rabbit.times(EventKind.DROPPED)
        assert 1 == len(rabbit.unsettled(QUEUE)) + len(rabbit.waiting(QUEUE))
        rabbit.broker.faults.clear()
        await asyncio.sleep(3600)
    assert b"0" in rabbit.waiting(DEAD)


async def test_neighbours_of_a_forbidden_copy_are_not_repeated_forever(rabbit):
    """Its refusal closes the channel with all that is in flight; then it goes alone."""
    rabbit.declare("dead")
    rabbit.bind("dead", "dlx", "#", kind="topic")
    many = [b"%d" % number for number in range(20)]

    async def answer(messages):
        for message in messages:
            yield NACK if message.body != b"ok" else ACK

    async with RecordingConsumer(
        answer,
        transport=rabbit.transport,
        queue_name=QUEUE,
        dead_letter_exchange="dlx",
        dead_letter_exchange_type="topic",
        batch_size=20,
        prefetch_count=100,
    ):
        await asyncio.sleep(1)
        rabbit.broker.faults.on_publish(PublishFault.FORBID, exchange="dlx", routing_key="secret")
        rabbit.put(*many[:10], exchange="events", routing_key="open", queue=QUEUE)
        rabbit.put(b"forbidden", exchange="events", routing_key="secret", queue=QUEUE)
        rabbit.put(*many[10:], exchange="events", routing_key="open", queue=QUEUE)
        await asyncio.sleep(600)
        dead = Counter(rabbit.waiting("dead"))
        assert set(many) == set(dead)
        assert max(dead.values()) <= 2


async def test_a_forbidden_copy_closes_the_channel_seldom(rabbit):
    """Each time it leaves the copies in doubt that are in flight beside it."""
    rabbit.declare("dead")
    rabbit.bind("dead", "dlx", "#", kind="topic")
    async with RecordingConsumer(
        answering(NACK),
        transport=rabbit.transport,
        queue_name=QUEUE,
        dead_letter_exchange="dlx",
        dead_letter_exchange_type="topic",
        batch_size=1,
        requeue_hold=600,
    ):
        await asyncio.sleep(1)
        rabbit.broker.faults.on_publish(PublishFault.FORBID, exchange="dlx", routing_key="secret")
        rabbit.put(b"forbidden", exchange="events", routing_key="secret", queue=QUEUE)
        await asyncio.sleep(300)
        closed = rabbit.times(EventKind.CHANNEL_CLOSED)
        refused = rabbit.broker.journal.of(EventKind.CHANNEL_CLOSED)
        assert 2 <= sum("refused" in each.detail for each in refused) <= 20, closed
