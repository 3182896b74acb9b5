"""`is_healthy` and `status` of a consumer."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict

import pytest

from aio_pika_batch import StartInterrupted, WorkerState
from tests.unit.shell.helpers import (
    REQUEUE,
    RecordingConsumer,
    ack,
    answering,
    first_then,
    numbered,
    taking,
)
from tests.unit.shell.scripted_transport import ScriptedTransport, never


async def test_a_consumer_is_healthy_while_every_worker_consumes():
    """A single worker that does not consume makes it unhealthy."""
    script = ScriptedTransport()
    async with RecordingConsumer(transport=script, num_workers=3) as consumer:
        assert consumer.is_healthy
        script.on_open = never
        script.sessions[1].end()
        await asyncio.sleep(1)
        assert not consumer.is_healthy
        states = [worker.state for worker in consumer.status().workers]
        assert 2 == states.count(WorkerState.CONSUMING)


@pytest.mark.parametrize(
    ("given", "limit"),
    [({"stuck_after": 40}, 40), ({"process_timeout": 100}, 200), ({}, 15 * 60)],
    ids=["as set", "twice the time-out", "a quarter of an hour"],
)
async def test_a_consumer_that_is_stuck_is_unhealthy(rabbit, given, limit):
    """A message stays unsettled for too long, since the handler, broker or publisher hangs."""
    rabbit.put(b"0")
    given = {"process_timeout": None} | given
    handler = taking(limit + 50)
    if given["process_timeout"]:

        async def handler(messages):  # swallows its cancellation for a while
            ends = asyncio.get_running_loop().time() + limit + 50
            while (left := ends - asyncio.get_running_loop().time()) > 0:
                try:
                    await asyncio.sleep(left)
                except asyncio.CancelledError:
                    continue
            for _ in messages:
                yield REQUEUE

    consumer = RecordingConsumer(
        first_then(handler, ack), transport=rabbit.transport, batch_size=1, **given
    )
    async with consumer:
        await asyncio.sleep(limit - 1)
        assert consumer.is_healthy
        await asyncio.sleep(2)
        assert not consumer.is_healthy
        assert limit < consumer.status().workers[0].oldest
        await asyncio.sleep(60)
        assert consumer.is_healthy


async def test_messages_that_wait_for_batch_or_settlement_count_as_stuck_too():
    """The age counts from the delivery of the message."""
    script = ScriptedTransport()
    script.on_settle = never
    consumer = RecordingConsumer(
        taking(10), transport=script, batch_size=2, batch_timeout=10, stuck_after=25
    )
    async with consumer:
        script.last.feed(b"0")
        for expected in (5, 15, 24):
            await asyncio.sleep(expected - asyncio.get_running_loop().time())
            [worker] = consumer.status().workers
            assert expected == worker.oldest
            assert consumer.is_healthy
        await asyncio.sleep(2)
        assert not consumer.is_healthy


async def test_status_shows_the_messages_of_each_worker(rabbit):
    """A plain snapshot that can be written as JSON, and contains no secret."""
    rabbit.put(*numbered(14))
    consumer = RecordingConsumer(
        taking(10), transport=rabbit.transport, batch_size=5, concurrency=2
    )
    async with consumer:
        await asyncio.sleep(3)
        told = consumer.status()
        assert ("RecordingConsumer", "jobs", True, True) == (
            told.consumer,
            told.queue,
            told.is_running,
            told.is_healthy,
        )
        [worker] = told.workers
        assert (0, WorkerState.CONSUMING, 1) == (worker.index, worker.state, worker.epoch)
        assert (4, 10, 0) == (worker.buffered, worker.in_hand, worker.held)
        assert (3, 3, None) == (worker.oldest, worker.last_progress, worker.last_error)
        json.dumps(asdict(told), default=str)
        await asyncio.sleep(30)
        assert told.workers[0] is worker
        assert (0, None) == (
            consumer.status().workers[0].in_hand,
            consumer.status().workers[0].oldest,
        )


async def test_status_before_the_first_session():
    """The worker is connecting, and has made no progress."""
    script = ScriptedTransport()
    script.on_declare = never
    consumer = RecordingConsumer(transport=script)
    starting = asyncio.create_task(consumer.start())
    await asyncio.sleep(1)
    [worker] = consumer.status().workers
    assert (WorkerState.CONNECTING, 0, None) == (worker.state, worker.epoch, worker.last_progress)
    await consumer.stop()
    with pytest.raises(StartInterrupted):
        await starting


async def test_status_shows_held_originals():
    """Those whose copies are not confirmed yet."""
    script = ScriptedTransport()
    script.outcomes = [None] * 2
    async with RecordingConsumer(
        answering(REQUEUE, REQUEUE), transport=script, batch_size=2
    ) as consumer:
        script.last.feed(*numbered(2))
        await asyncio.sleep(0.01)
        assert 2 == consumer.status().workers[0].held
        await asyncio.sleep(0.1)
        assert 0.1 < consumer.status().workers[0].oldest


async def test_a_consumer_that_drains_is_not_healthy(rabbit):
    """It takes no more messages."""
    rabbit.put(*numbered(3))
    consumer = RecordingConsumer(taking(10), transport=rabbit.transport, batch_size=3)
    await consumer.start()
    await asyncio.sleep(1)
    consumer.request_stop()
    assert consumer.is_running
    assert not consumer.is_healthy
    assert WorkerState.DRAINING is consumer.status().workers[0].state
    await consumer.stop()
