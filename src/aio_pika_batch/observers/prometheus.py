"""What does Prometheus learn of a consumer?

Counters and histograms are written where things happen, once for a batch and never for a message.
Gauges are set by the same events, from what workers say of themselves, so that they are true in a
process that is scraped, and in one of several that write into files of a common folder
(`PROMETHEUS_MULTIPROC_DIR`). There every gauge is of a `live` mode: what a process said of itself
ends with the process, once `process_died` is told.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from weakref import WeakKeyDictionary

from aio_pika_batch.core.batcher import Trigger
from aio_pika_batch.errors import HandlerTimeout
from aio_pika_batch.observer import (
    BatchCut,
    BatchHandled,
    BreakerClosed,
    BreakerOpened,
    BreakerProbing,
    Connected,
    DeadLettered,
    HandlerError,
    Load,
    Lost,
    Observer,
    Origin,
    Received,
    Settled,
    SettleFailed,
    StaleResults,
    WorkerStarted,
    WorkerStopped,
)

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
    from prometheus_client.multiprocess import mark_process_dead
except ModuleNotFoundError as error:
    raise ImportError(
        "PrometheusObserver needs prometheus-client: pip install 'aio-pika-batch[prometheus]'"
    ) from error

PREFIX = "aio_pika_batch"

MESSAGES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
"""Upper bounds for sizes of batches."""

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
"""Upper bounds for times: from a lookup in memory to the five minutes of a slow import."""

RETURNED = "returned"
"""Label value of what went back to the queue without having been handled."""

_WHO = ("consumer", "queue")


class Metrics:
    """All metrics, in one registry.

    Args:
        registry: Where they are registered.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"{PREFIX}_{name}", text, (*_WHO, *labels), registry=registry)

        def gauge(name: str, text: str, mode: str) -> Gauge:
            return Gauge(f"{PREFIX}_{name}", text, _WHO, registry=registry, multiprocess_mode=mode)  # type: ignore[arg-type]

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"{PREFIX}_{name}", text, _WHO, registry=registry, buckets=buckets)

        self.received = counter("messages_received_total", "Messages that have arrived.")
        self.settled = counter(
            "messages_settled_total", "Messages that are settled, by result.", "result", "cause"
        )
        self.dead_letters = counter(
            "dead_letters_total", "Dead letters that the broker has confirmed.", "reason"
        )
        self.stale = counter(
            "stale_results_total", "Results for a session that was gone: delivered again."
        )
        self.batches = counter(
            "batches_total", "Runs of the handler, by what cut the batch.", "trigger", "outcome"
        )
        self.batch_messages = histogram("batch_messages", "Messages in a batch.", MESSAGES)
        self.batch_fill = histogram(
            "batch_fill_seconds", "From a batch's first message to its handler.", SECONDS
        )
        self.batch_process = histogram(
            "batch_process_seconds", "How long the handler took.", SECONDS
        )
        self.exceptions = counter(
            "handler_exceptions_total", "What handlers have raised.", "exception_type"
        )
        self.settle_errors = counter(
            "settle_errors_total", "Messages that could not be settled, by step.", "operation"
        )
        self.reconnects = counter("reconnects_total", "Sessions begun after one was lost.")
        self.buffered = gauge("messages_buffered", "Messages that wait for a batch.", "livesum")
        self.in_progress = gauge(
            "messages_in_progress", "Messages in the hands of handlers.", "livesum"
        )
        self.workers = gauge("workers", "Workers that have been started.", "livesum")
        self.up = gauge("worker_up", "Workers that consume.", "livesum")
        self.progress = gauge(
            "last_progress_timestamp_seconds",
            "When the worker that is furthest behind last received or settled something.",
            "livemin",
        )
        self.consumers: dict[tuple[str, str], _Consumer] = {}
        about = Gauge(
            f"{PREFIX}_build_info",
            "Always 1; its labels say what runs.",
            ("version", "python"),
            registry=registry,
            multiprocess_mode="livemax",
        )
        about.labels(version("aio-pika-batch"), platform.python_version()).set(1)


_METRICS: WeakKeyDictionary[CollectorRegistry, Metrics] = WeakKeyDictionary()
"""Made once for a registry, however many observers it serves."""


class _Level:
    """A gauge that is a sum over workers, and written only where that has changed."""

    __slots__ = ("_set", "_told")

    def __init__(self, gauge: Gauge) -> None:
        self._set = gauge.set
        self._told: int | None = None

    def tell(self, value: int) -> None:
        if value != self._told:
            self._told = value
            self._set(value)


class _Consumer:
    """The metrics of one consumer, with its labels filled in."""

    def __init__(self, metrics: Metrics, *who: str) -> None:
        self._metrics = metrics
        self._who = who
        self._counts: dict[tuple[Counter, tuple[str, ...]], Callable[[float], None]] = {}
        self._asking: dict[int, Callable[[], Load]] = {}
        self._loads: dict[int, Load] = {}
        self._progress: dict[int, float] = {}
        self.lost: set[int] = set()
        self.received = metrics.received.labels(*who).inc
        self.batch_messages = metrics.batch_messages.labels(*who).observe
        self.batch_fill = metrics.batch_fill.labels(*who).observe
        self.batch_process = metrics.batch_process.labels(*who).observe
        self.stale = metrics.stale.labels(*who).inc
        self.reconnects = metrics.reconnects.labels(*who).inc
        self._workers = _Level(metrics.workers.labels(*who))
        self._buffered = _Level(metrics.buffered.labels(*who))
        self._in_progress = _Level(metrics.in_progress.labels(*who))
        self._up = _Level(metrics.up.labels(*who))
        self._set_progress = metrics.progress.labels(*who).set

    def count(self, counter: Counter, *labels: str, by: float = 1) -> None:
        """Count something; a series is looked up once."""
        key = counter, labels
        count = self._counts.get(key)
        if count is None:
            count = self._counts[key] = counter.labels(*self._who, *labels).inc
        count(by)

    def join(self, worker: int, load: Callable[[], Load]) -> None:
        """A worker begins, and will be asked how busy it is."""
        self._asking[worker] = load
        self._workers.tell(len(self._asking))
        self.ask(worker)
        self.go_on(worker)

    def leave(self, worker: int) -> None:
        """A worker is no more."""
        del self._asking[worker], self._loads[worker], self._progress[worker]
        self.lost.discard(worker)
        self._workers.tell(len(self._asking))
        self._add_up()

    def ask(self, worker: int) -> None:
        """Find out how busy a worker is."""
        self._loads[worker] = self._asking[worker]()
        self._add_up()

    def go_on(self, worker: int) -> None:
        """It has received or settled something."""
        self._progress[worker] = time.time()
        self._set_progress(min(self._progress.values()))

    def _add_up(self) -> None:
        buffered = in_progress = up = 0
        for each in self._loads.values():
            buffered += each.buffered
            in_progress += each.in_hand
            up += each.is_consuming
        self._buffered.tell(buffered)
        self._in_progress.tell(in_progress)
        self._up.tell(up)


class PrometheusObserver(Observer):
    """Writes metrics for Prometheus: `MyConsumer(observers=[PrometheusObserver()])`.

    One may serve any number of consumers, and each consumer may have one of its own; what two
    consumers of the same class and queue do is added up.

    Args:
        registry: Where the metrics are registered; None: prometheus_client's own.

    Raises:
        ImportError: At its import, where prometheus-client is not installed.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        registry = registry or REGISTRY
        if registry not in _METRICS:
            _METRICS[registry] = Metrics(registry)
        self._metrics = _METRICS[registry]

    def _of(self, origin: Origin) -> _Consumer:
        who = origin.consumer, origin.queue
        found = self._metrics.consumers.get(who)
        if found is None:
            found = self._metrics.consumers[who] = _Consumer(self._metrics, *who)
        return found

    def worker_started(self, origin: Origin, event: WorkerStarted) -> None:
        """There is one more."""
        self._of(origin).join(id(origin), event.load)

    def worker_stopped(self, origin: Origin, event: WorkerStopped) -> None:
        """There is one less."""
        self._of(origin).leave(id(origin))

    def received(self, origin: Origin, event: Received) -> None:
        """Count."""
        consumer = self._of(origin)
        consumer.received(event.count)
        consumer.ask(id(origin))
        consumer.go_on(id(origin))

    def batch_cut(self, origin: Origin, event: BatchCut) -> None:
        """How large, and how long it took to fill; a part that is run again was not cut."""
        consumer = self._of(origin)
        if event.trigger is not Trigger.ISOLATE:
            consumer.batch_messages(len(event.messages))
            consumer.batch_fill(event.waited)
        consumer.ask(id(origin))

    def batch_handled(self, origin: Origin, event: BatchHandled) -> None:
        """How long it took, and how it went."""
        consumer = self._of(origin)
        consumer.batch_process(event.seconds)
        outcome = _outcome(event.error)
        consumer.count(self._metrics.batches, event.trigger.value, outcome)

    def settled(self, origin: Origin, event: Settled) -> None:
        """Count each result and cause."""
        consumer = self._of(origin)
        for (result, cause), count in event.counts.items():
            name = RETURNED if result is None else result.name.lower()
            consumer.count(self._metrics.settled, name, cause.value, by=count)
        consumer.ask(id(origin))
        consumer.go_on(id(origin))

    def settle_failed(self, origin: Origin, event: SettleFailed) -> None:
        """Count the messages."""
        self._of(origin).count(self._metrics.settle_errors, event.step.value, by=event.count)

    def dead_lettered(self, origin: Origin, event: DeadLettered) -> None:
        """Count each reason."""
        self._of(origin).count(self._metrics.dead_letters, event.reason.value)

    def stale_results(self, origin: Origin, event: StaleResults) -> None:
        """Count the messages."""
        consumer = self._of(origin)
        consumer.stale(event.count)
        consumer.ask(id(origin))

    def handler_error(self, origin: Origin, event: HandlerError) -> None:
        """Count each class of exceptions."""
        self._of(origin).count(self._metrics.exceptions, type(event.error).__name__)

    def connected(self, origin: Origin, event: Connected) -> None:
        """A session that replaces a lost one is a reconnect; a breaker's is none."""
        consumer = self._of(origin)
        if id(origin) in consumer.lost:
            consumer.lost.remove(id(origin))
            consumer.reconnects()
        consumer.ask(id(origin))

    def lost(self, origin: Origin, event: Lost) -> None:
        """One that consumes less."""
        consumer = self._of(origin)
        consumer.lost.add(id(origin))
        consumer.ask(id(origin))

    def breaker_opened(self, origin: Origin, event: BreakerOpened) -> None:
        """It pauses."""
        self._of(origin).ask(id(origin))

    def breaker_probing(self, origin: Origin, event: BreakerProbing) -> None:
        """It tries."""
        self._of(origin).ask(id(origin))

    def breaker_closed(self, origin: Origin, event: BreakerClosed) -> None:
        """It goes on."""
        self._of(origin).ask(id(origin))


def process_died(pid: int) -> None:
    """Forget what a process that is gone has said of itself; what it has counted stays.

    For whoever supervises processes that share `PROMETHEUS_MULTIPROC_DIR`: to be called as soon as
    one has ended, or its workers count as up for ever.
    """
    mark_process_dead(pid)  # type: ignore[no-untyped-call]


def _outcome(error: BaseException | None) -> str:
    match error:
        case None:
            return "ok"
        case HandlerTimeout():
            return "timeout"
        case _:
            return "error"
