"""`BatchRabbitMQ`: what the fixture `batch_rabbitmq` gives a test of a real RabbitMQ."""

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
from aio_pika_batch.testing.rabbitmq.find import RunningBroker
from aio_pika_batch.testing.rabbitmq.node import RabbitMQ
from aio_pika_batch.transport import Endpoint, NativeSession, Subscription, open_transport


class BatchRabbitMQ:
    """A real RabbitMQ, for one test.

    Attributes:
        url: For the settings of consumers.
        version: The broker's version, such as `4.0.5`.
        node: Kills, pauses and administers it; None if the tests have not started it.
    """

    def __init__(self, broker: RunningBroker) -> None:
        self.url = broker.url
        self.version = broker.version
        self.node: RabbitMQ | None = broker.node
        self._transport = open_transport(Endpoint(url=broker.url))
        self._names: list[str] = []

    def name(self, what: str = "test") -> str:
        """Return a unique name for a queue or an exchange.

        On a broker that the tests have not started, the queue and the exchange of this name are
        deleted after the test, and so is the exchange `<name>.dlx`.
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
        """Publish messages, and wait until the broker confirms them.

        Args:
            routing_key: With the default exchange, the name of the queue.
            **properties: Further properties of :class:`~aio_pika_batch.Publication`.

        Raises:
            PublishError: A message was not confirmed, or no queue is bound for it.
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
                " a message without a queue is returned: start its consumer first"
            )

    async def drain(self, queue: str) -> list[Any]:
        """Remove all waiting messages from a queue, and return them as aio-pika's, in order."""
        taken = []
        async with self.channel() as channel:
            source = await channel.get_queue(queue, ensure=False)
            while (message := await source.get(no_ack=True, fail=False)) is not None:
                taken.append(message)
        return taken

    @asynccontextmanager
    async def channel(self) -> AsyncIterator[Any]:
        """Open an aio-pika channel on a new connection, to declare and to inspect."""
        # The library has no other way to an aio-pika channel than a session, which needs a queue.
        own = f"batch-rabbitmq-{uuid.uuid4().hex[:12]}"
        queue = Queue(own, durable=False, exclusive=True)
        subscription = Subscription(
            queue=own, prefetch=1, consumer_tag=own, own=Topology(queues=(queue,))
        )
        async with self._transport.session(subscription) as session:
            assert isinstance(session, NativeSession)  # noqa: S101  -- for type checkers
            yield (await session.native()).channel

    async def clear(self) -> None:
        """Delete all queues and exchanges with names of this test."""
        if not self._names:
            return
        async with self.channel() as channel:
            for name in self._names:
                await channel.queue_delete(name)
                await channel.exchange_delete(name)
                await channel.exchange_delete(f"{name}.dlx")


@contextmanager
def of_one_test(broker: RunningBroker) -> Iterator[BatchRabbitMQ]:
    """Return the RabbitMQ of one test; clear it if the tests have not started the broker."""
    rabbitmq = BatchRabbitMQ(broker)
    yield rabbitmq
    if rabbitmq.node is None:
        asyncio.run(rabbitmq.clear())
