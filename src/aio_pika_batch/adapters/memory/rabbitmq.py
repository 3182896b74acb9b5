"""Describes RabbitMQ: how its versions differ, how it refuses, and which arguments queues may have.

Everything that depends on the version is a field of `VersionRules`. The other modules read the
field and never compare versions. The texts of refusals are RabbitMQ's, so a test that reads them
reads the same ones in production.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from decimal import Decimal
from enum import Enum

from aio_pika_batch.core.message import FieldValue, Headers
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
        error = refusal_error(refusal.code, refusal.text, subject, if_unequal, if_missing)
        raise error from refusal


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


def is_same(one: FieldValue, other: FieldValue) -> bool:
    """Return whether two values are the same; 1 and True are in Python, but not in AMQP."""
    return type(one) is type(other) and one == other


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


# --- arguments of queues -------------------------------------------------------


class QueueType(Enum):
    """A type of queue; streams are not imitated."""

    CLASSIC = "classic"
    QUORUM = "quorum"


class Overflow(Enum):
    """What a queue does when it is at its `x-max-length`."""

    DROP_HEAD = "drop-head"
    REJECT_PUBLISH = "reject-publish"
    REJECT_PUBLISH_DLX = "reject-publish-dlx"


_TYPE = "x-queue-type"
_OF_ALL_TYPES = frozenset(
    {
        _TYPE,
        "x-dead-letter-exchange",
        "x-dead-letter-routing-key",
        "x-message-ttl",
        "x-max-length",
        "x-max-length-bytes",
        "x-overflow",
        "x-expires",
        "x-single-active-consumer",
    }
)
_OF_ONE_TYPE = {
    QueueType.CLASSIC: frozenset({"x-max-priority", "x-queue-mode", "x-queue-version"}),
    QueueType.QUORUM: frozenset({"x-delivery-limit", "x-dead-letter-strategy"}),
}
# Two declarations are compared by these arguments only.
_KNOWN = _OF_ALL_TYPES.union(*_OF_ONE_TYPE.values())
_OVERFLOWS = tuple(each.value for each in Overflow)
_STRATEGIES = ("at-most-once", "at-least-once")
_MAX_TTL = 4_294_967_295
_MAX_PRIORITY = 255


@dataclass(frozen=True, slots=True)
class QueueSpec:
    """A queue's arguments, parsed.

    Attributes:
        message_ttl: Seconds.
        expires: Seconds without use after which the queue is deleted.
        delivery_limit: None: no limit.
        at_least_once: Whether a dead letter is kept until another queue has taken it.
    """

    type: QueueType
    message_ttl: float | None
    expires: float | None
    max_length: int | None
    max_bytes: int | None
    overflow: Overflow
    dead_letter_exchange: str | None
    dead_letter_routing_key: str | None
    delivery_limit: int | None
    max_priority: int
    single_active: bool
    at_least_once: bool


def parse_arguments(queue: str, arguments: Headers, rules: VersionRules) -> QueueSpec:
    """Parse and check the arguments of a queue; those that RabbitMQ does not know are ignored.

    Raises:
        Refusal: One of them is not supported, or its value is invalid.
    """
    queue_type = _parse_type(queue, arguments)
    is_quorum = queue_type is QueueType.QUORUM
    supported = _OF_ALL_TYPES | _OF_ONE_TYPE[queue_type]
    if unsupported := sorted((_KNOWN - supported) & arguments.keys()):
        raise Refusal(
            ReplyCode.PRECONDITION_FAILED,
            f"invalid arg '{unsupported[0]}' for queue '{queue}' in vhost '/' of queue type"
            f" rabbit_{queue_type.value}_queue",
        )
    parser = _ArgumentParser(queue, arguments)
    never_expires = is_quorum and not rules.quorum_expires
    if never_expires and "x-message-ttl" in arguments:
        raise invalid_argument("x-message-ttl", queue)
    exchange = parser.text("x-dead-letter-exchange")
    routing_key = parser.text("x-dead-letter-routing-key")
    if routing_key is not None and exchange is None:
        raise invalid_argument("x-dead-letter-routing-key", queue, "routing_key_but_no_dlx_defined")
    overflow = Overflow(parser.choice("x-overflow", _OVERFLOWS) or Overflow.DROP_HEAD)
    if never_expires and overflow is not Overflow.DROP_HEAD:
        raise invalid_argument("x-overflow", queue)
    if is_quorum and overflow is Overflow.REJECT_PUBLISH_DLX:
        # RabbitMQ accepts it and drops the head.
        overflow = Overflow.DROP_HEAD
    strategy = parser.choice("x-dead-letter-strategy", _STRATEGIES)
    delivery_limit = rules.default_delivery_limit if is_quorum else None
    stated_limit = parser.number("x-delivery-limit", minimum=-1)
    if stated_limit is not None:
        # -1 lifts the default limit. Before 4.0 there is none, and every return is above -1.
        is_lifted = stated_limit < 0 and rules.default_delivery_limit is not None
        delivery_limit = None if is_lifted else stated_limit
    return QueueSpec(
        type=queue_type,
        message_ttl=_to_seconds(parser.number("x-message-ttl", maximum=_MAX_TTL)),
        expires=_to_seconds(parser.number("x-expires", minimum=1, maximum=_MAX_TTL)),
        max_length=parser.number("x-max-length"),
        max_bytes=parser.number("x-max-length-bytes"),
        overflow=overflow,
        dead_letter_exchange=exchange,
        dead_letter_routing_key=routing_key,
        delivery_limit=delivery_limit,
        max_priority=parser.number("x-max-priority", maximum=_MAX_PRIORITY) or 0,
        single_active=parser.flag("x-single-active-consumer"),
        # Without reject-publish RabbitMQ logs a warning and falls back to at-most-once.
        at_least_once=(
            rules.quorum_expires
            and strategy == "at-least-once"
            and exchange is not None
            and overflow is Overflow.REJECT_PUBLISH
        ),
    )


def _parse_type(queue: str, arguments: Headers) -> QueueType:
    stated = arguments.get(_TYPE, QueueType.CLASSIC.value)
    if stated == "stream":
        raise Refusal(
            ReplyCode.NOT_IMPLEMENTED,
            "the broker in memory has no streams; use a classic or a quorum queue",
        )
    try:
        return QueueType(stated)
    except ValueError:
        reason = f"\"unsupported queue type '{stated!s}'\""
        raise invalid_argument(_TYPE, queue, reason) from None


def _to_seconds(milliseconds: int | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def check_same_arguments(queue: str, received: Headers, current: Headers) -> None:
    """Compare the arguments of two declarations of one queue.

    Raises:
        Refusal: They differ.
    """
    for name in sorted((received.keys() | current.keys()) & _KNOWN):
        # A classic queue may be declared with or without its type.
        default = QueueType.CLASSIC.value if name == _TYPE else None
        one, other = received.get(name, default), current.get(name, default)
        if is_same(one, other):
            continue
        shown = (
            (f"'{one!s}'", f"'{other!s}'")
            if name == _TYPE
            else (format_value(one), format_value(other))
        )
        raise inequivalent_argument(name, f"queue '{queue}'", *shown)


class _ArgumentParser:
    """Reads single arguments, and checks their types and ranges."""

    def __init__(self, queue: str, arguments: Headers) -> None:
        self._queue = queue
        self._arguments = arguments

    def number(self, name: str, *, minimum: int = 0, maximum: int | None = None) -> int | None:
        value = self._arguments.get(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._wrong_type(name, "integer", value)
        if value < minimum:
            wrong = "negative" if value else "zero"
            raise invalid_argument(name, self._queue, f"{{value_{wrong},{value}}}")
        if maximum is not None and value > maximum:
            raise invalid_argument(name, self._queue, f"{{value_too_large,{value}}}")
        return value

    def text(self, name: str) -> str | None:
        value = self._arguments.get(name)
        if value is None or isinstance(value, str):
            return value
        raise self._wrong_type(name, "longstr", value)

    def choice(self, name: str, choices: Sequence[str]) -> str | None:
        value = self.text(name)
        if value is None or value in choices:
            return value
        reason = f"invalid_{name.removeprefix('x-').replace('-', '_')}"
        raise invalid_argument(name, self._queue, reason)

    def flag(self, name: str) -> bool:
        value = self._arguments.get(name, False)
        if isinstance(value, bool):
            return value
        raise self._wrong_type(name, "boolean", value)

    def _wrong_type(self, name: str, expected: str, value: FieldValue) -> Refusal:
        reason = f'"expected {expected}, got {amqp_type_name(value)}"'
        return invalid_argument(name, self._queue, reason)
