"""Quorum queues whose leader stands still while a consumer settles for the last time.

The channel of such a queue keeps settlements back, and drops them when it is closed. The leader is
suspended only after the broker has confirmed the cancel, and continues after the session's end.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from aio_pika_batch import Consumer, ConsumerSettings, MessageResult, Publication
from aio_pika_batch.adapters.aio_pika.session import AioPikaSession
from tests.integration.helpers import publish, ready, until
from tests.support.cluster import Cluster

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aio_pika_batch.testing.rabbitmq.node import RabbitMQ

pytestmark = pytest.mark.needs_node

FAILING = 10


@asynccontextmanager
async def suspended(node: RabbitMQ, queue: str) -> AsyncIterator[None]:
    """Suspend the leader of a quorum queue, which runs on this node."""

    async def tell(what: str) -> None:
        process = f"whereis('%2F_{queue}')"
        await asyncio.to_thread(node.eval, f"ok = sys:{what}({process}).")

    await tell("suspend")
    try:
        yield
    finally:
        await tell("resume")


class Importer(Consumer):
    """Handles messages when it is released; the first ones fail.

    Attributes:
        handled: How often each message was handled.
        cancelled: Set when the broker has confirmed a cancel.
        closed: Set when a session is closed.
    """

    failing = 0
    results = (MessageResult.ACK,)

    def prepare(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Watch the sessions."""
        self.release, self.cancelled, self.closed = (asyncio.Event() for _ in range(3))
        self.handled: Counter[bytes] = Counter()
        cancel, close = AioPikaSession.cancel, AioPikaSession.close

        async def watched_cancel(session: AioPikaSession) -> None:
            await cancel(session)
            self.cancelled.set()

        async def watched_close(session: AioPikaSession) -> None:
            await close(session)
            self.closed.set()

        monkeypatch.setattr(AioPikaSession, "cancel", watched_cancel)
        monkeypatch.setattr(AioPikaSession, "close", watched_close)

    async def process_message(self, message):
        self.handled[message.body] += 1
        number = int(message.body)
        if number < self.failing:
            await until(lambda: len(self.handled) == self.settings.concurrency)
            return MessageResult.REQUEUE_IMMEDIATE
        await self.release.wait()
        return self.results[number % len(self.results)]


def importer(url: str, name: str, count: int, **more: object) -> Importer:
    """A consumer that handles this many messages at once."""
    return Importer(
        ConsumerSettings(
            url=url,
            queue_name=name,
            queue_type="quorum",
            concurrency=count,
            prefetch_count=count,
            without_dead_letter="reject",
            **more,
        )
    )


async def stop_while_suspended(consumer: Importer, node: RabbitMQ, name: str) -> None:
    """Stop it; the leader stands still from the answer to the cancel until the stop has ended."""
    count = consumer.settings.concurrency
    await until(lambda: len(consumer.handled) == count)
    stopping = asyncio.create_task(consumer.stop())
    await consumer.cancelled.wait()
    async with suspended(node, name):
        consumer.release.set()
        await stopping


@pytest.mark.parametrize(
    ("count", "results"),
    [
        pytest.param(34, ("ACK",), marks=pytest.mark.long),
        (200, ("ACK", "NACK")),
        pytest.param(34, ("ACK", "NACK"), marks=pytest.mark.long),
        pytest.param(200, ("ACK",), marks=pytest.mark.long),
    ],
    ids=["34 acks", "200 acks and rejects", "34 acks and rejects", "200 acks"],
)
@pytest.mark.usefixtures("on_both_wires")
async def test_a_stop_causes_no_duplicates_while_the_leader_stands_still(
    channel, rabbitmq, amqp_url, name, monkeypatch, count, results
) -> None:
    """34 commands are one more than a channel sends to a leader that does not answer."""
    consumer = importer(amqp_url, name, count)
    consumer.results = tuple(MessageResult[each] for each in results)
    consumer.prepare(monkeypatch)
    await consumer.start()
    await publish(channel, [b"%d" % number for number in range(count)], routing_key=name)
    await stop_while_suspended(consumer, rabbitmq, name)
    assert 0 == await settled_count(amqp_url, name)
    assert {1} == {*consumer.handled.values()}


@pytest.mark.usefixtures("on_both_wires")
async def test_the_turn_of_a_breaker_causes_no_duplicates_while_the_leader_stands_still(
    channel, rabbitmq, amqp_url, name, monkeypatch
) -> None:
    """What ends after its session was cancelled is acknowledged, and not handled again."""
    count = 150
    consumer = importer(
        amqp_url,
        name,
        count,
        breaker_threshold=0.5,
        breaker_min_samples=FAILING,
        breaker_pause=300,
        # One that fails three times before the breaker opens would go back as a copy. While the
        # leader stands still, it isn't known whether that arrived.
        crash_suspect_after=100,
        crash_limit=200,
    )
    consumer.failing = FAILING
    consumer.prepare(monkeypatch)
    async with consumer:
        await publish(channel, [b"%d" % number for number in range(count)], routing_key=name)
        await consumer.cancelled.wait()
        async with suspended(rabbitmq, name):
            consumer.release.set()
            await consumer.closed.wait()
        assert FAILING == await settled_count(amqp_url, name)


@pytest.mark.long
async def test_a_stop_causes_no_duplicates_in_a_cluster(
    broker, tmp_path, monkeypatch, name
) -> None:
    """The leader stands still on another node than the consumer's."""
    count = 200
    with Cluster(broker.node.server, tmp_path) as cluster:
        first, other = cluster.nodes[0], cluster.nodes[1]
        creator = importer(first.url, name, count)
        async with creator:
            pass
        await asyncio.to_thread(cluster.wait_for_replicas, name)
        leader = await asyncio.to_thread(cluster.leader_of, name)
        client = other if leader is first else first
        consumer = importer(client.url, name, count)
        consumer.results = (MessageResult.ACK, MessageResult.NACK)
        consumer.prepare(monkeypatch)
        await consumer.start()
        await consumer.publish_many(
            [Publication(b"%d" % number, routing_key=name) for number in range(count)]
        )
        await stop_while_suspended(consumer, leader, name)
        assert 0 == await settled_count(client.url, name)


async def settled_count(url: str, name: str) -> int:
    """Return how many messages are ready once the number has stopped to change."""
    last = -1
    while (found := await ready(url, name)) != last or found < 0:
        last = found
        await asyncio.sleep(1)
    return found
