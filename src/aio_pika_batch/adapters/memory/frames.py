"""What does a broker send to a client?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from aio_pika_batch.core.message import Properties


@dataclass(frozen=True, slots=True)
class Delivery:
    """`basic.deliver`, with its content."""

    consumer_tag: str
    tag: int
    redelivered: bool
    exchange: str
    routing_key: str
    body: bytes
    properties: Properties


@dataclass(frozen=True, slots=True)
class Cancelled:
    """`basic.cancel`: the broker has ended a subscription."""

    consumer_tag: str


@dataclass(frozen=True, slots=True)
class Confirmed:
    """`basic.ack` or `basic.nack` of a publication.

    Attributes:
        number: Which one; the first on a channel is 1.
        accepted: False: nacked.
    """

    number: int
    accepted: bool


@dataclass(frozen=True, slots=True)
class Returned:
    """`basic.return`; the confirmation follows.

    Attributes:
        number: Which publication. The wire does not say so, but the order of frames does.
    """

    number: int


@dataclass(frozen=True, slots=True)
class Closed:
    """`channel.close` or `connection.close`, or the connection is cut.

    Attributes:
        words: Of the broker, or of whoever has cut it.
    """

    words: str


Incoming: TypeAlias = Delivery | Cancelled | Confirmed | Returned | Closed
