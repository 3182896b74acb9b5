"""Whose turn is it?

Consumers of higher priority first, round robin among equals, and nobody beyond its prefetch. A
queue with a single active consumer serves the one that came first, until it goes.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aio_pika_batch.adapters.memory.queues import Queue
    from aio_pika_batch.adapters.memory.ready import Entry


class Receiver(Protocol):
    """Where a consumer's deliveries go: its channel."""

    def deliver(self, consumer: Consumer, entry: Entry) -> None:
        """Hand out a message."""
        ...

    def cancelled(self, consumer: Consumer) -> None:
        """Tell that the broker has ended a subscription."""
        ...


@dataclass(slots=True, eq=False)
class Consumer:
    """One subscription.

    Attributes:
        prefetch: The most unsettled deliveries; 0: no limit.
        in_hand: The unsettled deliveries.
    """

    tag: str
    queue: Queue
    receiver: Receiver
    prefetch: int
    priority: int
    exclusive: bool
    in_hand: int = 0

    @property
    def able(self) -> bool:
        """Whether it may get another message."""
        return self.prefetch == 0 or self.in_hand < self.prefetch


class Roster:
    """The consumers of one queue."""

    def __init__(self, *, single_active: bool) -> None:
        self._single_active = single_active
        self._in_order: list[Consumer] = []
        self._turns: dict[int, deque[Consumer]] = {}

    def __len__(self) -> int:
        return len(self._in_order)

    def __iter__(self) -> Iterator[Consumer]:
        return iter(list(self._in_order))

    @property
    def exclusive(self) -> bool:
        """Whether its one consumer wants to stay alone."""
        return any(consumer.exclusive for consumer in self._in_order)

    def add(self, consumer: Consumer) -> None:
        """Let a consumer take its turns."""
        self._in_order.append(consumer)
        self._turns.setdefault(consumer.priority, deque()).append(consumer)
        self._turns = dict(sorted(self._turns.items(), reverse=True))

    def remove(self, consumer: Consumer) -> None:
        """Let it go."""
        self._in_order.remove(consumer)
        turns = self._turns[consumer.priority]
        turns.remove(consumer)
        if not turns:
            del self._turns[consumer.priority]

    def next(self) -> Consumer | None:
        """Whoever may get the next message, and go to the end of the line."""
        if self._single_active:
            active = self._in_order[0] if self._in_order else None
            return active if active is not None and active.able else None
        for turns in self._turns.values():
            for _ in range(len(turns)):
                turns.rotate(-1)
                if turns[-1].able:
                    return turns[-1]
        return None
