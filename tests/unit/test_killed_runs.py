"""The fault tests' own logic about killed consumers, which needs no broker."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest

from tests.faults import trial
from tests.faults.kill_points import KillPoint, KillSwitch
from tests.faults.killed_runs import APPLIED, read_run
from tests.faults.trial import HandlingRecord

DIED = 1000.0


def entry(what: str, of: object = None) -> dict[str, object]:
    """Return an entry of an event log."""
    return {"what": what, "of": of}


def test_delivered_messages_are_unsettled_until_settled() -> None:
    """Tags belong to their session."""
    told = read_run(
        [
            entry("started"),
            entry("delivered", [1, [[1, 70], [2, 71]]]),
            entry("delivered", [2, [[1, 72]]]),
            entry("done", 70),
            entry("settled", [1, DIED - 2 * APPLIED, [1]]),
        ],
        DIED,
    )
    assert Counter({71: 1, 72: 1}) == told.unsettled
    assert Counter({70: 1}) == told.done


def test_a_settlement_just_before_the_kill_may_be_lost() -> None:
    """The broker may drop it when the connection is gone."""
    told = read_run(
        [entry("delivered", [1, [[1, 70]]]), entry("settled", [1, DIED - APPLIED / 2, [1]])], DIED
    )
    assert Counter({70: 1}) == told.unsettled


def test_two_unsettled_copies_may_both_be_repeated() -> None:
    """An original, and its confirmed copy."""
    told = read_run([entry("delivered", [1, [[1, 70], [2, 70]]])], DIED)
    assert Counter({70: 2}) == told.unsettled


class CountingSwitch(KillSwitch):
    """Counts kills instead."""

    kills = 0

    def kill(self) -> None:
        self.kills += 1


@pytest.mark.parametrize("point", KillPoint)
def test_the_process_is_killed_at_the_given_count_of_its_point(point) -> None:
    """And at no other point."""
    switch = CountingSwitch(SimpleNamespace(), point=point, countdown=3)
    for other in set(KillPoint) - {point}:
        for _ in range(5):
            switch.reach(other)
    switch.reach(point)
    switch.reach(point)
    assert 0 == switch.kills
    switch.reach(point)
    assert 1 == switch.kills


def test_steps_count_only_during_a_drain() -> None:
    """The same steps are taken at other times, too."""
    switch = CountingSwitch(SimpleNamespace(), point=KillPoint.DRAINING)
    switch.step()
    assert 0 == switch.kills
    switch.is_draining = True
    switch.step()
    assert 1 == switch.kills


def test_the_longest_pause_includes_the_time_before_and_after_all_batches(monkeypatch) -> None:
    """Nothing is handled before the first batch and after the last one."""
    now = SimpleNamespace(monotonic=lambda: clock[0])
    clock = [0.0]
    monkeypatch.setattr(trial, "time", now)
    record = HandlingRecord()
    message = SimpleNamespace(consumer_tag="c")
    for at in (1.0, 12.0, 13.0, 17.0):
        clock[0] = at
        record.begin([message])
    assert 4.0 == record.longest_pause(10.0)
    assert 3.0 == record.longest_pause(14.0)
    clock[0] = 25.0
    assert 8.0 == record.longest_pause(10.0)
