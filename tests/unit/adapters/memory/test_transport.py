"""A transport finds its broker by name and loop, and raises the port's errors."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import weakref

import pytest

from aio_pika_batch.adapters.memory import Broker, ConnectFault, MemoryTransport, open_transport
from aio_pika_batch.core.topology import Binding, Exchange, Queue, Topology
from aio_pika_batch.errors import (
    AccessRefused,
    BrokerUnavailable,
    ConfigurationError,
    TopologyError,
)
from aio_pika_batch.testing.virtual_time import VirtualTimeLoop, run
from aio_pika_batch.transport import Endpoint, Subscription, Transport, VersionedTransport
from tests.unit.adapters.memory.client import Client, bodies


def opened(url: str) -> MemoryTransport:
    """Open a transport by its URL."""
    return open_transport(Endpoint(url=url))


async def test_a_loop_has_one_broker_for_each_name():
    """The same name leads to the same broker."""
    as_port: Transport = opened("memory://a")
    assert as_port is not None
    assert opened("memory://a").broker is opened("memory://a").broker
    assert opened("memory://a").broker is not opened("memory://b").broker
    assert opened("memory://").broker is not opened("memory://a").broker


def test_each_loop_has_brokers_of_its_own():
    """Nothing leaks from one test into the next."""

    async def fill() -> list[str]:
        broker = opened("memory://a").broker
        before = broker.queues
        Client(broker).queue("q")
        return before

    assert run(fill()) == run(fill()) == []


def test_a_broker_does_not_keep_its_loop_alive():
    """Nor do its timers; the broker is gone with its loop."""
    loop = VirtualTimeLoop()

    async def fill() -> weakref.ref[Broker]:
        transport = opened("memory://a")
        Client(transport.broker).queue("q", message_ttl=1_000_000)
        transport.broker.put("q", b"1")
        return weakref.ref(transport.broker)

    broker = loop.run_until_complete(fill())
    loop.close()
    reference = weakref.ref(loop)
    del loop
    gc.collect()
    assert reference() is None
    assert broker() is None


@pytest.mark.parametrize(
    "url",
    [
        "amqp://a",
        "memory://a/path",
        "memory://a,memory://b",
        "memory://a?size=3",
        "memory://a?version=1",
    ],
)
def test_invalid_urls_are_refused(url: str):
    """At once, and not when the consumer starts."""
    with pytest.raises(ConfigurationError):
        opened(url)


async def test_a_url_may_name_the_version():
    """But not two versions of one broker."""
    assert opened("memory://a?version=3.10").broker.version == "3.10"
    with pytest.raises(ConfigurationError, match=r"memory://a imitates RabbitMQ 3\.10 already"):
        _ = opened("memory://a?version=4.0").broker


@pytest.mark.parametrize(
    ("fault", "error"),
    [(ConnectFault.UNREACHABLE, BrokerUnavailable), (ConnectFault.WRONG_PASSWORD, AccessRefused)],
)
async def test_a_refused_connection_raises_the_error_of_its_kind(
    transport, memory: Broker, fault, error
):
    """The broker is unreachable, or refuses the login."""
    memory.faults.connect_fault = fault
    subscription = Subscription(queue="q", prefetch=1, consumer_tag="t")
    with pytest.raises(error):
        await transport.declare(Topology())
    for enter in (transport.publisher(), transport.session(subscription)):
        with pytest.raises(error):
            async with enter:
                pass


FULL = Topology(
    exchanges=(Exchange("x", "topic"), Exchange("dlx", "fanout", existing_first=True)),
    queues=(Queue("q", arguments={"x-max-length": 3}), Queue("dlq", existing_first=True)),
    bindings=(Binding("q", "x", "a.*"), Binding("q", "x", "b", {"n": 1}), Binding("dlq", "dlx")),
)


async def test_a_topology_can_be_declared_twice(transport, memory: Broker):
    """With the same result; the connections are closed."""
    for _ in range(2):
        await transport.declare(FULL)
    assert memory.queues == ["q", "dlq"]
    assert memory.arguments("q") == {"x-max-length": 3}
    assert memory.bindings("q") == [("x", "a.*", {}), ("x", "b", {"n": 1})]
    assert memory.connections == []


@pytest.mark.parametrize(
    ("version", "numbers"), [("3.10", (3, 10)), ("4.0", (4, 0)), ("4.3", (4, 3))]
)
async def test_the_version_that_is_imitated_can_be_compared(version, numbers):
    """Like that of a real broker."""
    transport = MemoryTransport(Broker(version))
    assert isinstance(transport, VersionedTransport)
    assert numbers == transport.broker_version


async def test_an_existing_entity_is_used_as_it_is(transport, memory: Broker):
    """With `existing_first`; otherwise it must be the same."""
    Client(memory).queue("dlq", max_length=9)
    Client(memory).exchange("dlx", "topic")
    await transport.declare(FULL)
    assert memory.arguments("dlq") == {"x-max-length": 9}
    with pytest.raises(TopologyError) as caught:
        await transport.declare(Topology(queues=(Queue("dlq"),)))
    assert str(caught.value) == (
        "queue 'dlq': 406 PRECONDITION_FAILED - inequivalent arg 'x-max-length'"
        " for queue 'dlq' in vhost '/': received none but current is the value '9' of type 'byte';"
        " change the settings to what the broker has, or delete it there with its messages"
    )


@pytest.mark.parametrize(
    ("topology", "entity"),
    [
        (Topology(queues=(Queue("q", check_only=True),)), "queue 'q'"),
        (Topology(exchanges=(Exchange("x", check_only=True),)), "exchange 'x'"),
    ],
)
async def test_checking_creates_nothing(transport, memory: Broker, topology, entity):
    """A missing entity raises with advice; an existing one is accepted."""
    with pytest.raises(TopologyError, match=f"{entity}: 404 NOT_FOUND .* create it"):
        await transport.declare(topology)
    assert memory.queues == []
    Client(memory).queue("q")
    Client(memory).exchange("x")
    await transport.declare(topology)


@pytest.mark.parametrize(
    ("topology", "words"),
    [
        (
            Topology(queues=(Queue("q", arguments={"x-queue-type": "stream"}),)),
            "540 NOT_IMPLEMENTED .* use a classic or a quorum queue",
        ),
        (
            Topology(exchanges=(Exchange("x", "x-delayed-message"),)),
            "unknown exchange type 'x-delayed-message'",
        ),
        (
            Topology(queues=(Queue("q"),), bindings=(Binding("q", "nope"),)),
            "binding of queue 'q' to exchange 'nope': .* no exchange 'nope'",
        ),
        (Topology(queues=(Queue("amq.q"),)), "403 ACCESS_REFUSED .* choose another name"),
    ],
)
async def test_a_refused_topology_raises(transport, topology, words):
    """With the entity and the broker's text."""
    with pytest.raises(TopologyError, match=words):
        await transport.declare(topology)


async def test_messages_expire_by_the_clock_of_the_loop(transport, memory: Broker, virtual_loop):
    """Without any call, and with a single timer."""
    await transport.declare(Topology(queues=(Queue("q"), Queue("r"))))
    client = Client(memory)
    for queue, seconds in (("q", 20), ("r", 5), ("q", 30)):
        client.publish(b"1", queue, expiration=str(seconds * 1000))
    timers = [timer for timer in virtual_loop._scheduled if not timer.cancelled()]
    assert [timer.when() for timer in timers] == [5.0]
    await asyncio.sleep(20)
    assert (bodies(memory, "q"), bodies(memory, "r")) == ([b"1"], [])
    await asyncio.sleep(100)
    assert memory.journal.events[-1].at == 30.0
    assert [timer for timer in virtual_loop._scheduled if not timer.cancelled()] == []


async def test_put_uses_the_present_time(transport, memory: Broker, virtual_loop):
    """Even if nothing has happened on the broker for long."""
    await transport.declare(Topology(queues=(Queue("q", arguments={"x-message-ttl": 5000}),)))
    await asyncio.sleep(100)
    memory.put("q", b"1")
    assert memory.next_event == 105.0
    await asyncio.sleep(5)
    assert bodies(memory, "q") == []


def test_the_time_of_a_broker_continues_in_the_next_loop():
    """Loops have their own clocks, a broker has one."""
    broker = Broker()
    transport = MemoryTransport(broker)

    async def first() -> None:
        await transport.declare(Topology(queues=(Queue("q", arguments={"x-message-ttl": 60_000}),)))
        await asyncio.sleep(50)
        broker.put("q", b"1")

    async def second() -> tuple[list[bytes], list[bytes]]:
        assert transport.broker is broker
        await asyncio.sleep(59)
        before = bodies(broker, "q")
        await asyncio.sleep(1)
        return before, bodies(broker, "q")

    run(first())
    assert broker.now == 50.0
    broker.put("q", b"between")
    assert run(second()) == ([b"1", b"between"], [])


def test_no_amqp_client_is_imported():
    """Neither aio-pika nor the packages that it needs."""
    story = (
        "import sys, aio_pika_batch.adapters.memory\n"
        "print({'aio_pika', 'aiormq', 'pamqp'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", story], check=True, capture_output=True, text=True)
    assert done.stdout == "set()\n"
