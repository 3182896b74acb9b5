"""What dead letters say, how they are selected, and how they are replayed."""

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
from aio_pika_batch.core.settlement_plan import SettlementPlanner
from aio_pika_batch.core.topology_options import DeadLetterTarget
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
    """The dead letter that this library makes of a message."""
    cause = Cause.HANDLER if error is None else Cause.EXCEPTION
    [pending] = ROUTER.plan([MessageOutcome(message, result, cause, error)], NOW).copies
    return delivered(pending.copy)


def test_dead_letters_of_this_library_are_read():
    """Reason, time, origin, and the text of the handler."""
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


def test_dead_letters_of_a_broker_are_read_from_x_death():
    """From the latest entry, which is the first one."""
    older = DEATH | {"queue": "elsewhere", "reason": "rejected", "exchange": "first"}
    letter = a_message(exchange="dlx", headers={"x-death": [DEATH, older], "x-retry-count": 1})
    assert DeathInfo(
        reason="expired",
        origin=OriginalRoute("events", "order.created"),
        queue="jobs",
        died_at=NOW,
        retries=1,
    ) == death_info(letter)


def test_a_requeued_copy_that_the_broker_dead_letters_keeps_its_origin():
    """For the broker it was published to the queue itself."""
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
def test_unreadable_headers_are_unknown(headers):
    """Nothing raises, whatever the headers contain."""
    assert DeathInfo() == death_info(a_message(headers=headers))


def test_undecodable_headers_are_unknown():
    """The dead letter can still be read."""
    assert DeathInfo() == death_info(a_message(undecodable={"headers": UNDECODABLE}))


# --- selection -----------------------------------------------------------------


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
def test_a_filter_needs_all_of_its_conditions(where, expected):
    """Reason, age and headers."""
    message = a_message(headers={"tenant": "acme", "try": 2})
    death = DeathInfo(reason="rejected", died_at=NOW - timedelta(minutes=10))
    assert expected is where.matches(message, death, NOW)


def test_a_dead_letter_of_unknown_age_matches_no_age():
    """An age selects only dead letters that are known to have it."""
    message = a_message()
    assert not Filter(older_than=timedelta(0)).matches(message, DeathInfo(), NOW)
    assert not Filter(newer_than=timedelta(days=9)).matches(message, DeathInfo(), NOW)


def test_a_time_without_a_time_zone_is_utc():
    """Other clients may decode it that way."""
    death = DeathInfo(died_at=(NOW - timedelta(hours=1)).replace(tzinfo=None))
    assert Filter(older_than=timedelta(minutes=59)).matches(a_message(), death, NOW)


def test_undecodable_headers_match_no_value():
    """But an empty filter selects the dead letter."""
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
def test_header_values_are_compared_as_text(value, expected):
    """On a command line everything is text."""
    assert expected == format_header(value)


# --- replay --------------------------------------------------------------------


@given(made_messages())
def test_a_replayed_message_is_like_a_new_one(message):
    """Same body, exchange and routing key.

    No count, no headers about the failure, no expiration.
    """
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


def test_a_replay_keeps_other_headers():
    """It removes only those about the failure."""
    death = {f"x-{which}-death-{what}": "x" for which in ("first", "last") for what in ("queue",)}
    letter = buried(a_message(headers={"tenant": "acme", "n": 1, "x-tries": 4, **death}))
    copy = replay_copy(letter, death_info(letter), retry_count_header="x-tries")
    assert isinstance(copy, Copy)
    assert {"tenant": "acme", "n": 1, "x-retry-count": 0} == copy.properties.headers


def test_a_replay_to_the_queue_keeps_the_original_routing_key():
    """For the handler. Its exchange may be bound to queues whose consumers succeeded."""
    letter = buried(a_message())
    copy = replay_copy(letter, death_info(letter), to_queue=True)
    assert isinstance(copy, Copy)
    assert ("", "jobs") == (copy.exchange, copy.routing_key)
    again = delivered(copy)
    assert ("events", "order.created") == (again.original_exchange, again.original_routing_key)


def test_a_replay_to_the_queue_needs_no_origin():
    """The queue is enough."""
    copy = replay_copy(a_message(), DeathInfo(queue="jobs"), to_queue=True)
    assert isinstance(copy, Copy)
    assert {} == copy.properties.headers or copy.properties.headers is None


@pytest.mark.parametrize(
    ("death", "to_queue"),
    [(DeathInfo(), False), (DeathInfo(), True), (DeathInfo(queue="q" * 256), True)],
)
def test_a_dead_letter_without_an_origin_cannot_be_replayed(death, to_queue):
    """It stays, and the reason is returned."""
    way = replay_copy(a_message(), death, to_queue=to_queue)
    assert isinstance(way, NotReplayable)
    assert "does not say" in way.why


# --- delivery limits -----------------------------------------------------------


@given(st.integers(0, 60), st.integers(0, 40))
def test_a_dead_letter_with_five_deliveries_left_is_not_read(count, limit):
    """Those are for its consumer."""
    message = a_message(headers={"x-delivery-count": count})
    assert (limit - count <= 5) is near_delivery_limit(message, limit)


@pytest.mark.parametrize("limit", [None, -1])
def test_without_a_delivery_limit_it_can_be_read_forever(limit):
    """Its queue drops nothing."""
    assert not near_delivery_limit(a_message(headers={"x-delivery-count": 10**6}), limit)


def test_without_a_delivery_count_it_can_be_read():
    """In a classic queue, or if the headers cannot be read."""
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
def test_the_delivery_limit_is_read_from_the_brokers_refusal(refusal, version, expected):
    """In doubt the queue is assumed to have one."""
    assert expected == delivery_limit_from(refusal, version)


@pytest.mark.parametrize(
    ("version", "expected"), [((3, 10), True), ((4, 2), True), ((4, 3), False), (None, False)]
)
@pytest.mark.parametrize(
    "refusal", [None, f"inequivalent arg 'x-delivery-limit' for {HERE} none but current is '7'"]
)
def test_dead_letters_are_returned_without_a_counted_delivery(refusal, version, expected):
    """Since 4.3 a nack is not counted, and a closed channel is."""
    assert expected is returns_by_closing(refusal, version)


@pytest.mark.parametrize("version", [(3, 10), (4, 3), None])
def test_a_classic_queue_gets_its_dead_letters_back_when_the_channel_is_closed(version):
    """It counts no deliveries, and RabbitMQ 4.3 is busy for long after a nack of many."""
    refusal = f"inequivalent arg 'x-queue-type' for {HERE} 'quorum' but current is 'classic'"
    assert returns_by_closing(refusal, version)
