"""When has a publisher waited long enough? After silence, not after a long time."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from aio_pika_batch.adapters.aio_pika.events import Confirm, Confirms
from aio_pika_batch.adapters.aio_pika.publisher import AioPikaPublisher
from aio_pika_batch.core.publication import Outcome, Publication

if TYPE_CHECKING:
    from aio_pika_batch.adapters.aio_pika.events import Event
    from aio_pika_batch.testing.virtual_time import VirtualTimeLoop


class Tap:
    """Takes everything; the broker is the test."""

    frame_max = 131_072
    end = None
    closed = None
    is_clogged = False

    def tap_publisher(self, number: int, listener: Any) -> None:
        self.tell = listener

    def write(self, data: bytes) -> bool:
        return True

    def confirm(self, tag: int) -> None:
        """The broker stored everything up to *tag*."""
        event: Event = Confirms([Confirm(tag, multiple=True, accepted=True)])
        self.tell(event)


async def opened(tap: Tap, timeout: float) -> AioPikaPublisher:
    """A publisher that waits for *timeout*."""

    async def channel(*, confirms: bool) -> Any:
        return SimpleNamespace(number=1)

    connection: Any = SimpleNamespace(
        tap=tap, address=SimpleNamespace(user="guest"), channel=channel, is_fast=True
    )
    publisher = AioPikaPublisher(connection, timeout)
    await publisher.open(timeout)
    return publisher


async def test_a_call_may_take_longer_while_confirms_are_heard(
    virtual_loop: VirtualTimeLoop,
) -> None:
    """200,000 messages at 8,000 a second take longer than `publish_timeout`, and are confirmed."""
    tap = Tap()
    publisher = await opened(tap, 10)
    publishing = asyncio.create_task(publisher.publish([Publication(b"")] * 2000))
    for tag in range(10, 2001, 10):
        await asyncio.sleep(9)
        tap.confirm(tag)

    assert {Outcome.CONFIRMED} == set(await publishing)
    assert 1800 == virtual_loop.time()
    assert publisher.is_open


async def test_silence_ends_the_waiting_after_the_last_confirm(
    virtual_loop: VirtualTimeLoop,
) -> None:
    """What was confirmed stays so; the rest is unknown, and the publisher takes no more."""
    tap = Tap()
    publisher = await opened(tap, 10)
    publishing = asyncio.create_task(publisher.publish([Publication(b"")] * 3))
    await asyncio.sleep(9)
    tap.confirm(2)

    assert [Outcome.CONFIRMED, Outcome.CONFIRMED, Outcome.UNKNOWN] == await publishing
    assert 19 == virtual_loop.time()
    assert not publisher.is_open


async def test_a_confirm_that_comes_with_the_end_of_time_changes_nothing() -> None:
    """The time-out is on its way already: it is not called back, and nothing fails."""
    tap = Tap()
    publisher = await opened(tap, 10)
    loop = asyncio.get_running_loop()
    publishing = asyncio.create_task(publisher.publish([Publication(b"")] * 2))
    await asyncio.sleep(0)
    loop.call_at(loop.time() + 10, tap.confirm, 1)

    assert [Outcome.CONFIRMED, Outcome.UNKNOWN] == await publishing
