"""What is planned for a session that can modify messages in their queue, instead of copies."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aio_pika_batch.core.dead_letter import death_info, replay_copy
from aio_pika_batch.core.hold_policy import HoldPolicy
from aio_pika_batch.core.message import read_moment
from aio_pika_batch.core.publication import Copy
from aio_pika_batch.core.quarantine import CrashPolicy, OwnRequeues, Suspicion
from aio_pika_batch.core.results import Cause, MessageOutcome, MessageResult, Nack, Requeue
from aio_pika_batch.core.retry import DeadLetterReason, RetryPolicy, make_delay_steps
from aio_pika_batch.core.retry_in_place import Retried
from aio_pika_batch.core.settlement import (
    Disposition,
    Modification,
    NativeRetries,
    check_modified_headers,
)
from aio_pika_batch.core.settlement_plan import SettlementPlanner
from aio_pika_batch.core.topology_options import DeadLetterTarget
from aio_pika_batch.testing.strategies import UNDECODABLE
from tests.unit.core.strategies import NOW, QUEUE, a_message, batches_of_outcomes

ACK, NACK = MessageResult.ACK, MessageResult.NACK
REQUEUE, REQUEUE_IMMEDIATE = MessageResult.REQUEUE, MessageResult.REQUEUE_IMMEDIATE

V4_3 = NativeRetries(delays=True, headers=True, dead_letters=True, uncounted=True)
V4_0 = NativeRetries(delays=False, headers=True, dead_letters=True, uncounted=False)
MS = int(NOW.timestamp() * 1000)

abilities = st.builds(
    NativeRetries, st.booleans(), st.just(value=True), st.booleans(), st.booleans()
)


def a_planner(native=V4_3, max_attempts=3, **more):
    """A planner whose session can do this."""
    retry = RetryPolicy(max_attempts, "x-retry-count")
    return SettlementPlanner(QUEUE, retry, DeadLetterTarget("dlx"), **more).natively(native)


def plan_one(planner, message, result, cause=Cause.HANDLER, error=None):
    """The only pending change of a plan for one message."""
    plan = planner.plan([MessageOutcome(message, result, cause, error)], NOW)
    assert not plan.settlements
    [pending] = plan.copies
    return pending


def seconds(pending):
    """The delay of a modification."""
    return (pending.copy.until - NOW).total_seconds()


def modified(message, pending):
    """The message as it comes back."""
    headers = {**(message.properties.headers or {}), **pending.copy.headers}
    return a_message(headers=headers)


# --- what is planned -----------------------------------------------------------------------


@given(abilities, batches_of_outcomes(), st.integers(0, 3))
def test_each_message_is_in_one_part_of_the_plan(native, outcomes, max_attempts):
    """And no header is one that someone can't read."""
    plan = a_planner(native, max_attempts).plan(outcomes, NOW)

    settled = [tag for each in plan.settlements for tag in each.tags]
    assert Counter(each.message.delivery_tag for each in outcomes) == Counter(
        [*settled, *(each.tag for each in plan.copies)]
    )
    for each in plan.copies:
        if each.reason is None or native.dead_letters:
            assert not each.copy.tags
            assert each.copy.dead == (each.reason is not None)
            check_modified_headers(each.copy.headers)
        else:
            assert isinstance(each.copy, Copy)


_HEADERS = {
    "x-retry-count": (1, True, "1", -1),
    "x-retry-queue": (QUEUE, "other"),
    "x-retry-reason": ("slow",),
    "x-retry-remaining-delay": (500,),
    "x-retry-deliveries": (1, 2),
    "x-first-failed-at": (MS, "never"),
    "x-delivery-count": (1, 2, 5),
    "x-crash-count": (2,),
    "x-death": ([{"queue": QUEUE, "reason": "rejected", "count": 2}], 7),
    "x-dead-letter-reason": ("rejected",),
    "x-dead-letter-count": (2, 4),
    "x-dead-letter-detail": ("why",),
    "x-dead-letter-after": ("before",),
    "x-exception-type": ("KeyError",),
    "x-exception-message": ("'a'",),
    "tenant": (1, 2),
}
_BASES = ({}, {"x-retry-count": 1}, {"x-dead-letter-reason": "exhausted"}, {"x-delivery-count": 4})


def neighbours(base, result):
    """Outcomes that differ in one thing from a first one, or in nothing."""
    of = functools.partial(a_message, headers=base)
    failed = functools.partial(MessageOutcome, result=result)
    yield failed(of())
    yield failed(of())
    for name, values in _HEADERS.items():
        for value in values:
            yield failed(a_message(headers={**base, name: value}))
    for days in (1, 2):
        yield failed(Retried(of(), NOW - timedelta(days=days)))
    for error in (ValueError("a"), ValueError("b"), KeyError("b")):
        yield failed(of(), cause=Cause.EXCEPTION, error=error)
    for cause in Cause:
        yield failed(of(), cause=cause)
    for other in (*MessageResult, Nack(), Nack("bad"), Requeue(), Requeue("bad"), Requeue(delay=5)):
        yield MessageOutcome(of(), other)


@pytest.mark.parametrize("native", [V4_0, V4_3, replace(V4_3, dead_letters=False)])
@pytest.mark.parametrize("base", _BASES)
@pytest.mark.parametrize("result", [NACK, REQUEUE, REQUEUE_IMMEDIATE])
@pytest.mark.parametrize("target", [None, DeadLetterTarget("dlx")])
def test_messages_of_a_batch_are_planned_as_each_one_would_be_alone(native, base, result, target):
    """A decision that several share is about each of them."""
    planner = replace(a_planner(native), dead_letters=target, crashes=CrashPolicy(3, 8))
    outcomes = list(neighbours(base, result))
    alone = [planner.plan([each], NOW) for each in outcomes]
    together = planner.plan(outcomes, NOW)
    assert [copy for plan in alone for copy in plan.copies] == list(together.copies)
    assert Counter(each.disposition for plan in alone for each in plan.settlements) == Counter(
        each.disposition for each in together.settlements for _ in each.tags
    )


def test_messages_that_fail_together_share_a_modification():
    """The broker gets one frame for them, and it is planned once."""
    messages = [a_message(tag, headers={"tenant": tag, "x-retry-count": 1}) for tag in range(1, 9)]
    plan = a_planner().plan([MessageOutcome(each, Requeue(delay=5)) for each in messages], NOW)
    assert 1 == len({id(each.copy) for each in plan.copies})


@given(batches_of_outcomes())
def test_without_headers_there_are_copies(outcomes):
    """A session that can't attach a count can't retry anything itself."""
    native = replace(V4_3, headers=False)
    plain = SettlementPlanner(QUEUE, RetryPolicy(3, "x-retry-count"), DeadLetterTarget("dlx"))
    assert plain.plan(outcomes, NOW) == a_planner(native).plan(outcomes, NOW)


def test_a_count_in_a_header_without_x_needs_copies():
    """A broker refuses to attach it."""
    planner = SettlementPlanner(QUEUE, RetryPolicy(3, "attempts")).natively(V4_3)
    assert isinstance(plan_one(planner, a_message(), REQUEUE).copy, Copy)


@pytest.mark.parametrize("native", [V4_0, V4_3])
def test_a_retry_counts_and_remembers_its_first_failure(native):
    """It keeps its route, so that nothing else has to be written."""
    pending = plan_one(a_planner(native), a_message(7, headers={"a": 1}), REQUEUE)
    headers = dict(pending.copy.headers)
    returned = headers.pop("x-retry-deliveries", None)
    assert (None if native.uncounted else 1) == returned
    assert {"x-retry-count": 1, "x-first-failed-at": MS} == headers
    assert not pending.copy.failed
    again = plan_one(a_planner(native), modified(a_message(), pending), REQUEUE)
    assert 2 == again.copy.headers["x-retry-count"]
    assert "x-first-failed-at" not in again.copy.headers


def test_a_reason_is_attached_and_emptied_by_the_next_retry_without_one():
    """Nothing can be removed from a message that stays in its queue."""
    pending = plan_one(a_planner(), a_message(), Requeue("later", delay=2))
    assert "later" == pending.copy.headers["x-retry-reason"]
    again = plan_one(a_planner(), modified(a_message(), pending), REQUEUE)
    assert "" == again.copy.headers["x-retry-reason"]


def test_what_was_known_of_crashes_and_parts_of_a_delay_is_cleared():
    """The message has a result, and its delay is over."""
    message = a_message(headers={"x-crash-count": 2, "x-retry-remaining-delay": 10})
    headers = plan_one(a_planner(), message, REQUEUE).copy.headers
    assert (0, 0) == (headers["x-crash-count"], headers["x-retry-remaining-delay"])


def test_a_count_that_isnt_a_number_is_reported():
    """As with copies."""
    assert plan_one(a_planner(), a_message(headers={"x-retry-count": "?"}), REQUEUE).malformed_count


# --- delays --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (Requeue(delay=0.05), 0.1),
        (Requeue(delay=0.6), 0.6),
        (Requeue(delay=7), 7),
        (Requeue(delay=timedelta(hours=1)), 300),
        # Without a delay it would come back at once, before all others.
        (Requeue(delay=0), 1),
        (REQUEUE, 1),
    ],
)
def test_a_delay_is_exact_and_no_queue_is_needed_for_it(result, expected):
    """Rounded up to a tenth of a second, so that messages share a frame."""
    pending = plan_one(a_planner(), a_message(), result)
    assert (expected, 0) == (seconds(pending), pending.hold)


def test_delays_grow_as_configured():
    """By default from 1 s to 30 s, otherwise as `requeue_delay` and its kind say."""
    default = a_planner(hold=HoldPolicy(by_default=True), max_attempts=9)
    configured = a_planner(delay_steps=make_delay_steps(0.2, 3, 5), max_attempts=9)
    counts = [a_message(headers={"x-retry-count": count}) for count in range(7)]
    assert [1, 2, 4, 8, 16, 30, 30] == [
        seconds(plan_one(default, each, REQUEUE)) for each in counts
    ]
    assert [0.2, 0.6, 1.8, 5, 5, 5, 5] == [
        seconds(plan_one(configured, each, REQUEUE)) for each in counts
    ]


def test_a_queue_that_delays_nothing_lets_the_consumer_hold_the_message():
    """Then it is modified."""
    pending = plan_one(a_planner(V4_0), a_message(), Requeue(delay=5))
    assert (5, None) == (pending.hold, pending.copy.until)


def test_a_delay_that_is_too_long_for_one_hold_goes_on():
    """And the message isn't handled before it is over."""
    planner = a_planner(V4_0, hold=HoldPolicy(longest=100))
    pending = plan_one(planner, a_message(), Requeue(delay=250))
    holds, message = [pending.hold], a_message()
    while (message := modified(message, pending)) and (
        following := planner.continued_delay(message, NOW)
    ):
        pending = following
        holds.append(pending.hold)
    assert [100, 100, 50] == holds
    assert (1, 0) == (message.retry_count, message.headers["x-retry-remaining-delay"])


# --- dead letters --------------------------------------------------------------------------


def test_a_dead_letter_says_why():
    """In the same headers as a copy, with times as numbers."""
    message = a_message(7, headers={"x-retry-count": 3})
    pending = plan_one(a_planner(), message, Requeue("no stock"), Cause.EXCEPTION, ValueError("äh"))
    assert (
        Modification(
            (),
            failed=False,
            dead=True,
            headers={
                "x-dead-letter-reason": "exhausted",
                "x-original-queue": QUEUE,
                "x-dead-lettered-at": MS,
                "x-dead-letter-after": f"{QUEUE} rejected 1",
                "x-first-failed-at": MS,
                "x-dead-letter-detail": "no stock",
                "x-exception-type": "builtins.ValueError",
                "x-exception-message": "äh",
                "x-retry-count": 3,
            },
        )
        == pending.copy
    )
    assert DeadLetterReason.EXHAUSTED is pending.reason


def test_a_message_with_unreadable_headers_is_dead_lettered_without_a_count():
    """Its attempts can't be counted."""
    message = a_message(undecodable={"headers": UNDECODABLE})
    pending = plan_one(a_planner(), message, REQUEUE)
    assert DeadLetterReason.UNDECODABLE is pending.reason
    assert pending.copy.dead
    assert "x-retry-count" not in pending.copy.headers


def test_headers_of_an_earlier_death_are_emptied():
    """Otherwise they would seem to belong to this one."""
    earlier = dict.fromkeys(
        ("x-dead-letter-detail", "x-exception-type", "x-exception-message", "x-retry-queue"), "old"
    )
    message = a_message(headers={**earlier, "x-dead-letter-reason": "rejected"})
    headers = plan_one(a_planner(), message, NACK).copy.headers
    assert dict.fromkeys(earlier, "") == {name: headers[name] for name in earlier}
    assert 2 == headers["x-dead-letter-count"]
    info = death_info(modified(message, plan_one(a_planner(), message, NACK)))
    assert (None, None, None) == (info.detail, info.exception_type, info.exception_message)


def test_a_dead_letter_that_comes_back_again_and_again_is_held():
    """As a copy would be."""
    message = a_message(headers={"x-dead-letter-reason": "rejected", "x-dead-letter-count": 2})
    pending = plan_one(a_planner(), message, NACK)
    assert pending.is_loop
    assert 1 == pending.hold


@pytest.mark.parametrize(
    "planner",
    [
        a_planner(replace(V4_3, dead_letters=False)),
        a_planner(dead_letters_differ=True),
    ],
)
def test_dead_letters_are_copies_where_the_queue_might_lose_them_or_send_them_elsewhere(planner):
    """It is decided for each kind: retries still need no copy."""
    assert isinstance(plan_one(planner, a_message(), NACK).copy, Copy)
    assert isinstance(plan_one(planner, a_message(), REQUEUE).copy, Modification)


@pytest.mark.parametrize("native", [V4_0, V4_3])
def test_without_a_destination_a_message_that_failed_for_good_is_retried(native):
    """Delayed by the queue, or held first."""
    native = replace(native, dead_letters=False)
    retry = RetryPolicy(3, "x-retry-count")
    planner = SettlementPlanner(QUEUE, retry).natively(native)
    message = a_message(headers={"x-retry-count": 5})
    pending = plan_one(planner, message, REQUEUE)
    assert pending.is_undeliverable
    assert 4 == (seconds(pending) if native.delays else pending.hold)
    assert 6 == pending.copy.headers["x-retry-count"]
    unreadable = a_message(undecodable={"headers": UNDECODABLE})
    assert plan_one(planner, unreadable, REQUEUE).is_undeliverable
    assert Disposition.REJECT in {
        each.disposition for each in planner.plan([MessageOutcome(message, NACK)], NOW).settlements
    }


# --- reading dead letters ------------------------------------------------------------------


def buried(message, pending, **death):
    """The dead letter as the broker delivers it."""
    entry = {
        "queue": QUEUE,
        "reason": "rejected",
        "count": 1,
        "exchange": "events",
        "routing-keys": ["order.created"],
        "time": NOW,
        **death,
    }
    headers = {**(message.properties.headers or {}), **pending.copy.headers, "x-death": [entry]}
    return a_message(exchange="dlx", headers=headers)


def test_the_reason_is_read_although_the_broker_wrote_its_own():
    """And the route, which only the broker has written."""
    message = a_message(headers={"x-retry-count": 2})
    letter = buried(message, plan_one(a_planner(), message, Nack("broken")))
    info = death_info(letter)
    assert ("rejected", "broken", QUEUE, 2) == (info.reason, info.detail, info.queue, info.retries)
    assert info.died_at is not None
    assert abs(info.died_at - NOW) < timedelta(milliseconds=1)
    assert info.origin is not None
    assert ("events", "order.created") == (info.origin.exchange, info.origin.routing_key)
    copy = replay_copy(letter, info)
    assert isinstance(copy, Copy)
    assert ("events", "order.created") == (copy.exchange, copy.routing_key)
    assert {} == {
        name: value for name, value in (copy.properties.headers or {}).items() if value != ""
    }


def test_a_later_death_counts_more():
    """The message expired in the dead-letter queue, for example."""
    message = a_message()
    pending = plan_one(a_planner(), message, NACK, Cause.EXCEPTION)
    assert "handler-error" == death_info(buried(message, pending)).reason
    assert "expired" == death_info(buried(message, pending, reason="expired")).reason
    assert "rejected" == death_info(buried(message, pending, count=2)).reason
    assert "rejected" == death_info(buried(message, pending, queue="other")).reason


def test_a_second_death_in_the_same_queue_is_expected():
    """The broker counts it, instead of adding an entry."""
    message = a_message()
    first = buried(message, plan_one(a_planner(), message, NACK))
    again = plan_one(a_planner(), first, NACK, Cause.EXCEPTION)
    assert f"{QUEUE} rejected 2" == again.copy.headers["x-dead-letter-after"]
    assert "handler-error" == death_info(buried(first, again, count=2)).reason
    # A broker that doesn't believe a publisher's x-death begins again.
    assert "handler-error" == death_info(buried(first, again, count=1)).reason


@pytest.mark.parametrize("deaths", [None, "yes", [1], [{"queue": QUEUE, "reason": "expired"}]])
def test_other_entries_don_t_count(deaths):
    """Only those of this queue and this reason."""
    message = a_message(headers={"x-death": deaths})
    headers = plan_one(a_planner(), message, NACK).copy.headers
    assert f"{QUEUE} rejected 1" == headers["x-dead-letter-after"]


def test_the_broker_s_own_dead_letter_keeps_the_reason_of_the_last_retry():
    """It was over the delivery limit, for example."""
    death = {"queue": QUEUE, "reason": "delivery_limit", "count": 1, "time": NOW}
    info = death_info(a_message(headers={"x-retry-reason": "no stock", "x-death": [death]}))
    assert ("delivery_limit", "no stock") == (info.reason, info.detail)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (NOW, NOW),
        (MS, NOW),
        (NOW.isoformat(), NOW),
        (True, None),
        (-1, None),
        (2**63 - 1, None),
        ("yesterday", None),
        (None, None),
        (1.5, None),
    ],
)
def test_a_time_is_read_whichever_protocol_wrote_it(value, expected):
    """Over AMQP 1.0 only a number or a text can be written."""
    assert expected == read_moment(value)


@pytest.mark.parametrize("value", [MS, NOW.isoformat()])
def test_a_copy_keeps_the_first_failure_that_was_written_without_a_copy(value):
    """A consumer may use AMQP 0-9-1 for a while."""
    planner = SettlementPlanner(QUEUE, RetryPolicy(3, "x-retry-count"))
    message = a_message(headers={"x-first-failed-at": value, "x-retry-reason": "later"})
    copy = plan_one(planner, message, REQUEUE).copy
    assert value == copy.properties.headers["x-first-failed-at"]
    assert "x-retry-reason" not in copy.properties.headers


# --- crashes -------------------------------------------------------------------------------

CRASHES = CrashPolicy(suspect_after=3, limit=6)


def test_own_retries_don_t_look_like_crashes():
    """Before RabbitMQ 4.3 each of them counts as a delivery."""
    planner = a_planner(V4_0, max_attempts=20)
    message = a_message()
    for count in range(1, 15):
        pending = plan_one(planner, message, REQUEUE)
        headers = {**pending.copy.headers, "x-delivery-count": count}
        message = a_message(headers=headers)
        assert Suspicion.NONE is CRASHES.judge(message, OwnRequeues())
    # But what comes back without a result does.
    for more, suspicion in ((3, Suspicion.SUSPECT), (6, Suspicion.CRASHED)):
        crashed = a_message(headers={**headers, "x-delivery-count": count + more})
        assert suspicion is CRASHES.judge(crashed, OwnRequeues())


@given(st.integers(), st.integers(0, 3), st.integers(6, 30))
def test_a_forged_header_does_not_prevent_suspicion(stated, retries, deliveries):
    """The header explains at most as many returns as there were retries."""
    headers = {
        "x-retry-deliveries": stated,
        "x-retry-count": retries,
        "x-delivery-count": deliveries,
    }
    assert Suspicion.NONE is not CRASHES.judge(a_message(headers=headers), OwnRequeues())


@pytest.mark.parametrize("native", [V4_0, V4_3])
def test_a_suspect_is_returned_where_that_counts_for_nothing(native):
    """Otherwise a copy takes its place, which a crash could duplicate."""
    planner = a_planner(native, crashes=CRASHES)
    plan = planner.plan_returns([a_message(7, headers={"x-delivery-count": 4})], NOW)
    assert native.uncounted == bool(plan.settlements)
    assert native.uncounted != bool(plan.copies)


def test_unreadable_headers_count_no_crash():
    """Neither do they raise."""
    message = a_message(undecodable={"headers": UNDECODABLE})
    assert Suspicion.NONE is CRASHES.judge(message, OwnRequeues())
