"""One connection, one channel, one consumer: an epoch of delivery tags on the broker in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, assert_never

from aio_pika_batch.adapters.memory.channels import Channel, Gone
from aio_pika_batch.adapters.memory.frames import Cancelled, Closed, Delivery
from aio_pika_batch.adapters.memory.native import NativeChannel
from aio_pika_batch.adapters.memory.refusals import Refusal
from aio_pika_batch.adapters.memory.topology import explained
from aio_pika_batch.core.message import DecodedSource, Message
from aio_pika_batch.core.settlement import Disposition, Frame, Ledger, Settlement
from aio_pika_batch.errors import SessionClosed, SessionLost
from aio_pika_batch.transport import Native, Subscription

if TYPE_CHECKING:
    from aio_pika_batch.adapters.memory.connections import Connection


class MemorySession:
    """A session. It is iterated once, by one task."""

    def __init__(
        self,
        connection: Connection,
        subscription: Subscription,
        *,
        publish_timeout: float,
        wall_clock: Callable[[], float],
    ) -> None:
        self._connection = connection
        self._subscription = subscription
        self._publish_timeout = publish_timeout
        self._source = DecodedSource(
            subscription.queue,
            subscription.consumer_tag,
            subscription.retry_count_header,
            wall_clock,
        )
        self._channel: Channel = connection.channel(self._notified)
        self._ledger = Ledger()
        self._arrived: list[Message] = []
        self._iterated = False
        self._cancelled = False
        self._ended = False
        self._lost: str | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._native: Native | None = None

    def consume(self) -> None:
        """Subscribe.

        Raises:
            TopologyError: There is no such queue, or it is not ours to consume.
        """
        wanted = self._subscription
        with explained(f"queue {wanted.queue!r}"):
            self._channel.qos(wanted.prefetch)
            self._channel.consume(
                wanted.queue,
                wanted.consumer_tag,
                exclusive=wanted.exclusive,
                arguments=wanted.arguments,
            )

    def end(self) -> None:
        """End it from this side; whoever waits for messages is told."""
        self._ended = True
        self._connection.close()

    # -- the port --

    def __aiter__(self) -> MemorySession:
        if self._iterated:
            raise RuntimeError("a session is iterated once")
        self._iterated = True
        return self

    async def __anext__(self) -> Sequence[Message]:
        # As if from a socket: whoever reads lets others run, and what came at once is read at once.
        await asyncio.sleep(0)
        while True:
            self._check()
            if self._arrived:
                chunk, self._arrived = self._arrived, []
                self._ledger.deliver([message.delivery_tag for message in chunk])
                return chunk
            if self._cancelled:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    async def cancel(self) -> None:
        """Ask for no more messages. What has been delivered before can still be had."""
        self._check()
        if not self._cancelled:
            self._channel.cancel(self._subscription.consumer_tag)
            self._cancelled = True
            self._notified()
        await asyncio.sleep(0)
        self._check()

    async def settle(self, settlements: Sequence[Settlement]) -> None:
        """Tell the broker what became of some messages."""
        self._check()
        frames = self._ledger.settle(settlements)
        with suppress(Gone, Refusal):
            for frame in frames:
                _send(self._channel, frame)
        # If the broker found fault with a frame, it has ended the session.
        self._check()
        await asyncio.sleep(0)

    async def native(self) -> Native:
        """Objects with the calls of aio-pika's, on a channel of their own."""
        self._check()
        if self._native is None:
            channel = NativeChannel(self._connection, publish_timeout=self._publish_timeout)
            self._native = Native(channel, await channel.get_queue(self._subscription.queue))
        return self._native

    # -- the broker's side --

    def _notified(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _check(self) -> None:
        """Take in what the broker has sent, and raise if it is over."""
        if self._ended:
            raise SessionClosed("the session is over; it was left before")
        for incoming in self._channel.take():
            match incoming:
                case Delivery():
                    self._arrived.append(self._message(incoming))
                case Cancelled():
                    self._lost = self._lost or "the broker has cancelled the consumer"
                case Closed(words):
                    self._lost = self._lost or words
        if self._lost is not None:
            raise SessionLost(f"the session on queue {self._source.queue!r} is lost: {self._lost}")

    def _message(self, delivery: Delivery) -> Message:
        return Message(
            self._source,
            delivery.tag,
            delivery.redelivered,
            delivery.body,
            (delivery.exchange, delivery.routing_key),
            delivery.properties,
        )


def _send(channel: Channel, frame: Frame) -> None:
    match frame.disposition:
        case Disposition.ACK:
            channel.ack(frame.tag, multiple=frame.multiple)
        case Disposition.REJECT:
            channel.reject(frame.tag, requeue=False)
        case Disposition.REQUEUE:
            channel.reject(frame.tag, requeue=True)
        case Disposition.RETURN:
            channel.nack(frame.tag, multiple=frame.multiple, requeue=True)
        case never:
            assert_never(never)
