"""A clause of the contract: a sentence about every transport, and the check that verifies it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeAlias

from aio_pika_batch.testing.contract.checks import CheckContext
from aio_pika_batch.testing.contract.harness import Features

Check: TypeAlias = Callable[[CheckContext], Awaitable[None]]


# Clauses are data rather than methods of a test class: any framework, or none, can go through them,
# the sentences serve as test names, and a report can say what was not applicable, and why.
@dataclass(frozen=True, slots=True)
class Clause:
    """One thing that a transport must do.

    Attributes:
        sentence: What it must do.
        needs: The features that it needs, all of them; without them the clause does not apply.
        check: Raises ClauseBroken, or the transport's own error, if the clause is broken.
    """

    sentence: str
    needs: tuple[str, ...]
    check: Check

    def __str__(self) -> str:
        return self.sentence

    def missing(self, features: Features) -> list[str]:
        """Return the needed features that are not claimed."""
        return [need for need in self.needs if not getattr(features, need)]


class ClauseGroup:
    """Clauses about one topic, in the order in which they are written."""

    def __init__(self) -> None:
        self.clauses: list[Clause] = []

    def clause(self, sentence: str, *needs: str) -> Callable[[Check], Check]:
        """Add the decorated function as the check of a clause."""

        def add(check: Check) -> Check:
            self.clauses.append(Clause(sentence, needs, check))
            return check

        return add
