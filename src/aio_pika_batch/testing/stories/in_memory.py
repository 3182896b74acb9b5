"""A scene on the in-memory broker in virtual time, where a story takes some milliseconds."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import assert_never

from aio_pika_batch.adapters.memory.faults import FRAME_MAX, EventKind, PublishFault
from aio_pika_batch.adapters.memory.rabbitmq import NEWEST
from aio_pika_batch.core.message import Properties
from aio_pika_batch.testing.broker import BatchBroker
from aio_pika_batch.testing.stories.player import play
from aio_pika_batch.testing.stories.story import WAIT_SUFFIX, FaultKind, Played, Story, judge
from aio_pika_batch.testing.virtual_time import run
from aio_pika_batch.transport import Transport, Wire

_LONG = 6000.0
"""Seconds that suffice to finish everything after the faults are over."""


_PUBLISH_FAULTS = {
    FaultKind.REFUSE: PublishFault.REFUSE,
    FaultKind.LOSE: PublishFault.LOSE,
    FaultKind.UNCONFIRMED: PublishFault.UNCONFIRMED,
    FaultKind.LATE: PublishFault.BLOCK,
    FaultKind.STALLED: PublishFault.BLOCK,
    FaultKind.FORBIDDEN: PublishFault.FORBID,
}


class MemoryScene:
    """A :class:`~aio_pika_batch.testing.stories.Scene` on the in-memory broker.

    Args:
        broker: A broker on which nothing is declared.

    Attributes:
        delivery_limit: That of quorum queues. Before RabbitMQ 4.3 AMQP 1.0 is used only without it.
    """

    pace = 1.0
    queue = "jobs"
    dead_letter_exchange = "dlx"
    keeps_place = True
    _dead = "dead"

    def __init__(self, broker: BatchBroker, delivery_limit: int = 1000) -> None:
        self._broker = broker
        self.delivery_limit = delivery_limit
        self._oversized = 0
        self._broker.declare(self._dead)
        self._bind()

    def _bind(self) -> None:
        self._broker.bind(self._dead, self.dead_letter_exchange, kind="fanout")

    @property
    def transport(self) -> Transport:
        """The broker's transport."""
        return self._broker.transport

    async def put(self, body: bytes) -> None:
        """Put a message directly into the queue."""
        properties = None
        if self._oversized:
            properties = Properties(headers={"token": "t" * (FRAME_MAX - 100)})
        broker = self._broker.broker
        broker.put(self.queue, body, properties, routing_key="key", exchange="events")

    async def hurt(self, kind: FaultKind, seconds: float) -> None:
        """Cause a fault for some virtual seconds."""
        match kind:
            case FaultKind.CUT:
                self._broker.cut()
            case FaultKind.CANCEL:
                self._broker.broker.cancel_consumers(self.queue)
            case FaultKind.AWAY:
                await self._disconnect(seconds)
            case FaultKind.RETURN:
                await self._without_dead_letters(seconds)
            case (
                FaultKind.REFUSE
                | FaultKind.LOSE
                | FaultKind.UNCONFIRMED
                | FaultKind.LATE
                | FaultKind.STALLED
                | FaultKind.FORBIDDEN
            ):
                exchange = self.dead_letter_exchange if kind is FaultKind.STALLED else None
                await self._affect_publishing(_PUBLISH_FAULTS[kind], seconds, exchange)
            case FaultKind.OVERSIZED:
                self._oversized += 1
                await asyncio.sleep(seconds)
                self._oversized -= 1
            case never:
                assert_never(never)

    async def _disconnect(self, seconds: float) -> None:
        with self._broker.down():
            await asyncio.sleep(seconds)

    async def _without_dead_letters(self, seconds: float) -> None:
        with self._broker.broker.operation() as vhost:
            vhost.unbind(vhost.queue(self._dead, None), self.dead_letter_exchange, "", {})
        await asyncio.sleep(seconds)
        self._bind()

    async def _affect_publishing(
        self, fault: PublishFault, seconds: float, exchange: str | None = None
    ) -> None:
        faults = self._broker.broker.faults
        faults.on_publish(fault, exchange=exchange)
        await asyncio.sleep(seconds)
        faults.clear(fault)
        if fault is PublishFault.BLOCK:
            # The confirms that were blocked come when the fault is over.
            self._broker.broker.unblock()

    async def come_to_rest(self, done: Callable[[], bool]) -> None:
        """Let a long time pass, which is free in virtual time."""
        del done
        await asyncio.sleep(_LONG)

    async def look(self, played: Played) -> None:
        """Read what is left in the queues, and the journal."""
        broker = self._broker.broker
        for queue in (self.queue, f"{self.queue}{WAIT_SUFFIX}"):
            if queue in broker.queues:
                left = broker.ready(queue) + broker.delayed(queue)
                left += broker.pending_dead_letters(queue)
                played.waiting.update(each.body for each in left)
        played.dead.update(each.body for each in broker.ready(self._dead))
        dropped = Counter(each.body for each in broker.journal.of(EventKind.DROPPED))
        unsettled = [each.body for each in broker.unacked(self.queue)]
        for what, found in (
            ("dropped by the broker", dropped),
            ("still unsettled", unsettled),
            ("connections that stay open", broker.connections),
        ):
            if found:
                played.complaints.append(f"{what}: {found}")


def play_in_memory(story: Story, version: str = NEWEST, wire: Wire = "auto") -> Played:
    """Play a story in virtual time, in a new event loop, and check all invariants.

    Args:
        story: From the strategy :func:`~aio_pika_batch.testing.strategies.stories`, or written.
        version: The RabbitMQ version to imitate.
        wire: With `amqp10`, sessions on quorum queues use AMQP 1.0.

    Raises:
        StoryBroken: An invariant is broken.
        VirtualTimeError: The story would never end, see `virtual_time`.
    """
    limit = -1 if wire == "amqp10" else 1000
    played = run(play(story, MemoryScene(BatchBroker(version, wire=wire), limit)))
    judge(story, played)
    return played
