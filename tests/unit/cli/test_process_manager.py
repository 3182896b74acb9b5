"""Tests of when a supervised process is restarted, drained, killed or given up.

The first tests are examples. The property test draws what each process will do, plays it with a
process manager in virtual time, and checks what must always hold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aio_pika_batch.cli.process_manager import (
    Abandon,
    Drain,
    Heartbeat,
    Kill,
    Log,
    Phase,
    ProcessEvent,
    ProcessManager,
    ProcessPolicy,
    Spawn,
)

READY = Heartbeat(is_ready=True, is_stuck=False, drain_timeout=20.0)
BUSY = Heartbeat(is_ready=False, is_stuck=False, drain_timeout=20.0)
STUCK = Heartbeat(is_ready=True, is_stuck=True, drain_timeout=20.0)


def started(size: int = 1, **policy: object) -> ProcessManager:
    """A manager whose processes are all ready at time 0."""
    manager = ProcessManager(ProcessPolicy(size, **policy))
    assert [Spawn(0)] == manager.poll(0)
    manager.on_heartbeat(0, READY, 0)
    assert [Spawn(slot) for slot in range(1, size)] == manager.poll(0)
    for slot in range(1, size):
        manager.on_heartbeat(slot, READY, 0)
    return manager


def events(actions: list[object]) -> list[ProcessEvent]:
    """The events that are logged."""
    return [each.event for each in actions if isinstance(each, Log)]


def test_the_other_processes_start_after_the_first_heartbeat():
    """An error that all of them would meet is reported once."""
    manager = ProcessManager(ProcessPolicy(3))
    assert [Spawn(0)] == manager.poll(0)
    assert [] == manager.poll(5)
    manager.on_heartbeat(0, BUSY, 6)
    assert [Spawn(1), Spawn(2)] == manager.poll(6)
    assert manager.slots == manager.unready


def test_a_crashed_process_is_restarted_after_a_growing_pause():
    """0.5 s, 1 s, 2 s, and so on."""
    manager = started(2)
    now = 0.0
    for pause in (0.5, 1.0, 2.0, 4.0):
        manager.on_exit(0, -9, now)
        assert [Log(ProcessEvent.ENDED, 0, -9, pause)] == manager.poll(now)
        assert [] == manager.poll(now + pause - 0.01)
        now += pause
        assert [Spawn(0)] == manager.poll(now)


def test_a_stable_process_clears_its_count_of_crashes():
    """After 30 s."""
    manager = started(2)
    manager.on_exit(0, 1, 1)
    manager.poll(2)
    manager.on_heartbeat(0, READY, 2 + 29)
    assert 1 == manager.slots[0].crashes
    manager.on_heartbeat(0, READY, 2 + 30)
    assert 0 == manager.slots[0].crashes


def test_a_crash_loop_of_one_process_is_logged_once_and_the_others_go_on():
    """It is restarted with the longest pause. That it is stable again is logged, too."""
    manager = started(2, crash_limit=3)
    logged: list[ProcessEvent] = []
    now = 0.0
    for _ in range(8):
        manager.on_exit(0, 1, now)
        logged += events(manager.poll(now))
        now += 30
        manager.on_heartbeat(1, READY, now)
        manager.poll(now)
    assert [ProcessEvent.LOOPING] == [each for each in logged if each is not ProcessEvent.ENDED]
    assert manager.outcome is None
    manager.on_heartbeat(0, READY, now + 30)
    assert [ProcessEvent.RECOVERED] == events(manager.poll(now + 30))


def test_crash_loops_of_all_processes_end_the_supervisor():
    """With exit code 1, so that the service manager notices."""
    manager = started(2, crash_limit=2)
    for slot in (0, 1):
        manager.on_exit(slot, 1, 0)
    manager.poll(1)
    manager.on_exit(0, 1, 1)
    assert manager.outcome is None
    manager.on_exit(1, 1, 1)
    assert ProcessEvent.GIVEN_UP in events(manager.poll(1))
    assert 1 == manager.outcome


@pytest.mark.parametrize("code", [2, 3])
def test_a_fatal_exit_code_ends_the_supervisor_at_once(code):
    """Wrong usage or configuration, or no access: with the same exit code."""
    manager = ProcessManager(ProcessPolicy(3, fatal_codes=frozenset({2, 3})))
    manager.poll(0)
    manager.on_exit(0, code, 1)
    assert [Log(ProcessEvent.GIVEN_UP, code=code)] == manager.poll(1)
    assert code == manager.outcome


def test_a_fatal_exit_code_is_a_crash_once_a_process_was_ready():
    """A wrong new configuration must not end what runs with the old one."""
    manager = started(2, fatal_codes=frozenset({2}))
    manager.on_exit(0, 2, 1)
    assert [Log(ProcessEvent.ENDED, 0, 2, 0.5)] == manager.poll(1)
    assert not manager.is_draining


def test_a_process_without_heartbeats_is_killed_and_restarted():
    """Its event loop hangs."""
    manager = started(1, hung_after=10)
    assert 10 == manager.deadline
    manager.on_heartbeat(0, READY, 4)
    assert [] == manager.poll(13.9)
    assert [Log(ProcessEvent.HUNG, 0), Kill(0)] == manager.poll(14)
    assert [] == manager.poll(15)
    manager.on_exit(0, -9, 15)
    assert [Log(ProcessEvent.ENDED, 0, -9, 0.5)] == manager.poll(15)
    assert [Spawn(0)] == manager.poll(15.5)


def test_a_process_has_more_time_until_its_first_heartbeat():
    """Imports take time."""
    manager = ProcessManager(ProcessPolicy(1, hung_after=10, start_timeout=100))
    manager.poll(0)
    assert 100 == manager.deadline
    assert [] == manager.poll(99)
    assert [Log(ProcessEvent.HUNG, 0), Kill(0)] == manager.poll(100)


def test_a_stuck_process_is_drained_and_killed_if_that_takes_too_long():
    """Its other handlers can finish until the drain times out."""
    manager = started(1, drain_grace=3)
    manager.on_heartbeat(0, STUCK, 1)
    assert [Log(ProcessEvent.STUCK, 0), Drain(0)] == manager.poll(1)
    manager.on_heartbeat(0, STUCK, 23)
    assert [] == manager.poll(23.9)
    assert [Log(ProcessEvent.LATE, 0), Kill(0)] == manager.poll(24)
    manager.on_exit(0, -9, 24)
    assert [Log(ProcessEvent.ENDED, 0, -9, 0.5)] == manager.poll(24)


def test_a_rolling_restart_replaces_one_process_after_another():
    """The next is drained when the one before is ready."""
    manager = started(2)
    manager.roll()
    assert [Drain(0)] == manager.poll(1)
    manager.on_exit(0, 0, 2)
    assert [Spawn(0)] == manager.poll(2)
    manager.on_heartbeat(0, BUSY, 3)
    assert [] == manager.poll(3)
    manager.on_heartbeat(0, READY, 4)
    assert [Drain(1)] == manager.poll(4)
    manager.on_exit(1, 0, 5)
    assert [Spawn(1)] == manager.poll(5)
    manager.on_heartbeat(1, READY, 6)
    assert [Log(ProcessEvent.ROLLED)] == manager.poll(6)
    assert [] == manager.unready


def test_a_rolling_restart_stops_if_a_new_process_fails():
    """The others keep running."""
    manager = started(2)
    manager.roll()
    manager.poll(1)
    manager.on_exit(0, 0, 2)
    manager.poll(2)
    manager.on_exit(0, 2, 3)
    assert [ProcessEvent.ROLL_STOPPED, ProcessEvent.ENDED] == events(manager.poll(3))
    manager.on_heartbeat(1, READY, 4)
    assert [Spawn(0)] == manager.poll(4)
    manager.on_heartbeat(0, READY, 5)
    assert [] == manager.poll(5)


def test_a_second_roll_starts_over_with_the_slot_being_replaced():
    """A process that fails there isn't of the newest version."""
    manager = started(2)
    manager.roll()
    manager.poll(1)
    manager.on_exit(0, 0, 2)
    manager.poll(2)
    manager.roll()
    assert [Drain(0)] == manager.poll(3)
    manager.on_exit(0, 2, 3)
    assert [Spawn(0)] == manager.poll(3)
    manager.on_heartbeat(0, READY, 4)
    assert [Drain(1)] == manager.poll(4)


def test_a_rolling_restart_includes_slots_that_are_down_or_draining():
    """One that waits for a restart starts at once. One that drains already isn't asked twice."""
    manager = started(2)
    manager.on_exit(0, 1, 1)
    manager.on_heartbeat(1, STUCK, 1)
    assert Drain(1) in manager.poll(1)
    manager.roll()
    assert [Spawn(0)] == manager.poll(1.1)
    manager.on_heartbeat(0, READY, 2)
    assert [] == manager.poll(2)
    manager.on_exit(1, 1, 3)
    assert [Spawn(1)] == manager.poll(3)


def test_a_drain_asks_every_process_and_exits_with_0():
    """No process is started any more, and a rolling restart ends."""
    manager = started(3)
    manager.on_exit(2, 1, 1)
    manager.roll()
    manager.drain(1)
    manager.drain(1)
    assert [Drain(0), Drain(1)] == [each for each in manager.poll(1) if not isinstance(each, Log)]
    assert manager.is_draining
    manager.roll()
    manager.on_exit(0, 0, 2)
    assert manager.outcome is None
    manager.on_exit(1, 0, 2)
    assert [] == manager.poll(100)
    assert 0 == manager.outcome
    assert manager.deadline is None


def test_a_process_that_drains_too_long_is_killed():
    """After the time that it reported itself, plus the grace; the exit code is 1."""
    manager = started(1, drain_grace=3)
    manager.drain(1)
    manager.poll(1)
    assert 24 == manager.deadline
    assert [Log(ProcessEvent.LATE, 0), Kill(0)] == manager.poll(24)
    manager.on_exit(0, -9, 24)
    assert 1 == manager.outcome


def test_the_second_signal_abandons_the_drain_and_the_third_kills():
    """The processes get less time with each."""
    manager = started(1, abandon_timeout=6)
    manager.drain(1)
    assert [Drain(0)] == manager.poll(1)
    manager.abandon(2)
    assert [Abandon(0)] == manager.poll(2)
    assert 8 == manager.deadline
    manager.abandon(3)
    assert [Kill(0)] == manager.poll(3)
    manager.on_exit(0, 1, 3)
    assert 1 == manager.outcome


def test_a_drain_asks_no_process_twice():
    """One that drains for a rolling restart goes on with that."""
    manager = started(2)
    manager.roll()
    assert Drain(0) in manager.poll(0)
    manager.drain(1)
    assert [Drain(1)] == [each for each in manager.poll(1) if not isinstance(each, Log)]


def test_a_process_that_is_down_is_not_restarted_in_a_drain():
    """Nor does it get the order to abandon the drain."""
    manager = started(2)
    manager.on_exit(0, -9, 0)
    manager.poll(0)
    manager.drain(1)
    manager.abandon(1)
    assert [Drain(1), Abandon(1)] == [each for each in manager.poll(1) if not isinstance(each, Log)]
    manager.on_exit(1, 0, 2)
    assert not [each for each in manager.poll(100) if isinstance(each, Spawn)]
    assert 0 == manager.outcome


def test_with_reload_a_process_that_ended_waits_for_a_roll():
    """Whatever its exit code."""
    manager = ProcessManager(
        ProcessPolicy(1, hung_after=math.inf, start_timeout=math.inf, waits_for_roll=True)
    )
    manager.poll(0)
    manager.on_exit(0, 2, 1)
    assert [Log(ProcessEvent.ENDED, 0, 2)] == manager.poll(1)
    assert manager.deadline is None
    manager.roll()
    assert [Spawn(0)] == manager.poll(1000)
    assert manager.deadline is None


def test_late_heartbeats_and_exits_are_ignored():
    """Those of a process that has already ended."""
    manager = started(1)
    manager.on_exit(0, 0, 1)
    manager.on_heartbeat(0, READY, 1)
    manager.on_exit(0, 0, 1)
    assert 1 == manager.slots[0].crashes
    assert manager.slots == manager.unready


def test_a_killed_process_is_not_ready_whatever_its_last_heartbeat():
    """Its phase is newer."""
    manager = started(2, hung_after=10)
    manager.on_heartbeat(0, READY, 5)
    assert [Log(ProcessEvent.HUNG, 1), Kill(1)] == manager.poll(10)
    assert manager.slots[1].is_ready
    assert [1] == [slot.index for slot in manager.unready]


def test_a_start_that_fails_is_tried_again_and_never_a_crash_loop():
    """With growing pauses, for as long as the machine lacks what it takes."""
    manager = ProcessManager(ProcessPolicy(1, crash_limit=3))
    now = 0.0
    for pause in (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0):
        assert [Spawn(0)] == manager.poll(now)
        assert pause == manager.on_start_failed(0, now)
        assert [] == manager.poll(now + pause - 0.01)
        now += pause
    assert [Spawn(0)] == manager.poll(now)
    assert 0 == manager.slots[0].restarts
    manager.on_heartbeat(0, READY, now)
    manager.on_exit(0, 1, now)
    assert [Log(ProcessEvent.ENDED, 0, 1, 0.5)] == manager.poll(now)
    assert (1, 1) == (manager.crashes, manager.slots[0].crashes)


def test_a_drain_ends_while_a_process_cannot_be_started():
    """No other try is made."""
    manager = ProcessManager(ProcessPolicy(1))
    manager.poll(0)
    manager.on_start_failed(0, 0)
    manager.drain(0.1)
    assert [] == manager.poll(100)
    assert 0 == manager.outcome


@pytest.mark.parametrize("had_heartbeat", [True, False])
@given(slept=st.floats(0, 1e6), since=st.floats(0, 9))
def test_time_for_which_the_supervisor_was_paused_counts_for_no_process(
    had_heartbeat, slept, since
):
    """A process is killed after as much time with a running supervisor as ever."""
    manager = ProcessManager(ProcessPolicy(1, hung_after=10, start_timeout=10))
    manager.poll(0)
    if had_heartbeat:
        manager.on_heartbeat(0, READY, 0)
    now = since + slept
    manager.skip(slept, now)
    assert [] == manager.poll(now)
    assert pytest.approx(10 + slept) == manager.deadline
    assert Kill(0) in manager.poll(manager.deadline)
    assert 1 == manager.hung_kills


def test_a_process_that_is_starting_during_a_pause_has_its_whole_time_to_start():
    """It has sent no heartbeat yet."""
    manager = ProcessManager(ProcessPolicy(1, start_timeout=10))
    manager.poll(0)
    manager.skip(1000, 1001)
    assert [] == manager.poll(1009)
    assert Kill(0) in manager.poll(1010)


def test_a_heartbeat_that_was_read_before_the_pause_was_noticed_is_not_of_the_future():
    """Otherwise a process that hangs then would live longer."""
    manager = started(1, hung_after=10)
    manager.on_heartbeat(0, READY, 100)
    manager.skip(99, 100)
    assert 110 == manager.deadline


def test_a_pause_of_the_supervisor_prolongs_a_drain():
    """Neither is a process killed whose exit it could not see."""
    manager = started(1, drain_grace=3)
    manager.drain(1)
    manager.poll(1)
    manager.skip(1000, 1001)
    assert [] == manager.poll(1001)
    assert 1024 == manager.deadline


# --- properties ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Script:
    """What one process will do.

    Attributes:
        starts_for: Seconds until its first heartbeat.
        runs_for: Seconds until it exits by itself, or hangs.
        code: Its exit code; None if it hangs.
        drains_for: Seconds for its drain; if that exceeds the limit, it must be killed.
        is_stuck: Whether its heartbeats say so.
    """

    starts_for: float
    runs_for: float
    code: int | None
    drains_for: float
    is_stuck: bool


SCRIPTS = st.builds(
    Script,
    starts_for=st.sampled_from([0.1, 1.0, 50.0]),
    runs_for=st.sampled_from([0.05, 0.5, 5.0, 50.0, math.inf]),
    code=st.sampled_from([None, 0, 1, 2, -9]),
    drains_for=st.sampled_from([0.0, 5.0, 19.0, math.inf]),
    is_stuck=st.sampled_from([False, False, False, True]),
)
HEALTHY = Script(starts_for=0.1, runs_for=math.inf, code=None, drains_for=1.0, is_stuck=False)
INTERVAL = 2.0


@dataclass
class Process:
    """A running process."""

    script: Script
    began: float
    next_beat: float
    ends: float
    code: int = 0
    is_draining: bool = False


@dataclass
class World:
    """Processes and their manager."""

    manager: ProcessManager
    scripts: list[list[Script]]
    running: dict[int, Process] = field(default_factory=dict)
    spawned: list[list[float]] = field(default_factory=list)
    logged: list[Log] = field(default_factory=list)
    now: float = 0.0

    def __post_init__(self) -> None:
        self.spawned = [[] for _ in self.scripts]

    def live(self, until: float) -> None:
        """Let time pass."""
        while self.manager.outcome is None:
            self.act()
            times = [
                self.manager.deadline,
                *(min(p.next_beat, p.ends) for p in self.running.values()),
            ]
            at = min((each for each in times if each is not None), default=math.inf)
            if at > until:
                break
            assert at >= self.now or self.manager.deadline == at, "time stands still"
            self.now = max(self.now, at)
            self.happen()
        self.act()
        self.now = max(self.now, until)

    def happen(self) -> None:
        for slot, process in list(self.running.items()):
            if process.ends <= self.now:
                del self.running[slot]
                self.manager.on_exit(slot, process.code, self.now)
            elif process.next_beat <= self.now:
                hangs = (
                    process.script.code is None
                    and self.now - process.began > process.script.runs_for
                )
                process.next_beat = math.inf if hangs else self.now + INTERVAL
                if not hangs:
                    self.manager.on_heartbeat(
                        slot, Heartbeat(True, process.script.is_stuck, 20.0), self.now
                    )

    def act(self) -> None:
        for action in self.manager.poll(self.now):
            match action:
                case Spawn(slot):
                    assert slot not in self.running, "a slot never has two processes"
                    assert not self.manager.is_draining, "nothing is started during a drain"
                    queue = self.scripts[slot]
                    script = queue.pop(0) if queue else HEALTHY
                    ends = math.inf if script.code is None else self.now + script.runs_for
                    self.running[slot] = Process(
                        script, self.now, self.now + script.starts_for, ends, script.code or 0
                    )
                    self.spawned[slot].append(self.now)
                case Drain(slot):
                    process = self.running[slot]
                    assert not process.is_draining, "a process is asked to drain once"
                    process.is_draining = True
                    if self.now + process.script.drains_for < process.ends:
                        process.ends, process.code = self.now + process.script.drains_for, 0
                case Kill(slot):
                    process = self.running[slot]
                    process.ends, process.code = self.now, -9
                case Abandon(slot):
                    process = self.running[slot]
                    process.ends, process.code = min(process.ends, self.now + 1), 1
                case Log():
                    self.logged.append(action)
        leaving = [
            each for each in self.manager.slots if each.is_rolled and each.phase is Phase.LEAVING
        ]
        assert len(leaving) <= 1, "one process at a time is replaced"


@given(
    scripts=st.integers(1, 3).flatmap(
        lambda size: st.lists(st.lists(SCRIPTS, max_size=6), min_size=size, max_size=size)
    ),
    rolls=st.lists(st.sampled_from([0.0, 1.0, 7.0, 60.0]), max_size=2),
    drain_at=st.sampled_from([0.0, 0.3, 3.0, 30.0, 700.0]),
    is_abandoned=st.booleans(),
)
def test_restarts_wait_and_a_drain_ends_in_time_whatever_the_processes_do(
    scripts, rolls, drain_at, is_abandoned
):
    """And a slot never has two processes."""
    policy = ProcessPolicy(
        len(scripts), hung_after=10, start_timeout=30, fatal_codes=frozenset({2})
    )
    world = World(ProcessManager(policy), [list(each) for each in scripts])
    for at in sorted(rolls):
        world.live(min(at, drain_at))
        world.manager.roll()
    world.live(drain_at)
    if drain_at == 700.0 and world.manager.outcome is None:
        assert not world.manager.unready, "all are ready in the end, since the scripts are finite"
    for times in world.spawned:
        between = [later - sooner for sooner, later in pairwise(times)]
        quick = sum(each < 0.5 for each in between)
        assert quick <= len(rolls), "a restart after a crash waits"
    if world.manager.outcome is not None:
        assert ProcessEvent.GIVEN_UP in [each.event for each in world.logged]
        return
    was_draining = world.manager.is_draining
    world.manager.drain(world.now)
    if is_abandoned:
        world.manager.abandon(world.now)
    world.live(drain_at + (policy.abandon_timeout if is_abandoned else 25.0 + policy.drain_grace))
    assert world.manager.outcome in ({0, 1, 2} if was_draining else {0, 1})
    assert {} == world.running


@given(size=st.integers(1, 3), code=st.sampled_from([1, 7, -11, 0]))
def test_processes_that_only_crash_end_the_supervisor_in_bounded_time(size, code):
    """With exit code 1, after as many starts as the limit allows."""
    failing = Script(starts_for=0.1, runs_for=0.2, code=code, drains_for=0.0, is_stuck=False)
    world = World(ProcessManager(ProcessPolicy(size)), [[failing] * 20 for _ in range(size)])
    world.live(60)
    assert 1 == world.manager.outcome
    assert all(5 <= len(times) <= 6 for times in world.spawned)
