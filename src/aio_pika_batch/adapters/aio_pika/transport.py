"""The port, on RabbitMQ."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aio_pika_batch.adapters.aio_pika import tls
from aio_pika_batch.adapters.aio_pika.publishers import open_publisher
from aio_pika_batch.adapters.aio_pika.session import open_session
from aio_pika_batch.adapters.aio_pika.topology import count, declare
from aio_pika_batch.adapters.aio_pika.urls import parse
from aio_pika_batch.adapters.aio_pika.wires import check

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from aio_pika_batch.adapters.aio_pika.publisher import AioPikaPublisher
    from aio_pika_batch.adapters.aio_pika.session import AioPikaSession
    from aio_pika_batch.core.topology import Topology, Version
    from aio_pika_batch.transport import Endpoint, Subscription, Transport


def open_transport(endpoint: Endpoint) -> Transport:
    """What the schemes `amqp` and `amqps` stand for. Connects to nothing yet.

    Raises:
        ConfigurationError: The URL or a file that is named is not right.
    """
    return AioPikaTransport(endpoint)


class AioPikaTransport:
    """Implements :class:`~aio_pika_batch.transport.Transport`."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._addresses = parse(endpoint.url)
        self._version: Version | None = None
        check(endpoint)
        tls.check(endpoint, self._addresses)

    async def declare(self, topology: Topology) -> None:
        """Declare and check. An exclusive queue goes again at once, with its connection."""
        self._version = await declare(self._endpoint, self._addresses, topology)

    @property
    def broker_version(self) -> Version | None:
        """Of the broker that was declared on last."""
        return self._version

    async def count(self, queue: str) -> int:
        """How many messages are ready in a queue."""
        return await count(self._endpoint, self._addresses, queue)

    def session(self, subscription: Subscription) -> AbstractAsyncContextManager[AioPikaSession]:
        """Open a connection and consume; leaving the context closes both."""
        return open_session(self._endpoint, self._addresses, subscription)

    def publisher(self) -> AbstractAsyncContextManager[AioPikaPublisher]:
        """Open a connection for publishing; leaving the context closes it."""
        return open_publisher(self._endpoint, self._addresses)
