"""Measures what observers cost: ``python benchmarks/observing.py [--against REVISION] …``.

One process consumes the same messages again and again from a broker of its own, in turn unobserved
and observed, and reads the processor's clock. The cost is what an observed round takes more than
the other; the median over all rounds is printed. Every message has a trace of its own, and the
exporter discards the spans, so that only sending them isn't measured. OpenTelemetry is measured
twice, because a span that is recorded has links: one variant records every batch, the other one in
ten.

With ``--against``, another revision does the same in turn, and the ratio of the costs is printed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not this folder: packages are imported as anywhere else

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
from benchmarks.competitors import ours_batch  # noqa: E402
from benchmarks.fill import Filler, connected  # noqa: E402
from benchmarks.protocol import Job, Meter  # noqa: E402

Pick = Callable[[], Sequence[Observer]]

BATCHES = (1, 10, 100, 500)


class Nowhere(SpanExporter):
    """Discards spans."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Report success."""
        del spans
        return SpanExportResult.SUCCESS


def variants() -> dict[str, Pick]:
    """Return the observers of each variant; the first has none."""
    prometheus = PrometheusObserver(CollectorRegistry())
    all_of_them, one_in_ten = telemetry(1), telemetry(0.1)
    return {
        "nobody": list,
        "prometheus": lambda: [prometheus],
        "one in ten": lambda: [prometheus, one_in_ten],
        "all": lambda: [prometheus, all_of_them],
    }


def telemetry(ratio: float) -> Observer:
    """Return an observer that records a part of all batches."""
    traces = TracerProvider(ParentBased(TraceIdRatioBased(ratio)))
    traces.add_span_processor(BatchSpanProcessor(Nowhere()))
    meters = MeterProvider([InMemoryMetricReader()])
    return OpenTelemetryObserver(tracer_provider=traces, meter_provider=meters)


def consume(filler: Filler, url: str, batch: int, messages: int, watched_by: Pick) -> float:
    """Return µs of CPU per message."""
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


def measure(filler: Filler, url: str, batch: int, messages: int, turn: int) -> dict[str, float]:
    """Measure one round; return µs of CPU per message of each variant."""
    looking = variants()
    names = list(looking)
    # Another order each time: who comes first has a colder cache.
    ordered = names[turn % len(names) :] + names[: turn % len(names)]
    taken = {name: consume(filler, url, batch, messages, looking[name]) for name in ordered}
    return {name: taken[name] for name in names}


def measure_other(source: Path, url: str, batch: int, messages: int, turn: int) -> dict[str, float]:
    """Measure one round with the sources of another revision."""
    numbers = map(str, (batch, messages, turn))
    done = subprocess.run(  # noqa: S603  -- our own
        [sys.executable, __file__, "--answer", url, *numbers],
        env={**os.environ, "PYTHONPATH": str(source)},
        check=True,
        capture_output=True,
        text=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def extra(rounds: Sequence[dict[str, float]], name: str) -> float:
    """Return the median of what observers cost."""
    return statistics.median(each[name] - each["nobody"] for each in rounds)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--messages", type=int, default=20_000)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--against", metavar="REVISION", help="compare with this one")
    parser.add_argument("--answer", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    logging.getLogger("aio_pika_batch").setLevel(logging.CRITICAL)
    if asked.answer:
        url, *numbers = asked.answer
        with connected(url) as filler:
            print(json.dumps(measure(filler, url, *map(int, numbers))))
        return
    # Not above: an older revision, which only answers, may lack what they need.
    from benchmarks import broker, guard

    sources = [ROOT / "src"]
    if asked.against:
        sources.insert(0, guard.check_out(asked.against))
    print("| batch | unobserved | Prometheus | both, one batch in ten recorded | both, all |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    with broker.running() as node:
        for batch in asked.batches:
            taken: dict[Path, list[dict[str, float]]] = {source: [] for source in sources}
            for turn in range(asked.rounds):
                for source in sources if turn % 2 == 0 else sources[::-1]:
                    round_ = measure_other(source, node.url, batch, asked.messages, turn)
                    taken[source].append(round_)
            names = [name for name in taken[sources[0]][0] if name != "nobody"]
            for rounds in taken.values():
                alone = statistics.median(each["nobody"] for each in rounds)
                cells = [f"{alone:.2f}", *(f"{extra(rounds, name):+.2f}" for name in names)]
                print(f"| {batch} | " + " | ".join(cells) + " |", flush=True)
            if asked.against:
                old, new = taken.values()
                cells = [f"{extra(new, name) / extra(old, name):.2f}" for name in names]
                print(f"| {batch} | ratio | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
