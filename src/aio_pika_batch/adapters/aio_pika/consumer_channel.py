"""What do both wires do alike? The channel is the client library's, opened, cancelled and closed by
it; and what ends a session is told in the same words.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from aio_pika_batch.adapters.aio_pika.broker_errors import refused_entity, why_channel_closed
from aio_pika_batch.adapters.aio_pika.client_errors import said
from aio_pika_batch.adapters.aio_pika.events import (
    ChannelClosed,
    ConnectionClosed,
    ConsumerCancelled,
    Cut,
    Deliveries,
    Malformed,
)
from aio_pika_batch.adapters.aio_pika.translate import describe, translated
from aio_pika_batch.errors import BrokerUnavailable, SessionLost

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from aiormq.abc import AbstractChannel, DeliveredMessage

    from aio_pika_batch.adapters.aio_pika.connection import Link
    from aio_pika_batch.adapters.aio_pika.events import Event
    from aio_pika_batch.adapters.aio_pika.wire import Ear
    from aio_pika_batch.core.message import Source
    from aio_pika_batch.transport import Subscription


class ConsumingChannel(ABC):
    """One channel of the client library that consumes."""

    def __init__(self, link: Link, ear: Ear) -> None:
        self._link = link
        self._ear = ear
        self._channel: AbstractChannel | None = None
        self._number = 0
        self._consumer_tag = ""
        self._refusal: ChannelClosed | ConnectionClosed | None = None
        self._is_over = False

    @abstractmethod
    async def _listen(
        self, channel: AbstractChannel, source: Source
    ) -> Callable[[DeliveredMessage], Coroutine[Any, Any, None]]:
        """Prepare for deliveries; return what the library shall call with each."""

    async def consume(self, subscription: Subscription, source: Source) -> None:
        """Open the channel and begin."""
        where = self._link.address

        def refused(error: BaseException) -> Exception:
            refusal = self._refusal or said(error)
            if refusal is None:
                why = describe(error)
                return BrokerUnavailable(f"{where} hung up while a consumer was opened: {why}")
            entity = f"consuming from queue {subscription.queue!r}"
            return refused_entity(refusal.code, refusal.text, entity, where)

        self._consumer_tag = subscription.consumer_tag
        with translated(refused):
            self._channel = channel = await self._link.channel()
            self._number = channel.number
            # Before there is a consumer, so that no delivery can come earlier.
            callback = await self._listen(channel, source)
            await channel.basic_qos(prefetch_count=subscription.prefetch)
            await channel.basic_consume(
                subscription.queue,
                callback,
                consumer_tag=subscription.consumer_tag,
                exclusive=subscription.exclusive,
                arguments=dict[str, Any](subscription.arguments),
            )

    async def cancel(self) -> None:
        """Ask for no more."""
        if self._channel is not None:
            with translated(lambda error: SessionLost(f"basic.cancel failed: {describe(error)}")):
                await self._channel.basic_cancel(self._consumer_tag)

    async def close(self) -> None:
        """Close the channel."""
        if self._channel is not None and self._link.line.end is None:
            await self._channel.close()

    def _heard(self, event: Event) -> None:
        match event:
            case Deliveries(messages):
                self._ear.delivered(messages)
            case ChannelClosed(code, text):
                self._refusal = event
                self._lose(why_channel_closed(code, text))
            case ConnectionClosed(code, text):
                self._refusal = event
                self._lose(f"the broker closed the connection: {code} {text}")
            case ConsumerCancelled():
                self._lose(
                    "the broker cancelled the consumer: the queue was deleted, is unavailable,"
                    " or messages were held for too long"
                )
            case Malformed(reason) | Cut(reason):
                self._lose(reason)
            case _:
                # Confirms do not come on a channel that consumes; close-ok is the library's.
                pass

    def _lose(self, why: str) -> None:
        self._is_over = True
        self._ear.lost(why)
