"""On which terms does a worker work?"""

from __future__ import annotations

from dataclasses import dataclass

from aio_pika_batch.core.batch_run import FailurePolicy
from aio_pika_batch.core.circuit_breaker import BreakerPolicy
from aio_pika_batch.core.settlement_plan import Pace, SettlementPlanner
from aio_pika_batch.core.unconfirmed_policy import UnconfirmedPolicy
from aio_pika_batch.runtime.batching import Cutting


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """What its settings say, in the words of those who do it.

    Attributes:
        pace: How soon a yield is settled; None where that waits for the end of its batch.
        breaker: When it pauses; None: never.
    """

    cutting: Cutting
    prefetch: int
    concurrency: int
    process_timeout: float | None
    failure: FailurePolicy
    router: SettlementPlanner
    hold: UnconfirmedPolicy
    pace: Pace | None
    breaker: BreakerPolicy | None
