"""`Story`, everything that happens to a consumer in one randomized test, and its invariants.

All of it is drawn before the consumer starts: a story that depended on something observed could not
be played again. A story knows nothing about brokers; a scene carries it out on one.

Each invariant is a function that returns what breaks it, or nothing. Its docstring is the text of
the report.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Literal, TypeAlias

from aio_pika_batch.core.results import MessageResult, Requeue, Result
from aio_pika_batch.core.settlement import Disposition

LATER: Final = Requeue(delay=1)
"""A retry after one second, at any pace: the shortest delay that has a wait queue."""

WAIT_SUFFIX: Final = ".retry.1000"
"""The suffix of the wait queue's name, after the name of the queue."""

RAISE: Final = None
"""The handler raises when it reaches this message."""

Answer: TypeAlias = Result | None
"""What a handler does with a message: the result that it yields, or `RAISE`."""


class FaultKind(Enum):
    """The kinds of faults. All but `CUT` and `CANCEL` last for some time."""

    CUT = "cut"
    """All connections break, and can be opened again at once."""
    CANCEL = "cancel"
    """The broker cancels all consumers."""
    AWAY = "away"
    """All connections break, and new ones are refused."""
    REFUSE = "refuse"
    """What the consumer publishes is refused."""
    RETURN = "return"
    """No queue is bound for dead letters: they are returned."""
    LOSE = "lose"
    """What the consumer publishes is lost before it reaches the broker."""
    UNCONFIRMED = "unconfirmed"
    """What the consumer publishes is stored, and the confirmations are lost."""
    LATE = "late"
    """What the consumer publishes is confirmed only when the fault is over."""
    STALLED = "stalled"
    """Dead letters are confirmed only when the fault is over; retries are confirmed at once."""
    FORBIDDEN = "forbidden"
    """The consumer may not publish: the broker closes its channels."""
    OVERSIZED = "oversized"
    """The headers of messages that come meanwhile leave no room in a frame for a copy's."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault that begins and ends.

    Attributes:
        at: Seconds after the start.
        seconds: Its duration.
    """

    at: float
    kind: FaultKind
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Story:
    """Everything that happens. Times are in seconds of the story; each scene has its own pace.

    Attributes:
        answers: For each message, what the handler does with it the first time, the second time
            and so on; after that, it ACKs the message.
        pauses: The pauses between publications, used in a cycle.
        durations: How long the handler takes for a batch, used in a cycle.
        size: `batch_size`.
        prefetch: `prefetch_count`; None: unset.
        attempts: `max_requeue_attempts`.
        isolate: `isolate_limit`; 0: failures are not isolated.
        breaker: `breaker_threshold`.
        quorum: Whether the queue is a quorum queue.
        stop_at: When the consumer is stopped; None: when nothing is left to do.
        restart_after: Seconds from the stop until the consumer is started again; None: it is not.
    """

    answers: tuple[tuple[Answer, ...], ...]
    pauses: tuple[float, ...] = (0.0,)
    durations: tuple[float, ...] = (0.0,)
    size: int = 3
    concurrency: int = 1
    workers: int = 1
    prefetch: int | None = None
    attempts: int = 3
    settle: Literal["batch", "yield", "atomic"] = "batch"
    isolate: int = 0
    breaker: float | None = None
    quorum: bool = False
    faults: tuple[Fault, ...] = ()
    stop_at: float | None = None
    restart_after: float | None = None

    def __str__(self) -> str:
        """Return the story as Python code, to play it again."""
        return re.sub(r"<(\w+\.\w+): [^>]*>", r"\1", repr(self))

    @property
    def bodies(self) -> list[bytes]:
        """The bodies of the published messages, in order: `b"0"`, `b"1"`, …."""
        return [b"%d" % number for number in range(len(self.answers))]

    @property
    def ends(self) -> bool:
        """Whether the consumer runs until nothing is left to do."""
        return self.stop_at is None or self.restart_after is not None

    @property
    def raises(self) -> bool:
        """Whether the handler raises at any time."""
        return any(RAISE in each for each in self.answers)

    def answer(self, body: bytes, time: int) -> Answer:
        """Return what the handler does with a message the first time (1), the second time, …."""
        drawn = self.answers[int(body)]
        return drawn[time - 1] if time <= len(drawn) else MessageResult.ACK

    def times(self, body: bytes) -> int:
        """Return how often a message is handled until it is ACKed or dead-lettered, without faults
        and exceptions.
        """
        requeues = 0
        drawn = self.answers[int(body)]
        for time, answer in enumerate(drawn, 1):
            if answer in {MessageResult.ACK, MessageResult.NACK}:
                return time
            if answer is not MessageResult.REQUEUE_IMMEDIATE:
                requeues += 1
                if requeues > self.attempts:
                    return time
        return len(drawn) + 1


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
        modified: How often each message was retried without a copy.
        buried: How often each message was dead-lettered without a copy.
        confirmed: How many copies of each message are confirmed.
        replaced: How many of them replace a message that was not handled.
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
    settled: dict[Disposition, Counter[bytes]] = field(
        default_factory=lambda: {each: Counter() for each in Disposition}
    )
    modified: Counter[bytes] = field(default_factory=Counter)
    buried: Counter[bytes] = field(default_factory=Counter)
    confirmed: Counter[bytes] = field(default_factory=Counter)
    replaced: Counter[bytes] = field(default_factory=Counter)
    waiting: Counter[bytes] = field(default_factory=Counter)
    dead: Counter[bytes] = field(default_factory=Counter)
    keeps_place: bool = True
    is_healthy: bool = True
    complaints: list[str] = field(default_factory=list)


# --- invariants -------------------------------------------------------------------

Invariant: TypeAlias = Callable[[Story, Played], object]


class StoryBroken(AssertionError):
    """A story broke an invariant; the text contains the story, to play it again."""


def judge(story: Story, played: Played) -> None:
    """Check all invariants of a story that was played.

    Raises:
        StoryBroken: Some invariants are broken; it lists each, and what breaks it.
    """
    found = [(each, each(story, played)) for each in INVARIANTS]
    broken = [f"  {inspect.getdoc(each)} Broken by {what}" for each, what in found if what]
    if broken:
        raise StoryBroken("\n".join([*broken, f"in {story}"]))


# -- with any faults --


def nothing_is_lost(story: Story, played: Played) -> object:
    """Each message is in a queue, or dead-lettered, or was ACKed by its handler."""
    return set(story.bodies) - set(played.waiting) - set(played.dead) - set(+played.acks)


def nothing_appears(story: Story, played: Played) -> object:
    """There are no messages that were not published."""
    return (set(played.waiting) | set(played.dead) | set(played.seen)) - set(story.bodies)


def nothing_is_acked_without_a_reason(_story: Story, played: Played) -> object:
    """A message is acked only as often as its handler ACKed it or a copy was confirmed."""
    return played.settled[Disposition.ACK] - played.acks - played.confirmed


def nothing_is_discarded(_story: Story, played: Played) -> object:
    """No message is rejected: dead letters are published."""
    return +played.settled[Disposition.REJECT]


def attempts_are_bounded(story: Story, played: Played) -> object:
    """No message is retried more often than `max_requeue_attempts`."""
    return [count for count in played.retries if not 0 <= count <= story.attempts]


def batches_are_within_their_size(story: Story, played: Played) -> object:
    """No batch is empty, or larger than `batch_size`."""
    return [batch for batch in played.batches if not 0 < len(batch) <= story.size]


def handlers_are_bounded(story: Story, played: Played) -> object:
    """No more than `concurrency` handlers run in each worker."""
    return played.most if played.most > story.concurrency * story.workers else None


def there_are_no_complaints(_story: Story, played: Played) -> object:
    """Tags come in order and are settled once, prefetch is respected, and nothing stays open."""
    return played.complaints


def all_comes_to_its_end(story: Story, played: Played) -> object:
    """After all faults, the consumer is healthy and its queue becomes empty."""
    if not story.ends:
        return None
    return +played.waiting or (None if played.is_healthy else "a consumer that is not healthy")


# -- without faults, stops included --


def everything_is_there_once(story: Story, played: Played) -> object:
    """Without faults, each message is in one place, and no acked message comes back."""
    if story.faults:
        return None
    return _difference(Counter(story.bodies), played.waiting + played.dead + played.acks)


def everything_handled_is_settled(story: Story, played: Played) -> object:
    """Without faults, each ACK and each confirmed copy causes one ack, even before a stop."""
    if story.faults:
        return None
    return _difference(played.settled[Disposition.ACK], played.acks + played.confirmed)


def nothing_left_was_handled(story: Story, played: Played) -> object:
    """Without faults, each result of a handler is settled once, and no message just returned."""
    if story.faults or story.raises:
        return None
    settled = played.settled
    decided = settled[Disposition.ACK] + settled[Disposition.REQUEUE]
    decided += settled[Disposition.REJECT] + played.modified + played.buried
    return _difference(played.seen + played.replaced, decided)


def nothing_is_handled_too_often(story: Story, played: Played) -> object:
    """Without faults, a message is handled as often as its answers require."""
    if story.faults:
        return None
    wrong = []
    for body in story.bodies:
        seen = played.seen[body]
        # If an atomic batch fails, its ACKs are void and their messages are handled again.
        too_often = seen > len(story.answers[int(body)]) + 1 and story.settle != "atomic"
        exact = not played.waiting[body] and not story.raises
        if too_often or (exact and seen != story.times(body)):
            wrong.append((body, seen))
    return wrong


def order_is_kept(story: Story, played: Played) -> object:
    """Without faults, a single handler gets the messages in the order of the queue."""
    returns_messages = story.stop_at is not None or story.breaker is not None
    alone = story.workers == story.concurrency == 1
    # A quorum queue delivers returned messages first, but in the order of their return.
    keeps_place = played.keeps_place and not story.quorum
    if story.faults or not alone or (returns_messages and not keeps_place):
        return None
    first = list(dict.fromkeys(body for batch in played.batches for body in batch))
    return None if first == [body for body in story.bodies if body in first] else first


INVARIANTS: tuple[Invariant, ...] = (
    nothing_is_lost,
    nothing_appears,
    nothing_is_acked_without_a_reason,
    nothing_is_discarded,
    attempts_are_bounded,
    batches_are_within_their_size,
    handlers_are_bounded,
    there_are_no_complaints,
    all_comes_to_its_end,
    everything_is_there_once,
    everything_handled_is_settled,
    nothing_left_was_handled,
    nothing_is_handled_too_often,
    order_is_kept,
)
"""All invariants."""


def _difference(expected: Counter[bytes], found: Counter[bytes]) -> object:
    missing, too_many = expected - found, found - expected
    return {"missing": missing, "too many": too_many} if missing or too_many else None
