"""Implements the transport port on RabbitMQ."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aio_pika_batch.adapters.aio_pika.publisher import open_publisher
from aio_pika_batch.adapters.aio_pika.session import open_session
from aio_pika_batch.adapters.aio_pika.tls import check_tls
from aio_pika_batch.adapters.aio_pika.topology import count, declare, exchange_type
from aio_pika_batch.adapters.aio_pika.url import parse_url

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractAsyncContextManager

    from aio_pika_batch.adapters.aio_pika.publisher import AioPikaPublisher
    from aio_pika_batch.adapters.aio_pika.session import AioPikaSession
    from aio_pika_batch.core.topology import Exchange, Topology, UnfulfilledWishes, Version
    from aio_pika_batch.transport import Endpoint, Subscription, Transport


def open_transport(endpoint: Endpoint) -> Transport:
    """Return the transport for the schemes `amqp` and `amqps`. It does not connect yet.

    Raises:
        ConfigurationError: The URL, or a TLS option, is invalid.
    """
    return AioPikaTransport(endpoint)


class AioPikaTransport:
    """Implements :class:`~aio_pika_batch.transport.Transport` and its extensions."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._addresses = parse_url(endpoint.url)
        self._version: Version | None = None
        # Reads the TLS files only to report errors early. Each connection reads them again.
        check_tls(endpoint, self._addresses)

    async def declare(self, topology: Topology) -> Mapping[str, UnfulfilledWishes]:
        """Declare and check. Exclusive queues are deleted again, with their connection."""
        self._version, unfulfilled = await declare(self._endpoint, self._addresses, topology)
        return unfulfilled

    async def exchange_type(self, exchange: Exchange) -> str | None:
        """Return the type that an exchange has on the broker."""
        return await exchange_type(self._endpoint, self._addresses, exchange)

    @property
    def broker_version(self) -> Version | None:
        """The version of the broker on which `declare` was called last."""
        return self._version

    async def count(self, queue: str) -> int:
        """Return how many messages are ready in a queue."""
        return await count(self._endpoint, self._addresses, queue)

    def session(self, subscription: Subscription) -> AbstractAsyncContextManager[AioPikaSession]:
        """Open a connection and consume; close both on leaving the context."""
        return open_session(self._endpoint, self._addresses, subscription)

    def publisher(self) -> AbstractAsyncContextManager[AioPikaPublisher]:
        """Open a connection for publishing; close it on leaving the context."""
        return open_publisher(self._endpoint, self._addresses)
