"""What happens, from the first message to the last?

Everything is said before anything begins: what depended on something observed could not be played
again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Final, Literal, TypeAlias

from aio_pika_batch.core.results import MessageResult, Requeue, Result

LATER: Final = Requeue(delay=1)
"""Another attempt after a second, at any pace: the shortest wait for which there is a level."""

WAIT_SUFFIX: Final = ".retry.1000"
"""What follows the queue's name in that of the queue in which it is waited for."""

RAISE: Final = None
"""The handler raises when it comes to this message."""

Answer: TypeAlias = Result | None
"""What a handler does about a message: it yields this, or raises."""


class FaultKind(Enum):
    """What can go wrong. All but the first two last for a while."""

    CUT = "cut"
    """All connections break, and new ones may come at once."""
    CANCEL = "cancel"
    """The broker ends all subscriptions."""
    AWAY = "away"
    """All connections break, and new ones are refused."""
    REFUSE = "refuse"
    """What the consumer publishes is refused."""
    RETURN = "return"
    """There is no queue for dead letters: they come back."""
    LOSE = "lose"
    """What the consumer publishes is lost on its way."""
    UNCONFIRMED = "unconfirmed"
    """What the consumer publishes is stored, and the confirmations are lost."""
    LATE = "late"
    """What the consumer publishes is confirmed when the fault is over, and not before."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that goes wrong, and right again.

    Attributes:
        at: Seconds after the start.
        seconds: How long it lasts.
    """

    at: float
    kind: FaultKind
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Story:
    """All that happens. Times are in seconds of the story: a scene has its own pace.

    Attributes:
        answers: For each message what the handler does about it the first time, the second time,
            and so on; when that is spent, it is ACKed.
        pauses: Between two publications; used in turn, again and again.
        durations: How long the handler takes for a batch; likewise.
        size: `batch_size`.
        prefetch: `prefetch_count`; None: unset.
        attempts: `max_requeue_attempts`.
        isolate: `isolate_limit`; 0: failures are not isolated.
        breaker: `breaker_threshold`.
        quorum: Whether the queue is a quorum queue.
        stop_at: When the consumer is stopped; None: when all has come to its end.
        restart_after: How long after its stop it is started again, to go on until the end; None:
            it is not.
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
        """As it is written in Python, to be played again."""
        return re.sub(r"<(\w+\.\w+): [^>]*>", r"\1", repr(self))

    @property
    def bodies(self) -> list[bytes]:
        """What is published, in order: `b"0"`, `b"1"`, …."""
        return [b"%d" % number for number in range(len(self.answers))]

    @property
    def ends(self) -> bool:
        """Whether it goes on until nothing is left to do."""
        return self.stop_at is None or self.restart_after is not None

    @property
    def raises(self) -> bool:
        """Whether the handler fails at any time."""
        return any(RAISE in each for each in self.answers)

    def answer(self, body: bytes, time: int) -> Answer:
        """What the handler does about a message the first time (1), the second time, …."""
        drawn = self.answers[int(body)]
        return drawn[time - 1] if time <= len(drawn) else MessageResult.ACK

    def times(self, body: bytes) -> int:
        """How often a message is handled until it is ACKed or dead, if nothing goes wrong and its
        handler never raises.
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
