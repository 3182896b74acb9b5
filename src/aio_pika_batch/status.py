"""How is a consumer? Snapshots, plain values without secrets."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class WorkerState(Enum):
    """What a worker is doing."""

    CONNECTING = "connecting"
    CONSUMING = "consuming"
    WAITING = "waiting"
    """Between two attempts to connect."""
    PAUSED = "paused"
    """By its breaker: too many messages have failed."""
    PROBING = "probing"
    """Consuming one message at a time, after a pause by its breaker."""
    DRAINING = "draining"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """A snapshot of one worker.

    Attributes:
        epoch: How many sessions it has opened.
        buffered: Messages that wait for their batch.
        in_hand: Messages that are being handled.
        held: Originals whose copies wait for a confirmation, and messages that wait for their next
            attempt in place.
        oldest: Seconds since its longest unsettled message arrived; None if there is none.
        last_progress: Seconds since it last received or settled something; None if never.
        last_error: Why its last session ended, or could not begin.
    """

    index: int
    state: WorkerState
    epoch: int
    buffered: int
    in_hand: int
    held: int
    oldest: float | None
    last_progress: float | None
    last_error: str | None


@dataclass(frozen=True, slots=True)
class ConsumerStatus:
    """A snapshot of a consumer.

    Attributes:
        is_stuck: Whether some worker has held a message for longer than `stuck_after`.
    """

    consumer: str
    queue: str
    is_running: bool
    is_healthy: bool
    workers: tuple[WorkerStatus, ...]
    is_stuck: bool = False
