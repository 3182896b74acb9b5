"""The order of a graceful shutdown, and its result."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aio_pika_batch import Cause, DrainIncomplete, Outcome
from aio_pika_batch.adapters.memory import EventKind
from aio_pika_batch.errors import SessionLost
from aio_pika_batch.observer import Settled
from aio_pika_batch.testing import virtual_time
from tests.unit.shell.helpers import (
    ACK,
    NACK,
    QUEUE,
    REQUEUE,
    EventRecorder,
    QueueBroker,
    RecordingConsumer,
    SingleConsumer,
    ack,
    answering,
    first_then,
    numbered,
    taking,
)
from tests.unit.shell.scripted_transport import ScriptedTransport, never


def now():
    """The current time."""
    return asyncio.get_running_loop().time()


async def stopped_after(seconds, consumer):
    """Run a consumer for some seconds and stop it; return how long the stop took."""
    running = asyncio.create_task(consumer.run())
    await asyncio.sleep(seconds)
    began = now()
    consumer.request_stop()
    try:
        await running
    finally:
        consumer.took = now() - began


async def test_messages_in_flight_when_the_cancel_is_confirmed_are_handled():
    """Otherwise they would come back as redelivered."""
    script = ScriptedTransport()

    async with RecordingConsumer(transport=script, batch_timeout=60) as consumer:
        session, end = script.last, script.last.end

        def land():
            session.feed(b"late")
            end()

        session.end = lambda: asyncio.get_running_loop().call_later(0.5, land)
    assert [b"late"] == consumer.handled
    assert [[("ack", (1,))]] == script.details("settle")


async def test_the_order_of_a_drain():
    """Cancel, handlers, confirms, settle, return, close the session, `on_stop`, publishers."""
    script = ScriptedTransport()

    class Telling(RecordingConsumer):
        async def on_stop(self):
            script.note("on_stop")

    script.on_cancel = script.on_publish = script.on_settle = lambda *_: asyncio.sleep(1)
    answer = taking(5, answering(ACK, REQUEUE))
    consumer = Telling(answer, transport=script, batch_size=2, batch_timeout=60)
    running = asyncio.create_task(consumer.run())
    await asyncio.sleep(0.5)
    script.last.feed(*numbered(5))
    await asyncio.sleep(0.5)
    consumer.request_stop()
    script.last.feed(b"5")
    await running
    expected = [
        (1, "cancel", None),
        (5.5, "publisher", None),
        (5.5, "publish", [b"1"]),
        (pytest.approx(5.6), "settle", [("ack", (1,))]),
        (6.5, "settle", [("ack", (2,))]),
        (7.5, "settle", [("return", (3, 4, 5, 6))]),
        (8.5, "leave", None),
        (8.5, "on_stop", None),
        (8.5, "leave publisher", None),
    ]
    assert expected == script.calls[2:]
    assert [numbered(2)] == consumer.batches


async def test_unstarted_messages_are_returned_by_one_nack(rabbit):
    """In queue order. Newer brokers do not count a nack as a failed delivery."""
    rabbit.put(*numbered(30))
    consumer = RecordingConsumer(
        taking(10), transport=rabbit.transport, batch_size=4, prefetch_count=20
    )
    await stopped_after(1, consumer)
    assert 9 == consumer.took
    assert [numbered(4)] == consumer.batches
    assert numbered(26, 4) == rabbit.waiting()


async def test_messages_that_come_before_the_cancel_is_confirmed_are_not_lost():
    """They are handled with the buffered ones, if a slot is free."""
    script = ScriptedTransport()

    async def late():
        await asyncio.sleep(1)
        script.last.feed(b"1")

    script.on_cancel = late
    consumer = RecordingConsumer(transport=script, batch_size=5, batch_timeout=60)
    async with consumer:
        script.last.feed(b"0")
        await asyncio.sleep(0.1)
    assert [[b"0", b"1"]] == consumer.batches
    assert [[("ack", (1, 2))]] == script.details("settle")


async def test_buffered_messages_are_returned_if_no_slot_is_free(rabbit):
    """Even if a handler ends meanwhile."""
    rabbit.put(*numbered(6))
    consumer = RecordingConsumer(
        taking(10), transport=rabbit.transport, batch_size=4, batch_timeout=60
    )
    await stopped_after(1, consumer)
    assert [numbered(4)] == consumer.batches
    assert numbered(2, 4) == rabbit.waiting()


async def test_no_batch_starts_while_the_cancel_is_not_confirmed():
    """A handler that ends meanwhile does not get another batch."""
    script = ScriptedTransport()
    script.on_cancel = lambda: asyncio.sleep(10)
    consumer = RecordingConsumer(taking(3), transport=script, batch_size=2, prefetch_count=20)
    async with consumer:
        script.last.feed(*numbered(10))
        await asyncio.sleep(1)
    assert [numbered(2), numbered(2, 2)] == consumer.batches
    assert [0, 11] == consumer.times
    assert [("return", tuple(range(5, 11)))] == script.details("settle")[-1]


async def test_a_drain_waits_for_confirms():
    """A copy in flight is not left behind."""
    script = ScriptedTransport()
    script.on_publish = lambda *_: asyncio.sleep(8)
    consumer = RecordingConsumer(answering(REQUEUE), transport=script, batch_size=1)
    running = asyncio.create_task(consumer.run())
    await asyncio.sleep(0)
    await asyncio.sleep(0.1)
    script.last.feed(b"0")
    await asyncio.sleep(0.1)
    consumer.request_stop()
    await running
    assert [[("ack", (1,))]] == script.details("settle")


@pytest.mark.parametrize("outcome", [Outcome.REFUSED, Outcome.RETURNED, Outcome.UNKNOWN])
async def test_an_original_whose_copy_is_not_confirmed_is_returned(outcome):
    """A drain does not publish again."""
    script = ScriptedTransport()
    script.outcomes = [outcome]
    script.on_publish = lambda *_: asyncio.sleep(3)
    async with RecordingConsumer(answering(REQUEUE), transport=script, batch_size=1):
        script.last.feed(b"0")
        await asyncio.sleep(1)
    assert [[("return", (1,))]] == script.details("settle")
    assert [3] == script.times("settle")


@pytest.mark.parametrize("timeout", [1, 5, 25, 100])
async def test_handlers_that_take_too_long_are_cut_off(rabbit, timeout):
    """In time. Their yielded results count, and a nack returns the undecided messages."""

    async def answer(messages):
        yield ACK
        yield REQUEUE
        await asyncio.sleep(3600)

    recorder = EventRecorder()
    rabbit.put(*numbered(7))
    consumer = RecordingConsumer(
        answer,
        transport=rabbit.transport,
        observers=[recorder],
        batch_size=5,
        batch_timeout=60,
        shutdown_timeout=timeout,
    )
    with pytest.raises(DrainIncomplete, match="5 messages were still being handled"):
        await stopped_after(1, consumer)
    assert 0.7 * timeout <= consumer.took <= timeout
    counts = {(ACK, Cause.HANDLER): 1, (REQUEUE, Cause.HANDLER): 1, (None, Cause.SHUTDOWN): 3}
    assert [counts] == [event.counts for event in recorder.of(Settled)]
    assert [*numbered(5, 2), b"1"] == rabbit.waiting()
    assert [b"0", b"1"] == [each.body for each in rabbit.broker.journal.of(EventKind.ACKED)]
    assert [] == rabbit.broker.connections


async def test_results_yielded_after_the_cut_off_do_not_count(rabbit):
    """The handler's time was over."""

    async def answer(messages):
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            for _ in messages:
                yield ACK

    rabbit.put(*numbered(3))
    consumer = RecordingConsumer(answer, transport=rabbit.transport, batch_size=3)
    with pytest.raises(DrainIncomplete):
        await stopped_after(1, consumer)
    assert numbered(3) == rabbit.waiting()


async def test_a_handler_that_ignores_its_cancellation_does_not_block_the_stop(rabbit):
    """Its messages go back with the session."""
    done = asyncio.Event()

    async def answer(messages):
        while not done.is_set():
            try:
                await done.wait()
            except asyncio.CancelledError:
                continue
        yield ACK

    rabbit.put(*numbered(3))
    consumer = RecordingConsumer(
        answer, transport=rabbit.transport, batch_size=3, shutdown_timeout=20
    )
    with pytest.raises(DrainIncomplete, match="cut short: 3 messages"):
        await stopped_after(1, consumer)
    assert 15 < consumer.took <= 20
    assert numbered(3) == rabbit.waiting()
    assert [] == rabbit.broker.connections
    done.set()
    await asyncio.sleep(1)


async def test_stop_does_not_raise_what_run_raises(rabbit):
    """`stop` only stops the consumer."""
    rabbit.put(*numbered(3))
    consumer = RecordingConsumer(taking(3600), transport=rabbit.transport, batch_size=3)
    await consumer.start()
    await asyncio.sleep(1)
    await consumer.stop()
    assert numbered(3) == rabbit.waiting()


@pytest.mark.parametrize("step", ["on_cancel", "on_leave", "on_settle", "on_publisher_leave"])
async def test_a_silent_broker_does_not_block_the_stop(step):
    """Whatever it does not answer: `shutdown_timeout` limits the whole drain."""
    script = ScriptedTransport()
    consumer = RecordingConsumer(
        first_then(answering(REQUEUE), ack), transport=script, batch_size=1, shutdown_timeout=20
    )
    await consumer.start()
    script.last.feed(b"0")
    await asyncio.sleep(1)
    setattr(script, step, never)
    script.last.feed(b"1")
    await consumer.stop()
    assert now() <= 22
    assert not consumer.is_running


async def test_an_on_stop_that_does_not_end_is_cut_off(rabbit):
    """It is part of the drain and of its time limit."""

    class Hangs(RecordingConsumer):
        async def on_stop(self):
            await never()

    consumer = Hangs(transport=rabbit.transport, shutdown_timeout=20)
    with pytest.raises(DrainIncomplete, match="on_stop"):
        await stopped_after(1, consumer)
    assert 20 == consumer.took


async def test_a_timeout_that_on_stop_raises_is_passed_on(rabbit):
    """It is not taken for the drain's own timeout."""

    class TimesOut(RecordingConsumer):
        async def on_stop(self):
            async with asyncio.timeout(1):
                await never()

    with pytest.raises(TimeoutError):
        await stopped_after(1, TimesOut(transport=rabbit.transport))


async def test_a_session_that_is_lost_during_the_drain_ends_it(rabbit):
    """Nothing can be settled any more, and its messages come back."""
    rabbit.put(*numbered(3))
    consumer = RecordingConsumer(taking(10), transport=rabbit.transport, batch_size=3)
    running = asyncio.create_task(consumer.run())
    await asyncio.sleep(1)
    consumer.request_stop()
    await asyncio.sleep(1)
    rabbit.broker.cut()
    await running
    assert numbered(3) == rabbit.waiting()
    assert 10 == now()


async def test_a_drain_waits_for_handlers_of_lost_sessions(rabbit):
    """`on_stop` may close what they use."""
    events = []

    class Telling(RecordingConsumer):
        async def on_stop(self):
            events.append(now())

    rabbit.put(*numbered(3))
    consumer = Telling(taking(10), transport=rabbit.transport, batch_size=3)
    running = asyncio.create_task(consumer.run())
    await asyncio.sleep(1)
    rabbit.broker.cut()
    await asyncio.sleep(3)
    consumer.request_stop()
    await running
    assert [10] == events


async def test_a_consumer_that_waits_for_its_broker_stops_at_once(rabbit):
    """There is nothing to drain."""
    consumer = RecordingConsumer(transport=rabbit.transport)
    running = asyncio.create_task(consumer.run())
    await asyncio.sleep(1)
    rabbit.broker.delete_queue("jobs")
    await asyncio.sleep(0)
    consumer.request_stop()
    await running
    assert 1 == now()


@given(
    count=st.integers(0, 30),
    size=st.integers(1, 6),
    concurrency=st.integers(1, 3),
    workers=st.integers(1, 2),
    prefetch=st.none() | st.integers(0, 12),
    seconds=st.lists(st.floats(0, 8), min_size=1, max_size=5),
    stop_at=st.floats(0, 20),
    pause=st.floats(0, 1),
)
def test_after_a_graceful_stop_nothing_left_was_handled(
    count, size, concurrency, workers, prefetch, seconds, stop_at, pause
):
    """No message left in the queue was handled, and acked messages are gone."""

    async def story():
        rabbit = QueueBroker()
        rabbit.declare()
        durations = iter(seconds * 100)

        async def answer(messages):
            await asyncio.sleep(next(durations))
            for _ in messages:
                yield ACK

        given = {} if prefetch is None else {"prefetch_count": prefetch}
        consumer = RecordingConsumer(
            answer,
            transport=rabbit.transport,
            batch_size=size,
            batch_timeout=2,
            concurrency=concurrency,
            num_workers=workers,
            **given,
        )

        async def feed():
            for body in numbered(count):
                rabbit.put(body)
                await asyncio.sleep(pause)

        feeding = asyncio.create_task(feed())
        await stopped_after(stop_at, consumer)
        await feeding
        acked = [each.body for each in rabbit.broker.journal.of(EventKind.ACKED)]
        assert [] == rabbit.unsettled()
        assert sorted(consumer.handled) == sorted(acked)
        assert sorted(acked + rabbit.waiting()) == sorted(numbered(count))

    virtual_time.run(story())


# -- settlements that the broker has not confirmed ------------------------------------------------


@pytest.mark.parametrize("step", ["on_cancel", "on_leave"])
async def test_a_stop_says_how_many_settlements_are_not_confirmed(step, caplog):
    """Within `shutdown_timeout`, although the broker never answers. Two workers count together."""
    script = ScriptedTransport()
    consumer = RecordingConsumer(transport=script, num_workers=2, shutdown_timeout=10)
    running = asyncio.create_task(consumer.run())
    await asyncio.sleep(1)
    for session in script.sessions:
        session.feed(*numbered(3))
        session.unproven = 3
    await asyncio.sleep(1)
    setattr(script, step, never)
    began = now()
    consumer.request_stop()
    with pytest.raises(DrainIncomplete, match="6 messages are settled, but the broker has not"):
        await running
    assert now() - began <= 10 + 5
    lines = [each for each in caplog.messages if "settlements are not confirmed" in each]
    assert 2 == len(lines)
    assert "messages=3" in lines[0]


async def test_a_stop_waits_until_the_last_settlements_are_carried_out():
    """After all of them are sent, and before the session is closed."""
    script = ScriptedTransport()
    script.on_settled = lambda: asyncio.sleep(3)
    consumer = RecordingConsumer(transport=script)
    await stopped_after(1, consumer)
    assert 3 == consumer.took
    [left] = script.times("leave")
    [cancelled] = script.times("cancel")
    assert 3 == left - cancelled


async def test_a_stop_does_not_wait_longer_than_it_may():
    """Then it says what is in doubt."""
    script = ScriptedTransport()
    script.on_settled = never
    consumer = RecordingConsumer(transport=script, shutdown_timeout=10)
    running = asyncio.create_task(consumer.run())
    await asyncio.sleep(1)
    script.last.unproven = 3
    began = now()
    consumer.request_stop()
    with pytest.raises(DrainIncomplete, match="3 messages are settled, but the broker has not"):
        await running
    assert now() - began < 10


async def test_a_session_that_is_lost_at_its_end_is_reported():
    """What was settled last may come again."""
    script = ScriptedTransport()

    async def lose():
        raise SessionLost("cut")

    script.on_settled = lose
    consumer = RecordingConsumer(transport=script)
    running = asyncio.create_task(consumer.run())
    await asyncio.sleep(1)
    script.last.unproven = 3
    consumer.request_stop()
    with pytest.raises(DrainIncomplete, match="3 messages are settled, but the broker has not"):
        await running


async def test_a_stop_says_nothing_of_settlements_that_became_certain_at_the_end():
    """They are counted when the session is closed, not before."""
    script = ScriptedTransport()
    consumer = RecordingConsumer(transport=script)
    running = asyncio.create_task(consumer.run())
    await asyncio.sleep(1)
    script.last.unproven = 3

    async def prove():
        script.last.unproven = 0

    script.on_leave = prove
    consumer.request_stop()
    await running


async def test_sessions_that_were_lost_before_the_stop_do_not_count():
    """Their messages were delivered again long ago."""
    script = ScriptedTransport()
    consumer = RecordingConsumer(transport=script, reconnect_delay=1)
    running = asyncio.create_task(consumer.run())
    await asyncio.sleep(1)
    script.last.unproven = 3
    script.last.end()
    await asyncio.sleep(10)
    assert 2 == len(script.sessions)
    consumer.request_stop()
    await running


async def test_messages_in_handlers_and_settlements_are_both_counted():
    """The former are delivered again for certain, the latter perhaps."""
    script = ScriptedTransport()
    consumer = RecordingConsumer(taking(60), transport=script, batch_size=2, shutdown_timeout=10)
    running = asyncio.create_task(consumer.run())
    await asyncio.sleep(1)
    script.last.feed(*numbered(2))
    script.last.unproven = 4
    await asyncio.sleep(1)
    consumer.request_stop()
    with pytest.raises(
        DrainIncomplete, match=r"2 messages were still being handled.*; 4 messages are"
    ):
        await running


# -- quorum queues --------------------------------------------------------------------------------


async def mixed(message):
    """ACK or NACK a message, some time after all others have begun."""
    await asyncio.sleep(10 + int(message.body) % 3)
    return (ACK, NACK)[int(message.body) % 2]


@pytest.mark.parametrize("version", ["3.10", "4.0", "4.3"])
@pytest.mark.parametrize("count", [34, 200])
async def test_a_stop_settles_everything_on_a_quorum_queue_that_does_not_answer(version, count):
    """However many messages are settled one by one, by ACK and NACK in turn."""
    broker = QueueBroker(version)
    broker.declare(x_queue_type="quorum")
    broker.put(*numbered(count))
    consumer = SingleConsumer(
        mixed,
        transport=broker.transport,
        queue_type="quorum",
        concurrency=count,
        prefetch_count=count,
    )
    async with consumer:
        await asyncio.sleep(1)
        assert count == len(broker.unsettled())
    assert [] == broker.waiting()
    assert 0 == broker.broker.journal.counts[EventKind.REQUEUED]


@pytest.mark.parametrize("version", ["3.10", "4.0", "4.3"])
async def test_the_turn_of_a_breaker_settles_everything_on_a_quorum_queue(version):
    """Handlers that end after its session was cancelled count, and are not run again."""
    broker = QueueBroker(version)
    broker.declare(x_queue_type="quorum")
    broker.put(*numbered(150))
    handled = Counter()

    async def handle(message):
        handled[message.body] += 1
        if int(message.body) < 10:
            raise ConnectionError
        await asyncio.sleep(5)
        return ACK

    consumer = SingleConsumer(
        handle,
        transport=broker.transport,
        queue_type="quorum",
        concurrency=150,
        prefetch_count=150,
        breaker_threshold=0.5,
        breaker_min_samples=10,
        breaker_pause=30,
        requeue_delay=0,
    )
    async with consumer:
        await asyncio.sleep(20)
        assert len(broker.broker.consumers(QUEUE)) == 0
        acked = [b"%d" % number for number in range(10, 150)]
        assert {1} == {handled[body] for body in acked}
        assert set() == set(acked) & set(broker.waiting())
