"""Is everything there that a consumer needs, and is it what was asked for?

On a connection of its own, which is thrown away at the first refusal: a refusal closes the
channel, and the client library may drop its answer to that, after which the channel's number is
poisoned.

What is exclusive lives no longer than the connection that declared it, so a session declares it on
its own.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeAlias, assert_never

from aio_pika_batch.adapters.aio_pika.broker_errors import NOT_FOUND, refused_entity
from aio_pika_batch.adapters.aio_pika.client_errors import said
from aio_pika_batch.adapters.aio_pika.connection import Link, open_link
from aio_pika_batch.adapters.aio_pika.events import ChannelClosed, ConnectionClosed
from aio_pika_batch.adapters.aio_pika.translate import describe, translated
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

    from aio_pika_batch.adapters.aio_pika.events import Event
    from aio_pika_batch.adapters.aio_pika.urls import Address
    from aio_pika_batch.transport import Endpoint

Entity: TypeAlias = Exchange | Queue | Binding
Refusal: TypeAlias = ChannelClosed | ConnectionClosed


def refuse_streams(topology: Topology) -> None:
    """Raise TopologyError where a queue is asked to be a stream."""
    for queue in topology.queues:
        if queue.arguments.get(QUEUE_TYPE) == "stream":
            raise TopologyError(
                f"queue {queue.name!r} is to be a stream (x-queue-type): its messages are neither"
                " rejected nor requeued one by one; use a classic or quorum queue"
            )


async def declare(
    endpoint: Endpoint, addresses: Sequence[Address], topology: Topology
) -> Version | None:
    """Declare and check. Raises TopologyError, AccessRefused, BrokerUnavailable.

    Returns:
        The version of the broker, where it says so.
    """
    refuse_streams(topology)
    first = await _open_desk(endpoint, addresses)
    desk: _Desk | None = first
    version = first.version
    try:
        for entity in _entities(topology):
            refusal: Refusal | None = None
            for passive in _ways(entity):
                if desk is None:
                    desk = await _open_desk(endpoint, addresses)
                if isinstance(entity, Queue):
                    refuse_lossy_wait_queue(entity, *desk.link.broker)
                refusal = await desk.declare(entity, passive=passive)
                if refusal is None:
                    break
                await desk.link.close()
                address, desk = desk.link.address, None
                if refusal.code != NOT_FOUND:
                    break
            if refusal is not None:
                fix = entity.if_unequal if isinstance(entity, Queue) else None
                raise refused_entity(refusal.code, refusal.text, _name(entity), address, fix)
    finally:
        if desk is not None:
            await desk.link.close()
    return version


async def count(endpoint: Endpoint, addresses: Sequence[Address], queue: str) -> int:
    """How many messages are ready in a queue. Raises as above."""
    desk = await _open_desk(endpoint, addresses)
    try:
        entity = Queue(queue, check_only=True)
        refusal = await desk.declare(entity, passive=True)
        if refusal is not None:
            raise refused_entity(refusal.code, refusal.text, _name(entity), desk.link.address)
        return desk.ready
    finally:
        await desk.link.close()


async def declare_on(link: Link, topology: Topology, timeout: float) -> None:
    """Declare on a given connection, of no more use if that is refused. Raises as above."""
    desk = _Desk(link, timeout)
    for entity in _entities(topology):
        refusal = await desk.declare(entity, passive=False)
        if refusal is not None:
            raise refused_entity(refusal.code, refusal.text, _name(entity), link.address)


async def _open_desk(endpoint: Endpoint, addresses: Sequence[Address]) -> _Desk:
    return _Desk(await open_link(endpoint, addresses), endpoint.connect_timeout)


class _Desk:
    """A channel on which entities are declared, until the first refusal.

    Attributes:
        ready: How many messages wait in the queue that was declared last.
    """

    def __init__(self, link: Link, timeout: float) -> None:
        self.link = link
        self._timeout = timeout
        self._channel: AbstractChannel | None = None
        self._refusal: Refusal | None = None
        self.ready = 0

    @property
    def version(self) -> Version | None:
        """Of the broker."""
        return parse_version(*self.link.broker)

    async def declare(self, entity: Entity, *, passive: bool) -> Refusal | None:
        """Declare one entity, or only look for it. Raises TransportError, but not for a refusal."""
        try:
            with translated(lambda error: self._failed(entity, error)):
                async with asyncio.timeout(self._timeout):
                    if self._channel is None:
                        self._channel = await self.link.channel()
                        self.link.line.watch(self._channel, self._heard)
                    self.ready = await _request(
                        self._channel, entity, self.version, passive=passive
                    )
        except TransportError:
            if self._refusal is None:
                raise
        return self._refusal

    def _heard(self, event: Event) -> None:
        if isinstance(event, ChannelClosed | ConnectionClosed):
            self._refusal = event

    def _failed(self, entity: Entity, error: BaseException) -> Exception:
        what = f"{_name(entity)} at {self.link.address}"
        if self._refusal is None:
            self._refusal = said(error)
        match error:
            case TypeError() | ValueError():
                # Of the client library, before it has sent anything.
                return TopologyError(f"{what}: {describe(error)}; correct its name or arguments")
            case TimeoutError():
                return BrokerUnavailable(f"{what}: no answer within {self._timeout:g} s")
            case _:
                return BrokerUnavailable(f"{what}: {describe(error)}")


async def _request(
    channel: AbstractChannel,
    entity: Entity,
    version: Version | None,
    *,
    passive: bool,
) -> int:
    """Ask for it. Returns how many messages it has: 0, but for a queue."""
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
    """All of it, in order, but for the default exchange: that is there, and nothing binds to it."""
    yield from (exchange for exchange in topology.exchanges if exchange.name)
    yield from topology.queues
    yield from (binding for binding in topology.bindings if binding.exchange)


def _ways(entity: Entity) -> tuple[bool, ...]:
    """Whether to ask passively: once, or first so and then, if there is none, otherwise."""
    match entity:
        case Exchange(check_only=True) | Queue(check_only=True):
            return (True,)
        case Exchange(existing_first=True) | Queue(existing_first=True):
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
