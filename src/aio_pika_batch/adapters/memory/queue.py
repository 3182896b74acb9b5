"""Implements a queue and its consumers.

A message is ready, delivered and unacked, or delayed by a modification, until it leaves the queue:
acknowledged, dead-lettered or dropped. A dead letter of an at-least-once queue stays, pending,
until another queue has taken it. A message is always in exactly one of these places.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Protocol

from aio_pika_batch.adapters.memory.faults import EventKind
from aio_pika_batch.adapters.memory.rabbitmq import Overflow, QueueSpec, QueueType, VersionRules
from aio_pika_batch.adapters.memory.ready_list import QueueEntry, ReadyList, RequeuePosition
from aio_pika_batch.adapters.memory.stored_message import DeathReason, StoredMessage
from aio_pika_batch.core.message import Headers
from aio_pika_batch.core.settlement import Modification

_LOW_SHARE = 0.8  # of its limit: there a full quorum queue accepts messages again


class ReturnCause(Enum):
    """Why a delivered message returns to its queue, or is dead-lettered."""

    REJECTED = "basic.reject"
    NACKED = "basic.nack"
    MODIFIED = "modified"
    DETACHED = "detached"
    CHANNEL_CLOSED = "channel closed"


class DeliveryTarget(Protocol):
    """What a queue needs of a consumer's channel."""

    def deliver(self, consumer: QueueConsumer, entry: QueueEntry) -> None:
        """Send a message to the client."""
        ...

    def send_cancel(self, consumer: QueueConsumer) -> None:
        """Tell the client that the broker has cancelled its consumer."""
        ...


class QueueHost(Protocol):
    """What a queue needs of its virtual host."""

    now: float
    rules: VersionRules

    def record(self, kind: EventKind, queue: str, message: StoredMessage, detail: str = "") -> None:
        """Write into the journal."""
        ...

    def send_dead_letter(
        self, queue: MemoryQueue, message: StoredMessage, reason: DeathReason
    ) -> bool:
        """Publish to the queue's dead-letter exchange; return False if it must be kept."""
        ...

    def schedule(self, queue: MemoryQueue) -> None:
        """Call `MemoryQueue.run` before the current operation ends."""
        ...


@dataclass(slots=True, eq=False)
class QueueConsumer:
    """A consumer of a queue.

    Attributes:
        prefetch: The maximum number of unacked messages; 0: no limit.
        unacked_count: The number of unacked messages.
    """

    tag: str
    queue: MemoryQueue
    channel: DeliveryTarget
    prefetch: int
    priority: int
    exclusive: bool
    unacked_count: int = 0

    @property
    def has_capacity(self) -> bool:
        """Whether its prefetch allows another message."""
        return self.prefetch == 0 or self.unacked_count < self.prefetch


class ConsumerList:
    """The consumers of a queue, and whose turn it is.

    Consumers of a higher priority come first, equal ones take turns. A queue with a single active
    consumer delivers to the oldest consumer only.
    """

    def __init__(self, *, single_active: bool) -> None:
        self._single_active = single_active
        self._consumers: list[QueueConsumer] = []
        self._by_priority: dict[int, deque[QueueConsumer]] = {}

    def __len__(self) -> int:
        return len(self._consumers)

    def __iter__(self) -> Iterator[QueueConsumer]:
        # A copy, since loops over it remove consumers.
        return iter(list(self._consumers))

    @property
    def is_exclusive(self) -> bool:
        """Whether there is an exclusive consumer."""
        return any(consumer.exclusive for consumer in self._consumers)

    def add(self, consumer: QueueConsumer) -> None:
        """Add a consumer."""
        self._consumers.append(consumer)
        self._by_priority.setdefault(consumer.priority, deque()).append(consumer)
        self._by_priority = dict(sorted(self._by_priority.items(), reverse=True))

    def remove(self, consumer: QueueConsumer) -> None:
        """Remove a consumer."""
        self._consumers.remove(consumer)
        equals = self._by_priority[consumer.priority]
        equals.remove(consumer)
        if not equals:
            del self._by_priority[consumer.priority]

    def next(self) -> QueueConsumer | None:
        """Return the consumer that gets the next message, or None if all are at their prefetch."""
        if self._single_active:
            active = self._consumers[0] if self._consumers else None
            return active if active is not None and active.has_capacity else None
        for equals in self._by_priority.values():
            for _ in range(len(equals)):
                equals.rotate(-1)
                if equals[-1].has_capacity:
                    return equals[-1]
        return None


class MemoryQueue:
    """A queue.

    Attributes:
        owner: The connection that it belongs to, if it is exclusive.
        pending_dead_letters: Dead letters that no other queue has taken yet, with their reasons.
        unused_since: When it was last consumed or declared.
    """

    def __init__(
        self,
        host: QueueHost,
        name: str,
        spec: QueueSpec,
        arguments: Headers,
        *,
        durable: bool,
        auto_delete: bool,
        owner: object | None,
    ) -> None:
        self._host = host
        self.name = name
        self.spec = spec
        self.arguments = arguments
        self.durable = durable
        self.auto_delete = auto_delete
        self.owner = owner
        self.ready = ReadyList(
            max_priority=spec.max_priority, all_heads_expire=spec.type is QueueType.CLASSIC
        )
        self.unacked: dict[QueueEntry, None] = {}
        # A heap of (due time, number, message).
        self._delayed: list[tuple[float, int, QueueEntry]] = []
        self._delays = 0
        self.pending_dead_letters: deque[tuple[StoredMessage, DeathReason]] = deque()
        self.consumers = ConsumerList(single_active=spec.single_active)
        self.unused_since = host.now
        self._is_quorum = spec.type is QueueType.QUORUM
        # A classic queue that does not count leaves a message's count as it is.
        self._counts = self._is_quorum or host.rules.counts_failures
        self._is_full = False
        self._last_position = 0

    @property
    def deadline(self) -> float | None:
        """When a message or the queue itself expires next, or a delay is over."""
        due = self._delayed[0][0] if self._delayed else None
        times = (self.ready.next_expiry(), self.expires_at, due)
        return min((time for time in times if time is not None), default=None)

    @property
    def delayed(self) -> list[StoredMessage]:
        """The messages that a modification delays, the first one that is due first."""
        return [entry.message for _, _, entry in sorted(self._delayed)]

    @property
    def expires_at(self) -> float | None:
        """When the queue expires if it is not used until then."""
        # Consuming and declaring count as use, publishing does not.
        if self.spec.expires is None or self.consumers:
            return None
        return self.unused_since + self.spec.expires

    def offer(self, message: StoredMessage, *, is_confirmed: bool = True) -> bool:
        """Store a message, unless the queue is full and refuses it; return whether it is stored."""
        # A quorum queue refuses by telling its publishers to stop. A queue that dead-letters
        # without waiting for confirms isn't one of them.
        if (is_confirmed or not self._is_quorum) and self.would_refuse(message):
            if self.spec.overflow is Overflow.REJECT_PUBLISH_DLX:
                self._host.send_dead_letter(self, message, DeathReason.MAXLEN)
            return False
        self._last_position += 1
        entry = QueueEntry(
            message, self._last_position, self._expiry(message), message.delivery_count
        )
        self._host.record(EventKind.STORED, self.name, message)
        consumer = None if self.ready else self.consumers.next()
        # A classic queue does not look at the count of a message that a consumer waits for.
        is_seen = self._is_quorum or (self._counts and consumer is None)
        entry.redelivered = is_seen and entry.delivery_count > 0
        if consumer is not None:
            # A waiting consumer gets a message even if its time to live is 0.
            self._deliver(entry, consumer)
        else:
            self.ready.append(entry)
            self._shorten()
            self._host.schedule(self)
        return True

    def would_refuse(self, message: StoredMessage) -> bool:
        """Return whether the queue is full and refuses messages."""
        if self.spec.overflow is Overflow.DROP_HEAD:
            return False
        count, size = self._note_fullness()
        if self._is_quorum:
            return self._is_full
        return self._is_beyond_limit(count + 1, size + len(message.body))

    def _note_fullness(self) -> tuple[int, int]:
        # Unacked messages do not count, so a requeued message always has room.
        pending = self.pending_dead_letters
        kept = [each for each, _ in pending] + [each.message for _, _, each in self._delayed]
        count = len(self.ready) + len(kept)
        size = self.ready.bytes + sum(len(each.body) for each in kept)
        # A quorum queue notices that it is full only when it is beyond its limit. Then it refuses
        # until it is down to a share of it.
        self._is_full = self._is_beyond_limit(count, size, _LOW_SHARE if self._is_full else 1)
        return count, size

    def ack(self, entries: Sequence[QueueEntry]) -> None:
        """Remove acknowledged messages."""
        for entry in self._removed_from_unacked(entries):
            self._host.record(EventKind.ACKED, self.name, entry.message)
        self._host.schedule(self)

    def reject(self, entries: Sequence[QueueEntry], cause: ReturnCause) -> None:
        """Dead-letter rejected messages."""
        for entry in self._removed_from_unacked(entries):
            self._count_return(entry, cause, is_requeued=False)
            self._dead_letter(entry, DeathReason.REJECTED)
        self._host.schedule(self)

    def requeue(self, entries: Sequence[QueueEntry], cause: ReturnCause) -> None:
        """Make returned messages ready again; they are given in the order of their delivery."""
        returned = []
        for entry in self._removed_from_unacked(entries):
            entry.redelivered = True
            self._count_return(entry, cause, is_requeued=True)
            if self._is_beyond_delivery_limit(entry):
                self._dead_letter(entry, DeathReason.DELIVERY_LIMIT)
                continue
            self._host.record(EventKind.REQUEUED, self.name, entry.message, cause.value)
            returned.append(entry)
        self.ready.requeue(returned, self._requeue_position(cause))
        self._shorten()
        self._host.schedule(self)

    def modify(self, entries: Sequence[QueueEntry], how: Modification, until: float | None) -> None:
        """Carry out AMQP 1.0's outcome `modified`.

        Args:
            until: `how.until` by the broker's clock.
        """
        returned = []
        for entry in self._removed_from_unacked(entries):
            entry.redelivered = True
            entry.acquired_count += 1
            entry.delivery_count += how.failed
            # A classic queue ignores headers and delays.
            if self._is_quorum:
                entry.message = entry.message.with_headers(how.headers)
            if how.dead:
                self._dead_letter(entry, DeathReason.REJECTED)
            elif self._is_beyond_delivery_limit(entry):
                self._dead_letter(entry, DeathReason.DELIVERY_LIMIT)
            else:
                cause = ReturnCause.MODIFIED
                self._host.record(EventKind.REQUEUED, self.name, entry.message, cause.value)
                if until is not None and until > self._host.now and self._delays_modified:
                    self._delays += 1
                    heapq.heappush(self._delayed, (until, self._delays, entry))
                else:
                    returned.append(entry)
        self.ready.requeue(returned, self._requeue_position(ReturnCause.MODIFIED))
        self._host.schedule(self)

    @property
    def _delays_modified(self) -> bool:
        return self._is_quorum and self._host.rules.delays_modified

    def _release_delayed(self) -> None:
        """Make the messages ready whose delay is over."""
        due = []
        while self._delayed and self._delayed[0][0] <= self._host.now:
            due.append(heapq.heappop(self._delayed)[2])
        if due:
            self.ready.requeue(due, RequeuePosition.FRONT)

    def _shorten(self) -> None:
        # A classic queue drops what is too much before it expires or is delivered again.
        for entry, reason in [] if self._is_quorum else self._drop_heads():
            self._dead_letter(entry, reason)

    def run(self) -> None:
        """Expire, dead-letter, deliver and drop what is due now."""
        self._release_delayed()
        deaths = self._expired()
        self._send_pending_dead_letters()
        while self.ready and (consumer := self.consumers.next()) is not None:
            self._deliver(self.ready.pop(), consumer)
            # What is first now may have expired.
            deaths += self._expired()
        # After the deliveries: what a consumer can take is not dropped for want of space.
        drops = self._drop_heads()
        if self._is_quorum and self._host.rules.drops_in_reverse:
            deaths[:0] = reversed(drops)
        else:
            deaths += drops
        for entry, reason in deaths + self._expired():
            self._dead_letter(entry, reason)
        self._note_fullness()

    def purge(self) -> int:
        """Drop the ready and the delayed messages and return their number; unacked ones stay."""
        return self._drop([*self.ready.clear(), *self._clear_delayed()], "purged")

    def _clear_delayed(self) -> list[QueueEntry]:
        delayed, self._delayed = self._delayed, []
        return [entry for _, _, entry in delayed]

    def delete(self) -> None:
        """Drop all messages and cancel the consumers."""
        # Without dead-lettering them, even if the queue has a dead-letter exchange.
        entries = [*self.ready.clear(), *self._clear_delayed(), *self.unacked]
        self._drop(entries, "queue deleted")
        self.unacked.clear()
        for message, _ in self.pending_dead_letters:
            self._host.record(EventKind.DROPPED, self.name, message, "queue deleted")
        self.pending_dead_letters.clear()
        for consumer in self.consumers:
            self.consumers.remove(consumer)
            consumer.channel.send_cancel(consumer)

    def remove_consumer(self, consumer: QueueConsumer) -> None:
        """Remove a consumer; its unacked messages stay with its channel."""
        self.consumers.remove(consumer)
        self.unused_since = self._host.now
        self._host.schedule(self)

    def _expired(self) -> list[tuple[QueueEntry, DeathReason]]:
        return [(each, DeathReason.EXPIRED) for each in self.ready.pop_expired(self._host.now)]

    def _drop_heads(self) -> list[tuple[QueueEntry, DeathReason]]:
        drops: list[tuple[QueueEntry, DeathReason]] = []
        drops_head = self.spec.overflow is Overflow.DROP_HEAD
        while drops_head and self._is_beyond_limit(len(self.ready), self.ready.bytes):
            drops.append((self.ready.pop(), DeathReason.MAXLEN))
            # A quorum queue is within its limit again before it looks for what has expired.
            if not self._is_quorum:
                drops += self._expired()
        return drops

    def _deliver(self, entry: QueueEntry, consumer: QueueConsumer) -> None:
        self.unacked[entry] = None
        consumer.unacked_count += 1
        self._host.record(EventKind.DELIVERED, self.name, entry.message, consumer.tag)
        consumer.channel.deliver(consumer, entry)

    def _drop(self, entries: Sequence[QueueEntry], reason: str) -> int:
        for entry in entries:
            self._host.record(EventKind.DROPPED, self.name, entry.message, reason)
        return len(entries)

    def _removed_from_unacked(self, entries: Sequence[QueueEntry]) -> Iterator[QueueEntry]:
        for entry in entries:
            # Messages of a deleted queue are dropped already, even if a channel settles them later.
            if entry in self.unacked:
                del self.unacked[entry]
                yield entry

    def _dead_letter(self, entry: QueueEntry, reason: DeathReason) -> None:
        message = entry.message
        if self._counts and self._host.rules.carries_delivery_count:
            message = replace(message, delivery_count=entry.delivery_count)
        if self.spec.dead_letter_exchange is None:
            self._host.record(EventKind.DROPPED, self.name, message, reason.value)
        elif self.spec.at_least_once:
            self.pending_dead_letters.append((message, reason))
            self._host.schedule(self)
        else:
            # At most once: the message has left, whether or not another queue takes it.
            self._host.record(EventKind.DEAD_LETTERED, self.name, message, reason.value)
            self._host.send_dead_letter(self, message, reason)

    def _send_pending_dead_letters(self) -> None:
        pending = self.pending_dead_letters
        for _ in range(len(pending)):
            message, reason = pending.popleft()
            if self._host.send_dead_letter(self, message, reason):
                self._host.record(EventKind.DEAD_LETTERED, self.name, message, reason.value)
            else:
                pending.append((message, reason))

    def _count_return(self, entry: QueueEntry, cause: ReturnCause, *, is_requeued: bool) -> None:
        entry.acquired_count += 1
        # Since 4.3 a nack returns a message that was not processed. In 4.0 only what a client does
        # not requeue has failed, and no earlier version lets the next queue see a failure.
        if self._host.rules.counts_failures:
            has_failed = cause not in {ReturnCause.NACKED, ReturnCause.DETACHED}
        else:
            has_failed = cause is ReturnCause.CHANNEL_CLOSED or not is_requeued
        entry.delivery_count += has_failed

    def _is_beyond_delivery_limit(self, entry: QueueEntry) -> bool:
        count = entry.delivery_count if self._host.rules.counts_failures else entry.acquired_count
        return self.spec.delivery_limit is not None and count > self.spec.delivery_limit

    def _requeue_position(self, cause: ReturnCause) -> RequeuePosition:
        if not self._is_quorum:
            return RequeuePosition.ORIGINAL
        # In 3.10 to the back, so that a message that always fails does not block the others. A
        # queue with a delivery limit gets rid of it anyway.
        to_back = self._host.rules.requeues_to_back and self.spec.delivery_limit is None
        if to_back and cause is not ReturnCause.CHANNEL_CLOSED:
            return RequeuePosition.BACK
        return RequeuePosition.FRONT

    def _expiry(self, message: StoredMessage) -> float | None:
        if self._is_quorum and not self._host.rules.quorum_expires:
            return None
        ttls = [ttl for ttl in (message.ttl, self.spec.message_ttl) if ttl is not None]
        return self._host.now + min(ttls) if ttls else None

    def _is_beyond_limit(self, count: int, size: int, share: float = 1) -> bool:
        spec = self.spec
        return (spec.max_length is not None and count > int(spec.max_length * share)) or (
            spec.max_bytes is not None and size > int(spec.max_bytes * share)
        )
