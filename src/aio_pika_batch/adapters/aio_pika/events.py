"""What a connection can report: messages, confirms, and every way in which it ends.

Events are values, in the order in which the broker sent them. Listeners match on their types.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from aio_pika_batch.core.message import Message


class Deliveries(NamedTuple):
    """Messages that arrived in one read, in the order of their tags."""

    messages: list[Message]


class Confirm(NamedTuple):
    """The broker's answer to one publication, or to all up to it."""

    tag: int
    multiple: bool
    accepted: bool


class Confirms(NamedTuple):
    """Confirms that arrived in one read."""

    confirms: list[Confirm]


class ReturnedPublication(NamedTuple):
    """A mandatory publication that reached no queue. Its confirm is still to come."""

    code: int
    text: str
    exchange: bytes
    routing_key: bytes
    properties: bytes
    body: bytes


class ConsumerCancelled(NamedTuple):
    """The broker has cancelled the consumer: its queue is gone, or it was too slow."""

    consumer_tag: str


class ChannelClosed(NamedTuple):
    """The broker has closed the channel. One more byte on it would cost the connection."""

    code: int
    text: str


class ChannelCloseOk(NamedTuple):
    """The broker has confirmed that the channel is closed."""


class ConnectionClosed(NamedTuple):
    """The broker closes the connection, and gives its reason."""

    code: int
    text: str


class Malformed(NamedTuple):
    """The received bytes cannot be parsed. No event follows this one."""

    reason: str


class ConnectionLost(NamedTuple):
    """The connection has ended, and the broker gave no reason."""

    reason: str


class PassThrough(NamedTuple):
    """Whole frames for the client library."""

    frames: list[bytes]


Closed: TypeAlias = ChannelClosed | ConnectionClosed
"""What the broker closed, and why."""

Event: TypeAlias = (
    Deliveries
    | Confirms
    | ReturnedPublication
    | ConsumerCancelled
    | ChannelClosed
    | ChannelCloseOk
    | ConnectionClosed
    | Malformed
    | ConnectionLost
    | PassThrough
)
