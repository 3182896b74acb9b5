"""What stays true, whatever happens?

A story is drawn up front: what is published, what the handler answers to each message each time,
how long it takes, and what the broker does meanwhile. Then it is played on the whole shell and the
broker in memory, in virtual time; afterwards the broker's journal is read.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, replace

from hypothesis import event, example, given
from hypothesis import strategies as st

from aio_pika_batch import Requeue
from aio_pika_batch.adapters.memory import Door, Happened, PublishFault
from aio_pika_batch.core.results import Result
from aio_pika_batch.testing import virtual_time
from tests.unit.shell.stage import (
    ACK,
    NACK,
    REQUEUE,
    REQUEUE_IMMEDIATE,
    Scribe,
    Stage,
    live_through,
    numbered,
)

LATER = Requeue(delay=2)

WAIT_QUEUE = "jobs.retry.2000"

RAISE = None
"""The handler raises when it comes to this message."""

LONG = 6000.0
"""Seconds in which everything comes to its end once the faults are over."""


@dataclass(frozen=True)
class Fault:
    """Something that the broker does, and for how long."""

    at: float
    kind: str
    seconds: float


@dataclass(frozen=True)
class Story:
    """All that happens. A message is ACKed once the answers that are drawn for it are spent."""

    answers: tuple[tuple[Result | None, ...], ...]
    pauses: tuple[float, ...] = (0.0,)
    durations: tuple[float, ...] = (0.0,)
    size: int = 3
    concurrency: int = 1
    workers: int = 1
    prefetch: int | None = None
    attempts: int = 3
    settle: str = "batch"
    isolate: int = 0
    breaker: float | None = None
    faults: tuple[Fault, ...] = ()
    stop_at: float | None = None


KINDS = ("cut", "cancel", "away", "refuse", "lose", "unconfirmed", "block")

stories = st.builds(
    Story,
    answers=st.lists(
        st.lists(
            st.sampled_from([ACK, NACK, REQUEUE, LATER, REQUEUE_IMMEDIATE, RAISE]), max_size=4
        ).map(tuple),
        max_size=12,
    ).map(tuple),
    pauses=st.lists(st.sampled_from([0.0, 0.3, 2.0]), min_size=1, max_size=3).map(tuple),
    durations=st.lists(st.sampled_from([0.0, 0.05, 1.0, 6.0]), min_size=1, max_size=4).map(tuple),
    size=st.integers(1, 5),
    concurrency=st.integers(1, 3),
    workers=st.integers(1, 2),
    prefetch=st.none() | st.integers(0, 12),
    attempts=st.integers(0, 3),
    settle=st.sampled_from(["batch", "yield", "atomic"]),
    isolate=st.sampled_from([0, 0, 1, 10]),
    breaker=st.sampled_from([None, None, 0.3, 1.0]),
    faults=st.lists(
        st.builds(
            Fault,
            at=st.floats(0, 15),
            kind=st.sampled_from(KINDS),
            seconds=st.sampled_from([0.0, 0.5, 5.0, 40.0]),
        ),
        max_size=3,
    ).map(tuple),
    stop_at=st.none() | st.floats(0, 20),
)


class Failed(Exception):
    """What the handler raises."""


class Play:
    """One story, being played."""

    def __init__(self, story: Story) -> None:
        self.story = story
        self.stage = Stage()
        for queue in ("jobs", "dead"):
            self.stage.declare(queue)
        self.stage.bind("dead", "dlx", "", kind="fanout")
        self.seen: Counter[bytes] = Counter()
        self.acks: Counter[bytes] = Counter()
        self.nacks: set[bytes] = set()
        self.retries: list[int] = []
        self.running = self.most = self.batches = 0

    def answer_to(self, body: bytes) -> Result | None:
        """What the story says, the how-manieth time ever this is."""
        drawn = self.story.answers[int(body)]
        return drawn[self.seen[body] - 1] if self.seen[body] <= len(drawn) else ACK

    async def handle(self, messages):
        """The handler."""
        self.running += 1
        self.most = max(self.most, self.running)
        self.batches += 1
        acks = Counter()
        pause = self.story.durations[self.batches % len(self.story.durations)]
        try:
            await asyncio.sleep(pause)
            for message in messages:
                self.seen[message.body] += 1
                self.retries.append(message.retry_count)
                answer = self.answer_to(message.body)
                if answer is RAISE:
                    raise Failed
                if answer is ACK and self.story.settle == "atomic":
                    acks[message.body] += 1
                elif answer is ACK:
                    self.acks[message.body] += 1
                yield answer
                if self.story.settle == "yield":
                    await asyncio.sleep(pause / 8)
            self.acks += acks
        finally:
            self.running -= 1

    async def publish(self):
        """Fill the queue."""
        for number, body in enumerate(numbered(len(self.story.answers))):
            self.stage.put(body, routing_key="key", exchange="events")
            await asyncio.sleep(self.story.pauses[number % len(self.story.pauses)])

    async def hurt(self, fault: Fault):
        """Let something go wrong, and right again."""
        broker = self.stage.broker
        await asyncio.sleep(fault.at)
        match fault.kind:
            case "cut":
                broker.cut()
            case "cancel":
                broker.cancel_consumers("jobs")
            case "away":
                broker.faults.door = Door.UNREACHABLE
                broker.cut()
                await asyncio.sleep(fault.seconds)
                broker.faults.door = Door.OPEN
            case "block":
                broker.faults.on_publish(PublishFault.BLOCK)
                await asyncio.sleep(fault.seconds)
                broker.unblock()
            case kind:
                publish_fault = PublishFault(kind)
                broker.faults.on_publish(publish_fault)
                await asyncio.sleep(fault.seconds)
                broker.faults.clear(publish_fault)

    async def run(self) -> Scribe:
        """From the first message to the last."""
        story = self.story
        given = {} if story.prefetch is None else {"prefetch_count": story.prefetch}
        consumer = Scribe(
            self.handle,
            transport=self.stage.transport,
            batch_size=story.size,
            batch_timeout=1,
            concurrency=story.concurrency,
            num_workers=story.workers,
            max_requeue_attempts=story.attempts,
            dead_letter_exchange="dlx",
            settle=story.settle,
            isolate_failures=bool(story.isolate),
            isolate_limit=story.isolate or 10,
            breaker_threshold=story.breaker,
            breaker_min_samples=2,
            breaker_pause=0.5,
            breaker_pause_max=1,
            **given,
        )
        happens = [*(self.hurt(fault) for fault in story.faults), self.publish()]
        await live_through(consumer, happens, stop_at=story.stop_at, long=LONG)
        return consumer


LOST_AND_FOUND = Story(
    answers=((REQUEUE,), (NACK,), (RAISE,)),
    faults=(Fault(0.5, "unconfirmed", 5.0), Fault(3.0, "cut", 0.0)),
)


@given(stories)
@example(LOST_AND_FOUND)
@example(Story(answers=((LATER,) * 4,) * 6, faults=(Fault(1.0, "unconfirmed", 5.0),)))
@example(Story(answers=((REQUEUE, LATER),) * 6, faults=(Fault(0.0, "away", 40.0),), stop_at=1.5))
@example(Story(answers=((REQUEUE_IMMEDIATE,) * 4,) * 6, concurrency=3, stop_at=0.0))
@example(replace(LOST_AND_FOUND, settle="yield", isolate=10, durations=(6.0,)))
@example(replace(LOST_AND_FOUND, settle="atomic", isolate=1, durations=(1.0,)))
@example(Story(answers=((), (RAISE,), (), (NACK,)), size=4, settle="atomic", isolate=10))
@example(Story(answers=((RAISE,) * 2,) * 6, breaker=0.3, faults=(Fault(0.6, "cut", 0.0),)))
@example(Story(answers=((REQUEUE,) * 4,) * 12, faults=(Fault(0.0, "block", 40.0),), stop_at=1.0))
def test_stories(story):
    """Nothing lost, nothing acked for no reason, nothing beyond its limits, nothing left behind."""
    play = Play(story)
    consumer = virtual_time.run(play.run())
    stage = play.stage
    everything = set(numbered(len(story.answers)))
    waiting, dead = Counter(stage.waiting()), Counter(stage.waiting("dead"))
    if WAIT_QUEUE in stage.broker.queues:
        waiting += Counter(stage.waiting(WAIT_QUEUE))
    acked = play.stage.counts(Happened.ACKED, queue="jobs")
    # Stored ever, but for the first time: copies for another attempt; and dead letters.
    copies = play.stage.counts(Happened.STORED, queue="jobs") - Counter(everything)
    copies += play.stage.counts(Happened.STORED, queue="dead")
    # What has waited is stored twice: on its way in, and when its wait is over.
    copies += play.stage.counts(Happened.STORED, queue=WAIT_QUEUE)
    copies -= play.stage.counts(Happened.DEAD_LETTERED, queue=WAIT_QUEUE)

    # Nothing is lost: it is still there, or dead, or its handler said that it went well.
    went_well = {body for body in everything if play.acks[body]}
    assert everything == set(waiting) | set(dead) | went_well
    assert not play.stage.counts(Happened.DROPPED)

    # Nothing is acked for no reason: the handler said so, or a copy is stored.
    assert acked <= play.acks + copies

    # Nothing is left in anybody's hands, and no connection open.
    assert [] == stage.out()
    assert [] == stage.broker.connections
    assert not consumer.is_running

    # Limits are kept.
    assert all(retry <= story.attempts for retry in play.retries)
    assert all(0 < len(batch) <= story.size for batch in consumer.batches)
    assert play.most <= story.concurrency * story.workers

    if story.stop_at is None:
        assert not waiting
    if not story.faults:
        calm(play, consumer, waiting, dead, copies)
    event(f"{len(story.faults)} faults, {'stopped' if story.stop_at is not None else 'to the end'}")


def calm(play, consumer, waiting, dead, copies):
    """Without faults there is exactly one of everything, and in order."""
    story = play.story
    everything = numbered(len(story.answers))
    acked = play.stage.counts(Happened.ACKED, queue="jobs")
    assert Counter(everything) == waiting + dead + play.acks
    # One ack for each ACK and for each copy: what was handled was settled, the stop included.
    assert acked == play.acks + copies
    for body in everything:
        drawn = story.answers[int(body)]
        # What an atomic batch acked in vain is handled again.
        assert play.seen[body] <= len(drawn) + 1 or story.settle == "atomic"
        if not waiting[body] and RAISE not in {each for plan in story.answers for each in plan}:
            assert play.seen[body] == lives(drawn, story.attempts)
    if story.workers == story.concurrency == 1:
        first_seen = list(dict.fromkeys(consumer.handled))
        assert [body for body in everything if body in set(first_seen)] == first_seen


def lives(drawn, attempts):
    """How often a message is handled: until it is ACKed or dead."""
    requeues = 0
    for number, answer in enumerate(drawn, 1):
        if answer in {ACK, NACK}:
            return number
        if answer in {REQUEUE, LATER}:
            requeues += 1
            if requeues > attempts:
                return number
    return len(drawn) + 1
