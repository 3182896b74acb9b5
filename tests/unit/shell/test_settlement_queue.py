"""Each batch's settlement is sent in its turn, once, and no later than necessary."""

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
    queue = SettlementQueue(clerk)
    first, _ = queue.reserve(), queue.reserve()

    await queue.settle(of(1), first)

    assert [[1]] == clerk.calls


async def test_those_in_front_are_waited_for_and_settled_together():
    """An original among theirs that is still undecided would be a hole."""
    clerk = RecordingSession()
    queue = SettlementQueue(clerk)
    first, second = queue.reserve(), queue.reserve()
    behind = [
        asyncio.ensure_future(queue.settle(of(2), second)),
        asyncio.ensure_future(queue.settle(of(3))),
    ]
    assert [False, False] == await settled_soon(*behind)
    assert [] == clerk.calls

    await queue.settle(of(1), first)

    assert [[1, 2, 3]] == clerk.calls
    assert [True, True] == await settled_soon(*behind)


async def test_who_leaves_the_line_holds_nobody_up():
    """Having nothing to settle."""
    clerk = RecordingSession()
    queue = SettlementQueue(clerk)
    first, second = queue.reserve(), queue.reserve()
    behind = asyncio.ensure_future(queue.settle(of(2), second))
    await asyncio.sleep(0.001)

    queue.release(first)

    assert [True] == await settled_soon(behind)
    assert [[2]] == clerk.calls


async def test_patience_has_an_end(virtual_loop):
    """Then all that is decided goes out together, and the undecided keep their places."""
    clerk = RecordingSession()
    queue = SettlementQueue(clerk, patience=0.5)
    first, second = queue.reserve(), queue.reserve()
    waiting = [asyncio.ensure_future(queue.settle(of(3)))]
    await asyncio.sleep(0.4)
    waiting.append(asyncio.ensure_future(queue.settle(of(4))))

    await asyncio.gather(*waiting)

    assert ([[3, 4]], 0.5) == (clerk.calls, virtual_loop.time())
    last = asyncio.ensure_future(queue.settle(of(2), second))
    await asyncio.sleep(0.4)
    await queue.settle(of(1), first)
    await last
    assert [[3, 4], [1, 2]] == clerk.calls


async def test_what_is_enqueued_is_settled_with_the_ticket_before_it():
    """A batch's ACKs wait a moment for its copies, so that one frame may settle all of it."""
    clerk = RecordingSession()
    queue = SettlementQueue(clerk)
    first = queue.reserve()

    others = queue.enqueue(of(2))

    assert [False] == await settled_soon(others)
    await queue.settle(of(1), first)
    assert [True] == await settled_soon(others)
    assert [[1, 2]] == clerk.calls


async def test_what_is_enqueued_does_not_wait_for_ever(virtual_loop):
    """A copy whose confirm doesn't come holds nothing up beyond the patience of the queue."""
    clerk = RecordingSession()
    queue = SettlementQueue(clerk, patience=0.5)
    first = queue.reserve()

    await queue.enqueue(of(2))

    assert ([[2]], 0.5) == (clerk.calls, virtual_loop.time())
    await queue.settle(of(1), first)
    assert [[2], [1]] == clerk.calls


async def test_an_error_is_everybodys():
    """Whoever waits for a settlement that failed hears of it, also those that came along."""
    clerk = RecordingSession()
    clerk.error = SessionLost("gone")
    queue = SettlementQueue(clerk)
    first = queue.reserve()
    behind = asyncio.ensure_future(queue.settle(of(2)))
    await asyncio.sleep(0.001)

    with pytest.raises(SessionLost):
        await queue.settle(of(1), first)
    with pytest.raises(SessionLost):
        await behind


async def test_a_cancelled_waiter_takes_nothing_back():
    """What it wanted to be settled is settled all the same, with the others'."""
    clerk = RecordingSession()
    queue = SettlementQueue(clerk)
    first = queue.reserve()
    behind = asyncio.ensure_future(queue.settle(of(2)))
    await asyncio.sleep(0.001)
    behind.cancel()
    await settled_soon(behind)

    await queue.settle([*of(1), Settlement(REJECT, (5,))], first)

    assert [[1, 2, 5]] == clerk.calls


@given(
    st.lists(st.tuples(st.floats(0, 1), st.sampled_from(["settles", "leaves", "has others"]))),
    st.floats(0.01, 2),
)
def test_any_order(batches: list[tuple[float, str]], patience: float) -> None:
    """Each batch is decided at a time of its own, or leaves, and may have others that are decided.

    What is decided is settled once: when everything before it is decided or has left, or when its
    patience is at its end, and no later.
    """
    clerk = RecordingSession()
    seen: dict[int, float] = {}

    async def one(queue: SettlementQueue, number: int, at: float, way: str) -> None:
        loop = asyncio.get_running_loop()
        ticket = queue.reserve()
        if way == "has others":
            others = queue.enqueue(of(-number - 1))
            others.add_done_callback(lambda _: seen.setdefault(-number - 1, loop.time()))
        await asyncio.sleep(at)
        if way == "leaves":
            queue.release(ticket)
            return
        await queue.settle(of(number), ticket)
        seen[number] = loop.time()

    async def story() -> None:
        queue = SettlementQueue(clerk, patience)
        async with asyncio.TaskGroup() as group:
            for number, (at, way) in enumerate(batches):
                group.create_task(one(queue, number, at, way))
        await asyncio.sleep(patience + 0.001)

    run(story())

    assert sorted(seen) == sorted(tag for call in clerk.calls for tag in call)
    for number, (at, way) in enumerate(batches):
        in_front = max(each for each, _ in batches[: number + 1])
        if way == "has others":
            assert seen[-number - 1] <= min(in_front, patience) + 1e-6
        if way != "leaves":
            assert at - 1e-6 <= seen[number] <= min(in_front, at + patience) + 1e-6
