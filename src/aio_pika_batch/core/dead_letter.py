"""Reads why a message was dead-lettered, selects dead letters, and makes copies to replay them.

This library writes headers of its own (see `core.settlement_plan`). A broker writes `x-death`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TypeAlias

from aio_pika_batch.core.message import (
    DEATH_REASON,
    DEATHS,
    NO_HEADERS,
    ORIGINAL_EXCHANGE,
    ORIGINAL_ROUTING_KEY,
    RETRY_COUNT_HEADER,
    RETRY_QUEUE,
    FieldValue,
    Headers,
    Message,
    is_short_string,
    read_moment,
    readable_headers,
    retry_count,
)
from aio_pika_batch.core.publication import Copy
from aio_pika_batch.core.refusals import UnequalArgument, unequal_argument
from aio_pika_batch.core.retry import is_stated_death, latest_death
from aio_pika_batch.core.settlement_plan import (
    DEAD_LETTERED_AT,
    DEATH_COUNT,
    DETAIL,
    DROPPED,
    EARLIER_DEATH,
    EXCEPTION_MESSAGE,
    EXCEPTION_TYPE,
    FIRST_FAILED_AT,
    ORIGINAL_QUEUE,
    RETRY_REASON,
)
from aio_pika_batch.core.topology import (
    DEFAULT_DELIVERY_LIMIT,
    DELIVERY_LIMIT,
    Version,
    default_delivery_limit,
)
from aio_pika_batch.core.topology_options import QUEUE_TYPE

UNKNOWN_REASON = "unknown"
"""The reason of a dead letter that states none."""

_BROKER_HEADERS = frozenset(
    f"x-{which}-death-{what}"
    for which in ("first", "last")
    for what in ("reason", "queue", "exchange")
)

REMOVED_ON_REPLAY = (
    DROPPED
    | _BROKER_HEADERS
    | {
        DEATHS,  # before 4.0 RabbitMQ trusts it, and drops messages that seem to be in a cycle
        DEATH_REASON,
        DEATH_COUNT,
        EARLIER_DEATH,
        RETRY_QUEUE,
        DETAIL,
        DEAD_LETTERED_AT,
        EXCEPTION_TYPE,
        EXCEPTION_MESSAGE,
        FIRST_FAILED_AT,
        ORIGINAL_QUEUE,
    }
)
"""Headers that a replayed message doesn't keep: they describe how it was dead-lettered."""


@dataclass(frozen=True, slots=True)
class OriginalRoute:
    """The exchange and routing key of a message's first publication."""

    exchange: str
    routing_key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeathInfo:
    """Why, when and where a message was dead-lettered. None means that it isn't known.

    Attributes:
        reason: From this library `rejected`, `exhausted`, `handler-error` or `undecodable`; from
            the broker `rejected`, `expired`, `maxlen` or `delivery_limit`; otherwise `unknown`.
        origin: The exchange and routing key of its first publication.
        queue: The queue that it was in.
        died_at: When it was dead-lettered, in UTC.
        retries: How often it was retried.
        detail: The reason that the handler gave.
        exception_type: The class of the exception that made it fail, with its module.
        exception_message: The text of that exception.
    """

    reason: str = UNKNOWN_REASON
    origin: OriginalRoute | None = None
    queue: str | None = None
    died_at: datetime | None = None
    retries: int = 0
    detail: str | None = None
    exception_type: str | None = None
    exception_message: str | None = None


def death_info(message: Message, retry_count_header: str = RETRY_COUNT_HEADER) -> DeathInfo:
    """Read the headers of a dead letter. Never raises: what cannot be read isn't known."""
    headers = readable_headers(message) or NO_HEADERS
    latest = latest_death(headers)
    death = latest or NO_HEADERS
    reason = _text(headers.get(DEATH_REASON))
    retries = retry_count(headers.get(retry_count_header)) or 0
    # The routing key of a requeued copy is the name of its queue, so our own headers go first. A
    # message that the broker has dead-lettered keeps its route in `x-death`.
    origin = _route(
        headers.get(ORIGINAL_EXCHANGE), headers.get(ORIGINAL_ROUTING_KEY)
    ) or _death_route(death)
    is_newer = latest is not None and not is_stated_death(latest, headers.get(EARLIER_DEATH))
    if reason is None or is_newer:
        return DeathInfo(
            reason=_text(death.get("reason")) or UNKNOWN_REASON,
            origin=origin,
            queue=_text(death.get("queue")),
            died_at=time if isinstance(time := death.get("time"), datetime) else None,
            retries=retries,
            detail=_text(headers.get(RETRY_REASON)),
        )
    return DeathInfo(
        reason=reason,
        origin=origin,
        queue=_text(headers.get(ORIGINAL_QUEUE)),
        died_at=read_moment(headers.get(DEAD_LETTERED_AT)),
        retries=retries,
        detail=_text(headers.get(DETAIL)),
        exception_type=_text(headers.get(EXCEPTION_TYPE)),
        exception_message=_text(headers.get(EXCEPTION_MESSAGE)),
    )


def _death_route(death: Headers) -> OriginalRoute | None:
    keys = death.get("routing-keys")
    return _route(death.get("exchange"), keys[0] if isinstance(keys, list) and keys else None)


def _route(exchange: FieldValue, key: FieldValue) -> OriginalRoute | None:
    if is_short_string(exchange) and is_short_string(key):
        return OriginalRoute(exchange, key)
    return None


def _text(value: FieldValue) -> str | None:
    # Over AMQP 1.0 a header that doesn't apply any more can't be removed, only emptied.
    return value if isinstance(value, str) and value else None


# --- selection -------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Selects the dead letters that meet all of its conditions.

    Attributes:
        reasons: The accepted reasons; empty accepts all.
        older_than: The minimum time since it was dead-lettered. A dead letter without that time
            doesn't match.
        newer_than: The maximum time since it was dead-lettered.
        headers: The required headers, with values as :func:`format_header` writes them.
    """

    reasons: frozenset[str] = frozenset()
    older_than: timedelta | None = None
    newer_than: timedelta | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def matches(self, message: Message, death: DeathInfo, now: datetime) -> bool:
        """Whether a dead letter meets all conditions.

        Args:
            death: Its :func:`death_info`.
            now: The time, with its time zone.
        """
        return (
            (not self.reasons or death.reason in self.reasons)
            and self._has_age(death.died_at, now)
            and self._has_headers(message)
        )

    def _has_age(self, died_at: datetime | None, now: datetime) -> bool:
        if self.older_than is None and self.newer_than is None:
            return True
        if died_at is None:
            return False
        age = now - (died_at if died_at.tzinfo else died_at.replace(tzinfo=UTC))
        return (self.older_than is None or age > self.older_than) and (
            self.newer_than is None or age < self.newer_than
        )

    def _has_headers(self, message: Message) -> bool:
        if not self.headers:
            return True
        headers = readable_headers(message) or NO_HEADERS
        return all(
            name in headers and format_header(headers[name]) == value
            for name, value in self.headers.items()
        )


EVERY = Filter()
"""Selects all dead letters."""


def format_header(value: FieldValue) -> str:
    """Format the value of a header: text as it is, most other values as JSON."""
    match value:
        case str():
            return value
        case bytes() | datetime():
            return str(_plain(value))
        case _:
            return json.dumps(value, default=_plain, ensure_ascii=False)


def _plain(value: object) -> object:
    match value:
        case bytes():
            try:
                return value.decode()
            except UnicodeDecodeError:
                return value.hex(" ")
        case datetime():
            return value.isoformat()
        case Mapping():
            return dict(value)
        case _:
            return str(value)


# --- replay ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NotReplayable:
    """The reason why a dead letter cannot be replayed."""

    why: str


ReplayDecision: TypeAlias = Copy | NotReplayable


def replay_copy(
    message: Message,
    death: DeathInfo,
    *,
    to_queue: bool = False,
    retry_count_header: str = RETRY_COUNT_HEADER,
) -> ReplayDecision:
    """Make a copy of a dead letter that returns to where it came from, as a new message.

    It has no retry count, no headers about its failure, and no `expiration`: it must not expire
    before a repaired consumer handles it.

    Args:
        to_queue: Send it only to the queue that it was in, and not to its exchange, which other
            queues may be bound to. It keeps its `x-original-…` headers, so that its handler still
            sees its routing key.
    """
    origin, kept = death.origin, NO_HEADERS
    dropped = REMOVED_ON_REPLAY | {retry_count_header}
    if to_queue:
        if not is_short_string(death.queue):
            return NotReplayable("it does not say in which queue it died")
        if origin is not None:
            kept = {ORIGINAL_EXCHANGE: origin.exchange, ORIGINAL_ROUTING_KEY: origin.routing_key}
        return Copy(message, "", death.queue, kept, dropped, keep_expiration=False)
    if origin is None:
        return NotReplayable("it does not say where it was published to")
    dropped |= {ORIGINAL_EXCHANGE, ORIGINAL_ROUTING_KEY}
    return Copy(message, origin.exchange, origin.routing_key, kept, dropped, keep_expiration=False)


# --- delivery limits -------------------------------------------------------------

SPARE_DELIVERIES = 5
"""A dead letter is not read if fewer deliveries than this are left until its queue drops it."""


def delivery_limit_from(refusal: str | None, version: Version | None) -> int | None:
    """The delivery limit of a queue, from the broker's answer to a declaration.

    AMQP cannot read the arguments of a queue. But when an existing queue is declared again, the
    broker says which argument differs. A limit by a policy remains unknown.

    Args:
        refusal: The broker's answer to the declaration of a quorum queue without a limit; None if
            it accepted that.
        version: The broker's version; None if it is unknown.

    Returns:
        None if there is no limit. RabbitMQ's default if the limit cannot be determined.
    """
    default = default_delivery_limit(version)
    if refusal is None:
        return default
    unequal = unequal_argument(refusal)
    if _names_classic_queue(unequal):
        return None  # it has no limit
    match unequal:
        case UnequalArgument(name, int(limit)) if name == DELIVERY_LIMIT:
            # Before 4.0 the first redelivery exceeds a negative limit.
            return max(limit, 0) if limit >= 0 or default is None else None
        case _:
            return DEFAULT_DELIVERY_LIMIT


NACK_IS_FREE_SINCE: Version = (4, 3)
"""The first RabbitMQ that doesn't count a delivery that is returned by `basic.nack`."""


def returns_by_closing(refusal: str | None, version: Version | None) -> bool:
    """Whether to return dead letters that were only read by closing the channel, not by a nack.

    Args:
        refusal: See :func:`delivery_limit_from`.
        version: The broker's version; None if it is unknown.
    """
    # A classic queue puts them where they were, either way, and counts no deliveries. But after a
    # nack of 60,000 RabbitMQ 4.3 answered no consumer for 11 s, and after a close for 1 s.
    if _names_classic_queue(unequal_argument(refusal)):
        return True
    # Before 4.3 a closed channel returns them to the front of a quorum queue, which a nack doesn't
    # always do: in their order, if at most 32 consumers have received them. Since then a nack does,
    # and only a nack costs no delivery.
    return version is not None and version < NACK_IS_FREE_SINCE


def _names_classic_queue(unequal: UnequalArgument | None) -> bool:
    return unequal is not None and unequal.name == QUEUE_TYPE


def near_delivery_limit(message: Message, limit: int | None) -> bool:
    """Whether its queue would soon drop a dead letter because of its number of deliveries.

    Args:
        limit: The delivery limit of the queue; None if it has none.
    """
    if limit is None or limit < 0 or not message.has_readable_headers:
        return False
    return (message.delivery_count or 0) >= limit - SPARE_DELIVERIES
