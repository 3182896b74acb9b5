"""`Story`: everything that happens to a consumer in one randomized test.

All of it is drawn before the consumer starts: a story that depended on something observed could not
be played again. A story knows nothing about brokers; a scene carries it out on one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Final, Literal, TypeAlias

from aio_pika_batch.core.results import MessageResult, Requeue, Result

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
