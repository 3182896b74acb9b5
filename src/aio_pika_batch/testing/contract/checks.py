"""Clauses of the contract, and the tools of their checks: expectations, a reader, the context.

The checks wait up to `patience` seconds for what must happen, and `quiet` seconds to see that
something doesn't happen.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

from aio_pika_batch.core.message import Message
from aio_pika_batch.core.publication import Outcome, Outgoing, Publication
from aio_pika_batch.core.settlement import Disposition, Settlement
from aio_pika_batch.core.topology import Queue, Topology
from aio_pika_batch.errors import SessionLost
from aio_pika_batch.testing.contract.harness import Features, Harness
from aio_pika_batch.transport import Session, Subscription, Transport

CONSUMER_TAG = "contract"
_LONGEST = 400


class ClauseBroken(AssertionError):
    """A transport breaks a clause; the text says what it did instead."""


def expect(expected: object, found: object, what: str) -> None:
    """Compare what was found with what was expected.

    Raises:
        ClauseBroken: They differ.
    """
    if expected != found:
        raise ClauseBroken(f"{what}: expected {_shorten(expected)}, found {_shorten(found)}")


@contextmanager
def expect_error(error: type[Exception], what: str) -> Iterator[None]:
    """Expect that the body of the context raises an error.

    Raises:
        ClauseBroken: It raised nothing, or another error.
    """
    try:
        yield
    except error:
        return
    except Exception as other:
        raise ClauseBroken(f"{what}: expected {error.__name__}, found {other!r}") from other
    raise ClauseBroken(f"{what}: expected {error.__name__}, and nothing was raised")


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


class SessionReader:
    """Reads a session.

    At most one receive waits at a time. It stays pending while a check does other things, so that
    looking for a message never cancels a receive.

    Attributes:
        session: The session.
        chunks: All chunks received so far.
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
        """All messages received so far."""
        return [message for chunk in self.chunks for message in chunk]

    async def _next(self) -> Sequence[Message] | None:
        if self._iterator is None:
            self._iterator = aiter(self.session)
        return await anext(self._iterator, None)

    async def chunk(self, within: float | None = None) -> Sequence[Message] | None:
        """Return the next chunk, or None at the end.

        Raises:
            TimeoutError: No chunk came in time.
        """
        # A task, since a cancelled `anext` would end a session that is an async generator.
        receiving = self._receiving = self._receiving or asyncio.create_task(self._next())
        await asyncio.wait({receiving}, timeout=self._patience if within is None else within)
        if not receiving.done():
            raise TimeoutError
        self._receiving = None
        chunk = receiving.result()
        if chunk is not None:
            self.chunks.append(chunk)
        return chunk

    async def take(self, count: int) -> list[Message]:
        """Receive exactly `count` more messages."""
        taken: list[Message] = []
        while len(taken) < count:
            try:
                chunk = await self.chunk()
            except TimeoutError:
                chunk = None
            if chunk is None:
                raise ClauseBroken(f"expected {count} messages, and only {len(taken)} came")
            taken.extend(chunk)
        expect(count, len(taken), "messages that came")
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

    async def expect_nothing(self) -> None:
        """Expect that no message comes for `quiet` seconds."""
        try:
            chunk = await self.chunk(within=self._quiet)
        except TimeoutError:
            return
        expect(None, chunk, "a chunk although no message should have come")

    async def expect_lost(self) -> None:
        """Expect that the session is lost, whatever is received before it notices the loss."""
        with expect_error(SessionLost, "receiving after the loss"):
            await self.take_to_the_end()

    async def settle(self, disposition: Disposition, messages: Iterable[Message]) -> None:
        """Settle all messages with one disposition."""
        await self.session.settle([settlement(disposition, messages)])

    async def stop(self) -> None:
        """Cancel a pending receive."""
        if self._receiving is not None:
            self._receiving.cancel()
            await asyncio.wait({self._receiving})


class CheckContext:
    """What a check works with: a harness, and methods that receive, publish and look.

    Args:
        harness: A broker, or queues, of this check alone.
        features: What the transport claims.
        patience: Seconds within which an expected event must come.
        quiet: Seconds after which an event counts as not coming.
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
        """The transport under test."""
        return self.harness.transport

    @property
    def queue(self) -> str:
        """A queue that was empty at first."""
        return self.harness.queue

    @property
    def existing(self) -> Topology:
        """The existing queue, to be checked only."""
        return Topology(queues=(Queue(self.queue, check_only=True),))

    def session(self, **more: Any) -> AbstractAsyncContextManager[Session]:  # noqa: ANN401  -- Subscription's own
        """Open a session on the queue, with room for all that a check puts there."""
        values = {"queue": self.queue, "prefetch": 1000, "consumer_tag": CONSUMER_TAG, **more}
        return self.transport.session(Subscription(**values))

    @asynccontextmanager
    async def read(self, **more: Any) -> AsyncIterator[SessionReader]:  # noqa: ANN401  -- the same
        """Open a session and read it."""
        async with self.session(**more) as session:
            reader = SessionReader(session, patience=self.patience, quiet=self.quiet)
            try:
                yield reader
            finally:
                await reader.stop()

    async def put(self, count: int) -> list[bytes]:
        """Put `count` numbered messages into the queue, and return their bodies."""
        bodies = [b"%d" % number for number in range(count)]
        await self.harness.put(bodies)
        return bodies

    async def expect_nothing_new(self, reader: SessionReader) -> None:
        """Expect that a cancelled session delivers nothing any more, and remove nothing."""
        await self.harness.put([b"late"])
        expect([], await reader.take_to_the_end(), "the received messages")
        await self.expect_count(1)

    def to_queue(self, body: bytes = b"") -> Publication:
        """Return a publication to the queue."""
        return Publication(body, routing_key=self.queue)

    async def publish(self, *publications: Outgoing) -> list[Outcome]:
        """Publish with a new publisher."""
        async with self.transport.publisher() as publisher:
            return list(await publisher.publish(publications))

    async def expect_count(self, count: int | None, queue: str | None = None) -> None:
        """Expect that a queue comes to hold `count` messages, and keeps holding them."""
        queue = queue or self.queue
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.patience
        while (found := await self.harness.count(queue)) != count and loop.time() < deadline:
            await asyncio.sleep(0.02)
        if found == count:
            # The count passes through other numbers on its way, so it must be seen twice.
            await asyncio.sleep(self.quiet)
            found = await self.harness.count(queue)
        expect(count, found, f"messages that wait in {queue!r}")

    async def expect_messages(self, bodies: Iterable[bytes], queue: str | None = None) -> None:
        """Expect that exactly these messages wait in a queue, in any order, and remove them."""
        expected = sorted(bodies)
        await self.expect_count(len(expected), queue)
        found = await self.harness.take(queue or self.queue)
        expect(expected, sorted(found), f"what was in {queue or self.queue!r}")


def settlement(disposition: Disposition, messages: Iterable[Message]) -> Settlement:
    """Return the settlement of some messages with one disposition."""
    return Settlement(disposition, tuple(message.delivery_tag for message in messages))


def expect_rising_tags(messages: Iterable[Message]) -> None:
    """Expect that the delivery tags of messages increase."""
    tags = [message.delivery_tag for message in messages]
    expect(sorted(set(tags)), tags, "the tags")


def bodies_of(messages: Iterable[Message]) -> list[bytes]:
    """Return the bodies of messages, in order."""
    return [message.body for message in messages]


Check: TypeAlias = Callable[[CheckContext], Awaitable[None]]


# Clauses are data rather than methods of a test class: any framework, or none, can go through them,
# the sentences serve as test names, and a report can say what was not applicable, and why.
@dataclass(frozen=True, slots=True)
class Clause:
    """One thing that a transport must do.

    Attributes:
        sentence: What it must do.
        needs: The features that it needs, all of them; without them the clause does not apply.
        check: Raises ClauseBroken, or the transport's own error, if the clause is broken.
    """

    sentence: str
    needs: tuple[str, ...]
    check: Check

    def __str__(self) -> str:
        return self.sentence

    def missing(self, features: Features) -> list[str]:
        """Return the needed features that are not claimed."""
        return [need for need in self.needs if not getattr(features, need)]


class ClauseGroup:
    """Clauses about one topic, in the order in which they are written."""

    def __init__(self) -> None:
        self.clauses: list[Clause] = []

    def clause(self, sentence: str, *needs: str) -> Callable[[Check], Check]:
        """Add the decorated function as the check of a clause."""

        def add(check: Check) -> Check:
            self.clauses.append(Clause(sentence, needs, check))
            return check

        return add
