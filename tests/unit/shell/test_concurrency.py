"""How many handlers, batches and workers run concurrently."""

from __future__ import annotations

import asyncio

import pytest

from aio_pika_batch.adapters.memory import EventKind
from tests.unit.shell.helpers import ACK, RecordingConsumer, SingleConsumer, ack, numbered, taking
from tests.unit.shell.scripted_transport import ScriptedTransport, never


@pytest.mark.parametrize("concurrency", [1, 2, 4])
async def test_at_most_concurrency_handlers_run_at_once(rabbit, concurrency):
    """And all of these, if there are enough messages."""
    running, most = 0, []

    async def answer(messages):
        nonlocal running
        running += 1
        most.append(running)
        await asyncio.sleep(10)
        running -= 1
        for _ in messages:
            yield ACK

    rabbit.put(*numbered(16))
    async with RecordingConsumer(
        answer, transport=rabbit.transport, batch_size=2, concurrency=concurrency
    ) as consumer:
        await asyncio.sleep(100)
    assert concurrency == max(most)
    assert [10.0 * (n // concurrency) for n in range(8)] == consumer.times


async def test_a_quick_batch_is_settled_while_a_slow_one_is_handled(rabbit):
    """No batch waits for the handler of another batch."""

    async def answer(messages):
        if messages[0].body == b"0":
            await asyncio.sleep(10)
        for _ in messages:
            yield ACK

    rabbit.put(*numbered(4))
    async with RecordingConsumer(answer, transport=rabbit.transport, batch_size=2, concurrency=2):
        await asyncio.sleep(1)
        assert [b"0", b"1"] == rabbit.unsettled()
        assert [0, 0] == rabbit.times(EventKind.ACKED)


async def test_the_next_batch_starts_while_one_is_being_settled():
    """A slot is free as soon as its handler is done, before its batch is settled."""
    script = ScriptedTransport()
    script.on_settle = lambda *_: asyncio.sleep(5)
    async with RecordingConsumer(taking(1), transport=script, batch_size=2) as consumer:
        script.last.feed(*numbered(4))
        await asyncio.sleep(10)
    assert [0, 1] == consumer.times


async def test_single_messages_run_concurrently(rabbit):
    """`concurrency` calls of `Consumer.process_message` run at once; by default one."""
    for concurrency, seconds in ((1, 30), (3, 10)):
        rabbit.put(*numbered(3))

        async def answer(message):
            await asyncio.sleep(10)
            return ACK

        began = asyncio.get_running_loop().time()
        async with SingleConsumer(answer, transport=rabbit.transport, concurrency=concurrency):
            await asyncio.sleep(seconds - 1)
            assert rabbit.unsettled()
            await asyncio.sleep(2)
            assert [] == rabbit.unsettled()
        assert seconds + began == rabbit.times(EventKind.ACKED)[-1]


async def test_workers_share_the_queue_and_have_their_own_connections(rabbit):
    """`num_workers` consumers, with one connection each."""
    async with RecordingConsumer(
        ack, transport=rabbit.transport, num_workers=3, prefetch_count=2
    ) as consumer:
        assert 3 == len(set(rabbit.broker.consumers("jobs")))
        assert 3 == len(rabbit.broker.connections)
        assert [0, 1, 2] == [worker.index for worker in consumer.status().workers]
        consumer.answer = taking(60)
        rabbit.put(*numbered(9))
        await asyncio.sleep(6)
        assert [2, 2, 2] == [worker.in_hand for worker in consumer.status().workers]
    assert [] == rabbit.broker.connections


async def test_a_reconnecting_worker_does_not_affect_others():
    """The others continue to consume."""
    script = ScriptedTransport()
    async with RecordingConsumer(transport=script, num_workers=2, batch_size=1) as consumer:
        first, second = script.sessions
        script.on_open = never
        first.end()
        await asyncio.sleep(5)
        second.feed(b"0")
        await asyncio.sleep(0)
        assert [2, 1] == [worker.epoch for worker in consumer.status().workers]
        assert not consumer.is_healthy
        await asyncio.sleep(1)
        assert [b"0"] == consumer.handled
    assert [[("ack", (1,))]] == script.details("settle")
