"""Events of a consumer, and observers that receive them.

Events concern batches rather than messages, so that their cost is shared by the messages of a
batch. An observer cannot change or break the flow: its exceptions are caught, logged once, and
counted.
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
    """The worker that an event is from.

    Attributes:
        consumer: The class name of the consumer.
        worker: The index of the worker, from 0.
        server: The host and port of the broker, if the URL has exactly one.
    """

    consumer: str
    queue: str
    worker: int
    server: tuple[str, int] | None = None


class Load(NamedTuple):
    """The current load of a worker.

    Attributes:
        buffered: Messages that wait for their batch.
        in_hand: Messages that are being handled.
        is_consuming: Whether it consumes, including one message at a time.
        held: Messages that wait, unsettled, for their retry or for the confirm of their copy.
    """

    # A NamedTuple, because one is made for almost every event.
    buffered: int
    in_hand: int
    is_consuming: bool
    held: int = 0


@dataclass(frozen=True, slots=True)
class WorkerStarted:
    """A worker has started; it doesn't consume yet.

    Attributes:
        load: Returns its current load. Call it only on the thread of the event loop.
    """

    # Gauges are set by events and not when they are scraped, because a scrape comes from another
    # thread, or even from another process.
    load: Callable[[], Load]


@dataclass(frozen=True, slots=True)
class WorkerStopped:
    """A worker has stopped."""


@dataclass(frozen=True, slots=True)
class Received:
    """Messages of one network read have arrived, and wait for their batch."""

    count: int


@dataclass(frozen=True, slots=True)
class BatchCut:
    """A batch is passed to the handler.

    Attributes:
        waited: Seconds since its first message arrived.
    """

    messages: Sequence[Message]
    trigger: Trigger
    waited: float


@dataclass(frozen=True, slots=True)
class BatchHandled:
    """The handler has finished a batch.

    Attributes:
        seconds: How long it ran.
        error: What it raised, or what is wrong with its results; None if it succeeded.
        trigger: Why the batch was cut, or run again.
    """

    messages: Sequence[Message]
    seconds: float
    error: BaseException | None
    trigger: Trigger


@dataclass(frozen=True, slots=True)
class Settled:
    """Messages have been settled.

    Attributes:
        counts: The number of messages by result and cause. The result is `None` for messages that
            were returned unhandled.
        seconds: The time from the decision until the frames were sent, including the confirms of
            copies.
    """

    counts: Mapping[tuple[MessageResult | None, Cause], int]
    seconds: float


class Step(Enum):
    """The steps of a settlement that can fail."""

    PUBLISH = "publish"
    """Copies were returned, refused, or not answered. Their originals are held."""
    SETTLE = "settle"
    """The session failed. The broker delivers these messages again."""


@dataclass(frozen=True, slots=True)
class SettleFailed:
    """Messages could not be settled, for now or in this session.

    Attributes:
        count: The number of messages.
        error: The exception, if there was one.
        seconds: How long the step took.
    """

    step: Step
    count: int
    error: BaseException | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Requeued:
    """A message will be retried: the broker has confirmed its copy.

    Attributes:
        retry_count: The number of the next retry.
        in_place: Whether the consumer holds the message until its next attempt, without a copy
            (`ordered_by_key`).
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
class Discarded:
    """Messages were rejected without a known dead-letter destination.

    The broker discards them, unless a policy dead-letters them.
    """

    messages: Sequence[Message]


@dataclass(frozen=True, slots=True)
class Connected:
    """A worker consumes. `epoch` counts its sessions, from 1."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Lost:
    """A worker's session was lost, or could not be opened."""

    epoch: int
    error: BaseException


@dataclass(frozen=True, slots=True)
class StaleResults:
    """Results came after their session was lost. The broker delivers these messages again."""

    count: int


@dataclass(frozen=True, slots=True)
class HandlerError:
    """A handler raised an exception, or yielded an invalid result."""

    messages: Sequence[Message]
    error: BaseException


@dataclass(frozen=True, slots=True)
class DuplicatesDropped:
    """An inbox dropped messages whose effects had been committed before.

    Attributes:
        inbox: The consumer's name in the inbox.
    """

    messages: Sequence[Message]
    inbox: str


@dataclass(frozen=True, slots=True)
class BreakerOpened:
    """Too many messages failed, so a worker pauses.

    Attributes:
        failed: The number of messages in the window that failed.
        samples: The number of messages in the window.
        pause: Seconds until the next attempt.
    """

    failed: int
    samples: int
    pause: float


@dataclass(frozen=True, slots=True)
class BreakerProbing:
    """The pause of a worker is over; it consumes one message at a time."""


@dataclass(frozen=True, slots=True)
class BreakerClosed:
    """A message succeeded after a pause; the worker consumes as before."""


class Observer:
    """Base class of observers. Its methods do nothing; override those that you need.

    Methods are called on the event loop, so they must not block. `batch_cut` and `batch_handled` of
    one run are called in the task of the handler.
    """

    # So a context variable that `batch_cut` sets, such as the current span, is visible in the
    # handler, in what it awaits, and in the tasks that it starts.

    def worker_started(self, origin: Origin, event: WorkerStarted) -> None:
        """A worker has started."""

    def worker_stopped(self, origin: Origin, event: WorkerStopped) -> None:
        """A worker has stopped."""

    def received(self, origin: Origin, event: Received) -> None:
        """Messages have arrived."""

    def batch_cut(self, origin: Origin, event: BatchCut) -> None:
        """A batch is passed to the handler."""

    def batch_handled(self, origin: Origin, event: BatchHandled) -> None:
        """The handler has finished a batch."""

    def settled(self, origin: Origin, event: Settled) -> None:
        """Messages have been settled."""

    def settle_failed(self, origin: Origin, event: SettleFailed) -> None:
        """Messages could not be settled."""

    def requeued(self, origin: Origin, event: Requeued) -> None:
        """A message will be retried."""

    def dead_lettered(self, origin: Origin, event: DeadLettered) -> None:
        """The broker has confirmed a dead letter."""

    def discarded(self, origin: Origin, event: Discarded) -> None:
        """Messages were rejected without a known dead-letter destination."""

    def connected(self, origin: Origin, event: Connected) -> None:
        """A worker consumes."""

    def lost(self, origin: Origin, event: Lost) -> None:
        """A worker's session was lost."""

    def stale_results(self, origin: Origin, event: StaleResults) -> None:
        """Results came too late."""

    def handler_error(self, origin: Origin, event: HandlerError) -> None:
        """A handler failed."""

    def duplicates_dropped(self, origin: Origin, event: DuplicatesDropped) -> None:
        """An inbox dropped messages that had taken effect before."""

    def breaker_opened(self, origin: Origin, event: BreakerOpened) -> None:
        """A worker pauses, because too many messages failed."""

    def breaker_probing(self, origin: Origin, event: BreakerProbing) -> None:
        """A worker consumes one message at a time after a pause."""

    def breaker_closed(self, origin: Origin, event: BreakerClosed) -> None:
        """A worker consumes as before."""


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
    Discarded: lambda observer: observer.discarded,
    Connected: lambda observer: observer.connected,
    Lost: lambda observer: observer.lost,
    StaleResults: lambda observer: observer.stale_results,
    HandlerError: lambda observer: observer.handler_error,
    DuplicatesDropped: lambda observer: observer.duplicates_dropped,
    BreakerOpened: lambda observer: observer.breaker_opened,
    BreakerProbing: lambda observer: observer.breaker_probing,
    BreakerClosed: lambda observer: observer.breaker_closed,
}


class Observers:
    """All observers of one worker. Their exceptions don't reach the worker.

    Attributes:
        present: Whether there are any.
        wanted: The events that an observer has a method for. Others need not be created.
        errors: The number of exceptions that they raised.
    """

    __slots__ = ("_complained", "_log", "_methods", "_origin", "errors", "present", "wanted")

    def __init__(self, observers: Sequence[Observer], origin: Origin, log: KeywordLogger) -> None:
        self._origin = origin
        self._log = log
        self._methods = {
            kind: [
                (each, method(each)) for each in observers if _is_overridden(method(each), method)
            ]
            for kind, method in _METHODS.items()
        }
        # By identity, because observers may compare equal.
        self._complained: set[int] = set()
        self.present = bool(observers)
        self.wanted = frozenset(kind for kind, methods in self._methods.items() if methods)
        self.errors = 0

    def emit(self, event: object) -> None:
        """Pass an event to all observers."""
        for observer, method in self._methods[type(event)]:
            try:
                method(self._origin, event)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException:  # noqa: BLE001  -- an observer's error must not stop the consumer
                self.errors += 1
                if id(observer) not in self._complained:
                    self._complained.add(id(observer))
                    self._log.exception(
                        "an observer failed; its further failures are only counted",
                        observer=type(observer).__name__,
                        event_type=type(event).__name__,
                    )


def _is_overridden(found: object, method: Callable[[Any], object]) -> bool:
    return getattr(found, "__func__", found) is not method(Observer)
