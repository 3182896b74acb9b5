"""`process_timeout`, and handlers that ignore their cancellation."""

from __future__ import annotations

import asyncio

import pytest

from aio_pika_batch import Cause, HandlerTimeout, WorkerState
from aio_pika_batch.adapters.memory import EventKind
from aio_pika_batch.observer import HandlerError, Lost, Settled, StaleResults
from tests.unit.shell.helpers import (
    ACK,
    NACK,
    REQUEUE,
    EventRecorder,
    RecordingConsumer,
    ack,
    first_then,
    numbered,
    taking,
)


def consumer_of(rabbit, answer, recorder=None, **given):
    """Return a consumer of batches of three, with a limit of ten seconds."""
    given = {"batch_size": 3, "batch_timeout": 1, "process_timeout": 10} | given
    return RecordingConsumer(
        first_then(answer, ack),
        transport=rabbit.transport,
        observers=[recorder or EventRecorder()],
        **given,
    )


@pytest.mark.parametrize("action", [REQUEUE, NACK])
async def test_results_yielded_in_time_count(rabbit, action, caplog):
    """The rest gets `unhandled_exception_action` after the timeout."""

    async def answer(messages):
        yield ACK
        await asyncio.sleep(3600)

    recorder = EventRecorder()
    rabbit.put(*numbered(3))
    async with consumer_of(rabbit, answer, recorder, unhandled_exception_action=action):
        await asyncio.sleep(20)
    assert {(ACK, Cause.HANDLER): 1, (action, Cause.TIMEOUT): 2} == recorder.of(Settled)[0].counts
    error = recorder.of(HandlerError)[0].error
    assert isinstance(error, HandlerTimeout)
    # The log shows where the handler was.
    assert isinstance(error.__cause__, asyncio.CancelledError)
    assert "process_timeout=10" in caplog.text
    assert [10] == rabbit.times(EventKind.ACKED)[:1]


async def test_exception_results_can_map_a_timeout(rabbit):
    """It is a :class:`HandlerTimeout`, and so a TimeoutError."""

    class Listed(RecordingConsumer):
        exception_results = {TimeoutError: NACK}  # noqa: RUF012

    recorder = EventRecorder()
    rabbit.put(b"0")
    async with Listed(
        taking(60),
        transport=rabbit.transport,
        observers=[recorder],
        batch_size=1,
        process_timeout=1,
    ):
        await asyncio.sleep(2)
    assert [{(NACK, Cause.TIMEOUT): 1}] == [event.counts for event in recorder.of(Settled)]


async def test_a_handler_within_the_limit_is_not_affected(rabbit):
    """The limit is for each batch, not for all of them."""
    recorder = EventRecorder()
    rabbit.put(*numbered(9))
    async with consumer_of(rabbit, taking(9), recorder) as consumer:
        consumer.answer = taking(9)
        await asyncio.sleep(40)
    assert [0, 9, 18] == consumer.times
    assert [] == recorder.of(HandlerError)


async def test_a_handler_can_clean_up_after_its_timeout(rabbit):
    """Its `finally` runs, and then its batch is settled."""
    events = []

    async def answer(messages):
        try:
            yield ACK
            await asyncio.sleep(3600)
        finally:
            await asyncio.sleep(2)
            events.append("cleaned up")

    rabbit.put(*numbered(3))
    async with consumer_of(rabbit, answer):
        await asyncio.sleep(20)
    assert ["cleaned up"] == events
    assert [12] == rabbit.times(EventKind.ACKED)[:1]


async def test_results_yielded_after_the_timeout_do_not_count(rabbit):
    """A handler that swallows its cancellation and yields is closed at that yield."""
    events = []

    async def answer(messages):
        yield ACK
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            events.append("swallowed")
        yield ACK
        events.append("went on")

    recorder = EventRecorder()
    rabbit.put(*numbered(3))
    async with consumer_of(rabbit, answer, recorder):
        await asyncio.sleep(20)
    assert ["swallowed"] == events
    assert {(ACK, Cause.HANDLER): 1, (REQUEUE, Cause.TIMEOUT): 2} == recorder.of(Settled)[0].counts
    assert [] == recorder.of(Lost)


async def test_a_timeout_during_clean_up_leaves_no_message_undecided(rabbit):
    """Whatever the handler does when it is cut off, its batch is settled."""

    async def answer(messages):
        try:
            yield ACK
            yield "nonsense"
        finally:
            await asyncio.sleep(3600)

    recorder = EventRecorder()
    rabbit.put(*numbered(3))
    async with consumer_of(rabbit, answer, recorder):
        await asyncio.sleep(30)
        assert [] == rabbit.unsettled()
    assert {(ACK, Cause.HANDLER): 1, (REQUEUE, Cause.INVALID): 2} == recorder.of(Settled)[0].counts
    assert [] == recorder.of(Lost)


async def test_complete_results_count_even_if_the_clean_up_is_cut_off(rabbit):
    """Every message has its result; the later failure is logged."""

    async def answer(messages):
        for _ in messages:
            yield ACK
        await asyncio.sleep(3600)

    recorder = EventRecorder()
    rabbit.put(*numbered(3))
    async with consumer_of(rabbit, answer, recorder):
        await asyncio.sleep(20)
    assert [{(ACK, Cause.HANDLER): 3}] == [event.counts for event in recorder.of(Settled)]
    assert 1 == len(recorder.of(HandlerError))


def stubborn(until):
    """Return a handler that swallows every cancellation until an event is set."""

    async def answer(messages):
        while not until.is_set():
            try:
                await until.wait()
            except asyncio.CancelledError:
                continue
        for _ in messages:
            yield ACK

    return answer


async def test_a_handler_that_ignores_its_cancellation_ends_the_session(rabbit, jitter):
    """After five seconds the session is given up, and the messages are delivered again.

    The slot stays taken: the next session's batch waits until the old handler has ended. Its
    results are discarded and counted.
    """
    done = asyncio.Event()
    recorder = EventRecorder()
    rabbit.put(*numbered(3))
    async with consumer_of(rabbit, stubborn(done), recorder) as consumer:
        await asyncio.sleep(14.9)
        assert [] == recorder.of(Lost)
        await asyncio.sleep(0.2)
        assert 1 == len(recorder.of(Lost))
        assert "cancelled" in str(recorder.of(Lost)[0].error)
        await asyncio.sleep(60)
        assert 2 == consumer.status().workers[0].epoch
        assert [WorkerState.CONSUMING] == [each.state for each in consumer.status().workers]
        assert not consumer.is_healthy
        assert [numbered(3)] == consumer.batches
        done.set()
        await asyncio.sleep(1)
        assert [numbered(3), numbered(3)] == consumer.batches
        assert [3] == [event.count for event in recorder.of(StaleResults)]
    assert [] == rabbit.waiting()
    assert [b"0", b"1", b"2"] == [
        each.body for each in rabbit.broker.journal.of(EventKind.ACKED, queue="jobs")
    ]


async def test_process_timeout_limits_all_runs_of_a_batch(rabbit):
    """A batch that is run again without its undecodable message gets no more time."""

    async def answer(messages):
        await asyncio.sleep(6)
        for message in messages:
            message.json()
            yield ACK

    recorder = EventRecorder()
    rabbit.put(b"{", b"[", b"3")
    async with consumer_of(rabbit, answer, recorder) as consumer:
        consumer.answer = first_then(answer, answer, answer, ack)
        await asyncio.sleep(11)
    assert {(NACK, Cause.UNDECODABLE): 2, (REQUEUE, Cause.TIMEOUT): 1} == recorder.of(Settled)[
        0
    ].counts


async def test_without_a_limit_a_handler_may_take_a_day(rabbit):
    """There is no limit by default."""
    rabbit.put(*numbered(3))
    async with consumer_of(rabbit, taking(80_000), process_timeout=None, shutdown_timeout=10):
        await asyncio.sleep(80_001)
        assert 3 == len(rabbit.times(EventKind.ACKED))
