"""Finds a broker that answers among several addresses, and explains why one cannot be reached.

Both wires for RabbitMQ use it, so that a URL, TLS options and hosts mean the same to them, and
their errors have the same words. No error contains a password.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

from aio_pika_batch.adapters import tls
from aio_pika_batch.adapters.url import Address, parse_url
from aio_pika_batch.errors import (
    AccessRefused,
    BrokerUnavailable,
    ConfigurationError,
    TransportError,
)
from aio_pika_batch.logs import KeywordLogger
from aio_pika_batch.transport import Endpoint

_log = KeywordLogger(logging.getLogger("aio_pika_batch.connection"))

CLOSE_TIMEOUT = 3.0
"""Seconds that the broker has to confirm a close. After it, the socket is dropped."""

_ALERT_TIMEOUT = 2.0
"""Seconds that a broker has to say why it ends a connection after the TLS handshake."""

# Unlike a name server that cannot be reached at the moment.
_NO_SUCH_NAME = {
    getattr(socket, name) for name in ("EAI_NONAME", "EAI_NODATA") if hasattr(socket, name)
}

T = TypeVar("T")


class _UnknownHost(AccessRefused):
    """The host name does not exist. For this address, it is as final as a refusal."""


async def connect_to_first(endpoint: Endpoint, connect: Callable[[Address], Awaitable[T]]) -> T:
    """Call *connect* with one address of the URL after another, in random order, until it succeeds.

    Raises:
        AccessRefused: At least one broker answered, and none accepted the connection; or no host
            name exists.
        BrokerUnavailable: No broker answered.
    """
    addresses = parse_url(endpoint.url)
    errors: list[TransportError] = []
    # In random order, so that the connections spread over the nodes of a cluster.
    for address in random.sample(addresses, len(addresses)):
        try:
            return await connect(address)
        except BrokerUnavailable as error:
            errors.append(await _lost_alert(endpoint, address, error) or error)
        except TransportError as error:
            errors.append(error)
    if len(errors) == 1 and not isinstance(errors[0], _UnknownHost):
        raise errors[0]
    refusals = [error for error in errors if isinstance(error, AccessRefused)]
    if len(refusals) < len(errors):
        # One wrong name among hosts that are only down. Those are worth another attempt.
        refusals = [error for error in refusals if not isinstance(error, _UnknownHost)]
    last = (refusals or errors)[-1]
    kind = AccessRefused if refusals else BrokerUnavailable
    text = "; ".join(map(str, errors))
    raise kind(text if len(errors) == 1 else f"no address can be used: {text}") from last


async def tls_context(endpoint: Endpoint, address: Address) -> ssl.SSLContext | None:
    """Return the TLS context for a connection; None if it is not encrypted.

    Raises:
        BrokerUnavailable: A file cannot be read.
    """
    if not address.tls:
        return None
    try:
        return await asyncio.to_thread(tls.create_context, tls.tls_options(endpoint, address))
    except ConfigurationError as error:
        # It was valid at the start, so the files are probably being replaced: try again later.
        raise BrokerUnavailable(f"{address} was not tried: {error}") from error


async def _lost_alert(
    endpoint: Endpoint, address: Address, error: BrokerUnavailable
) -> AccessRefused | None:
    """Return why TLS connections to this address are reset; None if that is another failure.

    By TLS 1.3 a client's certificate is checked after the client's handshake has ended. If the
    client has sent anything by then, the connection is reset, and the broker's alert is often lost
    with it: of 150 connections without a certificate, 64 didn't receive it. So this connects again,
    and sends nothing.
    """
    resets = (ConnectionResetError, BrokenPipeError)
    if not (address.tls and any(isinstance(cause, resets) for cause in causes_of(error))):
        return None
    try:
        context = await tls_context(endpoint, address)
        async with asyncio.timeout(_ALERT_TIMEOUT):
            reader, writer = await asyncio.open_connection(address.host, address.port, ssl=context)
            try:
                await reader.read(1)
            finally:
                writer.transport.abort()
    except (OSError, TransportError) as alert:
        found = network_error(alert, address)
        if isinstance(found, AccessRefused):
            found.__cause__ = alert
            return found
    return None


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception, its cause, the cause of that, and so on."""
    while error is not None:
        yield error
        error = error.__cause__


def network_error(  # noqa: PLR0911  -- one for each
    cause: BaseException, address: Address
) -> TransportError | None:
    """Return the error for a failure of the socket, or of TLS on it; None if it is another one."""
    match cause:
        case ssl.SSLCertVerificationError():
            return tls.verification_error(cause, address)
        case ssl.SSLEOFError():
            return unavailable(address, "the connection ended during the TLS handshake")
        case ssl.SSLError():
            return tls.handshake_error(cause, address)
        case socket.gaierror() if cause.errno in _NO_SUCH_NAME:
            return _UnknownHost(
                f"{address} cannot be reached: its name is not known: {cause.strerror};"
                f" correct the host {address.host!r} in url, or add it to the DNS"
            )
        case socket.gaierror():
            return unavailable(address, f"its name cannot be looked up: {cause.strerror}")
        case ConnectionRefusedError():
            return unavailable(address, "nothing listens there (connection refused)")
        case _:
            return None


def reason_of(error: BaseException) -> str:
    """Return an exception's text, or the name of its class if it has none."""
    return str(error) or type(error).__name__


def unavailable(address: Address, reason: str) -> BrokerUnavailable:
    """Return the error for a broker that does not answer, or not as it should."""
    return BrokerUnavailable(
        f"{address} cannot be reached: {reason}; check host and port, and that the broker runs"
    )


def mechanism_missing(address: Address) -> AccessRefused:
    """Return the error for a broker that does not offer the way to log in that the URL names."""
    mechanism = address.options.get("auth", "plain")
    return AccessRefused(
        f"{address} does not offer to log in by auth={mechanism};"
        " enable that on the broker, or remove auth from url. For external, the broker also"
        " needs a client certificate (ssl_certfile)"
    )


def login_advice(address: Address) -> str:
    """Return what to do if the broker refuses to let the user log in."""
    advice = "check user and password"
    if address.user == "guest":
        advice += "; by default, guest may connect only from the broker's own machine"
    return advice


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
