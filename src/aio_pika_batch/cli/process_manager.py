"""Decides when a supervised process is started, restarted, drained or killed.

Pure: the supervisor reports what happened (`on_heartbeat`, `on_exit`, `roll`, `drain`, `abandon`)
with the current time. `poll` returns the actions that are due, `deadline` when to poll again. So
unit tests play years of crashes, hangs and rolling restarts in virtual time. A slot holds at most
one process at a time.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from aio_pika_batch.core.retry import Backoff


@dataclass(frozen=True, slots=True)
class ProcessPolicy:
    """How processes are supervised. Times are in seconds.

    Attributes:
        hung_after: A process without a heartbeat for this long is killed.
        start_timeout: The same limit before its first heartbeat, since imports take time.
        drain_timeout: Limit for a drain until the process reports its own.
        drain_grace: Extra time for a drain before the process is killed.
        abandon_timeout: Time that a process has to exit once its drain is abandoned.
        stable_after: A process that has run for this long clears its count of crashes.
        pauses: Pauses before restarts after a crash.
        crash_limit: Number of crashes in a row that make a crash loop.
        fatal_codes: Exit codes that a restart can't fix. They end the supervisor if no process has
            ever been ready.
        waits_for_roll: A process that exited is restarted by `roll` only (`--reload`).
    """

    size: int
    hung_after: float = 60.0
    start_timeout: float = 120.0
    drain_timeout: float = 25.0
    drain_grace: float = 3.0
    abandon_timeout: float = 6.0
    stable_after: float = 30.0
    pauses: Backoff = Backoff(0.5, 30.0)  # noqa: RUF009  -- frozen
    crash_limit: int = 5
    fatal_codes: frozenset[int] = frozenset()
    waits_for_roll: bool = False


class Phase(Enum):
    """State of a slot."""

    DOWN = "down"
    """No process; one is started when it is due."""
    UP = "up"
    LEAVING = "leaving"
    """The process is draining; it is killed when it is due."""
    KILLED = "killed"
    """The process was killed, and its exit hasn't been reported yet."""
    OVER = "over"
    """No process, and none will be started."""


class ProcessEvent(Enum):
    """What the supervisor logs about its processes."""

    ENDED = "a process ended"
    LOOPING = "crash loop: a process keeps crashing; restarts go on with long pauses"
    RECOVERED = "a process is stable again"
    HUNG = "a process sends no heartbeats; killing it"
    STUCK = "a process holds a message longer than stuck_after; draining it"
    LATE = "a process did not drain in time; killing it"
    ROLLED = "rolling restart finished: every process was replaced"
    ROLL_STOPPED = "rolling restart stopped: the new process failed; the others keep running"
    GIVEN_UP = "giving up: restarts don't help; stopping all processes"


@dataclass(frozen=True, slots=True)
class SlotAction:
    """Something that the supervisor does to the process in a slot."""

    slot: int


class Spawn(SlotAction):
    """Start a process."""


class Drain(SlotAction):
    """Ask the process to drain and exit."""


class Abandon(SlotAction):
    """Ask the process to stop draining and exit."""


class Kill(SlotAction):
    """Kill the process."""


@dataclass(frozen=True, slots=True)
class Log:
    """Log an event, of one process or of all, with its exit code and the pause before the next."""

    event: ProcessEvent
    slot: int | None = None
    code: int | None = None
    pause: float | None = None


Action: TypeAlias = Spawn | Drain | Abandon | Kill | Log


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a process regularly reports about itself."""

    is_ready: bool
    is_stuck: bool
    """Whether it holds a message longer than `stuck_after`."""
    drain_timeout: float


@dataclass(slots=True)
class ProcessSlot:
    """One slot and its process. `crashes` and `failed_starts` are those in a row.

    Attributes:
        due: When to start the next process or to kill the current one, depending on `phase`.
        restarts: Number of processes started after the first.
        is_rolled: Whether the process drains to be replaced by a rolling restart.
    """

    index: int
    drain_timeout: float
    phase: Phase = Phase.DOWN
    due: float = -math.inf
    started_at: float = 0.0
    last_heartbeat: float | None = None
    is_ready: bool = False
    is_stuck: bool = False
    crashes: int = 0
    failed_starts: int = 0
    restarts: int = -1
    is_rolled: bool = False

    @property
    def is_alive(self) -> bool:
        """Whether the slot has a process."""
        return self.phase not in {Phase.DOWN, Phase.OVER}


class ProcessManager:
    """The state of all processes of one supervisor.

    Attributes:
        slots: All slots, for reading.
        crashes: Number of processes that ended without being asked to.
        hung_kills: Number of processes killed because they sent no heartbeats.
        is_draining: Whether the supervisor stops: no more processes are started.
    """

    def __init__(self, policy: ProcessPolicy) -> None:
        self.policy = policy
        self.slots = [ProcessSlot(index, policy.drain_timeout) for index in range(policy.size)]
        # The first process starts alone, and the others after its first heartbeat: an error that
        # all of them would meet is reported once.
        for slot in self.slots[1:]:
            slot.due = math.inf
        self.crashes = 0
        self.hung_kills = 0
        self.is_draining = False
        self._actions: list[Action] = []
        self._to_roll: list[int] = []
        self._rolling: int | None = None
        self._is_abandoned = False
        self._had_heartbeat = False
        self._was_ready = False
        self._code = 0

    @property
    def unready(self) -> Sequence[ProcessSlot]:
        """The slots whose process doesn't consume, or is leaving or killed."""
        # A killed process was ready by its last heartbeat; its phase is the newer fact.
        return [slot for slot in self.slots if slot.phase is not Phase.UP or not slot.is_ready]

    @property
    def outcome(self) -> int | None:
        """The exit code once all processes are over; None before."""
        over = all(slot.phase is Phase.OVER for slot in self.slots)
        return self._code if over else None

    @property
    def deadline(self) -> float | None:
        """When to poll at the latest if nothing happens; None if only an event can change it."""
        times = [self._due(slot) for slot in self.slots]
        return min((each for each in times if each < math.inf), default=None)

    def _due(self, slot: ProcessSlot) -> float:
        match slot.phase:
            case Phase.DOWN | Phase.LEAVING:
                return slot.due
            case Phase.UP:
                if slot.last_heartbeat is None:
                    return slot.started_at + self.policy.start_timeout
                return slot.last_heartbeat + self.policy.hung_after
            case _:
                return math.inf

    def on_heartbeat(self, index: int, heartbeat: Heartbeat, now: float) -> None:
        """Take in a heartbeat. One that arrives after the process ended is ignored."""
        slot = self.slots[index]
        if not slot.is_alive:
            return
        if not self._had_heartbeat:
            self._had_heartbeat = True
            for other in self.slots:
                if other.phase is Phase.DOWN:
                    other.due = now
        slot.failed_starts = 0
        slot.last_heartbeat = now
        slot.is_ready = heartbeat.is_ready
        slot.is_stuck = heartbeat.is_stuck
        slot.drain_timeout = heartbeat.drain_timeout
        if not heartbeat.is_ready or slot.phase is not Phase.UP:
            return
        self._was_ready = True
        if index == self._rolling:
            self._rolling = None
            if not self._to_roll:
                self._actions.append(Log(ProcessEvent.ROLLED))
        if slot.crashes and now - slot.started_at >= self.policy.stable_after:
            if slot.crashes >= self.policy.crash_limit:
                self._actions.append(Log(ProcessEvent.RECOVERED, index))
            slot.crashes = 0

    def on_exit(self, index: int, code: int, now: float) -> None:
        """Take in that a process ended, for whatever reason."""
        slot = self.slots[index]
        if not slot.is_alive:
            return
        was_ready, was_rolled = slot.is_ready, slot.is_rolled
        slot.is_ready = slot.is_stuck = slot.is_rolled = False
        if self.is_draining:
            slot.phase = Phase.OVER
            if code != 0:
                self._code = self._code or 1
            return
        slot.phase = Phase.DOWN
        if was_rolled:
            slot.due = now
            return
        if index == self._rolling and not was_ready:
            self._rolling = None
            self._to_roll.clear()
            self._actions.append(Log(ProcessEvent.ROLL_STOPPED, index))
        self._on_unexpected_exit(slot, code, now)

    def _on_unexpected_exit(self, slot: ProcessSlot, code: int, now: float) -> None:
        policy = self.policy
        if policy.waits_for_roll:
            slot.due = math.inf
            self._actions.append(Log(ProcessEvent.ENDED, slot.index, code))
            return
        # Once a process was ready, the same code is a crash like any other: a wrong new
        # configuration must not end the processes that run with the old one.
        if code in policy.fatal_codes and not self._was_ready:
            self._give_up(code, now)
            return
        slot.crashes += 1
        self.crashes += 1
        pause = policy.pauses.pause(slot.crashes, 1.0)
        slot.due = now + pause
        self._actions.append(Log(ProcessEvent.ENDED, slot.index, code, pause))
        # One crash loop goes on, since giving up would end the processes that work. When all are
        # in one, the supervisor exits, so that the service manager notices.
        if all(each.crashes >= policy.crash_limit for each in self.slots if each.restarts >= 0):
            self._give_up(1, now)
        elif slot.crashes == policy.crash_limit:
            self._actions.append(Log(ProcessEvent.LOOPING, slot.index))

    def on_start_failed(self, index: int, now: float) -> float:
        """Take in that a process couldn't be started, and return the pause before the next try."""
        slot = self.slots[index]
        slot.restarts -= 1
        # Not a crash: the machine lacks descriptors, memory or processes, for which the other
        # processes must not end. So this never counts as a crash loop.
        slot.failed_starts += 1
        pause = self.policy.pauses.pause(slot.failed_starts, 1.0)
        slot.phase, slot.due = Phase.DOWN, now + pause
        return pause

    def skip(self, seconds: float, now: float) -> None:
        """Leave out time during which the supervisor itself didn't run.

        Heartbeats that it couldn't read meanwhile are not missing.
        """
        for slot in self.slots:
            # Not beyond now: a heartbeat may have been read since.
            slot.started_at = min(slot.started_at + seconds, now)
            if slot.last_heartbeat is not None:
                slot.last_heartbeat = min(slot.last_heartbeat + seconds, now)
            if slot.phase is Phase.LEAVING:
                slot.due += seconds

    def roll(self) -> None:
        """Replace all processes one after another.

        Called again meanwhile, it starts over with the slot that is being replaced: the process
        that starts there may already be outdated.
        """
        if not self.is_draining:
            indexes = range(len(self.slots))
            self._to_roll = sorted(indexes, key=lambda index: index != self._rolling)
            self._rolling = None

    def drain(self, now: float) -> None:
        """Drain all processes and start no more."""
        if self.is_draining:
            return
        self.is_draining = True
        self._to_roll.clear()
        self._rolling = None
        for slot in self.slots:
            match slot.phase:
                case Phase.DOWN:
                    slot.phase = Phase.OVER
                case Phase.UP:
                    self._drain_slot(slot, now)
                case _:
                    pass  # already draining or killed

    def abandon(self, now: float) -> None:
        """Abandon the drain. The second call kills what is left."""
        self.drain(now)
        for slot in self.slots:
            if self._is_abandoned and slot.is_alive:
                self._kill(slot)
            elif slot.phase is Phase.LEAVING:
                slot.due = min(slot.due, now + self.policy.abandon_timeout)
                self._actions.append(Abandon(slot.index))
        self._is_abandoned = True

    def poll(self, now: float) -> list[Action]:
        """Return the actions that are due, in order."""
        for slot in self.slots:
            is_due = now >= self._due(slot)
            match slot.phase:
                case Phase.DOWN if is_due:
                    self._spawn(slot, now)
                case Phase.UP if is_due:
                    # A blocked event loop couldn't receive a command to drain.
                    self.hung_kills += 1
                    self._actions.append(Log(ProcessEvent.HUNG, slot.index))
                    self._kill(slot)
                case Phase.UP if slot.is_stuck:
                    # Its event loop runs, so its other handlers can still finish.
                    self._actions.append(Log(ProcessEvent.STUCK, slot.index))
                    self._drain_slot(slot, now)
                case Phase.LEAVING if is_due:
                    self._actions.append(Log(ProcessEvent.LATE, slot.index))
                    self._kill(slot)
                case _:
                    pass
        if self._to_roll and self._rolling is None:
            self._roll_next(now)
        actions, self._actions = self._actions, []
        return actions

    def _roll_next(self, now: float) -> None:
        self._rolling = index = self._to_roll.pop(0)
        slot = self.slots[index]
        match slot.phase:
            case Phase.UP:
                slot.is_rolled = True
                self._drain_slot(slot, now)
            case Phase.DOWN:
                self._spawn(slot, now)
            case _:
                slot.is_rolled = True  # it is leaving anyway, and the next process will be new

    def _spawn(self, slot: ProcessSlot, now: float) -> None:
        slot.phase = Phase.UP
        slot.started_at = now
        slot.last_heartbeat = None
        slot.restarts += 1
        self._actions.append(Spawn(slot.index))

    def _drain_slot(self, slot: ProcessSlot, now: float) -> None:
        slot.phase = Phase.LEAVING
        slot.due = now + slot.drain_timeout + self.policy.drain_grace
        self._actions.append(Drain(slot.index))

    def _kill(self, slot: ProcessSlot) -> None:
        slot.phase = Phase.KILLED
        self._actions.append(Kill(slot.index))

    def _give_up(self, code: int, now: float) -> None:
        self._actions.append(Log(ProcessEvent.GIVEN_UP, code=code))
        self.drain(now)
        self._code = code


def describe_exit(code: int) -> str:
    """Return how a process ended: its exit code, or the signal that killed it."""
    if code >= 0:
        return f"with exit code {code}"
    with suppress(ValueError):
        return f"by {signal.Signals(-code).name}"
    return f"by signal {-code}"
