"""When batches are cut, and which messages they contain."""

from __future__ import annotations

import asyncio

import pytest

from aio_pika_batch import Trigger
from aio_pika_batch.observer import BatchCut
from tests.unit.shell.helpers import EventRecorder, RecordingConsumer, numbered, taking


async def test_a_full_batch_is_handed_over_at_once(rabbit):
    """`batch_size` messages do not wait; the remaining ones wait for their own timeout."""
    rabbit.put(*numbered(7))
    recorder = EventRecorder()
    async with RecordingConsumer(
        transport=rabbit.transport, observers=[recorder], batch_size=3, batch_timeout=5
    ) as consumer:
        await asyncio.sleep(1)
        assert [numbered(3), numbered(3, 3)] == consumer.batches
        await asyncio.sleep(5)
        assert [numbered(3), numbered(3, 3), [b"6"]] == consumer.batches
    assert [0, 0, 5] == consumer.times
    triggers = [event.trigger for event in recorder.of(BatchCut)]
    assert [Trigger.SIZE, Trigger.SIZE, Trigger.TIMEOUT] == triggers
    assert [0, 0, 5] == [event.waited for event in recorder.of(BatchCut)]


async def test_the_age_of_a_batch_counts_from_its_first_message(rabbit):
    """Not from the start or the last batch, and a later message does not reset it."""
    async with RecordingConsumer(
        transport=rabbit.transport, batch_size=3, batch_timeout=5
    ) as consumer:
        await asyncio.sleep(7)
        rabbit.put(*numbered(3))
        await asyncio.sleep(4)
        rabbit.put(b"3")
        await asyncio.sleep(3)
        rabbit.put(b"4")
        await asyncio.sleep(1.5)
        assert [numbered(3)] == consumer.batches
        await asyncio.sleep(1)
    assert [numbered(3), [b"3", b"4"]] == consumer.batches
    assert [7, 16] == consumer.times


async def test_a_batch_grows_while_no_handler_slot_is_free(rabbit):
    """It is cut when a slot is free, with all messages so far, even if it was due long before."""
    recorder = EventRecorder()
    consumer = RecordingConsumer(
        taking(10), transport=rabbit.transport, observers=[recorder], batch_size=5, batch_timeout=1
    )
    async with consumer:
        rabbit.put(b"0")
        await asyncio.sleep(2)
        rabbit.put(b"1")
        await asyncio.sleep(3)
        rabbit.put(b"2")
        await asyncio.sleep(4)
        rabbit.put(b"3")
        await asyncio.sleep(20)
    assert [[b"0"], [b"1", b"2", b"3"]] == consumer.batches
    assert [1, 11] == consumer.times
    assert [1, 9] == [event.waited for event in recorder.of(BatchCut)]


async def test_a_batch_is_cut_when_prefetch_is_exhausted(rabbit):
    """A batch that can never be full does not wait for its timeout."""
    rabbit.put(*numbered(8))
    recorder = EventRecorder()
    async with RecordingConsumer(
        transport=rabbit.transport,
        observers=[recorder],
        batch_size=100,
        prefetch_count=4,
        batch_timeout=60,
    ) as consumer:
        await asyncio.sleep(1)
        assert [numbered(4), numbered(4, 4)] == consumer.batches
        assert {Trigger.PREFETCH} == {event.trigger for event in recorder.of(BatchCut)}


async def test_messages_in_handlers_count_against_prefetch(rabbit):
    """Two handlers, a prefetch of six, batches of four: the second gets the remaining two."""
    rabbit.put(*numbered(8))
    async with RecordingConsumer(
        taking(10),
        transport=rabbit.transport,
        batch_size=4,
        prefetch_count=6,
        batch_timeout=60,
        concurrency=2,
    ) as consumer:
        await asyncio.sleep(1)
        assert [numbered(4), numbered(2, 4)] == consumer.batches


async def test_without_a_prefetch_limit_only_the_timeout_cuts_a_short_batch(rabbit):
    """`prefetch_count=0` means no limit, and can never be exhausted."""
    rabbit.put(*numbered(20))
    async with RecordingConsumer(
        transport=rabbit.transport, batch_size=100, prefetch_count=0, batch_timeout=60
    ) as consumer:
        await asyncio.sleep(59)
        assert [] == consumer.batches
        await asyncio.sleep(2)
        assert [numbered(20)] == consumer.batches


async def test_the_default_prefetch_lets_one_batch_fill_while_others_are_handled(rabbit):
    """It is `batch_size × (concurrency + 1)`."""
    rabbit.put(*numbered(100))
    async with RecordingConsumer(
        taking(10), transport=rabbit.transport, batch_size=20, concurrency=2
    ) as consumer:
        await asyncio.sleep(1)
        assert numbered(60) == rabbit.unsettled()
        assert 40 == consumer.status().workers[0].in_hand
        assert 20 == consumer.status().workers[0].buffered


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
async def test_messages_come_in_order_and_once(rabbit, size):
    """Whatever the size of the batches."""
    rabbit.put(*numbered(17))
    async with RecordingConsumer(transport=rabbit.transport, batch_size=size) as consumer:
        await asyncio.sleep(6)
    assert numbered(17) == consumer.handled
    assert all(0 < len(batch) <= size for batch in consumer.batches)


async def test_a_stop_hands_over_the_buffered_messages(rabbit):
    """A batch that can no longer grow does not wait for its timeout."""
    recorder = EventRecorder()
    rabbit.put(*numbered(3))
    consumer = RecordingConsumer(transport=rabbit.transport, observers=[recorder], batch_timeout=60)
    async with consumer:
        await asyncio.sleep(1)
        assert [] == consumer.batches
    assert [numbered(3)] == consumer.batches
    assert [1] == consumer.times
    assert [Trigger.DRAIN] == [event.trigger for event in recorder.of(BatchCut)]
    assert [] == rabbit.waiting()
