"""The properties and headers of copies."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aio_pika_batch.core.message import Properties
from aio_pika_batch.core.publication import Copy
from aio_pika_batch.core.results import Cause, MessageOutcome, MessageResult, Nack, Requeue, Result
from aio_pika_batch.core.retry import RetryPolicy
from aio_pika_batch.core.settlement_plan import SettlementPlanner
from aio_pika_batch.core.topology_options import DeadLetterTarget
from aio_pika_batch.testing.strategies import (
    UNDECODABLE,
    broken_properties,
    headers,
    sound_properties,
)
from tests.unit.core.strategies import (
    NOW,
    QUEUE,
    Odd,
    StubSource,
    a_message,
    messages,
    texts,
    without,
)

NACK, REQUEUE = MessageResult.NACK, MessageResult.REQUEUE

ADDED_ONCE = ("x-original-exchange", "x-original-routing-key", "x-first-failed-at")
DROPPED = ("CC", "BCC", "x-delivery-count", "x-acquired-count")
EXPLANATIONS = ("x-dead-letter-detail", "x-exception-type", "x-exception-message")

failures: st.SearchStrategy[Result] = st.sampled_from([NACK, REQUEUE, Nack("bad"), Requeue("busy")])


def a_router(max_attempts=3, *, exception_message=True):
    """A planner that dead-letters to an exchange of this name."""
    return SettlementPlanner(
        QUEUE,
        RetryPolicy(max_attempts, "x-retry-count"),
        DeadLetterTarget("dlx"),
        exception_message=exception_message,
    )


def copy_of(message, result, *, error=None, cause=Cause.HANDLER, planner=None):
    """The copy that the plan for a result contains."""
    plan = (planner or a_router()).plan([MessageOutcome(message, result, cause, error)], NOW)
    (step,) = plan.copies
    return step.copy


def requeued(message):
    """The copy of a requeue."""
    return copy_of(message, REQUEUE, planner=a_router(2**70))


def dead(message, result=NACK, **more):
    """The copy of a dead letter."""
    return copy_of(message, result, **more)


@given(messages(of=sound_properties))
def test_a_requeue_changes_only_headers(message):
    """Properties stay, absent ones stay absent, and the body is the same object."""
    copy = requeued(message)

    assert replace(message.properties, headers=None) == replace(copy.properties, headers=None)
    assert message.body is copy.body
    assert copy.mandatory


@given(messages(of=sound_properties), failures)
def test_other_headers_stay_as_they_are(message, result):
    """Their values and types do not change, and none is added."""
    copy = copy_of(message, result)
    changed = (*copy.add, *copy.drop)

    before, after = message.properties.headers, copy.properties.headers

    assert without(before, *changed) == without(after, *copy.add)
    # In Python 1, 1.0 and True are equal, on the wire they are not.
    assert {name: type(value) for name, value in without(before, *changed).items()} == {
        name: type(value) for name, value in without(after, *copy.add).items()
    }


@given(messages(of=sound_properties), failures)
@example(a_message(headers=dict.fromkeys(DROPPED, "x")), REQUEUE)
@example(a_message(headers=dict.fromkeys(DROPPED, "x")), NACK)
def test_headers_that_route_or_count_are_dropped(message, result):
    """CC would route the copy to further queues, and the counts belong to the broker."""
    assert not set(DROPPED) & set(copy_of(message, result).properties.headers or {})


@given(messages(of=sound_properties))
def test_a_requeue_adds_its_count_and_its_origin(message):
    """It sets the count each time, and the origin and the time of the first failure once."""
    copy = requeued(message)

    added = {"x-retry-count", "x-retry-queue", *ADDED_ONCE}
    assert {"x-retry-count"} <= copy.add.keys() <= added


@given(messages(of=sound_properties))
def test_the_origin_is_added_once(message):
    """The second copy keeps that of the first one."""
    first = requeued(message)
    again = type(message)(message._source, 2, False, b"", ("", QUEUE), first.properties)

    second = requeued(again)

    assert {"x-retry-count"} == second.add.keys() - {"x-retry-queue"}
    kept = first.properties.headers or {}
    assert {name: kept[name] for name in ADDED_ONCE} == {
        name: (second.properties.headers or {})[name] for name in ADDED_ONCE
    }


@given(messages(of=sound_properties), failures)
def test_a_dead_letter_has_its_reason_queue_and_time(message, result):
    """In the documented headers."""
    copy = copy_of(message, result, planner=a_router(0))
    on_it = copy.properties.headers or {}

    assert on_it["x-dead-letter-reason"] in {"rejected", "exhausted"}
    assert QUEUE == on_it["x-original-queue"]
    assert NOW == on_it["x-dead-lettered-at"]
    assert message.retry_count == on_it["x-retry-count"]
    assert message.original_exchange == on_it["x-original-exchange"]
    assert message.original_routing_key == on_it["x-original-routing-key"]
    assert copy.mandatory


@given(messages(of=sound_properties))
@example(a_message(expiration="60000"))
def test_the_expiration_of_a_dead_letter_moves_to_a_header(message):
    """So that it does not expire. Without an expiration there is no such header."""
    copy = dead(message)

    assert copy.properties.expiration is None
    assert message.properties.expiration == copy.add.get("x-original-expiration")
    assert replace(message.properties, headers=None, expiration=None) == replace(
        copy.properties, headers=None
    )


@given(messages(of=sound_properties), st.none() | texts.map(ValueError))
@example(a_message(headers=dict.fromkeys(EXPLANATIONS, "of before")), None)
def test_the_reason_of_an_earlier_dead_letter_is_not_kept(message, error):
    """A replayed message that is dead-lettered again has only the new reason."""
    on_it = dead(message, error=error).properties.headers or {}

    assert "x-dead-letter-detail" not in on_it
    expected = set() if error is None else {"x-exception-type", "x-exception-message"}
    assert expected == set(EXPLANATIONS) & set(on_it)


@given(messages(of=broken_properties), failures)
def test_undecodable_properties_are_left_out(message, result):
    """Everything else is copied."""
    copy = copy_of(message, result)

    assert {} == copy.properties.undecodable
    assert copy.add.items() <= (copy.properties.headers or {}).items()


@given(texts)
@example("é" * 513)
def test_the_text_of_an_exception_has_at_most_a_kibibyte(text):
    """All headers of a message share one frame. It is cut between characters."""
    stored = dead(a_message(), error=RuntimeError(text)).add["x-exception-message"]
    sound = text.encode(errors="replace").decode()

    assert len(stored.encode()) <= 1024
    if len(sound.encode()) <= 1024:
        assert sound == stored
    else:
        assert stored.endswith("…")
        assert sound.startswith(stored[:-1])
        # Not one more character would have fitted.
        assert 1024 < len(sound[: len(stored)].encode()) + len("…".encode())


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ("", ""),
        ("é" * 512, "é" * 512),
        ("x" * 1024, "x" * 1024),
        ("x" * 1025, "x" * 1021 + "…"),
        ("é" * 513, "é" * 510 + "…"),
        ("x" + "é" * 512, "x" + "é" * 510 + "…"),
        ("a\udc80b", "a?b"),
    ],
)
@pytest.mark.parametrize("result", [Nack, Requeue])
def test_texts_at_the_limit(text, stored, result):
    """Cut between characters. Characters without UTF-8 become question marks. Reasons likewise."""
    copy = dead(
        a_message(), result(text), error=RuntimeError(text), planner=a_router(max_attempts=0)
    )

    assert stored == copy.add["x-exception-message"]
    assert stored == copy.add["x-dead-letter-detail"]


def test_an_exception_has_its_qualified_name():
    """With its module, for nested classes as well."""
    copy = dead(a_message(), error=Odd(), cause=Cause.EXCEPTION)

    assert "tests.unit.core.strategies.Odd" == copy.add["x-exception-type"]
    assert "(no text: str() raised AttributeError)" == copy.add["x-exception-message"]


def test_the_text_of_an_exception_can_be_left_out():
    """It may contain data that must not be stored. The type never does."""
    planner = a_router(exception_message=False)
    message = a_message(headers={"x-exception-message": "of an earlier death"})

    copy = dead(message, error=ValueError("secret"), planner=planner)

    assert "builtins.ValueError" == copy.add["x-exception-type"]
    assert "x-exception-message" not in (copy.properties.headers or {})


def test_a_requeue_has_no_dead_letter_headers():
    """The reason appears only on the dead letter."""
    copy = copy_of(a_message(), Requeue("busy"), error=ValueError("x"))

    assert {"x-retry-count", *ADDED_ONCE} == copy.add.keys()


def test_the_retry_count_header_is_configurable():
    """By the policy."""
    message = a_message(
        source=StubSource(retry_count_header="attempts"),
        headers={"attempts": 1, "x-retry-count": 7},
    )
    planner = SettlementPlanner(QUEUE, RetryPolicy(3, "attempts"))

    copy = copy_of(message, REQUEUE, planner=planner)

    assert 2 == copy.add["attempts"]
    assert 7 == (copy.properties.headers or {})["x-retry-count"]


@given(messages(of=sound_properties), headers, st.frozensets(st.sampled_from(DROPPED)))
def test_headers_are_replaced_and_dropped(message, add, drop):
    """All others stay as they were."""
    copy = Copy(message, "x", "k", add, drop)

    before = message.properties.headers
    expected = {**without(before, *drop), **add}
    assert (None if before is None and not add else expected) == copy.properties.headers
    assert replace(message.properties, headers=None) == replace(copy.properties, headers=None)


def test_the_properties_of_a_copy_leave_out_undecodable_ones():
    """A transport without the raw bytes cannot copy them."""
    message = a_message(app_id="a", undecodable={"message_id": UNDECODABLE})

    assert Properties(app_id="a") == Copy(message, "", "q", {}).properties
