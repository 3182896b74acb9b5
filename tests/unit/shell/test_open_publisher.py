"""`open_publisher`, and single publications that share a write."""

from __future__ import annotations

import asyncio

import pytest

from aio_pika_batch import (
    BrokerUnavailable,
    Outcome,
    Publication,
    PublishError,
    SessionClosed,
    open_publisher,
)
from aio_pika_batch.adapters import memory
from aio_pika_batch.adapters.memory import ConnectFault, PublishFault
from aio_pika_batch.core.topology import Queue, Topology
from aio_pika_batch.runtime.publishing import SharedPublisher
from aio_pika_batch.transport import Endpoint
from tests.unit.shell.helpers import RecordingConsumer, numbered
from tests.unit.shell.scripted_transport import ScriptedTransport

MEMORY = "memory://publisher"


def sink(count):
    """Return publications to the queue `sink`."""
    return [Publication(body, routing_key="sink") for body in numbered(count)]


async def test_many_messages_are_confirmed(rabbit):
    """In their order; one that no queue takes is returned."""
    rabbit.declare("sink")
    async with open_publisher(MEMORY, transport=rabbit.transport) as publisher:
        lost = Publication(b"x", routing_key="nowhere")
        outcomes = await publisher.publish_many([*sink(3), lost])
    assert [Outcome.CONFIRMED] * 3 + [Outcome.RETURNED] == outcomes
    assert numbered(3) == rabbit.waiting("sink")


async def test_a_url_is_enough():
    """It names the transport, as for a consumer."""
    transport = memory.open_transport(Endpoint(url=MEMORY))
    await transport.declare(Topology(queues=(Queue("sink"),)))
    async with open_publisher(MEMORY) as publisher:
        await publisher.publish(b"0", routing_key="sink", message_id="m")
    assert 1 == await transport.count("sink")


async def test_an_unconfirmed_publication_is_an_error(rabbit):
    """With the timeout of the endpoint."""
    endpoint = Endpoint(url=MEMORY, publish_timeout=7)
    rabbit.broker.faults.on_publish(PublishFault.LOSE)
    async with open_publisher(endpoint, transport=rabbit.transport) as publisher:
        with pytest.raises(PublishError, match="7 s"):
            await publisher.publish(b"0", routing_key="sink")


async def test_a_broker_that_is_away_is_an_error_at_once(rabbit):
    """Not an outcome of the first message."""
    rabbit.broker.faults.connect_fault = ConnectFault.UNREACHABLE
    with pytest.raises(BrokerUnavailable):
        async with open_publisher(MEMORY, transport=rabbit.transport):
            pytest.fail("it connected")


async def test_a_lost_connection_is_opened_again(rabbit):
    """By the next call."""
    rabbit.declare("sink")
    async with open_publisher(MEMORY, transport=rabbit.transport) as publisher:
        await publisher.publish_many(sink(1))
        rabbit.broker.cut()
        assert [Outcome.CONFIRMED] == await publisher.publish_many(sink(1))


async def test_a_closed_publisher_publishes_nothing(rabbit):
    """The error says where it may be used."""
    async with open_publisher(MEMORY, transport=rabbit.transport) as publisher:
        pass
    with pytest.raises(SessionClosed, match="inside its `async with` block"):
        await publisher.publish_many(sink(1))
    with pytest.raises(SessionClosed, match="inside its `async with` block"):
        await publisher.publish(b"0")


async def test_the_end_waits_for_what_is_being_published():
    """A task that publishes when the block ends gets its confirm."""
    script = ScriptedTransport()
    script.on_publish = lambda *_: asyncio.sleep(2)
    async with open_publisher(MEMORY, transport=script) as publisher:
        publishing = asyncio.create_task(publisher.publish(b"0"))
        await asyncio.sleep(0)
    assert publishing.done()
    assert ["publisher", "publish", "leave publisher"] == script.steps
    await publishing


@pytest.mark.parametrize("by", ["consumer", "publisher"])
async def test_single_publications_of_one_moment_share_a_write(by):
    """Those of tasks that run at the same time; each gets an outcome of its own."""
    script = ScriptedTransport()
    script.outcomes = [Outcome.CONFIRMED, Outcome.RETURNED, Outcome.CONFIRMED]
    opened = (
        open_publisher(MEMORY, transport=script)
        if by == "publisher"
        else RecordingConsumer(transport=script)
    )
    async with opened as publisher:
        results = await asyncio.gather(
            *(publisher.publish(each, routing_key="sink") for each in numbered(3)),
            return_exceptions=True,
        )
        await publisher.publish(b"later", routing_key="sink")
    assert [numbered(3), [b"later"]] == script.details("publish")
    assert [type(None), PublishError, type(None)] == [type(each) for each in results]


async def test_a_cancelled_publication_does_not_affect_the_others():
    """The write goes on."""
    script = ScriptedTransport()
    script.on_publish = lambda *_: asyncio.sleep(1)
    async with open_publisher(MEMORY, transport=script) as publisher:
        first, second = (asyncio.create_task(publisher.publish(each)) for each in numbered(2))
        await asyncio.sleep(0.5)
        first.cancel()
        await second
    assert first.cancelled()
    assert [numbered(2)] == script.details("publish")


async def test_a_publication_that_cannot_be_encoded_does_not_affect_the_others():
    """Nothing was sent of the first write, so each is published alone."""
    script = ScriptedTransport()

    async def refuse(publications):
        if any(each.body == b"1" for each in publications):
            raise PublishError("a header can't be encoded")

    script.on_publish = refuse
    async with open_publisher(MEMORY, transport=script) as publisher:
        results = await asyncio.gather(
            *(publisher.publish(each) for each in numbered(3)), return_exceptions=True
        )
    assert [None, "a header can't be encoded", None] == [each and str(each) for each in results]


async def test_an_error_of_the_transport_reaches_every_caller():
    """None of them waits forever."""
    script = ScriptedTransport()

    async def fail(_):
        raise ZeroDivisionError

    script.on_publish = fail
    async with open_publisher(MEMORY, transport=script) as publisher:
        results = await asyncio.gather(
            *(publisher.publish(each) for each in numbered(3)), return_exceptions=True
        )
    assert [ZeroDivisionError] * 3 == [type(each) for each in results]


async def test_the_end_of_a_write_cancels_those_who_wait():
    """For example if the event loop is being closed."""
    script = ScriptedTransport()
    script.on_publish = lambda *_: asyncio.sleep(100)
    async with open_publisher(
        Endpoint(url=MEMORY, publish_timeout=1), transport=script
    ) as publisher:
        shared, _ = publisher._publisher()
        assert isinstance(shared, SharedPublisher)
        waiting = asyncio.create_task(publisher.publish(b"0"))
        await asyncio.sleep(0.1)
        for each in shared._sending:
            each.cancel()
        await asyncio.wait({waiting})
    assert waiting.cancelled()
