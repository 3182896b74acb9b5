"""Do the books balance: has everything that came in come to its end?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from aio_pika_batch.cli.demo.load import FLAKY_FAILURES, Kind

_UNEQUAL = {True: "≤", False: "≠"}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the balance.

    Attributes:
        is_exact: Whether the two must be equal; else what was found may be more.
    """

    name: str
    expected: int
    found: int
    where: str
    is_exact: bool = True

    @property
    def is_balanced(self) -> bool:
        """Whether it is as it must be."""
        if self.is_exact:
            return self.expected == self.found
        return self.expected <= self.found

    def __str__(self) -> str:
        sign = "=" if self.expected == self.found else _UNEQUAL[self.is_balanced]
        return f"{self.name:<16}{self.expected:>8,}  {sign}{self.found:>8,}  {self.where}"


def balance(
    drawn: Counter[Kind],
    invoices: Mapping[int, int],
    dead: Mapping[int, int],
    reasons: Counter[str],
    *,
    retries: int,
    attempts: int,
    lost_connections: int,
) -> list[Row]:
    """Balance the books.

    Args:
        drawn: Orders that came in.
        invoices: How often each order's invoice has arrived, by its number.
        dead: How often each order has arrived as a dead letter, by its number.
        reasons: Dead letters by reason.
        retries: Copies that were confirmed.
        attempts: Retries that an order may have.
        lost_connections: If there were any, an order may have been delivered more than once.
    """
    is_exact = not lost_connections
    again = sum(invoices.values()) - len(invoices) + sum(dead.values()) - len(dead)
    due = FLAKY_FAILURES * drawn[Kind.FLAKY] + attempts * drawn[Kind.HOPELESS]
    ended = len({*invoices, *dead})
    return [
        Row("orders", drawn.total(), ended, "at their end: invoices and dead letters"),
        Row("good and flaky", drawn[Kind.GOOD] + drawn[Kind.FLAKY], len(invoices), "invoices"),
        Row(
            "no JSON",
            drawn[Kind.BAD],
            reasons["undecodable"],
            "dead letters: undecodable",
            is_exact,
        ),
        Row(
            "hopeless",
            drawn[Kind.HOPELESS],
            reasons["exhausted"],
            "dead letters: exhausted",
            is_exact,
        ),
        Row("retries due", due, retries, "retries made", is_exact),
        Row("lost", 0, drawn.total() - ended, "of them"),
        Row("delivered again", 0, again, "after a lost connection", is_exact),
    ]
