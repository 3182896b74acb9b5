"""What does a dead letter say of itself: where did it come from, why did it die, and when?

Ours say so in headers of their own (`core.routing` writes them), those that a broker has made in
`x-death`. And how is one sent back to where it came from, as if it had never been handled?
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TypeAlias

from aio_pika_batch.core.config_checks import DEFAULT_LIMIT
from aio_pika_batch.core.message import (
    NO_HEADERS,
    ORIGINAL_EXCHANGE,
    ORIGINAL_ROUTING_KEY,
    FieldValue,
    Headers,
    Message,
    is_short_string,
    retry_count,
)
from aio_pika_batch.core.publication import Copy
from aio_pika_batch.core.retry import DEATHS
from aio_pika_batch.core.settlement_plan import (
    DEAD_LETTERED_AT,
    DETAIL,
    DROPPED,
    EXCEPTION_MESSAGE,
    EXCEPTION_TYPE,
    FIRST_FAILED_AT,
    ORIGINAL_QUEUE,
    REASON,
)
from aio_pika_batch.core.topology import DEFAULT_LIMIT_SINCE, DELIVERY_LIMIT, QUEUE_TYPE, Version

UNKNOWN_REASON = "unknown"
"""The reason of what does not say why it is dead."""

RETRY_COUNT = "x-retry-count"

_OF_THE_BROKER = frozenset(
    f"x-{which}-death-{what}"
    for which in ("first", "last")
    for what in ("reason", "queue", "exchange")
)

REMOVED_ON_REPLAY = (
    DROPPED
    | _OF_THE_BROKER
    | {
        DEATHS,  # before 4.0 a broker takes a client's word for it, and drops what goes in circles
        REASON,
        DETAIL,
        DEAD_LETTERED_AT,
        EXCEPTION_TYPE,
        EXCEPTION_MESSAGE,
        FIRST_FAILED_AT,
        ORIGINAL_QUEUE,
    }
)
"""What a replayed message does not remember of its death."""


@dataclass(frozen=True, slots=True)
class OriginalRoute:
    """Where a message was published to, before anything went wrong."""

    exchange: str
    routing_key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeathInfo:
    """What is known of a death.

    Attributes:
        reason: `rejected`, `exhausted`, `handler-error`, `undecodable`; the broker's are
            `rejected`, `expired`, `maxlen`, `delivery_limit`; `unknown` where nobody says.
        origin: Its first exchange and routing key; None if it does not say.
        queue: Where it died; None if it does not say.
        died_at: In UTC; None if it does not say.
        retries: How often it was tried again.
        detail: The handler's own words.
        exception_type: The class of the error that it died of, with its module.
        exception_message: The text of that error.
    """

    reason: str = UNKNOWN_REASON
    origin: OriginalRoute | None = None
    queue: str | None = None
    died_at: datetime | None = None
    retries: int = 0
    detail: str | None = None
    exception_type: str | None = None
    exception_message: str | None = None


def death_info(message: Message, retry_count_header: str = RETRY_COUNT) -> DeathInfo:
    """Read what a dead letter says. Never raises: what cannot be read is not known."""
    headers = message.headers if message.has_readable_headers else NO_HEADERS
    reason = _text(headers.get(REASON))
    if reason is None:
        return _by_broker(headers, retry_count_header)
    return DeathInfo(
        reason=reason,
        origin=_origin(headers),
        queue=_text(headers.get(ORIGINAL_QUEUE)),
        died_at=_moment(headers.get(DEAD_LETTERED_AT)),
        retries=retry_count(headers.get(retry_count_header)) or 0,
        detail=_text(headers.get(DETAIL)),
        exception_type=_text(headers.get(EXCEPTION_TYPE)),
        exception_message=_text(headers.get(EXCEPTION_MESSAGE)),
    )


def _by_broker(headers: Headers, retry_count_header: str) -> DeathInfo:
    """By its latest death: that is the one it lies here for."""
    deaths = headers.get(DEATHS)
    latest = deaths[0] if isinstance(deaths, list) and deaths else None
    death = latest if isinstance(latest, Mapping) else NO_HEADERS
    return DeathInfo(
        reason=_text(death.get("reason")) or UNKNOWN_REASON,
        # A requeued copy has the name of its queue for a key: its own headers know better.
        origin=_origin(headers) or _death_origin(death),
        queue=_text(death.get("queue")),
        died_at=_moment(death.get("time")),
        retries=retry_count(headers.get(retry_count_header)) or 0,
    )


def _origin(headers: Headers) -> OriginalRoute | None:
    exchange, key = headers.get(ORIGINAL_EXCHANGE), headers.get(ORIGINAL_ROUTING_KEY)
    if is_short_string(exchange) and is_short_string(key):
        return OriginalRoute(exchange, key)
    return None


def _death_origin(death: Headers) -> OriginalRoute | None:
    exchange, keys = death.get("exchange"), death.get("routing-keys")
    key = keys[0] if isinstance(keys, list) and keys else None
    if is_short_string(exchange) and is_short_string(key):
        return OriginalRoute(exchange, key)
    return None


def _text(value: FieldValue) -> str | None:
    return value if isinstance(value, str) else None


def _moment(value: FieldValue) -> datetime | None:
    return value if isinstance(value, datetime) else None


# --- which ones ------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """Which letters are meant: those that meet all of it.

    Attributes:
        reasons: Any of these; empty: whatever the reason.
        older_than: Died longer ago than this. A letter that does not say when is not meant.
        newer_than: Died since.
        headers: Each of these headers has this value, written as :func:`format_header` writes it.
    """

    reasons: frozenset[str] = frozenset()
    older_than: timedelta | None = None
    newer_than: timedelta | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def matches(self, message: Message, death: DeathInfo, now: datetime) -> bool:
        """Whether a letter is meant.

        Args:
            death: What it says of itself.
            now: With its time zone.
        """
        return (
            (not self.reasons or death.reason in self.reasons)
            and self._is_of_age(death.died_at, now)
            and self._has_headers(message)
        )

    def _is_of_age(self, died_at: datetime | None, now: datetime) -> bool:
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
        if not message.has_readable_headers:
            return False
        there = message.headers
        return all(
            name in there and format_header(there[name]) == value
            for name, value in self.headers.items()
        )


EVERY = Filter()
"""All of them."""


def format_header(value: FieldValue) -> str:
    """A header's value, as somebody would write it: text as it is, whatever else as JSON."""
    match value:
        case str():
            return value
        case bytes():
            return _bytes(value)
        case datetime():
            return value.isoformat()
        case _:
            return json.dumps(value, default=_plain, ensure_ascii=False)


def _plain(value: object) -> object:
    match value:
        case bytes():
            return _bytes(value)
        case datetime():
            return value.isoformat()
        case Mapping():
            return dict(value)
        case _:
            return str(value)


def _bytes(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.hex(" ")


# --- the way back ----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NotReplayable:
    """A letter that cannot be sent back, and why."""

    why: str


ReplayDecision: TypeAlias = Copy | NotReplayable


def replay_copy(
    message: Message,
    death: DeathInfo,
    *,
    to_queue: bool = False,
    retry_count_header: str = RETRY_COUNT,
) -> ReplayDecision:
    """The copy that goes back to where a letter came from, as if it had never been handled.

    It has no retry count, nothing that tells of its death, and no `expiration`: whoever repairs
    something does not want it to expire before it is handled.

    Args:
        to_queue: Not to the exchange, which other queues may be bound to, but only to the queue in
            which it died. It keeps its `x-original-…` headers then, so that its handler still sees
            its routing key.
    """
    forgotten = REMOVED_ON_REPLAY | {retry_count_header}
    if to_queue:
        if death.queue is None or not is_short_string(death.queue):
            return NotReplayable("it does not say in which queue it died")
        return _copy(message, OriginalRoute("", death.queue), _kept(death.origin), forgotten)
    if death.origin is None:
        return NotReplayable("it does not say where it was published to")
    forgotten |= {ORIGINAL_EXCHANGE, ORIGINAL_ROUTING_KEY}
    return _copy(message, death.origin, {}, forgotten)


def _copy(message: Message, to: OriginalRoute, add: Headers, drop: frozenset[str]) -> Copy:
    return Copy(message, to.exchange, to.routing_key, add, drop, keep_expiration=False)


def _kept(origin: OriginalRoute | None) -> Headers:
    if origin is None:
        return {}
    return {ORIGINAL_EXCHANGE: origin.exchange, ORIGINAL_ROUTING_KEY: origin.routing_key}


# --- how often may one be looked at? ---------------------------------------------

SPARE = 5
"""So many deliveries are left to others: a letter that has no more is not looked at."""


_INEQUIVALENT = re.compile(
    r"inequivalent arg '(?P<argument>[^']+)'(?:.*?current is (?:the value )?'(?P<value>-?\d+)')?",
    re.DOTALL,
)


def delivery_limit_from(refusal: str | None, version: Version | None) -> int | None:
    """The delivery limit of a queue, as far as a broker can be asked for it.

    A queue's arguments cannot be read by AMQP, but a broker says which one is not as declared. What
    a policy says is not to be seen.

    Args:
        refusal: What the broker said when asked for a quorum queue without a limit of its own;
            None: that is what it is.
        version: Of the broker.

    Returns:
        None if there is none; in doubt RabbitMQ's default.
    """
    has_default = version is None or version >= DEFAULT_LIMIT_SINCE
    if refusal is None:
        return DEFAULT_LIMIT if has_default else None
    found = _INEQUIVALENT.search(refusal)
    argument, value = (None, None) if found is None else found.group("argument", "value")
    if argument == QUEUE_TYPE:
        return None  # a classic queue: it does not count
    if argument == DELIVERY_LIMIT and value is not None:
        # Before 4.0 a negative one is exceeded by the first delivery that comes back.
        return max(int(value), 0) if int(value) >= 0 or not has_default else None
    return DEFAULT_LIMIT


NACK_IS_FREE_SINCE: Version = (4, 3)
"""The first RabbitMQ that does not count a delivery that comes back by `basic.nack`."""


def returns_by_closing(version: Version | None) -> bool:
    """How letters that were only looked at go back: by closing the channel, or by `basic.nack`?

    Before 4.3 a closed channel puts them at the front of a quorum queue, in their order, which a
    nack does not do everywhere; since then a nack does, and it alone costs no delivery. A classic
    queue puts them where they were, either way.
    """
    return version is not None and version < NACK_IS_FREE_SINCE


def near_delivery_limit(message: Message, limit: int | None) -> bool:
    """Whether its queue would soon drop a letter for having been delivered too often.

    Args:
        limit: Of the queue; None: it has none.
    """
    if limit is None or limit < 0 or not message.has_readable_headers:
        return False
    return (message.delivery_count or 0) >= limit - SPARE
