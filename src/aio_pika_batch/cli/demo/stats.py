"""Counts what happens in the pipeline: an observer that only counts, with a clock passed in."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import quantiles
from typing import NamedTuple

from aio_pika_batch.observer import (
    BatchCut,
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
"""Number of latest latencies from which quantiles are computed."""


class Rate:
    """A count per second."""

    def __init__(self) -> None:
        self._seconds: deque[tuple[int, int]] = deque(maxlen=REMEMBERED)

    def add(self, count: int, now: float) -> None:
        """Add to the count of the current second."""
        second = int(now)
        if self._seconds and self._seconds[-1][0] == second:
            self._seconds[-1] = (second, self._seconds[-1][1] + count)
        else:
            self._seconds.append((second, count))

    def past(self, now: float, seconds: int) -> list[int]:
        """Return the counts of the last whole seconds, oldest first."""
        known = dict(self._seconds)
        return [known.get(second, 0) for second in range(int(now) - seconds, int(now))]


class LatencyQuantiles(NamedTuple):
    """Latencies in seconds."""

    median: float
    p95: float
    worst: float


@dataclass(slots=True)
class StageStats:
    """Statistics of one consumer.

    Attributes:
        settled: Messages by result; `returned` for those put back unhandled.
        triggers: Batches by trigger.
        batch_sizes: Sizes of the latest batches.
        retries: Confirmed copies for retries.
        dead: Dead letters by reason.
        lost_connections: Number of lost connections.
        rate: Settled messages per second.
    """

    settled: Counter[str] = field(default_factory=Counter)
    triggers: Counter[str] = field(default_factory=Counter)
    batch_sizes: deque[int] = field(default_factory=lambda: deque(maxlen=20))
    retries: int = 0
    dead: Counter[str] = field(default_factory=Counter)
    lost_connections: int = 0
    rate: Rate = field(default_factory=Rate)

    @property
    def batch_size(self) -> float:
        """The average size of the latest batches."""
        return sum(self.batch_sizes) / len(self.batch_sizes) if self.batch_sizes else 0.0


class PipelineStats(Observer):
    """Statistics of all stages.

    Args:
        clock: Returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.began = clock()
        self.stages: dict[str, StageStats] = {}
        self._latencies: deque[float] = deque(maxlen=SAMPLES)

    @property
    def now(self) -> float:
        """The current time."""
        return self._clock()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self.began

    @property
    def lost_connections(self) -> int:
        """Number of lost connections of all stages."""
        return sum(stage.lost_connections for stage in self.stages.values())

    @property
    def latency(self) -> LatencyQuantiles | None:
        """Time from publishing to the end of the pipeline; None until two messages got there."""
        known = sorted(self._latencies)
        if len(known) < 2:  # noqa: PLR2004  -- quantiles need two values
            return None
        cuts = quantiles(known, n=20, method="inclusive")
        return LatencyQuantiles(cuts[9], cuts[18], known[-1])

    def arrived(self, latency: float) -> None:
        """Count a message that reached the end of the pipeline."""
        self._latencies.append(latency)

    def stage(self, consumer: str) -> StageStats:
        """Return the statistics of a consumer, by its class name."""
        return self.stages.setdefault(consumer, StageStats())

    def batch_cut(self, origin: Origin, event: BatchCut) -> None:
        """Count a batch and its trigger."""
        stage = self.stage(origin.consumer)
        stage.triggers[event.trigger.value] += 1
        stage.batch_sizes.append(len(event.messages))

    def settled(self, origin: Origin, event: Settled) -> None:
        """Count messages by result."""
        stage = self.stage(origin.consumer)
        for (result, _), count in event.counts.items():
            stage.settled["returned" if result is None else result.name] += count
        stage.rate.add(sum(event.counts.values()), self._clock())

    def requeued(self, origin: Origin, event: Requeued) -> None:
        """Count a retry."""
        self.stage(origin.consumer).retries += 1

    def dead_lettered(self, origin: Origin, event: DeadLettered) -> None:
        """Count a dead letter."""
        self.stage(origin.consumer).dead[event.reason.value] += 1

    def connected(self, origin: Origin, event: Connected) -> None:
        """Add the stage of this consumer."""
        self.stage(origin.consumer)

    def lost(self, origin: Origin, event: Lost) -> None:
        """Count a lost connection."""
        self.stage(origin.consumer).lost_connections += 1
