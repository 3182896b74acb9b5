"""What is a mutant? One change for the worse, and the tests that must notice it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change for the worse.

    Attributes:
        trap: What happens then, in a sentence.
        file: Below `src/aio_pika_batch`.
        tests: What pytest is to run, at least one of which must fail.
    """

    trap: str
    file: str
    was: str
    becomes: str
    tests: tuple[str, ...]

    @property
    def needs_broker(self) -> bool:
        """Whether one of its tests does."""
        return any("integration" in each for each in self.tests)
