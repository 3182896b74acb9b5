"""In which order does a consumer stop, and what is true afterwards?"""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aio_pika_batch import Cause, DrainIncomplete, Outcome
from aio_pika_batch.adapters.memory import EventKind
from aio_pika_batch.observer import Settled
from aio_pika_batch.testing import virtual_time
from tests.unit.shell.helpers import (
    ACK,
    REQUEUE,
    EventRecorder,
    QueueBroker,
    RecordingConsumer,
    ack,
    answering,
    first_then,
    numbered,
    taking,
)
from tests.unit.shell.scripted_transport import ScriptedTransport, never


def now():
    """The time."""
    return asyncio.get_running_loop().time()


async def stopped_after(seconds, consumer):
    """Run for so long, then stop; how long the stop took."""
    running = asyncio.create_task(consumer.run())
    await asyncio.sleep(seconds)
    began = now()
    consumer.request_stop()
    try:
        await running
    finally:
        consumer.took = now() - began


async def test_what_is_on_its_way_when_the_cancel_is_confirmed_is_taken():
    """Left alone, it would come back as redelivered."""
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


async def test_what_was_not_started_is_returned_by_one_nack(rabbit):
    """A return spends no delivery where the broker can tell; and in the queue's order."""
    rabbit.put(*numbered(30))
    consumer = RecordingConsumer(
        taking(10), transport=rabbit.transport, batch_size=4, prefetch_count=20
    )
    await stopped_after(1, consumer)
    assert 9 == consumer.took
    assert [numbered(4)] == consumer.batches
    assert numbered(26, 4) == rabbit.waiting()


async def test_what_came_before_the_cancellation_was_confirmed_is_not_lost():
    """It is handed over if a slot is free, with what was being collected."""
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


async def test_nothing_is_handed_over_if_no_slot_is_free(rabbit):
    """What was being collected is returned, although a handler ends meanwhile."""
    rabbit.put(*numbered(6))
    consumer = RecordingConsumer(
        taking(10), transport=rabbit.transport, batch_size=4, batch_timeout=60
    )
    await stopped_after(1, consumer)
    assert [numbered(4)] == consumer.batches
    assert numbered(2, 4) == rabbit.waiting()


async def test_a_slow_cancellation_starts_nothing_new():
    """While its confirmation is waited for, a handler that ends is not given another batch."""
    script = ScriptedTransport()
    script.on_cancel = lambda: asyncio.sleep(10)
    consumer = RecordingConsumer(taking(3), transport=script, batch_size=2, prefetch_count=20)
    async with consumer:
        script.last.feed(*numbered(10))
        await asyncio.sleep(1)
    assert [numbered(2), numbered(2, 2)] == consumer.batches
    assert [0, 11] == consumer.times
    assert [("return", tuple(range(5, 11)))] == script.details("settle")[-1]


async def test_a_drain_waits_for_confirmations():
    """A copy that is on its way is not left behind."""
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
    """There is no time to try again."""
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
    """In time: what they have yielded counts, what they left undecided goes back by nack."""

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
    with pytest.raises(DrainIncomplete, match="5 messages were in mid-handling"):
        await stopped_after(1, consumer)
    assert 0.7 * timeout <= consumer.took <= timeout
    counts = {(ACK, Cause.HANDLER): 1, (REQUEUE, Cause.HANDLER): 1, (None, Cause.SHUTDOWN): 3}
    assert [counts] == [event.counts for event in recorder.of(Settled)]
    assert [*numbered(5, 2), b"1"] == rabbit.waiting()
    assert [b"0", b"1"] == [each.body for each in rabbit.broker.journal.of(EventKind.ACKED)]
    assert [] == rabbit.broker.connections


async def test_a_handler_that_answers_its_cut_by_yielding_is_not_listened_to(rabbit):
    """Its time was over."""

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


async def test_a_handler_that_ignores_its_cut_does_not_keep_the_consumer(rabbit):
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


async def test_stop_does_not_raise_what_run_would(rabbit):
    """Whoever stops wants it stopped."""
    rabbit.put(*numbered(3))
    consumer = RecordingConsumer(taking(3600), transport=rabbit.transport, batch_size=3)
    await consumer.start()
    await asyncio.sleep(1)
    await consumer.stop()
    assert numbered(3) == rabbit.waiting()


@pytest.mark.parametrize("step", ["on_cancel", "on_leave", "on_settle", "on_publisher_leave"])
async def test_a_broker_that_falls_silent_does_not_keep_the_consumer(step):
    """Whatever it does not answer: `shutdown_timeout` is for the whole."""
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
    """It is part of the drain, and of its time."""

    class Hangs(RecordingConsumer):
        async def on_stop(self):
            await never()

    consumer = Hangs(transport=rabbit.transport, shutdown_timeout=20)
    with pytest.raises(DrainIncomplete, match="on_stop"):
        await stopped_after(1, consumer)
    assert 20 == consumer.took


async def test_an_on_stop_may_time_out_by_itself(rabbit):
    """Its own exception comes out as it is."""

    class TimesOut(RecordingConsumer):
        async def on_stop(self):
            async with asyncio.timeout(1):
                await never()

    with pytest.raises(TimeoutError):
        await stopped_after(1, TimesOut(transport=rabbit.transport))


async def test_a_session_that_is_lost_during_the_drain_ends_it(rabbit):
    """There is nobody left to settle with; its messages come back."""
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


async def test_a_drain_waits_for_handlers_of_sessions_that_are_gone(rabbit):
    """`on_stop` may take away what they use."""
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


async def test_a_consumer_that_waits_for_its_broker_has_nothing_to_drain(rabbit):
    """It stops at once."""
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
    """What is left in the queue was never handed out to a handler, and what was acked is gone."""

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
