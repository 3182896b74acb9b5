"""Declares queues, exchanges and bindings, and checks that they are what was asked for.

It uses a connection of its own, and drops it at the first refusal. A refusal closes the channel,
and aiormq may drop the broker's reply to that; then the channel's number cannot be used again.

An exclusive queue lives no longer than the connection that declared it, so a session declares it on
its own connection.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeAlias, assert_never

from aio_pika_batch.adapters.aio_pika.client_errors import (
    close_reason,
    format_error,
    translate_errors,
)
from aio_pika_batch.adapters.aio_pika.connection import OpenConnection, open_connection
from aio_pika_batch.core.refusals import ReplyCode, refusal_error
from aio_pika_batch.core.topology import (
    QUEUE_TYPE,
    Binding,
    Exchange,
    Queue,
    Topology,
    Version,
    parse_version,
    refuse_lossy_wait_queue,
)
from aio_pika_batch.errors import BrokerUnavailable, TopologyError, TransportError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from aiormq.abc import AbstractChannel

    from aio_pika_batch.adapters.aio_pika.events import Closed
    from aio_pika_batch.adapters.aio_pika.url import Address
    from aio_pika_batch.transport import Endpoint

Entity: TypeAlias = Exchange | Queue | Binding


def refuse_streams(topology: Topology) -> None:
    """Raise TopologyError if a queue is declared as a stream."""
    for queue in topology.queues:
        if queue.arguments.get(QUEUE_TYPE) == "stream":
            raise TopologyError(
                f"queue {queue.name!r} is declared as a stream (x-queue-type), whose messages"
                " cannot be rejected or requeued one by one; use a classic or quorum queue"
            )


async def declare(
    endpoint: Endpoint, addresses: Sequence[Address], topology: Topology
) -> Version | None:
    """Declare and check. Raises TopologyError, AccessRefused or BrokerUnavailable.

    Returns:
        The version of the broker, if it is a RabbitMQ.
    """
    refuse_streams(topology)
    channel = await _open_channel(endpoint, addresses)
    is_open, version = True, channel.version
    try:
        for entity in _entities(topology):
            closed: Closed | None = None
            for passive in _attempts(entity):
                if not is_open:
                    channel = await _open_channel(endpoint, addresses)
                    is_open = True
                if isinstance(entity, Queue):
                    # Old brokers accept arguments that they don't know: only the version tells.
                    refuse_lossy_wait_queue(entity, *channel.connection.product)
                closed = await channel.declare(entity, passive=passive)
                if closed is None:
                    break
                # The broker has closed the channel; see above why its connection goes, too.
                is_open = False
                await channel.connection.close()
                if closed.code != ReplyCode.NOT_FOUND:
                    break
            if closed is not None:
                fix = entity.if_unequal if isinstance(entity, Queue) else None
                raise refusal_error(closed.code, closed.text, channel.describe(entity), fix)
    finally:
        if is_open:
            await channel.connection.close()
    return version


async def count(endpoint: Endpoint, addresses: Sequence[Address], queue: str) -> int:
    """Return how many messages are ready in a queue. Raises as `declare` does."""
    channel = await _open_channel(endpoint, addresses)
    try:
        await channel.declare_or_raise(Queue(queue, check_only=True), passive=True)
        return channel.ready
    finally:
        await channel.connection.close()


async def declare_on(connection: OpenConnection, topology: Topology, timeout: float) -> None:
    """Declare on an open connection, which is useless after a refusal. Raises as `declare` does."""
    channel = _DeclareChannel(connection, timeout)
    for entity in _entities(topology):
        await channel.declare_or_raise(entity, passive=False)


async def _open_channel(endpoint: Endpoint, addresses: Sequence[Address]) -> _DeclareChannel:
    connection = await open_connection(endpoint, addresses)
    return _DeclareChannel(connection, endpoint.connect_timeout)


class _DeclareChannel:
    """A channel on which entities are declared, until the first refusal.

    Attributes:
        ready: How many messages are ready in the queue that was declared last.
    """

    def __init__(self, connection: OpenConnection, timeout: float) -> None:
        self.connection = connection
        self.ready = 0
        self._timeout = timeout
        self._channel: AbstractChannel | None = None

    @property
    def version(self) -> Version | None:
        """The version of the broker, if it is a RabbitMQ."""
        return parse_version(*self.connection.product)

    def describe(self, entity: Entity) -> str:
        """Return the kind and the name of an entity, and where it is."""
        return f"{_name(entity)} at {self.connection.address}"

    async def declare_or_raise(self, entity: Entity, *, passive: bool) -> None:
        """Declare one entity, or only check that it exists. Raises TransportError."""
        closed = await self.declare(entity, passive=passive)
        if closed is not None:
            raise refusal_error(closed.code, closed.text, self.describe(entity))

    async def declare(self, entity: Entity, *, passive: bool) -> Closed | None:
        """Declare one entity, or only check that it exists.

        Returns:
            Why the broker refused, if it did.

        Raises:
            TransportError: It failed in any other way.
        """
        cause: BaseException | None = None

        def failed(error: BaseException) -> Exception:
            nonlocal cause
            cause = error
            return self._error(entity, error)

        try:
            with translate_errors(failed):
                async with asyncio.timeout(self._timeout):
                    if self._channel is None:
                        self._channel = await self.connection.channel()
                        self.connection.tap.watch(self._channel.number)
                    self.ready = await _request(
                        self._channel, entity, self.version, passive=passive
                    )
        except TransportError:
            closed = self.connection.tap.closed or close_reason(cause)
            if closed is None:
                raise
            return closed
        return self.connection.tap.closed

    def _error(self, entity: Entity, error: BaseException) -> Exception:
        what = self.describe(entity)
        match error:
            case TypeError() | ValueError():
                # aiormq raises these before it has sent anything.
                return TopologyError(
                    f"{what}: {format_error(error)}; correct its name or arguments"
                )
            case TimeoutError():
                return BrokerUnavailable(f"{what}: no answer within {self._timeout:g} s")
            case _:
                return BrokerUnavailable(f"{what}: {format_error(error)}")


async def _request(
    channel: AbstractChannel,
    entity: Entity,
    version: Version | None,
    *,
    passive: bool,
) -> int:
    """Send the request. Returns how many messages are ready, if it is a queue."""
    match entity:
        case Exchange():
            await channel.exchange_declare(
                entity.name,
                exchange_type=entity.type,
                passive=passive,
                durable=entity.durable,
                auto_delete=entity.auto_delete,
                arguments=dict[str, Any](entity.arguments),
            )
        case Queue():
            found = await channel.queue_declare(
                entity.name,
                passive=passive,
                durable=entity.durable,
                exclusive=entity.exclusive,
                auto_delete=entity.auto_delete,
                arguments=dict[str, Any](entity.arguments_on(version)),
            )
            return found.message_count or 0
        case Binding():
            await channel.queue_bind(
                entity.queue,
                entity.exchange,
                entity.routing_key,
                arguments=dict[str, Any](entity.arguments),
            )
        case _:
            assert_never(entity)
    return 0


def _entities(topology: Topology) -> Iterator[Entity]:
    """Yield everything in order, except the default exchange, which always exists."""
    yield from (exchange for exchange in topology.exchanges if exchange.name)
    yield from topology.queues
    yield from (binding for binding in topology.bindings if binding.exchange)


def _attempts(entity: Entity) -> tuple[bool, ...]:
    """Return whether to declare passively, for each attempt. Only a 404 leads to the next one."""
    match entity:
        case Exchange(check_only=True) | Queue(check_only=True):
            return (True,)
        case Exchange(existing_first=True) | Queue(existing_first=True):
            # Nothing is created only to see whether it differs.
            return (True, False)
        case _:
            return (False,)


def _name(entity: Entity) -> str:
    match entity:
        case Exchange(name):
            return f"exchange {name!r}"
        case Queue(name):
            return f"queue {name!r}"
        case Binding(queue, exchange, routing_key):
            return f"binding of queue {queue!r} to exchange {exchange!r} with key {routing_key!r}"
        case _:
            assert_never(entity)
