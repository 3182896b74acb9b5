"""What happens to a message in a queue?

It waits (`ready`), is handed out (`unacked`), and leaves: acknowledged, dead-lettered or dropped. A
dead letter that must not be lost stays (`dying`) until its next queue has it. A message is always
in exactly one of these places.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from aio_pika_batch.adapters.memory.arguments import Overflow, QueueType, Spec
from aio_pika_batch.adapters.memory.consumers import Consumer, Roster
from aio_pika_batch.adapters.memory.dead_lettering import Reason
from aio_pika_batch.adapters.memory.journal import EventKind
from aio_pika_batch.adapters.memory.ready import Entry, Place, Ready

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aio_pika_batch.adapters.memory.stored_message import Stored
    from aio_pika_batch.adapters.memory.versions import Dialect
    from aio_pika_batch.core.message import Headers


class Comeback(Enum):
    """How a delivery comes back to its queue."""

    REJECTED = "basic.reject"
    NACKED = "basic.nack"
    LOST = "the channel is gone"


class House(Protocol):
    """What a queue needs of the broker around it."""

    now: float
    dialect: Dialect

    def note(self, kind: EventKind, queue: str, message: Stored, detail: str = "") -> None:
        """Write into the journal."""
        ...

    def send_dead_letter(self, queue: Queue, message: Stored, reason: Reason) -> bool:
        """Publish to the queue's dead-letter exchange; tell whether all queues there took it."""
        ...

    def wake(self, queue: Queue) -> None:
        """See to it that `Queue.run` is called before the current operation ends."""
        ...


class Queue:
    """One queue.

    Attributes:
        owner: The connection that it belongs to, if it is exclusive.
        dying: Dead letters that nobody has taken yet, with the reasons of their deaths.
        unused_since: Since when nobody has consumed or declared it.
    """

    def __init__(
        self,
        house: House,
        name: str,
        spec: Spec,
        arguments: Headers,
        *,
        durable: bool,
        auto_delete: bool,
        owner: object | None,
    ) -> None:
        self._house = house
        self.name = name
        self.spec = spec
        self.arguments = arguments
        self.durable = durable
        self.auto_delete = auto_delete
        self.owner = owner
        self.ready = Ready(
            max_priority=spec.max_priority, all_heads_expire=spec.type is QueueType.CLASSIC
        )
        self.unacked: dict[Entry, None] = {}
        self.dying: deque[tuple[Stored, Reason]] = deque()
        self.consumers = Roster(single_active=spec.single_active)
        self.unused_since = house.now
        self.deleted = False
        self._positions = 0

    @property
    def deadline(self) -> float | None:
        """When something happens by itself: a message expires, or the queue does."""
        moments = (self.ready.next_expiry(), self.gone_at)
        return min((moment for moment in moments if moment is not None), default=None)

    @property
    def gone_at(self) -> float | None:
        """When the queue expires, if nobody uses it till then."""
        if self.spec.expires is None or self.consumers:
            return None
        return self.unused_since + self.spec.expires

    def offer(self, message: Stored) -> bool:
        """Take a message, unless the queue is full and says so."""
        if self.would_refuse(message):
            if self.spec.overflow is Overflow.REJECT_PUBLISH_DLX:
                self._house.send_dead_letter(self, message, Reason.MAXLEN)
            return False
        self._positions += 1
        entry = Entry(message, self._positions, self._expiry(message))
        self._house.note(EventKind.STORED, self.name, message)
        if not self.ready and (consumer := self.consumers.next()) is not None:
            # Whoever waits for it gets it even if it has no time at all.
            self._hand_out(entry, consumer)
        else:
            self.ready.append(entry)
            self._house.wake(self)
        return True

    def would_refuse(self, message: Stored) -> bool:
        """Whether the queue is full and says so."""
        if self.spec.overflow is Overflow.DROP_HEAD:
            return False
        count = len(self.ready) + len(self.dying)
        size = self.ready.bytes + sum(len(each.body) for each, _ in self.dying)
        if self.spec.type is QueueType.QUORUM:
            # It notices that it is full only once it is beyond its limit.
            return self._beyond(count, size)
        return self._beyond(count + 1, size + len(message.body))

    def ack(self, entries: Sequence[Entry]) -> None:
        """These are done."""
        for entry in entries:
            if self._out(entry):
                self._house.note(EventKind.ACKED, self.name, entry.message)
        self._house.wake(self)

    def reject(self, entries: Sequence[Entry]) -> None:
        """These are not wanted any more."""
        for entry in entries:
            if self._out(entry):
                self._die(entry, Reason.REJECTED)
        self._house.wake(self)

    def requeue(self, entries: Sequence[Entry], comeback: Comeback) -> None:
        """These come back, in the order of their delivery."""
        back = []
        for entry in entries:
            if not self._out(entry):
                continue
            entry.redelivered = True
            if self.spec.type is QueueType.QUORUM and self._exhausted(entry, comeback):
                self._die(entry, Reason.DELIVERY_LIMIT)
                continue
            self._house.note(EventKind.REQUEUED, self.name, entry.message, comeback.value)
            back.append(entry)
        self.ready.put_back(back, self._place(comeback))
        self._house.wake(self)

    def run(self) -> None:
        """Do what can be done now: expire, bury, hand out, cut to length."""
        self._expire()
        self._bury()
        while self.ready and (consumer := self.consumers.next()) is not None:
            self._hand_out(self.ready.pop(), consumer)
            # Whatever stands at the head now may be late.
            self._expire()
        if self.spec.overflow is Overflow.DROP_HEAD:
            while self.ready and self._beyond(len(self.ready), self.ready.bytes):
                self._die(self.ready.pop(), Reason.MAXLEN)
                self._expire()

    def purge(self) -> int:
        """Drop what waits; what is handed out stays so."""
        return self._drop(self.ready.clear(), "purged")

    def delete(self) -> None:
        """Drop everything, and tell the consumers."""
        self.deleted = True
        self._drop([*self.ready.clear(), *self.unacked], "queue deleted")
        self.unacked.clear()
        for message, _ in self.dying:
            self._house.note(EventKind.DROPPED, self.name, message, "queue deleted")
        self.dying.clear()
        for consumer in self.consumers:
            self.consumers.remove(consumer)
            consumer.receiver.cancelled(consumer)

    def leave(self, consumer: Consumer) -> None:
        """A consumer goes; what it was handed stays with its channel."""
        self.consumers.remove(consumer)
        self.unused_since = self._house.now
        self._house.wake(self)

    def _expire(self) -> None:
        for entry in self.ready.pop_expired(self._house.now):
            self._die(entry, Reason.EXPIRED)

    def _hand_out(self, entry: Entry, consumer: Consumer) -> None:
        entry.handed_out = True
        self.unacked[entry] = None
        consumer.in_hand += 1
        self._house.note(EventKind.DELIVERED, self.name, entry.message, consumer.tag)
        consumer.receiver.deliver(consumer, entry)

    def _drop(self, entries: Sequence[Entry], why: str) -> int:
        for entry in entries:
            self._house.note(EventKind.DROPPED, self.name, entry.message, why)
        return len(entries)

    def _out(self, entry: Entry) -> bool:
        """Take a delivery off the books; of a queue that is gone there is none."""
        if self.deleted:
            return False
        del self.unacked[entry]
        return True

    def _die(self, entry: Entry, reason: Reason) -> None:
        message = entry.message
        if entry.handed_out and self._house.dialect.remembers_handing_out:
            message = replace(message, seen=True)
        if self.spec.dead_letter_exchange is None:
            self._house.note(EventKind.DROPPED, self.name, message, reason.value)
        elif self.spec.at_least_once:
            self.dying.append((message, reason))
            self._house.wake(self)
        else:
            self._house.note(EventKind.DEAD_LETTERED, self.name, message, reason.value)
            self._house.send_dead_letter(self, message, reason)

    def _bury(self) -> None:
        for _ in range(len(self.dying)):
            message, reason = self.dying.popleft()
            if self._house.send_dead_letter(self, message, reason):
                self._house.note(EventKind.DEAD_LETTERED, self.name, message, reason.value)
            else:
                self.dying.append((message, reason))

    def _exhausted(self, entry: Entry, comeback: Comeback) -> bool:
        """Count a delivery in vain, and tell whether it was the last."""
        entry.acquired += 1
        if comeback is not Comeback.NACKED or self._house.dialect.nack_counts:
            entry.deliveries += 1
        limit = self.spec.delivery_limit
        return limit is not None and entry.deliveries > limit

    def _place(self, comeback: Comeback) -> Place:
        if self.spec.type is QueueType.CLASSIC:
            return Place.ORIGINAL
        back = self._house.dialect.returns_to_back and self.spec.delivery_limit is None
        return Place.BACK if back and comeback is not Comeback.LOST else Place.FRONT

    def _expiry(self, message: Stored) -> float | None:
        if self.spec.type is QueueType.QUORUM and not self._house.dialect.quorum_expires:
            return None
        lives = [ttl for ttl in (message.ttl, self.spec.message_ttl) if ttl is not None]
        return self._house.now + min(lives) if lives else None

    def _beyond(self, count: int, size: int) -> bool:
        spec = self.spec
        return (spec.max_length is not None and count > spec.max_length) or (
            spec.max_bytes is not None and size > spec.max_bytes
        )
