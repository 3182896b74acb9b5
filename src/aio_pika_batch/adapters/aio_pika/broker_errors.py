"""Explains why the broker closed a connection that was being opened, or a consuming channel.

Pure: reply codes and texts in, errors out. :func:`~aio_pika_batch.core.refusals.refusal_error`
explains the refusals of queues, exchanges, bindings and consumers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aio_pika_batch.core.refusals import ReplyCode, is_transient
from aio_pika_batch.errors import AccessRefused, BrokerUnavailable, TransportError

if TYPE_CHECKING:
    from aio_pika_batch.adapters.aio_pika.events import Closed
    from aio_pika_batch.adapters.aio_pika.url import Address

_FINAL = {ReplyCode.ACCESS_REFUSED, ReplyCode.NOT_FOUND, ReplyCode.NOT_ALLOWED}


def connection_error(closed: Closed, address: Address) -> TransportError:
    """Make an error of a connection that the broker closed while it was being opened."""
    code, text = closed
    refusal = f"{address} refused the connection of user {address.user!r}: {code} {text}"
    if code not in _FINAL or is_transient(text):
        return BrokerUnavailable(f"{refusal}; try again later")
    if code == ReplyCode.ACCESS_REFUSED:
        advice = "check user and password"
        if address.user == "guest":
            advice += "; by default, guest may connect only from the broker's own machine"
    elif "not found" in text:
        advice = f"check the virtual host {address.vhost!r} in the URL, or create it"
    else:
        advice = f"give the user permissions in the virtual host {address.vhost!r}"
    return AccessRefused(f"{refusal}; {advice}")


def describe_channel_close(closed: Closed) -> str:
    """Return why a consuming channel was closed, in words."""
    code, text = closed
    advice = ""
    if code == ReplyCode.PRECONDITION_FAILED and "timeout" in text:
        advice = "; messages were held longer than the broker's consumer_timeout allows"
    return f"the broker closed the channel: {code} {text}{advice}"
