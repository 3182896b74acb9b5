"""What each broker version counts as a failed delivery, and whether a poison message ends.

The results:

=================================  =======================  =======================  ==============
quorum queue                       3.8, 3.10                4.0                      4.3
=================================  =======================  =======================  ==============
limit, if none is set              none                     20                       20
REQUEUE_IMMEDIATE, crash           count                    count                    count
returned unstarted                 counts                   counts                   does not count
=================================  =======================  =======================  ==============

Classic queues count nothing.
"""

from __future__ import annotations

import asyncio
import json
import signal
from collections import Counter

import pytest

from aio_pika_batch import BatchConsumer, BatchConsumerSettings, MessageResult
from tests.integration.helpers import (
    app,
    declare_dead_letters,
    holds,
    parse_version,
    publish,
    ready,
    take_all,
    until,
)


class Always(BatchConsumer):
    """Has one result, and counts its calls."""

    answer = MessageResult.REQUEUE_IMMEDIATE

    def __init__(self, settings, **more) -> None:
        super().__init__(settings, **more)
        self.seen: Counter[bytes] = Counter()

    async def process_messages(self, messages):
        for message in messages:
            self.seen[message.body] += 1
            if self.answer is None:
                raise ValueError("poison")
            yield self.answer


def quorum(url, queue, dlx, *, limit=None, **more) -> BatchConsumerSettings:
    """Declare a quorum queue with a dead-letter exchange."""
    arguments = {"x-dead-letter-exchange": dlx}
    if limit is not None:
        arguments["x-delivery-limit"] = limit
    more = {"batch_size": 1, "batch_timeout": 0.05} | more
    return BatchConsumerSettings(
        url=url, queue_name=queue, queue_type="quorum", queue_arguments=arguments, **more
    )


def by_the_limit(letter) -> bool:
    """Return whether the broker dead-lettered this message because of the limit."""
    [death] = letter.headers["x-death"]
    return death["reason"] == "delivery_limit"


@pytest.mark.usefixtures("on_both_wires")
@pytest.mark.parametrize("cause", ["yielded", "raised"])
async def test_failures_count_until_the_delivery_limit(channel, amqp_url, name, cause) -> None:
    """REQUEUE_IMMEDIATE, on all versions: after one delivery more than the limit it is
    dead-lettered.
    """
    dlx, dlq = await declare_dead_letters(channel, name)
    consumer = Always(
        quorum(amqp_url, name, dlx, limit=3, unhandled_exception_action="REQUEUE_IMMEDIATE")
    )
    if cause == "raised":
        consumer.answer = None
    async with consumer:
        await publish(channel, [b"poison"], routing_key=name)
        await holds(amqp_url, dlq, 1)
    [letter] = await take_all(channel, dlq, 1)
    assert by_the_limit(letter)
    # A delivery can fall into the moment in which the session changes its prefetch. RabbitMQ counts
    # it, and delivers the message again.
    assert consumer.seen[b"poison"] in (3, 4)
    assert 0 == await ready(amqp_url, name)


async def test_a_message_that_is_always_requeued_at_once_has_no_attempts_left_in_the_end(
    channel, amqp_url, name, caplog
) -> None:
    """On every version, since each sixth time counts as a retry."""
    dlx, dlq = await declare_dead_letters(channel, name)
    consumer = Always(quorum(amqp_url, name, dlx))
    async with consumer:
        await publish(channel, [b"poison"], routing_key=name)
        await holds(amqp_url, dlq, 1)
    assert not any("is redelivered forever" in each.getMessage() for each in caplog.records)
    assert 20 < consumer.seen[b"poison"] <= 24
    [letter] = await take_all(channel, dlq, 1)
    assert "exhausted" == letter.headers["x-dead-letter-reason"]


@pytest.mark.usefixtures("on_both_wires")
async def test_no_default_is_warned_of(amqp_url, name, caplog) -> None:
    """On every version, with and without a dead-letter queue."""
    for more in ({}, {"dead_letter_queue": f"{name}.dead"}):
        settings = BatchConsumerSettings(url=amqp_url, queue_name=f"{name}{len(more)}", **more)
        async with Always(settings) as consumer:
            assert consumer.is_healthy
    assert [] == [each.getMessage() for each in caplog.records if each.levelname != "INFO"]


async def test_on_a_classic_queue_a_poison_message_loops_and_the_log_says_so(
    channel, amqp_url, name, caplog
) -> None:
    """On every version: classic queues count nothing."""
    dlx, dlq = await declare_dead_letters(channel, name)
    consumer = Always(
        BatchConsumerSettings(
            url=amqp_url,
            queue_name=name,
            queue_type="classic",
            batch_timeout=0.05,
            dead_letter_exchange=dlx,
            unhandled_exception_action="REQUEUE_IMMEDIATE",
        )
    )
    async with consumer:
        [warning] = [
            each for each in caplog.records if "is redelivered forever" in each.getMessage()
        ]
        assert "REQUEUE_IMMEDIATE" in warning.getMessage()
        await publish(channel, [b"poison"], routing_key=name)
        await until(lambda: consumer.seen.total() > 60)
        consumer.answer = MessageResult.ACK
        await until(lambda: consumer.status().workers[0].in_hand == 0)
    assert 0 == await ready(amqp_url, dlq)


async def test_a_negative_limit_means_none_since_4_0_and_zero_before(
    channel, amqp_url, name, broker, caplog
) -> None:
    """The log says which. Before 4.0 the first redelivery dead-letters the message."""
    dlx, dlq = await declare_dead_letters(channel, name)
    consumer = Always(quorum(amqp_url, name, dlx, limit=-1))
    lifts = parse_version(broker) >= (4, 0)
    async with consumer:
        await publish(channel, [b"poison"], routing_key=name)
        await holds(amqp_url, dlq, 1)
    assert consumer.seen[b"poison"] in (range(20, 25) if lifts else [1])
    said = " ".join(each.getMessage() for each in caplog.records)
    assert lifts is not ("given up at their first redelivery" in said)


async def test_a_message_that_kills_its_consumer_ends_at_the_limit(
    channel, amqp_url, name, tmp_path
) -> None:
    """SIGKILL, each time it is handled; the message behind it is finally handled."""
    dlx, dlq = await declare_dead_letters(channel, name)
    limit = 1
    options = {
        "queue_type": "quorum",
        "queue_arguments": {"x-dead-letter-exchange": dlx, "x-delivery-limit": limit},
        "batch_size": 1,
        # Whatever is prefetched counts its death as a delivery in vain.
        "prefetch_count": 1,
    }
    queue = await channel.declare_queue(
        name, durable=True, arguments={"x-queue-type": "quorum", **options["queue_arguments"]}
    )
    messages = [{"id": 1, "kind": "lethal"}, {"id": 2, "kind": "good"}]
    await publish(channel, [json.dumps(each).encode() for each in messages], routing_key=name)
    for _ in range(limit + 1):
        async with app("work", tmp_path, amqp_url, queue.name, **options) as program:
            assert -signal.SIGKILL == await program.ended()
    async with app("work", tmp_path, amqp_url, queue.name, **options) as program:
        await program.noted("done")
        program.send(signal.SIGTERM)
        assert 0 == await program.ended()
        assert [2] == program.of("done")
    [letter] = await take_all(channel, dlq, 1)
    assert 1 == json.loads(letter.body)["id"]
    assert by_the_limit(letter)


async def test_a_lost_connection_counts_for_all_prefetched_messages(
    channel, amqp_url, name, proxy
) -> None:
    """The broker can't know which of them caused it."""
    dlx, dlq = await declare_dead_letters(channel, name)

    class Stuck(BatchConsumer):
        async def process_messages(self, messages):
            await asyncio.sleep(3600)
            yield MessageResult.ACK

    consumer = Stuck(
        quorum(
            proxy.url(amqp_url),
            name,
            dlx,
            limit=1,
            prefetch_count=5,
            reconnect_delay=0.05,
            shutdown_timeout=1,
        )
    )
    async with consumer:
        await publish(channel, [b"%d" % each for each in range(5)], routing_key=name)
        # The handler of the first session keeps its hand, so that the second one handles nothing.
        for has_come in ((1, 4), (2, 5)):
            await until(lambda has_come=has_come: has_come == _come(consumer), what=consumer.status)
            proxy.cut()
        await holds(amqp_url, dlq, 5)


def _come(consumer) -> tuple[int, int]:
    [worker] = consumer.status().workers
    return worker.epoch, worker.buffered


@pytest.mark.usefixtures("on_both_wires")
async def test_returned_messages_never_reach_the_limit(channel, amqp_url, name, broker) -> None:
    """Three drains with a limit of two: before 4.3 copies take their place in time."""
    dlx, dlq = await declare_dead_letters(channel, name)

    class Stuck(BatchConsumer):
        async def process_messages(self, messages):
            await asyncio.sleep(3600)
            yield MessageResult.ACK

    settings = quorum(amqp_url, name, dlx, limit=2, prefetch_count=10, shutdown_timeout=3)
    for turn in range(3):
        consumer = Stuck(settings)
        await consumer.start()
        if turn == 0:
            await publish(channel, [b"%d" % each for each in range(5)], routing_key=name)
        if turn == 0 or parse_version(broker) >= (4, 3):
            await _buffers(consumer, 4)
        else:
            # They came back, so they are handled one by one.
            await until(lambda consumer=consumer: consumer.status().workers[0].in_hand == 1)
        # The one that is being handled is cut off, and returned with the others.
        await consumer.stop()
    returned = await take_all(channel, name, 5)
    assert 5 == len({each.body for each in returned})
    if parse_version(broker) >= (4, 3):
        assert not any("x-delivery-count" in (each.headers or {}) for each in returned)
    assert 0 == await ready(amqp_url, dlq)


async def _buffers(consumer, count) -> None:
    await until(lambda: count == consumer.status().workers[0].buffered, what=consumer.status)


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
async def test_a_declared_dead_letter_queue_has_no_delivery_limit(
    channel, amqp_url, name, queue_type
) -> None:
    """A dead letter is looked at and returned more often than any default limit."""
    consumer = Always(
        BatchConsumerSettings(
            url=amqp_url,
            queue_name=name,
            queue_type=queue_type,
            batch_timeout=0.05,
            dead_letter_queue=f"{name}.dead",
        )
    )
    consumer.answer = MessageResult.NACK
    async with consumer:
        await publish(channel, [b"bad"], routing_key=name)
        await holds(amqp_url, f"{name}.dead", 1)
    dead = await channel.get_queue(f"{name}.dead", ensure=False)
    for _ in range(30):
        letter = await until(lambda: dead.get(fail=False), what="the dead letter")
        await letter.reject(requeue=True)
    [letter] = await take_all(channel, dead.name, 1)
    assert b"bad" == letter.body
