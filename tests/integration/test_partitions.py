"""Order scales with a consistent-hash exchange, as docs/scaling.md says."""

from __future__ import annotations

from collections import defaultdict
from contextlib import AsyncExitStack

import aio_pika
import pytest

from aio_pika_batch import BatchConsumer, BatchConsumerSettings, MessageResult
from aio_pika_batch.testing.rabbitmq.node import RabbitMQ
from tests.integration.helpers import consumers, until

COUNT = 400


class Noting(BatchConsumer):
    """Records which consumer got which message."""

    def __init__(self, settings, seen):
        super().__init__(settings)
        self.seen = seen

    def batch_key(self, message):
        return message.routing_key

    async def process_messages(self, messages):
        """Ack everything."""
        for message in messages:
            self.seen[message.routing_key].append((id(self), int(message.body)))
            yield MessageResult.ACK


def partition(url, number):
    """Declare a partition, as the page does."""
    return BatchConsumerSettings(
        _env_file=None,
        url=url,
        exchange_name="orders.by-customer",
        exchange_type="x-consistent-hash",
        queue_name=f"orders.{number}",
        queue_type="quorum",
        queue_arguments={"x-single-active-consumer": True},
        routing_key="1",
        ordered_by_key=True,
        batch_size=100,
        batch_timeout=0.1,
    )


async def is_consumed(url, queue):
    """Return whether a queue has a consumer, and so is bound; a standby may not be counted."""
    return await consumers(url, queue) >= 1


@pytest.mark.long
@pytest.mark.needs_node
async def test_each_key_keeps_its_order_and_its_consumer(broker, tmp_path):
    """Four partitions share forty keys, with an active and a standby worker for each."""
    seen = defaultdict(list)
    plugins = ["rabbitmq_consistent_hash_exchange"]
    with RabbitMQ(broker.node.server, tmp_path / "node", plugins=plugins) as node:
        async with AsyncExitStack() as stack:
            for number in [0, 0, 1, 1, 2, 2, 3, 3]:
                await stack.enter_async_context(Noting(partition(node.url, number), seen))
            for number in range(4):
                queue = f"orders.{number}"
                await until(lambda queue=queue: is_consumed(node.url, queue))
            connection = await stack.enter_async_context(await aio_pika.connect(node.url))
            channel = await connection.channel()
            exchange = await channel.get_exchange("orders.by-customer")
            for number in range(COUNT):
                body = aio_pika.Message(str(number).encode())
                await exchange.publish(body, f"customer-{number % 40}")
            await until(lambda: sum(map(len, seen.values())) == COUNT)

    assert 40 == len(seen)
    for notes in seen.values():
        assert 1 == len({who for who, _ in notes})
        assert sorted(number for _, number in notes) == [number for _, number in notes]
    assert 1 < len({notes[0][0] for notes in seen.values()})
