"""What would aio-pika's objects do here?

The calls that consumers make on `channel` and `queue`, with aio-pika's names, on the broker in
memory. Messages may be aio-pika's own, or anything else with the same attributes; nothing of
aio-pika is imported. Stricter than aio-pika: a message that is returned or refused raises.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from aio_pika_batch.adapters.memory.channels import Gone
from aio_pika_batch.adapters.memory.publisher import MemoryPublisher
from aio_pika_batch.adapters.memory.refusals import Refusal
from aio_pika_batch.core.message import FieldValue
from aio_pika_batch.core.publication import Outcome, Publication
from aio_pika_batch.core.refusals import ReplyCode, refusal_error
from aio_pika_batch.errors import PublishError, SessionLost

if TYPE_CHECKING:
    from aio_pika_batch.adapters.memory.connections import Connection
    from aio_pika_batch.adapters.memory.queues import Queue
    from aio_pika_batch.adapters.memory.vhost import VirtualHost

_Arguments = Mapping[str, FieldValue] | None


@dataclass(slots=True, kw_only=True)
class _Properties:
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


@dataclass(slots=True)
class Message(_Properties):
    """A message to be published, where aio-pika's is not at hand; the keywords are the same."""

    body: bytes


class NativeChannel:
    """A channel.

    Args:
        connection: The session's.
        publish_timeout: Seconds to wait for a confirmation.
    """

    def __init__(self, connection: Connection, *, publish_timeout: float) -> None:
        self._connection = connection
        self._publisher = MemoryPublisher(connection, publish_timeout=publish_timeout)

    @property
    def is_closed(self) -> bool:
        """Whether a mistake, or the end of the session, has closed it."""
        return not self._publisher.is_open

    @property
    def default_exchange(self) -> NativeExchange:
        """The exchange that routes by the queue's name."""
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
        """Declare an exchange, or check that there is one."""
        with self.operation(f"exchange {name!r}") as vhost:
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
        await asyncio.sleep(0)
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
        """Declare a queue, or check that there is one. Without a name the broker chooses one."""
        with self.operation(f"queue {name!r}") as vhost:
            if passive:
                queue = vhost.queue(name or "", self._connection)
            else:
                queue = vhost.declare_queue(
                    name or "",
                    durable=durable,
                    exclusive=exclusive,
                    auto_delete=auto_delete,
                    arguments=arguments or {},
                    asker=self._connection,
                )
        await asyncio.sleep(0)
        return NativeQueue(self, queue.name)

    async def get_exchange(self, name: str, *, ensure: bool = True) -> NativeExchange:
        """An exchange that is there."""
        if ensure:
            return await self.declare_exchange(name, passive=True)
        return NativeExchange(self, name)

    async def get_queue(self, name: str, *, ensure: bool = True) -> NativeQueue:
        """A queue that is there."""
        if ensure:
            return await self.declare_queue(name, passive=True)
        return NativeQueue(self, name)

    @contextmanager
    def operation(self, entity: str) -> Iterator[VirtualHost]:
        """One call, its refusals told in the port's words.

        Raises:
            TopologyError: The broker says no; the channel is closed now.
            SessionLost: The channel was closed before.
        """
        try:
            with self._publisher.channel.operation() as vhost:
                yield vhost
        except Refusal as refusal:
            raise refusal_error(refusal.code, refusal.text, entity) from refusal
        except Gone as gone:
            raise SessionLost(f"the channel is closed: {gone}") from gone

    @contextmanager
    def on_queue(self, name: str) -> Iterator[tuple[VirtualHost, Queue]]:
        """One call on a queue that is there, and not another connection's."""
        with self.operation(f"queue {name!r}") as vhost:
            yield vhost, vhost.queue(name, self._connection)

    async def publish(self, publication: Publication) -> None:
        """Publish, and wait for the confirmation.

        Raises:
            PublishError: It was returned or refused, or nothing was heard of it.
        """
        if self.is_closed:
            raise SessionLost(f"the channel is closed: {self._publisher.channel.closed}")
        (outcome,) = await self._publisher.publish([publication])
        if outcome is not Outcome.CONFIRMED:
            refusal = self._publisher.refusal
            why = outcome.value if refusal is None else str(refusal)
            raise PublishError(
                f"publication to exchange {publication.exchange!r} with routing key"
                f" {publication.routing_key!r}: {why}"
            )


class NativeExchange:
    """An exchange."""

    def __init__(self, channel: NativeChannel, name: str) -> None:
        self._channel = channel
        self.name = name

    async def publish(self, message: Any, routing_key: str, *, mandatory: bool = True) -> None:  # noqa: ANN401  -- whatever looks like aio-pika's
        """Publish a message, and wait for the confirmation.

        Raises:
            PublishError: It was returned or refused, or nothing was heard of it.
        """
        await self._channel.publish(
            publication(message, exchange=self.name, routing_key=routing_key, mandatory=mandatory)
        )

    async def delete(self) -> None:
        """Delete it."""
        with self._channel.operation(f"exchange {self.name!r}") as vhost:
            vhost.delete_exchange(self.name)
        await asyncio.sleep(0)


class NativeQueue:
    """A queue."""

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
        """Bind it; the routing key is its name unless said otherwise."""
        key = self.name if routing_key is None else routing_key
        with self._channel.on_queue(self.name) as (vhost, queue):
            vhost.bind(queue, _name(exchange), key, arguments or {})
        await asyncio.sleep(0)

    async def unbind(
        self,
        exchange: NativeExchange | str,
        routing_key: str | None = None,
        *,
        arguments: _Arguments = None,
    ) -> None:
        """Take a binding away."""
        key = self.name if routing_key is None else routing_key
        with self._channel.on_queue(self.name) as (vhost, queue):
            vhost.unbind(queue, _name(exchange), key, arguments or {})
        await asyncio.sleep(0)

    async def purge(self) -> None:
        """Drop what waits in it."""
        with self._channel.on_queue(self.name) as (_, queue):
            queue.purge()
        await asyncio.sleep(0)

    async def delete(self, *, if_unused: bool = True, if_empty: bool = True) -> None:
        """Delete it."""
        with self._channel.on_queue(self.name) as (vhost, queue):
            for wrong, why in (
                (if_unused and len(queue.consumers), "in use"),
                (if_empty and len(queue.ready), "not empty"),
            ):
                if wrong:
                    raise Refusal(
                        ReplyCode.PRECONDITION_FAILED, f"queue '{self.name}' in vhost '/' {why}"
                    )
            vhost.delete_queue(queue)
        await asyncio.sleep(0)


def publication(message: Any, *, exchange: str, routing_key: str, mandatory: bool) -> Publication:  # noqa: ANN401  -- whatever looks like aio-pika's
    """Read a message by its attributes; one that it does not have is absent."""
    priority = getattr(message, "priority", None)
    mode = getattr(message, "delivery_mode", None)
    return Publication(
        message.body,
        exchange=exchange,
        routing_key=routing_key,
        mandatory=mandatory,
        # aio-pika makes no difference between no headers and none at all.
        headers=getattr(message, "headers", None) or None,
        delivery_mode=None if mode is None else int(mode),
        priority=None if priority is None else int(priority),
        expiration=_seconds(getattr(message, "expiration", None)),
        timestamp=_moment(getattr(message, "timestamp", None)),
        **{name: getattr(message, name, None) for name in _AS_THEY_ARE},
    )


_AS_THEY_ARE = (
    "content_type",
    "content_encoding",
    "correlation_id",
    "reply_to",
    "message_id",
    "type",
    "user_id",
    "app_id",
)


def _seconds(expiration: float | timedelta | datetime | None) -> float | timedelta | None:
    if isinstance(expiration, datetime):
        return expiration - datetime.now(expiration.tzinfo)
    return expiration


def _moment(timestamp: datetime | float | None) -> datetime | None:
    if timestamp is None or isinstance(timestamp, datetime):
        return timestamp
    return datetime.fromtimestamp(timestamp, UTC)


def _name(exchange: NativeExchange | str) -> str:
    return exchange if isinstance(exchange, str) else exchange.name
