"""The port to a broker, and the lookup of the transport for a URL.

Sessions deliver messages in chunks, with one await for each network read instead of each message.
Only the session that delivered a message can settle it. `docs/writing-a-transport.md` explains how
to write a transport. This module exports everything that it needs: the types of the port, the
errors to raise, and parts to reuse.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, Protocol, TypeAlias, cast, runtime_checkable

from aio_pika_batch.core.message import (
    DELIVERY_COUNT,
    RETRY_COUNT_HEADER,
    DecodedSource,
    Headers,
    Message,
    Properties,
    Source,
)
from aio_pika_batch.core.publication import Copy, Outcome, Outgoing, Publication, StoredPublication
from aio_pika_batch.core.settlement import (
    Disposition,
    Frame,
    Ledger,
    Modification,
    NativeRetries,
    Settlement,
    check_modified_headers,
)
from aio_pika_batch.core.topology import (
    Binding,
    Exchange,
    PublishCheck,
    Queue,
    Topology,
    UnfulfilledWishes,
    Version,
)
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
    "AdjustableSession",
    "Binding",
    "BrokerUnavailable",
    "ConfirmingSession",
    "Copy",
    "CountingTransport",
    "DecodedSource",
    "Disposition",
    "Endpoint",
    "Exchange",
    "ExpiringSession",
    "FallingBackTransport",
    "Frame",
    "Headers",
    "InspectingTransport",
    "Ledger",
    "ListeningPublisher",
    "Message",
    "Modification",
    "ModifyingSession",
    "Native",
    "NativeRetries",
    "NativeSession",
    "Outcome",
    "Outgoing",
    "Properties",
    "ProvingSession",
    "Publication",
    "PublishCheck",
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
    "StoredPublication",
    "Subscription",
    "Topology",
    "TopologyError",
    "Transport",
    "TransportFactory",
    "UnfulfilledWishes",
    "Version",
    "VersionedTransport",
    "Wire",
    "check_modified_headers",
    "open_transport",
    "resumed_consumer_tag",
]

Wire: TypeAlias = Literal["auto", "fast", "plain", "amqp10"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """How to connect to a broker.

    Attributes:
        url: One URL, or several separated by commas. Each one can have several hosts.
        connect_timeout: Seconds for one attempt to connect, log in and open a channel.
        heartbeat: Seconds between heartbeats. A connection without any for three times as long is
            lost.
        publish_timeout: Seconds to wait for the confirm of a publication.
        connection_name: The name of the connection in the management UI.
        wire: `fast` reads and writes AMQP frames directly, `plain` uses the client library, and
            `auto` leaves the choice to the adapter. With `amqp10`, sessions use AMQP 1.0 where the
            broker and the queue allow it. For adapters that have the choice.
    """

    url: str = field(repr=False)
    # aiormq reads a `timeout` in the URL, and doesn't use it.
    connect_timeout: float = 10.0
    # aiormq's default of 60 s notices a dead peer only after three minutes.
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
    """What a session consumes.

    Attributes:
        prefetch: The maximum number of unsettled messages; 0 means no limit.
        arguments: Arguments of `basic.consume`, such as `x-priority`.
        exclusive: Whether it must be the only consumer of the queue.
        consumer_tag: Unique in its channel; at most 255 bytes.
        retry_count_header: The header that `Message.retry_count` reads.
        own: The topology to declare on the session's own connection before it consumes. An
            exclusive queue exists only as long as the connection that declared it.
        queue_type: The queue's type; None if it is not known. The end of a session on a quorum
            queue takes more care that the last settlements are carried out.
        for_copies: Whether the messages will be copied, so that nothing of them may be missing.
    """

    queue: str
    prefetch: int
    consumer_tag: str
    arguments: Headers = field(default_factory=dict)
    exclusive: bool = False
    retry_count_header: str = RETRY_COUNT_HEADER
    own: Topology = field(default_factory=Topology)
    queue_type: str | None = None
    for_copies: bool = False


@dataclass(frozen=True, slots=True)
class Native:
    """Objects of the client library, for what the port doesn't cover.

    Attributes:
        channel: A channel for declarations and publishing, separate from the consuming one.
        queue: The consumed queue, on that channel.
    """

    channel: Any
    queue: Any


class Session(Protocol):
    """One connection with one channel, whose delivery tags are valid in this session only."""

    def __aiter__(self) -> AsyncIterator[Sequence[Message]]:
        """Iterate over chunks of messages, in the order of their tags. Called once.

        The iteration ends after `cancel` and all messages that were delivered before. It raises
        SessionLost if the session ends otherwise.
        """
        ...

    async def cancel(self) -> None:
        """Stop the deliveries, and return after the broker has confirmed. Idempotent.

        Raises:
            SessionLost: The session was lost in the meantime.
        """
        ...

    async def settle(self, settlements: Sequence[Settlement]) -> None:
        """Settle messages, all or none.

        It returns when the frames have been sent. A broker doesn't confirm them.

        Raises:
            SettlementError: A tag is settled already or was never delivered. Nothing was sent.
            SessionLost: The session was lost. The broker delivers the messages again.
            SessionClosed: The session was closed before.
        """
        ...


@runtime_checkable
class PumpingSession(Protocol):
    """A session that can also pass chunks to a function as soon as they arrive.

    Iteration wakes a task for each network read. A pumping session doesn't need to.
    """

    async def pump(self, sink: Callable[[Sequence[Message]], None]) -> None:
        """Call `sink` with each chunk, in the order of their tags, instead of an iteration.

        It returns after `cancel` and all messages that were delivered before.

        Raises:
            SessionLost: The session was lost.
            Exception: The exception that `sink` raised. It isn't called again.
        """
        ...


@runtime_checkable
class AdjustableSession(Protocol):
    """A session that can also pause its deliveries, and resume them with another prefetch.

    A consumer that meets a message that may crash its process handles it while it holds no other.
    """

    async def pause(self) -> None:
        """Stop the deliveries, and return after the broker has confirmed. Idempotent.

        What was delivered before is still handed out. The iteration doesn't end, and settlements
        go on.

        Raises:
            SessionLost: The session was lost in the meantime.
        """
        ...

    async def resume(self, prefetch: int) -> None:
        """Let the broker deliver again after a pause. It does nothing after `cancel`.

        Args:
            prefetch: How many messages that are delivered from now on may be unsettled; 0 means no
                limit. Those that were delivered before the pause don't count.

        Raises:
            SessionLost: The session was lost, or the broker refuses to deliver again.
        """
        ...


def resumed_consumer_tag(consumer_tag: str, number: int) -> str:
    """Return the consumer tag after this many pauses, cut to what a tag may have.

    A quorum queue still knows a cancelled consumer that has unsettled messages. Under the same tag
    it would go on counting these, so that a new prefetch count couldn't be relied on. When the
    channel is closed, the messages return in the order of the tags: the numbers have leading zeros.
    """
    return f"{consumer_tag.encode()[:240].decode(errors='ignore')}-{number:06}"


@runtime_checkable
class ProvingSession(Protocol):
    """A session that also knows which of its settlements the broker has certainly received.

    One that doesn't have this waits for that in `settle`, or can't know it.
    """

    @property
    def unproven(self) -> int:
        """The number of settled messages that the broker may deliver again.

        It can be read after the end of the session. Then it is 0 if the session was closed in an
        orderly way.
        """
        ...


@runtime_checkable
class ModifyingSession(Protocol):
    """A session that can also change messages in their queue, so that retries need no copies."""

    @property
    def retries(self) -> NativeRetries:
        """What is possible with this queue on this broker. It doesn't change."""
        ...

    async def modify(
        self, modifications: Sequence[Modification], settlements: Sequence[Settlement] = ()
    ) -> None:
        """Modify messages and give them back, all or none.

        Args:
            settlements: What is settled with them, all or none: other messages of a batch.

        Raises:
            SettlementError: A tag is settled already or was never delivered, a header is refused
                (see `check_modified_headers`), or the queue can't delay messages. Nothing was sent.
            SessionLost: The session was lost. The broker delivers the messages again.
            SessionClosed: The session was closed before.
        """
        ...


@runtime_checkable
class ConfirmingSession(Protocol):
    """A session that can also wait until its settlements have been carried out.

    If it is a `ProvingSession`, too, the consumer logs how many are in doubt.
    """

    async def settled(self) -> None:
        """Return when the broker has carried out all that was settled before this call.

        It is called after `cancel`. Nothing is settled while it waits, and it can be cancelled.

        Raises:
            SessionLost: The session was lost in the meantime.
        """
        ...


@runtime_checkable
class ExpiringSession(Protocol):
    """A session that can also end its iteration by itself, so that another one can replace it."""

    @property
    def is_expired(self) -> bool:
        """Whether the iteration ends, or has ended, for this reason."""
        ...


@runtime_checkable
class NativeSession(Protocol):
    """A session that can also return objects of its client library."""

    async def native(self) -> Native:
        """Return a channel for the user, separate from the consuming one; opened once."""
        ...


class Publisher(Protocol):
    """One connection for publishing with confirms, separate from those of all sessions."""

    # Under a memory alarm the broker stops reading from connections that have published, so acks on
    # the same connection would have to wait.

    async def publish(self, publications: Sequence[Outgoing]) -> Sequence[Outcome]:
        """Publish all messages, and wait for the broker's answers.

        A :class:`~aio_pika_batch.core.publication.Copy` keeps the properties of its original,
        except for a `user_id` other than the connection's own.

        Returns:
            One outcome for each message, in order. It is `Outcome.UNKNOWN` if the connection was
            lost, or if there was no answer for `publish_timeout`; neither raises an error.
            A copy, or a row of an outbox (`StoredPublication`), that can't be encoded is
            `Outcome.UNPUBLISHABLE`, and doesn't affect the others.

        Raises:
            PublishError: A `Publication` can't be encoded. Nothing was sent.
        """
        ...

    @property
    def is_open(self) -> bool:
        """Whether another `publish` can succeed. Once False, it stays False."""
        ...


@runtime_checkable
class ListeningPublisher(Protocol):
    """A publisher that can also report answers that come after `publish` has returned.

    If `on_late` is set, `publish` waits for `publish_timeout` and no longer, and the publisher
    stays open after that: a late confirm is as good as any other.

    Attributes:
        on_late: Called with a publication whose outcome was `Outcome.UNKNOWN`, once the broker has
            answered. The outcome is `Outcome.UNKNOWN` again if the connection was lost instead.
    """

    on_late: Callable[[Outgoing, Outcome], None] | None


class Transport(Protocol):
    """The way to one broker."""

    async def declare(self, topology: Topology) -> Mapping[str, UnfulfilledWishes] | None:
        """Declare and check the topology, on channels of its own.

        An empty topology checks that the broker can be reached and grants access.

        Returns:
            What existing queues were declared without, by name; None if that is unknown.

        Raises:
            TopologyError: An entity differs, is missing, or may not be declared or published to.
            AccessRefused: The broker refuses access.
            BrokerUnavailable: The broker cannot be reached (yet).
        """
        ...

    def session(self, subscription: Subscription) -> AbstractAsyncContextManager[Session]:
        """Open a connection and consume. Leaving the context ends both.

        Entering raises the errors of `declare`. Messages that are unsettled on leaving return to
        the queue.
        """
        ...

    def publisher(self) -> AbstractAsyncContextManager[Publisher]:
        """Open a connection for publishing. Leaving the context closes it.

        Entering raises the errors of `declare`, except TopologyError.
        """
        ...


@runtime_checkable
class VersionedTransport(Protocol):
    """A transport that also knows the version of the RabbitMQ it is connected to."""

    @property
    def broker_version(self) -> Version | None:
        """The version at the last `declare`; None before that, and for other products."""
        ...


@runtime_checkable
class InspectingTransport(Protocol):
    """A transport that can also find out the type of an exchange."""

    async def exchange_type(self, exchange: Exchange) -> str | None:
        """The type that it has on the broker, if any; None if that is unknown."""
        ...


@runtime_checkable
class FallingBackTransport(Protocol):
    """A transport that can also use another protocol for a while, for messages that need it."""

    @property
    def fallbacks(self) -> int:
        """How often a message made a session fail, so that later ones use the other protocol."""
        ...


@runtime_checkable
class CountingTransport(Protocol):
    """A transport that can also count the messages in a queue."""

    async def count(self, queue: str) -> int:
        """The number of ready messages in a queue, without those that are delivered and unsettled.

        Raises the errors of `declare`.
        """
        ...


TransportFactory: TypeAlias = Callable[[Endpoint], Transport]
"""The type of an entry point in the group `aio_pika_batch.transports`. Its name is a URL scheme."""


# -- the transport for a URL ----------------------------------------------------------------------

GROUP = "aio_pika_batch.transports"

_SCHEME = re.compile(r"\s*([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
"""RFC 3986, section 3.1. Anything else can be a part of a password."""

_ONE_SERVER = re.compile(
    r"\w+://(?:[^/?#@]*@)?(?P<host>\[[^\]@]*\]|[^/?#@,:\[\]]*)(?::(?P<port>\d{1,5}))?(?:[/?][^,@]*)?"
)
PORTS = {"amqp": 5672, "amqps": 5671}

_RABBITMQ = "aio_pika_batch.adapters.rabbitmq:open_transport"
# By name, so that no client library is imported before it is needed.
_BUILT_IN = {
    "amqp": _RABBITMQ,
    "amqps": _RABBITMQ,
    "memory": "aio_pika_batch.adapters.memory:open_transport",
}


def scheme_of(url: str) -> str:
    """The scheme of a URL, in lower case; empty if it has no valid one."""
    found = _SCHEME.match(url)
    return found[1].lower() if found else ""


def server_of(url: str) -> tuple[str, int] | None:
    """The host and port of the broker; None if the URL doesn't have exactly one."""
    found = _ONE_SERVER.fullmatch(url.strip())
    default = PORTS.get(scheme_of(url))
    if found is None or default is None:
        return None
    host = found["host"].removeprefix("[").removesuffix("]")
    return host or "localhost", int(found["port"] or default)


def is_known_scheme(scheme: str) -> bool:
    """Whether a URL scheme has a transport."""
    # To look through all installed packages takes milliseconds.
    return scheme in _BUILT_IN or scheme in known_schemes()


def known_schemes() -> list[str]:
    """All URL schemes that have a transport, sorted."""
    return sorted({*_BUILT_IN, *entry_points(group=GROUP).names})


def open_transport(endpoint: Endpoint) -> Transport:
    """Create the transport for the URL of an endpoint.

    Raises:
        ConfigurationError: Its scheme has no transport, or several, or one that cannot be imported.
    """
    scheme = scheme_of(endpoint.url)
    entry_point = _entry_point(scheme)
    try:
        factory = cast("TransportFactory", entry_point.load())
    except Exception as error:
        # A module can raise anything while it is imported. The error names the package, because the
        # URL is right.
        what = f"{_describe(entry_point)}, {type(error).__name__}: {error}"
        raise ConfigurationError(
            f"url: the transport for {scheme}:// cannot be imported ({what});"
            " install what it needs, or use another scheme"
        ) from error
    return factory(endpoint)


def _entry_point(scheme: str) -> EntryPoint:
    if scheme in _BUILT_IN:
        return EntryPoint(scheme, _BUILT_IN[scheme], GROUP)
    # The same package can be found twice on the path, by a link or an editable install. If two
    # packages have the same scheme, their order on the path must not decide where messages go.
    match list(dict.fromkeys(entry_points(group=GROUP, name=scheme))):
        case [only]:
            return only
        case []:
            known = ", ".join(known_schemes())
            msg = f"url: no transport serves {scheme}://; use one of {known}"
        case several:
            msg = (
                f"url: {scheme}:// is served by {' and by '.join(map(_describe, several))};"
                " uninstall all but one, or pass the transport in"
            )
    raise ConfigurationError(msg)


def _describe(entry_point: EntryPoint) -> str:
    installed = entry_point.dist
    return f"{entry_point.value} of {installed.name}" if installed else entry_point.value
