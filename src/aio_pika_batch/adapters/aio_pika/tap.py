"""How are frames taken out from under a client library that was not asked?

It was: aiormq lets its user open the socket (`transport_factory`). This one returns real asyncio
streams; only, what arrives goes through a `Splitter` before the library's reader sees it, and the
writer is kept, so that packed frames can be written in one piece.

Laws:

- The library hears everything but what a tapped channel carries in bulk, in order; and as long as
  bytes arrive, it hears that its peer is alive.
- What is heard is told in the same moment. A listener's exception costs nobody else anything.
- After the end of the connection is told, nothing more is, and nothing is written.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from aiormq.connection import TransportFactory
from aiormq.exceptions import AMQPConnectionError

from aio_pika_batch.adapters.aio_pika.events import (
    ConnectionClosed,
    Cut,
    Malformed,
    PassThrough,
)
from aio_pika_batch.adapters.aio_pika.frame_parser import Splitter

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiormq.abc import AbstractChannel
    from aiormq.connection import SSLContextProvider
    from yarl import URL

    from aio_pika_batch.adapters.aio_pika.events import Event
    from aio_pika_batch.adapters.aio_pika.header_guard import Guard
    from aio_pika_batch.core.message import Source

    Listener = Callable[[Event], None]

_HEARTBEAT = b"\x08\x00\x00\x00\x00\x00\x00\xce"
_SILENT_HEARTBEATS = 3
_READ_SIZE = 2**18
_READER_LIMIT = 2**16
"""asyncio's own; beyond twice this, reading pauses until the library has caught up."""


class Tap(TransportFactory):
    """One connection's socket, as aiormq opens it and as its tapped channel uses it.

    Args:
        heartbeat: Seconds between signs of life; 0 for none.
    """

    def __init__(self, heartbeat: int) -> None:
        self.closed_by_broker: ConnectionClosed | None = None
        """Why the broker closed the connection, if it told."""
        self.end: Event | None = None
        """What ended the connection, if something did."""
        self._heartbeat = heartbeat
        self._loop = asyncio.get_running_loop()
        self._splitter = Splitter()
        self._listener: Listener | None = None
        self._reader = asyncio.StreamReader(limit=_READER_LIMIT, loop=self._loop)
        self._writer: asyncio.StreamWriter | None = None
        self._heard_at = self._loop.time()
        self._fed_at = self._heard_at
        self._watch: asyncio.TimerHandle | None = None

    async def create(
        self,
        url: URL,
        **kwargs: Any,  # noqa: ANN401  -- as it is declared there
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open the socket: aiormq calls this once, with the URL and its options."""
        provider: SSLContextProvider = kwargs.pop("ssl_context_provider")
        protocol = _Protocol(self, self._reader, self._loop)
        try:
            context = await provider.get_context() if url.scheme == "amqps" else None
            transport, _ = await self._loop.create_connection(
                lambda: protocol, url.host or "", url.port or 0, ssl=context, **kwargs
            )
        except OSError as error:
            raise AMQPConnectionError(*error.args) from error
        self._writer = asyncio.StreamWriter(transport, protocol, self._reader, self._loop)
        self._heard_at = self._loop.time()
        self._arm()
        return self._reader, self._writer

    # --- for the channel that is tapped ----------------------------------------

    @property
    def is_installed(self) -> bool:
        """Whether the library has asked for its socket here."""
        return self._writer is not None

    @property
    def frame_max(self) -> int:
        """The largest frame that may be sent."""
        return self._splitter.frame_max

    def consume(self, channel: int, source: Source, listener: Listener) -> None:
        """Take out the deliveries to *source*'s consumer; to be called before it exists."""
        self._splitter.tap_consumer(channel, source)
        self._listener = listener

    def publish(self, channel: int, listener: Listener) -> None:
        """Take out confirms and returns."""
        self._splitter.tap_publisher(channel)
        self._listener = listener

    def returns(self, channel: int, listener: Listener) -> None:
        """Take out returns only, and tell when the broker closes this channel."""
        self._splitter.tap_returns(channel)
        self._listener = listener

    def guard(self, channel: int, listener: Listener) -> Guard:
        """Take out nothing, but keep from the library what it may be unable to decode."""
        self._listener = listener
        return self._splitter.guard(channel)

    def watch(self, channel: AbstractChannel, listener: Listener) -> None:
        """Only tell when the broker closes this channel."""
        self._splitter.watch(channel.number)
        self._listener = listener

    def write(self, data: bytes) -> bool:
        """Write whole frames of the tapped channel, at once.

        Returns:
            False if the channel or the connection is no more; then nothing was written.
        """
        writer = self._writer
        if self.end is not None or not self._splitter.is_tapping:
            return False
        if writer is None or writer.is_closing():
            return False
        writer.write(data)
        return True

    @property
    def is_clogged(self) -> bool:
        """Whether so much is waiting to be sent that a writer should `drain`."""
        if self._writer is None:
            return False
        transport = self._writer.transport
        return transport.get_write_buffer_size() > transport.get_write_buffer_limits()[1]

    async def drain(self) -> None:
        """Wait until most of what was written is sent. Raises what the stream raises."""
        if self._writer is not None:
            await self._writer.drain()

    def abort(self) -> None:
        """Drop the socket, whatever is still to be sent."""
        if self._watch is not None:
            self._watch.cancel()
        if self._writer is not None:
            self._writer.transport.abort()

    # --- for the protocol --------------------------------------------------------

    def received(self, data: bytes) -> None:
        """Sort what one read has brought."""
        self._heard_at = now = self._loop.time()
        passed = False
        for event in self._splitter.feed(data):
            match event:
                case PassThrough(frames):
                    self._reader.feed_data(b"".join(frames))
                    passed = True
                case Malformed():
                    self.ended(event)
                    self._reader.set_exception(AMQPConnectionError(event.reason))
                    self.abort()
                    return
                case ConnectionClosed():
                    self.closed_by_broker = event
                    self.ended(event)
                case _:
                    self._tell(event)
        if passed:
            self._fed_at = now
        elif self._splitter.is_tapping and now - self._fed_at > 1:
            # All of it was taken out; the library must not think that its peer is dead.
            self._reader.feed_data(_HEARTBEAT)
            self._fed_at = now

    def ended(self, event: Event) -> None:
        """Tell, once, that the connection is no more."""
        if self._watch is not None:
            self._watch.cancel()
        if self.end is None:
            self.end = event
            self._tell(event)

    def _tell(self, event: Event) -> None:
        if self._listener is None:
            return
        try:
            self._listener(event)
        except Exception as error:  # noqa: BLE001  -- the rest of the read is not lost over it
            self._loop.call_exception_handler(
                {"message": "a listener on an AMQP connection failed", "exception": error}
            )

    # --- silence -----------------------------------------------------------------

    def _arm(self) -> None:
        if self._heartbeat:
            deadline = self._heard_at + _SILENT_HEARTBEATS * self._heartbeat
            self._watch = self._loop.call_at(deadline, self._look)

    def _look(self) -> None:
        silence = self._loop.time() - self._heard_at
        if silence < _SILENT_HEARTBEATS * self._heartbeat:
            self._arm()
            return
        self.ended(Cut(f"nothing was heard of the broker for {silence:.0f} s"))
        self.abort()


class _Protocol(asyncio.StreamReaderProtocol, asyncio.BufferedProtocol):
    """asyncio's own, with the tap in between.

    Buffered, so that each read goes into the same memory: asyncio would otherwise ask for 256 KiB
    anew each time, though reads bring 6 KiB on average.
    """

    def __init__(
        self, tap: Tap, reader: asyncio.StreamReader, loop: asyncio.AbstractEventLoop
    ) -> None:
        super().__init__(reader, loop=loop)
        self._tap = tap
        self._buffer = memoryview(bytearray(_READ_SIZE))

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002  -- as it is declared there
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._tap.received(bytes(self._buffer[:nbytes]))

    def data_received(self, data: bytes) -> None:
        # uvloop takes every Protocol for one that is not buffered.
        self._tap.received(data)

    def eof_received(self) -> bool | None:
        self._tap.ended(Cut("the broker closed the connection without a word"))
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._tap.ended(Cut("the connection was closed" if exc is None else f"{exc}"))
        super().connection_lost(exc)
