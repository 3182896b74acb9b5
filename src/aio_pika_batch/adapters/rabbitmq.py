"""Implements the transport port on RabbitMQ, and chooses AMQP 0-9-1 or AMQP 1.0 for each session.

Declaring, counting, publishing and checks always use 0-9-1. With `wire="amqp10"` a session uses
AMQP 1.0 if the broker and the queue allow it. Some messages make the broker's AMQP 1.0 session
fail, again and again. After such a failure sessions use 0-9-1 for a while, which can read them.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final

from aio_pika_batch.adapters.aio_pika.publisher import AioPikaPublisher, open_publisher
from aio_pika_batch.adapters.aio_pika.session import open_session
from aio_pika_batch.adapters.aio_pika.topology import count, declare, exchange_type
from aio_pika_batch.adapters.amqp10.codec import Int
from aio_pika_batch.adapters.amqp10.connection import (
    Amqp10Connection,
    Amqp10Unsupported,
    open_amqp10,
)
from aio_pika_batch.adapters.amqp10.management import QueueInfo, look_up_queue
from aio_pika_batch.adapters.amqp10.session import Amqp10Session
from aio_pika_batch.adapters.tls import check_endpoint
from aio_pika_batch.core.topology import (
    AMQP10_SINCE,
    Amqp10Obstacle,
    Exchange,
    Topology,
    UnfulfilledWishes,
    Version,
    amqp10_obstacle,
    native_retries,
)
from aio_pika_batch.errors import BrokerUnavailable
from aio_pika_batch.logs import KeywordLogger
from aio_pika_batch.transport import (
    Endpoint,
    Session,
    Subscription,
    Transport,
)

_log = KeywordLogger(logging.getLogger("aio_pika_batch.connection"))

NEEDS_4: Final = "AMQP 1.0 needs RabbitMQ 4.0 or newer"

_FAILED: Final = "a message made the broker's AMQP 1.0 session fail"

FALLBACK: Final = 300.0
"""Seconds for which sessions use AMQP 0-9-1 after a failure of the broker's AMQP 1.0 session."""


def open_transport(endpoint: Endpoint) -> Transport:
    """Return the transport for the schemes `amqp` and `amqps`. It does not connect yet.

    Raises:
        ConfigurationError: The URL, or a TLS option, is invalid.
    """
    is_amqp10 = endpoint.wire == "amqp10"
    return Amqp10Transport(endpoint) if is_amqp10 else AioPikaTransport(endpoint)


class AioPikaTransport:
    """Implements :class:`~aio_pika_batch.transport.Transport` and its extensions."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._version: Version | None = None
        # Reads the TLS files only to report errors early. Each connection reads them again.
        check_endpoint(endpoint)

    async def declare(self, topology: Topology) -> Mapping[str, UnfulfilledWishes]:
        """Declare and check. Exclusive queues are deleted again, with their connection."""
        self._version, unfulfilled = await declare(self._endpoint, topology)
        return unfulfilled

    async def exchange_type(self, exchange: Exchange) -> str | None:
        """Return the type that an exchange has on the broker."""
        return await exchange_type(self._endpoint, exchange)

    @property
    def broker_version(self) -> Version | None:
        """The version of the broker on which `declare` was called last."""
        return self._version

    async def count(self, queue: str) -> int:
        """Return how many messages are ready in a queue."""
        return await count(self._endpoint, queue)

    def session(self, subscription: Subscription) -> AbstractAsyncContextManager[Session]:
        """Open a connection and consume; close both on leaving the context."""
        return open_session(self._endpoint, subscription)

    def publisher(self) -> AbstractAsyncContextManager[AioPikaPublisher]:
        """Open a connection for publishing; close it on leaving the context."""
        return open_publisher(self._endpoint)


class Amqp10Transport(AioPikaTransport):
    """Consumes over AMQP 1.0 where that is possible, and does everything else over AMQP 0-9-1.

    Attributes:
        fallbacks: How often a session ended because the broker's AMQP 1.0 session failed.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(endpoint)
        self.fallbacks = 0
        self._returns_at: dict[str, float] = {}
        self._reasons: dict[str, str] = {}

    def session(self, subscription: Subscription) -> AbstractAsyncContextManager[Session]:
        """Open a connection and consume; close both on leaving the context."""
        # AMQP 1.0 doesn't show everything that a message contains.
        return (
            super().session(subscription)
            if subscription.for_copies
            else self._session(subscription)
        )

    @asynccontextmanager
    async def _session(self, subscription: Subscription) -> AsyncIterator[Session]:
        loop = asyncio.get_running_loop()
        opened = await self._open(subscription)
        if isinstance(opened, str):
            self._log_choice(subscription.queue, opened)
            async with open_session(self._endpoint, subscription) as session:
                remaining = self._fallback_left(subscription.queue)
                timer = loop.call_later(remaining, session.expire) if remaining else None
                try:
                    yield session
                finally:
                    if timer is not None:
                        timer.cancel()
            return
        try:
            await opened.open(self._endpoint.connect_timeout)
            self._reasons.pop(subscription.queue, None)
            yield opened
        finally:
            if opened.crashed_on is not None:
                self._on_crash(subscription.queue, opened.crashed_on)
            await opened.close()

    async def _open(self, subscription: Subscription) -> Amqp10Session | str:
        """Return a session that isn't open yet, or why there can't be one."""
        reason = self._obstacle(subscription)
        if reason is not None:
            return reason
        try:
            connection = await open_amqp10(self._endpoint)
        except BrokerUnavailable as error:
            if not isinstance(error, Amqp10Unsupported) and not isinstance(
                error.__cause__, Amqp10Unsupported
            ):
                raise
            return "the broker does not speak AMQP 1.0"
        try:
            info = await look_up_queue(
                connection, subscription.queue, self._endpoint.connect_timeout
            )
            reason = queue_obstacle(connection.version or (), info)
            if reason is None and info is not None:
                return _session_on(connection, subscription, info)
        except BaseException:
            connection.abort()
            raise
        await connection.close()
        return reason or ""

    def _obstacle(self, subscription: Subscription) -> str | None:
        if self._fallback_left(subscription.queue):
            return _FAILED
        if self._version is not None and self._version < AMQP10_SINCE:
            return NEEDS_4
        if subscription.exclusive or subscription.own.queues:
            return "AMQP 1.0 has no exclusive queues and consumers"
        unknown = subscription.arguments.keys() - {"x-priority"}
        if unknown:
            return f"AMQP 1.0 has no consumer argument {min(unknown)}"
        return None

    def _fallback_left(self, queue: str) -> float:
        """Return for how many seconds sessions on a queue use 0-9-1 after a failure."""
        now = asyncio.get_running_loop().time()
        return max(0.0, self._returns_at.get(queue, now) - now)

    def _log_choice(self, queue: str, reason: str) -> None:
        if self._reasons.get(queue) != reason:
            self._reasons[queue] = reason
            _log.warning("this consumer uses AMQP 0-9-1", queue=queue, reason=reason)

    def _on_crash(self, queue: str, error: str) -> None:
        self.fallbacks += 1
        self._reasons[queue] = _FAILED  # the warning below says it
        self._returns_at[queue] = asyncio.get_running_loop().time() + FALLBACK
        _log.warning(
            "a message makes the broker's AMQP 1.0 session fail: using AMQP 0-9-1 for now",
            queue=queue,
            seconds=f"{FALLBACK:g}",
            error=error,
        )


def queue_obstacle(version: Version, info: QueueInfo | None) -> str | None:
    """Return why a queue can't be consumed over AMQP 1.0 without a loss; None if it can.

    Args:
        version: The version of RabbitMQ; empty if it is unknown.
        info: What the broker knows about the queue.
    """
    known = info or QueueInfo("", {})
    match amqp10_obstacle(version, known.type, known.arguments):
        case None:
            return None
        case Amqp10Obstacle.VERSION:
            return NEEDS_4
        case Amqp10Obstacle.DELIVERY_LIMIT:
            return "before RabbitMQ 4.3, retries count towards the delivery limit of the queue"
        case Amqp10Obstacle.QUEUE_TYPE if info is None:
            return "the broker does not tell the type of the queue"
        case _:
            return f"AMQP 1.0 retries need a quorum queue, and this is a {known.type} queue"


def _session_on(
    connection: Amqp10Connection, subscription: Subscription, info: QueueInfo
) -> Amqp10Session:
    priority = subscription.arguments.get("x-priority")
    # RabbitMQ ignores a priority of any other type.
    properties = {"rabbitmq:priority": Int(priority)} if isinstance(priority, int) else {}
    retries = native_retries(connection.version or (), info.arguments)
    return Amqp10Session(connection, subscription, properties, retries)
