"""What is one epoch on RabbitMQ: from a connection to the last tag that only it can settle?

Laws:

- What was delivered before the answer to `cancel` is handed out; after a loss nothing is.
- A settlement is written whole or not at all, and never in another epoch or after the end.
- Leaving the context ends it in this order: cancel, wait for what was just settled, channel,
  connection. Each step may fail or hang; the next one follows within seconds.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from aio_pika_batch.adapters.aio_pika.connection import Link, open_link
from aio_pika_batch.adapters.aio_pika.fast import FastWire
from aio_pika_batch.adapters.aio_pika.plain import PlainWire
from aio_pika_batch.adapters.aio_pika.properties import decode, decode_headers, decode_route
from aio_pika_batch.adapters.aio_pika.topology import declare_on
from aio_pika_batch.adapters.aio_pika.translate import describe, translated, within
from aio_pika_batch.core.message import Headers, Message, Properties
from aio_pika_batch.core.settlement import Ledger
from aio_pika_batch.errors import BrokerUnavailable, SessionClosed, SessionLost, TopologyError
from aio_pika_batch.transport import Native

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from aio_pika_batch.adapters.aio_pika.urls import Address
    from aio_pika_batch.adapters.aio_pika.wire import Wire
    from aio_pika_batch.core.settlement import Settlement
    from aio_pika_batch.transport import Endpoint, Subscription

SETTLE_PAUSE = 0.2
"""Seconds between the last settlement and the channel's close.

A quorum queue's channel holds acks back when there are many, and drops what it holds when it
closes; nothing that can be asked of it tells when they are through. 50 ms were enough in every run.
"""

WIND_UP_TIMEOUT = 5.0
"""Seconds for all that comes before the connection's own close."""

_T = TypeVar("_T")

_STREAM_OFFSET = "x-stream-offset"


@dataclass(frozen=True, slots=True)
class _Source:
    queue: str
    consumer_tag: str
    retry_count_header: str

    def decode_properties(self, raw: bytes, /) -> Properties:
        return decode(raw)

    def decode_headers(self, raw: bytes, /) -> Headers | None:
        return decode_headers(raw)

    def decode_route(self, raw: bytes, /) -> tuple[str, str]:
        return decode_route(raw)

    def now(self) -> float:
        return time.time()


@asynccontextmanager
async def open_session(
    endpoint: Endpoint,
    addresses: Sequence[Address],
    subscription: Subscription,
) -> AsyncIterator[AioPikaSession]:
    """Connect, consume, and in the end close."""
    link = await open_link(endpoint, addresses)
    session = AioPikaSession(link, subscription)
    try:
        await session.open(endpoint.connect_timeout)
        yield session
    finally:
        await session.close()


class AioPikaSession:
    """Implements :class:`~aio_pika_batch.transport.Session` and `NativeSession`."""

    def __init__(self, link: Link, subscription: Subscription) -> None:
        self._link = link
        self._subscription = subscription
        self._wire: Wire = (
            FastWire(link, link.tap, self)
            if link.is_fast and link.tap is not None
            else PlainWire(link, self)
        )
        self._loop = asyncio.get_running_loop()
        self._ledger = Ledger()
        self._pending: list[Message] = []
        self._news: asyncio.Future[None] | None = None
        self._sink: Callable[[Sequence[Message]], None] | None = None
        self._failure: Exception | None = None
        self._lost: str | None = None
        self._drained = False
        self._closed = False
        self._is_first = True
        self._settled_at = -SETTLE_PAUSE
        self._cancelling: asyncio.Task[None] | None = None
        self._opening_native: asyncio.Task[Native] | None = None

    async def open(self, timeout: float) -> None:
        """Begin to consume. Raises TopologyError, BrokerUnavailable."""
        subscription = self._subscription
        source = _Source(
            subscription.queue, subscription.consumer_tag, subscription.retry_count_header
        )
        try:
            async with asyncio.timeout(timeout):
                await declare_on(self._link, subscription.own, timeout)
                await self._wire.consume(subscription, source)
        except TimeoutError as error:
            raise BrokerUnavailable(
                f"{self._link.address} did not open a consumer within {timeout:g} s"
            ) from error

    # --- the port ----------------------------------------------------------------

    def __aiter__(self) -> AsyncIterator[Sequence[Message]]:
        return self

    async def __anext__(self) -> Sequence[Message]:
        while True:
            self._check()
            if self._pending:
                break
            if self._drained:
                raise StopAsyncIteration
            await self._wait()
        return self._take()

    async def pump(self, sink: Callable[[Sequence[Message]], None]) -> None:
        """Hand chunks over in the moment they come: no task is woken for a read."""
        self._sink = sink
        try:
            while True:
                self._check()
                self._hand_over()
                if self._failure is not None:
                    raise self._failure
                if self._drained:
                    return
                await self._wait()
        finally:
            self._sink = None

    async def cancel(self) -> None:
        """Ask for no more messages."""
        self._check()
        if self._cancelling is None:
            # A task of its own: a basic.cancel that is itself cancelled closes the channel.
            self._cancelling = self._loop.create_task(self._cancel())
            self._cancelling.add_done_callback(_heard)
        await self._own(self._cancelling)

    async def settle(self, settlements: Sequence[Settlement]) -> None:
        """Tell the broker what became of some messages."""
        self._check()
        frames = self._ledger.settle(settlements)
        if not frames:
            return
        if not self._wire.settle(frames):
            self.lost("the connection was closed")
            self._check()
        self._settled_at = self._loop.time()
        await self._wire.drained()

    async def native(self) -> Native:
        """Open (once) a channel for the user on the session's connection."""
        self._check()
        if self._opening_native is None:
            self._opening_native = self._loop.create_task(self._open_native())
            self._opening_native.add_done_callback(_heard)
        return await self._own(self._opening_native)

    # --- what the wire tells -------------------------------------------------------

    def delivered(self, messages: Sequence[Message]) -> None:
        """Messages have come, in the order of their tags."""
        self._pending.extend(messages)
        if self._sink is None:
            self._wake()
        else:
            self._hand_over()

    def lost(self, why: str) -> None:
        """The world has ended it."""
        if self._lost is None:
            self._lost = why
            self._pending.clear()
            self._wake()

    # --- the end ---------------------------------------------------------------------

    async def close(self) -> None:
        """Close channel and connection. Never raises, but for the cancellation of its task."""
        self._closed = True
        self._wake()
        if self._opening_native is not None:
            self._opening_native.cancel()
        try:
            if self._lost is None:
                await within(WIND_UP_TIMEOUT, self._wind_up(), self._link.line.abort)
        finally:
            await self._link.close()

    async def _wind_up(self) -> None:
        if self._cancelling is None:
            await self._cancel()
        else:
            await asyncio.wait({self._cancelling})
        pause = self._settled_at + SETTLE_PAUSE - self._loop.time()
        if pause > 0:
            await asyncio.sleep(pause)
        await self._wire.close()

    async def _cancel(self) -> None:
        await self._wire.cancel()
        self._drained = True
        self._wake()

    async def _open_native(self) -> Native:
        with translated(
            lambda error: SessionLost(f"no native channel could be opened: {describe(error)}")
        ):
            # A publish that no queue takes shall not be lost in silence.
            channel = await self._link.connection.channel(on_return_raises=True)
            queue = await channel.get_queue(self._subscription.queue, ensure=False)
            return Native(channel, queue)

    # --- helpers -----------------------------------------------------------------------

    def _take(self) -> list[Message]:
        messages, self._pending = self._pending, []
        if self._is_first:
            self._is_first = False
            self._refuse_streams(messages[0])
        self._ledger.deliver([message.delivery_tag for message in messages])
        return messages

    def _hand_over(self) -> None:
        """Give what is pending to the sink. What that raises is raised where `pump` is awaited."""
        if self._pending and self._sink is not None and self._failure is None:
            try:
                self._sink(self._take())
            except Exception as error:  # noqa: BLE001  -- the wire has nothing to do with it
                self._failure = error
                self._wake()

    def _check(self) -> None:
        if self._closed:
            raise SessionClosed(f"the session on queue {self._subscription.queue!r} is over")
        if self._lost is not None:
            raise SessionLost(
                f"the session on queue {self._subscription.queue!r} at {self._link.address}"
                f" was lost: {self._lost}"
            )

    async def _own(self, task: asyncio.Task[_T]) -> _T:
        """Wait for a task that goes on if its waiter is cancelled."""
        try:
            return await asyncio.shield(task)
        except SessionLost:
            self._check()  # knows better why
            raise

    async def _wait(self) -> None:
        self._news = self._loop.create_future()
        try:
            await self._news
        finally:
            self._news = None

    def _wake(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    def _refuse_streams(self, message: Message) -> None:
        if _STREAM_OFFSET in (message.properties.headers or {}):
            raise TopologyError(
                f"queue {self._subscription.queue!r} is a stream: its messages are neither rejected"
                " nor requeued one by one; consume from a classic or quorum queue"
            )


def _heard(task: asyncio.Task[Any]) -> None:
    """Its waiter may have gone: then asyncio would complain of an error that nobody awaited."""
    if not task.cancelled():
        task.exception()
