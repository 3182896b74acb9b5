"""Plays a story: a whole consumer runs on a scene, at the scene's pace.

What passes between the consumer and its broker is recorded at the port, so that the records are the
same on every broker. They are stricter than a broker, which does not notice that a tag is settled
again after its session is gone.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import ExitStack, asynccontextmanager
from typing import Any, Protocol

from aio_pika_batch.consumer import BatchConsumer
from aio_pika_batch.core.message import RETRY_COUNT_HEADER, Message
from aio_pika_batch.core.publication import Copy, Outcome, Outgoing
from aio_pika_batch.core.results import MessageResult, Result
from aio_pika_batch.core.settlement import (
    Modification,
    NativeRetries,
    Settlement,
)
from aio_pika_batch.core.topology import Topology, Version
from aio_pika_batch.errors import TopologyError
from aio_pika_batch.settings import BatchConsumerSettings
from aio_pika_batch.testing.stories.story import RAISE, Fault, FaultKind, Played, Story
from aio_pika_batch.transport import (
    AdjustableSession,
    ConfirmingSession,
    ListeningPublisher,
    ModifyingSession,
    ProvingSession,
    Publisher,
    PumpingSession,
    Session,
    Subscription,
    Transport,
    VersionedTransport,
)

_DELIVERY_LIMIT = 1000
"""More deliveries than in any story: the broker must not drop a message because of its limit."""


class Scene(Protocol):
    """A broker, or part of one, for one story, with a queue bound to its dead-letter exchange.

    Attributes:
        transport: The consumer's transport, which faults affect.
        pace: Seconds on the clock for one second of the story.
        queue: The queue that the consumer declares; no message is put into it before.
        dead_letter_exchange: An existing fanout exchange.
        keeps_place: Whether requeued and returned messages keep their place in the queue.
    """

    @property
    def transport(self) -> Transport: ...  # noqa: D102
    @property
    def pace(self) -> float: ...  # noqa: D102
    @property
    def queue(self) -> str: ...  # noqa: D102
    @property
    def dead_letter_exchange(self) -> str: ...  # noqa: D102
    @property
    def keeps_place(self) -> bool: ...  # noqa: D102

    async def put(self, body: bytes) -> None:
        """Put a message into the queue, unaffected by faults; it is there when this returns."""
        ...

    async def hurt(self, kind: FaultKind, seconds: float) -> None:
        """Cause a fault for some seconds on the clock, and end it."""
        ...

    async def come_to_rest(self, done: Callable[[], bool]) -> None:
        """Wait until no message waits on the broker and `done` returns true, or up to a limit."""
        ...

    async def look(self, played: Played) -> None:
        """Add what is left in the queues after the consumer has stopped, and any complaints."""
        ...


class HandlerFailed(Exception):
    """Raised by the handler of a story."""


class HandlerExited(BaseException):
    """Raised by the handler of a story every second time: no class of error may end more."""


class _StoryConsumer(BatchConsumer):
    """Yields and raises what the story says."""

    def __init__(
        self, story: Story, played: Played, scene: Scene, transport: RecordingTransport
    ) -> None:
        super().__init__(_settings(story, scene), transport=transport)
        self._story = story
        self._played = played
        self._pace = scene.pace
        self._running = 0

    async def process_messages(self, messages: Sequence[Message]) -> AsyncIterator[Result]:
        story, played = self._story, self._played
        self._running += 1
        played.most = max(played.most, self._running)
        played.batches.append([message.body for message in messages])
        pause = story.durations[len(played.batches) % len(story.durations)] * self._pace
        acks: Counter[bytes] = Counter()
        try:
            await asyncio.sleep(pause)
            for message in messages:
                answer = self._answer(message)
                if answer is MessageResult.ACK:
                    # The ACKs of an atomic batch count once the handler has ended.
                    (acks if story.settle == "atomic" else played.acks)[message.body] += 1
                yield answer
                if story.settle == "yield":
                    await asyncio.sleep(pause / 8)
            played.acks += acks
        finally:
            self._running -= 1

    def _answer(self, message: Message) -> Result:
        played, body = self._played, message.body
        played.seen[body] += 1
        played.retries.append(message.retry_count)
        answer = self._story.answer(body, played.seen[body])
        if answer is RAISE:
            kind = HandlerExited if (int(body) + played.seen[body]) % 2 else HandlerFailed
            raise kind(f"the story says so for {body!r}")
        return answer


def _settings(story: Story, scene: Scene) -> BatchConsumerSettings:
    """Return settings at the scene's pace; the time of a drain stays, for busy machines."""
    pace = scene.pace
    limit = getattr(scene, "delivery_limit", _DELIVERY_LIMIT)
    # Nothing from an .env file, which would change the story.
    given: dict[str, Any] = {"_env_file": None}
    if story.prefetch is not None:
        given["prefetch_count"] = story.prefetch
    return BatchConsumerSettings(
        url="memory://",
        queue_name=scene.queue,
        queue_type="quorum" if story.quorum else "classic",
        queue_arguments={"x-delivery-limit": limit} if story.quorum else {},
        batch_size=story.size,
        batch_timeout=pace,
        concurrency=story.concurrency,
        num_workers=story.workers,
        max_requeue_attempts=story.attempts,
        requeue_delay=0,
        requeue_hold=30 * pace,
        reconnect_delay=0.5 * pace,
        reconnect_delay_max=30 * pace,
        dead_letter_exchange=scene.dead_letter_exchange,
        settle=story.settle,
        isolate_failures=bool(story.isolate),
        isolate_limit=story.isolate or 10,
        breaker_threshold=story.breaker,
        breaker_min_samples=2,  # a story has few messages
        breaker_pause=0.5 * pace,
        breaker_pause_max=pace,
        **given,
    )


async def play(story: Story, scene: Scene) -> Played:
    """Play a story, and return what happened; :func:`judge` checks it."""
    played = Played(keeps_place=scene.keeps_place)
    record = RecordingTransport(scene.transport, played)
    consumer = _StoryConsumer(story, played, scene, record)
    await _start(consumer, scene)
    # Publishing and faults run beside the consumer, and end before its last stop.
    async with asyncio.TaskGroup() as others:
        others.create_task(_publish(story, scene))
        for fault in story.faults:
            others.create_task(_hurt(fault, scene))
        if story.stop_at is not None:
            await asyncio.sleep(story.stop_at * scene.pace)
            await consumer.stop()
            if story.restart_after is not None:
                await asyncio.sleep(story.restart_after * scene.pace)
                await _start(consumer, scene)
    if story.ends:

        def done() -> bool:
            """Return whether everything was delivered and settled."""
            return (
                consumer.is_healthy
                and record.delivered >= set(story.bodies)
                and not record.unsettled
                and not record.ending
            )

        await scene.come_to_rest(done)
        played.is_healthy = consumer.is_healthy
        await consumer.stop()
    if consumer.is_running:
        played.complaints.append("the consumer still runs although it was stopped")
    await scene.look(played)
    return played


async def _start(consumer: _StoryConsumer, scene: Scene) -> None:
    """Start it until the broker permits it, as a supervisor does."""
    while True:
        try:
            await consumer.start()
        except TopologyError:  # a permission is missing for some time
            await asyncio.sleep(scene.pace)
        else:
            return


async def _publish(story: Story, scene: Scene) -> None:
    for number, body in enumerate(story.bodies):
        await scene.put(body)
        await asyncio.sleep(story.pauses[number % len(story.pauses)] * scene.pace)


async def _hurt(fault: Fault, scene: Scene) -> None:
    await asyncio.sleep(fault.at * scene.pace)
    await scene.hurt(fault.kind, fault.seconds * scene.pace)


# --- recording --------------------------------------------------------------------


class RecordingTransport:
    """Wraps a transport, records messages by their bodies, and changes nothing.

    Attributes:
        played: What is done with messages at the port, and complaints about what must not happen.
        delivered: All messages delivered so far.
        ending: Sessions from their cancel to their close. They may hold messages that are neither
            in a queue nor known here: some returns are written last.
    """

    def __init__(self, transport: Transport, played: Played) -> None:
        self._transport = transport
        self._sessions: set[_Session] = set()
        self.played = played
        self.delivered: set[bytes] = set()
        self.ending: set[_Session] = set()

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
        with ExitStack() as when_closed:
            async with self._transport.session(subscription) as session:
                recorded = _kind_of(session)(self, session, subscription.prefetch)
                self._sessions.add(recorded)
                try:
                    yield recorded
                finally:
                    self._sessions.discard(recorded)
                    self.ending.add(recorded)
                    when_closed.callback(self.ending.discard, recorded)

    @asynccontextmanager
    async def publisher(self) -> AsyncIterator[Publisher]:
        """Open a publisher."""
        async with self._transport.publisher() as publisher:
            listens = isinstance(publisher, ListeningPublisher)
            kind = _ListeningPublisher if listens else _Publisher
            yield kind(publisher, self.played)


class _Session:
    """Records a session.

    Attributes:
        bodies: The bodies of unsettled messages, by delivery tag.
    """

    def __init__(self, record: RecordingTransport, session: Session, prefetch: int) -> None:
        self._record = record
        self._played = record.played
        # Any: a subclass calls what `_kind_of` has found the session to have.
        self._session: Any = session
        self._prefetch = prefetch
        self._last_tag = 0
        self.bodies: dict[int, bytes] = {}

    @property
    def unproven(self) -> int:
        """That of the wrapped session, if it has one."""
        session: Session = self._session
        return session.unproven if isinstance(session, ProvingSession) else 0

    async def __aiter__(self) -> AsyncIterator[Sequence[Message]]:
        async for chunk in self._session:
            self.record(chunk)
            yield chunk

    def record(self, chunk: Sequence[Message]) -> None:
        """Record the delivery of a chunk."""
        for message in chunk:
            if message.delivery_tag <= self._last_tag:
                self._played.complaints.append(f"tag {message.delivery_tag} came out of order")
            self._last_tag = message.delivery_tag
            self.bodies[message.delivery_tag] = message.body
            self._record.delivered.add(message.body)
        if self._prefetch and len(self.bodies) > self._prefetch:
            self._played.complaints.append(f"more than {self._prefetch} messages were unsettled")

    async def cancel(self) -> None:
        """Cancel the consumer."""
        self._record.ending.add(self)
        await self._session.cancel()

    async def settle(self, settlements: Sequence[Settlement]) -> None:
        """Record settlements before they are sent, so that nothing happens in between."""
        self._note_all(settlements)
        await self._session.settle(settlements)

    def _note_all(self, settlements: Sequence[Settlement]) -> None:
        for settlement in settlements:
            self._note(settlement.tags, self._played.settled[settlement.disposition])

    def _note(self, tags: Iterable[int], record: Counter[bytes]) -> None:
        for tag in tags:
            body = self.bodies.pop(tag, None)
            if body is None:
                self._played.complaints.append(f"tag {tag} was settled twice, or never delivered")
            else:
                record[body] += 1


class _PumpingSession(_Session):
    """Records a session that pumps."""

    async def pump(self, sink: Callable[[Sequence[Message]], None]) -> None:
        """Record chunks, and pass them to the sink."""

        def recording(chunk: Sequence[Message]) -> None:
            self.record(chunk)
            sink(chunk)

        await self._session.pump(recording)


class _AdjustableSession(_Session):
    """Records a session that can be paused."""

    async def pause(self) -> None:
        """Pause the deliveries."""
        await self._session.pause()

    async def resume(self, prefetch: int) -> None:
        """Resume the deliveries; earlier messages don't count for the new prefetch."""
        self._prefetch = prefetch and prefetch + len(self.bodies)
        await self._session.resume(prefetch)


class _ModifyingSession(_Session):
    """Records a session that can modify messages."""

    @property
    def retries(self) -> NativeRetries:
        """Those of the wrapped session."""
        retries: NativeRetries = self._session.retries
        return retries

    async def modify(
        self, modifications: Sequence[Modification], settlements: Sequence[Settlement] = ()
    ) -> None:
        """Record modifications before they are sent."""
        for each in modifications:
            self._note(each.tags, self._played.buried if each.dead else self._played.modified)
        self._note_all(settlements)
        await self._session.modify(modifications, settlements)


class _ConfirmingSession(_Session):
    """Records a session that confirms its settlements."""

    async def settled(self) -> None:
        """Wait until they are carried out."""
        await self._session.settled()


_ABILITIES: tuple[tuple[type, type[_Session]], ...] = (
    (PumpingSession, _PumpingSession),
    (AdjustableSession, _AdjustableSession),
    (ModifyingSession, _ModifyingSession),
    (ConfirmingSession, _ConfirmingSession),
)


def _kind_of(session: Session) -> type[_Session]:
    """The class that records a session, with exactly the abilities that it has."""
    bases = tuple(kind for ability, kind in _ABILITIES if isinstance(session, ability))
    return type("_RecordedSession", bases or (_Session,), {})


def _is_fresh(publication: Outgoing) -> bool:
    """Return whether it takes the place of a message that has no result."""
    return (
        isinstance(publication, Copy)
        and publication.routing_key == publication.message.queue
        and RETRY_COUNT_HEADER not in publication.add
    )


class _Publisher:
    """Records a publisher."""

    def __init__(self, publisher: Publisher, played: Played) -> None:
        self._publisher = publisher
        self._played = played

    @property
    def is_open(self) -> bool:
        """Whether another `publish` may succeed."""
        return self._publisher.is_open

    async def publish(self, publications: Sequence[Outgoing]) -> Sequence[Outcome]:
        """Record confirmed copies."""
        outcomes = await self._publisher.publish(publications)
        for publication, outcome in zip(publications, outcomes, strict=True):
            if outcome is Outcome.CONFIRMED:
                self._played.confirmed[publication.body] += 1
                self._played.replaced[publication.body] += _is_fresh(publication)
        return outcomes


class _ListeningPublisher(_Publisher):
    """Records a publisher that reports late outcomes."""

    @property
    def on_late(self) -> Callable[[Outgoing, Outcome], None] | None:
        """Called with late outcomes."""
        return self._listening.on_late

    @on_late.setter
    def on_late(self, on_late: Callable[[Outgoing, Outcome], None]) -> None:
        def recording(publication: Outgoing, outcome: Outcome) -> None:
            if outcome is Outcome.CONFIRMED:
                self._played.confirmed[publication.body] += 1
            on_late(publication, outcome)

        self._listening.on_late = recording

    @property
    def _listening(self) -> ListeningPublisher:
        assert isinstance(self._publisher, ListeningPublisher)  # noqa: S101  -- for type checkers
        return self._publisher
