"""Opens a connection to one of several brokers, and closes it within seconds.

aio-pika handles TLS, logging in, negotiation and channels. This module adds a time limit that holds
even if the library hangs, several addresses, and errors that say what is wrong, where, and what to
do. No error contains a password.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import ssl
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote

import aio_pika
from aiormq.exceptions import AuthenticationError
from yarl import URL

from aio_pika_batch.adapters.aio_pika import tls
from aio_pika_batch.adapters.aio_pika.client_errors import (
    close_reason,
    connection_error,
    finish_within,
    format_error,
)
from aio_pika_batch.adapters.aio_pika.events import ConnectionLost, Malformed
from aio_pika_batch.adapters.aio_pika.frame_tap import FrameTap
from aio_pika_batch.errors import (
    AccessRefused,
    BrokerUnavailable,
    ConfigurationError,
    TransportError,
)
from aio_pika_batch.logs import KeywordLogger

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiormq.channel import Channel

    from aio_pika_batch.adapters.aio_pika.url import Address
    from aio_pika_batch.transport import Endpoint

_log = KeywordLogger(logging.getLogger("aio_pika_batch.connection"))

CLOSE_TIMEOUT = 3.0
"""Seconds that the broker has to confirm a close. After it, the socket is dropped."""


_is_ours: ContextVar[bool] = ContextVar("aio_pika_batch_connection", default=False)
"""Whether a task belongs to a connection of this library. The tasks that aiormq starts inherit it,
and so its lines about other connections of the program are left alone."""

_REPORTED = (
    "error when creating transport",
    "Cancelling cause reader exited abnormally",
    "Unexpected connection close from remote",
    "Server connection %r was stuck",
)
"""The beginnings of aiormq's lines about events that the worker or the publisher reports itself."""


def _is_unreported(record: logging.LogRecord) -> bool:
    return not (_is_ours.get() and str(record.msg).startswith(_REPORTED))


# aiormq logs the failure of each attempt to connect. We report changes only.
logging.getLogger("aiormq.connection").addFilter(_is_unreported)


class TappedConnection(aio_pika.Connection):
    """An aio-pika connection whose socket is opened by a frame tap."""

    def __init__(
        self,
        url: URL,
        tap: FrameTap,
        client_properties: dict[str, Any],
        context: ssl.SSLContext | None,
    ) -> None:
        super().__init__(url, ssl_context=context, client_properties=client_properties)
        # aio-pika passes these on to aiormq.
        self.kwargs["transport_factory"] = tap


class LoopMonitor:
    """Logs when the event loop was blocked for longer than a heartbeat interval.

    A blocked loop sends no heartbeats, so the broker takes the client for dead. The error that the
    client then gets says nothing about the cause.
    """

    def __init__(self, heartbeat: int) -> None:
        self._heartbeat = heartbeat
        self._loop = asyncio.get_running_loop()
        self._schedule()

    def _schedule(self) -> None:
        # Twice per interval: a block that takes longer makes at least one of the timers late.
        self._due = self._loop.time() + self._heartbeat / 2
        self._timer = self._loop.call_at(self._due, self._on_timer)

    def _on_timer(self) -> None:
        late = self._loop.time() - self._due
        if late > self._heartbeat / 2:
            _log.warning(
                "the event loop was blocked: the broker may cut the connection",
                seconds=f"{late:.1f}",
                heartbeat=self._heartbeat,
            )
        self._schedule()

    def stop(self) -> None:
        """Watch no longer."""
        self._timer.cancel()


@dataclass(frozen=True, slots=True)
class OpenConnection:
    """One open connection.

    Attributes:
        is_fast: Whether messages bypass the client library.
        monitor: Watches the event loop as long as the connection is open; None if nothing does.
    """

    address: Address
    connection: aio_pika.Connection
    tap: FrameTap
    is_fast: bool
    monitor: LoopMonitor | None = None

    @property
    def product(self) -> tuple[str, str]:
        """The broker's product name and version."""
        transport = self.connection.transport
        properties = {} if transport is None else transport.connection.server_properties
        return str(properties.get("product", "the broker")), str(
            properties.get("version", "of no known version")
        )

    @property
    def is_rabbitmq(self) -> bool:
        """Whether the broker calls itself RabbitMQ."""
        return self.product[0] == "RabbitMQ"

    async def channel(self, *, confirms: bool = False) -> Channel:
        """Open a channel of aiormq. Raises what aiormq raises."""
        transport = self.connection.transport
        if transport is None:
            raise RuntimeError("the connection is closed")
        return cast("Channel", await transport.connection.channel(publisher_confirms=confirms))

    async def close(self) -> None:
        """Close the connection, gracefully if the broker answers soon."""
        if self.monitor is not None:
            self.monitor.stop()
        if isinstance(self.tap.end, ConnectionLost | Malformed):
            # No answer will come. aiormq would wait for it.
            self.tap.abort()
        await finish_within(CLOSE_TIMEOUT, self.connection.close(), self.tap.abort)


class _UnknownHost(AccessRefused):
    """The host name does not exist. For this address, it is as final as a refusal."""


# Unlike a name server that cannot be reached at the moment.
_NO_SUCH_NAME = {
    getattr(socket, name) for name in ("EAI_NONAME", "EAI_NODATA") if hasattr(socket, name)
}


async def open_connection(
    endpoint: Endpoint, addresses: Sequence[Address], *, watches_loop: bool = False
) -> OpenConnection:
    """Connect to the first of the addresses that answers, in random order.

    Args:
        watches_loop: Whether to log when the event loop is blocked for too long.

    Raises:
        AccessRefused: At least one broker answered, and none accepted the connection; or no host
            name exists.
        BrokerUnavailable: No broker answered.
        ConfigurationError: The installed aiormq cannot be used.
    """
    errors: list[TransportError] = []
    # In random order, so that the connections spread over the nodes of a cluster.
    for address in random.sample(addresses, len(addresses)):
        try:
            return await _connect(endpoint, address, watches_loop=watches_loop)
        except TransportError as error:
            errors.append(error)
    refusals = [error for error in errors if isinstance(error, AccessRefused)]
    if len(refusals) < len(errors):
        # One wrong name among hosts that are only down. Those are worth another attempt.
        refusals = [error for error in refusals if not isinstance(error, _UnknownHost)]
    last = (refusals or errors)[-1]
    kind = AccessRefused if refusals else BrokerUnavailable
    text = "; ".join(map(str, errors))
    raise kind(text if len(errors) == 1 else f"no address can be used: {text}") from last


async def _connect(endpoint: Endpoint, address: Address, *, watches_loop: bool) -> OpenConnection:
    context = await _tls_context(endpoint, address)
    heartbeat = int(address.options.get("heartbeat", endpoint.heartbeat))
    tap = FrameTap(heartbeat)
    name = address.options.get("name", endpoint.connection_name)
    connection = TappedConnection(_url(address, heartbeat), tap, {"connection_name": name}, context)
    failure: BaseException | None = None

    async def connect() -> None:
        nonlocal failure
        _is_ours.set(True)  # in this task, and those that it starts
        try:
            await connection.connect()
        except BaseException as error:
            failure = error
            raise

    # Not asyncio.timeout: aiormq's connect may ignore its cancellation.
    try:
        has_ended = await finish_within(endpoint.connect_timeout, connect(), tap.abort)
    except asyncio.CancelledError:
        await connection.close()
        raise
    if has_ended and failure is None and tap.is_installed:
        monitor = LoopMonitor(heartbeat) if watches_loop and heartbeat else None
        return OpenConnection(address, connection, tap, endpoint.wire != "plain", monitor)
    await finish_within(CLOSE_TIMEOUT, connection.close(), tap.abort)
    if not tap.is_installed and (failure is None or isinstance(failure, TypeError)) and has_ended:
        # aiormq has opened the socket itself, or has failed at the unknown argument.
        raise ConfigurationError(
            f"the installed aiormq {version('aiormq')} does not open its socket by"
            " transport_factory, which this library needs; install aiormq 7.2.4 or newer"
        ) from failure
    if has_ended:
        raise _connect_error(tap, address, failure) from failure
    seconds = f"{endpoint.connect_timeout:g} s"
    raise _unavailable(address, f"no answer within {seconds}") from failure


async def _tls_context(endpoint: Endpoint, address: Address) -> ssl.SSLContext | None:
    if not address.tls:
        return None
    try:
        return await asyncio.to_thread(tls.create_context, tls.tls_options(endpoint, address))
    except ConfigurationError as error:
        # It was valid at the start, so the files are probably being replaced: try again later.
        raise BrokerUnavailable(f"{address} was not tried: {error}") from error


def _url(address: Address, heartbeat: int) -> URL:
    options = {key: value for key, value in address.options.items() if key not in tls.OPTIONS}
    url = URL.build(
        scheme="amqps" if address.tls else "amqp",
        user=address.user,
        password=address.password,
        host=address.host,
        port=address.port,
    )
    # Encoded here: yarl would take the virtual host ".." for a step up.
    url = url.with_path(f"/{quote(address.vhost, safe='')}", encoded=True)
    return url.with_query({**options, "heartbeat": str(heartbeat)})


def _connect_error(
    tap: FrameTap, address: Address, failure: BaseException | None
) -> TransportError:
    """Make an error of the broker's reason if there is one, else of the first known cause."""
    closed = tap.closed or close_reason(failure)
    if closed is not None:
        return connection_error(closed, address)
    cause = failure
    while cause is not None:
        error = _known_error(cause, address)
        if error is not None:
            return error
        cause = cause.__cause__
    reason = "the broker closed the connection" if failure is None else format_error(failure)
    return _unavailable(address, reason)


def _known_error(cause: BaseException, address: Address) -> TransportError | None:  # noqa: PLR0911  -- one for each
    match cause:
        case ssl.SSLCertVerificationError():
            return tls.verification_error(cause, address)
        case AuthenticationError():
            mechanism = address.options.get("auth", "plain")
            return AccessRefused(
                f"{address} does not offer to log in by auth={mechanism};"
                " enable that on the broker, or remove auth from url. For external, the broker also"
                " needs a client certificate (ssl_certfile)"
            )
        case ssl.SSLEOFError():
            return _unavailable(address, "the connection ended during the TLS handshake")
        case ssl.SSLError():
            return tls.handshake_error(cause, address)
        case socket.gaierror() if cause.errno in _NO_SUCH_NAME:
            return _UnknownHost(
                f"{address} cannot be reached: its name is not known: {cause.strerror};"
                f" correct the host {address.host!r} in url, or add it to the DNS"
            )
        case socket.gaierror():
            return _unavailable(address, f"its name cannot be looked up: {cause.strerror}")
        case ConnectionRefusedError():
            return _unavailable(address, "nothing listens there (connection refused)")
        case _:
            return None


def _unavailable(address: Address, reason: str) -> BrokerUnavailable:
    return BrokerUnavailable(
        f"{address} cannot be reached: {reason}; check host and port, and that the broker runs"
    )
