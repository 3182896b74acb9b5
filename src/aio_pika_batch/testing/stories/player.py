"""Plays a story: a whole consumer runs on a scene, at the scene's pace."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from aio_pika_batch.consumer import BatchConsumer
from aio_pika_batch.core.results import MessageResult, Result
from aio_pika_batch.settings import BatchConsumerSettings
from aio_pika_batch.testing.stories.recording import RecordingTransport
from aio_pika_batch.testing.stories.story import RAISE, Fault, FaultKind, Story

if TYPE_CHECKING:
    from aio_pika_batch.core.message import Message
    from aio_pika_batch.core.settlement import Disposition
    from aio_pika_batch.transport import Transport


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


@dataclass(slots=True)
class Played:
    """What happened in a story. Messages are identified by their bodies.

    Attributes:
        seen: How often the handler reached each message.
        acks: How often the handler ACKed each message, and no failure voided the ACK.
        batches: The batches that the handler got.
        retries: The retry counts that the handler saw.
        most: The most handlers that ran concurrently.
        settled: How often each message was settled with each disposition.
        confirmed: How many copies of each message are confirmed.
        waiting: Messages left in the queue or waiting for a retry.
        dead: The dead letters.
        keeps_place: `Scene.keeps_place`.
        is_healthy: Whether the consumer was healthy before its last stop.
        complaints: Descriptions of what must not happen in any story.
    """

    seen: Counter[bytes] = field(default_factory=Counter)
    acks: Counter[bytes] = field(default_factory=Counter)
    batches: list[list[bytes]] = field(default_factory=list)
    retries: list[int] = field(default_factory=list)
    most: int = 0
    settled: dict[Disposition, Counter[bytes]] = field(default_factory=dict)
    confirmed: Counter[bytes] = field(default_factory=Counter)
    waiting: Counter[bytes] = field(default_factory=Counter)
    dead: Counter[bytes] = field(default_factory=Counter)
    keeps_place: bool = True
    is_healthy: bool = True
    complaints: list[str] = field(default_factory=list)


class HandlerFailed(Exception):
    """Raised by the handler of a story."""


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
            raise HandlerFailed(f"the story says so for {body!r}")
        return answer


def _settings(story: Story, scene: Scene) -> BatchConsumerSettings:
    """Return settings at the scene's pace; the time of a drain stays, for busy machines."""
    pace = scene.pace
    # Nothing from an .env file, which would change the story.
    given: dict[str, Any] = {"_env_file": None}
    if story.prefetch is not None:
        given["prefetch_count"] = story.prefetch
    return BatchConsumerSettings(
        url="memory://",
        queue_name=scene.queue,
        queue_type="quorum" if story.quorum else "classic",
        queue_arguments={"x-delivery-limit": _DELIVERY_LIMIT} if story.quorum else {},
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
    record = RecordingTransport(scene.transport)
    played = Played(
        settled=record.settled,
        confirmed=record.confirmed,
        complaints=record.complaints,
        keeps_place=scene.keeps_place,
    )
    consumer = _StoryConsumer(story, played, scene, record)
    await consumer.start()
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
                await consumer.start()
    if story.ends:

        def done() -> bool:
            """Return whether everything was delivered and settled."""
            return (
                consumer.is_healthy
                and record.delivered >= set(story.bodies)
                and not record.unsettled
            )

        await scene.come_to_rest(done)
        played.is_healthy = consumer.is_healthy
        await consumer.stop()
    if consumer.is_running:
        played.complaints.append("the consumer still runs although it was stopped")
    await scene.look(played)
    return played


async def _publish(story: Story, scene: Scene) -> None:
    for number, body in enumerate(story.bodies):
        await scene.put(body)
        await asyncio.sleep(story.pauses[number % len(story.pauses)] * scene.pace)


async def _hurt(fault: Fault, scene: Scene) -> None:
    await asyncio.sleep(fault.at * scene.pace)
    await scene.hurt(fault.kind, fault.seconds * scene.pace)
