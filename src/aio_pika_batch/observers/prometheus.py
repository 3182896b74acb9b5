"""Counts what consumers do as metrics of Prometheus.

Counters and histograms are updated once per batch, never per message. Gauges are set by events too,
not when they are scraped: a scrape comes from another thread, or with several processes that share
`PROMETHEUS_MULTIPROC_DIR` from another process. There all gauges have a `live` mode, so that
`process_died` removes those of a process that has exited.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Literal
from weakref import WeakKeyDictionary

from aio_pika_batch.core.batcher import Trigger
from aio_pika_batch.core.results import Cause, MessageResult
from aio_pika_batch.core.retry import DeadLetterReason
from aio_pika_batch.errors import HandlerTimeout
from aio_pika_batch.observer import (
    BatchCut,
    BatchHandled,
    BreakerClosed,
    BreakerOpened,
    BreakerProbing,
    Connected,
    DeadLettered,
    Discarded,
    DuplicatesDropped,
    HandlerError,
    Load,
    Lost,
    Observer,
    Origin,
    Received,
    Settled,
    SettleFailed,
    StaleResults,
    Step,
    WorkerStarted,
    WorkerStopped,
)

try:
    from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
    from prometheus_client.mmap_dict import MmapedDict
    from prometheus_client.multiprocess import mark_process_dead
except ModuleNotFoundError as error:
    raise ImportError(
        "PrometheusObserver needs prometheus-client: pip install 'aio-pika-batch[prometheus]'"
    ) from error

PREFIX = "aio_pika_batch"

MESSAGES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
"""Histogram buckets for batch sizes."""

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
"""Histogram buckets for durations."""

RETURNED = "returned"
"""Label value for messages that were returned to the queue unhandled."""

_LABELS = ("consumer", "queue")


class Metrics:
    """All metrics of one registry.

    Args:
        registry: The registry that the metrics are added to.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"{PREFIX}_{name}", text, (*_LABELS, *labels), registry=registry)

        def gauge(name: str, text: str, mode: Literal["livesum", "livemin"]) -> Gauge:
            full = f"{PREFIX}_{name}"
            return Gauge(full, text, _LABELS, registry=registry, multiprocess_mode=mode)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"{PREFIX}_{name}", text, _LABELS, registry=registry, buckets=buckets)

        self.received = counter("messages_received_total", "Messages delivered by the broker.")
        self.settled = counter(
            "messages_settled_total", "Messages settled, by result and cause.", "result", "cause"
        )
        self.dead_letters = counter(
            "dead_letters_total", "Dead letters confirmed by the broker, by reason.", "reason"
        )
        self.discarded = counter(
            "messages_discarded_total",
            "Messages rejected although no dead-letter destination is known.",
        )
        self.stale = counter(
            "stale_results_total",
            "Results that came after their session was lost.",
        )
        self.duplicates = counter(
            "duplicates_dropped_total",
            "Messages that an inbox dropped because their effects had been committed before.",
        )
        self.batches = counter(
            "batches_total", "Runs of the handler, by trigger and outcome.", "trigger", "outcome"
        )
        self.batch_messages = histogram("batch_messages", "Messages in a batch.", MESSAGES)
        self.batch_fill = histogram(
            "batch_fill_seconds", "Time from the first message of a batch to its handler.", SECONDS
        )
        self.batch_process = histogram(
            "batch_process_seconds", "Duration of a run of the handler.", SECONDS
        )
        self.exceptions = counter(
            "handler_exceptions_total", "Exceptions raised by handlers.", "exception_type"
        )
        self.settle_errors = counter(
            "settle_errors_total", "Messages that could not be settled, by operation.", "operation"
        )
        self.reconnects = counter("reconnects_total", "Sessions opened after one was lost.")
        self.buffered = gauge("messages_buffered", "Messages waiting for a batch.", "livesum")
        self.in_progress = gauge("messages_in_progress", "Messages being handled.", "livesum")
        self.held = gauge(
            "messages_held", "Messages waiting, unsettled, for a retry or a confirm.", "livesum"
        )
        self.workers = gauge("workers", "Workers started.", "livesum")
        self.up = gauge("worker_up", "Workers consuming.", "livesum")
        self.progress = gauge(
            "last_progress_timestamp_seconds",
            "When the worker that holds messages without progress the longest last progressed.",
            "livemin",
        )
        self.consumers: dict[tuple[str, str], _ConsumerMetrics] = {}
        about = Gauge(
            f"{PREFIX}_build_info",
            "Always 1; the labels are the versions.",
            ("version", "python"),
            registry=registry,
            multiprocess_mode="livemax",
        )
        about.labels(version("aio-pika-batch"), platform.python_version()).set(1)


# A registry refuses a second metric of the same name, so that observers must share them.
_METRICS: WeakKeyDictionary[CollectorRegistry, Metrics] = WeakKeyDictionary()
"""The metrics of each registry, shared by all its observers."""


class _ConsumerMetrics:
    """The metrics of one consumer, with their labels filled in."""

    def __init__(self, metrics: Metrics, *labels: str) -> None:
        self._metrics = metrics
        self._labels = labels
        self._is_shared = "PROMETHEUS_MULTIPROC_DIR" in os.environ
        self._counts: dict[tuple[Counter, tuple[str, ...]], Callable[[float], None]] = {}
        self._sources: dict[int, Callable[[], Load]] = {}
        self._loads: dict[int, Load] = {}
        self._progress: dict[int, float] = {}
        self.lost: set[int] = set()
        self.received = metrics.received.labels(*labels).inc
        self.batch_messages = metrics.batch_messages.labels(*labels).observe
        self.batch_fill = metrics.batch_fill.labels(*labels).observe
        self.batch_process = metrics.batch_process.labels(*labels).observe
        self.discarded = metrics.discarded.labels(*labels).inc
        self.stale = metrics.stale.labels(*labels).inc
        self.duplicates = metrics.duplicates.labels(*labels).inc
        self.reconnects = metrics.reconnects.labels(*labels).inc
        self._workers = metrics.workers.labels(*labels).set
        gauges = (
            metrics.buffered,
            metrics.in_progress,
            metrics.up,
            metrics.held,
            metrics.progress,
        )
        self._gauges = [each.labels(*labels).set for each in gauges]
        self._shown: list[float | None] = [None] * len(gauges)
        # Before there are workers: a time of 0 would look as if nothing had moved since 1970.
        self._update_gauges()
        # Series exist from the start: `increase` doesn't see the step from nothing to 1.
        for reason in DeadLetterReason:
            self.count(metrics.dead_letters, reason.value, by=0)
        for step in Step:
            self.count(metrics.settle_errors, step.value, by=0)
        for trigger, outcome in product(Trigger, ("ok", "error", "timeout")):
            self.count(metrics.batches, trigger.value, outcome, by=0)
        for result, cause in product(MessageResult, Cause):
            if cause is not Cause.SHUTDOWN:
                self.count(metrics.settled, result.name.lower(), cause.value, by=0)
        self.count(metrics.settled, RETURNED, Cause.SHUTDOWN.value, by=0)

    def count(self, counter: Counter, *labels: str, by: float = 1) -> None:
        """Add to a counter. Each series is looked up only once."""
        key = counter, labels
        count = self._counts.get(key)
        if count is None:
            count = self._counts[key] = counter.labels(*self._labels, *labels).inc
        count(by)

    def add_worker(self, worker: int, load: Callable[[], Load]) -> None:
        """Count a worker as running."""
        self._sources[worker] = load
        self._workers(len(self._sources))
        self._progress[worker] = time.time()
        self.update_load(worker)

    def remove_worker(self, worker: int) -> None:
        """Remove a worker that stopped."""
        del self._sources[worker], self._loads[worker], self._progress[worker]
        self.lost.discard(worker)
        self._workers(len(self._sources))
        self._update_gauges()

    def update_load(self, worker: int) -> None:
        """Read the load of a worker and update the gauges."""
        self._loads[worker] = self._sources[worker]()
        self._update_gauges()

    def note_progress(self, worker: int) -> None:
        """Note that a worker has just received or settled messages."""
        self._progress[worker] = time.time()
        self.update_load(worker)

    def _update_gauges(self) -> None:
        buffered = in_progress = up = held = 0
        # With several processes the least of all counts, and it must not be that of an idle one.
        since = math.inf if self._is_shared else max(self._progress.values(), default=time.time())
        for worker, each in self._loads.items():
            buffered += each.buffered
            in_progress += each.in_hand
            up += each.is_consuming
            held += each.held
            # One that holds nothing isn't behind: such as the standby of a single active consumer.
            if each.buffered + each.in_hand:
                since = min(since, self._progress[worker])
        # Only what has changed: with several processes each write goes to a shared file.
        for index, value in enumerate((buffered, in_progress, up, held, since)):
            if value != self._shown[index]:
                self._shown[index] = value
                self._gauges[index](value)


class PrometheusObserver(Observer):
    """Counts events as metrics of Prometheus: `MyConsumer(observers=[PrometheusObserver()])`.

    Consumers may share an observer or have one each. Consumers of the same class and queue are
    added up.

    Args:
        registry: The registry; None for the default one of prometheus_client.

    Raises:
        ImportError: On import, if prometheus-client isn't installed.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        registry = registry or REGISTRY
        if registry not in _METRICS:
            _METRICS[registry] = Metrics(registry)
        self._metrics = _METRICS[registry]

    def _metrics_of(self, origin: Origin) -> _ConsumerMetrics:
        labels = origin.consumer, origin.queue
        found = self._metrics.consumers.get(labels)
        if found is None:
            found = self._metrics.consumers[labels] = _ConsumerMetrics(self._metrics, *labels)
        return found

    def worker_started(self, origin: Origin, event: WorkerStarted) -> None:
        """Count the worker as running."""
        # Each worker has its own `Origin` object. Its index isn't unique, since several consumers
        # may share one observer.
        self._metrics_of(origin).add_worker(id(origin), event.load)

    def worker_stopped(self, origin: Origin, event: WorkerStopped) -> None:
        """Remove the worker."""
        self._metrics_of(origin).remove_worker(id(origin))

    def received(self, origin: Origin, event: Received) -> None:
        """Count the messages."""
        consumer = self._metrics_of(origin)
        consumer.received(event.count)
        consumer.note_progress(id(origin))

    def batch_cut(self, origin: Origin, event: BatchCut) -> None:
        """Observe the size of a batch and its fill time, unless a part of it is run again."""
        consumer = self._metrics_of(origin)
        if event.trigger is not Trigger.ISOLATE:
            consumer.batch_messages(len(event.messages))
            consumer.batch_fill(event.waited)
        consumer.update_load(id(origin))

    def batch_handled(self, origin: Origin, event: BatchHandled) -> None:
        """Observe the duration of a run and count its outcome."""
        consumer = self._metrics_of(origin)
        consumer.batch_process(event.seconds)
        outcome = "ok"
        if event.error is not None:
            outcome = "timeout" if isinstance(event.error, HandlerTimeout) else "error"
        consumer.count(self._metrics.batches, event.trigger.value, outcome)

    def settled(self, origin: Origin, event: Settled) -> None:
        """Count the messages by result and cause."""
        consumer = self._metrics_of(origin)
        for (result, cause), count in event.counts.items():
            name = RETURNED if result is None else result.name.lower()
            consumer.count(self._metrics.settled, name, cause.value, by=count)
        consumer.note_progress(id(origin))

    def settle_failed(self, origin: Origin, event: SettleFailed) -> None:
        """Count the messages by operation."""
        self._metrics_of(origin).count(
            self._metrics.settle_errors, event.step.value, by=event.count
        )

    def dead_lettered(self, origin: Origin, event: DeadLettered) -> None:
        """Count a dead letter by reason."""
        self._metrics_of(origin).count(self._metrics.dead_letters, event.reason.value)

    def discarded(self, origin: Origin, event: Discarded) -> None:
        """Count the messages."""
        self._metrics_of(origin).discarded(len(event.messages))

    def stale_results(self, origin: Origin, event: StaleResults) -> None:
        """Count the messages."""
        consumer = self._metrics_of(origin)
        consumer.stale(event.count)
        consumer.update_load(id(origin))

    def duplicates_dropped(self, origin: Origin, event: DuplicatesDropped) -> None:
        """Count the messages."""
        self._metrics_of(origin).duplicates(len(event.messages))

    def handler_error(self, origin: Origin, event: HandlerError) -> None:
        """Count an exception by class."""
        self._metrics_of(origin).count(self._metrics.exceptions, type(event.error).__name__)

    def connected(self, origin: Origin, event: Connected) -> None:
        """Count a reconnect if the previous session was lost, not if the breaker ended it."""
        consumer = self._metrics_of(origin)
        if id(origin) in consumer.lost:
            consumer.lost.remove(id(origin))
            consumer.reconnects()
        consumer.update_load(id(origin))

    def lost(self, origin: Origin, event: Lost) -> None:
        """Decrement the consuming gauge."""
        consumer = self._metrics_of(origin)
        consumer.lost.add(id(origin))
        consumer.update_load(id(origin))

    def breaker_opened(self, origin: Origin, event: BreakerOpened) -> None:
        """Mark the worker as paused."""
        self._metrics_of(origin).update_load(id(origin))

    def breaker_probing(self, origin: Origin, event: BreakerProbing) -> None:
        """Mark the worker as consuming one message at a time."""
        self._metrics_of(origin).update_load(id(origin))

    def breaker_closed(self, origin: Origin, event: BreakerClosed) -> None:
        """Mark the worker as consuming."""
        self._metrics_of(origin).update_load(id(origin))


def process_died(pid: int) -> None:
    """Remove the gauges of a process that has exited; what it has counted stays, in one file.

    If you supervise processes that share `PROMETHEUS_MULTIPROC_DIR`, call this whenever one exits.
    Otherwise its workers count as up forever.
    """
    folder = Path(os.environ["PROMETHEUS_MULTIPROC_DIR"])
    mark_process_dead(pid, str(folder))  # type: ignore[no-untyped-call]
    # What it has counted joins that of its predecessors, or each restart would leave two files.
    for kind in ("counter", "histogram"):
        left = folder / f"{kind}_{pid}.db"
        if left.exists():
            values = list(MmapedDict.read_all_values_from_file(str(left)))  # type: ignore[no-untyped-call]
            sums = MmapedDict(str(folder / f"{kind}_ended.db"))  # type: ignore[no-untyped-call]
            for key, value, _, _ in values:
                sums.write_value(key, sums.read_value(key)[0] + value, 0.0)  # type: ignore[no-untyped-call]
            sums.close()  # type: ignore[no-untyped-call]
            left.unlink()
