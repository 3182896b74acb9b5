"""The delays of retries, and the copies that wait for them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from aio_pika_batch.core.message import Properties
from aio_pika_batch.core.results import MessageOutcome, MessageResult, Requeue
from aio_pika_batch.core.retry import (
    LONGEST_WAIT,
    MAX_LEVELS,
    DeadLetterReason,
    DelayedCopy,
    RetryPolicy,
    check_wait_queue_names,
    make_delay_steps,
    wait_queue_name,
)
from aio_pika_batch.core.settlement_plan import SettlementPlanner
from aio_pika_batch.core.topology_options import DeadLetterTarget
from aio_pika_batch.testing.strategies import broken_properties, properties, sound_properties
from tests.unit.core.strategies import (
    NOW,
    QUEUE,
    StubSource,
    a_message,
    delivered,
    messages,
    without,
)

REQUEUE = MessageResult.REQUEUE

waits = st.floats(0.001, LONGEST_WAIT)
factors = st.floats(1.0, 10.0) | st.sampled_from([1.0, 2.0])
retries = st.integers(0, 2**70)


@st.composite
def delay_steps(draw, *, climbing=True):
    """Delay steps, and the arguments that made them."""
    maximum = draw(waits)
    first = draw(st.floats(0.001, maximum)) if climbing else 0.0
    factor = draw(factors)
    try:
        return make_delay_steps(first, factor, maximum), first, factor, maximum
    except ValueError:
        assume(False)
        raise


anything = delay_steps() | delay_steps(climbing=False)


def waiting_copy(message, result=REQUEUE, *, first=1.0):
    """The copy of a delayed message."""
    planner = SettlementPlanner(
        QUEUE, RetryPolicy(2**71, "x-retry-count"), delay_steps=make_delay_steps(first)
    )
    (step,) = planner.plan([MessageOutcome(message, result)], NOW).copies
    return step.copy


def prompt_copy(message):
    """The copy of a message without a delay."""
    return waiting_copy(message, first=0.0)


def expired(copy, level=1000, queue=QUEUE):
    """The delivery after a delay: what the broker makes of a copy."""
    was = copy.properties
    death = {"queue": wait_queue_name(queue, level), "reason": "expired", "count": 1}
    headers = {**(was.headers or {}), "x-death": [death]}
    return delivered(DelayedCopy(a_message(headers=headers), "", queue, {}))


# --- delay steps -------------------------------------------------------------------------


@given(delay_steps(), retries)
def test_a_retry_waits_as_configured(made, count):
    """The first delay times the factor for each retry before, and at most the maximum."""
    steps, first, factor, maximum = made
    try:
        expected = min(maximum, first * factor**count)
    except OverflowError:
        expected = maximum

    level = steps.level(None, count)

    assert abs(expected * 1000 - level) <= max(0.5, expected * 1e-9) + 1e-6


@given(delay_steps(), retries, retries)
def test_a_later_retry_never_waits_less(made, one, other):
    """Delays do not get shorter."""
    steps = made[0]
    earlier, later = sorted((one, other))

    assert 0 < steps.level(None, earlier) <= steps.level(None, later)


@given(anything, st.floats(0, 1e300) | waits, retries)
@example((make_delay_steps(1, 2, 4), 1, 2, 4), 2.3, 0)
@example((make_delay_steps(0.0, 2, 300), 0, 2, 300), 1e308, 0)
def test_a_requested_delay_is_rounded_up(made, asked, count):
    """To the next level, whatever the retry count is, and at most to the maximum. 0 stays 0."""
    steps, _, _, maximum = made

    level = steps.level(asked, count)

    below = [each for each in steps.requestable if each < level]
    if asked * 1000 < 0.0005:
        assert 0 == level
    else:
        assert level in steps.requestable
        assert level >= min(asked * 1000 - 0.001, round(maximum * 1000))
        assert not below or below[-1] < asked * 1000


@given(anything)
def test_the_steps_are_few_and_rise(made):
    """Each one is a queue, with a number of milliseconds that the broker accepts."""
    steps, _, _, maximum = made

    assert 1 <= len(steps.requestable) <= MAX_LEVELS + 1
    assert sorted(set(steps.requestable)) == list(steps.requestable)
    assert sorted(steps.automatic) == list(steps.automatic)
    assert set(steps.automatic) <= set(steps.requestable)
    assert 1 <= steps.requestable[0]
    assert max(1, round(maximum * 1000)) == steps.requestable[-1] < 2**32


@given(delay_steps(), st.integers(0, 200))
def test_the_steps_for_a_number_of_attempts(made, attempts):
    """Those are declared at the start: no more, and no less."""
    steps = made[0]

    automatic = {steps.level(None, count) for count in range(attempts)}

    assert sorted(automatic) == list(steps.steps_for(attempts))


@given(delay_steps() | delay_steps(climbing=False), st.integers(0, 200))
def test_the_total_delay_of_all_retries(made, attempts):
    """Each of them as configured."""
    steps = made[0]

    waits = [steps.level(None, count) for count in range(attempts)]

    assert pytest.approx(sum(waits) / 1000) == steps.total_seconds(attempts)


@given(delay_steps(climbing=False), retries)
def test_without_a_configured_delay_retries_do_not_wait(made, count):
    """The default. A handler can still request a delay."""
    steps = made[0]

    assert 0 == steps.level(None, count) == steps.level(Requeue().seconds, count)
    assert () == steps.steps_for(100)


@pytest.mark.parametrize(
    ("first", "factor", "maximum", "automatic", "requestable"),
    [
        (0, 2, 300, [], [1, 2, 4, 8, 16, 32, 64, 128, 256, 300]),
        (1, 2, 10, [1, 2, 4, 8, 10], [1, 2, 4, 8, 10]),
        (5, 3, 60, [5, 15, 45, 60], [5, 15, 45, 60]),
        (5, 1, 60, [5], [5, 10, 20, 40, 60]),
        (60, 2, 60, [60], [60]),
        (0, 2, 0.5, [], [0.5]),
    ],
)
def test_examples_of_steps(first, factor, maximum, automatic, requestable):
    """In seconds."""
    steps = make_delay_steps(first, factor, maximum)

    assert automatic == [each / 1000 for each in steps.automatic]
    assert requestable == [each / 1000 for each in steps.requestable]


def test_steps_below_a_millisecond_share_a_level():
    """No queue is declared twice, and each retry has a delay."""
    steps = make_delay_steps(0.001, 1.2, 0.003)

    assert (1, 1, 1, 2, 2, 2, 3, 3) == steps.automatic
    assert (1, 2, 3) == steps.requestable == steps.steps_for(9)


def test_a_first_delay_above_the_maximum_is_refused():
    """The error names both settings."""
    with pytest.raises(ValueError, match="requeue_delay=9 must not exceed requeue_delay_max=5"):
        make_delay_steps(9, 2, 5)


def test_a_queue_name_that_is_too_long_for_wait_queues_is_refused():
    """With `.retry.` and the longest delay it has one byte more than AMQP allows."""
    steps = make_delay_steps(1, 2, 5)
    fits = "q" * (255 - len(".retry.5000"))
    check_wait_queue_names(fits, steps)

    with pytest.raises(ValueError, match="use a shorter queue_name"):
        check_wait_queue_names(f"{fits}q", steps)


def test_too_many_steps_are_refused():
    """Each step is a queue; a factor near 1 would make thousands."""
    with pytest.raises(ValueError, match=r"by a factor of 1\.01 there are more than 100 steps"):
        make_delay_steps(1, 1.01, 300)


@pytest.mark.parametrize(
    ("delay", "level"),
    [(0, 0), (0.2, 1000), (1, 1000), (timedelta(seconds=3), 4000), (5, 8000), (999, 10_000)],
)
@pytest.mark.parametrize("first", [0, 1])
def test_examples_of_requested_delays(delay, level, first):
    """A requested delay of 0 is none, also if others are configured."""
    assert level == make_delay_steps(first, 2, 10).level(Requeue(delay=delay).seconds, 2)


# --- requested delays -------------------------------------------------------------------


@pytest.mark.parametrize("delay", ["5", True, [5], 5j])
def test_a_delay_is_a_number_or_a_timedelta(delay):
    """Other types are refused when the result is created."""
    with pytest.raises(TypeError, match="delay must be a number of seconds or a timedelta"):
        Requeue(delay=delay)


@pytest.mark.parametrize("delay", [-1, -0.1, float("inf"), float("nan"), timedelta(seconds=-1)])
def test_a_delay_is_finite_and_not_negative(delay):
    """Other values are refused as well."""
    with pytest.raises(ValueError, match="delay must be finite and at least 0 seconds"):
        Requeue(delay=delay)


def test_a_number_is_refused_as_a_reason():
    """`Requeue(30)` looks like a delay."""
    with pytest.raises(TypeError, match=r"not 30; a delay is Requeue\(delay=…\)"):
        Requeue(30)  # type: ignore[arg-type]


# --- copies -----------------------------------------------------------------------------


@given(messages(of=properties), st.none() | st.floats(0.001, 1000))
def test_a_delayed_copy_is_published_to_its_wait_queue(message, delay):
    """By the default exchange, mandatory. Without readable headers it is a dead letter."""
    assume(message.has_readable_headers)

    copy = waiting_copy(message, Requeue(delay=delay))

    assert isinstance(copy, DelayedCopy)
    assert ("", f"jobs.retry.{copy.level}") == (copy.exchange, copy.routing_key)
    assert copy.mandatory
    assert message.body is copy.body


@given(messages(of=sound_properties))
@example(a_message(headers={"x-death": [{"queue": "jobs", "reason": "rejected"}]}))
def test_a_delayed_copy_changes_its_expiration_and_a_few_headers(message):
    """The expiration moves to a header. `x-death` and the broker's counts are dropped."""
    copy = waiting_copy(message)
    before, after = message.properties, copy.properties

    for name in set(Properties.__slots__) - {"headers", "expiration", "undecodable"}:
        assert getattr(before, name) == getattr(after, name)
    assert after.expiration is None
    on_it = after.headers or {}
    if before.expiration is not None:
        assert before.expiration == on_it["x-original-expiration"]
    assert not {"x-death", "x-delivery-count", "x-acquired-count", "CC", "BCC"} & on_it.keys()
    assert message.retry_count + 1 == on_it["x-retry-count"]
    changed = (*copy.add, *copy.drop)
    assert without(before.headers, *changed) == without(on_it, *copy.add)


@given(messages(of=sound_properties))
def test_after_its_delays_a_message_is_as_before(message):
    """The next copy without a delay has the expiration again, and not the header."""
    assume("x-original-expiration" not in message.headers)
    first = expired(waiting_copy(message))
    second = expired(waiting_copy(first), 2000)

    copy = prompt_copy(second)

    assert message.properties.expiration == copy.properties.expiration
    assert "x-original-expiration" not in (copy.properties.headers or {})
    assert message.retry_count + 3 == delivered(copy).retry_count
    assert message.original_routing_key == delivered(copy).original_routing_key
    assert message.original_exchange == delivered(copy).original_exchange


@given(messages(of=broken_properties))
def test_a_delayed_copy_leaves_out_undecodable_properties(message):
    """Everything else is copied."""
    assume(message.has_readable_headers)

    assert {} == waiting_copy(message).properties.undecodable


DIED_HERE = [{"queue": "jobs.retry.1000", "reason": "expired"}]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"x-death": "nonsense"},
        {"x-death": []},
        {"x-death": [{"queue": "jobs.retry.1000", "reason": "rejected"}]},
        {"x-death": [{"queue": "others.retry.1000", "reason": "expired"}]},
        {"x-death": [{"queue": "jobs", "reason": "expired"}, *DIED_HERE]},
        {"x-death": DIED_HERE, "x-original-expiration": "soon"},
        {"x-death": DIED_HERE, "x-original-expiration": "²"},
        {"x-death": DIED_HERE, "x-original-expiration": "4294967296"},
        {"x-death": DIED_HERE, "x-original-expiration": "9" * 5000},
        {"x-death": DIED_HERE, "x-original-expiration": 60000},
    ],
)
def test_only_an_expiration_that_a_delay_has_moved_is_restored(headers):
    """A dead letter that is requeued must not expire, and a broker accepts only numbers."""
    message = a_message(headers={"x-original-expiration": "60000", **headers})

    copy = prompt_copy(message)

    assert copy.properties.expiration is None
    assert "x-original-expiration" in (copy.properties.headers or {})


def test_an_expiration_is_restored():
    """An example."""
    message = a_message(headers={"x-original-expiration": "60000", "x-death": DIED_HERE})

    copy = prompt_copy(message)

    assert "60000" == copy.properties.expiration
    assert {"x-death", "x-retry-count"} <= (copy.properties.headers or {}).keys()


def test_a_delayed_message_without_attempts_left_is_dead_lettered():
    """Whatever delay is requested. Its expiration is in the header of dead letters."""
    headers = {"x-original-expiration": "60000", "x-death": DIED_HERE, "x-retry-count": 3}
    planner = SettlementPlanner(QUEUE, RetryPolicy(3, "x-retry-count"), DeadLetterTarget("dlx"))

    plan = planner.plan([MessageOutcome(a_message(headers=headers), Requeue(delay=5))], NOW)

    (step,) = plan.copies
    assert ("dlx", DeadLetterReason.EXHAUSTED) == (step.copy.exchange, step.reason)
    assert step.copy.properties.expiration is None
    assert "60000" == (step.copy.properties.headers or {})["x-original-expiration"]


def test_the_retry_count_selects_the_delay():
    """Also if another client has written it.

    The third retry waits four times as long as the first.
    """
    message = a_message(source=StubSource(), headers={"x-retry-count": 2})

    assert "jobs.retry.4000" == waiting_copy(message).routing_key


def test_a_delayed_copy_keeps_the_time_of_the_first_failure():
    """Later failures do not change it."""
    earlier = datetime(2025, 1, 1, tzinfo=UTC)
    message = a_message(headers={"x-first-failed-at": earlier})

    assert "x-first-failed-at" not in waiting_copy(message).add
