"""What is a clause? A sentence about every transport, and the check that finds out."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeAlias

from aio_pika_batch.testing.contract.features import Features
from aio_pika_batch.testing.contract.stage import Stage

Check: TypeAlias = Callable[[Stage], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Clause:
    """One thing that a transport owes.

    Attributes:
        sentence: What it owes.
        needs: The features without which it owes nothing; all of them are needed.
        check: Raises ClauseBroken, or whatever the transport raised, if it does not keep it.
    """

    sentence: str
    needs: tuple[str, ...]
    check: Check

    def __str__(self) -> str:
        return self.sentence

    def missing(self, features: Features) -> list[str]:
        """Which of the features that it needs are not claimed."""
        return [need for need in self.needs if not getattr(features, need)]


class Chapter:
    """Clauses that belong together, in the order in which they are written."""

    def __init__(self) -> None:
        self.clauses: list[Clause] = []

    def clause(self, sentence: str, *needs: str) -> Callable[[Check], Check]:
        """Enter the decorated function as the check of a clause."""

        def enter(check: Check) -> Check:
            self.clauses.append(Clause(sentence, needs, check))
            return check

        return enter
