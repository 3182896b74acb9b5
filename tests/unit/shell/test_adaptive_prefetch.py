"""A consumer whose prefetch count isn't configured."""

from __future__ import annotations

import asyncio

import pytest

from aio_pika_batch.adapters.memory import EventKind
from aio_pika_batch.core.config_checks import SINGLE_ACTIVE
from tests.unit.shell.helpers import (
    ACK,
    NACK,
    REQUEUE,
    RecordingConsumer,
    SingleConsumer,
    ack,
    answering,
    numbered,
    taking,
)


def prefetches(consumer):
    """Return the prefetch count of each worker."""
    return [each.prefetch for each in consumer.status().workers]


async def until(condition):
    """Wait for a condition, for a minute at most."""
    for _ in range(6000):
        if condition():
            return
        await asyncio.sleep(0.01)
    pytest.fail("it didn't happen")


@pytest.mark.untraced
async def test_it_grows_while_messages_are_acked_quickly(rabbit):
    """And the broker delivers as many."""
    rabbit.put(*numbered(5000))
    async with RecordingConsumer(taking(0.01), transport=rabbit.transport) as consumer:
        await asyncio.sleep(0.9)
        assert [20] == prefetches(consumer)
        await asyncio.sleep(1)
        assert [490] == pytest.approx(prefetches(consumer), abs=15)
        assert len(rabbit.unsettled()) > 400
        await asyncio.sleep(10)
    assert numbered(5000) == consumer.handled
    assert 5000 == len(rabbit.broker.journal.of(EventKind.ACKED))


@pytest.mark.untraced
async def test_it_shrinks_when_the_handler_becomes_slow(rabbit):
    """After 10 s, so that other workers get what it can't handle soon."""
    rabbit.put(*numbered(5000))
    async with RecordingConsumer(taking(0.01), transport=rabbit.transport) as consumer:
        await asyncio.sleep(2)
        consumer.answer = taking(1)
        await asyncio.sleep(60)
        assert [20] == prefetches(consumer)
        await asyncio.sleep(60)
        assert len(rabbit.unsettled()) <= 20


@pytest.mark.untraced
async def test_on_a_queue_that_counts_deliveries_it_grows_too(rabbit):
    """The session pauses as it does for a message that may crash its process."""
    rabbit.declare("counted", **{"x-queue-type": "quorum"})
    rabbit.put(*numbered(5000), queue="counted")
    async with RecordingConsumer(
        taking(0.01), transport=rabbit.transport, queue_type="quorum", queue_name="counted"
    ):
        await asyncio.sleep(3)
        assert len(rabbit.unsettled("counted")) > 400


@pytest.mark.untraced
@pytest.mark.parametrize(
    "given",
    [
        {"prefetch_count": 30},
        {"queue_exclusive": True},
        {"queue_auto_delete": True},
        {"queue_arguments": {SINGLE_ACTIVE: True}},
        {"ordered_by_key": True},
        {"declare": False},
    ],
    ids=lambda given: next(iter(given)),
)
async def test_it_is_kept(rabbit, given):
    """If it is configured, and for consumers that must not be interrupted."""

    class Keyed(RecordingConsumer):
        def batch_key(self, message):
            return message.body[-1:]

    queue = "jobs" if "declare" in given else "other"
    answer = taking(0.01)
    base = Keyed if "ordered_by_key" in given else RecordingConsumer
    async with base(answer, transport=rabbit.transport, queue_name=queue, **given) as consumer:
        [before] = prefetches(consumer)
        rabbit.put(*numbered(5000), queue=queue)
        await asyncio.sleep(3)
        assert [before] == prefetches(consumer)
        assert 0 < len(rabbit.unsettled(queue)) <= before


@pytest.mark.untraced
@pytest.mark.parametrize("result", [NACK, REQUEUE])
async def test_messages_that_fail_do_not_make_it_grow(rabbit, result):
    """They are held until their retry, and count against it; or they are rejected."""
    rabbit.put(*numbered(3000))
    async with RecordingConsumer(
        taking(0.01, answering(*[result] * 10)), transport=rabbit.transport, requeue_delay=None
    ) as consumer:
        for _ in range(40):
            await asyncio.sleep(0.5)
            assert [20] == prefetches(consumer)


async def test_a_stop_while_it_changes_loses_nothing(rabbit):
    """The drain waits for the change."""
    rabbit.put(*numbered(3000))
    async with RecordingConsumer(taking(0.01), transport=rabbit.transport) as consumer:
        await until(lambda: prefetches(consumer) != [20])
    handled = {each.body for each in rabbit.broker.journal.of(EventKind.ACKED)}
    assert set(numbered(3000)) == handled | set(rabbit.waiting())
    assert set(consumer.handled) == handled


@pytest.mark.untraced
async def test_a_lost_session_begins_with_what_the_batches_need(rabbit):
    """It may have been lost because of what it prefetched."""
    rabbit.put(*numbered(5000))
    async with RecordingConsumer(taking(0.01), transport=rabbit.transport) as consumer:
        await asyncio.sleep(2)
        assert [20] != prefetches(consumer)
        rabbit.broker.cut()
        await asyncio.sleep(0.01)
        await until(lambda: consumer.is_healthy)
        assert [20] == prefetches(consumer)


@pytest.mark.parametrize("singly", [True, False])
async def test_no_worker_is_idle_while_another_one_holds_work(rabbit, singly):
    """Four workers, 400 messages, 50 ms for each of them."""
    rabbit.put(*numbered(400))

    async def handle(_):
        await asyncio.sleep(0.05)
        return ACK

    async def handle_batch(messages):
        for each in messages:
            yield await handle(each)

    consumer = (
        SingleConsumer(handle, transport=rabbit.transport, num_workers=4)
        if singly
        else RecordingConsumer(handle_batch, transport=rabbit.transport, num_workers=4)
    )
    async with consumer:
        while rabbit.waiting() or rabbit.unsettled():
            await asyncio.sleep(0.01)
            work = [(each.buffered + each.in_hand) * 0.05 for each in consumer.status().workers]
            assert min(work) > 0 or max(work) <= 1.0 + 1e-9
    assert 400 == len(rabbit.broker.journal.of(EventKind.ACKED))


@pytest.mark.untraced
async def test_fast_handlers_share_a_backlog(rabbit):
    """Handlers that await nothing, in two workers: none of them takes everything."""
    rabbit.put(*numbered(20_000))
    async with RecordingConsumer(ack, transport=rabbit.transport, num_workers=2) as consumer:
        await asyncio.sleep(5)
        assert max(prefetches(consumer)) <= 500
    assert 20_000 == len(consumer.handled)
