"""A publisher on a real RabbitMQ reports the right outcome of each message."""

from __future__ import annotations

import asyncio
import struct
import time
from collections import Counter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from aio_pika_batch.adapters.aio_pika.properties import decode, decode_headers
from aio_pika_batch.adapters.aio_pika.tables import entries
from aio_pika_batch.adapters.rabbitmq import AioPikaTransport
from aio_pika_batch.core.message import Message
from aio_pika_batch.core.publication import Copy, Outcome, Publication
from aio_pika_batch.core.topology import Queue, Topology
from aio_pika_batch.errors import PublishError
from aio_pika_batch.transport import Endpoint, Subscription, Wire
from tests.integration.helpers import PATIENCE, SLACK

if TYPE_CHECKING:
    from aio_pika.abc import AbstractChannel

    from aio_pika_batch.testing.rabbitmq.node import RabbitMQ
    from tests.support.proxy import TcpProxy

CONFIRMED, RETURNED, REFUSED, UNKNOWN, _, UNPUBLISHABLE = Outcome


@pytest.fixture
def transport(amqp_url: str, wire: Wire) -> AioPikaTransport:
    """The adapter, on either wire."""
    return AioPikaTransport(Endpoint(url=amqp_url, wire=wire))


@pytest.fixture
async def queue(transport: AioPikaTransport, name: str, channel: AbstractChannel) -> Any:
    """A queue."""
    await transport.declare(Topology(queues=(Queue(name),)))
    yield name
    await channel.queue_delete(name)


async def taken(transport: AioPikaTransport, queue: str, count: int) -> list[Message]:
    """The messages in the queue."""
    messages: list[Message] = []
    async with (
        asyncio.timeout(PATIENCE),
        transport.session(Subscription(queue=queue, prefetch=0, consumer_tag="c")) as session,
    ):
        while len(messages) < count:
            messages.extend(await anext(aiter(session)))
    return messages


def original(raw: bytes, body: bytes = b"body") -> Message:
    """A delivered message with these property bytes."""
    source = SimpleNamespace(queue="q", decode_properties=decode, decode_headers=decode_headers)
    return Message(source, 1, False, body, ("", "q"), raw)  # type: ignore[arg-type]


async def test_thousands_in_flight_are_all_confirmed(
    transport: AioPikaTransport, queue: str, channel: AbstractChannel
) -> None:
    """Pipelined, from several calls at once."""
    async with transport.publisher() as publisher:
        many = [Publication(b"%d" % number, routing_key=queue) for number in range(5000)]
        calls = [publisher.publish(many), *(publisher.publish(many[:10]) for _ in range(20))]
        outcomes = await asyncio.gather(*calls)
        assert {CONFIRMED} == {outcome for each in outcomes for outcome in each}
        assert publisher.is_open
        assert [] == await publisher.publish([])

    found = await channel.declare_queue(queue, passive=True)
    assert 5200 == found.declaration_result.message_count


async def test_unroutable_messages_are_returned(transport: AioPikaTransport, queue: str) -> None:
    """Even if all have the same message id, which other clients match them by."""

    def one(routing_key: str, *, mandatory: bool = True) -> Publication:
        return Publication(b"", routing_key=routing_key, message_id="same", mandatory=mandatory)

    async with transport.publisher() as publisher:
        keys = [queue, f"{queue}-no", f"{queue}-no", queue, f"{queue}-nowhere"] * 50
        outcomes = await publisher.publish([*map(one, keys), one(f"{queue}-no", mandatory=False)])

    expected = [CONFIRMED if key == queue else RETURNED for key in keys]
    assert [*expected, CONFIRMED] == outcomes


async def test_an_unroutable_message_with_invalid_properties_is_returned(
    transport: AioPikaTransport, queue: str
) -> None:
    """A client library that decodes it would lose the connection."""
    poison = original(struct.pack(">H", 1 << 10) + b"\x03\xff\xfe\xfd")
    async with transport.publisher() as publisher:
        there, nowhere = Copy(poison, "", queue, {}), Copy(poison, "", f"{queue}-no", {})
        assert [CONFIRMED, RETURNED, CONFIRMED] == await publisher.publish([there, nowhere, there])
        assert publisher.is_open


async def test_an_exchange_name_that_aiormq_refuses(amqp_url: str, queue: str) -> None:
    """Only on the plain wire: a copy isn't sent, a publication raises, the publisher stays open."""
    async with AioPikaTransport(Endpoint(url=amqp_url, wire="plain")).publisher() as publisher:
        there = Publication(b"", routing_key=queue)
        copy = Copy(original(b"\0\0"), "straße", queue, {})
        assert [CONFIRMED, UNPUBLISHABLE, CONFIRMED] == await publisher.publish(
            [there, copy, there]
        )
        with pytest.raises(PublishError, match="the client library refuses exchange 'straße'"):
            await publisher.publish([there, Publication(b"", exchange="straße")])
        assert publisher.is_open


async def test_a_full_queue_refuses(
    transport: AioPikaTransport, name: str, channel: AbstractChannel
) -> None:
    """The publisher stays open."""
    arguments = {"x-max-length": 5, "x-overflow": "reject-publish"}
    await transport.declare(Topology(queues=(Queue(name, arguments=arguments),)))

    async with transport.publisher() as publisher:
        outcomes = await publisher.publish([Publication(b"", routing_key=name)] * 20)
        assert publisher.is_open
    await channel.queue_delete(name)

    assert {CONFIRMED: 5, REFUSED: 15} == Counter(outcomes)


async def test_a_missing_exchange_refuses_what_goes_there(
    transport: AioPikaTransport, queue: str
) -> None:
    """The channel is closed, so the other outcomes are unknown, and the publisher is closed."""
    async with transport.publisher() as publisher:
        there = Publication(b"", routing_key=queue)
        missing = Publication(b"", exchange=f"{queue}-missing")
        outcomes = await publisher.publish([there, missing, there])
        assert REFUSED == outcomes[1]
        assert {outcomes[0], outcomes[2]} <= {CONFIRMED, UNKNOWN}
        assert outcomes[2] == UNKNOWN
        assert not publisher.is_open
        assert [UNKNOWN] == await publisher.publish([there])


async def test_another_users_id_would_close_the_channel(
    transport: AioPikaTransport, queue: str
) -> None:
    """A publication is refused. A copy leaves the user_id out."""
    async with transport.publisher() as publisher:
        foreign = original(struct.pack(">H", 1 << 4) + b"\x05other")
        assert [CONFIRMED] == await publisher.publish([Copy(foreign, "", queue, {})])
        own = original(struct.pack(">H", 1 << 4) + b"\x05guest")
        assert [CONFIRMED] == await publisher.publish([Copy(own, "", queue, {})])
        assert [REFUSED] == await publisher.publish(
            [Publication(b"", routing_key=queue, user_id="other")]
        )

    assert [None, "guest"] == [message.user_id for message in await taken(transport, queue, 2)]


TABLE = (
    b"\x01dd"
    + struct.pack(">d", 1.1)
    + b"\x01ff\x3f\x8c\xcc\xcd"
    + b"\x01bb\xff\x01ss\xff\xff\x01II\xff\xff\xff\xff\x01ll"
    + b"\xff" * 8
    + b"\x02uBB\xff\x02usu\xff\xff\x02uIi\xff\xff\xff\xff"
    + b"\x01SS\x00\x00\x00\x02\xff\xfe"
    + b"\x01xx\x00\x00\x00\x02\xff\xfe"
    + b"\x01VV\x01tt\x01"
    + b"\x01TT"
    + struct.pack(">Q", 1_700_000_000_123)
    + b"\x01DD\x02\x00\x00\x01\x3a"
    + b"\x01FF\x00\x00\x00\x04\x02inV"
    + b"\x01AA\x00\x00\x00\x06sI\x00"[:3]
    + b"\x00\x00\x00\x04b\x07t\x01"
)


async def test_a_copy_is_the_same_byte_for_byte(transport: AioPikaTransport, queue: str) -> None:
    """All types, a time in milliseconds, a text that isn't UTF-8. Absent stays absent."""
    table = struct.pack(">I", len(TABLE)) + TABLE
    raw = (
        struct.pack(">H", 1 << 13 | 1 << 10 | 1 << 6)
        + table
        + b"\x02\xff\xfe"
        + b"\x00\x00\x01\x8b\xcf\xe5\x68\x7b"
    )

    async with transport.publisher() as publisher:
        assert [CONFIRMED] == await publisher.publish([Copy(original(raw), "", queue, {})])
        [first] = await taken(transport, queue, 1)
        copy = Copy(first, "", f"{queue}", {"x-retry-count": 1}, frozenset(["V"]))
        assert [CONFIRMED] == await publisher.publish([copy])
    second = (await taken(transport, queue, 2))[1]

    assert sorted_properties(raw) == sorted_properties(first.raw_properties)
    without = TABLE.replace(b"\x01VV", b"") + b"\x0dx-retry-countI\x00\x00\x00\x01"
    table = struct.pack(">I", len(without)) + without
    assert sorted_properties(raw[:2] + table + raw[-11:]) == sorted_properties(
        second.raw_properties
    )
    assert 1 == second.retry_count


def sorted_properties(raw: bytes | None) -> tuple[bytes, list[bytes], bytes]:
    """Flags, headers and the rest: some brokers sort the table."""
    assert raw is not None
    end = 6 + struct.unpack_from(">I", raw, 2)[0]
    rows = [raw[start:stop] for _, start, _, stop in entries(raw, 6, end)]
    return raw[:2], sorted(rows), raw[end:]


async def test_aio_pika_reads_headers_of_all_types(
    transport: AioPikaTransport, queue: str, channel: AbstractChannel
) -> None:
    """As this library writes them."""
    headers = {
        "i": 5,
        "l": 2**40,
        "d": 1.1,
        "t": True,
        "n": None,
        "s": "ä",
        "x": b"\xff",
        "a": [1, {"b": "c"}],
    }
    async with transport.publisher() as publisher:
        await publisher.publish([Publication(b"", routing_key=queue, headers=headers, priority=0)])

    message = await (await channel.get_queue(queue)).get(no_ack=True)
    assert headers == message.headers


async def test_too_many_headers_are_not_sent(transport: AioPikaTransport, queue: str) -> None:
    """They would end the connection: a copy isn't sent, and a publication raises."""
    async with transport.publisher() as publisher:
        copy = Copy(original(b"\x00\x00"), "", queue, {"x": "x" * 200_000})
        there = Publication(b"", routing_key=queue)
        assert [CONFIRMED, UNPUBLISHABLE, CONFIRMED] == await publisher.publish(
            [there, copy, there]
        )
        with pytest.raises(PublishError, match="one frame"):
            await publisher.publish([Publication(b"", headers={"x": "x" * 200_000})])
        with pytest.raises(PublishError, match="'x': AMQP has no type for object"):
            await publisher.publish([there, Publication(b"", headers={"x": object()})])  # type: ignore[dict-item]
        assert [CONFIRMED] == await publisher.publish([there])

    assert 3 == len(await taken(transport, queue, 3))


async def test_silence_makes_the_outcome_unknown(
    amqp_url: str, proxy: TcpProxy, queue: str, wire: Wire
) -> None:
    """After `publish_timeout`. The publisher closes, because a late confirm would be ambiguous."""
    transport = AioPikaTransport(Endpoint(url=proxy.url(amqp_url), publish_timeout=0.3, wire=wire))

    async with transport.publisher() as publisher:
        proxy.freeze("to_client")
        assert [UNKNOWN] * 3 == await publisher.publish([Publication(b"", routing_key=queue)] * 3)
        assert not publisher.is_open
        proxy.thaw()


@pytest.mark.long
async def test_time_runs_out_in_silence_only(
    amqp_url: str, proxy: TcpProxy, queue: str, wire: Wire
) -> None:
    """A call may take longer than `publish_timeout` while confirms arrive."""
    transport = AioPikaTransport(Endpoint(url=proxy.url(amqp_url), publish_timeout=3.0, wire=wire))
    done = asyncio.Event()

    async def stutter() -> None:
        while not done.is_set():
            proxy.freeze("to_broker")
            await asyncio.sleep(0.15)
            proxy.thaw()
            await asyncio.sleep(0.002)

    async with transport.publisher() as publisher:
        stuttering = asyncio.create_task(stutter())
        start = time.monotonic()
        # More than a proxy takes in while it lets nothing through.
        outcomes = await publisher.publish([Publication(bytes(500_000), routing_key=queue)] * 60)
        assert time.monotonic() - start > 3.0
        done.set()
        await stuttering
        assert {CONFIRMED} == set(outcomes)
        assert publisher.is_open
        proxy.freeze("to_client")
        start = time.monotonic()
        assert [UNKNOWN] == await publisher.publish([Publication(b"", routing_key=queue)])
        assert time.monotonic() - start < 3.0 + SLACK


async def test_a_broker_that_reads_nothing_is_given_up(
    amqp_url: str, proxy: TcpProxy, queue: str, wire: Wire
) -> None:
    """The buffers are full, so the writer waits, but not forever."""
    transport = AioPikaTransport(Endpoint(url=proxy.url(amqp_url), publish_timeout=1, wire=wire))

    async with transport.publisher() as publisher:
        proxy.freeze()
        large = Publication(bytes(1_000_000), routing_key=queue, delivery_mode=1)
        assert {UNKNOWN} == set(await publisher.publish([large] * 50))
        assert not publisher.is_open


async def test_large_messages_are_written_in_several_parts(
    transport: AioPikaTransport, queue: str
) -> None:
    """They arrive whole."""
    bodies = [bytes([number]) * 700_000 for number in range(5)]
    async with transport.publisher() as publisher:
        assert [CONFIRMED] * 5 == await publisher.publish(
            [Publication(body, routing_key=queue) for body in bodies]
        )

    assert bodies == [message.body for message in await taken(transport, queue, 5)]


async def test_the_confirms_of_a_cancelled_call_are_ignored(
    transport: AioPikaTransport, queue: str
) -> None:
    """The next call gets its own."""
    async with transport.publisher() as publisher:
        cancelled = asyncio.create_task(
            publisher.publish([Publication(b"", routing_key="nowhere")] * 100)
        )
        await asyncio.sleep(0)
        cancelled.cancel()
        assert [CONFIRMED] * 5 == await publisher.publish([Publication(b"", routing_key=queue)] * 5)
        assert publisher.is_open


@pytest.mark.needs_node
async def test_a_blocked_publisher_does_not_block_acks(
    transport: AioPikaTransport, amqp_url: str, queue: str, rabbitmq: RabbitMQ, wire: Wire
) -> None:
    """Under a memory alarm publications wait, and their outcome is unknown. A session goes on."""
    from aio_pika_batch.core.settlement import Disposition, Settlement

    hasty = AioPikaTransport(Endpoint(url=amqp_url, publish_timeout=1, wire=wire))
    there = Publication(b"", routing_key=queue)
    async with (
        hasty.publisher() as publisher,
        transport.session(Subscription(queue=queue, prefetch=1, consumer_tag="c")) as session,
    ):
        assert [CONFIRMED] * 3 == await publisher.publish([there] * 3)
        await asyncio.to_thread(rabbitmq.set_memory_alarm, True)
        try:
            # The one after which the broker blocks the connection may still get through.
            outcomes = [*await publisher.publish([there]), *await publisher.publish([there])]
            assert UNKNOWN == outcomes[-1]
            for _ in range(3):
                async with asyncio.timeout(PATIENCE):
                    [message] = await anext(aiter(session))
                await session.settle([Settlement(Disposition.ACK, (message.delivery_tag,))])
        finally:
            await asyncio.to_thread(rabbitmq.set_memory_alarm, False)
