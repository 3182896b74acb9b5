"""A consumer of a dead-letter queue counts its own retries, and the latest reason counts."""

from __future__ import annotations

from datetime import timedelta

import pytest

from aio_pika_batch.core.dead_letter import death_info, replay_copy
from aio_pika_batch.core.publication import Copy
from aio_pika_batch.core.results import MessageOutcome, MessageResult
from aio_pika_batch.core.retry import RetryPolicy, make_delay_steps
from aio_pika_batch.core.settlement_plan import SettlementPlanner
from aio_pika_batch.core.topology_options import DeadLetterTarget
from tests.unit.core.strategies import NOW, StubSource, a_message, delivered

NACK, REQUEUE = MessageResult.NACK, MessageResult.REQUEUE

LATER = NOW + timedelta(hours=1)


def a_planner(queue, *, delay=0.0):
    """The planner of a consumer with three attempts."""
    return SettlementPlanner(
        queue,
        RetryPolicy(3, "x-retry-count"),
        DeadLetterTarget(f"{queue}.dlx"),
        delay_steps=make_delay_steps(delay),
    )


JOBS, DEAD = a_planner("jobs"), a_planner("dead")


def published(planner, message, result, *, queue):
    """The copy that a result makes, as it is delivered from another queue."""
    [pending] = planner.plan([MessageOutcome(message, result)], NOW).copies
    return delivered(pending.copy, queue=queue)


def a_death(queue, reason="expired", *, time=NOW, count=1):
    """An entry of `x-death`."""
    return {
        "queue": queue,
        "reason": reason,
        "time": time,
        "count": count,
        "exchange": "",
        "routing-keys": [queue],
    }


def with_headers(message, **changed):
    """The same message with other headers, in its queue."""
    headers = dict(message.headers) | {name.replace("_", "-"): it for name, it in changed.items()}
    return a_message(source=StubSource(message._source.queue), headers=headers)


def exhausted():
    """A dead letter whose consumer has used up its attempts."""
    message = a_message(headers={"x-retry-count": 3})
    return published(JOBS, message, REQUEUE, queue="dead")


def attempts(planner, message, queue):
    """The retry counts that a consumer sees until it gives up, and the dead letter."""
    seen = []
    while not message.exchange or not seen:
        assert len(seen) < 10, "it is retried for ever"
        seen.append(message.retry_count)
        message = published(planner, message, REQUEUE, queue=queue)
    return seen, message


@pytest.mark.parametrize("delay", [0, 1])
def test_a_consumer_of_dead_letters_counts_from_zero(delay):
    """Its count goes on through its own retries, also if they wait in a queue."""
    seen, letter = attempts(a_planner("dead", delay=delay), exhausted(), "dead")
    assert [0, 1, 2, 3] == seen
    assert ("exhausted", 3, "dead") == (
        (death := death_info(letter)).reason,
        death.retries,
        death.queue,
    )


def test_a_dead_letter_that_was_moved_back_is_counted_from_zero():
    """By hand, with its headers. Otherwise it would have no attempts left."""
    letter = exhausted()
    moved = a_message(headers=letter.headers)
    seen, _ = attempts(JOBS, moved, "jobs")
    assert [0, 1, 2, 3] == seen


def test_a_dead_letter_of_the_broker_is_counted_from_zero():
    """It has the count of the queue that it expired in."""
    headers = {"x-retry-count": 2, "x-death": [a_death("jobs")]}
    seen, _ = attempts(DEAD, a_message(source=StubSource("dead"), headers=headers), "dead")
    assert [0, 1, 2, 3] == seen


def test_a_retry_that_waited_keeps_its_count():
    """It expired in a wait queue, which doesn't count as a death."""
    headers = {"x-retry-count": 2, "x-death": [a_death("jobs.retry.1000")]}
    assert 2 == a_message(headers=headers).retry_count


def test_the_count_of_another_consumer_is_not_taken_over():
    """A retry that was moved to another queue counts from 0 there."""
    copy = published(DEAD, exhausted(), REQUEUE, queue="dead")
    assert (1, 0) == (copy.retry_count, a_message(headers=copy.headers).retry_count)


def test_a_dead_letter_of_a_dead_letter_consumer_counts_from_0_everywhere():
    """In its next queue, and if it is moved back."""
    copy = published(DEAD, exhausted(), REQUEUE, queue="dead")
    letter = published(DEAD, copy, NACK, queue="dead.dead")
    assert 1 == death_info(letter).retries
    assert 0 == letter.retry_count
    assert 0 == a_message(source=StubSource("dead"), headers=letter.headers).retry_count


def test_usual_retries_and_dead_letters_have_no_further_headers():
    """Only a message that has died before needs to say whose count it carries."""
    retried = published(JOBS, a_message(), REQUEUE, queue="jobs")
    letter = published(JOBS, retried, NACK, queue="dead")
    names = {*retried.headers, *letter.headers}
    assert not names & {"x-retry-queue", "x-dead-letter-after"}


def test_a_replayed_message_has_no_count_left():
    """Nor does it say in which queue it was counted."""
    copy = published(DEAD, exhausted(), REQUEUE, queue="dead")
    replayed = replay_copy(copy, death_info(copy))
    assert isinstance(replayed, Copy)
    assert {} == (replayed.properties.headers or {})


# --- reasons -------------------------------------------------------------------


def test_a_later_death_by_the_broker_counts():
    """A dead letter was moved back by hand, and expired. Its old reason is still in its headers."""
    letter = published(JOBS, a_message(), NACK, queue="dead")
    again = with_headers(letter, x_death=[a_death("jobs", time=LATER)])
    assert ("expired", "jobs", LATER) == (
        (death := death_info(again)).reason,
        death.queue,
        death.died_at,
    )


def test_an_earlier_death_by_the_broker_does_not_count():
    """A dead letter of the broker was consumed, and rejected by that consumer."""
    expired = a_message(source=StubSource("dead"), headers={"x-death": [a_death("jobs")]})
    letter = published(DEAD, expired, NACK, queue="dead.dead")
    assert ("rejected", "dead") == ((death := death_info(letter)).reason, death.queue)

    again = with_headers(letter, x_death=[a_death("jobs", time=LATER, count=2)])
    assert "expired" == death_info(again).reason


def test_a_clock_that_is_behind_does_not_matter():
    """The broker's and the consumer's clocks differ, so times are not compared."""
    early = NOW - timedelta(days=1)
    letter = published(JOBS, a_message(), NACK, queue="dead")
    again = with_headers(letter, x_death=[a_death("jobs", time=early)])
    assert "expired" == death_info(again).reason


@pytest.mark.parametrize("waits", [["jobs.retry.1000"], ["jobs.retry.2000", "jobs.retry.1000"]])
def test_a_retry_that_waited_does_not_count_as_a_death(waits):
    """It expired on purpose."""
    letter = published(JOBS, a_message(), NACK, queue="dead")
    again = with_headers(letter, x_death=[a_death(each) for each in waits])
    assert "rejected" == death_info(again).reason


# --- loops ---------------------------------------------------------------------


def test_a_message_that_is_dead_lettered_again_and_again_is_held():
    """Longer each time. A chain of two dead-letter queues isn't a loop."""
    message, seen = a_message(), []
    for _ in range(5):
        [pending] = JOBS.plan([MessageOutcome(message, NACK)], NOW).copies
        seen.append((pending.hold, pending.is_loop))
        message = delivered(pending.copy)
    assert [(0, False), (0, False), (1, True), (2, True), (4, True)] == seen
    assert 5 == message.headers["x-dead-letter-count"]

    replayed = replay_copy(message, death_info(message))
    assert isinstance(replayed, Copy)
    assert "x-dead-letter-count" not in (replayed.properties.headers or {})
