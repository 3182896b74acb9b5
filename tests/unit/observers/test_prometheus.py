"""Tests of the Prometheus observer, by what a scrape returns."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from aio_pika_batch import DeadLetterReason, SessionLost, Trigger
from aio_pika_batch.adapters.memory import ConnectFault, PublishFault
from aio_pika_batch.cli.process_manager import ProcessManager, ProcessPolicy
from aio_pika_batch.cli.supervisor import ProcessMetrics
from aio_pika_batch.observer import Step
from aio_pika_batch.observers.prometheus import PrometheusObserver
from tests.unit.observers.stories import everything
from tests.unit.shell.helpers import (
    ACK,
    NACK,
    REQUEUE,
    RecordingConsumer,
    ack,
    answering,
    first_then,
    numbered,
    taking,
)
from tests.unit.shell.scripted_transport import ScriptedTransport, raising

ROOT = Path(__file__).parents[3]
WHO = {"consumer": "RecordingConsumer", "queue": "jobs"}


class Scraped:
    """The result of a scrape."""

    def __init__(self, text):
        self.families = {each.name: each for each in text_string_to_metric_families(text)}
        self.samples = [each for family in self.families.values() for each in family.samples]

    @classmethod
    def of(cls, registry):
        return cls(generate_latest(registry).decode())

    def __call__(self, name, **labels):
        """Return the value of a series; None if it doesn't exist."""
        wanted = WHO | labels
        found = [
            each.value
            for each in self.samples
            if each.name == f"aio_pika_batch_{name}" and each.labels == wanted
        ]
        assert len(found) <= 1
        return found[0] if found else None


@pytest.fixture
def registry():
    """A registry for one test."""
    return CollectorRegistry()


async def test_each_event_moves_its_counters_and_histograms(rabbit, jitter, registry):
    """In a run with every kind of event."""
    await everything(rabbit, PrometheusObserver(registry))
    value = Scraped.of(registry)
    assert 6 == value("messages_received_total")  # 3, two copies, and one delivered again
    assert 2 == value("messages_settled_total", result="ack", cause="handler")
    assert 1 == value("messages_settled_total", result="requeue", cause="handler")
    assert 1 == value("messages_settled_total", result="requeue", cause="exception")
    assert 1 == value("messages_settled_total", result="nack", cause="handler")
    assert 1 == value("dead_letters_total", reason="rejected")
    assert 1 == value("stale_results_total")
    assert 1 == value("batches_total", trigger="size", outcome="ok")
    assert 1 == value("batches_total", trigger="timeout", outcome="error")
    assert 2 == value("batches_total", trigger="timeout", outcome="ok")
    assert (4, 6) == (value("batch_messages_count"), value("batch_messages_sum"))
    assert 3 == value("batch_messages_bucket", le="1.0")
    assert (4, 27.5) == (value("batch_fill_seconds_count"), value("batch_fill_seconds_sum"))
    assert (4, 20) == (value("batch_process_seconds_count"), value("batch_process_seconds_sum"))
    assert 1 == value("handler_exceptions_total", exception_type="KeyError")
    assert 1 == value("reconnects_total")
    assert (0, 0, 0, 0) == tuple(
        value(each)
        for each in ("messages_buffered", "messages_in_progress", "worker_up", "workers")
    )


async def test_gauges_follow_the_load_of_the_workers(rabbit, registry):
    """Buffered and handled messages, and consuming workers."""
    rabbit.put(*numbered(5))
    observer = PrometheusObserver(registry)
    async with RecordingConsumer(
        taking(20), transport=rabbit.transport, observers=[observer], batch_size=3
    ):
        await asyncio.sleep(1)
        value = Scraped.of(registry)
        assert (2, 3) == (value("messages_buffered"), value("messages_in_progress"))
        assert (1, 1) == (value("worker_up"), value("workers"))
        rabbit.broker.cut()
        rabbit.broker.faults.connect_fault = ConnectFault.UNREACHABLE
        await asyncio.sleep(1)
        value = Scraped.of(registry)
        assert (0, 1) == (value("worker_up"), value("workers"))
        assert 0 == value("messages_buffered")
        rabbit.broker.faults.connect_fault = ConnectFault.NONE
        await asyncio.sleep(30)
        assert 1 == Scraped.of(registry)("worker_up")


async def test_held_retries_are_a_gauge_while_they_last(rabbit, registry):
    """A failed message waits for its retry without counting as in progress."""
    rabbit.put(*numbered(3))
    async with RecordingConsumer(
        first_then(answering(ACK, REQUEUE, REQUEUE), ack),
        transport=rabbit.transport,
        observers=[PrometheusObserver(registry)],
        batch_size=3,
        requeue_delay=None,
    ):
        await asyncio.sleep(0.5)
        value = Scraped.of(registry)
        assert (2, 0) == (value("messages_held"), value("messages_in_progress"))
        await asyncio.sleep(10)
        assert 0 == Scraped.of(registry)("messages_held")


async def test_discarded_messages_are_counted(rabbit, registry):
    """A NACK without a dead-letter destination."""
    rabbit.put(*numbered(3))
    async with RecordingConsumer(
        answering(NACK, NACK, ACK),
        transport=rabbit.transport,
        observers=[PrometheusObserver(registry)],
        batch_size=3,
    ):
        await asyncio.sleep(1)
    assert 2 == Scraped.of(registry)("messages_discarded_total")


async def test_series_exist_before_anything_happens(rabbit, registry):
    """An alert on an increase would miss the step from no series to 1."""
    async with RecordingConsumer(
        ack, transport=rabbit.transport, observers=[PrometheusObserver(registry)]
    ):
        value = Scraped.of(registry)
    assert {0} == {
        value("messages_discarded_total"),
        value("stale_results_total"),
        value("reconnects_total"),
        *(value("dead_letters_total", reason=each.value) for each in DeadLetterReason),
        *(value("settle_errors_total", operation=each.value) for each in Step),
        *(
            value("batches_total", trigger=each.value, outcome=outcome)
            for each in Trigger
            for outcome in ("ok", "error", "timeout")
        ),
        value("messages_settled_total", result="requeue", cause="exception"),
        value("messages_settled_total", result="returned", cause="shutdown"),
    }


async def test_last_progress_is_a_timestamp(rabbit, registry, monkeypatch):
    """Of the worker without progress for the longest time."""
    loop = asyncio.get_running_loop()
    monkeypatch.setattr("time.time", lambda: 1_000_000 + loop.time())
    rabbit.put(*numbered(1))
    async with RecordingConsumer(
        taking(100), transport=rabbit.transport, observers=[PrometheusObserver(registry)]
    ):
        began = loop.time()
        await asyncio.sleep(50)
        assert 1_000_000 + began == pytest.approx(
            Scraped.of(registry)("last_progress_timestamp_seconds"), abs=1
        )
        await asyncio.sleep(70)
        assert 1_000_100 + began == pytest.approx(
            Scraped.of(registry)("last_progress_timestamp_seconds"), abs=10
        )


async def test_a_worker_that_holds_nothing_is_never_behind(rabbit, registry, monkeypatch):
    """Such as the standby of a single active consumer, beside a worker that makes progress."""
    loop = asyncio.get_running_loop()
    monkeypatch.setattr("time.time", lambda: 1_000_000 + loop.time())
    async with RecordingConsumer(
        taking(2),
        transport=rabbit.transport,
        observers=[PrometheusObserver(registry)],
        num_workers=2,
        queue_name="standby",
        queue_arguments={"x-single-active-consumer": True},
    ):
        for _ in range(60):
            rabbit.publish(b"x", routing_key="standby")
            await asyncio.sleep(4)
            since = Scraped.of(registry)("last_progress_timestamp_seconds", queue="standby")
            assert 1_000_000 + loop.time() - since < 10


async def test_every_series_of_an_alert_exists_before_its_first_burst(rabbit, registry):
    """Prometheus sees no increase in a series that begins with its burst."""
    async with RecordingConsumer(
        transport=rabbit.transport, observers=[PrometheusObserver(registry)]
    ):
        value = Scraped.of(registry)
    rules = (ROOT / "deploy/prometheus/alerts.yaml").read_text()
    counters = set(re.findall(r"aio_pika_batch_(\w+_total)", rules)) - {"process_crashes_total"}
    assert {"dead_letters_total", "settle_errors_total", "batches_total"} < counters
    for name in counters:
        assert any(each.name == f"aio_pika_batch_{name}" for each in value.samples), name
    for reason in ("rejected", "exhausted", "handler-error", "undecodable"):
        assert 0 == value("dead_letters_total", reason=reason)
    for operation in ("publish", "settle"):
        assert 0 == value("settle_errors_total", operation=operation)
    assert 0 == value("batches_total", trigger="size", outcome="error")


async def test_build_info_has_the_versions(registry):
    """As labels."""
    PrometheusObserver(registry)
    [about] = Scraped.of(registry).families["aio_pika_batch_build_info"].samples
    assert {"version", "python"} == set(about.labels)
    assert 1 == about.value


def test_the_docs_list_every_metric(registry):
    """With type and labels."""
    metrics = PrometheusObserver(registry)._metrics
    registry.register(ProcessMetrics(ProcessManager(ProcessPolicy(1))))
    labels = {
        f"{each._name}{'_total' if each._type == 'counter' else ''}": each._labelnames
        for each in vars(metrics).values()
        if hasattr(each, "_labelnames")
    }
    page = (ROOT / "docs" / "observability.md").read_text()
    rows = dict(re.findall(r"^\| `(aio_pika_batch_\w+)` (\| \w+ \|[^|]*\|)", page, re.MULTILINE))
    about = {"aio_pika_batch_build_info": "| gauge | `version`, `python` |"}
    for family in registry.collect():
        name = family.name + ("_total" if family.type == "counter" else "")
        further = ", ".join(f"`{label}`" for label in labels.get(name, ()) if label not in WHO)
        about.setdefault(name, f"| {family.type} | {further} |".replace("|  |", "| |"))
    assert about == rows


async def test_consumers_of_the_same_class_and_queue_are_added_up(rabbit, registry):
    """Whether they share an observer or have one each."""
    rabbit.put(*numbered(4))
    shared = PrometheusObserver(registry)
    some = [
        RecordingConsumer(taking(5), transport=rabbit.transport, observers=[each], prefetch_count=1)
        for each in (shared, shared, PrometheusObserver(registry))
    ]
    for each in some:
        await each.start()
    await asyncio.sleep(20)
    value = Scraped.of(registry)
    assert (3, 3) == (value("worker_up"), value("workers"))
    assert 4 == value("messages_received_total")
    await some[0].stop()
    assert 2 == Scraped.of(registry)("worker_up")
    for each in some[1:]:
        await each.stop()
    assert 0 == Scraped.of(registry)("worker_up")


async def test_a_handler_that_times_out_has_the_outcome_timeout(rabbit, registry):
    """And the cause timeout."""
    rabbit.put(*numbered(1))
    async with RecordingConsumer(
        first_then(taking(100), ack),
        transport=rabbit.transport,
        observers=[PrometheusObserver(registry)],
        process_timeout=2,
        batch_timeout=1,
    ):
        await asyncio.sleep(60)
    value = Scraped.of(registry)
    assert 1 == value("batches_total", trigger="timeout", outcome="timeout")
    assert 1 == value("handler_exceptions_total", exception_type="HandlerTimeout")
    assert 1 == value("messages_settled_total", result="requeue", cause="timeout")


async def test_parts_of_a_failed_batch_count_as_runs_not_as_batches(rabbit, registry):
    """They have no batch size and no fill time."""

    async def sunk_by_2(messages):
        if any(each.body == b"2" for each in messages):
            raise KeyError
        for _ in messages:
            yield ACK

    rabbit.put(*numbered(4))
    async with RecordingConsumer(
        sunk_by_2,
        transport=rabbit.transport,
        observers=[PrometheusObserver(registry)],
        batch_size=4,
        isolate_failures=True,
        unhandled_exception_action="NACK",
    ):
        await asyncio.sleep(1)
    value = Scraped.of(registry)
    assert (1, 4) == (value("batch_messages_count"), value("batch_messages_sum"))
    assert 1 == value("batch_fill_seconds_count")
    assert 5 == value("batch_process_seconds_count")
    assert 2 == value("batches_total", trigger="isolate", outcome="ok")
    assert 2 == value("batches_total", trigger="isolate", outcome="error")


async def test_failed_settlements_are_counted(registry):
    """By operation."""
    script = ScriptedTransport()
    script.on_settle = raising(SessionLost("just now"))
    async with RecordingConsumer(
        ack, transport=script, observers=[PrometheusObserver(registry)], batch_size=3
    ):
        script.last.feed(*numbered(3))
        await asyncio.sleep(0.001)
        assert 3 == Scraped.of(registry)("settle_errors_total", operation="settle")


async def test_unconfirmed_copies_are_counted(rabbit, registry):
    """With the operation publish."""
    rabbit.put(*numbered(2))
    rabbit.broker.faults.on_publish(PublishFault.REFUSE)
    async with RecordingConsumer(
        answering(REQUEUE, REQUEUE),
        transport=rabbit.transport,
        observers=[PrometheusObserver(registry)],
        batch_size=2,
    ):
        await asyncio.sleep(0.1)
        assert 2 == Scraped.of(registry)("settle_errors_total", operation="publish")


STORY = """
import asyncio, os, sys
from aio_pika_batch import Cause, MessageResult
from aio_pika_batch.observer import (
    Connected, Load, Observers, Origin, Received, Settled, WorkerStarted
)
from aio_pika_batch.adapters.memory import ConnectFault, PublishFault
from aio_pika_batch.observers.prometheus import PrometheusObserver

observers = Observers([PrometheusObserver()], Origin("RecordingConsumer", "jobs", 0), None)
observers.emit(WorkerStarted(lambda: Load(2, 3, True)))
observers.emit(Connected(1))
observers.emit(Received(5))
observers.emit(Settled({(MessageResult.ACK, Cause.HANDLER): 4}, 0.0))
print(os.getpid(), flush=True)
sys.stdin.read()
"""


SCRAPE = """
from prometheus_client import CollectorRegistry, generate_latest, multiprocess

registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""

DEATH = """
from aio_pika_batch.observers.prometheus import process_died

process_died({})
"""


def test_processes_are_added_up_and_the_gauges_of_a_dead_one_removed(tmp_path):
    """Its counters stay."""
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}

    def run(script):
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        )
        return Scraped(done.stdout)

    children = [
        subprocess.Popen(
            [sys.executable, "-c", STORY],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    try:
        pids = [int(each.stdout.readline()) for each in children]
        value = run(SCRAPE)
        assert (2, 2) == (value("worker_up"), value("workers"))
        assert (4, 6) == (value("messages_buffered"), value("messages_in_progress"))
        assert 10 == value("messages_received_total")
        assert 8 == value("messages_settled_total", result="ack", cause="handler")
        children[0].kill()
        children[0].wait()
        run(DEATH.format(pids[0]))
        value = run(SCRAPE)
        assert (1, 1) == (value("worker_up"), value("workers"))
        assert (2, 3) == (value("messages_buffered"), value("messages_in_progress"))
        assert 10 == value("messages_received_total")
    finally:
        for child in children:
            child.communicate()


COUNTING = """
import sys
from prometheus_client import Counter, Histogram
Counter("things", "Things.", ["kind"]).labels("a").inc(int(sys.argv[1]))
Histogram("sizes", "Sizes.", buckets=(1, 10)).observe(int(sys.argv[1]))
print(__import__("os").getpid())
"""

READING = """
import sys
from aio_pika_batch.health.server import metrics
from aio_pika_batch.observers.prometheus import process_died
for pid in sys.argv[1:]:
    process_died(int(pid))
print(metrics().body)
"""


def python(folder, program, *arguments):
    """Run a program that shares metrics in a folder, and return what it prints."""
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(folder)}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(
        command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout


def test_what_ended_processes_counted_is_kept_in_one_file(tmp_path):
    """However many there were."""
    pids = [python(tmp_path, COUNTING, number).strip() for number in (1, 2, 5)]
    text = python(tmp_path, READING, *pids)
    for line in ('things_total{kind="a"} 8.0', 'sizes_bucket{le="1.0"} 1.0', "sizes_sum 8.0"):
        assert line in text
    assert ["counter_ended.db", "histogram_ended.db"] == sorted(
        each.name for each in tmp_path.iterdir() if not each.name.startswith("gauge_livemax")
    )


def test_metrics_survive_a_damaged_file_and_a_missing_folder(tmp_path):
    """The other files count."""
    python(tmp_path, COUNTING, 3)
    for number, content in enumerate((b"", b"abc", b"\xff" * 100, b"\x40\0\0\0" * 20)):
        (tmp_path / f"counter_{number}.db").write_bytes(content)
    assert 'things_total{kind="a"} 3.0' in python(tmp_path, READING)
    assert "things" not in python(
        tmp_path,
        "import shutil, os; from aio_pika_batch.health.server import metrics;"
        "shutil.rmtree(os.environ['PROMETHEUS_MULTIPROC_DIR']); print(metrics().body)",
    )
