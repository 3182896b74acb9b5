"""`ordered_by_key`: each key keeps its order, whatever fails."""

from __future__ import annotations

import asyncio

import pytest

from aio_pika_batch import MessageResult, Requeue, Trigger
from aio_pika_batch.adapters.memory import EventKind, PublishFault
from aio_pika_batch.observer import BatchCut, DeadLettered, Requeued, Settled
from tests.unit.shell.helpers import (
    ACK,
    NACK,
    REQUEUE,
    REQUEUE_IMMEDIATE,
    EventRecorder,
    RecordingConsumer,
    SingleConsumer,
    ack,
    answering,
    taking,
)
from tests.unit.shell.scripted_transport import ScriptedTransport


class Orderly(RecordingConsumer):
    """Its key is the first letter of a body; `?` has none. Records bodies and retry counts."""

    def __init__(self, *args, **given):
        super().__init__(*args, **{"ordered_by_key": True, "batch_timeout": 1} | given)
        self.seen = []

    def batch_key(self, message):
        letter = message.body[:1].decode()
        return None if letter == "?" else letter

    def process_messages(self, messages):
        self.seen.append([(message.body.decode(), message.retry_count) for message in messages])
        return super().process_messages(messages)

    def of(self, key):
        """Return the messages of a key, batch by batch."""
        return [batch for batch in self.seen if batch[0][0].startswith(key)]


def failing(*bodies, result=REQUEUE, times=1000, stops=False, error=RuntimeError):
    """Return a handler that fails for these bodies, each *times* times, by a result or an
    exception.
    """
    left = dict.fromkeys(bodies, times)

    async def answer(messages):
        for message in messages:
            if left.get(message.body, 0) > 0:
                left[message.body] -= 1
                if stops:
                    raise error
                yield result
            else:
                yield ACK

    return answer


async def test_batches_overlap_only_with_those_of_other_keys(rabbit):
    """With any number of handler slots."""
    rabbit.put(b"a1", b"a2", b"b1", b"a3", b"b2")
    async with Orderly(
        taking(5), transport=rabbit.transport, batch_size=1, concurrency=4, prefetch_count=20
    ) as consumer:
        await asyncio.sleep(20)
    assert {b"a1": 0, b"b1": 0, b"a2": 5, b"b2": 5, b"a3": 10} == dict(
        zip(consumer.handled, consumer.times, strict=True)
    )


@pytest.mark.parametrize("concurrency", [1, 3])
async def test_a_failing_message_is_retried_in_place_and_later_ones_wait(
    rabbit, jitter, concurrency
):
    """With its count raised, alone, with growing pauses; other keys continue."""
    rabbit.put(b"a1", b"b1", b"a2", b"a3", b"b2")
    recorder = EventRecorder()
    async with Orderly(
        failing(b"a1", times=3),
        transport=rabbit.transport,
        observers=[recorder],
        batch_size=1,
        concurrency=concurrency,
        max_requeue_attempts=3,
        prefetch_count=20,
    ) as consumer:
        await asyncio.sleep(10)
        assert [] == rabbit.unsettled()
    assert [[("a1", n)] for n in range(4)] + [[("a2", 0)], [("a3", 0)]] == consumer.of("a")
    assert [[("b1", 0)], [("b2", 0)]] == consumer.of("b")
    tries = [
        at for at, batch in zip(consumer.times, consumer.batches, strict=True) if b"a1" in batch
    ]
    assert pytest.approx([0, 0.2, 0.6, 1.4]) == tries
    assert [1, 2, 3] == [each.retry_count for each in recorder.of(Requeued) if each.in_place]
    # Nothing was published, and each message was settled once.
    assert 5 == len(rabbit.times(EventKind.STORED))
    assert 5 == len(rabbit.times(EventKind.ACKED))
    counts = [event.counts for event in recorder.of(Settled)]
    assert 5 == sum(sum(each.values()) for each in counts)
    assert all(counts)


@pytest.mark.parametrize("result", [REQUEUE, Requeue("busy"), REQUEUE_IMMEDIATE])
async def test_an_exhausted_message_is_dead_lettered_and_its_key_continues(rabbit, result):
    """REQUEUE_IMMEDIATE is counted here, too, since the broker does not see the retries."""
    rabbit.declare("dead")
    rabbit.bind("dead", "dlx", "key", kind="direct")
    for body in (b"a1", b"a2"):
        rabbit.put(body, exchange="events", routing_key="key")
    recorder = EventRecorder()
    async with Orderly(
        failing(b"a1", result=result),
        transport=rabbit.transport,
        observers=[recorder],
        dead_letter_exchange="dlx",
        max_requeue_attempts=2,
        batch_size=1,
    ) as consumer:
        await asyncio.sleep(10)
        assert [] == rabbit.unsettled()
    assert [[("a1", 0)], [("a1", 1)], [("a1", 2)], [("a2", 0)]] == consumer.seen
    [letter] = rabbit.broker.ready("dead")
    assert (b"a1", "exhausted", 2) == (
        letter.body,
        letter.headers["x-dead-letter-reason"],
        letter.headers["x-retry-count"],
    )
    first, dead = (letter.headers[f"x-{each}-at"] for each in ("first-failed", "dead-lettered"))
    assert first <= dead
    assert 1 == len(recorder.of(DeadLettered))


async def test_without_a_dead_letter_exchange_an_exhausted_message_is_rejected(rabbit):
    """REQUEUE_IMMEDIATE does not bring it back, either."""
    rabbit.put(b"a1", b"a2")
    async with Orderly(
        failing(b"a1", result=REQUEUE_IMMEDIATE),
        transport=rabbit.transport,
        max_requeue_attempts=1,
        batch_size=1,
    ) as consumer:
        await asyncio.sleep(10)
    assert [[("a1", 0)], [("a1", 1)], [("a2", 0)]] == consumer.seen
    assert ([], []) == (rabbit.waiting(), rabbit.unsettled())


async def test_delays_apply_to_in_place_retries(rabbit):
    """With the same steps, and without wait queues."""
    rabbit.put(b"a1", b"a2")
    async with Orderly(
        failing(b"a1", times=2), transport=rabbit.transport, batch_size=1, requeue_delay=20
    ) as consumer:
        await asyncio.sleep(100)
        assert [] == rabbit.unsettled()
    assert [0, 20, 60, 60] == consumer.times
    assert [b"a1", b"a1", b"a1", b"a2"] == consumer.handled
    assert 2 == len(rabbit.times(EventKind.STORED))


async def test_requeue_immediate_retries_at_once(rabbit):
    """As often as any other retry, and no more."""
    rabbit.put(b"a1")
    async with Orderly(
        failing(b"a1", result=REQUEUE_IMMEDIATE, times=3), transport=rabbit.transport, batch_size=1
    ) as consumer:
        await asyncio.sleep(1)
    assert [0, 0, 0, 0] == consumer.times
    assert [[("a1", n)] for n in range(4)] == consumer.seen


async def test_an_exception_counts_for_the_first_undecided_message_only(rabbit):
    """Yielded results count; this message is retried alone, and the rest waits unchanged."""
    rabbit.put(b"a1", b"a2", b"a3", b"a4")
    async with Orderly(
        failing(b"a2", times=2, stops=True), transport=rabbit.transport, batch_size=4
    ) as consumer:
        await asyncio.sleep(5)
        assert [] == rabbit.unsettled()
    assert [
        [("a1", 0), ("a2", 0), ("a3", 0), ("a4", 0)],
        [("a2", 1)],
        [("a2", 2)],
        [("a3", 0), ("a4", 0)],
    ] == consumer.seen


async def test_a_poison_message_does_not_exhaust_others(rabbit):
    """It is dead-lettered after its own attempts, and the others have used none."""
    rabbit.declare("dead")
    rabbit.bind("dead", "dlx", "", kind="fanout")
    rabbit.put(b"a1", b"a2", b"a3")
    async with Orderly(
        failing(b"a1", stops=True),
        transport=rabbit.transport,
        batch_size=3,
        max_requeue_attempts=1,
        dead_letter_exchange="dlx",
    ) as consumer:
        await asyncio.sleep(5)
    assert [b"a1"] == rabbit.waiting("dead")
    assert [[("a2", 0), ("a3", 0)]] == consumer.seen[2:]


async def test_a_handler_may_continue_after_a_failed_message(rabbit):
    """ACKed messages are acked; each requeued one is finished before the next."""
    rabbit.put(b"a1", b"a2", b"a3", b"a4")
    async with Orderly(
        failing(b"a1", b"a3", times=2), transport=rabbit.transport, batch_size=3
    ) as consumer:
        await asyncio.sleep(0.05)
        assert [b"a1", b"a3", b"a4"] == rabbit.unsettled()
        assert 2 == consumer.status().workers[0].held
        assert 1 == consumer.status().workers[0].buffered
        await asyncio.sleep(5)
    assert [
        [("a1", 0), ("a2", 0), ("a3", 0)],
        [("a1", 1)],
        [("a1", 2)],
        [("a3", 1)],
        [("a3", 2)],
        [("a4", 0)],
    ] == consumer.seen


async def test_a_nack_is_final(rabbit):
    """And so are failures that are mapped to NACK."""
    rabbit.put(b"a1", b"a2", b"b1", b"b2")
    async with Orderly(
        failing(b"a1", b"b1", stops=True),
        transport=rabbit.transport,
        batch_size=2,
        unhandled_exception_action=NACK,
    ) as consumer:
        await asyncio.sleep(5)
    assert [[("a1", 0), ("a2", 0)], [("b1", 0), ("b2", 0)]] == consumer.seen
    assert ([], []) == (rabbit.waiting(), rabbit.unsettled())


async def test_messages_without_a_key_are_requeued_normally(rabbit):
    """They have no order to keep: a copy goes to the back."""
    rabbit.put(b"?1", b"?2")
    async with Orderly(
        failing(b"?1", times=1), transport=rabbit.transport, batch_size=1
    ) as consumer:
        await asyncio.sleep(5)
    assert [[("?1", 0)], [("?2", 0)], [("?1", 1)]] == consumer.seen
    assert 3 == len(rabbit.times(EventKind.STORED))


async def test_a_timeout_is_retried_in_place(rabbit):
    """`process_timeout` cancels the handler; the first undecided message counts as the one that
    hung.
    """

    async def answer(messages):
        for message in messages:
            if message.body == b"a2" and message.retry_count == 0:
                await asyncio.sleep(1000)
            yield ACK

    rabbit.put(b"a1", b"a2", b"a3")
    async with Orderly(
        answer, transport=rabbit.transport, batch_size=3, process_timeout=2
    ) as consumer:
        await asyncio.sleep(10)
    assert [[("a2", 1)], [("a3", 0)]] == consumer.seen[1:]


async def test_a_failing_key_does_not_hold_up_others(rabbit):
    """During its pause, the handler slots are free for other keys."""
    rabbit.put(b"a1", b"a2", b"b1", b"b2", b"c1")
    async with Orderly(
        failing(b"a1"), transport=rabbit.transport, batch_size=1, prefetch_count=20
    ) as consumer:
        await asyncio.sleep(0.05)
        assert [[("a1", 0)], [("b1", 0)], [("b2", 0)], [("c1", 0)]] == consumer.seen
        assert [b"a1", b"a2"] == rabbit.unsettled()
        await asyncio.sleep(5)


async def test_a_prefetch_full_of_one_failing_key_continues_after_the_pause(rabbit):
    """No other message can come, and nothing is due before."""
    rabbit.put(*(b"a%d" % number for number in range(6)), b"b1")
    recorder = EventRecorder()
    async with Orderly(
        failing(b"a0", times=2),
        transport=rabbit.transport,
        observers=[recorder],
        batch_size=5,
        prefetch_count=3,
        batch_timeout=60,
    ) as consumer:
        await asyncio.sleep(120)
        assert [] == rabbit.unsettled()
    assert [("a0", 0), ("a1", 0), ("a2", 0)] == consumer.seen[0]
    assert [[("a0", 1)], [("a0", 2)]] == [batch for batch in consumer.seen if batch[0][1]]
    assert Trigger.PREFETCH in {event.trigger for event in recorder.of(BatchCut)}


async def test_a_stop_returns_held_messages(rabbit):
    """By nack, like unstarted messages: there is no time to retry."""
    rabbit.put(b"a1", b"a2", b"a3")
    script = ScriptedTransport()
    async with Orderly(
        failing(b"a1"), transport=script, batch_size=2, batch_timeout=0.1
    ) as consumer:
        script.last.feed(b"a1", b"a2", b"a3")
        await asyncio.sleep(0.05)
    assert [[("ack", (2,))], [("return", (1, 3))]] == script.details("settle")
    assert [[("a1", 0), ("a2", 0)]] == consumer.seen
    assert [] == script.details("publish")


async def test_messages_that_fail_during_a_drain_are_returned():
    """They are not retried, and no other batch of their key starts, even in a free slot."""
    script = ScriptedTransport()
    consumer = Orderly(taking(5, answering(REQUEUE)), transport=script, batch_size=1, concurrency=3)
    async with consumer:
        script.last.feed(b"a1", b"a2", b"a3", b"b1")
        await asyncio.sleep(1)
    assert [[("a1", 0)], [("b1", 0)]] == consumer.seen
    assert [[("return", (1, 2, 3, 4))]] == script.details("settle")
    assert [] == script.details("publish")


async def test_messages_exhausted_during_a_drain_are_dead_lettered(rabbit):
    """Their last attempt has been made."""
    rabbit.declare("dead")
    rabbit.bind("dead", "dlx", "", kind="fanout")
    rabbit.put(b"a1", b"a2")
    consumer = Orderly(
        taking(5, answering(REQUEUE)),
        transport=rabbit.transport,
        batch_size=1,
        max_requeue_attempts=0,
        dead_letter_exchange="dlx",
    )
    async with consumer:
        await asyncio.sleep(1)
    assert ([b"a1"], [b"a2"]) == (rabbit.waiting("dead"), rabbit.waiting())


async def test_a_lost_session_drops_held_messages(rabbit):
    """The broker delivers them again, and their counts, kept in memory only, start at zero."""
    rabbit.put(b"a1", b"a2")
    async with Orderly(
        failing(b"a1", times=2), transport=rabbit.transport, batch_size=1
    ) as consumer:
        await asyncio.sleep(0.01)
        assert 1 == consumer.status().workers[0].held
        rabbit.broker.cut()
        await asyncio.sleep(10)
        assert 0 == consumer.status().workers[0].held
    assert [[("a1", 0)], [("a1", 0)], [("a1", 1)], [("a2", 0)]] == consumer.seen
    assert ([], []) == (rabbit.waiting(), rabbit.unsettled())


async def test_a_handler_of_a_lost_session_keeps_its_key(rabbit):
    """The next session's batch of this key waits for it, even if a slot is free."""
    rabbit.put(b"a1", b"a2", b"b1")
    async with Orderly(
        taking(20), transport=rabbit.transport, batch_size=1, concurrency=3, prefetch_count=9
    ) as consumer:
        await asyncio.sleep(1)
        rabbit.broker.cut()
        await asyncio.sleep(100)
        assert [] == rabbit.unsettled()
    starts = [
        at
        for at, batch in zip(consumer.times, consumer.batches, strict=True)
        if batch[0][:1] == b"a"
    ]
    assert [b"a1", b"a1", b"a2"] == [body for body in consumer.handled if body[:1] == b"a"]
    assert [0, 20, 40] == starts


async def test_a_handler_that_ends_between_two_sessions_frees_its_key(rabbit):
    """The next session sees that the handler is gone."""
    script = ScriptedTransport()
    async with Orderly(taking(3), transport=script, batch_size=1, concurrency=2) as consumer:
        script.last.feed(b"a1")
        await asyncio.sleep(1)
        script.on_open = lambda: asyncio.sleep(10)
        script.last.end()
        await asyncio.sleep(20)
        script.last.feed(b"a1")
        await asyncio.sleep(5)
    assert [[("a1", 0)], [("a1", 0)]] == consumer.seen
    assert [[("ack", (1,))]] == script.details("settle")


async def test_failures_of_a_lost_session_are_not_retried(rabbit):
    """Their handler ends after the session, and the broker delivers the messages again."""
    script = ScriptedTransport()
    recorder = EventRecorder()
    answer = taking(3, answering(REQUEUE))
    async with Orderly(answer, transport=script, batch_size=1, observers=[recorder]) as consumer:
        script.last.feed(b"a1")
        await asyncio.sleep(1)
        script.last.end()
        await asyncio.sleep(60)
        assert 0 == consumer.status().workers[0].held
    assert [[("a1", 0)]] == consumer.seen
    assert [] == recorder.of(Requeued)


async def test_an_unconfirmed_dead_letter_does_not_hold_up_its_key(rabbit):
    """Its original waits by itself."""
    rabbit.declare("dead")
    rabbit.bind("dead", "dlx", "", kind="fanout")
    rabbit.broker.faults.on_publish(PublishFault.REFUSE)
    rabbit.put(b"a1", b"a2")
    async with Orderly(
        failing(b"a1", result=NACK),
        transport=rabbit.transport,
        batch_size=1,
        dead_letter_exchange="dlx",
    ) as consumer:
        await asyncio.sleep(1)
        assert [[("a1", 0)], [("a2", 0)]] == consumer.seen
        assert [b"a1"] == rabbit.unsettled()
        rabbit.broker.faults.clear(PublishFault.REFUSE)
        await asyncio.sleep(20)
        assert [] == rabbit.unsettled()
    assert [b"a1"] == rabbit.waiting("dead")


async def test_failed_messages_are_not_settled_early(rabbit):
    """With `settle="yield"`, in-place retries wait for the end of the handler."""

    async def answer(messages):
        for message in messages:
            await asyncio.sleep(1)
            first = message.retry_count == 0
            yield {b"a1": REQUEUE, b"a2": NACK}.get(message.body, ACK) if first else ACK

    rabbit.put(b"a1", b"a2", b"a3", b"a4")
    async with Orderly(
        answer, transport=rabbit.transport, batch_size=3, settle="yield"
    ) as consumer:
        await asyncio.sleep(2.5)
        assert [b"a1", b"a3", b"a4"] == rabbit.unsettled()
        await asyncio.sleep(0.8)
        assert [b"a1", b"a4"] == rabbit.unsettled()
        await asyncio.sleep(9)
        assert [] == rabbit.unsettled()
    assert [[("a1", 0), ("a2", 0), ("a3", 0)], [("a1", 1)], [("a4", 0)]] == consumer.seen
    assert 4 == len(rabbit.times(EventKind.STORED))


async def test_failed_messages_without_a_key_are_settled_early(rabbit):
    """They are requeued while their handler runs."""

    async def answer(messages):
        for message in messages:
            yield ACK if message.retry_count else REQUEUE
            await asyncio.sleep(2)

    rabbit.put(b"?1", b"?2")
    async with Orderly(answer, transport=rabbit.transport, batch_size=2, settle="yield"):
        await asyncio.sleep(1)
        assert 3 == len(rabbit.times(EventKind.STORED))
        await asyncio.sleep(20)
    assert [] == rabbit.unsettled()


async def test_failing_messages_are_isolated_and_then_retried_in_place(rabbit):
    """Each is a failure of its own; the messages after it wait for its retry."""

    async def answer(messages):
        if any(message.body in {b"a2", b"a5"} and not message.retry_count for message in messages):
            raise RuntimeError
        for _ in messages:
            yield ACK

    rabbit.put(*(b"a%d" % number for number in range(1, 9)))
    async with Orderly(
        answer, transport=rabbit.transport, batch_size=7, isolate_failures=True
    ) as consumer:
        await asyncio.sleep(10)
        assert [] == rabbit.unsettled()
    assert [
        "a1 a2 a3 a4 a5 a6 a7",
        "a1 a2 a3 a4",
        "a1 a2",
        "a1",
        "a2",
        "a2",  # its retry
        "a3 a4 a5 a6 a7 a8",
        "a3 a4 a5",
        "a3 a4",
        "a5",
        "a5",  # its retry
        "a6 a7 a8",
    ] == [" ".join(body for body, _ in run) for run in consumer.seen]
    assert [[("a2", 1)], [("a5", 1)]] == [run for run in consumer.seen if run[0][1]]
    assert 8 == len(rabbit.times(EventKind.ACKED))


async def test_isolation_waits_for_a_message_that_the_handler_requeued(rabbit):
    """It yields REQUEUE for the first message, and fails at a later one, which is NACKed alone."""

    async def answer(messages):
        for message in messages:
            if message.body == b"a3":
                raise ValueError
            yield ACK if message.body != b"a1" or message.retry_count else REQUEUE

    class Mapped(Orderly):
        exception_results = {ValueError: NACK}  # noqa: RUF012

    rabbit.put(b"a1", b"a2", b"a3", b"a4")
    async with Mapped(
        answer,
        transport=rabbit.transport,
        batch_size=4,
        isolate_failures=True,
        dead_letter_queue="dead",
    ) as consumer:
        await asyncio.sleep(10)
        assert [] == rabbit.unsettled()
    assert [
        [("a1", 0), ("a2", 0), ("a3", 0), ("a4", 0)],
        [("a1", 1)],
        [("a3", 0), ("a4", 0)],
        [("a3", 0)],
        [("a4", 0)],
    ] == consumer.seen
    assert [b"a3"] == rabbit.waiting("dead")


async def test_a_failed_atomic_batch_is_retried_from_its_beginning(rabbit):
    """Its ACKs are void, so its first message is the first undecided one."""
    rabbit.put(b"a1", b"a2", b"a3")
    async with Orderly(
        failing(b"a2", times=1, stops=True),
        transport=rabbit.transport,
        batch_size=3,
        settle="atomic",
    ) as consumer:
        await asyncio.sleep(5)
        assert [] == rabbit.unsettled()
    assert [[("a1", 1)], [("a2", 0), ("a3", 0)]] == consumer.seen[1:]


async def test_single_messages_keep_the_order_of_their_key(rabbit):
    """A `Consumer` with `concurrency` handles one message per key at a time."""
    seen = []

    class KeyedSingleConsumer(SingleConsumer):
        def batch_key(self, message):
            return message.body[:1]

    async def answer(message):
        seen.append((message.body.decode(), message.retry_count))
        await asyncio.sleep(1)
        if message.body == b"a1" and message.retry_count < 2:
            raise RuntimeError
        return ACK

    rabbit.put(b"a1", b"a2", b"b1", b"b2")
    async with KeyedSingleConsumer(
        answer,
        transport=rabbit.transport,
        concurrency=4,
        ordered_by_key=True,
        unhandled_exception_action=MessageResult.REQUEUE,
    ):
        await asyncio.sleep(20)
    assert [("a1", 0), ("a1", 1), ("a1", 2), ("a2", 0)] == [e for e in seen if e[0][0] == "a"]
    assert [("b1", 0), ("b2", 0)] == [e for e in seen if e[0][0] == "b"]
    assert ([], []) == (rabbit.waiting(), rabbit.unsettled())


async def test_held_messages_count_for_health(rabbit):
    """Their age counts from their delivery."""
    rabbit.put(b"a1")
    async with Orderly(
        failing(b"a1"), transport=rabbit.transport, max_requeue_attempts=50, stuck_after=30
    ) as consumer:
        await asyncio.sleep(29)
        assert consumer.is_healthy
        await asyncio.sleep(10)
        assert not consumer.is_healthy
        assert 38 <= consumer.status().workers[0].oldest


async def test_the_order_is_kept_if_nothing_fails(rabbit):
    """With many keys and many handler slots."""
    rabbit.put(*(b"%c%d" % (65 + number % 7, number) for number in range(70)))
    async with Orderly(ack, transport=rabbit.transport, batch_size=3, concurrency=4) as consumer:
        await asyncio.sleep(10)
        assert [] == rabbit.unsettled()
    for key in "ABCDEFG":
        numbers = [int(body[1:]) for body in consumer.handled if body[:1] == key.encode()]
        assert sorted(numbers) == numbers
    assert 70 == len(consumer.handled)
