"""Which clauses are there, and how is a transport held to them?"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import TypeAlias

from aio_pika_batch.testing.contract import (
    declaring,
    losing,
    publishing,
    receiving,
    refusing,
    settling,
    stopping,
)
from aio_pika_batch.testing.contract.broken import ClauseBroken
from aio_pika_batch.testing.contract.clause import Clause
from aio_pika_batch.testing.contract.features import Features
from aio_pika_batch.testing.contract.harness import Harness
from aio_pika_batch.testing.contract.report import Finding, Report, Verdict
from aio_pika_batch.testing.contract.stage import Stage

HarnessFactory: TypeAlias = Callable[[], AbstractAsyncContextManager[Harness]]

CLAUSES: tuple[Clause, ...] = tuple(
    clause
    for chapter in (
        receiving.CHAPTER,
        stopping.CHAPTER,
        settling.CHAPTER,
        refusing.CHAPTER,
        losing.CHAPTER,
        publishing.CHAPTER,
        declaring.CHAPTER,
    )
    for clause in chapter.clauses
)
"""All clauses, in the order in which they are best read."""

_WHOLE_CLAUSE = 10
"""How many times `patience` a check may take in all."""


class TransportContract:
    """The contract for one transport.

    Args:
        harness: Makes a broker of its own for each clause; or, where there is only one broker,
            queues of their own. What it opens it closes.
        features: What the transport claims, and what the harness can do.
        patience: Seconds in which what must come has to come; only a failure waits for so long.
        quiet: Seconds after which what has not come does not count as coming. In virtual time it
            costs nothing.
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
        """The clauses about what every transport owes, and about what this one claims."""
        return [clause for clause in CLAUSES if not clause.missing(self._features)]

    async def check(self, clause: Clause) -> None:
        """Find out about one clause, on a harness of its own.

        Raises:
            ClauseBroken: It is not kept.
            Exception: Whatever the transport or the harness raised.
        """
        limit = self._patience * _WHOLE_CLAUSE
        deadline = asyncio.timeout(limit)
        try:
            async with deadline, self._harness() as harness:
                await clause.check(
                    Stage(harness, self._features, patience=self._patience, quiet=self._quiet)
                )
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise ClauseBroken(f"it was not done within {limit:g} s") from error

    async def run(self, *, at_once: int = 1) -> Report:
        """Find out about all clauses.

        Args:
            at_once: How many are checked at a time: on a real broker most of the time is waiting.
        """
        room = asyncio.Semaphore(at_once)

        async def find(clause: Clause) -> Finding:
            if missing := clause.missing(self._features):
                return Finding(clause, Verdict.NOT_APPLICABLE, f"needs {', '.join(missing)}")
            async with room:
                try:
                    await self.check(clause)
                except Exception as error:  # noqa: BLE001  -- whatever goes wrong is a finding
                    why = str(error) if isinstance(error, ClauseBroken) else repr(error)
                    return Finding(clause, Verdict.BROKEN, why, error)
            return Finding(clause, Verdict.KEPT)

        return Report(tuple(await asyncio.gather(*map(find, CLAUSES))))
