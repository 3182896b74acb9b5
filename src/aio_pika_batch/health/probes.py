"""Is a program alive, is it ready, and how is it? Answers to probes, from snapshots.

Alive means: nobody holds a message past its deadline. A broker that is away is none of it, since a
restart of the program would not bring it back. Ready means: connected, consuming, not draining.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from aio_pika_batch.masking import mask_text
from aio_pika_batch.status import ConsumerStatus, WorkerState

_READY = frozenset({WorkerState.CONSUMING, WorkerState.PROBING})


@dataclass(frozen=True, slots=True)
class Verdict:
    """An answer.

    Attributes:
        reasons: Why not; empty if all is well.
    """

    reasons: tuple[str, ...]

    @property
    def is_good(self) -> bool:
        """Whether all is well."""
        return not self.reasons


def liveness(statuses: Iterable[ConsumerStatus]) -> Verdict:
    """Whether nobody is past a deadline; a restart helps where somebody is."""
    return Verdict(
        tuple(
            f"{_name(status)}: a message has been held for {_oldest(status):.0f} s,"
            " longer than stuck_after"
            for status in statuses
            if status.is_stuck
        )
    )


def readiness(statuses: Iterable[ConsumerStatus]) -> Verdict:
    """Whether every worker of every consumer takes messages."""
    return Verdict(tuple(reason for status in statuses for reason in _unready(status)))


def _unready(status: ConsumerStatus) -> Iterable[str]:
    if not status.is_running or not status.workers:
        yield f"{_name(status)}: not started, or stopped"
    for worker in status.workers:
        if worker.state not in _READY:
            yield f"{_name(status)}: worker {worker.index} is {worker.state.value}"


def _name(status: ConsumerStatus) -> str:
    return f"{status.consumer} ({status.queue})"


def _oldest(status: ConsumerStatus) -> float:
    return max((worker.oldest or 0.0 for worker in status.workers), default=0.0)


def as_json(statuses: Sequence[ConsumerStatus]) -> list[dict[str, object]]:
    """The snapshots as what JSON knows, without passwords."""
    consumers = [asdict(status) for status in statuses]
    for consumer in consumers:
        for worker in consumer["workers"]:
            worker["state"] = worker["state"].value
            if worker["last_error"] is not None:
                worker["last_error"] = mask_text(worker["last_error"])
    return consumers
