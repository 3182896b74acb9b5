"""The settle modes: with the batch, soon after each yield, or all or nothing."""

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
    """Raised by handlers."""


def every(seconds, *results, error=None):
    """Return a handler that yields one of these after each pause, and then raises."""

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
    """Return a consumer with `settle="yield"`, and dead letters in `dead`."""
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
    """Return the counts of everything that was settled."""
    total = {}
    for event in recorder.of(Settled):
        for key, count in event.counts.items():
            total[key] = total.get(key, 0) + count
    return total


# -- yield ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [0.1, 1.0, 30.0])
async def test_a_yield_is_settled_within_the_interval_while_the_handler_runs(rabbit, interval):
    """No message waits longer after its yield, whatever is yielded later."""
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


async def test_results_yielded_in_one_interval_are_settled_in_one_write():
    """Not message by message."""
    script = ScriptedTransport()
    async with RecordingConsumer(
        every(0.01, ACK), transport=script, batch_size=20, settle="yield", settle_interval=1
    ):
        script.last.feed(*numbered(20))
        await asyncio.sleep(5)
        assert [[("ack", tuple(range(1, 21)))]] == script.details("settle")


async def test_concurrent_handlers_share_one_write():
    """For the results of two handlers, in delivery order; then a new interval begins."""
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


async def test_unconfirmed_copies_do_not_delay_acks_beyond_the_interval():
    """Neither those of the same handler nor those of concurrent handlers."""
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


async def test_confirms_of_other_batches_do_not_delay_acks_beyond_the_interval():
    """Finished batches wait for their copies, one after the other; a yield waits less long."""
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
    """Each in its own time; the rest with the batch."""

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
    """Retries and dead letters as well as acks."""
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


async def test_an_exception_affects_only_messages_that_were_not_yielded(rabbit):
    """Yielded messages are already settled, and are not settled again."""
    recorder = EventRecorder()
    rabbit.put(*numbered(4))
    async with consumer_of(rabbit, every(10, ACK, ACK, error=Failed()), recorder) as consumer:
        await asyncio.sleep(29)
        assert [b"2", b"3"] == rabbit.unsettled()
        await asyncio.sleep(10)
    assert {(ACK, Cause.HANDLER): 4, (REQUEUE, Cause.EXCEPTION): 2} == counted(recorder)
    assert [numbered(4), numbered(2, 2)] == consumer.batches
    assert [] == recorder.of(Lost)


async def test_results_yielded_just_before_an_exception_count(rabbit):
    """With or without an interval."""
    recorder = EventRecorder()
    rabbit.put(*numbered(4))
    async with consumer_of(rabbit, answering(ACK, ACK, error=Failed()), recorder):
        await asyncio.sleep(5)
    assert {(ACK, Cause.HANDLER): 4, (REQUEUE, Cause.EXCEPTION): 2} == counted(recorder)


async def test_a_timeout_keeps_yielded_results(rabbit):
    """Those settled early, and the last ones."""
    recorder = EventRecorder()
    rabbit.put(*numbered(4))
    async with consumer_of(rabbit, every(10, ACK), recorder, process_timeout=20.01):
        await asyncio.sleep(25)
    assert {(ACK, Cause.HANDLER): 4, (REQUEUE, Cause.TIMEOUT): 2} == counted(recorder)
    assert 2 + 2 + 2 == len(rabbit.times(EventKind.ACKED))


async def test_unconfirmed_copies_hold_up_no_acks(rabbit):
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


async def test_settled_messages_do_not_count_against_prefetch(rabbit):
    """They make room for others, so no batch is cut short because of them."""
    recorder = EventRecorder()
    rabbit.put(*numbered(8))
    async with consumer_of(
        rabbit, every(10, ACK), recorder, concurrency=2, prefetch_count=6, batch_timeout=100
    ) as consumer:
        await asyncio.sleep(1)
        assert (4, 2) == (consumer.status().workers[0].in_hand, len(consumer.batches))
        await asyncio.sleep(20)
        assert 2 == consumer.status().workers[0].in_hand


async def test_early_settlements_count_as_progress(rabbit):
    """A worker that settles is not stuck."""
    rabbit.put(*numbered(4))
    async with consumer_of(rabbit, every(50, ACK)) as consumer:
        await asyncio.sleep(60)
        assert 10 == round(consumer.status().workers[0].last_progress)


async def test_a_lost_session_settles_nothing_more(rabbit, jitter):
    """Settled messages stay settled; later results are stale, and their messages come again."""
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
    """Results yielded but not settled yet are stale, too."""
    recorder = EventRecorder()
    rabbit.put(*numbered(4))
    async with consumer_of(rabbit, every(10, ACK), recorder, settle_interval=5) as consumer:
        await asyncio.sleep(12)
        rabbit.broker.cut()
        await asyncio.sleep(60)
    assert [numbered(4), numbered(4)] == consumer.batches
    assert [4] == [event.count for event in recorder.of(StaleResults)]


async def test_a_session_lost_after_the_last_yield_costs_nothing(rabbit, jitter):
    """Everything was settled, so no result is stale, although the handler was still running."""

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


async def test_a_failed_early_settlement_ends_the_session(jitter):
    """Its results and later ones are stale, and none is counted twice."""
    script, recorder = ScriptedTransport(), EventRecorder()
    async with RecordingConsumer(
        every(10, ACK), transport=script, observers=[recorder], batch_size=4, settle="yield"
    ):
        script.on_settle = raising(SessionLost("cut"))
        script.last.feed(*numbered(4))
        await asyncio.sleep(100)
    assert [1, 3] == [event.count for event in recorder.of(StaleResults)]
    assert 1 == len(recorder.of(Lost))


async def test_an_unexpected_error_while_settling_ends_the_session(jitter, caplog):
    """A bug must not leave messages unsettled forever."""
    script, recorder = ScriptedTransport(), EventRecorder()
    async with RecordingConsumer(
        every(10, ACK), transport=script, observers=[recorder], batch_size=4, settle="yield"
    ):
        script.on_settle = raising(KeyError("bug"))
        script.last.feed(*numbered(4))
        await asyncio.sleep(20)
    assert "could not be settled" in str(recorder.of(Lost)[0].error)
    assert "could not be settled" in caplog.text


async def test_a_drain_waits_for_early_settlements(rabbit):
    """It settles the last results with the rest of their batch."""
    rabbit.put(*numbered(4))
    consumer = consumer_of(rabbit, every(1, ACK))
    await consumer.start()
    await asyncio.sleep(2.01)
    await consumer.stop()
    assert [] == rabbit.unsettled()
    assert [] == rabbit.waiting()
    assert 4 == len(rabbit.times(EventKind.ACKED))


async def test_a_drain_counts_only_unsettled_messages_as_cut_off(rabbit):
    """Settled messages are not delivered again."""
    rabbit.put(*numbered(4))
    consumer = consumer_of(rabbit, every(10, ACK), shutdown_timeout=5)
    await consumer.start()
    await asyncio.sleep(15)
    await consumer.stop()
    assert numbered(3, 1) == rabbit.waiting()


async def test_a_drain_waits_for_a_settlement_in_progress():
    """Even if there is nothing else to wait for."""
    script = ScriptedTransport()
    script.on_settle = lambda *_: asyncio.sleep(2)
    consumer = RecordingConsumer(every(1, ACK), transport=script, batch_size=1, settle="yield")
    await consumer.start()
    script.last.feed(b"0")
    await asyncio.sleep(1.5)
    await consumer.stop()
    assert [(1,)] == [each.tags for each in script.sessions[0].settlements]


@pytest.mark.parametrize(("yields_at", "goes_on"), [(10, 0.5), (16.98, 3600)])
async def test_a_drain_waits_for_the_copies_of_the_last_results(yields_at, goes_on):
    """Whether the handler then ends or is cut off, 17 seconds after the stop."""
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
    """Decided messages are settled soon, also those that failed."""

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


async def test_a_handler_that_never_awaits_is_settled_at_its_end(rabbit):
    """It blocks the event loop, so nothing else can run meanwhile."""
    rabbit.put(*numbered(4))
    recorder = EventRecorder()
    async with consumer_of(rabbit, ack, recorder):
        await asyncio.sleep(3)
    assert [{(ACK, Cause.HANDLER): 4}] == [event.counts for event in recorder.of(Settled)]
    assert 1 == len(recorder.of(BatchCut))


# -- atomic ---------------------------------------------------------------------------------------


async def settled_by(rabbit, answer, count=3, **given):
    """Give one atomic batch to a handler, and later ones to a handler that ACKs; return what was
    settled.
    """
    recorder = EventRecorder()
    rabbit.put(*numbered(count))
    given = {"settle": "atomic", "batch_size": count} | given
    consumer = consumer_of(rabbit, answer, recorder, **given)
    async with consumer:
        await asyncio.sleep(60)
    return recorder.of(Settled)[0].counts, consumer


async def late_failure(messages):
    """Yield a result for every message, and fail to commit."""
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
    """The transaction was rolled back, so all messages come again."""
    counts, consumer = await settled_by(rabbit, answer, process_timeout=25)
    assert {(REQUEUE, cause): 3} == counts
    assert [numbered(3), numbered(3)] == consumer.batches


async def test_a_clean_up_that_is_cut_off_voids_the_acks(rabbit):
    """A handler that is cut off during its commit has not committed."""

    async def answer(messages):
        for _ in messages:
            yield ACK
        await asyncio.sleep(3600)

    counts, _ = await settled_by(rabbit, answer, process_timeout=5)
    assert {(REQUEUE, Cause.TIMEOUT): 3} == counts


async def test_a_commit_that_swallows_its_cancellation_counts(rabbit):
    """The handler has ended without an error."""

    async def answer(messages):
        for _ in messages:
            yield ACK
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            await asyncio.sleep(1)

    counts, _ = await settled_by(rabbit, answer, process_timeout=5)
    assert {(ACK, Cause.HANDLER): 3} == counts


async def test_a_handler_that_yields_after_its_timeout_has_not_committed(rabbit):
    """It is abandoned at that yield, whatever it has yielded."""
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


async def test_a_successful_atomic_batch_is_settled_at_once(rabbit):
    """When the handler has ended, as by default."""
    counts, _ = await settled_by(rabbit, every(5, ACK, NACK, ACK))
    assert {(ACK, Cause.HANDLER): 2, (NACK, Cause.HANDLER): 1} == counts
    assert [15] * 3 == rabbit.times(EventKind.ACKED)


async def test_only_acks_are_void(rabbit):
    """NACK and REQUEUE claim no effect that a rollback could undo."""
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


async def test_exception_results_apply_to_void_acks(rabbit):
    """A mapped exception applies to the whole batch."""

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


async def test_void_acks_are_isolated_with_the_rest(rabbit):
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


async def test_an_undecodable_message_does_not_fail_an_atomic_batch(rabbit):
    """Only this message is dead-lettered; the rest is run again, in order."""

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


async def test_a_drain_returns_the_messages_of_an_atomic_batch_that_it_cut_off(rabbit):
    """Its ACKs are void."""
    rabbit.put(*numbered(3))
    consumer = consumer_of(
        rabbit, every(10, ACK), settle="atomic", batch_size=3, shutdown_timeout=5
    )
    await consumer.start()
    await asyncio.sleep(15)
    await consumer.stop()
    assert numbered(3) == rabbit.waiting()
