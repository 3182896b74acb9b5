"""The outcomes of the messages of a batch, over one or more runs of the handler."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import event, example, given
from hypothesis import strategies as st

from aio_pika_batch.core.batch_run import BatchDecisions, BatchRun, FailurePolicy, ResultCollector
from aio_pika_batch.core.results import Cause, MessageOutcome, MessageResult, Requeue
from aio_pika_batch.errors import MessageDecodeError, MissingMessageId
from tests.unit.core.strategies import some_messages

ACK, NACK = MessageResult.ACK, MessageResult.NACK
REQUEUE, REQUEUE_IMMEDIATE = MessageResult.REQUEUE, MessageResult.REQUEUE_IMMEDIATE

FAILURES = (Cause.EXCEPTION, Cause.TIMEOUT, Cause.MISSING, Cause.INVALID, Cause.SHUTDOWN)


class Listed(Exception):
    """An exception that `exceptions` has a result for."""


@dataclass(frozen=True)
class Run:
    """What a handler does in one run, drawn before its messages are known.

    Attributes:
        yields: Its first results.
        failure: The end of the run; None acks all other messages.
        undecodable: The position of the message that it cannot decode, if it raises that.
        take: Whether decisions are taken during the run and after it.
    """

    yields: tuple[MessageResult, ...]
    failure: Cause | None
    undecodable: int | None = None
    take: bool = False


runs = st.builds(
    Run,
    yields=st.lists(st.sampled_from(MessageResult), max_size=4).map(tuple),
    failure=st.none() | st.sampled_from(FAILURES),
    undecodable=st.none() | st.integers(0, 7),
    take=st.booleans(),
)
policies = st.builds(
    FailurePolicy,
    st.sampled_from([REQUEUE, NACK, REQUEUE_IMMEDIATE]),
    st.sampled_from([{}, {Listed: NACK}]),
    st.integers(0, 3),
    st.booleans(),
)


def play(messages, policy, plan):
    """Run a batch to its end by a plan. Runs after the plan succeed."""
    run_of_batch, taken, left = BatchRun(policy), [], list(plan)
    batch, number = messages, 0
    while batch:
        number += 1
        run = left.pop(0) if left else Run((), None)
        collector = ResultCollector(batch)
        for result in run.yields[: len(batch)]:
            collector.accept(result)
        if run.take and not policy.is_atomic:
            taken.append(run_of_batch.take(collector))
        error, cause = None, run.failure or Cause.HANDLER
        if run.failure is None:
            while collector.count < len(batch):
                collector.accept(ACK)
        elif run.failure is Cause.EXCEPTION and run.undecodable is not None:
            error = MessageDecodeError(batch[run.undecodable % len(batch)], "body", "no JSON")
        else:
            error = Listed()
        run_of_batch.record_run(collector, error, cause)
        if run.take and not policy.is_atomic:
            taken.append(run_of_batch.take(collector))
        if cause in (Cause.TIMEOUT, Cause.SHUTDOWN):
            run_of_batch.stop(Listed("stopped"), cause)
        batch = run_of_batch.next_run()
        assert number < 200
    assert run_of_batch.is_over
    together = BatchDecisions()
    for part in (*taken, run_of_batch):
        together.add(part)
    return together, number


def tags(handled):
    """The messages in all of the lists."""
    decided = [outcome.message.delivery_tag for outcome in handled.not_acked]
    return handled.acked + decided + [message.delivery_tag for message in handled.returned]


@given(st.integers(1, 8), policies, st.lists(runs, max_size=12))
@example(4, FailurePolicy(REQUEUE, {}, 3, True), [Run((ACK, ACK), Cause.EXCEPTION)])
@example(3, FailurePolicy(NACK, {}, 1), [Run((), Cause.EXCEPTION, 0), Run((), Cause.EXCEPTION)])
def test_each_message_gets_one_outcome(count, policy, plan):
    """Whatever its runs do, and whenever decisions are taken in between."""
    handled, number = play(some_messages(count), policy, plan)

    assert list(range(1, count + 1)) == sorted(tags(handled))
    assert count == len(handled)
    event(f"{number} runs")


@given(st.integers(1, 8), policies, st.lists(runs, max_size=12))
def test_only_acks_of_valid_runs_count(count, policy, plan):
    """A message is acked only if a handler acked it, in a run that was not rolled back."""
    handled, number = play(some_messages(count), policy, plan)

    fine = number > len(plan) or any(run.failure is None for run in plan)
    if policy.is_atomic and not fine:
        assert [] == handled.acked
    acked_at_all = fine or any(ACK in run.yields for run in plan)
    assert acked_at_all or [] == handled.acked


@given(st.integers(1, 8), policies, st.lists(runs, max_size=12))
def test_without_isolation_only_undecodable_messages_need_another_run(count, policy, plan):
    """At most one run for each."""
    policy = FailurePolicy(policy.action, policy.exceptions, 0, policy.is_atomic)
    handled, number = play(some_messages(count), policy, plan)

    undecodable = [each for each in handled.not_acked if each.cause is Cause.UNDECODABLE]
    assert 1 <= number <= 1 + len(undecodable)


def after_one_run(policy, yields, error, cause=Cause.EXCEPTION, count=3):
    """A batch after one run."""
    run_of_batch = BatchRun(policy)
    collector = ResultCollector(some_messages(count))
    for each in yields:
        collector.accept(each)
    passing = run_of_batch.record_run(collector, error, cause)
    return run_of_batch, collector.messages, passing


PLAIN = FailurePolicy(REQUEUE, {Listed: NACK})


@pytest.mark.parametrize(
    ("error", "cause", "result"),
    [
        (Listed(), Cause.EXCEPTION, NACK),
        (Listed(), Cause.TIMEOUT, NACK),
        (KeyError(), Cause.EXCEPTION, REQUEUE),
        (Listed(), Cause.MISSING, REQUEUE),
        (Listed(), Cause.INVALID, REQUEUE),
    ],
)
def test_undecided_messages_get_the_result_of_the_failure(error, cause, result):
    """Earlier results count.

    Only exceptions and timeouts have a result of their own, because missing and invalid results do
    not say what went wrong.
    """
    run_of_batch, messages, passing = after_one_run(PLAIN, [ACK, NACK], error, cause)

    assert [1] == run_of_batch.acked
    assert [
        MessageOutcome(messages[1], NACK),
        MessageOutcome(messages[2], result, cause, error),
    ] == (run_of_batch.not_acked)
    assert (True, False) == (run_of_batch.is_over, passing)


def test_a_shutdown_returns_undecided_messages():
    """They have no outcome."""
    run_of_batch, messages, _ = after_one_run(PLAIN, [ACK], Listed(), Cause.SHUTDOWN)

    assert ([1], [], messages[1:]) == (
        run_of_batch.acked,
        run_of_batch.not_acked,
        run_of_batch.returned,
    )


ATOMIC = FailurePolicy(REQUEUE, {Listed: NACK}, is_atomic=True)


@pytest.mark.parametrize("cause", [Cause.EXCEPTION, Cause.TIMEOUT, Cause.MISSING, Cause.INVALID])
@pytest.mark.parametrize("yields", [[ACK], [ACK, ACK], [ACK, ACK, ACK]])
def test_a_failure_voids_the_acks_of_an_atomic_batch(yields, cause):
    """All of them, for every kind of failure, even after the last result."""
    error = KeyError()
    run_of_batch, messages, _ = after_one_run(ATOMIC, yields, error, cause)

    assert [] == run_of_batch.acked
    assert [
        MessageOutcome(message, REQUEUE, cause, error) for message in messages
    ] == run_of_batch.not_acked


def test_other_results_of_an_atomic_batch_stay():
    """They claim no effect that a rollback could undo. Undecided messages keep their order."""
    error = Listed()
    run_of_batch, messages, _ = after_one_run(ATOMIC, [ACK, REQUEUE_IMMEDIATE, ACK], error)

    first, _, last = messages
    assert [
        MessageOutcome(messages[1], REQUEUE_IMMEDIATE),
        MessageOutcome(first, NACK, Cause.EXCEPTION, error),
        MessageOutcome(last, NACK, Cause.EXCEPTION, error),
    ] == run_of_batch.not_acked


def test_a_shutdown_voids_the_acks_of_an_atomic_batch():
    """Their messages are returned with the others."""
    run_of_batch, messages, _ = after_one_run(ATOMIC, [ACK, NACK], Listed(), Cause.SHUTDOWN)

    assert [] == run_of_batch.acked
    assert [messages[0], messages[2]] == run_of_batch.returned


def test_an_undecodable_message_with_a_void_ack_is_dead_lettered():
    """Its ACK counts as little as those of the others."""
    run_of_batch = BatchRun(ATOMIC)
    messages = some_messages(3)
    collector = ResultCollector(messages)
    collector.accept(ACK)
    error = MessageDecodeError(messages[0], "body", "no JSON")
    run_of_batch.record_run(collector, error, Cause.EXCEPTION)

    assert [MessageOutcome(messages[0], NACK, Cause.UNDECODABLE, error)] == run_of_batch.not_acked
    assert messages[1:] == run_of_batch.next_run()


ISOLATING = FailurePolicy(REQUEUE, {}, isolate=10)


def test_undecided_messages_of_an_exception_are_run_again_in_halves():
    """Messages that got a result before are not run again."""
    run_of_batch, messages, passing = after_one_run(ISOLATING, [ACK], KeyError(), count=4)

    assert passing
    assert [1] == run_of_batch.acked
    assert [messages[1:3], messages[3:], ()] == [run_of_batch.next_run() for _ in range(3)]
    assert run_of_batch.is_over


@pytest.mark.parametrize("cause", [Cause.TIMEOUT, Cause.MISSING, Cause.INVALID])
def test_other_failures_are_not_bisected(cause):
    """They concern the whole batch."""
    run_of_batch, _, passing = after_one_run(ISOLATING, [], KeyError(), cause)

    assert (True, False, 3) == (run_of_batch.is_over, passing, len(run_of_batch.not_acked))


def test_an_exception_after_the_last_result_blames_no_message():
    """And nothing is run again."""
    run_of_batch, _, passing = after_one_run(ISOLATING, [ACK, ACK, ACK], KeyError())

    assert (True, False, [1, 2, 3], []) == (
        run_of_batch.is_over,
        passing,
        run_of_batch.acked,
        run_of_batch.not_acked,
    )


def test_a_timeout_fails_all_parts_that_are_due():
    """They get the result of the timeout, and not that of the exception before."""
    policy = FailurePolicy(REQUEUE, {Listed: NACK}, isolate=10)
    run_of_batch, messages, _ = after_one_run(policy, [], Listed(), count=4)
    collector = ResultCollector(run_of_batch.next_run())
    late = TimeoutError()
    run_of_batch.record_run(collector, late, Cause.TIMEOUT)
    run_of_batch.stop(late, Cause.TIMEOUT)

    assert [
        MessageOutcome(each, REQUEUE, Cause.TIMEOUT, late) for each in messages
    ] == run_of_batch.not_acked
    assert run_of_batch.is_over


def test_at_the_limit_each_message_gets_the_result_of_its_own_failure():
    """The exception of the last bad message says nothing about the others."""
    policy = FailurePolicy(REQUEUE, {Listed: NACK}, isolate=1)
    whole, alone = KeyError(), Listed()
    run_of_batch, messages, _ = after_one_run(policy, [], whole, count=2)
    passing = run_of_batch.record_run(
        ResultCollector(run_of_batch.next_run()), alone, Cause.EXCEPTION
    )

    assert [
        MessageOutcome(messages[0], NACK, Cause.EXCEPTION, alone),
        MessageOutcome(messages[1], REQUEUE, Cause.EXCEPTION, whole),
    ] == run_of_batch.not_acked
    assert (True, False) == (run_of_batch.is_over, passing)


def test_a_shutdown_returns_all_parts_that_are_due():
    """No message of them was blamed."""
    run_of_batch, messages, _ = after_one_run(ISOLATING, [], Listed(), count=4)
    collector = ResultCollector(run_of_batch.next_run())
    run_of_batch.record_run(collector, TimeoutError(), Cause.SHUTDOWN)
    run_of_batch.stop(TimeoutError(), Cause.SHUTDOWN)

    assert messages == run_of_batch.returned


def test_stopping_a_successful_batch_does_nothing():
    """It has its results."""
    run_of_batch, _, _ = after_one_run(PLAIN, [ACK, NACK, ACK], None, Cause.HANDLER)
    run_of_batch.stop(TimeoutError(), Cause.TIMEOUT)

    assert ([1, 3], 1, ()) == (
        run_of_batch.acked,
        len(run_of_batch.not_acked),
        run_of_batch.next_run(),
    )


def test_messages_to_retry_in_place_are_not_taken_before_the_end():
    """They cannot be retried while the handler is still working on their batch."""
    messages = some_messages(5)
    run_of_batch = BatchRun(FailurePolicy(REQUEUE, {}), keeps_failures=True)
    collector = ResultCollector(messages)
    for each in (ACK, REQUEUE, NACK, REQUEUE_IMMEDIATE):
        collector.accept(each)

    taken = run_of_batch.take(collector)
    again = run_of_batch.take(collector)
    run_of_batch.record_run(collector, RuntimeError(), Cause.EXCEPTION)

    assert ([1], [3]) == (taken.acked, [each.message.delivery_tag for each in taken.not_acked])
    assert 0 == len(again)
    assert ([], [2, 4, 5]) == (
        run_of_batch.acked,
        [each.message.delivery_tag for each in run_of_batch.not_acked],
    )


def test_messages_without_an_id_fail_alone():
    """All of them at once; the others are run again, whatever `isolate` says."""
    batch_run, collector = BatchRun(PLAIN), ResultCollector(some_messages(4))
    first, second, third, fourth = collector.messages
    error = MissingMessageId((second, fourth))
    batch_run.record_run(collector, error, Cause.EXCEPTION)

    assert [
        MessageOutcome(each, REQUEUE, Cause.EXCEPTION, error) for each in (second, fourth)
    ] == batch_run.not_acked
    assert [first, third] == batch_run.next_run()


def test_an_id_that_is_missed_elsewhere_fails_the_batch():
    """None of its messages is in the batch."""
    error = MissingMessageId((object(),))
    batch_run, messages, _ = after_one_run(PLAIN, [], error)

    assert messages == [each.message for each in batch_run.not_acked]
    assert batch_run.is_over


@pytest.mark.parametrize("cause", [Cause.EXCEPTION, Cause.TIMEOUT, Cause.MISSING, Cause.INVALID])
def test_a_failure_leaves_committed_results_alone(cause):
    """What the handler yielded itself counts before them."""
    batch_run, collector = BatchRun(PLAIN), ResultCollector(some_messages(4))
    first, second, third, fourth = collector.messages
    batch_run.commit([first, second, third], [ACK, ACK, NACK])
    collector.accept(REQUEUE)
    batch_run.record_run(collector, KeyError(), cause)

    assert [2] == batch_run.acked
    assert [(first, REQUEUE), (third, NACK), (fourth, REQUEUE)] == [
        (each.message, each.result) for each in batch_run.not_acked
    ]


def test_committed_acks_of_an_atomic_batch_stay():
    """Those that were only yielded do not."""
    batch_run, collector = BatchRun(ATOMIC), ResultCollector(some_messages(2))
    batch_run.commit([collector.messages[1]], [ACK])
    collector.accept(ACK)
    collector.accept(ACK)
    batch_run.record_run(collector, KeyError(), Cause.EXCEPTION)

    assert [2] == batch_run.acked
    assert [1] == [each.message.delivery_tag for each in batch_run.not_acked]


def test_a_batch_can_become_atomic():
    """When something begins in it that can be rolled back."""
    batch_run, collector = BatchRun(PLAIN), ResultCollector(some_messages(1))
    batch_run.is_atomic = True
    collector.accept(ACK)
    batch_run.record_run(collector, KeyError(), Cause.EXCEPTION)

    assert [] == batch_run.acked


def test_a_result_of_a_subclass_is_like_any_other():
    """It belongs to the next message."""

    class Later(Requeue):
        pass

    run_of_batch, _, _ = after_one_run(PLAIN, [ACK, Later(delay=1), ACK], None)
    assert [MessageOutcome(each.message, Later(delay=1)) for each in run_of_batch.not_acked] == (
        run_of_batch.not_acked
    )
    assert 1 == len(run_of_batch.not_acked)
