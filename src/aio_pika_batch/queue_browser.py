"""Reads the messages of a queue and puts them back.

AMQP shows a message only by delivering it. So a browser is a session that settles only the messages
that the caller is done with. All others go back to the queue when it ends. A quorum queue counts
each message read as a delivery, and one with a delivery limit drops a message that was delivered
too often. The browser stops before that happens.
"""

from __future__ import annotations

import asyncio
import math
import os
from array import array
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from itertools import islice
from typing import Literal, TypeAlias

from aio_pika_batch.core.dead_letter import (
    delivery_limit_from,
    near_delivery_limit,
    returns_by_closing,
)
from aio_pika_batch.core.message import RETRY_COUNT_HEADER, Message
from aio_pika_batch.core.settlement import Disposition, Settlement
from aio_pika_batch.core.topology import Queue, Topology
from aio_pika_batch.core.topology_options import QUEUE_TYPE
from aio_pika_batch.errors import TopologyError
from aio_pika_batch.transport import (
    AdjustableSession,
    ConfirmingSession,
    CountingTransport,
    Session,
    Subscription,
    Transport,
    VersionedTransport,
)

QUIET = 5.0
"""Seconds without a message after which the remaining ones are taken to be elsewhere or gone."""

MAX_HELD = 65_535
"""The largest prefetch count (AMQP 0-9-1, basic.qos)."""

CHUNK = 100
"""Messages handed out in one step."""

WINDOW = 250
"""Messages that the broker may send before those are handed out; only their tags are kept then."""

RETURNED_AT_ONCE = 7_500
"""Messages put back in one step. RabbitMQ keeps the order of what at most 32 consumers have
received, and each received `WINDOW` messages."""

Limit: TypeAlias = int | Literal["ask"] | None


class QueueBrowser:
    """Hands out the messages that were in a queue when it was opened.

    Attributes:
        ready: Number of messages at the start; None if the transport can't count them.
        seen: Number of messages handed out.
        ended: Why it ended early; None if it didn't.
    """

    def __init__(
        self,
        ready: int | None,
        most: int | None,
        limit: int | None,
        stop: asyncio.Event | None,
        *,
        prefetch: int = 0,
    ) -> None:
        self.ready = ready
        self.seen = 0
        self.ended: str | None = None
        self._most = math.inf if most is None else most
        self._allowed = prefetch
        self._limit = limit
        self._stop = stop or asyncio.Event()
        # A large queue may be held as a whole: no more than a number for each message.
        self._tags = array("Q")
        self._done: set[int] = set()
        # In the order of their tags, which is that of the queue.
        self._arrived: list[Message] = []
        self._has_arrived = asyncio.Event()
        self._session: Session | None = None
        self._reading: asyncio.Task[None] | None = None

    async def next_chunk(self) -> Sequence[Message]:
        """Return the next messages; empty at the end.

        Raises:
            SessionLost: The connection was lost.
        """
        # Only what was there at the start: a replay may put the same messages back into this
        # queue. Without a count, the end is where nothing arrives for a while.
        left = (self._most if self.ready is None else self.ready) - self.seen
        if left <= 0 or self.ended is not None:
            return []
        # The broker sends no more than the prefetch count, however long one waits.
        if not self._arrived and self._count >= self._allowed and not await self._ask_for_more():
            self.end(f"{self._count} dead letters are held, the maximum; raise scan (--scan)")
            return []
        if not self._arrived:
            await self._wait()
        if self._stop.is_set():
            self.end("interrupted")
            return []
        count = int(min(left, CHUNK))
        chunk, self._arrived = self._arrived[:count], self._arrived[count:]
        self.seen += len(chunk)
        if not chunk and self.ready is not None:
            self.end(
                f"{left} more were in the queue but did not arrive within {QUIET:g} s;"
                " another consumer may have them"
            )
        return chunk

    async def _ask_for_more(self) -> bool:
        """Let the broker send more, although none of those that are held has been settled."""
        more = min(WINDOW, self._most - self._count)
        session: object = self._session
        if not isinstance(session, AdjustableSession) or more <= 0:
            return False
        # Not a larger prefetch from the start: then all of the queue would be in memory at once.
        self._allowed = self._count + int(more)
        await session.pause()
        await session.resume(int(more))
        return True

    def end(self, reason: str) -> None:
        """End early. The first reason counts."""
        self.ended = self.ended or reason

    def can_return(self, message: Message) -> bool:
        """Return whether a message can go back to its queue; if not, end early."""
        if not near_delivery_limit(message, self._limit):
            return True
        self.end(
            f"a dead letter was delivered {message.delivery_count} times, and the queue drops it"
            f" after {self._limit}; since reading counts as a delivery, no more are read;"
            " replay it, or raise the delivery limit of the queue"
        )
        return False

    @property
    def _count(self) -> int:
        return len(self._tags) - len(self._done)

    def _held(self) -> Iterator[int]:
        return (tag for tag in self._tags if tag not in self._done)

    async def done(self, messages: Sequence[Message]) -> None:
        """Remove messages from the queue."""
        tags = tuple(message.delivery_tag for message in messages)
        if tags and self._session is not None:
            await self._session.settle([Settlement(Disposition.ACK, tags)])
            self._done.update(tags)
            if len(self._done) >= WINDOW:
                self._tags, self._done = array("Q", self._held()), set()

    @asynccontextmanager
    async def receive(self, session: Session, *, by_closing: bool) -> AsyncIterator[None]:
        """Receive messages, and put back those held, unless the channel's end does that."""
        self._session = session
        self._reading = reading = asyncio.create_task(self._read(session))
        try:
            yield
            # Not earlier: the broker would deliver them again at once.
            if not by_closing:
                await session.cancel()
                await reading
                held = self._held()
                # Oldest first, and not all at once: there may be a hundred thousand, and the
                # session remembers each of them until it is carried out.
                while tags := tuple(islice(held, RETURNED_AT_ONCE)):
                    await session.settle([Settlement(Disposition.RETURN, tags)])
                    if isinstance(session, ConfirmingSession):
                        await session.settled()
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _read(self, session: Session) -> None:
        async for chunk in session:
            self._tags.extend(message.delivery_tag for message in chunk)
            self._arrived.extend(chunk)
            self._has_arrived.set()

    async def _wait(self) -> None:
        """Wait for a message, the stop event, the end of the session, or `QUIET` seconds."""
        reading = self._reading
        if reading is None:
            return
        self._has_arrived.clear()
        waiting = [asyncio.ensure_future(each.wait()) for each in (self._has_arrived, self._stop)]
        try:
            await asyncio.wait(
                [*waiting, reading], timeout=QUIET, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            # They would wait for ever, and be reported when the loop is closed.
            for each in waiting:
                each.cancel()
        if reading.done() and not self._arrived:
            await reading  # raises the error that ended it


@asynccontextmanager
async def browse(
    transport: Transport,
    queue: str,
    *,
    most: int | None = None,
    limit: Limit = "ask",
    retry_count_header: str = RETRY_COUNT_HEADER,
    stop: asyncio.Event | None = None,
) -> AsyncIterator[QueueBrowser]:
    """Open a browser on a queue; at the end, messages that aren't done are back in the queue.

    Args:
        most: Maximum number of messages held at a time; None for no limit.
        limit: Delivery limit of the queue; None for none; `"ask"` asks the broker.
        stop: Set this event to end early.

    Raises:
        TopologyError: The queue doesn't exist, or can't be consumed from.
        TransportError: The connection failed. No message is lost.
    """
    by_closing, known = await _ask(transport, queue, limit)
    ready = await transport.count(queue) if isinstance(transport, CountingTransport) else None
    prefetch = min(most or MAX_HELD, WINDOW, ready or WINDOW)
    browser = QueueBrowser(ready, most, known, stop, prefetch=prefetch)
    # No session for an empty queue: it would wait for a message in vain.
    if ready == 0:
        yield browser
        return
    subscription = Subscription(
        queue=queue,
        # Not more than there were: each delivery counts, also of messages that come meanwhile.
        prefetch=prefetch,
        consumer_tag=f"browser-{os.getpid()}",
        retry_count_header=retry_count_header,
        for_copies=True,
    )
    async with (
        transport.session(subscription) as session,
        browser.receive(session, by_closing=by_closing),
    ):
        yield browser


async def _ask(transport: Transport, queue: str, limit: Limit) -> tuple[bool, int | None]:
    """Return whether closing the channel puts messages back best, and the delivery limit."""
    # The usual advice is to let the consumer declare it, and no consumer is there.
    advice = "correct its name, or the virtual host in the URL"
    there = Queue(queue, check_only=True, if_missing=advice)
    await transport.declare(Topology(queues=(there,)))
    version = transport.broker_version if isinstance(transport, VersionedTransport) else None
    # AMQP can't read the arguments of a queue. But if an existing queue is declared with other
    # arguments, the broker's error says how they differ. Nothing is created by it.
    probe = Queue(queue, arguments={QUEUE_TYPE: "quorum"})
    refusal: str | None = None
    try:
        await transport.declare(Topology(queues=(probe,)))
    except TopologyError as error:
        refusal = str(error)
    known = delivery_limit_from(refusal, version) if limit == "ask" else limit
    return returns_by_closing(refusal, version), known
