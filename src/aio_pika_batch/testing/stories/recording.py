"""A transport that records what passes between a consumer and its broker.

It records at the port, between the runtime and an adapter, so that the records are the same on
every broker. They are stricter than a broker, which does not notice that a tag is settled again
after its session is gone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from aio_pika_batch.core.publication import Outcome, Outgoing
from aio_pika_batch.core.settlement import Disposition, Settlement
from aio_pika_batch.transport import AdjustableSession, PumpingSession, VersionedTransport

if TYPE_CHECKING:
    from aio_pika_batch.core.message import Message
    from aio_pika_batch.core.topology import Topology, Version
    from aio_pika_batch.transport import Publisher, Session, Subscription, Transport


class RecordingTransport:
    """Wraps a transport, records messages by their bodies, and changes nothing.

    Attributes:
        delivered: All messages delivered so far.
        settled: How often each message was settled with each disposition.
        confirmed: How many copies of each message are confirmed.
        complaints: Descriptions of what must not happen at the port.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._sessions: set[_Session] = set()
        self.delivered: set[bytes] = set()
        self.settled: dict[Disposition, Counter[bytes]] = {each: Counter() for each in Disposition}
        self.confirmed: Counter[bytes] = Counter()
        self.complaints: list[str] = []

    @property
    def broker_version(self) -> Version | None:
        """The version of the wrapped transport, if it has one."""
        inner = self._transport
        return inner.broker_version if isinstance(inner, VersionedTransport) else None

    @property
    def unsettled(self) -> int:
        """The number of unsettled messages."""
        return sum(len(each.bodies) for each in self._sessions)

    async def declare(self, topology: Topology) -> None:
        """Declare on the wrapped transport."""
        await self._transport.declare(topology)

    @asynccontextmanager
    async def session(self, subscription: Subscription) -> AsyncIterator[Session]:
        """Open a session that can do what the wrapped one can."""
        async with self._transport.session(subscription) as session:
            recorded = _kind_of(session)(self, session, subscription.prefetch)
            self._sessions.add(recorded)
            try:
                yield recorded
            finally:
                self._sessions.discard(recorded)

    @asynccontextmanager
    async def publisher(self) -> AsyncIterator[Publisher]:
        """Open a publisher."""
        async with self._transport.publisher() as publisher:
            yield _Publisher(publisher, self.confirmed)


class _Session:
    """Records a session.

    Attributes:
        bodies: The bodies of unsettled messages, by delivery tag.
    """

    def __init__(self, record: RecordingTransport, session: Session, prefetch: int) -> None:
        self._record = record
        self._session = session
        self._prefetch = prefetch
        self._last_tag = 0
        self.bodies: dict[int, bytes] = {}

    async def __aiter__(self) -> AsyncIterator[Sequence[Message]]:
        async for chunk in self._session:
            self.record(chunk)
            yield chunk

    def record(self, chunk: Sequence[Message]) -> None:
        """Record the delivery of a chunk."""
        for message in chunk:
            if message.delivery_tag <= self._last_tag:
                self._record.complaints.append(f"tag {message.delivery_tag} came out of order")
            self._last_tag = message.delivery_tag
            self.bodies[message.delivery_tag] = message.body
            self._record.delivered.add(message.body)
        if self._prefetch and len(self.bodies) > self._prefetch:
            self._record.complaints.append(f"more than {self._prefetch} messages were unsettled")

    async def cancel(self) -> None:
        """Cancel the consumer."""
        await self._session.cancel()

    async def settle(self, settlements: Sequence[Settlement]) -> None:
        """Record settlements before they are sent, so that nothing happens in between."""
        for settlement in settlements:
            for tag in settlement.tags:
                body = self.bodies.pop(tag, None)
                if body is None:
                    self._record.complaints.append(
                        f"tag {tag} was settled twice, or never delivered"
                    )
                else:
                    self._record.settled[settlement.disposition][body] += 1
        await self._session.settle(settlements)


class _PumpingSession(_Session):
    """Records a session that pumps."""

    async def pump(self, sink: Callable[[Sequence[Message]], None]) -> None:
        """Record chunks, and pass them to the sink."""

        def recording(chunk: Sequence[Message]) -> None:
            self.record(chunk)
            sink(chunk)

        assert isinstance(self._session, PumpingSession)  # noqa: S101  -- for type checkers
        await self._session.pump(recording)


class _AdjustableSession(_Session):
    """Records a session that can be paused."""

    async def pause(self) -> None:
        """Pause the deliveries."""
        assert isinstance(self._session, AdjustableSession)  # noqa: S101  -- for type checkers
        await self._session.pause()

    async def resume(self, prefetch: int) -> None:
        """Resume the deliveries; earlier messages don't count for the new prefetch."""
        assert isinstance(self._session, AdjustableSession)  # noqa: S101  -- for type checkers
        self._prefetch = prefetch and prefetch + len(self.bodies)
        await self._session.resume(prefetch)


class _PumpingAdjustableSession(_PumpingSession, _AdjustableSession):
    """Records a session that pumps, and can be paused."""


def _kind_of(session: Session) -> type[_Session]:
    if isinstance(session, PumpingSession):
        is_adjustable = isinstance(session, AdjustableSession)
        return _PumpingAdjustableSession if is_adjustable else _PumpingSession
    return _AdjustableSession if isinstance(session, AdjustableSession) else _Session


class _Publisher:
    """Records a publisher."""

    def __init__(self, publisher: Publisher, confirmed: Counter[bytes]) -> None:
        self._publisher = publisher
        self._confirmed = confirmed

    @property
    def is_open(self) -> bool:
        """Whether another `publish` may succeed."""
        return self._publisher.is_open

    async def publish(self, publications: Sequence[Outgoing]) -> Sequence[Outcome]:
        """Record confirmed copies."""
        outcomes = await self._publisher.publish(publications)
        for publication, outcome in zip(publications, outcomes, strict=True):
            if outcome is Outcome.CONFIRMED:
                self._confirmed[publication.body] += 1
        return outcomes
