"""What a session hands out before the answer to its cancel, and how it settles after that."""

from __future__ import annotations

import asyncio
import struct
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import pytest

from aio_pika_batch.adapters.aio_pika.amqp_spec import ACK_SIZE, FRAME_OVERHEAD
from aio_pika_batch.adapters.aio_pika.connection import BasicConsume, QueueDeclare
from aio_pika_batch.adapters.aio_pika.events import ChannelCloseOk, ConnectionLost, Deliveries
from aio_pika_batch.adapters.aio_pika.frame_fastpath import pack_settlements
from aio_pika_batch.adapters.aio_pika.session import AioPikaSession
from aio_pika_batch.core.message import Message
from aio_pika_batch.core.settlement import Disposition, Frame, Settlement
from aio_pika_batch.errors import SessionLost, SettlementError
from aio_pika_batch.testing.virtual_time import VirtualTimeLoop
from aio_pika_batch.transport import Subscription
from tests.unit.adapters.aio_pika.broker_frames import message


class FakeChannel:
    """aiormq's channel. The broker answers a cancel when the test says so."""

    number = 1

    def __init__(self, tap: FakeTap | None = None) -> None:
        self.answer = asyncio.Event()
        self.has_leader = True
        self.delivers = 0
        self.tap = tap or FakeTap()
        self.consumers: dict[str, Any] = {}

    async def basic_qos(self, **_: Any) -> None:
        """Accept any prefetch."""

    async def rpc(self, method: BasicConsume | QueueDeclare) -> Any:
        if isinstance(method, BasicConsume):
            self.tap.note("consume")
            if self.delivers:
                self.tap.tell(Deliveries([delivered(self.delivers)]))
            return None
        self.tap.note("declare")
        await asyncio.sleep(0 if self.has_leader else 0.25)
        return SimpleNamespace(consumer_count=0)

    async def basic_cancel(self, _: str) -> None:
        self.tap.note("cancel")
        await self.answer.wait()
        self.tap.note("cancel-ok")

    async def tx_select(self) -> None:
        self.tap.note("select")

    async def tx_commit(self) -> None:
        self.tap.note("commit")
        await asyncio.sleep(ROUND_TRIP)

    async def close(self) -> None:
        self.tap.note("close")
        self.closed_at = asyncio.get_running_loop().time()
        self.tap.tell(ChannelCloseOk())


class FakeTap:
    """The test is the broker.

    Attributes:
        sent: What was sent, in order: methods, and settlements as (disposition, tag, multiple).
    """

    end = None
    closed = None
    is_clogged = False

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def listen(self, listener: Any) -> FakeTap:
        self.tell = listener
        return self

    def tap_consumer(self, _: int, __: Any) -> None:
        """Take out what the test tells."""

    def write(self, data: bytes) -> bool:
        self.sent.extend(SETTLEMENTS[each] for each in _SETTLE_FRAME.iter_unpack(data))
        return True

    def note(self, method: str) -> None:
        """Record a method."""
        self.sent.append(method)

    def abort(self) -> None:
        """Do nothing."""


_SETTLE_FRAME = struct.Struct(f">{FRAME_OVERHEAD + ACK_SIZE}s")
ROUND_TRIP = 0.01
SETTLEMENTS = {
    (pack_settlements(1, [Frame(disposition, tag, multiple)]),): (disposition, tag, multiple)
    for disposition in Disposition
    for tag in range(1, 201)
    for multiple in (True, False)  # a reject has only one form
}
ACK, REJECT, REQUEUE, RETURN = Disposition


async def opened(
    channel: FakeChannel,
    tap: FakeTap,
    *,
    is_rabbitmq: bool = True,
    prefetch: int = 10,
    queue_type: str | None = None,
    exclusive: bool = False,
    version: str = "4.3.0",
) -> AioPikaSession:
    """A session that consumes."""

    async def open_channel() -> FakeChannel:
        return channel

    async def close() -> None:
        """Hang up."""

    connection: Any = SimpleNamespace(
        is_fast=True,
        tap=tap,
        channel=open_channel,
        close=close,
        address="there",
        is_rabbitmq=is_rabbitmq,
        product=("RabbitMQ", version),
    )
    subscription = Subscription(
        queue="q",
        prefetch=prefetch,
        consumer_tag="c",
        queue_type=queue_type,
        exclusive=exclusive,
    )
    session = AioPikaSession(connection, subscription)
    await session.open(1)
    return session


def delivered(tag: int) -> Message:
    """A message with this delivery tag."""
    made = message(b"\0\0")
    made.delivery_tag = tag
    return made


async def holding(count: int, **how: Any) -> tuple[AioPikaSession, FakeChannel, FakeTap]:
    """A session with *count* unsettled messages, whose tags begin at 1."""
    tap = FakeTap()
    channel = FakeChannel(tap)
    session = await opened(channel, tap, **how)
    tap.tell(Deliveries([delivered(tag) for tag in range(1, count + 1)]))
    await anext(session)
    tap.sent.clear()
    return session, channel, tap


async def settle(session: AioPikaSession, disposition: Disposition, *tags: int) -> None:
    """Settle messages."""
    await session.settle([Settlement(disposition, tags)])


async def iterated(session: AioPikaSession, chunks: list[list[Message]]) -> None:
    """Iterate over a session to its end."""
    chunks.extend([list(chunk) async for chunk in session])


async def pumped(session: AioPikaSession, chunks: list[list[Message]]) -> None:
    """Pump a session to its end."""
    await session.pump(lambda chunk: chunks.append(list(chunk)))


@pytest.mark.parametrize("way", [iterated, pumped])
async def test_what_comes_before_the_answer_to_cancel_is_handed_out(way: Any) -> None:
    """However much it is, and however long the answer takes."""
    channel, tap = FakeChannel(), FakeTap()
    session = await opened(channel, tap)
    chunks: list[list[Message]] = []
    taking = asyncio.create_task(way(session, chunks))
    cancelling = asyncio.create_task(session.cancel())
    late = [message(b"\0\0"), message(b"\0\0")]
    for each in late:
        await asyncio.sleep(1)
        assert not taking.done()
        tap.tell(Deliveries([each]))
    channel.answer.set()
    await asyncio.gather(taking, cancelling)

    assert [[each] for each in late] == chunks


@pytest.mark.parametrize("way", [iterated, pumped])
async def test_what_comes_after_a_loss_is_not_handed_out(way: Any) -> None:
    """Also if it comes before the task that takes messages has noticed."""
    tap = FakeTap()
    session = await opened(FakeChannel(tap), tap)
    chunks: list[list[Message]] = []
    taking = asyncio.create_task(way(session, chunks))
    await asyncio.sleep(1)
    tap.tell(ConnectionLost("the line was cut"))
    tap.tell(Deliveries([delivered(1)]))

    with pytest.raises(SessionLost, match="the line was cut"):
        await taking
    assert [] == chunks


# -- after the cancel -----------------------------------------------------------------------------


async def test_settlements_wait_for_the_answer_to_cancel_and_then_go_out_at_once(
    virtual_loop: VirtualTimeLoop,
) -> None:
    """With 30 messages left, no more commands can follow than a quorum queue's channel sends."""
    session, channel, tap = await holding(31)
    await settle(session, ACK, 1)
    cancelling = asyncio.create_task(session.cancel())
    await asyncio.sleep(1)
    await settle(session, ACK, 2, 3)
    await settle(session, REJECT, 4)
    assert [(ACK, 1, False), "cancel"] == tap.sent
    channel.answer.set()
    await cancelling
    await settle(session, ACK, 6)
    assert 4 == session.unproven
    await session.close()

    assert 0 == session.unproven
    assert [
        (ACK, 1, False),
        "cancel",
        "cancel-ok",
        (REJECT, 4, False),
        (ACK, 3, True),
        (ACK, 6, False),
        "close",
    ] == tap.sent
    assert 1 == virtual_loop.time()


async def test_settlements_of_many_messages_are_sorted_and_committed() -> None:
    """Each commit costs one command for each disposition. The close does not wait."""
    session, channel, tap = await holding(31)
    cancelling = asyncio.create_task(session.cancel())
    await asyncio.sleep(0.1)
    for tag in range(1, 7):
        await settle(session, (ACK, RETURN, REJECT)[tag % 3], tag)
    channel.answer.set()
    await cancelling
    await asyncio.sleep(1)
    expected = [
        *("cancel", "cancel-ok", "select"),
        *((ACK, 3, False), (ACK, 6, False)),
        *((REJECT, 2, False), (REJECT, 5, False)),
        *((RETURN, 1, False), (RETURN, 4, False)),
        "commit",
    ]
    assert expected == tap.sent
    await settle(session, ACK, 9)
    await settle(session, ACK, 7, 8)
    await session.close()

    expected += [(ACK, 7, False), (ACK, 8, False), (ACK, 9, False), "commit", "close"]
    assert expected == tap.sent


async def test_messages_that_arrive_before_the_answer_to_cancel_are_counted() -> None:
    """They are unsettled as well."""
    session, channel, tap = await holding(1, prefetch=100)
    cancelling = asyncio.create_task(session.cancel())
    await asyncio.sleep(0.1)
    tap.tell(Deliveries([delivered(tag) for tag in range(2, 32)]))
    channel.answer.set()
    await cancelling

    assert "select" == tap.sent[-1]
    await session.close()


async def test_settled_can_be_awaited_again() -> None:
    """Each time it covers everything that was settled before."""
    session, channel, tap = await holding(40, prefetch=40)
    channel.answer.set()
    await session.cancel()
    for tag in (1, 2):
        await settle(session, ACK, tag)
        await session.settled()
        assert [(ACK, tag, False), "commit"] == tap.sent[-2:]
        assert 0 == session.unproven
    await session.close()


async def test_what_is_settled_during_a_commit_is_committed_before_the_close() -> None:
    """Nothing that was written stays uncommitted: it would return to the queue."""
    session, channel, tap = await holding(40, prefetch=40)
    channel.answer.set()
    await session.cancel()
    await settle(session, ACK, 1)
    await asyncio.sleep(ROUND_TRIP / 2)
    await settle(session, ACK, 2)
    await session.close()

    assert [(ACK, 1, False), "commit", (ACK, 2, False), "commit", "close"] == tap.sent[3:]
    assert 0 == session.unproven


async def test_a_drain_of_many_messages_commits_few_times(virtual_loop: VirtualTimeLoop) -> None:
    """200 messages end in their own time; the last ones are committed before the close."""
    session, channel, tap = await holding(200, prefetch=200)
    channel.answer.set()
    await session.cancel()
    for tag in range(1, 201):
        await settle(session, (ACK, REJECT)[tag % 2], tag)
        await asyncio.sleep(0.1)
    await session.close()

    runs = [how for how, _ in groupby(tap.sent[3:-1], key=lambda each: each[0])]
    assert 10 < sum(each in {ACK, REJECT} for each in runs) <= 30
    assert ["commit", "close"] == tap.sent[-2:]
    assert set(range(1, 201)) == {each[1] for each in tap.sent if isinstance(each, tuple)}
    assert virtual_loop.time() < 20.1


@pytest.mark.parametrize("count", [30, 31])
@pytest.mark.parametrize("late", [0.0, 0.15, 9.0])
async def test_a_broker_other_than_rabbitmq_gets_a_pause_and_no_transaction(
    virtual_loop: VirtualTimeLoop, late: float, count: int
) -> None:
    """Its channel is closed some time after the last settlement."""
    session, channel, tap = await holding(count, is_rabbitmq=False)
    channel.answer.set()
    await session.cancel()
    for tag in range(count, 0, -1):
        await settle(session, ACK, tag)
    await asyncio.sleep(late)
    closing_at = virtual_loop.time()
    await session.close()

    acks = tap.sent[2:-1]
    assert ((ACK, 31, True) in acks) if count > 30 else len(acks) == 30
    assert "select" not in tap.sent
    pause = 0.2 if count > 30 else max(0.0, 0.2 - late)
    assert pause == pytest.approx(channel.closed_at - closing_at)


async def test_a_session_knows_how_many_settlements_are_unproven() -> None:
    """Cancel-ok, commit-ok and close-ok prove what was settled before."""
    session, channel, _ = await holding(45, prefetch=40)
    await settle(session, ACK, 1)
    assert 1 == session.unproven
    await settle(session, ACK, 2, 3)
    assert 3 == session.unproven
    cancelling = asyncio.create_task(session.cancel())
    await asyncio.sleep(0.1)
    await settle(session, ACK, 4, 5)
    assert 5 == session.unproven
    channel.answer.set()
    await cancelling
    assert 2 == session.unproven
    await asyncio.sleep(2 * ROUND_TRIP)
    assert 0 == session.unproven
    await settle(session, ACK, 6)
    assert 1 == session.unproven
    await session.close()
    assert 0 == session.unproven


async def test_no_more_settlements_are_unproven_than_the_prefetch_allows() -> None:
    """The broker delivers no further message before it has received a settlement."""
    session, _, _ = await holding(45, prefetch=40)
    await settle(session, ACK, *range(1, 46))

    assert 40 == session.unproven


async def test_settlements_are_unproven_if_the_cancel_or_the_commit_is_never_answered() -> None:
    """The session's end doesn't wait longer for that than for anything else."""
    session, channel, tap = await holding(45, prefetch=45)
    await settle(session, ACK, *range(1, 5))
    await session.close()
    assert 4 == session.unproven

    session, channel, tap = await holding(45, prefetch=45)
    is_lost = asyncio.Event()

    async def unanswered() -> None:
        await is_lost.wait()
        raise ConnectionError

    channel.tx_commit = unanswered  # type: ignore[method-assign]
    tap.abort = is_lost.set  # type: ignore[method-assign]
    channel.answer.set()
    await session.cancel()
    await settle(session, ACK, *range(1, 5))
    await asyncio.sleep(1)
    await settle(session, ACK, *range(5, 8))
    await session.close()
    assert 7 == session.unproven
    assert "close" not in tap.sent


async def test_the_answers_to_pause_and_resume_prove_what_was_settled_before() -> None:
    """A second pause sends nothing, and proves nothing."""
    session, channel, _ = await holding(45, prefetch=20)
    channel.answer.set()
    await settle(session, ACK, 1)
    await session.pause()
    assert 0 == session.unproven
    await settle(session, ACK, *range(2, 12))
    await session.pause()
    assert 10 == session.unproven
    await session.resume(3)
    assert 0 == session.unproven
    await settle(session, ACK, *range(12, 40))
    assert 23 == session.unproven
    await session.pause()
    assert 0 == session.unproven
    await session.close()


async def test_a_paused_session_that_settles_much_gets_an_answer_of_the_queue() -> None:
    """It starts a consumer only for that: a second cancel of the first one would prove nothing."""
    session, channel, tap = await holding(45, prefetch=45)
    channel.answer.set()
    await session.pause()
    tap.sent.clear()
    for tag in range(1, 41):
        await settle(session, ACK, tag)
    await session.cancel()
    assert ["consume", "cancel", "cancel-ok"] == tap.sent[40:]
    assert 0 == session.unproven
    await session.close()


async def test_a_paused_session_that_settles_little_is_just_closed() -> None:
    """The commands since the pause are few enough."""
    session, channel, tap = await holding(20, prefetch=20)
    channel.answer.set()
    await session.pause()
    tap.sent.clear()
    for tag in range(1, 21):
        await settle(session, ACK, tag)
    await session.cancel()
    assert 20 == session.unproven
    await session.close()
    assert ["close"] == tap.sent[20:]
    assert 0 == session.unproven


@pytest.mark.parametrize("count", [1, 40])
async def test_a_quorum_queue_answers_after_the_last_settlements(count: int) -> None:
    """Only then is the channel closed: it may have kept them behind deliveries that came late."""
    session, channel, tap = await holding(count, prefetch=count, queue_type="quorum")
    channel.answer.set()
    await session.cancel()
    tap.sent.clear()
    await settle(session, ACK, *range(1, count + 1))
    await asyncio.sleep(2 * ROUND_TRIP)
    assert count == session.unproven
    await session.close()
    assert ["declare", "consume", "cancel", "cancel-ok", "close"] == tap.sent[-5:]
    assert 0 == session.unproven


async def test_a_queue_without_a_leader_is_not_waited_for(virtual_loop: VirtualTimeLoop) -> None:
    """The channel would hang in the question, and be closed with the whole connection."""
    session, channel, tap = await holding(40, prefetch=40, queue_type="quorum")
    channel.answer.set()
    channel.has_leader = False
    await session.cancel()
    tap.sent.clear()
    await settle(session, ACK, *range(1, 41))
    await session.close()
    assert ["commit", "declare", "declare", "close"] == tap.sent[-4:]
    assert virtual_loop.time() < 1


@pytest.mark.parametrize("version", ["3.10.8", "4.2.9", "4.3.0"])
@pytest.mark.parametrize("count", [1, 40])
async def test_what_is_delivered_for_that_answer_is_returned(count: int, version: str) -> None:
    """Since 4.3 by a nack, which isn't counted. Before, the close returns it to its place."""
    session, channel, tap = await holding(
        count, prefetch=count, queue_type="quorum", version=version
    )
    channel.answer.set()
    await session.cancel()
    await settle(session, ACK, *range(1, count + 1))

    channel.delivers = count + 1
    await session.close()
    end: list[Any] = ["cancel-ok", "close"]
    if version == "4.3.0":
        end[1:1] = [(RETURN, count + 1, False), *(["commit"] if count > 30 else [])]
    assert end == tap.sent[-len(end) :]


async def test_returned_messages_come_after_that_answer() -> None:
    """So they stay before a message that is delivered for it. Alone they need no answer."""
    session, channel, tap = await holding(4, prefetch=4, queue_type="quorum")
    channel.answer.set()
    await session.cancel()
    tap.sent.clear()
    await settle(session, RETURN, 2, 3)
    with pytest.raises(SettlementError):
        await settle(session, RETURN, 5)
    for again in (RETURN, ACK):
        with pytest.raises(SettlementError, match="settled already"):
            await settle(session, again, 2)
    assert [] == tap.sent
    assert 0 == session.unproven
    await settle(session, ACK, 1)
    await session.close()
    assert [
        (ACK, 1, False),
        "declare",
        "consume",
        "cancel",
        "cancel-ok",
        (RETURN, 3, True),
        "close",
    ] == tap.sent

    session, channel, tap = await holding(4, prefetch=4, queue_type="quorum")
    channel.answer.set()
    await session.cancel()
    tap.sent.clear()
    await settle(session, RETURN, 2, 3)
    await session.close()
    assert [(RETURN, 2, False), (RETURN, 3, False), "close"] == tap.sent


async def test_an_end_without_an_answer_of_the_queue_proves_nothing() -> None:
    """The kept settlements would be redelivered unnoticed."""
    session, channel, tap = await holding(3, prefetch=3, queue_type="quorum")
    channel.answer.set()
    await session.cancel()
    await settle(session, ACK, 1, 2)
    is_lost = asyncio.Event()

    async def unanswered(_: object) -> None:
        await is_lost.wait()
        raise ConnectionError

    channel.rpc = unanswered  # type: ignore[method-assign]
    tap.abort = is_lost.set  # type: ignore[method-assign]
    await session.close()
    assert "close" not in tap.sent
    assert 2 == session.unproven


@pytest.mark.parametrize(
    ("settled", "how"),
    [
        (True, {"queue_type": "classic"}),
        (True, {"queue_type": None}),
        (True, {"queue_type": "quorum", "exclusive": True}),
        (False, {"queue_type": "quorum"}),
    ],
)
async def test_no_answer_is_asked_for_if_it_may_do_harm_or_proves_nothing(
    how: dict[str, Any], *, settled: bool
) -> None:
    """Other queues would deliver a message for it."""
    session, channel, tap = await holding(3, **how)
    channel.answer.set()
    await session.cancel()
    tap.sent.clear()
    if settled:
        await settle(session, ACK, 1, 2, 3)
    await session.close()
    assert "consume" not in tap.sent
    assert 0 == session.unproven


@pytest.mark.parametrize("way", ["pause", "resume"])
async def test_a_pause_that_is_not_answered_loses_the_session(
    virtual_loop: VirtualTimeLoop, way: str
) -> None:
    """A queue may be without a leader, while the connection is alive."""
    session, channel, _ = await holding(3)
    hung = asyncio.Event()

    async def unanswered(*_: Any, **__: Any) -> None:
        await hung.wait()

    if way == "resume":
        channel.answer.set()
        await session.pause()
        channel.rpc = unanswered  # type: ignore[method-assign]
    with pytest.raises(SessionLost, match="not answered for 10 s"):
        await (session.pause() if way == "pause" else session.resume(1))
    assert 10 == virtual_loop.time()
    with pytest.raises(SessionLost):
        await settle(session, ACK, 1)
    hung.set()
    channel.answer.set()
    await session.close()
