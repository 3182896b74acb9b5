"""Consumers inside other programs: a broker that is away, and stopping from other threads."""

from __future__ import annotations

import asyncio
import logging

import pytest

from aio_pika_batch import AccessRefused, ConfigurationError
from aio_pika_batch.adapters.memory import ConnectFault
from tests.unit.shell.helpers import RecordingConsumer, ack, numbered, taking
from tests.unit.shell.scripted_transport import ScriptedTransport, never


@pytest.mark.parametrize("workers", [1, 3])
async def test_a_block_begins_although_the_broker_is_away(rabbit, workers):
    """At once; the consumer connects when the broker comes."""
    consumer = RecordingConsumer(transport=rabbit.transport, num_workers=workers)
    with rabbit.down():
        async with consumer:
            assert 0 == asyncio.get_running_loop().time()
            assert (True, False) == (consumer.is_running, consumer.is_healthy)
        assert 1 > asyncio.get_running_loop().time()
        assert not consumer.is_running
    async with consumer:
        rabbit.put(*numbered(3))
        await rabbit.settled()
        assert consumer.is_healthy
    assert [] == rabbit.waiting()


async def test_a_block_that_began_without_a_broker_consumes_later(rabbit):
    """Also if the broker refuses at first: it may be about to be configured."""
    rabbit.broker.faults.connect_fault = ConnectFault.UNREACHABLE
    async with RecordingConsumer(transport=rabbit.transport) as consumer:
        rabbit.broker.faults.connect_fault = ConnectFault.WRONG_PASSWORD
        await asyncio.sleep(60)
        assert not consumer.is_healthy
        rabbit.broker.faults.connect_fault = ConnectFault.NONE
        await asyncio.sleep(60)
        rabbit.put(*numbered(3))
        await rabbit.settled()
        assert consumer.is_healthy
    assert numbered(3) == consumer.handled


async def test_a_block_waits_for_a_broker_that_is_there(rabbit):
    """So that its queue is declared when the body of the block begins."""
    async with RecordingConsumer(transport=rabbit.transport) as consumer:
        assert consumer.is_healthy


async def test_a_block_does_not_begin_with_a_wrong_password(rabbit):
    """What will not go away is raised."""
    rabbit.broker.faults.connect_fault = ConnectFault.WRONG_PASSWORD
    with pytest.raises(AccessRefused):
        await RecordingConsumer(transport=rabbit.transport).__aenter__()


async def test_a_block_does_not_wait_long_for_a_broker_that_does_not_answer():
    """The application has other things to do."""
    script = ScriptedTransport()
    script.on_declare = never
    async with RecordingConsumer(transport=script) as consumer:
        assert 2 == asyncio.get_running_loop().time()
        assert not consumer.is_healthy
    assert 2 == asyncio.get_running_loop().time()


async def test_start_need_not_wait(rabbit):
    """It runs `on_start`, and connects in the background."""
    events = []

    class Hooked(RecordingConsumer):
        async def on_start(self):
            events.append("on_start")

    consumer = Hooked(transport=rabbit.transport)
    with rabbit.down():
        await consumer.start(wait=False)
        assert (["on_start"], True) == (events, consumer.is_running)
        with pytest.raises(ConfigurationError, match="is running already"):
            await consumer.start(wait=False)
    rabbit.declare()
    rabbit.put(*numbered(3))
    await asyncio.sleep(100)
    assert numbered(3) == consumer.handled
    await consumer.stop()


@pytest.mark.parametrize("way", ["request_stop", "stop"])
async def test_another_thread_can_stop_a_consumer(rabbit, way):
    """It drains on its own loop; `stop` waits for it."""
    # The loop then refuses calls of other threads that aren't safe.
    asyncio.get_running_loop().set_debug(True)
    rabbit.put(*numbered(3))
    # While a thread is busy, no virtual time passes.
    handler = taking(5) if way == "request_stop" else ack
    consumer = RecordingConsumer(handler, transport=rabbit.transport, batch_size=3)
    running = asyncio.create_task(consumer.run())
    await asyncio.sleep(1)

    def work():
        if way == "request_stop":
            consumer.request_stop()
            return
        with asyncio.Runner() as runner:
            runner.run(consumer.stop())
        assert not consumer.is_running

    await asyncio.to_thread(work)
    await running
    assert [] == rabbit.waiting()
    assert numbered(3) == consumer.handled
    consumer.request_stop()
    await consumer.stop()


async def test_a_refusal_in_the_background_is_logged(rabbit, caplog):
    """No call waits for it any more."""
    rabbit.broker.faults.connect_fault = ConnectFault.WRONG_PASSWORD
    consumer = RecordingConsumer(transport=rabbit.transport)
    await consumer.start(wait=False)
    await asyncio.sleep(10)
    assert consumer.is_running
    assert not consumer.is_healthy
    assert [logging.WARNING] == [
        each.levelno for each in caplog.records if "not consuming" in each.getMessage()
    ]
    await consumer.stop()
