"""Does each batch's settlement go out in its turn, once, and no later than it must?"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aio_pika_batch.core.settlement import Disposition, Settlement
from aio_pika_batch.desk import SettleDesk
from aio_pika_batch.errors import SessionLost
from aio_pika_batch.testing.virtual_time import run

REJECT = Disposition.REJECT


class Clerk:
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
    clerk = Clerk()
    desk = SettleDesk(clerk)
    first, _ = desk.stand_in_line(), desk.stand_in_line()

    await desk.settle(of(1), first)

    assert [[1]] == clerk.calls


async def test_those_in_front_are_waited_for_and_settled_together():
    """An original among theirs that is still undecided would be a hole."""
    clerk = Clerk()
    desk = SettleDesk(clerk)
    first, second = desk.stand_in_line(), desk.stand_in_line()
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
    """And may settle later, at its end."""
    clerk = Clerk()
    desk = SettleDesk(clerk)
    first, second = desk.stand_in_line(), desk.stand_in_line()
    behind = asyncio.ensure_future(desk.settle(of(2), second))
    await asyncio.sleep(0.001)

    desk.leave(first)
    desk.leave(first)

    assert [True] == await settled_soon(behind)
    await desk.settle(of(1), first)
    assert [[2], [1]] == clerk.calls


async def test_an_error_is_everybodys():
    """Whoever waits for a settlement that failed hears of it, also those that came along."""
    clerk = Clerk()
    clerk.error = SessionLost("gone")
    desk = SettleDesk(clerk)
    first = desk.stand_in_line()
    behind = asyncio.ensure_future(desk.settle(of(2)))
    await asyncio.sleep(0.001)

    with pytest.raises(SessionLost):
        await desk.settle(of(1), first)
    with pytest.raises(SessionLost):
        await behind


async def test_a_cancelled_waiter_takes_nothing_back():
    """What it wanted to be settled is settled all the same, with the others'."""
    clerk = Clerk()
    desk = SettleDesk(clerk)
    first = desk.stand_in_line()
    behind = asyncio.ensure_future(desk.settle(of(2)))
    await asyncio.sleep(0.001)
    behind.cancel()
    await settled_soon(behind)

    await desk.settle([*of(1), Settlement(REJECT, (5,))], first)

    assert [[1, 2, 5]] == clerk.calls


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=8))
def test_any_order(batches: list[tuple[int, bool]]) -> None:
    """Each batch is decided, or leaves the line first, at a time of its own.

    It is settled once, as soon as everybody in front of it is decided or has left, and no sooner.
    """
    clerk = Clerk()
    seen: dict[int, float] = {}

    async def one(desk: SettleDesk, number: int, at: int, leaves: bool) -> None:
        place = desk.stand_in_line()
        await asyncio.sleep(at)
        if leaves:
            desk.leave(place)
            await asyncio.sleep(100)
        await desk.settle(of(number), place)
        seen[number] = asyncio.get_running_loop().time()

    async def story() -> float:
        desk = SettleDesk(clerk)
        began = asyncio.get_running_loop().time()
        async with asyncio.TaskGroup() as group:
            for number, (at, leaves) in enumerate(batches):
                group.create_task(one(desk, number, at, leaves))
        return began

    began = run(story())

    assert sorted(seen) == sorted(tag for call in clerk.calls for tag in call)
    for number, (_, leaves) in enumerate(batches):
        due = max(at for at, _ in batches[: number + 1])
        if not leaves:
            assert due == pytest.approx(seen[number] - began, abs=0.01)
        else:
            assert seen[number] - began >= batches[number][0] + 100
