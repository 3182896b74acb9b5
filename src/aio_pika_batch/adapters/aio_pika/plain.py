"""How does a session consume with nothing but the client library's own calls?

The library's callback appends, and does nothing else: handlers run in tasks of ours, which a lost
connection does not cancel. Where a tap is installed it guards: properties are kept from the
library, and settlements go out as packed bytes. Where none is, values are decoded by the library,
with its losses (floats, times in milliseconds), and settlements are its calls, one for each frame.

Laws:

- What was delivered before the answer to `cancel` has been heard when it returns.
- Settlements are sent in the order in which they were given, however often a sender is cancelled.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, cast

from aio_pika_batch.adapters.aio_pika.consumer_channel import ConsumingChannel
from aio_pika_batch.adapters.aio_pika.events import ConsumerCancelled
from aio_pika_batch.adapters.aio_pika.frame_writer import pack_settlements
from aio_pika_batch.adapters.aio_pika.translate import describe, translated
from aio_pika_batch.core.message import Message, Properties
from aio_pika_batch.core.settlement import Disposition
from aio_pika_batch.errors import SessionLost

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from typing import Any

    from aiormq.abc import AbstractChannel, DeliveredMessage
    from pamqp.commands import Basic

    from aio_pika_batch.adapters.aio_pika.connection import Link
    from aio_pika_batch.adapters.aio_pika.header_guard import Guard
    from aio_pika_batch.adapters.aio_pika.wire import Ear
    from aio_pika_batch.core.message import Headers, Source
    from aio_pika_batch.core.settlement import Frame

_TURNS = 4
"""Of the event loop, after cancel-ok. The library has started a task for each delivery before it
passes the answer on, so that one would do."""


class PlainWire(ConsumingChannel):
    """Implements :class:`~aio_pika_batch.adapters.aio_pika.wire.Wire`."""

    def __init__(self, link: Link, ear: Ear) -> None:
        super().__init__(link, ear)
        self._guard: Guard | None = None
        self._unsent: deque[Frame] = deque()
        self._sending = asyncio.Lock()

    async def _listen(
        self, channel: AbstractChannel, source: Source
    ) -> Callable[[DeliveredMessage], Coroutine[Any, Any, None]]:
        tap, untapped = self._link.tap, self._link.untapped
        if tap is not None:
            self._guard = tap.guard(channel.number, self._heard)
        elif untapped is not None:
            untapped.watch(channel, self._heard)
            untapped.ask(await self._link.channel(), self._link.heartbeat)
        channel.on_consumer_cancel_callbacks.add(self._cancelled)

        async def received(message: DeliveredMessage) -> None:
            if not self._is_over:
                self._ear.delivered((self._message(source, message),))

        return received

    def settle(self, frames: Sequence[Frame]) -> bool:
        """Send, at once and in this order; False if nothing can be sent any more."""
        if self._link.tap is not None:
            return self._link.tap.write(pack_settlements(self._number, frames))
        if self._is_over or self._link.line.end is not None:
            return False
        self._unsent.extend(frames)
        return True

    async def drained(self) -> None:
        """Hand on what is unsent, and wait if too much is waiting to be sent."""
        tap = self._link.tap
        with translated(lambda error: SessionLost(f"the connection broke: {describe(error)}")):
            if tap is None:
                await self._send()
            elif tap.is_clogged:
                await tap.drain()

    async def cancel(self) -> None:
        """Ask for no more."""
        await super().cancel()
        for _ in range(_TURNS):
            await asyncio.sleep(0)

    async def close(self) -> None:
        """Close the channel."""
        if self._unsent and not self._is_over:
            await self._send()
        await super().close()

    def _cancelled(self, frame: Basic.Cancel) -> None:
        self._heard(ConsumerCancelled(frame.consumer_tag or ""))

    def _message(self, source: Source, message: DeliveredMessage) -> Message:
        tag = message.delivery_tag or 0
        redelivered = bool(getattr(message.delivery, "redelivered", False))
        kept = None if self._guard is None else self._guard.take(tag)
        if kept is not None:
            return Message(source, tag, redelivered, message.body, *kept)
        route = (message.exchange or "", message.routing_key or "")
        properties = values(message.header.properties)
        return Message(source, tag, redelivered, message.body, route, properties)

    async def _send(self) -> None:
        channel = self._channel
        async with self._sending:
            while self._unsent and channel is not None:
                frame = self._unsent[0]
                match frame.disposition:
                    case Disposition.ACK:
                        await channel.basic_ack(frame.tag, frame.multiple, wait=False)
                    case Disposition.RETURN:
                        await channel.basic_nack(frame.tag, frame.multiple, wait=False)
                    case _:
                        requeue = frame.disposition is Disposition.REQUEUE
                        await channel.basic_reject(frame.tag, requeue=requeue, wait=False)
                # Not before: if the call is cancelled, nothing was queued.
                self._unsent.popleft()


def values(decoded: Basic.Properties) -> Properties:
    """The properties as the client library has decoded them."""
    return Properties(
        content_type=decoded.content_type,
        content_encoding=decoded.content_encoding,
        headers=cast("Headers | None", decoded.headers),
        delivery_mode=decoded.delivery_mode,
        priority=decoded.priority,
        correlation_id=decoded.correlation_id,
        reply_to=decoded.reply_to,
        expiration=decoded.expiration,
        message_id=decoded.message_id,
        timestamp=decoded.timestamp,
        type=decoded.message_type,
        user_id=decoded.user_id,
        app_id=decoded.app_id,
        cluster_id=decoded.cluster_id,
    )
