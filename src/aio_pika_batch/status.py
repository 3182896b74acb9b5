"""Snapshots of the state of a consumer and its workers, without secrets."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class WorkerState(Enum):
    """The state of a worker."""

    CONNECTING = "connecting"
    CONSUMING = "consuming"
    WAITING = "waiting"
    """Between two attempts to connect."""
    PAUSED = "paused"
    """Its circuit breaker is open, because too many messages failed."""
    PROBING = "probing"
    """Its circuit breaker is half-open, so it consumes one message at a time."""
    DRAINING = "draining"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """A snapshot of one worker.

    Attributes:
        epoch: The number of sessions that it has opened.
        buffered: Messages that wait for their batch.
        in_hand: Messages that are being handled.
        held: Messages that wait, unsettled, for their retry, or whose copy is not confirmed.
        oldest: Seconds since the oldest message arrived that is buffered, being handled, or waits
            for the outcome of its copy; None if there is none.
        oldest_held: Seconds since the oldest message arrived that is held for its retry or for the
            outcome of its copy; None if there is none. Held messages never make a worker stuck.
        last_progress: Seconds since it last received or settled a message; None if it never did.
        last_error: Why its last session ended, or could not begin.
        prefetch: The prefetch count in use; 0 means no limit.
    """

    index: int
    state: WorkerState
    epoch: int
    buffered: int
    in_hand: int
    held: int
    oldest: float | None
    oldest_held: float | None
    last_progress: float | None
    last_error: str | None
    prefetch: int = 0


@dataclass(frozen=True, slots=True)
class ConsumerStatus:
    """A snapshot of a consumer.

    Attributes:
        is_stuck: Whether a worker has held a message for longer than `stuck_after`.
        costliest_setting: The setting that costs most CPU for each message; None if none costs
            much.
        fallbacks: How often a message made the broker's AMQP 1.0 session fail.
    """

    consumer: str
    queue: str
    is_running: bool
    is_healthy: bool
    workers: tuple[WorkerStatus, ...]
    is_stuck: bool = False
    fallbacks: int = 0
    costliest_setting: str | None = None
