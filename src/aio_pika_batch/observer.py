"""What may be seen, and never changed.

An observer is told what happened, as values. It cannot slow, change or break the flow: what it
raises is caught, logged once and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

from aio_pika_batch.core.batcher import Trigger
from aio_pika_batch.core.message import Message
from aio_pika_batch.core.results import Cause, MessageResult
from aio_pika_batch.core.retry import DeadLetterReason
from aio_pika_batch.logs import KeywordLogger


@dataclass(frozen=True, slots=True)
class Origin:
    """Who tells.

    Attributes:
        consumer: The consumer's class name.
        worker: Its index, from 0.
        server: The broker's host and port, if the URL names just one.
    """

    consumer: str
    queue: str
    worker: int
    server: tuple[str, int] | None = None


class Load(NamedTuple):
    """How busy is a worker, at this moment?

    Attributes:
        buffered: Messages that wait for their batch.
        in_hand: Messages that are being handled.
        is_consuming: Whether it consumes, be it one at a time.
    """

    buffered: int
    in_hand: int
    is_consuming: bool


@dataclass(frozen=True, slots=True)
class WorkerStarted:
    """A worker begins its life; it does not consume yet.

    Attributes:
        load: Tells how busy it is, whenever it is asked; on the event loop's thread only.
    """

    load: Callable[[], Load]


@dataclass(frozen=True, slots=True)
class WorkerStopped:
    """A worker's life is over."""


@dataclass(frozen=True, slots=True)
class Received:
    """Messages have arrived, in one read, and wait for their batch."""

    count: int


@dataclass(frozen=True, slots=True)
class BatchCut:
    """A batch goes to the handler.

    Attributes:
        waited: Seconds since its first message arrived.
    """

    messages: Sequence[Message]
    trigger: Trigger
    waited: float


@dataclass(frozen=True, slots=True)
class BatchHandled:
    """The handler is done with a batch.

    Attributes:
        seconds: How long it took.
        error: What it raised, or what was wrong with its results; None if nothing.
        trigger: Why the batch was cut, or run again.
    """

    messages: Sequence[Message]
    seconds: float
    error: BaseException | None
    trigger: Trigger


@dataclass(frozen=True, slots=True)
class Settled:
    """The broker has been told what became of these.

    Attributes:
        counts: How many messages, per result and cause; `None` for those returned unhandled.
        seconds: How long it took, from the decision until the frames were on their way; with the
            confirmations of copies, where there were some.
    """

    counts: Mapping[tuple[MessageResult | None, Cause], int]
    seconds: float


class Step(Enum):
    """What can go wrong on the way from a decision to its settlement."""

    PUBLISH = "publish"
    """Copies were not confirmed: returned, refused, or unknown. Their originals are held."""
    SETTLE = "settle"
    """The session did not take it: the broker delivers these messages again."""


@dataclass(frozen=True, slots=True)
class SettleFailed:
    """What was decided about some messages could not be done, for now or in this session.

    Attributes:
        count: How many messages.
        error: What was raised, if anything was.
        seconds: How long it was tried.
    """

    step: Step
    count: int
    error: BaseException | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Requeued:
    """A message is tried again: the broker has confirmed its copy.

    Attributes:
        retry_count: Of the next attempt.
        in_place: Whether there is no copy: it is held until its next attempt (`ordered_by_key`).
    """

    message: Message
    retry_count: int
    in_place: bool = False


@dataclass(frozen=True, slots=True)
class DeadLettered:
    """The broker has confirmed a dead letter."""

    message: Message
    reason: DeadLetterReason


@dataclass(frozen=True, slots=True)
class Connected:
    """A worker consumes; `epoch` counts its sessions, from 1."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Lost:
    """A worker's session, or its attempt at one, is over for a reason outside."""

    epoch: int
    error: BaseException


@dataclass(frozen=True, slots=True)
class StaleResults:
    """Results came for a session that is gone: the broker delivers these messages again."""

    count: int


@dataclass(frozen=True, slots=True)
class HandlerError:
    """A handler raised, or yielded what is no answer."""

    messages: Sequence[Message]
    error: BaseException


@dataclass(frozen=True, slots=True)
class BreakerOpened:
    """Too many messages have failed: a worker pauses.

    Attributes:
        failed: How many have failed, of those that were looked at.
        samples: How many were looked at.
        pause: Seconds until one is tried again.
    """

    failed: int
    samples: int
    pause: float


@dataclass(frozen=True, slots=True)
class BreakerProbing:
    """A pause is over: a worker takes one message at a time."""


@dataclass(frozen=True, slots=True)
class BreakerClosed:
    """A message has succeeded: a worker takes as many as before."""


class Observer:
    """Base of all observers: every method does nothing, override what you want to see.

    Methods are called on the event loop, between two steps of the flow: do not block. `batch_cut`
    and `batch_handled` of one run are called in the task that the handler runs in.
    """

    def worker_started(self, origin: Origin, event: WorkerStarted) -> None:
        """A worker begins its life."""

    def worker_stopped(self, origin: Origin, event: WorkerStopped) -> None:
        """A worker's life is over."""

    def received(self, origin: Origin, event: Received) -> None:
        """Messages have arrived."""

    def batch_cut(self, origin: Origin, event: BatchCut) -> None:
        """A batch goes to the handler."""

    def batch_handled(self, origin: Origin, event: BatchHandled) -> None:
        """The handler is done with a batch."""

    def settled(self, origin: Origin, event: Settled) -> None:
        """The broker has been told."""

    def settle_failed(self, origin: Origin, event: SettleFailed) -> None:
        """The broker could not be told."""

    def requeued(self, origin: Origin, event: Requeued) -> None:
        """A message is tried again."""

    def dead_lettered(self, origin: Origin, event: DeadLettered) -> None:
        """A dead letter is confirmed."""

    def connected(self, origin: Origin, event: Connected) -> None:
        """A worker consumes."""

    def lost(self, origin: Origin, event: Lost) -> None:
        """A worker's session is over for a reason outside."""

    def stale_results(self, origin: Origin, event: StaleResults) -> None:
        """Results came too late."""

    def handler_error(self, origin: Origin, event: HandlerError) -> None:
        """A handler failed."""

    def breaker_opened(self, origin: Origin, event: BreakerOpened) -> None:
        """A worker pauses, since too many messages have failed."""

    def breaker_probing(self, origin: Origin, event: BreakerProbing) -> None:
        """A worker tries one message at a time."""

    def breaker_closed(self, origin: Origin, event: BreakerClosed) -> None:
        """A worker goes on as before."""


_METHODS: Mapping[type, Callable[[Observer], Callable[[Origin, Any], None]]] = {
    WorkerStarted: lambda observer: observer.worker_started,
    WorkerStopped: lambda observer: observer.worker_stopped,
    Received: lambda observer: observer.received,
    BatchCut: lambda observer: observer.batch_cut,
    BatchHandled: lambda observer: observer.batch_handled,
    Settled: lambda observer: observer.settled,
    SettleFailed: lambda observer: observer.settle_failed,
    Requeued: lambda observer: observer.requeued,
    DeadLettered: lambda observer: observer.dead_lettered,
    Connected: lambda observer: observer.connected,
    Lost: lambda observer: observer.lost,
    StaleResults: lambda observer: observer.stale_results,
    HandlerError: lambda observer: observer.handler_error,
    BreakerOpened: lambda observer: observer.breaker_opened,
    BreakerProbing: lambda observer: observer.breaker_probing,
    BreakerClosed: lambda observer: observer.breaker_closed,
}


class Observers:
    """All observers of one worker, behind a wall.

    Attributes:
        errors: How many exceptions they have raised.
    """

    __slots__ = ("_complained", "_log", "_observers", "_origin", "errors")

    def __init__(self, observers: Sequence[Observer], origin: Origin, log: KeywordLogger) -> None:
        self._observers = tuple(observers)
        self._origin = origin
        self._log = log
        self._complained: set[int] = set()
        self.errors = 0

    def __bool__(self) -> bool:
        """Whether anybody looks; events need not be made for nobody."""
        return bool(self._observers)

    def emit(self, event: object) -> None:
        """Tell everybody."""
        for observer in self._observers:
            try:
                _METHODS[type(event)](observer)(self._origin, event)
            except Exception:  # noqa: BLE001  -- somebody else's code, which must not stop ours
                self.errors += 1
                if id(observer) not in self._complained:
                    self._complained.add(id(observer))
                    self._log.exception(
                        "an observer failed; its further failures are only counted",
                        observer=type(observer).__name__,
                        told=type(event).__name__,
                    )
