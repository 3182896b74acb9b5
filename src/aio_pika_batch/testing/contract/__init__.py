"""Does a transport keep the port's word? The contract that ours have to pass, to be used on yours.

No test framework is needed, and any will do. `docs/writing-a-transport.md` shows how to use it.
"""

from aio_pika_batch.testing.contract.broken import ClauseBroken
from aio_pika_batch.testing.contract.clause import Clause
from aio_pika_batch.testing.contract.features import Features
from aio_pika_batch.testing.contract.harness import Harness
from aio_pika_batch.testing.contract.report import Finding, Report, Verdict
from aio_pika_batch.testing.contract.runner import CLAUSES, TransportContract

__all__ = [
    "CLAUSES",
    "Clause",
    "ClauseBroken",
    "Features",
    "Finding",
    "Harness",
    "Report",
    "TransportContract",
    "Verdict",
]
