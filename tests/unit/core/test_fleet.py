"""When is a process started again, asked to leave, killed, or given up?

The examples tell one story each. The property draws what each process will do before anything
happens, lets a fleet look after them in virtual time, and asks what must hold whatever they do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aio_pika_batch.cli.fleet import (
    Abandon,
    Drain,
    Event,
    Heartbeat,
    Kill,
    Log,
    Phase,
    ProcessManager,
    ProcessPolicy,
    Spawn,
)

WELL = Heartbeat(is_ready=True, is_stuck=False, budget=20.0)
BUSY = Heartbeat(is_ready=False, is_stuck=False, budget=20.0)
STUCK = Heartbeat(is_ready=True, is_stuck=True, budget=20.0)


def started(size: int = 1, **policy: object) -> ProcessManager:
    """A fleet whose processes are all ready at time 0."""
    fleet = ProcessManager(ProcessPolicy(size, **policy))
    assert [Spawn(0)] == fleet.poll(0)
    fleet.heard(0, WELL, 0)
    assert [Spawn(slot) for slot in range(1, size)] == fleet.poll(0)
    for slot in range(1, size):
        fleet.heard(slot, WELL, 0)
    return fleet


def notices(actions: list[object]) -> list[Event]:
    """What is told."""
    return [each.notice for each in actions if isinstance(each, Log)]


def test_the_others_are_started_once_the_first_is_heard_of():
    """What is wrong with all of them is told once."""
    fleet = ProcessManager(ProcessPolicy(3))
    assert [Spawn(0)] == fleet.poll(0)
    assert [] == fleet.poll(5)
    fleet.heard(0, BUSY, 6)
    assert [Spawn(1), Spawn(2)] == fleet.poll(6)
    assert not fleet.is_ready


def test_a_crashed_process_is_started_again_after_a_pause_that_grows():
    """Half a second, one, two: and never at once."""
    fleet = started(2)
    now = 0.0
    for pause in (0.5, 1.0, 2.0, 4.0):
        fleet.exited(0, -9, now)
        assert [Log(Event.ENDED, 0, -9, pause)] == fleet.poll(now)
        assert [] == fleet.poll(now + pause - 0.01)
        now += pause
        assert [Spawn(0)] == fleet.poll(now)


def test_a_process_that_was_stable_begins_anew():
    """Its earlier crashes are forgotten."""
    fleet = started(2)
    fleet.exited(0, 1, 1)
    fleet.poll(2)
    fleet.heard(0, WELL, 2 + 29)
    assert 1 == fleet.members[0].crashes
    fleet.heard(0, WELL, 2 + 30)
    assert 0 == fleet.members[0].crashes


def test_one_crash_loop_is_told_once_and_the_others_work_on():
    """It is tried again, at the longest pause; when it is stable, that is told too."""
    fleet = started(2, limit=3)
    told: list[Event] = []
    now = 0.0
    for _ in range(8):
        fleet.exited(0, 1, now)
        told += notices(fleet.poll(now))
        now += 30
        fleet.heard(1, WELL, now)
        fleet.poll(now)
    assert [Event.LOOPING] == [each for each in told if each is not Event.ENDED]
    assert fleet.outcome is None
    fleet.heard(0, WELL, now + 30)
    assert [Event.RECOVERED] == notices(fleet.poll(now + 30))


def test_a_fleet_of_crash_loops_is_given_up():
    """With exit code 1: whoever runs the supervisor has to know."""
    fleet = started(2, limit=2)
    for slot in (0, 1):
        fleet.exited(slot, 1, 0)
    fleet.poll(1)
    fleet.exited(0, 1, 1)
    assert fleet.outcome is None
    fleet.exited(1, 1, 1)
    assert Event.GIVEN_UP in notices(fleet.poll(1))
    assert 1 == fleet.outcome


@pytest.mark.parametrize("code", [2, 3])
def test_what_no_restart_mends_is_given_up_at_once(code):
    """Wrong usage, wrong configuration, no access: with the same exit code."""
    fleet = ProcessManager(ProcessPolicy(3, fatal=frozenset({2, 3})))
    fleet.poll(0)
    fleet.exited(0, code, 1)
    assert [Log(Event.GIVEN_UP, code=code)] == fleet.poll(1)
    assert code == fleet.outcome


def test_after_it_was_ready_such_a_code_is_a_crash():
    """A new configuration that is wrong must not take down what runs on the old one."""
    fleet = started(2, fatal=frozenset({2}))
    fleet.exited(0, 2, 1)
    assert [Log(Event.ENDED, 0, 2, 0.5)] == fleet.poll(1)
    assert not fleet.is_draining


def test_a_silent_process_is_killed_and_replaced():
    """No heartbeat, no excuse: its event loop hangs."""
    fleet = started(1, silence=10)
    assert 10 == fleet.deadline
    fleet.heard(0, WELL, 4)
    assert [] == fleet.poll(13.9)
    assert [Log(Event.HUNG, 0), Kill(0)] == fleet.poll(14)
    assert [] == fleet.poll(15)
    fleet.exited(0, -9, 15)
    assert [Log(Event.ENDED, 0, -9, 0.5)] == fleet.poll(15)
    assert [Spawn(0)] == fleet.poll(15.5)


def test_a_process_that_is_never_heard_of_is_killed_later():
    """Imports take their time."""
    fleet = ProcessManager(ProcessPolicy(1, silence=10, boot=100))
    fleet.poll(0)
    assert 100 == fleet.deadline
    assert [] == fleet.poll(99)
    assert [Log(Event.HUNG, 0), Kill(0)] == fleet.poll(100)


def test_a_stuck_process_is_asked_to_leave_and_killed_if_it_does_not():
    """Its other handlers may end well; the one that is stuck is cut off within the budget."""
    fleet = started(1, grace=3)
    fleet.heard(0, STUCK, 1)
    assert [Log(Event.STUCK, 0), Drain(0)] == fleet.poll(1)
    fleet.heard(0, STUCK, 23)
    assert [] == fleet.poll(23.9)
    assert [Log(Event.LATE, 0), Kill(0)] == fleet.poll(24)
    fleet.exited(0, -9, 24)
    assert [Log(Event.ENDED, 0, -9, 0.5)] == fleet.poll(24)


def test_rolling_replaces_one_after_another():
    """The next one leaves only when the one before is ready again."""
    fleet = started(2)
    fleet.roll()
    assert [Drain(0)] == fleet.poll(1)
    fleet.exited(0, 0, 2)
    assert [Spawn(0)] == fleet.poll(2)
    fleet.heard(0, BUSY, 3)
    assert [] == fleet.poll(3)
    fleet.heard(0, WELL, 4)
    assert [Drain(1)] == fleet.poll(4)
    fleet.exited(1, 0, 5)
    assert [Spawn(1)] == fleet.poll(5)
    fleet.heard(1, WELL, 6)
    assert [Log(Event.ROLLED)] == fleet.poll(6)
    assert fleet.is_ready


def test_rolling_stops_where_the_new_process_does_not_come_up():
    """The others go on with what they have."""
    fleet = started(2)
    fleet.roll()
    fleet.poll(1)
    fleet.exited(0, 0, 2)
    fleet.poll(2)
    fleet.exited(0, 2, 3)
    told = notices(fleet.poll(3))
    assert [Event.ROLL_STOPPED, Event.ENDED] == told
    fleet.heard(1, WELL, 4)
    assert [Spawn(0)] == fleet.poll(4)
    fleet.heard(0, WELL, 5)
    assert [] == fleet.poll(5)


def test_rolling_begins_anew_where_it_is_asked_for_again():
    """With the slot that it was at; what does not come up there is not the newest."""
    fleet = started(2)
    fleet.roll()
    fleet.poll(1)
    fleet.exited(0, 0, 2)
    fleet.poll(2)
    fleet.roll()
    assert [Drain(0)] == fleet.poll(3)
    fleet.exited(0, 2, 3)
    assert [Spawn(0)] == fleet.poll(3)
    fleet.heard(0, WELL, 4)
    assert [Drain(1)] == fleet.poll(4)


def test_rolling_takes_along_what_is_down_or_leaving():
    """What waits for its restart is started at once; what leaves already is not asked twice."""
    fleet = started(2)
    fleet.exited(0, 1, 1)
    fleet.heard(1, STUCK, 1)
    assert Drain(1) in fleet.poll(1)
    fleet.roll()
    assert [Spawn(0)] == fleet.poll(1.1)
    fleet.heard(0, WELL, 2)
    assert [] == fleet.poll(2)
    fleet.exited(1, 1, 3)
    assert [Spawn(1)] == fleet.poll(3)


def test_a_drain_asks_everybody_and_ends_with_0():
    """Nobody is started any more, and rolling is over."""
    fleet = started(3)
    fleet.exited(2, 1, 1)
    fleet.roll()
    fleet.drain(1)
    fleet.drain(1)
    assert [Drain(0), Drain(1)] == [each for each in fleet.poll(1) if not isinstance(each, Log)]
    assert fleet.is_draining
    fleet.roll()
    fleet.exited(0, 0, 2)
    assert fleet.outcome is None
    fleet.exited(1, 0, 2)
    assert [] == fleet.poll(100)
    assert 0 == fleet.outcome
    assert fleet.deadline is None


def test_a_drain_that_takes_too_long_is_ended_and_told():
    """By SIGKILL, at the budget that the process itself has named, and a little grace."""
    fleet = started(1, grace=3)
    fleet.drain(1)
    fleet.poll(1)
    assert 24 == fleet.deadline
    assert [Log(Event.LATE, 0), Kill(0)] == fleet.poll(24)
    fleet.exited(0, -9, 24)
    assert 1 == fleet.outcome


def test_an_abandoned_drain_is_forced_and_the_third_signal_kills():
    """Each signal is more urgent than the one before."""
    fleet = started(1, force=6)
    fleet.drain(1)
    assert [Drain(0)] == fleet.poll(1)
    fleet.abandon(2)
    assert [Abandon(0)] == fleet.poll(2)
    assert 8 == fleet.deadline
    fleet.abandon(3)
    assert [Kill(0)] == fleet.poll(3)
    fleet.exited(0, 1, 3)
    assert 1 == fleet.outcome


def test_under_development_what_ended_waits_for_a_change():
    """Whatever it ended with."""
    fleet = ProcessManager(ProcessPolicy(1, silence=math.inf, boot=math.inf, is_patient=True))
    fleet.poll(0)
    fleet.exited(0, 2, 1)
    assert [Log(Event.ENDED, 0, 2)] == fleet.poll(1)
    assert fleet.deadline is None
    fleet.roll()
    assert [Spawn(0)] == fleet.poll(1000)
    assert fleet.deadline is None


def test_what_is_late_is_ignored():
    """A heartbeat or an end of a process that was seen to end already."""
    fleet = started(1)
    fleet.exited(0, 0, 1)
    fleet.heard(0, WELL, 1)
    fleet.exited(0, 0, 1)
    assert 1 == fleet.members[0].crashes
    assert not fleet.is_ready


# --- whatever they do ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Life:
    """What one process will do.

    Attributes:
        boots: Seconds until its first heartbeat.
        lives: Seconds until it ends by itself, or hangs.
        end: Its exit code; None: it hangs.
        drains: Seconds for its drain; more than its budget: it must be killed.
        is_stuck: It says so, from its first heartbeat on.
    """

    boots: float
    lives: float
    end: int | None
    drains: float
    is_stuck: bool


LIVES = st.builds(
    Life,
    boots=st.sampled_from([0.1, 1.0, 50.0]),
    lives=st.sampled_from([0.05, 0.5, 5.0, 50.0, math.inf]),
    end=st.sampled_from([None, 0, 1, 2, -9]),
    drains=st.sampled_from([0.0, 5.0, 19.0, math.inf]),
    is_stuck=st.sampled_from([False, False, False, True]),
)
HEALTHY = Life(boots=0.1, lives=math.inf, end=None, drains=1.0, is_stuck=False)
INTERVAL = 2.0


@dataclass
class Process:
    """One that is running."""

    life: Life
    began: float
    next_beat: float
    ends: float
    code: int = 0
    is_draining: bool = False


@dataclass
class World:
    """Processes, and a fleet that looks after them."""

    fleet: ProcessManager
    lives: list[list[Life]]
    running: dict[int, Process] = field(default_factory=dict)
    spawned: list[list[float]] = field(default_factory=list)
    told: list[Log] = field(default_factory=list)
    rolled: list[float] = field(default_factory=list)
    now: float = 0.0

    def __post_init__(self) -> None:
        self.spawned = [[] for _ in self.lives]

    def live(self, until: float) -> None:
        """Let time pass."""
        while self.fleet.outcome is None:
            self.act()
            times = [
                self.fleet.deadline,
                *(min(p.next_beat, p.ends) for p in self.running.values()),
            ]
            at = min((each for each in times if each is not None), default=math.inf)
            if at > until:
                break
            assert at >= self.now or self.fleet.deadline == at, "time stands still"
            self.now = max(self.now, at)
            self.happen()
        self.act()
        self.now = max(self.now, until)

    def happen(self) -> None:
        for slot, process in list(self.running.items()):
            if process.ends <= self.now:
                del self.running[slot]
                self.fleet.exited(slot, process.code, self.now)
            elif process.next_beat <= self.now:
                hangs = process.life.end is None and self.now - process.began > process.life.lives
                process.next_beat = math.inf if hangs else self.now + INTERVAL
                if not hangs:
                    self.fleet.heard(slot, Heartbeat(True, process.life.is_stuck, 20.0), self.now)

    def act(self) -> None:
        for action in self.fleet.poll(self.now):
            match action:
                case Spawn(slot):
                    assert slot not in self.running, "a slot never has two processes"
                    assert not self.fleet.is_draining, "nothing is started during a drain"
                    queue = self.lives[slot]
                    life = queue.pop(0) if queue else HEALTHY
                    ends = math.inf if life.end is None else self.now + life.lives
                    self.running[slot] = Process(
                        life, self.now, self.now + life.boots, ends, life.end or 0
                    )
                    self.spawned[slot].append(self.now)
                case Drain(slot):
                    process = self.running[slot]
                    assert not process.is_draining, "nobody is asked twice"
                    process.is_draining = True
                    if self.now + process.life.drains < process.ends:
                        process.ends, process.code = self.now + process.life.drains, 0
                case Kill(slot):
                    process = self.running[slot]
                    process.ends, process.code = self.now, -9
                case Abandon(slot):
                    process = self.running[slot]
                    process.ends, process.code = min(process.ends, self.now + 1), 1
                case Log():
                    self.told.append(action)
        leaving = [m for m in self.fleet.members if m.is_rolled and m.phase is Phase.LEAVING]
        assert len(leaving) <= 1, "one at a time makes room"


@given(
    lives=st.integers(1, 3).flatmap(
        lambda size: st.lists(st.lists(LIVES, max_size=6), min_size=size, max_size=size)
    ),
    rolls=st.lists(st.sampled_from([0.0, 1.0, 7.0, 60.0]), max_size=2),
    drain_at=st.sampled_from([0.0, 0.3, 3.0, 30.0, 700.0]),
    is_abandoned=st.booleans(),
)
def test_whatever_processes_do_the_fleet_ends_as_it_should(lives, rolls, drain_at, is_abandoned):
    """No slot has two processes, restarts are never a hot loop, and a drain ends within budget."""
    policy = ProcessPolicy(len(lives), silence=10, boot=30, fatal=frozenset({2}))
    world = World(ProcessManager(policy), [list(each) for each in lives])
    for at in sorted(rolls):
        world.live(min(at, drain_at))
        world.fleet.roll()
    world.live(drain_at)
    if drain_at == 700.0 and world.fleet.outcome is None:
        assert world.fleet.is_ready, "all are well in the end, since what is drawn is finite"
    for times in world.spawned:
        between = [later - sooner for sooner, later in pairwise(times)]
        quick = sum(each < 0.5 for each in between)
        assert quick <= len(rolls), "a restart that nobody asked for waits"
    if world.fleet.outcome is not None:
        assert Event.GIVEN_UP in [each.notice for each in world.told]
        return
    was_draining = world.fleet.is_draining
    world.fleet.drain(world.now)
    if is_abandoned:
        world.fleet.abandon(world.now)
    world.live(drain_at + (policy.force if is_abandoned else 25.0 + policy.grace))
    assert world.fleet.outcome in ({0, 1, 2} if was_draining else {0, 1})
    assert {} == world.running


@given(size=st.integers(1, 3), code=st.sampled_from([1, 7, -11, 0]))
def test_a_fleet_that_only_crashes_is_given_up_in_bounded_time(size, code):
    """With 1; after as many starts as the limit says."""
    fatal = Life(boots=0.1, lives=0.2, end=code, drains=0.0, is_stuck=False)
    world = World(ProcessManager(ProcessPolicy(size)), [[fatal] * 20 for _ in range(size)])
    world.live(60)
    assert 1 == world.fleet.outcome
    assert all(5 <= len(times) <= 6 for times in world.spawned)
