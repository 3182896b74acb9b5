"""Opens a connection to one of several brokers, and closes it within seconds.

aio-pika handles TLS, logging in, negotiation and channels. This module adds a time limit that holds
even if the library hangs, several addresses, and errors that say what is wrong, where, and what to
do. No error contains a password. Its requests may have every name that RabbitMQ accepts.
"""

from __future__ import annotations

import asyncio
import logging
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote

import aio_pika
from aiormq.exceptions import AuthenticationError
from pamqp.commands import Basic, Exchange, Queue
from yarl import URL

from aio_pika_batch.adapters.aio_pika.client_errors import (
    close_reason,
    connection_error,
    finish_within,
    translate_errors,
)
from aio_pika_batch.adapters.aio_pika.events import ConnectionLost, Malformed
from aio_pika_batch.adapters.aio_pika.frame_tap import FrameTap
from aio_pika_batch.adapters.connecting import (
    CLOSE_TIMEOUT,
    LoopMonitor,
    causes_of,
    connect_to_first,
    mechanism_missing,
    network_error,
    reason_of,
    tls_context,
    unavailable,
)
from aio_pika_batch.adapters.tls import OPTIONS
from aio_pika_batch.core.refusals import refusal_error
from aio_pika_batch.errors import BrokerUnavailable, ConfigurationError, TransportError

if TYPE_CHECKING:
    import ssl
    from contextlib import AbstractContextManager

    from aiormq.channel import Channel

    from aio_pika_batch.adapters.url import Address
    from aio_pika_batch.transport import Endpoint

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


# --- requests --------------------------------------------------------------------


class _AnyName:
    """A request whose names pamqp doesn't check.

    It refuses names of queues and exchanges that don't match its pattern, such as those with an
    umlaut or a quotation mark. RabbitMQ takes any text of at most 255 bytes.
    """

    def validate(self) -> None:
        """Accept every name. Settings and the topology have checked its length."""


class ExchangeDeclare(_AnyName, Exchange.Declare):
    """`exchange.declare` of any name."""


class QueueDeclare(_AnyName, Queue.Declare):
    """`queue.declare` of any name."""


class QueueBind(_AnyName, Queue.Bind):
    """`queue.bind` of any names."""


class BasicConsume(_AnyName, Basic.Consume):
    """`basic.consume` of any queue."""


# --- connections -----------------------------------------------------------------


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


async def open_connection(endpoint: Endpoint, *, watches_loop: bool = False) -> OpenConnection:
    """Connect to the first of the URL's addresses that answers, in random order.

    Args:
        watches_loop: Whether to log when the event loop is blocked for too long.

    Raises:
        AccessRefused: At least one broker answered, and none accepted the connection; or no host
            name exists.
        BrokerUnavailable: No broker answered.
        ConfigurationError: The installed aiormq cannot be used.
    """
    return await connect_to_first(
        endpoint, lambda address: _connect(endpoint, address, watches_loop=watches_loop)
    )


async def _connect(endpoint: Endpoint, address: Address, *, watches_loop: bool) -> OpenConnection:
    context = await tls_context(endpoint, address)
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
    raise unavailable(address, f"no answer within {seconds}") from failure


def starting(connection: OpenConnection, subject: str, event: str) -> AbstractContextManager[None]:
    """Translate what the client library raises while something is started on a connection.

    Args:
        connection: The open connection.
        subject: What the broker may refuse.
        event: What happens meanwhile, if the connection ends.
    """
    address = connection.address

    def failed(error: BaseException) -> TransportError:
        closed = connection.tap.closed or close_reason(error)
        if closed is not None:
            return refusal_error(closed.code, closed.text, f"{subject} at {address}")
        return BrokerUnavailable(
            f"{address} ended the connection while {event}: {reason_of(error)}"
        )

    return translate_errors(failed)


def _url(address: Address, heartbeat: int) -> URL:
    options = {key: value for key, value in address.options.items() if key not in OPTIONS}
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
    for cause in causes_of(failure):
        if isinstance(cause, AuthenticationError):
            return mechanism_missing(address)
        error = network_error(cause, address)
        if error is not None:
            return error
    reason = "the broker closed the connection" if failure is None else reason_of(failure)
    return unavailable(address, reason)
