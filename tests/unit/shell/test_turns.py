"""Messages that are there already share a task and a write, and nothing else."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aio_pika_batch import BatchConsumer
from aio_pika_batch.runtime.consume_loop import TURN
from aio_pika_batch.testing import virtual_time
from tests.unit.shell.helpers import (
    ACK,
    DEFAULTS,
    NACK,
    REQUEUE,
    RecordingConsumer,
    SingleConsumer,
    ack,
    first_then,
    numbered,
    settings,
    taking,
)
from tests.unit.shell.scripted_transport import ScriptedTransport

MARK: ContextVar[bytes | None] = ContextVar("mark", default=None)
FAILS = frozenset({"raise", "cancel and wait", "hang"})


async def _live(kind: str) -> None:
    """Do to the task what a handler may do to it."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    match kind:
        case "wait":
            await asyncio.sleep(0.01)
        case "raise":
            raise ValueError
        case "cancel":
            task.cancel()
        case "cancel and wait":
            task.cancel()
            await asyncio.sleep(0.01)
        case "hang":
            await asyncio.sleep(1000)
        case "leave a timer":
            loop.call_later(0.001, task.cancel)
        case "wait and leave a timer":
            await asyncio.sleep(0)
            loop.call_later(0.001, task.cancel)
        case "time limit":
            async with asyncio.timeout(0.02):
                await asyncio.sleep(0.01)


KINDS = (
    "ack",
    "wait",
    "raise",
    "cancel",
    "cancel and wait",
    "hang",
    "leave a timer",
    "wait and leave a timer",
    "time limit",
)


class Play:
    """A consumer with a message for each kind."""

    def __init__(self, kinds, concurrency, *, singly):
        self.kinds = kinds
        self.script = ScriptedTransport()
        self.left = {}
        given = {
            "concurrency": concurrency,
            "process_timeout": 1,
            "prefetch_count": 100,
            "unhandled_exception_action": NACK,
            "dead_letter_queue": None,
        }
        if singly:
            self.consumer = SingleConsumer(self.handle, transport=self.script, **given)
        else:
            self.consumer = RecordingConsumer(
                self.handle_batch, transport=self.script, batch_size=1, **given
            )

    async def handle(self, message):
        assert MARK.get() is None
        MARK.set(message.body)
        try:
            await _live(self.kinds[int(message.body)])
            assert MARK.get() == message.body
        finally:
            self.left[message.delivery_tag] = asyncio.get_running_loop().time()
        return ACK

    async def handle_batch(self, messages):
        for message in messages:
            yield await self.handle(message)

    async def run(self):
        async with self.consumer:
            self.script.last.feed(*numbered(len(self.kinds)))
            await asyncio.sleep(100)
        settled = {}
        for at, what, details in self.script.calls:
            if what == "settle":
                for kind, tags in details:
                    for tag in tags:
                        assert tag not in settled
                        settled[tag] = (kind, at)
        return settled


@given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=12),
    concurrency=st.integers(1, 3),
    singly=st.booleans(),
)
def test_each_message_is_handled_as_if_it_were_alone(kinds, concurrency, singly):
    """Its context, cancellation, time limit and failure are its own, and it is settled at once."""
    play = Play(kinds, concurrency, singly=singly)
    settled = virtual_time.run(play.run())
    expected = {
        tag: "reject" if kind in FAILS else "ack" for tag, kind in enumerate(kinds, start=1)
    }
    assert expected == {tag: kind for tag, (kind, _) in settled.items()}
    assert play.left == {tag: at for tag, (_, at) in settled.items()}


@pytest.mark.parametrize("kind", ["leave a timer", "cancel", "wait and leave a timer"])
async def test_a_task_that_a_message_keeps_is_not_the_next_ones(kind):
    """A timer that cancels a task after its message has ended cancels nothing else."""
    play = Play([kind, "wait"], 1, singly=True)
    settled = await play.run()
    assert {1: "ack", 2: "ack"} == {tag: how for tag, (how, _) in settled.items()}


@pytest.mark.parametrize("singly", [True, False])
async def test_messages_that_are_there_share_a_task_and_a_write(singly):
    """If their handlers await nothing."""
    script, tasks = ScriptedTransport(), set()

    async def note(_):
        # Not the task itself: a handler that keeps it is the last one in it.
        tasks.add(asyncio.current_task().get_name())
        return ACK

    async def note_all(messages):
        for each in messages:
            yield await note(each)

    consumer = (
        SingleConsumer(note, transport=script, prefetch_count=100)
        if singly
        else RecordingConsumer(note_all, transport=script, batch_size=5, prefetch_count=100)
    )
    async with consumer:
        script.last.feed(*numbered(50))
        await asyncio.sleep(0.1)
    assert 1 == len(tasks)
    assert [[("ack", tuple(range(1, 51)))]] == script.details("settle")


async def test_results_of_one_turn_are_settled_together():
    """Handlers that run at the same time, and end at the same time."""
    script = ScriptedTransport()
    consumer = RecordingConsumer(
        taking(0.5), transport=script, batch_size=1, concurrency=10, prefetch_count=100
    )
    async with consumer:
        script.last.feed(*numbered(30))
        await asyncio.sleep(10)
    assert [0.5, 1.0, 1.5] == script.times("settle")
    assert [10, 10, 10] == [len(tags) for [(_, tags)] in script.details("settle")]


async def test_a_result_does_not_wait_for_a_later_message():
    """What the first messages of a turn got is settled while the next one awaits something."""
    script = ScriptedTransport()
    answer = first_then(ack, ack, taking(5))
    async with RecordingConsumer(answer, transport=script, batch_size=1, prefetch_count=100):
        script.last.feed(*numbered(3))
        await asyncio.sleep(10)
    assert [0, 5] == script.times("settle")
    assert [[("ack", (1, 2))], [("ack", (3,))]] == script.details("settle")


async def test_a_message_on_an_idle_queue_is_settled_in_its_own_task():
    """No further turn of the event loop passes between its result and its settlement."""
    script, turns = ScriptedTransport(), []
    loop = asyncio.get_running_loop()

    async def note(_):
        loop.call_soon(turns.append, "a turn")
        return ACK

    async def settled(_):
        turns.append("settled")

    script.on_settle = settled
    async with SingleConsumer(note, transport=script, concurrency=5):
        script.last.feed(b"0")
        await asyncio.sleep(1)
    assert ["settled", "a turn"] == turns


def blocking(seconds, seen=None, who=None):
    """Return a handler that lets time pass without awaiting anything."""

    async def block(_):
        asyncio.get_running_loop()._now += seconds
        if seen is not None:
            seen.append(who())
        return ACK

    return block


async def test_handlers_that_await_nothing_let_the_loop_run():
    """After 5 ms, what is done is settled, and other tasks run."""
    script, rounds = ScriptedTransport(), []

    async def watch():
        while len(script.details("settle")) < 10:
            rounds.append(asyncio.get_running_loop().time())
            await asyncio.sleep(0)

    block = blocking(0.002, [])
    async with SingleConsumer(block, transport=script, prefetch_count=100):
        script.last.feed(*numbered(30))
        await watch()
    counts = [len(tags) for [(_, tags)] in script.details("settle")]
    assert 30 == sum(counts)
    assert max(counts) <= 3
    passed = [later - earlier for earlier, later in pairwise(rounds)]
    assert max(passed) <= TURN + 0.002


async def test_a_worker_with_a_backlog_leaves_time_to_the_others():
    """Workers whose handlers await nothing take turns of 5 ms."""
    script, seen = ScriptedTransport(), []
    consumer = SingleConsumer(
        blocking(0.001, seen, lambda: script.settling), transport=script, num_workers=2
    )

    async def handle(message):
        asyncio.get_running_loop()._now += 0.001
        seen.append(message.body)
        return ACK

    consumer.answer = handle
    async with consumer:
        for name, session in zip(b"ab", script.sessions, strict=True):
            session.feed(*[bytes([name])] * 100)
        await asyncio.sleep(1)
    assert 200 == len(seen)
    for end in range(1, 200):
        ahead = seen[:end].count(b"a") - seen[:end].count(b"b")
        assert abs(ahead) <= 6


async def test_a_stop_ends_a_turn(rabbit):
    """Messages that are buffered when a handler stops the consumer go back to the broker."""
    rabbit.put(*numbered(50))
    handled = []

    async def handle(message):
        handled.append(message.body)
        if len(handled) == 3:
            consumer.request_stop()
        return ACK

    consumer = SingleConsumer(handle, transport=rabbit.transport, prefetch_count=100)
    await consumer.run(signals=False)
    assert len(handled) <= 8
    assert numbered(50) == sorted([*handled, *rabbit.waiting()], key=int)


async def test_a_consumer_of_single_messages_has_no_batches():
    """Even with the settings of a `BatchConsumer`: a failure is that message's alone."""
    script = ScriptedTransport()

    class Single(SingleConsumer):
        def __init__(self):
            super().__init__(self.handle, transport=script)
            self.settings = settings(**DEFAULTS, batch_size=10, unhandled_exception_action=NACK)

        async def handle(self, message):
            if message.body == b"1":
                raise ValueError
            return ACK

    async with Single():
        script.last.feed(*numbered(3))
        await asyncio.sleep(10)
    settled = {
        tag: kind for each in script.details("settle") for kind, tags in each for tag in tags
    }
    assert {1: "ack", 2: "reject", 3: "ack"} == settled


async def test_a_lost_session_counts_what_was_decided_in_its_last_turn_as_stale(caplog):
    """The broker delivers these messages again."""
    script = ScriptedTransport()

    async def fail(_):
        raise ConnectionError("gone")

    script.on_settle = fail
    async with RecordingConsumer(
        taking(0.5), transport=script, batch_size=1, concurrency=3, prefetch_count=100
    ):
        script.last.feed(*numbered(3))
        await asyncio.sleep(100)
        assert 2 <= len(script.sessions)
    assert 1 == len(script.details("settle"))


async def test_copies_of_one_turn_are_published_together():
    """Also those of different batches."""
    script = ScriptedTransport()

    class Failing(BatchConsumer):
        async def process_messages(self, messages):
            for _ in messages:
                yield REQUEUE

    given = {"batch_size": 2, "prefetch_count": 100, "max_requeue_attempts": 3}
    async with Failing(settings(**given), transport=script):
        script.last.feed(*numbered(6))
        await asyncio.sleep(1)
    assert [numbered(6)] == script.details("publish")
    assert [[("ack", (1, 2, 3, 4, 5, 6))]] == script.details("settle")
