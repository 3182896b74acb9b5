"""What does a test get of a real RabbitMQ? Where it is, and names that nobody else uses."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from aio_pika_batch.core.message import Headers
from aio_pika_batch.core.publication import Outcome, Publication
from aio_pika_batch.core.topology import Queue, Topology
from aio_pika_batch.errors import PublishError
from aio_pika_batch.testing.rabbitmq.find import Broker
from aio_pika_batch.testing.rabbitmq.node import RabbitMQ
from aio_pika_batch.transport import Endpoint, NativeSession, Subscription, open_transport


class BatchRabbitMQ:
    """A real RabbitMQ, for one test.

    Attributes:
        url: For the settings of consumers.
        version: What the broker calls itself, such as `4.0.5`.
        node: How to kill, pause and administer it; None where it was not started for the tests.
    """

    def __init__(self, broker: Broker) -> None:
        self.url = broker.url
        self.version = broker.version
        self.node: RabbitMQ | None = broker.node
        self._transport = open_transport(Endpoint(url=broker.url))
        self._names: list[str] = []

    def name(self, what: str = "test") -> str:
        """Make a name for a queue or an exchange that nobody else uses.

        On a broker that is not there for the tests alone, what has this name is deleted after the
        test, and an exchange that has it with `.dlx` behind.
        """
        name = f"{what}-{uuid.uuid4().hex[:12]}"
        self._names.append(name)
        return name

    async def publish(
        self,
        *bodies: bytes,
        exchange: str = "",
        routing_key: str = "",
        headers: Headers | None = None,
        **properties: Any,  # noqa: ANN401  -- those of Publication, each with its own type
    ) -> None:
        """Publish messages, and wait until the broker has confirmed them.

        Args:
            routing_key: With the default exchange, the queue.
            **properties: Further ones of :class:`~aio_pika_batch.Publication`.

        Raises:
            PublishError: One of them was not confirmed, or has no queue.
        """
        publications = [
            Publication(
                body, exchange=exchange, routing_key=routing_key, headers=headers, **properties
            )
            for body in bodies
        ]
        async with self._transport.publisher() as publisher:
            outcomes = await publisher.publish(publications)
        if wrong := {outcome.value for outcome in outcomes} - {Outcome.CONFIRMED.value}:
            raise PublishError(
                f"exchange {exchange!r}, routing key {routing_key!r}: {', '.join(sorted(wrong))};"
                " a message without a queue is returned: start its consumer before"
            )

    async def drain(self, queue: str) -> list[Any]:
        """Take out what waits in a queue, in order: as aio-pika's messages."""
        taken = []
        async with self.channel() as channel:
            source = await channel.get_queue(queue, ensure=False)
            while (message := await source.get(no_ack=True, fail=False)) is not None:
                taken.append(message)
        return taken

    @asynccontextmanager
    async def channel(self) -> AsyncIterator[Any]:
        """A channel of aio-pika's, on a connection of its own, to set the scene and to look."""
        own = f"batch-rabbitmq-{uuid.uuid4().hex[:12]}"
        queue = Queue(own, durable=False, exclusive=True)
        subscription = Subscription(
            queue=own, prefetch=1, consumer_tag=own, own=Topology(queues=(queue,))
        )
        async with self._transport.session(subscription) as session:
            assert isinstance(session, NativeSession)  # noqa: S101  -- for type checkers
            yield (await session.native()).channel

    async def clear(self) -> None:
        """Delete what has a name of this test's."""
        if not self._names:
            return
        async with self.channel() as channel:
            for name in self._names:
                await channel.queue_delete(name)
                await channel.exchange_delete(name)
                await channel.exchange_delete(f"{name}.dlx")


@contextmanager
def of_one_test(broker: Broker) -> Iterator[BatchRabbitMQ]:
    """What one test gets; it is cleared away where the broker outlives the tests."""
    given = BatchRabbitMQ(broker)
    yield given
    if given.node is None:
        asyncio.run(given.clear())
