"""A contract that every transport must keep. Check yours with it, as the library's own are.

It needs no test framework, and works with any. `docs/writing-a-transport.md` shows how to use it.
"""

from aio_pika_batch.testing.contract.checks import Clause, ClauseBroken
from aio_pika_batch.testing.contract.harness import Features, Harness
from aio_pika_batch.testing.contract.runner import (
    CLAUSES,
    ContractReport,
    Finding,
    TransportContract,
    Verdict,
)

__all__ = [
    "CLAUSES",
    "Clause",
    "ClauseBroken",
    "ContractReport",
    "Features",
    "Finding",
    "Harness",
    "TransportContract",
    "Verdict",
]
