"""A mutant: a change that introduces a bug, and the tests that must detect it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mutant:
    """A change that introduces a bug.

    Attributes:
        trap: The bug, in a sentence.
        file: The changed file, relative to `src/aio_pika_batch`.
        tests: The tests that pytest runs; at least one must fail.
    """

    trap: str
    file: str
    was: str
    becomes: str
    tests: tuple[str, ...]

    @property
    def needs_broker(self) -> bool:
        """Whether one of its tests needs a broker."""
        return any("integration" in each for each in self.tests)
