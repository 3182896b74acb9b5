"""What becomes of a message that dies: which headers does it get, and may it go where it is sent?

As RabbitMQ's dead-lettering: `x-death` has one table for each queue and reason, the latest first,
with a count; a message that would come back to a queue without anybody having rejected it on its
way is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import Enum
from typing import TYPE_CHECKING

from aio_pika_batch.adapters.memory.stored_message import Stored

if TYPE_CHECKING:
    from aio_pika_batch.adapters.memory.versions import Dialect
    from aio_pika_batch.core.message import FieldValue


class Reason(Enum):
    """Why a message died."""

    REJECTED = "rejected"
    EXPIRED = "expired"
    MAXLEN = "maxlen"
    DELIVERY_LIMIT = "delivery_limit"


@dataclass(frozen=True, slots=True)
class Death:
    """One table of `x-death`; the fields are its keys.

    Attributes:
        reason: A :class:`Reason`'s value, or whatever a client has written there.
        original_expiration: The message's own expiration, which dead-lettering takes off.
    """

    queue: str
    reason: str
    count: int
    exchange: str
    routing_keys: tuple[str, ...]
    time: datetime
    original_expiration: str | None = None

    @property
    def table(self) -> dict[str, FieldValue]:
        """As it stands in the header."""
        table: dict[str, FieldValue] = {
            "count": self.count,
            "exchange": self.exchange,
            "queue": self.queue,
            "reason": self.reason,
            "routing-keys": list(self.routing_keys),
            "time": self.time,
        }
        if self.original_expiration is not None:
            table["original-expiration"] = self.original_expiration
        return table


def claimed_deaths(value: FieldValue) -> tuple[Death, ...]:
    """Read the `x-death` that a client has published; what is no such header is nothing."""
    if not isinstance(value, list):
        return ()
    deaths: dict[tuple[str, str], Death] = {}
    for table in value:
        if not isinstance(table, Mapping):
            continue
        match table:
            case {"queue": str(queue), "reason": str(reason), **rest}:
                death = _claimed(rest, queue, reason)
                before = deaths.get((queue, reason))
                if before is not None:
                    death = replace(before, count=before.count + death.count)
                deaths[queue, reason] = death
            case _:
                continue
    return tuple(deaths.values())


def _claimed(table: Mapping[str, FieldValue], queue: str, reason: str) -> Death:
    count, exchange = table.get("count"), table.get("exchange")
    keys, time = table.get("routing-keys"), table.get("time")
    expiration = table.get("original-expiration")
    return Death(
        queue=queue,
        reason=reason,
        count=count if isinstance(count, int) else 1,
        exchange=exchange if isinstance(exchange, str) else "",
        routing_keys=tuple(key for key in keys if isinstance(key, str))
        if isinstance(keys, list)
        else (),
        time=time if isinstance(time, datetime) else datetime.fromtimestamp(0, UTC),
        original_expiration=expiration if isinstance(expiration, str) else None,
    )


def dead_letter(  # noqa: PLR0917  -- the six are what a death is made of
    message: Stored,
    queue: str,
    reason: Reason,
    exchange: str,
    routing_key: str | None,
    now: float,
    dialect: Dialect,
) -> Stored:
    """The message as it is published to a dead-letter exchange.

    Without a routing key of the queue's (`x-dead-letter-routing-key`) it keeps its own. The
    broker's clock begins in 1970.
    """
    was = message.properties
    headers: dict[str, FieldValue] = dict(message.headers)
    seen = _more_visible_keys(message)
    deaths = _with(
        message.deaths,
        Death(
            queue=queue,
            reason=reason.value,
            count=1,
            exchange=message.exchange,
            routing_keys=seen,
            time=datetime.fromtimestamp(int(now), UTC),
            original_expiration=was.expiration,
        ),
    )
    if not message.deaths:
        headers["x-first-death-reason"] = reason.value
        headers["x-first-death-queue"] = queue
        headers["x-first-death-exchange"] = message.exchange
    if dialect.tells_last_death:
        headers["x-last-death-reason"] = reason.value
        headers["x-last-death-queue"] = queue
        headers["x-last-death-exchange"] = message.exchange
    headers["x-death"] = [death.table for death in deaths]
    keys = message.routing_keys
    if routing_key is not None:
        keys = (routing_key,)
        if not dialect.keeps_copies:
            headers.pop("CC", None)
    properties = replace(was, headers=headers, expiration=None)
    return Stored(message.body, properties, exchange, keys, deaths, message.seen)


def _more_visible_keys(message: Stored) -> tuple[str, ...]:
    """The message's own key and those in `CC`; those in `BCC` are nobody's business."""
    copies = message.headers.get("CC")
    if not isinstance(copies, list):
        return (message.routing_key,)
    return (message.routing_key, *(key for key in copies if isinstance(key, str)))


def _with(deaths: tuple[Death, ...], latest: Death) -> tuple[Death, ...]:
    """Count a death that happened before; either way it comes first now."""
    others = []
    for death in deaths:
        if (death.queue, death.reason) == (latest.queue, latest.reason):
            latest = replace(death, count=death.count + 1)
        else:
            others.append(death)
    return (latest, *others)


def goes_in_circles(deaths: tuple[Death, ...], queue: str) -> bool:
    """Whether a message on its way to a queue was there before, and nobody has rejected it since.

    The deaths include the one that sends it there.
    """
    for at, death in enumerate(deaths):
        if death.queue == queue:
            return all(each.reason != Reason.REJECTED.value for each in deaths[: at + 1])
    return False
