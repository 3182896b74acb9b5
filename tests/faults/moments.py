"""At which moments of a message's life can its consumer die, and how is one of them hit exactly?

A transport around the real one sees every step that a settlement takes. It counts how often the
chosen moment is reached, and at the count that it was given the process is gone: SIGKILL, by its
own hand, before the next instruction. On the way it notes what was delivered and what was settled,
so that it can be told afterwards what was in hand.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from aio_pika_batch.core.settlement import Settlement

if TYPE_CHECKING:
    from aio_pika_batch import Message
    from aio_pika_batch.core.publication import Outcome, Outgoing
    from aio_pika_batch.core.topology import Topology
    from aio_pika_batch.transport import (
        Publisher,
        PumpingSession,
        Session,
        Subscription,
        Transport,
    )
    from tests.integration.apps.diary import Diary


class Moment(StrEnum):
    """When to die."""

    COLLECTING = "while messages are collected"
    HANDLING = "in the handler"
    BEFORE_COPY = "between a result and the publication of its copy"
    BEFORE_CONFIRM = "after a copy was published, before it is confirmed"
    BEFORE_ACK = "after a copy was confirmed, before its original is acked"
    BETWEEN_ACKS = "between the acks of one batch"
    DRAINING = "while draining"
    ANY = "at any moment, from outside"


@dataclass
class Fate:
    """Dies at the *countdown*-th time that *moment* is reached; never without a moment."""

    diary: Diary
    moment: Moment | None = None
    countdown: int = 1
    is_draining: bool = field(default=False, init=False)

    def reach(self, moment: Moment) -> None:
        """Tell that a moment has come."""
        if moment is self.moment:
            self.countdown -= 1
            if self.countdown <= 0:
                self.die()

    def step(self) -> None:
        """Tell of a step that is also taken in a drain."""
        if self.is_draining:
            self.reach(Moment.DRAINING)

    def die(self) -> None:
        """Leave word of when, and be gone."""
        self.diary.note("died", time.time())
        os.kill(os.getpid(), signal.SIGKILL)


class MortalTransport:
    """A transport whose user may die of it."""

    def __init__(self, transport: Transport, fate: Fate) -> None:
        self._transport = transport
        self._fate = fate
        self._sessions = 0

    async def declare(self, topology: Topology) -> None:
        await self._transport.declare(topology)

    @asynccontextmanager
    async def session(self, subscription: Subscription) -> AsyncIterator[MortalSession]:
        number = self._sessions = self._sessions + 1
        async with self._transport.session(subscription) as session:
            yield MortalSession(session, self._fate, number)
            if self._fate.is_draining and self._fate.moment is Moment.DRAINING:
                self._fate.die()  # whatever the countdown says: this is the last moment

    @asynccontextmanager
    async def publisher(self) -> AsyncIterator[MortalPublisher]:
        async with self._transport.publisher() as publisher:
            yield MortalPublisher(publisher, self._fate)


class MortalSession:
    """Notes what is delivered and settled, and may die in between."""

    def __init__(self, session: Session, fate: Fate, number: int) -> None:
        self._session = session
        self._fate = fate
        self._number = number

    async def __aiter__(self) -> AsyncIterator[Sequence[Message]]:
        async for chunk in self._session:
            self._note(chunk)
            yield chunk
            self._fate.reach(Moment.COLLECTING)

    async def pump(self, sink: Callable[[Sequence[Message]], None]) -> None:
        def take(chunk: Sequence[Message]) -> None:
            self._note(chunk)
            sink(chunk)
            self._fate.reach(Moment.COLLECTING)

        pumping: PumpingSession = self._session  # type: ignore[assignment]  # aio-pika's can
        await pumping.pump(take)

    def _note(self, chunk: Sequence[Message]) -> None:
        delivered = [[message.delivery_tag, message.json()["id"]] for message in chunk]
        self._fate.diary.note("delivered", [self._number, delivered])

    async def cancel(self) -> None:
        self._fate.step()
        await self._session.cancel()
        self._fate.step()

    async def settle(self, settlements: Sequence[Settlement]) -> None:
        self._fate.step()
        count = sum(len(each.tags) for each in settlements)
        if self._fate.moment is Moment.BETWEEN_ACKS and count > 1:
            self._fate.countdown -= 1
            if self._fate.countdown <= 0:
                await self._settle(_first(settlements, count // 2))
                self._fate.die()
        await self._settle(settlements)
        self._fate.step()

    async def _settle(self, settlements: Sequence[Settlement]) -> None:
        await self._session.settle(settlements)
        tags = [tag for each in settlements for tag in each.tags]
        self._fate.diary.note("settled", [self._number, time.time(), tags])


class MortalPublisher:
    """May die before, during and after publishing."""

    def __init__(self, publisher: Publisher, fate: Fate) -> None:
        self._publisher = publisher
        self._fate = fate

    async def publish(self, publications: Sequence[Outgoing]) -> Sequence[Outcome]:
        self._fate.reach(Moment.BEFORE_COPY)
        self._fate.step()
        publishing = asyncio.ensure_future(self._publisher.publish(publications))
        # What is to be written is written after one turn of the loop, and confirmed after a
        # round trip at the earliest.
        await asyncio.sleep(0)
        if not publishing.done():
            self._fate.reach(Moment.BEFORE_CONFIRM)
        outcomes = await publishing
        self._fate.reach(Moment.BEFORE_ACK)
        self._fate.step()
        return outcomes

    @property
    def is_open(self) -> bool:
        return self._publisher.is_open


def _first(settlements: Sequence[Settlement], count: int) -> list[Settlement]:
    """As much of the settlements as makes *count* tags."""
    first = []
    for each in settlements:
        tags = each.tags[:count]
        count -= len(tags)
        if tags:
            first.append(Settlement(each.disposition, tags))
    return first
