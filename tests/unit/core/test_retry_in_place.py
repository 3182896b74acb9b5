"""Which messages of a failed batch are retried in place, and after which pause."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aio_pika_batch.core.message import Properties
from aio_pika_batch.core.results import Cause, MessageOutcome, MessageResult, Nack, Requeue
from aio_pika_batch.core.retry import Backoff, DeadLetterReason, RetryPolicy, make_delay_steps
from aio_pika_batch.core.retry_in_place import Retried, RetryInPlace
from aio_pika_batch.core.settlement_plan import SettlementPlanner
from aio_pika_batch.core.topology_options import DeadLetterTarget
from tests.unit.core.strategies import NOW, StubSource, a_message, batches_of_outcomes

NACK, REQUEUE = MessageResult.NACK, MessageResult.REQUEUE
REQUEUE_IMMEDIATE = MessageResult.REQUEUE_IMMEDIATE

RETRY = RetryPolicy(3, "x-retry-count")
IN_PLACE = RetryInPlace(RETRY, Backoff(2.0, 60.0), make_delay_steps())

jitters = st.floats(0, 1, exclude_max=True)
undecided = st.sampled_from([Cause.EXCEPTION, Cause.TIMEOUT, Cause.MISSING, Cause.INVALID])


ERROR = RuntimeError("what ended the run")


def outcome(tag, result=REQUEUE, cause=Cause.HANDLER, error=ERROR, **properties):
    """The outcome of a message."""
    error = None if cause is Cause.HANDLER else error
    return MessageOutcome(a_message(tag, **properties), result, cause, error)


def sort(*outcomes, policy=IN_PLACE, jitter=0.0):
    """The decision about these outcomes, by tags."""
    found = policy.decide(outcomes, now=NOW, jitter=jitter)
    return (
        [each.message.delivery_tag for each in found.final],
        [each.message.delivery_tag for each in found.attempts],
        [each.delivery_tag for each in found.not_attempted],
    )


def test_messages_that_the_handler_requeued_are_retried():
    """Each one by itself. Other outcomes are final."""
    assert ([2, 5], [1, 3, 4], []) == sort(
        outcome(1),
        outcome(2, NACK),
        outcome(3, REQUEUE_IMMEDIATE),
        outcome(4, Requeue("busy")),
        outcome(5, Nack("bad")),
    )


@given(undecided, st.integers(1, 6))
def test_the_first_undecided_message_failed_and_the_others_were_not_attempted(cause, count):
    """Whatever ended the handler. The others keep their attempts."""
    tags = list(range(1, count + 1))
    outcomes = [outcome(tag, cause=cause) for tag in tags]

    found = IN_PLACE.decide(outcomes, now=NOW, jitter=0.5)

    assert [(1, 1)] == [
        (each.message.delivery_tag, each.message.retry_count) for each in found.attempts
    ]
    assert [each.message for each in outcomes[1:]] == found.not_attempted
    assert [] == found.final


def test_messages_that_failed_alone_are_attempts_of_their_own():
    """After isolation. Messages of one run share its failure."""
    alone = [outcome(tag, cause=Cause.EXCEPTION, error=RuntimeError()) for tag in (2, 5)]
    together = [outcome(tag, cause=Cause.EXCEPTION) for tag in (6, 7, 8)]

    assert ([], [2, 5, 6], [7, 8]) == sort(*together, *alone)


def test_messages_requeued_before_the_failure_are_retried_first():
    """In the order of the batch."""
    assert ([], [1, 3], [4, 5]) == sort(
        outcome(1),
        outcome(3, cause=Cause.EXCEPTION),
        outcome(4, cause=Cause.EXCEPTION),
        outcome(5, cause=Cause.EXCEPTION),
    )


def test_a_message_that_was_left_out_stays_before_a_later_failed_one():
    """Out of order: the third failed and the second was not attempted, so that goes first,
    uncounted.
    """
    found = IN_PLACE.decide(
        [
            outcome(3),
            outcome(1, cause=Cause.EXCEPTION),
            outcome(2, cause=Cause.EXCEPTION),
            outcome(4, cause=Cause.EXCEPTION),
        ],
        now=NOW,
        jitter=0.0,
    )

    assert [(1, 1, 1.0), (2, 0, 0.0), (3, 1, 1.0)] == [
        (each.message.delivery_tag, each.message.retry_count, each.pause) for each in found.attempts
    ]
    assert [4] == [each.delivery_tag for each in found.not_attempted]


def test_messages_that_wait_keep_their_place():
    """Isolation left them undecided: none has failed, and each goes before later failed ones."""
    waiting = [a_message(4), a_message(1)]

    found = IN_PLACE.decide([outcome(3), outcome(2, NACK)], waiting, now=NOW, jitter=0.0)

    assert [(1, 0, 0.0), (3, 1, 1.0)] == [
        (each.message.delivery_tag, each.message.retry_count, each.pause) for each in found.attempts
    ]
    assert [4] == [each.delivery_tag for each in found.not_attempted]
    assert [2] == [each.message.delivery_tag for each in found.final]


@pytest.mark.parametrize("result", [REQUEUE, REQUEUE_IMMEDIATE, Requeue("busy")])
def test_a_message_without_attempts_left_is_dead_lettered(result):
    """As exhausted, and no broker retries it."""
    planner = SettlementPlanner("jobs", RETRY, DeadLetterTarget("dlx"))
    last = outcome(1, result, headers={"x-retry-count": 3})

    found = IN_PLACE.decide([last], now=NOW, jitter=0.0)

    plan = planner.plan(found.final, NOW)
    assert [DeadLetterReason.EXHAUSTED] == [each.reason for each in plan.copies]
    assert (0, 0) == (len(found.attempts), len(plan.settlements))


def test_messages_after_an_exhausted_one_are_handled():
    """The first undecided message has no attempts left, so the later ones continue."""
    assert ([1], [], [2]) == sort(
        outcome(1, cause=Cause.EXCEPTION, headers={"x-retry-count": 3}),
        outcome(2, cause=Cause.EXCEPTION, headers={"x-retry-count": 3}),
    )


def test_a_message_with_unreadable_headers_is_not_retried():
    """Its attempts cannot be counted."""
    broken = MessageOutcome(a_message(1, undecodable={"headers": "not UTF-8"}), REQUEUE)
    planner = SettlementPlanner("jobs", RETRY, DeadLetterTarget("dlx"))

    found = IN_PLACE.decide([broken], now=NOW, jitter=0.0)

    plan = planner.plan(found.final, NOW)
    assert [DeadLetterReason.UNDECODABLE] == [each.reason for each in plan.copies]
    assert [] == found.attempts


@given(st.integers(0, 2), jitters)
def test_pauses_grow_with_the_attempts(count, jitter):
    """Between half of the longest pause and all of it, and never 0."""
    [attempt] = IN_PLACE.decide(
        [outcome(1, headers={"x-retry-count": count})], now=NOW, jitter=jitter
    ).attempts

    assert 2.0**count <= attempt.pause <= 2.0 * 2.0**count


@pytest.mark.parametrize(
    ("result", "count", "pause"),
    [
        (REQUEUE, 0, 5.0),
        (REQUEUE, 1, 10.0),
        (REQUEUE, 2, 15.0),
        (Requeue("busy"), 1, 10.0),
        (Requeue(delay=7), 0, 10.0),
        (Requeue(delay=99), 0, 15.0),
        (Requeue(delay=0), 2, 0.0),
        (REQUEUE_IMMEDIATE, 2, 0.0),
    ],
)
def test_it_waits_as_long_as_a_delayed_retry(result, count, pause):
    """By the same delay steps, whatever the jitter, or as long as the handler requests."""
    policy = RetryInPlace(RETRY, Backoff(2.0, 60.0), make_delay_steps(5.0, 2.0, 15.0))
    failed = outcome(1, result, headers={"x-retry-count": count})

    [attempt] = policy.decide([failed], now=NOW, jitter=0.3).attempts

    assert pause == attempt.pause


def test_requeue_immediate_has_no_pause_and_is_counted():
    """Otherwise it could block its key forever."""
    [attempt] = IN_PLACE.decide([outcome(1, REQUEUE_IMMEDIATE)], now=NOW, jitter=0.5).attempts

    assert 0.0 == attempt.pause
    assert 1 == attempt.message.retry_count


@given(batches_of_outcomes(), jitters)
def test_each_message_is_in_one_list_and_the_order_is_kept(outcomes, jitter):
    """None is lost or duplicated, retried beyond its limit, or retried after an ACK."""
    found = IN_PLACE.decide(outcomes, now=NOW, jitter=jitter)

    kept = [each.message for each in found.attempts] + found.not_attempted
    tags = [each.delivery_tag for each in kept]
    final = [each.message.delivery_tag for each in found.final]
    assert sorted(each.message.delivery_tag for each in outcomes) == sorted(tags + final)
    assert sorted(tags) == tags
    again = [each.message for each in found.attempts if isinstance(each.message, Retried)]
    assert all(1 <= message.retry_count <= 3 for message in again)
    by_tag = {each.message.delivery_tag: each for each in outcomes}
    for tag in tags:
        assert by_tag[tag].result in {REQUEUE, REQUEUE_IMMEDIATE} or isinstance(
            by_tag[tag].result, Requeue
        )
    for tag in final:
        # Each message that can be retried is.
        was = by_tag[tag]
        spent = not was.message.has_readable_headers or was.message.retry_count >= 3
        is_failure = was.result in {MessageResult.ACK, NACK} or isinstance(was.result, Nack)
        assert spent or is_failure


def test_a_retried_message_is_the_same_delivery_with_a_higher_count():
    """Everything else stays, and the failed one does not change."""
    source = StubSource(decoded=Properties(headers={"x-retry-count": 1, "a": "b"}, message_id="m"))
    failed = a_message(7, source=source, headers={"x-retry-count": 1, "a": "b"}, message_id="m")

    again = Retried(failed, NOW)

    assert (1, 2) == (failed.retry_count, again.retry_count)
    assert {"x-retry-count": 2, "a": "b"} == dict(again.headers)
    assert (7, b"payload", "m", "events", "order.created") == (
        again.delivery_tag,
        again.body,
        again.message_id,
        again.exchange,
        again.routing_key,
    )
    assert (failed.raw_properties, failed.properties) == (again.raw_properties, again.properties)


def test_the_dead_letter_has_the_first_failure_and_the_count():
    """Although no copy has had them."""
    planner = SettlementPlanner("jobs", RETRY, DeadLetterTarget("dlx"))
    again = Retried(Retried(a_message(), NOW), NOW + timedelta(seconds=1))

    plan = planner.plan([MessageOutcome(again, NACK)], NOW + timedelta(seconds=9))

    [dead_letter] = plan.copies
    assert NOW == dead_letter.copy.properties.headers["x-first-failed-at"]
    assert 2 == dead_letter.copy.properties.headers["x-retry-count"]
    assert NOW + timedelta(seconds=9) == dead_letter.copy.properties.headers["x-dead-lettered-at"]


def test_an_earlier_first_failure_in_the_headers_is_kept():
    """From a consumer that keeps no order."""
    planner = SettlementPlanner("jobs", RETRY, DeadLetterTarget("dlx"))
    before = NOW - timedelta(days=1)
    again = Retried(a_message(headers={"x-first-failed-at": before}), NOW)

    [dead_letter] = planner.plan([MessageOutcome(again, NACK)], NOW).copies

    assert before == dead_letter.copy.properties.headers["x-first-failed-at"]
