"""A publisher returns the outcome of each publication."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest

from aio_pika_batch.adapters.memory import Broker, MemoryTransport, PublishFault
from aio_pika_batch.core.message import Properties
from aio_pika_batch.core.publication import Copy, Outcome, Publication
from aio_pika_batch.core.topology import Queue, Topology
from aio_pika_batch.transport import Publisher, Subscription
from tests.unit.adapters.memory.client import bodies

CONFIRMED, RETURNED = Outcome.CONFIRMED, Outcome.RETURNED
REFUSED, UNKNOWN = Outcome.REFUSED, Outcome.UNKNOWN


@pytest.fixture
async def queue(transport: MemoryTransport) -> str:
    """A queue to publish to."""
    await transport.declare(Topology(queues=(Queue("q"),)))
    return "q"


def to(key: str, body: bytes = b"1", **more) -> Publication:
    """A publication."""
    return Publication(body, routing_key=key, **more)


async def test_each_publication_has_its_outcome(transport, memory: Broker, queue: str):
    """In order, and independent of the others."""
    full = {"x-max-length": 0, "x-overflow": "reject-publish"}
    await transport.declare(Topology(queues=(Queue("full", arguments=full),)))
    async with transport.publisher() as publisher:
        as_port: Publisher = publisher
        outcomes = await as_port.publish(
            [to(queue), to("nobody"), to("full"), to("nobody", mandatory=False), to(queue)]
        )
        assert outcomes == [CONFIRMED, RETURNED, REFUSED, CONFIRMED, CONFIRMED]
        assert publisher.is_open
    assert bodies(memory, queue) == [b"1", b"1"]
    assert memory.connections == []


async def test_properties_arrive_as_they_were_published(transport, memory: Broker, queue: str):
    """Absent ones stay absent; messages are persistent by default."""
    when = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    async with transport.publisher() as publisher:
        await publisher.publish(
            [to(queue, headers={"a": 1.1}, expiration=1.5, timestamp=when, app_id="me"), to(queue)]
        )
    full, bare = (message.properties for message in memory.ready(queue))
    assert full == Properties(
        headers={"a": 1.1}, expiration="1500", timestamp=when, app_id="me", delivery_mode=2
    )
    assert bare == Properties(delivery_mode=2)


async def test_a_copy_keeps_its_properties_except_another_users_user_id(
    transport, memory: Broker, queue: str
):
    """And except what it changes."""
    memory.put(queue, b"1", Properties(headers={"a": 1, "drop": 2}, user_id="guest", priority=0))
    subscription = Subscription(queue=queue, prefetch=1, consumer_tag="t")
    async with transport.session(subscription) as session, transport.publisher() as publisher:
        (message,) = await anext(aiter(session))
        copy = Copy(message, "", queue, {"n": 1}, frozenset({"drop"}))
        assert await publisher.publish([copy]) == [CONFIRMED]
        assert memory.ready(queue)[0].properties == Properties(
            headers={"a": 1, "n": 1}, user_id="guest", priority=0
        )
        message._read = Properties(user_id="bob")
        assert await publisher.publish([copy]) == [CONFIRMED]
        assert memory.ready(queue)[1].properties == Properties(headers={"n": 1})


@pytest.mark.parametrize("bad", [{"headers": {"a": object()}}, {"priority": 256}])
async def test_nothing_is_sent_if_one_publication_is_invalid(transport, memory: Broker, queue, bad):
    """The publisher stays open."""
    async with transport.publisher() as publisher:
        with pytest.raises((TypeError, ValueError)):
            await publisher.publish([to(queue), to(queue, **bad)])
        assert publisher.is_open
    assert bodies(memory, queue) == []


async def test_a_missing_exchange_refuses_one_and_ends_the_publisher(
    transport, memory: Broker, queue: str
):
    """Those before it are confirmed; the outcome of those after it is unknown."""
    async with transport.publisher() as publisher:
        outcomes = await publisher.publish(
            [to(queue, b"1"), to("k", exchange="missing"), to(queue, b"3")]
        )
        assert outcomes == [CONFIRMED, REFUSED, UNKNOWN]
        assert not publisher.is_open
        assert await publisher.publish([to(queue)]) == [UNKNOWN]
    assert bodies(memory, queue) == [b"1"]


@pytest.mark.parametrize(
    ("fault", "stored"), [(PublishFault.UNCONFIRMED, [b"1", b"2"]), (PublishFault.LOSE, [b"2"])]
)
async def test_a_publication_without_a_confirm_is_unknown_after_the_timeout(
    memory: Broker, queue: str, virtual_loop, fault, stored
):
    """The others have their outcomes, and the publisher stays open."""
    transport = MemoryTransport(memory, publish_timeout=7)
    memory.faults.on_publish(fault, times=1)
    async with transport.publisher() as publisher:
        assert await publisher.publish([to(queue, b"1"), to(queue, b"2")]) == [UNKNOWN, CONFIRMED]
        assert virtual_loop.time() == 7
        assert publisher.is_open
    assert bodies(memory, queue) == stored


async def test_publish_returns_as_soon_as_all_confirms_are_there(
    transport, queue: str, virtual_loop
):
    """It does not wait for the timeout."""
    async with transport.publisher() as publisher:
        await publisher.publish([to(queue)] * 100)
    assert virtual_loop.time() == 0


async def test_a_blocked_broker_confirms_when_it_is_unblocked(
    transport, memory: Broker, queue: str, virtual_loop
):
    """A confirm after the timeout is ignored."""
    memory.faults.on_publish(PublishFault.BLOCK)
    virtual_loop.call_later(3, memory.unblock)
    async with transport.publisher() as publisher:
        assert await publisher.publish([to(queue)]) == [CONFIRMED]
        assert virtual_loop.time() == 3
        memory.faults.on_publish(PublishFault.BLOCK)
        assert await publisher.publish([to(queue), to("nobody")]) == [UNKNOWN, UNKNOWN]
        memory.unblock()
        assert await publisher.publish([to(queue)]) == [CONFIRMED]
    assert bodies(memory, queue) == [b"1"] * 3


async def test_publications_are_unknown_when_the_connection_is_cut(
    transport, memory: Broker, queue: str, virtual_loop
):
    """At once, and not after the timeout."""
    memory.faults.on_publish(PublishFault.LOSE, times=1)
    virtual_loop.call_later(2, memory.cut)
    async with transport.publisher() as publisher:
        assert await publisher.publish([to(queue), to(queue)]) == [UNKNOWN, CONFIRMED]
        assert virtual_loop.time() == 2
        assert not publisher.is_open
        assert await publisher.publish([to(queue)]) == [UNKNOWN]


async def test_concurrent_calls_get_their_own_outcomes(transport, memory: Broker, queue: str):
    """Whatever the outcomes of the others are."""
    memory.faults.on_publish(PublishFault.REFUSE, times=1)
    async with transport.publisher() as publisher:
        first, second = await asyncio.gather(
            publisher.publish([to(queue), to("nobody")]), publisher.publish([to(queue)])
        )
    assert (first, second) == ([REFUSED, RETURNED], [CONFIRMED])


async def test_a_cancelled_call_leaves_nothing_behind(transport, memory: Broker, queue: str):
    """A later confirm of its publications is ignored."""
    memory.faults.on_publish(PublishFault.BLOCK)
    async with transport.publisher() as publisher:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await publisher.publish([to(queue)])
        assert publisher._waiting == {}
        memory.unblock()
        assert await publisher.publish([to(queue)]) == [CONFIRMED]
