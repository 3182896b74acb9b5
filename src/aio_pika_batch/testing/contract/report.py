"""What has come out?"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from aio_pika_batch.testing.contract.broken import ClauseBroken
from aio_pika_batch.testing.contract.clause import Clause


class Verdict(Enum):
    """What was found about one clause."""

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
class Report:
    """The verdicts on all clauses, in the order of the contract."""

    findings: tuple[Finding, ...]

    def of(self, verdict: Verdict) -> list[Finding]:
        """Those with one verdict."""
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
        """The clauses about what is not claimed."""
        return self.of(Verdict.NOT_APPLICABLE)

    def raise_if_broken(self) -> None:
        """Fail, and tell about all at once.

        Raises:
            ClauseBroken: There is a broken clause.
        """
        if broken := self.broken:
            told = "".join(f"\n  {finding}" for finding in broken)
            raise ClauseBroken(
                f"{len(broken)} of {len(self.findings)} clauses are broken:{told}"
            ) from broken[0].error

    def __str__(self) -> str:
        return "\n".join(map(str, self.findings))
