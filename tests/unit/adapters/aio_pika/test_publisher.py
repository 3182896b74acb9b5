"""A publisher gives up after silence, not after a long time."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from aio_pika_batch.adapters.aio_pika.events import Confirm, Confirms, ConnectionLost
from aio_pika_batch.adapters.aio_pika.publisher import AioPikaPublisher
from aio_pika_batch.core.publication import Outcome, Publication

if TYPE_CHECKING:
    from aio_pika_batch.adapters.aio_pika.events import Event
    from aio_pika_batch.testing.virtual_time import VirtualTimeLoop


class FakeTap:
    """Accepts everything. The test is the broker."""

    frame_max = 131_072
    end = None
    closed = None
    is_clogged = False

    def listen(self, listener: Any) -> FakeTap:
        self.tell = listener
        return self

    def tap_publisher(self, _: int) -> None:
        """Take out what the test tells."""

    def write(self, data: bytes) -> bool:
        return True

    def confirm(self, tag: int) -> None:
        """Confirm everything up to *tag*."""
        event: Event = Confirms([Confirm(tag, multiple=True, accepted=True)])
        self.tell(event)


async def opened(tap: FakeTap, timeout: float) -> AioPikaPublisher:
    """A publisher with this `publish_timeout`."""

    async def channel(*, confirms: bool) -> Any:
        return SimpleNamespace(number=1)

    connection: Any = SimpleNamespace(
        tap=tap, address=SimpleNamespace(user="guest"), channel=channel, is_fast=True
    )
    publisher = AioPikaPublisher(connection, timeout)
    await publisher.open(timeout)
    return publisher


async def test_a_call_may_take_longer_while_confirms_arrive(
    virtual_loop: VirtualTimeLoop,
) -> None:
    """200,000 messages at 8,000 a second take longer than `publish_timeout`, and are confirmed."""
    tap = FakeTap()
    publisher = await opened(tap, 10)
    publishing = asyncio.create_task(publisher.publish([Publication(b"")] * 2000))
    for tag in range(10, 2001, 10):
        await asyncio.sleep(9)
        tap.confirm(tag)

    assert {Outcome.CONFIRMED} == set(await publishing)
    assert 1800 == virtual_loop.time()
    assert publisher.is_open


async def test_silence_after_the_last_confirm_ends_the_call(
    virtual_loop: VirtualTimeLoop,
) -> None:
    """Confirmed messages stay confirmed. The rest is unknown, and the publisher is closed."""
    tap = FakeTap()
    publisher = await opened(tap, 10)
    publishing = asyncio.create_task(publisher.publish([Publication(b"")] * 3))
    await asyncio.sleep(9)
    tap.confirm(2)

    assert [Outcome.CONFIRMED, Outcome.CONFIRMED, Outcome.UNKNOWN] == await publishing
    assert 19 == virtual_loop.time()
    assert not publisher.is_open


async def test_a_confirm_at_the_moment_of_the_timeout_changes_nothing() -> None:
    """The time-out has been scheduled already. Nothing fails."""
    tap = FakeTap()
    publisher = await opened(tap, 10)
    loop = asyncio.get_running_loop()
    publishing = asyncio.create_task(publisher.publish([Publication(b"")] * 2))
    await asyncio.sleep(0)
    loop.call_at(loop.time() + 10, tap.confirm, 1)

    assert [Outcome.CONFIRMED, Outcome.UNKNOWN] == await publishing


async def test_a_listener_gets_late_confirms_and_the_publisher_goes_on(
    virtual_loop: VirtualTimeLoop,
) -> None:
    """Its own, whatever was published in the meantime."""
    tap = FakeTap()
    publisher = await opened(tap, 10)
    late: list[Any] = []
    publisher.on_late = lambda *each: late.append(each)
    first, second = Publication(b"1"), Publication(b"2")

    assert [Outcome.UNKNOWN] == await publisher.publish([first])
    assert 10 == virtual_loop.time()
    assert publisher.is_open
    publishing = asyncio.create_task(publisher.publish([second]))
    await asyncio.sleep(1)
    tap.confirm(2)

    assert [Outcome.CONFIRMED] == await publishing
    assert [(first, Outcome.CONFIRMED)] == late


async def test_with_a_listener_other_confirms_grant_no_more_time(
    virtual_loop: VirtualTimeLoop,
) -> None:
    """Each copy has `publish_timeout`, in the same call and in others."""
    tap = FakeTap()
    publisher = await opened(tap, 10)
    publisher.on_late = lambda *_: None
    publishing = asyncio.create_task(publisher.publish([Publication(b"")] * 3))
    other = asyncio.create_task(publisher.publish([Publication(b"")]))
    await asyncio.sleep(9)
    tap.confirm(2)

    assert [Outcome.CONFIRMED, Outcome.CONFIRMED, Outcome.UNKNOWN] == await publishing
    assert 10 == virtual_loop.time()
    assert [Outcome.UNKNOWN] == await other


async def test_a_lost_connection_is_a_late_outcome(virtual_loop: VirtualTimeLoop) -> None:
    """Nothing can be expected any more."""
    tap = FakeTap()
    publisher = await opened(tap, 10)
    late: list[Any] = []
    publisher.on_late = lambda *each: late.append(each)
    publication = Publication(b"")
    await publisher.publish([publication])

    tap.tell(ConnectionLost("gone"))

    assert [(publication, Outcome.UNKNOWN)] == late
    assert not publisher.is_open
