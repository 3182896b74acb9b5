"""Who is to blame for a run that failed? Found among hundreds, in few runs, and nobody else is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from hypothesis import event, example, given
from hypothesis import strategies as st

from aio_pika_batch.core.batch_run import Bisection, Part
from tests.unit.core.strategies import some_messages


@dataclass
class Found:
    """How an isolation went, in positions of messages."""

    runs: list[list[int]]
    alone: list[int]
    condemned: list[int]
    well: list[int]


def isolate(count, culprits, *, limit=1000, before=0):
    """Run `count` messages, of which some make each run fail that they are in.

    Args:
        before: How many messages a run decides before it fails, culprits excepted.
    """
    messages = some_messages(count)
    at = {id(message): position for position, message in enumerate(messages)}
    isolation = Bisection(limit)
    found = Found([], [], [], [])
    run = messages
    while run:
        positions = [at[id(message)] for message in run]
        found.runs.append(positions)
        bad = [position for position in positions if position in culprits]
        if bad:
            decided = positions[: min(before, positions.index(bad[0]))]
            rest = run[len(decided) :]
            found.well += decided
            condemned = isolation.bisect(run, Part(rest, KeyError(bad[0])))
            if condemned and len(run) == 1:
                found.alone += positions
            found.condemned += [at[id(message)] for part in condemned for message in part.messages]
        else:
            found.well += positions
        run = isolation.next_run()
    assert 0 == len(isolation)
    return found


cases = st.integers(1, 300).flatmap(
    lambda count: st.tuples(st.just(count), st.sets(st.integers(0, count - 1), max_size=12))
)


@given(cases, st.integers(0, 5))
@example((1000, {0, 500, 999}), 0)
@example((1, {0}), 0)
@example((2, {1}), 1)
def test_culprits_are_found_in_few_runs_and_nobody_else_is_condemned(case, before):
    """Every message has one end; the runs are as few as halving can promise."""
    count, culprits = case

    found = isolate(count, culprits, before=before)

    assert sorted(culprits) == sorted(found.condemned) == sorted(found.alone)
    assert list(range(count)) == sorted(found.condemned + found.well)
    assert len(found.runs) <= 1 + 2 * len(culprits) * math.ceil(math.log2(count))
    event(f"{len(culprits)} culprits in {len(found.runs)} runs")


@given(cases, st.integers(0, 5), st.integers(1, 12))
@example((8, {1, 2, 3}), 0, 1)
def test_no_more_culprits_are_looked_for_than_allowed(case, before, limit):
    """At the limit everything that is undecided is condemned, and nothing is run any more."""
    count, culprits = case

    found = isolate(count, culprits, limit=limit, before=before)

    assert min(limit, len(culprits)) == len(found.alone)
    assert list(range(count)) == sorted(found.condemned + found.well)
    assert set(found.well).isdisjoint(culprits)
    if len(culprits) < limit:
        assert sorted(culprits) == sorted(found.condemned)
    elif culprits:
        assert found.runs[-1] == [found.alone[-1]]


@given(cases)
def test_everything_is_run_in_the_order_of_the_batch(case):
    """Within a run, and whoever ended well did so in order."""
    count, culprits = case

    found = isolate(count, culprits)

    assert all(run == list(range(run[0], run[-1] + 1)) for run in found.runs)
    assert sorted(found.well) == found.well
    assert sorted(found.condemned) == found.condemned


def test_without_a_limit_to_look_up_to_nothing_is_divided():
    """Whoever was undecided in a run that failed is condemned, as is the default."""
    found = isolate(5, {1}, limit=0)

    assert [[0, 1, 2, 3, 4]] == found.runs
    assert [0, 1, 2, 3, 4] == found.condemned


def test_who_is_left_over_of_many_is_run_alone_first():
    """What failed may have been what all of them shared."""
    messages = some_messages(3)
    isolation = Bisection(10)

    assert [] == isolation.bisect(messages, Part(messages[2:], KeyError()))
    assert messages[2:] == isolation.next_run()
    assert () == isolation.next_run()


@pytest.mark.parametrize("limit", [1, 2])
def test_each_is_condemned_for_the_failure_that_it_was_part_of(limit):
    """The last culprit's is its own; what was not run any more has that of the run before."""
    messages = some_messages(4)
    whole, half, alone = KeyError("whole"), KeyError("half"), KeyError("alone")
    isolation = Bisection(limit)
    assert [] == isolation.bisect(messages, Part(messages, whole))
    assert messages[:2] == isolation.next_run()
    assert [] == isolation.bisect(messages[:2], Part(messages[:2], half))
    assert messages[:1] == isolation.next_run()

    condemned = isolation.bisect(messages[:1], Part(messages[:1], alone))

    rest = [] if limit > 1 else [Part(messages[1:2], half), Part(messages[2:], whole)]
    assert [Part(messages[:1], alone), *rest] == condemned
    assert (len(rest) == 0) is (len(isolation) > 0)


def test_what_shall_be_run_again_undivided_comes_next():
    """Before the halves that wait; nobody is no run."""
    messages = some_messages(4)
    isolation = Bisection(10)
    isolation.bisect(messages, Part(messages, KeyError()))
    isolation.run_again(Part(messages[1:2], KeyError()))
    isolation.run_again(Part((), KeyError()))

    assert 3 == len(isolation)
    assert messages[1:2] == isolation.next_run()
    assert [messages[:2], messages[2:]] == [part.messages for part in isolation.stop()]
    assert () == isolation.next_run()
