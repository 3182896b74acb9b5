"""The benchmark of workers and processes counts correctly."""

from __future__ import annotations

import pytest

from benchmarks.scale import Seen, Work, judge


def test_one_process_counts_what_came_after_its_first_batch():
    """The first batch sets the clock, and is not counted itself."""
    work = Work(ended=[1.0, 2.0, 3.0], sizes=[100, 100, 100], cpu=[0.5, 0.51, 0.52])
    assert Seen(rate=100.0, cpu=pytest.approx(100.0)) == judge([work])


def test_only_the_time_counts_in_which_all_were_at_work():
    """A process that began sooner, or ended later, did so alone."""
    early = Work(ended=[0.0, 1.0, 2.0, 3.0], sizes=[50] * 4, cpu=[0.0, 0.1, 0.2, 0.3])
    late = Work(ended=[1.0, 2.0, 3.0, 9.0], sizes=[50] * 4, cpu=[0.0, 0.1, 0.2, 0.3])
    assert 100.0 == judge([early, late]).rate


def test_processes_that_never_met_measure_nothing():
    """One had emptied the queue before the other was there."""
    with pytest.raises(ValueError, match="more messages"):
        judge([Work([0.0, 1.0], [1, 1], [0.0, 0.0]), Work([2.0, 3.0], [1, 1], [0.0, 0.0])])
