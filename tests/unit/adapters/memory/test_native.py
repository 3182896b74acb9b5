"""The native objects have aio-pika's calls."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from enum import Enum
from types import SimpleNamespace

import pytest

from aio_pika_batch.adapters.memory import Broker, MemoryTransport, NativeMessage, PublishFault
from aio_pika_batch.adapters.memory.native import NativeChannel, read_message
from aio_pika_batch.core.message import Properties
from aio_pika_batch.core.topology import Queue, Topology
from aio_pika_batch.errors import PublishError, SessionLost, TopologyError
from aio_pika_batch.transport import Native, Subscription
from tests.unit.adapters.memory.client import bodies


class ExchangeType(Enum):
    """As aio-pika has it."""

    TOPIC = "topic"


@pytest.fixture
async def native(transport: MemoryTransport) -> AsyncIterator[Native]:
    """A session's native objects."""
    await transport.declare(Topology(queues=(Queue("q"),)))
    subscription = Subscription(queue="q", prefetch=1, consumer_tag="t")
    async with transport.session(subscription) as session:
        native = await session.native()
        assert await session.native() is native
        yield native


@pytest.fixture
def channel(native: Native) -> NativeChannel:
    """The channel among them."""
    assert isinstance(native.channel, NativeChannel)
    return native.channel


async def test_native_objects_declare_bind_and_publish(native: Native, memory: Broker):
    """With aio-pika's calls."""
    exchange = await native.channel.declare_exchange(
        "x", type=ExchangeType.TOPIC, durable=True, auto_delete=False, arguments=None
    )
    audit = await native.channel.declare_queue("audit", durable=True, arguments={"x-max-length": 5})
    await audit.bind(exchange, routing_key="order.*")
    await audit.bind("x", "#.late", arguments={"note": 1})
    await exchange.publish(
        NativeMessage(b"1", headers={"a": 1}), routing_key="order.new", mandatory=True
    )
    assert bodies(memory, "audit") == [b"1"]
    assert memory.arguments("audit") == {"x-max-length": 5}
    await audit.unbind(exchange, routing_key="order.*")
    assert memory.bindings("audit") == [("x", "#.late", {"note": 1})]
    await audit.purge()
    assert bodies(memory, "audit") == []
    await audit.delete()
    await exchange.delete()
    assert memory.queues == ["q"]
    with pytest.raises(TopologyError, match="no exchange 'x'"):
        await native.channel.get_exchange("x")


async def test_the_native_queue_is_the_consumed_one(native: Native, memory: Broker):
    """Its channel is another than the consuming one."""
    await native.queue.bind("amq.fanout")
    assert native.queue.name == "q"
    assert memory.bindings("q") == [("amq.fanout", "q", {})]
    await native.channel.default_exchange.publish(NativeMessage(b"1"), "q")
    assert [message.body for message in memory.unacked("q")] == [b"1"]


async def test_existing_entities_are_found_without_declaring_them(channel: NativeChannel):
    """They are checked unless `ensure` is off."""
    assert (await channel.get_queue("q")).name == "q"
    assert (await channel.declare_queue("q", passive=True)).name == "q"
    assert (await channel.get_exchange("amq.topic")).name == "amq.topic"
    assert (await channel.get_exchange("later", ensure=False)).name == "later"
    assert (await channel.get_queue("later", ensure=False)).name == "later"
    assert (await channel.declare_queue(exclusive=True)).name.startswith("amq.gen-")


@pytest.mark.parametrize("call", ["exchange", "queue"])
async def test_a_refusal_raises_and_closes_the_native_channel(channel: NativeChannel, call: str):
    """The next call raises the reason."""
    with pytest.raises(TopologyError, match=f"{call} 'nope': 404 NOT_FOUND"):
        await getattr(channel, f"get_{call}")("nope")
    assert channel.is_closed
    with pytest.raises(SessionLost, match="404 NOT_FOUND"):
        await channel.declare_queue("late")
    with pytest.raises(SessionLost, match="404 NOT_FOUND"):
        await channel.default_exchange.publish(NativeMessage(b"1"), "q")


async def test_an_unconfirmed_native_publication_raises(channel: NativeChannel, memory: Broker):
    """It was returned or refused, or its exchange is missing."""
    with pytest.raises(PublishError, match="routing key 'nowhere': returned"):
        await channel.default_exchange.publish(NativeMessage(b"1"), "nowhere")
    await channel.default_exchange.publish(NativeMessage(b"1"), "nowhere", mandatory=False)
    memory.faults.on_publish(PublishFault.REFUSE, times=1)
    with pytest.raises(PublishError, match="refused"):
        await channel.default_exchange.publish(NativeMessage(b"1"), "q")
    missing = await channel.get_exchange("missing", ensure=False)
    with pytest.raises(PublishError, match="404 NOT_FOUND - no exchange 'missing' in vhost '/'"):
        await missing.publish(NativeMessage(b"1"), "k")
    assert channel.is_closed


async def test_a_queue_with_consumers_is_not_deleted(native: Native, memory: Broker):
    """Unless `if_unused` is off."""
    with pytest.raises(TopologyError, match="queue 'q' in vhost '/' in use"):
        await native.queue.delete()


async def test_a_queue_with_messages_is_not_deleted(channel: NativeChannel, memory: Broker):
    """Unless `if_empty` is off."""
    queue = await channel.declare_queue("full", durable=True)
    memory.put("full", b"1")
    await queue.delete(if_empty=False)
    queue = await channel.declare_queue("full", durable=True)
    memory.put("full", b"1")
    with pytest.raises(TopologyError, match="not empty"):
        await queue.delete()


class DeliveryMode(int, Enum):
    """As aio-pika has it."""

    PERSISTENT = 2


def test_a_message_is_read_by_its_attributes():
    """Of whatever class it is; aio-pika's has enums, durations and dates."""
    when = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    message = SimpleNamespace(
        body=b"1",
        headers={"a": 1},
        delivery_mode=DeliveryMode.PERSISTENT,
        priority=3,
        expiration=timedelta(seconds=2),
        timestamp=when.timestamp(),
        message_id="m",
    )
    read = read_message(message, exchange="x", routing_key="k", mandatory=False)
    assert (read.exchange, read.routing_key, read.mandatory) == ("x", "k", False)
    assert read.properties == Properties(
        headers={"a": 1},
        delivery_mode=2,
        priority=3,
        expiration="2000",
        timestamp=when,
        message_id="m",
    )
    assert type(read.delivery_mode) is int


def test_a_message_without_properties_has_none():
    """Empty headers count as absent, as in aio-pika."""
    read = read_message(
        NativeMessage(b"1", headers={}), exchange="", routing_key="q", mandatory=True
    )
    assert read.properties == Properties()


@pytest.mark.parametrize("zone", [UTC, None])
def test_an_expiration_may_be_a_datetime(zone):
    """It counts from now."""
    moment = datetime.now(zone) + timedelta(hours=1)
    read = read_message(
        NativeMessage(b"1", expiration=moment, timestamp=moment),
        exchange="",
        routing_key="",
        mandatory=True,
    )
    assert isinstance(read.expiration, timedelta)
    assert timedelta(minutes=59) < read.expiration <= timedelta(hours=1)
    assert read.timestamp == moment
