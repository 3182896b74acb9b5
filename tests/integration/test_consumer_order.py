"""Batches by key and bytes, and the order of each key, on RabbitMQ."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from aio_pika_batch import BatchConsumer, BatchConsumerSettings, MessageResult
from tests.integration.helpers import (
    Recorder,
    declare_dead_letters,
    holds,
    publish,
    take_all,
    until,
)

KEYS = "abcde"


def numbered(count: int) -> list[bytes]:
    """Return this many messages, with several keys in turn."""
    return [f"{KEYS[each % len(KEYS)]}{each}".encode() for each in range(count)]


class Orderly(BatchConsumer):
    """Fails a given number of times, and records overlaps and overtaking."""

    def __init__(self, settings, failures=None, seconds=0.0, **more) -> None:
        super().__init__(settings, **more)
        self.failures = Counter(failures or {})
        self.seconds = seconds
        self.batches: list[list[bytes]] = []
        self.tried: list[tuple[bytes, int]] = []
        self.through: set[bytes] = set()
        self.at_work: Counter[str] = Counter()
        self.overlaps = 0
        self.overtaken: list[tuple[bytes, int]] = []

    def batch_key(self, message):
        return message.body[:1].decode()

    async def process_messages(self, messages):
        self.batches.append([message.body for message in messages])
        key = self.batch_key(messages[0])
        self.at_work[key] += 1
        self.overlaps += self.at_work[key] > 1
        try:
            for message in messages:
                await asyncio.sleep(self.seconds)
                self.try_one(message)
                yield MessageResult.ACK
        finally:
            self.at_work[key] -= 1

    def try_one(self, message) -> None:
        body = message.body
        self.tried.append((body, message.retry_count))
        before = range(int(body[1:]) % len(KEYS), int(body[1:]), len(KEYS))
        missing = [each for each in before if body[:1] + b"%d" % each not in self.through]
        self.overtaken.extend((body, each) for each in missing)
        if self.failures[body] > 0:
            self.failures[body] -= 1
            if message.retry_count == self.settings.max_requeue_attempts:
                self.through.add(body)
            msg = "not now"
            raise RuntimeError(msg)
        self.through.add(body)

    @property
    def keeps_order(self) -> bool:
        """Return whether no batches of a key overlapped, and none was handled too early."""
        return not self.overlaps and not self.overtaken


def settings_for(url: str, queue: str, **more) -> BatchConsumerSettings:
    """Return settings with short waits."""
    return BatchConsumerSettings(
        **{
            "url": url,
            "queue_name": queue,
            "batch_timeout": 0.05,
            "batch_size": 5,
            "concurrency": 4,
            "ordered_by_key": True,
            **more,
        }
    )


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
async def test_each_key_keeps_its_order_whatever_fails(
    channel, amqp_url, name, queue_type, on_both_wires
) -> None:
    """Failures are retried in place, exhausted messages are dead-lettered, and no copy is made."""
    dlx, dlq = await declare_dead_letters(channel, name)
    recorder = Recorder()
    failures = {b"a0": 1, b"b11": 2, b"b16": 1, b"c2": 9, b"e99": 2}
    consumer = Orderly(
        settings_for(
            amqp_url, name, queue_type=queue_type, max_requeue_attempts=2, dead_letter_exchange=dlx
        ),
        failures,
        observers=[recorder],
    )
    async with consumer:
        await publish(channel, numbered(100), routing_key=name)
        await until(lambda: recorder.results["ACK"] == 99 and len(recorder.dead) == 1)
    assert consumer.keeps_order
    assert [(b"c2", "exhausted")] == recorder.dead
    for body, count in failures.items():
        tries = [tried for each, tried in consumer.tried if each == body]
        assert list(range(min(count, 2) + 1)) == tries
    assert 100 == len(set(consumer.tried)) - sum(min(count, 2) for count in failures.values())
    [letter] = await take_all(channel, dlq, 1)
    assert (b"c2", "exhausted", 2) == (
        letter.body,
        letter.headers["x-dead-letter-reason"],
        letter.headers["x-retry-count"],
    )
    assert letter.headers["x-first-failed-at"] <= letter.headers["x-dead-lettered-at"]
    assert [] == await take_all(channel, name)


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
async def test_a_cut_connection_keeps_the_order(channel, amqp_url, name, queue_type, proxy) -> None:
    """Redelivered messages come in order, and wait for handlers of the lost session."""
    recorder = Recorder()
    consumer = Orderly(
        settings_for(
            proxy.url(amqp_url),
            name,
            queue_type=queue_type,
            # Nothing may be dropped for having been delivered too often.
            max_requeue_attempts=9,
            reconnect_delay=0.05,
        ),
        {b"a0": 1, b"b1": 1, b"c52": 2},
        seconds=0.005,
        observers=[recorder],
    )
    async with consumer:
        await publish(channel, numbered(150), routing_key=name)
        for count in (20, 60):
            await until(lambda count=count: len(consumer.through) > count)
            proxy.cut()
            await until(lambda count=count: len(recorder.epochs) > (count > 20) + 1)
        await until(lambda: len(consumer.through) == 150)
        await holds(amqp_url, name, 0)
        await until(lambda: not consumer.status().workers[0].in_hand)
    assert consumer.keeps_order
    assert [] == await take_all(channel, name)


@pytest.mark.parametrize(
    ("queue_type", "limit"), [("classic", None), ("quorum", None), ("quorum", 100)]
)
async def test_messages_returned_by_a_stop_keep_their_place(
    broker, channel, amqp_url, name, queue_type, limit
) -> None:
    """The next consumer finds the old order, except on older quorum queues without a limit."""
    consumer = Orderly(
        settings_for(
            amqp_url,
            name,
            queue_type=queue_type,
            queue_arguments={"x-delivery-limit": limit} if limit else {},
            max_requeue_attempts=90,
            prefetch_count=10,
        ),
        {b"a0": 1000},
    )
    some = [b"a%d" % (5 * each) for each in range(30)]
    async with consumer:
        await publish(channel, some, routing_key=name)
        await until(lambda: consumer.status().workers[0].held == 1)
        await until(lambda: consumer.status().workers[0].buffered == 9)
        await holds(amqp_url, name, 20)
    left = [message.body for message in await take_all(channel, name, 30)]
    # With 3.8, the channel's end has the last word: a cancelled consumer gets what is returned.
    is_old = broker.version.startswith("3.") and not broker.version.startswith("3.8.")
    is_back = queue_type == "quorum" and not limit and is_old
    assert (some[10:] + some[:10] if is_back else some) == left


async def test_a_batch_has_one_key_and_limited_bytes(
    channel, amqp_url, name, on_both_wires
) -> None:
    """Whatever comes in one read."""
    recorder = Recorder()
    consumer = Orderly(
        settings_for(
            amqp_url,
            name,
            batch_size=50,
            batch_max_bytes=100,
            prefetch_count=500,
            ordered_by_key=False,
        ),
        observers=[recorder],
    )
    some = [body.ljust(30, b".") for body in numbered(60)] + [b"a" * 1000]
    consumer.try_one = lambda message: None
    await channel.declare_queue(name, durable=True)
    await publish(channel, some, routing_key=name)
    async with consumer:
        await until(lambda: recorder.results["ACK"] == 61)
    assert Counter(some) == Counter(body for batch in consumer.batches for body in batch)
    for batch in consumer.batches:
        assert 1 == len({body[:1] for body in batch})
        assert sum(map(len, batch)) <= 100 or len(batch) == 1
    assert [b"a" * 1000] in consumer.batches
    assert "bytes" in recorder.triggers
