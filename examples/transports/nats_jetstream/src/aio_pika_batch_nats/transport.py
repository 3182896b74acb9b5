"""The transport for NATS JetStream."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from nats import errors
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig

from aio_pika_batch.transport import Endpoint, Subscription, Topology, TopologyError
from aio_pika_batch_nats.link import Link, explained, linked
from aio_pika_batch_nats.names import token
from aio_pika_batch_nats.publisher import NatsPublisher
from aio_pika_batch_nats.session import CONSUMER, NatsSession
from aio_pika_batch_nats.streams import AUTO_DELETE, declare

_MISSED_HEARTBEATS = 3
"""A session that misses this many is dead, and its messages are delivered again."""


class NatsTransport:
    """The transport to one NATS server."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._ack_wait = float(_MISSED_HEARTBEATS * endpoint.heartbeat)

    async def declare(self, topology: Topology) -> None:
        """Declare and check, on a connection of its own."""
        async with linked(self._endpoint) as link:
            await declare(link.client.jetstream(), topology)

    @asynccontextmanager
    async def session(self, subscription: Subscription) -> AsyncIterator[NatsSession]:
        """Consume, until the context is left."""
        what = f"queue {subscription.queue!r}"
        if subscription.exclusive or subscription.arguments or subscription.own.queues:
            raise TopologyError(
                f"{what}: NATS has no exclusive consumers and queues, and no consumer arguments"
            )
        async with linked(self._endpoint) as link:
            with explained(what):
                stream = token(subscription.queue)
                jetstream = link.client.jetstream()
                info = await jetstream.stream_info(stream)
                consumer = ConsumerConfig(
                    durable_name=CONSUMER,
                    ack_policy=AckPolicy.EXPLICIT,
                    ack_wait=self._ack_wait,
                    # What a session holds is limited by what it pulls.
                    max_ack_pending=-1,
                )
                await jetstream.add_consumer(stream, consumer)
            session = NatsSession(link, subscription, self._ack_wait)
            async with _attendance(link, stream, deletes=info.config.description == AUTO_DELETE):
                with explained(what):
                    await session.open()
                try:
                    yield session
                finally:
                    await session.close()

    @asynccontextmanager
    async def publisher(self) -> AsyncIterator[NatsPublisher]:
        """Publish, until the context is left."""
        async with linked(self._endpoint) as link:
            publisher = NatsPublisher(link)
            try:
                yield publisher
            finally:
                publisher.end()


@asynccontextmanager
async def _attendance(link: Link, stream: str, *, deletes: bool) -> AsyncIterator[None]:
    """Announce a session of an auto-delete queue; the last one to leave deletes the stream.

    A session answers when it is asked. If none is left, the server says so at once.
    """
    if not deletes:
        yield
        return

    async def here(question: Msg) -> None:
        await link.send(question.reply, b"")

    subject = f"aio-pika-batch.attendance.{stream}"
    with explained(f"stream {stream!r}"):
        attending = await link.client.subscribe(subject, cb=here)
    try:
        yield
    finally:
        if link.lost is None:
            with suppress(errors.Error):
                # Not unsubscribe: a request that is on its way would get no answer.
                await attending.drain()  # type: ignore[no-untyped-call]
                await _delete_if_alone(link, subject, stream)


async def _delete_if_alone(link: Link, subject: str, stream: str) -> None:
    try:
        await link.client.request(subject, timeout=link.timeout)
    except errors.NoRespondersError:
        await link.client.jetstream().delete_stream(stream)
