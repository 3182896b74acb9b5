"""Offers the calls of aio-pika's channel, exchange and queue on the broker in memory.

Only the calls that consumers make on `channel` and `queue` are there, with aio-pika's names.
Messages may be aio-pika's own, or anything with the same attributes; aio-pika is not imported. It
is stricter than aio-pika: a message that is returned or refused raises.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import KW_ONLY, dataclass, fields
from datetime import UTC, datetime, timedelta
from typing import Any

from aio_pika_batch.adapters.memory.channel import Channel, ChannelIsClosed, Connection
from aio_pika_batch.adapters.memory.queue import MemoryQueue
from aio_pika_batch.adapters.memory.rabbitmq import Refusal, translate_refusals
from aio_pika_batch.adapters.memory.vhost import VirtualHost
from aio_pika_batch.core.message import FieldValue, Headers
from aio_pika_batch.core.publication import Outcome, Publication
from aio_pika_batch.core.refusals import ReplyCode
from aio_pika_batch.errors import PublishError, SessionLost
from aio_pika_batch.transport import Publisher

_Arguments = Mapping[str, FieldValue] | None


@dataclass(slots=True)
class NativeMessage:
    """A message to publish, for code without aio-pika; it takes the keywords of aio-pika's."""

    body: bytes
    _: KW_ONLY
    headers: dict[str, FieldValue] | None = None
    content_type: str | None = None
    content_encoding: str | None = None
    delivery_mode: int | None = None
    priority: int | None = None
    correlation_id: str | None = None
    reply_to: str | None = None
    expiration: float | timedelta | datetime | None = None
    message_id: str | None = None
    timestamp: datetime | float | None = None
    type: str | None = None
    user_id: str | None = None
    app_id: str | None = None


class NativeChannel:
    """A channel, with aio-pika's calls.

    Args:
        connection: The session's connection.
        channel: The channel on which the calls are made.
        publisher: A publisher on that channel.
    """

    def __init__(self, connection: Connection, channel: Channel, publisher: Publisher) -> None:
        self._connection = connection
        self._channel = channel
        self._publisher = publisher

    @property
    def is_closed(self) -> bool:
        """Whether a mistake or the end of the session has closed it."""
        return not self._publisher.is_open

    @property
    def default_exchange(self) -> NativeExchange:
        """The exchange whose routing keys are names of queues."""
        return NativeExchange(self, "")

    async def declare_exchange(
        self,
        name: str,
        type: Any = "direct",  # noqa: A002, ANN401  -- aio-pika's name; a string, or an enum of strings
        *,
        durable: bool = False,
        auto_delete: bool = False,
        passive: bool = False,
        arguments: _Arguments = None,
    ) -> NativeExchange:
        """Declare an exchange, or check that it exists."""
        async with self.operation(f"exchange {name!r}") as vhost:
            if passive:
                vhost.exchange(name)
            else:
                vhost.declare_exchange(
                    name,
                    str(getattr(type, "value", type)),
                    durable=durable,
                    auto_delete=auto_delete,
                    arguments=arguments or {},
                )
        return NativeExchange(self, name)

    async def declare_queue(
        self,
        name: str | None = None,
        *,
        durable: bool = False,
        exclusive: bool = False,
        passive: bool = False,
        auto_delete: bool = False,
        arguments: _Arguments = None,
    ) -> NativeQueue:
        """Declare a queue, or check that it exists. Without a name the broker chooses one."""
        async with self.operation(f"queue {name!r}") as vhost:
            if passive:
                queue = vhost.queue(name or "", self._connection)
            else:
                queue = vhost.declare_queue(
                    name or "",
                    durable=durable,
                    exclusive=exclusive,
                    auto_delete=auto_delete,
                    arguments=arguments or {},
                    connection=self._connection,
                )
        return NativeQueue(self, queue.name)

    async def get_exchange(self, name: str, *, ensure: bool = True) -> NativeExchange:
        """Return an exchange; with `ensure`, check that it exists."""
        if ensure:
            return await self.declare_exchange(name, passive=True)
        return NativeExchange(self, name)

    async def get_queue(self, name: str, *, ensure: bool = True) -> NativeQueue:
        """Return a queue; with `ensure`, check that it exists."""
        if ensure:
            return await self.declare_queue(name, passive=True)
        return NativeQueue(self, name)

    @asynccontextmanager
    async def operation(self, subject: str) -> AsyncIterator[VirtualHost]:
        """Make one call on the broker.

        Raises:
            TopologyError: The broker refuses, and has closed the channel.
            SessionLost: The channel was closed before.
        """
        try:
            with translate_refusals(subject), self._channel.operation() as vhost:
                yield vhost
        except ChannelIsClosed as error:
            raise SessionLost(f"the channel is closed: {error}") from error
        # Every call lets other tasks run, as a round trip to a real broker does.
        await asyncio.sleep(0)

    @asynccontextmanager
    async def queue_operation(self, name: str) -> AsyncIterator[tuple[VirtualHost, MemoryQueue]]:
        """Make one call on a queue that exists and that this connection may use."""
        async with self.operation(f"queue {name!r}") as vhost:
            yield vhost, vhost.queue(name, self._connection)

    async def publish(self, publication: Publication) -> None:
        """Publish, and wait for the confirm.

        Raises:
            PublishError: It was returned or refused, or no confirm came.
        """
        if self.is_closed:
            raise SessionLost(f"the channel is closed: {self._channel.close_reason}")
        (outcome,) = await self._publisher.publish([publication])
        if outcome is not Outcome.CONFIRMED:
            raise PublishError(
                f"publication to exchange {publication.exchange!r} with routing key"
                f" {publication.routing_key!r}: {self._channel.close_reason or outcome.value}"
            )


class NativeExchange:
    """An exchange, with aio-pika's calls."""

    def __init__(self, channel: NativeChannel, name: str) -> None:
        self._channel = channel
        self.name = name

    async def publish(self, message: Any, routing_key: str, *, mandatory: bool = True) -> None:  # noqa: ANN401  -- any class with aio-pika's attributes
        """Publish a message, and wait for the confirm.

        Raises:
            PublishError: It was returned or refused, or no confirm came.
        """
        await self._channel.publish(
            read_message(message, exchange=self.name, routing_key=routing_key, mandatory=mandatory)
        )

    async def delete(self) -> None:
        """Delete it."""
        async with self._channel.operation(f"exchange {self.name!r}") as vhost:
            vhost.delete_exchange(self.name)


class NativeQueue:
    """A queue, with aio-pika's calls."""

    def __init__(self, channel: NativeChannel, name: str) -> None:
        self._channel = channel
        self.name = name

    async def bind(
        self,
        exchange: NativeExchange | str,
        routing_key: str | None = None,
        *,
        arguments: _Arguments = None,
    ) -> None:
        """Bind it; the default routing key is its name."""
        await self._rebind(VirtualHost.bind, exchange, routing_key, arguments)

    async def unbind(
        self,
        exchange: NativeExchange | str,
        routing_key: str | None = None,
        *,
        arguments: _Arguments = None,
    ) -> None:
        """Remove a binding."""
        await self._rebind(VirtualHost.unbind, exchange, routing_key, arguments)

    async def _rebind(
        self,
        change: Callable[[VirtualHost, MemoryQueue, str, str, Headers], None],
        exchange: NativeExchange | str,
        routing_key: str | None,
        arguments: _Arguments,
    ) -> None:
        key = self.name if routing_key is None else routing_key
        source = exchange if isinstance(exchange, str) else exchange.name
        async with self._channel.queue_operation(self.name) as (vhost, queue):
            change(vhost, queue, source, key, arguments or {})

    async def purge(self) -> None:
        """Drop its ready messages."""
        async with self._channel.queue_operation(self.name) as (_, queue):
            queue.purge()

    async def delete(self, *, if_unused: bool = True, if_empty: bool = True) -> None:
        """Delete it, by default only if it has neither consumers nor ready messages."""
        async with self._channel.queue_operation(self.name) as (vhost, queue):
            for is_refused, reason in (
                (if_unused and len(queue.consumers), "in use"),
                (if_empty and len(queue.ready), "not empty"),
            ):
                if is_refused:
                    raise Refusal(
                        ReplyCode.PRECONDITION_FAILED,
                        f"queue '{self.name}' in vhost '/' {reason}",
                    )
            vhost.delete_queue(queue)


def read_message(message: Any, *, exchange: str, routing_key: str, mandatory: bool) -> Publication:  # noqa: ANN401  -- any class with aio-pika's attributes
    """Return the publication of a message; an attribute that it does not have is absent."""
    properties = {each.name: getattr(message, each.name, None) for each in _PROPERTIES}
    for name in ("delivery_mode", "priority"):
        if (number := properties[name]) is not None:
            properties[name] = int(number)  # aio-pika's delivery mode is an enum
    # aio-pika does not distinguish empty headers from absent ones.
    properties["headers"] = properties["headers"] or None
    if isinstance(expiration := properties["expiration"], datetime):
        # As in aio-pika, a moment counts from now.
        properties["expiration"] = expiration - datetime.now(expiration.tzinfo)
    if isinstance(timestamp := properties["timestamp"], int | float):
        properties["timestamp"] = datetime.fromtimestamp(timestamp, UTC)
    return Publication(
        message.body, exchange=exchange, routing_key=routing_key, mandatory=mandatory, **properties
    )


_PROPERTIES = [each for each in fields(NativeMessage) if each.name != "body"]
