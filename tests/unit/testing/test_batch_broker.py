"""Does the broker of a test do what its few calls say, and wait for what there is to wait for?"""

from __future__ import annotations

import asyncio

import pytest

from aio_pika_batch import PublishError, Requeue
from aio_pika_batch.adapters.memory import EventKind
from aio_pika_batch.observer import DeadLettered, Requeued, Settled
from aio_pika_batch.testing import BatchBroker
from tests.unit.shell.helpers import (
    ACK,
    NACK,
    REQUEUE,
    EventRecorder,
    RecordingConsumer,
    ack,
    answering,
    bodies,
    first_then,
    taking,
)


@pytest.fixture
def broker():
    """With the queue that consumers of this file consume from."""
    made = BatchBroker()
    made.declare("jobs")
    return made


def clock():
    """What time it is."""
    return asyncio.get_running_loop().time()


# -- publishing and draining ----------------------------------------------------------------------


async def test_what_is_published_can_be_drained(broker):
    """In order, with all its properties; and then it is gone."""
    broker.publish(b"1", b"2", routing_key="jobs", headers={"a": 1}, message_id="m")
    first, second = broker.drain("jobs")
    assert [b"1", b"2"] == [first.body, second.body]
    assert ({"a": 1}, "m", "jobs") == (
        first.headers,
        first.properties.message_id,
        first.routing_key,
    )
    assert [] == broker.drain("jobs")


async def test_exchanges_route(broker):
    """By key; what no queue is bound for is an error that says what to do."""
    broker.bind("jobs", "events", "created", kind="topic")
    broker.publish(b"1", exchange="events", routing_key="created")
    with pytest.raises(PublishError, match="start its consumer first, or `declare`"):
        broker.publish(b"2", exchange="events", routing_key="deleted")
    assert [b"1"] == bodies(broker.drain("jobs"))


async def test_an_exchange_that_is_not_there_is_an_error(broker):
    """In the words of the broker."""
    with pytest.raises(PublishError, match="no exchange 'events'"):
        broker.publish(b"1", exchange="events")


async def test_a_full_queue_is_an_error(broker):
    """Where it refuses."""
    broker.declare("small", x_max_length=1, x_overflow="reject-publish")
    with pytest.raises(PublishError, match="full"):
        broker.publish(b"1", b"2", routing_key="small")
    assert [b"1"] == bodies(broker.drain("small"))


def test_no_event_loop_is_needed_to_set_the_scene(broker):
    """It is there before the loop, and after it."""
    broker.publish(b"1", routing_key="jobs")

    async def scenario():
        async with RecordingConsumer(transport=broker.transport) as consumer:
            await broker.settled()
        broker.publish(b"2", routing_key="jobs")
        return consumer.handled

    assert [b"1"] == broker.run(scenario())
    assert [b"2"] == bodies(broker.drain("jobs"))


@pytest.mark.parametrize("version", ["3.8", "3.10", "4.0", "4.3"])
def test_it_imitates_the_version_that_is_asked_for(version):
    """All that the broker in memory knows."""
    assert version == BatchBroker(version).broker.version


# -- what goes wrong ------------------------------------------------------------------------------


async def test_connections_can_be_cut(broker):
    """The batch is repeated."""
    broker.publish(b"1", routing_key="jobs")
    consumer = RecordingConsumer(taking(10), transport=broker.transport, batch_timeout=1)
    async with consumer:
        await broker.advance(5)
        broker.cut()
        await broker.settled()
    assert [[b"1"], [b"1"]] == consumer.batches


async def test_it_can_be_down(broker):
    """Consumers come back when it is up again, even if the test fails meanwhile."""

    async def fail():
        with broker.down():
            await broker.advance(60)
            assert not consumer.is_healthy
            assert [] == broker.broker.connections
            raise ZeroDivisionError

    async with RecordingConsumer(transport=broker.transport) as consumer:
        with pytest.raises(ZeroDivisionError):
            await fail()
        await broker.advance(60)
        assert consumer.is_healthy


async def test_it_can_refuse(broker):
    """What consumers publish, not what the test does; a refused dead letter is tried again."""
    broker.refuse(2)
    broker.publish(b"1", routing_key="jobs")
    async with RecordingConsumer(
        answering(NACK), transport=broker.transport, dead_letter_queue="dead"
    ):
        await broker.settled()
    assert [b"1"] == bodies(broker.drain("dead"))
    assert 2 == len(broker.broker.journal.of(EventKind.REFUSED))


async def test_it_accepts_again(broker):
    """A requeue that was refused is held until then."""
    broker.refuse()
    broker.publish(b"1", routing_key="jobs")
    consumer = RecordingConsumer(first_then(answering(REQUEUE), ack), transport=broker.transport)
    async with consumer:
        await broker.advance(10)
        assert 1 == len(consumer.handled)
        broker.accept()
        await broker.settled()
    assert [0, 1] == [each.retry_count for each in consumer.messages]


# -- time -----------------------------------------------------------------------------------------


async def test_time_can_be_advanced(broker):
    """It takes none."""
    await broker.advance(3600)
    assert 3600 == clock()


def test_real_time_is_not_advanced(broker):
    """The test would take as long; it is told so instead."""
    with asyncio.Runner() as runner, pytest.raises(RuntimeError, match="needs virtual time"):
        runner.run(broker.advance(3600))


async def test_where_nothing_is_to_be_done_all_is_settled(broker):
    """At once; what waits in a queue that nobody consumes from waits for nobody."""
    broker.publish(b"1", routing_key="jobs")
    await broker.settled()
    assert 0 == clock()


async def test_batches_are_waited_for(broker):
    """Till the batch is cut, its handler is done, and the broker knows."""
    broker.publish(b"1", routing_key="jobs")
    async with RecordingConsumer(
        taking(7), transport=broker.transport, batch_timeout=5
    ) as consumer:
        await broker.settled()
        assert [] == broker.broker.unacked("jobs")
        assert 12 == pytest.approx(clock(), abs=0.5)
    assert [b"1"] == consumer.handled


async def test_retries_are_waited_for(broker):
    """Also while they wait in queues that nobody consumes from."""
    broker.publish(b"1", routing_key="jobs")
    answer = first_then(answering(REQUEUE), answering(Requeue(delay=60)), ack)
    async with RecordingConsumer(answer, transport=broker.transport, requeue_delay=30) as consumer:
        await broker.settled()
        assert [0, 1, 2] == [each.retry_count for each in consumer.messages]
        assert clock() >= 90


@pytest.mark.parametrize(
    "arguments",
    [
        {"x_message_ttl": 7 * 24 * 3600 * 1000, "x_dead_letter_exchange": ""},
        {"x_message_ttl": 1000, "x_dead_letter_exchange": "x", "x_dead_letter_routing_key": "jobs"},
        {"x_dead_letter_exchange": "", "x_dead_letter_routing_key": "jobs"},
    ],
    ids=["goes back to nobody", "goes elsewhere", "stays"],
)
async def test_dead_letters_are_not(broker, arguments):
    """They stay where they are, be it for a week; nobody who is known of waits for them."""
    broker.declare("dead", **arguments)
    broker.bind("dead", "dlx", kind="fanout")
    broker.publish(b"1", routing_key="jobs")
    consumer = RecordingConsumer(
        answering(NACK), transport=broker.transport, dead_letter_exchange="dlx", batch_timeout=0.5
    )
    async with consumer:
        await broker.settled()
        assert clock() < 1
        assert [b"1"] == bodies(broker.drain("dead"))


async def test_what_is_settled_has_been_told(broker):
    """To observers, and in the status."""
    recorder = EventRecorder()
    broker.publish(b"1", b"2", routing_key="jobs")
    answer = first_then(answering(ACK, REQUEUE), answering(NACK))
    consumer = RecordingConsumer(
        answer, transport=broker.transport, observers=[recorder], dead_letter_queue="dead"
    )
    async with consumer:
        await broker.settled()
        assert 3 == sum(sum(event.counts.values()) for event in recorder.of(Settled))
        assert [1, 1] == [len(recorder.of(kind)) for kind in (Requeued, DeadLettered)]
        [worker] = consumer.status().workers
        assert (0, 0, 0) == (worker.buffered, worker.in_hand, worker.held)


async def test_its_time_is_that_of_the_loop(broker):
    """From the first call on, whoever makes it."""
    await broker.advance(100)
    broker.publish(b"1", routing_key="jobs", expiration=5)
    async with RecordingConsumer(transport=broker.transport, batch_timeout=1) as consumer:
        await broker.settled()
        assert [b"1"] == consumer.handled


async def test_a_consumer_that_was_cut_off_is_waited_for(broker):
    """It comes back for what is in its queue, however long that takes."""
    async with RecordingConsumer(transport=broker.transport, reconnect_delay=30) as consumer:
        broker.cut()
        broker.publish(b"1", routing_key="jobs")
        await broker.settled()
        assert [b"1"] == consumer.handled


async def test_a_consumer_that_has_stopped_is_not(broker):
    """What it has left is nobody's."""
    async with RecordingConsumer(transport=broker.transport):
        pass
    broker.publish(b"1", routing_key="jobs")
    await broker.settled()
    assert [b"1"] == bodies(broker.drain("jobs"))


async def test_what_one_consumer_sends_another_one_handles(broker):
    """All of a chain are waited for."""
    broker.declare("next")

    class First(RecordingConsumer):
        async def process_messages(self, messages):
            for message in messages:
                await self.publish(message.body, routing_key="next")
                yield ACK

    broker.publish(b"1", b"2", routing_key="jobs")
    second = RecordingConsumer(transport=broker.transport, queue_name="next")
    async with First(transport=broker.transport), second:
        await broker.settled()
        assert [b"1", b"2"] == second.handled


async def test_what_is_not_settled_in_time_is_told(broker):
    """By queue and number."""
    broker.publish(b"1", b"2", b"3", routing_key="jobs")
    consumer = RecordingConsumer(
        taking(3600), transport=broker.transport, batch_size=1, prefetch_count=2
    )
    async with consumer:
        with pytest.raises(TimeoutError) as told:
            await broker.settled(within=60)
        consumer._lifecycle.abandon()
    assert "not settled within 60 s: 2 unsettled from 'jobs', 1 waiting in 'jobs'" == str(
        told.value
    )


async def test_a_retry_that_is_not_due_in_time_is_told(broker):
    """With the queue that it waits in."""
    broker.publish(b"1", routing_key="jobs")
    async with RecordingConsumer(answering(REQUEUE), transport=broker.transport, requeue_delay=300):
        with pytest.raises(TimeoutError, match=r"1 waiting in 'jobs.retry.300000' for a retry"):
            await broker.settled(within=60)
