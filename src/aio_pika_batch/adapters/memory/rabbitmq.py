"""Describes RabbitMQ: how its versions differ, and with which texts it refuses.

Everything that depends on the version is a field of `VersionRules`. The other modules read the
field and never compare versions. The texts of refusals are RabbitMQ's, so a test that reads them
reads the same ones in production.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal

from aio_pika_batch.core.message import FieldValue
from aio_pika_batch.core.refusals import ReplyCode, refusal_error
from aio_pika_batch.errors import ConfigurationError

# --- versions ------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionRules:
    """How one version behaves, as observed on a real broker of it; the defaults are 3.10's."""

    version: str
    # The delivery limit of a quorum queue that is declared without one.
    default_delivery_limit: int | None = None
    # Whether a quorum queue without a delivery limit puts requeued messages at its back.
    requeues_to_back: bool = True
    # Whether rejects and closed channels count as failures, in classic queues, too, apart from mere
    # returns by `basic.nack`. Before, every return counts towards a delivery limit.
    counts_failures: bool = False
    # Whether the broker believes an `x-death` header that a client sends.
    trusts_client_deaths: bool = True
    # Whether dead letters have `x-last-death-*` headers.
    sends_last_death: bool = False
    # Whether a dead letter keeps `CC` although its queue has a dead-letter routing key.
    keeps_cc: bool = False
    # Whether dead letters of quorum queues keep their delivery count in the next quorum queue.
    carries_delivery_count: bool = False
    # Whether quorum queues dead-letter what they drop at once in reverse order, and before what
    # expires with it.
    drops_in_reverse: bool = True
    # Whether quorum queues have time to live, `reject-publish`, and at-least-once dead letters.
    quorum_expires: bool = True
    # Whether an unknown exchange type closes the connection and not only the channel.
    unknown_type_closes_connection: bool = True
    # How many commands a channel sends to a quorum queue that doesn't answer after a cancel.
    commands_without_answer: int = 32
    # Whether it speaks AMQP 1.0, so that a session can modify messages of a quorum queue.
    modifies: bool = False
    # Whether a quorum queue keeps a modified message until a given time.
    delays_modified: bool = False


_V3_10 = VersionRules(version="3.10")
_V3_8 = replace(_V3_10, version="3.8", requeues_to_back=False, quorum_expires=False)
_V4_0 = replace(
    _V3_10,
    version="4.0",
    default_delivery_limit=20,
    requeues_to_back=False,
    trusts_client_deaths=False,
    sends_last_death=True,
    keeps_cc=True,
    carries_delivery_count=True,
    unknown_type_closes_connection=False,
    commands_without_answer=33,
    modifies=True,
)
_V4_3 = replace(
    _V4_0,
    version="4.3",
    counts_failures=True,
    drops_in_reverse=False,
    delays_modified=True,
)
_RULES = {each.version: each for each in (_V3_8, _V3_10, _V4_0, _V4_3)}

NEWEST = "4.3"


def version_rules(version: str) -> VersionRules:
    """Return the rules of a version.

    Raises:
        ConfigurationError: It is not imitated.
    """
    try:
        return _RULES[version]
    except KeyError:
        known = ", ".join(_RULES)
        raise ConfigurationError(
            f"the broker in memory can't imitate RabbitMQ {version!r}; use one of {known}"
        ) from None


# --- refusals ------------------------------------------------------------------

_FIRST_CONNECTION_CODE = 500


class Refusal(Exception):
    """The broker refuses what a client asks for, and closes its channel or its connection."""

    def __init__(self, code: ReplyCode, reason: str) -> None:
        self.code = code
        self.text = f"{code.name} - {reason}"
        super().__init__(f"{code} {self.text}")

    @property
    def closes_connection(self) -> bool:
        """Whether it closes the connection and not only the channel."""
        # AMQP 0-9-1 calls these hard errors, and 320 is the only one of them below 500.
        return self.code >= _FIRST_CONNECTION_CODE or self.code is ReplyCode.CONNECTION_FORCED


@contextmanager
def translate_refusals(
    subject: str, if_unequal: str | None = None, if_missing: str | None = None
) -> Iterator[None]:
    """Raise refusals inside the context as the port's errors, with advice."""
    try:
        yield
    except Refusal as refusal:
        code, text = refusal.code, refusal.text
        raise refusal_error(code, text, subject, if_unequal, if_missing) from refusal


def publish_forbidden(exchange: str, user: str) -> Refusal:
    """Return the refusal for publishing without the write permission."""
    name = exchange or "amq.default"
    text = f"write access to exchange '{name}' in vhost '/' refused for user '{user}'"
    return Refusal(ReplyCode.ACCESS_REFUSED, text)


def inequivalent_argument(argument: str, entity: str, received: str, current: str) -> Refusal:
    """Return the refusal for declaring something that exists with another argument."""
    return Refusal(
        ReplyCode.PRECONDITION_FAILED,
        f"inequivalent arg '{argument}' for {entity} in vhost '/':"
        f" received {received} but current is {current}",
    )


def invalid_argument(argument: str, queue: str, reason: str | None = None) -> Refusal:
    """Return the refusal for an argument that the queue does not support, or not with its value."""
    text = f"invalid arg '{argument}' for queue '{queue}' in vhost '/'"
    return Refusal(ReplyCode.PRECONDITION_FAILED, text if reason is None else f"{text}: {reason}")


def format_flag(flag: bool) -> str:  # noqa: FBT001
    """Return a flag as refusals show it."""
    return f"'{str(flag).lower()}'"


def format_value(value: FieldValue) -> str:
    """Return an argument's value and type as refusals show them."""
    if value is None:
        return "none"
    shown = str(value).lower() if isinstance(value, bool) else str(value)
    return f"the value '{shown}' of type '{amqp_type_name(value)}'"


def amqp_type_name(value: FieldValue) -> str:
    """Return RabbitMQ's name for a value's type; an integer has the smallest type that holds it."""
    if isinstance(value, int) and not isinstance(value, bool):
        return next((name for bits, name in _INTEGER_TYPES if value.bit_length() < bits), "long")
    return next(name for types, name in _OTHER_TYPES if isinstance(value, types))


# The types are signed: a byte holds seven bits and the sign.
_INTEGER_TYPES = ((8, "byte"), (16, "short"), (32, "signedint"))
_OTHER_TYPES = (
    (bool, "bool"),
    ((str, bytes), "longstr"),
    (float, "double"),
    (list, "array"),
    (Mapping, "table"),
    (datetime, "timestamp"),
    (Decimal, "decimal"),
    (object, "void"),
)
