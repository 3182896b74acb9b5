"""Do the books of those who are killed say what a kill may repeat? No broker is needed for that."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest

from tests.faults import trial
from tests.faults.lives import APPLIED, life
from tests.faults.moments import Fate, Moment
from tests.faults.trial import Books

DIED = 1000.0


def entry(what: str, of: object = None) -> dict[str, object]:
    """A line of a diary."""
    return {"what": what, "of": of}


def test_what_was_delivered_and_not_settled_was_in_hand() -> None:
    """Tags are those of their session."""
    told = life(
        [
            entry("started"),
            entry("delivered", [1, [[1, 70], [2, 71]]]),
            entry("delivered", [2, [[1, 72]]]),
            entry("done", 70),
            entry("settled", [1, DIED - 2 * APPLIED, [1]]),
        ],
        DIED,
    )
    assert Counter({71: 1, 72: 1}) == told.in_hand
    assert Counter({70: 1}) == told.done


def test_a_settlement_at_the_last_moment_may_not_have_counted() -> None:
    """The broker may drop it when the connection is gone."""
    told = life(
        [entry("delivered", [1, [[1, 70]]]), entry("settled", [1, DIED - APPLIED / 2, [1]])], DIED
    )
    assert Counter({70: 1}) == told.in_hand


def test_two_copies_in_hand_may_both_be_repeated() -> None:
    """An original, and a copy of it that was confirmed."""
    told = life([entry("delivered", [1, [[1, 70], [2, 70]]])], DIED)
    assert Counter({70: 2}) == told.in_hand


class Mourned(Fate):
    """Only tells that it would have died."""

    deaths = 0

    def die(self) -> None:
        self.deaths += 1


@pytest.mark.parametrize("moment", Moment)
def test_death_comes_at_the_chosen_moment_when_it_is_reached_often_enough(moment) -> None:
    """And at no other."""
    fate = Mourned(SimpleNamespace(), moment=moment, countdown=3)
    for other in set(Moment) - {moment}:
        for _ in range(5):
            fate.reach(other)
    fate.reach(moment)
    fate.reach(moment)
    assert 0 == fate.deaths
    fate.reach(moment)
    assert 1 == fate.deaths


def test_steps_are_counted_in_a_drain_only() -> None:
    """The same steps are taken all the time."""
    fate = Mourned(SimpleNamespace(), moment=Moment.DRAINING)
    fate.step()
    assert 0 == fate.deaths
    fate.is_draining = True
    fate.step()
    assert 1 == fate.deaths


def test_the_longest_pause_counts_from_the_mark_and_to_the_present(monkeypatch) -> None:
    """Before the first batch and after the last one nothing is handled either."""
    now = SimpleNamespace(monotonic=lambda: clock[0])
    clock = [0.0]
    monkeypatch.setattr(trial, "time", now)
    books = Books()
    message = SimpleNamespace(consumer_tag="c")
    for at in (1.0, 12.0, 13.0, 17.0):
        clock[0] = at
        books.begin([message])
    assert 4.0 == books.longest_pause(10.0)
    assert 3.0 == books.longest_pause(14.0)
    clock[0] = 25.0
    assert 8.0 == books.longest_pause(10.0)
