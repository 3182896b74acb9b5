"""The settlement queue: each batch is settled in turn, once, and in time."""

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
    """Records the settled tags, in one list for each call."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []
        self.error: Exception | None = None

    async def settle(self, settlements: Sequence[Settlement]) -> None:
        self.calls.append([tag for each in settlements for tag in each.tags])
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error


def of(*tags: int) -> list[Settlement]:
    """Return an ack of these tags."""
    return [Settlement(Disposition.ACK, tags)]


async def settled_soon(*work: asyncio.Future[None]) -> list[bool]:
    """Return which of these tasks are done after all of them could run."""
    await asyncio.sleep(0.001)
    return [each.done() for each in work]


async def test_a_batch_does_not_wait_for_batches_behind_it():
    """There are more as long as messages come, so it would wait forever."""
    session = RecordingSession()
    queue = SettlementQueue(session)
    first, _ = queue.reserve(), queue.reserve()

    await queue.settle(of(1), first)

    assert [[1]] == session.calls


async def test_a_batch_waits_for_batches_in_front_and_is_settled_with_them():
    """An undecided original of theirs would prevent one `multiple` ack."""
    session = RecordingSession()
    queue = SettlementQueue(session)
    first, second = queue.reserve(), queue.reserve()
    behind = [
        asyncio.ensure_future(queue.settle(of(2), second)),
        asyncio.ensure_future(queue.settle(of(3))),
    ]
    assert [False, False] == await settled_soon(*behind)
    assert [] == session.calls

    await queue.settle(of(1), first)

    assert [[1, 2, 3]] == session.calls
    assert [True, True] == await settled_soon(*behind)


async def test_a_released_ticket_holds_up_no_batch():
    """It has nothing to settle."""
    session = RecordingSession()
    queue = SettlementQueue(session)
    first, second = queue.reserve(), queue.reserve()
    behind = asyncio.ensure_future(queue.settle(of(2), second))
    await asyncio.sleep(0.001)

    queue.release(first)

    assert [True] == await settled_soon(behind)
    assert [[2]] == session.calls


async def test_after_its_patience_a_batch_is_settled_without_those_in_front(virtual_loop):
    """All decided batches are settled together; undecided ones keep their places."""
    session = RecordingSession()
    queue = SettlementQueue(session, patience=0.5)
    first, second = queue.reserve(), queue.reserve()
    waiting = [asyncio.ensure_future(queue.settle(of(3)))]
    await asyncio.sleep(0.4)
    waiting.append(asyncio.ensure_future(queue.settle(of(4))))

    await asyncio.gather(*waiting)

    assert ([[3, 4]], 0.5) == (session.calls, virtual_loop.time())
    last = asyncio.ensure_future(queue.settle(of(2), second))
    await asyncio.sleep(0.4)
    await queue.settle(of(1), first)
    await last
    assert [[3, 4], [1, 2]] == session.calls


async def test_an_immediate_settlement_includes_waiting_ones():
    """In one write, perhaps in one frame."""
    session = RecordingSession()
    queue = SettlementQueue(session)
    first = queue.reserve()

    others = queue.enqueue(of(2))

    assert [False] == await settled_soon(others)
    await queue.settle(of(1), first)
    assert [True] == await settled_soon(others)
    assert [[1, 2]] == session.calls


async def test_what_is_enqueued_does_not_wait_for_ever(virtual_loop):
    """A copy whose confirm doesn't come holds nothing up beyond the patience of the queue."""
    session = RecordingSession()
    queue = SettlementQueue(session, patience=0.5)
    first = queue.reserve()

    await queue.enqueue(of(2))

    assert ([[2]], 0.5) == (session.calls, virtual_loop.time())
    await queue.settle(of(1), first)
    assert [[2], [1]] == session.calls


async def test_an_error_reaches_every_batch_of_the_settlement():
    """Also those that only joined it."""
    session = RecordingSession()
    session.error = SessionLost("gone")
    queue = SettlementQueue(session)
    first = queue.reserve()
    behind = asyncio.ensure_future(queue.settle(of(2)))
    await asyncio.sleep(0.001)

    with pytest.raises(SessionLost):
        await queue.settle(of(1), first)
    with pytest.raises(SessionLost):
        await behind


async def test_a_cancelled_waiter_is_settled_all_the_same():
    """Together with the others."""
    session = RecordingSession()
    queue = SettlementQueue(session)
    first = queue.reserve()
    behind = asyncio.ensure_future(queue.settle(of(2)))
    await asyncio.sleep(0.001)
    behind.cancel()
    await settled_soon(behind)

    await queue.settle([*of(1), Settlement(REJECT, (5,))], first)

    assert [[1, 2, 5]] == session.calls


@given(
    st.lists(st.tuples(st.floats(0, 1), st.sampled_from(["settles", "leaves", "has others"]))),
    st.floats(0.01, 2),
)
def test_batches_decided_in_any_order_are_settled_once_and_in_time(
    batches: list[tuple[float, str]], patience: float
) -> None:
    """Each batch is decided at its own time, or releases its ticket, or settles something at once
    before.

    A decided batch is settled once: when all batches in front are decided or released, or when its
    patience ends, and no later.
    """
    session = RecordingSession()
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
        queue = SettlementQueue(session, patience)
        async with asyncio.TaskGroup() as group:
            for number, (at, way) in enumerate(batches):
                group.create_task(one(queue, number, at, way))
        await asyncio.sleep(patience + 0.001)

    run(story())

    assert sorted(seen) == sorted(tag for call in session.calls for tag in call)
    for number, (at, way) in enumerate(batches):
        in_front = max(each for each, _ in batches[: number + 1])
        if way == "has others":
            assert seen[-number - 1] <= min(in_front, patience) + 1e-6
        if way != "leaves":
            assert at - 1e-6 <= seen[number] <= min(in_front, at + patience) + 1e-6
