"""A queue that doesn't confirm: its copies are not multiplied, and it delays no others."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import asynccontextmanager

import pytest

from aio_pika_batch import MessageResult, Requeue
from aio_pika_batch.adapters.memory import PublishFault
from aio_pika_batch.core.publication import Outcome
from aio_pika_batch.observer import DeadLettered
from tests.unit.shell.helpers import NACK, EventRecorder, RecordingConsumer, answering

DEAD = "jobs.dead"


@pytest.fixture
def stall(rabbit):
    """Stops confirms for an exchange or a routing key; the copies are stored at the end."""

    def stalled(**where):
        rabbit.broker.faults.on_publish(PublishFault.BLOCK, **where)

    return stalled


async def by_body(messages):
    """Dead-letter what begins with "bad", retry the others three times."""
    for message in messages:
        if message.body.startswith(b"bad"):
            yield MessageResult.NACK
        else:
            yield MessageResult.REQUEUE if message.retry_count < 3 else MessageResult.ACK


@pytest.mark.untraced
@pytest.mark.parametrize("hold", [3, 30])
@pytest.mark.parametrize("seconds", [20, 60])
async def test_a_silent_dead_letter_queue_repeats_nothing_else(rabbit, stall, hold, seconds):
    """Each retry is handled once per attempt; a dead letter exists twice at most."""
    rabbit.declare("dead")
    rabbit.bind("dead", "dlx", "d", kind="direct")
    stall(exchange="dlx")
    bad = [b"bad%d" % number for number in range(3)]
    healthy = [b"ok%d" % number for number in range(2 * seconds)]
    async with RecordingConsumer(
        by_body,
        transport=rabbit.transport,
        dead_letter_exchange="dlx",
        dead_letter_routing_key="d",
        batch_size=2,
        concurrency=5,
        prefetch_count=100,
        batch_timeout=0.1,
        requeue_hold=hold,
    ) as consumer:
        rabbit.put(*bad)
        for body in healthy:
            rabbit.put(body)
            await asyncio.sleep(0.5)
        # The stall is not over, and all of them are done.
        await asyncio.sleep(0.2)
        assert dict.fromkeys(healthy, 4) == {
            body: count for body, count in Counter(consumer.handled).items() if body in healthy
        }
        rabbit.broker.unblock()
        await asyncio.sleep(600)
    dead = Counter(rabbit.waiting("dead"))
    assert set(bad) == set(dead)
    assert max(dead.values()) <= 2
    assert [] == rabbit.waiting()


class ChokedPublisher:
    """Stops as a whole once it has published a dead letter.

    RabbitMQ reads no more from a connection that has published much to a queue that takes nothing.
    """

    def __init__(self, publisher):
        self._publisher = publisher
        self._is_choked = False
        self.is_open = True
        self.on_late = None

    async def publish(self, publications):
        """Publish; no outcome is known any more after a dead letter."""
        self._is_choked |= any(each.exchange == "dlx" for each in publications)
        if not self._is_choked:
            return await self._publisher.publish(publications)
        await asyncio.sleep(10)
        return [Outcome.UNKNOWN] * len(publications)


async def test_dead_letters_that_stop_their_channel_stop_no_retries(rabbit, monkeypatch):
    """Copies of the two kinds are published on different connections."""
    opened = rabbit.transport.publisher

    @asynccontextmanager
    async def choked():
        async with opened() as publisher:
            yield ChokedPublisher(publisher)

    monkeypatch.setattr(rabbit.transport, "publisher", choked)
    rabbit.declare("dead")
    rabbit.bind("dead", "dlx", "#", kind="topic")
    async with RecordingConsumer(
        by_body,
        transport=rabbit.transport,
        dead_letter_exchange="dlx",
        dead_letter_exchange_type="topic",
        batch_size=1,
    ) as consumer:
        rabbit.put(b"bad")
        await asyncio.sleep(1)
        rabbit.put(b"ok")
        await asyncio.sleep(30)
        assert [b"bad"] + 4 * [b"ok"] == consumer.handled
        assert [b"bad"] == rabbit.unsettled()


async def test_a_late_confirm_settles_the_original(rabbit, stall):
    """Within `requeue_hold`: there is one dead letter, and the message is handled once."""
    stall(routing_key=DEAD)
    rabbit.put(b"0")
    recorder = EventRecorder()
    async with RecordingConsumer(
        answering(NACK),
        transport=rabbit.transport,
        dead_letter_queue=DEAD,
        dead_letter_routing_key=DEAD,
        observers=[recorder],
        batch_size=1,
        requeue_hold=30,
    ) as consumer:
        await asyncio.sleep(39)
        assert 1 == consumer.status().workers[0].held
        rabbit.broker.unblock()
        await asyncio.sleep(0.1)
        assert 0 == consumer.status().workers[0].held
        assert [] == rabbit.unsettled()
        await asyncio.sleep(1000)
    assert [b"0"] == consumer.handled
    assert [b"0"] == rabbit.waiting(DEAD)
    assert 1 == len(recorder.of(DeadLettered))


async def test_a_copy_is_not_repeated_because_its_neighbour_was_confirmed(rabbit):
    """Its own confirm may still come, although the route works again."""
    rabbit.broker.faults.on_publish(PublishFault.BLOCK, routing_key=DEAD, times=1)
    rabbit.put(b"bad1", b"bad2")
    async with RecordingConsumer(
        by_body,
        transport=rabbit.transport,
        dead_letter_queue=DEAD,
        dead_letter_routing_key=DEAD,
        batch_size=2,
        requeue_hold=300,
    ):
        await asyncio.sleep(60)
        assert [b"bad2"] == rabbit.waiting(DEAD)
        rabbit.broker.unblock()
        await asyncio.sleep(1)
        assert {b"bad1": 1, b"bad2": 1} == Counter(rabbit.waiting(DEAD))
        assert [] == rabbit.unsettled()


async def test_one_confirm_ends_the_doubt_about_a_route(rabbit, stall):
    """All that comes later is sent at once again."""
    stall(routing_key=DEAD)
    rabbit.put(b"bad1")
    async with RecordingConsumer(
        by_body,
        transport=rabbit.transport,
        dead_letter_queue=DEAD,
        dead_letter_routing_key=DEAD,
        batch_size=1,
        requeue_hold=3600,
    ):
        await asyncio.sleep(200)
        rabbit.broker.faults.clear()
        await asyncio.sleep(200)
        assert [b"bad1"] == rabbit.waiting(DEAD)
        rabbit.put(b"bad2")
        await asyncio.sleep(0.2)
        assert [b"bad1", b"bad2"] == rabbit.waiting(DEAD)


async def test_silent_retries_delay_no_dead_letters(rabbit, stall):
    """The other direction, and a message of each kind in one batch."""
    stall(exchange="", routing_key="jobs")
    rabbit.put(b"bad", b"ok")
    async with RecordingConsumer(
        by_body,
        transport=rabbit.transport,
        dead_letter_queue=DEAD,
        batch_size=2,
    ):
        await asyncio.sleep(0.2)
        assert [b"bad"] == rabbit.waiting(DEAD)
        assert [b"ok"] == rabbit.unsettled()


async def test_a_silent_wait_queue_delays_no_other_retries(rabbit, stall):
    """Copies to different wait queues are published and settled apart from each other."""
    stall(routing_key="jobs.retry.1000")

    async def answer(messages):
        for message in messages:
            if message.retry_count:
                yield MessageResult.ACK
            else:
                yield Requeue(delay=1 if message.body == b"slow" else 0)

    rabbit.put(b"slow", b"fast")
    async with RecordingConsumer(answer, transport=rabbit.transport, batch_size=2) as consumer:
        await asyncio.sleep(8)
        assert [b"slow", b"fast", b"fast"] == consumer.handled
        assert [b"slow"] == rabbit.unsettled()


async def test_each_copy_has_its_own_time_limit(rabbit, stall):
    """Other dead letters are confirmed all the time, and this one still goes back."""
    rabbit.declare("dead")
    rabbit.bind("dead", "dlx", "#", kind="topic")
    stall(exchange="dlx", routing_key="silent")
    rabbit.put(b"silent", routing_key="silent", exchange="events")
    async with RecordingConsumer(
        answering(NACK),
        transport=rabbit.transport,
        dead_letter_exchange="dlx",
        dead_letter_exchange_type="topic",
        batch_size=1,
        requeue_hold=10,
    ) as consumer:
        for _ in range(22):
            rabbit.put(b"bad", routing_key="fast", exchange="events")
            await asyncio.sleep(1)
        assert 2 == consumer.handled.count(b"silent")
        assert [b"bad"] * 22 == rabbit.waiting("dead")


async def test_after_a_long_silence_one_copy_at_a_time_is_tried(rabbit, stall, jitter):
    """A queue that never confirms again doesn't fill with copies of all messages."""
    rabbit.declare("dead")
    rabbit.bind("dead", "dlx", "", kind="fanout")
    stall(exchange="dlx")
    many = [b"%d" % number for number in range(20)]
    rabbit.put(*many, exchange="events", routing_key="key")
    async with RecordingConsumer(
        lambda messages: answering(*[NACK] * len(messages))(messages),
        transport=rabbit.transport,
        dead_letter_exchange="dlx",
        batch_size=20,
        prefetch_count=100,
        requeue_hold=10,
    ):
        await asyncio.sleep(600)
        rabbit.broker.unblock()
        await asyncio.sleep(100)
    dead = Counter(rabbit.waiting("dead"))
    assert set(many) == set(dead)
    # Each of them before the silence was known and after it, and one more for each minute.
    assert dead.total() <= 2 * 20 + 10


async def test_a_dead_letter_that_closes_its_channel_leaves_no_retry_in_doubt(rabbit, stall):
    """Each kind has a connection of its own."""
    async with RecordingConsumer(
        by_body, transport=rabbit.transport, dead_letter_queue=DEAD, batch_size=1, concurrency=2
    ) as consumer:
        await asyncio.sleep(1)
        rabbit.broker.faults.on_publish(PublishFault.FORBID, exchange="jobs.dlx")
        stall(exchange="", routing_key="jobs")
        rabbit.put(b"ok", b"bad")
        await asyncio.sleep(1)
        rabbit.broker.unblock()
        await asyncio.sleep(1)
        assert [b"ok", b"ok", b"ok", b"ok"] == [each for each in consumer.handled if each == b"ok"]
