"""Which way do a connection's messages go: past the client library, or through it?

The tap needs an aiormq that lets its user open the socket. Where it can be had, it is installed,
on the plain wire too: there it guards the library against what it cannot decode.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

from aio_pika_batch.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiormq.abc import AbstractChannel

    from aio_pika_batch.adapters.aio_pika.events import ConnectionClosed, Event
    from aio_pika_batch.adapters.aio_pika.tap import Tap
    from aio_pika_batch.transport import Endpoint

_log = logging.getLogger("aio_pika_batch.wire")

NOT_ASKED = "the client library opened the socket by itself"


class Line(Protocol):
    """What is known of a connection, by a tap or without one."""

    @property
    def end(self) -> Event | None:
        """What ended it, if something did."""

    @property
    def closed_by_broker(self) -> ConnectionClosed | None:
        """Why the broker closed it, if it told."""

    def watch(self, channel: AbstractChannel, listener: Callable[[Event], None]) -> None:
        """Tell when the broker closes this channel."""

    def abort(self) -> None:
        """Drop it, as far as that is possible."""


def why_no_tap() -> str | None:
    """Why the tap cannot be installed here; None where it can."""
    try:
        import aio_pika_batch.adapters.aio_pika.tap
    except ImportError as error:
        return f"this aiormq does not let its user open the socket: {error}"
    del aio_pika_batch
    return None


def new_tap(heartbeat: int) -> Tap | None:
    """A tap for one connection, where it can be installed."""
    if why_no_tap() is not None:
        return None
    from aio_pika_batch.adapters.aio_pika.tap import Tap

    return Tap(heartbeat)


def check(endpoint: Endpoint) -> None:
    """Refuse the fast wire where there is none; where it is only preferred, say so.

    Raises:
        ConfigurationError: It says why.
    """
    reason = why_no_tap()
    if reason is not None:
        without(endpoint, reason)


def without(endpoint: Endpoint, reason: str) -> None:
    """Go on without a tap, or refuse to. Raises ConfigurationError."""
    if endpoint.wire == "fast":
        raise ConfigurationError(
            f"wire='fast' cannot be had: {reason}; use wire='auto', or another aiormq"
        )
    if endpoint.wire == "auto":
        _say(reason)


@lru_cache(maxsize=8)  # once, however many connections there will be
def _say(reason: str) -> None:
    _log.warning(
        "the plain wire is used: %s; a message costs some fifteen times the CPU, and one whose"
        " properties the client library cannot decode ends the connection",
        reason,
    )
