"""How does a session consume over the frame tap?

The channel is the client library's, so that it opens, cancels and closes it; the deliveries are
taken out from under it, and settlements are written past it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aio_pika_batch.adapters.aio_pika.edge import describe, translated
from aio_pika_batch.adapters.aio_pika.events import (
    ChannelClosed,
    ConnectionClosed,
    ConsumerCancelled,
    Cut,
    Deliveries,
    Malformed,
)
from aio_pika_batch.adapters.aio_pika.packing import pack_settlements
from aio_pika_batch.adapters.aio_pika.refusals import (
    refused_entity,
    why_channel_closed,
)
from aio_pika_batch.errors import BrokerUnavailable, SessionLost

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiormq.abc import AbstractChannel, DeliveredMessage

    from aio_pika_batch.adapters.aio_pika.connection import Link
    from aio_pika_batch.adapters.aio_pika.events import Event
    from aio_pika_batch.adapters.aio_pika.wire import Ear
    from aio_pika_batch.core.ledger import Frame
    from aio_pika_batch.core.message import Source
    from aio_pika_batch.transport import Subscription


class FastWire:
    """Implements :class:`~aio_pika_batch.adapters.aio_pika.wire.Wire`."""

    def __init__(self, link: Link, ear: Ear) -> None:
        self._link = link
        self._tap = link.tap
        self._ear = ear
        self._channel: AbstractChannel | None = None
        self._number = 0
        self._consumer_tag = ""
        self._refusal: tuple[int, str] | None = None

    async def consume(self, subscription: Subscription, source: Source) -> None:
        """Open the channel and begin."""
        where = self._link.address

        def refused(error: BaseException) -> Exception:
            if self._refusal is None:
                why = describe(error)
                return BrokerUnavailable(f"{where} hung up while a consumer was opened: {why}")
            entity = f"consuming from queue {subscription.queue!r}"
            return refused_entity(*self._refusal, entity, where)

        self._consumer_tag = subscription.consumer_tag
        with translated(refused):
            self._channel = channel = await self._link.channel()
            self._number = channel.number
            # Before there is a consumer, so that no delivery can come earlier.
            self._tap.consume(channel.number, source, self._heard)
            await channel.basic_qos(prefetch_count=subscription.prefetch)
            await channel.basic_consume(
                subscription.queue,
                _untapped,
                consumer_tag=subscription.consumer_tag,
                exclusive=subscription.exclusive,
                arguments=dict[str, Any](subscription.arguments),
            )

    def settle(self, frames: Sequence[Frame]) -> bool:
        """Send, at once and in this order; False if nothing can be sent any more."""
        return self._tap.write(pack_settlements(self._number, frames))

    async def drained(self) -> None:
        """Wait if too much is waiting to be sent."""
        if self._tap.is_clogged:
            with translated(lambda error: SessionLost(f"the connection broke: {describe(error)}")):
                await self._tap.drain()

    async def cancel(self) -> None:
        """Ask for no more."""
        if self._channel is not None:
            with translated(lambda error: SessionLost(f"basic.cancel failed: {describe(error)}")):
                await self._channel.basic_cancel(self._consumer_tag)

    async def close(self) -> None:
        """Close the channel."""
        if self._channel is not None and self._tap.end is None:
            await self._channel.close()

    def _heard(self, event: Event) -> None:
        match event:
            case Deliveries(messages):
                self._ear.delivered(messages)
            case ChannelClosed(code, text):
                self._refusal = (code, text)
                self._ear.lost(why_channel_closed(code, text))
            case ConnectionClosed(code, text):
                self._refusal = (code, text)
                self._ear.lost(f"the broker closed the connection: {code} {text}")
            case ConsumerCancelled():
                self._ear.lost(
                    "the broker cancelled the consumer: the queue was deleted, is unavailable,"
                    " or messages were held for too long"
                )
            case Malformed(reason) | Cut(reason):
                self._ear.lost(reason)
            case _:
                # Confirms do not come on a channel that consumes; close-ok is the library's.
                pass


async def _untapped(message: DeliveredMessage) -> None:
    raise AssertionError(f"{message!r} came past the tap")
