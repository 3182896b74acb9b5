"""What has happened so far, and how fast is it?

An observer that counts, and nothing else: what it has counted is drawn by others. The time is given
to it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import quantiles
from typing import NamedTuple

from aio_pika_batch.observer import (
    BatchCut,
    BatchHandled,
    Connected,
    DeadLettered,
    Lost,
    Observer,
    Origin,
    Requeued,
    Settled,
)

REMEMBERED = 60
"""Seconds for which a rate is kept."""
SAMPLES = 2000
"""Latencies that a quantile is made of: the newest ones."""


class Rate:
    """How many a second, second by second."""

    def __init__(self) -> None:
        self._seconds: deque[tuple[int, int]] = deque(maxlen=REMEMBERED)

    def add(self, count: int, now: float) -> None:
        """Count some."""
        second = int(now)
        if self._seconds and self._seconds[-1][0] == second:
            self._seconds[-1] = (second, self._seconds[-1][1] + count)
        else:
            self._seconds.append((second, count))

    def past(self, now: float, seconds: int) -> list[int]:
        """Return the counts of the last whole seconds, the oldest first."""
        known = dict(self._seconds)
        return [known.get(second, 0) for second in range(int(now) - seconds, int(now))]


class Quantiles(NamedTuple):
    """How long it took, in seconds."""

    median: float
    p95: float
    worst: float


@dataclass(slots=True)
class Stage:
    """One consumer's figures.

    Attributes:
        settled: Messages by result; `returned` for those that went back unhandled.
        triggers: Batches by what has cut them.
        fills: Messages in each of the newest batches.
        retries: Copies that were confirmed.
        dead: Dead letters by reason.
        losses: How often a connection was lost.
        rate: Messages that have come to their end here.
        busy: Seconds in the handler, all batches together.
    """

    settled: Counter[str] = field(default_factory=Counter)
    triggers: Counter[str] = field(default_factory=Counter)
    fills: deque[int] = field(default_factory=lambda: deque(maxlen=20))
    retries: int = 0
    dead: Counter[str] = field(default_factory=Counter)
    losses: int = 0
    rate: Rate = field(default_factory=Rate)
    busy: float = 0.0

    @property
    def fill(self) -> float:
        """Messages in a batch, on an average of the newest ones."""
        return sum(self.fills) / len(self.fills) if self.fills else 0.0


class Figures(Observer):
    """The figures of a pipeline.

    Args:
        clock: Tells the time in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.began = clock()
        self.stages: dict[str, Stage] = {}
        self._latencies: deque[float] = deque(maxlen=SAMPLES)

    @property
    def now(self) -> float:
        """The time."""
        return self._clock()

    @property
    def elapsed(self) -> float:
        """Seconds since it began."""
        return self._clock() - self.began

    @property
    def latency(self) -> Quantiles | None:
        """From being published to the end of the pipeline; None before anything has got there."""
        known = sorted(self._latencies)
        if len(known) < 2:  # noqa: PLR2004  -- no quantile can be made of one
            return None
        cuts = quantiles(known, n=20, method="inclusive")
        return Quantiles(cuts[9], cuts[18], known[-1])

    def arrived(self, latency: float) -> None:
        """Count a message that has reached the end of the pipeline."""
        self._latencies.append(latency)

    def stage(self, consumer: str) -> Stage:
        """Return the figures of one consumer, by its class."""
        return self.stages.setdefault(consumer, Stage())

    # -- what is seen --

    def batch_cut(self, origin: Origin, event: BatchCut) -> None:
        """A batch goes to the handler."""
        stage = self.stage(origin.consumer)
        stage.triggers[event.trigger.value] += 1
        stage.fills.append(len(event.messages))

    def batch_handled(self, origin: Origin, event: BatchHandled) -> None:
        """The handler is done with a batch."""
        self.stage(origin.consumer).busy += event.seconds

    def settled(self, origin: Origin, event: Settled) -> None:
        """The broker has been told."""
        stage = self.stage(origin.consumer)
        for (result, _), count in event.counts.items():
            stage.settled["returned" if result is None else result.name] += count
        stage.rate.add(sum(event.counts.values()), self._clock())

    def requeued(self, origin: Origin, event: Requeued) -> None:
        """A copy is confirmed."""
        self.stage(origin.consumer).retries += 1

    def dead_lettered(self, origin: Origin, event: DeadLettered) -> None:
        """A dead letter is confirmed."""
        self.stage(origin.consumer).dead[event.reason.value] += 1

    def connected(self, origin: Origin, event: Connected) -> None:
        """A worker consumes: its consumer is on the board from now on."""
        self.stage(origin.consumer)

    def lost(self, origin: Origin, event: Lost) -> None:
        """A connection is gone."""
        self.stage(origin.consumer).losses += 1
