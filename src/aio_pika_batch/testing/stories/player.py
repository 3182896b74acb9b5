"""How is a story played? By a whole consumer, on a scene, at the scene's pace."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from aio_pika_batch.batch_settings import BatchConsumerSettings
from aio_pika_batch.consumer import BatchConsumer
from aio_pika_batch.core.results import MessageResult, Result
from aio_pika_batch.testing.stories.recording import RecordingTransport
from aio_pika_batch.testing.stories.story import RAISE, Fault, FaultKind, Story

if TYPE_CHECKING:
    from aio_pika_batch.core.message import Message
    from aio_pika_batch.core.settlement import Disposition
    from aio_pika_batch.transport import Transport


_DELIVERY_LIMIT = 1000
"""So many deliveries no story has: what a broker drops for coming back too often is lost by its
limit, not by the consumer.
"""


class Scene(Protocol):
    """A broker with a dead-letter exchange that leads to a queue. All of it is this story's own.

    Attributes:
        transport: What the consumer is given; it can be hurt.
        pace: Seconds on the clock for one of the story.
        queue: The consumer declares it; nothing is put into it before.
        dead_letter_exchange: A fanout, which is there.
        keeps_place: Whether what is given back to the queue keeps its place.
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
        """Put a message into the queue; returns once it is there. No fault is in its way."""
        ...

    async def hurt(self, kind: FaultKind, seconds: float) -> None:
        """Let something go wrong for so many seconds on the clock, and right again."""
        ...

    async def come_to_rest(self, done: Callable[[], bool]) -> None:
        """Wait until the broker has nothing that waits, and `done` says so of the consumer; or for
        as long as that may take at most.
        """
        ...

    async def look(self, played: Played) -> None:
        """Enter what is left in the queues, once the consumer is gone, and any complaints."""
        ...


@dataclass(slots=True)
class Played:
    """What was seen of a story. Messages are told apart by their bodies.

    Attributes:
        seen: How often the handler came to each message.
        acks: How often it said ACK, and nothing made that void.
        batches: What it was given.
        retries: The retry counts that it was shown.
        most: How many handlers were at work at a time, at most.
        told: How often the broker was told what, for each.
        confirmed: How many copies of each are confirmed.
        waiting: What is left in the queue, or waits for another attempt.
        dead: The dead letters.
        keeps_place: The scene's.
        is_healthy: Whether the consumer was, before its last stop.
        complaints: What must not happen, whatever the story says, in words.
    """

    seen: Counter[bytes] = field(default_factory=Counter)
    acks: Counter[bytes] = field(default_factory=Counter)
    batches: list[list[bytes]] = field(default_factory=list)
    retries: list[int] = field(default_factory=list)
    most: int = 0
    told: dict[Disposition, Counter[bytes]] = field(default_factory=dict)
    confirmed: Counter[bytes] = field(default_factory=Counter)
    waiting: Counter[bytes] = field(default_factory=Counter)
    dead: Counter[bytes] = field(default_factory=Counter)
    keeps_place: bool = True
    is_healthy: bool = True
    complaints: list[str] = field(default_factory=list)


class HandlerFailed(Exception):
    """What the handler of a story raises."""


class _Actor(BatchConsumer):
    """Does what the story says."""

    def __init__(
        self, story: Story, played: Played, scene: Scene, transport: RecordingTransport
    ) -> None:
        super().__init__(_settings(story, scene), transport=transport)
        self._story = story
        self._played = played
        self._pace = scene.pace
        self._at_work = 0

    async def process_messages(self, messages: Sequence[Message]) -> AsyncIterator[Result]:
        story, played = self._story, self._played
        self._at_work += 1
        played.most = max(played.most, self._at_work)
        played.batches.append([message.body for message in messages])
        pause = story.durations[len(played.batches) % len(story.durations)] * self._pace
        acks: Counter[bytes] = Counter()
        try:
            await asyncio.sleep(pause)
            for message in messages:
                answer = self._answer(message)
                if answer is MessageResult.ACK:
                    # An atomic batch says so with its end.
                    (acks if story.settle == "atomic" else played.acks)[message.body] += 1
                yield answer
                if story.settle == "yield":
                    await asyncio.sleep(pause / 8)
            played.acks += acks
        finally:
            self._at_work -= 1

    def _answer(self, message: Message) -> Result:
        played, body = self._played, message.body
        played.seen[body] += 1
        played.retries.append(message.retry_count)
        answer = self._story.answer(body, played.seen[body])
        if answer is RAISE:
            raise HandlerFailed(f"as the story says of {body!r}")
        return answer


def _settings(story: Story, scene: Scene) -> BatchConsumerSettings:
    """Times are the scene's, but for the time that a drain may take on a busy machine."""
    pace = scene.pace
    # No file's: what stands in one is not of the story.
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
        requeue_hold=30 * pace,
        reconnect_delay=0.5 * pace,
        reconnect_delay_max=30 * pace,
        dead_letter_exchange=scene.dead_letter_exchange,
        settle=story.settle,
        isolate_failures=bool(story.isolate),
        isolate_limit=story.isolate or 10,
        breaker_threshold=story.breaker,
        breaker_min_samples=2,
        breaker_pause=0.5 * pace,
        breaker_pause_max=pace,
        **given,
    )


async def play(story: Story, scene: Scene) -> Played:
    """Play a story, and tell what was seen of it; :func:`judge` says what is wrong with that."""
    watch = RecordingTransport(scene.transport)
    played = Played(
        told=watch.told,
        confirmed=watch.confirmed,
        complaints=watch.complaints,
        keeps_place=scene.keeps_place,
    )
    consumer = _Actor(story, played, scene, watch)
    await consumer.start()
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
            """Everything has come, and nothing is left in anybody's hands."""
            return consumer.is_healthy and watch.came >= set(story.bodies) and not watch.open

        await scene.come_to_rest(done)
        played.is_healthy = consumer.is_healthy
        await consumer.stop()
    if consumer.is_running:
        played.complaints.append("the consumer runs although it was stopped")
    await scene.look(played)
    return played


async def _publish(story: Story, scene: Scene) -> None:
    for number, body in enumerate(story.bodies):
        await scene.put(body)
        await asyncio.sleep(story.pauses[number % len(story.pauses)] * scene.pace)


async def _hurt(fault: Fault, scene: Scene) -> None:
    await asyncio.sleep(fault.at * scene.pace)
    await scene.hurt(fault.kind, fault.seconds * scene.pace)
