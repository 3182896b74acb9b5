"""What is settled at once, what is published first, and how often a message is retried."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aio_pika_batch.core.hold_policy import HoldPolicy
from aio_pika_batch.core.message import Properties
from aio_pika_batch.core.results import Cause, MessageOutcome, MessageResult, Nack, Requeue
from aio_pika_batch.core.retry import DeadLetterReason, RetryPolicy
from aio_pika_batch.core.settlement import Disposition
from aio_pika_batch.core.settlement_plan import CopyKind, SettlementPlan, SettlementPlanner
from aio_pika_batch.core.topology_options import DeadLetterTarget
from aio_pika_batch.testing.strategies import UNDECODABLE, results, short_texts, sound_properties
from tests.unit.core.strategies import (
    NOW,
    QUEUE,
    a_message,
    batches_of_outcomes,
    delivered,
    messages,
    without,
)

ACK, NACK = MessageResult.ACK, MessageResult.NACK
REQUEUE, REQUEUE_IMMEDIATE = MessageResult.REQUEUE, MessageResult.REQUEUE_IMMEDIATE

DLX = DeadLetterTarget("dlx")

policies = st.builds(RetryPolicy, st.integers(0, 5), st.just("x-retry-count"))
targets = st.builds(DeadLetterTarget, short_texts, st.none() | short_texts)
planners = st.builds(
    SettlementPlanner,
    st.just(QUEUE),
    policies,
    st.none() | targets,
    exception_message=st.booleans(),
    reject_undeliverable=st.booleans(),
)


def a_router(max_attempts=3, dead_letters=DLX):
    """A planner that dead-letters to an exchange of this name."""
    return SettlementPlanner(QUEUE, RetryPolicy(max_attempts, "x-retry-count"), dead_letters)


def settled(plan):
    """The delivery tags that are settled at once, with their disposition."""
    return [(tag, each.disposition) for each in plan.settlements for tag in each.tags]


def plan_one(planner, message, result, cause=Cause.HANDLER):
    """The plan for one message."""
    return planner.plan([MessageOutcome(message, result, cause)], NOW)


def kind_of(result):
    """The member of the enumeration that a result means."""
    match result:
        case Nack():
            return NACK
        case Requeue():
            return REQUEUE
        case _:
            return result


@given(planners, batches_of_outcomes())
def test_each_original_is_settled_at_once_or_after_its_copy(planner, outcomes):
    """No tag is in both parts of the plan, or twice."""
    plan = planner.plan(outcomes, NOW)

    tags = [tag for tag, _ in settled(plan)] + [each.tag for each in plan.copies]

    assert Counter(outcome.message.delivery_tag for outcome in outcomes) == Counter(tags)


@given(planners, batches_of_outcomes())
def test_only_acked_messages_are_acked_at_once(planner, outcomes):
    """An original that is requeued or dead-lettered is not among them."""
    plan = planner.plan(outcomes, NOW)

    acked = [tag for tag, disposition in settled(plan) if disposition is Disposition.ACK]

    assert [outcome.message.delivery_tag for outcome in outcomes if outcome.result is ACK] == acked


@given(planners, batches_of_outcomes())
def test_the_plan_of_each_result(planner, outcomes):
    """ACK and REQUEUE_IMMEDIATE publish nothing. Without an exchange a dead letter is a reject."""
    plan = planner.plan(outcomes, NOW)
    at_once = dict(settled(plan))
    waiting = {each.tag: each for each in plan.copies}

    for outcome in outcomes:
        tag = outcome.message.delivery_tag
        match kind_of(outcome.result):
            case MessageResult.ACK:
                assert Disposition.ACK is at_once[tag]
            case MessageResult.REQUEUE_IMMEDIATE:
                assert Disposition.REQUEUE is at_once[tag]
            case MessageResult.NACK if planner.dead_letters is None and tag in waiting:
                assert outcome.cause is not Cause.HANDLER
                assert not planner.reject_undeliverable
                assert waiting[tag].is_undeliverable
                assert waiting[tag].hold >= 1
            case MessageResult.NACK if planner.dead_letters is None:
                assert Disposition.REJECT is at_once[tag]
                assert planner.reject_undeliverable or outcome.cause is Cause.HANDLER
            case MessageResult.NACK:
                assert CopyKind.DEAD_LETTER is waiting[tag].kind
            case MessageResult.REQUEUE if tag in at_once:
                assert planner.dead_letters is None
                assert planner.reject_undeliverable
                assert Disposition.REJECT is at_once[tag]
            case MessageResult.REQUEUE:
                assert outcome is waiting[tag].outcome


@given(planners, batches_of_outcomes())
def test_dispositions_are_grouped_and_keep_the_order_of_the_batch(planner, outcomes):
    """Rarely more than two settlements, however large the batch."""
    plan = planner.plan(outcomes, NOW)
    place = {outcome.message.delivery_tag: at for at, outcome in enumerate(outcomes)}

    dispositions = [each.disposition for each in plan.settlements]
    assert len(set(dispositions)) == len(dispositions)
    for each in plan.settlements:
        assert sorted(each.tags, key=place.__getitem__) == list(each.tags)
        assert each.tags
    copies = [each.tag for each in plan.copies]
    assert sorted(copies, key=place.__getitem__) == copies


@given(st.integers(0, 6), messages(of=sound_properties), st.sampled_from([REQUEUE, Requeue("x")]))
@example(0, a_message(), REQUEUE)
def test_a_message_is_handled_once_more_than_it_is_requeued(max_attempts, message, result):
    """It is dead-lettered after at most 1 + `max_requeue_attempts` attempts."""
    planner = a_router(max_attempts)
    came_with = message.retry_count
    tries = 0
    while True:
        tries += 1
        (step,) = plan_one(planner, message, result).copies
        if step.kind is CopyKind.DEAD_LETTER:
            break
        assert message.retry_count + 1 == step.copy.add["x-retry-count"]
        message = delivered(step.copy)

    assert 1 + max(0, max_attempts - came_with) == tries
    assert DeadLetterReason.EXHAUSTED is step.reason


@given(st.integers(0, 6), short_texts, short_texts)
def test_the_last_attempt_knows_the_first_publication(hops, exchange, routing_key):
    """Requeues use the default exchange.

    The handler and the dead letter have the original route.
    """
    message = a_message(exchange=exchange, routing_key=routing_key)
    for hop in range(hops):
        now = NOW + timedelta(seconds=hop)
        (step,) = a_router(hops).plan([MessageOutcome(message, REQUEUE)], now).copies
        message = delivered(step.copy)
        assert ("", QUEUE) == (message.exchange, message.routing_key)

    assert (exchange, routing_key) == (message.original_exchange, message.original_routing_key)
    (dead,) = a_router(hops).plan([MessageOutcome(message, REQUEUE)], NOW).copies
    assert ("dlx", routing_key) == (dead.copy.exchange, dead.copy.routing_key)
    if hops:
        assert NOW == message.headers["x-first-failed-at"]


@given(messages(of=sound_properties))
@example(a_message(headers={"x-original-exchange": 5, "x-original-routing-key": b"k"}))
def test_a_requeue_replaces_an_invalid_original_route(message):
    """Whatever the headers contain, a requeue does not change what is read from them."""
    before = (message.original_exchange, message.original_routing_key)
    (step,) = plan_one(a_router(10), message, REQUEUE).copies
    if step.kind is CopyKind.DEAD_LETTER:
        return

    after = delivered(step.copy)

    assert before == (after.original_exchange, after.original_routing_key)


@given(st.sampled_from([NACK, REQUEUE, Nack("why"), Requeue("why")]), messages(), st.integers(0, 3))
def test_without_a_dead_letter_exchange_messages_can_be_rejected(result, message, count):
    """Nothing is published, whatever state the message is in: a policy may dead-letter it."""
    message = replace_headers(message, {"x-retry-count": 3 + count})
    router = replace(a_router(3, dead_letters=None), reject_undeliverable=True)

    plan = plan_one(router, message, result)

    assert [(1, Disposition.REJECT)] == settled(plan)
    assert [message] == [each.message for each in plan.discarded]


@given(
    st.sampled_from([REQUEUE, Requeue("why"), NACK]),
    messages(),
    st.integers(0, 30),
    st.sampled_from([1.0, 10.0, 300.0]),
)
def test_a_message_that_failed_for_good_is_never_lost_for_want_of_a_destination(
    result, message, count, longest
):
    """It is retried with a growing delay, whatever state it is in; nothing is discarded."""
    message = replace_headers(message, {"x-retry-count": 3 + count})
    router = replace(a_router(3, dead_letters=None), hold=HoldPolicy(longest_undeliverable=longest))

    plan = plan_one(router, message, result, Cause.EXCEPTION)

    [copy] = plan.copies
    assert () == tuple(plan.settlements) == tuple(plan.discarded)
    assert copy.is_undeliverable
    assert 1 <= copy.hold <= longest
    assert ("", QUEUE) == (copy.copy.exchange, copy.copy.routing_key)
    if "headers" not in message.properties.undecodable:
        assert count + 4 == copy.copy.add["x-retry-count"]


def test_an_undecodable_message_without_a_destination_is_retried_as_it_is():
    """Its headers can't be read, so its attempts can't be counted, and its delay is always long."""
    message = a_message(undecodable={"headers": UNDECODABLE})
    planner = replace(a_router(3, dead_letters=None), hold=HoldPolicy())

    [copy] = plan_one(planner, message, NACK, Cause.UNDECODABLE).copies

    assert ({}, 8) == (copy.copy.add, copy.hold)
    assert copy.is_undeliverable


def test_only_a_copy_for_a_wait_queue_is_held_instead():
    """Others have nothing to do with wait queues."""
    planner = a_router()
    [at_once] = plan_one(planner, a_message(), REQUEUE).copies
    [delayed] = plan_one(planner, a_message(), Requeue(delay=4)).copies

    assert at_once is planner.held_instead(at_once)
    assert 4 == planner.held_instead(delayed).hold


@given(st.floats(0.001, 10_000), st.floats(0.01, 600), messages(of=sound_properties))
def test_a_long_delay_is_held_in_parts_that_add_up(delay, longest, message):
    """No part is longer than allowed, and only the first copy counts as an attempt."""
    # Hypothesis draws names that occur in the code, too, so the message may have been retried.
    message = replace_headers(message, without(message.headers, "x-retry-count"))
    router = replace(a_router(), hold=HoldPolicy(longest=longest))
    level = router.delay_steps.level(delay, 0) / 1000

    [copy] = router.plan(
        [MessageOutcome(message, Requeue(delay=delay))], NOW, wait_queues=False
    ).copies
    held = [copy.hold]
    assert 1 == copy.copy.add["x-retry-count"]
    while "x-retry-remaining-delay" in copy.copy.add and len(held) < 100:
        copy = router.continued_delay(delivered(copy.copy), NOW)
        assert "x-retry-count" not in copy.copy.add
        held.append(copy.hold)

    assert max(held) <= longest
    if len(held) < 100:
        assert level <= sum(held) + 1e-6
        assert sum(held) <= level + 0.002 * len(held)


def replace_headers(message, headers):
    """The message with other headers, if its headers can be decoded."""
    properties = message.properties
    if "headers" not in properties.undecodable:
        properties = replace(properties, headers=headers)
    route = (message.exchange, message.routing_key)
    return type(message)(message._source, 1, False, message.body, route, properties)


@given(messages(of=st.just(Properties(undecodable={"headers": UNDECODABLE}))), results)
def test_a_requeue_without_readable_headers_is_a_dead_letter(message, result):
    """Its reason is undecodable, it keeps its route, and it has no count."""
    plan = plan_one(a_router(), message, result)

    match kind_of(result):
        case MessageResult.ACK | MessageResult.REQUEUE_IMMEDIATE:
            assert () == tuple(plan.copies)
        case requeue_or_nack:
            (step,) = plan.copies
            reasons = {
                NACK: DeadLetterReason.REJECTED,
                REQUEUE: DeadLetterReason.UNDECODABLE,
            }
            assert reasons[requeue_or_nack] is step.reason
            assert message.routing_key == step.copy.routing_key
            assert "x-retry-count" not in step.copy.add
            assert message.routing_key == step.copy.add["x-original-routing-key"]


@pytest.mark.parametrize(
    ("cause", "reason"),
    [
        (Cause.HANDLER, DeadLetterReason.REJECTED),
        (Cause.EXCEPTION, DeadLetterReason.HANDLER_ERROR),
        (Cause.TIMEOUT, DeadLetterReason.HANDLER_ERROR),
        (Cause.MISSING, DeadLetterReason.HANDLER_ERROR),
        (Cause.INVALID, DeadLetterReason.HANDLER_ERROR),
        (Cause.SHUTDOWN, DeadLetterReason.HANDLER_ERROR),
        (Cause.UNDECODABLE, DeadLetterReason.UNDECODABLE),
    ],
)
@pytest.mark.parametrize("result", [NACK, Nack("why")])
def test_the_reason_of_a_dead_letter_depends_on_the_cause(cause, reason, result):
    """The handler, its failure, or the message itself."""
    (step,) = plan_one(a_router(), a_message(), result, cause).copies

    assert reason is step.reason
    assert reason.value == step.copy.add["x-dead-letter-reason"]


@pytest.mark.parametrize("cause", Cause)
def test_a_message_without_attempts_left_is_exhausted(cause):
    """Whatever asked for another attempt."""
    message = a_message(headers={"x-retry-count": 3})

    (step,) = plan_one(a_router(3), message, REQUEUE, cause).copies

    assert DeadLetterReason.EXHAUSTED is step.reason


@pytest.mark.parametrize(
    ("headers", "malformed", "next_count"),
    [
        (None, False, 1),
        ({}, False, 1),
        ({"x-retry-count": None}, False, 1),
        ({"x-retry-count": 0}, False, 1),
        ({"x-retry-count": 1}, False, 2),
        ({"x-retry-count": "1"}, False, 2),
        ({"x-retry-count": "one"}, True, 1),
        ({"x-retry-count": -1}, True, 1),
        ({"x-retry-count": 1.0}, True, 1),
        ({"x-retry-count": True}, True, 1),
    ],
)
def test_an_invalid_count_is_0_and_reported(headers, malformed, next_count):
    """A number in another type is a number. The settler logs others."""
    (step,) = plan_one(a_router(), a_message(headers=headers), REQUEUE).copies

    assert (malformed, next_count) == (step.malformed_count, step.copy.add["x-retry-count"])


@pytest.mark.parametrize(("stated", "key"), [(None, "order.created"), ("dead", "dead"), ("", "")])
def test_a_dead_letter_keeps_its_routing_key_unless_the_target_has_one(stated, key):
    """An empty routing key is one as well."""
    planner = a_router(dead_letters=DeadLetterTarget("dlx", stated))

    (step,) = plan_one(planner, a_message(), NACK).copies

    assert ("dlx", key) == (step.copy.exchange, step.copy.routing_key)


def test_no_outcomes_make_an_empty_plan():
    """Nothing is sent."""
    assert SettlementPlan([], [], []) == a_router().plan([], NOW)
    assert not settled(SettlementPlan())
