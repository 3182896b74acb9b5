"""How often messages are retried, and with which pauses."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aio_pika_batch.core.retry import Backoff, RetryPolicy

seconds = st.floats(0.001, 3600)
backoffs = st.builds(Backoff, seconds, seconds)
jitters = st.floats(0, 1, exclude_max=True)


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_a_message_is_requeued_up_to_the_maximum(max_attempts, count):
    """Counts below the maximum, and no others."""
    assert (count in range(max_attempts)) is RetryPolicy(max_attempts, "h").may_retry(count)


@given(backoffs, st.integers(1, 10_000), jitters)
def test_a_pause_stays_within_its_bounds(backoff, failures, jitter):
    """Never negative, never above the maximum, and finite after any number of failures."""
    pause = backoff.pause(failures, jitter)

    assert 0 <= pause <= backoff.maximum
    assert math.isfinite(pause)


@given(backoffs, st.integers(1, 200))
def test_the_longest_pause_doubles_up_to_the_maximum(backoff, failures):
    """It begins with the base, and never gets shorter."""
    longest = backoff.pause(failures, 1)
    following = backoff.pause(failures + 1, 1)

    assert min(backoff.base, backoff.maximum) <= longest
    assert min(2 * longest, backoff.maximum) == following


@given(backoffs, st.integers(1, 200), jitters)
def test_jitter_spreads_a_pause_over_its_whole_length(backoff, failures, jitter):
    """Full jitter: evenly from 0 to the longest pause."""
    assert backoff.pause(failures, 1) * jitter == backoff.pause(failures, jitter)


@pytest.mark.parametrize(
    ("failures", "jitter", "pause"),
    [(1, 0, 0), (1, 0.5, 0.25), (2, 0.5, 0.5), (3, 0.5, 1), (8, 0.5, 15), (10**6, 0.5, 15)],
)
def test_examples_of_pauses(failures, jitter, pause):
    """Half a second, doubled, at most thirty."""
    assert pause == Backoff(0.5, 30).pause(failures, jitter)
