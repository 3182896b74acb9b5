"""Turns a broker's refusal of a queue, exchange, binding or consumer into an error with advice.

The reply codes are AMQP 0-9-1's. The texts that are searched are RabbitMQ's; where a text is not
known, the code decides.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum

from aio_pika_batch.core.message import FieldValue
from aio_pika_batch.errors import BrokerUnavailable, TopologyError, TransportError


class ReplyCode(IntEnum):
    """The reply codes with which a broker closes a channel or a connection."""

    CONNECTION_FORCED = 320
    ACCESS_REFUSED = 403
    NOT_FOUND = 404
    RESOURCE_LOCKED = 405
    PRECONDITION_FAILED = 406
    FRAME_ERROR = 501
    SYNTAX_ERROR = 502
    COMMAND_INVALID = 503
    CHANNEL_ERROR = 504
    UNEXPECTED_FRAME = 505
    RESOURCE_ERROR = 506
    NOT_ALLOWED = 530
    NOT_IMPLEMENTED = 540
    INTERNAL_ERROR = 541


_TRANSIENT = ("is down", "inaccessible", "timeout", "timed out", "limit", "shutting down")
"""Words of refusals that a later attempt may not meet."""

_ADVICE_BY_CODE: dict[int, str] = {
    ReplyCode.ACCESS_REFUSED: "give the user the missing permission, or connect as another user",
    ReplyCode.NOT_FOUND: "create it, or let the consumer declare it (declare=True)",
    ReplyCode.RESOURCE_LOCKED: "another connection has it exclusively: close that connection, or"
    " choose another name",
    ReplyCode.PRECONDITION_FAILED: "change the settings to what the broker has, or"
    " delete it there with its messages",
    ReplyCode.COMMAND_INVALID: "the broker does not know this type; enable its plugin, or correct"
    " the type",
    ReplyCode.NOT_ALLOWED: "the broker does not allow this; choose another name or type",
    ReplyCode.NOT_IMPLEMENTED: "this version of the broker does not implement it",
    ReplyCode.INTERNAL_ERROR: "the broker does not support this, or no longer; see its log",
}

STREAM_ADVICE = (
    "it is a stream, whose messages cannot be rejected or requeued one by one; consume from a"
    " classic or quorum queue"
)

_ADVICE_BY_TEXT = (
    (
        "no exchange",
        (
            "create it, or let the consumer declare it (declare=True; a dead-letter exchange also"
            " needs dead_letter_queue)"
        ),
    ),
    # Since RabbitMQ 4.0 an unknown exchange type is a failed precondition.
    ("exchange type", _ADVICE_BY_CODE[ReplyCode.COMMAND_INVALID]),
    ("exclusive use", "an exclusive consumer is its only consumer: stop it, or don't be exclusive"),
    ("internal exchange", "dead letters need an exchange that is not internal: name another one"),
    ("reserved prefix", "names that begin with amq. are the broker's: choose another name"),
    ("rabbit_stream_queue", STREAM_ADVICE),
    ("default exchange", "the default exchange can't be declared or bound: name another exchange"),
    ("invalid arg", "correct this argument, or choose another queue type"),
    ("invalid property", "a quorum queue is durable, and neither exclusive nor auto-delete"),
)

_QUOTED = re.compile(r"'[^']*'")

_UNEQUAL = re.compile(
    r"inequivalent arg '(?P<name>[^']+)'.*? current is (?:the value )?"
    r"(?:none|'(?P<value>.*?)'(?: of type '(?P<type>\w+)')?)(?:;|$)",
    re.DOTALL,
)
_INTEGER = re.compile(r"-?\d+")


@dataclass(frozen=True, slots=True)
class UnequalArgument:
    """What a broker says about something that exists and was declared differently.

    Attributes:
        value: What the broker has; None if it has no such argument.
    """

    name: str
    value: FieldValue


def unequal_argument(text: str | None) -> UnequalArgument | None:
    """Read from a refusal, or an error of :func:`refusal_error`, which argument differs and how."""
    # The only way in AMQP to see the arguments of what exists.
    found = None if text is None else _UNEQUAL.search(text)
    if found is None:
        return None
    value: FieldValue = found["value"]
    if isinstance(value, str) and _INTEGER.fullmatch(value):
        value = int(value)
    elif found["type"] == "bool":
        value = value == "true"
    return UnequalArgument(found["name"], value)


def is_transient(text: str) -> bool:
    """Return whether a later attempt may not meet the refusal with this text."""
    return any(word in _unquoted(text) for word in _TRANSIENT)


def _unquoted(text: str) -> str:
    # What is quoted is a name or a value: a queue may be called 'limit', and an argument is called
    # 'x-delivery-limit'.
    return _QUOTED.sub("", text)


def refusal_error(
    code: int,
    text: str,
    subject: str,
    if_unequal: str | None = None,
    if_missing: str | None = None,
) -> TransportError:
    """Return the error for a broker's refusal to declare, check, bind or consume something.

    Args:
        code: The reply code.
        text: The reply text.
        subject: What was refused, and where.
        if_unequal: What to do if the broker has it with other arguments; None: as for any queue.
        if_missing: What to do if the broker doesn't have it; None: as for any queue.

    Returns:
        A `TopologyError`, or `BrokerUnavailable` if a later attempt may succeed.
    """
    advice = _ADVICE_BY_CODE.get(code)
    said = f"{code} {text}".rstrip(".")
    if advice is None or is_transient(text):
        return BrokerUnavailable(f"{subject}: {said}; try again later")
    words = _unquoted(text)
    if "inequivalent" in words:
        advice = if_unequal or advice
    elif code == ReplyCode.NOT_FOUND and if_missing:
        advice = if_missing
    else:
        advice = next((each for part, each in _ADVICE_BY_TEXT if part in words), advice)
    return TopologyError(f"{subject}: {said}; {advice}")


def publish_refusal_error(code: int, text: str, exchange: str, where: str) -> TransportError:
    """Return the error for a broker's refusal to take messages for an exchange.

    Args:
        code: The reply code.
        text: The reply text.
        exchange: The exchange; empty: the default one.
        where: The broker's address.
    """
    name = exchange or "amq.default"
    subject = f"publishing to exchange {name!r} at {where}"
    if code != ReplyCode.ACCESS_REFUSED or "internal exchange" in text:
        return refusal_error(code, text, subject)
    return TopologyError(
        f"{subject}: {code} {text}; this needs the write permission: let the write pattern of"
        f" `rabbitmqctl set_permissions` match {name!r}, or connect as another user"
    )
