"""A session hands out deliveries in chunks, and settles them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import pytest

from aio_pika_batch.adapters.memory import Broker, EventKind, MemoryTransport
from aio_pika_batch.adapters.memory.session import MemorySession
from aio_pika_batch.core.message import Message, Properties
from aio_pika_batch.core.settlement import Disposition, Settlement
from aio_pika_batch.core.topology import Binding, Exchange, Queue, Topology
from aio_pika_batch.errors import SessionClosed, SessionLost, SettlementError, TopologyError
from aio_pika_batch.transport import NativeSession, Session, Subscription
from tests.unit.adapters.memory.client import bodies

DEAD = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": "dead"}


@asynccontextmanager
async def consuming(
    transport: MemoryTransport, *, prefetch: int = 10, queue: str = "q"
) -> AsyncIterator[MemorySession]:
    """A session on a queue with a dead-letter queue."""
    await transport.declare(
        Topology(queues=(Queue("dead"), Queue(queue, arguments=DEAD, existing_first=True)))
    )
    subscription = Subscription(queue=queue, prefetch=prefetch, consumer_tag="tag")
    async with transport.session(subscription) as session:
        yield session


def put(memory: Broker, *contents: bytes) -> None:
    """Put messages into the queue."""
    for body in contents:
        memory.put("q", body)


def of(chunk: Sequence[Message]) -> list[bytes]:
    """The bodies of a chunk."""
    return [message.body for message in chunk]


def settled(disposition: Disposition, *tags: int) -> list[Settlement]:
    """One settlement."""
    return [Settlement(disposition, tags)]


async def test_it_implements_the_ports_session(transport: MemoryTransport):
    """And offers native objects."""
    async with consuming(transport) as session:
        as_port: Session = session
        assert as_port is session
        assert isinstance(session, NativeSession)


async def test_waiting_messages_arrive_in_one_chunk(transport: MemoryTransport, memory: Broker):
    """As many as the prefetch allows, in the order of their tags."""
    async with consuming(transport, prefetch=3) as session:
        put(memory, b"1", b"2", b"3", b"4")
        chunks = aiter(session)
        chunk = await anext(chunks)
        assert of(chunk) == [b"1", b"2", b"3"]
        assert [message.delivery_tag for message in chunk] == [1, 2, 3]
        await session.settle(settled(Disposition.ACK, 1, 2))
        assert of(await anext(chunks)) == [b"4"]


async def test_a_new_message_wakes_the_iteration(
    transport: MemoryTransport, memory: Broker, virtual_loop
):
    """At the time when it is published."""
    async with consuming(transport) as session:
        virtual_loop.call_later(5, put, memory, b"1", b"2")
        chunk = await anext(aiter(session))
        assert of(chunk) == [b"1", b"2"]
        assert virtual_loop.time() == 5


async def test_a_message_arrives_as_it_was_published(transport: MemoryTransport, memory: Broker):
    """With the queue, the consumer tag and the age that its session adds."""
    async with consuming(transport) as session:
        memory.put(
            "q",
            b'{"a": 1}',
            Properties(
                headers={"x-retry-count": 2, "list": [1]},
                message_id="m",
                timestamp=datetime.fromtimestamp(999_999_990, UTC),
            ),
            exchange="x",
            routing_key="k",
        )
        (message,) = await anext(aiter(session))
    assert (message.queue, message.consumer_tag) == ("q", "tag")
    assert (message.exchange, message.routing_key) == ("x", "k")
    assert (message.retry_count, message.message_id, message.content_type) == (2, "m", None)
    assert message.headers == {"x-retry-count": 2, "list": [1]}
    assert message.json() == {"a": 1}
    assert message.age == 10.0
    assert message.redelivered is False
    assert message.raw_properties is None


async def test_each_disposition_has_its_effect(transport: MemoryTransport, memory: Broker):
    """Acknowledged, dead-lettered, or requeued by reject or nack."""
    async with consuming(transport, prefetch=4) as session:
        put(memory, b"ack", b"reject", b"requeue", b"return")
        chunks = aiter(session)
        await anext(chunks)
        await session.settle(
            [
                Settlement(Disposition.RETURN, (4,)),
                Settlement(Disposition.ACK, (1,)),
                Settlement(Disposition.REQUEUE, (3,)),
                Settlement(Disposition.REJECT, (2,)),
            ]
        )
        again = await anext(chunks)
        assert sorted((message.body, message.redelivered) for message in again) == [
            (b"requeue", True),
            (b"return", True),
        ]
    assert bodies(memory, "dead") == [b"reject"]
    back = [(event.body, event.detail) for event in memory.journal.of(EventKind.REQUEUED)]
    assert sorted(back[:2]) == [(b"requeue", "basic.reject"), (b"return", "basic.nack")]


@pytest.mark.parametrize("tags", [(1, 1), (5,), (0,)])
async def test_a_tag_is_settled_once_and_only_if_it_was_delivered(
    transport: MemoryTransport, memory: Broker, tags
):
    """Otherwise nothing is sent."""
    async with consuming(transport) as session:
        chunks = aiter(session)
        put(memory, b"1", b"2")
        await anext(chunks)
        with pytest.raises(SettlementError):
            await session.settle(settled(Disposition.ACK, 2, *tags))
        assert len(memory.unacked("q")) == 2
        await session.settle(settled(Disposition.ACK, 1, 2))
        put(memory, b"3")
        await anext(chunks)
        with pytest.raises(SettlementError, match="settled already"):
            await session.settle(settled(Disposition.ACK, 2))
        assert [message.body for message in memory.unacked("q")] == [b"3"]


async def test_a_message_that_was_not_handed_out_cannot_be_settled(
    transport: MemoryTransport, memory: Broker
):
    """Even if it has arrived."""
    async with consuming(transport) as session:
        put(memory, b"1")
        with pytest.raises(SettlementError, match="never delivered here"):
            await session.settle(settled(Disposition.ACK, 1))


async def test_a_wrong_frame_ends_the_session(
    transport: MemoryTransport, memory: Broker, monkeypatch
):
    """As on a real broker."""
    async with consuming(transport) as session:
        put(memory, b"1", b"2")
        chunks = aiter(session)
        await anext(chunks)
        await session.settle(settled(Disposition.ACK, 1))
        # As if the ledger had miscounted.
        session._ledger.deliver([77])
        with pytest.raises(SessionLost, match="406 PRECONDITION_FAILED - unknown delivery tag 77"):
            await session.settle(settled(Disposition.ACK, 77))
        with pytest.raises(SessionLost, match="unknown delivery tag 77"):
            await anext(chunks)


async def test_cancel_ends_the_iteration_after_the_delivered_messages(
    transport: MemoryTransport, memory: Broker
):
    """They can still be settled."""
    async with consuming(transport, prefetch=2) as session:
        put(memory, b"1", b"2", b"3")
        await session.cancel()
        await session.cancel()
        put(memory, b"4")
        handed_out = [of(chunk) async for chunk in session]
        assert handed_out == [[b"1", b"2"]]
        await session.settle(settled(Disposition.ACK, 1, 2))
        assert bodies(memory, "q") == [b"3", b"4"]
        assert memory.consumers("q") == []


async def test_a_session_is_iterated_once(transport: MemoryTransport):
    """Two readers would mix up the order."""
    async with consuming(transport) as session:
        aiter(session)
        with pytest.raises(RuntimeError, match="iterated once"):
            aiter(session)


@pytest.mark.parametrize("when", ["before", "while waiting"])
async def test_a_cut_connection_loses_the_session(
    transport: MemoryTransport, memory: Broker, virtual_loop, when
):
    """Every call raises the reason; messages that had arrived are not handed out."""
    async with consuming(transport, prefetch=1) as session:
        chunks = aiter(session)
        if when == "before":
            put(memory, b"1")
            memory.cut(reason="rats")
        else:
            virtual_loop.call_later(3, memory.cut, None, "rats")
        with pytest.raises(SessionLost, match="the session on queue 'q' is lost: rats"):
            await anext(chunks)
        for use in (session.cancel, lambda: session.settle([]), session.native):
            with pytest.raises(SessionLost, match="rats"):
                await use()


async def test_tags_of_a_lost_session_settle_nothing(transport: MemoryTransport, memory: Broker):
    """Although the next session has the same numbers."""
    async with consuming(transport) as lost:
        put(memory, b"1")
        await anext(aiter(lost))
        memory.cut()
        async with consuming(transport) as session:
            (message,) = await anext(aiter(session))
            assert (message.delivery_tag, message.redelivered) == (1, True)
            with pytest.raises(SessionLost):
                await lost.settle(settled(Disposition.ACK, 1))
            assert len(memory.unacked("q")) == 1
            await session.settle(settled(Disposition.ACK, 1))
            assert memory.unacked("q") == []


@pytest.mark.parametrize("how", ["deleted", "cancelled"])
async def test_a_cancelled_consumer_loses_the_session(
    transport: MemoryTransport, memory: Broker, how
):
    """Because the queue was deleted or its leader moved."""
    async with consuming(transport) as session:
        put(memory, b"1")
        chunks = aiter(session)
        await anext(chunks)
        waiting = asyncio.create_task(anext(chunks))
        await asyncio.sleep(1)
        if how == "deleted":
            memory.delete_queue("q")
        else:
            memory.cancel_consumers("q")
        with pytest.raises(SessionLost, match="cancelled the consumer"):
            await waiting
        with pytest.raises(SessionLost):
            await session.settle(settled(Disposition.ACK, 1))
    if how == "cancelled":
        assert bodies(memory, "q") == [b"1"]


async def test_leaving_the_context_requeues_unsettled_messages(
    transport: MemoryTransport, memory: Broker
):
    """And closes the connection; later calls raise."""
    async with consuming(transport) as session:
        put(memory, b"1", b"2")
        chunks = aiter(session)
        await anext(chunks)
        waiting = asyncio.create_task(anext(chunks))
        await asyncio.sleep(1)
        await session.settle(settled(Disposition.ACK, 1))
    with pytest.raises(SessionClosed):
        await waiting
    for use in (session.cancel, lambda: session.settle([]), session.native):
        with pytest.raises(SessionClosed):
            await use()
    assert bodies(memory, "q") == [b"2"]
    assert memory.connections == []


async def test_an_error_in_the_context_closes_the_connection(
    transport: MemoryTransport, memory: Broker
):
    """And is not swallowed."""
    with pytest.raises(ZeroDivisionError):
        async with consuming(transport):
            raise ZeroDivisionError
    assert memory.connections == []


async def test_a_missing_queue_raises_when_the_context_is_entered(
    transport: MemoryTransport, memory: Broker
):
    """With the broker's text and advice."""
    subscription = Subscription(queue="nope", prefetch=1, consumer_tag="t")
    with pytest.raises(TopologyError) as caught:
        async with transport.session(subscription):
            pass
    assert str(caught.value) == (
        "queue 'nope': 404 NOT_FOUND - no queue 'nope' in vhost '/';"
        " create it, or let the consumer declare it (declare=True)"
    )
    assert memory.connections == []


async def test_consumer_arguments_are_passed_on(transport: MemoryTransport, memory: Broker):
    """So are priority and exclusiveness."""
    async with consuming(transport) as low:
        high = Subscription(queue="q", prefetch=1, consumer_tag="t", arguments={"x-priority": 5})
        async with transport.session(high) as session:
            put(memory, b"1", b"2")
            assert of(await anext(aiter(session))) == [b"1"]
            assert of(await anext(aiter(low))) == [b"2"]
        alone = Subscription(queue="q", prefetch=1, consumer_tag="t", exclusive=True)
        with pytest.raises(TopologyError, match=r"403 ACCESS_REFUSED .* in exclusive use"):
            async with transport.session(alone):
                pass


async def test_a_session_declares_its_exclusive_queue(transport: MemoryTransport, memory: Broker):
    """Which is deleted with its connection."""
    await transport.declare(Topology(exchanges=(Exchange("x", "fanout"),)))
    own = Topology(queues=(Queue("mine", exclusive=True),), bindings=(Binding("mine", "x"),))
    subscription = Subscription(queue="mine", prefetch=1, consumer_tag="t", own=own)
    for _ in range(2):
        async with transport.session(subscription):
            assert memory.queues == ["mine"]
            assert memory.bindings("mine") == [("x", "", {})]
            with pytest.raises(TopologyError, match="405 RESOURCE_LOCKED"):
                async with transport.session(subscription):
                    pass
        assert memory.queues == []


async def test_the_number_of_awaits_does_not_depend_on_the_number_of_messages(
    transport: MemoryTransport, memory: Broker
):
    """A thousand messages take as many turns of the loop as ten."""

    async def turns(count: int) -> int:
        passed = 0
        done = False

        async def counting() -> None:
            nonlocal passed
            while not done:
                passed += 1
                await asyncio.sleep(0)

        async with consuming(transport, prefetch=0) as session:
            put(memory, *(b"x" for _ in range(count)))
            counter = asyncio.create_task(counting())
            chunk = await anext(aiter(session))
            assert len(chunk) == count
            tags = [message.delivery_tag for message in chunk]
            await session.settle(settled(Disposition.ACK, *tags))
            done = True
            await counter
        return passed

    assert await turns(1000) == await turns(10)


@pytest.mark.parametrize(
    ("kind", "order"), [("classic", [b"4", b"5", b"1"]), ("quorum", [b"1", b"4", b"5"])]
)
async def test_a_classic_queue_takes_acks_before_what_was_written_with_them(
    transport: MemoryTransport, memory: Broker, kind: str, order: list[bytes]
):
    """So the place of an acked message is not for one that is requeued in the same write."""
    arguments = {"x-queue-type": kind}
    await transport.declare(Topology(queues=(Queue("q", arguments=arguments),)))
    put(memory, b"1", b"2", b"3", b"4", b"5")
    subscription = Subscription(queue="q", prefetch=3, consumer_tag="tag")
    async with transport.session(subscription) as session:
        chunks = aiter(session)
        assert of(await anext(chunks)) == [b"1", b"2", b"3"]
        await session.settle(
            [Settlement(Disposition.REQUEUE, (1,)), Settlement(Disposition.ACK, (2, 3))]
        )
        assert of(await anext(chunks)) == order
