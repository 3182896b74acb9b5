"""An AMQP broker in memory: strict, synchronous, and without a clock of its own.

It behaves as RabbitMQ does, down to its words, and more strictly where the wire would let a mistake
pass. Time is a number that it is told (`advance`), or asks an alarm clock for.

Not imitated: streams, priorities of quorum queues, policies, permissions, virtual hosts other than
`/`, exchange-to-exchange bindings, plugins, transactions, flow control, consumer time-outs, and
what only happens in a cluster. Dead letters that had to wait (`at-least-once`) are sent again as
soon as something changes, and not after minutes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Protocol, assert_never

from aio_pika_batch.adapters.memory.channels import Channel, Gone
from aio_pika_batch.adapters.memory.connections import Connection
from aio_pika_batch.adapters.memory.faults import ConnectFault, Faults, PublishFault
from aio_pika_batch.adapters.memory.journal import EventKind, Journal
from aio_pika_batch.adapters.memory.refusals import Refusal
from aio_pika_batch.adapters.memory.stored_message import Stored, copied_headers, letter, stored
from aio_pika_batch.adapters.memory.versions import NEWEST, dialect
from aio_pika_batch.adapters.memory.vhost import VirtualHost
from aio_pika_batch.core.message import Properties
from aio_pika_batch.core.publication import Outcome
from aio_pika_batch.core.refusals import ReplyCode

if TYPE_CHECKING:
    from aio_pika_batch.adapters.memory.queues import Queue
    from aio_pika_batch.core.message import Headers
    from aio_pika_batch.core.publication import Publication

CUT = "the connection was cut"


class Unreachable(Exception):
    """Nobody answers."""


class Alarm(Protocol):
    """An alarm clock."""

    def time(self) -> float:
        """The present time, in seconds."""
        ...

    def ring_at(self, when: float | None) -> None:
        """Call `Broker.advance` then; None: no need to."""
        ...


class Broker:
    """The broker.

    Args:
        version: Of the imitated RabbitMQ: `3.8`, `3.10`, `4.0` or `4.3`.
        user: Whom connections belong to.
        keep: How many events the journal keeps.

    Attributes:
        faults: What goes wrong.
        journal: What has happened.
        alarm: Asked for the time, and told when to call again; None: time stands where `advance`
            has put it.
    """

    def __init__(self, version: str = NEWEST, *, user: str = "guest", keep: int = 100_000) -> None:
        self.dialect = dialect(version)
        self.user = user
        self.faults = Faults()
        self.journal = Journal(keep)
        self.vhost = VirtualHost(self.dialect, self.journal)
        self.alarm: Alarm | None = None
        self._connections: dict[Connection, None] = {}
        self._blocked: deque[tuple[Channel, int, Stored, bool]] = deque()
        self._depth = 0

    # -- for clients --

    def connect(self, name: str = "") -> Connection:
        """Let a client in.

        Raises:
            Unreachable: The fault in force is that there is no broker.
            Refusal: The fault in force is a wrong password.
        """
        match self.faults.connect_fault:
            case ConnectFault.UNREACHABLE:
                raise Unreachable("connection refused")
            case ConnectFault.WRONG_PASSWORD:
                raise Refusal(
                    ReplyCode.ACCESS_REFUSED,
                    "Login was refused using authentication mechanism PLAIN. For details see the"
                    " broker logfile.",
                )
            case ConnectFault.NONE:
                connection = Connection(self, name, self.user)
                self._connections[connection] = None
                self.vhost.note(EventKind.CONNECTED, "", None, name)
                return connection
            case never:
                assert_never(never)

    @property
    def version(self) -> str:
        """The imitated version of RabbitMQ."""
        return self.dialect.version

    # -- time --

    @property
    def now(self) -> float:
        """The broker's time."""
        return self.vhost.now

    @property
    def next_event(self) -> float | None:
        """When something happens by itself; None: never."""
        return self.vhost.deadline()

    def advance(self, now: float) -> None:
        """Let it be that late, and do what is due. Time never runs backwards."""
        self.vhost.now = max(self.vhost.now, now)
        self.vhost.fire()
        self.vhost.run()
        self._set_alarm()

    @contextmanager
    def operation(self) -> Iterator[VirtualHost]:
        """Whatever changes something: at the present time, and with all that follows from it."""
        if self._depth == 0 and self.alarm is not None:
            self.advance(self.alarm.time())
        self._depth += 1
        try:
            yield self.vhost
        finally:
            self._depth -= 1
            if self._depth == 0:
                self.vhost.run()
                self._set_alarm()

    def _set_alarm(self) -> None:
        if self.alarm is not None:
            self.alarm.ring_at(self.next_event)

    # -- publishing --

    def accept(self, channel: Channel, number: int, message: Stored, *, mandatory: bool) -> None:
        """A publication has arrived; a fault may be in its way."""
        match self.faults.meets(message.exchange, message.routing_key):
            case None:
                self._store(channel, number, message, mandatory=mandatory)
            case PublishFault.REFUSE:
                self.vhost.note(EventKind.REFUSED, "", message, "fault")
                channel.confirm(number, accepted=False)
            case PublishFault.UNCONFIRMED:
                self._store(None, number, message, mandatory=mandatory)
            case PublishFault.LOSE:
                pass
            case PublishFault.BLOCK:
                self._blocked.append((channel, number, message, mandatory))
            case never:
                assert_never(never)

    def _store(
        self, channel: Channel | None, number: int, message: Stored, *, mandatory: bool
    ) -> None:
        accepted, routed = self._distribute(message)
        returned = mandatory and not routed
        if returned:
            self.vhost.note(EventKind.RETURNED, "", message, message.exchange)
        if channel is not None:
            channel.confirm(number, accepted=accepted, returned=returned)

    def _distribute(self, message: Stored) -> tuple[bool, bool]:
        """Offer it to the queues that it is routed to: have all taken it, and are there any?"""
        queues = self.vhost.route(message)
        self.vhost.note(EventKind.PUBLISHED, "", message, message.exchange)
        message = self.vhost.received(message)
        accepted = VirtualHost.offer_to_all(queues, message)
        if not accepted:
            self.vhost.note(EventKind.REFUSED, "", message, "queue full")
        return accepted, bool(queues)

    # -- faults --

    def cut(self, name: str | None = None, words: str = CUT) -> int:
        """Cut connections: those of one name, or all.

        Returns:
            How many there were.
        """
        with self.operation():
            chosen = [each for each in self._connections if name in {None, each.name}]
            for connection in chosen:
                connection.end(words)
        return len(chosen)

    def cancel_consumers(self, queue: str) -> int:
        """End all subscriptions to a queue, as a broker does when the queue's leader moves.

        Returns:
            How many there were.
        """
        with self.operation() as vhost:
            consumers = list(self._queue(queue).consumers)
            for consumer in consumers:
                vhost.leave(consumer)
                consumer.receiver.cancelled(consumer)
        return len(consumers)

    def delete_queue(self, name: str) -> None:
        """Delete a queue, as an operator does; its consumers are told."""
        with self.operation() as vhost:
            vhost.delete_queue(self._queue(name))

    def delete_exchange(self, name: str) -> None:
        """Delete an exchange, as an operator does."""
        with self.operation() as vhost:
            vhost.delete_exchange(name)

    def unblock(self) -> None:
        """Clear `PublishFault.BLOCK`, and store what was held up by it."""
        self.faults.clear(PublishFault.BLOCK)
        with self.operation():
            while self._blocked:
                channel, number, message, mandatory = self._blocked.popleft()
                with suppress(Gone, Refusal), channel.operation():
                    self._store(channel, number, message, mandatory=mandatory)

    def forget(self, connection: Connection) -> None:
        """A connection has ended."""
        del self._connections[connection]
        self.vhost.note(EventKind.DISCONNECTED, "", None, connection.name)

    def delete_queues_of(self, connection: Connection) -> None:
        """Exclusive queues go with their connection."""
        for queue in [each for each in self.vhost.queues.values() if each.owner is connection]:
            self.vhost.delete_queue(queue)

    # -- behind the port's back --

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
        """Put a message into a queue, past exchanges and faults; tell whether the queue took it.

        It claims to come from the default exchange, with the queue's name for its routing key,
        unless said otherwise.
        """
        with self.operation() as vhost:
            key = queue if routing_key is None else routing_key
            message = stored(letter(exchange, key, body, properties or Properties()), self.user)
            return self._queue(queue).offer(vhost.received(message))

    def publish(self, publication: Publication) -> Outcome:
        """Publish, past connections and faults.

        Raises:
            Refusal: The broker would close the channel over it.
        """
        properties = publication.properties
        exchange, key = publication.exchange, publication.routing_key
        with self.operation():
            message = stored(letter(exchange, key, publication.body, properties), self.user)
            accepted, routed = self._distribute(message)
        if not routed:
            return Outcome.RETURNED
        return Outcome.CONFIRMED if accepted else Outcome.REFUSED

    def drain(self, queue: str) -> list[Stored]:
        """Take out what waits in a queue, in the order in which it would be delivered."""
        waiting = self.ready(queue)
        with self.operation():
            self._queue(queue).purge()
        return waiting

    def ready(self, queue: str) -> list[Stored]:
        """What waits in a queue, in the order in which it will be delivered."""
        with self.operation():
            return [entry.message for entry in self._queue(queue).ready]

    def unacked(self, queue: str) -> list[Stored]:
        """What a queue has handed out, in the order of delivery."""
        with self.operation():
            return [entry.message for entry in self._queue(queue).unacked]

    def dying(self, queue: str) -> list[Stored]:
        """Dead letters that a queue keeps until another one takes them (`at-least-once`)."""
        with self.operation():
            return [message for message, _ in self._queue(queue).dying]

    def consumers(self, queue: str) -> list[str]:
        """The tags of a queue's consumers."""
        with self.operation():
            return [consumer.tag for consumer in self._queue(queue).consumers]

    def arguments(self, queue: str) -> Headers:
        """The arguments that a queue was declared with."""
        with self.operation():
            return copied_headers(self._queue(queue).arguments)

    def bindings(self, queue: str) -> list[tuple[str, str, Headers]]:
        """A queue's bindings: exchange, routing key, arguments."""
        with self.operation() as vhost:
            return [
                (exchange.name, bound.routing_key, copied_headers(bound.arguments))
                for exchange in vhost.exchanges.values()
                for bound in exchange.bindings
                if bound.queue == queue
            ]

    def _queue(self, name: str) -> Queue:
        return self.vhost.queue(name, self._owner(name))

    def _owner(self, name: str) -> object | None:
        """Whoever looks behind the port's back is nobody's stranger."""
        queue = self.vhost.queues.get(name)
        return None if queue is None else queue.owner
