"""The broker said no: to what, in which words, and what can be done about it?

Pure: reply codes and texts in, errors out. The codes are those of AMQP 0-9-1; the texts that are
looked into are RabbitMQ's, and where one is not known the code decides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from aio_pika_batch.errors import AccessRefused, BrokerUnavailable, TopologyError, TransportError

if TYPE_CHECKING:
    from aio_pika_batch.adapters.aio_pika.urls import Address

ACCESS_REFUSED = 403
NOT_FOUND = 404
RESOURCE_LOCKED = 405
PRECONDITION_FAILED = 406
COMMAND_INVALID = 503
NOT_ALLOWED = 530
NOT_IMPLEMENTED = 540
INTERNAL_ERROR = 541

_PASSING: Final = ("is down", "inaccessible", "timeout", "timed out", "limit", "shutting down")
"""Words of refusals that another attempt, later, may not meet."""

_FIXES: Final = {
    ACCESS_REFUSED: "give the user the permission that it lacks, or connect as another user",
    NOT_FOUND: "create it, or let it be declared (declare=True)",
    RESOURCE_LOCKED: "another connection has it exclusively: end that one, or use another name",
    PRECONDITION_FAILED: "let the settings say what it is on the broker, or delete it there",
    COMMAND_INVALID: "the broker does not know this type; enable its plugin, or correct the type",
    NOT_ALLOWED: "the broker does not allow this; choose another name or type",
    NOT_IMPLEMENTED: "this version of the broker cannot do it",
    INTERNAL_ERROR: "the broker does not support this, or no longer; see its log",
}


def refused_connection(code: int, text: str, address: Address) -> TransportError:
    """The broker closed the connection while it was being opened."""
    said = f"{address} refused the connection of user {address.user!r}: {code} {text}"
    if any(word in text for word in _PASSING) or code not in {
        ACCESS_REFUSED,
        NOT_FOUND,
        NOT_ALLOWED,
    }:
        return BrokerUnavailable(f"{said}; try again later")
    if code == ACCESS_REFUSED:
        advice = "check user and password"
        if address.user == "guest":
            advice += "; by default a broker lets guest in from its own machine only"
    elif "not found" in text:
        advice = f"check the virtual host {address.vhost!r} in the URL, or create it"
    else:
        advice = f"give the user permissions in the virtual host {address.vhost!r}"
    return AccessRefused(f"{said}; {advice}")


def refused_entity(
    code: int, text: str, entity: str, where: object, if_unequal: str | None = None
) -> TransportError:
    """The broker refused to declare, check, bind or consume *entity*.

    Args:
        if_unequal: What to do if it is there, and otherwise; None: what is usual.
    """
    said = f"{entity} at {where}: {code} {text}"
    fix = _FIXES.get(code)
    # An argument's name may be one of those words: x-delivery-limit, x-consumer-timeout.
    is_passing = "inequivalent" not in text and any(word in text for word in _PASSING)
    if fix is None or is_passing:
        return BrokerUnavailable(f"{said}; try again later")
    if "exchange type" in text:
        fix = _FIXES[COMMAND_INVALID]  # newer brokers call it a failed precondition
    elif "exclusive use" in text:
        fix = "its only consumer is another one: end that one, or do not ask to be exclusive"
    elif "inequivalent" in text and if_unequal is not None:
        fix = if_unequal
    return TopologyError(f"{said}; {fix}")


def why_channel_closed(code: int, text: str) -> str:
    """Tell what a channel that was consuming was closed for."""
    advice = ""
    if code == PRECONDITION_FAILED and "timeout" in text:
        advice = "; messages were held longer than the broker's consumer_timeout allows"
    return f"the broker closed the channel: {code} {text}{advice}"
