"""Messages that may have crashed their process are handled alone, and given up in the end."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import asynccontextmanager

import pytest

from aio_pika_batch import Cause, DeadLetterReason, MessageResult, SessionLost
from aio_pika_batch.observer import DeadLettered, Settled
from aio_pika_batch.transport import Subscription
from tests.unit.shell.helpers import (
    ACK,
    REQUEUE,
    REQUEUE_IMMEDIATE,
    EventRecorder,
    QueueBroker,
    RecordingConsumer,
    ack,
    answering,
    first_then,
    numbered,
    taking,
)

VERSIONS = ["3.10", "4.0", "4.3"]
POISON = b"poison"


def quorum(rabbit, answer=ack, **given):
    """Return a consumer of a quorum queue, with dead letters in `dead`."""
    given = {"batch_size": 10, "batch_timeout": 0.1, "dead_letter_queue": "dead"} | given
    return RecordingConsumer(
        answer, transport=rabbit.transport, queue_type="quorum", reconnect_delay=0.1, **given
    )


def declared(version="4.3", **arguments):
    """Return a broker that has the quorum queue already."""
    rabbit = QueueBroker(version)
    rabbit.declare(**{"x-queue-type": "quorum"} | arguments)
    return rabbit


def suspect(rabbit, *bodies):
    """Publish messages as copies of suspects are published."""
    for body in bodies:
        rabbit.publish(body, routing_key="jobs", headers={"x-crash-count": 3})


class Fleet:
    """Processes that are replaced when a message kills them."""

    def __init__(self, rabbit, count, **given) -> None:
        self.rabbit = rabbit
        self.given = given
        self.handled: Counter[bytes] = Counter()
        self.kills = 0
        self.pause = 0.0
        self.running = [self._start() for _ in range(count)]

    def _start(self):
        consumer = quorum(self.rabbit, **self.given)
        consumer.answer = lambda messages: self._handle(consumer, messages)
        return consumer, asyncio.ensure_future(consumer.start())

    async def _handle(self, consumer, messages):
        await asyncio.sleep(self.pause)
        if POISON in [message.body for message in messages]:
            self.kills += 1
            self.running = [each for each in self.running if each[0] is not consumer]
            # As the kernel does: nothing is settled any more, and another process takes over.
            asyncio.get_running_loop().call_soon(consumer._lifecycle.abandon)
            self.running.append(self._start())
            await asyncio.Event().wait()
        self.handled.update(message.body for message in messages)
        for _ in messages:
            yield ACK

    async def replace(self):
        """Restart all processes, one after another, gracefully."""
        for _ in range(len(self.running)):
            consumer, starting = self.running.pop(0)
            await starting
            await consumer.stop()
            self.running.append(self._start())

    async def stop(self):
        """Stop all processes."""
        for consumer, starting in self.running:
            await starting
            await consumer.stop()


def reasons(rabbit):
    """Return body and reason of each dead letter."""
    return [
        (letter.body, letter.properties.headers["x-dead-letter-reason"])
        for letter in rabbit.drain("dead")
    ]


@pytest.mark.untraced
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("shape", [{}, {"num_workers": 2, "concurrency": 2}], ids=str)
@pytest.mark.parametrize("place", [0, 25])
async def test_a_message_that_kills_its_process_takes_no_other_with_it(version, shape, place):
    """Fifty others are handled; it is dead-lettered after its eighth time."""
    rabbit = declared(version)
    bodies = numbered(50)
    rabbit.put(*bodies[:place], POISON, *bodies[place:])
    fleet = Fleet(rabbit, 2, **shape)
    await asyncio.sleep(600)
    await fleet.stop()
    assert set(bodies) == set(fleet.handled)
    assert [(POISON, "crashed")] == reasons(rabbit)
    assert [] == rabbit.waiting()
    # The connections of a killed process end one after another here, so one may get it in between.
    assert 7 <= fleet.kills <= 8


@pytest.mark.untraced
@pytest.mark.parametrize(
    ("version", "seconds", "cuts", "count"),
    [
        # Each version, and each other value, is among the quick ones.
        pytest.param(version, *given, marks=[] if place % 3 == turn else pytest.mark.long)
        for place, given in enumerate(
            [(0.01, 3, 60), (1.0, 3, 60), (7.0, 3, 60), (7.0, 30, 60), (7.0, 30, 3)]
        )
        for turn, version in enumerate(VERSIONS)
    ],
)
async def test_deployments_and_lost_connections_dont_count_as_crashes(
    version, seconds, cuts, count
):
    """Also if each batch takes longer than a connection lasts: two processes are cut off thirty
    times, and restarted ten times.
    """
    rabbit = declared(version)
    rabbit.put(*numbered(count))
    fleet = Fleet(rabbit, 2, batch_size=5)
    fleet.pause = seconds
    for turn in range(30):
        await asyncio.sleep(3)
        rabbit.broker.cut()
        if (turn + 1) % cuts == 0:
            for _ in range(cuts // 3):
                await fleet.replace()
    await asyncio.sleep(1200)
    await fleet.stop()
    assert set(numbered(count)) == set(fleet.handled)
    assert [] == reasons(rabbit)
    assert [] == rabbit.waiting()


@pytest.mark.parametrize("are_cut", [True, False])
async def test_a_connection_that_is_lost_while_it_opens_doesnt_count_as_a_crash(
    are_cut, monkeypatch
):
    """The broker may have delivered and counted already."""
    rabbit = declared()
    rabbit.put(b"1")
    transport = rabbit.transport
    subscription = Subscription(queue="jobs", prefetch=1, consumer_tag="t")
    for _ in range(9):
        async with transport.session(subscription) as session:
            await anext(session)
    failures = [SessionLost("cut")] * are_cut

    @asynccontextmanager
    async def opened(subscription):
        if failures:
            raise failures.pop()
        async with type(transport).session(transport, subscription) as session:
            yield session

    monkeypatch.setattr(transport, "session", opened)
    async with quorum(rabbit) as consumer:
        await rabbit.settled()
    assert ([] if are_cut else [(b"1", "crashed")]) == reasons(rabbit)
    assert are_cut == (b"1" in consumer.handled)


@pytest.mark.parametrize("pace", [{}, {"num_workers": 3, "concurrency": 2, "settle": "yield"}])
async def test_a_suspect_is_handled_while_the_process_holds_no_other_message(pace):
    """Whatever its place in the queue."""
    rabbit = declared()
    held = {}

    async def look(messages):
        for message in messages:
            if message.body.startswith(b"s"):
                held[message.body] = rabbit.unsettled()
        await asyncio.sleep(0.5)
        for _ in messages:
            yield ACK

    async with quorum(rabbit, look, **pace) as consumer:
        for number in range(20):
            rabbit.put(b"%d" % number)
            if number % 6 == 1:
                suspect(rabbit, b"s%d" % number)
            await asyncio.sleep(0.3)
        await rabbit.settled()
    assert {body: [body] for body in (b"s1", b"s7", b"s13", b"s19")} == held
    assert [[body] for body in held] == [each for each in consumer.batches if each[0] in held]
    assert 24 == len(consumer.handled)


async def test_several_suspects_at_once_are_handled_one_by_one():
    """All but one go to the back of the queue, by copies: a return might count against them."""
    rabbit = declared("4.0")
    async with quorum(rabbit, taking(0.1)) as consumer:
        rabbit.put(b"first")
        await asyncio.sleep(5)
        suspect(rabbit, *numbered(5))
        await rabbit.settled()
    assert [[b"first"], *[[each] for each in numbered(5)]] == [
        consumer.batches[0],
        *sorted(consumer.batches[1:]),
    ]
    assert {0} == {message.delivery_count or 0 for message in consumer.messages}


async def test_a_session_begins_with_one_message_and_goes_on_with_all():
    """The first one is ordinary, so its batch waits for others."""
    rabbit = declared()
    async with quorum(rabbit, prefetch_count=7, batch_size=5, batch_timeout=1) as consumer:
        rabbit.put(*numbered(5))
        await asyncio.sleep(0.5)
    assert [numbered(5)] == consumer.batches


async def test_a_broker_that_refuses_copies_does_not_stop_the_intake():
    """Suspects that can't be replaced are held, and the others are handled."""
    rabbit = declared("4.0")
    async with quorum(rabbit, taking(0.1)) as consumer:
        rabbit.put(b"first")
        await asyncio.sleep(5)
        suspect(rabbit, *numbered(3))
        rabbit.refuse()
        await asyncio.sleep(1)
        rabbit.put(b"next")
        await asyncio.sleep(5)
        assert b"next" in consumer.handled
        rabbit.accept()
        await rabbit.settled()
    assert {b"first", b"next", *numbered(3)} == set(consumer.handled)


async def test_a_session_that_begins_with_suspects_gets_one_at_a_time():
    """So none has to be replaced by a copy, or would come back with the one that crashes."""
    rabbit = declared()
    suspect(rabbit, *numbered(5))
    async with quorum(rabbit, taking(0.1)) as consumer:
        await rabbit.settled()
    assert [[each] for each in numbered(5)] == consumer.batches
    assert not any("x-original-exchange" in each.headers for each in consumer.messages)


async def test_a_classic_queue_delivers_everything_at_once():
    """It doesn't count deliveries, so nothing is suspected."""
    rabbit = QueueBroker()
    rabbit.declare()
    suspect(rabbit, *numbered(5))
    consumer = RecordingConsumer(ack, transport=rabbit.transport, batch_size=5, batch_timeout=1)
    async with consumer:
        await rabbit.settled()
    assert [numbered(5)] == consumer.batches


async def test_held_retries_are_published_before_a_suspect_is_handled():
    """Otherwise a crash would count against them."""
    rabbit = declared()
    answer = first_then(answering(REQUEUE), ack)
    async with quorum(rabbit, answer, requeue_delay=None, batch_timeout=0.01) as consumer:
        rabbit.put(b"fails")
        await asyncio.sleep(0.5)
        suspect(rabbit, b"suspect")
        await asyncio.sleep(0.4)
        assert [b"fails", b"suspect", b"fails"] == consumer.handled
    assert 1 == consumer.messages[-1].retry_count


async def test_a_suspect_that_fails_gives_way_to_the_next_message():
    """Although the consumer holds it until its retry."""
    rabbit = declared()
    suspect(rabbit, b"suspect")
    rabbit.put(*numbered(3))
    answer = first_then(answering(REQUEUE), ack)
    async with quorum(rabbit, answer, requeue_delay=None) as consumer:
        await asyncio.sleep(0.9)
        assert [[b"suspect"], numbered(3)] == consumer.batches
        await rabbit.settled()
    assert [[b"suspect"]] == consumer.batches[2:]


async def test_a_message_that_is_requeued_at_once_is_not_suspected():
    """The handler wants it back, so that it didn't crash anything."""
    rabbit = declared("4.0")
    answer = first_then(*[answering(REQUEUE_IMMEDIATE, ACK)] * 4, ack)
    async with quorum(rabbit, answer, batch_size=2, batch_timeout=1) as consumer:
        for number in range(5):
            rabbit.put(b"again" if number == 0 else b"%d" % number)
            if number:
                await asyncio.sleep(0.1)
            else:
                rabbit.put(b"0")
                await asyncio.sleep(0.1)
        await rabbit.settled()
    assert [[b"again", each] for each in numbered(5)] == consumer.batches


async def test_a_suspect_is_not_returned_by_a_stop():
    """A copy takes its place: before RabbitMQ 4.3 a return counts."""
    rabbit = declared("4.0")
    async with quorum(rabbit, taking(5), num_workers=2, batch_size=1):
        rabbit.put(b"0")
        await asyncio.sleep(1)
        suspect(rabbit, b"suspect")
        await asyncio.sleep(1)
    [left] = rabbit.drain("jobs")
    assert (b"suspect", 3) == (left.body, left.properties.headers["x-crash-count"])
    assert "x-original-exchange" in left.properties.headers


async def test_a_crashed_message_is_counted_and_logged(caplog):
    """Observers see a dead letter; the log says how many, and what is handled alone."""
    rabbit = declared("4.0")
    rabbit.put(POISON)
    recorder = EventRecorder()
    fleet = Fleet(rabbit, 1, observers=[recorder])
    await asyncio.sleep(60)
    await fleet.stop()
    [dead] = recorder.of(DeadLettered)
    assert DeadLetterReason.CRASHED is dead.reason
    [settled] = recorder.of(Settled)
    assert {(MessageResult.NACK, Cause.CRASHED): 1} == settled.counts
    lines = [each.getMessage() for each in caplog.records]
    assert 1 == sum("they aren't handled any more [" in line for line in lines)
    assert 5 == sum("each is handled alone [" in line for line in lines)


@pytest.mark.untraced
async def test_without_a_destination_a_crashed_message_is_retried_with_growing_delays():
    """It is never discarded."""
    rabbit = declared("4.0")
    rabbit.put(POISON)
    fleet = Fleet(rabbit, 1, dead_letter_queue=None, without_dead_letter="retry")
    await asyncio.sleep(100)
    await fleet.stop()
    assert [POISON] == rabbit.waiting()
    assert 8 < fleet.kills < 60
