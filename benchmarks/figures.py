"""Computes medians with their spread, ratios, and which goals are reached. Pure functions.

Ratios compare CPU per message, because a busy machine changes it least. A ratio is taken within
each round, between measurements that are minutes apart. Its median over the rounds is shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from statistics import median

from benchmarks.protocol import Reading

Rounds = Mapping[int, Reading]
"""The readings of one case, by round; a round that failed is missing."""


@dataclass(frozen=True)
class Spread:
    """A median with its minimum and maximum."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread | None:
    """Return median, minimum and maximum; None without values."""
    if not values:
        return None
    return Spread(median(values), min(values), max(values))


def cpu(reading: Reading) -> float:
    """Return µs of CPU per message."""
    return reading.cpu / reading.messages * 1e6


def rate(reading: Reading) -> float:
    """Return messages per second."""
    return reading.messages / reading.seconds


def cpu_of(rounds: Rounds) -> Spread | None:
    """Return CPU per message over all rounds."""
    return spread([cpu(reading) for reading in rounds.values()])


def rate_of(rounds: Rounds) -> Spread | None:
    """Return messages per second over all rounds."""
    return spread([rate(reading) for reading in rounds.values()])


def peak_of(rounds: Rounds) -> Spread | None:
    """Return the peak memory over all rounds, in MiB."""
    return spread([reading.peak_rss / 2**20 for reading in rounds.values()])


def cpu_ratio(rounds: Rounds, other: Rounds) -> Spread | None:
    """Return the ratio to the other's CPU, round by round."""
    both = sorted(rounds.keys() & other.keys())
    return spread([cpu(rounds[each]) / cpu(other[each]) for each in both])


def cpu_difference(rounds: Rounds, other: Rounds) -> Spread | None:
    """Return how many µs more than the other it needs, round by round."""
    both = sorted(rounds.keys() & other.keys())
    return spread([cpu(rounds[each]) - cpu(other[each]) for each in both])


def rate_ratio(rounds: Rounds, other: Rounds) -> Spread | None:
    """Return the ratio to the other's messages per second, round by round."""
    both = sorted(rounds.keys() & other.keys())
    return spread([rate(rounds[each]) / rate(other[each]) for each in both])


@dataclass(frozen=True)
class Goal:
    """A goal for a figure of this library.

    Attributes:
        limit: What the median must reach; a fraction if it is a ratio to others.
        seen: The measured value; None if there is none.
        is_ceiling: Whether the limit is a maximum rather than a minimum.
    """

    text: str
    limit: float | Fraction
    seen: Spread | None
    unit: str = ""
    is_ceiling: bool = True

    @property
    def is_reached(self) -> bool | None:
        """Whether it is reached; None if it wasn't measured."""
        if self.seen is None:
            return None
        return self.seen.median <= self.limit if self.is_ceiling else self.seen.median >= self.limit


def the_bar(of: Mapping[str, Rounds]) -> list[Goal]:
    """Return the goals of this library with what was measured, from the rounds of each case."""
    nothing: Rounds = {}

    def rounds(key: str) -> Rounds:
        return of.get(key, nothing)

    ours = rounds("ours.ack")
    c = rounds("librabbitmq")
    return [
        Goal(
            "CPU per message, all acked, of aio-pika's with an ack each",
            Fraction(1, 20),
            cpu_ratio(ours, rounds("aio-pika.each")),
        ),
        *(
            Goal(
                f"CPU per message, {text}, of aio-pika's with an ack each",
                Fraction(1, wanted),
                cpu_ratio(rounds(key), rounds("aio-pika.each")),
            )
            for text, wanted, key in [
                ("defaults", 12, "ours.default"),
                ("`Consumer` with its defaults", 8, "ours.single-default"),
            ]
        ),
        Goal("CPU per message, defaults, of all acked", 2, cpu_ratio(rounds("ours.default"), ours)),
        Goal(
            "CPU per message, all acked, of pika's", Fraction(1, 3), cpu_ratio(ours, rounds("pika"))
        ),
        Goal("messages/s, all acked, of librabbitmq's", 0.9, rate_ratio(ours, c), is_ceiling=False),
        Goal(
            "messages/s, 10 % NACK, of librabbitmq's with all acked",
            0.8,
            rate_ratio(rounds("ours.reject"), c),
            is_ceiling=False,
        ),
        Goal(
            "messages/s, 1 % NACK and 10 % REQUEUE, of aio-pika's with the same mix by hand",
            5,
            rate_ratio(rounds("ours.mixed"), rounds("aio-pika.mixed")),
            is_ceiling=False,
        ),
        Goal("CPU per requeued message, end to end", 25, cpu_of(rounds("ours.requeue")), " µs"),
        Goal(
            "CPU per published message, of aio-pika's with `gather`",
            Fraction(1, 8),
            cpu_ratio(rounds("ours.publish"), rounds("aio-pika.gather")),
        ),
        Goal(
            "CPU per message that an observer of everything adds",
            1,
            cpu_difference(rounds("ours.observer"), ours),
            " µs",
        ),
        Goal(
            "memory that a million messages add to what the first thousand took",
            4,
            _grown(rounds("million")),
            " MiB",
        ),
        Goal(
            "memory that larger bodies take, of prefetch × body, with a slow handler",
            2,
            _memory_ratio(of),
        ),
        *(
            Goal(f"CPU per message {text}", 1.1, cpu_ratio(rounds(large), rounds(small)))
            for text, large, small in [
                ("in batches of 5,000, of that in batches of 100", "batch-5000", "batch-100"),
                ("at prefetch 10,000, of that at 100", "prefetch-10000", "prefetch-100"),
                (
                    "in a backlog of 1,000,000, of that in 10,000",
                    "backlog-1000000",
                    "backlog-10000",
                ),
            ]
        ),
        Goal(
            "CPU per MiB of bodies of 8 MiB, of that of 1 MiB",
            1.1,
            _by(8, cpu_ratio(rounds("body-8388608"), rounds("body-1048576"))),
        ),
    ]


def _by(divisor: float, seen: Spread | None) -> Spread | None:
    if seen is None:
        return None
    return Spread(seen.median / divisor, seen.low / divisor, seen.high / divisor)


def _grown(rounds: Rounds) -> Spread | None:
    return spread([(each.peak_rss - each.rss) / 2**20 for each in rounds.values()])


def _memory_ratio(of: Mapping[str, Rounds]) -> Spread | None:
    """Return the ratio of memory for more unsettled messages."""
    small, large = of.get("memory-500-16384", {}), of.get("memory-500-262144", {})
    in_hand = 500 * (262_144 - 16_384)
    both = sorted(small.keys() & large.keys())
    return spread([(large[each].peak_rss - small[each].peak_rss) / in_hand for each in both])
