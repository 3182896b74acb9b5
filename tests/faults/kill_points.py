"""Points at which a consumer can be killed, and a transport that kills it exactly there.

The transport wraps the real one and sees each step of a settlement. It counts how often the chosen
point is reached. At the given count the process kills itself by SIGKILL, before the next
instruction: a kill from outside would hit such a point only by luck. It also records what was
delivered and settled, so that each repeated message can be traced to a kill.
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
from aio_pika_batch.transport import ModifyingSession

if TYPE_CHECKING:
    from aio_pika_batch import Message
    from aio_pika_batch.core.publication import Outcome, Outgoing
    from aio_pika_batch.core.settlement import Modification, NativeRetries
    from aio_pika_batch.core.topology import Topology
    from aio_pika_batch.transport import (
        AdjustableSession,
        ConfirmingSession,
        Publisher,
        PumpingSession,
        Session,
        Subscription,
        Transport,
    )
    from tests.integration.apps.event_log import EventLog


class KillPoint(StrEnum):
    """When to kill the consumer."""

    COLLECTING = "while messages are collected"
    HANDLING = "in the handler"
    BEFORE_COPY = "between a result and the publication of its copy"
    BEFORE_CONFIRM = "after a copy was published, before it is confirmed"
    BEFORE_ACK = "after a copy was confirmed, before its original is acked"
    BETWEEN_ACKS = "between the acks of one batch"
    DRAINING = "while draining"
    ANY = "at any moment, from outside"


@dataclass
class KillSwitch:
    """Kills the process when *point* is reached for the *countdown*-th time."""

    events: EventLog
    point: KillPoint | None = None
    countdown: int = 1
    is_draining: bool = field(default=False, init=False)

    def reach(self, point: KillPoint) -> None:
        """Report that a point is reached."""
        if point is self.point:
            self.countdown -= 1
            if self.countdown <= 0:
                self.kill()

    def step(self) -> None:
        """Report a step that a drain takes, too."""
        if self.is_draining:
            self.reach(KillPoint.DRAINING)

    def kill(self) -> None:
        """Record the time, and kill the process."""
        self.events.note("died", time.time())
        os.kill(os.getpid(), signal.SIGKILL)


class KillableTransport:
    """A transport that may kill its process."""

    def __init__(self, transport: Transport, switch: KillSwitch) -> None:
        self._transport = transport
        self._switch = switch
        self._sessions = 0

    async def declare(self, topology: Topology) -> None:
        await self._transport.declare(topology)

    @asynccontextmanager
    async def session(self, subscription: Subscription) -> AsyncIterator[KillableSession]:
        number = self._sessions = self._sessions + 1
        async with self._transport.session(subscription) as session:
            if isinstance(session, ModifyingSession):
                yield KillableModifyingSession(session, self._switch, number)
            else:
                yield KillableSession(session, self._switch, number)
            if self._switch.is_draining and self._switch.point is KillPoint.DRAINING:
                self._switch.kill()  # whatever the countdown says: this is the last point

    @asynccontextmanager
    async def publisher(self) -> AsyncIterator[KillablePublisher]:
        async with self._transport.publisher() as publisher:
            yield KillablePublisher(publisher, self._switch)


class KillableSession:
    """Records deliveries and settlements, and may kill the process between them."""

    def __init__(self, session: Session, switch: KillSwitch, number: int) -> None:
        self._session = session
        self._switch = switch
        self._number = number

    async def __aiter__(self) -> AsyncIterator[Sequence[Message]]:
        async for chunk in self._session:
            self._note(chunk)
            yield chunk
            self._switch.reach(KillPoint.COLLECTING)

    async def pump(self, sink: Callable[[Sequence[Message]], None]) -> None:
        def take(chunk: Sequence[Message]) -> None:
            self._note(chunk)
            sink(chunk)
            self._switch.reach(KillPoint.COLLECTING)

        pumping: PumpingSession = self._session  # type: ignore[assignment]  # aio-pika's can
        await pumping.pump(take)

    async def pause(self) -> None:
        self._switch.step()
        adjustable: AdjustableSession = self._session  # type: ignore[assignment]  # the same
        await adjustable.pause()
        self._switch.step()

    async def resume(self, prefetch: int) -> None:
        adjustable: AdjustableSession = self._session  # type: ignore[assignment]  # the same
        await adjustable.resume(prefetch)

    def _note(self, chunk: Sequence[Message]) -> None:
        delivered = [[message.delivery_tag, message.json()["id"]] for message in chunk]
        self._switch.events.note("delivered", [self._number, delivered])

    async def cancel(self) -> None:
        self._switch.step()
        await self._session.cancel()
        self._switch.step()

    async def settle(self, settlements: Sequence[Settlement]) -> None:
        self._switch.step()
        await self._between(settlements)
        await self._settle(settlements)
        self._switch.step()

    async def _between(self, settlements: Sequence[Settlement]) -> None:
        """Kill the process after half of them, if that is its point."""
        count = sum(len(each.tags) for each in settlements)
        if self._switch.point is KillPoint.BETWEEN_ACKS and count > 1:
            self._switch.countdown -= 1
            if self._switch.countdown <= 0:
                await self._settle(_first(settlements, count // 2))
                self._switch.kill()

    async def _settle(self, settlements: Sequence[Settlement]) -> None:
        await self._session.settle(settlements)
        tags = [tag for each in settlements for tag in each.tags]
        self._switch.events.note("settled", [self._number, time.time(), tags])


class KillableModifyingSession(KillableSession):
    """May also kill the process before and after messages are modified.

    There are no copies: what is written at once takes the place of a copy and an ack.
    """

    @property
    def retries(self) -> NativeRetries:
        return self._modifying.retries

    async def modify(
        self, modifications: Sequence[Modification], settlements: Sequence[Settlement] = ()
    ) -> None:
        self._switch.reach(KillPoint.BEFORE_COPY)
        self._switch.step()
        await self._between(settlements)
        await self._modifying.modify(modifications, settlements)
        tags = [tag for each in (*modifications, *settlements) for tag in each.tags]
        self._switch.events.note("settled", [self._number, time.time(), tags])
        self._switch.reach(KillPoint.BEFORE_ACK)
        self._switch.step()

    async def settled(self) -> None:
        confirming: ConfirmingSession = self._session  # type: ignore[assignment]  # it can, too
        self._switch.step()
        await confirming.settled()
        self._switch.step()

    @property
    def _modifying(self) -> ModifyingSession:
        assert isinstance(self._session, ModifyingSession)
        return self._session


class KillablePublisher:
    """May kill the process before, during and after publishing."""

    def __init__(self, publisher: Publisher, switch: KillSwitch) -> None:
        self._publisher = publisher
        self._switch = switch

    async def publish(self, publications: Sequence[Outgoing]) -> Sequence[Outcome]:
        self._switch.reach(KillPoint.BEFORE_COPY)
        self._switch.step()
        publishing = asyncio.ensure_future(self._publisher.publish(publications))
        # What is to be written is written after one turn of the loop, and confirmed after a
        # round trip at the earliest.
        await asyncio.sleep(0)
        if not publishing.done():
            self._switch.reach(KillPoint.BEFORE_CONFIRM)
        outcomes = await publishing
        self._switch.reach(KillPoint.BEFORE_ACK)
        self._switch.step()
        return outcomes

    @property
    def is_open(self) -> bool:
        return self._publisher.is_open


def _first(settlements: Sequence[Settlement], count: int) -> list[Settlement]:
    """Return the first *count* tags of the settlements."""
    first = []
    for each in settlements:
        tags = each.tags[:count]
        count -= len(tags)
        if tags:
            first.append(Settlement(each.disposition, tags))
    return first
