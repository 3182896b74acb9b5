"""Holds the faults that a test injects into the broker, and the journal that it reads.

Faults are states of the broker. Its methods `Broker.cut` and `Broker.cancel_consumers` do the rest.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

FRAME_MAX = 131_072
"""The default of RabbitMQ, in bytes."""


class ConnectFault(Enum):
    """What goes wrong when a client connects."""

    NONE = "none"
    UNREACHABLE = "unreachable"
    """The broker does not answer."""
    WRONG_PASSWORD = "wrong password"  # noqa: S105  -- the name of a fault
    """The broker refuses the login."""


class PublishFault(Enum):
    """What goes wrong when a message is published."""

    REFUSE = "refuse"
    """The broker nacks it and does not store it."""
    UNCONFIRMED = "unconfirmed"
    """The broker stores it, and its confirm is lost."""
    LOSE = "lose"
    """It is lost on its way: neither stored nor confirmed."""
    BLOCK = "block"
    """It waits until `Broker.unblock`, as under a memory alarm; then it is stored and confirmed."""
    FORBID = "forbid"
    """The user has no permission: the broker closes the channel."""


@dataclass(slots=True)
class _PublishFaultRule:
    fault: PublishFault
    times: int | None
    exchange: str | None
    routing_key: str | None

    def matches(self, exchange: str, routing_key: str) -> bool:
        return self.exchange in {None, exchange} and self.routing_key in {None, routing_key}


class Faults:
    """The faults in force; none at first.

    Attributes:
        connect_fault: What goes wrong when a client connects.
        frame_max: The size of a frame, into which all properties of a publication must fit.
    """

    def __init__(self) -> None:
        self.connect_fault = ConnectFault.NONE
        self.frame_max = FRAME_MAX
        self._rules: list[_PublishFaultRule] = []

    def on_publish(
        self,
        fault: PublishFault,
        *,
        times: int | None = None,
        exchange: str | None = None,
        routing_key: str | None = None,
    ) -> None:
        """Inject a fault into publications from now on.

        Args:
            fault: What goes wrong.
            times: For how many publications; None: for all, until `clear`.
            exchange: None: any.
            routing_key: None: any.
        """
        self._rules.append(_PublishFaultRule(fault, times, exchange, routing_key))

    def clear(self, fault: PublishFault | None = None) -> None:
        """Remove one fault from publications, or all of them."""
        self._rules = [rule for rule in self._rules if fault not in {None, rule.fault}]

    def forbids(self, exchange: str, routing_key: str) -> bool:
        """Return whether the user may not publish there."""
        return any(
            rule.fault is PublishFault.FORBID and rule.matches(exchange, routing_key)
            for rule in self._rules
        )

    def next_publish_fault(self, exchange: str, routing_key: str) -> PublishFault | None:
        """Return the fault for this publication and count it; the oldest that matches wins."""
        for rule in self._rules:
            if not rule.matches(exchange, routing_key):
                continue
            if rule.times is not None:
                rule.times -= 1
                if rule.times <= 0:
                    self._rules.remove(rule)
            return rule.fault
        return None


class EventKind(Enum):
    """What can happen to messages, consumers and connections."""

    CONNECTED = "connected"
    DISCONNECTED = "disconnected"
    CHANNEL_CLOSED = "channel-closed"
    CONSUMING = "consuming"
    CANCELLED = "cancelled"
    PUBLISHED = "published"
    """A publication reached the broker."""
    RETURNED = "returned"
    """A mandatory publication matched no queue."""
    REFUSED = "refused"
    """A publication was nacked."""
    STORED = "stored"
    """A message entered a queue, from a publisher or from another queue."""
    DELIVERED = "delivered"
    ACKED = "acked"
    REQUEUED = "requeued"
    DEAD_LETTERED = "dead-lettered"
    """A message left a queue for its dead-letter exchange; the detail is the reason."""
    DROPPED = "dropped"
    """A message was discarded; the detail is the reason."""


@dataclass(frozen=True, slots=True)
class BrokerEvent:
    """One event on the broker.

    Attributes:
        at: The broker's time.
        queue: Empty if the event concerns no queue.
        body: The message's body; None if the event concerns no message.
        detail: A reason, a consumer tag, or the broker's text.
    """

    at: float
    kind: EventKind
    queue: str = ""
    body: bytes | None = None
    detail: str = ""


class Journal:
    """The latest events, and the number of all events of each kind.

    Args:
        size: How many events are kept.

    Attributes:
        on_event: Called with each event, during the operation that causes it; None: not called.
    """

    def __init__(self, size: int) -> None:
        self.events: deque[BrokerEvent] = deque(maxlen=size)
        # Not limited by the size: it also counts the events that are not kept any more.
        self.counts: Counter[EventKind] = Counter()
        self.on_event: Callable[[BrokerEvent], None] | None = None

    def record(self, event: BrokerEvent) -> None:
        """Add an event."""
        self.events.append(event)
        self.counts[event.kind] += 1
        if self.on_event is not None:
            self.on_event(event)

    def of(self, *kinds: EventKind, queue: str | None = None) -> list[BrokerEvent]:
        """Return the kept events of some kinds, the oldest first."""
        return [
            event
            for event in self.events
            if event.kind in kinds and (queue is None or event.queue == queue)
        ]
