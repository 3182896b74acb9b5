"""Warnings about settings that are valid, but probably not what you want.

Each warning is one line that says what is wrong, what follows from it, and what to do. Most of them
need only the settings. Whether the broker counts deliveries depends on its version. What follows
from defaults alone is a hint, and no warning.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from aio_pika_batch.core.message import (
    DEATH_REASON,
    RETRY_COUNT_HEADER,
    Headers,
)
from aio_pika_batch.core.quarantine import CrashPolicy
from aio_pika_batch.core.results import MessageResult, Result
from aio_pika_batch.core.topology import (
    DEFAULT_DELIVERY_LIMIT,
    DELAYS_SINCE,
    DELIVERY_LIMIT,
    Amqp10Obstacle,
    Version,
    amqp10_obstacle,
    default_delivery_limit,
)
from aio_pika_batch.core.topology_options import (
    AT_LEAST_ONCE,
    DEAD_LETTER_EXCHANGE,
    DEAD_LETTER_ROUTING_KEY,
    DEAD_LETTER_STRATEGY,
    LENGTH_LIMITS,
    MESSAGE_TTL,
    OVERFLOW,
    QUEUE_TYPE,
    TopologyOptions,
    broker_dead_letter_arguments,
    dead_letter_target,
    dead_letters_differ,
    declared_arguments,
    effective_queue_type,
)

CONSUMER_TIMEOUT = "x-consumer-timeout"

SINGLE_ACTIVE = "x-single-active-consumer"

DELAYED_RETRY_TYPE = "x-delayed-retry-type"

ACK_TIMEOUT = 30 * 60.0
"""Seconds that RabbitMQ waits for an acknowledgement by default (`consumer_timeout`)."""


_AMQP10_REMEDIES = {
    Amqp10Obstacle.VERSION: "it needs RabbitMQ 4.0 or newer",
    Amqp10Obstacle.QUEUE_TYPE: (
        "the queue isn't known to be a quorum queue; use queue_type='quorum'"
    ),
    Amqp10Obstacle.CONSUMER_ARGUMENTS: (
        "it has no consumer_arguments but x-priority; remove the others"
    ),
    Amqp10Obstacle.DELIVERY_LIMIT: (
        "before RabbitMQ 4.3 each retry counts towards the delivery limit; set"
        f" {DELIVERY_LIMIT}=-1 in queue_arguments"
    ),
}

CLOCK_TOLERANCE = 1.0
"""Seconds by which clocks may differ."""

MUCH = 1.25
"""How many times as much as it could a message must cost for a setting to be named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumerProfile:
    """How a consumer handles messages. Fields without a description have the name of their setting.

    Attributes:
        prefetch: The prefetch count in use, at first; 0 means no limit.
        adapts_prefetch: Whether it adapts to what is acked.
        failure_results: The results that a message can get when its handler fails.
        retry_seconds: The sum of the delays of all retries of a message.
        ordered: Whether retries are made in place (`ordered_by_key`): without copies, and counted
            by this library whatever the result is.
    """

    prefetch: int
    batch_size: int
    batch_timeout: float = 0.0
    concurrency: int = 1
    process_timeout: float | None = None
    max_requeue_attempts: int = 0
    failure_results: Collection[Result] = ()
    consumer_arguments: Headers = field(default_factory=dict)
    retry_seconds: float = 0.0
    ordered: bool = False
    rejects_undeliverable: bool = False
    retry_count_header: str = RETRY_COUNT_HEADER
    wire: str = "auto"
    adapts_prefetch: bool = False


def costliest_setting(profile: ConsumerProfile, *, singly: bool) -> str | None:
    """Return the setting that costs most CPU for each message; None if none costs much.

    Args:
        singly: Whether the consumer handles one message at a time, so that it has no `batch_size`.
    """
    # How many times as much a message costs, roughly as docs/performance.md shows.
    factors = {"wire": 10.0 if profile.wire == "plain" else 1.0}
    if not singly:
        factors["batch_size"] = 1 + 4 / profile.batch_size
    if profile.prefetch and not profile.adapts_prefetch:
        factors["prefetch_count"] = 1 + 20 / profile.prefetch
    name, factor = max(factors.items(), key=lambda each: each[1])
    return name if factor >= MUCH else None


def warnings_for(options: TopologyOptions, profile: ConsumerProfile) -> list[str]:
    """The warnings that need no broker."""
    return [
        *_prefetch(profile),
        *(_no_dead_letters(options, profile) if profile.rejects_undeliverable else ()),
        *_given_up(options),
        *_delivery_limit(options, profile),
        *_ack_timeout(options, profile),
        *_time_to_live(options, profile),
    ]


def hints_for(options: TopologyOptions, profile: ConsumerProfile) -> list[str]:
    """What may be missing where settings have their defaults."""
    hints = [] if profile.rejects_undeliverable else [*_no_dead_letters(options, profile)]
    if _is_classic_by_default(options, profile):
        hints.append(
            f"queue {options.queue_name!r} may be a classic queue: a message that crashes its"
            " consumer is redelivered forever; set queue_type='quorum'"
        )
    return [*hints, *_other_headers(options)]


def broker_warnings_for(
    options: TopologyOptions, profile: ConsumerProfile, version: Version | None
) -> list[str]:
    """Return the warnings that depend on the broker: some never give up a failing message.

    Args:
        version: The broker's version; None if it is unknown.
    """
    if _drops_at_once(options, version):
        return [_DROPS_AT_ONCE]
    if _is_classic_by_default(options, profile):
        return []
    not_alone = _no_quarantine(options, ordered=profile.ordered)
    if not_alone is None:
        return []  # `crash_limit` ends such a message, if the broker doesn't
    why = _endless(options, version)
    if why is None:
        return [
            (
                f"a message that crashes its consumer can't be handled alone, since {not_alone};"
                " keep prefetch_count low"
            )
        ]
    # Not only if the settings contain REQUEUE_IMMEDIATE: what a handler will yield is unknown at
    # the start, and any message can crash its process.
    poison = "a message that always crashes its consumer, or always gets REQUEUE_IMMEDIATE,"
    if profile.ordered:
        poison = "a message that always crashes its consumer"
    elif MessageResult.REQUEUE_IMMEDIATE in profile.failure_results:
        poison = "a message that always makes its handler fail (REQUEUE_IMMEDIATE), or crash,"
    remedy = f"set {DELIVERY_LIMIT} in queue_arguments"
    if effective_queue_type(options) != "quorum":
        remedy = "use queue_type='quorum'"
    return [f"{why}: {poison} is redelivered forever; {remedy}"]


def amqp10_warnings_for(
    options: TopologyOptions, profile: ConsumerProfile, version: Version | None
) -> list[str]:
    """What prevents `wire="amqp10"`, or makes it less useful; empty if it isn't set.

    Args:
        version: The broker's version; None if it is unknown.
    """
    if profile.wire != "amqp10":
        return []
    why = _no_amqp10(options, profile, version)
    if why is not None:
        return [f"wire='amqp10' has no effect, AMQP 0-9-1 is used: {why}"]
    return list(_partly_amqp10(options, profile))


def delays_natively(
    options: TopologyOptions, profile: ConsumerProfile, version: Version | None
) -> bool:
    """Whether the broker decides by its own clock when a retry is due."""
    return (
        profile.wire == "amqp10"
        and version is not None
        and version >= DELAYS_SINCE
        and _no_amqp10(options, profile, version) is None
    )


def clock_warning(ahead: float | None) -> str | None:
    """What different clocks do to delays over AMQP 1.0; None if they are the same, or unknown.

    Args:
        ahead: By how many seconds the broker's clock is ahead; negative if it is behind.
    """
    if ahead is None or abs(ahead) <= CLOCK_TOLERANCE:
        return None
    where, come = ("ahead of", "earlier") if ahead > 0 else ("behind", "later")
    return (
        f"the broker's clock is {abs(ahead):.0f} s {where} this computer's: retries over AMQP"
        f" 1.0 come back {come} by that; synchronize both clocks (NTP)"
    )


def amqp10_hint(
    options: TopologyOptions, profile: ConsumerProfile, version: Version | None
) -> str | None:
    """What `wire="amqp10"` would save; None if it is set, or prevented."""
    if profile.wire == "amqp10" or version is None or profile.ordered:
        return None
    if _no_amqp10(options, profile, version) is not None:
        return None
    return (
        "wire='amqp10' is possible: a failed message needs no copies, of which there are up to"
        f" {profile.max_requeue_attempts + 1} now"
    )


def _no_amqp10(
    options: TopologyOptions, profile: ConsumerProfile, version: Version | None
) -> str | None:
    obstacle = amqp10_obstacle(
        version,
        effective_queue_type(options),
        options.queue_arguments,
        profile.consumer_arguments,
    )
    return None if obstacle is None else _AMQP10_REMEDIES[obstacle]


def _partly_amqp10(options: TopologyOptions, profile: ConsumerProfile) -> Iterator[str]:
    arguments = declared_arguments(options)
    if not profile.retry_count_header.startswith("x-"):
        yield (
            "retries are copies although wire='amqp10' is set: only headers whose name begins with"
            " x- can be attached; change retry_count_header"
        )
    is_lossless = AT_LEAST_ONCE.items() <= arguments.items()
    if dead_letter_target(options) is not None and (
        not is_lossless or dead_letters_differ(options)
    ):
        yield (
            "dead letters are copies although wire='amqp10' is set: the queue needs"
            f" {DEAD_LETTER_EXCHANGE} to the same destination, and {DEAD_LETTER_STRATEGY}="
            "'at-least-once'; leave them out of queue_arguments, so that they are declared"
        )
    stated = _number(arguments, MESSAGE_TTL)
    if stated is not None and profile.retry_seconds > stated / 1000:
        yield (
            f"a time to live of {stated} ms goes on while a retry is delayed over AMQP 1.0:"
            f" messages expire before their last attempt; raise {MESSAGE_TTL}"
        )
    if arguments.get(DELAYED_RETRY_TYPE) in {"all", "returned"}:
        yield (
            f"{DELAYED_RETRY_TYPE} in queue_arguments also delays messages that a stop returns;"
            " use 'failed'"
        )


_DROPS_AT_ONCE = (
    f"before RabbitMQ 4.0 a negative {DELIVERY_LIMIT} does not lift the limit: messages are given"
    f" up at their first redelivery; remove it from queue_arguments"
)


def _prefetch(profile: ConsumerProfile) -> Iterator[str]:
    prefetch, batch_size = profile.prefetch, profile.batch_size
    if 0 < prefetch < batch_size:
        yield (
            f"prefetch_count={prefetch} is below batch_size={batch_size}: batches are never full;"
            " raise prefetch_count, or leave it unset"
        )


def _no_dead_letters(options: TopologyOptions, profile: ConsumerProfile) -> Iterator[str]:
    if dead_letter_target(options) is None:
        failed = "others that fail are discarded, too"
        if not profile.rejects_undeliverable:
            failed = "others that fail are retried forever"
        yield (
            f"no dead-letter destination is known: NACK discards messages, and {failed};"
            " set dead_letter_queue"
        )


def _is_classic_by_default(options: TopologyOptions, profile: ConsumerProfile) -> bool:
    is_default = effective_queue_type(options) is None
    return is_default and MessageResult.REQUEUE_IMMEDIATE not in profile.failure_results


def _other_headers(options: TopologyOptions) -> Iterator[str]:
    is_ours = options.dead_letter_exchange or options.dead_letter_queue
    if DEAD_LETTER_EXCHANGE in options.queue_arguments and not is_ours:
        yield (
            "the consumer publishes dead letters itself to the exchange in queue_arguments:"
            f" {DEATH_REASON} replaces x-death"
        )


def _given_up(options: TopologyOptions) -> Iterator[str]:
    """What the broker itself drops, unless it has a place for it."""
    if not options.broker_dead_letters:
        return
    wishes = broker_dead_letter_arguments(options) if options.declare else {}
    if DEAD_LETTER_EXCHANGE in {**options.queue_arguments, **wishes}:
        return
    known = dead_letter_target(options) is not None
    # The queue is declared elsewhere, then.
    remedy = f"declare it with {DEAD_LETTER_EXCHANGE}" if known else "set dead_letter_queue"
    remedy += ", or a policy and broker_dead_letters=False"
    if effective_queue_type(options) == "quorum":
        yield (
            f"a quorum queue drops messages that were delivered too often: to keep them, {remedy}"
        )
    for limit in _limits(options.queue_arguments):
        yield (
            f"the broker drops messages because of {limit} in queue_arguments: to keep them,"
            f" {remedy}"
        )


def existing_queue_warnings(options: TopologyOptions, arguments: Headers) -> list[str]:
    """What the arguments that the consumed queue has on the broker mean for its messages."""
    name, exchange = options.queue_name, arguments.get(DEAD_LETTER_EXCHANGE)
    key = arguments.get(DEAD_LETTER_ROUTING_KEY)
    if exchange == "" and key in (None, name):
        return [f"queue {name!r} dead-letters to itself, a loop: declare it with another exchange"]
    if exchange is not None:
        return []
    return [
        f"queue {name!r} has {limit}: the broker drops messages, unless a policy dead-letters them"
        for limit in _limits(arguments)
    ]


def dead_letter_queue_warnings(
    options: TopologyOptions, arguments: Headers, version: Version | None
) -> list[str]:
    """By which of the arguments that it has on the broker a dead-letter queue loses dead letters.

    Args:
        version: The broker's version; None if it is unknown.
    """
    name, exchange = options.dead_letter_queue, arguments.get(DEAD_LETTER_EXCHANGE)
    if exchange == "" and arguments.get(DEAD_LETTER_ROUTING_KEY) == options.queue_name:
        return [f"dead-letter queue {name!r} dead-letters to queue {options.queue_name!r}: a loop"]
    limits = _limits(arguments)
    stated = _number(arguments, DELIVERY_LIMIT)
    if arguments.get(QUEUE_TYPE) == "quorum":
        limit = default_delivery_limit(version) if stated is None else stated
        if limit is not None and limit >= 0:
            limits.append(f"a delivery limit of {limit}")
    return [
        f"dead-letter queue {name!r} has {limit}, by which the broker drops dead letters: move them"
        " away and delete it, and the consumer declares it without"
        for limit in limits
    ]


def _limits(arguments: Headers) -> list[str]:
    """The arguments by which a queue drops messages."""
    limits = {MESSAGE_TTL, *(() if OVERFLOW in arguments else LENGTH_LIMITS)}
    return [f"{name}={arguments[name]!r}" for name in sorted(limits & arguments.keys())]


def _delivery_limit(options: TopologyOptions, profile: ConsumerProfile) -> Iterator[str]:
    # For the broker a requeued copy is a new message, so its limit doesn't apply to REQUEUE.
    if effective_queue_type(options) != "quorum":
        return
    stated = _number(options.queue_arguments, DELIVERY_LIMIT)
    limit = DEFAULT_DELIVERY_LIMIT if stated is None else stated
    attempts = profile.max_requeue_attempts
    if 0 <= limit < attempts:
        source = "RabbitMQ 4's default" if stated is None else "in queue_arguments"
        yield (
            f"the delivery limit {limit} ({source}) is below max_requeue_attempts={attempts}:"
            " REQUEUE_IMMEDIATE, crashes and lost connections reach it first; raise"
            f" {DELIVERY_LIMIT} in queue_arguments"
        )


def crash_policy(
    options: TopologyOptions, *, suspect_after: int, limit: int, ordered: bool
) -> CrashPolicy | None:
    """Return how often a message may come back without a result; None if that can't be limited.

    Args:
        ordered: Whether the consumer keeps the order of keys, which copies would change.
    """
    if _no_quarantine(options, ordered=ordered) is not None:
        return None
    stated = _number(options.queue_arguments, DELIVERY_LIMIT)
    is_lower = stated is not None and 0 <= stated < limit
    if stated is not None and is_lower:
        # The broker gives a message up when it comes back once more than its limit allows.
        limit = stated
        suspect_after = min(suspect_after, limit - 1)
    return CrashPolicy(suspect_after, limit, is_lower) if suspect_after > 0 else None


def adapts_prefetch(options: TopologyOptions, *, ordered: bool) -> bool:
    """Whether a session may be paused for another prefetch count, if none is configured.

    Args:
        ordered: Whether the consumer keeps the order of keys.
    """
    # Without a declaration, another argument of the queue may make it a single active consumer.
    return options.declare and not (
        ordered
        or options.queue_exclusive
        or options.queue_auto_delete
        or options.queue_arguments.get(SINGLE_ACTIVE) is True
    )


def _no_quarantine(options: TopologyOptions, *, ordered: bool) -> str | None:
    """Why suspects can't be handled alone; None if they can."""
    if effective_queue_type(options) != "quorum":
        return "the queue isn't known to be a quorum queue"
    if ordered:
        return "ordered_by_key keeps the order of messages"
    if options.queue_arguments.get(SINGLE_ACTIVE) is True:
        return "another consumer of the queue would become the single active one"
    if options.queue_auto_delete:
        return "queue_auto_delete deletes the queue while nothing consumes"
    return None


def consumer_timeout(options: TopologyOptions, consumer_arguments: Headers) -> tuple[float, str]:
    """Return how many seconds the broker waits for an ack, as far as is known, and who says so."""
    limit, source = ACK_TIMEOUT, "RabbitMQ's default consumer_timeout"
    for where, arguments in (
        ("queue_arguments", options.queue_arguments),
        ("consumer_arguments", consumer_arguments),
    ):
        stated = _number(arguments, CONSUMER_TIMEOUT)
        if stated is not None and stated > 0:
            limit, source = stated / 1000, f"{CONSUMER_TIMEOUT} in {where}"
    return limit, source


def _ack_timeout(options: TopologyOptions, profile: ConsumerProfile) -> Iterator[str]:
    limit, source = consumer_timeout(options, profile.consumer_arguments)
    held = _longest_hold(profile)
    if held > limit:
        yield (
            f"a message may be held for {held:g} s (the broker waits for {limit:g} s: {source});"
            " lower batch_timeout, process_timeout or prefetch_count"
        )


def _longest_hold(profile: ConsumerProfile) -> float:
    """The maximum seconds that a message waits for its batch and for a slot, and is handled."""
    handling = profile.process_timeout or 0.0
    at_once = profile.concurrency * min(profile.batch_size, profile.prefetch or profile.batch_size)
    before = max(1, math.ceil(profile.prefetch / at_once)) - 1
    in_place = profile.retry_seconds if profile.ordered else 0.0
    # A batch is collected while earlier ones are handled, so only the longer of the two counts.
    return max(profile.batch_timeout, before * handling) + handling + in_place


def _time_to_live(options: TopologyOptions, profile: ConsumerProfile) -> Iterator[str]:
    stated = _number(options.queue_arguments, MESSAGE_TTL)
    is_copied = not profile.ordered and profile.wire != "amqp10"
    if stated is not None and is_copied and profile.retry_seconds > stated / 1000:
        yield (
            f"retries may take {profile.retry_seconds:g} s, longer than a message lives"
            f" ({MESSAGE_TTL}={stated} ms in queue_arguments), since each copy has the full time;"
            " lower requeue_delay_max or max_requeue_attempts"
        )


def _endless(options: TopologyOptions, version: Version | None) -> str | None:
    """Why the broker never gives up a message that always fails; None if it does."""
    queue_type = effective_queue_type(options)
    if queue_type != "quorum":
        unless = "" if queue_type else " (unless the virtual host has another default)"
        return f"queue {options.queue_name!r} is a classic queue{unless}"
    limit = _number(options.queue_arguments, DELIVERY_LIMIT)
    if limit is not None:
        return f"{DELIVERY_LIMIT}={limit} lifts the delivery limit" if limit < 0 else None
    if default_delivery_limit(version) is None:
        return "before RabbitMQ 4.0 a quorum queue has no delivery limit"
    return None


def _drops_at_once(options: TopologyOptions, version: Version | None) -> bool:
    limit = _number(options.queue_arguments, DELIVERY_LIMIT)
    return limit is not None and limit < 0 and default_delivery_limit(version) is None


def _number(arguments: Headers, name: str) -> int | None:
    value = arguments.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
