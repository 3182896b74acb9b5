"""A session uses AMQP 1.0 where that is possible, and 0-9-1 with a reason otherwise."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from aio_pika_batch.adapters import rabbitmq
from aio_pika_batch.adapters.amqp10 import performatives as p
from aio_pika_batch.adapters.amqp10.codec import Int, Symbol
from aio_pika_batch.adapters.amqp10.frames import pack
from aio_pika_batch.adapters.amqp10.management import QueueInfo
from aio_pika_batch.adapters.amqp10.session import Amqp10Session
from aio_pika_batch.adapters.rabbitmq import (
    FALLBACK,
    Amqp10Transport,
    queue_obstacle,
)
from aio_pika_batch.core.topology import Queue, Topology, native_retries
from aio_pika_batch.errors import BrokerUnavailable, SessionLost
from aio_pika_batch.transport import Endpoint, Subscription, open_transport
from tests.unit.adapters.amqp10.server import Server, about_queue, sent

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aio_pika_batch.testing.virtual_time import VirtualTimeLoop
    from aio_pika_batch.transport import Session


class Old:
    """A session over 0-9-1."""

    expired = 0

    def expire(self) -> None:
        self.expired += 1


OLD = Old()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, virtual_loop: VirtualTimeLoop) -> Server:
    """The broker; each connection is a new one, with what is still in the queue."""
    server = Server()

    async def create_connection(make: Any, *_: Any, **__: Any) -> Any:
        protocol = make()
        server.is_aborted = False
        server.connect(protocol, None)
        return server, protocol

    @asynccontextmanager
    async def open_session(*_: object) -> AsyncIterator[Old]:
        yield OLD

    monkeypatch.setattr(virtual_loop, "create_connection", create_connection)
    monkeypatch.setattr(rabbitmq, "open_session", open_session)
    return server


@pytest.fixture
def transport() -> Amqp10Transport:
    """One that may use AMQP 1.0."""
    found = open_transport(Endpoint(url="amqp://broker", wire="amqp10", connect_timeout=5))
    assert isinstance(found, Amqp10Transport)
    return found


async def choice(transport: Amqp10Transport, **more: Any) -> Session:
    """The session that it opens."""
    subscription = Subscription(queue="q", prefetch=5, consumer_tag="c-1", **more)
    async with transport.session(subscription) as session:
        return session


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings, which are removed."""
    lines = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    caplog.clear()
    return lines


async def test_a_quorum_queue_is_consumed_over_amqp10(
    server: Server, transport: Amqp10Transport, caplog: pytest.LogCaptureFixture
) -> None:
    """With the priority as the broker reads it, and what its arguments allow."""
    session = await choice(transport, arguments={"x-priority": 3})
    assert isinstance(session, Amqp10Session)
    assert session.retries == native_retries((4, 3, 6), {})
    [attach] = sent(server, p.Attach)
    assert {"rabbitmq:priority": Int(3)} == attach.properties
    assert isinstance(attach.properties["rabbitmq:priority"], Int)
    assert [] == logged(caplog)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"exclusive": True}, "AMQP 1.0 has no exclusive queues and consumers"),
        (
            {"own": Topology(queues=(Queue("q", exclusive=True),))},
            "AMQP 1.0 has no exclusive queues and consumers",
        ),
        ({"arguments": {"x-other": 1}}, "AMQP 1.0 has no consumer argument x-other"),
    ],
)
async def test_what_amqp10_does_not_have_is_consumed_over_091(
    server: Server,
    transport: Amqp10Transport,
    caplog: pytest.LogCaptureFixture,
    more: dict[str, Any],
    reason: str,
) -> None:
    """Before anything is opened. The reason is logged once."""
    for _ in range(2):
        assert OLD is await choice(transport, **more)
    [line] = logged(caplog)
    assert line == f"this consumer uses AMQP 0-9-1 [queue=q reason={reason}]"
    assert [] == server.received


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (about_queue("classic"), "this is a classic queue"),
        (about_queue("stream"), "this is a stream queue"),
        (about_queue("quorum", status="404"), "does not tell the type"),
        (b"\x00\x53\x73", "does not tell the type"),
        (None, "does not tell the type"),
    ],
)
async def test_other_queues_are_consumed_over_091(
    server: Server,
    transport: Amqp10Transport,
    caplog: pytest.LogCaptureFixture,
    answer: bytes | None,
    reason: str,
) -> None:
    """Also if the broker doesn't say what they are. Its connection is closed again."""
    server.answer = answer
    assert OLD is await choice(transport)
    [line] = logged(caplog)
    assert reason in line
    assert 1 == len(sent(server, p.Close))


async def test_an_old_broker_is_not_asked(
    server: Server, transport: Amqp10Transport, caplog: pytest.LogCaptureFixture
) -> None:
    """If its version is known; otherwise it says so itself."""
    transport._version = (3, 13)
    assert OLD is await choice(transport)
    assert [] == server.received
    transport._version = None
    server.header = b"AMQP\x00\x00\x09\x01"
    assert OLD is await choice(transport)
    first, second = logged(caplog)
    assert "needs RabbitMQ 4.0 or newer" in first
    assert "does not speak AMQP 1.0" in second


async def test_a_broker_that_does_not_answer_about_the_queue_is_not_waited_for(
    server: Server, transport: Amqp10Transport, virtual_loop: VirtualTimeLoop
) -> None:
    """Nor one that breaks off."""
    server._manage = lambda _: None  # type: ignore[method-assign]
    with pytest.raises(BrokerUnavailable, match="did not answer a question about queue 'q'"):
        await choice(transport)
    assert server.is_aborted
    server._manage = lambda _: server.break_off()  # type: ignore[method-assign]
    with pytest.raises(BrokerUnavailable, match="closed: the connection was closed"):
        await choice(transport)


@pytest.mark.parametrize(
    ("version", "arguments", "is_possible"),
    [
        ((3, 13), {"x-delivery-limit": -1}, False),
        ((4, 0), {}, False),
        ((4, 0), {"x-delivery-limit": 20}, False),
        ((4, 2, 9), {"x-delivery-limit": -1}, True),
        ((4, 3), {}, True),
        ((4, 3), {"x-delivery-limit": 20}, True),
    ],
)
def test_retries_never_use_a_delivery_limit_up(
    version: tuple[int, ...], arguments: dict[str, Any], is_possible: bool
) -> None:
    """Before 4.3 each of them counts."""
    assert is_possible == (queue_obstacle(version, QueueInfo("quorum", arguments)) is None)


SAFE = {
    "x-dead-letter-exchange": "",
    "x-dead-letter-strategy": "at-least-once",
    "x-overflow": "reject-publish",
}


@pytest.mark.parametrize("missing", [None, *SAFE])
def test_the_queue_dead_letters_only_if_it_loses_nothing(missing: str | None) -> None:
    """What a policy says isn't known."""
    arguments = {name: value for name, value in SAFE.items() if name != missing}
    assert native_retries((4, 0), arguments).dead_letters == (missing is None)


async def test_after_a_failure_of_the_brokers_session_091_is_used_for_a_while(
    server: Server,
    transport: Amqp10Transport,
    caplog: pytest.LogCaptureFixture,
    virtual_loop: VirtualTimeLoop,
) -> None:
    """The same message would make it fail again. The warning quotes the broker."""
    server.publish(1)
    error = p.PeerError(Symbol("amqp:internal-error"), "Session error: badmatch")
    subscription = Subscription(queue="q", prefetch=5, consumer_tag="c-1")
    async with transport.session(subscription) as session:
        server.say(pack(p.Close(error)))
        with pytest.raises(SessionLost):
            async for _ in session:
                pass
    assert 1 == transport.fallbacks
    [line] = logged(caplog)
    assert "using AMQP 0-9-1 for now" in line
    assert "Session error: badmatch" in line
    server.__init__()  # type: ignore[misc]
    async with transport.session(subscription) as session:
        assert session is OLD
        assert [] == logged(caplog)
        await asyncio.sleep(FALLBACK - 1)
        assert 0 == OLD.expired
        await asyncio.sleep(2)
        assert 1 == OLD.expired
    assert isinstance(await choice(transport), Amqp10Session)


async def test_other_losses_change_nothing(server: Server, transport: Amqp10Transport) -> None:
    """An operator, for example."""
    subscription = Subscription(queue="q", prefetch=5, consumer_tag="c-1")
    error = p.PeerError(Symbol("amqp:internal-error"), "Connection forced: 'stop'")
    async with transport.session(subscription) as session:
        server.say(pack(p.Close(error)))
        with pytest.raises(SessionLost):
            async for _ in session:
                pass
    assert 0 == transport.fallbacks
    server.__init__()  # type: ignore[misc]
    assert isinstance(await choice(transport), Amqp10Session)
