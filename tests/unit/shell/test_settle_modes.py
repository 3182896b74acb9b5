"""When is what a handler yields settled: with its batch, within a moment, or all or none?"""

from __future__ import annotations

import asyncio

import pytest

from aio_pika_batch import Cause, SessionLost
from aio_pika_batch.adapters.memory import EventKind, PublishFault
from aio_pika_batch.observer import BatchCut, Lost, Settled, StaleResults
from tests.unit.shell.helpers import (
    ACK,
    NACK,
    REQUEUE,
    REQUEUE_IMMEDIATE,
    EventRecorder,
    RecordingConsumer,
    ack,
    answering,
    first_then,
    numbered,
    taking,
)
from tests.unit.shell.scripted_transport import ScriptedTransport, never, raising


class Failed(RuntimeError):
    """What handlers raise here."""


def every(seconds, *results, error=None):
    """A handler that yields one of these after each pause, and then raises."""

    async def answer(messages):
        for at, _ in enumerate(messages):
            await asyncio.sleep(seconds)
            if at == len(results) and error is not None:
                raise error
            yield results[at % len(results)]
        if error is not None:
            raise error

    return answer


def consumer_of(rabbit, answer, recorder=None, **given):
    """A consumer that settles what is yielded, with dead letters to `dead`."""
    rabbit.declare("dead")
    rabbit.bind("dead", "dlx", "", kind="fanout")
    given = {
        "batch_size": 4,
        "batch_timeout": 1,
        "settle": "yield",
        "dead_letter_exchange": "dlx",
    } | given
    return RecordingConsumer(
        first_then(answer, taking(1)),
        transport=rabbit.transport,
        observers=[recorder] if recorder else [],
        **given,
    )


def counted(recorder):
    """What has been settled, over all."""
    total = {}
    for event in recorder.of(Settled):
        for key, count in event.counts.items():
            total[key] = total.get(key, 0) + count
    return total


# -- yield ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [0.1, 1.0, 30.0])
async def test_a_yield_is_settled_within_the_interval_while_the_handler_runs(rabbit, interval):
    """No message waits for longer after its yield, whatever comes after it."""
    rabbit.put(*numbered(4))
    async with consumer_of(rabbit, every(50, ACK), settle_interval=interval):
        await asyncio.sleep(300)
    waits = [at - 50 * (number + 1) for number, at in enumerate(rabbit.times(EventKind.ACKED))]
    assert 4 == len(waits)
    assert all(0 <= wait <= interval for wait in waits)
    # The last one was settled with its batch, at once.
    assert 0 == waits[-1]


async def test_the_default_settles_nothing_before_the_handler_has_ended(rabbit):
    """A handler may yield inside a transaction, and commit at its end."""
    rabbit.put(*numbered(4))
    async with consumer_of(rabbit, every(50, ACK), settle="batch"):
        await asyncio.sleep(300)
    assert [200] * 4 == rabbit.times(EventKind.ACKED)


async def test_what_is_yielded_in_one_interval_goes_out_in_one_write():
    """Not message by message."""
    script = ScriptedTransport()
    async with RecordingConsumer(
        every(0.01, ACK), transport=script, batch_size=20, settle="yield", settle_interval=1
    ):
        script.last.feed(*numbered(20))
        await asyncio.sleep(5)
        assert [[("ack", tuple(range(1, 21)))]] == script.details("settle")


async def test_handlers_share_their_writes():
    """Two at work, one write for both, in the order of delivery; then a new interval begins."""
    moments = iter([(0.44, 0.58), (0.4, 100)])

    async def answer(messages):
        for seconds in next(moments):
            await asyncio.sleep(seconds)
            yield ACK
        await asyncio.sleep(100)

    script = ScriptedTransport()
    async with RecordingConsumer(
        answer,
        transport=script,
        batch_size=2,
        concurrency=2,
        settle="yield",
        settle_interval=0.8,
        process_timeout=50,
        shutdown_timeout=2,
    ):
        script.last.feed(*numbered(4))
        await asyncio.sleep(10)
        assert [[("ack", (1, 3))], [("ack", (2,))]] == script.details("settle")
        # Confirmations have 0.1 s of the interval, twice.
        assert [1.0, 1.62] == [round(time, 3) for time in script.times("settle")]


async def test_unconfirmed_copies_do_not_keep_acks_beyond_the_interval():
    """Neither those of the same handler nor those of others at work, in the same moment."""
    script = ScriptedTransport()
    script.on_publish = never
    number = iter(range(3))

    async def answer(messages):
        await asyncio.sleep(5 + 0.01 * next(number))
        yield REQUEUE
        yield ACK
        await asyncio.sleep(100)

    async with RecordingConsumer(
        answer,
        transport=script,
        batch_size=2,
        concurrency=3,
        settle="yield",
        process_timeout=60,
        shutdown_timeout=2,
    ):
        script.last.feed(*numbered(6))
        await asyncio.sleep(20)
        assert all(5 < time <= 5.1 for time in script.times("settle"))
        settled = [tag for each in script.last.settlements for tag in each.tags]
        assert [2, 4, 6] == sorted(settled)


async def test_confirmations_of_others_do_not_keep_acks_beyond_the_interval():
    """Batches that end wait for their copies, one after the other; a yield waits not that long."""
    script = ScriptedTransport()
    script.on_publish = never
    ends = iter([5.04, 5.06, 5.08, 5.1, 5.12])

    async def answer(messages):
        if messages[0].body == b"0":
            await asyncio.sleep(5)
            yield ACK
            await asyncio.sleep(100)
        else:
            await asyncio.sleep(next(ends))
            yield REQUEUE

    async with RecordingConsumer(
        answer,
        transport=script,
        batch_size=1,
        concurrency=6,
        settle="yield",
        process_timeout=60,
        shutdown_timeout=2,
    ):
        script.last.feed(*numbered(6))
        await asyncio.sleep(9)
        assert [[("ack", (1,))]] == script.details("settle")
        assert all(5 < time <= 5.1 for time in script.times("settle"))


async def test_pairs_may_be_settled_in_any_order(rabbit):
    """Each at its time; the rest with the batch."""

    async def answer(messages):
        yield messages[2], ACK
        await asyncio.sleep(10)
        yield messages[0], NACK
        await asyncio.sleep(10)
        yield messages[3], ACK
        yield messages[1], ACK

    rabbit.put(*numbered(4))
    async with consumer_of(rabbit, answer):
        await asyncio.sleep(9)
        assert [b"0", b"1", b"3"] == rabbit.unsettled()
        await asyncio.sleep(9)
        assert [b"1", b"3"] == rabbit.unsettled()
        await asyncio.sleep(9)
        assert [] == rabbit.unsettled()
    assert [b"0"] == rabbit.waiting("dead")
    assert 4 == len(rabbit.times(EventKind.ACKED))


async def test_every_result_is_carried_out_while_the_handler_runs(rabbit):
    """Copies for another attempt and dead letters as well as acks."""
    recorder = EventRecorder()
    rabbit.put(*numbered(4))
    results = (REQUEUE, NACK, REQUEUE_IMMEDIATE, ACK)
    async with consumer_of(rabbit, every(10, *results), recorder):
        await asyncio.sleep(11)
        assert [b"1", b"2", b"3", b"0"] == rabbit.unsettled()
        await asyncio.sleep(10)
        assert [b"1"] == rabbit.waiting("dead")
        await asyncio.sleep(10)
        assert [b"2"] == [each.body for each in rabbit.broker.journal.of(EventKind.REQUEUED)]
        assert [b"0", b"2", b"3"] == sorted(rabbit.unsettled())
        assert [b"0", b"1"] == [each.body for each in rabbit.broker.journal.of(EventKind.ACKED)]
        assert {(each, Cause.HANDLER): 1 for each in results[:3]} == counted(recorder)


async def test_an_exception_costs_only_what_was_not_yielded(rabbit):
    """What was yielded is settled already, and is not settled again."""
    recorder = EventRecorder()
    rabbit.put(*numbered(4))
    async with consumer_of(rabbit, every(10, ACK, ACK, error=Failed()), recorder) as consumer:
        await asyncio.sleep(29)
        assert [b"2", b"3"] == rabbit.unsettled()
        await asyncio.sleep(10)
    assert {(ACK, Cause.HANDLER): 4, (REQUEUE, Cause.EXCEPTION): 2} == counted(recorder)
    assert [numbered(4), numbered(2, 2)] == consumer.batches
    assert [] == recorder.of(Lost)


async def test_an_exception_in_the_same_moment_costs_only_what_was_not_yielded(rabbit):
    """What was yielded just before it counts, with or without an interval's delay."""
    recorder = EventRecorder()
    rabbit.put(*numbered(4))
    async with consumer_of(rabbit, answering(ACK, ACK, error=Failed()), recorder):
        await asyncio.sleep(5)
    assert {(ACK, Cause.HANDLER): 4, (REQUEUE, Cause.EXCEPTION): 2} == counted(recorder)


async def test_time_running_out_keeps_what_was_settled(rabbit):
    """Finished results are kept, the early ones and those of the last moment."""
    recorder = EventRecorder()
    rabbit.put(*numbered(4))
    async with consumer_of(rabbit, every(10, ACK), recorder, process_timeout=20.01):
        await asyncio.sleep(25)
    assert {(ACK, Cause.HANDLER): 4, (REQUEUE, Cause.TIMEOUT): 2} == counted(recorder)
    assert 2 + 2 + 2 == len(rabbit.times(EventKind.ACKED))


async def test_copies_that_are_not_confirmed_hold_nobody_up(rabbit):
    """Acks go out in time; the original stays until its copy is confirmed."""
    rabbit.broker.faults.on_publish(PublishFault("unconfirmed"))
    rabbit.put(*numbered(4))
    async with consumer_of(rabbit, every(1, REQUEUE, ACK), batch_size=4):
        await asyncio.sleep(2.5)
        assert [b"0", b"2", b"3", b"0"] == rabbit.unsettled()
        assert [b"1"] == [each.body for each in rabbit.broker.journal.of(EventKind.ACKED)]
        [acked_at] = rabbit.times(EventKind.ACKED)
        assert 2 < acked_at <= 2.1
        rabbit.broker.faults.clear(PublishFault("unconfirmed"))
        await asyncio.sleep(60)
    assert [] == rabbit.unsettled()
    assert [] == rabbit.waiting()


async def test_what_is_settled_is_not_in_hand(rabbit):
    """It makes room for others, so no batch is cut short on its account."""
    recorder = EventRecorder()
    rabbit.put(*numbered(8))
    async with consumer_of(
        rabbit, every(10, ACK), recorder, concurrency=2, prefetch_count=6, batch_timeout=100
    ) as consumer:
        await asyncio.sleep(1)
        assert (4, 2) == (consumer.status().workers[0].in_hand, len(consumer.batches))
        await asyncio.sleep(20)
        assert 2 == consumer.status().workers[0].in_hand


async def test_early_settlements_are_progress(rabbit):
    """A worker that settles is not stuck."""
    rabbit.put(*numbered(4))
    async with consumer_of(rabbit, every(50, ACK)) as consumer:
        await asyncio.sleep(60)
        assert 10 == round(consumer.status().workers[0].last_progress)


async def test_a_session_that_is_lost_settles_nothing_more(rabbit, jitter):
    """What was settled stays so; what came later is stale, and is delivered again."""
    recorder = EventRecorder()
    rabbit.put(*numbered(4))
    async with consumer_of(rabbit, every(10, ACK), recorder) as consumer:
        await asyncio.sleep(25)
        rabbit.broker.cut()
        await asyncio.sleep(60)
    assert [numbered(4), numbered(2, 2)] == consumer.batches
    assert [2] == [event.count for event in recorder.of(StaleResults)]
    assert 4 == len(rabbit.times(EventKind.ACKED))
    assert {(ACK, Cause.HANDLER): 4} == counted(recorder)


async def test_a_session_lost_within_the_interval_settles_nothing_more(rabbit, jitter):
    """Also what had been yielded already, but was not settled yet."""
    recorder = EventRecorder()
    rabbit.put(*numbered(4))
    async with consumer_of(rabbit, every(10, ACK), recorder, settle_interval=5) as consumer:
        await asyncio.sleep(12)
        rabbit.broker.cut()
        await asyncio.sleep(60)
    assert [numbered(4), numbered(4)] == consumer.batches
    assert [4] == [event.count for event in recorder.of(StaleResults)]


async def test_a_session_lost_after_the_last_yield_costs_nothing(rabbit, jitter):
    """Everything was settled, so no result is stale, although its handler was still at work."""

    async def answer(messages):
        for _ in messages:
            yield ACK
        await asyncio.sleep(20)

    recorder = EventRecorder()
    rabbit.put(*numbered(4))
    async with consumer_of(rabbit, answer, recorder) as consumer:
        await asyncio.sleep(10)
        rabbit.broker.cut()
        await asyncio.sleep(60)
    assert [numbered(4)] == consumer.batches
    assert [] == recorder.of(StaleResults)
    assert 4 == len(rabbit.times(EventKind.ACKED))


async def test_a_settlement_that_fails_ends_the_epoch(jitter):
    """Its results are stale; those that come later too. None is counted twice."""
    script, recorder = ScriptedTransport(), EventRecorder()
    async with RecordingConsumer(
        every(10, ACK), transport=script, observers=[recorder], batch_size=4, settle="yield"
    ):
        script.on_settle = raising(SessionLost("cut"))
        script.last.feed(*numbered(4))
        await asyncio.sleep(100)
    assert [1, 3] == [event.count for event in recorder.of(StaleResults)]
    assert 1 == len(recorder.of(Lost))


async def test_a_settlement_that_breaks_ends_the_epoch(jitter, caplog):
    """A bug of ours must not leave messages unsettled for ever."""
    script, recorder = ScriptedTransport(), EventRecorder()
    async with RecordingConsumer(
        every(10, ACK), transport=script, observers=[recorder], batch_size=4, settle="yield"
    ):
        script.on_settle = raising(KeyError("bug"))
        script.last.feed(*numbered(4))
        await asyncio.sleep(20)
    assert "could not be settled" in str(recorder.of(Lost)[0].error)
    assert "could not be settled" in caplog.text


async def test_a_drain_waits_for_what_is_being_settled(rabbit):
    """And settles what was yielded last with the rest of its batch."""
    rabbit.put(*numbered(4))
    consumer = consumer_of(rabbit, every(1, ACK))
    await consumer.start()
    await asyncio.sleep(2.01)
    await consumer.stop()
    assert [] == rabbit.unsettled()
    assert [] == rabbit.waiting()
    assert 4 == len(rabbit.times(EventKind.ACKED))


async def test_a_drain_counts_as_cut_off_only_what_was_not_settled(rabbit):
    """What was settled is not delivered again."""
    rabbit.put(*numbered(4))
    consumer = consumer_of(rabbit, every(10, ACK), shutdown_timeout=5)
    await consumer.start()
    await asyncio.sleep(15)
    await consumer.stop()
    assert numbered(3, 1) == rabbit.waiting()


async def test_a_settlement_on_its_way_is_waited_for():
    """Also by a drain that has nothing else to wait for."""
    script = ScriptedTransport()
    script.on_settle = lambda *_: asyncio.sleep(2)
    consumer = RecordingConsumer(every(1, ACK), transport=script, batch_size=1, settle="yield")
    await consumer.start()
    script.last.feed(b"0")
    await asyncio.sleep(1.5)
    await consumer.stop()
    assert [(1,)] == [each.tags for each in script.sessions[0].settlements]


@pytest.mark.parametrize(("yields_at", "goes_on"), [(10, 0.5), (16.98, 3600)])
async def test_a_drain_waits_for_the_copies_of_what_was_yielded_last(yields_at, goes_on):
    """Whether its handler then comes to its end or is cut off, 17 seconds after the stop."""
    script = ScriptedTransport()
    script.on_publish = lambda *_: asyncio.sleep(0.8)

    async def answer(messages):
        try:
            await asyncio.sleep(yields_at)
            yield REQUEUE
            await asyncio.sleep(goes_on)
            yield ACK
        finally:
            await asyncio.sleep(0.5)

    consumer = RecordingConsumer(
        answer, transport=script, batch_size=2, settle="yield", shutdown_timeout=20
    )
    await consumer.start()
    script.last.feed(*numbered(2))
    await asyncio.sleep(0)
    await consumer.stop()
    told = {(each.disposition.value, each.tags) for each in script.sessions[0].settlements}
    assert {("ack", (1,)), ("ack" if goes_on < 1 else "return", (2,))} == told
    assert 1 == len(script.details("publish"))


async def test_isolated_messages_are_settled_while_others_are_run_again(rabbit):
    """Whoever is decided is settled soon; a culprit too."""

    async def answer(messages):
        await asyncio.sleep(10)
        if b"1" in {message.body for message in messages}:
            raise Failed
        for _ in messages:
            yield ACK
        await asyncio.sleep(10)

    recorder = EventRecorder()
    rabbit.put(*numbered(4))
    consumer = consumer_of(
        rabbit, answer, recorder, isolate_failures=True, unhandled_exception_action=NACK
    )
    consumer.answer = answer
    async with consumer:
        await asyncio.sleep(32)
        assert numbered(3, 1) == rabbit.unsettled()
        await asyncio.sleep(19)
        assert [b"1"] == rabbit.waiting("dead")
        assert [b"2", b"3"] == rabbit.unsettled()
        await asyncio.sleep(10)
        assert [] == rabbit.unsettled()
        assert 1 == consumer.status().workers[0].epoch
    assert {(ACK, Cause.HANDLER): 3, (NACK, Cause.EXCEPTION): 1} == counted(recorder)


async def test_a_handler_that_gives_no_chance_is_settled_at_its_end(rabbit):
    """One that never waits lets nobody else work meanwhile."""
    rabbit.put(*numbered(4))
    recorder = EventRecorder()
    async with consumer_of(rabbit, ack, recorder):
        await asyncio.sleep(3)
    assert [{(ACK, Cause.HANDLER): 4}] == [event.counts for event in recorder.of(Settled)]
    assert 1 == len(recorder.of(BatchCut))


# -- atomic ---------------------------------------------------------------------------------------


async def settled_by(rabbit, answer, count=3, **given):
    """Hand one atomic batch to a handler, with another that acks everything after it."""
    recorder = EventRecorder()
    rabbit.put(*numbered(count))
    given = {"settle": "atomic", "batch_size": count} | given
    consumer = consumer_of(rabbit, answer, recorder, **given)
    async with consumer:
        await asyncio.sleep(60)
    return recorder.of(Settled)[0].counts, consumer


async def late_failure(messages):
    """Yield everything, and fail to commit."""
    for _ in messages:
        yield ACK
    raise Failed


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (answering(ACK, error=Failed()), Cause.EXCEPTION),
        (late_failure, Cause.EXCEPTION),
        (answering(ACK, ACK), Cause.MISSING),
        (answering(ACK, ACK, ACK, ACK), Cause.INVALID),
        (answering(ACK, "nonsense"), Cause.INVALID),
        (every(10, ACK), Cause.TIMEOUT),
    ],
    ids=["exception", "commit", "missing", "too many", "nonsense", "time"],
)
async def test_a_failure_voids_the_acks_of_an_atomic_batch(rabbit, answer, cause):
    """None of it has happened: all of it comes again."""
    counts, consumer = await settled_by(rabbit, answer, process_timeout=25)
    assert {(REQUEUE, cause): 3} == counts
    assert [numbered(3), numbered(3)] == consumer.batches


async def test_a_clean_up_that_is_cut_off_voids_the_acks(rabbit):
    """Whoever is cut off in its commit has not committed."""

    async def answer(messages):
        for _ in messages:
            yield ACK
        await asyncio.sleep(3600)

    counts, _ = await settled_by(rabbit, answer, process_timeout=5)
    assert {(REQUEUE, Cause.TIMEOUT): 3} == counts


async def test_a_commit_that_swallows_its_cancellation_counts(rabbit):
    """It has come to its end, and nothing went wrong."""

    async def answer(messages):
        for _ in messages:
            yield ACK
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            await asyncio.sleep(1)

    counts, _ = await settled_by(rabbit, answer, process_timeout=5)
    assert {(ACK, Cause.HANDLER): 3} == counts


async def test_a_handler_that_goes_on_after_its_time_has_not_committed(rabbit):
    """It is left in the middle, however much it had said."""
    events = []

    async def answer(messages):
        try:
            for _ in messages:
                yield ACK
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                yield ACK
        except GeneratorExit:
            events.append("rolled back")
            raise

    counts, _ = await settled_by(rabbit, answer, process_timeout=5)
    assert ["rolled back"] == events
    assert {(REQUEUE, Cause.TIMEOUT): 3} == counts


async def test_an_atomic_batch_that_goes_well_is_settled_in_one_go(rabbit):
    """When the handler has ended, as by default."""
    counts, _ = await settled_by(rabbit, every(5, ACK, NACK, ACK))
    assert {(ACK, Cause.HANDLER): 2, (NACK, Cause.HANDLER): 1} == counts
    assert [15] * 3 == rabbit.times(EventKind.ACKED)


async def test_only_acks_are_void(rabbit):
    """NACK and REQUEUE say that there was no effect, which is true all the more."""
    answer = answering(ACK, NACK, REQUEUE, ACK, error=Failed())
    counts, _ = await settled_by(
        rabbit, answer, count=5, unhandled_exception_action=REQUEUE_IMMEDIATE
    )
    assert {
        (NACK, Cause.HANDLER): 1,
        (REQUEUE, Cause.HANDLER): 1,
        (REQUEUE_IMMEDIATE, Cause.EXCEPTION): 3,
    } == counts
    assert [b"1"] == rabbit.waiting("dead")


async def test_exception_results_are_for_void_acks_too(rabbit):
    """Whoever maps an exception means all of the batch."""

    class Listed(RecordingConsumer):
        exception_results = {Failed: NACK}  # noqa: RUF012

    recorder = EventRecorder()
    rabbit.put(*numbered(3))
    async with Listed(
        answering(ACK, error=Failed()),
        transport=rabbit.transport,
        observers=[recorder],
        batch_size=3,
        settle="atomic",
    ):
        await asyncio.sleep(1)
    assert {(NACK, Cause.EXCEPTION): 3} == recorder.of(Settled)[0].counts


async def test_what_is_void_is_isolated_with_the_rest(rabbit):
    """Each half is a transaction of its own."""

    async def answer(messages):
        for _ in messages:
            yield ACK
        if b"2" in {message.body for message in messages}:
            raise Failed

    rabbit.put(*numbered(4))
    recorder = EventRecorder()
    consumer = consumer_of(
        rabbit,
        answer,
        recorder,
        settle="atomic",
        isolate_failures=True,
        unhandled_exception_action=NACK,
    )
    consumer.answer = answer
    async with consumer:
        await asyncio.sleep(2)
    assert {(ACK, Cause.HANDLER): 3, (NACK, Cause.EXCEPTION): 1} == counted(recorder)
    assert [b"2"] == rabbit.waiting("dead")
    assert [numbered(4), numbered(2), numbered(2, 2), [b"2"], [b"3"]] == consumer.batches


async def test_a_message_that_cannot_be_decoded_sinks_no_acks(rabbit):
    """It alone is dead-lettered; the void ACKs are yielded again with the rest, in their order."""

    async def answer(messages):
        for message in messages:
            message.json()
            yield ACK

    rabbit.put(b"0", b"1", b"{", b"3")
    recorder = EventRecorder()
    consumer = consumer_of(rabbit, answer, recorder, settle="atomic")
    consumer.answer = answer
    async with consumer:
        await asyncio.sleep(2)
    assert [[b"0", b"1", b"{", b"3"], [b"0", b"1", b"3"]] == consumer.batches
    assert {(ACK, Cause.HANDLER): 3, (NACK, Cause.UNDECODABLE): 1} == counted(recorder)


async def test_a_drain_returns_the_acks_of_a_batch_that_it_cut_off(rabbit):
    """They were void."""
    rabbit.put(*numbered(3))
    consumer = consumer_of(
        rabbit, every(10, ACK), settle="atomic", batch_size=3, shutdown_timeout=5
    )
    await consumer.start()
    await asyncio.sleep(15)
    await consumer.stop()
    assert numbered(3) == rabbit.waiting()
