"""When the circuit breaker opens, probes and closes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aio_pika_batch.core.circuit_breaker import (
    SLICES,
    BreakerPolicy,
    BreakerState,
    CircuitBreaker,
    is_failure,
)
from aio_pika_batch.core.results import Cause, MessageOutcome, MessageResult, Nack, Requeue
from aio_pika_batch.core.retry import Backoff
from aio_pika_batch.testing.strategies import results
from tests.unit.core.strategies import a_message, causes, errors

CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN

ACK, NACK = MessageResult.ACK, MessageResult.NACK
REQUEUE, REQUEUE_IMMEDIATE = MessageResult.REQUEUE, MessageResult.REQUEUE_IMMEDIATE


@dataclass(frozen=True)
class Handled:
    """A batch: the seconds before it, and how many messages succeeded and failed."""

    gap: float
    succeeded: int
    failed: int


policies = st.builds(
    BreakerPolicy,
    threshold=st.floats(0.01, 1) | st.sampled_from([0.1, 0.3, 0.5, 1.0]),
    window=st.floats(1, 100),
    min_samples=st.integers(1, 30),
    pause=st.builds(Backoff, st.floats(0.1, 100), st.floats(0.1, 1000)),
)
histories = st.lists(
    st.builds(Handled, st.floats(0, 40), st.integers(0, 15), st.integers(0, 15)), max_size=20
)


def policy(**given):
    """A breaker with simple numbers."""
    usual = {"threshold": 0.5, "window": 10.0, "min_samples": 4, "pause": Backoff(30, 100)}
    return BreakerPolicy(**usual | given)


def after(breaker, *steps, now=1000.0):
    """Record (succeeded, failed) messages, and return the state after each."""
    states = []
    for succeeded, failed in steps:
        breaker.record(succeeded=succeeded, failed=failed, now=now)
        states.append(breaker.state)
    return states


@given(policies, histories)
@example(policy(threshold=1.0, min_samples=1), [Handled(0, 0, 1)])
@example(policy(), [Handled(0, 0, 3), Handled(9, 0, 1)])
@example(policy(), [Handled(0, 0, 3), Handled(11, 0, 1)])
@example(policy(), [Handled(0, 4, 0), Handled(9, 0, 4)])
def test_it_opens_only_because_of_the_window(policy, history):
    """The window covers between nine tenths of its length and all of it."""
    breaker = CircuitBreaker(policy)
    times = list(accumulate(each.gap for each in history))
    for at, (now, batch) in enumerate(zip(times, history, strict=True)):
        changed = breaker.record(succeeded=batch.succeeded, failed=batch.failed, now=now)
        # Counts whose age is near the length of the window may be in it or not.
        edge = policy.window * (1 - 1 / SLICES)
        ages = [now - time for time in times[: at + 1]]
        cuts = {age for age in ages if edge * 0.999 <= age <= policy.window * 1.001} | {edge}
        outcomes = set()
        for cut in cuts:
            for inclusive in (True, False):
                seen = [
                    each
                    for age, each in zip(ages, history, strict=False)
                    if age < cut or (inclusive and age == cut)
                ]
                failed = sum(each.failed for each in seen)
                samples = failed + sum(each.succeeded for each in seen)
                enough = samples >= policy.min_samples
                outcomes.add(enough and failed / samples >= policy.threshold)
        assert changed in outcomes
        assert changed is (breaker.state is OPEN)
        if changed:
            assert breaker.failed / breaker.samples >= policy.threshold
            assert breaker.samples >= policy.min_samples
            return


@given(policies, histories)
def test_with_too_few_messages_it_stays_closed(policy, history):
    """Even if all of them fail."""
    breaker = CircuitBreaker(policy)
    now, left = 0.0, policy.min_samples - 1
    for batch in history:
        now += batch.gap
        failed = min(left, batch.failed)
        left -= failed
        assert not breaker.record(succeeded=0, failed=failed, now=now)
    assert breaker.state is CLOSED


@given(policies, st.lists(st.booleans(), max_size=20))
def test_each_failed_probe_doubles_the_pause(policy, probes):
    """Up to the maximum. The first success closes the breaker and resets the pause."""
    breaker = CircuitBreaker(policy)
    failures = 0
    for succeeds in probes:
        if breaker.state is CLOSED:
            assert breaker.record(succeeded=0, failed=policy.min_samples, now=0)
            failures = 1
        assert OPEN is breaker.state
        assert policy.pause.pause(failures, 1) == breaker.pause
        breaker.probe()
        assert HALF_OPEN is breaker.state
        assert not breaker.record(succeeded=0, failed=0, now=0)
        assert breaker.record(succeeded=int(succeeds), failed=int(not succeeds), now=0)
        assert (CLOSED if succeeds else OPEN) is breaker.state
        failures += 1


def test_a_probe_that_partly_fails_has_failed():
    """If two results come together, the worse one counts."""
    breaker = CircuitBreaker(policy())
    after(breaker, (0, 4))
    breaker.probe()
    assert [OPEN] == after(breaker, (1, 1))
    assert (1, 2) == (breaker.failed, breaker.samples)


@given(policies, st.integers(0, 9), st.integers(0, 9))
def test_results_while_it_is_open_are_ignored(policy, succeeded, failed):
    """Batches that began before it opened can end later."""
    breaker = CircuitBreaker(policy)
    breaker.record(succeeded=0, failed=policy.min_samples, now=0)
    assert not breaker.record(succeeded=succeeded, failed=failed, now=policy.window)
    assert OPEN is breaker.state


@pytest.mark.parametrize("state", [CLOSED, HALF_OPEN])
def test_only_an_open_breaker_can_be_probed(state):
    """Other states do not change."""
    breaker = CircuitBreaker(policy())
    if state is HALF_OPEN:
        after(breaker, (0, 4))
        breaker.probe()
    breaker.probe()
    assert state is breaker.state


def test_results_from_before_it_opened_are_forgotten():
    """Otherwise it would open again at once although everything works."""
    breaker = CircuitBreaker(policy())
    after(breaker, (0, 50))
    breaker.probe()
    assert [CLOSED, CLOSED, CLOSED, OPEN] == after(breaker, (1, 0), (0, 1), (1, 0), (0, 3))


@pytest.mark.parametrize(
    ("threshold", "steps", "states"),
    [
        (0.5, [(0, 3), (0, 1)], [CLOSED, OPEN]),
        (0.5, [(5, 4), (0, 1)], [CLOSED, OPEN]),
        (1.0, [(1, 99), (0, 999)], [CLOSED, CLOSED]),
        (1.0, [(0, 4)], [OPEN]),
        (0.3, [(7, 2), (0, 1)], [CLOSED, OPEN]),
        (0.1, [(9, 0), (0, 1)], [CLOSED, OPEN]),
    ],
)
def test_examples_of_when_it_opens(threshold, steps, states):
    """With (succeeded, failed) messages.

    It needs four samples, and opens when the threshold is reached.
    """
    assert states == after(CircuitBreaker(policy(threshold=threshold)), *steps)


def test_memory_does_not_grow_with_the_number_of_messages():
    """It keeps one count for each tenth of the window."""
    breaker = CircuitBreaker(policy(threshold=1.0))
    for number in range(5000):
        breaker.record(succeeded=1, failed=0, now=number / 50)
        assert len(breaker._slices) <= SLICES
    assert 450 <= breaker.samples <= 500


# --- what is a failure ------------------------------------------------------------


class Down(ConnectionError):
    """An error whose base class is in `exception_results`."""


MAPPED = {ConnectionError: NACK, KeyError: REQUEUE, ValueError: ACK, IndexError: Nack("bad")}


@pytest.mark.parametrize(
    ("result", "cause", "error", "failure"),
    [
        (ACK, Cause.HANDLER, None, False),
        (ACK, Cause.EXCEPTION, ValueError(), False),
        (REQUEUE, Cause.HANDLER, None, True),
        (Requeue("busy"), Cause.HANDLER, None, True),
        (REQUEUE_IMMEDIATE, Cause.HANDLER, None, True),
        (REQUEUE, Cause.EXCEPTION, KeyError(), True),
        (REQUEUE, Cause.TIMEOUT, TimeoutError(), True),
        (NACK, Cause.HANDLER, None, False),
        (Nack("no such order"), Cause.HANDLER, None, False),
        (NACK, Cause.UNDECODABLE, ValueError(), False),
        (NACK, Cause.SHUTDOWN, None, False),
        (NACK, Cause.EXCEPTION, Down(), False),
        (Nack("bad"), Cause.EXCEPTION, IndexError(), False),
        (NACK, Cause.EXCEPTION, OSError(), True),
        (NACK, Cause.EXCEPTION, None, True),
        (NACK, Cause.TIMEOUT, TimeoutError(), True),
        (NACK, Cause.MISSING, Down(), True),
        (NACK, Cause.INVALID, Down(), True),
    ],
)
def test_what_counts_as_a_failure(result, cause, error, failure):
    """A NACK of the handler does not, and neither does one that `exception_results` gives."""
    assert failure is is_failure(MessageOutcome(a_message(), result, cause, error), MAPPED)


@given(results, causes, errors)
def test_every_retry_is_a_failure_and_no_ack_is(result, cause, error):
    """For every cause."""
    failure = is_failure(MessageOutcome(a_message(), result, cause, error), {})
    if result is ACK:
        assert not failure
    elif not (result is NACK or isinstance(result, Nack)):
        assert failure
