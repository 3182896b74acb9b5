"""Reaches one of several brokers, and says what is wrong with those that it cannot reach.

Nothing here depends on the protocol that is spoken with them.
"""

from __future__ import annotations

import random
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeVar

from aio_pika_batch.errors import (
    AccessRefused,
    BrokerUnavailable,
    TransportError,
)

_NO_SUCH_NAME: Final = {
    getattr(socket, name) for name in ("EAI_NONAME", "EAI_NODATA") if hasattr(socket, name)
}
"""As against a name server that cannot be reached just now."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One broker, and how to log in there.

    Attributes:
        where: Its address for errors and logs, without the password.
        external: Whether to log in by the certificate in place of the password.
        tls: Reads the files that TLS needs, anew for each connection; it may block. None: no TLS.
        why_no_tls: Puts into an error what went wrong with TLS.
    """

    where: str
    host: str
    port: int
    user: str
    password: str = field(repr=False)
    vhost: str
    name: str
    heartbeat: int
    external: bool = False
    tls: Callable[[], ssl.SSLContext] | None = None
    why_no_tls: Callable[[ssl.SSLError], TransportError] | None = None

    def __str__(self) -> str:
        return self.where


class _UnknownHost(AccessRefused):
    """There is no such name: as final as a refusal, as far as this address is concerned."""


async def first_of(peers: Sequence[Peer], reach: Callable[[Peer], Awaitable[_T]]) -> _T:
    """Call *reach* with one peer after another, in a random order, until it succeeds.

    Raises:
        AccessRefused: At least one broker answered, and none let us in; or no host has a name that
            is known.
        BrokerUnavailable: None answered.
    """
    errors: list[TransportError] = []
    for peer in random.sample(peers, len(peers)):
        try:
            return await reach(peer)
        except TransportError as error:
            errors.append(error)
    refusals = [error for error in errors if isinstance(error, AccessRefused)]
    if len(refusals) < len(errors):
        # One wrong name among hosts that are only down: those are worth waiting for.
        refusals = [error for error in refusals if not isinstance(error, _UnknownHost)]
    if len(errors) == 1:
        raise errors[0]
    kind = AccessRefused if refusals else BrokerUnavailable
    text = "; ".join(map(str, errors))
    raise kind(f"no address would do: {text}") from (refusals or errors)[-1]


def unreachable(peer: Peer, error: OSError) -> TransportError:
    """Say why a socket, or TLS on it, could not be opened."""
    match error:
        case ssl.SSLEOFError():
            return unavailable(peer, "the connection ended during the TLS handshake")
        case ssl.SSLError() if peer.why_no_tls is not None:
            return peer.why_no_tls(error)
        case socket.gaierror() if error.errno in _NO_SUCH_NAME:
            return _UnknownHost(
                f"{peer} cannot be reached: its name is not known: {error.strerror};"
                f" correct the host {peer.host!r} in url, or give it that name"
            )
        case socket.gaierror():
            return unavailable(peer, f"its name cannot be looked up: {error.strerror}")
        case ConnectionRefusedError():
            return unavailable(peer, "nobody listens there (connection refused)")
        case _:
            return unavailable(peer, str(error) or type(error).__name__)


def unavailable(peer: Peer, why: str) -> BrokerUnavailable:
    """Say why a broker that may well be there soon did not answer."""
    return BrokerUnavailable(
        f"{peer} cannot be reached: {why}; check host and port, and whether the broker runs"
    )
