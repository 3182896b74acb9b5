"""After a cancel, few commands follow, however many messages are left and however they end."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aio_pika_batch.core.settlement import (
    SAFE_COMMANDS,
    CommandBudget,
    Disposition,
    DrainMode,
    drain_mode,
)

KEPT_BY_A_CHANNEL = 33
"""The next command is kept back, and dropped if the channel is closed; 32 on RabbitMQ 3.10."""

kinds = st.integers(1, len(Disposition))


@given(commits=st.lists(st.tuples(kinds, st.floats(0, 60)), max_size=60), last=kinds)
def test_all_commits_of_a_drain_and_the_last_one_stay_within_the_limit(commits, last):
    """Whatever the results are, and whenever they come."""
    budget, now, sent = CommandBudget(), 0.0, 0
    for commands, later in commits:
        now += later
        at = budget.commit_at(commands)
        if at is not None:
            now = max(now, at)
            budget.spend(commands, now)
            sent += commands

    assert sent + last <= SAFE_COMMANDS < KEPT_BY_A_CHANNEL - 1


def times_of_commits(commands):
    """Return when commits of these sizes are sent, each as early as possible."""
    budget, times = CommandBudget(), []
    while (at := budget.commit_at(commands)) is not None:
        times.append(max(0.0, at))
        budget.spend(commands, times[-1])
    return times


@pytest.mark.parametrize(("commands", "at_once"), [(1, 10), (2, 5), (3, 4), (4, 3)])
def test_the_first_commits_follow_at_once(commands, at_once):
    """So results that are there when the cancel is confirmed don't wait."""
    times = times_of_commits(commands)

    assert [0.0] * at_once == times[:at_once]
    assert times[at_once] > 0


@pytest.mark.parametrize("commands", [1, 2, 3, 4])
def test_pauses_grow_so_that_the_budget_lasts_for_the_longest_drain(commands):
    """A result waits for its commit about as long as the drain has lasted."""
    times = times_of_commits(commands)
    pauses = [later - earlier for earlier, later in pairwise(times)]

    assert sorted(pauses) == pauses
    assert times[-1] > 120


@given(unsettled=st.integers(0, 1000))
def test_transactions_are_used_only_where_single_frames_could_be_too_many(unsettled):
    """They cost round trips."""
    expected = DrainMode.DIRECT if unsettled <= 30 else DrainMode.COMMITTED
    assert expected is drain_mode(unsettled, is_rabbitmq=True)


@given(unsettled=st.integers(31, 1000))
def test_other_brokers_get_no_transactions(unsettled):
    """They may answer tx.select by closing the connection."""
    assert DrainMode.JOINED is drain_mode(unsettled, is_rabbitmq=False)
