"""Implements connections and channels: what a client may do, and what the broker sends back.

As in AMQP, a mistake closes the channel: the method raises the broker's refusal, every unacked
message returns to its queue, and the channel can't be used any more. Delivery tag 0 is refused,
although in AMQP it stands for all unacked messages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

from aio_pika_batch.adapters.memory.faults import EventKind, Faults
from aio_pika_batch.adapters.memory.queue import MemoryQueue, QueueConsumer, ReturnCause
from aio_pika_batch.adapters.memory.rabbitmq import (
    QueueType,
    Refusal,
    VersionRules,
    amqp_type_name,
    invalid_argument,
)
from aio_pika_batch.adapters.memory.ready_list import QueueEntry
from aio_pika_batch.adapters.memory.stored_message import (
    StoredMessage,
    check_short_string,
    copy_headers,
    store_publication,
)
from aio_pika_batch.adapters.memory.unacked import UnackedMessages
from aio_pika_batch.adapters.memory.vhost import VirtualHost
from aio_pika_batch.core.message import FieldValue, Headers, Properties
from aio_pika_batch.core.publication import Outcome
from aio_pika_batch.core.refusals import ReplyCode
from aio_pika_batch.core.settlement import Disposition, Frame, Modification

_MAX_PREFETCH = 65_535
_CLOSED_BY_CLIENT = "closed by the client"


class ChannelIsClosed(Exception):
    """A method was called on a closed channel; the text is the reason."""


@dataclass(frozen=True, slots=True)
class DeliverFrame:
    """`basic.deliver`, with its content."""

    consumer_tag: str
    tag: int
    redelivered: bool
    exchange: str
    routing_key: str
    body: bytes
    properties: Properties


@dataclass(frozen=True, slots=True)
class CancelFrame:
    """`basic.cancel`, sent by the broker."""

    consumer_tag: str


@dataclass(frozen=True, slots=True)
class ConfirmFrame:
    """`basic.ack` or `basic.nack` of a publication, and the `basic.return` before it.

    Attributes:
        number: The number of the publication; the first on a channel is 1.
        outcome: What these frames say: confirmed, returned or refused.
    """

    number: int
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class CloseFrame:
    """`channel.close` or `connection.close`, or the connection was cut."""

    reason: str


BrokerFrame: TypeAlias = DeliverFrame | CancelFrame | ConfirmFrame | CloseFrame


class ConnectionHost(Protocol):
    """What connections and channels need of the broker; see `Broker`."""

    vhost: VirtualHost
    rules: VersionRules
    faults: Faults

    def operation(self) -> AbstractContextManager[VirtualHost]:
        """Change something, and do all that follows."""
        ...

    def receive_publication(
        self, channel: Channel, number: int, message: StoredMessage, *, mandatory: bool
    ) -> None:
        """Store a publication, unless a fault prevents it."""
        ...

    def remove_connection(self, connection: Connection) -> None:
        """Take note that a connection was closed."""
        ...


class Connection:
    """A client's connection.

    Attributes:
        rules: How the broker's version behaves.
        faults: What goes wrong on the broker.
        close_reason: Why it was closed; None while it is open.
    """

    def __init__(self, host: ConnectionHost, name: str, user: str) -> None:
        self._host = host
        self.rules = host.rules
        self.faults = host.faults
        self.name = name
        self.user = user
        self.channels: list[Channel] = []
        self.close_reason: str | None = None

    def channel(self, notify: Callable[[], None] | None = None) -> Channel:
        """Open a channel.

        Args:
            notify: Called after each frame that the broker sends. It must not call the broker.
        """
        channel = Channel(self._host, self, notify)
        # A channel of a closed connection is closed from the start.
        channel.close_reason = self.close_reason
        self.channels.append(channel)
        return channel

    def close(self) -> None:
        """Close the connection and its channels."""
        with self._host.operation():
            self.close_by_broker(_CLOSED_BY_CLIENT)

    def close_by_broker(self, reason: str) -> None:
        """Close the connection and its channels, as part of an operation."""
        if self.close_reason is None:
            self.close_reason = reason
            self._host.remove_connection(self)
            for channel in list(self.channels):
                channel.close_by_broker(reason)
            # After the channels, whose unacked messages return to their queues first.
            self._host.vhost.delete_exclusive_queues(self)


class Channel:
    """A channel.

    Attributes:
        received: What the broker has sent and the client has not taken yet.
        close_reason: Why it was closed; None while it is open.
    """

    def __init__(
        self, host: ConnectionHost, connection: Connection, notify: Callable[[], None] | None
    ) -> None:
        self._host = host
        self._connection = connection
        self._notify = notify
        self._prefetch = 0
        self._last_tag = 0
        self._consumers: dict[str, QueueConsumer] = {}
        self._unacked = UnackedMessages(host.rules)
        self._published = 0
        self.received: list[BrokerFrame] = []
        self.close_reason: str | None = None

    def take(self) -> list[BrokerFrame]:
        """Remove and return what the broker has sent."""
        taken, self.received = self.received, []
        return taken

    @property
    def unsettled(self) -> tuple[int, ...]:
        """The delivery tags that are not settled, in their order."""
        return self._unacked.tags

    @contextmanager
    def operation(self) -> Iterator[VirtualHost]:
        """Do what the client asks for, at the present time and with all that follows.

        Raises:
            ChannelIsClosed: The channel was closed before.
            Refusal: The broker refuses, and has closed the channel or the connection.
        """
        with self._host.operation() as vhost:
            if self.close_reason is not None:
                raise ChannelIsClosed(self.close_reason)
            try:
                yield vhost
            except Refusal as refusal:
                closed = self._connection if refusal.closes_connection else self
                closed.close_by_broker(str(refusal))
                raise

    # -- consuming --

    def qos(self, prefetch: int) -> None:
        """Limit the unacked messages of each *later* consumer; 0: no limit."""
        if not 0 <= prefetch <= _MAX_PREFETCH:
            raise ValueError(f"a prefetch count must be from 0 to {_MAX_PREFETCH}, not {prefetch}")
        self._prefetch = prefetch

    def consume(
        self, queue: str, tag: str, *, exclusive: bool = False, arguments: Headers | None = None
    ) -> None:
        """Start a consumer on a queue."""
        with self.operation() as vhost:
            check_short_string("a consumer tag", tag)
            source = vhost.queue(queue, self._connection)
            if tag in self._consumers:
                raise Refusal(ReplyCode.NOT_ALLOWED, f"attempt to reuse consumer tag '{tag}'")
            if source.consumers.is_exclusive or (
                exclusive and (len(source.consumers) or source.spec.single_active)
            ):
                raise Refusal(
                    ReplyCode.ACCESS_REFUSED, f"queue '{queue}' in vhost '/' in exclusive use"
                )
            priority = (arguments or {}).get("x-priority", 0)
            if type(priority) is not int:
                reason = f'"expected integer, got {amqp_type_name(priority)}"'
                raise invalid_argument("x-priority", queue, reason)
            consumer = QueueConsumer(tag, source, self, self._prefetch, priority, exclusive)
            self._consumers[tag] = consumer
            source.consumers.add(consumer)
            self._unacked.on_answer(source, to_cancel=False)
            vhost.record(EventKind.CONSUMING, queue, None, tag)
            vhost.schedule(source)

    def cancel(self, tag: str) -> None:
        """Cancel a consumer, if it exists; its unacked messages stay with the channel."""
        with self.operation() as vhost:
            consumer = self._consumers.pop(tag, None)
            if consumer is not None:
                vhost.record(EventKind.CANCELLED, consumer.queue.name, None, tag)
                vhost.remove_consumer(consumer)
                self._unacked.on_answer(consumer.queue, to_cancel=True)

    def ack(self, tag: int, *, multiple: bool = False) -> None:
        """Send `basic.ack`."""
        self.settle(Disposition.ACK, tag, multiple=multiple)

    def nack(self, tag: int, *, multiple: bool = False, requeue: bool = True) -> None:
        """Send `basic.nack`."""
        disposition = Disposition.RETURN if requeue else Disposition.REJECT
        with self.operation():
            self._unacked.settle(disposition, ReturnCause.NACKED, tag, multiple=multiple)

    def reject(self, tag: int, *, requeue: bool = True) -> None:
        """Send `basic.reject`."""
        self.settle(Disposition.REQUEUE if requeue else Disposition.REJECT, tag, multiple=False)

    def settle(self, disposition: Disposition, tag: int, *, multiple: bool) -> None:
        """Send the frame of a disposition."""
        with self.operation():
            self._unacked.settle(disposition, _cause_of(disposition), tag, multiple=multiple)

    def settle_all(self, frames: Iterable[Frame]) -> None:
        """Send several frames in one write."""
        with self._host.operation() as vhost, vhost.dead_letters_last():
            for frame in frames:
                self.settle(frame.disposition, frame.tag, multiple=frame.multiple)
                vhost.run()

    def settle_run(self, disposition: Disposition, tags: Sequence[int]) -> None:
        """Send one `disposition` of AMQP 1.0: accepted, rejected, modified (failed) or released."""
        with self.operation():
            self._unacked.settle_run(disposition, _cause_of(disposition), tags)

    def modify(self, modification: Modification, until: float | None) -> None:
        """Send one `disposition` of AMQP 1.0 whose outcome is `modified`.

        Args:
            until: Its time by the broker's clock.
        """
        with self.operation():
            self._unacked.modify(modification, until)

    def await_answer(self) -> None:
        """Ask something that the queues answer: then all before it has been carried out."""
        with self.operation():
            self._unacked.on_answers()

    def detach(self) -> None:
        """End the AMQP 1.0 link: the unsettled messages return to their queues."""
        with self.operation() as vhost:
            for consumer in self._consumers.values():
                vhost.remove_consumer(consumer)
            self._consumers.clear()
            self._unacked.requeue_all(ReturnCause.DETACHED)

    def tx_select(self) -> None:
        """Settle in transactions from now on."""
        with self.operation():
            self._unacked.select()

    def tx_commit(self) -> None:
        """Settle what has been settled since the last commit."""
        with self.operation():
            self._unacked.commit()

    # -- publishing --

    def publish(self, publication: StoredMessage, *, mandatory: bool = False) -> int:
        """Publish a message; every channel is in confirm mode.

        Returns:
            The number of its confirm.
        """
        with self.operation():
            message = store_publication(publication, self._connection.user)
            self._published += 1
            self._host.receive_publication(self, self._published, message, mandatory=mandatory)
        return self._published

    def close(self) -> None:
        """Close the channel; its unacked messages return to their queues."""
        with self._host.operation():
            self.close_by_broker(_CLOSED_BY_CLIENT)

    # -- what the broker calls --

    def deliver(self, consumer: QueueConsumer, entry: QueueEntry) -> None:
        """Send a message to the client."""
        self._last_tag += 1
        self._unacked.add(self._last_tag, consumer, entry)
        message = entry.message
        self._send(
            DeliverFrame(
                consumer.tag,
                self._last_tag,
                entry.redelivered,
                message.exchange,
                message.routing_key,
                message.body,
                _delivered_properties(entry, consumer.queue, self._host.rules),
            )
        )

    def send_cancel(self, consumer: QueueConsumer) -> None:
        """Tell the client that the broker has cancelled its consumer."""
        if self._consumers.pop(consumer.tag, None) is not None:
            self._send(CancelFrame(consumer.tag))

    def send_confirm(self, number: int, outcome: Outcome) -> None:
        """Tell the client what happened to a publication."""
        if self.close_reason is None:
            self._send(ConfirmFrame(number, outcome))

    def close_by_broker(self, reason: str) -> None:
        """Close the channel, as part of an operation."""
        if self not in self._connection.channels:
            return
        self._connection.channels.remove(self)
        vhost = self._host.vhost
        self.close_reason = reason
        vhost.record(EventKind.CHANNEL_CLOSED, "", None, reason)
        # Before the messages return, or these consumers would get them again.
        for consumer in self._consumers.values():
            vhost.remove_consumer(consumer)
        self._consumers.clear()
        self._unacked.requeue_all(ReturnCause.CHANNEL_CLOSED)
        self._send(CloseFrame(reason))

    def _send(self, frame: BrokerFrame) -> None:
        self.received.append(frame)
        if self._notify is not None:
            self._notify()


def _cause_of(disposition: Disposition) -> ReturnCause:
    return ReturnCause.NACKED if disposition is Disposition.RETURN else ReturnCause.REJECTED


def _delivered_properties(entry: QueueEntry, queue: MemoryQueue, rules: VersionRules) -> Properties:
    """Return a copy of the properties for one consumer, with the counts of a quorum queue."""
    properties = entry.message.properties
    counts: dict[str, FieldValue] = {}
    if queue.spec.type is QueueType.QUORUM:
        # Until its first return, a dead letter was acquired as often as its delivery has failed.
        acquired_count = entry.acquired_count or entry.delivery_count
        delivery_count = entry.delivery_count if rules.counts_failures else acquired_count
        if delivery_count:
            counts["x-delivery-count"] = delivery_count
        if acquired_count and rules.counts_failures:
            counts["x-acquired-count"] = acquired_count
    if properties.headers is None and not counts:
        return properties
    return replace(properties, headers={**copy_headers(properties.headers or {}), **counts})
