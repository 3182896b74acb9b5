"""What does a dead letter say of itself, which ones are meant, and how do they go back?"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aio_pika_batch.core.dead_letter import (
    EVERY,
    DeathInfo,
    Filter,
    NotReplayable,
    OriginalRoute,
    death_info,
    delivery_limit_from,
    format_header,
    near_delivery_limit,
    replay_copy,
    returns_by_closing,
)
from aio_pika_batch.core.publication import Copy
from aio_pika_batch.core.results import Cause, MessageOutcome, MessageResult, Nack
from aio_pika_batch.core.retry import RetryPolicy
from aio_pika_batch.core.settlement_plan import DeadLetterTarget, SettlementPlanner
from aio_pika_batch.testing.strategies import UNDECODABLE
from aio_pika_batch.testing.strategies import messages as made_messages
from tests.unit.core.strategies import NOW, a_message, delivered

DEATH = {
    "reason": "expired",
    "queue": "jobs",
    "exchange": "events",
    "routing-keys": ["order.created", "copy"],
    "time": NOW,
    "count": 1,
}

ROUTER = SettlementPlanner("jobs", RetryPolicy(3, "x-retry-count"), DeadLetterTarget("dlx"))


def buried(message, result=MessageResult.NACK, error=None):
    """The letter that this library makes of a message."""
    cause = Cause.HANDLER if error is None else Cause.EXCEPTION
    [republication] = ROUTER.plan([MessageOutcome(message, result, cause, error)], NOW).copies
    return delivered(republication.copy)


def test_our_own_letters_say_everything():
    """Why, when, where from, and in whose words."""
    letter = buried(
        a_message(headers={"x-retry-count": 2}), Nack("no such order"), ValueError("no 17")
    )
    assert DeathInfo(
        reason="handler-error",
        origin=OriginalRoute("events", "order.created"),
        queue="jobs",
        died_at=NOW,
        retries=2,
        detail="no such order",
        exception_type="builtins.ValueError",
        exception_message="no 17",
    ) == death_info(letter)


def test_a_brokers_letter_says_it_in_x_death():
    """By its latest death, which stands first."""
    older = DEATH | {"queue": "elsewhere", "reason": "rejected", "exchange": "first"}
    letter = a_message(exchange="dlx", headers={"x-death": [DEATH, older], "x-retry-count": 1})
    assert DeathInfo(
        reason="expired",
        origin=OriginalRoute("events", "order.created"),
        queue="jobs",
        died_at=NOW,
        retries=1,
    ) == death_info(letter)


def test_a_requeued_copy_that_the_broker_buries_still_knows_its_first_key():
    """To the broker it was published to the queue itself."""
    mine = {"x-original-exchange": "events", "x-original-routing-key": "order.created"}
    death = DEATH | {"exchange": "", "routing-keys": ["jobs"]}
    letter = a_message(exchange="dlx", headers={**mine, "x-death": [death]})
    assert OriginalRoute("events", "order.created") == death_info(letter).origin


@pytest.mark.parametrize(
    "headers",
    [
        None,
        {"x-death": "yes"},
        {"x-death": []},
        {"x-death": [1]},
        {"x-death": [{"reason": 1, "queue": 2, "time": 3, "exchange": 4, "routing-keys": [5]}]},
        {"x-death": [{"exchange": "events", "routing-keys": []}]},
        {"x-dead-letter-reason": 7},
        {"x-original-exchange": "events"},
        {"x-retry-count": "many"},
    ],
)
def test_what_says_nothing_that_can_be_read_is_unknown(headers):
    """Whatever is in the way, nothing is raised."""
    assert DeathInfo() == death_info(a_message(headers=headers))


def test_headers_that_cannot_be_decoded_say_nothing():
    """It can still be looked at."""
    assert DeathInfo() == death_info(a_message(undecodable={"headers": UNDECODABLE}))


# --- which ones ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (EVERY, True),
        (Filter(reasons=frozenset({"rejected", "expired"})), True),
        (Filter(reasons=frozenset({"exhausted"})), False),
        (Filter(older_than=timedelta(minutes=9)), True),
        (Filter(older_than=timedelta(minutes=10)), False),
        (Filter(newer_than=timedelta(minutes=11)), True),
        (Filter(newer_than=timedelta(minutes=10)), False),
        (Filter(older_than=timedelta(minutes=1), newer_than=timedelta(minutes=9)), False),
        (Filter(headers={"tenant": "acme", "try": "2"}), True),
        (Filter(headers={"tenant": "acme", "try": "3"}), False),
        (Filter(headers={"tenant": "acme", "other": ""}), False),
    ],
)
def test_a_letter_is_meant_if_it_meets_all_of_the_filter(where, expected):
    """Reason, age and headers."""
    message = a_message(headers={"tenant": "acme", "try": 2})
    death = DeathInfo(reason="rejected", died_at=NOW - timedelta(minutes=10))
    assert expected is where.matches(message, death, NOW)


def test_a_letter_of_unknown_age_is_neither_old_nor_new():
    """Who asks for an age means those that are known to be of it."""
    message = a_message()
    assert not Filter(older_than=timedelta(0)).matches(message, DeathInfo(), NOW)
    assert not Filter(newer_than=timedelta(days=9)).matches(message, DeathInfo(), NOW)


def test_a_time_without_a_zone_is_utc():
    """As other clients may decode it."""
    death = DeathInfo(died_at=(NOW - timedelta(hours=1)).replace(tzinfo=None))
    assert Filter(older_than=timedelta(minutes=59)).matches(a_message(), death, NOW)


def test_undecodable_headers_have_no_value_that_could_be_meant():
    """But the letter is among all of them."""
    message = a_message(undecodable={"headers": UNDECODABLE})
    assert not Filter(headers={"tenant": "acme"}).matches(message, DeathInfo(), NOW)
    assert EVERY.matches(message, DeathInfo(), NOW)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("acme", "acme"),
        (2, "2"),
        (True, "true"),
        (None, "null"),
        (1.5, "1.5"),
        (b"acme", "acme"),
        (b"\xff\x00", "ff 00"),
        (datetime(2025, 1, 2, tzinfo=UTC), "2025-01-02T00:00:00+00:00"),
        ([1, b"x", datetime(2025, 1, 2, tzinfo=UTC)], '[1, "x", "2025-01-02T00:00:00+00:00"]'),
        (MappingProxyType({"a": 1}), '{"a": 1}'),
        ({"a": {"b": b"\xff"}}, '{"a": {"b": "ff"}}'),
        ([object], "[\"<class 'object'>\"]"),
    ],
)
def test_values_are_compared_as_they_are_written(value, expected):
    """On a command line everything is text."""
    assert expected == format_header(value)


# --- the way back ----------------------------------------------------------------


@given(made_messages())
def test_a_replayed_letter_is_what_it_was_before_it_failed(message):
    """Same body, same exchange and key; no count, no trace of its death, no time to live."""
    letter = buried(message)
    death = death_info(letter)
    copy = replay_copy(letter, death)
    if message.has_readable_headers:
        first = OriginalRoute(message.original_exchange, message.original_routing_key)
        assert first == death.origin
    assert isinstance(copy, Copy)
    assert death.origin == OriginalRoute(copy.exchange, copy.routing_key)
    assert copy.mandatory
    assert message.body == copy.body
    assert copy.properties.expiration is None
    again = delivered(copy)
    assert DeathInfo() == death_info(again)
    assert 0 == again.retry_count


def test_what_others_have_written_into_headers_stays():
    """Only what tells of the death is taken off."""
    death = {f"x-{which}-death-{what}": "x" for which in ("first", "last") for what in ("queue",)}
    letter = buried(a_message(headers={"tenant": "acme", "n": 1, "x-tries": 4, **death}))
    copy = replay_copy(letter, death_info(letter), retry_count_header="x-tries")
    assert isinstance(copy, Copy)
    assert {"tenant": "acme", "n": 1, "x-retry-count": 0} == copy.properties.headers


def test_to_its_queue_only_it_keeps_its_first_key_for_its_handler():
    """An exchange may be bound to queues whose consumers were content."""
    letter = buried(a_message())
    copy = replay_copy(letter, death_info(letter), to_queue=True)
    assert isinstance(copy, Copy)
    assert ("", "jobs") == (copy.exchange, copy.routing_key)
    again = delivered(copy)
    assert ("events", "order.created") == (again.original_exchange, again.original_routing_key)


def test_to_its_queue_it_needs_no_origin():
    """Where it died is enough."""
    copy = replay_copy(a_message(), DeathInfo(queue="jobs"), to_queue=True)
    assert isinstance(copy, Copy)
    assert {} == copy.properties.headers or copy.properties.headers is None


@pytest.mark.parametrize(
    ("death", "to_queue"),
    [(DeathInfo(), False), (DeathInfo(), True), (DeathInfo(queue="q" * 256), True)],
)
def test_who_does_not_say_where_from_has_no_way_back(death, to_queue):
    """It stays, and is told of."""
    way = replay_copy(a_message(), death, to_queue=to_queue)
    assert isinstance(way, NotReplayable)
    assert "does not say" in way.why


# --- how often may one be looked at? ---------------------------------------------


@given(st.integers(0, 60), st.integers(0, 40))
def test_a_letter_with_five_deliveries_left_is_not_looked_at(count, limit):
    """Those are for whoever will handle it."""
    message = a_message(headers={"x-delivery-count": count})
    assert (limit - count <= 5) is near_delivery_limit(message, limit)


@pytest.mark.parametrize("limit", [None, -1])
def test_without_a_limit_it_may_be_looked_at_for_ever(limit):
    """Nobody drops it."""
    assert not near_delivery_limit(a_message(headers={"x-delivery-count": 10**6}), limit)


def test_what_nobody_counts_does_not_wear_out():
    """As in a classic queue; and where the count cannot be read, nobody can tell."""
    assert not near_delivery_limit(a_message(), 20)
    assert not near_delivery_limit(a_message(undecodable={"headers": UNDECODABLE}), 20)


HERE = "queue 'q' in vhost '/': received"


@pytest.mark.parametrize(
    ("refusal", "version", "expected"),
    [
        (None, (4, 0), 20),
        (None, None, 20),
        (None, (3, 10), None),
        (f"inequivalent arg 'x-queue-type' for {HERE} 'quorum' but current is none", (4, 0), None),
        (
            (
                f"406 PRECONDITION_FAILED - inequivalent arg 'x-delivery-limit' for {HERE}"
                " none but current is the value '7' of type 'long'"
            ),
            (3, 10),
            7,
        ),
        (
            f"inequivalent arg 'x-delivery-limit' for {HERE} none but current is '-1'",
            (4, 0),
            None,
        ),
        (
            f"inequivalent arg 'x-delivery-limit' for {HERE} none but current is '-1'",
            (3, 13),
            0,
        ),
        (f"inequivalent arg 'x-delivery-limit' for {HERE} other words", (4, 0), 20),
        (f"inequivalent arg 'x-max-length' for {HERE} none but current is '7'", (3, 10), 20),
        ("ACCESS_REFUSED", (3, 10), 20),
    ],
)
def test_a_queues_limit_is_what_its_broker_lets_on(refusal, version, expected):
    """In doubt it is taken to have one."""
    assert expected == delivery_limit_from(refusal, version)


@pytest.mark.parametrize(
    ("version", "expected"), [((3, 10), True), ((4, 2), True), ((4, 3), False), (None, False)]
)
def test_letters_go_back_in_the_way_that_costs_least(version, expected):
    """Since 4.3 a nack is not counted, and a closed channel is."""
    assert expected is returns_by_closing(version)
