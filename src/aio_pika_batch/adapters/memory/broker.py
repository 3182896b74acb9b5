"""Implements RabbitMQ in memory: strict, synchronous, and without a clock of its own.

It behaves as RabbitMQ does, down to its texts, and is stricter where AMQP would let a mistake pass.
Its time is a number that `advance` sets, or that it reads from its `clock`.

Not imitated: streams, priorities of quorum queues, policies, permissions, virtual hosts other than
`/`, exchange-to-exchange bindings, plugins, publishing in transactions, flow control, consumer
timeouts, and whatever only happens in a cluster.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol, assert_never

from aio_pika_batch.adapters.memory.channel import Channel, ChannelIsClosed, Connection
from aio_pika_batch.adapters.memory.faults import (
    ConnectFault,
    EventKind,
    Faults,
    Journal,
    PublishFault,
)
from aio_pika_batch.adapters.memory.queue import MemoryQueue
from aio_pika_batch.adapters.memory.rabbitmq import (
    NEWEST,
    Refusal,
    publish_forbidden,
    version_rules,
)
from aio_pika_batch.adapters.memory.stored_message import (
    StoredMessage,
    check_publication,
    copy_headers,
    store_publication,
)
from aio_pika_batch.adapters.memory.vhost import VirtualHost
from aio_pika_batch.core.message import Headers, Properties
from aio_pika_batch.core.publication import Outcome, Publication
from aio_pika_batch.core.refusals import ReplyCode


class BrokerUnreachable(Exception):
    """The broker does not answer."""


class BrokerClock(Protocol):
    """The time of a broker, and its timer."""

    def time(self) -> float:
        """Return the present time, in seconds."""
        ...

    def set_timer(self, when: float | None) -> None:
        """Call `Broker.advance` at this time, instead of an earlier timer's; None: never."""
        ...


class Broker:
    """A broker in memory.

    Args:
        version: The version of RabbitMQ to imitate: `3.8`, `3.10`, `4.0` or `4.3`.
        user: The user of all connections.
        journal_size: How many events the journal keeps.

    Attributes:
        faults: What goes wrong.
        journal: What has happened.
        clock: Gives the time, and calls when something is due; None: time changes only by
            `advance`.
    """

    def __init__(
        self, version: str = NEWEST, *, user: str = "guest", journal_size: int = 100_000
    ) -> None:
        self.rules = version_rules(version)
        self.user = user
        self.faults = Faults()
        self.journal = Journal(journal_size)
        self.vhost = VirtualHost(self.rules, self.journal)
        self.clock: BrokerClock | None = None
        self._connections: dict[Connection, None] = {}
        self._blocked: deque[tuple[Channel, int, StoredMessage, bool]] = deque()
        self._depth = 0

    @property
    def version(self) -> str:
        """The imitated version of RabbitMQ."""
        return self.rules.version

    def connect(self, name: str = "") -> Connection:
        """Connect a client.

        Raises:
            BrokerUnreachable: The fault in force is `ConnectFault.UNREACHABLE`.
            Refusal: The fault in force is `ConnectFault.WRONG_PASSWORD`.
        """
        match self.faults.connect_fault:
            case ConnectFault.UNREACHABLE:
                raise BrokerUnreachable("connection refused")
            case ConnectFault.WRONG_PASSWORD:
                raise Refusal(
                    ReplyCode.ACCESS_REFUSED,
                    "Login was refused using authentication mechanism PLAIN. For details see the"
                    " broker logfile.",
                )
            case ConnectFault.NONE:
                connection = Connection(self, name, self.user)
                self._connections[connection] = None
                self.vhost.record(EventKind.CONNECTED, "", None, name)
                return connection
            case never:
                assert_never(never)

    # -- time --

    @property
    def now(self) -> float:
        """The broker's time."""
        return self.vhost.now

    @property
    def next_event(self) -> float | None:
        """When a message or a queue expires next; None: never."""
        return self.vhost.next_deadline()

    def advance(self, now: float) -> None:
        """Set the time and do what is due; an earlier time than the present one is ignored."""
        self.vhost.now = max(self.vhost.now, now)
        self.vhost.expire()
        self.vhost.run()
        self._set_timer()

    @contextmanager
    def operation(self) -> Iterator[VirtualHost]:
        """Change something, at the present time and with all that follows; may be nested."""
        if self._depth == 0 and self.clock is not None:
            self.advance(self.clock.time())
        self._depth += 1
        try:
            yield self.vhost
        finally:
            self._depth -= 1
            # Only at the end of the outermost operation: messages of connections that are cut
            # together must not be delivered to one of them.
            if self._depth == 0:
                self.vhost.run()
                self._set_timer()

    def _set_timer(self) -> None:
        if self.clock is not None:
            self.clock.set_timer(self.next_event)

    # -- what connections and channels call --

    def remove_connection(self, connection: Connection) -> None:
        """Forget a connection that is being closed."""
        del self._connections[connection]
        self.vhost.record(EventKind.DISCONNECTED, "", None, connection.name)

    def receive_publication(
        self, channel: Channel, number: int, message: StoredMessage, *, mandatory: bool
    ) -> None:
        """Store a publication and confirm it, unless a fault prevents it."""
        match self.faults.next_publish_fault(message.exchange, message.routing_key):
            case None:
                self._store(channel, number, message, mandatory=mandatory)
            case PublishFault.REFUSE:
                self.vhost.record(EventKind.REFUSED, "", message, "fault")
                channel.send_confirm(number, Outcome.REFUSED)
            case PublishFault.UNCONFIRMED:
                # Without a channel there is no client to confirm to.
                self._store(None, number, message, mandatory=mandatory)
            case PublishFault.LOSE:
                pass
            case PublishFault.BLOCK:
                self._blocked.append((channel, number, message, mandatory))
            case PublishFault.FORBID:
                raise publish_forbidden(message.exchange, self.user)
            case never:
                assert_never(never)

    def _store(
        self, channel: Channel | None, number: int, message: StoredMessage, *, mandatory: bool
    ) -> None:
        outcome = self._route_to_queues(message, mandatory=mandatory)
        if outcome is Outcome.RETURNED:
            self.vhost.record(EventKind.RETURNED, "", message, message.exchange)
        if channel is not None:
            channel.send_confirm(number, outcome)

    def _route_to_queues(self, message: StoredMessage, *, mandatory: bool) -> Outcome:
        """Offer a message to its queues; it is confirmed if all stored it."""
        # Before the event is recorded: a missing exchange refuses the publication.
        self.vhost.check_publish(message.exchange)
        queues = self.vhost.route(message)
        self.vhost.record(EventKind.PUBLISHED, "", message, message.exchange)
        message = self.vhost.with_client_deaths(message)
        if not VirtualHost.offer_to_all(queues, message):
            self.vhost.record(EventKind.REFUSED, "", message, "queue full")
            return Outcome.REFUSED
        return Outcome.RETURNED if mandatory and not queues else Outcome.CONFIRMED

    # -- what tests do to clients --

    def cut(self, name: str | None = None, reason: str = "the connection was cut") -> int:
        """Cut the connections of one name, or all; return how many there were."""
        with self.operation():
            connections = [each for each in self._connections if name in {None, each.name}]
            for connection in connections:
                connection.close_by_broker(reason)
        return len(connections)

    def cancel_consumers(self, queue: str) -> int:
        """Cancel all consumers of a queue, as RabbitMQ does when the queue's leader moves.

        Returns:
            How many there were.
        """
        with self.operation() as vhost:
            consumers = list(self._queue(queue).consumers)
            for consumer in consumers:
                vhost.remove_consumer(consumer)
                consumer.channel.send_cancel(consumer)
        return len(consumers)

    def delete_queue(self, name: str) -> None:
        """Delete a queue, as an operator does; its consumers are cancelled."""
        with self.operation() as vhost:
            vhost.delete_queue(self._queue(name))

    def delete_exchange(self, name: str) -> None:
        """Delete an exchange, as an operator does."""
        with self.operation() as vhost:
            vhost.delete_exchange(name)

    def unblock(self) -> None:
        """Clear `PublishFault.BLOCK`, and store the publications that it has held back."""
        self.faults.clear(PublishFault.BLOCK)
        with self.operation():
            while self._blocked:
                channel, number, message, mandatory = self._blocked.popleft()
                # Publications of a closed channel are lost. One that the broker refuses closes its
                # channel only now, since the broker has not read it before.
                with suppress(ChannelIsClosed, Refusal), channel.operation():
                    self._store(channel, number, message, mandatory=mandatory)

    # -- what tests read and write without a client --

    @property
    def connections(self) -> list[str]:
        """The names of the open connections."""
        return [connection.name for connection in self._connections]

    @property
    def queues(self) -> list[str]:
        """The names of the queues."""
        return list(self.vhost.queues)

    def put(
        self,
        queue: str,
        body: bytes,
        properties: Properties | None = None,
        *,
        exchange: str = "",
        routing_key: str | None = None,
    ) -> bool:
        """Put a message into a queue, without routing and faults; return whether it was stored.

        The message carries the given exchange and routing key; by default those with which it would
        have been published to the queue directly.
        """
        key = queue if routing_key is None else routing_key
        with self.operation() as vhost:
            checked = check_publication(exchange, key, body, properties or Properties())
            message = store_publication(checked, self.user)
            return self._queue(queue).offer(vhost.with_client_deaths(message))

    def publish(self, publication: Publication) -> Outcome:
        """Publish without a connection, and without faults.

        Raises:
            Refusal: The broker would close the channel.
        """
        with self.operation():
            checked = check_publication(
                publication.exchange,
                publication.routing_key,
                publication.body,
                publication.properties,
            )
            message = store_publication(checked, self.user)
            return self._route_to_queues(message, mandatory=True)

    def drain(self, queue: str) -> list[StoredMessage]:
        """Remove and return a queue's ready messages, in the order of their delivery."""
        ready = self.ready(queue)
        with self.operation():
            self._queue(queue).purge()
        return ready

    def ready(self, queue: str) -> list[StoredMessage]:
        """Return a queue's ready messages, in the order of their delivery."""
        with self.operation():
            return [entry.message for entry in self._queue(queue).ready]

    def unacked(self, queue: str) -> list[StoredMessage]:
        """Return the messages of a queue that are delivered and not settled."""
        with self.operation():
            return [entry.message for entry in self._queue(queue).unacked]

    def delayed(self, queue: str) -> list[StoredMessage]:
        """Return the messages of a queue that come back later, in that order."""
        with self.operation():
            return self._queue(queue).delayed

    def pending_dead_letters(self, queue: str) -> list[StoredMessage]:
        """Return the dead letters that an at-least-once queue keeps until another has them."""
        with self.operation():
            return [message for message, _ in self._queue(queue).pending_dead_letters]

    def consumers(self, queue: str) -> list[str]:
        """Return the tags of a queue's consumers."""
        with self.operation():
            return [consumer.tag for consumer in self._queue(queue).consumers]

    def arguments(self, queue: str) -> Headers:
        """Return the arguments that a queue was declared with."""
        with self.operation():
            return copy_headers(self._queue(queue).arguments)

    def bindings(self, queue: str) -> list[tuple[str, str, Headers]]:
        """Return a queue's bindings: exchange, routing key, arguments."""
        with self.operation() as vhost:
            return [
                (exchange.name, binding.routing_key, copy_headers(binding.arguments))
                for exchange in vhost.exchanges.values()
                for binding in exchange.bindings
                if binding.queue == queue
            ]

    def _queue(self, name: str) -> MemoryQueue:
        # With the owner's rights: tests see exclusive queues, too.
        queue = self.vhost.queues.get(name)
        return self.vhost.queue(name, None if queue is None else queue.owner)
