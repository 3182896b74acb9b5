"""Configuration of one worker, derived from the consumer's settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from aio_pika_batch.core.batch_run import FailurePolicy
from aio_pika_batch.core.circuit_breaker import BreakerPolicy
from aio_pika_batch.core.config_checks import consumer_timeout, crash_policy
from aio_pika_batch.core.hold_policy import (
    LONGEST_DEFAULT,
    HoldPolicy,
    UnconfirmedPolicy,
    longest_hold,
)
from aio_pika_batch.core.message import Headers
from aio_pika_batch.core.results import ExceptionResults
from aio_pika_batch.core.retry import Backoff, RetryPolicy
from aio_pika_batch.core.retry_in_place import RetryInPlace
from aio_pika_batch.core.settlement_plan import Pace, SettlementPlanner
from aio_pika_batch.core.topology import delivery_limit
from aio_pika_batch.core.topology_options import (
    TopologyOptions,
    dead_letter_target,
    dead_letters_differ,
)
from aio_pika_batch.runtime.settlement_queue import PATIENCE
from aio_pika_batch.settings import BatchConsumerSettings, ConsumerSettings, plain_url
from aio_pika_batch.settings.derived import (
    delay_steps,
    has_adaptive_prefetch,
    topology_options,
    virtual_host,
)

REPUBLISH = Backoff(0.5, 5.0)
"""Pauses before a copy that was returned or refused is published again."""

IN_PLACE = Backoff(0.2, 5.0)
"""Pauses before a retry in place if `requeue_delay` is 0: without one it would be a hot loop."""

HELD_IN_PLACE = Backoff(1.0, LONGEST_DEFAULT)
"""Pauses before a retry in place if `requeue_delay` isn't set."""

UNLIMITED_PREFETCH_HOLD = 1000
"""How many messages may be held if the prefetch count is 0, which limits nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """How a worker consumes. Names are those of the settings where they mean the same.

    Attributes:
        in_place: How messages are retried in place; None without `ordered_by_key`.
        adapts_prefetch: Whether `prefetch` is only where the prefetch count begins.
        reconnect: The pauses before a new session after a failure.
        failure: The results of messages that the handler left undecided.
        planner: Turns results into settlements and copies.
        unconfirmed: How long a message is held while its copy is not confirmed.
        pace: How soon a yielded result is settled; None if that waits for the end of the batch.
        breaker: When the worker pauses; None for never.
        may_continue_delays: Whether delays may be too long for one hold, so that a delivery may
            have to be held before it is handled.
    """

    queue_name: str
    prefetch: int
    adapts_prefetch: bool
    consumer_arguments: Headers
    batch_size: int
    batch_timeout: float
    batch_max_bytes: int | None
    in_place: RetryInPlace | None
    concurrency: int
    process_timeout: float | None
    stuck_after: float
    reconnect: Backoff
    failure: FailurePolicy
    planner: SettlementPlanner
    unconfirmed: UnconfirmedPolicy
    pace: Pace | None
    breaker: BreakerPolicy | None
    may_continue_delays: bool
    topology: TopologyOptions
    vhost: str

    @classmethod
    def from_settings(
        cls, settings: ConsumerSettings, exceptions: ExceptionResults, *, singly: bool = False
    ) -> Self:
        """Return the configuration for these settings.

        Args:
            exceptions: The consumer's `exception_results`.
            singly: Whether the consumer handles one message at a time, whatever the settings are.
        """
        batches = settings if isinstance(settings, BatchConsumerSettings) and not singly else None
        prefetch = settings.effective_prefetch
        options = topology_options(settings)
        steps = delay_steps(settings)
        retry = RetryPolicy(settings.max_requeue_attempts, settings.retry_count_header)
        timeout, _ = consumer_timeout(options, settings.consumer_arguments or {})
        longest = longest_hold(timeout)
        holds_by_default = settings.requeue_delay is None
        crashes = crash_policy(
            options,
            suspect_after=settings.crash_suspect_after,
            limit=settings.crash_limit,
            ordered=settings.ordered_by_key,
        )
        return cls(
            queue_name=settings.queue_name,
            prefetch=prefetch,
            adapts_prefetch=has_adaptive_prefetch(settings),
            consumer_arguments=settings.consumer_arguments or {},
            batch_size=batches.batch_size if batches else 1,
            batch_timeout=batches.batch_timeout if batches else 0.0,
            batch_max_bytes=batches.batch_max_bytes if batches else None,
            in_place=RetryInPlace(retry, HELD_IN_PLACE if holds_by_default else IN_PLACE, steps)
            if settings.ordered_by_key
            else None,
            concurrency=settings.concurrency,
            process_timeout=settings.process_timeout,
            stuck_after=settings.effective_stuck_after,
            reconnect=Backoff(settings.reconnect_delay, settings.reconnect_delay_max),
            failure=FailurePolicy(
                settings.unhandled_exception_action,
                exceptions,
                isolate=batches.isolate_limit if batches and batches.isolate_failures else 0,
                # A Consumer's only result comes when its handler has ended.
                is_atomic=batches is None or batches.settle == "atomic",
            ),
            planner=SettlementPlanner(
                settings.queue_name,
                retry,
                dead_letter_target(options),
                settings.dead_letter_exception_message,
                delay_steps=steps,
                reject_undeliverable=settings.without_dead_letter == "reject",
                hold=HoldPolicy(holds_by_default, longest, settings.requeue_delay_max),
                crashes=crashes,
                dead_letters_differ=dead_letters_differ(options),
            ),
            unconfirmed=UnconfirmedPolicy(
                settings.requeue_hold,
                prefetch // 2 if prefetch else UNLIMITED_PREFETCH_HOLD,
                REPUBLISH,
                longest,
                # Beyond `suspect_after` each return would look like a crash.
                crashes.suspect_after + 1 if crashes else delivery_limit(options),
            ),
            pace=Pace.within(batches.settle_interval, longest=PATIENCE)
            if batches and batches.settle == "yield"
            else None,
            breaker=_breaker(settings),
            may_continue_delays=longest < max(LONGEST_DEFAULT, settings.requeue_delay_max),
            topology=options,
            vhost=virtual_host(plain_url(settings)),
        )


def _breaker(settings: ConsumerSettings) -> BreakerPolicy | None:
    if settings.breaker_threshold is None:
        return None
    return BreakerPolicy(
        settings.breaker_threshold,
        settings.breaker_window,
        settings.breaker_min_samples,
        Backoff(settings.breaker_pause, settings.breaker_pause_max),
    )
