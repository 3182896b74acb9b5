"""What lies in a dead-letter queue, and how does it get back to work?

Law: a letter leaves its queue only once the broker has confirmed the copy that goes back, or
because it shall be deleted. So each is in the dead-letter queue or back where it came from, however
a replay ends; in both only where a confirmation or an acknowledgement was lost.

The same as `aio-pika-batch dlq`, for programs: :func:`look`, :func:`replay`, :func:`purge`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TypeAlias

from aio_pika_batch.core.dead_letter import (
    EVERY,
    DeathInfo,
    Filter,
    NotReplayable,
    OriginalRoute,
    death_info,
    replay_copy,
)
from aio_pika_batch.core.message import RETRY_COUNT, Message
from aio_pika_batch.core.publication import Copy, Outcome
from aio_pika_batch.core.topology import Exchange, Topology
from aio_pika_batch.errors import TopologyError
from aio_pika_batch.queue_browser import Limit, Visit, visit
from aio_pika_batch.transport import Publisher, Transport

__all__ = [
    "EVERY",
    "DeathInfo",
    "Filter",
    "Letter",
    "Looked",
    "OriginalRoute",
    "Report",
    "look",
    "purge",
    "replay",
]

SCAN = 10_000
"""Letters that are held while they are looked at: memory, and a broker's patience, are finite."""


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter, and what it says of itself.

    Attributes:
        message: Headers and body. Its session is over: it cannot be settled any more.
        death: Why, when, and where from.
    """

    message: Message
    death: DeathInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Looked:
    """What was seen in a dead-letter queue.

    Attributes:
        ready: How many letters there are; None if the transport cannot tell.
        letters: Those that were looked at, oldest first.
        ended: Why no more were looked at than these, although more were asked for.
    """

    queue: str
    ready: int | None
    letters: Sequence[Letter]
    ended: str | None = None


@dataclass(slots=True, kw_only=True)
class Report:
    """What became of the letters of a queue.

    Attributes:
        ready: How many there were; None if the transport cannot tell.
        seen: How many were looked at.
        done: How many were replayed or deleted (or would be, by a dry run).
        kept: How many stay, since they were not meant.
        failed: How many stay although they were meant, by the reason.
        ended: Why it ended before its end; None if it did not.
    """

    queue: str
    ready: int | None = None
    seen: int = 0
    done: int = 0
    kept: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    ended: str | None = None


Progress: TypeAlias = Callable[[Report], None]


async def look(
    transport: Transport,
    queue: str,
    *,
    most: int = 100,
    delivery_limit: Limit = "ask",
    retry_count_header: str = RETRY_COUNT,
    stop: asyncio.Event | None = None,
) -> Looked:
    """Look at the oldest letters, and leave them where they are.

    Being looked at is a delivery: a quorum queue counts it, and a queue with a delivery limit drops
    what was delivered too often. So nothing more is looked at where a letter has only five
    deliveries left; :attr:`Looked.ended` says so.

    Args:
        most: How many, 1 to 65535.
        delivery_limit: Of the queue; None: it has none; `"ask"`: as the broker says, or in doubt
            RabbitMQ's default.
        stop: Set it to end early.

    Raises:
        TransportError: There is no such queue, or no such broker.
    """
    letters: list[Letter] = []
    async with visit(
        transport,
        queue,
        most=most,
        limit=delivery_limit,
        retry_count_header=retry_count_header,
        stop=stop,
    ) as there:
        while len(letters) < most and (some := await there.some()):
            for message in some[: most - len(letters)]:
                if not there.may_return(message):
                    break
                letters.append(Letter(message, death_info(message, retry_count_header)))
    return Looked(queue=queue, ready=there.ready, letters=letters, ended=there.ended)


async def replay(
    transport: Transport,
    queue: str,
    *,
    where: Filter = EVERY,
    limit: int | None = None,
    scan: int = SCAN,
    to_queue: bool = False,
    dry_run: bool = False,
    delivery_limit: Limit = "ask",
    retry_count_header: str = RETRY_COUNT,
    stop: asyncio.Event | None = None,
    on_progress: Progress | None = None,
) -> Report:
    """Send letters back to their original exchange and routing key, as if never handled.

    Each copy is mandatory and confirmed before its letter is acknowledged. What is not meant, or
    does not get through, stays in the queue: it is held until the end, and then put back, in its
    order as far as the broker allows. Letters that come in meanwhile are left alone.

    Args:
        where: Which ones.
        limit: At most so many.
        scan: At most so many are held at a time; where more than that stay, it ends early.
        to_queue: Only to the queue in which each died, not to all that its exchange is bound to.
        dry_run: Only look; it counts as a delivery.
        delivery_limit: As for :func:`look`.
        retry_count_header: The header that is taken off.
        stop: Set it to end early: what is on its way is still confirmed.
        on_progress: Called after each step.

    Raises:
        TransportError: There is no such queue, or the connection was lost. No letter is lost.
    """
    report = Report(queue=queue)
    async with (
        visit(
            transport,
            queue,
            most=scan,
            limit=delivery_limit,
            retry_count_header=retry_count_header,
            stop=stop,
        ) as there,
        AsyncExitStack() as stack,
    ):
        post = _Post(transport, there, report, stack)
        tour = _Tour(there, report, where, limit, retry_count_header, stays=dry_run)
        while (meant := await tour.step()) is not None:
            copies: list[Copy] = []
            for letter in meant:
                way = replay_copy(
                    letter.message,
                    letter.death,
                    to_queue=to_queue,
                    retry_count_header=retry_count_header,
                )
                match way:
                    case NotReplayable(why):
                        tour.failed(letter.message, why)
                    case Copy():
                        copies.append(way)
            if dry_run:
                report.done += len(copies)
            else:
                for copy, why in await post.send(copies):
                    tour.failed(copy.message, why)
            if on_progress is not None:
                on_progress(report)
    report.ended = there.ended
    return report


async def purge(
    transport: Transport,
    queue: str,
    *,
    where: Filter = EVERY,
    limit: int | None = None,
    scan: int = SCAN,
    dry_run: bool = False,
    delivery_limit: Limit = "ask",
    retry_count_header: str = RETRY_COUNT,
    stop: asyncio.Event | None = None,
    on_progress: Progress | None = None,
) -> Report:
    """Delete letters; the arguments are those of :func:`replay`.

    Raises:
        TransportError: There is no such queue, or the connection was lost.
    """
    report = Report(queue=queue)
    async with visit(
        transport,
        queue,
        most=scan,
        limit=delivery_limit,
        retry_count_header=retry_count_header,
        stop=stop,
    ) as there:
        tour = _Tour(there, report, where, limit, retry_count_header, stays=dry_run)
        while (meant := await tour.step()) is not None:
            if not dry_run:
                await there.done([letter.message for letter in meant])
            report.done += len(meant)
            if on_progress is not None:
                on_progress(report)
    report.ended = there.ended
    return report


class _Tour:
    """Goes through a visit, and tells apart who is meant."""

    def __init__(
        self,
        there: Visit,
        report: Report,
        where: Filter,
        limit: int | None,
        retry_count_header: str,
        *,
        stays: bool,
    ) -> None:
        self._there = there
        self._report = report
        self._where = where
        self._limit = limit
        self._header = retry_count_header
        self._stays = stays
        self._rest: Sequence[Message] = []

    async def step(self) -> list[Letter] | None:
        """Some letters that are meant, or none of a few that are not; None at the end."""
        report = self._report
        report.ready = self._there.ready
        if self._limit is not None and report.done >= self._limit:
            return None
        some, self._rest = self._rest or await self._there.some(), []
        return self._meant(some) if some else None

    def failed(self, message: Message, why: str) -> None:
        """A letter that was meant stays, and comes back to its queue."""
        self._report.failed[why] += 1
        self._there.may_return(message)

    def _meant(self, messages: Sequence[Message]) -> list[Letter]:
        report = self._report
        now = datetime.now(UTC)
        meant: list[Letter] = []
        for at, message in enumerate(messages):
            if self._limit is not None and report.done + len(meant) >= self._limit:
                # Not all of these may get through: then it is the next one's turn.
                self._rest = messages[at:]
                break
            report.seen += 1
            death = death_info(message, self._header)
            takes = self._where.matches(message, death, now)
            if (self._stays or not takes) and not self._there.may_return(message):
                break
            if takes:
                meant.append(Letter(message, death))
            else:
                report.kept += 1
        return meant


class _Post:
    """Publishes copies, and lets go of the letters whose copies are confirmed."""

    def __init__(
        self, transport: Transport, there: Visit, report: Report, stack: AsyncExitStack
    ) -> None:
        self._transport = transport
        self._there = there
        self._report = report
        self._stack = stack
        self._publisher: Publisher | None = None
        self._missing: dict[str, str | None] = {"": None}

    async def send(self, copies: Sequence[Copy]) -> list[tuple[Copy, str]]:
        """Publish; returns those whose letters stay, and why."""
        failed: list[tuple[Copy, str]] = []
        ready: list[Copy] = []
        for copy in copies:
            why = await self._why_missing(copy.exchange)
            if why is None:
                ready.append(copy)
            else:
                failed.append((copy, why))
        if not ready:
            return failed
        if self._publisher is None:
            self._publisher = await self._stack.enter_async_context(self._transport.publisher())
        outcomes = await self._publisher.publish(ready)
        arrived: list[Message] = []
        for copy, outcome in zip(ready, outcomes, strict=True):
            if outcome is Outcome.CONFIRMED:
                arrived.append(copy.message)
            else:
                failed.append((copy, _why(copy, outcome)))
        await self._there.done(arrived)
        self._report.done += len(arrived)
        if Outcome.UNKNOWN in outcomes or not self._publisher.is_open:
            self._there.end("the connection for publishing was lost, or kept silent")
        return failed

    async def _why_missing(self, exchange: str) -> str | None:
        """Why an exchange cannot be published to: one that is missing would cost the channel."""
        if exchange not in self._missing:
            entity = Exchange(exchange, check_only=True)
            try:
                await self._transport.declare(Topology(exchanges=(entity,)))
            except TopologyError as error:
                self._missing[exchange] = str(error)
            else:
                self._missing[exchange] = None
        return self._missing[exchange]


def _why(copy: Copy, outcome: Outcome) -> str:
    where = f"exchange {copy.exchange!r}, routing key {copy.routing_key!r}"
    match outcome:
        case Outcome.RETURNED:
            return f"returned: no queue is bound for {where}"
        case Outcome.REFUSED:
            return f"refused by the broker: {where}"
        case _:
            return f"nothing was heard of it, it may be in both queues now: {where}"
