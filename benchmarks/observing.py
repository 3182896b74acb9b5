"""What does it cost to be observed? ``python benchmarks/observing.py [--rounds N] [--messages N]``.

One process consumes the same messages again and again from a broker of its own, in turn unobserved
and observed, and reads the processor's clock. What a round of the one takes more than the same
round of the other is the cost; the median over all rounds is told. Every message carries a trace,
and the exporter throws away what it is given: nothing is spared but the sending. Of OpenTelemetry
there are two, since a span that is recorded has its links: one records every batch, the other one
in ten.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not this folder: packages are imported as everybody sees them

from opentelemetry.sdk.metrics import MeterProvider  # noqa: E402  -- after the path is right
from opentelemetry.sdk.metrics.export import InMemoryMetricReader  # noqa: E402
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider  # noqa: E402
from opentelemetry.sdk.trace.export import (  # noqa: E402
    BatchSpanProcessor,
    SpanExporter,
    SpanExportResult,
)
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased  # noqa: E402
from prometheus_client import CollectorRegistry  # noqa: E402

from aio_pika_batch import Observer  # noqa: E402
from aio_pika_batch.observers.otel import OpenTelemetryObserver  # noqa: E402
from aio_pika_batch.observers.prometheus import PrometheusObserver  # noqa: E402
from benchmarks import broker  # noqa: E402
from benchmarks.competitors import ours_batch  # noqa: E402
from benchmarks.fill import Filler, connected  # noqa: E402
from benchmarks.protocol import Job, Meter  # noqa: E402

Pick = Callable[[], Sequence[Observer]]

BATCHES = (10, 100, 500)


class Nowhere(SpanExporter):
    """Throws spans away."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Say that all went well."""
        del spans
        return SpanExportResult.SUCCESS


def variants() -> dict[str, Pick]:
    """Who looks on; the first is nobody."""
    prometheus = PrometheusObserver(CollectorRegistry())
    all_of_them, one_in_ten = telemetry(1), telemetry(0.1)
    return {
        "nobody": list,
        "prometheus": lambda: [prometheus],
        "one in ten": lambda: [prometheus, one_in_ten],
        "all": lambda: [prometheus, all_of_them],
    }


def telemetry(ratio: float) -> Observer:
    """One that records some of all batches."""
    traces = TracerProvider(ParentBased(TraceIdRatioBased(ratio)))
    traces.add_span_processor(BatchSpanProcessor(Nowhere()))
    meters = MeterProvider([InMemoryMetricReader()])
    return OpenTelemetryObserver(tracer_provider=traces, meter_provider=meters)


def consume(filler: Filler, url: str, batch: int, messages: int, watched_by: Pick) -> float:
    """Microseconds of the processor for a message."""
    queue = "bench.observing"
    prefetch = max(500, 2 * batch)
    warmup = 2 * prefetch
    job = Job(
        url=url,
        queue=queue,
        task="ack",
        messages=messages,
        warmup=warmup,
        batch=batch,
        prefetch=prefetch,
    )
    filler.delete(queue)
    filler.make(queue)
    try:
        filler.fill(queue, warmup + messages + 3 * prefetch, job.body, "traced")
        meter = Meter(job)
        asyncio.run(ours_batch.consume(job, meter, watched_by()))
    finally:
        filler.delete(queue)
    if meter.reading is None:
        sys.exit("it ended before all messages were handled")
    return meter.reading.cpu / meter.reading.messages * 1e6


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--messages", type=int, default=20_000)
    asked = parser.parse_args()
    logging.getLogger("aio_pika_batch").setLevel(logging.CRITICAL)
    looking = variants()
    print(
        "| batch | unobserved | Prometheus | both, one batch in ten recorded | both, all recorded |"
    )
    print("| ---: | ---: | ---: | ---: | ---: |")
    with broker.running() as node, connected(node.url) as filler:
        for batch in BATCHES:
            taken: dict[str, list[float]] = {name: [] for name in looking}
            for number in range(asked.rounds):
                # Another order each time: who comes first has a colder cache.
                names = list(looking)
                for name in names[number % 4 :] + names[: number % 4]:
                    watched_by = looking[name]
                    taken[name].append(consume(filler, node.url, batch, asked.messages, watched_by))
            alone = taken.pop("nobody")
            more = [
                statistics.median(one - none for one, none in zip(each, alone, strict=True))
                for each in taken.values()
            ]
            cells = [f"{statistics.median(alone):.2f}", *(f"{each:+.2f}" for each in more)]
            print(f"| {batch} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
