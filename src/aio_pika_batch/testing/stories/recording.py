"""What did the consumer tell the broker, and what was it told?

Seen at the port, between the shell and whichever adapter: so it is the same on every broker, and
strict where a broker could not say anything (a tag that is settled again, once its session is
gone).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING

from aio_pika_batch.core.publication import Outcome, Outgoing
from aio_pika_batch.core.settlement import Disposition, Settlement
from aio_pika_batch.transport import PumpingSession, VersionedTransport

if TYPE_CHECKING:
    from aio_pika_batch.core.message import Message
    from aio_pika_batch.core.topology import Topology, Version
    from aio_pika_batch.transport import Publisher, Session, Subscription, Transport


class RecordingTransport:
    """A transport that notes what goes through it, by bodies, and changes nothing.

    Attributes:
        came: What was handed out, ever.
        told: How often the broker was told what, for each message.
        confirmed: How many copies of each message are confirmed.
        complaints: What must not happen at the port, in words.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._sessions: set[_Session] = set()
        self.came: set[bytes] = set()
        self.told: dict[Disposition, Counter[bytes]] = {each: Counter() for each in Disposition}
        self.confirmed: Counter[bytes] = Counter()
        self.complaints: list[str] = []

    @property
    def broker_version(self) -> Version | None:
        """The transport's, if it has one."""
        watched = self._transport
        return watched.broker_version if isinstance(watched, VersionedTransport) else None

    @property
    def open(self) -> int:
        """How many messages are handed out and not settled."""
        return sum(len(each.bodies) for each in self._sessions)

    async def declare(self, topology: Topology) -> None:
        """Declare, and check."""
        await self._transport.declare(topology)

    @asynccontextmanager
    async def session(self, subscription: Subscription) -> AsyncIterator[Session]:
        """A session that pumps if the transport's does."""
        async with self._transport.session(subscription) as session:
            kind = _PumpingSession if isinstance(session, PumpingSession) else _Session
            watched = kind(self, session, subscription.prefetch)
            self._sessions.add(watched)
            try:
                yield watched
            finally:
                self._sessions.discard(watched)

    def publisher(self) -> AbstractAsyncContextManager[Publisher]:
        """A publisher."""
        return self._publisher()

    @asynccontextmanager
    async def _publisher(self) -> AsyncIterator[Publisher]:
        async with self._transport.publisher() as publisher:
            yield _Publisher(publisher, self.confirmed)


class _Session:
    """A session.

    Attributes:
        bodies: Of what is handed out and not settled, by tag.
    """

    def __init__(self, watch: RecordingTransport, session: Session, prefetch: int) -> None:
        self._watch = watch
        self._session = session
        self._prefetch = prefetch
        self._last = 0
        self.bodies: dict[int, bytes] = {}

    async def __aiter__(self) -> AsyncIterator[Sequence[Message]]:
        async for chunk in self._session:
            self.deliver(chunk)
            yield chunk

    def deliver(self, chunk: Sequence[Message]) -> None:
        """Note what came."""
        for message in chunk:
            if message.delivery_tag <= self._last:
                self._watch.complaints.append(f"tag {message.delivery_tag} came out of order")
            self._last = message.delivery_tag
            self.bodies[message.delivery_tag] = message.body
            self._watch.came.add(message.body)
        if self._prefetch and len(self.bodies) > self._prefetch:
            self._watch.complaints.append(f"more than {self._prefetch} messages were handed out")

    async def cancel(self) -> None:
        """Ask for no more."""
        await self._session.cancel()

    async def settle(self, settlements: Sequence[Settlement]) -> None:
        """Note what the broker is told before it is, so that nothing comes in between."""
        for settlement in settlements:
            for tag in settlement.tags:
                body = self.bodies.pop(tag, None)
                if body is None:
                    self._watch.complaints.append(f"tag {tag} was settled twice, or never came")
                else:
                    self._watch.told[settlement.disposition][body] += 1
        await self._session.settle(settlements)


class _PumpingSession(_Session):
    """A session that pumps."""

    async def pump(self, sink: Callable[[Sequence[Message]], None]) -> None:
        """Note what comes, and hand it on."""

        def noting(chunk: Sequence[Message]) -> None:
            self.deliver(chunk)
            sink(chunk)

        assert isinstance(self._session, PumpingSession)  # noqa: S101  -- for type checkers
        await self._session.pump(noting)


class _Publisher:
    def __init__(self, publisher: Publisher, confirmed: Counter[bytes]) -> None:
        self._publisher = publisher
        self._confirmed = confirmed

    @property
    def is_open(self) -> bool:
        """Whether another `publish` may succeed."""
        return self._publisher.is_open

    async def publish(self, publications: Sequence[Outgoing]) -> Sequence[Outcome]:
        """Note what is confirmed."""
        outcomes = await self._publisher.publish(publications)
        for publication, outcome in zip(publications, outcomes, strict=True):
            if outcome is Outcome.CONFIRMED:
                self._confirmed[publication.body] += 1
        return outcomes
