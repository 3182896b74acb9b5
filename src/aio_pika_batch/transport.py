"""The port: all that this library asks of a broker.

Messages travel in chunks, one await for each network read, never one for each message. What a
session hands out, only that session can settle. A transport is found by the scheme of its URL, or
passed in as an object; `docs/writing-a-transport.md` tells how to write one. All that this takes is
found here: what the port speaks of, the errors that it raises, and the parts that are shared.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, Protocol, TypeAlias, cast, runtime_checkable

from aio_pika_batch.core.message import (
    DELIVERY_COUNT,
    DecodedSource,
    Headers,
    Message,
    Properties,
    Source,
)
from aio_pika_batch.core.publication import Copy, Outcome, Outgoing, Publication
from aio_pika_batch.core.settlement import Disposition, Frame, Ledger, Settlement
from aio_pika_batch.core.topology import Binding, Exchange, Queue, Topology, Version
from aio_pika_batch.errors import (
    AccessRefused,
    BrokerUnavailable,
    ConfigurationError,
    PublishError,
    SessionClosed,
    SessionLost,
    SettlementError,
    TopologyError,
)

__all__ = [
    "DELIVERY_COUNT",
    "AccessRefused",
    "Binding",
    "BrokerUnavailable",
    "Copy",
    "CountingTransport",
    "DecodedSource",
    "Disposition",
    "Endpoint",
    "Exchange",
    "Frame",
    "Headers",
    "Ledger",
    "Message",
    "Native",
    "NativeSession",
    "Outcome",
    "Outgoing",
    "Properties",
    "Publication",
    "PublishError",
    "Publisher",
    "PumpingSession",
    "Queue",
    "Session",
    "SessionClosed",
    "SessionLost",
    "Settlement",
    "SettlementError",
    "Source",
    "Subscription",
    "Topology",
    "TopologyError",
    "Transport",
    "TransportFactory",
    "Version",
    "VersionedTransport",
    "Wire",
    "open_transport",
]

Wire: TypeAlias = Literal["auto", "fast", "plain"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """How to reach a broker.

    Attributes:
        url: One URL, or several, comma-separated; each may name several hosts.
        connect_timeout: Seconds for one attempt to connect, log in and open a channel.
        heartbeat: Seconds between signs of life; a peer silent for three of them is dead.
        publish_timeout: Seconds to wait for the confirmation of a publication.
        connection_name: How the broker's management shows the connection.
        wire: Whether messages go past the client library (`fast`), through it (`plain`), or past it
            where that can be had (`auto`). For adapters that have such a choice.
    """

    url: str = field(repr=False)
    connect_timeout: float = 10.0
    heartbeat: int = 30
    publish_timeout: float = 10.0
    connection_name: str = "aio-pika-batch"
    ssl_cafile: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    ssl_key_password: str | None = field(default=None, repr=False)
    wire: Wire = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subscription:
    """What a session consumes, and how.

    Attributes:
        prefetch: The most unsettled messages at a time; 0 means no limit.
        arguments: For `basic.consume`, such as `x-priority`.
        exclusive: Whether to be the queue's only consumer.
        consumer_tag: Unique in its channel; at most 255 bytes.
        retry_count_header: The header that `Message.retry_count` reads.
        own: Declared on the session's own connection before it consumes: an exclusive queue lives
            and dies with the connection that declared it.
    """

    queue: str
    prefetch: int
    consumer_tag: str
    arguments: Headers = field(default_factory=dict)
    exclusive: bool = False
    retry_count_header: str = "x-retry-count"
    own: Topology = field(default_factory=Topology)


@dataclass(frozen=True, slots=True)
class Native:
    """The broker library's own objects, for what the port does not cover.

    Attributes:
        channel: A channel apart from the consuming one, for declarations and publishes.
        queue: The consumed queue, on that channel.
    """

    channel: Any
    queue: Any


class Session(Protocol):
    """One connection, one channel, one epoch of delivery tags."""

    def __aiter__(self) -> AsyncIterator[Sequence[Message]]:
        """Chunks of messages in the order of their tags; iterated once.

        It ends after `cancel`, when everything that was delivered before has been handed out, and
        raises SessionLost when the world ends the session.
        """
        ...

    async def cancel(self) -> None:
        """Ask for no more messages; returns once the broker has confirmed. Idempotent.

        Raises:
            SessionLost: It was lost meanwhile.
        """
        ...

    async def settle(self, settlements: Sequence[Settlement]) -> None:
        """Tell the broker what became of some messages, all or nothing.

        It returns when the frames are on their way; a broker does not confirm them.

        Raises:
            SettlementError: A tag is settled already or was never delivered; nothing was sent.
            SessionLost: The world ended the session; nothing was sent, or nothing of it counts.
            SessionClosed: The session is over.
        """
        ...


@runtime_checkable
class PumpingSession(Protocol):
    """A session that can also hand chunks over in the moment they arrive.

    Iteration wakes a task for each network read, this does not.
    """

    async def pump(self, sink: Callable[[Sequence[Message]], None]) -> None:
        """Call `sink` with each chunk, in the order of their tags, instead of being iterated.

        Returns after `cancel`, when everything that was delivered before has been handed over.

        Raises:
            SessionLost: The world ended the session.
            Exception: What `sink` raised; it is not called again.
        """
        ...


@runtime_checkable
class NativeSession(Protocol):
    """A session that can also hand out its broker library's own objects."""

    async def native(self) -> Native:
        """Open (once) a channel for the user, apart from the consuming one."""
        ...


class Publisher(Protocol):
    """One connection for confirmed publishing, apart from every session's."""

    async def publish(self, publications: Sequence[Outgoing]) -> Sequence[Outcome]:
        """Publish, pipelined, and wait for the broker's word on each.

        A :class:`~aio_pika_batch.core.publication.Copy` keeps its original's properties; of its
        `user_id` only the connection's own is kept.

        Returns:
            An outcome for each, in order. A lost connection makes `Outcome.UNKNOWN` of whatever was
            not confirmed, and so does silence for `publish_timeout`; nothing is raised for either.
        """
        ...

    @property
    def is_open(self) -> bool:
        """Whether another `publish` may succeed; once False, it stays False."""
        ...


class Transport(Protocol):
    """A broker, to be reached."""

    async def declare(self, topology: Topology) -> None:
        """Declare and check, on channels of its own. Where there is nothing to declare, it is seen
        all the same whether the broker is there and lets us in.

        Raises:
            TopologyError: The broker has it otherwise, or not at all, or does not allow it.
            AccessRefused: The broker does not let us in.
            BrokerUnavailable: There is no broker (yet).
        """
        ...

    def session(self, subscription: Subscription) -> AbstractAsyncContextManager[Session]:
        """Open a connection and consume; leaving the context closes both.

        Entering raises what `declare` raises. Whatever is unsettled on leaving goes back to the
        queue.
        """
        ...

    def publisher(self) -> AbstractAsyncContextManager[Publisher]:
        """Open a connection for publishing; leaving the context closes it.

        Entering raises what `declare` raises, but TopologyError.
        """
        ...


@runtime_checkable
class VersionedTransport(Protocol):
    """A transport that also knows which RabbitMQ it has reached."""

    @property
    def broker_version(self) -> Version | None:
        """Of the broker that was declared on last; None before that, and of other products."""
        ...


@runtime_checkable
class CountingTransport(Protocol):
    """A transport that also knows how many messages wait in a queue."""

    async def count(self, queue: str) -> int:
        """How many messages are ready in a queue; those that are handed out do not count.

        Raises what `declare` raises.
        """
        ...


TransportFactory: TypeAlias = Callable[[Endpoint], Transport]
"""What an entry point of the group `aio_pika_batch.transports` names, under a URL scheme."""


GROUP = "aio_pika_batch.transports"

_SCHEME = re.compile(r"\s*([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
"""RFC 3986, section 3.1; anything else may be part of a password."""

_ONE_SERVER = re.compile(
    r"\w+://(?:[^/?#@]*@)?(?P<host>\[[^\]@]*\]|[^/?#@,:\[\]]*)(?::(?P<port>\d{1,5}))?(?:[/?][^,@]*)?"
)
_PORTS = {"amqp": 5672, "amqps": 5671}

_AIO_PIKA = "aio_pika_batch.adapters.aio_pika.transport:open_transport"
_BUILT_IN = {
    "amqp": _AIO_PIKA,
    "amqps": _AIO_PIKA,
    "memory": "aio_pika_batch.adapters.memory:open_transport",
}


def scheme_of(url: str) -> str:
    """The scheme of a URL, in lower case; empty if it has none, or something that can be none."""
    found = _SCHEME.match(url)
    return found[1].lower() if found else ""


def server_of(url: str) -> tuple[str, int] | None:
    """Host and port of the broker; None if the URL names none, or several."""
    found = _ONE_SERVER.fullmatch(url.strip())
    default = _PORTS.get(scheme_of(url))
    if found is None or default is None:
        return None
    host = found["host"].removeprefix("[").removesuffix("]")
    return host or "localhost", int(found["port"] or default)


def known_schemes() -> list[str]:
    """Every scheme that some transport serves, sorted."""
    return sorted({*_BUILT_IN, *entry_points(group=GROUP).names})


def open_transport(endpoint: Endpoint) -> Transport:
    """Make the transport that serves an endpoint.

    Raises:
        ConfigurationError: No transport serves its scheme, or several do, or the one that does
            cannot be imported.
    """
    scheme = scheme_of(endpoint.url)
    entry_point = _entry_point(scheme)
    try:
        factory = cast("TransportFactory", entry_point.load())
    except Exception as error:
        # Whatever a module raises while it is imported, it is of no use.
        what = f"{_named(entry_point)}, {type(error).__name__}: {error}"
        msg = (
            f"url: the transport for {scheme}:// cannot be imported ({what});"
            " install what it needs, or use another scheme"
        )
        raise ConfigurationError(msg) from error
    return factory(endpoint)


def _entry_point(scheme: str) -> EntryPoint:
    if scheme in _BUILT_IN:
        return EntryPoint(scheme, _BUILT_IN[scheme], GROUP)
    # What is found twice on the path, by a link or an editable install, is still one.
    match list(dict.fromkeys(entry_points(group=GROUP, name=scheme))):
        case [only]:
            return only
        case []:
            msg = f"url: no transport serves {scheme}://; known are {', '.join(known_schemes())}"
        case several:
            msg = (
                f"url: {scheme}:// is served by {' and by '.join(map(_named, several))};"
                " uninstall all but one, or pass the transport in"
            )
    raise ConfigurationError(msg)


def _named(entry_point: EntryPoint) -> str:
    installed = entry_point.dist
    return f"{entry_point.value} of {installed.name}" if installed else entry_point.value
