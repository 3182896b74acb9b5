"""The port on the broker in memory: what `memory://name` is.

One broker for each name and event loop. It lives as long as the loop does; messages do not survive
it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit
from weakref import WeakKeyDictionary

from aio_pika_batch.adapters.memory.alarm import attach
from aio_pika_batch.adapters.memory.broker import Broker, Unreachable
from aio_pika_batch.adapters.memory.connections import Connection
from aio_pika_batch.adapters.memory.publisher import MemoryPublisher
from aio_pika_batch.adapters.memory.refusals import Refusal
from aio_pika_batch.adapters.memory.session import MemorySession
from aio_pika_batch.adapters.memory.topology import count, declare
from aio_pika_batch.adapters.memory.versions import NEWEST, dialect
from aio_pika_batch.core.topology import parse_version
from aio_pika_batch.errors import AccessRefused, BrokerUnavailable, ConfigurationError

if TYPE_CHECKING:
    from aio_pika_batch.core.topology import Topology, Version
    from aio_pika_batch.transport import Endpoint, Subscription

_BROKERS: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, Broker]] = WeakKeyDictionary()


def open_transport(endpoint: Endpoint) -> MemoryTransport:
    """What the scheme `memory` stands for: `memory://name`, or `memory://name?version=4.0`.

    Raises:
        ConfigurationError: The URL says something else, too.
    """
    url = urlsplit(endpoint.url)
    query = parse_qs(url.query, keep_blank_values=True)
    version = query.pop("version", [NEWEST])[-1]
    if url.scheme != "memory" or "," in endpoint.url or url.path.strip("/") or query:
        raise ConfigurationError(
            "a broker in memory is memory://name, or memory://name?version=4.0"
        )
    dialect(version)
    return MemoryTransport(
        name=url.hostname or "",
        version=version,
        publish_timeout=endpoint.publish_timeout,
        connection_name=endpoint.connection_name,
    )


class MemoryTransport:
    """A broker in memory, to be reached.

    Args:
        broker: Which one; None: the running event loop's of that name.
        name: Of the loop's broker.
        version: Of the RabbitMQ that it imitates, if it has to be made.
        publish_timeout: Seconds to wait for confirmations.
        connection_name: What the broker calls the connections.
        wall_clock: Seconds since the epoch, for the age of messages.
    """

    def __init__(
        self,
        broker: Broker | None = None,
        *,
        name: str = "",
        version: str = NEWEST,
        publish_timeout: float = 10.0,
        connection_name: str = "aio-pika-batch",
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._broker = broker
        self._name = name
        self._version = version
        self._publish_timeout = publish_timeout
        self._connection_name = connection_name
        self._wall_clock = wall_clock

    @property
    def broker(self) -> Broker:
        """The broker, for tests: what it holds, what has happened, and what shall go wrong.

        Raises:
            ConfigurationError: One of that name is there, and imitates another version.
        """
        broker = self._broker
        if broker is None:
            brokers = _BROKERS.setdefault(asyncio.get_running_loop(), {})
            broker = brokers.get(self._name)
            if broker is None:
                broker = brokers[self._name] = Broker(self._version)
            if broker.dialect.version != self._version:
                raise ConfigurationError(
                    f"memory://{self._name} imitates RabbitMQ {broker.dialect.version} already,"
                    f" not {self._version}"
                )
        attach(broker)
        return broker

    @property
    def broker_version(self) -> Version | None:
        """Of the RabbitMQ that is imitated."""
        return parse_version("RabbitMQ", self.broker.dialect.version)

    async def declare(self, topology: Topology) -> None:
        """Declare and check. An exclusive queue goes again at once, with its connection."""
        async with self._connected() as connection:
            declare(connection, topology)

    async def count(self, queue: str) -> int:
        """How many messages are ready in a queue."""
        async with self._connected() as connection:
            return count(connection, queue)

    @asynccontextmanager
    async def session(self, subscription: Subscription) -> AsyncIterator[MemorySession]:
        """Consume, until the context is left."""
        async with self._connected() as connection:
            declare(connection, subscription.own)
            session = MemorySession(
                connection,
                subscription,
                publish_timeout=self._publish_timeout,
                wall_clock=self._wall_clock,
            )
            session.consume()
            try:
                yield session
            finally:
                session.end()

    @asynccontextmanager
    async def publisher(self) -> AsyncIterator[MemoryPublisher]:
        """Publish, until the context is left."""
        async with self._connected() as connection:
            publisher = MemoryPublisher(connection, publish_timeout=self._publish_timeout)
            try:
                yield publisher
            finally:
                publisher.end()

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Connection]:
        broker = self.broker
        # Reaching a broker takes a moment; whoever else is ready goes first.
        await asyncio.sleep(0)
        try:
            connection = broker.connect(self._connection_name)
        except Unreachable as error:
            raise BrokerUnavailable(f"memory://{self._name}: {error}") from error
        except Refusal as refusal:
            raise AccessRefused(f"memory://{self._name}: {refusal}") from refusal
        try:
            yield connection
        finally:
            connection.close()
