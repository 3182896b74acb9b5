"""A session on a real RabbitMQ keeps its laws, whatever the broker and the network do."""

from __future__ import annotations

import asyncio
import struct
import time
from typing import TYPE_CHECKING, Any

import aio_pika
import pytest

from aio_pika_batch.adapters.aio_pika.frame_fastpath import pack_settlements
from aio_pika_batch.adapters.rabbitmq import AioPikaTransport
from aio_pika_batch.core.message import Message
from aio_pika_batch.core.publication import Copy, Outcome, Publication
from aio_pika_batch.core.settlement import Disposition, Frame, Settlement
from aio_pika_batch.core.topology import Queue, Topology
from aio_pika_batch.errors import (
    MessageDecodeError,
    SessionClosed,
    SessionLost,
    TopologyError,
)
from aio_pika_batch.transport import Endpoint, Subscription, Wire
from tests.integration.helpers import PATIENCE, SLACK, until

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aio_pika.abc import AbstractChannel

    from aio_pika_batch.adapters.aio_pika.session import AioPikaSession
    from tests.support.proxy import TcpProxy

pytestmark = pytest.mark.usefixtures("queue")


@pytest.fixture
def transport(amqp_url: str, wire: Wire) -> AioPikaTransport:
    """The adapter, on either wire."""
    return AioPikaTransport(Endpoint(url=amqp_url, wire=wire))


@pytest.fixture(params=["classic", "quorum"])
async def queue(
    request: pytest.FixtureRequest, transport: AioPikaTransport, name: str, channel: AbstractChannel
) -> Any:
    """A queue of either type."""
    kind = {"x-queue-type": request.param}
    await transport.declare(Topology(queues=(Queue(name, arguments=kind),)))
    yield name
    await channel.queue_delete(name)


def subscription(queue: str, **more: Any) -> Subscription:
    """A subscription with a large prefetch."""
    return Subscription(**{"queue": queue, "prefetch": 5000, "consumer_tag": "c-1", **more})


async def publish(transport: AioPikaTransport, queue: str, bodies: Sequence[bytes]) -> None:
    """Put messages into a queue."""
    async with transport.publisher() as publisher:
        outcomes = await publisher.publish(
            [Publication(body, routing_key=queue) for body in bodies]
        )
    assert {Outcome.CONFIRMED} == set(outcomes)


async def publish_raw(
    transport: AioPikaTransport, queue: str, raw: bytes, body: bytes = b""
) -> None:
    """Publish with these property bytes."""
    original = Message(None, 1, False, body, ("", queue), raw)  # type: ignore[arg-type]
    async with transport.publisher() as publisher:
        assert [Outcome.CONFIRMED] == await publisher.publish([Copy(original, "", queue, {})])


async def receive(session: AioPikaSession, count: int) -> list[Message]:
    """Receive chunks until there are *count* messages."""
    messages: list[Message] = []
    async with asyncio.timeout(PATIENCE):
        while len(messages) < count:
            messages.extend(await anext(aiter(session)))
    return messages


def settlement(disposition: Disposition, messages: Sequence[Message]) -> Settlement:
    """One disposition for some messages."""
    return Settlement(disposition, tuple(message.delivery_tag for message in messages))


async def assert_ready(channel: AbstractChannel, queue: str, count: int) -> None:
    """Wait until the queue holds this many messages, and a little longer for surplus ones."""

    async def look() -> bool:
        found = await channel.declare_queue(queue, passive=True)
        return count == found.declaration_result.message_count

    await until(look, what=f"{count} messages in {queue}")
    await asyncio.sleep(0.3)
    assert await look()


# --- the way of a message --------------------------------------------------------


async def test_messages_come_in_chunks_and_stay_settled(
    transport: AioPikaTransport, queue: str, channel: AbstractChannel
) -> None:
    """In the order of their tags. Settled messages are gone, whatever the disposition."""
    bodies = [b"%d" % number for number in range(1000)]
    await publish(transport, queue, bodies)
    chunks = 0

    async with transport.session(subscription(queue)) as session:
        messages: list[Message] = []
        async for chunk in session:
            chunks += 1
            messages.extend(chunk)
            if len(messages) == 1000:
                break
        assert bodies == [message.body for message in messages]
        assert list(range(1, 1001)) == [message.delivery_tag for message in messages]
        assert (queue, "", queue) == (
            messages[0].queue,
            messages[0].exchange,
            messages[0].routing_key,
        )
        await session.settle(
            [
                settlement(Disposition.ACK, messages[::2]),
                settlement(Disposition.REJECT, messages[1:501:2]),
                settlement(Disposition.RETURN, messages[501::2]),
            ]
        )
        again = await receive(session, 250)
        assert sorted(bodies[501::2]) == sorted(message.body for message in again)
        assert all(message.redelivered for message in again)
        await session.settle([settlement(Disposition.ACK, again)])
        await session.settle([])

    assert chunks < 500
    await assert_ready(channel, queue, 0)


async def test_after_cancel_the_session_hands_out_the_rest_and_ends(
    transport: AioPikaTransport, queue: str, channel: AbstractChannel
) -> None:
    """Each message was handed out or is in the queue, never both or neither."""
    await publish(transport, queue, [b"%d" % number for number in range(2000)])

    async with transport.session(subscription(queue, prefetch=300)) as session:
        first = await receive(session, 1)
        await asyncio.gather(session.cancel(), session.cancel())
        rest = [message for chunk in [chunk async for chunk in session] for message in chunk]
        await session.cancel()
        handed_out = [*first, *rest]
        await session.settle([settlement(Disposition.ACK, handed_out)])
        # Inside: what was delivered and got lost on the way goes back to the queue at the end.
        await assert_ready(channel, queue, 2000 - len(handed_out))

    assert len(handed_out) <= 300
    assert list(range(1, len(handed_out) + 1)) == [each.delivery_tag for each in handed_out]
    await assert_ready(channel, queue, 2000 - len(handed_out))


@pytest.mark.parametrize("size", [0, 1, 131_063, 131_064, 131_065, 1_000_000])
async def test_bodies_of_any_size(transport: AioPikaTransport, queue: str, size: int) -> None:
    """No body frame, one, or several, in both directions."""
    body = bytes(range(256)) * (size // 256) + bytes(size % 256)
    await publish(transport, queue, [body, b"next"])

    async with transport.session(subscription(queue)) as session:
        messages = await receive(session, 2)
        assert [body, b"next"] == [message.body for message in messages]
        await session.settle([settlement(Disposition.ACK, messages)])


async def test_an_undecodable_property_affects_only_its_message(
    transport: AioPikaTransport, queue: str
) -> None:
    """A binary correlation id, and a time beyond the year 9999."""
    binary = struct.pack(">H", 1 << 10 | 1 << 7) + b"\x03\xff\xfe\xfd" + b"\x02id"
    await publish_raw(transport, queue, binary, b"poison")
    await publish_raw(transport, queue, struct.pack(">H", 1 << 6) + b"\x00\xff" * 4, b"later")
    await publish(transport, queue, [b"good"])

    async with transport.session(subscription(queue)) as session:
        poison, later, good = await receive(session, 3)
        assert "id" == poison.message_id
        with pytest.raises(MessageDecodeError, match="correlation_id"):
            _ = poison.correlation_id
        with pytest.raises(MessageDecodeError, match="timestamp"):
            _ = later.timestamp
        assert (b"good", None) == (good.body, good.correlation_id)
        await session.settle(
            [settlement(Disposition.REJECT, [poison, later]), settlement(Disposition.ACK, [good])]
        )


@pytest.mark.parametrize("queue", ["classic"], indirect=True)
async def test_a_routing_key_that_is_not_utf8(
    transport: AioPikaTransport, amqp_url: str, queue: str, channel: AbstractChannel
) -> None:
    """Other clients may send any bytes, over which stock clients lose the connection."""
    exchange = await channel.declare_exchange(queue, "fanout", auto_delete=True)
    await (await channel.get_queue(queue)).bind(exchange)
    original = Message(None, 1, False, b"", ("", queue), b"\0\0")  # type: ignore[arg-type]
    async with AioPikaTransport(Endpoint(url=amqp_url, wire="fast")).publisher() as publisher:
        copy = Copy(original, queue, "a\udcff\udcfeb", {"x": 1})
        assert [Outcome.CONFIRMED] == await publisher.publish([copy])
    await publish(transport, queue, [b"next"])

    async with transport.session(subscription(queue)) as session:
        first, second = await receive(session, 2)
        assert (queue, "a\udcff\udcfeb") == (first.exchange, first.routing_key)
        assert (b"next", queue) == (second.body, second.routing_key)
        await session.settle([settlement(Disposition.ACK, [first, second])])


@pytest.mark.long
async def test_acks_just_before_the_end_are_not_lost(
    transport: AioPikaTransport, queue: str, channel: AbstractChannel
) -> None:
    """A quorum queue drops acks that its channel still delays when it closes: the session waits."""
    await publish(transport, queue, [b""] * 5000)

    async with transport.session(subscription(queue)) as session:
        messages = await receive(session, 5000)
        await session.cancel()
        # The first is left over, so that none of the others can be joined: 4999 frames in a write.
        await session.settle([settlement(Disposition.ACK, messages[1:])])

    await assert_ready(channel, queue, 1)


async def test_a_session_is_closed_after_its_context(
    transport: AioPikaTransport, queue: str
) -> None:
    """Every call raises, and so does one that was waiting."""
    async with transport.session(subscription(queue)) as session:
        waiting = asyncio.create_task(anext(aiter(session)))
        await asyncio.sleep(0)

    with pytest.raises(SessionClosed):
        await waiting
    for use in (session.cancel(), session.settle([]), session.native(), anext(aiter(session))):
        with pytest.raises(SessionClosed):
            await use


# --- beside the session ----------------------------------------------------------


async def test_the_native_channel_is_separate(
    transport: AioPikaTransport, queue: str, name: str
) -> None:
    """It is opened once, on the same connection. Its consumer gets its own deliveries."""
    async with transport.session(subscription(queue)) as session:
        native, same = await asyncio.gather(session.native(), session.native())
        assert native is same
        assert queue == native.queue.name
        temporary = await native.channel.declare_queue(f"{name}-other", exclusive=True)
        taken: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        async def take(message: Any) -> None:
            await message.ack()
            taken.set_result(message.body)

        await temporary.consume(take)
        await publish(transport, temporary.name, [b"theirs"])
        await publish(transport, queue, [b"ours"])
        [ours] = await receive(session, 1)
        assert (b"ours", b"theirs") == (ours.body, await asyncio.wait_for(taken, PATIENCE))
        await session.settle([settlement(Disposition.ACK, [ours])])


async def test_an_unroutable_native_publish_raises(transport: AioPikaTransport, queue: str) -> None:
    """aio-pika's own channels would lose it silently."""
    async with transport.session(subscription(queue)) as session:
        native = await session.native()
        exchange = native.channel.default_exchange
        await exchange.publish(aio_pika.Message(b"there"), queue)
        with pytest.raises(aio_pika.exceptions.PublishError, match="NO_ROUTE"):
            await exchange.publish(aio_pika.Message(b"nowhere"), f"{queue}-no")
        assert 1 == len(await receive(session, 1))


# --- when the world ends it ------------------------------------------------------


async def lost(session: AioPikaSession) -> str:
    """Wait for the loss; return its reason."""
    with pytest.raises(SessionLost) as caught:
        await receive(session, 1_000_000)
    return str(caught.value)


async def test_a_deleted_queue_ends_the_session(
    transport: AioPikaTransport, queue: str, channel: AbstractChannel
) -> None:
    """The broker cancels the consumer, which stock clients don't report."""
    await publish(transport, queue, [b"1"])

    async with transport.session(subscription(queue)) as session:
        messages = await receive(session, 1)
        await channel.queue_delete(queue)
        assert "cancelled the consumer" in await lost(session)
        with pytest.raises(SessionLost, match=queue):
            await session.settle([settlement(Disposition.ACK, messages)])


async def test_a_closed_channel_ends_the_session_with_the_brokers_reason(
    transport: AioPikaTransport, queue: str
) -> None:
    """Nothing more is written on it: that would cost the connection."""
    async with transport.session(subscription(queue)) as session:
        native = await session.native()
        number = session._channel.number
        session._tap.write(pack_settlements(number, [Frame(Disposition.ACK, 999)]))
        reason = await lost(session)
        assert "406 PRECONDITION_FAILED - unknown delivery tag 999" in reason
        for use in (session.settle([]), session.cancel(), session.native()):
            with pytest.raises(SessionLost, match="999"):
                await use
        assert not session._tap.write(pack_settlements(number, [Frame(Disposition.ACK, 1)]))
        assert not native.channel.is_closed


async def test_a_silent_broker_ends_the_session(
    amqp_url: str, proxy: TcpProxy, queue: str, wire: Wire
) -> None:
    """After three heartbeats. Closing takes seconds although there is no answer."""
    transport = AioPikaTransport(Endpoint(url=proxy.url(amqp_url), heartbeat=1, wire=wire))

    async with transport.session(subscription(queue)) as session:
        proxy.freeze("to_client")
        start = time.monotonic()
        assert "has sent nothing" in await lost(session)
        assert 2 < time.monotonic() - start < 3 + SLACK
        start = time.monotonic()
    assert time.monotonic() - start < SLACK


@pytest.mark.long
async def test_closing_a_clogged_connection_takes_seconds(
    amqp_url: str, proxy: TcpProxy, queue: str, wire: Wire
) -> None:
    """The broker reads nothing: aiormq's own close would wait forever."""
    transport = AioPikaTransport(Endpoint(url=proxy.url(amqp_url), wire=wire))

    async with transport.session(subscription(queue)):
        proxy.freeze()
        start = time.monotonic()
    assert time.monotonic() - start < 5 + SLACK


@pytest.mark.long
@pytest.mark.parametrize("queue", ["classic"], indirect=True)
async def test_a_busy_connection_is_not_considered_dead(
    amqp_url: str, queue: str, wire: Wire
) -> None:
    """The library sees none of the deliveries."""
    transport = AioPikaTransport(Endpoint(url=amqp_url, heartbeat=1, wire=wire))
    await publish(transport, queue, [b"x"])

    async with transport.session(subscription(queue)) as session:
        end = time.monotonic() + 8
        while time.monotonic() < end:
            messages = await receive(session, 1)
            await asyncio.sleep(0.01)
            await session.settle([settlement(Disposition.REQUEUE, messages)])


async def test_a_connection_that_is_cut_during_cancel_is_a_loss(
    amqp_url: str, proxy: TcpProxy, queue: str, wire: Wire
) -> None:
    """The waiting call raises."""
    transport = AioPikaTransport(Endpoint(url=proxy.url(amqp_url), wire=wire))

    async with transport.session(subscription(queue)) as session:
        proxy.freeze("to_client")
        cancelling = asyncio.create_task(session.cancel())
        await asyncio.sleep(0.1)
        proxy.cut()
        with pytest.raises(SessionLost):
            await cancelling


# --- what cannot be consumed -----------------------------------------------------


async def test_a_missing_queue_is_a_topology_error(transport: AioPikaTransport, name: str) -> None:
    """With the broker's reason, and what to do."""
    with pytest.raises(TopologyError, match=r"404 NOT_FOUND - no queue .*create it"):
        async with transport.session(subscription(f"{name}-missing")):
            pass


@pytest.mark.parametrize("queue", ["classic"], indirect=True)
async def test_a_queue_with_an_exclusive_consumer_refuses_another(
    transport: AioPikaTransport, queue: str
) -> None:
    """With the broker's reason."""
    async with transport.session(subscription(queue, exclusive=True)):
        with pytest.raises(TopologyError, match=r"403 ACCESS_REFUSED.*exclusive"):
            async with transport.session(subscription(queue)):
                pass


async def test_consumer_arguments_reach_the_broker(transport: AioPikaTransport, queue: str) -> None:
    """The broker refuses an invalid one."""
    with pytest.raises(TopologyError, match="406"):
        async with transport.session(subscription(queue, arguments={"x-priority": "high"})):
            pass
