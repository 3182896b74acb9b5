"""What works, and is still not what anybody would want?

One line for each finding: what it is, what it leads to, and what to do. Most of it can be read from
the settings alone; whether the broker counts deliveries depends on its version.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from aio_pika_batch.core.message import FieldValue, Headers
from aio_pika_batch.core.results import MessageResult
from aio_pika_batch.core.topology import (
    DEAD_LETTER_EXCHANGE,
    DEFAULT_LIMIT_SINCE,
    DELIVERY_LIMIT,
    TopologyOptions,
    Version,
    dead_letter_target,
    effective_queue_type,
)

MESSAGE_TTL = "x-message-ttl"
CONSUMER_TIMEOUT = "x-consumer-timeout"

ACK_TIMEOUT = 30 * 60.0
"""Seconds that a broker waits for an acknowledgement (`consumer_timeout`, RabbitMQ's default)."""

DEFAULT_LIMIT = 20
"""The delivery limit of a quorum queue that sets none (since `DEFAULT_LIMIT_SINCE`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumerProfile:
    """How a consumer treats its messages; what is not said here has the name of its setting.

    Attributes:
        prefetch: The prefetch count that is used; 0 means no limit.
        failure_results: What may become of a message when its handler fails.
        retry_seconds: How long a message waits for its retries, all in all.
        ordered: Whether retries are made in place (`ordered_by_key`): counted by us, whatever the
            result, and without copies.
    """

    prefetch: int
    batch_size: int
    batch_timeout: float = 0.0
    concurrency: int = 1
    process_timeout: float | None = None
    max_requeue_attempts: int = 0
    failure_results: Collection[MessageResult] = ()
    consumer_arguments: Headers = field(default_factory=dict)
    retry_seconds: float = 0.0
    ordered: bool = False


def warnings_for(wanted: TopologyOptions, habits: ConsumerProfile) -> list[str]:
    """Look for what will surprise somebody later, before any broker is asked."""
    return [
        *_prefetch(habits),
        *_dead_letters(wanted),
        *_delivery_limit(wanted, habits),
        *_ack_timeout(wanted, habits),
        *_time_to_live(wanted, habits),
    ]


def broker_warnings_for(
    wanted: TopologyOptions, habits: ConsumerProfile, version: Version | None
) -> list[str]:
    """Look for what depends on the broker: does it ever give up a message that always comes back?

    Args:
        version: The broker's; None if it is not known.
    """
    if _drops_at_once(wanted, version):
        return [_DROPS_AT_ONCE]
    why = _endless(wanted, version)
    if why is None:
        return []
    poison = "a message that kills its consumer, or is answered REQUEUE_IMMEDIATE, each time"
    if habits.ordered:
        poison = "a message that kills its consumer each time"
    elif MessageResult.REQUEUE_IMMEDIATE in habits.failure_results:
        poison = "a message that its handler fails at (REQUEUE_IMMEDIATE), or dies of, each time"
    return [f"{why}: {poison}, comes back for ever; {_COUNTED}"]


_DROPS_AT_ONCE = (
    f"before RabbitMQ 4.0 a negative {DELIVERY_LIMIT} does not lift the limit: the broker takes a"
    " message away, dead-lettered or dropped, the first time it comes back; leave"
    f" {DELIVERY_LIMIT} out of queue_arguments there"
)

_COUNTED = (
    f"use a quorum queue with {DELIVERY_LIMIT} in queue_arguments (or by a policy), and REQUEUE,"
    " which is counted everywhere"
)


def _prefetch(habits: ConsumerProfile) -> Iterator[str]:
    prefetch, batch_size = habits.prefetch, habits.batch_size
    if 0 < prefetch < batch_size:
        yield (
            f"prefetch_count={prefetch} is below batch_size={batch_size}: batches are cut at"
            f" {prefetch} messages; raise prefetch_count, or leave it unset"
        )


def _dead_letters(wanted: TopologyOptions) -> Iterator[str]:
    if dead_letter_target(wanted) is None:
        yield (
            "no dead-letter exchange is known: unless a policy sets one, the broker discards what"
            " is NACKed or exhausted; set dead_letter_exchange, or dead_letter_queue to have both"
            " declared"
        )
    if (
        effective_queue_type(wanted) == "quorum"
        and DEAD_LETTER_EXCHANGE not in wanted.queue_arguments
    ):
        yield (
            "a quorum queue drops messages that were delivered too often (RabbitMQ 4: 20 times"
            f" unless {DELIVERY_LIMIT} says otherwise): set {DEAD_LETTER_EXCHANGE} in"
            " queue_arguments, or by a policy, to keep them"
        )


def _delivery_limit(wanted: TopologyOptions, habits: ConsumerProfile) -> Iterator[str]:
    """A copy is a new message to the broker: its limit never meets REQUEUE, but all other ways."""
    if effective_queue_type(wanted) != "quorum":
        return
    stated = _number(wanted.queue_arguments.get(DELIVERY_LIMIT))
    limit = DEFAULT_LIMIT if stated is None else stated
    attempts = habits.max_requeue_attempts
    if 0 <= limit < attempts:
        source = "RabbitMQ 4's default" if stated is None else "in queue_arguments"
        yield (
            f"the delivery limit {limit} ({source}) is below max_requeue_attempts={attempts}: what"
            " comes back otherwise than by REQUEUE (by REQUEUE_IMMEDIATE, a crash, a lost"
            " connection) is taken away by the broker sooner, dead-lettered or dropped; raise"
            f" {DELIVERY_LIMIT} in queue_arguments, or lower max_requeue_attempts"
        )


def _ack_timeout(wanted: TopologyOptions, habits: ConsumerProfile) -> Iterator[str]:
    limit, source = ACK_TIMEOUT, "RabbitMQ's default consumer_timeout"
    for where, arguments in (
        ("queue_arguments", wanted.queue_arguments),
        ("consumer_arguments", habits.consumer_arguments),
    ):
        stated = _number(arguments.get(CONSUMER_TIMEOUT))
        if stated is not None and stated > 0:
            limit, source = stated / 1000, f"{CONSUMER_TIMEOUT} in {where}"
    held = _held(habits)
    if held > limit:
        yield (
            f"a message may be held for {held:g} s (by batch_timeout, process_timeout, other"
            " batches before it, and retries in place), longer than the broker waits"
            f" ({limit:g} s, {source}): it then delivers everything again; lower those, or"
            " prefetch_count, or let the broker wait longer"
        )


def _held(habits: ConsumerProfile) -> float:
    """Seconds for which a message may wait for its batch, and for a hand, and be handled."""
    handling = habits.process_timeout or 0.0
    at_once = habits.concurrency * min(habits.batch_size, habits.prefetch or habits.batch_size)
    before = max(1, math.ceil(habits.prefetch / at_once)) - 1
    # A batch is collected while those before it are handled.
    in_place = habits.retry_seconds if habits.ordered else 0.0
    return max(habits.batch_timeout, before * handling) + handling + in_place


def _time_to_live(wanted: TopologyOptions, habits: ConsumerProfile) -> Iterator[str]:
    stated = _number(wanted.queue_arguments.get(MESSAGE_TTL))
    if stated is not None and not habits.ordered and habits.retry_seconds > stated / 1000:
        yield (
            f"retries may take {habits.retry_seconds:g} s, longer than a message lives"
            f" ({MESSAGE_TTL}={stated} ms in queue_arguments): each copy lives anew, so a failing"
            " message outlives its time; lower the delays or max_requeue_attempts, or raise"
            f" {MESSAGE_TTL}"
        )


def _endless(wanted: TopologyOptions, version: Version | None) -> str | None:
    """Why the broker never gives up a message that always comes back; None if it does."""
    queue_type = effective_queue_type(wanted)
    if queue_type != "quorum":
        unless = "" if queue_type else " (which this is, unless the virtual host says otherwise)"
        return f"a classic queue{unless} counts no deliveries"
    limit = _number(wanted.queue_arguments.get(DELIVERY_LIMIT))
    if limit is not None:
        return f"{DELIVERY_LIMIT}={limit} lifts the delivery limit" if limit < 0 else None
    if _is_before(version, DEFAULT_LIMIT_SINCE):
        return "before RabbitMQ 4.0 a quorum queue has no delivery limit by itself"
    return None


def _drops_at_once(wanted: TopologyOptions, version: Version | None) -> bool:
    limit = _number(wanted.queue_arguments.get(DELIVERY_LIMIT))
    return limit is not None and limit < 0 and _is_before(version, DEFAULT_LIMIT_SINCE)


def _is_before(version: Version | None, other: Version) -> bool:
    return version is not None and version < other


def _number(value: FieldValue) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
