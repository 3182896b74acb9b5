"""The consumer holds failed messages before their retry, unless the settings say otherwise."""

from __future__ import annotations

import asyncio
import logging
from itertools import pairwise
from typing import Any

import pytest

from aio_pika_batch import DeadLetterReason, Requeue
from aio_pika_batch.adapters.memory import EventKind
from aio_pika_batch.core.message import Properties
from aio_pika_batch.observer import DeadLettered, Discarded, Requeued
from tests.unit.shell.helpers import (
    ACK,
    NACK,
    QUEUE,
    REQUEUE,
    EventRecorder,
    RecordingConsumer,
    ack,
    answering,
    bodies,
    first_then,
    numbered,
    taking,
)

HELD: dict[str, Any] = {"requeue_delay": None, "without_dead_letter": "retry"}
"""The defaults of the library."""


def outage(until: float) -> Any:
    """Return a handler whose database is away until a moment in loop time."""

    async def answer(messages):
        if asyncio.get_running_loop().time() < until:
            raise ConnectionError("the database is away")
        for _ in messages:
            yield ACK

    return answer


def gaps(consumer: RecordingConsumer) -> list[float]:
    """Return the seconds between one batch and the next."""
    return [round(later - earlier, 3) for earlier, later in pairwise(consumer.times)]


# --- delays --------------------------------------------------------------------------------


async def test_retries_are_held_for_one_two_and_four_seconds(rabbit):
    """No queue is declared for it, and the count is in the header as usual."""
    rabbit.put(b"0")
    async with RecordingConsumer(
        answering(REQUEUE),
        transport=rabbit.transport,
        batch_size=1,
        dead_letter_queue="dead",
        **HELD,
    ) as consumer:
        await asyncio.sleep(20)
    assert [1, 2, 4] == gaps(consumer)
    assert [0, 1, 2, 3] == [each.retry_count for each in consumer.messages]
    assert {QUEUE, "dead"} == set(rabbit.broker.queues)
    assert [b"0"] == rabbit.waiting("dead")


async def test_delays_grow_to_half_a_minute(rabbit):
    """And no further."""
    rabbit.put(b"0")
    async with RecordingConsumer(
        answering(REQUEUE),
        transport=rabbit.transport,
        batch_size=1,
        max_requeue_attempts=8,
        **HELD,
    ) as consumer:
        await asyncio.sleep(150)
    assert [1, 2, 4, 8, 16, 30, 30, 30] == gaps(consumer)[:8]


@pytest.mark.parametrize("given", [{"requeue_delay": 0}, HELD])
async def test_a_handler_can_ask_for_a_retry_at_once(rabbit, given):
    """`Requeue(delay=0)`; with `requeue_delay=0` every retry follows at once."""
    result = REQUEUE if given["requeue_delay"] == 0 else Requeue(delay=0)
    rabbit.put(b"0")
    async with RecordingConsumer(
        first_then(answering(result), ack), transport=rabbit.transport, batch_size=1, **given
    ) as consumer:
        await asyncio.sleep(1)
    assert [0] == gaps(consumer)


async def test_a_held_message_is_seen_in_the_status_and_in_one_log_line(rabbit, caplog):
    """And the consumer is healthy: it holds the message on purpose."""
    rabbit.put(*numbered(3))
    async with RecordingConsumer(
        first_then(answering(REQUEUE), ack),
        transport=rabbit.transport,
        batch_size=1,
        stuck_after=0.5,
        **HELD,
    ) as consumer:
        await asyncio.sleep(0.9)
        [status] = consumer.status().workers
        assert (1, None) == (status.held, status.oldest)
        assert consumer.is_healthy
        await asyncio.sleep(5)
        assert 0 == consumer.status().workers[0].held
    assert 1 == sum("the consumer holds them" in each for each in caplog.messages)


# --- outages -------------------------------------------------------------------------------


@pytest.mark.untraced
@pytest.mark.parametrize("seconds", [3, 30, 300])
@pytest.mark.parametrize("given", [{"dead_letter_queue": "dead"}, {}])
async def test_an_outage_loses_no_message(rabbit, seconds, given):
    """After a short one everything is handled. After a longer one each message is handled, or in
    the dead-letter queue as exhausted; without such a queue everything is handled in the end.
    """
    rabbit.put(*numbered(500))
    recorder = EventRecorder()
    async with RecordingConsumer(
        outage(seconds),
        transport=rabbit.transport,
        batch_size=10,
        batch_timeout=0.1,
        observers=[recorder],
        **HELD,
        **given,
    ) as consumer:
        await asyncio.sleep(seconds + 400)
    acked = {
        each.body
        for batch, at in zip(consumer.batches, consumer.times, strict=True)
        for each in [*map(_Body, batch)]
        if at >= seconds
    }
    dead = [each.message.body for each in recorder.of(DeadLettered)]
    assert {DeadLetterReason.EXHAUSTED} >= {each.reason for each in recorder.of(DeadLettered)}
    assert sorted(numbered(500)) == sorted(acked | set(dead))
    assert len(dead) == len(set(dead))
    assert [] == recorder.of(Discarded)
    assert [] == rabbit.broker.journal.of(EventKind.DROPPED)
    if seconds == 3 or not given:
        assert [] == dead


class _Body:
    """A body, by the name that messages have for it."""

    def __init__(self, body: bytes) -> None:
        self.body = body


async def test_an_outage_slows_the_intake_down(rabbit):
    """What is held takes up prefetch: few messages use up attempts."""
    rabbit.put(*numbered(500))
    async with RecordingConsumer(
        outage(1000), transport=rabbit.transport, batch_size=10, dead_letter_queue="d", **HELD
    ) as consumer:
        await asyncio.sleep(5)
        assert 100 <= len(consumer.handled) <= 120
        assert 20 == len(rabbit.unsettled())


@pytest.mark.untraced
@pytest.mark.parametrize(
    "given", [{"max_requeue_attempts": 1000}, {"dead_letter_queue": "dead"}, {}]
)
async def test_failing_messages_do_not_starve_the_others(rabbit, given):
    """Fifty of them among healthy traffic, with a prefetch of ten."""
    waits: list[float] = []
    published: dict[bytes, float] = {}
    loop = asyncio.get_running_loop()

    async def answer(messages):
        for message in messages:
            if message.body.startswith(b"poison"):
                yield REQUEUE
            else:
                waits.append(loop.time() - published[message.body])
                yield ACK

    async with RecordingConsumer(
        answer,
        transport=rabbit.transport,
        batch_size=10,
        batch_timeout=0.1,
        prefetch_count=10,
        **HELD,
        **given,
    ):
        for number in range(1000):
            published[b"%d" % number] = loop.time()
            rabbit.put(b"%d" % number)
            if number % 10 == 0 and number < 500:
                rabbit.put(b"poison %d" % number)
            await asyncio.sleep(0.1)
        await asyncio.sleep(100)
    assert 1000 == len(waits)
    assert sorted(waits)[989] < 10


# --- no destination for dead letters -------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        {"max_requeue_attempts": 0},
        {"max_requeue_attempts": 0, "requeue_delay": 0},
        {"unhandled_exception_action": "NACK"},
    ],
)
async def test_without_a_destination_a_message_that_failed_for_good_is_retried(
    rabbit, caplog, given
):
    """With growing delays, whatever `requeue_delay` is; one ERROR says how to change that."""

    async def answer(messages):
        raise ConnectionError
        yield ACK

    rabbit.put(b"0")
    async with RecordingConsumer(
        answer,
        transport=rabbit.transport,
        batch_size=1,
        requeue_delay_max=10,
        **HELD | given,
    ) as consumer:
        await asyncio.sleep(50)
    assert [1, 2, 4, 8, 10, 10] == gaps(consumer)[:6]
    errors = [
        each
        for each in caplog.messages
        if "no dead-letter destination is known: they are retried" in each
    ]
    assert 1 == len([each for each in errors if "messages=1 " in each])
    assert "set dead_letter_queue" in errors[0]


async def test_a_message_that_cannot_be_decoded_is_not_discarded_either(rabbit):
    """No setting asked for it. A NACK of the handler is something else."""
    recorder = EventRecorder()

    async def answer(messages):
        for message in messages:
            message.json()
            yield ACK

    rabbit.put(b"no json")
    async with RecordingConsumer(
        answer, transport=rabbit.transport, batch_size=1, observers=[recorder], **HELD
    ) as consumer:
        await asyncio.sleep(10)
    assert [1, 2, 4] == gaps(consumer)
    assert [] == recorder.of(Discarded)
    assert [] == rabbit.broker.journal.of(EventKind.DROPPED)


async def test_without_dead_letter_reject_leaves_it_to_the_broker(rabbit):
    """As before: the broker discards the message, and that is counted."""
    recorder = EventRecorder()
    rabbit.put(b"0")
    async with RecordingConsumer(
        answering(REQUEUE),
        transport=rabbit.transport,
        batch_size=1,
        max_requeue_attempts=0,
        without_dead_letter="reject",
        requeue_delay=None,
        observers=[recorder],
    ):
        await asyncio.sleep(1)
    assert [[b"0"]] == [bodies(each.messages) for each in recorder.of(Discarded)]


async def test_discards_are_logged_once_in_a_while(rabbit, caplog):
    """A burst of them is two lines: the first, and how many there were."""
    rabbit.put(*numbered(100))
    async with RecordingConsumer(
        taking(0, answering(*[NACK] * 10)), transport=rabbit.transport, batch_size=10, **HELD
    ):
        await asyncio.sleep(100)
    lines = [each for each in caplog.records if "are rejected without" in each.getMessage()]
    assert [10, 90] == [each.messages for each in lines]
    assert {logging.WARNING} == {each.levelno for each in lines}


# --- ends of sessions ----------------------------------------------------------------------


async def test_a_stop_returns_held_messages(rabbit):
    """Unsettled, uncounted; nothing is published, and it doesn't take longer."""
    rabbit.put(*numbered(3))
    async with RecordingConsumer(
        answering(REQUEUE), transport=rabbit.transport, batch_size=3, **HELD
    ):
        await asyncio.sleep(0.5)
        before = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - before < 1
    assert numbered(3) == sorted(rabbit.waiting())
    assert [] == rabbit.times(EventKind.PUBLISHED)


async def test_a_lost_connection_ends_the_holds(rabbit, jitter):
    """The broker delivers the messages again, and no copy is published for them."""
    rabbit.put(b"0")
    async with RecordingConsumer(
        first_then(answering(REQUEUE), ack), transport=rabbit.transport, batch_size=1, **HELD
    ) as consumer:
        await asyncio.sleep(0.5)
        rabbit.broker.cut()
        await asyncio.sleep(20)
    assert [0, 0] == [each.retry_count for each in consumer.messages]
    assert [] == rabbit.times(EventKind.PUBLISHED)


# --- long delays ---------------------------------------------------------------------------


async def test_no_hold_is_longer_than_a_third_of_the_consumer_timeout(rabbit):
    """A longer delay goes on after a copy that doesn't count as an attempt."""
    recorder = EventRecorder()
    rabbit.declare(f"{QUEUE}.retry.64000")  # with other arguments, so it can't be used
    rabbit.put(b"0")
    async with RecordingConsumer(
        first_then(answering(Requeue(delay=64)), ack),
        transport=rabbit.transport,
        batch_size=1,
        observers=[recorder],
        consumer_arguments={"x-consumer-timeout": 60_000},
        **HELD,
    ) as consumer:
        await asyncio.sleep(200)
    [gap] = gaps(consumer)
    assert 64 <= gap < 65
    assert [0, 1] == [each.retry_count for each in consumer.messages]
    times = rabbit.times(EventKind.PUBLISHED)
    assert [20, 20, 20, 4] == [round(b - a, 1) for a, b in pairwise([consumer.times[0], *times])]
    assert "x-retry-remaining-delay" not in consumer.messages[-1].headers


@pytest.mark.parametrize("foreign", ["tomorrow", -5, 10**15, None])
async def test_a_foreign_header_delays_nothing(rabbit, foreign):
    """A value that this library would never write is ignored."""
    headers = {"x-retry-remaining-delay": foreign}
    rabbit.put(b"0", properties=Properties(headers=headers))
    async with RecordingConsumer(
        ack,
        transport=rabbit.transport,
        batch_size=1,
        consumer_arguments={"x-consumer-timeout": 60_000},
        **HELD,
    ) as consumer:
        await asyncio.sleep(1)
    assert [b"0"] == consumer.handled


async def test_observers_are_notified_when_retries_are_published(rabbit):
    """Not while the message is held."""
    recorder = EventRecorder()
    rabbit.put(b"0")
    async with RecordingConsumer(
        first_then(answering(REQUEUE), ack),
        transport=rabbit.transport,
        batch_size=1,
        observers=[recorder],
        **HELD,
    ):
        await asyncio.sleep(0.9)
        assert [] == recorder.of(Requeued)
        await asyncio.sleep(1)
        assert [1] == [each.retry_count for each in recorder.of(Requeued)]
