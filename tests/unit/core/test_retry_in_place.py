"""Which messages are kept to be tried again, which are through, and what do they wait for?"""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aio_pika_batch.core.message import Properties
from aio_pika_batch.core.results import Cause, MessageOutcome, MessageResult, Nack, Requeue
from aio_pika_batch.core.retry import Backoff, DeadLetterReason, RetryPolicy, make_delay_steps
from aio_pika_batch.core.retry_in_place import Retried, RetryInPlace
from aio_pika_batch.core.settlement_plan import DeadLetterTarget, SettlementPlanner
from tests.unit.core.strategies import NOW, StubSource, a_message, batches_of_verdicts

NACK, REQUEUE = MessageResult.NACK, MessageResult.REQUEUE
REQUEUE_IMMEDIATE = MessageResult.REQUEUE_IMMEDIATE

RETRY = RetryPolicy(3, "x-retry-count")
IN_PLACE = RetryInPlace(RETRY, Backoff(2.0, 60.0), make_delay_steps())

jitters = st.floats(0, 1, exclude_max=True)
undecided = st.sampled_from([Cause.EXCEPTION, Cause.TIMEOUT, Cause.MISSING, Cause.INVALID])


ERROR = RuntimeError("what ended the run")


def verdict(tag, result=REQUEUE, cause=Cause.HANDLER, error=ERROR, **properties):
    """What was decided about a message."""
    error = None if cause is Cause.HANDLER else error
    return MessageOutcome(a_message(tag, **properties), result, cause, error)


def sort(*verdicts, policy=IN_PLACE, jitter=0.0):
    """What becomes of these, by tags."""
    found = policy.decide(verdicts, now=NOW, jitter=jitter)
    return (
        [each.message.delivery_tag for each in found.final],
        [each.message.delivery_tag for each in found.attempts],
        [each.delivery_tag for each in found.not_attempted],
    )


def test_what_the_handler_requeued_is_tried_again_and_the_rest_is_carried_out():
    """Each by itself: the handler knows."""
    assert ([2, 5], [1, 3, 4], []) == sort(
        verdict(1),
        verdict(2, NACK),
        verdict(3, REQUEUE_IMMEDIATE),
        verdict(4, Requeue("busy")),
        verdict(5, Nack("bad")),
    )


@given(undecided, st.integers(1, 6))
def test_of_those_left_undecided_the_first_has_failed_and_the_others_were_not_reached(cause, count):
    """Whatever ended the handler: what comes later costs no attempt."""
    tags = list(range(1, count + 1))
    verdicts = [verdict(tag, cause=cause) for tag in tags]

    found = IN_PLACE.decide(verdicts, now=NOW, jitter=0.5)

    assert [(1, 1)] == [
        (each.message.delivery_tag, each.message.retry_count) for each in found.attempts
    ]
    assert [each.message for each in verdicts[1:]] == found.not_attempted
    assert [] == found.final


def test_culprits_that_stood_alone_have_failed_each_for_itself():
    """What was isolated ran by itself; those that shared a run share its failure."""
    alone = [verdict(tag, cause=Cause.EXCEPTION, error=RuntimeError()) for tag in (2, 5)]
    together = [verdict(tag, cause=Cause.EXCEPTION) for tag in (6, 7, 8)]

    assert ([], [2, 5, 6], [7, 8]) == sort(*together, *alone)


def test_what_was_requeued_before_the_handler_ended_is_tried_first():
    """In the order of the batch."""
    assert ([], [1, 3], [4, 5]) == sort(
        verdict(1),
        verdict(3, cause=Cause.EXCEPTION),
        verdict(4, cause=Cause.EXCEPTION),
        verdict(5, cause=Cause.EXCEPTION),
    )


def test_one_that_was_passed_over_keeps_its_place_before_a_later_one_that_failed():
    """Out of order, the third failed and the second was not reached: it goes first, uncounted."""
    found = IN_PLACE.decide(
        [
            verdict(3),
            verdict(1, cause=Cause.EXCEPTION),
            verdict(2, cause=Cause.EXCEPTION),
            verdict(4, cause=Cause.EXCEPTION),
        ],
        now=NOW,
        jitter=0.0,
    )

    assert [(1, 1, 1.0), (2, 0, 0.0), (3, 1, 1.0)] == [
        (each.message.delivery_tag, each.message.retry_count, each.pause) for each in found.attempts
    ]
    assert [4] == [each.delivery_tag for each in found.not_attempted]


@pytest.mark.parametrize("result", [REQUEUE, REQUEUE_IMMEDIATE, Requeue("busy")])
def test_once_its_attempts_are_spent_a_message_is_dead_lettered_as_exhausted(result):
    """And no broker tries it again instead."""
    router = SettlementPlanner("jobs", RETRY, DeadLetterTarget("dlx"))
    last = verdict(1, result, headers={"x-retry-count": 3})

    found = IN_PLACE.decide([last], now=NOW, jitter=0.0)

    plan = router.plan(found.final, NOW)
    assert [DeadLetterReason.EXHAUSTED] == [each.reason for each in plan.copies]
    assert (0, 0) == (len(found.attempts), len(plan.settlements))


def test_the_last_one_of_a_batch_that_could_be_tried_again_lets_the_others_go_on():
    """The first undecided is spent: the ones behind it have their turn."""
    assert ([1], [], [2]) == sort(
        verdict(1, cause=Cause.EXCEPTION, headers={"x-retry-count": 3}),
        verdict(2, cause=Cause.EXCEPTION, headers={"x-retry-count": 3}),
    )


def test_one_whose_headers_cannot_be_read_is_not_tried_again():
    """Nobody could count its attempts."""
    broken = MessageOutcome(a_message(1, undecodable={"headers": "not UTF-8"}), REQUEUE)
    router = SettlementPlanner("jobs", RETRY, DeadLetterTarget("dlx"))

    found = IN_PLACE.decide([broken], now=NOW, jitter=0.0)

    plan = router.plan(found.final, NOW)
    assert [DeadLetterReason.UNDECODABLE] == [each.reason for each in plan.copies]
    assert [] == found.attempts


@given(st.integers(0, 2), jitters)
def test_pauses_grow_with_the_attempts_and_are_never_nothing(count, jitter):
    """Between half of the longest and all of it."""
    [attempt] = IN_PLACE.decide(
        [verdict(1, headers={"x-retry-count": count})], now=NOW, jitter=jitter
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
def test_it_waits_as_long_as_a_delayed_retry_would(result, count, pause):
    """By the same delay_steps, whatever the jitter; and as long as the handler asks for."""
    policy = RetryInPlace(RETRY, Backoff(2.0, 60.0), make_delay_steps(5.0, 2.0, 15.0))
    failed = verdict(1, result, headers={"x-retry-count": count})

    [attempt] = policy.decide([failed], now=NOW, jitter=0.3).attempts

    assert pause == attempt.pause


def test_immediately_is_without_a_pause_and_counted_all_the_same():
    """It could block its key for ever otherwise."""
    [attempt] = IN_PLACE.decide([verdict(1, REQUEUE_IMMEDIATE)], now=NOW, jitter=0.5).attempts

    assert 0.0 == attempt.pause
    assert 1 == attempt.message.retry_count


@given(batches_of_verdicts(), jitters)
def test_each_message_has_one_fate_and_the_order_is_kept(verdicts, jitter):
    """Nothing is lost or doubled, nothing is kept beyond its limit, nothing ACKed is kept."""
    found = IN_PLACE.decide(verdicts, now=NOW, jitter=jitter)

    kept = [each.message for each in found.attempts] + found.not_attempted
    tags = [each.delivery_tag for each in kept]
    final = [each.message.delivery_tag for each in found.final]
    assert sorted(each.message.delivery_tag for each in verdicts) == sorted(tags + final)
    assert sorted(tags) == tags
    again = [each.message for each in found.attempts if isinstance(each.message, Retried)]
    assert all(1 <= message.retry_count <= 3 for message in again)
    by_tag = {each.message.delivery_tag: each for each in verdicts}
    for tag in tags:
        assert by_tag[tag].result in {REQUEUE, REQUEUE_IMMEDIATE} or isinstance(
            by_tag[tag].result, Requeue
        )
    for tag in final:
        # Whatever can be tried again is.
        was = by_tag[tag]
        spent = not was.message.has_readable_headers or was.message.retry_count >= 3
        is_failure = was.result in {MessageResult.ACK, NACK} or isinstance(was.result, Nack)
        assert spent or is_failure


def test_a_retried_message_is_the_same_delivery_with_one_attempt_more():
    """All else is as it came; the one that failed stays as it was."""
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


def test_the_dead_letter_says_when_it_failed_first_and_how_often_it_was_tried():
    """Although no copy has ever carried that."""
    router = SettlementPlanner("jobs", RETRY, DeadLetterTarget("dlx"))
    again = Retried(Retried(a_message(), NOW), NOW + timedelta(seconds=1))

    plan = router.plan([MessageOutcome(again, NACK)], NOW + timedelta(seconds=9))

    [letter] = plan.copies
    assert NOW == letter.copy.properties.headers["x-first-failed-at"]
    assert 2 == letter.copy.properties.headers["x-retry-count"]
    assert NOW + timedelta(seconds=9) == letter.copy.properties.headers["x-dead-lettered-at"]


def test_when_a_copy_of_it_failed_first_stands_above_what_is_known_here():
    """It has been requeued before, by a consumer that keeps no order."""
    router = SettlementPlanner("jobs", RETRY, DeadLetterTarget("dlx"))
    before = NOW - timedelta(days=1)
    again = Retried(a_message(headers={"x-first-failed-at": before}), NOW)

    [letter] = router.plan([MessageOutcome(again, NACK)], NOW).copies

    assert before == letter.copy.properties.headers["x-first-failed-at"]
