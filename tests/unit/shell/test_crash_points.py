"""docs/guarantees.md says what a crash leaves behind; each cell of its table is played here.

A crash kills the process: all its connections close at once, and it sends nothing more. What is
left is what the broker has in its queues.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from aio_pika_batch import Requeue
from aio_pika_batch.adapters.memory import ConnectFault, EventKind, PublishFault
from aio_pika_batch.adapters.memory.session import MemoryModifyingSession, MemorySession
from tests.unit.shell.helpers import (
    ACK,
    NACK,
    QUEUE,
    REQUEUE,
    REQUEUE_IMMEDIATE,
    QueueBroker,
    RecordingConsumer,
    answering,
    taking,
)

PAGE = Path(__file__).parents[3] / "docs" / "guarantees.md"
DEAD, WAITING = f"{QUEUE}.dead", f"{QUEUE}.retry.9000"
WITH_DEAD_LETTERS = {"dead_letter_queue": DEAD}

RESULTS = {
    "ACK": (ACK, {}),
    "NACK, dead-letter exchange known": (NACK, WITH_DEAD_LETTERS),
    "NACK, none known": (NACK, {}),
    "REQUEUE, attempts left": (REQUEUE, {}),
    "REQUEUE with a delay": (Requeue(delay=9), {"requeue_delay": 9}),
    "REQUEUE, attempts spent": (REQUEUE, WITH_DEAD_LETTERS | {"max_requeue_attempts": 0}),
    "REQUEUE_IMMEDIATE": (REQUEUE_IMMEDIATE, {}),
}


def rows() -> tuple[list[str], dict[str, list[str]]]:
    """Return the rows of the table: for each result, what is left after a crash at each point."""
    text = PAGE.read_text().partition("\n### Result by result\n")[2]
    head, _, *lines = re.findall(r"^\| (.*) \|$", text.partition("\n#")[0], re.MULTILINE)
    cells = {first: rest for first, *rest in (line.split(" | ") for line in lines)}
    return head.split(" | ")[1:], cells


POINTS, CELLS = rows()
OVER_AMQP_1_0 = POINTS.pop()


def test_each_result_has_a_row():
    """A result that is missing there would not be tested here."""
    assert set(RESULTS) == set(CELLS)
    assert "over AMQP 1.0" == OVER_AMQP_1_0
    assert {len(POINTS) + 1} == {len(cells) for cells in CELLS.values()}


async def kill(broker, consumer):
    """Cut all connections of a process, which then does nothing more."""
    broker.faults.connect_fault = ConnectFault.UNREACHABLE
    broker.cut()
    await consumer.stop()


@pytest.mark.parametrize(("point", "at"), [(POINTS[0], 1.0), *((each, 6.0) for each in POINTS)])
@pytest.mark.parametrize("result", RESULTS)
async def test_what_a_crash_leaves_behind(rabbit, monkeypatch, result, point, at):
    """As the table says: the original, a copy, a dead letter, two of them, or nothing."""
    said = CELLS[result][POINTS.index(point)]
    answer, given = RESULTS[result]
    broker = rabbit.broker
    handler = answering(answer)
    match point:
        case "in your handler, or before":
            handler = taking(10, handler)  # which is given its batch after 5 s
        case "copy lost":
            broker.faults.on_publish(PublishFault.LOSE)
        case "copy not confirmed":
            broker.faults.on_publish(PublishFault.UNCONFIRMED)
        case "settlement lost":
            settle = MemorySession.settle

            async def lose(session, settlements):
                broker.faults.connect_fault = ConnectFault.UNREACHABLE
                broker.cut()
                await settle(session, settlements)

            monkeypatch.setattr(MemorySession, "settle", lose)
        case "all done":
            pass
        case _:
            pytest.fail(f"unknown crash point {point!r}")
    rabbit.put(b"it")
    consumer = RecordingConsumer(handler, transport=rabbit.transport, shutdown_timeout=0.1, **given)
    await consumer.start()
    await asyncio.sleep(at)
    if said == "–":
        assert 0 == broker.journal.counts[EventKind.PUBLISHED]
    await kill(broker, consumer)
    if said != "–":
        assert said == (" + ".join(found(broker)) or "nothing")


@pytest.mark.parametrize("is_lost", [True, False])
@pytest.mark.parametrize("result", RESULTS)
async def test_what_a_crash_leaves_behind_over_amqp_1_0(monkeypatch, result, is_lost):
    """The original as long as the outcome hasn't arrived, and then what the table says."""
    rabbit = QueueBroker("4.3", wire="amqp10")
    broker = rabbit.broker
    answer, given = RESULTS[result]
    for name in ("settle", "modify"):
        carry_out = getattr(MemoryModifyingSession, name)

        async def lose(session, changes, *more, carry_out=carry_out):
            broker.faults.connect_fault = ConnectFault.UNREACHABLE
            if is_lost:
                broker.cut()
            await carry_out(session, changes, *more)
            broker.cut()

        monkeypatch.setattr(MemoryModifyingSession, name, lose)
    consumer = RecordingConsumer(
        answering(answer),
        transport=rabbit.transport,
        shutdown_timeout=0.1,
        queue_type="quorum",
        **given,
    )
    await consumer.start()
    rabbit.put(b"it")
    await asyncio.sleep(5.5)
    await kill(broker, consumer)
    assert 0 == broker.journal.counts[EventKind.PUBLISHED]
    left = ["original" for _ in broker.ready(QUEUE)]
    left += ["delayed original" for _ in broker.delayed(QUEUE)]
    left += ["dead letter" for each in broker.queues if each == DEAD for _ in broker.ready(each)]
    expected = "original" if is_lost else CELLS[result][-1]
    assert expected == (" + ".join(left) or "nothing")


def found(broker):
    """Return what the broker has, in the page's words."""
    names = {
        (False, QUEUE): "original",
        (True, QUEUE): "copy",
        (True, WAITING): "waiting copy",
        (True, DEAD): "dead letter",
    }
    messages = [
        (QUEUE in queue and "x-first-failed-at" in message.headers, queue)
        for queue in broker.queues
        for message in broker.ready(queue)
    ]
    return [names[each] for each in sorted(messages)]
