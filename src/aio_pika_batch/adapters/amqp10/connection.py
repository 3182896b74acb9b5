"""Opens a connection to one of several brokers over AMQP 1.0, keeps it alive, and ends it for sure.

Laws:

- What ended a connection is told once, and nothing after it.
- A broker that is silent for three heartbeats is dead. It hears from us twice as often as it asks.
- Logging in and closing have a time limit each, at which the socket is dropped.
- No error shows a password.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, TypeAlias, TypeVar

from aio_pika_batch.adapters.amqp10 import spec
from aio_pika_batch.adapters.amqp10.broker_errors import no_mechanism, refused_login, why_ended
from aio_pika_batch.adapters.amqp10.codec import Array, Symbol, UInt, UShort
from aio_pika_batch.adapters.amqp10.frames import (
    SIGN_OF_LIFE,
    Event,
    FrameParser,
    ProtocolHeader,
    Received,
    Transferred,
    Violation,
    pack,
)
from aio_pika_batch.adapters.amqp10.performatives import (
    Close,
    Error,
    Init,
    Mechanisms,
    Open,
    Record,
    SaslOutcome,
)
from aio_pika_batch.adapters.amqp10.reaching import Peer, first_of, unavailable, unreachable
from aio_pika_batch.adapters.amqp10.transfers import Transfers
from aio_pika_batch.core.topology import Version, parse_version
from aio_pika_batch.errors import (
    BrokerUnavailable,
    ConfigurationError,
)

FRAME_MAX: Final = 2**20
"""Bytes of the largest frame that a broker may send."""

CLOSE_TIMEOUT: Final = 3.0
"""Seconds for the broker to confirm a close."""

_SILENT_HEARTBEATS: Final = 3
_READ_SIZE: Final = 2**18

_R = TypeVar("_R", bound=Record)


class Lost(NamedTuple):
    """The connection is no more.

    Attributes:
        error: What the broker said, if it closed the connection.
    """

    reason: str
    error: Error | None = None


class Unexplained(BrokerUnavailable):
    """The broker hung up instead of opening the connection.

    It does so for a virtual host that isn't there, for a missing permission and for limits; logging
    in over AMQP 0-9-1 tells which.
    """


Listener: TypeAlias = Callable[[Transferred | Received | Lost], None]


async def open_connection(peers: Sequence[Peer], timeout: float) -> Connection:
    """Connect to one of the brokers and log in.

    Raises:
        AccessRefused: At least one broker answered, and none let us in; or no host has a name that
            is known.
        BrokerUnavailable: None answered.
    """

    async def reach(peer: Peer) -> Connection:
        return await _open(peer, timeout)

    return await first_of(peers, reach)


async def _open(peer: Peer, timeout: float) -> Connection:
    connection = Connection(peer)
    try:
        context = None if peer.tls is None else await asyncio.to_thread(peer.tls)
        async with asyncio.timeout(timeout):
            await asyncio.get_running_loop().create_connection(
                lambda: connection, peer.host, peer.port, ssl=context
            )
            await connection.log_in()
    except TimeoutError as error:
        connection.abort()
        raise unavailable(peer, f"no answer within {timeout:g} s") from error
    except ConfigurationError as error:
        # It was right at start: most likely files are being replaced.
        raise BrokerUnavailable(f"{peer} was not tried: {error}") from error
    except OSError as error:
        connection.abort()
        raise unreachable(peer, error) from error
    except BaseException:
        connection.abort()
        raise
    return connection


class Connection(asyncio.BufferedProtocol):
    """One connection: its socket, its frames, its signs of life.

    Attributes:
        version: Of the RabbitMQ at the other end; None if it is something else.
    """

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.version: Version | None = None
        self._loop = asyncio.get_running_loop()
        self._parser = FrameParser(FRAME_MAX)
        # Buffered, so that each read goes into the same memory: asyncio would otherwise ask for
        # 256 KiB anew each time, though reads bring a few KiB.
        self._buffer = memoryview(bytearray(_READ_SIZE))
        self._transport: asyncio.Transport | None = None
        self._listener: Listener | None = None
        self._early: deque[Event | Lost] = deque()
        self._news: asyncio.Future[None] | None = None
        self._end: Lost | None = None
        self._failure: OSError | None = None
        self._is_closing = False
        self._heard_at = self._loop.time()
        self._timers: list[asyncio.TimerHandle] = []
        self._clogged: asyncio.Future[None] | None = None

    # --- for its session ---------------------------------------------------------------

    def listen(self, listener: Listener) -> None:
        """Tell *listener* what comes from now on, and what has come since `log_in`."""
        self._listener = listener
        while self._early:
            self._tell(self._early.popleft())

    def receive(self, transfers: Transfers) -> None:
        """Make messages of the transfers of this link."""
        self._parser.receive(transfers)

    def write(self, frames: list[bytes]) -> None:
        """Send frames and clear the list; after the end they are dropped."""
        if self._end is None and self._transport is not None and frames:
            self._transport.write(b"".join(frames))
        frames.clear()

    @property
    def is_clogged(self) -> bool:
        """Whether so much is waiting to be sent that a writer should `drain`."""
        return self._clogged is not None

    async def drain(self) -> None:
        """Wait until most of what was written is sent, or the connection is no more."""
        if self._clogged is not None:
            await asyncio.shield(self._clogged)

    def abort(self) -> None:
        """Drop the socket, whatever is still to be sent."""
        for timer in self._timers:
            timer.cancel()
        if self._transport is not None:
            self._transport.abort()

    async def close(self) -> None:
        """Close it, in good order if the broker answers soon, and in any case."""
        try:
            if self._end is None:
                self._is_closing = True
                self.write([pack(Close())])
                async with asyncio.timeout(CLOSE_TIMEOUT):
                    while self._end is None:
                        await self._wait()
        except TimeoutError:
            pass
        finally:
            self.abort()

    # --- logging in --------------------------------------------------------------------

    async def log_in(self) -> None:
        """Log in and open the connection.

        Raises:
            AccessRefused: The broker doesn't let us in.
            BrokerUnavailable: It hung up, or answered with something else.
        """
        peer = self.peer
        await self._greet(spec.SASL_HEADER)
        offered = (await self._expect(Mechanisms)).sasl_server_mechanisms
        mechanism = Symbol("EXTERNAL" if peer.external else "PLAIN")
        if mechanism not in (offered if isinstance(offered, Array) else [offered]):
            raise no_mechanism(peer, str(mechanism).lower())
        response = b"" if peer.external else f"\0{peer.user}\0{peer.password}".encode()
        self.write([pack(Init(mechanism, response), 0, spec.SASL_FRAME)])
        if (await self._expect(SaslOutcome)).code != 0:
            raise refused_login(peer)
        await self._greet(spec.AMQP_HEADER)
        # The broker sends something twice in the time that it is allowed to be silent.
        idle = UInt(2000 * peer.heartbeat) if peer.heartbeat else None
        self.write([pack(Open(peer.name, f"vhost:{peer.vhost}", UInt(FRAME_MAX), UShort(0), idle))])
        try:
            opened = await self._expect(Open)
        except Unexplained as error:
            raise Unexplained(
                f"{peer} hung up instead of opening the connection of user {peer.user!r}; check"
                f" whether the virtual host {peer.vhost!r} exists and the user may use it"
            ) from error
        properties = opened.properties or {}
        self.version = parse_version(str(properties.get("product")), str(properties.get("version")))
        if opened.idle_time_out:
            self._send_signs_of_life(opened.idle_time_out / 2000)
        if peer.heartbeat:
            self._watch()

    async def _greet(self, header: bytes) -> None:
        self.write([header])
        refusal = "it does not speak AMQP 1.0, as RabbitMQ does since 4.0"
        try:
            answer = await self._next()
        except Unexplained as error:
            raise unavailable(self.peer, f"{refusal}, or hung up") from error
        if answer != ProtocolHeader(header):
            raise unavailable(self.peer, refusal)

    async def _expect(self, kind: type[_R]) -> _R:
        match await self._next():
            case Received(_, record) if isinstance(record, kind):
                return record
            case Received(_, Close(error)):
                raise BrokerUnavailable(
                    f"{self.peer} refused the connection of user {self.peer.user!r}:"
                    f" {why_ended('connection', error)}; try again later"
                )
            case event:
                raise unavailable(self.peer, f"it answered with {type(event).__name__}")

    async def _next(self) -> Event:
        while not self._early:
            await self._wait()
        event = self._early.popleft()
        if isinstance(event, Lost):
            if isinstance(self._failure, ssl.SSLError):
                # Under TLS 1.3 a broker refuses a certificate only after the handshake.
                raise self._failure
            raise Unexplained(f"{self.peer} hung up: {event.reason}; check whether the broker runs")
        return event

    async def _wait(self) -> None:
        self._news = self._loop.create_future()
        try:
            await self._news
        finally:
            self._news = None

    # --- signs of life -----------------------------------------------------------------

    def _send_signs_of_life(self, seconds: float) -> None:
        def send() -> None:
            self.write([SIGN_OF_LIFE])
            self._send_signs_of_life(seconds)

        self._after(seconds, send)

    def _watch(self) -> None:
        limit = _SILENT_HEARTBEATS * self.peer.heartbeat
        silence = self._loop.time() - self._heard_at
        if silence < limit:
            self._after(limit - silence, self._watch)
            return
        self._ended(f"nothing was heard of the broker for {silence:.0f} s")
        self.abort()

    def _after(self, seconds: float, call: Callable[[], None]) -> None:
        now = self._loop.time()
        self._timers = [timer for timer in self._timers if timer.when() > now]
        if self._end is None:
            self._timers.append(self._loop.call_later(seconds, call))

    # --- for asyncio -------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is open."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101
        self._transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        """Where the next read goes."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Something has come."""
        self.data_received(bytes(self._buffer[:nbytes]))

    def data_received(self, data: bytes) -> None:
        """The same; uvloop takes every protocol for one that isn't buffered."""
        self._heard_at = self._loop.time()
        for event in self._parser.feed(data):
            if self._end is not None:
                return
            match event:
                case Violation(reason):
                    self._ended(f"the broker broke AMQP 1.0: {reason}")
                    self.abort()
                    return
                case Received(_, Close(error)) if self._listener is not None:
                    self.write([] if self._is_closing else [pack(Close())])
                    self._ended(why_ended("connection", error), error)
                case _:
                    self._tell(event)

    def eof_received(self) -> None:
        """The broker has hung up."""
        self._ended("the broker closed the connection without a reason")

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is closed."""
        if isinstance(exc, OSError):
            self._failure = exc
        self._ended("the connection was closed" if exc is None else str(exc))
        self.resume_writing()

    def pause_writing(self) -> None:
        """Too much waits to be sent."""
        if self._clogged is None:
            self._clogged = self._loop.create_future()

    def resume_writing(self) -> None:
        """Enough has been sent."""
        if self._clogged is not None:
            self._clogged.set_result(None)
            self._clogged = None

    def _ended(self, reason: str, error: Error | None = None) -> None:
        if self._end is None:
            self._end = Lost(reason, error)
            for timer in self._timers:
                timer.cancel()
            self._tell(self._end)

    def _tell(self, event: Event | Lost) -> None:
        if self._listener is None:
            self._early.append(event)
        elif isinstance(event, Transferred | Received | Lost):
            self._listener(event)
        if self._news is not None and not self._news.done():
            self._news.set_result(None)
