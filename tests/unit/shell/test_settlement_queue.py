"""Does each batch's settlement go out in its turn, once, and no later than it must?"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aio_pika_batch.core.settlement import Disposition, Settlement
from aio_pika_batch.errors import SessionLost
from aio_pika_batch.runtime.settlement_queue import SettlementQueue
from aio_pika_batch.testing.virtual_time import run

REJECT = Disposition.REJECT


class RecordingSession:
    """A session that writes down which tags it was told of, in one list for each call."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.error: Exception | None = None

    async def settle(self, settlements: Sequence[Settlement]) -> None:
        self.calls.append([tag for each in settlements for tag in each.tags])
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error


def of(*tags: int) -> list[Settlement]:
    """An ack of these."""
    return [Settlement(Disposition.ACK, tags)]


async def settled_soon(*work: asyncio.Future[None]) -> list[bool]:
    """Which of these are done once everybody had a turn."""
    await asyncio.sleep(0.001)
    return [each.done() for each in work]


async def test_nobody_waits_for_those_behind():
    """They are on their way as long as messages come: that would be for ever."""
    clerk = RecordingSession()
    desk = SettlementQueue(clerk)
    first, _ = desk.reserve(), desk.reserve()

    await desk.settle(of(1), first)

    assert [[1]] == clerk.calls


async def test_those_in_front_are_waited_for_and_settled_together():
    """An original among theirs that is still undecided would be a hole."""
    clerk = RecordingSession()
    desk = SettlementQueue(clerk)
    first, second = desk.reserve(), desk.reserve()
    behind = [
        asyncio.ensure_future(desk.settle(of(2), second)),
        asyncio.ensure_future(desk.settle(of(3))),
    ]
    assert [False, False] == await settled_soon(*behind)
    assert [] == clerk.calls

    await desk.settle(of(1), first)

    assert [[1, 2, 3]] == clerk.calls
    assert [True, True] == await settled_soon(*behind)


async def test_who_leaves_the_line_holds_nobody_up():
    """Having nothing to settle."""
    clerk = RecordingSession()
    desk = SettlementQueue(clerk)
    first, second = desk.reserve(), desk.reserve()
    behind = asyncio.ensure_future(desk.settle(of(2), second))
    await asyncio.sleep(0.001)

    desk.leave(first)

    assert [True] == await settled_soon(behind)
    assert [[2]] == clerk.calls


async def test_patience_has_an_end(virtual_loop):
    """Then all that is decided goes out together, and the undecided keep their places."""
    clerk = RecordingSession()
    desk = SettlementQueue(clerk, patience=0.5)
    first, second = desk.reserve(), desk.reserve()
    waiting = [asyncio.ensure_future(desk.settle(of(3)))]
    await asyncio.sleep(0.4)
    waiting.append(asyncio.ensure_future(desk.settle(of(4))))

    await asyncio.gather(*waiting)

    assert ([[3, 4]], 0.5) == (clerk.calls, virtual_loop.time())
    last = asyncio.ensure_future(desk.settle(of(2), second))
    await asyncio.sleep(0.4)
    await desk.settle(of(1), first)
    await last
    assert [[3, 4], [1, 2]] == clerk.calls


async def test_what_shall_go_at_once_takes_along_what_waits():
    """One write, one frame perhaps."""
    clerk = RecordingSession()
    desk = SettlementQueue(clerk)
    first = desk.reserve()
    waiting = asyncio.ensure_future(desk.settle(of(2)))
    await asyncio.sleep(0.001)

    await desk.settle_at_once(of(3))

    assert [True] == await settled_soon(waiting)
    await desk.settle(of(1), first)
    assert [[2, 3], [1]] == clerk.calls


async def test_an_error_is_everybodys():
    """Whoever waits for a settlement that failed hears of it, also those that came along."""
    clerk = RecordingSession()
    clerk.error = SessionLost("gone")
    desk = SettlementQueue(clerk)
    first = desk.reserve()
    behind = asyncio.ensure_future(desk.settle(of(2)))
    await asyncio.sleep(0.001)

    with pytest.raises(SessionLost):
        await desk.settle(of(1), first)
    with pytest.raises(SessionLost):
        await behind


async def test_a_cancelled_waiter_takes_nothing_back():
    """What it wanted to be settled is settled all the same, with the others'."""
    clerk = RecordingSession()
    desk = SettlementQueue(clerk)
    first = desk.reserve()
    behind = asyncio.ensure_future(desk.settle(of(2)))
    await asyncio.sleep(0.001)
    behind.cancel()
    await settled_soon(behind)

    await desk.settle([*of(1), Settlement(REJECT, (5,))], first)

    assert [[1, 2, 5]] == clerk.calls


@given(
    st.lists(st.tuples(st.floats(0, 1), st.sampled_from(["settles", "leaves", "cannot wait"]))),
    st.floats(0.01, 2),
)
def test_any_order(batches: list[tuple[float, str]], patience: float) -> None:
    """Each batch is decided at a time of its own, or leaves, or settles something at once first.

    What is decided is settled once: when everybody in front is decided or has left, or when its
    patience is at its end, and no later.
    """
    clerk = RecordingSession()
    seen: dict[int, float] = {}

    async def one(desk: SettlementQueue, number: int, at: float, way: str) -> None:
        loop = asyncio.get_running_loop()
        place = desk.reserve()
        await asyncio.sleep(at)
        if way == "leaves":
            desk.leave(place)
            return
        if way == "cannot wait":
            await desk.settle_at_once(of(-number - 1))
            seen[-number - 1] = loop.time()
        await desk.settle(of(number), place)
        seen[number] = loop.time()

    async def story() -> None:
        desk = SettlementQueue(clerk, patience)
        async with asyncio.TaskGroup() as group:
            for number, (at, way) in enumerate(batches):
                group.create_task(one(desk, number, at, way))

    run(story())

    assert sorted(seen) == sorted(tag for call in clerk.calls for tag in call)
    for number, (at, way) in enumerate(batches):
        if way == "cannot wait":
            assert at == pytest.approx(seen[-number - 1], abs=1e-6)
        if way != "leaves":
            in_front = max(each for each, _ in batches[: number + 1])
            assert at - 1e-6 <= seen[number] <= min(in_front, at + patience) + 1e-6
