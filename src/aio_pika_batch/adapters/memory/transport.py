"""Implements the port on the broker in memory, for `memory://name`.

There is one broker for each name and event loop. It lives as long as the loop does, and its
messages are lost with it.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from urllib.parse import parse_qs, urlsplit
from weakref import WeakKeyDictionary

from aio_pika_batch.adapters.memory.broker import Broker, BrokerUnreachable
from aio_pika_batch.adapters.memory.channel import Connection
from aio_pika_batch.adapters.memory.rabbitmq import (
    NEWEST,
    QueueType,
    Refusal,
    publish_forbidden,
    translate_refusals,
    version_rules,
)
from aio_pika_batch.adapters.memory.session import (
    MemoryModifyingSession,
    MemoryPublisher,
    MemorySession,
)
from aio_pika_batch.adapters.memory.vhost import VirtualHost
from aio_pika_batch.core.refusals import ReplyCode, publish_refusal_error
from aio_pika_batch.core.topology import (
    Exchange,
    Queue,
    Topology,
    UnfulfilledWishes,
    Version,
    parse_version,
    refuse_lossy_wait_queue,
)
from aio_pika_batch.errors import AccessRefused, BrokerUnavailable, ConfigurationError
from aio_pika_batch.transport import Endpoint, Subscription, Wire

# Weak keys, so that a broker does not outlive its loop, and nothing leaks from test to test.
_BROKERS: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, Broker]] = WeakKeyDictionary()


def open_transport(endpoint: Endpoint) -> MemoryTransport:
    """Return the transport for `memory://name` or `memory://name?version=4.0`.

    Raises:
        ConfigurationError: The URL has other parts.
    """
    url = urlsplit(endpoint.url)
    query = parse_qs(url.query, keep_blank_values=True)
    version = query.pop("version", [NEWEST])[-1]
    if url.scheme != "memory" or "," in endpoint.url or url.path.strip("/") or query:
        raise ConfigurationError(
            "the URL of a broker in memory must be memory://name or memory://name?version=4.0"
        )
    # An unknown version is an error now, and not when the consumer starts.
    version_rules(version)
    return MemoryTransport(
        name=url.hostname or "",
        version=version,
        publish_timeout=endpoint.publish_timeout,
        connection_name=endpoint.connection_name,
        wire=endpoint.wire,
    )


class MemoryTransport:
    """A transport to a broker in memory.

    Args:
        broker: The broker; None: the running event loop's broker of that name.
        name: The name of the loop's broker.
        version: The version of RabbitMQ that the loop's broker imitates.
        publish_timeout: Seconds to wait for confirms.
        connection_name: The broker's name for the connections.
        wire: With `amqp10`, sessions use AMQP 1.0 where the version and the queue allow it.
        wall_clock: Returns seconds since 1970, for the age of messages.
    """

    def __init__(
        self,
        broker: Broker | None = None,
        *,
        name: str = "",
        version: str = NEWEST,
        publish_timeout: float = 10.0,
        connection_name: str = "aio-pika-batch",
        wire: Wire = "auto",
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._broker = broker
        self._name = name
        self._version = version
        self._publish_timeout = publish_timeout
        self._connection_name = connection_name
        self._wire = wire
        self._wall_clock = wall_clock

    @property
    def broker(self) -> Broker:
        """The broker, for tests; it runs on the clock of the running event loop from now on.

        Raises:
            ConfigurationError: The loop's broker of that name imitates another version.
        """
        broker = self._broker
        if broker is None:
            brokers = _BROKERS.setdefault(asyncio.get_running_loop(), {})
            broker = brokers.get(self._name)
            if broker is None:
                broker = brokers[self._name] = Broker(self._version)
            if broker.version != self._version:
                raise ConfigurationError(
                    f"memory://{self._name} imitates RabbitMQ {broker.version} already, not"
                    f" {self._version}; use another name"
                )
        _use_clock_of_running_loop(broker)
        return broker

    @property
    def broker_version(self) -> Version | None:
        """The version of RabbitMQ that is imitated."""
        return parse_version("RabbitMQ", self.broker.version)

    async def declare(self, topology: Topology) -> Mapping[str, UnfulfilledWishes]:
        """Declare and check. An exclusive queue is deleted at once, with its connection."""
        async with self._connected() as connection:
            return _declare(connection, topology)

    async def exchange_type(self, exchange: Exchange) -> str | None:
        """Return the type that an exchange has on the broker."""
        async with self._connected() as connection:
            with connection.channel().operation() as vhost:
                existing = vhost.exchanges.get(exchange.name)
                return None if existing is None else existing.type.value

    async def count(self, queue: str) -> int:
        """Return the number of ready messages in a queue."""
        async with self._connected() as connection:
            with translate_refusals(f"queue {queue!r}"), connection.channel().operation() as vhost:
                return len(vhost.queue(queue, connection).ready)

    @asynccontextmanager
    async def session(self, subscription: Subscription) -> AsyncIterator[MemorySession]:
        """Consume until the context is left."""
        async with self._connected() as connection:
            # An exclusive queue belongs to the connection that declares it.
            _declare(connection, subscription.own)
            kind = MemorySession
            if self._wire == "amqp10" and _allows_amqp10(connection, subscription):
                kind = MemoryModifyingSession
            session = kind(
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
        """Publish until the context is left."""
        async with self._connected() as connection:
            publisher = MemoryPublisher(connection, publish_timeout=self._publish_timeout)
            try:
                yield publisher
            finally:
                publisher.end()

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Connection]:
        broker = self.broker
        # Connecting to a real broker takes time, in which other tasks run.
        await asyncio.sleep(0)
        try:
            connection = broker.connect(self._connection_name)
        except BrokerUnreachable as error:
            raise BrokerUnavailable(f"memory://{self._name}: {error}") from error
        except Refusal as refusal:
            raise AccessRefused(f"memory://{self._name}: {refusal}") from refusal
        try:
            yield connection
        finally:
            connection.close()


def _allows_amqp10(connection: Connection, subscription: Subscription) -> bool:
    """Whether a session can use AMQP 1.0, and its own retries don't use up a delivery limit."""
    rules = connection.rules
    with connection.channel().operation() as vhost:
        queue = vhost.queues.get(subscription.queue)
    return (
        rules.modifies
        and not (subscription.exclusive or subscription.for_copies)
        and queue is not None
        and queue.spec.type is QueueType.QUORUM
        and (rules.counts_failures or queue.spec.delivery_limit is None)
    )


# --- topology ------------------------------------------------------------------


def _declare(connection: Connection, topology: Topology) -> dict[str, UnfulfilledWishes]:
    for exchange in topology.exchanges:
        with translate_refusals(f"exchange {exchange.name!r}"):
            _ensure_exchange(connection, exchange)
    unfulfilled: dict[str, UnfulfilledWishes] = {}
    for queue in topology.queues:
        refuse_lossy_wait_queue(queue, "RabbitMQ", connection.rules.version)
        with translate_refusals(f"queue {queue.name!r}", queue.if_unequal, queue.if_missing):
            unfulfilled[queue.name] = _ensure_queue(connection, queue)
    for binding in topology.bindings:
        subject = f"binding of queue {binding.queue!r} to exchange {binding.exchange!r}"
        with translate_refusals(subject), connection.channel().operation() as vhost:
            vhost.bind(
                vhost.queue(binding.queue, connection),
                binding.exchange,
                binding.routing_key,
                binding.arguments,
            )
    for check in topology.publishes:
        try:
            with connection.channel().operation() as vhost:
                vhost.check_publish(check.exchange)
                if connection.faults.forbids(check.exchange, check.routing_key):
                    raise publish_forbidden(check.exchange, connection.user)
        except Refusal as refusal:
            code, text = refusal.code, refusal.text
            raise publish_refusal_error(code, text, check.exchange, "memory://") from refusal
    return {name: each for name, each in unfulfilled.items() if each}


def _ensure_exchange(connection: Connection, exchange: Exchange) -> None:
    if not _exists(connection, exchange, lambda vhost: vhost.exchange(exchange.name)):
        with connection.channel().operation() as vhost:
            vhost.declare_exchange(
                exchange.name,
                exchange.type,
                durable=exchange.durable,
                auto_delete=exchange.auto_delete,
                internal=exchange.internal,
                arguments=exchange.arguments,
            )


def _ensure_queue(connection: Connection, queue: Queue) -> UnfulfilledWishes:
    """Declare or check a queue; return what it was declared without."""
    if _exists(connection, queue, lambda vhost: vhost.queue(queue.name, connection)):
        return UnfulfilledWishes()
    version = parse_version("RabbitMQ", connection.rules.version)
    arguments = queue.arguments_on(version)
    while True:
        try:
            with connection.channel().operation() as vhost:
                vhost.declare_queue(
                    queue.name,
                    durable=queue.durable,
                    exclusive=queue.exclusive,
                    auto_delete=queue.auto_delete,
                    arguments=arguments,
                    connection=connection,
                )
        except Refusal as refusal:
            following = None
            if refusal.code is ReplyCode.PRECONDITION_FAILED:
                following = queue.arguments_after(arguments, refusal.text)
            if following is None:
                raise
            arguments = following
        else:
            return queue.unfulfilled(arguments, version)


def _exists(
    connection: Connection, entity: Exchange | Queue, find: Callable[[VirtualHost], object]
) -> bool:
    """Return whether to use an entity as it is; it must exist if it is only to be checked."""
    if not (entity.check_only or entity.existing_first):
        return False
    try:
        # On a channel of its own, which a refusal closes.
        with connection.channel().operation() as vhost:
            find(vhost)
    except Refusal as refusal:
        if entity.check_only or refusal.code is not ReplyCode.NOT_FOUND:
            raise
        return False
    return True


# --- the event loop's clock ----------------------------------------------------


class LoopClock:
    """The clock of an event loop, as the broker's clock.

    The broker's time continues where it stood, since a broker may outlive a loop, and the clocks of
    two loops may differ.
    """

    def __init__(self, broker: Broker, loop: asyncio.AbstractEventLoop) -> None:
        self._broker = broker
        # Weak references only: a broker must not keep a finished loop alive, and neither must the
        # handle of its timer, which refers to the loop.
        self._loop = weakref.ref(loop)
        self._timer: weakref.ref[asyncio.TimerHandle] | None = None
        # The broker's time never runs backwards.
        self._offset = max(0.0, broker.now - loop.time())
        self._last_time = broker.now
        self._due: float | None = None

    def is_of(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Return whether it is this loop's clock."""
        return self._loop() is loop

    def time(self) -> float:
        """Return the present time; after the end of the loop, the last one that was read."""
        loop = self._loop()
        if loop is not None:
            self._last_time = loop.time() + self._offset
        return self._last_time

    def set_timer(self, when: float | None) -> None:
        """Advance the broker at this time, instead of at an earlier timer's; None: never."""
        if when == self._due:
            return
        self._due = when
        timer = None if self._timer is None else self._timer()
        if timer is not None:
            timer.cancel()
        loop = self._loop()
        if when is not None and loop is not None and not loop.is_closed():
            self._timer = weakref.ref(loop.call_at(when - self._offset, self._on_timer, when))

    def _on_timer(self, when: float) -> None:
        self._due = None
        # A loop may call a little early, by the resolution of its clock.
        self._broker.advance(max(when, self.time()))


def _use_clock_of_running_loop(broker: Broker) -> None:
    loop = asyncio.get_running_loop()
    if not (isinstance(broker.clock, LoopClock) and broker.clock.is_of(loop)):
        if broker.clock is not None:
            broker.clock.set_timer(None)
        broker.clock = LoopClock(broker, loop)
