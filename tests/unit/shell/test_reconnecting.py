"""How a worker reconnects, and which errors are fatal."""

from __future__ import annotations

import asyncio
import logging
from itertools import pairwise

import pytest

from aio_pika_batch import (
    AccessRefused,
    BrokerUnavailable,
    SessionLost,
    StartInterrupted,
    TopologyError,
    WorkerState,
)
from aio_pika_batch.adapters.memory import ConnectFault, EventKind
from aio_pika_batch.observer import Connected, Lost
from tests.unit.shell.helpers import EventRecorder, RecordingConsumer, numbered, taking
from tests.unit.shell.scripted_transport import ScriptedTransport, at_once, never, raising

GONE = BrokerUnavailable("no answer")
NO = AccessRefused("wrong password")


async def test_a_worker_waits_for_a_broker_that_is_not_up_yet(jitter):
    """With pauses that double up to the maximum."""
    script = ScriptedTransport()
    script.on_declare = raising(GONE)
    consumer = RecordingConsumer(transport=script, reconnect_delay=1, reconnect_delay_max=10)
    starting = asyncio.create_task(consumer.start())
    await asyncio.sleep(40)
    assert not starting.done()
    assert [0, 1, 3, 7, 15, 25, 35] == script.times("declare")
    assert consumer.is_running
    assert not consumer.is_healthy
    script.on_declare = at_once
    await starting
    assert consumer.is_healthy
    await consumer.stop()


@pytest.mark.parametrize("luck", [0.0, 0.5, 0.999])
async def test_jitter_is_full(jitter, luck):
    """A pause is between zero and its maximum."""
    jitter[0] = luck
    script = ScriptedTransport()
    script.on_declare = raising(GONE)
    consumer = RecordingConsumer(transport=script, reconnect_delay=2, reconnect_delay_max=8)
    starting = asyncio.create_task(consumer.start())
    await asyncio.sleep(0)
    for _ in range(20):
        await asyncio.sleep(0)
    await asyncio.sleep(30 * luck)
    script.on_declare = at_once
    await starting
    pauses = [2 * luck, 4 * luck, 8 * luck, 8 * luck]
    times = script.times("declare")[:5]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert gaps == pytest.approx(pauses[: len(gaps)])
    assert gaps
    await consumer.stop()


async def test_the_backoff_resets_after_ten_stable_seconds(jitter):
    """After a session that was lost sooner, it continues."""
    lasts = [0, 0, 0, 9, 10, 0, 3600]

    class Shaky(RecordingConsumer):
        async def on_session(self, session):
            asyncio.get_running_loop().call_later(lasts.pop(0), script.last.end)

    script = ScriptedTransport()
    async with Shaky(transport=script, reconnect_delay=1):
        await asyncio.sleep(600)
    times = script.times("open")
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert [1, 2, 4, 9 + 8, 10 + 1, 2] == gaps


@pytest.mark.parametrize(
    "step", ["on_declare", "on_open"], ids=["at the topology", "at the session"]
)
@pytest.mark.parametrize("error", [NO, TopologyError("x-max-length differs")])
async def test_a_permanent_refusal_at_start_is_fatal(step, error):
    """Waiting would not help."""
    script = ScriptedTransport()
    setattr(script, step, raising(error))
    consumer = RecordingConsumer(transport=script)
    with pytest.raises(type(error), match=str(error)):
        await consumer.start()
    assert not consumer.is_running
    with pytest.raises(type(error)):
        await consumer.run()
    assert 2 == len(script.times("declare"))


async def test_one_worker_that_is_refused_ends_the_start_of_all():
    """Even if others consume already; they drain."""
    script = ScriptedTransport()

    async def second_is_refused():
        if len(script.times("open")) == 2:
            await asyncio.sleep(5)
            raise NO

    script.on_open = second_is_refused
    consumer = RecordingConsumer(transport=script, num_workers=3)
    with pytest.raises(AccessRefused):
        await consumer.start()
    assert not consumer.is_running
    assert 2 == script.steps.count("leave") == script.steps.count("cancel")


async def test_a_permanent_refusal_later_is_retried_and_logged_once(caplog, jitter):
    """The consumer is unhealthy meanwhile; an operator may fix the cause."""
    caplog.set_level(logging.INFO)
    script = ScriptedTransport()
    recorder = EventRecorder()
    async with RecordingConsumer(transport=script, observers=[recorder]) as consumer:
        script.on_declare = raising(NO)
        script.last.end(SessionLost("cut"))
        await asyncio.sleep(600)
        assert not consumer.is_healthy
        assert consumer.is_running
        [worker] = consumer.status().workers
        assert WorkerState.WAITING is worker.state
        assert "AccessRefused: wrong password" == worker.last_error
        assert len(script.times("declare")) > 10
        told = [record for record in caplog.records if "wrong password" in record.getMessage()]
        assert [logging.WARNING] == [record.levelno for record in told]
        script.on_declare = at_once
        await asyncio.sleep(31)
        assert consumer.is_healthy
    assert {SessionLost, AccessRefused} == {type(event.error) for event in recorder.of(Lost)}


async def test_each_loss_is_logged_even_if_it_repeats(caplog, jitter):
    """One line for each change: after a reconnection, the log starts again."""
    caplog.set_level(logging.INFO)
    script = ScriptedTransport()
    async with RecordingConsumer(transport=script):
        for _ in range(3):
            script.last.end(SessionLost("cut"))
            await asyncio.sleep(60)
    lines = [record.message.partition(" [")[0] for record in caplog.records]
    assert 3 == lines.count("not consuming")
    assert 4 == lines.count("consuming")


@pytest.mark.parametrize("step", ["on_declare", "on_open"])
async def test_a_stop_interrupts_connecting(step):
    """At once, whatever step it waits for."""
    script = ScriptedTransport()
    setattr(script, step, never)
    consumer = RecordingConsumer(transport=script)
    starting = asyncio.create_task(consumer.start())
    await asyncio.sleep(5)
    await consumer.stop()
    with pytest.raises(StartInterrupted):
        await starting
    assert 5 == asyncio.get_running_loop().time()
    assert not consumer.is_running


async def test_a_stop_interrupts_the_pause_between_two_attempts(jitter):
    """At once, however long the pause is."""
    script = ScriptedTransport()
    script.on_declare = raising(GONE)
    consumer = RecordingConsumer(transport=script, reconnect_delay=30)
    starting = asyncio.create_task(consumer.start())
    await asyncio.sleep(5)
    await consumer.stop()
    with pytest.raises(StartInterrupted):
        await starting
    assert 5 == asyncio.get_running_loop().time()


async def test_a_stop_leaves_no_connection_behind(rabbit):
    """Not even one that was being opened."""
    script = ScriptedTransport()
    left = []

    async def connecting():
        try:
            await never()
        finally:
            await asyncio.sleep(1)
            left.append("closed")

    script.on_declare = connecting
    consumer = RecordingConsumer(transport=script)
    starting = asyncio.create_task(consumer.start())
    await asyncio.sleep(5)
    await consumer.stop()
    assert ["closed"] == left
    with pytest.raises(StartInterrupted):
        await starting


FAULTS = {
    "cut": lambda rabbit: rabbit.broker.cut(),
    "consumer cancelled": lambda rabbit: rabbit.broker.cancel_consumers("jobs"),
    "queue deleted": lambda rabbit: rabbit.broker.delete_queue("jobs"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
async def test_a_worker_reconnects(rabbit, fault):
    """It declares again what is gone; `is_healthy` is false meanwhile."""
    recorder = EventRecorder()
    async with RecordingConsumer(
        transport=rabbit.transport, observers=[recorder], batch_size=1
    ) as consumer:
        rabbit.broker.faults.connect_fault = ConnectFault.UNREACHABLE
        fault(rabbit)
        await asyncio.sleep(5)
        assert not consumer.is_healthy
        rabbit.broker.faults.connect_fault = ConnectFault.NONE
        await asyncio.sleep(31)
        assert consumer.is_healthy
        rabbit.put(*numbered(3))
        await asyncio.sleep(1)
        assert numbered(3) == consumer.handled
    assert [1, 2] == [event.epoch for event in recorder.of(Connected)]
    lost = [event for event in recorder.of(Lost) if isinstance(event.error, SessionLost)]
    assert [1] == [event.epoch for event in lost]


async def test_workers_that_reconnect_together_declare_once():
    """They share one attempt."""
    script = ScriptedTransport()
    script.on_declare = lambda: asyncio.sleep(1)
    async with RecordingConsumer(transport=script, num_workers=4):
        assert 1 == len(script.times("declare"))
        assert 4 == len(script.times("open"))


async def test_a_declaration_that_fails_during_a_stop_is_not_logged(jitter):
    """Nothing awaits it any more, and asyncio does not complain either."""
    script = ScriptedTransport()

    async def in_vain():
        await asyncio.sleep(3)
        raise BrokerUnavailable("away")

    async with RecordingConsumer(taking(10), transport=script, batch_size=1):
        script.last.feed(b"0")
        await asyncio.sleep(1)
        script.on_declare = in_vain
        script.last.end()
        await asyncio.sleep(2)
    assert 2 == len(script.times("declare"))


async def test_a_session_that_ends_by_itself_is_lost(jitter):
    """The broker stops sending without an error."""
    script = ScriptedTransport()
    recorder = EventRecorder()
    async with RecordingConsumer(transport=script, observers=[recorder]):
        script.last.end()
        await asyncio.sleep(5)
        assert 2 == len(script.sessions)
    assert isinstance(recorder.of(Lost)[0].error, SessionLost)


async def test_a_wrong_password_is_fatal_on_the_memory_broker(rabbit):
    """The error has the broker's text."""
    rabbit.broker.faults.connect_fault = ConnectFault.WRONG_PASSWORD
    consumer = RecordingConsumer(transport=rabbit.transport)
    with pytest.raises(AccessRefused, match="ACCESS_REFUSED"):
        await consumer.run()


async def test_a_queue_with_other_arguments_is_fatal_and_named(rabbit):
    """The error says what to do about it."""
    consumer = RecordingConsumer(transport=rabbit.transport, queue_arguments={"x-max-length": 5})
    with pytest.raises(TopologyError, match=r"(?s)'jobs'.*x-max-length.*delete it"):
        await consumer.start()
    assert [] == rabbit.times(EventKind.CONSUMING)


async def test_an_exclusive_queue_is_deleted_with_its_session(rabbit):
    """It goes with the connection, and a new session declares its own."""
    async with RecordingConsumer(
        transport=rabbit.transport, queue_name="own", queue_exclusive=True, batch_size=1
    ) as consumer:
        rabbit.put(b"0", queue="own")
        await asyncio.sleep(1)
        rabbit.broker.cut()
        await asyncio.sleep(2)
        rabbit.put(b"1", queue="own")
        await asyncio.sleep(1)
        assert numbered(2) == consumer.handled
    assert "own" not in rabbit.broker.queues


@pytest.mark.parametrize("is_expired", [True, False])
async def test_a_session_that_expires_is_drained_and_replaced_at_once(is_expired, caplog):
    """What is being handled is finished and settled; any other end is a loss."""
    script = ScriptedTransport()
    recorder = EventRecorder()
    async with RecordingConsumer(
        taking(5), transport=script, observers=[recorder], batch_size=1
    ) as consumer:
        first = script.last
        first.feed(b"one")
        await asyncio.sleep(1)
        first.is_expired = is_expired
        first.end()
        await asyncio.sleep(4.5)
        assert is_expired == bool(first.settlements)
        if is_expired:
            assert [0, 5] == script.times("open")
        assert is_expired == (recorder.of(Lost) == [])
        assert is_expired == ("not consuming" not in caplog.text)
        assert consumer.is_healthy
