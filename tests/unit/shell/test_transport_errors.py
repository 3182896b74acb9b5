"""A consumer survives what a transport, a handler or an observer should not do."""

from __future__ import annotations

import asyncio

import pytest

from aio_pika_batch import SessionLost
from aio_pika_batch.observer import Lost, Observer, StaleResults
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


class Broken(BaseException):
    """What an extension or a test runner may raise: not an `Exception`."""


async def test_whatever_ends_a_session_is_not_the_end_of_its_worker(caplog):
    """It is logged, and the worker consumes again."""
    script = ScriptedTransport()
    async with RecordingConsumer(transport=script) as consumer:
        script.last.end(Broken("odd"))
        await asyncio.sleep(5)
        assert 2 == len(script.sessions)
        assert consumer.is_healthy
    assert "the session was ended by Broken: odd" in caplog.text


async def test_a_worker_that_is_cancelled_by_others_ends_run():
    """Otherwise nothing would be consumed, and `run` would not end."""
    consumer = RecordingConsumer(transport=ScriptedTransport())
    running = asyncio.create_task(consumer.run())
    await asyncio.sleep(1)

    consumer._lifecycle.pool._tasks[0].cancel()

    with pytest.raises(SessionLost, match="cancelled"):
        await running
    assert not consumer.is_running


@pytest.mark.parametrize("way", ["yields", "raises", "closes", "cancels", "cancels at the end"])
async def test_whatever_leaves_a_handler_is_a_failure_of_its_batch_only(way, caplog):
    """Also what isn't an `Exception`; the next batches are handled as before."""
    script = ScriptedTransport()
    runs = 0

    async def answer(messages):
        nonlocal runs
        runs += 1
        if runs > 1:
            for _ in messages:
                yield ACK
            return
        match way:
            case "yields":
                async with asyncio.TaskGroup():
                    for _ in (*messages, "one too many"):
                        yield ACK
            case "raises":
                yield ACK
                raise Broken
            case "closes":
                try:
                    yield "no result"
                finally:
                    raise BaseExceptionGroup("closing", [Broken()])
            case "cancels":
                yield ACK
                asyncio.current_task().cancel()
                await asyncio.sleep(3600)
            case _:
                yield ACK
                asyncio.current_task().cancel()

    async with RecordingConsumer(
        answer, transport=script, batch_size=2, unhandled_exception_action="NACK"
    ) as consumer:
        script.last.feed(*numbered(2))
        await asyncio.sleep(1)
        script.last.feed(*numbered(2, 2))
        await asyncio.sleep(1)
        assert consumer.is_healthy
    first, second = script.details("settle")
    expected = {
        "yields": [("ack", (1, 2))],
        "closes": [("reject", (1, 2))],
    }.get(way, [("ack", (1,)), ("reject", (2,))])
    assert expected == first
    assert [("ack", (3, 4))] == second
    assert 1 == len(script.sessions)
    assert "a batch failed" in caplog.text


async def test_an_observer_may_raise_anything(caplog):
    """It changes nothing."""

    class Odd(Observer):
        def received(self, origin, event):
            raise Broken

    script = ScriptedTransport()
    async with RecordingConsumer(transport=script, observers=[Odd()], batch_size=2) as consumer:
        script.last.feed(*numbered(2))
        await asyncio.sleep(1)
        assert consumer.is_healthy
    assert [[("ack", (1, 2))]] == script.details("settle")
    assert "an observer failed" in caplog.text


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
