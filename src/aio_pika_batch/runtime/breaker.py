"""The circuit breaker of one worker: counts results, and reports when it opens and closes."""

from __future__ import annotations

import asyncio

from aio_pika_batch.core.batch_run import BatchDecisions
from aio_pika_batch.core.circuit_breaker import (
    BreakerPolicy,
    BreakerState,
    CircuitBreaker,
    is_failure,
)
from aio_pika_batch.core.results import ExceptionResults, MessageResult
from aio_pika_batch.logs import KeywordLogger
from aio_pika_batch.observer import BreakerClosed, BreakerOpened, BreakerProbing, Observers

PROBE = 1
"""The prefetch count of a worker that tries whether messages succeed again."""


class WorkerBreaker:
    """Connects a worker's results to its circuit breaker.

    Args:
        exceptions: The consumer's `exception_results`.
    """

    def __init__(
        self,
        policy: BreakerPolicy,
        exceptions: ExceptionResults,
        observers: Observers,
        log: KeywordLogger,
    ) -> None:
        self._breaker = CircuitBreaker(policy)
        self._exceptions = exceptions
        self._observers = observers
        self._log = log
        self._loop = asyncio.get_running_loop()

    @property
    def is_open(self) -> bool:
        """Whether the worker has to pause."""
        return self._breaker.state is BreakerState.OPEN

    @property
    def is_probing(self) -> bool:
        """Whether the worker has to take one message at a time."""
        return self._breaker.state is BreakerState.HALF_OPEN

    @property
    def pause(self) -> float:
        """How long the worker has to pause, in seconds."""
        return self._breaker.pause

    def record(self, decisions: BatchDecisions) -> bool:
        """Count results; return whether the worker needs another session now."""
        others = decisions.not_acked
        failed = sum(is_failure(each, self._exceptions) for each in others)
        succeeded = len(decisions.acked)
        succeeded += sum(each.result is MessageResult.ACK for each in others)
        breaker = self._breaker
        if not breaker.record(succeeded=succeeded, failed=failed, now=self._loop.time()):
            return False
        if breaker.state is BreakerState.OPEN:
            self._log.warning(
                "too many messages fail: consuming pauses",
                failed=breaker.failed,
                of=breaker.samples,
                pause=f"{breaker.pause:g} s",
            )
            self._observers.emit(BreakerOpened(breaker.failed, breaker.samples, breaker.pause))
        else:
            self._log.info("messages succeed again: consuming goes on")
            self._observers.emit(BreakerClosed())
        return True

    def probe(self) -> None:
        """End the pause."""
        self._breaker.probe()
        self._log.info("one message at a time, until one succeeds or fails")
        self._observers.emit(BreakerProbing())
