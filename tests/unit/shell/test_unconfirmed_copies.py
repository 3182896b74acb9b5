"""Originals whose copies are not confirmed."""

from __future__ import annotations

import asyncio

import pytest

from aio_pika_batch import Outcome
from aio_pika_batch.adapters.memory import ConnectFault, EventKind, PublishFault
from aio_pika_batch.errors import BrokerUnavailable, SessionClosed
from aio_pika_batch.observer import Lost, Requeued, Settled
from tests.unit.shell.helpers import (
    REQUEUE,
    EventRecorder,
    RecordingConsumer,
    ack,
    answering,
    first_then,
    numbered,
    taking,
)
from tests.unit.shell.scripted_transport import ScriptedTransport, never, raising

NOT_CONFIRMED = [Outcome.RETURNED, Outcome.REFUSED]


@pytest.mark.parametrize("outcome", NOT_CONFIRMED)
async def test_a_copy_is_published_again_with_growing_pauses(outcome, jitter):
    """Its original is acked when it is finally confirmed."""
    script = ScriptedTransport()
    script.outcomes = [outcome] * 4
    recorder = EventRecorder()
    async with RecordingConsumer(
        answering(REQUEUE), transport=script, observers=[recorder], batch_size=1
    ) as consumer:
        script.last.feed(b"0")
        await asyncio.sleep(7)
        assert [] == script.times("settle")
        assert 1 == consumer.status().workers[0].held
        await asyncio.sleep(1)
        assert 0 == consumer.status().workers[0].held
    assert [0, 0.5, 1.5, 3.5, 7.5] == script.times("publish")
    assert [[("ack", (1,))]] == script.details("settle")
    assert 1 == len(recorder.of(Requeued))
    # Nothing is settled for the batch at first, and its one message later.
    assert [0, 1] == [sum(event.counts.values()) for event in recorder.of(Settled)]
    assert [] == recorder.of(Lost)


@pytest.mark.parametrize("outcome", NOT_CONFIRMED)
@pytest.mark.parametrize("luck", [0.0, 0.999])
async def test_an_original_is_held_for_requeue_hold_at_most(outcome, jitter, luck):
    """Then it goes back by nack, which newer brokers do not count as a failed delivery."""
    jitter[0] = luck
    script = ScriptedTransport()
    script.outcomes = [outcome] * 100
    async with RecordingConsumer(
        answering(REQUEUE), transport=script, batch_size=1, requeue_hold=10
    ) as consumer:
        script.last.feed(b"0")
        await asyncio.sleep(9.9)
        assert [] == script.details("settle")
        await asyncio.sleep(0.2)
        assert [[("return", (1,))]] == script.details("settle")
        assert 0 == consumer.status().workers[0].held
        tried = len(script.times("publish"))
        await asyncio.sleep(100)
        assert tried == len(script.times("publish"))
    assert all(0 <= time <= 10 for time in script.times("publish"))


@pytest.mark.parametrize(("prefetch", "room"), [(1, 0), (2, 1), (3, 1), (10, 5), (0, 12)])
async def test_at_most_half_of_the_prefetch_is_held(prefetch, room, jitter):
    """More originals go back to the broker after a pause."""
    script = ScriptedTransport()
    script.outcomes = [Outcome.REFUSED] * 10_000
    count = prefetch or 12
    async with RecordingConsumer(
        answering(*[REQUEUE] * count),
        transport=script,
        batch_size=count,
        prefetch_count=prefetch,
        requeue_hold=3600,
    ) as consumer:
        script.last.feed(*numbered(count))
        await asyncio.sleep(0.4)
        assert [] == script.details("settle")
        await asyncio.sleep(3)
        returned = [tags for settled in script.details("settle") for _, tags in settled]
        assert count - room == sum(len(tags) for tags in returned)
        assert room == consumer.status().workers[0].held


async def test_a_full_queue_that_refuses_copies_causes_no_busy_loop(rabbit, caplog):
    """Originals are not requeued and republished as fast as possible; one log line says so."""
    rabbit.declare("full", **{"x-max-length": 6, "x-overflow": "reject-publish"})
    rabbit.put(*numbered(6), queue="full")
    rabbit.broker.faults.on_publish(PublishFault.REFUSE)
    async with RecordingConsumer(
        lambda messages: answering(*[REQUEUE] * len(messages))(messages),
        transport=rabbit.transport,
        queue_name="full",
        queue_arguments={"x-max-length": 6, "x-overflow": "reject-publish"},
        batch_size=3,
        prefetch_count=6,
    ) as consumer:
        await asyncio.sleep(60)
        assert 6 == len(rabbit.unsettled("full")) + len(rabbit.waiting("full"))
        rounds = len(consumer.batches)
        # Each message comes back after a quarter of a second at the earliest.
        assert 10 < rounds < 4 * 6 * 60
        assert 1 == sum("go back to the broker" in each.message for each in caplog.records)
        rabbit.broker.faults.clear()
        consumer.answer = ack
        await asyncio.sleep(60)
    assert [] == rabbit.waiting("full")
    assert {*numbered(6)} == {
        event.body for event in rabbit.broker.journal.of(EventKind.ACKED, queue="full")
    }


async def test_a_copy_that_may_be_stored_is_published_again_much_later(jitter):
    """The publisher can't report late confirms, so its connection is replaced."""
    script = ScriptedTransport()
    script.outcomes = [Outcome.UNKNOWN] * 2
    async with RecordingConsumer(
        answering(REQUEUE), transport=script, batch_size=1, requeue_hold=3600
    ):
        script.last.feed(b"0")
        await asyncio.sleep(3600)
    assert [0, 30, 90] == script.times("publish")
    assert 3 == len(script.times("publisher"))
    assert [[("ack", (1,))]] == script.details("settle")


async def test_a_silent_connection_is_replaced_once_no_confirm_can_be_expected(rabbit, jitter):
    """Nothing was answered on it for a minute after the time limit of the copy."""
    rabbit.broker.faults.on_publish(PublishFault.LOSE, times=1)
    rabbit.put(b"0")
    async with RecordingConsumer(
        first_then(answering(REQUEUE), ack),
        transport=rabbit.transport,
        batch_size=1,
        requeue_hold=3600,
    ):
        connections = len(rabbit.times(EventKind.CONNECTED))
        await asyncio.sleep(69.9)
        assert 1 == len(rabbit.times(EventKind.CONNECTED)) - connections
        await asyncio.sleep(100)
        assert 2 == len(rabbit.times(EventKind.CONNECTED)) - connections
        assert 2 == len(rabbit.broker.connections)
    # Ten seconds until its outcome is unknown, sixty for a late confirm, and twice as much then.
    assert [130] == rabbit.times(EventKind.PUBLISHED)


async def test_a_lost_confirm_causes_a_duplicate_and_no_loss(rabbit, jitter):
    """The copy may be stored already when it is published again."""
    rabbit.broker.faults.on_publish(PublishFault.UNCONFIRMED, times=1)
    rabbit.put(b"0")
    async with RecordingConsumer(
        first_then(answering(REQUEUE), ack),
        transport=rabbit.transport,
        batch_size=1,
        requeue_hold=3600,
    ) as consumer:
        await asyncio.sleep(600)
    assert [0, 1, 1] == [message.retry_count for message in consumer.messages]
    assert [] == rabbit.waiting()


async def test_without_a_connection_for_publishing_originals_are_held(jitter, caplog):
    """It is logged once until there is a connection again."""
    script = ScriptedTransport()
    script.on_publisher = raising(BrokerUnavailable("connection refused"))
    async with RecordingConsumer(answering(REQUEUE), transport=script, batch_size=1):
        script.last.feed(b"0")
        await asyncio.sleep(4)
        assert [0, 0.5, 1.5, 3.5] == script.times("publisher")
        assert [] == script.times("publish")
        script.on_publisher = lambda: asyncio.sleep(0)
        await asyncio.sleep(4)
        assert [[("ack", (1,))]] == script.details("settle")
    assert 1 == sum("no connection for publishing" in each.message for each in caplog.records)


async def test_a_copy_whose_session_is_lost_is_not_published_again(jitter):
    """Its original is delivered again, so the copy would be a duplicate."""
    script = ScriptedTransport()
    script.outcomes = [Outcome.REFUSED] * 100
    async with RecordingConsumer(
        first_then(answering(REQUEUE), ack), transport=script, batch_size=1
    ) as consumer:
        script.last.feed(b"0")
        await asyncio.sleep(4)
        tried = len(script.times("publish"))
        assert tried > 1
        script.last.end()
        await asyncio.sleep(100)
        assert tried == len(script.times("publish"))
        assert 2 == len(script.sessions)
        assert 0 == consumer.status().workers[0].held
    assert [] == script.sessions[0].settlements


async def test_a_copy_that_is_refused_after_its_session_was_lost_is_not_held(jitter):
    """Nor published again: its original is delivered again."""
    script = ScriptedTransport()
    script.outcomes = [Outcome.REFUSED] * 100
    script.on_publish = lambda _: asyncio.sleep(3)
    async with RecordingConsumer(answering(REQUEUE), transport=script, batch_size=1) as consumer:
        script.last.feed(b"0")
        await asyncio.sleep(1)
        script.last.end()
        await asyncio.sleep(100)
        assert 1 == len(script.times("publish"))
        assert 0 == consumer.status().workers[0].held
    assert [[], []] == [session.settlements for session in script.sessions]


async def test_a_lost_session_drops_its_held_originals(jitter):
    """The status no longer shows them."""
    script = ScriptedTransport()
    script.outcomes = [Outcome.REFUSED] * 100
    async with RecordingConsumer(answering(REQUEUE), transport=script, batch_size=1) as consumer:
        script.last.feed(b"0")
        await asyncio.sleep(1)
        consumer.answer = taking(3)
        script.last.feed(*numbered(2))
        await asyncio.sleep(1)
        script.on_open = never
        script.last.end()
        await asyncio.sleep(1)
        [worker] = consumer.status().workers
        assert (0, 0, 1, 2) == (worker.held, worker.buffered, worker.in_hand, worker.oldest)
        await asyncio.sleep(3)
        [worker] = consumer.status().workers
        assert (0, None) == (worker.in_hand, worker.oldest)


async def test_originals_of_confirmed_copies_are_acked_before_the_rest_of_the_batch(jitter):
    """Each original is settled by itself."""
    script = ScriptedTransport()
    script.outcomes = [Outcome.CONFIRMED, Outcome.RETURNED, Outcome.CONFIRMED]
    async with RecordingConsumer(answering(*[REQUEUE] * 3), transport=script, batch_size=3):
        script.last.feed(*numbered(3))
        await asyncio.sleep(1)
    assert [[("ack", (1, 3))], [("ack", (2,))]] == script.details("settle")
    assert [numbered(3), [b"1"]] == script.details("publish")


@pytest.mark.parametrize("error", [SessionClosed("gone"), RuntimeError("a bug")])
async def test_a_held_original_that_cannot_be_settled_ends_the_session(error, jitter):
    """A redelivery is better than a message that stays unsettled forever."""
    script = ScriptedTransport()
    script.outcomes = [Outcome.REFUSED]
    recorder = EventRecorder()
    async with RecordingConsumer(
        first_then(answering(REQUEUE), ack), transport=script, observers=[recorder], batch_size=1
    ):
        script.on_settle = raising(error)
        script.last.feed(b"0")
        await asyncio.sleep(0.6)
        script.on_settle = lambda *_: asyncio.sleep(0)
        await asyncio.sleep(5)
        assert 2 == len(script.sessions)
    assert 1 == len(recorder.of(Lost))


@pytest.mark.parametrize("error", [SessionClosed("gone"), RuntimeError("a bug"), ValueError("no")])
async def test_an_error_of_the_publisher_ends_the_session_and_loses_no_message(error, jitter):
    """At the first attempt and at a later one."""
    script = ScriptedTransport()
    script.outcomes = [Outcome.REFUSED]
    async with RecordingConsumer(
        first_then(answering(REQUEUE), answering(REQUEUE), ack), transport=script, batch_size=1
    ) as consumer:
        script.last.feed(b"0")
        await asyncio.sleep(0.1)
        assert 1 == consumer.status().workers[0].held
        script.on_publish = raising(error)
        await asyncio.sleep(5)
        assert 2 == len(script.sessions)
        script.last.feed(b"0")
        await asyncio.sleep(5)
        assert 3 == len(script.sessions)
        script.on_publish = lambda *_: asyncio.sleep(0)
        script.last.feed(b"0")
        await asyncio.sleep(1)
    assert [[("ack", (1,))]] == script.details("settle")


async def test_a_stop_returns_held_originals(rabbit, jitter):
    """Nothing is published again, and the broker has all of them before the session ends."""
    rabbit.broker.faults.on_publish(PublishFault.REFUSE)
    rabbit.put(*numbered(2))
    async with RecordingConsumer(
        answering(REQUEUE, REQUEUE), transport=rabbit.transport, batch_size=2
    ):
        await asyncio.sleep(4)
        assert 2 == len(rabbit.unsettled())
    assert numbered(2) == rabbit.waiting()
    assert 4 == asyncio.get_running_loop().time()


async def test_a_stop_waits_for_publications_in_flight(jitter):
    """If they are confirmed, their originals are acked, not returned."""
    script = ScriptedTransport()
    script.outcomes = [Outcome.REFUSED]
    async with RecordingConsumer(answering(REQUEUE), transport=script, batch_size=1):
        script.last.feed(b"0")
        await asyncio.sleep(0.1)
        script.on_publish = lambda *_: asyncio.sleep(3)
        await asyncio.sleep(1)
    assert [[("ack", (1,))]] == script.details("settle")
    assert [3.5] == script.times("settle")


async def test_an_unreachable_broker_causes_no_busy_loop(rabbit):
    """Consuming and publishing connections both reconnect with backoff."""
    rabbit.put(b"0")
    async with RecordingConsumer(
        first_then(answering(REQUEUE), ack), transport=rabbit.transport, batch_size=1
    ) as consumer:
        await asyncio.sleep(0)
        rabbit.broker.faults.connect_fault = ConnectFault.UNREACHABLE
        rabbit.broker.cut()
        await asyncio.sleep(3600)
        assert not consumer.is_healthy
        rabbit.broker.faults.connect_fault = ConnectFault.NONE
        await asyncio.sleep(60)
        assert consumer.is_healthy
    assert [] == rabbit.waiting()
    assert b"0" in consumer.handled
