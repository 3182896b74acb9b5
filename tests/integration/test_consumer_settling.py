"""Settle modes and isolation on RabbitMQ, with classic and quorum queues.

The unit tests check the same on the in-memory broker.
"""

from __future__ import annotations

import asyncio
import math

import pytest

from aio_pika_batch import BatchConsumer, BatchConsumerSettings, MessageResult
from tests.integration.helpers import (
    QUEUE_TYPES,
    Recorder,
    declare_dead_letters,
    holds,
    publish,
    take_all,
    until,
)

ACK, NACK, REQUEUE = MessageResult.ACK, MessageResult.NACK, MessageResult.REQUEUE

pytestmark = pytest.mark.usefixtures("on_both_wires")


class BadRow(ValueError):
    """The error of a bulk write with an invalid row."""


class RecordingConsumer(BatchConsumer):
    """Runs the test's handler, and records what it gets.

    Attributes:
        batches: The bodies of each run.
        retries: The retry count of each message.
    """

    def __init__(self, handler, url, name, **given) -> None:
        given = {"batch_timeout": 0.5, **given}
        self.recorder = Recorder()
        super().__init__(
            BatchConsumerSettings(url=url, queue_name=name, **given), observers=[self.recorder]
        )
        self.handler = handler
        self.batches = []
        self.retries = []

    def process_messages(self, messages):
        self.batches.append([message.body for message in messages])
        self.retries.extend(message.retry_count for message in messages)
        return self.handler(messages)


def numbered(count):
    """Return bodies b"0", b"1", …."""
    return [b"%d" % number for number in range(count)]


async def ack(messages):
    """ACK every message."""
    for _ in messages:
        yield ACK


def bulk(*bad):
    """Return a handler that writes its batch at once, or not at all."""

    async def write(messages):
        found = {message.body for message in messages} & {*bad}
        if found:
            raise BadRow(f"{len(found)} bad rows")
        for _ in messages:
            yield ACK

    return write


@QUEUE_TYPES
async def test_only_the_failing_messages_are_dead_lettered(
    channel, amqp_url, name, queue_type
) -> None:
    """In few runs; all others are acked, and nothing is left."""
    dlx, dlq = await declare_dead_letters(channel, name)
    bad = (b"7", b"50", b"99")
    consumer = RecordingConsumer(
        bulk(*bad),
        amqp_url,
        name,
        batch_size=100,
        batch_timeout=5,
        queue_type=queue_type,
        isolate_failures=True,
        dead_letter_exchange=dlx,
        unhandled_exception_action=NACK,
    )
    async with consumer:
        await publish(channel, numbered(100), routing_key=name)
        await until(lambda: consumer.recorder.results["ACK"] == 97)
        await until(lambda: len(consumer.recorder.dead) == 3)
    await holds(amqp_url, name, 0)
    dead = await take_all(channel, dlq, 3)
    assert [*bad] == [letter.body for letter in dead]
    assert {("handler-error", "1 bad rows")} == {
        (letter.headers["x-dead-letter-reason"], letter.headers["x-exception-message"])
        for letter in dead
    }
    runs = consumer.recorder.triggers
    assert {"isolate"} == {*runs[1:]}
    assert len(consumer.batches) == len(runs) <= 1 + 2 * 3 * math.ceil(math.log2(100))


@QUEUE_TYPES
async def test_yielded_results_are_settled_while_the_handler_runs(
    channel, amqp_url, name, proxy, queue_type
) -> None:
    """A cut connection then repeats only messages that were not yielded; copies exist once."""
    dlx, dlq = await declare_dead_letters(channel, name)
    held = asyncio.Event()

    async def answer(messages):
        for message, result in zip(messages, (ACK, NACK, REQUEUE, ACK), strict=False):
            yield message, result
        await held.wait()

    consumer = RecordingConsumer(
        answer,
        proxy.url(amqp_url),
        name,
        batch_size=6,
        batch_timeout=2,
        queue_type=queue_type,
        settle="yield",
        settle_interval=0.2,
        dead_letter_exchange=dlx,
        reconnect_delay_max=1,
    )
    results = consumer.recorder.results
    async with consumer:
        await publish(channel, numbered(6), routing_key=name)
        await until(lambda: results.total() == 4)
        assert {"ACK": 2, "NACK": 1, "REQUEUE": 1} == results
        assert 1 == len(consumer.batches)
        await proxy.refuse()
        proxy.cut()
        # The two that were not yielded, and the copy for another attempt.
        await holds(amqp_url, name, 3)
        consumer.handler = ack
        held.set()
        await proxy.refuse(False)
        await until(lambda: results["ACK"] == 5)
    assert 2 == consumer.recorder.stale
    assert [b"2", b"4", b"5"] == sorted(body for batch in consumer.batches[1:] for body in batch)
    assert [b"1"] == [letter.body for letter in await take_all(channel, dlq, 1)]


async def test_by_default_nothing_is_settled_before_the_handler_has_ended(
    channel, amqp_url, name, proxy
) -> None:
    """Then a cut connection repeats the whole batch."""
    held, yielded = asyncio.Event(), asyncio.Event()

    async def answer(messages):
        for _ in messages:
            yield ACK
        yielded.set()
        await held.wait()

    consumer = RecordingConsumer(
        answer, proxy.url(amqp_url), name, batch_size=6, batch_timeout=10, reconnect_delay_max=1
    )
    async with consumer:
        await publish(channel, numbered(6), routing_key=name)
        await yielded.wait()
        await proxy.refuse()
        proxy.cut()
        await holds(amqp_url, name, 6)
        consumer.handler = ack
        held.set()
        await proxy.refuse(False)
        await until(lambda: consumer.recorder.results["ACK"] == 6)
    assert 6 == consumer.recorder.stale


async def test_many_yields_are_settled_in_order_and_once(channel, amqp_url, name) -> None:
    """In many intervals, from several concurrent handlers, with copies in between."""

    async def answer(messages):
        for message in messages:
            await asyncio.sleep(0.002)
            again = int(message.body) % 7 == 0 and not message.retry_count
            yield REQUEUE if again else ACK

    consumer = RecordingConsumer(
        answer, amqp_url, name, batch_size=40, concurrency=3, settle="yield", settle_interval=0.02
    )
    async with consumer:
        await publish(channel, numbered(400), routing_key=name)
        await until(lambda: consumer.recorder.results["ACK"] == 400)
    await holds(amqp_url, name, 0)
    assert 58 == consumer.recorder.results["REQUEUE"]
    assert 1 == len(consumer.recorder.epochs)
    assert 0 == consumer.recorder.stale


@QUEUE_TYPES
async def test_a_commit_that_fails_voids_the_acks_of_an_atomic_batch(
    channel, amqp_url, name, queue_type
) -> None:
    """All messages are requeued; the second attempt commits."""
    failures = [BadRow("deadlock detected")]

    async def answer(messages):
        for _ in messages:
            yield ACK
        if failures:
            raise failures.pop()

    consumer = RecordingConsumer(
        answer,
        amqp_url,
        name,
        batch_size=10,
        batch_timeout=10,
        queue_type=queue_type,
        settle="atomic",
    )
    async with consumer:
        await publish(channel, numbered(10), routing_key=name)
        await until(lambda: consumer.recorder.results["ACK"] == 10)
    await holds(amqp_url, name, 0)
    assert {"REQUEUE": 10, "ACK": 10} == consumer.recorder.results
    assert [numbered(10)] * 2 == consumer.batches
    assert [0] * 10 + [1] * 10 == consumer.retries


async def test_a_timeout_keeps_the_results_of_isolation(channel, amqp_url, name) -> None:
    """The limit is for all runs together: messages that succeeded by then are acked."""
    dlx, dlq = await declare_dead_letters(channel, name)

    async def answer(messages):
        bodies = {message.body for message in messages}
        if len(bodies) == 4:
            raise BadRow
        if b"3" in bodies:
            await asyncio.sleep(60)
        for _ in messages:
            yield ACK

    consumer = RecordingConsumer(
        answer,
        amqp_url,
        name,
        batch_size=4,
        batch_timeout=5,
        isolate_failures=True,
        process_timeout=1.5,
        dead_letter_exchange=dlx,
        unhandled_exception_action=NACK,
    )
    async with consumer:
        await publish(channel, numbered(4), routing_key=name)
        await until(lambda: len(consumer.recorder.dead) == 2)
    await holds(amqp_url, name, 0)
    assert {"exception": 0, "timeout": 2, "handler": 2} == {
        cause: consumer.recorder.causes[cause] for cause in ("exception", "timeout", "handler")
    }
    assert [b"2", b"3"] == sorted(letter.body for letter in await take_all(channel, dlq, 2))
