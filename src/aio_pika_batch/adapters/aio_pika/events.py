"""What can be heard on a wire?

Values, in the order of the wire. Whoever listens matches on their types.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from aio_pika_batch.core.message import Message


class Deliveries(NamedTuple):
    """Messages that came together, in the order of their tags."""

    messages: list[Message]


class Confirm(NamedTuple):
    """The broker's word on one publication, or on all up to it."""

    tag: int
    multiple: bool
    accepted: bool


class Confirms(NamedTuple):
    """Confirms that came together."""

    confirms: list[Confirm]


class Returned(NamedTuple):
    """A mandatory publication that no queue took; its confirm is still to come."""

    code: int
    text: str
    exchange: bytes
    routing_key: bytes
    properties: bytes
    body: bytes


class ConsumerCancelled(NamedTuple):
    """The broker has ended the consumer: its queue is gone, or it was too slow."""

    consumer_tag: str


class ChannelClosed(NamedTuple):
    """The broker has closed the channel: another byte on it would end the connection."""

    code: int
    text: str


class ChannelGone(NamedTuple):
    """The broker has confirmed that the channel is closed."""


class ConnectionClosed(NamedTuple):
    """The broker is closing the connection, and says why."""

    code: int
    text: str


class Malformed(NamedTuple):
    """The stream cannot be split any further; nothing comes after this."""

    reason: str


class Cut(NamedTuple):
    """The connection is no more, without a word from the broker."""

    reason: str


class PassThrough(NamedTuple):
    """Whole frames for the client library."""

    frames: list[bytes]


Event: TypeAlias = (
    Deliveries
    | Confirms
    | Returned
    | ConsumerCancelled
    | ChannelClosed
    | ChannelGone
    | ConnectionClosed
    | Malformed
    | Cut
    | PassThrough
)
