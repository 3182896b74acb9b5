"""Turns a broker's refusals over AMQP 1.0 into this library's errors, with what to do about each.

Pure: conditions and texts in, errors out. The texts that are looked into are RabbitMQ's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from aio_pika_batch.errors import AccessRefused, BrokerUnavailable, TopologyError, TransportError

if TYPE_CHECKING:
    from aio_pika_batch.adapters.amqp10.performatives import Error
    from aio_pika_batch.adapters.amqp10.reaching import Peer

INTERNAL_ERROR: Final = "amqp:internal-error"
RESOURCE_DELETED: Final = "amqp:resource-deleted"

_TEMPORARY: Final = ("is down", "inaccessible", "timeout", "timed out", "limit", "shutting down")
"""Words of refusals that a later attempt may not meet."""

_FIXES: Final = {
    "amqp:unauthorized-access": (
        "give the user the permission that it lacks, or connect as another user"
    ),
    "amqp:not-found": "create it, or let it be declared (declare=True)",
    "amqp:resource-locked": (
        "another connection has it exclusively: end that one, or use another name"
    ),
    "amqp:invalid-field": "the broker does not take this name; use another",
    "amqp:precondition-failed": "let the settings say what it is on the broker, or delete it there",
    "amqp:not-allowed": "the broker does not allow this; choose another queue",
    "amqp:not-implemented": "this version of the broker cannot do it",
}


def refused_login(peer: Peer) -> AccessRefused:
    """The broker didn't accept user and password, or the certificate."""
    advice = "check user and password"
    if peer.user == "guest":
        advice += "; by default a broker lets guest in from its own machine only"
    return AccessRefused(f"{peer} refused the login of user {peer.user!r}; {advice}")


def no_mechanism(peer: Peer, asked: str) -> AccessRefused:
    """The broker doesn't offer the way to log in that was asked for."""
    return AccessRefused(
        f"{peer} does not offer to log in by auth={asked};"
        " enable that on the broker, or leave auth out of url. By external, it wants a"
        " client certificate first (ssl_certfile)"
    )


def refused_queue(error: Error | None, queue: str, where: object) -> TransportError:
    """The broker refused to let the queue be consumed from."""
    text = "no reason is given" if error is None else str(error)
    refusal = f"consuming from queue {queue!r} at {where}: {text}"
    fix = None if error is None else _FIXES.get(error.condition)
    if fix is None or any(word in text for word in _TEMPORARY):
        return BrokerUnavailable(f"{refusal}; try again later")
    return TopologyError(f"{refusal}; {fix}")


def why_ended(what: str, error: Error | None) -> str:
    """Tell what a link, a session or a connection was ended for."""
    if error is None:
        return f"the broker ended the {what} without a reason"
    if error.condition == RESOURCE_DELETED:
        return f"the broker ended the {what}: the queue was deleted or is unavailable"
    return f"the broker ended the {what}: {error}"


def is_crash(error: Error | None) -> bool:
    """Whether the broker's own session failed, most likely over a message that it cannot translate.

    The same message would end the next session, too, and use up the delivery limit of those that
    were prefetched with it.
    """
    if error is None or error.condition != INTERNAL_ERROR:
        return False
    return "forced" not in str(error).lower()
