"""The timing of early settlements."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from aio_pika_batch.core.settlement_plan import Pace

seconds = st.floats(1e-3, 1e6)


@given(seconds, seconds)
def test_all_waits_are_within_the_interval(interval, longest):
    """Collecting, and twice the patience: for own confirms and for those of others."""
    pace = Pace.within(interval, longest=longest)

    assert 0 < pace.patience <= longest
    assert interval / 2 <= pace.collect < interval
    assert interval >= (pace.collect + 2 * pace.patience) * (1 - 1e-9)


def test_a_long_interval_is_used_for_collecting():
    """The time for confirms has a maximum."""
    assert Pace(collect=9.75, patience=0.125) == Pace.within(10, longest=0.125)
