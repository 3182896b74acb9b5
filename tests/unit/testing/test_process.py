"""`process` returns what a worker would do with the messages."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aio_pika_batch import (
    BatchConsumer,
    BatchConsumerSettings,
    ConfigurationError,
    Consumer,
    ConsumerSettings,
    DeadLetterReason,
    DrainIncomplete,
    HandlerTimeout,
    MessageDecodeError,
    MessageResult,
    Nack,
    Requeue,
    ResultError,
    SessionLost,
)
from aio_pika_batch.adapters.memory import MemoryTransport
from aio_pika_batch.observer import Requeued, Settled
from aio_pika_batch.testing import BatchBroker, DeadLetter, make_message, process
from aio_pika_batch.testing.strategies import messages, results
from aio_pika_batch.testing.virtual_time import run
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
    bodies,
    first_then,
    numbered,
    taking,
)


def recording_consumer(
    answer: Any = ack, cls: type[RecordingConsumer] = RecordingConsumer, **given: Any
) -> RecordingConsumer:
    """Return a consumer without a broker."""
    return cls(answer, transport=None, **given)


async def test_each_result_has_its_list():
    """Each message is in exactly one of four lists; `results` has all of them, in order."""
    answer = answering(ACK, Nack("no good"), REQUEUE, REQUEUE_IMMEDIATE)
    outcome = await process(recording_consumer(answer, dead_letter_queue="dead"), numbered(4))

    assert [b"0"] == bodies(outcome.acked)
    assert [b"1"] == bodies(outcome.nacked)
    assert [b"1"] == bodies(outcome.dead_lettered)
    assert [b"2", b"3"] == bodies(outcome.requeued)
    assert [] == outcome.discarded
    assert [ACK, Nack("no good"), REQUEUE, REQUEUE_IMMEDIATE] == outcome.results
    assert [] == outcome.errors


async def test_a_requeued_message_has_its_delay_and_retry_count():
    """As its copy's header and wait queue would have; REQUEUE_IMMEDIATE counts nothing."""
    given = [
        make_message(b"0"),
        make_message(b"1", headers={"x-retry-count": 1}),
        b"2",
        make_message(b"3", headers={"x-retry-count": 2}),
    ]
    answer = answering(REQUEUE, REQUEUE, Requeue(delay=6), REQUEUE_IMMEDIATE)
    outcome = await process(recording_consumer(answer, requeue_delay=2), given)

    assert [(1, 2.0, False), (2, 4.0, False), (1, 8.0, False), (2, 0.0, True)] == [
        (each.retry_count, each.delay, each.immediate) for each in outcome.requeued
    ]


async def test_without_a_delay_retries_do_not_wait():
    """The default."""
    outcome = await process(recording_consumer(answering(REQUEUE)), [b"0"])
    assert [0.0] == [each.delay for each in outcome.requeued]


async def test_a_requeue_without_attempts_left_is_a_dead_letter():
    """It is not in `nacked`, since the handler wanted a retry."""
    spent = make_message(b"0", headers={"x-retry-count": 3})
    outcome = await process(
        recording_consumer(answering(REQUEUE), dead_letter_queue="dead"), [spent]
    )

    [letter] = outcome.dead_lettered
    assert DeadLetterReason.EXHAUSTED is letter.reason
    assert (spent, b"0", 3) == (letter.message, letter.body, letter.headers["x-retry-count"])
    assert [] == outcome.nacked
    assert [] == outcome.requeued


async def test_a_dead_letter_has_its_destination_and_reason():
    """Exchange, original routing key and headers, as they would be published."""
    given = make_message(b"0", exchange="events", routing_key="order.created")
    handler = answering(error=ValueError("no stock"))
    consumer = recording_consumer(
        handler, dead_letter_exchange="dlx", unhandled_exception_action=NACK
    )
    outcome = await process(consumer, [given])

    [letter] = outcome.dead_lettered
    assert isinstance(letter, DeadLetter)
    assert DeadLetterReason.HANDLER_ERROR is letter.reason
    assert ("dlx", "order.created") == (letter.exchange, letter.routing_key)
    assert "no stock" == letter.headers["x-exception-message"]
    assert "jobs" == letter.headers["x-original-queue"]


async def test_without_a_dead_letter_exchange_a_nack_discards():
    """It is not a dead letter, since nothing would keep it."""
    spent = make_message(b"1", headers={"x-retry-count": 3})
    outcome = await process(recording_consumer(answering(NACK, REQUEUE)), [b"0", spent])

    assert [b"0"] == bodies(outcome.nacked)
    assert [b"0", b"1"] == bodies(outcome.discarded)
    assert [] == outcome.dead_lettered


async def test_errors_are_returned_not_raised():
    """Results yielded before count; the rest gets the configured action."""
    error = ValueError("no")
    outcome = await process(recording_consumer(answering(ACK, error=error)), numbered(3))

    assert [error] == outcome.errors
    assert [b"0"] == bodies(outcome.acked)
    assert [b"1", b"2"] == bodies(outcome.requeued)


@pytest.mark.parametrize(
    ("handler", "kind"),
    [
        (answering(ACK), ResultError),
        (answering(ACK, "yes"), ResultError),
        (answering(ACK, ACK, ACK), ResultError),
        (taking(60), HandlerTimeout),
    ],
    ids=["too few", "no result", "too many", "too slow"],
)
async def test_every_kind_of_failure_is_an_error(handler, kind):
    """A missing result is never an ACK."""
    outcome = await process(recording_consumer(handler, process_timeout=5), numbered(2))
    assert [kind] == [kind if isinstance(each, kind) else each for each in outcome.errors]


async def test_exception_results_apply():
    """By the class of the exception."""

    class Choosy(RecordingConsumer):
        exception_results = {LookupError: NACK}  # noqa: RUF012  -- as users write it

    outcome = await process(recording_consumer(answering(error=KeyError("x")), Choosy), [b"0"])
    assert [NACK] == outcome.results


async def test_an_undecodable_message_fails_alone():
    """The others are run again without it."""

    class Reader(RecordingConsumer):
        async def process_messages(self, messages):
            for message in messages:
                message.json()
                yield ACK

    outcome = await process(
        recording_consumer(cls=Reader, dead_letter_queue="dead"), [b"1", b"oops", b"2", b"3"]
    )
    assert [b"1", b"2", b"3"] == bodies(outcome.acked)
    assert [(b"oops", DeadLetterReason.UNDECODABLE)] == [
        (each.body, each.reason) for each in outcome.dead_lettered
    ]
    assert [[b"1", b"oops", b"2", b"3"], [b"2", b"3"]] == list(map(bodies, outcome.batches))
    [error] = outcome.errors
    assert isinstance(error, MessageDecodeError)


async def test_isolate_failures_finds_the_failing_messages():
    """In halves, as a worker does it."""

    async def bulk(messages):
        if b"3" in bodies(messages):
            raise ValueError
        for _ in messages:
            yield ACK

    outcome = await process(recording_consumer(bulk, isolate_failures=True), numbered(4))
    assert [b"0", b"1", b"2"] == bodies(outcome.acked)
    assert [b"3"] == bodies(outcome.requeued)
    assert [b"3"] == bodies(outcome.batches[-1])


async def test_an_atomic_batch_is_all_or_nothing():
    """If it fails, its ACKs are void."""
    consumer = recording_consumer(answering(ACK, error=ValueError()), settle="atomic")
    outcome = await process(consumer, numbered(2))
    assert [] == outcome.acked
    assert [b"0", b"1"] == bodies(outcome.requeued)


async def test_batches_are_cut_as_the_settings_say():
    """Full ones, and one with the rest, without waiting for its timeout."""
    consumer = RecordingConsumer(transport=None, batch_size=2)
    outcome = await process(consumer, numbered(5))

    assert [[b"0", b"1"], [b"2", b"3"], [b"4"]] == consumer.batches
    assert consumer.batches == list(map(bodies, outcome.batches))
    assert numbered(5) == bodies(outcome.acked)
    assert 0 == asyncio.get_running_loop().time()


class ByFirstLetter(RecordingConsumer):
    """The key of a message is its first letter; `?` has none."""

    def batch_key(self, message):
        if message.body == b"?":
            raise LookupError(message.body)
        return message.body[:1]


async def test_batches_hold_one_key():
    """The lists of the outcome are in the order of the given messages nevertheless."""
    consumer = ByFirstLetter(transport=None)
    outcome = await process(consumer, [b"a1", b"b1", b"a2"])
    assert [[b"a1", b"a2"], [b"b1"]] == consumer.batches
    assert [b"a1", b"b1", b"a2"] == bodies(outcome.acked)


async def test_a_message_whose_batch_key_raises_fails_alone():
    """No handler gets it."""
    outcome = await process(ByFirstLetter(transport=None), [b"a", b"?"])
    assert [b"a"] == bodies(outcome.acked)
    assert [b"?"] == bodies(outcome.requeued)
    assert [LookupError] == list(map(type, outcome.errors))
    assert [[b"a"]] == list(map(bodies, outcome.batches))


async def test_ordered_messages_are_retried_in_place():
    """Without the pauses; later messages of the key wait."""
    answer = first_then(answering(error=ValueError()), answering(REQUEUE), answering(ACK))
    consumer = recording_consumer(answer, ByFirstLetter, ordered_by_key=True, batch_size=1)
    outcome = await process(consumer, [b"a1", b"a2"])

    assert [[b"a1"], [b"a1"], [b"a1"], [b"a2"]] == consumer.batches
    assert [0, 1, 2] == [each.retry_count for each in consumer.messages[:3]]
    assert [b"a1", b"a2"] == bodies(outcome.acked)
    assert 0 == asyncio.get_running_loop().time()


async def test_ordered_messages_are_dead_lettered_when_exhausted():
    """With all attempts counted."""
    given = make_message(b"a1")
    consumer = recording_consumer(
        answering(REQUEUE), ByFirstLetter, ordered_by_key=True, dead_letter_queue="dead"
    )
    outcome = await process(consumer, [given])
    [letter] = outcome.dead_lettered
    assert given is letter.message
    assert (DeadLetterReason.EXHAUSTED, 3) == (letter.reason, letter.headers["x-retry-count"])


async def test_a_single_message_consumer_gets_messages_one_by_one():
    """Errors of one message do not affect the others."""

    async def answer(message):
        if message.body == b"1":
            raise ValueError
        return ACK

    outcome = await process(SingleConsumer(answer, transport=None), numbered(3))
    assert [[b"0"], [b"1"], [b"2"]] == list(map(bodies, outcome.batches))
    assert [b"0", b"2"] == bodies(outcome.acked)
    assert [b"1"] == bodies(outcome.requeued)


async def test_the_lists_hold_the_given_message_objects():
    """With delivery tags as in a session."""
    given = [make_message(b"same"), make_message(b"same")]
    outcome = await process(recording_consumer(answering(ACK, NACK)), given)
    assert [given[0]] == outcome.acked
    assert [given[1]] == outcome.nacked
    assert [1, 2] == [each.delivery_tag for each in given]


async def test_passing_a_message_twice_is_an_error():
    """A broker never delivers the same message object twice."""
    message = make_message(b"x")
    with pytest.raises(ValueError, match="occurs twice"):
        await process(recording_consumer(), [message, message])


async def test_without_messages_there_is_no_batch():
    """The hooks run nevertheless."""
    outcome = await process(recording_consumer(), [])
    assert [] == outcome.results == outcome.batches


class Hooked(RecordingConsumer):
    """Records its hooks."""

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        self.steps: list[str] = []

    async def on_start(self):
        self.steps.append("start")
        await self.publish(b"here I am", routing_key="log")

    async def on_stop(self):
        self.steps.append("stop")

    async def process_messages(self, messages):
        self.steps.append("handle")
        assert self.is_running
        await self.publish(messages[0].body, exchange="copies", headers={"a": 1})
        yield ACK


async def test_hooks_run_around_it():
    """Once in each call."""
    consumer = Hooked(transport=None)
    for _ in range(2):
        await process(consumer, [b"0"])
    assert 2 * ["start", "handle", "stop"] == consumer.steps
    assert not consumer.is_running


async def test_hooks_can_be_left_out():
    """A test may have replaced what they open."""
    consumer = Hooked(transport=None)
    await process(consumer, [b"0"], hooks=False)
    assert ["handle"] == consumer.steps


async def test_publications_are_recorded():
    """They go nowhere, and count as confirmed."""
    outcome = await process(Hooked(transport=None), [b"0"])
    assert [("", "log", b"here I am"), ("copies", "", b"0")] == [
        (each.exchange, each.routing_key, each.body) for each in outcome.published
    ]


async def test_an_error_of_a_hook_is_raised():
    """If `on_start` fails, nothing else runs."""

    class Broken(Hooked):
        async def on_start(self):
            raise OSError("no database")

    consumer = Broken(transport=None)
    with pytest.raises(OSError, match="no database"):
        await process(consumer, [b"0"])
    assert [] == consumer.steps
    assert not consumer.is_running


async def test_an_on_stop_that_takes_too_long_is_an_error():
    """It is cut off after `shutdown_timeout`, as in a running consumer."""

    class Lingering(Hooked):
        async def on_stop(self):
            await asyncio.sleep(3600)

    with pytest.raises(DrainIncomplete, match="on_stop was cut off"):
        await process(Lingering(transport=None), [b"0"])
    assert asyncio.get_running_loop().time() < 60


async def test_a_handler_may_stop_its_consumer():
    """`stop` returns at once, as in a worker."""

    class Quitter(Hooked):
        async def process_messages(self, messages):
            await self.stop()
            self.steps.append("stopped")
            yield ACK

    consumer = Quitter(transport=None)
    outcome = await process(consumer, [b"0"])
    assert [b"0"] == bodies(outcome.acked)
    assert ["start", "stopped", "stop"] == consumer.steps


async def test_a_running_consumer_is_refused():
    """Its broker shows what it does."""
    broker = BatchBroker()
    async with RecordingConsumer(transport=broker.transport) as consumer:
        with pytest.raises(ConfigurationError, match="RecordingConsumer is running"):
            await process(consumer, [b"0"])
        assert consumer.is_running


async def test_observers_get_the_handlers_events():
    """And none of a session, since there is none."""
    recorder = EventRecorder()
    consumer = RecordingConsumer(
        answering(error=ValueError()), transport=None, observers=[recorder]
    )
    await process(consumer, [b"0"])
    assert ["BatchCut", "HandlerError", "BatchHandled"] == [
        type(event).__name__ for _, event in recorder.seen
    ]


async def test_a_handler_that_ignores_its_cancellation_raises_session_lost():
    """A worker would give up its session, so there is no outcome."""
    forever = asyncio.Event()

    async def stubborn(messages):
        while not forever.is_set():
            try:
                await forever.wait()
            except asyncio.CancelledError:
                continue
        for _ in messages:
            yield ACK

    with pytest.raises(SessionLost, match="was cancelled at process_timeout and still runs"):
        await process(recording_consumer(stubborn, process_timeout=1), [b"0"])
    assert 6.0 == asyncio.get_running_loop().time()
    forever.set()
    await asyncio.sleep(0)


async def test_cancelling_process_cancels_the_handler():
    """The handler cleans up, and `on_stop` runs."""
    seen = []

    class Slow(Hooked):
        async def process_messages(self, messages):
            try:
                await asyncio.sleep(3600)
            finally:
                seen.append("cleaned up")
            yield ACK

    consumer = Slow(transport=None)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await process(consumer, [b"0"])
    assert ["cleaned up"] == seen
    assert ["start", "stop"] == consumer.steps


def test_it_runs_on_any_event_loop():
    """It needs no virtual time."""

    class Plain(BatchConsumer):
        async def process_messages(self, messages):
            for _ in messages:
                yield MessageResult.ACK

    consumer = Plain(BatchConsumerSettings(_env_file=None, url="memory://", queue_name="orders"))
    with asyncio.Runner() as runner:
        outcome = runner.run(process(consumer, numbered(3)))
    assert numbered(3) == bodies(outcome.acked)


async def test_the_consumers_retry_count_header_applies():
    """To messages that `make_message` made without one; an explicit one stays."""
    given = [
        make_message(b"0", headers={"tries": 2}),
        make_message(
            b"1", queue="other", headers={"tries": 2, "mine": 1}, retry_count_header="mine"
        ),
    ]
    consumer = recording_consumer(
        answering(REQUEUE, REQUEUE), retry_count_header="tries", queue_name="orders"
    )
    outcome = await process(consumer, given)
    assert [("orders", 2), ("other", 1)] == [(each.queue, each.retry_count) for each in given]
    assert [3, 3] == [each.retry_count for each in outcome.requeued]


@given(st.lists(st.tuples(messages(), results), max_size=6), st.booleans())
def test_every_message_is_in_one_list(decided, knows_dead_letters):
    """Whatever the messages and the results are."""
    given_messages = [message for message, _ in decided]
    answers = [result for _, result in decided]
    more = {"dead_letter_exchange": "dlx"} if knows_dead_letters else {}
    consumer = RecordingConsumer(answering(*answers), transport=MemoryTransport(), **more)
    outcome = run(process(consumer, given_messages))

    fates = [
        *outcome.acked,
        *(each.message for each in outcome.requeued),
        *(each.message for each in outcome.dead_lettered),
        *outcome.discarded,
    ]
    assert sorted(map(id, given_messages)) == sorted(map(id, fates))
    assert answers == outcome.results
    assert [
        message for message, result in decided if result is NACK or isinstance(result, Nack)
    ] == outcome.nacked
    assert not (outcome.discarded and knows_dead_letters)


@given(
    st.lists(st.sampled_from([ACK, NACK, REQUEUE]), max_size=12),
    st.integers(1, 4),
    st.sampled_from(["auto", "amqp10"]),
)
def test_the_outcome_is_that_of_a_worker(answers, batch_size, wire):
    """A worker on a broker does to each message what `process` says."""
    by_body = {b"%d" % at: answer for at, answer in enumerate(answers)}

    async def answer(messages):
        for message in messages:
            yield by_body[message.body] if message.retry_count == 0 else ACK

    async def scenario():
        broker, observed = BatchBroker(wire=wire), EventRecorder()
        worker = RecordingConsumer(
            answer,
            transport=broker.transport,
            observers=[observed],
            batch_size=batch_size,
            dead_letter_queue="dead",
            queue_type="quorum",
            wire=wire,
        )
        outcome = await process(worker, list(by_body))
        assert [] == observed.of(Settled)
        await worker.start()
        await worker.stop()
        broker.publish(*by_body, routing_key="jobs")
        async with worker:
            await broker.settled()
        return outcome, observed, broker

    outcome, observed, broker = run(scenario())
    retried = [each.message.body for each in observed.of(Requeued)]
    assert sorted(bodies(outcome.requeued)) == sorted(retried)
    dead = broker.drain("dead")
    assert sorted(bodies(outcome.dead_lettered)) == sorted(bodies(dead))
    # Only a copy names its original's route itself.
    copied = {"x-original-routing-key" not in each.headers for each in dead}
    assert copied == {each.native for each in outcome.dead_lettered}
    assert {each.native for each in outcome.requeued} <= {wire == "amqp10"}
    assert [] == broker.drain("jobs")
    assert [body for body, said in by_body.items() if said is ACK] == bodies(outcome.acked)


def test_settings_are_those_of_the_consumer():
    """Also with a consumer of single messages."""

    class One(Consumer):
        async def process_message(self, message):
            raise ValueError(message.body)

    has = ConsumerSettings(
        _env_file=None, url="memory://", queue_name="q", unhandled_exception_action=NACK
    )
    assert [NACK] == run(process(One(has), [b"0"])).results


QUORUM = {"queue_type": "quorum", "dead_letter_queue": "dead", "wire": "amqp10"}


async def test_over_amqp_1_0_retries_and_dead_letters_are_the_originals():
    """The outcome says so, with the delays, counts, routes and headers that they get."""
    answer = answering(Requeue(delay=2.34), REQUEUE, Nack("no good"), REQUEUE_IMMEDIATE)
    some = [make_message(b"%d" % n, headers={"x-own": n}, routing_key="orders") for n in range(4)]

    outcome = await process(recording_consumer(answer, **QUORUM), some)

    first, second, third = outcome.requeued
    assert (1, True) == (first.retry_count, first.native)
    assert first.delay == pytest.approx(2.4)
    assert (1, 1.0, True) == (second.retry_count, second.delay, second.native)
    assert (True, False) == (third.immediate, third.native)
    [letter] = outcome.dead_lettered
    assert ("jobs.dlx", "orders", True) == (letter.exchange, letter.routing_key, letter.native)
    assert (2, "no good") == (letter.headers["x-own"], letter.headers["x-dead-letter-detail"])
    assert isinstance(letter.headers["x-dead-lettered-at"], int)


@pytest.mark.parametrize(
    ("version", "given", "native"),
    [
        ("3.10", {}, False),
        ("4.0", {}, False),
        ("4.0", {"queue_arguments": {"x-delivery-limit": -1}}, True),
        ("4.3", {"queue_type": "classic"}, False),
        ("4.3", {"wire": "auto"}, False),
        ("4.3", {"consumer_arguments": {"x-consumer-timeout": 1000}}, False),
        ("4.3", {"retry_count_header": "retries"}, False),
    ],
)
async def test_retries_are_copies_where_amqp_1_0_is_not_used(version, given, native):
    """As in a worker: the queue, the version and the settings decide."""
    consumer = recording_consumer(answering(REQUEUE, NACK), **(QUORUM | given))

    outcome = await process(consumer, numbered(2), version=version)

    assert [native] == [each.native for each in outcome.requeued]
    assert [native] == [each.native for each in outcome.dead_lettered]


async def test_a_dead_letter_is_a_copy_where_the_queue_could_lose_it():
    """Its arguments name no dead-letter exchange; a retry still needs no copy."""
    given = QUORUM | {"broker_dead_letters": False}

    outcome = await process(recording_consumer(answering(REQUEUE, NACK), **given), numbered(2))

    assert [True] == [each.native for each in outcome.requeued]
    assert [False] == [each.native for each in outcome.dead_lettered]
