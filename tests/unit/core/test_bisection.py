"""Finding the bad messages of a batch by running halves of it again."""

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
    """The course of a bisection, in positions of messages."""

    runs: list[list[int]]
    alone: list[int]
    blamed: list[int]
    well: list[int]


def isolate(count, bad_messages, *, limit=1000, before=0):
    """Run `count` messages, of which the bad ones make each of their runs fail.

    Args:
        before: How many messages a run decides before it fails, except bad ones.
    """
    messages = some_messages(count)
    at = {id(message): position for position, message in enumerate(messages)}
    bisection = Bisection(limit)
    found = Found([], [], [], [])
    run = messages
    while run:
        positions = [at[id(message)] for message in run]
        found.runs.append(positions)
        bad = [position for position in positions if position in bad_messages]
        if bad:
            decided = positions[: min(before, positions.index(bad[0]))]
            rest = run[len(decided) :]
            found.well += decided
            blamed = bisection.bisect(run, Part(rest, KeyError(bad[0])))
            if blamed and len(run) == 1:
                found.alone += positions
            found.blamed += [at[id(message)] for part in blamed for message in part.messages]
        else:
            found.well += positions
        run = bisection.next_run()
    assert 0 == len(bisection)
    return found


cases = st.integers(1, 300).flatmap(
    lambda count: st.tuples(st.just(count), st.sets(st.integers(0, count - 1), max_size=12))
)


@given(cases, st.integers(0, 5))
@example((1000, {0, 500, 999}), 0)
@example((1, {0}), 0)
@example((2, {1}), 1)
def test_bad_messages_are_found_in_few_runs_and_no_others_are_blamed(case, before):
    """Each message has one outcome, and the number of runs is within the promised bound."""
    count, bad_messages = case

    found = isolate(count, bad_messages, before=before)

    assert sorted(bad_messages) == sorted(found.blamed) == sorted(found.alone)
    assert list(range(count)) == sorted(found.blamed + found.well)
    assert len(found.runs) <= 1 + 2 * len(bad_messages) * math.ceil(math.log2(count))
    event(f"{len(bad_messages)} bad messages in {len(found.runs)} runs")


@given(cases, st.integers(0, 5), st.integers(1, 12))
@example((8, {1, 2, 3}), 0, 1)
def test_the_search_ends_at_the_limit(case, before, limit):
    """At the limit all undecided messages are blamed, and nothing is run again."""
    count, bad_messages = case

    found = isolate(count, bad_messages, limit=limit, before=before)

    assert min(limit, len(bad_messages)) == len(found.alone)
    assert list(range(count)) == sorted(found.blamed + found.well)
    assert set(found.well).isdisjoint(bad_messages)
    if len(bad_messages) < limit:
        assert sorted(bad_messages) == sorted(found.blamed)
    elif bad_messages:
        assert found.runs[-1] == [found.alone[-1]]


@given(cases)
def test_everything_is_run_in_the_order_of_the_batch(case):
    """Within a run, and over all successful messages."""
    count, bad_messages = case

    found = isolate(count, bad_messages)

    assert all(run == list(range(run[0], run[-1] + 1)) for run in found.runs)
    assert sorted(found.well) == found.well
    assert sorted(found.blamed) == found.blamed


def test_a_limit_of_zero_divides_nothing():
    """All undecided messages of a failed run are blamed; this is the default."""
    found = isolate(5, {1}, limit=0)

    assert [[0, 1, 2, 3, 4]] == found.runs
    assert [0, 1, 2, 3, 4] == found.blamed


def test_the_last_undecided_message_of_a_larger_run_is_run_alone():
    """The cause may have been something that all of them shared."""
    messages = some_messages(3)
    bisection = Bisection(10)

    assert [] == bisection.bisect(messages, Part(messages[2:], KeyError()))
    assert messages[2:] == bisection.next_run()
    assert () == bisection.next_run()


@pytest.mark.parametrize("limit", [1, 2])
def test_each_message_is_blamed_for_its_own_failure(limit):
    """The last bad message has its own error.

    Messages that were not run again have that of their last run.
    """
    messages = some_messages(4)
    whole, half, alone = KeyError("whole"), KeyError("half"), KeyError("alone")
    bisection = Bisection(limit)
    assert [] == bisection.bisect(messages, Part(messages, whole))
    assert messages[:2] == bisection.next_run()
    assert [] == bisection.bisect(messages[:2], Part(messages[:2], half))
    assert messages[:1] == bisection.next_run()

    blamed = bisection.bisect(messages[:1], Part(messages[:1], alone))

    rest = [] if limit > 1 else [Part(messages[1:2], half), Part(messages[2:], whole)]
    assert [Part(messages[:1], alone), *rest] == blamed
    assert (len(rest) == 0) is (len(bisection) > 0)


def test_a_part_to_run_again_undivided_comes_next():
    """Before the halves that are due. An empty part isn't run."""
    messages = some_messages(4)
    bisection = Bisection(10)
    bisection.bisect(messages, Part(messages, KeyError()))
    bisection.run_again(Part(messages[1:2], KeyError()))
    bisection.run_again(Part((), KeyError()))

    assert 3 == len(bisection)
    assert messages[1:2] == bisection.next_run()
    assert [messages[:2], messages[2:]] == [part.messages for part in bisection.stop()]
    assert () == bisection.next_run()
