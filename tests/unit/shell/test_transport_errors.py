"""What the shell does if a transport, a worker or a hook fails unexpectedly."""

from __future__ import annotations

import asyncio

import pytest

from aio_pika_batch import SessionLost
from aio_pika_batch.observer import Lost, StaleResults
from tests.unit.shell.helpers import (
    ACK,
    REQUEUE,
    EventRecorder,
    RecordingConsumer,
    ack,
    answering,
    first_then,
    numbered,
)
from tests.unit.shell.scripted_transport import ScriptedTransport, at_once, raising


@pytest.mark.parametrize("error", [SessionLost("gone"), RuntimeError("a bug")])
async def test_a_settlement_that_fails_ends_the_session(error, jitter):
    """Whatever it raises. The messages come back, and nothing is settled twice."""
    script = ScriptedTransport()
    script.on_settle = raising(error)
    recorder = EventRecorder()
    async with RecordingConsumer(ack, transport=script, observers=[recorder], batch_size=2):
        script.last.feed(*numbered(2))
        await asyncio.sleep(0.1)
        script.on_settle = at_once
        await asyncio.sleep(5)
        assert 2 == len(script.sessions)
        script.last.feed(*numbered(2))
        await asyncio.sleep(1)
    assert [("ack", (1, 2))] == script.details("settle")[-1]
    assert [SessionLost] == [type(event.error) for event in recorder.of(Lost)]


@pytest.mark.parametrize("error", [SessionLost("gone"), RuntimeError("a bug")])
async def test_a_failed_settlement_of_several_batches_reaches_all_of_them(error, jitter):
    """Each counts its results as stale, or ends the session."""
    script = ScriptedTransport()
    script.on_publish = lambda *_: asyncio.sleep(0.05)
    script.on_settle = raising(error)
    recorder = EventRecorder()
    answers = first_then(answering(REQUEUE, ACK), ack, ack)
    async with RecordingConsumer(
        answers, transport=script, observers=[recorder], batch_size=2, concurrency=3
    ) as consumer:
        script.last.feed(*numbered(6))
        await asyncio.sleep(0.1)
        script.on_settle = at_once
        await asyncio.sleep(5)
        assert 2 == len(script.sessions)
        assert consumer.is_healthy
    assert 1 == len(script.times("settle"))
    assert 1 == len(recorder.of(Lost))
    stale = sum(event.count for event in recorder.of(StaleResults))
    assert stale == (6 if isinstance(error, SessionLost) else 0)


async def test_a_worker_that_ends_by_itself_ends_run():
    """Otherwise the consumer would silently stop consuming."""
    script = ScriptedTransport()
    consumer = RecordingConsumer(transport=script)
    running = asyncio.create_task(consumer.run())
    await asyncio.sleep(1)

    class Broken(BaseException):
        """An error that no worker survives."""

    script.last.end(Broken())
    with pytest.raises(Broken):
        await running
    assert not consumer.is_running


async def test_a_timeout_that_on_start_raises_is_passed_on():
    """It is not taken for the library's own timeout."""

    class TimesOut(RecordingConsumer):
        async def on_start(self):
            async with asyncio.timeout(1):
                await asyncio.sleep(3600)

    with pytest.raises(TimeoutError):
        await TimesOut(transport=ScriptedTransport()).start()


async def test_the_cancellation_of_a_handler_ends_before_its_batch_is_settled(jitter):
    """Adapters ask the task whether a cancellation is the client library's or ours."""
    script = ScriptedTransport()
    cancelling = []

    async def ask(*_):
        cancelling.append(asyncio.current_task().cancelling())

    script.on_settle = ask

    async def answer(messages):
        yield ACK
        await asyncio.sleep(3600)

    async with RecordingConsumer(answer, transport=script, batch_size=2, process_timeout=10):
        script.last.feed(*numbered(2))
        await asyncio.sleep(12)
    assert [0] == cancelling
