"""How does one look into a queue and leave it as it was?

AMQP has no way to look at a message but to be handed it. So a visit is one session that settles
only what it has dealt with; the rest goes back when it ends, however it ends. It counts as a
delivery where a quorum queue counts them, and a queue with a limit drops what was delivered too
often: a visit ends before that.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Literal, TypeAlias

from aio_pika_batch.core.dead_letter import (
    delivery_limit_from,
    near_delivery_limit,
    returns_by_closing,
)
from aio_pika_batch.core.message import RETRY_COUNT, Message
from aio_pika_batch.core.settlement import Disposition, Settlement
from aio_pika_batch.core.topology import QUEUE_TYPE, Queue, Topology, Version
from aio_pika_batch.errors import TopologyError
from aio_pika_batch.transport import CountingTransport, Session, Subscription, Transport
from aio_pika_batch.transport import VersionedTransport as Versioned

QUIET = 5.0
"""Seconds without a message after which the rest is taken to be with somebody else, or gone."""

MAX_HELD = 65_535
"""A prefetch count's limit (AMQP 0-9-1, basic.qos)."""

AT_ONCE = 100
"""Messages that are dealt with in one step."""

Limit: TypeAlias = int | Literal["ask"] | None


class Visit:
    """What lies in a queue, piece by piece.

    Attributes:
        ready: How many messages there were when it began; None if the transport cannot tell.
        seen: How many were handed out.
        ended: Why it ended before its end; None if it did not.
    """

    def __init__(
        self,
        ready: int | None,
        most: int,
        limit: int | None,
        stop: asyncio.Event | None,
    ) -> None:
        self.ready = ready
        self.seen = 0
        self.ended: str | None = None
        self._most = most
        self._limit = limit
        self._stop = stop or asyncio.Event()
        self._held: dict[int, None] = {}
        self._arrived: list[Message] = []
        self._news = asyncio.Event()
        self._session: Session | None = None
        self._reading: asyncio.Task[None] | None = None

    async def some(self) -> Sequence[Message]:
        """What comes next of what was in the queue when the visit began; empty at its end.

        Raises:
            SessionLost: The connection was lost.
        """
        left = (self._most if self.ready is None else self.ready) - self.seen
        if left <= 0 or self.ended is not None:
            return []
        if not self._arrived and len(self._held) >= self._most:
            self.end(f"{self._most} letters are held, and no more may be")
            return []
        if not self._arrived:
            await self._wait()
        if self._stop.is_set():
            self.end("interrupted")
            return []
        count = min(left, AT_ONCE)
        some, self._arrived = self._arrived[:count], self._arrived[count:]
        self.seen += len(some)
        if not some and self.ready is not None:
            self.end(f"{left} more were there, and did not come within {QUIET:g} s")
        return some

    def end(self, why: str) -> None:
        """Ask for no more."""
        self.ended = self.ended or why

    def may_return(self, message: Message) -> bool:
        """Whether a message can be put back; if not, the visit has to end."""
        if not near_delivery_limit(message, self._limit):
            return True
        self.end(
            f"a letter was delivered {message.delivery_count} times, and its queue drops it after"
            f" {self._limit}: looking counts as a delivery, so nothing more is looked at; replay"
            " it, or lift the limit of the queue"
        )
        return False

    async def done(self, messages: Sequence[Message]) -> None:
        """These are dealt with: they leave the queue."""
        tags = tuple(message.delivery_tag for message in messages)
        if tags and self._session is not None:
            await self._session.settle([Settlement(Disposition.ACK, tags)])
            for tag in tags:
                del self._held[tag]

    async def open(self, session: Session) -> None:
        """Begin to be handed messages."""
        self._session = session
        self._reading = asyncio.create_task(self._read(session))

    async def close(self, version: Version | None) -> None:
        """Put back what is held, where closing the channel would not do it as well."""
        session, reading = self._session, self._reading
        if session is None or reading is None:
            return
        if not returns_by_closing(version):
            await session.cancel()
            await reading
            if self._held:
                held = tuple(self._held)
                await session.settle([Settlement(Disposition.RETURN, held)])

    async def abandon(self) -> None:
        """Read no more."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    async def _read(self, session: Session) -> None:
        async for chunk in session:
            self._held.update(dict.fromkeys(message.delivery_tag for message in chunk))
            self._arrived.extend(chunk)
            self._news.set()

    async def _wait(self) -> None:
        """Wait until something comes; not for ever, and not if it is to stop."""
        reading = self._reading
        if reading is None:
            return
        self._news.clear()
        waiting = [asyncio.ensure_future(each.wait()) for each in (self._news, self._stop)]
        try:
            await asyncio.wait(
                [*waiting, reading], timeout=QUIET, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            for each in waiting:
                each.cancel()
        if reading.done() and not self._arrived:
            await reading  # raises what has ended it


@asynccontextmanager
async def visit(
    transport: Transport,
    queue: str,
    *,
    most: int,
    limit: Limit = "ask",
    retry_count_header: str = RETRY_COUNT,
    stop: asyncio.Event | None = None,
) -> AsyncIterator[Visit]:
    """Look into a queue, and leave it as it was, but for what is dealt with meanwhile.

    Args:
        most: Messages to hold at a time, 1 to 65535.
        limit: The queue's delivery limit; None: it has none; `"ask"`: find out.
        stop: Set it to end early.

    Raises:
        TopologyError: There is no such queue, or it is not ours to consume.
        TransportError: What else may happen to a connection. Nothing is lost by it.
    """
    most = min(max(1, most), MAX_HELD)
    version, known = await _ask(transport, queue, limit)
    ready = await transport.count(queue) if isinstance(transport, CountingTransport) else None
    made = Visit(ready, most, known, stop)
    if ready == 0:
        yield made
        return
    subscription = Subscription(
        queue=queue,
        prefetch=min(most, ready or most),
        consumer_tag=f"visit-{os.getpid()}",
        retry_count_header=retry_count_header,
    )
    async with transport.session(subscription) as session:
        await made.open(session)
        try:
            yield made
            await made.close(version)
        finally:
            await made.abandon()


async def _ask(transport: Transport, queue: str, limit: Limit) -> tuple[Version | None, int | None]:
    """The broker's version, and the queue's delivery limit."""
    await transport.declare(Topology(queues=(Queue(queue, check_only=True),)))
    version = transport.broker_version if isinstance(transport, Versioned) else None
    if limit != "ask":
        return version, limit
    probe = Queue(queue, arguments={QUEUE_TYPE: "quorum"})
    refusal: str | None = None
    try:
        # It is there, so that nothing is created.
        await transport.declare(Topology(queues=(probe,)))
    except TopologyError as error:
        refusal = str(error)
    return version, delivery_limit_from(refusal, version)
