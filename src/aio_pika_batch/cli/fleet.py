"""When is a process started again, asked to leave, killed, or given up?

A supervisor's decisions, from what it has heard and what time it is: `heard`, `exited`, `roll`,
`drain`, `abandon` take in what happens, `poll` says what is to be done by now, and `deadline` when
to ask again. One process has one slot, and a slot never has two processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

from aio_pika_batch.core.retry import Backoff


@dataclass(frozen=True, slots=True)
class ProcessPolicy:
    """What a supervisor was told; times are in seconds.

    Attributes:
        size: How many processes.
        silence: Without a heartbeat for so long a process hangs.
        boot: The same until its first heartbeat: imports take their time.
        budget: For a drain, until the process says itself what it needs.
        grace: How much longer than its budget a process may take.
        force: How long it may take once its drain is abandoned.
        stable: After so long at work, earlier crashes are forgotten.
        pauses: Between crashes and starts.
        limit: So many crashes in a row are a crash loop.
        fatal: Exit codes that no restart mends, of a fleet that has never been ready.
        is_patient: A process that ended waits for `roll`, as one under development does.
    """

    size: int
    silence: float = 60.0
    boot: float = 120.0
    budget: float = 25.0
    grace: float = 3.0
    force: float = 6.0
    stable: float = 30.0
    pauses: Backoff = Backoff(0.5, 30.0)  # noqa: RUF009  -- frozen
    limit: int = 5
    fatal: frozenset[int] = frozenset()
    is_patient: bool = False


class Phase(Enum):
    """Where a slot's process is."""

    DOWN = "down"
    """There is none; one is started when it is due."""
    UP = "up"
    LEAVING = "leaving"
    """It was asked to drain; when it is due it is killed."""
    KILLED = "killed"
    """It was killed; its end has not been seen yet."""
    OVER = "over"
    """There is none, and there will be none."""


class Event(Enum):
    """What whoever looks after the supervisor should know."""

    ENDED = "a process ended"
    LOOPING = "crash loop: a process crashes again and again"
    RECOVERED = "a process is stable again"
    HUNG = "a process hangs, and is killed"
    STUCK = "a process holds a message for too long, and is asked to leave"
    LATE = "a process did not leave in time, and is killed"
    ROLLED = "all processes are new"
    ROLL_STOPPED = "a new process does not come up: the others stay as they are"
    GIVEN_UP = "given up"


@dataclass(frozen=True, slots=True)
class Spawn:
    """Start a process for a slot."""

    slot: int


@dataclass(frozen=True, slots=True)
class Drain:
    """Ask a slot's process to drain and to end."""

    slot: int


@dataclass(frozen=True, slots=True)
class Abandon:
    """Ask a slot's process to give up its drain."""

    slot: int


@dataclass(frozen=True, slots=True)
class Kill:
    """End a slot's process at once."""

    slot: int


@dataclass(frozen=True, slots=True)
class Log:
    """Log something.

    Attributes:
        slot: Whom it is about; None: all.
        code: With which exit code a process ended; None if it did not.
        pause: Seconds until the next one is started; None if none is.
    """

    notice: Event
    slot: int | None = None
    code: int | None = None
    pause: float | None = None


Action: TypeAlias = Spawn | Drain | Abandon | Kill | Log


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What a process says of itself, again and again.

    Attributes:
        is_ready: It consumes.
        is_stuck: It holds a message past its deadline.
        budget: Seconds that its drain may take.
    """

    is_ready: bool
    is_stuck: bool
    budget: float


@dataclass(slots=True)
class ProcessSlot:
    """A slot.

    Attributes:
        due: When its next process is started, or its process killed, as `phase` has it.
        since: When its process was started.
        last: When it was heard of.
        crashes: In a row.
        restarts: How many processes it has had, but for the first.
        is_rolled: Its process leaves to make room for a new one.
    """

    slot: int
    budget: float
    phase: Phase = Phase.DOWN
    due: float = -math.inf
    since: float = 0.0
    last: float | None = None
    is_ready: bool = False
    is_stuck: bool = False
    crashes: int = 0
    restarts: int = -1
    is_rolled: bool = False

    @property
    def is_alive(self) -> bool:
        """Whether it has a process."""
        return self.phase in _ALIVE


_ALIVE = frozenset({Phase.UP, Phase.LEAVING, Phase.KILLED})


@dataclass(slots=True)
class ProcessManager:
    """All processes of one supervisor."""

    policy: ProcessPolicy
    _members: list[ProcessSlot] = field(init=False)
    _actions: list[Action] = field(default_factory=list, init=False)
    _to_roll: list[int] = field(default_factory=list, init=False)
    _rolling: int | None = field(default=None, init=False)
    _is_draining: bool = field(default=False, init=False)
    _is_abandoned: bool = field(default=False, init=False)
    _was_heard: bool = field(default=False, init=False)
    _was_ready: bool = field(default=False, init=False)
    _code: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._members = [ProcessSlot(slot, self.policy.budget) for slot in range(self.policy.size)]
        # What is wrong with the configuration is found, and told, by the first one alone.
        for member in self._members[1:]:
            member.due = math.inf

    # -- what is seen from outside ----------------------------------------------------------------

    @property
    def members(self) -> Sequence[ProcessSlot]:
        """Every slot, to be looked at."""
        return self._members

    @property
    def is_ready(self) -> bool:
        """Whether every process consumes, and none is about to leave."""
        return not self._is_draining and all(
            member.phase is Phase.UP and member.is_ready for member in self._members
        )

    @property
    def is_draining(self) -> bool:
        """Whether no process will be started any more."""
        return self._is_draining

    @property
    def outcome(self) -> int | None:
        """The exit code, once all is over."""
        over = all(member.phase is Phase.OVER for member in self._members)
        return self._code if over else None

    @property
    def deadline(self) -> float | None:
        """When to poll at the latest, if nothing happens before."""
        times = [self._time_of(member) for member in self._members]
        return min((each for each in times if each < math.inf), default=None)

    def _time_of(self, member: ProcessSlot) -> float:
        match member.phase:
            case Phase.DOWN | Phase.LEAVING:
                return member.due
            case Phase.UP:
                if member.last is None:
                    return member.since + self.policy.boot
                return member.last + self.policy.silence
            case _:
                return math.inf

    # -- what happens -----------------------------------------------------------------------------

    def heard(self, slot: int, beat: Heartbeat, now: float) -> None:
        """A process is alive, and says how it is."""
        member = self._members[slot]
        if not member.is_alive:
            return
        if not self._was_heard:
            self._was_heard = True
            for other in self._members:
                if other.phase is Phase.DOWN:
                    other.due = now
        member.last = now
        member.is_ready = beat.is_ready
        member.is_stuck = beat.is_stuck
        member.budget = beat.budget
        if not beat.is_ready or member.phase is not Phase.UP:
            return
        self._was_ready = True
        if slot == self._rolling:
            self._rolling = None
            if not self._to_roll:
                self._actions.append(Log(Event.ROLLED))
        if member.crashes and now - member.since >= self.policy.stable:
            if member.crashes >= self.policy.limit:
                self._actions.append(Log(Event.RECOVERED, slot))
            member.crashes = 0

    def exited(self, slot: int, code: int, now: float) -> None:
        """A process has ended, for whatever reason."""
        member = self._members[slot]
        if not member.is_alive:
            return
        was_ready, was_rolled = member.is_ready, member.is_rolled
        member.is_ready = member.is_stuck = member.is_rolled = False
        if self._is_draining:
            member.phase = Phase.OVER
            if code != 0:
                self._code = self._code or 1
            return
        member.phase = Phase.DOWN
        if was_rolled:
            member.due = now
            return
        if slot == self._rolling and not was_ready:
            self._rolling = None
            self._to_roll.clear()
            self._actions.append(Log(Event.ROLL_STOPPED, slot))
        self._ended(member, code, now)

    def _ended(self, member: ProcessSlot, code: int, now: float) -> None:
        """It ended, and nobody had wanted it to make room."""
        policy = self.policy
        if policy.is_patient:
            member.due = math.inf
            self._actions.append(Log(Event.ENDED, member.slot, code))
            return
        if code in policy.fatal and not self._was_ready:
            self._give_up(code, now)
            return
        member.crashes += 1
        pause = policy.pauses.pause(member.crashes, 1.0)
        member.due = now + pause
        self._actions.append(Log(Event.ENDED, member.slot, code, pause))
        if all(each.crashes >= policy.limit for each in self._members if each.restarts >= 0):
            self._give_up(1, now)
        elif member.crashes == policy.limit:
            self._actions.append(Log(Event.LOOPING, member.slot))

    def roll(self) -> None:
        """Replace all processes, one after another.

        Asked for again meanwhile, it begins anew, and with the one that is being replaced: what
        comes up there may be out of date already.
        """
        if not self._is_draining:
            slots = [member.slot for member in self._members]
            self._to_roll = sorted(slots, key=lambda slot: slot != self._rolling)
            self._rolling = None

    def drain(self, now: float) -> None:
        """Let all processes drain, and start no more."""
        if self._is_draining:
            return
        self._is_draining = True
        self._to_roll.clear()
        self._rolling = None
        for member in self._members:
            match member.phase:
                case Phase.DOWN:
                    member.phase = Phase.OVER
                case Phase.UP:
                    self._ask_to_leave(member, now)
                case _:
                    pass  # it is on its way

    def abandon(self, now: float) -> None:
        """Give up the drain; asked for again, kill."""
        self.drain(now)
        for member in self._members:
            if self._is_abandoned and member.is_alive:
                self._kill(member)
            elif member.phase is Phase.LEAVING:
                member.due = min(member.due, now + self.policy.force)
                self._actions.append(Abandon(member.slot))
        self._is_abandoned = True

    # -- what is to be done -----------------------------------------------------------------------

    def poll(self, now: float) -> list[Action]:
        """What is to be done by now, in this order."""
        for member in self._members:
            is_due = now >= self._time_of(member)
            match member.phase:
                case Phase.DOWN if is_due:
                    self._spawn(member, now)
                case Phase.UP if is_due:
                    self._actions.append(Log(Event.HUNG, member.slot))
                    self._kill(member)
                case Phase.UP if member.is_stuck:
                    self._actions.append(Log(Event.STUCK, member.slot))
                    self._ask_to_leave(member, now)
                case Phase.LEAVING if is_due:
                    self._actions.append(Log(Event.LATE, member.slot))
                    self._kill(member)
                case _:
                    pass
        if self._to_roll and self._rolling is None:
            self._roll_next(now)
        actions, self._actions = self._actions, []
        return actions

    def _roll_next(self, now: float) -> None:
        self._rolling = slot = self._to_roll.pop(0)
        member = self._members[slot]
        match member.phase:
            case Phase.UP:
                member.is_rolled = True
                self._ask_to_leave(member, now)
            case Phase.DOWN:
                self._spawn(member, now)
            case _:
                member.is_rolled = True  # it leaves for another reason: the next one is new

    def _spawn(self, member: ProcessSlot, now: float) -> None:
        member.phase = Phase.UP
        member.since = now
        member.last = None
        member.restarts += 1
        self._actions.append(Spawn(member.slot))

    def _ask_to_leave(self, member: ProcessSlot, now: float) -> None:
        member.phase = Phase.LEAVING
        member.due = now + member.budget + self.policy.grace
        self._actions.append(Drain(member.slot))

    def _kill(self, member: ProcessSlot) -> None:
        member.phase = Phase.KILLED
        self._actions.append(Kill(member.slot))

    def _give_up(self, code: int, now: float) -> None:
        self._actions.append(Log(Event.GIVEN_UP, code=code))
        self.drain(now)
        self._code = code
