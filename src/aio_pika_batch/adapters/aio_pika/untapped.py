"""What can be known of a connection that the client library opens by itself?

What its documented calls tell. Limits, against the tap: a peer that has fallen silent is noticed by
asking it (one small request for each heartbeat); a socket cannot be dropped, so that a close that
hangs is left behind; one message whose properties the library cannot read ends the connection.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aiormq.exceptions import ChannelClosed as ChannelClosedError

from aio_pika_batch.adapters.aio_pika.client_errors import said
from aio_pika_batch.adapters.aio_pika.events import (
    ChannelClosed,
    ChannelGone,
    ConnectionClosed,
    Cut,
)
from aio_pika_batch.adapters.aio_pika.translate import describe, translated
from aio_pika_batch.errors import BrokerUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from aiormq.abc import AbstractChannel, AbstractConnection

    from aio_pika_batch.adapters.aio_pika.events import Event

    Listener = Callable[[Event], None]

_SILENT_HEARTBEATS = 3


class Untapped:
    """Stands where a tap would: it tells less, and later."""

    def __init__(self) -> None:
        self.closed_by_broker: ConnectionClosed | None = None
        """Why the broker closed the connection, if it told."""
        self.end: Event | None = None
        """What ended the connection, if something did."""
        self._listener: Listener | None = None
        self._asking: asyncio.Task[None] | None = None

    def follow(self, connection: AbstractConnection) -> None:
        """Learn when the connection is closed."""
        connection.closing.add_done_callback(self._closed)

    def watch(self, channel: AbstractChannel, listener: Listener) -> None:
        """Tell when the channel or its connection is closed."""
        self._listener = listener
        channel.closing.add_done_callback(self._channel_closed)

    def ask(self, channel: AbstractChannel, heartbeat: int) -> None:
        """From now on, take a broker that does not answer on this channel for dead."""
        if heartbeat:
            self._asking = asyncio.get_running_loop().create_task(self._ask(channel, heartbeat))

    def abort(self) -> None:
        """Ask no more; the socket is the library's."""
        if self._asking is not None:
            self._asking.cancel()

    async def _ask(self, channel: AbstractChannel, heartbeat: int) -> None:
        while self.end is None:
            await asyncio.sleep(heartbeat)
            # It concerns consumers to come; this channel has none.
            answer = asyncio.ensure_future(_answer(channel))
            patience = (_SILENT_HEARTBEATS - 1) * heartbeat
            try:
                done, _ = await asyncio.wait({answer}, timeout=patience)
            finally:
                answer.cancel()
            if not done:
                self._ended(Cut(f"nothing was heard of the broker for {patience + heartbeat} s"))

    def _closed(self, closing: asyncio.Future[Any]) -> None:
        error = None if closing.cancelled() else closing.exception()
        words = said(error)
        if isinstance(words, ConnectionClosed):
            self.closed_by_broker = words
            self._ended(words)
        else:
            self._ended(Cut(describe(error) if error is not None else "the connection was closed"))

    def _ended(self, event: Event) -> None:
        if self.end is None:
            self.end = event
            self._tell(event)

    def _channel_closed(self, closing: asyncio.Future[Any]) -> None:
        error = None if closing.cancelled() else closing.exception()
        words = said(error)
        if isinstance(words, ChannelClosed):
            self._tell(words)
        elif words is not None:
            self._ended(words)
        elif error is None or isinstance(error, ChannelClosedError):
            self._tell(ChannelGone())
        else:
            self._tell(Cut(describe(error)))

    def _tell(self, event: Event) -> None:
        if self._listener is not None:
            self._listener(event)


async def _answer(channel: AbstractChannel) -> None:
    try:
        with translated(lambda error: BrokerUnavailable(describe(error))):
            await channel.basic_qos(prefetch_count=1)
    except BrokerUnavailable:
        pass  # told otherwise
