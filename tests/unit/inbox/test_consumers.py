"""Consumers whose handlers claim messages."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections import Counter

import pytest

from aio_pika_batch import Cause, ConfigurationError, MissingMessageId
from aio_pika_batch.observer import DuplicatesDropped, HandlerError, Origin, Settled
from aio_pika_batch.testing import make_message, process
from tests.support.databases import write
from tests.unit.inbox.sqlite import Connection
from tests.unit.shell.helpers import (
    ACK,
    NACK,
    QUEUE,
    REQUEUE,
    EventRecorder,
    RecordingConsumer,
    SingleConsumer,
    settings,
)


def put(rabbit, *ids):
    """Put messages with these ids into the queue."""
    for each in ids:
        rabbit.publish(b"", routing_key=QUEUE, message_id=each)


async def effects(connection):
    """All of them, sorted."""
    return sorted(row[0] for row in await connection.execute_fetchall("SELECT id FROM effects"))


def writing(inbox, path, *, after=None, inside=None):
    """A handler that writes an effect for each message.

    Args:
        inside: Called with the batch in the block.
        after: Called with it after the block.
    """

    async def handle(messages):
        async with Connection(path) as connection:
            async with inbox.transaction(connection, messages) as batch:
                await write(connection, [each.message_id for each in batch.fresh])
                if inside:
                    await inside(batch)
            if after:
                await after(batch)
        for result in batch.results:
            yield result

    return handle


def consumer(answer, rabbit, recorder=None, **given):
    """A consumer of five messages at a time, with dead letters in `dead`."""
    given = {"batch_size": 5, "batch_timeout": 1, "dead_letter_queue": "dead"} | given
    return RecordingConsumer(
        answer, transport=rabbit.transport, observers=[recorder] if recorder else [], **given
    )


@pytest.mark.parametrize("settle", ["batch", "yield", "atomic"])
async def test_what_is_delivered_twice_takes_effect_once(inbox, path, connection, rabbit, settle):
    """And observers count what was dropped."""
    recorder = EventRecorder()
    async with consumer(writing(inbox, path), rabbit, recorder, settle=settle):
        put(rabbit, "a", "b", "c", "a")
        await rabbit.settled()
        put(rabbit, "c", "d")
        await rabbit.settled()
    assert ["a", "b", "c", "d"] == await effects(connection)
    assert ["a", "c"] == [
        message.message_id for each in recorder.of(DuplicatesDropped) for message in each.messages
    ]
    assert {"orders"} == {each.inbox for each in recorder.of(DuplicatesDropped)}
    [origin] = {origin for origin, event in recorder.seen if type(event) is DuplicatesDropped}
    assert Origin("RecordingConsumer", QUEUE, 0) == origin
    counts = sum((Counter(each.counts) for each in recorder.of(Settled)), Counter())
    assert {(ACK, Cause.HANDLER): 6} == counts


async def test_a_bare_claim_needs_atomic(inbox, path, rabbit):
    """With any other `settle` it is refused, and says so."""

    async def handle(messages):
        async with Connection(path) as connection:
            await inbox.claim(connection, messages)
            await connection.commit()
        for _ in messages:
            yield ACK

    for settle in ("batch", "yield"):
        recorder = EventRecorder()
        async with consumer(handle, rabbit, recorder, settle=settle, max_requeue_attempts=0):
            put(rabbit, "a")
            await rabbit.settled()
        [error] = [each.error for each in recorder.of(HandlerError)]
        assert isinstance(error, ConfigurationError)
        assert "needs settle='atomic'" in str(error)
    recorder = EventRecorder()
    async with consumer(handle, rabbit, recorder, settle="atomic"):
        put(rabbit, "a", "a")
        await rabbit.settled()
    assert [] == recorder.of(HandlerError)
    assert 1 == sum(len(each.messages) for each in recorder.of(DuplicatesDropped))


async def test_a_consumer_of_single_messages_may_claim(inbox, path, rabbit):
    """Its result comes after its handler's end."""
    seen = []

    async def handle(message):
        async with Connection(path) as connection:
            seen.append(len(await inbox.claim(connection, [message])))
            await connection.commit()
        return ACK

    async with SingleConsumer(handle, transport=rabbit.transport):
        put(rabbit, "a", "a")
        await rabbit.settled()
    assert [1, 0] == seen


async def test_only_messages_without_an_id_fail(inbox, path, connection, rabbit):
    """The others are handled again without them, once, however many they are."""
    recorder = EventRecorder()
    writer = consumer(writing(inbox, path), rabbit, recorder, max_requeue_attempts=0)
    async with writer:
        put(rabbit, "a", None, "b", None, "c")
        await rabbit.settled()
    assert ["a", "b", "c"] == await effects(connection)
    letters = rabbit.drain("dead")
    assert 2 == len(letters)
    assert "MissingMessageId" in letters[0].headers["x-exception-type"]
    assert [MissingMessageId] == [type(each.error) for each in recorder.of(HandlerError)]
    assert [5, 3] == [len(each) for each in writer.batches]


async def test_results_in_the_block_are_void_if_the_commit_fails(inbox, path, rabbit, connection):
    """With `settle="batch"`, where an ACK counts otherwise."""
    fails = [True, False]

    async def handle(messages):
        async with Connection(path) as own, inbox.transaction(own, messages) as batch:
            await write(own, [each.message_id for each in batch.fresh])
            for _ in messages:
                yield ACK
            if fails.pop(0):
                raise ZeroDivisionError

    async with consumer(handle, rabbit):
        put(rabbit, "a", "b")
        await rabbit.settled()
    assert ["a", "b"] == await effects(connection)


async def test_results_in_the_block_are_refused_where_they_are_settled_early(
    inbox, path, rabbit, connection
):
    """With `settle="yield"`: nothing has been written, and nothing ACKed."""
    recorder = EventRecorder()

    async def handle(messages):
        async with Connection(path) as own, inbox.transaction(own, messages) as batch:
            await write(own, [each.message_id for each in batch.fresh])
            for _ in messages:
                yield ACK

    async with consumer(handle, rabbit, recorder, settle="yield", max_requeue_attempts=0):
        put(rabbit, "a", "b")
        await rabbit.settled()
    assert [] == await effects(connection)
    assert 2 == len(rabbit.drain("dead"))
    assert "before the transaction" in str(recorder.of(HandlerError)[0].error)


async def test_a_failure_after_the_commit_changes_no_result(inbox, path, connection, rabbit):
    """What was committed is settled as it was decided, and not dead-lettered."""

    async def decide(batch):
        batch.set_result(batch.fresh[1], REQUEUE)
        batch.set_result(batch.fresh[2], NACK)

    async def fail(batch):
        raise ZeroDivisionError

    recorder = EventRecorder()
    handle = writing(inbox, path, inside=decide, after=fail)
    given = {"unhandled_exception_action": NACK, "max_requeue_attempts": 0}
    async with consumer(handle, rabbit, recorder, **given):
        put(rabbit, "a", "b", "c", "d", "e")
        await asyncio.sleep(5)
    counts = sum((Counter(each.counts) for each in recorder.of(Settled)), Counter())
    assert 3 == counts[ACK, Cause.HANDLER]
    reasons = [each.headers["x-dead-letter-reason"] for each in rabbit.drain("dead")]
    assert ["exhausted", "rejected"] == sorted(reasons)


@pytest.mark.parametrize("is_committed", [True, False])
async def test_an_unknown_outcome_sends_messages_round_again(
    inbox, path, connection, rabbit, is_committed, caplog
):
    """They take effect once, whether it was committed or not, and nothing is dead-lettered."""

    async def lose(batch):
        if len(writer.batches) > 1:
            return
        real = batch._database.commit

        async def commit():
            if is_committed:
                await real()
            raise ConnectionResetError

        batch._database.commit = commit

    writer = consumer(writing(inbox, path, inside=lose), rabbit, unhandled_exception_action=NACK)
    async with writer:
        put(rabbit, "a", "b")
        await rabbit.settled()
    assert ["a", "b"] == await effects(connection)
    assert [] == rabbit.drain("dead")
    assert "the outcome of a commit is unknown" in caplog.text


async def test_a_refused_commit_is_a_failure_of_the_batch(inbox, path, connection, rabbit):
    """The database says that nothing was committed, so the messages get the failure's result."""

    async def refuse(batch):
        async def commit():
            raise sqlite3.IntegrityError("FOREIGN KEY constraint failed")

        batch._database.commit = commit

    handle = writing(inbox, path, inside=refuse)
    async with consumer(handle, rabbit, unhandled_exception_action=NACK):
        put(rabbit, "a")
        await rabbit.settled()
    assert [] == await effects(connection)
    assert 1 == len(rabbit.drain("dead"))


async def test_a_time_limit_waits_for_the_commit(inbox, path, connection, rabbit):
    """Whose outcome is what the messages are settled by."""

    async def slow(batch):
        real = batch._database.commit

        async def commit():
            await asyncio.sleep(4)
            await real()

        batch._database.commit = commit

    recorder = EventRecorder()
    handle = writing(inbox, path, inside=slow)
    given = {"process_timeout": 2, "unhandled_exception_action": NACK}
    async with consumer(handle, rabbit, recorder, **given):
        put(rabbit, "a")
        await rabbit.settled()
    assert ["a"] == await effects(connection)
    assert [] == rabbit.drain("dead")
    assert {(ACK, Cause.HANDLER): 1} == recorder.of(Settled)[0].counts


async def test_replayed_dead_letters_that_took_effect_are_dropped(
    inbox, path, connection, rabbit, caplog
):
    """Their handler's log says so; those that did not take effect do."""
    caplog.set_level(logging.INFO)
    async with inbox.transaction(connection, [make_message(b"", message_id="a")]):
        await write(connection, ["a"])
    async with consumer(writing(inbox, path), rabbit):
        put(rabbit, "a", "b")
        await rabbit.settled()
    assert ["a", "b"] == await effects(connection)
    assert "dropped messages that took effect before" in caplog.text
    assert "first_id=a" in caplog.text


async def test_a_handler_with_an_inbox_can_be_tested_by_process(inbox, path, connection):
    """Without a broker."""
    messages = [make_message(b"", message_id=each) for each in ("a", "b", "a")]
    tested = RecordingConsumer(writing(inbox, path), transport=None, batch_size=5)
    outcome = await process(tested, messages)
    assert 3 == len(outcome.acked)
    assert ["a", "b"] == await effects(connection)
    assert settings().settle == "batch"


async def test_tasks_of_a_handler_belong_to_its_run(inbox, path, connection, rabbit):
    """Two transactions at once, for parts of a batch."""
    recorder = EventRecorder()

    async def handle(messages):
        async def part(some):
            async with Connection(path) as own, inbox.transaction(own, some) as batch:
                await write(own, [each.message_id for each in batch.fresh])
            return list(zip(some, batch.results, strict=True))

        for pairs in await asyncio.gather(part(messages[::2]), part(messages[1::2])):
            for pair in pairs:
                yield pair

    async with consumer(handle, rabbit, recorder):
        put(rabbit, "a", "b", "c", "d", "e")
        await rabbit.settled()
        put(rabbit, "e")
        await rabbit.settled()
    assert ["a", "b", "c", "d", "e"] == await effects(connection)
    assert 1 == len(recorder.of(DuplicatesDropped))
