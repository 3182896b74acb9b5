"""What does a session ask of whatever carries its messages?

Little enough that there may be two of them: one over the frame tap, and one that asks nothing of
the client library but its documented calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aio_pika_batch.core.message import Message, Source
    from aio_pika_batch.core.settlement import Frame
    from aio_pika_batch.transport import Subscription


class Ear(Protocol):
    """What a wire tells its session, in the order of the wire; neither call raises or blocks."""

    def delivered(self, messages: Sequence[Message]) -> None:
        """Messages have come, in the order of their tags."""

    def lost(self, why: str) -> None:
        """The world has ended it. Nothing is delivered after this."""


class Wire(Protocol):
    """One channel that consumes."""

    async def consume(self, subscription: Subscription, source: Source) -> None:
        """Open the channel and begin. Raises TopologyError, BrokerUnavailable."""

    def settle(self, frames: Sequence[Frame]) -> bool:
        """Send, at once and in this order; False if nothing can be sent any more."""

    async def drained(self) -> None:
        """Wait if too much is waiting to be sent. Raises TransportError."""

    async def cancel(self) -> None:
        """Ask for no more; when it returns, the ear has heard all that came before the answer."""

    async def close(self) -> None:
        """Close the channel; never raises, and may be abandoned by cancelling it."""
