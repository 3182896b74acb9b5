"""How is a connection opened, and how does it surely come to an end?

aio-pika does what it is good at: TLS, logging in, negotiation, channels. Around it stand a time
limit that holds also where the library hangs, several addresses, and errors that say what is
wrong, where, and what to do; never with a password.
"""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import aio_pika
from aiormq.exceptions import AuthenticationError
from yarl import URL

from aio_pika_batch.adapters.aio_pika import tls
from aio_pika_batch.adapters.aio_pika.broker_errors import refused_connection
from aio_pika_batch.adapters.aio_pika.client_errors import said
from aio_pika_batch.adapters.aio_pika.events import Cut, Malformed
from aio_pika_batch.adapters.aio_pika.translate import describe, within
from aio_pika_batch.adapters.aio_pika.untapped import Untapped
from aio_pika_batch.adapters.aio_pika.wires import NOT_ASKED, new_tap, why_no_tap, without
from aio_pika_batch.errors import (
    AccessRefused,
    BrokerUnavailable,
    ConfigurationError,
    TransportError,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aiormq.abc import AbstractChannel

    from aio_pika_batch.adapters.aio_pika.tap import Tap
    from aio_pika_batch.adapters.aio_pika.urls import Address
    from aio_pika_batch.adapters.aio_pika.wires import Line
    from aio_pika_batch.transport import Endpoint

CLOSE_TIMEOUT = 3.0
"""Seconds for the broker to say goodbye; after it the socket is dropped."""


class TappedConnection(aio_pika.Connection):
    """aio-pika's own, on a socket that the tap opens."""

    def __init__(
        self,
        url: URL,
        tap: Tap | None,
        client_properties: dict[str, Any],
        context: ssl.SSLContext | None,
    ) -> None:
        super().__init__(url, ssl_context=context, client_properties=client_properties)
        if tap is not None:
            # What stands here goes on to aiormq.
            self.kwargs["transport_factory"] = tap


@dataclass(frozen=True, slots=True)
class Link:
    """One open connection.

    Attributes:
        tap: Where it could be installed.
        untapped: Stands in for it where it could not.
        is_fast: Whether messages go past the client library.
    """

    address: Address
    connection: aio_pika.Connection
    tap: Tap | None
    untapped: Untapped | None
    heartbeat: int
    is_fast: bool

    @property
    def line(self) -> Line:
        """What is known of the connection."""
        line: Line | None = self.tap or self.untapped
        assert line is not None  # noqa: S101  -- one or the other
        return line

    @property
    def frame_max(self) -> int:
        """The largest frame that may be sent."""
        if self.tap is not None:
            return self.tap.frame_max
        transport = self.connection.transport
        return transport.connection.connection_tune.frame_max if transport is not None else 0

    @property
    def broker(self) -> tuple[str, str]:
        """What it calls itself, and its version."""
        transport = self.connection.transport
        said = {} if transport is None else transport.connection.server_properties
        return str(said.get("product", "the broker")), str(
            said.get("version", "of no known version")
        )

    async def channel(self, *, confirms: bool = False) -> AbstractChannel:
        """Open a channel of the library below aio-pika. Raises what that raises."""
        transport = self.connection.transport
        if transport is None:
            raise RuntimeError("the connection is closed")
        return await transport.connection.channel(publisher_confirms=confirms)

    async def close(self) -> None:
        """Close it, in good order if the broker answers soon, and in any case."""
        line = self.line
        if isinstance(line.end, Cut | Malformed):
            line.abort()
        await within(CLOSE_TIMEOUT, self.connection.close(), line.abort)
        if self.untapped is not None:
            self.untapped.abort()


class _UnknownHost(AccessRefused):
    """There is no such name: as final as a refusal, as far as this address is concerned."""


_NO_SUCH_NAME = {
    getattr(socket, name) for name in ("EAI_NONAME", "EAI_NODATA") if hasattr(socket, name)
}
"""As against a name server that cannot be reached just now."""


async def open_link(endpoint: Endpoint, addresses: Sequence[Address]) -> Link:
    """Connect to one of the addresses, whichever comes first in a random order.

    Raises:
        AccessRefused: At least one broker answered, and none let us in; or no host has a name that
            is known.
        BrokerUnavailable: None answered.
    """
    errors: list[TransportError] = []
    for address in random.sample(addresses, len(addresses)):
        try:
            return await _open(endpoint, address)
        except TransportError as error:
            errors.append(error)
    refusals = [error for error in errors if isinstance(error, AccessRefused)]
    if len(refusals) < len(errors):
        # One wrong name among hosts that are only down: those are worth waiting for.
        refusals = [error for error in refusals if not isinstance(error, _UnknownHost)]
    last = (refusals or errors)[-1]
    kind = AccessRefused if refusals else BrokerUnavailable
    text = "; ".join(map(str, errors))
    raise kind(text if len(errors) == 1 else f"no address would do: {text}") from last


async def _open(endpoint: Endpoint, address: Address, *, tapped: bool = True) -> Link:
    context = await _context(endpoint, address)
    heartbeat = int(address.options.get("heartbeat", endpoint.heartbeat))
    tap = new_tap(heartbeat) if tapped else None
    untapped = Untapped()
    line: Line = tap or untapped
    name = address.options.get("name", endpoint.connection_name)
    connection = TappedConnection(_url(address, heartbeat), tap, {"connection_name": name}, context)
    outcome: list[BaseException] = []

    async def connect() -> None:
        try:
            await connection.connect()
        except BaseException as error:
            outcome.append(error)
            raise

    try:
        answered = await within(endpoint.connect_timeout, connect(), line.abort)
    except asyncio.CancelledError:
        await connection.close()
        raise
    if answered and not outcome:
        if tap is not None and tap.is_installed:
            return Link(address, connection, tap, None, heartbeat, endpoint.wire != "plain")
        try:
            without(endpoint, why_no_tap() or NOT_ASKED)
        except ConfigurationError:
            await within(CLOSE_TIMEOUT, connection.close(), line.abort)
            raise
        if connection.transport is not None:
            untapped.follow(connection.transport.connection)
        return Link(address, connection, None, untapped, heartbeat, is_fast=False)
    await within(CLOSE_TIMEOUT, connection.close(), line.abort)
    cause = outcome[0] if outcome else None
    if isinstance(cause, TypeError) and tap is not None and not tap.is_installed:
        # The library takes a factory otherwise than we know it, or takes none.
        without(endpoint, f"its call for a socket is not the one that we know: {cause}")
        return await _open(endpoint, address, tapped=False)
    if answered:
        raise _why(line, address, cause) from cause
    seconds = f"{endpoint.connect_timeout:g} s"
    raise _unavailable(address, f"no answer within {seconds}") from cause


async def _context(endpoint: Endpoint, address: Address) -> ssl.SSLContext | None:
    if not address.tls:
        return None
    try:
        return await asyncio.to_thread(tls.context_of, tls.papers_for(endpoint, address))
    except ConfigurationError as error:
        # It was right at start: most likely files are being replaced.
        raise BrokerUnavailable(f"{address} was not tried: {error}") from error


def _url(address: Address, heartbeat: int) -> URL:
    options = {key: value for key, value in address.options.items() if key not in tls.OPTIONS}
    return URL.build(
        scheme="amqps" if address.tls else "amqp",
        user=address.user,
        password=address.password,
        host=address.host,
        port=address.port,
        path=f"/{address.vhost}",
        query={**options, "heartbeat": str(heartbeat)},
    )


def _why(line: Line, address: Address, error: BaseException | None) -> TransportError:
    """What went wrong: the broker's own words are best, then the first cause that we know."""
    closed = line.closed_by_broker or said(error)
    if closed is not None:
        return refused_connection(closed.code, closed.text, address)
    cause = error
    while cause is not None:
        known = _known(cause, address)
        if known is not None:
            return known
        cause = cause.__cause__
    return _unavailable(address, describe(error) if error is not None else "it hung up")


def _known(cause: BaseException, address: Address) -> TransportError | None:  # noqa: PLR0911  -- one for each
    match cause:
        case ssl.SSLCertVerificationError():
            return tls.not_verified(cause, address)
        case AuthenticationError():
            asked = address.options.get("auth", "plain")
            return AccessRefused(
                f"{address} does not offer to log in by auth={asked};"
                " enable that on the broker, or leave auth out of url. By external, it wants a"
                " client certificate first (ssl_certfile)"
            )
        case ssl.SSLEOFError():
            return _unavailable(address, "the connection ended during the TLS handshake")
        case ssl.SSLError():
            return tls.handshake_failed(cause, address)
        case socket.gaierror() if cause.errno in _NO_SUCH_NAME:
            return _UnknownHost(
                f"{address} cannot be reached: its name is not known: {cause.strerror};"
                f" correct the host {address.host!r} in url, or give it that name"
            )
        case socket.gaierror():
            return _unavailable(address, f"its name cannot be looked up: {cause.strerror}")
        case ConnectionRefusedError():
            return _unavailable(address, "nobody listens there (connection refused)")
        case _:
            return None


def _unavailable(address: Address, why: str) -> BrokerUnavailable:
    return BrokerUnavailable(
        f"{address} cannot be reached: {why}; check host and port, and whether the broker runs"
    )
