"""How long failed messages are held, and when one is published early."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aio_pika_batch.core.hold_policy import (
    NEVER,
    HoldPolicy,
    early_release_at,
    longest_hold,
)

times = st.floats(0, 1e6)


@pytest.mark.parametrize(("retries", "seconds"), [(0, 1), (1, 2), (4, 16), (5, 30), (10**9, 30)])
def test_the_default_delays(retries, seconds):
    """Doubled each time, up to half a minute."""
    assert seconds == HoldPolicy(by_default=True).retry_delay(retries)
    assert 0 == HoldPolicy().retry_delay(retries)


@given(st.integers(0, 10**9), st.floats(1, 1e6), st.floats(1, 600))
def test_delays_of_undeliverable_messages(failures, longest_undeliverable, longest):
    """They start at a second, grow, and have two limits."""
    policy = HoldPolicy(longest=longest, longest_undeliverable=longest_undeliverable)
    delay = policy.undeliverable_delay(failures)
    assert 1 <= delay <= min(longest, longest_undeliverable)
    assert delay <= policy.undeliverable_delay(failures + 1)


@pytest.mark.parametrize(("timeout", "longest"), [(1800, 600), (60, 20), (10**6, 600)])
def test_the_longest_hold(timeout, longest):
    """Ten minutes, or a third of the consumer timeout."""
    assert longest == longest_hold(timeout)


@given(st.integers(0, 1000), st.integers(0, 1000), times, times, times)
def test_retries_are_published_early_only_where_others_succeed(
    held, limit, last_success, last_release, now
):
    """And only above the limit; at a bounded rate."""
    at = early_release_at(
        held=held, limit=limit, last_success=last_success, last_release=last_release, now=now
    )
    is_expected = held > limit and now - last_success <= 30
    assert is_expected is (at is not None)
    if at is not None:
        assert at >= now
        assert at - last_release >= 1 / (held - limit) - 1e-6


def test_before_anything_succeeds_nothing_is_published_early():
    """An outage from the start."""
    assert None is early_release_at(
        held=10, limit=5, last_success=NEVER, last_release=NEVER, now=0.0
    )
    assert 7.0 == early_release_at(held=6, limit=5, last_success=7.0, last_release=NEVER, now=7.0)
