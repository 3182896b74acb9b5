"""Publishes many messages at once, and returns the outcome of each.

It uses a channel in confirm mode, on a connection of its own. Under a memory alarm the broker stops
reading from a connection that has published, and acks on the same connection would wait, too.

On the fast wire, packed publications are written past the client library, many in one write. On the
plain wire (`wire="plain"`), aiormq publishes each and awaits its confirm. aiormq identifies a
returned message only by its `message_id`: of two with the same one it would take a lost message for
a stored one. So the frame tap takes returned messages out on both wires.

Laws:

- Nothing that the broker or the network does raises: it becomes an
  :class:`~aio_pika_batch.core.publication.Outcome`.
- Without a listener for late answers, a publisher accepts no more once an outcome is in doubt, and
  a call times out only in silence: each confirm starts its time limit again.
- With a listener (`on_late`) each publication has `publish_timeout`, whatever else is confirmed in
  the meantime, and the publisher goes on: a late confirm still belongs to its publication.
- Nothing is written on a channel that the broker has closed.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from aiormq.exceptions import DeliveryError
from aiormq.exceptions import PublishError as ReturnedError
from pamqp.commands import Basic

from aio_pika_batch.adapters.aio_pika.client_errors import (
    close_reason,
    finish_within,
    translate_errors,
)
from aio_pika_batch.adapters.aio_pika.confirms import (
    ConfirmTracker,
    PublishCall,
    Route,
    Target,
    outcome_after_close,
    unknown,
)
from aio_pika_batch.adapters.aio_pika.connection import (
    OpenConnection,
    open_connection,
    starting,
)
from aio_pika_batch.adapters.aio_pika.events import (
    ChannelClosed,
    ChannelCloseOk,
    Confirms,
    ConnectionClosed,
    ConnectionLost,
    Malformed,
    ReturnedPublication,
)
from aio_pika_batch.adapters.aio_pika.frame_fastpath import (
    largest_properties,
    pack_publications,
    pack_publish,
)
from aio_pika_batch.adapters.aio_pika.properties import (
    encode,
    encode_around_id,
    encode_short,
    splice,
)
from aio_pika_batch.adapters.aio_pika.tables import encode_text
from aio_pika_batch.adapters.connecting import CLOSE_TIMEOUT, reason_of
from aio_pika_batch.core.publication import Copy, Outcome, Publication, StoredPublication, fit
from aio_pika_batch.errors import BrokerUnavailable, PublishError, SessionClosed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence

    from aiormq.abc import AbstractChannel

    from aio_pika_batch.adapters.aio_pika.events import Event
    from aio_pika_batch.core.message import Properties
    from aio_pika_batch.core.publication import Outgoing
    from aio_pika_batch.transport import Endpoint

_log = logging.getLogger("aio_pika_batch.publisher")

GROUP_BYTES = 1 << 20
"""Bytes of bodies that are packed at a time: many large messages need not be in memory twice."""

MOST_TEMPLATES = 64
"""Templates that are kept encoded."""

AT_ONCE = 200
"""Publications of one call that are in flight at a time on the plain wire. Each is a task."""


@asynccontextmanager
async def open_publisher(endpoint: Endpoint) -> AsyncIterator[AioPikaPublisher]:
    """Connect, and open a channel in confirm mode; close both on leaving the context."""
    connection = await open_connection(endpoint)
    publisher = AioPikaPublisher(connection, endpoint.publish_timeout)
    try:
        await publisher.open(endpoint.connect_timeout)
        yield publisher
    finally:
        await publisher.close()


class AioPikaPublisher:
    """Implements :class:`~aio_pika_batch.transport.Publisher`."""

    def __init__(self, connection: OpenConnection, timeout: float) -> None:
        self._connection = connection
        self._tap = connection.tap
        self._is_fast = connection.is_fast
        self._timeout = timeout
        self._user = encode_text(connection.address.user)
        self._loop = asyncio.get_running_loop()
        self._channel: AbstractChannel | None = None
        self._number = 0
        self._frame_max = self._largest_properties = 0
        self._tracker = ConfirmTracker()
        self._confirmed_at = self._loop.time()
        self._templates: dict[int, tuple[bytes, bytes, Properties]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_open = False
        self._is_closed = False
        self.on_late: Callable[[Outgoing, Outcome], None] | None = None

    async def open(self, timeout: float) -> None:
        """Open the channel. Raises TransportError."""
        with starting(self._connection, "a channel", "a channel was opened"):
            async with asyncio.timeout(timeout):
                self._channel = channel = await self._connection.channel(confirms=True)
        self._number = channel.number
        self._frame_max = self._tap.frame_max
        self._largest_properties = largest_properties(self._frame_max)
        parser = self._tap.listen(self.on_event)
        if self._is_fast:
            parser.tap_publisher(channel.number)
        else:
            parser.tap_returns(channel.number)
        self._is_open = True

    @property
    def is_open(self) -> bool:
        """Whether another `publish` may succeed. Once False, it stays False."""
        return self._is_open

    async def publish(self, publications: Sequence[Outgoing]) -> Sequence[Outcome]:
        """Publish, pipelined, and wait for the broker's answer to each."""
        if self._is_closed:
            raise SessionClosed("the publisher is closed")
        if not publications:
            return []
        done: asyncio.Future[None] = self._loop.create_future()
        on_late = self.on_late
        timer = self._silence_limit() if on_late is None else asyncio.timeout(None)
        # Pack everything before sending anything: a header of a wrong type must send nothing.
        call = self._pack(publications, lambda: _resolve(done))
        try:
            async with timer as limit:
                for start, stop in _groups(call):
                    if on_late is not None:
                        limit.reschedule(self._loop.time() + self._timeout)
                    if self._is_fast:
                        await self._write(call, start, stop)
                    else:
                        await self._publish_by_library(call, start, stop)
                if call.missing:
                    await done
        except TimeoutError:
            if on_late is None:
                # A later confirm would reach no caller: accept no more.
                self._is_open = False
            else:
                call.late = lambda index, outcome: on_late(call.sent[index], outcome)
        return call.results()

    @asynccontextmanager
    async def _silence_limit(self) -> AsyncIterator[asyncio.Timeout]:
        """Raise TimeoutError once no confirm has come for so long. A confirm sets no timer."""
        began = self._loop.time()
        timer: asyncio.TimerHandle

        def check() -> None:
            nonlocal timer
            due = max(began, self._confirmed_at) + self._timeout
            if due > self._loop.time():
                timer = self._loop.call_at(due, check)
            else:
                limit.reschedule(due)

        async with asyncio.timeout(None) as limit:
            timer = self._loop.call_at(began + self._timeout, check)
            try:
                yield limit
            finally:
                timer.cancel()

    async def close(self) -> None:
        """Close channel and connection. Raises only if its own task is cancelled."""
        self._is_closed = True
        self._end(unknown)
        try:
            if self._channel is not None and self._tap.end is None:
                await finish_within(CLOSE_TIMEOUT, self._channel.close(), self._tap.abort)
        finally:
            await self._connection.close()
            for task in self._tasks:
                task.cancel()

    # --- packing -------------------------------------------------------------------

    def _pack(self, publications: Sequence[Outgoing], done: Callable[[], None]) -> PublishCall:
        """Return what is sent, without the copies that cannot be sent."""
        number, largest, is_fast = self._number, self._largest_properties, self._is_fast
        templates = self._templates
        unsent: list[int] = []
        sent: list[Outgoing] = []
        targets: list[Target] = []
        packed: list[bytes] = []
        for index, publication in enumerate(publications):
            try:
                if isinstance(publication, StoredPublication):
                    template = publication.template
                    around = templates.get(id(template)) or self._encode_template(template)
                    message_id = encode_short("message_id", publication.message_id)
                    properties = around[0] + message_id + around[1]
                else:
                    properties = self._properties(publication)
                if len(properties) > largest:
                    properties = self._fitting_properties(publication, len(properties))
                exchange, routing_key = publication.exchange, publication.routing_key
                target = _pack_target(number, exchange, routing_key, publication.mandatory)
                if not is_fast:
                    _check_for_library(exchange, routing_key)
            except PublishError as error:
                if isinstance(publication, Publication):
                    raise
                # An error would fail the copies of its whole batch.
                _log.debug("a copy is not published: %s", error)
                unsent.append(index)
            else:
                sent.append(publication)
                targets.append(target)
                packed.append(properties)
        return PublishCall(sent, targets, packed, unsent, done)

    def _fitting_properties(self, publication: Outgoing, size: int) -> bytes:
        limit = self._largest_properties
        if isinstance(publication, Copy):
            fitting = fit(publication, limit, lambda copy: len(self._properties(copy)))
            if fitting is not None:
                return self._properties(fitting)
        raise PublishError(
            f"the properties of a message to {publication.exchange!r} have {size} bytes; they must"
            f" fit into one frame of {self._frame_max}"
        )

    def _properties(self, publication: Publication | Copy) -> bytes:
        if isinstance(publication, Publication):
            return encode(publication.properties)
        raw = publication.message.raw_properties
        if raw is not None:
            return splice(raw, publication, self._user)
        return encode(self._own_user(publication.properties))

    def _own_user(self, values: Properties) -> Properties:
        # The broker closes the channel if a user_id is not the connection's.
        is_foreign = values.user_id not in (None, self._connection.address.user)
        return replace(values, user_id=None) if is_foreign else values

    def _encode_template(self, template: Properties) -> tuple[bytes, bytes, Properties]:
        if len(self._templates) >= MOST_TEMPLATES:
            self._templates.clear()
        found = (*encode_around_id(self._own_user(template)), template)
        # With the template itself, so that no other one gets its id.
        self._templates[id(template)] = found
        return found

    # --- sending -------------------------------------------------------------------

    async def _write(self, call: PublishCall, start: int, stop: int) -> None:
        """Write publications past the client library."""
        frames = pack_publications(
            self._number,
            zip(
                call.targets[start:stop],
                call.properties[start:stop],
                call.bodies[start:stop],
                strict=True,
            ),
            self._frame_max,
        )
        if not self._is_open or not self._tap.write(frames):
            self._is_open = False
            call.settle_range(start, stop, Outcome.UNKNOWN)
            return
        # Without an await in between, so that the numbers are the channel's even if calls overlap.
        self._tracker.track(call, start, stop)
        if self._tap.is_clogged:
            try:
                with translate_errors(lambda error: BrokerUnavailable(reason_of(error))):
                    await self._tap.drain()
            except BrokerUnavailable:
                self._end(unknown)

    async def _publish_by_library(self, call: PublishCall, start: int, stop: int) -> None:
        """Publish by the client library, some at a time."""
        for first in range(start, stop, AT_ONCE):
            tasks = {
                self._loop.create_task(self._publish_one(call, index))
                for index in range(first, min(first + AT_ONCE, stop))
            }
            for task in tasks:
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            # They go on after the time limit of the call: their confirms may be late.
            await asyncio.wait(tasks)
            for task in tasks:
                task.result()

    async def _publish_one(self, call: PublishCall, index: int) -> None:
        channel = self._channel
        if not self._is_open or channel is None:
            call.settle(index, Outcome.UNKNOWN)
            return
        number = self._tracker.track(call, index, index + 1)
        outcome = Outcome.UNKNOWN
        try:
            with translate_errors(lambda error: BrokerUnavailable(reason_of(error))):
                outcome = await _publish(channel, call.sent[index], call.properties[index])
            self._confirmed_at = self._loop.time()
        except BrokerUnavailable as error:
            if self._is_open:
                self.on_event(close_reason(error) or ConnectionLost(str(error)))
        finally:
            self._tracker.settle(number, outcome)

    # --- events of the connection ----------------------------------------------------

    def on_event(self, event: Event) -> None:
        """Handle what the frame tap reports. Never raises or blocks."""
        match event:
            case Confirms(confirms):
                self._confirmed_at = self._loop.time()
                for confirm in confirms:
                    self._tracker.confirm(confirm)
            case ReturnedPublication():
                self._tracker.mark_returned(event)
            case ChannelClosed(code, text):
                _log.warning("the broker closed a publisher's channel: %s %s", code, text)
                self._end(outcome_after_close(event, alone=len(self._tracker) == 1))
            case ConnectionClosed() | Malformed() | ConnectionLost() | ChannelCloseOk():
                self._end(unknown)
            case _:
                pass  # nothing is consumed on this channel

    def _end(self, outcome: Callable[[Route, bytes], Outcome]) -> None:
        self._is_open = False
        self._tracker.end(outcome)


class _RawProperties(Basic.Properties):
    """A property list that is written unchanged: aiormq calls `marshal` for the bytes."""

    def __init__(self, raw: bytes) -> None:
        super().__init__()
        self._raw = raw

    def marshal(self) -> bytes:
        return self._raw


async def _publish(channel: AbstractChannel, publication: Outgoing, properties: bytes) -> Outcome:
    """Publish by the client library, and wait for the confirm. Raises what aiormq raises."""
    try:
        answer = await channel.basic_publish(
            bytes(publication.body),
            exchange=publication.exchange,
            routing_key=publication.routing_key,
            properties=_RawProperties(properties),
            mandatory=publication.mandatory,
        )
    except ReturnedError:
        return Outcome.RETURNED
    except DeliveryError:
        return Outcome.REFUSED
    return Outcome.CONFIRMED if isinstance(answer, Basic.Ack) else Outcome.UNKNOWN


@lru_cache(maxsize=512)  # a program publishes to the same few routes again and again
def _pack_target(
    channel: int,
    exchange: str,
    routing_key: str,
    mandatory: bool,  # noqa: FBT001  -- names would make the cache slower
) -> Target:
    """Return the method frame of a publication, and its route. Raises PublishError."""
    method = pack_publish(channel, exchange, routing_key, mandatory=mandatory)
    return method, (encode_text(exchange), encode_text(routing_key))


@lru_cache(maxsize=512)  # as above
def _check_for_library(exchange: str, routing_key: str) -> None:
    """Raise PublishError if the client library refuses to send to this route."""
    try:
        Basic.Publish(exchange=exchange, routing_key=routing_key).marshal()
    except (TypeError, ValueError) as error:
        raise PublishError(
            f"the client library refuses exchange {exchange!r} or its key: {error}"
        ) from error


def _groups(call: PublishCall) -> Iterator[tuple[int, int]]:
    """Yield the first index and the end of what is sent together."""
    start = size = 0
    # Nearly always all are sent together: then the bodies are not looked at one by one.
    large = sum(map(len, call.bodies)) >= GROUP_BYTES
    for index, body in enumerate(call.bodies, 1) if large else ():
        size += len(body)
        if size >= GROUP_BYTES:
            yield start, index
            start, size = index, 0
    if start < len(call.bodies):
        yield start, len(call.bodies)


def _resolve(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)
