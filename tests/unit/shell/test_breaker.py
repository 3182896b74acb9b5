"""The circuit breaker: when a worker pauses, and how it resumes."""

from __future__ import annotations

import asyncio
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aio_pika_batch import ConfigurationError, SessionLost, WorkerState
from aio_pika_batch.adapters.memory import ConnectFault, EventKind
from aio_pika_batch.observer import BreakerClosed, BreakerOpened, BreakerProbing, Connected, Lost
from aio_pika_batch.testing import virtual_time
from tests.unit.shell.helpers import (
    ACK,
    NACK,
    REQUEUE,
    REQUEUE_IMMEDIATE,
    EventRecorder,
    QueueBroker,
    RecordingConsumer,
    ack,
    answering,
    first_then,
    numbered,
    settings,
    taking,
)
from tests.unit.shell.scripted_transport import ScriptedTransport, at_once, never, raising

BREAKER = {
    "breaker_threshold": 0.5,
    "breaker_min_samples": 4,
    "breaker_pause": 30,
    "breaker_pause_max": 100,
    "batch_size": 4,
    "batch_timeout": 1,
    "max_requeue_attempts": 1000,
}


def now():
    """The current time."""
    return asyncio.get_running_loop().time()


def always(result):
    """A handler with one result."""

    async def answer(messages):
        for _ in messages:
            yield result

    return answer


async def failing(messages):
    """A handler whose database is down."""
    raise ConnectionError("no database")
    yield


def state(consumer):
    """The state of the first worker."""
    return consumer.status().workers[0].state


def opened(recorder):
    """All openings of a breaker, as (failed, samples, pause)."""
    return [(each.failed, each.samples, each.pause) for each in recorder.of(BreakerOpened)]


async def test_an_opening_breaker_cancels_drains_returns_and_probes(jitter):
    """In this order. One nack returns all unstarted messages, then probes get one at a time."""
    script = ScriptedTransport()
    recorder = EventRecorder()
    consumer = RecordingConsumer(
        first_then(failing, ack),
        transport=script,
        observers=[recorder],
        prefetch_count=20,
        **BREAKER,
    )
    async with consumer:
        script.on_publish = lambda *_: asyncio.sleep(1)
        script.last.feed(*numbered(11))
        await asyncio.sleep(0.5)
        assert WorkerState.PAUSED is state(consumer)
        assert consumer.is_healthy
        await asyncio.sleep(19.5)
        assert WorkerState.PAUSED is state(consumer)
        assert consumer.is_healthy
        assert 1 == len(consumer.batches)
        await asyncio.sleep(20)
        assert WorkerState.PROBING is state(consumer)
        assert consumer.is_healthy
        script.last.feed(b"again")
        await asyncio.sleep(1)
        assert WorkerState.CONSUMING is state(consumer)
        script.last.feed(*numbered(4, 20))
        await asyncio.sleep(1)
    assert [numbered(4), [b"again"], numbered(4, 20)] == consumer.batches
    assert [20, 1, 20] == [subscription.prefetch for subscription in script.details("open")]
    assert [0] == script.times("cancel")[:1]
    assert [
        (1, [("ack", (1, 2, 3, 4))]),
        (1, [("return", (5, 6, 7, 8, 9, 10, 11))]),
    ] == list(zip(script.times("settle"), script.details("settle"), strict=True))[:2]
    assert [1] == script.times("leave")[:1]
    assert [0, 31, 40] == script.times("open")
    assert [(4, 4, 30)] == opened(recorder)
    assert [BreakerOpened, BreakerProbing, BreakerClosed] == [
        type(event) for _, event in recorder.seen if type(event).__name__.startswith("Breaker")
    ]
    assert [1, 2, 3] == [event.epoch for event in recorder.of(Connected)]
    assert [] == recorder.of(Lost)


async def test_an_outage_costs_one_attempt_for_each_pause(rabbit, jitter):
    """Pauses grow during the outage. Afterwards everything is handled, and nothing is lost."""
    down_until = 385
    recorder = EventRecorder()
    rabbit.put(*numbered(40))

    async def answer(messages):
        if now() < down_until:
            raise ConnectionError
        for _ in messages:
            yield ACK

    consumer = RecordingConsumer(
        answer, transport=rabbit.transport, observers=[recorder], **BREAKER
    )
    async with consumer:
        await asyncio.sleep(down_until)
        assert [4, 1, 1, 1, 1] == [len(batch) for batch in consumer.batches]
        # 30, 60, 100 and 100 seconds lie between them; the next one comes after the outage.
        assert [0, 30, 90, 190, 290] == consumer.times
        assert consumer.is_healthy
        await asyncio.sleep(60)
    assert [30, 60, 100, 100, 100] == [pause for _, _, pause in opened(recorder)]
    assert set(numbered(40)) == {event.body for event in rabbit.broker.journal.of(EventKind.ACKED)}
    assert [] == rabbit.waiting()
    assert [] == rabbit.unsettled()
    assert 1 == len(recorder.of(BreakerClosed))


@pytest.mark.parametrize(
    ("handler", "given"),
    [
        (failing, {}),
        (always(REQUEUE), {}),
        (always(REQUEUE_IMMEDIATE), {}),
        (failing, {"unhandled_exception_action": NACK}),
        (answering(), {}),
        (taking(60), {"process_timeout": 5}),
        (always("nonsense"), {}),
    ],
    ids=["raises", "requeues", "immediately", "nacks by default", "ends early", "late", "nonsense"],
)
async def test_every_kind_of_failure_counts(rabbit, jitter, handler, given):
    """Each makes the breaker open."""
    rabbit.put(*numbered(20))
    consumer = RecordingConsumer(handler, transport=rabbit.transport, **BREAKER | given)
    async with consumer:
        await asyncio.sleep(10)
        assert WorkerState.PAUSED is state(consumer)
        assert 1 == len(consumer.batches)
        assert [] == rabbit.unsettled()


@pytest.mark.parametrize("result", [ACK, NACK])
async def test_a_nack_does_not_count_as_a_failure(rabbit, result):
    """A handler that NACKs a message has judged the message, not the database."""
    rabbit.put(*numbered(20))
    consumer = RecordingConsumer(always(result), transport=rabbit.transport, **BREAKER)
    async with consumer:
        await asyncio.sleep(10)
        assert WorkerState.CONSUMING is state(consumer)
    assert [] == rabbit.waiting()


async def test_an_exception_mapped_to_nack_does_not_count(rabbit):
    """`exception_results` says that it is the message's fault."""

    class Strict(RecordingConsumer):
        exception_results: ClassVar = {ConnectionError: NACK}

    rabbit.put(*numbered(20))
    async with Strict(failing, transport=rabbit.transport, **BREAKER) as consumer:
        await asyncio.sleep(10)
        assert WorkerState.CONSUMING is state(consumer)
    assert [] == rabbit.waiting()


async def test_an_exception_mapped_to_ack_counts_as_a_success(rabbit, jitter):
    """It closes a breaker, too."""

    class Idempotent(RecordingConsumer):
        exception_results: ClassVar = {KeyError: ACK}

    rabbit.put(*numbered(8))
    consumer = Idempotent(
        first_then(failing, answering(error=KeyError("done before"))),
        transport=rabbit.transport,
        **BREAKER,
    )
    async with consumer:
        await asyncio.sleep(40)
        assert WorkerState.CONSUMING is state(consumer)
    assert [] == rabbit.waiting()


async def test_results_before_the_window_do_not_count(rabbit, jitter):
    """Old successes do not outweigh new failures."""
    rabbit.put(*numbered(100))
    recorder = EventRecorder()
    consumer = RecordingConsumer(
        transport=rabbit.transport, observers=[recorder], breaker_window=10, **BREAKER
    )
    async with consumer:
        await asyncio.sleep(20)
        consumer.answer = failing
        rabbit.put(*numbered(4))
        await asyncio.sleep(1)
        assert [(4, 4, 30)] == opened(recorder)


async def test_a_share_of_failures_below_the_threshold_does_not_open(rabbit, jitter):
    """One in four fails, and half of them may."""
    rabbit.put(*numbered(40))

    async def answer(messages):
        for message in messages:
            yield REQUEUE if int(message.body) % 4 == 0 and not message.retry_count else ACK

    async with RecordingConsumer(answer, transport=rabbit.transport, **BREAKER) as consumer:
        await asyncio.sleep(10)
        assert WorkerState.CONSUMING is state(consumer)
    assert 50 == len(consumer.handled)


async def test_a_probe_that_is_neither_success_nor_failure_is_followed_by_another(rabbit, jitter):
    """A NACK proves nothing, so the worker continues with one message at a time."""
    recorder = EventRecorder()
    rabbit.put(*numbered(8))
    consumer = RecordingConsumer(
        first_then(always(REQUEUE_IMMEDIATE), always(NACK), always(NACK), ack),
        transport=rabbit.transport,
        observers=[recorder],
        **BREAKER,
    )
    async with consumer:
        await asyncio.sleep(60)
    assert [4, 1, 1, 1] == [len(batch) for batch in consumer.batches[:4]]
    assert [30, 30, 30] == consumer.times[1:4]
    assert 1 == len(recorder.of(BreakerClosed))
    assert [] == rabbit.waiting()


async def slowly_failing(messages):
    """A handler that fails once per second."""
    for _ in messages:
        await asyncio.sleep(1)
        yield REQUEUE_IMMEDIATE


async def test_early_settlements_count_at_once(rabbit):
    """The breaker opens during the batch, which still runs to its end and is settled."""
    recorder = EventRecorder()
    rabbit.put(*numbered(12))
    consumer = RecordingConsumer(
        slowly_failing,
        transport=rabbit.transport,
        observers=[recorder],
        settle="yield",
        **BREAKER | {"batch_size": 6},
    )
    async with consumer:
        await asyncio.sleep(3.5)
        assert WorkerState.CONSUMING is state(consumer)
        await asyncio.sleep(1)
        assert WorkerState.PAUSED is state(consumer)
        assert [(4, 4, 30)] == opened(recorder)
        await asyncio.sleep(5)
        assert [] == rabbit.unsettled()
        assert set(numbered(12)) == set(rabbit.waiting())
    assert [numbered(6)] == consumer.batches
    assert [] == recorder.of(Lost)


async def test_early_settlements_count_once(rabbit):
    """Not again at the end of the batch."""
    rabbit.put(*numbered(3))
    consumer = RecordingConsumer(
        first_then(slowly_failing, ack),
        transport=rabbit.transport,
        settle="yield",
        **BREAKER | {"breaker_threshold": 1.0},
    )
    async with consumer:
        await asyncio.sleep(10)
        assert WorkerState.CONSUMING is state(consumer)


async def test_an_isolated_failure_counts_once(rabbit):
    """The other messages of its batch have succeeded."""
    recorder = EventRecorder()
    rabbit.put(*numbered(8))

    async def picky(messages):
        if b"2" in [message.body for message in messages]:
            raise KeyError
        for _ in messages:
            yield ACK

    consumer = RecordingConsumer(
        picky,
        transport=rabbit.transport,
        observers=[recorder],
        isolate_failures=True,
        **BREAKER | {"max_requeue_attempts": 0},
    )
    async with consumer:
        await asyncio.sleep(10)
        assert WorkerState.CONSUMING is state(consumer)
    assert [] == opened(recorder)


async def test_in_place_retries_count_and_go_back_during_a_pause(rabbit, jitter):
    """With `ordered_by_key` failures are held; during a pause they go back, and the order stays."""
    recorder = EventRecorder()

    class Ordered(RecordingConsumer):
        def batch_key(self, message):
            return int(message.body) % 2

    rabbit.put(*numbered(12))
    consumer = Ordered(
        first_then(always(REQUEUE), ack),
        transport=rabbit.transport,
        observers=[recorder],
        ordered_by_key=True,
        **BREAKER,
    )
    async with consumer:
        await asyncio.sleep(10)
        assert [(4, 4, 30)] == opened(recorder)
        assert [] == rabbit.unsettled()
        assert numbered(12) == rabbit.waiting()
        await asyncio.sleep(60)
        assert WorkerState.CONSUMING is state(consumer)
    assert [] == rabbit.waiting()
    went_well = [int(body) for batch in consumer.batches[1:] for body in batch]
    assert [1, 3, 5, 7, 9, 11] == [each for each in went_well if each % 2]
    assert [0, 2, 4, 6, 8, 10] == [each for each in went_well if not each % 2]


async def test_the_breaker_is_off_by_default(rabbit, jitter):
    """A consumer without breaker settings keeps failing."""
    rabbit.put(*numbered(40))
    async with RecordingConsumer(
        failing, transport=rabbit.transport, max_requeue_attempts=1
    ) as consumer:
        await asyncio.sleep(10)
        assert WorkerState.CONSUMING is state(consumer)
    assert 80 == len(consumer.handled)


async def test_a_worker_is_healthy_while_it_opens_sessions_for_and_after_a_probe(jitter):
    """Opening a session takes time, and is not a fault."""
    script = ScriptedTransport()
    consumer = RecordingConsumer(
        first_then(failing, ack), transport=script, prefetch_count=20, **BREAKER
    )
    async with consumer:
        script.on_open = lambda *_: asyncio.sleep(5)
        script.last.feed(*numbered(4))
        await asyncio.sleep(32)
        assert WorkerState.PAUSED is state(consumer)
        assert consumer.is_healthy
        await asyncio.sleep(5)
        assert WorkerState.PROBING is state(consumer)
        script.last.feed(b"again")
        await asyncio.sleep(2)
        assert WorkerState.PROBING is state(consumer)
        assert consumer.is_healthy
        await asyncio.sleep(5)
        assert WorkerState.CONSUMING is state(consumer)


@pytest.mark.parametrize("fails", [False, True])
async def test_messages_that_come_while_a_successful_probe_ends_are_handled(jitter, fails):
    """They need not go back. If they fail, the breaker opens again."""
    script = ScriptedTransport()
    recorder = EventRecorder()
    consumer = RecordingConsumer(
        first_then(failing, ack, failing if fails else ack, ack),
        transport=script,
        observers=[recorder],
        prefetch_count=20,
        **BREAKER | {"breaker_min_samples": 1},
    )

    async def late():
        script.last.feed(b"late")

    async with consumer:
        script.last.feed(*numbered(4))
        await asyncio.sleep(35)
        script.on_cancel = late
        script.last.feed(b"again")
        await asyncio.sleep(1)
        script.on_cancel = at_once
        assert [numbered(4), [b"again"], [b"late"]] == consumer.batches
        assert (WorkerState.PAUSED if fails else WorkerState.CONSUMING) is state(consumer)
    assert [30, 30] == [pause for _, _, pause in opened(recorder)] or not fails
    assert [] == recorder.of(Lost)


# --- each worker for itself ---------------------------------------------------------


async def test_a_pause_affects_one_worker_only(jitter):
    """The other workers continue."""
    script = ScriptedTransport()
    consumer = RecordingConsumer(
        first_then(failing, ack), transport=script, num_workers=2, prefetch_count=20, **BREAKER
    )
    async with consumer:
        one, other = script.sessions
        one.feed(*numbered(8))
        await asyncio.sleep(1)
        other.feed(*numbered(4, 20))
        await asyncio.sleep(1)
        states = {worker.state for worker in consumer.status().workers}
        assert {WorkerState.PAUSED, WorkerState.CONSUMING} == states
        assert consumer.is_healthy
    assert [numbered(4), numbered(4, 20)] == consumer.batches


async def test_running_batches_finish_before_messages_are_returned():
    """They are settled with their results, and no new batch starts."""
    script = ScriptedTransport()
    consumer = RecordingConsumer(
        first_then(taking(10), always(REQUEUE_IMMEDIATE)),
        transport=script,
        concurrency=2,
        prefetch_count=20,
        **BREAKER,
    )
    async with consumer:
        script.last.feed(*numbered(13))
        await asyncio.sleep(5)
        assert WorkerState.PAUSED is state(consumer)
        assert [4, 4] == [len(batch) for batch in consumer.batches]
        assert consumer.is_healthy
        await asyncio.sleep(10)
        assert [
            [("requeue", (5, 6, 7, 8))],
            [("ack", (1, 2, 3, 4))],
            [("return", (9, 10, 11, 12, 13))],
        ] == script.details("settle")
        assert [4, 4] == [len(batch) for batch in consumer.batches]


async def test_a_late_success_of_a_running_batch_does_not_end_the_pause(rabbit, jitter):
    """The batch had started before the pause; only a probe ends it."""
    rabbit.put(*numbered(20))
    consumer = RecordingConsumer(
        first_then(taking(10), always(REQUEUE)),
        transport=rabbit.transport,
        concurrency=2,
        **BREAKER,
    )
    async with consumer:
        await asyncio.sleep(35)
        assert WorkerState.PAUSED is state(consumer)


# --- trouble meanwhile --------------------------------------------------------------


@pytest.mark.parametrize("after", [0.5, 29])
async def test_a_stop_ends_a_pause_at_once(rabbit, jitter, after):
    """All messages stay in the queue."""
    recorder = EventRecorder()
    rabbit.put(*numbered(20))
    consumer = RecordingConsumer(
        failing, transport=rabbit.transport, observers=[recorder], **BREAKER
    )
    await consumer.start()
    await asyncio.sleep(after)
    assert WorkerState.PAUSED is state(consumer)
    await consumer.stop()
    assert after == now()
    assert [] == recorder.of(BreakerProbing)
    assert set(numbered(20)) == set(rabbit.waiting())


async def test_a_stop_while_the_breaker_drains_has_its_own_deadline():
    """A handler that does not end is cut off, as in any drain."""
    script = ScriptedTransport()
    consumer = RecordingConsumer(
        first_then(taking(3600), always(REQUEUE_IMMEDIATE)),
        transport=script,
        concurrency=2,
        prefetch_count=20,
        shutdown_timeout=20,
        **BREAKER,
    )
    await consumer.start()
    script.last.feed(*numbered(10))
    await asyncio.sleep(100)
    assert WorkerState.PAUSED is state(consumer)
    await consumer.stop()
    # Of the twenty seconds, a tenth but not more than a second and a half is kept, twice.
    assert [
        (0, [("requeue", (5, 6, 7, 8))]),
        (117, [("return", (1, 2, 3, 4))]),
        (117, [("return", (9, 10))]),
    ] == list(zip(script.times("settle"), script.details("settle"), strict=True))
    assert 117 == now()


@pytest.mark.parametrize("step", ["on_cancel", "on_settle"])
async def test_a_silent_broker_does_not_delay_a_stop_during_a_pause(step):
    """Whatever the broker does not answer after the breaker has opened."""
    script = ScriptedTransport()
    consumer = RecordingConsumer(
        failing, transport=script, prefetch_count=20, shutdown_timeout=20, **BREAKER
    )
    await consumer.start()
    setattr(script, step, never)
    script.last.feed(*numbered(6))
    await asyncio.sleep(100)
    await consumer.stop()
    assert now() <= 122
    assert not consumer.is_running


@pytest.mark.parametrize("step", ["on_cancel", "on_settle"])
async def test_a_session_that_is_lost_when_the_breaker_opens_does_not_shorten_the_pause(
    step, jitter
):
    """The broker delivers its messages again, after the pause."""
    script = ScriptedTransport()
    recorder = EventRecorder()
    consumer = RecordingConsumer(
        failing, transport=script, observers=[recorder], prefetch_count=20, **BREAKER
    )
    async with consumer:
        setattr(script, step, raising(SessionLost("cut")))
        script.last.feed(*numbered(6))
        await asyncio.sleep(29)
        assert WorkerState.PAUSED is state(consumer)
        assert consumer.is_healthy
        assert 1 == len(script.sessions)
        assert 1 == len(recorder.of(Lost))
        await asyncio.sleep(2)
        assert WorkerState.PROBING is state(consumer)
        assert [0, 30] == script.times("open")
        setattr(script, step, at_once)


@pytest.mark.parametrize("silent", [True, False])
async def test_a_handler_that_ignores_its_cancellation_does_not_delay_the_pause(jitter, silent):
    """Its session is given up; it counts against `concurrency` until it ends."""
    script = ScriptedTransport()
    recorder = EventRecorder()

    async def stubborn(messages):
        while now() < 60:
            try:
                await asyncio.sleep(60 - now())
            except asyncio.CancelledError:
                continue
        for _ in messages:
            yield ACK

    consumer = RecordingConsumer(
        first_then(stubborn, failing, ack),
        transport=script,
        observers=[recorder],
        concurrency=2,
        prefetch_count=20,
        process_timeout=2,
        **BREAKER,
    )
    async with consumer:
        if silent:
            script.on_cancel = never
        script.last.feed(*numbered(8))
        await asyncio.sleep(8)
        [lost] = recorder.of(Lost)
        assert "its session is given up" in str(lost.error)
        script.on_cancel = at_once
        assert ["leave"] == [step for step in script.steps if step == "leave"]
        await asyncio.sleep(25)
        assert WorkerState.PAUSED is state(consumer)
        await asyncio.sleep(10)
        assert WorkerState.PROBING is state(consumer)
        await asyncio.sleep(20)


async def test_a_cancel_that_is_never_answered_does_not_keep_the_worker_from_its_pause(jitter):
    """A queue without a leader leaves it unanswered, while heartbeats go on."""
    script = ScriptedTransport()
    recorder = EventRecorder()
    consumer = RecordingConsumer(
        first_then(failing, ack),
        transport=script,
        observers=[recorder],
        prefetch_count=20,
        **BREAKER,
    )
    async with consumer:
        script.on_cancel = never
        script.last.feed(*numbered(6))
        await asyncio.sleep(9)
        assert [] == recorder.of(Lost)
        await asyncio.sleep(2)
        [lost] = recorder.of(Lost)
        assert "did not confirm in time" in str(lost.error)
        assert WorkerState.PAUSED is state(consumer)
        await asyncio.sleep(30)
        assert WorkerState.PROBING is state(consumer)
        assert [0, 40] == script.times("open")
        script.on_cancel = at_once


async def test_probing_continues_after_the_loss_of_its_session(rabbit, jitter):
    """The next session takes one message at a time, too. Without a broker it is not healthy."""
    rabbit.put(*numbered(8))
    consumer = RecordingConsumer(
        first_then(failing, taking(20)), transport=rabbit.transport, prefetch_count=20, **BREAKER
    )
    async with consumer:
        await asyncio.sleep(35)
        assert WorkerState.PROBING is state(consumer)
        rabbit.broker.faults.connect_fault = ConnectFault.UNREACHABLE
        rabbit.broker.cut()
        await asyncio.sleep(5)
        assert not consumer.is_healthy
        rabbit.broker.faults.connect_fault = ConnectFault.NONE
        await asyncio.sleep(5)
        assert WorkerState.PROBING is state(consumer)
        assert 1 == len(rabbit.unsettled())
        await asyncio.sleep(60)
        assert WorkerState.CONSUMING is state(consumer)


async def test_results_for_a_lost_session_do_not_count(rabbit, jitter):
    """The messages are handled again, and count then."""
    rabbit.put(*numbered(4))
    consumer = RecordingConsumer(
        first_then(taking(5, failing), ack), transport=rabbit.transport, **BREAKER
    )
    async with consumer:
        await asyncio.sleep(1)
        rabbit.broker.cut()
        await asyncio.sleep(10)
        assert WorkerState.CONSUMING is state(consumer)


async def test_hooks_are_called_for_each_session_and_see_no_error(rabbit, jitter):
    """A pause is not an error."""
    seen = []

    class Hooked(RecordingConsumer):
        async def on_session(self, session):
            seen.append((session.epoch, now()))

        async def _run_internal(self, **given):
            await super()._run_internal(**given)
            seen.append("over")

    rabbit.put(*numbered(8))
    async with Hooked(first_then(failing, ack), transport=rabbit.transport, **BREAKER):
        await asyncio.sleep(40)
    assert [(1, 0), "over", (2, 30), "over", (3, 30), "over"] == seen
    assert [] == rabbit.waiting()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"breaker_threshold": 0}, "breaker_threshold"),
        ({"breaker_threshold": 1.1}, "breaker_threshold"),
        ({"breaker_min_samples": 0}, "breaker_min_samples"),
        ({"breaker_window": 0}, "breaker_window"),
        ({"breaker_pause": 400}, "breaker_pause_max"),
        ({"breaker_threshold": 0.5, "queue_exclusive": True}, "queue_exclusive"),
        ({"breaker_threshold": 0.5, "queue_auto_delete": True}, "queue_auto_delete"),
    ],
)
def test_invalid_breaker_settings_are_refused(given, said):
    """The error names the setting. A queue that is deleted with its last consumer would be lost in
    a pause.
    """
    with pytest.raises(ConfigurationError, match=said):
        settings(**given)


@given(
    outages=st.lists(st.tuples(st.floats(0, 100), st.floats(0, 200)), max_size=3),
    count=st.integers(1, 40),
    size=st.integers(1, 6),
    concurrency=st.integers(1, 3),
    seconds=st.floats(0, 5),
    threshold=st.sampled_from([0.1, 0.5, 1.0]),
    cuts=st.lists(st.floats(0, 300), max_size=3),
    result=st.sampled_from([REQUEUE, REQUEUE_IMMEDIATE]),
)
def test_everything_is_handled_in_the_end(
    outages, count, size, concurrency, seconds, threshold, cuts, result
):
    """Outages, cuts and pauses in any order lose no message, and no worker stays paused."""

    async def story():
        rabbit = QueueBroker()
        rabbit.declare()

        async def answer(messages):
            await asyncio.sleep(seconds)
            is_down = any(begin <= now() < begin + length for begin, length in outages)
            if is_down:
                await asyncio.sleep(0.1)
            for _ in messages:
                yield result if is_down else ACK

        consumer = RecordingConsumer(
            answer,
            transport=rabbit.transport,
            **BREAKER
            | {
                "batch_size": size,
                "concurrency": concurrency,
                "breaker_threshold": threshold,
                "max_requeue_attempts": 100_000,
            },
        )

        async def cut():
            for at in sorted(cuts):
                await asyncio.sleep(at - now())
                rabbit.broker.cut()

        rabbit.put(*numbered(count))
        async with consumer:
            cutting = asyncio.create_task(cut())
            await asyncio.sleep(1500)
            await cutting
            assert consumer.is_healthy
            assert [] == rabbit.unsettled()
        acked = {each.body for each in rabbit.broker.journal.of(EventKind.ACKED)}
        assert set(numbered(count)) == acked
        assert [] == rabbit.waiting()

    virtual_time.run(story())
