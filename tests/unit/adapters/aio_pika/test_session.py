"""A session hands out everything that was delivered before the answer to its cancel."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from aio_pika_batch.adapters.aio_pika.events import Deliveries
from aio_pika_batch.adapters.aio_pika.session import AioPikaSession
from aio_pika_batch.core.message import Message
from aio_pika_batch.core.settlement import Disposition, Settlement
from aio_pika_batch.testing.virtual_time import VirtualTimeLoop
from aio_pika_batch.transport import Subscription
from tests.unit.adapters.aio_pika.broker_frames import message


class FakeChannel:
    """aiormq's channel. The broker answers a cancel when the test says so."""

    number = 1

    def __init__(self) -> None:
        self.answer = asyncio.Event()

    async def basic_qos(self, **_: Any) -> None:
        """Accept any prefetch."""

    async def basic_consume(self, *_: Any, **__: Any) -> None:
        """Accept any consumer."""

    async def basic_cancel(self, _: str) -> None:
        await self.answer.wait()

    async def close(self) -> None:
        self.closed_at = asyncio.get_running_loop().time()


class FakeTap:
    """The test is the broker."""

    end = None
    closed = None
    is_clogged = False

    def tap_consumer(self, _: int, __: Any, listener: Any) -> None:
        self.tell = listener

    def write(self, _: bytes) -> bool:
        return True

    def abort(self) -> None:
        """Do nothing."""


async def opened(channel: FakeChannel, tap: FakeTap) -> AioPikaSession:
    """A session that consumes."""

    async def open_channel() -> FakeChannel:
        return channel

    async def close() -> None:
        """Hang up."""

    connection: Any = SimpleNamespace(
        is_fast=True, tap=tap, channel=open_channel, close=close, address="there"
    )
    session = AioPikaSession(connection, Subscription(queue="q", prefetch=10, consumer_tag="c"))
    await session.open(1)
    return session


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


@pytest.mark.parametrize("late", [0.0, 0.15, 9.0])
async def test_a_channel_is_closed_some_time_after_the_last_settlement(
    virtual_loop: VirtualTimeLoop, late: float
) -> None:
    """A quorum queue may still be processing acks. 50 ms were enough."""
    channel, tap = FakeChannel(), FakeTap()
    session = await opened(channel, tap)
    channel.answer.set()
    tap.tell(Deliveries([message(b"\0\0")]))
    await anext(session)
    await session.settle([Settlement(Disposition.ACK, (1,))])
    settled_at = virtual_loop.time()
    await asyncio.sleep(late)

    await session.close()

    assert max(0.2, late) == pytest.approx(channel.closed_at - settled_at)
