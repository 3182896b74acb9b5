"""A session keeps its laws beside a model of the broker, in virtual time."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from aio_pika_batch.adapters.amqp10 import performatives as p
from aio_pika_batch.adapters.amqp10 import spec
from aio_pika_batch.adapters.amqp10.codec import Int, Symbol, UInt
from aio_pika_batch.adapters.amqp10.connection import open_amqp10
from aio_pika_batch.adapters.amqp10.frames import pack
from aio_pika_batch.adapters.amqp10.session import (
    WIND_UP_TIMEOUT,
    Amqp10Session,
)
from aio_pika_batch.adapters.connecting import CLOSE_TIMEOUT
from aio_pika_batch.core.settlement import Disposition, Modification, Settlement
from aio_pika_batch.errors import (
    AioPikaBatchError,
    BrokerUnavailable,
    SessionClosed,
    SessionLost,
    SettlementError,
    TopologyError,
)
from aio_pika_batch.transport import (
    AdjustableSession,
    ConfirmingSession,
    ModifyingSession,
    NativeRetries,
    ProvingSession,
    PumpingSession,
    Subscription,
)
from tests.unit.adapters.amqp10.server import ADDRESS, SHOWN, Server, endpoint, sent

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from aio_pika_batch.core.message import Message
    from aio_pika_batch.testing.virtual_time import VirtualTimeLoop


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, virtual_loop: VirtualTimeLoop) -> Server:
    """The broker, with a queue."""
    server = Server()

    async def create_connection(make: Any, *_: Any, **__: Any) -> Any:
        protocol = make()
        server.connect(protocol, None)
        return server, protocol

    monkeypatch.setattr(virtual_loop, "create_connection", create_connection)
    return server


ALL = NativeRetries(delays=True, headers=True, dead_letters=True, uncounted=True)


@asynccontextmanager
async def consuming(
    prefetch: int = 10, properties: dict[str, Any] | None = None, retries: NativeRetries = ALL
) -> AsyncIterator[Amqp10Session]:
    """A session."""
    subscription = Subscription(queue="q ü", prefetch=prefetch, consumer_tag="c-1")
    connection = await open_amqp10(endpoint(ADDRESS))
    session = Amqp10Session(connection, subscription, properties or {}, retries)
    try:
        await session.open(5)
        yield session
    finally:
        await session.close()


async def refusal(**more: Any) -> AioPikaBatchError:
    """Why there is no session."""
    with pytest.raises(AioPikaBatchError) as caught:
        async with consuming(**more):
            pass
    return caught.value


async def take(session: Amqp10Session, count: int) -> list[Message]:
    """Receive this many messages."""
    messages: list[Message] = []
    while len(messages) < count:
        messages.extend(await anext(aiter(session)))
    return messages


def acked(messages: Sequence[Message]) -> list[Settlement]:
    """All of them."""
    return [Settlement(Disposition.ACK, tuple(each.delivery_tag for each in messages))]


# --- opening ---------------------------------------------------------------------------


async def test_a_session_attaches_to_its_queue(server: Server) -> None:
    """By an address of version 2, with the prefetch as its credit."""
    async with consuming(7, {"rabbitmq:priority": Int(3)}) as session:
        for offered in (
            AdjustableSession,
            ConfirmingSession,
            ModifyingSession,
            ProvingSession,
            PumpingSession,
        ):
            assert isinstance(session, offered)
        [attach] = sent(server, p.Attach)
        assert "/queues/q%20%C3%BC" == attach.source.address
        assert attach.name.startswith("c-1-")
        assert {"rabbitmq:priority": Int(3)} == attach.properties
        assert isinstance(attach.properties["rabbitmq:priority"], Int)
        [flow] = sent(server, p.Flow)
        assert 7 == flow.link_credit


async def test_a_delay_that_the_broker_would_ignore_is_refused(server: Server) -> None:
    """Before 4.3, and nothing is sent."""
    server.publish(1)
    async with consuming(retries=replace(ALL, delays=False)) as session:
        await take(session, 1)
        with pytest.raises(SettlementError, match="cannot delay"):
            await session.modify([Modification((1,), until=datetime.now(UTC))])
        await session.modify([Modification((1,))])


NOT_FOUND = p.PeerError(Symbol("amqp:not-found"), "no queue 'q' in vhost '/'")


@pytest.mark.parametrize("version", ["4.0", "4.3"])
@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (NOT_FOUND, TopologyError, "404 amqp:not-found: no queue 'q' in vhost '/'; create it"),
        (p.PeerError(Symbol("amqp:unauthorized-access"), "no"), TopologyError, "give the user the"),
        (p.PeerError(Symbol("amqp:resource-locked"), "no"), TopologyError, "has it exclusively"),
        (
            p.PeerError(Symbol("amqp:not-allowed"), "queue is down"),
            BrokerUnavailable,
            "again later",
        ),
        (p.PeerError(Symbol("amqp:internal-error")), BrokerUnavailable, "again later"),
        (None, BrokerUnavailable, "the broker gives no reason; try again later"),
    ],
)
async def test_the_error_says_why_a_queue_cannot_be_consumed(
    server: Server, version: str, error: p.PeerError | None, kind: type, text: str
) -> None:
    """4.0 ends the session, 4.3 answers the attach with nothing, and detaches."""

    def refuse(record: p.Record) -> None:
        match record:
            case p.Begin():
                server.say(pack(p.Begin(None, UInt(0), UInt(1), UInt(1))))
            case p.Attach() if version == "4.3":
                server.say(pack(p.Attach(record.name, UInt(0), role=False)))
                server.say(pack(p.Detach(UInt(0), closed=True, error=error)))
            case p.Attach():
                server.say(pack(p.End(error)))

    server.broker._on_record = refuse
    found = await refusal()
    assert isinstance(found, kind)
    assert f"consuming from queue 'q ü' at {SHOWN}: " in str(found)
    assert text in str(found)
    assert server.is_aborted


async def test_a_broker_that_does_not_attach_is_not_waited_for(
    server: Server, virtual_loop: VirtualTimeLoop
) -> None:
    """Nor one that breaks off."""
    server.broker._on_record = lambda _: None
    assert "did not open a link within 5 s" in str(await refusal())
    server.__init__()  # type: ignore[misc]
    server.broker._on_record = lambda _: server.break_off()
    assert "closed the connection while a link was opened" in str(await refusal())


# --- receiving and settling --------------------------------------------------------------


async def test_messages_come_and_are_settled(server: Server) -> None:
    """The first tag is 1; credit comes back with each settlement."""
    server.publish(25)
    async with consuming(10) as session:
        seen: list[Message] = []
        while len(seen) < 25:
            messages = await anext(aiter(session))
            seen.extend(messages)
            await session.settle(acked(messages))
        assert [*range(1, 26)] == [message.delivery_tag for message in seen]
        assert [b"%d" % number for number in range(25)] == [message.body for message in seen]
        assert 25 == session.unproven
        await session.settled()
        assert 0 == session.unproven
    assert {(spec.ACCEPTED, ())} == {
        (code, tuple(state)) for code, state in server.broker.outcomes.values()
    }
    assert 25 == len(server.broker.outcomes)


async def test_deliveries_go_back_by_themselves(server: Server) -> None:
    """All or none, as in `settle`."""
    server.publish(4)
    async with consuming() as session:
        await take(session, 4)
        ack = [Settlement(Disposition.ACK, (4,))]
        wrong = [Modification((1,)), Modification((2,), headers={"x-f": 1.5})]
        with pytest.raises(SettlementError):
            await session.modify(wrong, ack)
        right = [Modification((1, 2), headers={"x-why": "w"}), Modification((3,))]
        await session.modify(right, ack)
        await session.settled()
    fields = [True, False, {"x-why": "w"}]
    expected = {0: (spec.MODIFIED, fields), 1: (spec.MODIFIED, fields)}
    expected |= {2: (spec.MODIFIED, [True, False]), 3: (spec.ACCEPTED, [])}
    assert expected == server.broker.outcomes


async def test_messages_are_pumped_in_the_moment_they_come(server: Server) -> None:
    """Also those that came before."""
    server.publish(2)
    async with consuming() as session:
        await asyncio.sleep(1)
        chunks: list[list[int]] = []
        pumping = asyncio.create_task(
            session.pump(lambda chunk: chunks.append([each.delivery_tag for each in chunk]))
        )
        await asyncio.sleep(1)
        server.publish(3)
        await asyncio.sleep(1)
        assert [[1, 2], [3, 4, 5]] == chunks
        await session.cancel()
        await pumping


async def test_what_a_sink_raises_is_raised_by_the_pump(server: Server) -> None:
    """It is not called again, and the connection goes on."""
    async with consuming() as session:
        calls = []

        def sink(chunk: Sequence[Message]) -> None:
            calls.append(chunk)
            raise ValueError("the sink")

        pumping = asyncio.create_task(session.pump(sink))
        await asyncio.sleep(1)
        server.publish(1)
        server.publish(1)
        with pytest.raises(ValueError, match="the sink"):
            await pumping
        assert 1 == len(calls)
        await session.settle(acked(calls[0]))


async def test_what_the_broker_takes_back_is_dropped(server: Server) -> None:
    """It comes again; the handler could not know."""
    server.publish(2)
    async with consuming() as session:
        held = await take(session, 2)
        server.broker.take_back(2)
        server.tell()
        again = await take(session, 2)
        await session.settle(acked(held))
        assert 0 == session.unproven
        await session.settle(acked(again))
        await session.settled()
    assert {2, 3} == set(server.broker.outcomes)


async def test_a_settlement_waits_while_too_much_is_to_be_sent(server: Server) -> None:
    """Like every writer."""
    server.publish(1)
    async with consuming() as session:
        messages = await take(session, 1)
        session._connection.pause_writing()
        settling = asyncio.create_task(session.settle(acked(messages)))
        await asyncio.sleep(1)
        assert not settling.done()
        session._connection.resume_writing()
        await settling


# --- pausing -----------------------------------------------------------------------------


async def test_a_pause_stops_the_deliveries_and_a_new_prefetch_counts_only_later_ones(
    server: Server,
) -> None:
    """What is unsettled then takes no credit, and gives none back."""
    async with consuming(5) as session:
        server.publish(20)
        old = await take(session, 5)
        await session.pause()
        await session.pause()
        await session.settle(acked(old[:1]))
        await asyncio.sleep(1)
        assert 15 == server.broker.ready
        await session.resume(1)
        await session.resume(9)
        [one] = await take(session, 1)
        await session.settle(acked(old[1:3]))
        await asyncio.sleep(1)
        assert [] == session._pending
        await session.settle(acked([one]))
        assert [b"6"] == [each.body for each in await take(session, 1)]
        await session.pause()
        await session.cancel()
        await session.resume(5)
        await asyncio.sleep(1)
        assert [] == [each async for each in session]
    assert 13 == server.broker.ready


async def test_a_pause_that_is_not_answered_loses_the_session(
    server: Server, virtual_loop: VirtualTimeLoop
) -> None:
    """As that of a queue without a leader."""
    async with consuming() as session:
        server.is_silent = True
        with pytest.raises(SessionLost, match="has not answered for 10 s"):
            await session.pause()
        assert 10 == virtual_loop.time()


# --- cancelling --------------------------------------------------------------------------


async def test_what_was_delivered_before_the_answer_is_handed_out(server: Server) -> None:
    """And then the iteration ends; nothing comes any more."""
    async with consuming() as session:
        server.publish(3)
        await asyncio.gather(session.cancel(), session.cancel())
        await session.cancel()
        server.publish(2)
        seen = [message.body async for chunk in session for message in chunk]
        assert [b"0", b"1", b"2"] == seen
        await session.settle([Settlement(Disposition.ACK, (1, 2, 3))])
    assert {0, 1, 2} == set(server.broker.outcomes)
    assert 2 == server.broker.ready


async def test_a_cancel_is_answered_or_the_session_is_lost(server: Server) -> None:
    """It does not hang."""
    async with consuming() as session:
        server.is_silent = True
        cancelling = asyncio.create_task(session.cancel())
        await asyncio.sleep(1)
        assert not cancelling.done()
        server.break_off()
        with pytest.raises(SessionLost, match="the connection was closed"):
            await cancelling


# --- losses ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "text", "is_crash"),
    [
        (
            p.Detach(UInt(0), closed=True, error=p.PeerError(Symbol("amqp:resource-deleted"))),
            "the broker ended the link: the queue was deleted or is unavailable",
            False,
        ),
        (
            p.End(p.PeerError(Symbol("amqp:internal-error"), "badmatch")),
            "the broker ended the link: amqp:internal-error: badmatch",
            True,
        ),
        (
            p.Close(p.PeerError(Symbol("amqp:internal-error"), "Session error: …")),
            "the broker ended the connection: amqp:internal-error: Session error: …",
            True,
        ),
        (
            p.Close(p.PeerError(Symbol("amqp:internal-error"), "Connection forced: 'x'")),
            "the broker ended the connection: amqp:internal-error: Connection forced: 'x'",
            False,
        ),
        (p.Close(), "the broker ended the connection without a reason", False),
    ],
)
async def test_the_error_says_what_ended_a_session(
    server: Server, record: p.Record, text: str, is_crash: bool
) -> None:
    """By everything that is asked of it afterwards; what was pending is not handed out."""
    server.publish(1)
    async with consuming() as session:
        await asyncio.sleep(1)
        server.say(pack(record))
        await asyncio.sleep(1)
        for use in (
            anext(aiter(session)),
            session.settle([]),
            session.settled(),
            session.cancel(),
            session.pump(lambda _: None),
        ):
            with pytest.raises(SessionLost) as caught:
                await use
            expected = f"the session on queue 'q ü' at {SHOWN} was lost: "
            assert f"{expected}{text}" == str(caught.value)
        assert is_crash == (session.crashed_on is not None)


async def test_a_loss_ends_every_wait(server: Server) -> None:
    """Not only the next call."""
    async with consuming() as session:
        waiting = [
            asyncio.create_task(use)
            for use in (session.pump(lambda _: None), session.settled(), session.cancel())
        ]
        server.is_silent = True
        await asyncio.sleep(1)
        server.break_off(ConnectionResetError("reset by peer"))
        done = await asyncio.gather(*waiting, return_exceptions=True)
        assert "reset by peer" in str(done[0])


# --- leaving -----------------------------------------------------------------------------


async def test_leaving_proves_detaches_and_closes(
    server: Server, virtual_loop: VirtualTimeLoop
) -> None:
    """In this order; what is unsettled goes back."""
    server.publish(3)
    async with consuming() as session:
        await take(session, 3)
        await session.settle([Settlement(Disposition.ACK, (1, 2))])
    order = [type(record).__name__ for record in server.received if record != "sign of life"]
    assert ["DispositionFrame", "Flow", "Flow", "Flow", "Flow", "Detach", "Close"] == order[-7:]
    assert [True, True, True] == [flow.drain for flow in sent(server, p.Flow)[-3:]]
    assert 0 == session.unproven
    assert virtual_loop.time() < 1
    with pytest.raises(SessionClosed, match="is closed"):
        await session.settle([])


async def test_waiting_calls_end_when_the_session_is_closed(server: Server) -> None:
    """That it is over."""
    async with consuming() as session:
        waiting = asyncio.create_task(anext(aiter(session)))  # type: ignore[arg-type]
        await asyncio.sleep(1)
    with pytest.raises(SessionClosed):
        await waiting


async def test_leaving_ends_in_time(server: Server, virtual_loop: VirtualTimeLoop) -> None:
    """Whatever the broker does; `unproven` counts the settlements that may be lost."""
    server.publish(3)
    async with consuming() as session:
        await session.settle(acked(await take(session, 3)))
        server.is_silent = True
        server.keeps_open = True
    assert WIND_UP_TIMEOUT + CLOSE_TIMEOUT == pytest.approx(virtual_loop.time(), abs=0.1)
    assert 3 == session.unproven
    assert server.is_aborted


async def test_leaving_a_lost_session_takes_no_time(
    server: Server, virtual_loop: VirtualTimeLoop
) -> None:
    """There is no broker to ask."""
    server.publish(1)
    async with consuming() as session:
        await session.settle(acked(await take(session, 1)))
        server.is_silent = True
        server.break_off()
        await asyncio.sleep(1)
    assert 1 == pytest.approx(virtual_loop.time(), abs=0.1)
    assert 1 == session.unproven


async def test_a_detach_during_the_close_is_not_a_loss(server: Server) -> None:
    """The broker may close at the same moment."""
    async with consuming() as session:
        server.say(pack(p.Detach(UInt(0), closed=True)))
    assert server.is_aborted
    assert session.crashed_on is None
