"""What the results of a handler do, including missing and invalid ones."""

from __future__ import annotations

import asyncio
import logging

import pytest

from aio_pika_batch import (
    BatchConsumer,
    Cause,
    ConfigurationError,
    Consumer,
    MessageDecodeError,
    MessageResult,
    Nack,
    Requeue,
    ResultError,
)
from aio_pika_batch.adapters.memory import EventKind
from aio_pika_batch.core.message import Properties
from aio_pika_batch.observer import BatchHandled, HandlerError, Settled
from tests.unit.core.strategies import a_message
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
    first_then,
    numbered,
    settings,
    taking,
)


class Unavailable(RuntimeError):
    """Raised by handlers."""


class Odd(RuntimeError):
    """An exception whose `__str__` raises."""

    def __str__(self):
        raise AttributeError


async def settled_by(rabbit, answer, count=3, **given):
    """Give one batch to a handler, and later ones to one that ACKs; return what was settled."""
    recorder = EventRecorder()
    rabbit.put(*numbered(count))
    consumer = RecordingConsumer(
        first_then(answer, taking(1)),
        transport=rabbit.transport,
        observers=[recorder],
        batch_size=count,
        batch_timeout=1,
        **given,
    )
    async with consumer:
        await asyncio.sleep(5)
    return recorder.of(Settled)[0].counts, consumer, recorder


def journal(rabbit, *kinds):
    """Return the messages of an event kind."""
    return [event.body for event in rabbit.broker.journal.of(*kinds, queue="jobs")]


async def test_the_nth_yield_is_the_result_of_the_nth_message(rabbit):
    """Each message is settled with its own result."""
    answer = answering(ACK, NACK, REQUEUE_IMMEDIATE)
    counts, consumer, _ = await settled_by(rabbit, answer)
    assert {
        (ACK, Cause.HANDLER): 1,
        (NACK, Cause.HANDLER): 1,
        (REQUEUE_IMMEDIATE, Cause.HANDLER): 1,
    } == counts
    assert [b"0", b"2"] == journal(rabbit, EventKind.ACKED)
    assert [b"1"] == journal(rabbit, EventKind.DROPPED)
    assert [b"2"] == journal(rabbit, EventKind.REQUEUED)
    assert [numbered(3), [b"2"]] == consumer.batches
    assert not consumer.messages[2].redelivered
    assert consumer.messages[3].redelivered


async def test_pairs_name_their_message(rabbit):
    """A handler that works in any order yields `(message, result)`."""

    async def answer(messages):
        yield messages[2], ACK
        yield messages[0], NACK
        yield messages[1], ACK

    counts, _, _ = await settled_by(rabbit, answer)
    assert {(ACK, Cause.HANDLER): 2, (NACK, Cause.HANDLER): 1} == counts
    assert [b"0"] == journal(rabbit, EventKind.DROPPED)


async def test_results_with_a_reason_count_like_those_without(rabbit):
    """`Nack(…)` is NACK, `Requeue(…)` is REQUEUE."""
    counts, _, _ = await settled_by(rabbit, answering(Nack("bad"), Requeue("later"), ACK))
    assert {
        (NACK, Cause.HANDLER): 1,
        (REQUEUE, Cause.HANDLER): 1,
        (ACK, Cause.HANDLER): 1,
    } == counts


async def test_a_missing_result_is_never_an_ack(rabbit, caplog):
    """The rest gets `unhandled_exception_action`, and the log says how many are missing."""
    counts, consumer, _ = await settled_by(rabbit, answering(ACK, ACK), count=5)
    assert {(ACK, Cause.HANDLER): 2, (REQUEUE, Cause.MISSING): 3} == counts
    assert [numbered(5), numbered(3, 2)] == consumer.batches
    assert "2 results for 5 messages" in caplog.text


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda messages: (ACK, ACK, ACK, ACK), "result 4"),
        (lambda messages: (ACK, None), "None is not a result"),
        (lambda messages: (ACK, "ack"), "'ack' is not a result"),
        (lambda messages: (ACK, (messages[1], ACK)), "use one of the two forms"),
        (lambda messages: ((messages[0], ACK), ACK), "use one of the two forms"),
        (lambda messages: ((messages[0], ACK), (messages[0], NACK)), "a second result"),
        (lambda messages: ((messages[0], ACK), (a_message(), ACK)), "not in this batch"),
    ],
    ids=["too many", "none", "unknown", "mixed", "mixed again", "twice", "foreign"],
)
async def test_an_invalid_result_is_logged_and_counted(rabbit, caplog, wrong, told):
    """Valid results before it are kept; the rest gets `unhandled_exception_action`."""

    async def answer(messages):
        for each in wrong(messages):
            yield each

    counts, _, recorder = await settled_by(rabbit, answer)
    decided = 3 if told == "result 4" else 1
    assert counts.pop((ACK, Cause.HANDLER)) == decided
    assert counts == ({} if decided == 3 else {(REQUEUE, Cause.INVALID): 2})
    [event] = recorder.of(HandlerError)
    assert isinstance(event.error, ResultError)
    assert told in str(event.error)
    assert event.error is recorder.of(BatchHandled)[0].error
    assert told in caplog.text


@pytest.mark.parametrize("action", [REQUEUE, NACK, REQUEUE_IMMEDIATE])
async def test_an_exception_affects_undecided_messages_only(rabbit, caplog, action):
    """Results yielded before it count, and the log has its traceback."""
    answer = answering(ACK, error=Unavailable("the database"))
    counts, consumer, _ = await settled_by(rabbit, answer, unhandled_exception_action=action)
    assert {(ACK, Cause.HANDLER): 1, (action, Cause.EXCEPTION): 2} == counts
    rest = [] if action is NACK else [numbered(2, 1)]
    assert [numbered(3), *rest] == consumer.batches
    assert ([b"1", b"2"] if action is NACK else []) == journal(rabbit, EventKind.DROPPED)
    [record] = [each for each in caplog.records if each.levelno >= logging.ERROR]
    assert isinstance(record.exc_info[1], Unavailable)
    assert "the database" in record.getMessage()


async def test_an_exception_before_the_first_yield_counts_too(rabbit):
    """Even if the handler is not a generator, and raises when it is called."""

    def answer(messages):
        raise Unavailable

    counts, _, _ = await settled_by(rabbit, answer)
    assert {(REQUEUE, Cause.EXCEPTION): 3} == counts


async def test_exception_results_the_most_specific_class_wins(rabbit):
    """Subclasses count as their base class; other exceptions get the general action."""

    class Listed(RecordingConsumer):
        exception_results = {  # noqa: RUF012
            Exception: REQUEUE_IMMEDIATE,
            LookupError: NACK,
            KeyError: ACK,
        }

    recorder = EventRecorder()
    consumer = Listed(
        first_then(
            taking(0, answering(error=KeyError())),
            taking(0, answering(error=IndexError())),
            taking(0, answering(error=OSError())),
            ack,
        ),
        transport=rabbit.transport,
        observers=[recorder],
        batch_size=1,
    )
    rabbit.put(*numbered(3))
    async with consumer:
        await asyncio.sleep(1)
    told = [event.counts for event in recorder.of(Settled)][:3]
    expected = [ACK, NACK, REQUEUE_IMMEDIATE]
    assert [{(each, Cause.EXCEPTION): 1} for each in expected] == told


async def test_exception_results_are_for_exceptions_only(rabbit):
    """A missing or invalid result gets the general action."""

    class Listed(RecordingConsumer):
        exception_results = {Exception: ACK}  # noqa: RUF012

    recorder = EventRecorder()
    rabbit.put(*numbered(3))
    async with Listed(
        first_then(ack, taking(0, answering()), taking(0, answering("nonsense")), taking(0)),
        transport=rabbit.transport,
        observers=[recorder],
        batch_size=1,
        unhandled_exception_action=NACK,
    ):
        await asyncio.sleep(1)
    told = [event.counts for event in recorder.of(Settled)]
    assert [{(NACK, Cause.MISSING): 1}, {(NACK, Cause.INVALID): 1}] == told[1:]


async def test_an_exception_whose_str_raises_is_handled_like_others(rabbit, caplog):
    """Its text is not needed to settle undecided messages."""
    counts, _, _ = await settled_by(rabbit, answering(ACK, error=Odd()))
    assert {(ACK, Cause.HANDLER): 1, (REQUEUE, Cause.EXCEPTION): 2} == counts
    assert 1 == len(rabbit.times(EventKind.CONSUMING))
    assert "Odd" in caplog.text


async def test_a_foreign_cancellation_is_handled_like_an_exception(rabbit):
    """Client libraries cancel their own futures; a handler that does not catch that has failed."""

    async def answer(messages):
        yield ACK
        raise asyncio.CancelledError

    counts, consumer, _ = await settled_by(rabbit, answer)
    assert {(ACK, Cause.HANDLER): 1, (REQUEUE, Cause.EXCEPTION): 2} == counts
    assert [numbered(3), numbered(2, 1)] == consumer.batches


async def test_an_undecodable_message_is_isolated(rabbit):
    """Only this message is dead-lettered; the other undecided ones are run again at once."""

    async def answer(messages):
        for message in messages:
            message.json()
            yield ACK

    rabbit.put(b"1", b"{", b"2", b"[", b"3")
    recorder = EventRecorder()
    async with RecordingConsumer(
        answer, transport=rabbit.transport, observers=[recorder], batch_size=5
    ) as consumer:
        await asyncio.sleep(1)
    assert [[b"1", b"{", b"2", b"[", b"3"], [b"2", b"3"]] == consumer.batches
    assert [0, 0] == consumer.times
    [event] = recorder.of(Settled)
    assert {(ACK, Cause.HANDLER): 3, (NACK, Cause.UNDECODABLE): 2} == event.counts
    assert [b"{", b"["] == journal(rabbit, EventKind.DROPPED)


@pytest.mark.untraced
async def test_thousands_of_undecodable_messages_cost_one_more_run(rabbit):
    """Not a run for each of them, which would block the event loop for minutes."""
    runs = []

    async def answer(messages):
        runs.append(len(messages))
        for message in messages:
            message.json()
            yield ACK

    rabbit.put(*(b"{}" if number % 2 else b"no json" for number in range(3000)))
    async with RecordingConsumer(
        answer,
        transport=rabbit.transport,
        batch_size=3000,
        batch_timeout=0.1,
        dead_letter_queue="dead",
    ):
        await asyncio.sleep(10)
    assert [3000, 1500] == runs
    assert [b"no json"] * 1500 == rabbit.waiting("dead")


async def test_only_messages_of_the_same_kind_are_undecodable_in_the_same_way(rabbit):
    """A handler may not want JSON from others; and its own error is about one message only."""

    async def answer(messages):
        for message in messages:
            if message.content_type == "application/json":
                message.json()
            elif message.body == b"wrong":
                raise MessageDecodeError(message, "body", "not what I expect")
            yield ACK

    rabbit.put(b"[", b"[", properties=Properties(content_type="application/json"))
    rabbit.put(b"text", b"wrong", b"text", properties=Properties(content_type="text/plain"))
    async with RecordingConsumer(
        answer,
        transport=rabbit.transport,
        batch_size=5,
        batch_timeout=0.1,
        dead_letter_queue="dead",
    ):
        await asyncio.sleep(10)
    assert [b"[", b"[", b"wrong"] == rabbit.waiting("dead")


async def test_a_decided_message_is_not_isolated_for_being_undecodable(rabbit):
    """A decode error of a message that already has its result is an ordinary exception."""

    async def answer(messages):
        yield ACK
        messages[0].json()

    rabbit.put(b"{", b"1")
    recorder = EventRecorder()
    async with RecordingConsumer(
        first_then(answer, ack), transport=rabbit.transport, observers=[recorder], batch_size=2
    ):
        await asyncio.sleep(6)
    assert {(ACK, Cause.HANDLER): 1, (REQUEUE, Cause.EXCEPTION): 1} == recorder.of(Settled)[
        0
    ].counts


async def test_a_handler_that_is_closed_early_can_clean_up(rabbit):
    """Its `finally` runs before its batch is settled, also after an invalid result."""
    events = []

    async def answer(messages):
        try:
            yield ACK
            yield "nonsense"
            events.append("went on")
        finally:
            await asyncio.sleep(2)
            events.append("cleaned up")

    await settled_by(rabbit, answer)
    assert ["cleaned up"] == events
    assert [2] == rabbit.times(EventKind.ACKED)[:1]


async def test_a_clean_up_that_raises_is_an_exception_of_the_handler(rabbit, caplog):
    """Decided messages keep their results; the first error is the one that is logged."""

    async def answer(messages):
        try:
            yield ACK
            yield "nonsense"
        finally:
            raise Unavailable

    counts, _, recorder = await settled_by(rabbit, answer)
    assert {(ACK, Cause.HANDLER): 1, (REQUEUE, Cause.INVALID): 2} == counts
    assert isinstance(recorder.of(HandlerError)[0].error, ResultError)


async def test_a_handler_may_be_any_asynchronous_iterator(rabbit):
    """It need not be a generator; one without `aclose` has nothing to clean up."""

    class Answers:
        def __init__(self, messages):
            self.left = len(messages)

        def __aiter__(self):
            return self

        async def __anext__(self):
            if not self.left:
                raise StopAsyncIteration
            self.left -= 1
            return ACK

    counts, _, _ = await settled_by(rabbit, Answers)
    assert {(ACK, Cause.HANDLER): 3} == counts


def test_a_handler_that_isnt_an_async_generator_is_refused_at_construction():
    """The error names it; a class without a handler is refused, too."""

    class Returns(BatchConsumer):
        async def process_messages(self, messages):
            return [ACK for _ in messages]

    class YieldsAtOnce(BatchConsumer):
        def process_messages(self, messages):
            yield ACK

    class Nothing(BatchConsumer):
        pass

    class NothingEither(Consumer):
        pass

    for cls in (Returns, YieldsAtOnce, Nothing, NothingEither):
        with pytest.raises(ConfigurationError, match=f"{cls.__name__}.*process_message"):
            cls(settings())


@pytest.mark.parametrize("result", [*MessageResult, Nack("bad"), Requeue()])
async def test_a_consumer_of_single_messages_returns_its_result(rabbit, result):
    """Like a batch of one; its exceptions get `unhandled_exception_action`."""
    answers = [result, ACK]

    async def answer(message):
        return answers.pop(0)

    rabbit.put(b"0")
    async with SingleConsumer(answer, transport=rabbit.transport):
        await asyncio.sleep(1)
    gone = result is NACK or isinstance(result, Nack)
    assert len(answers) == (1 if gone or result is ACK else 0)
    assert ([b"0"] if gone else []) == journal(rabbit, EventKind.DROPPED)
    assert [] == rabbit.waiting()


async def test_a_consumer_of_single_messages_may_raise(rabbit):
    """Then its message is requeued, or gets `unhandled_exception_action`."""

    async def answer(message):
        raise Unavailable

    rabbit.put(b"0")
    async with SingleConsumer(answer, transport=rabbit.transport, max_requeue_attempts=2):
        await asyncio.sleep(1)
    assert 3 == len(journal(rabbit, EventKind.DELIVERED))
    assert [b"0"] == journal(rabbit, EventKind.DROPPED)
