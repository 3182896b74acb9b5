"""The channel that a session consumes on. aiormq opens, cancels and closes it.

On the fast wire, the frame tap takes the deliveries out before aiormq sees them. On the plain wire
(`wire="plain"`), aiormq carries them and calls back for each. Its callback only emits an event:
handlers run in tasks of ours, which a lost connection does not cancel.

Law: what was delivered before the broker's answer to `cancel` was emitted when it returns.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from aio_pika_batch.adapters.aio_pika.client_errors import lost_on_error
from aio_pika_batch.adapters.aio_pika.connection import (
    BasicConsume,
    OpenConnection,
    QueueDeclare,
    starting,
)
from aio_pika_batch.adapters.aio_pika.events import Deliveries
from aio_pika_batch.adapters.aio_pika.header_guard import HeaderGuard
from aio_pika_batch.adapters.aio_pika.properties import (
    decode,
    decode_headers,
    decode_message_ids,
    decode_route,
)
from aio_pika_batch.core.message import Message
from aio_pika_batch.core.topology import Version, parse_version
from aio_pika_batch.transport import resumed_consumer_tag

if TYPE_CHECKING:
    from aiormq.abc import DeliveredMessage
    from aiormq.channel import Channel

    from aio_pika_batch.adapters.aio_pika.frame_tap import Listener
    from aio_pika_batch.transport import Subscription

STREAM_OFFSET = "x-stream-offset"
"""An argument of a stream's consumer, and a header of its messages."""

ARGUMENTS_CHECKED_SINCE: Version = (3, 10)
"""The first RabbitMQ that refuses arguments of consumers that a queue's type doesn't have."""

LEADER_TIMEOUT = 0.2
"""Seconds in which the leader of a quorum queue answers a passive declare. Without it RabbitMQ
answers after 0.25 s, as if there were no consumers."""

QUESTIONS = 2  # on a busy machine, a leader may need as long once

_TURNS = 4
"""Turns of the event loop after cancel-ok on the plain wire. aiormq has started a task for each
delivery before it handles the answer, so one would do."""


@dataclass(frozen=True, slots=True)
class RawSource:
    """What the messages of one session share: :class:`~aio_pika_batch.core.message.Source`."""

    queue: str
    consumer_tag: str
    retry_count_header: str

    decode_properties = staticmethod(decode)
    decode_headers = staticmethod(decode_headers)
    decode_message_ids = staticmethod(decode_message_ids)
    decode_route = staticmethod(decode_route)

    def now(self) -> float:
        """Return seconds since the epoch."""
        return time.time()


class ConsumerChannel:
    """One channel with one consumer.

    Attributes:
        number: The channel's number; 0 before it is open.
    """

    def __init__(
        self, connection: OpenConnection, subscription: Subscription, listener: Listener
    ) -> None:
        self.number = 0
        self._connection = connection
        self._subscription = subscription
        self._listener = listener
        self._channel: Channel  # opened by `consume`
        self._consumer_tag = ""
        self._pauses = 0

    @property
    def is_consuming(self) -> bool:
        """Whether it has a consumer, which `cancel` would cancel."""
        return bool(self._consumer_tag)

    @property
    def version(self) -> Version:
        """The version of RabbitMQ; empty for other brokers."""
        return parse_version(*self._connection.product) or ()

    async def consume(self) -> None:
        """Open the channel and start the consumer. Raises TopologyError or BrokerUnavailable."""
        subject = f"consuming from queue {self._subscription.queue!r}"
        with starting(self._connection, subject, "a consumer was started"):
            self._channel = await self._connection.channel()
            self.number = self._channel.number
            await self._start(self._subscription)

    async def resume(self, prefetch: int) -> None:
        """Start a consumer again after `cancel`, with a new tag. Raises SessionLost."""
        if self._consumer_tag:
            return
        first = self._subscription
        self._pauses += 1
        tag = resumed_consumer_tag(first.consumer_tag, self._pauses)
        with lost_on_error("cannot resume the deliveries"):
            await self._start(replace(first, consumer_tag=tag, prefetch=prefetch))

    async def _start(self, subscription: Subscription) -> None:
        self._consumer_tag = subscription.consumer_tag
        source = RawSource(
            subscription.queue, subscription.consumer_tag, subscription.retry_count_header
        )
        # Tap before the consumer exists, so that no delivery can come earlier.
        if self._connection.is_fast:
            self._connection.tap.listen(self._listener).tap_consumer(self.number, source)
            on_message = _unexpected
        else:
            on_message = self._guarded(source)
        # Set prefetch first: it applies to consumers that start after it.
        await self._channel.basic_qos(prefetch_count=subscription.prefetch)
        # What `Channel.basic_consume` does, for every name that the broker accepts.
        self._channel.consumers[subscription.consumer_tag] = on_message
        await self._channel.rpc(
            BasicConsume(
                queue=subscription.queue,
                consumer_tag=subscription.consumer_tag,
                exclusive=subscription.exclusive,
                arguments=self._arguments(subscription),
            )
        )

    def _arguments(self, subscription: Subscription) -> dict[str, Any]:
        arguments = dict[str, Any](subscription.arguments)
        # Changes nothing, except that a stream refuses the consumer. If it is asked for an offset,
        # its first message tells.
        if self.version >= ARGUMENTS_CHECKED_SINCE and STREAM_OFFSET not in arguments:
            arguments.setdefault("x-priority", 0)
        return arguments

    def _guarded(self, source: RawSource) -> Any:  # noqa: ANN401  -- a callback
        guard = HeaderGuard()
        self._connection.tap.listen(self._listener).guard(self.number, guard)

        async def on_message(message: DeliveredMessage) -> None:
            tag = message.delivery_tag or 0
            redelivered = bool(getattr(message.delivery, "redelivered", False))
            delivered = Message(source, tag, redelivered, message.body, *guard.take(tag))
            self._listener(Deliveries([delivered]))

        return on_message

    async def cancel(self) -> None:
        """Cancel the consumer, and wait for the broker's answer. Raises SessionLost."""
        if not self._consumer_tag:
            return
        with lost_on_error("basic.cancel failed"):
            await self._channel.basic_cancel(self._consumer_tag)
        self._consumer_tag = ""
        if not self._connection.is_fast:
            for _ in range(_TURNS):
                await asyncio.sleep(0)

    async def has_leader(self) -> bool:
        """Return whether the queue's leader answers questions. Raises SessionLost."""
        loop = asyncio.get_running_loop()
        question = QueueDeclare(queue=self._subscription.queue, passive=True)
        for _ in range(QUESTIONS):
            asked_at = loop.time()
            with lost_on_error("queue.declare failed"):
                answer = await self._channel.rpc(question)
            if answer.consumer_count or loop.time() - asked_at < LEADER_TIMEOUT:
                return True
        return False

    async def select(self) -> None:
        """Begin to settle in transactions. Raises SessionLost."""
        with lost_on_error("tx.select failed"):
            await self._channel.tx_select()

    async def commit(self) -> None:
        """Commit what was settled since the last commit. Raises SessionLost."""
        with lost_on_error("tx.commit failed"):
            await self._channel.tx_commit()

    async def close(self) -> None:
        """Close the channel. Raises what aiormq raises."""
        if self._connection.tap.end is None:
            await self._channel.close()


async def _unexpected(message: DeliveredMessage) -> None:
    raise AssertionError(f"{message!r} was delivered past the tap")
