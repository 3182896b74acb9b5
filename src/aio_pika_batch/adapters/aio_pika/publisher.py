"""How are many messages published at once, and each one's fate known?

On a channel in confirm mode, with books of our own; how they are sent is the wire's. Its connection
is its own, too: under a memory alarm the broker stops reading from a connection that has published,
and acks on it would wait with the publications.

Laws:

- Nothing is raised for what the world does: it is an
  :class:`~aio_pika_batch.core.publication.Outcome`.
- Once one outcome is in doubt, the publisher takes no more: its successor begins with empty books.
- A call's time runs out in silence only: with each confirm that is heard it begins anew.
- Nothing is written on a channel that the broker has closed.
"""

from __future__ import annotations

import asyncio
import logging
import re
from abc import ABC, abstractmethod
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from aio_pika_batch.adapters.aio_pika.broker_errors import (
    ACCESS_REFUSED,
    NOT_FOUND,
    PRECONDITION_FAILED,
    refused_entity,
)
from aio_pika_batch.adapters.aio_pika.client_errors import said
from aio_pika_batch.adapters.aio_pika.confirms import Books, Call, Entry
from aio_pika_batch.adapters.aio_pika.connection import CLOSE_TIMEOUT, Link
from aio_pika_batch.adapters.aio_pika.events import (
    ChannelClosed,
    ChannelGone,
    Confirms,
    ConnectionClosed,
    Cut,
    Malformed,
    Returned,
)
from aio_pika_batch.adapters.aio_pika.frame_writer import fits, publish_method
from aio_pika_batch.adapters.aio_pika.properties import encode
from aio_pika_batch.adapters.aio_pika.splice import splice
from aio_pika_batch.adapters.aio_pika.tables import encode_text
from aio_pika_batch.adapters.aio_pika.translate import describe, translated, within
from aio_pika_batch.core.publication import Copy, Outcome
from aio_pika_batch.errors import BrokerUnavailable, PublishError, SessionClosed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from aiormq.abc import AbstractChannel

    from aio_pika_batch.adapters.aio_pika.events import Event
    from aio_pika_batch.core.publication import Outgoing

_log = logging.getLogger("aio_pika_batch.publisher")

_LARGEST_BODY = re.compile(r"configured max size (\d+)")


class AioPikaPublisher(ABC):
    """Implements :class:`~aio_pika_batch.transport.Publisher`, but for the sending."""

    def __init__(self, link: Link, timeout: float) -> None:
        self._link = link
        self._timeout = timeout
        self._user = encode_text(link.address.user)
        self._loop = asyncio.get_running_loop()
        self._channel: AbstractChannel | None = None
        self._number = 0
        self._frame_max = 0
        self._books = Books()
        self._heard_at = self._loop.time()
        self._is_open = False
        self._closed = False

    async def open(self, timeout: float) -> None:
        """Open the channel. Raises BrokerUnavailable."""
        address = self._link.address

        def failed(error: BaseException) -> Exception:
            closed = self._link.line.closed_by_broker or said(error)
            if closed is not None:
                return refused_entity(closed.code, closed.text, "a channel", address)
            return BrokerUnavailable(
                f"{address} hung up while a channel was opened: {describe(error)}"
            )

        with translated(failed):
            async with asyncio.timeout(timeout):
                self._channel = channel = await self._link.channel(confirms=True)
        self._number = channel.number
        self._frame_max = self._link.frame_max
        self._attach(channel)
        self._is_open = True

    @property
    def is_open(self) -> bool:
        """Whether another `publish` may succeed; once False, it stays False."""
        return self._is_open

    async def publish(self, publications: Sequence[Outgoing]) -> Sequence[Outcome]:
        """Publish, pipelined, and wait for the broker's word on each."""
        if self._closed:
            raise SessionClosed("the publisher is closed")
        if not publications:
            return []
        done: asyncio.Future[None] = self._loop.create_future()
        call = Call(len(publications), lambda: _resolve(done))
        # All of it is packed before any of it is sent: a header of the wrong type sends nothing.
        packed = [self._pack(publication) for publication in publications]
        try:
            async with self._patience():
                await self._write(call, publications, packed)
                await done
        except TimeoutError:
            # A confirm that comes later belongs to nobody.
            self._is_open = False
        return [Outcome.UNKNOWN if outcome is None else outcome for outcome in call.outcomes]

    @asynccontextmanager
    async def _patience(self) -> AsyncIterator[None]:
        """Raise TimeoutError after so long a silence; a confirm costs no timer."""
        began = self._loop.time()
        timer: asyncio.TimerHandle

        def look() -> None:
            nonlocal timer
            due = max(began, self._heard_at) + self._timeout
            if due > self._loop.time():
                timer = self._loop.call_at(due, look)
            else:
                limit.reschedule(due)

        async with asyncio.timeout(None) as limit:
            timer = self._loop.call_at(began + self._timeout, look)
            try:
                yield
            finally:
                timer.cancel()

    async def close(self) -> None:
        """Close channel and connection. Never raises, but for the cancellation of its task."""
        self._closed = True
        self._end(unknown)
        try:
            line = self._link.line
            if self._channel is not None and line.end is None:
                await within(CLOSE_TIMEOUT, self._channel.close(), line.abort)
        finally:
            await self._link.close()

    # --- writing -----------------------------------------------------------------------

    @abstractmethod
    def _attach(self, channel: AbstractChannel) -> None:
        """Have what the broker says on this channel told to `_heard`."""

    def _pack(self, publication: Outgoing) -> tuple[bytes, bytes] | None:
        """Pack method and properties; None if a copy's have become too large for a frame."""
        properties = self._properties(publication)
        method = publish_method(
            self._number,
            publication.exchange,
            publication.routing_key,
            mandatory=publication.mandatory,
        )
        if fits(properties, self._frame_max):
            return method, properties
        text = (
            f"the properties of a message to {publication.exchange!r} have {len(properties)} bytes;"
            f" they must fit into one frame of {self._frame_max}"
        )
        if not isinstance(publication, Copy):
            raise PublishError(text)
        _log.warning("%s: not published", text)
        return None

    def _properties(self, publication: Outgoing) -> bytes:
        if not isinstance(publication, Copy):
            return encode(publication.properties)
        raw = publication.message.raw_properties
        if raw is not None:
            return splice(raw, publication, self._user)
        values = publication.properties
        if values.user_id != self._link.address.user:
            values = replace(values, user_id=None)
        return encode(values)

    @abstractmethod
    async def _write(
        self,
        call: Call,
        publications: Sequence[Outgoing],
        packed: Sequence[tuple[bytes, bytes] | None],
    ) -> None:
        """Send, and enter into the books; what could not be packed is refused."""

    # --- what the wire tells -------------------------------------------------------------

    def _heard(self, event: Event) -> None:
        match event:
            case Confirms(confirms):
                self._heard_at = self._loop.time()
                for confirm in confirms:
                    self._books.confirm(confirm)
            case Returned():
                self._books.returned(event)
            case ChannelClosed(code, text):
                _log.warning("the broker closed a publisher's channel: %s %s", code, text)
                self._end(_Verdict(code, text, alone=len(self._books) == 1))
            case ConnectionClosed() | Malformed() | Cut() | ChannelGone():
                self._end(unknown)
            case _:
                # Nothing is consumed on this channel.
                pass

    def _end(self, outcome: Callable[[Entry], Outcome]) -> None:
        self._is_open = False
        self._books.end(outcome)


class _Verdict:
    """Which of the publications in flight has the broker closed the channel over?

    Only that one is refused for sure; others may have been stored before it.
    """

    def __init__(self, code: int, text: str, *, alone: bool) -> None:
        self._is_refusal = code in {ACCESS_REFUSED, NOT_FOUND, PRECONDITION_FAILED}
        self._text = text
        self._alone = alone
        largest = _LARGEST_BODY.search(text)
        self._largest = int(largest[1]) if largest else None

    def __call__(self, entry: Entry) -> Outcome:
        exchange = entry.route[0].decode(errors="replace")
        if self._is_refusal and (
            self._alone
            or f"exchange '{exchange}'" in self._text
            or (self._largest is not None and len(entry.body) > self._largest)
        ):
            return Outcome.REFUSED
        return Outcome.UNKNOWN


def unknown(_: Entry) -> Outcome:
    """What is true of any publication of which nothing was heard."""
    return Outcome.UNKNOWN


def _resolve(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)
