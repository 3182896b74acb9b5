"""`BatchBroker`: its methods, and what `settled` waits for."""

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
    """A broker with the queue of this file's consumers."""
    made = BatchBroker()
    made.declare("jobs")
    return made


def clock():
    """The current time."""
    return asyncio.get_running_loop().time()


# -- publishing and draining ----------------------------------------------------------------------


async def test_published_messages_can_be_drained(broker):
    """In order, with all properties; then they are gone."""
    broker.publish(b"1", b"2", routing_key="jobs", headers={"a": 1}, message_id="m")
    first, second = broker.drain("jobs")
    assert [b"1", b"2"] == [first.body, second.body]
    assert ({"a": 1}, "m", "jobs") == (
        first.headers,
        first.properties.message_id,
        first.routing_key,
    )
    assert [] == broker.drain("jobs")


async def test_an_exchange_routes_by_key(broker):
    """If no queue is bound for a key, the error says what to do."""
    broker.bind("jobs", "events", "created", kind="topic")
    broker.publish(b"1", exchange="events", routing_key="created")
    with pytest.raises(PublishError, match="start its consumer first, or `declare`"):
        broker.publish(b"2", exchange="events", routing_key="deleted")
    assert [b"1"] == bodies(broker.drain("jobs"))


async def test_a_missing_exchange_is_an_error(broker):
    """With the broker's text."""
    with pytest.raises(PublishError, match="no exchange 'events'"):
        broker.publish(b"1", exchange="events")


async def test_a_full_queue_is_an_error(broker):
    """If it refuses publications."""
    broker.declare("small", x_max_length=1, x_overflow="reject-publish")
    with pytest.raises(PublishError, match="full"):
        broker.publish(b"1", b"2", routing_key="small")
    assert [b"1"] == bodies(broker.drain("small"))


def test_queues_can_be_filled_without_an_event_loop(broker):
    """Before the loop starts, and after it has ended."""
    broker.publish(b"1", routing_key="jobs")

    async def scenario():
        async with RecordingConsumer(transport=broker.transport) as consumer:
            await broker.settled()
        broker.publish(b"2", routing_key="jobs")
        return consumer.handled

    assert [b"1"] == broker.run(scenario())
    assert [b"2"] == bodies(broker.drain("jobs"))


@pytest.mark.parametrize("version", ["3.8", "3.10", "4.0", "4.3"])
def test_it_imitates_the_given_version(version):
    """Any that the in-memory broker knows."""
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
    """Consumers reconnect when it is up again, even if the test fails meanwhile."""

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


async def test_it_can_refuse_publications(broker):
    """Of consumers, not of the test; a refused dead letter is published again."""
    broker.refuse(2)
    broker.publish(b"1", routing_key="jobs")
    async with RecordingConsumer(
        answering(NACK), transport=broker.transport, dead_letter_queue="dead"
    ):
        await broker.settled()
    assert [b"1"] == bodies(broker.drain("dead"))
    assert 2 == len(broker.broker.journal.of(EventKind.REFUSED))


async def test_it_can_accept_publications_again(broker):
    """The original of a refused requeue is held until then."""
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
    """It takes no real time."""
    await broker.advance(3600)
    assert 3600 == clock()


def test_real_time_cannot_be_advanced(broker):
    """The test would wait as long, so an error says what to do."""
    with asyncio.Runner() as runner, pytest.raises(RuntimeError, match="needs virtual time"):
        runner.run(broker.advance(3600))


async def test_settled_returns_at_once_if_nothing_is_left_to_do(broker):
    """Messages in a queue without consumers are not waited for."""
    broker.publish(b"1", routing_key="jobs")
    await broker.settled()
    assert 0 == clock()


async def test_settled_waits_for_batches(broker):
    """Until the batch is cut, handled and settled."""
    broker.publish(b"1", routing_key="jobs")
    async with RecordingConsumer(
        taking(7), transport=broker.transport, batch_timeout=5
    ) as consumer:
        await broker.settled()
        assert [] == broker.broker.unacked("jobs")
        assert 12 == pytest.approx(clock(), abs=0.5)
    assert [b"1"] == consumer.handled


async def test_settled_waits_for_retries(broker):
    """Also while they wait in queues without consumers."""
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
    ids=["is discarded", "goes elsewhere", "stays"],
)
async def test_settled_does_not_wait_for_dead_letters(broker, arguments):
    """They stay in their queue, which has no consumer."""
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


async def test_after_settled_observers_have_all_events(broker):
    """And the status is up to date."""
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
    """From the first call on, by any caller."""
    await broker.advance(100)
    broker.publish(b"1", routing_key="jobs", expiration=5)
    async with RecordingConsumer(transport=broker.transport, batch_timeout=1) as consumer:
        await broker.settled()
        assert [b"1"] == consumer.handled


async def test_settled_waits_for_a_disconnected_consumer(broker):
    """It reconnects and handles what is in its queue, however long that takes."""
    async with RecordingConsumer(transport=broker.transport, reconnect_delay=30) as consumer:
        broker.cut()
        broker.publish(b"1", routing_key="jobs")
        await broker.settled()
        assert [b"1"] == consumer.handled


async def test_settled_does_not_wait_for_a_stopped_consumer(broker):
    """Messages in its queue stay."""
    async with RecordingConsumer(transport=broker.transport):
        pass
    broker.publish(b"1", routing_key="jobs")
    await broker.settled()
    assert [b"1"] == bodies(broker.drain("jobs"))


async def test_settled_waits_for_a_chain_of_consumers(broker):
    """One publishes what another handles."""
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


async def test_the_timeout_of_settled_says_what_is_left(broker):
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


async def test_the_timeout_of_settled_names_the_wait_queue_of_a_retry(broker):
    """A retry that is not due in time is waiting there."""
    broker.publish(b"1", routing_key="jobs")
    async with RecordingConsumer(answering(REQUEUE), transport=broker.transport, requeue_delay=300):
        with pytest.raises(TimeoutError, match=r"1 waiting in 'jobs.retry.300000' for a retry"):
            await broker.settled(within=60)
