"""Does the adapter hold where the client library does not let anybody open its socket?

No such aiormq is at hand, so the tap's module cannot be imported here: its users learn that from
the import, as they would there. What only a tap can do (properties byte for byte, poison that costs
its message only) is not asked for.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from aio_pika_batch.adapters.aio_pika import wires
from aio_pika_batch.adapters.aio_pika.connection import TappedConnection
from aio_pika_batch.adapters.aio_pika.transport import AioPikaTransport
from aio_pika_batch.core.message import Message, Properties
from aio_pika_batch.core.publication import Copy, Outcome, Publication
from aio_pika_batch.core.settlement import Disposition, Frame, Settlement
from aio_pika_batch.core.topology import Queue, Topology
from aio_pika_batch.errors import (
    AccessRefused,
    ConfigurationError,
    SessionLost,
    TopologyError,
)
from aio_pika_batch.transport import Endpoint, Subscription

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aio_pika.abc import AbstractChannel

    from tests.support.proxy import TcpProxy

CONFIRMED, RETURNED, REFUSED, UNKNOWN = Outcome


@pytest.fixture(autouse=True)
def no_tap(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """There is none, and nobody has said so yet."""
    monkeypatch.setitem(sys.modules, "aio_pika_batch.adapters.aio_pika.tap", None)
    wires._say.cache_clear()
    yield
    wires._say.cache_clear()


@pytest.fixture
def transport(amqp_url: str) -> AioPikaTransport:
    """The adapter, as a consumer has it."""
    return AioPikaTransport(Endpoint(url=amqp_url))


@pytest.fixture
async def queue(transport: AioPikaTransport, name: str, channel: AbstractChannel) -> Any:
    """A queue."""
    await transport.declare(Topology(queues=(Queue(name),)))
    yield name
    await channel.queue_delete(name)


def subscription(queue: str, **more: Any) -> Subscription:
    """Ask for much of a queue."""
    return Subscription(**{"queue": queue, "prefetch": 5000, "consumer_tag": "c-1", **more})


async def receive(session: Any, count: int) -> list[Message]:
    """Take chunks until *count* messages are there."""
    messages: list[Message] = []
    async with asyncio.timeout(20):
        while len(messages) < count:
            messages.extend(await anext(aiter(session)))
    return messages


def tags(messages: list[Message]) -> tuple[int, ...]:
    """What is settled."""
    return tuple(message.delivery_tag for message in messages)


async def fill(transport: AioPikaTransport, queue: str, count: int) -> None:
    """Put numbered messages into a queue."""
    async with transport.publisher() as publisher:
        outcomes = await publisher.publish(
            [Publication(b"%d" % number, routing_key=queue) for number in range(count)]
        )
    assert {CONFIRMED} == set(outcomes)


def test_it_is_said_once_or_refused(amqp_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Who asked for no wire learns what it costs; who asked for the fast one does not get less."""
    with caplog.at_level(logging.WARNING, "aio_pika_batch"):
        for _ in range(3):
            AioPikaTransport(Endpoint(url=amqp_url))
    assert 1 == len(caplog.messages)
    assert "the plain wire is used: this aiormq does not let its user" in caplog.text

    caplog.clear()
    AioPikaTransport(Endpoint(url=amqp_url, wire="plain"))
    assert not caplog.messages
    with pytest.raises(ConfigurationError, match="wire='fast' cannot be had"):
        AioPikaTransport(Endpoint(url=amqp_url, wire="fast"))


@pytest.mark.parametrize("wire", ["auto", "fast", "plain"])
async def test_a_library_that_does_not_ask_the_tap(
    amqp_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, wire: Any
) -> None:
    """It is noticed once the connection is open; messages travel all the same, or not at all."""
    monkeypatch.undo()
    transport = AioPikaTransport(Endpoint(url=amqp_url, wire=wire))
    opened = TappedConnection.__init__

    def ignoring(self: Any, url: Any, _: Any, *rest: Any) -> None:
        opened(self, url, None, *rest)

    monkeypatch.setattr(TappedConnection, "__init__", ignoring)
    if wire == "fast":
        with pytest.raises(ConfigurationError, match="opened the socket by itself"):
            async with transport.publisher():
                pass
        return
    async with transport.publisher() as publisher:
        there = Publication(b"", exchange="amq.fanout", mandatory=False)
        assert [CONFIRMED] == await publisher.publish([there])
    assert (wire == "auto") is ("opened the socket by itself" in caplog.text)


@pytest.mark.parametrize("wire", ["auto", "fast", "plain"])
async def test_a_library_that_asks_the_tap_otherwise(
    amqp_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, wire: Any
) -> None:
    """Its call fails before a socket is opened; the next attempt is made without a tap."""
    monkeypatch.undo()
    from aio_pika_batch.adapters.aio_pika.tap import Tap

    async def create(self: Any) -> None:
        raise AssertionError("unreachable")

    monkeypatch.setattr(Tap, "create", create)
    transport = AioPikaTransport(Endpoint(url=amqp_url, wire=wire))
    if wire == "fast":
        with pytest.raises(ConfigurationError, match="not the one that we know"):
            async with transport.publisher():
                pass
        return
    async with transport.publisher() as publisher:
        there = Publication(b"", exchange="amq.fanout", mandatory=False)
        assert [CONFIRMED] == await publisher.publish([there])
    assert (wire == "auto") is ("not the one that we know" in caplog.text)


async def test_messages_come_and_stay_settled(
    transport: AioPikaTransport, queue: str, channel: AbstractChannel
) -> None:
    """In order, and settled in each way, by many calls at once of which one is cancelled."""
    await fill(transport, queue, 600)

    async with transport.session(subscription(queue)) as session:
        messages = await receive(session, 600)
        assert [b"%d" % number for number in range(600)] == [each.body for each in messages]
        assert (queue, "", queue) == (
            messages[0].queue,
            messages[0].exchange,
            messages[0].routing_key,
        )
        cancelled = asyncio.create_task(
            session.settle([Settlement(Disposition.REJECT, tags(messages[:100]))])
        )
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.gather(
            session.settle([Settlement(Disposition.ACK, tags(messages[101:500:2]))]),
            session.settle([Settlement(Disposition.RETURN, tags(messages[500:]))]),
            session.settle([Settlement(Disposition.ACK, tags(messages[100:500:2]))]),
        )
        again = await receive(session, 100)
        assert all(message.redelivered for message in again)
        await session.settle([Settlement(Disposition.REQUEUE, tags(again))])
        await session.settle([Settlement(Disposition.ACK, tags(await receive(session, 100)))])

    found = await channel.declare_queue(queue, passive=True)
    assert 0 == found.declaration_result.message_count


async def test_after_cancel_comes_what_was_delivered_before_it(
    transport: AioPikaTransport, queue: str, channel: AbstractChannel
) -> None:
    """All of it, though the library hands it out in tasks."""
    await fill(transport, queue, 1000)

    async with transport.session(subscription(queue, prefetch=300)) as session:
        first = await receive(session, 1)
        await session.cancel()
        rest = [message for chunk in [chunk async for chunk in session] for message in chunk]
        handed_out = tags([*first, *rest])
        # Inside: what was delivered and got lost on the way goes back to the queue at the end.
        found = await channel.declare_queue(queue, passive=True)
        assert 1000 - len(handed_out) == found.declaration_result.message_count
    assert list(range(1, len(handed_out) + 1)) == list(handed_out)


async def test_what_becomes_of_publications(
    transport: AioPikaTransport, queue: str, channel: AbstractChannel
) -> None:
    """No lost one is taken for stored, whatever their message ids; a full queue refuses."""

    def one(routing_key: str, message_id: str | None) -> Publication:
        return Publication(b"", routing_key=routing_key, message_id=message_id)

    await channel.declare_queue(
        f"{queue}-full", arguments={"x-max-length": 2, "x-overflow": "reject-publish"}
    )
    async with transport.publisher() as publisher:
        keys = [queue, f"{queue}-no", f"{queue}-no", queue] * 20
        for message_id in ("same", None):
            many = [one(key, message_id) for key in keys]
            calls = await asyncio.gather(publisher.publish(many), publisher.publish(many))
            expected = [CONFIRMED if key == queue else RETURNED for key in keys]
            assert [expected, expected] == calls
        full = await publisher.publish([one(f"{queue}-full", None)] * 6)
        assert {CONFIRMED: 2, REFUSED: 4} == Counter(full)
        values = Properties(headers={"a": 1.1}, user_id="other")
        message = Message(None, 1, False, b"body", ("", "q"), values)  # type: ignore[arg-type]
        copy = Copy(message, "", f"{queue}", {"b": 2})
        assert [CONFIRMED] == await publisher.publish([copy])
        assert [REFUSED] == await publisher.publish([Publication(b"", exchange=f"{queue}-no")])
        assert not publisher.is_open
    await channel.queue_delete(f"{queue}-full")

    async with transport.session(subscription(queue)) as session:
        last = (await receive(session, 161))[-1]
        assert ({"a": 1.1, "b": 2}, None) == (last.headers, last.user_id)


async def test_refusals_have_the_brokers_words(
    amqp_url: str, transport: AioPikaTransport, queue: str
) -> None:
    """As with a tap, by the class and the text of the library's exceptions."""
    with pytest.raises(TopologyError, match=r"404 NOT_FOUND - no queue .*create it"):
        async with transport.session(subscription(f"{queue}-no")):
            pass
    with pytest.raises(TopologyError, match=r"406 PRECONDITION_FAILED - inequivalent"):
        await transport.declare(Topology(queues=(Queue(queue, arguments={"x-max-length": 8}),)))
    wrong = AioPikaTransport(Endpoint(url=amqp_url.replace("guest:guest", "guest:wr0ng")))
    with pytest.raises(AccessRefused, match=r"403 ACCESS_REFUSED.*check user and password"):
        async with wrong.publisher():
            pass


async def lost(session: Any) -> str:
    """Wait for the loss; return its reason."""
    with pytest.raises(SessionLost) as caught:
        await receive(session, 1_000_000)
    return str(caught.value)


async def test_what_ends_a_session(
    amqp_url: str, transport: AioPikaTransport, queue: str, proxy: TcpProxy, name: str
) -> None:
    """A closed channel, a deleted queue, a cut line, and a broker that is silent: each is told."""
    await fill(transport, queue, 1)
    async with transport.session(subscription(queue)) as session:
        session._wire.settle([Frame(Disposition.ACK, 999)])
        await session._wire.drained()
        assert "406 PRECONDITION_FAILED - unknown delivery tag 999" in await lost(session)
        assert not session._wire.settle([Frame(Disposition.ACK, 1)])

    other = f"{name}-other"
    await transport.declare(Topology(queues=(Queue(other),)))
    async with transport.session(subscription(other)) as session:
        native = await session.native()
        await native.channel.queue_delete(other)
        assert "cancelled the consumer" in await lost(session)

    line = AioPikaTransport(Endpoint(url=proxy.url(amqp_url), heartbeat=1))
    async with line.session(subscription(queue)) as session:
        messages = await receive(session, 1)
        proxy.cut()
        assert await lost(session)
        with pytest.raises(SessionLost):
            await session.settle([Settlement(Disposition.ACK, tags(messages))])

    async with line.session(subscription(queue)) as session:
        start = time.monotonic()
        proxy.freeze("to_client")
        assert "nothing was heard of the broker for 3 s" in await lost(session)
        assert 1 < time.monotonic() - start < 5
        proxy.thaw()


async def test_a_publisher_that_hears_nothing(amqp_url: str, proxy: TcpProxy, queue: str) -> None:
    """Its outcomes are unknown, after silence or a cut, and it takes no more."""
    transport = AioPikaTransport(Endpoint(url=proxy.url(amqp_url), publish_timeout=0.3))
    there = Publication(b"", routing_key=queue)
    async with transport.publisher() as publisher:
        proxy.freeze("to_client")
        assert [UNKNOWN] * 3 == await publisher.publish([there] * 3)
        assert not publisher.is_open
        proxy.thaw()

    transport = AioPikaTransport(Endpoint(url=proxy.url(amqp_url)))
    async with transport.publisher() as publisher:
        proxy.freeze("to_client")
        publishing = asyncio.create_task(publisher.publish([there] * 3))
        await asyncio.sleep(0.1)
        proxy.cut()
        assert [UNKNOWN] * 3 == await publishing
        assert not publisher.is_open
        proxy.thaw()
