"""Opens a connection over AMQP 1.0, keeps it alive, and closes it within seconds.

Laws:

- The end of a connection is reported once, and nothing after it.
- A broker that is silent for three heartbeats is taken for dead. It gets heartbeats twice as often
  as it asks for.
- Logging in and closing have a time limit each. After it, the socket is dropped.
- No error contains a password.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple, TypeAlias, TypeVar

from aio_pika_batch.adapters.amqp10 import spec
from aio_pika_batch.adapters.amqp10.codec import Array, Symbol, UInt, UShort
from aio_pika_batch.adapters.amqp10.frames import (
    HEARTBEAT,
    Frames10Parser,
    ProtocolHeader,
    ReceivedRecord,
    TransferredMessages,
    Violation,
    WireEvent,
    pack,
)
from aio_pika_batch.adapters.amqp10.performatives import (
    Close,
    Init,
    Mechanisms,
    Open,
    PeerError,
    Record,
    SaslOutcome,
)
from aio_pika_batch.adapters.amqp10.transfers import Transfers
from aio_pika_batch.adapters.connecting import (
    CLOSE_TIMEOUT,
    LoopMonitor,
    connect_to_first,
    login_advice,
    mechanism_missing,
    network_error,
    reason_of,
    tls_context,
    unavailable,
)
from aio_pika_batch.adapters.url import Address
from aio_pika_batch.core.topology import Version, parse_version
from aio_pika_batch.errors import AccessRefused, BrokerUnavailable
from aio_pika_batch.transport import Endpoint

FRAME_MAX: Final = 2**20
"""Bytes of the largest frame that a broker may send."""

LAST_CHANNEL: Final = 1
"""The highest channel number: one session consumes, and one looks at the queue before."""

_SILENT_HEARTBEATS: Final = 3
_READ_SIZE: Final = 2**18

_R = TypeVar("_R", bound=Record)


class Disconnected(NamedTuple):
    """The connection has ended.

    Attributes:
        error: The broker's error, if it closed the connection.
    """

    reason: str
    error: PeerError | None = None


class _HungUp(BrokerUnavailable):
    """The broker closed the socket instead of an answer."""


class Amqp10Unsupported(BrokerUnavailable):
    """The broker doesn't speak AMQP 1.0."""


Listener: TypeAlias = Callable[[TransferredMessages | ReceivedRecord | Disconnected], None]


def end_reason(what: str, error: PeerError | None) -> str:
    """Return why the broker ended a link, a session or a connection, in words."""
    if error is None:
        return f"the broker ended the {what} without a reason"
    if error.condition == "amqp:resource-deleted":
        return f"the broker ended the {what}: the queue was deleted or is unavailable"
    return f"the broker ended the {what}: {error}"


async def open_amqp10(endpoint: Endpoint) -> Amqp10Connection:
    """Connect to one of the brokers and log in; see `connect_to_first`."""
    return await connect_to_first(endpoint, lambda address: _open(endpoint, address))


async def _open(endpoint: Endpoint, address: Address) -> Amqp10Connection:
    connection = Amqp10Connection(endpoint, address)
    context = await tls_context(endpoint, address)
    timeout = endpoint.connect_timeout
    try:
        async with asyncio.timeout(timeout):
            await asyncio.get_running_loop().create_connection(
                lambda: connection, address.host, address.port, ssl=context
            )
            await connection.log_in()
    except TimeoutError as error:
        connection.abort()
        raise unavailable(address, f"no answer within {timeout:g} s") from error
    except OSError as error:
        connection.abort()
        raise network_error(error, address) or unavailable(address, reason_of(error)) from error
    except BaseException:
        connection.abort()
        raise
    connection.watch()
    return connection


class Amqp10Connection(asyncio.BufferedProtocol):
    """One connection: its socket, frames and heartbeats.

    Attributes:
        version: The version of RabbitMQ; None for other products.
    """

    def __init__(self, endpoint: Endpoint, address: Address) -> None:
        self.address = address
        self.version: Version | None = None
        self._name = address.options.get("name", endpoint.connection_name)
        self._heartbeat = int(address.options.get("heartbeat", endpoint.heartbeat))
        self._loop = asyncio.get_running_loop()
        self._parser = Frames10Parser(FRAME_MAX)
        # Buffered, so that each read goes into the same memory: asyncio would otherwise allocate
        # 256 KiB for each read, of which most bring a few KiB.
        self._buffer = memoryview(bytearray(_READ_SIZE))
        self._transport: asyncio.Transport | None = None
        self._listener: Listener | None = None
        self._early: deque[WireEvent | Disconnected] = deque()
        self._arrival: asyncio.Future[None] | None = None
        self._end: Disconnected | None = None
        self._failure: OSError | None = None
        self._is_closing = False
        self._last_read = self._loop.time()
        self._monitor: LoopMonitor | None = None
        self._timers: list[asyncio.TimerHandle] = []
        self._clogged: asyncio.Future[None] | None = None

    # --- for its session ---------------------------------------------------------------

    def listen(self, listener: Listener) -> None:
        """Call *listener* with each event from now on, and with those since `log_in`."""
        self._listener = listener
        while self._early:
            self._emit(self._early.popleft())

    def receive(self, transfers: Transfers) -> None:
        """Make messages of the transfers of this link from now on."""
        self._parser.receive(transfers)

    def write(self, frames: list[bytes]) -> None:
        """Send frames and clear the list; after the end of the connection they are dropped."""
        if self._end is None and self._transport is not None and frames:
            self._transport.write(b"".join(frames))
        frames.clear()

    @property
    def is_clogged(self) -> bool:
        """Whether so much is waiting to be sent that a writer should `drain`."""
        return self._clogged is not None

    async def drain(self) -> None:
        """Wait until most of what was written is sent, or the connection has ended."""
        if self._clogged is not None:
            await asyncio.shield(self._clogged)

    def abort(self) -> None:
        """Drop the socket, and what is still to be sent."""
        self._stop_timers()
        if self._transport is not None:
            self._transport.abort()

    async def close(self) -> None:
        """Close the connection, gracefully if the broker answers soon."""
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
            AccessRefused: The broker refuses the login.
            BrokerUnavailable: It hung up, or its answer was something else.
        """
        address = self.address
        await self._exchange_headers(spec.SASL_HEADER)
        offered = (await self._expect(Mechanisms)).sasl_server_mechanisms
        is_external = address.options.get("auth", "plain").lower() == "external"
        mechanism = Symbol("EXTERNAL" if is_external else "PLAIN")
        if mechanism not in (offered if isinstance(offered, Array) else [offered]):
            raise mechanism_missing(address)
        response = b"" if is_external else f"\0{address.user}\0{address.password}".encode()
        self.write([pack(Init(mechanism, response), 0, spec.SASL_FRAME)])
        if (await self._expect(SaslOutcome)).code != 0:
            raise AccessRefused(
                f"{address} refused the login of user {address.user!r}; {login_advice(address)}"
            )
        await self._exchange_headers(spec.AMQP_HEADER)
        # The broker sends something twice in the time that it is allowed to be silent.
        idle = UInt(2000 * self._heartbeat) if self._heartbeat else None
        vhost = f"vhost:{address.vhost}"
        opening = Open(self._name, vhost, UInt(FRAME_MAX), UShort(LAST_CHANNEL), idle)
        self.write([pack(opening)])
        try:
            opened = await self._expect(Open)
        except _HungUp as error:
            # RabbitMQ gives no reason in this phase.
            raise BrokerUnavailable(
                f"{address} hung up instead of opening the connection of user {address.user!r};"
                f" check that the virtual host {address.vhost!r} exists, that the user may use it,"
                " and that no limit of connections is reached"
            ) from error
        properties = opened.properties or {}
        self.version = parse_version(str(properties.get("product")), str(properties.get("version")))
        if opened.idle_time_out:
            self._send_heartbeats(opened.idle_time_out / 2000)

    async def _exchange_headers(self, header: bytes) -> None:
        self.write([header])
        try:
            answer = await self._next()
        except _HungUp as error:
            raise unavailable(self.address, "it closed the connection during the login") from error
        if answer != ProtocolHeader(header):
            raise Amqp10Unsupported(
                f"{self.address} does not speak AMQP 1.0, as RabbitMQ does since 4.0;"
                ' use wire="auto"'
            )

    async def _expect(self, kind: type[_R]) -> _R:
        match await self._next():
            case ReceivedRecord(_, record) if isinstance(record, kind):
                return record
            case ReceivedRecord(_, Close(error)):
                raise BrokerUnavailable(
                    f"{self.address} refused the connection of user {self.address.user!r}:"
                    f" {end_reason('connection', error)}; try again later"
                )
            case event:
                raise unavailable(self.address, f"it answered with {type(event).__name__}")

    async def _next(self) -> WireEvent:
        while not self._early:
            await self._wait()
        event = self._early.popleft()
        if isinstance(event, Disconnected):
            if isinstance(self._failure, ssl.SSLError):
                # Under TLS 1.3 a broker refuses a certificate only after the handshake.
                raise self._failure
            raise _HungUp(event.reason) from self._failure
        return event

    async def _wait(self) -> None:
        self._arrival = self._loop.create_future()
        try:
            await self._arrival
        finally:
            self._arrival = None

    # --- heartbeats --------------------------------------------------------------------

    def watch(self) -> None:
        """From now on, end the connection if the broker is silent for too long."""
        if self._heartbeat:
            self._monitor = LoopMonitor(self._heartbeat)
            self._check_silence()

    def _send_heartbeats(self, seconds: float) -> None:
        def send() -> None:
            self.write([HEARTBEAT])
            self._send_heartbeats(seconds)

        self._after(seconds, send)

    def _check_silence(self) -> None:
        limit = _SILENT_HEARTBEATS * self._heartbeat
        silence = self._loop.time() - self._last_read
        if silence < limit:
            self._after(limit - silence, self._check_silence)
            return
        self._on_end(f"the broker has sent nothing for {silence:.0f} s")
        self.abort()

    def _after(self, seconds: float, call: Callable[[], None]) -> None:
        now = self._loop.time()
        self._timers = [timer for timer in self._timers if timer.when() > now]
        if self._end is None:
            self._timers.append(self._loop.call_later(seconds, call))

    def _stop_timers(self) -> None:
        for timer in self._timers:
            timer.cancel()
        if self._monitor is not None:
            self._monitor.stop()

    # --- for asyncio -------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the socket's transport."""
        assert isinstance(transport, asyncio.Transport)  # noqa: S101
        self._transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        """Return where the next read goes."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Take what a read has brought."""
        self.data_received(bytes(self._buffer[:nbytes]))

    def data_received(self, data: bytes) -> None:
        """Take what a read has brought: uvloop calls this for every protocol."""
        self._last_read = self._loop.time()
        for event in self._parser.feed(data):
            if self._end is not None:
                return
            match event:
                case Violation(reason):
                    self._on_end(f"the broker violated AMQP 1.0: {reason}")
                    self.abort()
                    return
                case ReceivedRecord(_, Close(error)) if self._listener is not None:
                    self.write([] if self._is_closing else [pack(Close())])
                    self._on_end(end_reason("connection", error), error)
                case _:
                    self._emit(event)

    def eof_received(self) -> None:
        """Handle the end of the stream."""
        self._on_end("the broker closed the connection without a reason")

    def connection_lost(self, exc: Exception | None) -> None:
        """Take the end of the socket."""
        if isinstance(exc, OSError):
            self._failure = exc
        self._on_end("the connection was closed" if exc is None else str(exc))
        self.resume_writing()

    def pause_writing(self) -> None:
        """Make writers wait: too much is to be sent."""
        if self._clogged is None:
            self._clogged = self._loop.create_future()

    def resume_writing(self) -> None:
        """Let writers go on."""
        if self._clogged is not None:
            self._clogged.set_result(None)
            self._clogged = None

    def _on_end(self, reason: str, error: PeerError | None = None) -> None:
        if self._end is None:
            self._end = Disconnected(reason, error)
            self._stop_timers()
            self._emit(self._end)

    def _emit(self, event: WireEvent | Disconnected) -> None:
        if self._listener is None:
            self._early.append(event)
        elif isinstance(event, TransferredMessages | ReceivedRecord | Disconnected):
            self._listener(event)
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)
