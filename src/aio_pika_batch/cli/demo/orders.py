"""The orders of the demo, the statistics of their way, and the check that none was lost.

Most orders are good. Some aren't valid JSON, some fail twice before they succeed, and a few always
fail. A good order becomes an invoice, and a bad one a dead letter.
"""

from __future__ import annotations

import json
import random
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from statistics import quantiles
from typing import NamedTuple

from aio_pika_batch.observer import (
    BatchCut,
    DeadLettered,
    Lost,
    Observer,
    Origin,
    Requeued,
    Settled,
)

FLAKY_FAILURES = 2
"""How often a flaky order fails before it succeeds."""


class OrderKind(Enum):
    """What happens to an order, and the share of such orders."""

    GOOD = 0.90
    BAD = 0.03
    FLAKY = 0.06
    HOPELESS = 0.01


class OrderStream:
    """A reproducible stream of random orders; `drawn` counts them by kind."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.drawn: Counter[OrderKind] = Counter()

    def take(self, count: int, now: float) -> list[bytes]:
        """Return the bodies of the next orders. Each begins with or contains its number."""
        kinds = list(OrderKind)
        bodies = []
        for kind in self._random.choices(kinds, [kind.value for kind in kinds], k=count):
            number = self.drawn.total()
            self.drawn[kind] += 1
            if kind is OrderKind.BAD:
                bodies.append(f"{number} {{ no JSON".encode())
            else:
                order = {"number": number, "kind": kind.name, "at": now}
                bodies.append(json.dumps(order).encode())
        return bodies


def number_of(body: bytes) -> int:
    """Return the number of an order, whether its body is valid JSON or not."""
    head, _, _ = body.partition(b" ")
    return int(head) if head.isdigit() else int(json.loads(body)["number"])


@dataclass(frozen=True, slots=True)
class CountCheck:
    """One line of the final check.

    Attributes:
        is_exact: Whether both counts must be equal; otherwise more may be found than expected.
    """

    name: str
    expected: int
    found: int
    where: str
    is_exact: bool = True

    @property
    def is_ok(self) -> bool:
        """Whether the counts match."""
        return self.expected == self.found or (not self.is_exact and self.expected < self.found)

    def __str__(self) -> str:
        sign = "=" if self.expected == self.found else "≤" if self.is_ok else "≠"
        return f"{self.name:<18}{self.expected:>8,}  {sign}{self.found:>8,}  {self.where}"


def check_counts(
    drawn: Counter[OrderKind],
    invoices: Mapping[int, int],
    dead: Mapping[int, int],
    reasons: Counter[str],
    *,
    retries: int,
    attempts: int,
    lost_connections: int,
) -> list[CountCheck]:
    """Compare the published orders with what happened to them.

    Args:
        invoices: How often the invoice of each order arrived, by the order's number.
        dead: How often each order arrived as a dead letter, by its number.
        retries: Confirmed copies for retries.
        attempts: Retries that an order may have.
        lost_connections: If not 0, orders may have been delivered more than once.
    """
    is_exact = not lost_connections
    repeated = sum(invoices.values()) - len(invoices) + sum(dead.values()) - len(dead)
    retries_due = FLAKY_FAILURES * drawn[OrderKind.FLAKY] + attempts * drawn[OrderKind.HOPELESS]
    finished = len({*invoices, *dead})
    succeeding = drawn[OrderKind.GOOD] + drawn[OrderKind.FLAKY]
    undecodable, exhausted = reasons["undecodable"], reasons["exhausted"]
    bad, hopeless = drawn[OrderKind.BAD], drawn[OrderKind.HOPELESS]
    return [
        CountCheck("orders", drawn.total(), finished, "invoices and dead letters"),
        CountCheck("good and flaky", succeeding, len(invoices), "invoices"),
        CountCheck("invalid JSON", bad, undecodable, "dead letters (undecodable)", is_exact),
        CountCheck("always failing", hopeless, exhausted, "dead letters (exhausted)", is_exact),
        # A lost connection leaves copies unconfirmed. Stored or not, they are not counted.
        *([CountCheck("expected retries", retries_due, retries, "retries")] if is_exact else []),
        CountCheck("lost", 0, drawn.total() - finished, "orders"),
        CountCheck("delivered again", 0, repeated, "orders, after a lost connection", is_exact),
    ]


# --- statistics ------------------------------------------------------------------

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
        dead: Dead letters by reason.
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
    """Statistics of all stages, by a clock in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began = clock()
        self.stages: dict[str, StageStats] = {}
        self._latencies: deque[float] = deque(maxlen=SAMPLES)

    @property
    def now(self) -> float:
        """The current time."""
        return self._clock()

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self.now - self._began

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

    def lost(self, origin: Origin, event: Lost) -> None:
        """Count a lost connection."""
        self.stage(origin.consumer).lost_connections += 1
