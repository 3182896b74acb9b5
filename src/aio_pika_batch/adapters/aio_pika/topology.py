"""Declares queues, exchanges and bindings, and checks that they are what was asked for.

It uses a connection of its own, and drops it at the first refusal. A refusal closes the channel,
and aiormq may drop the broker's reply to that; then the channel's number cannot be used again.

An exclusive queue lives no longer than the connection that declared it, so a session declares it on
its own connection.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self, TypeAlias, assert_never

from aio_pika_batch.adapters.aio_pika.client_errors import (
    close_reason,
    translate_errors,
)
from aio_pika_batch.adapters.aio_pika.connection import (
    ExchangeDeclare,
    OpenConnection,
    QueueBind,
    QueueDeclare,
    open_connection,
)
from aio_pika_batch.adapters.connecting import reason_of
from aio_pika_batch.core.refusals import (
    ReplyCode,
    UnequalArgument,
    publish_refusal_error,
    refusal_error,
    unequal_argument,
)
from aio_pika_batch.core.topology import (
    Binding,
    Exchange,
    PublishCheck,
    Queue,
    Topology,
    UnfulfilledWishes,
    Version,
    parse_version,
    refuse_lossy_wait_queue,
)
from aio_pika_batch.core.topology_options import QUEUE_TYPE
from aio_pika_batch.errors import BrokerUnavailable, TopologyError, TransportError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

    from aiormq.channel import Channel

    from aio_pika_batch.adapters.aio_pika.events import Closed
    from aio_pika_batch.core.message import Headers
    from aio_pika_batch.transport import Endpoint

Entity: TypeAlias = Exchange | Queue | Binding

BLOCKED_AFTER = 2.0
"""Seconds without an answer to a publish after which the broker is taken to have an alarm: it then
reads nothing more from a connection that has published."""


def refuse_streams(topology: Topology) -> None:
    """Raise TopologyError if a queue is declared as a stream."""
    for queue in topology.queues:
        if queue.arguments.get(QUEUE_TYPE) == "stream":
            raise TopologyError(
                f"queue {queue.name!r} is declared as a stream (x-queue-type), whose messages"
                " cannot be rejected or requeued one by one; use a classic or quorum queue"
            )


async def declare(
    endpoint: Endpoint, topology: Topology
) -> tuple[Version | None, dict[str, UnfulfilledWishes]]:
    """Declare and check. Raises TopologyError, AccessRefused or BrokerUnavailable.

    Returns:
        The version of the broker, if it is a RabbitMQ, and what existing queues lack.
    """
    refuse_streams(topology)
    unfulfilled: dict[str, UnfulfilledWishes] = {}
    async with _Declarer(endpoint) as declarer:
        # The default exchange first: a user who can't retry declares nothing.
        first = [each for each in topology.publishes if not each.exchange]
        await declarer.check_publishing(first)
        for entity in _entities(topology):
            accepted = await declarer.declare_or_raise(entity)
            if isinstance(entity, Queue):
                unfulfilled[entity.name] = entity.unfulfilled(accepted, declarer.version)
        await declarer.check_publishing([each for each in topology.publishes if each.exchange])
    return declarer.version, {name: each for name, each in unfulfilled.items() if each}


async def exchange_type(endpoint: Endpoint, exchange: Exchange) -> str | None:
    """Return the type of an existing exchange; None if it is missing, or can't be seen."""
    async with _Declarer(endpoint) as declarer:
        if await declarer.attempt(exchange, passive=True) is not None:
            return None
        # If it is deleted in between, this creates it as the consumer would.
        refused = await declarer.attempt(exchange)
    if refused is None:
        return exchange.type
    match unequal_argument(refused.text):
        case UnequalArgument("type", str(kind)):
            return kind
        case UnequalArgument():
            # The broker compares the type first.
            return exchange.type
        case None:
            return None


class _Declarer:
    """Declares one entity after the other; opens a new connection after each refusal.

    Attributes:
        ready: How many messages are ready in the queue that was declared last.
        version: The version of the broker, if it is a RabbitMQ.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._channel: _DeclareChannel | None = None
        self._where = ""
        self.ready = 0
        self.version: Version | None = None

    async def __aenter__(self) -> Self:
        # Also if there is nothing to declare: the broker can be reached.
        await self._open()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._channel is not None:
            await self._channel.connection.close()

    async def _open(self) -> _DeclareChannel:
        if self._channel is None:
            connection = await open_connection(self._endpoint)
            self._channel = _DeclareChannel(connection, self._endpoint.connect_timeout)
            self.version = self._channel.version
            self._where = str(connection.address)
        return self._channel

    async def attempt(self, entity: Entity, *, passive: bool = False) -> Closed | None:
        """Declare once; return why the broker refused, if it did. Raises TransportError."""
        channel = await self._open()
        if isinstance(entity, Queue):
            # Old brokers accept arguments that they don't know: only the version tells.
            refuse_lossy_wait_queue(entity, *channel.connection.product)
        closed = await channel.declare(entity, passive=passive)
        self.ready = channel.ready
        if closed is not None:
            await self._drop(channel)
        return closed

    async def _drop(self, channel: _DeclareChannel) -> None:
        # The broker has closed the channel; see above why its connection goes, too.
        self._channel = None
        await channel.connection.close()

    async def declare_or_raise(self, entity: Entity) -> Headers:
        """Declare or check an entity; return the arguments that the broker has accepted."""
        if not isinstance(entity, Binding) and (entity.check_only or entity.existing_first):
            # Nothing is created only to see whether it differs.
            closed = await self.attempt(entity, passive=True)
            if closed is None:
                return entity.arguments
            if entity.check_only or closed.code != ReplyCode.NOT_FOUND:
                raise _refusal(entity, self._where, closed)
        if not isinstance(entity, Queue):
            closed = await self.attempt(entity)
            if closed is not None:
                raise _refusal(entity, self._where, closed)
            return {}
        await self._open()  # tells the version
        arguments = entity.arguments_on(self.version)
        while closed := await self.attempt(replace(entity, arguments=arguments)):
            following = None
            if closed.code == ReplyCode.PRECONDITION_FAILED:
                following = entity.arguments_after(arguments, closed.text)
            if following is None:
                raise _refusal(entity, self._where, closed)
            arguments = following
        return arguments

    async def check_publishing(self, checks: Sequence[PublishCheck]) -> None:
        """Raise TopologyError if the user may not publish to one of the exchanges."""
        for check in checks:
            channel = await self._open()
            try:
                closed = await channel.check_publishing(check)
            except BrokerUnavailable:
                # It may well be allowed, and consuming is what ends a memory alarm.
                await self._drop(channel)
                return
            if closed is not None:
                await self._drop(channel)
                raise publish_refusal_error(closed.code, closed.text, check.exchange, self._where)


async def count(endpoint: Endpoint, queue: str) -> int:
    """Return how many messages are ready in a queue. Raises as `declare` does."""
    async with _Declarer(endpoint) as declarer:
        await declarer.declare_or_raise(Queue(queue, check_only=True))
        return declarer.ready


async def declare_on(connection: OpenConnection, topology: Topology, timeout: float) -> None:
    """Declare on an open connection, which is useless after a refusal. Raises as `declare` does."""
    channel = _DeclareChannel(connection, timeout)
    for entity in _entities(topology):
        if isinstance(entity, Queue):
            # It is new, so it has what the broker accepts.
            entity = replace(entity, arguments=entity.arguments_on(channel.version))  # noqa: PLW2901
        closed = await channel.declare(entity)
        if closed is not None:
            raise _refusal(entity, str(connection.address), closed)


def _refusal(entity: Entity, where: str, closed: Closed) -> TransportError:
    advice = (entity.if_unequal, entity.if_missing) if isinstance(entity, Queue) else ()
    return refusal_error(closed.code, closed.text, f"{_name(entity)} at {where}", *advice)


class _DeclareChannel:
    """A channel on which entities are declared, until the first refusal.

    Attributes:
        ready: How many messages are ready in the queue that was declared last.
    """

    def __init__(self, connection: OpenConnection, timeout: float) -> None:
        self.connection = connection
        self.ready = 0
        self._timeout = timeout
        self._channel: Channel | None = None

    @property
    def version(self) -> Version | None:
        """The version of the broker, if it is a RabbitMQ."""
        return parse_version(*self.connection.product)

    async def declare(self, entity: Entity, *, passive: bool = False) -> Closed | None:
        """Declare one entity, or only check that it exists.

        Returns:
            Why the broker refused, if it did.

        Raises:
            TransportError: It failed in any other way.
        """

        async def request(channel: Channel) -> None:
            self.ready = await _request(channel, entity, passive=passive)

        return await self._call(request, _name(entity), self._timeout)

    async def check_publishing(self, check: PublishCheck) -> Closed | None:
        """Publish to an exchange in a transaction that is rolled back, so that it has no effect.

        Returns:
            Why the broker refused, if it did.

        Raises:
            TransportError: It failed in any other way.
        """

        async def request(channel: Channel) -> None:
            await channel.tx_select()
            with suppress(ValueError):  # an exchange that aiormq can't name is not checked
                await channel.basic_publish(
                    b"", exchange=check.exchange, routing_key=check.routing_key
                )
            await channel.tx_rollback()

        what = f"publishing to exchange {check.exchange!r}"
        return await self._call(request, what, min(self._timeout, BLOCKED_AFTER))

    async def _call(
        self, request: Callable[[Channel], Awaitable[None]], what: str, timeout: float
    ) -> Closed | None:
        subject = f"{what} at {self.connection.address}"
        try:
            with translate_errors(lambda error: _call_error(subject, error, timeout)):
                async with asyncio.timeout(timeout):
                    if self._channel is None:
                        self._channel = await self.connection.channel()
                        self.connection.tap.listen(None).watch(self._channel.number)
                    await request(self._channel)
        except TransportError as error:
            closed = self.connection.tap.closed or close_reason(error)
            if closed is None:
                raise
            return closed
        return self.connection.tap.closed


def _call_error(subject: str, error: BaseException, timeout: float) -> Exception:
    match error:
        case TypeError() | ValueError():
            # aiormq raises these before it has sent anything.
            return TopologyError(f"{subject}: {reason_of(error)}; correct its name or arguments")
        case TimeoutError():
            return BrokerUnavailable(f"{subject}: no answer within {timeout:g} s")
        case _:
            return BrokerUnavailable(f"{subject}: {reason_of(error)}")


async def _request(channel: Channel, entity: Entity, *, passive: bool) -> int:
    """Send the request. Returns how many messages are ready, if it is a queue."""
    match entity:
        case Exchange():
            await channel.rpc(
                ExchangeDeclare(
                    exchange=entity.name,
                    exchange_type=entity.type,
                    passive=passive,
                    durable=entity.durable,
                    auto_delete=entity.auto_delete,
                    internal=entity.internal,
                    arguments=dict[str, Any](entity.arguments),
                )
            )
        case Queue():
            found = await channel.rpc(
                QueueDeclare(
                    queue=entity.name,
                    passive=passive,
                    durable=entity.durable,
                    exclusive=entity.exclusive,
                    auto_delete=entity.auto_delete,
                    arguments=dict[str, Any](entity.arguments),
                )
            )
            return found.message_count or 0
        case Binding():
            await channel.rpc(
                QueueBind(
                    queue=entity.queue,
                    exchange=entity.exchange,
                    routing_key=entity.routing_key,
                    arguments=dict[str, Any](entity.arguments),
                )
            )
        case _:
            assert_never(entity)
    return 0


def _entities(topology: Topology) -> Iterator[Entity]:
    """Yield everything in order, except the default exchange, which always exists."""
    yield from (exchange for exchange in topology.exchanges if exchange.name)
    yield from topology.queues
    yield from (binding for binding in topology.bindings if binding.exchange)


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
