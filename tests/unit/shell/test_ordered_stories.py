"""Stories with keys: each key keeps its order, whatever happens.

As in `test_stories`, everything is drawn in advance: what is published, how often each message
fails and how, how long handlers take, and what the broker does meanwhile.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass

from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from aio_pika_batch import MessageResult
from aio_pika_batch.adapters.memory import EventKind
from aio_pika_batch.testing import virtual_time
from aio_pika_batch.testing.stories import Fault, FaultKind, MemoryScene
from tests.stories import STORIES
from tests.unit.shell.helpers import (
    ACK,
    NACK,
    REQUEUE,
    REQUEUE_IMMEDIATE,
    QueueBroker,
    RecordingConsumer,
)

LONG = 600.0
"""Seconds in which everything comes to its end once the faults are over."""


@dataclass(frozen=True)
class Life:
    """What happens to a message: a number of failures of one kind, and then an ACK or a NACK."""

    key: str
    failures: int
    how: MessageResult | None
    end: MessageResult


@dataclass(frozen=True)
class Story:
    """All that happens.

    Attributes:
        stops: Whether the handler ends its batch at a failure, or goes on.
        answers: Whether, with `isolate`, it yields the failure's result before it ends its batch.
            (Without `isolate`, that would be a failure of the next message.)
        faults: What goes wrong, and when.
    """

    lives: tuple[Life, ...]
    durations: tuple[float, ...] = (0.0,)
    pause: float = 0.0
    size: int = 3
    max_bytes: int | None = None
    concurrency: int = 3
    prefetch: int | None = None
    attempts: int = 3
    stops: bool = True
    answers: bool = False
    settle: str = "batch"
    isolate: bool = False
    faults: tuple[Fault, ...] = ()
    stop_at: float | None = None


lives = st.builds(
    Life,
    key=st.sampled_from(["a", "a", "b", "?"]),
    failures=st.sampled_from([0, 0, 1, 2, 9]),
    how=st.sampled_from([REQUEUE, REQUEUE_IMMEDIATE, None]),
    end=st.sampled_from([ACK, ACK, NACK]),
)

stories = st.builds(
    Story,
    lives=st.lists(lives, max_size=12).map(tuple),
    durations=st.lists(st.sampled_from([0.0, 0.05, 1.0, 6.0]), min_size=1, max_size=4).map(tuple),
    pause=st.sampled_from([0.0, 0.3]),
    size=st.integers(1, 4),
    max_bytes=st.none() | st.integers(1, 9),
    concurrency=st.integers(1, 3),
    prefetch=st.none() | st.integers(0, 12),
    attempts=st.integers(0, 3),
    stops=st.booleans(),
    answers=st.booleans(),
    settle=st.sampled_from(["batch", "yield", "atomic"]),
    isolate=st.booleans(),
    faults=st.lists(
        st.builds(
            Fault,
            st.floats(0, 15),
            st.sampled_from(FaultKind),
            st.sampled_from([0.0, 0.5, 5.0, 40.0]),
        ),
        max_size=2,
    ).map(tuple),
    stop_at=st.none() | st.floats(0, 20),
)


class Failed(Exception):
    """Raised by the handler."""


class Orderly(RecordingConsumer):
    """Its key is the first letter of a body; `?` has none."""

    def batch_key(self, message):
        letter = message.body[:1].decode()
        return None if letter == "?" else letter


class Play:
    """One story while it is played."""

    def __init__(self, story: Story) -> None:
        self.story = story
        self.rabbit = QueueBroker()
        self.scene = MemoryScene(self.rabbit)
        self.rabbit.declare()
        self.bodies = [f"{life.key}{at}".encode() for at, life in enumerate(story.lives)]
        self.life = dict(zip(self.bodies, story.lives, strict=True))
        self.seen: Counter[bytes] = Counter()
        self.acks: Counter[bytes] = Counter()
        self.nacks: set[bytes] = set()
        self.concluded: set[bytes] = set()
        self.at_work: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.tried: list[tuple[bytes, int]] = []
        self.out_of_order: list[tuple[bytes, bytes]] = []
        self.batches = 0

    async def handle(self, messages):
        """The handler."""
        key = self.life[messages[0].body].key
        assert {key} == {self.life[message.body].key for message in messages}
        self.at_work[key] += 1
        self.most[key] = max(self.most[key], self.at_work[key])
        self.batches += 1
        try:
            await asyncio.sleep(self.story.durations[self.batches % len(self.story.durations)])
            for message in messages:
                result = self.result(message)
                is_end = self.story.stops and result is not ACK and result is not NACK
                if result is None or (is_end and not (self.story.answers and self.story.isolate)):
                    raise Failed
                yield result
                if is_end:
                    raise Failed
        finally:
            self.at_work[key] -= 1

    def result(self, message):
        """Return what the story says for this attempt."""
        body = message.body
        life = self.life[body]
        if life.key != "?":
            earlier = self.bodies[: self.bodies.index(body)]
            self.out_of_order += [
                (each, body)
                for each in earlier
                if self.life[each].key == life.key and each not in self.concluded
            ]
        self.seen[body] += 1
        self.tried.append((body, message.retry_count))
        if self.seen[body] > life.failures:
            self.concluded.add(body)
            if life.end is ACK:
                self.acks[body] += 1
            else:
                self.nacks.add(body)
            return life.end
        if message.retry_count >= self.story.attempts:
            self.concluded.add(body)
        return life.how

    async def publish(self):
        """Publish the messages."""
        for body in self.bodies:
            self.rabbit.put(body)
            await asyncio.sleep(self.story.pause)

    async def hurt(self, fault):
        """Cause a fault and end it."""
        await asyncio.sleep(fault.at)
        await self.scene.hurt(fault.kind, fault.seconds)

    async def run(self) -> RecordingConsumer:
        """Play the story from beginning to end."""
        story = self.story
        given = {} if story.prefetch is None else {"prefetch_count": story.prefetch}
        consumer = Orderly(
            self.handle,
            transport=self.rabbit.transport,
            batch_size=story.size,
            batch_max_bytes=story.max_bytes,
            batch_timeout=1,
            concurrency=story.concurrency,
            max_requeue_attempts=story.attempts,
            dead_letter_exchange="dlx",
            ordered_by_key=True,
            settle=story.settle,
            isolate_failures=story.isolate,
            **given,
        )
        happens = [*(self.hurt(fault) for fault in story.faults), self.publish()]
        await live_through(consumer, happens, stop_at=story.stop_at)
        return consumer


async def live_through(consumer, happens, *, stop_at):
    """Run a consumer during a story; `stop_at` None: until nothing is left to do."""
    await consumer.start()
    others = [asyncio.create_task(each) for each in happens]
    if stop_at is None:
        await asyncio.gather(*others)
        await asyncio.sleep(LONG)
        assert consumer.is_healthy
        await consumer.stop()
    else:
        await asyncio.sleep(stop_at)
        await consumer.stop()
        await asyncio.gather(*others)


@settings(max_examples=STORIES)
@given(stories)
@example(
    Story(
        lives=(Life("a", 2, None, ACK), Life("a", 0, None, ACK), Life("a", 9, REQUEUE, ACK)),
        durations=(6.0,),
        size=1,
        faults=(Fault(3.0, FaultKind.CUT),),
    )
)
@example(
    Story(
        lives=(Life("a", 9, REQUEUE_IMMEDIATE, ACK), Life("a", 0, None, ACK)),
        prefetch=1,
        attempts=1,
        faults=(Fault(0.0, FaultKind.REFUSE, 40.0),),
    )
)
@example(Story(lives=(Life("a", 9, REQUEUE, ACK),) * 5, stop_at=0.3, prefetch=3))
def test_each_key_keeps_its_order_in_any_story(story):
    """Nothing is lost or left behind, no batches of a key overlap, and no limit is exceeded."""
    play = Play(story)
    consumer = virtual_time.run(play.run())
    rabbit = play.rabbit
    everything = set(play.bodies)
    waiting, dead = Counter(rabbit.waiting()), Counter(rabbit.waiting("dead"))

    # Nothing is lost: each message is in a queue, or its handler yielded ACK.
    assert everything == set(waiting) | set(dead) | set(play.acks)
    assert not play.rabbit.counts(EventKind.DROPPED)

    # Batches of a key do not overlap, nor with those of a session that is gone.
    assert all(most == 1 for key, most in play.most.items() if key != "?")

    # Nothing is handled before all that came before it is through; unless the handler goes on.
    if story.stops or story.size == 1:
        assert [] == play.out_of_order

    # Limits are kept.
    assert all(count <= story.attempts for _, count in play.tried)
    assert all(0 < len(batch) <= story.size for batch in consumer.batches)
    for batch in consumer.batches:
        fits = story.max_bytes is None or sum(map(len, batch)) <= story.max_bytes
        assert fits or len(batch) == 1

    # Nothing stays unsettled.
    assert [] == rabbit.unsettled()
    assert [] == rabbit.broker.connections
    if story.stop_at is None:
        assert not waiting
    if not story.faults:
        calm(play, waiting, dead)
        # A run that was void, or one of halves, is not counted.
        if story.stop_at is None and story.settle != "atomic" and not story.isolate:
            attempts(play, dead)
    event(f"{len(story.faults)} faults, {'stopped' if story.stop_at is not None else 'to the end'}")


def calm(play, waiting, dead):
    """Check a story without faults: each message exists once, and only a stop returned messages."""
    story = play.story
    if story.settle != "atomic":
        # There, an ACK may have been void.
        assert Counter(play.bodies) == waiting + dead + play.acks
    assert all(count == 1 for count in (waiting + dead).values())
    copies = play.rabbit.counts(EventKind.STORED, queue="jobs") - Counter(play.bodies)
    assert all(play.life[body].key == "?" for body in copies)


def attempts(play, dead):
    """Return the attempts of a message until it succeeds or is exhausted."""
    story = play.story
    for body, life in play.life.items():
        if life.key == "?":
            continue
        tries = min(life.failures, story.attempts) + 1
        assert list(range(tries)) == [count for each, count in play.tried if each == body]
        is_dead = life.failures > story.attempts or life.end is NACK
        assert is_dead == bool(dead[body])
