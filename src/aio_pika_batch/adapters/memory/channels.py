"""What may a client do on a channel, and what does the broker send back?

A mistake closes the channel, as in AMQP: the method raises what the broker says, everything
unsettled goes back to its queue, and from then on the channel is gone. Stricter than the wire: tag
0, which means "all there are" there, is no tag here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING

from aio_pika_batch.adapters.memory.arguments import QueueType
from aio_pika_batch.adapters.memory.consumers import Consumer
from aio_pika_batch.adapters.memory.frames import (
    Cancelled,
    Closed,
    Confirmed,
    Delivery,
    Incoming,
    Returned,
)
from aio_pika_batch.adapters.memory.journal import EventKind
from aio_pika_batch.adapters.memory.queues import Comeback, Queue
from aio_pika_batch.adapters.memory.refusals import (
    Refusal,
    in_exclusive_use,
    invalid,
    type_name,
)
from aio_pika_batch.adapters.memory.stored_message import Letter, copied_headers, short, stored
from aio_pika_batch.core.refusals import ReplyCode

if TYPE_CHECKING:
    from aio_pika_batch.adapters.memory.broker import Broker
    from aio_pika_batch.adapters.memory.connections import Connection
    from aio_pika_batch.adapters.memory.ready import Entry
    from aio_pika_batch.adapters.memory.versions import Dialect
    from aio_pika_batch.adapters.memory.vhost import VirtualHost
    from aio_pika_batch.core.message import FieldValue, Headers, Properties

PREFETCH_LIMIT = 65_535


class Gone(Exception):
    """The channel is closed; the words say since what."""


class Channel:
    """One channel.

    Attributes:
        inbox: What the broker has sent and the client has not taken yet.
        closed: Why it is closed; None while it is open.
    """

    def __init__(
        self, broker: Broker, connection: Connection, notify: Callable[[], None] | None
    ) -> None:
        self._broker = broker
        self._connection = connection
        self._notify = notify
        self._prefetch = 0
        self._last_tag = 0
        self._consumers: dict[str, Consumer] = {}
        self._unacked: dict[int, tuple[Consumer, Entry]] = {}
        self._published = 0
        self.inbox: list[Incoming] = []
        self.closed: str | None = None

    def take(self) -> list[Incoming]:
        """Everything in the inbox, which is empty then."""
        taken, self.inbox = self.inbox, []
        return taken

    @property
    def unsettled(self) -> tuple[int, ...]:
        """The outstanding tags, in their order."""
        return tuple(self._unacked)

    @contextmanager
    def operation(self) -> Iterator[VirtualHost]:
        """Everything a client asks for: on an open channel, at the present time, all or nothing.

        Raises:
            Gone: The channel is closed.
            Refusal: The broker says no, and has closed the channel.
        """
        with self._broker.operation() as vhost:
            if self.closed is not None:
                raise Gone(self.closed)
            try:
                yield vhost
            except Refusal as refusal:
                if refusal.closes_connection:
                    self._connection.end(str(refusal))
                else:
                    self._connection.drop(self, str(refusal))
                raise

    # -- consuming --

    def qos(self, prefetch: int) -> None:
        """How many unsettled messages each *later* consumer may have; 0: any number."""
        if not 0 <= prefetch <= PREFETCH_LIMIT:
            raise ValueError(f"a prefetch count is from 0 to {PREFETCH_LIMIT}, not {prefetch}")
        self._prefetch = prefetch

    def consume(
        self, queue: str, tag: str, *, exclusive: bool = False, arguments: Headers | None = None
    ) -> None:
        """Subscribe to a queue."""
        with self.operation() as vhost:
            short("a consumer tag", tag)
            source = vhost.queue(queue, self._connection)
            if tag in self._consumers:
                raise Refusal(ReplyCode.NOT_ALLOWED, f"attempt to reuse consumer tag '{tag}'")
            if source.consumers.exclusive or (
                exclusive and (len(source.consumers) or source.spec.single_active)
            ):
                raise in_exclusive_use(queue)
            priority = (arguments or {}).get("x-priority", 0)
            if type(priority) is not int:
                words = f'"expected integer, got {type_name(priority)}"'
                raise invalid("x-priority", queue, words)
            consumer = Consumer(tag, source, self, self._prefetch, priority, exclusive)
            self._consumers[tag] = consumer
            source.consumers.add(consumer)
            vhost.note(EventKind.CONSUMING, queue, None, tag)
            vhost.wake(source)

    def cancel(self, tag: str) -> None:
        """Unsubscribe; what was handed out stays here. A tag that is unknown is no mistake."""
        with self.operation() as vhost:
            consumer = self._consumers.pop(tag, None)
            if consumer is not None:
                vhost.note(EventKind.CANCELLED, consumer.queue.name, None, tag)
                vhost.leave(consumer)

    def ack(self, tag: int, *, multiple: bool = False) -> None:
        """`basic.ack`."""
        with self.operation():
            for queue, entries in self._settled(tag, multiple):
                queue.ack(entries)

    def nack(self, tag: int, *, multiple: bool = False, requeue: bool = True) -> None:
        """`basic.nack`."""
        with self.operation():
            for queue, entries in self._settled(tag, multiple):
                if requeue:
                    queue.requeue(entries, Comeback.NACKED)
                else:
                    queue.reject(entries)

    def reject(self, tag: int, *, requeue: bool = True) -> None:
        """`basic.reject`."""
        with self.operation():
            for queue, entries in self._settled(tag, multiple=False):
                if requeue:
                    queue.requeue(entries, Comeback.REJECTED)
                else:
                    queue.reject(entries)

    # -- publishing --

    def publish(self, letter: Letter, *, mandatory: bool = False) -> int:
        """Publish; every channel is in confirm mode.

        Returns:
            The number under which the confirmation will come.
        """
        with self.operation():
            message = stored(letter, self._connection.user)
            self._published += 1
            self._broker.accept(self, self._published, message, mandatory=mandatory)
        return self._published

    def confirm(self, number: int, *, accepted: bool, returned: bool = False) -> None:
        """The broker's word on a publication."""
        if self.closed is None:
            if returned:
                self._send(Returned(number))
            self._send(Confirmed(number, accepted))

    # -- what the queues call --

    def deliver(self, consumer: Consumer, entry: Entry) -> None:
        """Hand a message to the client."""
        self._last_tag += 1
        self._unacked[self._last_tag] = (consumer, entry)
        message = entry.message
        self._send(
            Delivery(
                consumer.tag,
                self._last_tag,
                entry.redelivered,
                message.exchange,
                message.routing_key,
                message.body,
                _told(entry, consumer.queue, self._broker.dialect),
            )
        )

    def cancelled(self, consumer: Consumer) -> None:
        """Tell the client that the broker has ended a subscription."""
        if self._consumers.pop(consumer.tag, None) is not None:
            self._send(Cancelled(consumer.tag))

    def close(self, words: str = "closed by the client") -> None:
        """Close; what is unsettled goes back."""
        with self._broker.operation():
            self._connection.drop(self, words)

    def shut(self, vhost: VirtualHost, words: str) -> None:
        """Close from the broker's side. What is unsettled goes back, in its order."""
        self.closed = words
        vhost.note(EventKind.CHANNEL_CLOSED, "", None, words)
        for consumer in self._consumers.values():
            vhost.leave(consumer)
        self._consumers.clear()
        unacked, self._unacked = self._unacked, {}
        for queue, entries in _by_queue(unacked.values()):
            queue.requeue(entries, Comeback.LOST)
        self._send(Closed(words))

    def _send(self, incoming: Incoming) -> None:
        self.inbox.append(incoming)
        if self._notify is not None:
            self._notify()

    def _settled(self, tag: int, multiple: bool) -> list[tuple[Queue, list[Entry]]]:  # noqa: FBT001
        """Take deliveries off the channel's books, in their order."""
        if tag not in self._unacked:
            raise Refusal(ReplyCode.PRECONDITION_FAILED, f"unknown delivery tag {tag}")
        tags = [tag]
        if multiple:
            tags = []
            for each in self._unacked:
                tags.append(each)
                if each == tag:
                    break
        return _by_queue([self._unacked.pop(each) for each in tags])


def _by_queue(
    deliveries: Iterable[tuple[Consumer, Entry]],
) -> list[tuple[Queue, list[Entry]]]:
    settled = []
    for queue, group in groupby(deliveries, key=lambda delivery: delivery[0].queue):
        entries = []
        for consumer, entry in group:
            consumer.in_hand -= 1
            entries.append(entry)
        settled.append((queue, entries))
    return settled


def _told(entry: Entry, queue: Queue, dialect: Dialect) -> Properties:
    """The properties as one consumer gets them: a copy, with the broker's own counts."""
    was = entry.message.properties
    counts: dict[str, FieldValue] = {}
    if queue.spec.type is QueueType.QUORUM:
        if entry.deliveries or dialect.tells_zero:
            counts["x-delivery-count"] = entry.deliveries
        if entry.acquired and dialect.tells_acquired:
            counts["x-acquired-count"] = entry.acquired
    if was.headers is None and not counts:
        return was
    return replace(was, headers={**copied_headers(was.headers or {}), **counts})
