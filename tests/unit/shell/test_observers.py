"""Observers: the events that they get, and what their errors cannot do."""

from __future__ import annotations

import asyncio
import logging

import pytest

from aio_pika_batch import (
    Cause,
    DeadLetterReason,
    Observer,
    Outcome,
    SessionLost,
    Trigger,
)
from aio_pika_batch.logs import KeywordLogger
from aio_pika_batch.observer import (
    BatchCut,
    BatchHandled,
    Connected,
    DeadLettered,
    HandlerError,
    Load,
    Lost,
    Observers,
    Origin,
    Received,
    Requeued,
    Settled,
    SettleFailed,
    StaleResults,
    Step,
    WorkerStarted,
    WorkerStopped,
)
from tests.unit.observers.stories import everything
from tests.unit.shell.helpers import (
    ACK,
    NACK,
    REQUEUE,
    EventRecorder,
    RecordingConsumer,
    ack,
    answering,
    numbered,
    taking,
)
from tests.unit.shell.scripted_transport import ScriptedTransport, never, raising


class Breaks(Observer):
    """Raises from every method."""

    def _break(self, origin, event):
        raise KeyError("observer")

    batch_cut = batch_handled = settled = requeued = dead_lettered = connected = _break
    lost = stale_results = handler_error = worker_started = worker_stopped = received = _break


async def test_events_come_in_order(rabbit, jitter):
    """With their origin, and the values that an operator or a metric needs."""
    recorder = EventRecorder()
    consumer = await everything(rabbit, recorder)
    assert {Origin("RecordingConsumer", "jobs", 0)} == {origin for origin, _ in recorder.seen}
    assert [
        WorkerStarted,
        Connected,
        Received,
        BatchCut,
        BatchHandled,
        Received,
        Settled,
        Requeued,
        DeadLettered,
        BatchCut,
        HandlerError,
        BatchHandled,
        Received,
        Settled,
        Requeued,
        BatchCut,
        Lost,
        Connected,
        Received,
        BatchHandled,
        StaleResults,
        BatchCut,
        BatchHandled,
        Settled,
        WorkerStopped,
    ] == [type(event) for _, event in recorder.seen]
    triggers = [event.trigger for event in recorder.of(BatchCut)]
    assert [Trigger.SIZE, *[Trigger.TIMEOUT] * 3] == triggers
    assert [0, 5, 5, 17.5] == [event.waited for event in recorder.of(BatchCut)]
    assert [0, 0, 20, 0] == [event.seconds for event in recorder.of(BatchHandled)]
    [error] = recorder.of(HandlerError)
    assert isinstance(error.error, KeyError)
    assert triggers == [event.trigger for event in recorder.of(BatchHandled)]
    assert [3, 1, 1, 1] == [event.count for event in recorder.of(Received)]
    assert [None, error.error, None, None] == [each.error for each in recorder.of(BatchHandled)]
    assert [
        {(ACK, Cause.HANDLER): 1, (REQUEUE, Cause.HANDLER): 1, (NACK, Cause.HANDLER): 1},
        {(REQUEUE, Cause.EXCEPTION): 1},
        {(ACK, Cause.HANDLER): 1},
    ] == [event.counts for event in recorder.of(Settled)]
    requeued = [(event.message.body, event.retry_count) for event in recorder.of(Requeued)]
    assert [(b"1", 1), (b"1", 2)] == requeued
    [dead] = recorder.of(DeadLettered)
    assert (b"2", DeadLetterReason.REJECTED) == (dead.message.body, dead.reason)
    [lost] = recorder.of(Lost)
    assert 1 == lost.epoch
    assert isinstance(lost.error, SessionLost)
    assert [1] == [event.count for event in recorder.of(StaleResults)]
    assert [numbered(3), [b"1"], [b"1"], [b"1"]] == consumer.batches


async def test_an_observer_that_raises_changes_nothing(rabbit, jitter, caplog):
    """It is logged once and counted; other observers get all events."""
    caplog.set_level(logging.ERROR)
    before, after = EventRecorder(), EventRecorder()
    consumer = await everything(rabbit, before, Breaks(), after)
    assert [type(event) for _, event in before.seen] == [type(event) for _, event in after.seen]
    assert 25 == len(after.seen)
    assert [numbered(3), [b"1"], [b"1"], [b"1"]] == consumer.batches
    assert [b"2"] == rabbit.waiting("dead")
    complaints = [each for each in caplog.records if "observer" in each.getMessage()]
    assert 1 == len(complaints)
    assert "Breaks" in complaints[0].getMessage()
    assert isinstance(complaints[0].exc_info[1], KeyError)


def test_failures_of_observers_are_counted(caplog):
    """All of them; the first one of each observer is logged."""
    log = KeywordLogger(logging.getLogger("aio_pika_batch.test"))
    observers = Observers([Breaks(), Observer(), Breaks()], Origin("C", "q", 0), log)
    for _ in range(3):
        observers.emit(Connected(1))
    assert 6 == observers.errors
    assert 2 == len(caplog.records)
    assert observers
    assert not Observers([], Origin("C", "q", 0), log).present


def test_only_events_with_a_method_are_wanted():
    """Others aren't created."""
    log = KeywordLogger(logging.getLogger("aio_pika_batch.test"))

    class Counts(Observer):
        """Wants one kind of event."""

        def settled(self, origin, event):
            """Settled."""

    def wanted(*observers):
        return Observers(observers, Origin("C", "q", 0), log).wanted

    assert {Settled} == wanted(Observer(), Counts())
    assert set() == wanted(Observer())
    assert {Connected, Settled} <= wanted(EventRecorder(), Counts())


async def test_an_observer_overrides_only_what_it_needs(rabbit, jitter):
    """Other events do nothing."""

    class Counts(Observer):
        total = 0

        def settled(self, origin, event):
            self.total += sum(event.counts.values())

    counts = Counts()
    await everything(rabbit, counts)
    assert 5 == counts.total


async def test_unsent_settlements_are_reported_as_stale():
    """If a session ends while copies are in flight, all results of their batch are stale."""
    script = ScriptedTransport()
    recorder = EventRecorder()
    script.on_publish = lambda *_: asyncio.sleep(0.05)
    async with RecordingConsumer(
        answering(ACK, REQUEUE, ACK), transport=script, observers=[recorder], batch_size=3
    ):
        script.last.feed(*numbered(3))
        await asyncio.sleep(0.01)
        script.last.end()
        await asyncio.sleep(5)
    assert [] == script.details("settle")
    assert 0 == sum(sum(event.counts.values()) for event in recorder.of(Settled))
    assert 3 == sum(event.count for event in recorder.of(StaleResults))


async def test_settlements_before_the_end_of_a_session_are_reported_as_settled():
    """Only the rest is stale."""
    script = ScriptedTransport()
    recorder = EventRecorder()
    script.on_publish = lambda *_: asyncio.sleep(1)
    async with RecordingConsumer(
        answering(ACK, REQUEUE, ACK), transport=script, observers=[recorder], batch_size=3
    ):
        script.last.feed(*numbered(3))
        await asyncio.sleep(0.5)
        script.last.end()
        await asyncio.sleep(5)
    assert [[("ack", (1, 3))]] == script.details("settle")
    assert 2 == sum(sum(event.counts.values()) for event in recorder.of(Settled))
    assert 1 == sum(event.count for event in recorder.of(StaleResults))


async def test_a_worker_reports_its_load(rabbit, jitter):
    """At any time between its start and its end."""
    rabbit.put(*numbered(5))
    recorder = EventRecorder()
    async with RecordingConsumer(
        taking(20), transport=rabbit.transport, observers=[recorder], batch_size=3, prefetch_count=5
    ):
        [started] = recorder.of(WorkerStarted)
        await asyncio.sleep(1)
        assert Load(buffered=2, in_hand=3, is_consuming=True) == started.load()
        rabbit.broker.cut()
        await asyncio.sleep(0.01)
        assert Load(buffered=0, in_hand=3, is_consuming=False) == started.load()
    assert Load(buffered=0, in_hand=0, is_consuming=False) == started.load()


async def test_the_duration_and_the_failures_of_settling_are_reported(jitter):
    """From the decision until the frames are sent, including confirms of copies."""
    script = ScriptedTransport()
    recorder = EventRecorder()
    script.on_publish = lambda *_: asyncio.sleep(0.05)
    script.outcomes = [Outcome.CONFIRMED, Outcome.RETURNED]
    async with RecordingConsumer(
        answering(REQUEUE, REQUEUE), transport=script, observers=[recorder], batch_size=2
    ):
        script.last.feed(*numbered(2))
        await asyncio.sleep(0.2)
        assert [0.05] == [pytest.approx(event.seconds) for event in recorder.of(Settled)]
        [failed] = recorder.of(SettleFailed)
        assert (Step.PUBLISH, 1, None) == (failed.step, failed.count, failed.error)
        assert pytest.approx(0.05) == failed.seconds
        await asyncio.sleep(5)
        script.on_settle = raising(error := SessionLost("just now"))
        script.last.feed(*numbered(2))
        await asyncio.sleep(0.2)
    failed = recorder.of(SettleFailed)[-1]
    assert (Step.SETTLE, 2, error) == (failed.step, failed.count, failed.error)


async def test_results_for_a_session_that_refuses_settlements_are_stale():
    """The broker delivers their messages again."""
    script = ScriptedTransport()
    recorder = EventRecorder()

    async def closed(*_):
        raise SessionLost("just now")

    script.on_settle = closed
    async with RecordingConsumer(ack, transport=script, observers=[recorder], batch_size=3):
        script.last.feed(*numbered(3))
        await asyncio.sleep(0.001)
        assert [3] == [event.count for event in recorder.of(StaleResults)]
        assert [] == recorder.of(Settled)


async def test_a_copy_in_flight_is_not_waited_for_after_its_session():
    """Its original can no longer be settled."""
    script = ScriptedTransport()
    script.on_publish = never
    script.on_settle = raising(SessionLost("just now"))
    async with RecordingConsumer(
        answering(ACK, REQUEUE, ACK), transport=script, observers=[recorder := EventRecorder()]
    ):
        script.last.feed(*numbered(3))
        await asyncio.sleep(6)
        assert 2 == len(script.sessions)
    assert [3] == [event.count for event in recorder.of(StaleResults)]
