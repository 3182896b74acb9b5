"""A scene in memory and in virtual time: thousands of stories in seconds."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import assert_never

from aio_pika_batch.adapters.memory.faults import PublishFault
from aio_pika_batch.adapters.memory.journal import EventKind
from aio_pika_batch.adapters.memory.versions import NEWEST
from aio_pika_batch.testing.broker import BatchBroker
from aio_pika_batch.testing.stories.invariants import judge
from aio_pika_batch.testing.stories.player import Played, play
from aio_pika_batch.testing.stories.story import WAIT_SUFFIX, FaultKind, Story
from aio_pika_batch.testing.virtual_time import run
from aio_pika_batch.transport import Transport

_LONG = 6000.0
"""Seconds in which everything comes to its end once the faults are over."""


class MemoryScene:
    """Implements :class:`~aio_pika_batch.testing.stories.Scene`.

    Args:
        stage: The broker; nothing has been declared on it.
    """

    pace = 1.0
    queue = "jobs"
    dead_letter_exchange = "dlx"
    keeps_place = True
    _dead = "dead"

    def __init__(self, stage: BatchBroker) -> None:
        self._stage = stage
        self._stage.declare(self._dead)
        self._bind()

    def _bind(self) -> None:
        self._stage.bind(self._dead, self.dead_letter_exchange, kind="fanout")

    @property
    def transport(self) -> Transport:
        """The broker's."""
        return self._stage.transport

    async def put(self, body: bytes) -> None:
        """Into the queue, past all exchanges."""
        self._stage.broker.put(self.queue, body, routing_key="key", exchange="events")

    async def hurt(self, kind: FaultKind, seconds: float) -> None:
        """Let something go wrong, and right again."""
        match kind:
            case FaultKind.CUT:
                self._stage.cut()
            case FaultKind.CANCEL:
                self._stage.broker.cancel_consumers(self.queue)
            case FaultKind.AWAY:
                await self._away(seconds)
            case FaultKind.RETURN:
                await self._without_dead_letters(seconds)
            case FaultKind.REFUSE:
                await self._publishing(PublishFault.REFUSE, seconds)
            case FaultKind.LOSE:
                await self._publishing(PublishFault.LOSE, seconds)
            case FaultKind.UNCONFIRMED:
                await self._publishing(PublishFault.UNCONFIRMED, seconds)
            case FaultKind.LATE:
                await self._publishing(PublishFault.BLOCK, seconds)
                self._stage.broker.unblock()
            case never:
                assert_never(never)

    async def _away(self, seconds: float) -> None:
        with self._stage.down():
            await asyncio.sleep(seconds)

    async def _without_dead_letters(self, seconds: float) -> None:
        with self._stage.broker.operation() as vhost:
            vhost.unbind(vhost.queue(self._dead, None), self.dead_letter_exchange, "", {})
        await asyncio.sleep(seconds)
        self._bind()

    async def _publishing(self, fault: PublishFault, seconds: float) -> None:
        faults = self._stage.broker.faults
        faults.on_publish(fault)
        await asyncio.sleep(seconds)
        faults.clear(fault)

    async def come_to_rest(self, done: Callable[[], bool]) -> None:
        """Time costs nothing: let a lot of it go by."""
        del done
        await asyncio.sleep(_LONG)

    async def look(self, played: Played) -> None:
        """Read the queues and the journal."""
        broker = self._stage.broker
        for queue in (self.queue, f"{self.queue}{WAIT_SUFFIX}"):
            if queue in broker.queues:
                played.waiting.update(each.body for each in broker.ready(queue))
        played.dead.update(each.body for each in broker.ready(self._dead))
        dropped = Counter(each.body for each in broker.journal.of(EventKind.DROPPED))
        out = [each.body for each in broker.unacked(self.queue)]
        for what, found in (
            ("dropped by the broker", dropped),
            ("still handed out", out),
            ("connections that stay open", broker.connections),
        ):
            if found:
                played.complaints.append(f"{what}: {found}")


def play_in_memory(story: Story, version: str = NEWEST) -> Played:
    """Play a story in virtual time, on a loop of its own, and judge it.

    Args:
        story: Of the strategy :func:`~aio_pika_batch.testing.strategies.stories`, or written down.
        version: Of the RabbitMQ that is imitated.

    Raises:
        StoryBroken: Something was seen that must not be.
        VirtualTimeError: It would never have come to its end, see `virtual_time`.
    """
    played = run(play(story, MemoryScene(BatchBroker(version))))
    judge(story, played)
    return played
