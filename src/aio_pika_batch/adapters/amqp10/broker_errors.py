"""Makes this library's errors of a broker's refusals over AMQP 1.0, with advice for each.

It is pure. The texts that it looks for are RabbitMQ's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from aio_pika_batch.core.refusals import ReplyCode, refusal_error
from aio_pika_batch.errors import AccessRefused, BrokerUnavailable, TransportError

if TYPE_CHECKING:
    from aio_pika_batch.adapters.amqp10.performatives import PeerError
    from aio_pika_batch.adapters.url import Address

INTERNAL_ERROR: Final = "amqp:internal-error"
RESOURCE_DELETED: Final = "amqp:resource-deleted"

_CODES: Final = {
    "amqp:unauthorized-access": ReplyCode.ACCESS_REFUSED,
    "amqp:not-found": ReplyCode.NOT_FOUND,
    "amqp:resource-locked": ReplyCode.RESOURCE_LOCKED,
    "amqp:invalid-field": ReplyCode.NOT_ALLOWED,
    "amqp:precondition-failed": ReplyCode.PRECONDITION_FAILED,
    "amqp:not-allowed": ReplyCode.NOT_ALLOWED,
    "amqp:not-implemented": ReplyCode.NOT_IMPLEMENTED,
}
"""The reply codes of AMQP 0-9-1 for the same refusals."""


def refused_login(address: Address) -> AccessRefused:
    """Return the error for a user and password, or a certificate, that is not accepted."""
    advice = "check user and password"
    if address.user == "guest":
        advice += "; by default, guest may connect only from the broker's own machine"
    return AccessRefused(f"{address} refused the login of user {address.user!r}; {advice}")


def refused_queue(error: PeerError | None, queue: str, address: Address) -> TransportError:
    """Return the error for a queue that the broker refuses to let be consumed."""
    subject = f"consuming from queue {queue!r} at {address}"
    if error is None:
        return BrokerUnavailable(f"{subject}: the broker gives no reason; try again later")
    return refusal_error(_CODES.get(error.condition, 0), str(error), subject)


def end_reason(what: str, error: PeerError | None) -> str:
    """Return why the broker ended a link, a session or a connection, in words."""
    if error is None:
        return f"the broker ended the {what} without a reason"
    if error.condition == RESOURCE_DELETED:
        return f"the broker ended the {what}: the queue was deleted or is unavailable"
    return f"the broker ended the {what}: {error}"


def is_crash(error: PeerError | None) -> bool:
    """Whether the broker's own session failed, probably at a message that it cannot translate."""
    if error is None or error.condition != INTERNAL_ERROR:
        return False
    # An operator, a stopping node, or maintenance.
    return "forced" not in str(error).lower()
