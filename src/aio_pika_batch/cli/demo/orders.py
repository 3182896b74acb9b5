"""The orders of the demo, and the check that each of them was handled.

Most orders are good. Some aren't valid JSON, some fail twice before they succeed, and a few always
fail. A good order becomes an invoice, and a bad one a dead letter.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

FLAKY_FAILURES = 2
"""How often a flaky order fails before it succeeds."""


class OrderKind(Enum):
    """What happens to an order, and the share of such orders."""

    GOOD = 0.90
    BAD = 0.03
    FLAKY = 0.06
    HOPELESS = 0.01


class OrderStream:
    """A reproducible stream of random orders.

    Attributes:
        drawn: Number of orders so far, by kind.
    """

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


_UNEQUAL = {True: "≤", False: "≠"}


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
        if self.is_exact:
            return self.expected == self.found
        return self.expected <= self.found

    def __str__(self) -> str:
        sign = "=" if self.expected == self.found else _UNEQUAL[self.is_ok]
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
    """Compare the published orders with what became of them.

    Args:
        drawn: Published orders by kind.
        invoices: How often the invoice of each order arrived, by the order's number.
        dead: How often each order arrived as a dead letter, by its number.
        reasons: Dead letters by reason.
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
    return [
        CountCheck("orders", drawn.total(), finished, "invoices and dead letters"),
        CountCheck("good and flaky", succeeding, len(invoices), "invoices"),
        CountCheck(
            "invalid JSON",
            drawn[OrderKind.BAD],
            undecodable,
            "dead letters (undecodable)",
            is_exact,
        ),
        CountCheck(
            "always failing",
            drawn[OrderKind.HOPELESS],
            exhausted,
            "dead letters (exhausted)",
            is_exact,
        ),
        CountCheck("expected retries", retries_due, retries, "retries", is_exact),
        CountCheck("lost", 0, drawn.total() - finished, "orders"),
        CountCheck("delivered again", 0, repeated, "orders, after a lost connection", is_exact),
    ]
