"""`isolate_failures`: a batch that fails because of one message."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from contextlib import suppress

import pytest

from aio_pika_batch import Cause, Trigger
from aio_pika_batch.adapters.memory import EventKind
from aio_pika_batch.observer import BatchCut, BatchHandled, HandlerError, Lost, Settled
from tests.unit.shell.helpers import (
    ACK,
    NACK,
    REQUEUE,
    EventRecorder,
    RecordingConsumer,
    ack,
    numbered,
)


class Rejected(ValueError):
    """The error of a database that rejects all rows because one is invalid."""


def bulk(*bad, seconds=0.0, before=0):
    """Write all rows of a batch at once, which fails if some are invalid.

    Args:
        before: How many rows are written one by one first.
    """

    async def answer(messages):
        for message in messages[:before]:
            if message.body not in bad:
                yield ACK
        rest = messages[before:]
        await asyncio.sleep(seconds)
        if {message.body for message in messages} & set(bad):
            raise Rejected("a bad row")
        for _ in rest:
            yield ACK

    return answer


def consumer_of(rabbit, answer, recorder=None, **given):
    """Return a consumer that isolates failures, with dead letters in `dead`."""
    rabbit.declare("dead")
    rabbit.bind("dead", "dlx", "", kind="fanout")
    given = {
        "batch_size": 8,
        "batch_timeout": 1,
        "isolate_failures": True,
        "dead_letter_exchange": "dlx",
        "unhandled_exception_action": NACK,
    } | given
    return RecordingConsumer(
        answer, transport=rabbit.transport, observers=[recorder] if recorder else [], **given
    )


async def test_only_the_failing_messages_get_the_failures_result(rabbit):
    """All other messages are written, in few runs, and each batch is settled once at the end."""
    recorder = EventRecorder()
    rabbit.put(*numbered(8))
    async with consumer_of(rabbit, bulk(b"3", b"4"), recorder) as consumer:
        await asyncio.sleep(1)
    assert [b"3", b"4"] == rabbit.waiting("dead")
    assert [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [0, 1, 2, 3],
        [0, 1],
        [2, 3],
        [2],
        [3],
        [4, 5, 6, 7],
        [4, 5],
        [4],
        [5],
        [6, 7],
    ] == [[int(body) for body in batch] for batch in consumer.batches]
    [event] = recorder.of(Settled)
    assert {(ACK, Cause.HANDLER): 6, (NACK, Cause.EXCEPTION): 2} == event.counts
    [dead, _] = rabbit.broker.ready("dead")
    assert b"handler-error" == dead.headers["x-dead-letter-reason"].encode()
    assert "a bad row" == dead.headers["x-exception-message"]


async def test_three_failing_messages_of_a_thousand_need_few_runs(rabbit):
    """At most three times twice the logarithm."""
    rabbit.put(*numbered(1000))
    bad = (b"17", b"500", b"998")
    async with consumer_of(rabbit, bulk(*bad), batch_size=1000) as consumer:
        await asyncio.sleep(1)
    assert list(bad) == rabbit.waiting("dead")
    assert 997 == len(set(numbered(1000)) - set(rabbit.waiting("dead")))
    assert [] == rabbit.waiting()
    assert len(consumer.batches) <= 1 + 2 * 3 * 10


async def test_without_isolation_all_undecided_messages_fail(rabbit):
    """The default."""
    rabbit.put(*numbered(8))
    async with consumer_of(rabbit, bulk(b"3"), isolate_failures=False) as consumer:
        await asyncio.sleep(1)
    assert numbered(8) == rabbit.waiting("dead")
    assert 1 == len(consumer.batches)


async def test_results_yielded_before_the_exception_are_kept(rabbit):
    """These messages are not run again."""
    rabbit.put(*numbered(5))
    async with consumer_of(rabbit, bulk(b"3", before=2)) as consumer:
        await asyncio.sleep(2)
    assert [b"3"] == rabbit.waiting("dead")
    assert [numbered(5), [b"2", b"3"], [b"3"], [b"4"]] == consumer.batches


async def test_after_isolate_limit_failures_all_undecided_messages_fail(rabbit):
    """During an outage it makes no sense to isolate each message."""
    rabbit.put(*numbered(8))
    async with consumer_of(rabbit, bulk(*numbered(8)), isolate_limit=2) as consumer:
        await asyncio.sleep(2)
    assert sorted(numbered(8)) == sorted(rabbit.waiting("dead"))
    assert [8, 4, 2, 1, 1] == [len(batch) for batch in consumer.batches]


async def test_a_transient_failure_fails_no_message(rabbit, caplog):
    """The halves succeed; the log still says that the batch failed."""
    failures = [Rejected("once")]

    async def answer(messages):
        if failures:
            raise failures.pop()
        for _ in messages:
            yield ACK

    rabbit.put(*numbered(8))
    async with consumer_of(rabbit, answer) as consumer:
        await asyncio.sleep(2)
    assert [] == rabbit.waiting("dead")
    assert [numbered(8), numbered(4), numbered(4, 4)] == consumer.batches
    [record] = [each for each in caplog.records if each.levelno >= logging.ERROR]
    assert "Rejected: once" in record.getMessage()


async def test_process_timeout_limits_all_runs_together(rabbit):
    """Messages undecided by then get the result of the timeout; finished results are kept."""
    recorder = EventRecorder()
    rabbit.put(*numbered(8))
    answer = bulk(b"0", seconds=3)
    async with consumer_of(rabbit, answer, recorder, process_timeout=14) as consumer:
        consumer.exception_results = {}
        await asyncio.sleep(14.5)
        assert [] == rabbit.unsettled()
    assert [(8, 0), (4, 3), (2, 6), (1, 9), (1, 12)] == [
        (len(batch), time) for batch, time in zip(consumer.batches, consumer.times, strict=True)
    ]
    [event] = recorder.of(Settled)
    assert {(NACK, Cause.EXCEPTION): 1, (NACK, Cause.TIMEOUT): 7} == event.counts
    reasons = [message.headers["x-exception-type"] for message in rabbit.broker.ready("dead")]
    assert 7 == sum("HandlerTimeout" in reason for reason in reasons)


async def test_results_of_runs_that_ended_in_time_are_kept(rabbit):
    """Only messages of unfinished runs are undecided."""
    recorder = EventRecorder()
    rabbit.put(*numbered(4))
    answer = bulk(b"3", seconds=3)
    async with consumer_of(
        rabbit, answer, recorder, process_timeout=7, unhandled_exception_action=REQUEUE
    ) as consumer:
        await asyncio.sleep(7.5)
        consumer.answer = ack
    assert {(ACK, Cause.HANDLER): 2, (REQUEUE, Cause.TIMEOUT): 2} == recorder.of(Settled)[0].counts
    assert [b"0", b"1"] == [
        each.body for each in rabbit.broker.journal.of(EventKind.ACKED, queue="jobs")
    ][:2]


@pytest.mark.parametrize("well", [0, 2])
async def test_a_handler_that_swallows_its_cancellation_is_not_run_again(rabbit, well):
    """Even if it ends well, the time of the batch is over."""
    recorder = EventRecorder()

    async def answer(messages):
        if len(messages) == 4:
            raise Rejected
        for _ in messages[:well]:
            yield ACK
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(3600)

    rabbit.put(*numbered(4))
    async with consumer_of(rabbit, answer, recorder, process_timeout=2) as consumer:
        await asyncio.sleep(5)
    assert [numbered(4), numbered(2)] == consumer.batches
    expected = Counter({(ACK, Cause.HANDLER): well, (NACK, Cause.TIMEOUT): 4 - well})
    assert expected == recorder.of(Settled)[0].counts


async def test_a_handler_that_ignores_its_cancellation_ends_the_session(rabbit, jitter):
    """During isolation as at any other time."""
    done = asyncio.Event()
    recorder = EventRecorder()

    async def answer(messages):
        if len(messages) == 4:
            raise Rejected
        while not done.is_set():
            try:
                await done.wait()
            except asyncio.CancelledError:
                continue
        for _ in messages:
            yield ACK

    rabbit.put(*numbered(4))
    async with consumer_of(rabbit, answer, recorder, process_timeout=2, batch_size=4) as consumer:
        await asyncio.sleep(6.9)
        assert [] == recorder.of(Lost)
        await asyncio.sleep(0.2)
        assert "cancelled" in str(recorder.of(Lost)[0].error)
        consumer.answer = ack
        done.set()
        await asyncio.sleep(10)
    assert [numbered(4), numbered(2), numbered(4)] == consumer.batches
    assert [] == rabbit.waiting()


async def test_observers_see_every_run(rabbit, caplog):
    """The first has the trigger of its batch, the others have `isolate`; failures are reported."""
    caplog.set_level(logging.DEBUG)
    recorder = EventRecorder()
    rabbit.put(*numbered(4))
    async with consumer_of(rabbit, bulk(b"1", seconds=2), recorder):
        await asyncio.sleep(20)
    told = [(len(each.messages), each.trigger, each.waited) for each in recorder.of(BatchCut)]
    assert [
        (4, Trigger.TIMEOUT, 1),
        (2, Trigger.ISOLATE, 3),
        (1, Trigger.ISOLATE, 5),
        (1, Trigger.ISOLATE, 7),
        (2, Trigger.ISOLATE, 9),
    ] == told
    assert [4, 2, 1] == [len(event.messages) for event in recorder.of(HandlerError)]
    handled = [
        (len(each.messages), each.seconds, each.error is not None)
        for each in recorder.of(BatchHandled)
    ]
    assert [(4, 2, True), (2, 2, True), (1, 2, False), (1, 2, True), (2, 2, False)] == handled
    said = [each for each in caplog.records if each.levelno >= logging.ERROR]
    assert ["messages=4", "messages=1"] == [
        each.getMessage().partition("messages=")[1] + str(each.messages) for each in said
    ]
    assert "a part of a failed batch failed" in caplog.text


async def test_an_undecodable_message_is_isolated_without_halving(rabbit):
    """The others are run again together, and the one of them that fails is found."""

    async def answer(messages):
        for message in messages:
            message.json()
        if b"3" in [message.body for message in messages]:
            raise Rejected
        for _ in messages:
            yield ACK

    rabbit.put(b"0", b"{", b"2", b"3", b"4")
    recorder = EventRecorder()
    async with consumer_of(rabbit, answer, recorder, batch_size=5) as consumer:
        await asyncio.sleep(1)
    assert [
        [b"0", b"{", b"2", b"3", b"4"],
        [b"0", b"2", b"3", b"4"],
        [b"0", b"2"],
        [b"3", b"4"],
        [b"3"],
        [b"4"],
    ] == consumer.batches
    assert {
        (ACK, Cause.HANDLER): 3,
        (NACK, Cause.UNDECODABLE): 1,
        (NACK, Cause.EXCEPTION): 1,
    } == recorder.of(Settled)[0].counts


async def test_each_failing_message_gets_the_result_of_its_own_exception(rabbit):
    """`exception_results` applies to what it raised in a run of its own."""

    class Listed(RecordingConsumer):
        exception_results = {Rejected: NACK, ConnectionError: REQUEUE}  # noqa: RUF012

    async def answer(messages):
        bodies = {message.body for message in messages}
        if b"1" in bodies and not messages[0].retry_count:
            raise Rejected
        if b"2" in bodies and not messages[0].retry_count:
            raise ConnectionError
        for _ in messages:
            yield ACK

    recorder = EventRecorder()
    rabbit.put(*numbered(4))
    async with Listed(
        answer,
        transport=rabbit.transport,
        observers=[recorder],
        batch_size=4,
        batch_timeout=1,
        isolate_failures=True,
    ):
        await asyncio.sleep(5)
    assert {
        (ACK, Cause.HANDLER): 2,
        (NACK, Cause.EXCEPTION): 1,
        (REQUEUE, Cause.EXCEPTION): 1,
    } == recorder.of(Settled)[0].counts


async def test_a_session_lost_during_isolation_repeats_the_whole_batch(rabbit, jitter):
    """The runs go on, their results are stale, and all messages are delivered again."""
    recorder = EventRecorder()
    rabbit.put(*numbered(4))
    async with consumer_of(rabbit, bulk(b"0", seconds=2), recorder, batch_size=4) as consumer:
        await asyncio.sleep(3)
        rabbit.broker.cut()
        await asyncio.sleep(60)
    assert [4, 2, 1, 1, 2] * 2 == [len(batch) for batch in consumer.batches]
    assert [b"0"] == rabbit.waiting("dead")
    assert 3 + 1 == len(rabbit.times(EventKind.ACKED))


async def test_a_drain_cuts_off_an_isolation(rabbit):
    """Decided messages keep their results, the others go back."""
    rabbit.put(*numbered(4))
    consumer = consumer_of(rabbit, bulk(b"3", seconds=2), batch_size=4, shutdown_timeout=10)
    await consumer.start()
    await asyncio.sleep(3.9)
    consumer.answer = bulk(b"3", seconds=3600)
    await asyncio.sleep(0.2)
    await consumer.stop()
    assert [b"2", b"3"] == rabbit.waiting()
    assert [] == rabbit.waiting("dead")
