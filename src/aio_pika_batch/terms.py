"""On which terms does a worker work?"""

from __future__ import annotations

from dataclasses import dataclass

from aio_pika_batch.collecting import Cutting
from aio_pika_batch.core.breaker import BreakerPolicy
from aio_pika_batch.core.holding import HoldPolicy
from aio_pika_batch.core.pace import Pace
from aio_pika_batch.core.routing import Router
from aio_pika_batch.core.trial import FailurePolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
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
    router: Router
    hold: HoldPolicy
    pace: Pace | None
    breaker: BreakerPolicy | None
