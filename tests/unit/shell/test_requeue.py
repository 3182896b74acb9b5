"""What a requeue does to a message and to its original."""

from __future__ import annotations

import asyncio
import logging
from datetime import UTC, datetime

import pytest

from aio_pika_batch import MessageResult, Outcome, Trigger
from aio_pika_batch.adapters.memory import EventKind, PublishFault
from aio_pika_batch.core.message import Properties
from aio_pika_batch.observer import BatchCut, Requeued
from tests.unit.shell.helpers import (
    ACK,
    REQUEUE,
    REQUEUE_IMMEDIATE,
    EventRecorder,
    RecordingConsumer,
    ack,
    answering,
    first_then,
    numbered,
    taking,
)
from tests.unit.shell.scripted_transport import ScriptedTransport

EVERYTHING = Properties(
    content_type="text/plain",
    content_encoding="utf-8",
    headers={"kept": [1, {"deep": None}], "CC": ["jobs.cc"], "x-acquired-count": 3},
    delivery_mode=1,
    priority=7,
    correlation_id="c",
    reply_to="r",
    expiration="600000",
    message_id="m",
    timestamp=datetime(2025, 3, 4, tzinfo=UTC),
    type="t",
    app_id="a",
)


def events(rabbit, *kinds):
    """Return what happened, as (kind, body)."""
    return [(event.kind, event.body) for event in rabbit.broker.journal.of(*kinds)]


async def test_a_copy_goes_to_the_back_of_the_queue(rabbit):
    """Others go first, and the copy's retry count is one higher."""
    rabbit.put(*numbered(3))
    consumer = RecordingConsumer(
        first_then(answering(REQUEUE), ack), transport=rabbit.transport, batch_size=1
    )
    async with consumer:
        await asyncio.sleep(1)
    assert [b"0", b"1", b"2", b"0"] == consumer.handled
    assert [0, 0, 0, 1] == [message.retry_count for message in consumer.messages]
    assert not consumer.messages[-1].redelivered


async def test_a_copy_keeps_its_properties_and_gains_its_origin(rabbit):
    """Byte for byte, absent ones absent; headers of the broker and those that route are dropped."""
    rabbit.put(b"0", properties=EVERYTHING, exchange="events", routing_key="order.created")
    rabbit.put(b"1")
    consumer = RecordingConsumer(
        first_then(answering(REQUEUE, REQUEUE), ack), transport=rabbit.transport, batch_size=2
    )
    async with consumer:
        await asyncio.sleep(1)
    first, plain, copy, plain_copy = consumer.messages
    assert "CC" in first.headers
    names = set(Properties.__slots__) - {"headers"}
    for original, again in ((first, copy), (plain, plain_copy)):
        for name in names:
            assert getattr(original.properties, name) == getattr(again.properties, name)
    added = dict(copy.headers)
    assert datetime.now(UTC).year == added.pop("x-first-failed-at").year
    assert {
        "kept": [1, {"deep": None}],
        "x-retry-count": 1,
        "x-original-exchange": "events",
        "x-original-routing-key": "order.created",
    } == added
    assert ("", "jobs") == (copy.exchange, copy.routing_key)
    assert ("events", "order.created") == (copy.original_exchange, copy.original_routing_key)


async def test_an_origin_is_added_once(rabbit):
    """The second copy has the origin of the first publication, not of the first copy."""
    rabbit.put(b"0", exchange="events", routing_key="order.created")
    consumer = RecordingConsumer(
        first_then(answering(REQUEUE), answering(REQUEUE), ack),
        transport=rabbit.transport,
        batch_size=1,
    )
    async with consumer:
        await asyncio.sleep(1)
    assert [0, 1, 2] == [message.retry_count for message in consumer.messages]
    assert {"order.created"} == {each.original_routing_key for each in consumer.messages}
    first, second = (each.headers["x-first-failed-at"] for each in consumer.messages[1:])
    assert first == second


async def test_an_original_is_acked_only_once_its_copy_is_confirmed(rabbit):
    """Until then it stays unsettled; messages without a copy do not wait for it."""
    rabbit.broker.faults.on_publish(PublishFault.BLOCK)
    rabbit.put(*numbered(3))
    async with RecordingConsumer(
        first_then(answering(ACK, REQUEUE, ACK), ack),
        transport=rabbit.transport,
        batch_size=3,
        batch_timeout=1,
    ) as consumer:
        await asyncio.sleep(5)
        assert [b"1"] == rabbit.unsettled()
        assert [] == rabbit.waiting()
        rabbit.broker.unblock()
        await asyncio.sleep(5)
        assert [] == rabbit.unsettled()
    assert [numbered(3), [b"1"]] == consumer.batches
    assert [(EventKind.PUBLISHED, b"1"), (EventKind.ACKED, b"1")] == [
        each for each in events(rabbit, EventKind.PUBLISHED, EventKind.ACKED) if each[1] == b"1"
    ][:2]


async def test_copies_have_their_own_connection(rabbit):
    """It opens with the first copy; if it is blocked, acks are not."""
    async with RecordingConsumer(
        first_then(answering(REQUEUE), ack), transport=rabbit.transport
    ) as consumer:
        assert 1 == len(rabbit.broker.connections)
        rabbit.put(b"0")
        await asyncio.sleep(6)
        assert 2 == len(rabbit.broker.connections)
        await consumer.publish(b"1", routing_key="jobs")
        assert 3 == len(rabbit.broker.connections)
    assert [] == rabbit.broker.connections


async def test_a_message_is_handled_once_more_than_it_is_requeued(rabbit):
    """After `max_requeue_attempts` it is dead-lettered or, without an exchange, rejected."""
    recorder = EventRecorder()
    rabbit.put(b"0")
    async with RecordingConsumer(
        answering(REQUEUE),
        transport=rabbit.transport,
        observers=[recorder],
        batch_size=1,
        max_requeue_attempts=3,
    ) as consumer:
        await asyncio.sleep(1)
    assert [0, 1, 2, 3] == [message.retry_count for message in consumer.messages]
    assert [1, 2, 3] == [event.retry_count for event in recorder.of(Requeued)]
    assert [(EventKind.DROPPED, b"0")] == events(rabbit, EventKind.DROPPED)
    assert [] == rabbit.waiting()


async def test_without_attempts_a_requeue_is_a_dead_letter_at_once(rabbit):
    """`max_requeue_attempts=0`."""
    rabbit.put(b"0")
    async with RecordingConsumer(
        answering(REQUEUE), transport=rabbit.transport, batch_size=1, max_requeue_attempts=0
    ) as consumer:
        await asyncio.sleep(1)
    assert [[b"0"]] == consumer.batches
    assert [] == rabbit.waiting()


async def test_the_retry_count_header_can_be_renamed(rabbit):
    """`retry_count_header`; the default header is then an ordinary one."""
    rabbit.put(b"0", properties=Properties(headers={"x-retry-count": 99, "tries": 1}))
    async with RecordingConsumer(
        first_then(answering(REQUEUE), ack),
        transport=rabbit.transport,
        batch_size=1,
        retry_count_header="tries",
    ) as consumer:
        await asyncio.sleep(1)
    assert [1, 2] == [message.retry_count for message in consumer.messages]
    assert 99 == consumer.messages[1].headers["x-retry-count"]


@pytest.mark.parametrize("nonsense", ["many", -1, True, None, 1.5])
async def test_an_invalid_retry_count_is_zero_and_logged_once(rabbit, caplog, nonsense):
    """Any client may have written the header. A missing one is valid."""
    for _ in range(3):
        rabbit.put(b"0", properties=Properties(headers={"x-retry-count": nonsense}))
    async with RecordingConsumer(
        first_then(answering(REQUEUE), answering(REQUEUE), answering(REQUEUE), ack),
        transport=rabbit.transport,
        batch_size=1,
    ) as consumer:
        await asyncio.sleep(1)
    assert [0, 0, 0, 1, 1, 1] == [message.retry_count for message in consumer.messages]
    warned = [record for record in caplog.records if "retry count" in record.getMessage()]
    assert (nonsense is not None) == len(warned)


async def test_requeue_immediate_goes_to_the_front_and_counts_nothing(rabbit):
    """`basic.reject(requeue=True)`: no copy, no header."""
    rabbit.put(*numbered(3))
    consumer = RecordingConsumer(
        first_then(answering(REQUEUE_IMMEDIATE), taking(1)),
        transport=rabbit.transport,
        batch_size=1,
        prefetch_count=1,
    )
    async with consumer:
        await asyncio.sleep(5)
    assert [b"0", b"0", b"1", b"2"] == consumer.handled
    assert [True] == [message.redelivered for message in consumer.messages[1:2]]
    assert 0 == consumer.messages[1].retry_count
    assert [] == events(rabbit, EventKind.PUBLISHED)


async def test_requeue_immediate_is_a_reject_and_not_a_nack():
    """Newer brokers count a reject as a failed delivery, and a nack not."""
    script = ScriptedTransport()
    async with RecordingConsumer(answering(REQUEUE_IMMEDIATE), transport=script, batch_size=1):
        script.last.feed(b"0")
        await asyncio.sleep(1)
    assert [[("requeue", (1,))]] == script.details("settle")


async def test_confirms_of_a_batch_share_one_settlement():
    """The settlement waits a moment for the copies, so that all acks go out in one write."""
    script = ScriptedTransport()
    script.on_publish = lambda *_: asyncio.sleep(0.05)
    answers = answering(ACK, REQUEUE, MessageResult.ACK, REQUEUE_IMMEDIATE)
    async with RecordingConsumer(answers, transport=script, batch_size=4):
        script.last.feed(*numbered(4))
        await asyncio.sleep(1)
    assert [[("ack", (2, 1, 3)), ("requeue", (4,))]] == script.details("settle")
    assert [0.05] == script.times("settle")


async def test_messages_without_a_copy_wait_at_most_a_tenth_of_a_second():
    """A broker that confirms slowly must not hold up everything else."""
    script = ScriptedTransport()
    script.on_publish = lambda *_: asyncio.sleep(3)
    async with RecordingConsumer(answering(ACK, REQUEUE, ACK), transport=script, batch_size=3):
        script.last.feed(*numbered(3))
        await asyncio.sleep(5)
    assert [[("ack", (1, 3))], [("ack", (2,))]] == script.details("settle")
    assert [pytest.approx(0.1), 3] == script.times("settle")


async def test_a_batch_behind_an_unconfirmed_one_is_settled_once():
    """Neither at the end of its own patience nor at the other's is anything settled twice."""
    script = ScriptedTransport()
    script.on_publish = lambda copies: asyncio.sleep(3 if copies[0].body == b"0" else 0.05)
    answer = taking(0, answering(REQUEUE, ACK))
    async with RecordingConsumer(answer, transport=script, batch_size=2):
        script.last.feed(*numbered(4))
        await asyncio.sleep(5)
    settled = [sorted(tag for _, tags in each for tag in tags) for each in script.details("settle")]
    assert [[2, 3, 4], [1]] == settled
    assert [pytest.approx(0.1), 3] == script.times("settle")


async def test_settlements_of_other_batches_join():
    """While copies are in flight, a quick batch's acks wait for them, and share their write."""
    script = ScriptedTransport()
    script.on_publish = lambda *_: asyncio.sleep(0.05)
    answers = first_then(answering(REQUEUE, ACK), ack)
    async with RecordingConsumer(answers, transport=script, batch_size=2, concurrency=2):
        script.last.feed(*numbered(4))
        await asyncio.sleep(1)
    assert [("ack", (1, 2, 3, 4))] == [
        (kind, tuple(sorted(tags))) for [(kind, tags)] in script.details("settle")
    ]


async def test_originals_of_copies_in_flight_do_not_exhaust_prefetch():
    """They do not count as buffered; a new batch is collected beside them."""
    script = ScriptedTransport()
    script.outcomes = [Outcome.RETURNED] * 2
    recorder = EventRecorder()
    async with RecordingConsumer(
        first_then(answering(REQUEUE, REQUEUE), ack),
        transport=script,
        observers=[recorder],
        batch_size=2,
        prefetch_count=4,
    ) as consumer:
        script.last.feed(*numbered(3))
        await asyncio.sleep(0.01)
        assert 2 == consumer.status().workers[0].held
        assert [numbered(2)] == consumer.batches
        script.last.feed(b"3")
        await asyncio.sleep(0.01)
    assert [Trigger.SIZE] * 2 == [event.trigger for event in recorder.of(BatchCut)]


async def test_held_originals_count_against_prefetch():
    """A batch that cannot grow, since held originals use the rest of prefetch, does not wait."""
    script = ScriptedTransport()
    script.outcomes = [Outcome.RETURNED] * 2
    async with RecordingConsumer(
        first_then(answering(REQUEUE, REQUEUE), ack),
        transport=script,
        batch_size=2,
        prefetch_count=3,
        batch_timeout=60,
    ) as consumer:
        script.last.feed(*numbered(2))
        await asyncio.sleep(0.01)
        script.last.feed(b"2")
        await asyncio.sleep(0.01)
        assert [numbered(2), [b"2"]] == consumer.batches


async def test_single_messages_are_not_logged_at_info(rabbit, caplog):
    """One line for each failed batch; single messages only at DEBUG."""
    caplog.set_level(logging.INFO)
    rabbit.put(*numbered(4))
    async with RecordingConsumer(
        first_then(answering(REQUEUE, REQUEUE_IMMEDIATE, ACK, ACK), ack),
        transport=rabbit.transport,
        batch_size=4,
        dead_letter_queue="dead",
    ):
        before = len(caplog.records)
        await asyncio.sleep(10)
        assert before == len(caplog.records)
