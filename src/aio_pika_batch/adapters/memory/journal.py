"""Records what happens on the broker, for tests to read."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum


class EventKind(Enum):
    """Kinds of events on the broker."""

    CONNECTED = "connected"
    DISCONNECTED = "disconnected"
    CHANNEL_CLOSED = "channel-closed"
    CONSUMING = "consuming"
    CANCELLED = "cancelled"
    PUBLISHED = "published"
    """A publication reached the broker."""
    RETURNED = "returned"
    """It was mandatory, and no queue was bound for it."""
    REFUSED = "refused"
    """It was nacked."""
    STORED = "stored"
    """A message has entered a queue, from a publisher or from another queue."""
    DELIVERED = "delivered"
    ACKED = "acked"
    REQUEUED = "requeued"
    DEAD_LETTERED = "dead-lettered"
    """A message has left a queue for its dead-letter exchange; the detail is the reason."""
    DROPPED = "dropped"
    """A message is gone for good; the detail is the reason."""


@dataclass(frozen=True, slots=True)
class BrokerEvent:
    """One thing that happened.

    Attributes:
        at: The broker's time.
        queue: Empty where no queue was concerned.
        body: Of the message concerned; None where there was none.
        detail: A reason, a consumer tag, the broker's words.
    """

    at: float
    kind: EventKind
    queue: str = ""
    body: bytes | None = None
    detail: str = ""


class Journal:
    """The latest events, and how many there were of each kind ever since.

    Args:
        keep: How many events are kept.

    Attributes:
        on_event: Told of each event, in the middle of what makes it happen; None: nobody is.
    """

    def __init__(self, keep: int) -> None:
        self.events: deque[BrokerEvent] = deque(maxlen=keep)
        self.counts: Counter[EventKind] = Counter()
        self.on_event: Callable[[BrokerEvent], None] | None = None

    def write(self, event: BrokerEvent) -> None:
        """Note an event."""
        self.events.append(event)
        self.counts[event.kind] += 1
        if self.on_event is not None:
            self.on_event(event)

    def of(self, *kinds: EventKind, queue: str | None = None) -> list[BrokerEvent]:
        """The events of some kinds, the oldest first."""
        return [
            event
            for event in self.events
            if event.kind in kinds and (queue is None or event.queue == queue)
        ]
