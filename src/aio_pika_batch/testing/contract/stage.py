"""What does a check work with? A harness, and hands that take, settle, publish and look.

Nothing here waits for luck: what must come is waited for up to `patience` seconds, and what must
not come for `quiet` seconds.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from aio_pika_batch.core.message import Message
from aio_pika_batch.core.publication import Outcome, Outgoing
from aio_pika_batch.core.settlement import Disposition, Settlement
from aio_pika_batch.core.topology import Queue, Topology
from aio_pika_batch.testing.contract.broken import ClauseBroken, same
from aio_pika_batch.testing.contract.features import Features
from aio_pika_batch.testing.contract.harness import Harness
from aio_pika_batch.transport import Session, Subscription, Transport

CONSUMER_TAG = "contract"


class Consuming:
    """A session that is being read.

    At most one receive waits at a time, and it is kept while a check does other things: to look
    whether something comes does not cancel anything.

    Attributes:
        session: The session.
        chunks: All chunks that have been taken so far.
    """

    def __init__(self, session: Session, *, patience: float, quiet: float) -> None:
        self.session = session
        self.chunks: list[Sequence[Message]] = []
        self._patience = patience
        self._quiet = quiet
        self._iterator: AsyncIterator[Sequence[Message]] | None = None
        self._receiving: asyncio.Task[Sequence[Message] | None] | None = None

    @property
    def messages(self) -> list[Message]:
        """All messages that have been taken so far."""
        return [message for chunk in self.chunks for message in chunk]

    def receive(self) -> asyncio.Task[Sequence[Message] | None]:
        """Begin to wait for the next chunk, or go on; the task's result is None at the end."""
        if self._receiving is None:
            self._receiving = asyncio.create_task(self._next())
        return self._receiving

    async def _next(self) -> Sequence[Message] | None:
        if self._iterator is None:
            self._iterator = aiter(self.session)
        return await anext(self._iterator, None)

    async def chunk(self, within: float | None = None) -> Sequence[Message] | None:
        """The next chunk; None at the end.

        Raises:
            TimeoutError: None came in time.
        """
        receiving = self.receive()
        await asyncio.wait({receiving}, timeout=self._patience if within is None else within)
        if not receiving.done():
            raise TimeoutError
        self._receiving = None
        chunk = receiving.result()
        if chunk is not None:
            self.chunks.append(chunk)
        return chunk

    async def take(self, count: int) -> list[Message]:
        """Receive until there are so many messages more."""
        taken: list[Message] = []
        while len(taken) < count:
            try:
                chunk = await self.chunk()
            except TimeoutError:
                chunk = None
            if chunk is None:
                raise ClauseBroken(f"expected {count} messages, and only {len(taken)} came")
            taken.extend(chunk)
        same(count, len(taken), "messages that came")
        return taken

    async def take_to_the_end(self) -> list[Message]:
        """Receive until the iteration ends."""
        taken: list[Message] = []
        try:
            while (chunk := await self.chunk()) is not None:
                taken.extend(chunk)
        except TimeoutError:
            raise ClauseBroken("the iteration was expected to end, and did not") from None
        return taken

    async def nothing_comes(self) -> None:
        """Expect that nothing more is handed out for now."""
        try:
            chunk = await self.chunk(within=self._quiet)
        except TimeoutError:
            return
        same(None, chunk, "what was handed out although nothing should have been")

    async def settle(self, disposition: Disposition, messages: Iterable[Message]) -> None:
        """Settle messages in one way."""
        await self.session.settle([settled(disposition, messages)])

    async def stop(self) -> None:
        """Wait no more."""
        if self._receiving is not None:
            self._receiving.cancel()
            await asyncio.wait({self._receiving})


class Stage:
    """What a check is given.

    Args:
        harness: A broker of its own.
        features: What is claimed.
        patience: Seconds in which what must come has to come.
        quiet: Seconds after which what has not come does not count as coming.
    """

    def __init__(
        self, harness: Harness, features: Features, *, patience: float, quiet: float
    ) -> None:
        self.harness = harness
        self.features = features
        self.patience = patience
        self.quiet = quiet

    @property
    def transport(self) -> Transport:
        """What is held to the contract."""
        return self.harness.transport

    @property
    def queue(self) -> str:
        """A queue that was empty at first."""
        return self.harness.queue

    @property
    def existing(self) -> Topology:
        """What is there, to be looked for."""
        return Topology(queues=(Queue(self.queue, check_only=True),))

    def subscription(self, **more: Any) -> Subscription:  # noqa: ANN401  -- Subscription's own
        """To the queue, with room for all that a check puts there."""
        values = {"queue": self.queue, "prefetch": 1000, "consumer_tag": CONSUMER_TAG, **more}
        return Subscription(**values)

    @asynccontextmanager
    async def consuming(self, **more: Any) -> AsyncIterator[Consuming]:  # noqa: ANN401  -- the same
        """Open a session and read it."""
        async with self.transport.session(self.subscription(**more)) as session:
            consuming = Consuming(session, patience=self.patience, quiet=self.quiet)
            try:
                yield consuming
            finally:
                await consuming.stop()

    async def put(self, count: int) -> list[bytes]:
        """Put so many numbered messages into the queue; return their bodies."""
        bodies = [b"%d" % number for number in range(count)]
        await self.harness.put(bodies)
        return bodies

    async def publish(self, *publications: Outgoing) -> list[Outcome]:
        """Publish with a publisher of its own."""
        async with self.transport.publisher() as publisher:
            return list(await publisher.publish(publications))

    async def waiting(self, count: int | None, queue: str | None = None) -> None:
        """Expect that a queue comes to hold so many messages, and goes on holding them."""
        queue = queue or self.queue
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.patience
        while (found := await self.harness.count(queue)) != count and loop.time() < deadline:
            await asyncio.sleep(0.02)
        if found == count:
            # It may have been on its way to another number.
            await asyncio.sleep(self.quiet)
            found = await self.harness.count(queue)
        same(count, found, f"messages that wait in {queue!r}")

    async def holds(self, bodies: Iterable[bytes], queue: str | None = None) -> None:
        """Expect that just these messages wait in a queue, in whatever order; take them out."""
        expected = sorted(bodies)
        await self.waiting(len(expected), queue)
        found = await self.harness.take(queue or self.queue)
        same(expected, sorted(found), f"what was in {queue or self.queue!r}")


def settled(disposition: Disposition, messages: Iterable[Message]) -> Settlement:
    """One disposition for some messages."""
    return Settlement(disposition, tuple(message.delivery_tag for message in messages))


def bodies_of(messages: Iterable[Message]) -> list[bytes]:
    """Their bodies, in order."""
    return [message.body for message in messages]
