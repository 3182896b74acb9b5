"""Answers liveness and readiness probes from status snapshots.

Live means that no worker holds a message longer than `stuck_after`. Ready means that every worker
is connected, consumes and isn't draining. A missing broker makes a program unready, but not dead:
a restart wouldn't bring the broker back, and every consumer would restart along with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from aio_pika_batch.masking import mask_text
from aio_pika_batch.status import ConsumerStatus, WorkerState

# A worker that probes after a pause consumes, if only one message at a time.
_READY = frozenset({WorkerState.CONSUMING, WorkerState.PROBING})

# In other states, the end of the last session isn't the reason.
_CONNECTING = frozenset({WorkerState.CONNECTING, WorkerState.WAITING})


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """The result of a probe.

    Attributes:
        reasons: Why the probe failed; empty if it didn't.
    """

    reasons: tuple[str, ...]

    @property
    def is_good(self) -> bool:
        """Whether the probe succeeded."""
        return not self.reasons


def liveness(statuses: Iterable[ConsumerStatus]) -> ProbeResult:
    """Return which consumers hold a message for too long; a restart helps those."""
    return ProbeResult(
        tuple(
            f"{_name(status)}: a message has been held for {_oldest(status):.0f} s,"
            " longer than stuck_after"
            for status in statuses
            if status.is_stuck
        )
    )


def readiness(statuses: Iterable[ConsumerStatus]) -> ProbeResult:
    """Return which workers of these consumers don't take messages."""
    return ProbeResult(tuple(reason for status in statuses for reason in _unready(status)))


def _unready(status: ConsumerStatus) -> Iterable[str]:
    if not status.is_running or not status.workers:
        yield f"{_name(status)}: not started, or stopped"
    for worker in status.workers:
        if worker.state not in _READY:
            error = worker.last_error if worker.state in _CONNECTING else None
            why = f": {mask_text(error)}" if error else ""
            yield f"{_name(status)}: worker {worker.index} is {worker.state.value}{why}"


def _name(status: ConsumerStatus) -> str:
    return f"{status.consumer} ({status.queue})"


def _oldest(status: ConsumerStatus) -> float:
    return max((worker.oldest or 0.0 for worker in status.workers), default=0.0)


def as_json(statuses: Sequence[ConsumerStatus]) -> list[dict[str, object]]:
    """Return the snapshots as values for JSON, with passwords masked."""
    consumers = [asdict(status) for status in statuses]
    for consumer in consumers:
        for worker in consumer["workers"]:
            worker["state"] = worker["state"].value
            if worker["last_error"] is not None:
                worker["last_error"] = mask_text(worker["last_error"])
    return consumers
