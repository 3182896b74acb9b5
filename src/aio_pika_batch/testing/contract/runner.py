"""Checks a transport against all clauses of the contract, and reports what was found."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from aio_pika_batch.testing.contract import ending, modifying, publishing, receiving, settling
from aio_pika_batch.testing.contract.checks import CheckContext, Clause, ClauseBroken
from aio_pika_batch.testing.contract.harness import Features, Harness

HarnessFactory: TypeAlias = Callable[[], AbstractAsyncContextManager[Harness]]

CLAUSES: tuple[Clause, ...] = tuple(
    clause
    for module in (receiving, ending, settling, modifying, publishing)
    for clause in module.GROUP.clauses
)
"""All clauses, in the order in which they are best read."""

_CHECK_TIMEOUT_FACTOR = 10
"""How many times `patience` a whole check may take."""


class Verdict(Enum):
    """The result of one clause."""

    KEPT = "kept"
    BROKEN = "broken"
    NOT_APPLICABLE = "not applicable"


@dataclass(frozen=True, slots=True)
class Finding:
    """The verdict on one clause.

    Attributes:
        why: Why it is broken, or which features it would need; empty if it is kept.
    """

    clause: Clause
    verdict: Verdict
    why: str = ""
    error: BaseException | None = None

    def __str__(self) -> str:
        return f"{self.verdict.value}: {self.clause}{self.why and f' ({self.why})'}"


@dataclass(frozen=True, slots=True)
class ContractReport:
    """The verdicts on all clauses, in the order of the contract."""

    findings: tuple[Finding, ...]

    def of(self, verdict: Verdict) -> list[Finding]:
        """Return the findings with one verdict."""
        return [finding for finding in self.findings if finding.verdict is verdict]

    @property
    def kept(self) -> list[Finding]:
        """The clauses that hold."""
        return self.of(Verdict.KEPT)

    @property
    def broken(self) -> list[Finding]:
        """The clauses that do not hold."""
        return self.of(Verdict.BROKEN)

    @property
    def not_applicable(self) -> list[Finding]:
        """The clauses about features that are not claimed."""
        return self.of(Verdict.NOT_APPLICABLE)

    def raise_if_broken(self) -> None:
        """Raise one error about all broken clauses.

        Raises:
            ClauseBroken: At least one clause is broken.
        """
        if broken := self.broken:
            lines = "".join(f"\n  {finding}" for finding in broken)
            raise ClauseBroken(
                f"{len(broken)} of {len(self.findings)} clauses are broken:{lines}"
            ) from broken[0].error

    def __str__(self) -> str:
        return "\n".join(map(str, self.findings))


class TransportContract:
    """The contract for one transport.

    Args:
        harness: Makes a broker for each clause or, if there is only one broker, new queues. It
            closes what it opens.
        features: What the transport claims, and what the harness can do.
        patience: Seconds within which an expected event must come; only a failure waits that long.
        quiet: Seconds after which an event counts as not coming. In virtual time it costs nothing.
    """

    def __init__(
        self,
        harness: HarnessFactory,
        features: Features | None = None,
        *,
        patience: float = 10.0,
        quiet: float = 0.2,
    ) -> None:
        self._harness = harness
        self._features = Features() if features is None else features
        self._patience = patience
        self._quiet = quiet

    @property
    def applicable(self) -> list[Clause]:
        """The clauses that every transport must keep, and those about the claimed features."""
        return [clause for clause in CLAUSES if not clause.missing(self._features)]

    async def check(self, clause: Clause) -> None:
        """Check one clause, on a new harness.

        Raises:
            ClauseBroken: The transport breaks it.
            Exception: Whatever the transport or the harness raised.
        """
        limit = self._patience * _CHECK_TIMEOUT_FACTOR
        deadline = asyncio.timeout(limit)
        try:
            async with deadline, self._harness() as harness:
                await clause.check(
                    CheckContext(
                        harness, self._features, patience=self._patience, quiet=self._quiet
                    )
                )
        except TimeoutError as error:
            if not deadline.expired():
                raise  # the transport's own TimeoutError
            raise ClauseBroken(f"the check did not finish within {limit:g} s") from error

    async def run(self, *, at_once: int = 1) -> ContractReport:
        """Check all clauses.

        Args:
            at_once: How many run concurrently: on a real broker most of the time is waiting.
        """
        limit = asyncio.Semaphore(at_once)

        async def find(clause: Clause) -> Finding:
            if missing := clause.missing(self._features):
                return Finding(clause, Verdict.NOT_APPLICABLE, f"needs {', '.join(missing)}")
            async with limit:
                try:
                    await self.check(clause)
                except Exception as error:  # noqa: BLE001  -- any error is a finding
                    why = str(error) if isinstance(error, ClauseBroken) else repr(error)
                    return Finding(clause, Verdict.BROKEN, why, error)
            return Finding(clause, Verdict.KEPT)

        return ContractReport(tuple(await asyncio.gather(*map(find, CLAUSES))))
