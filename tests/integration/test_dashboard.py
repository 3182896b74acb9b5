"""The dashboard and the alerts, checked by a real Prometheus that scrapes a real consumer.

Everything for which there is a metric happens to that consumer.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client import CollectorRegistry, start_http_server

from aio_pika_batch import BatchConsumer, BatchConsumerSettings, MessageResult
from aio_pika_batch.adapters.memory import Broker, MemoryTransport, PublishFault
from aio_pika_batch.cli.process_manager import ProcessManager, ProcessPolicy
from aio_pika_batch.cli.supervisor import ProcessMetrics
from aio_pika_batch.observers.prometheus import PrometheusObserver
from aio_pika_batch.testing.rabbitmq.processes import LOCALHOST, free_port
from tests.integration.helpers import PATIENCE
from tests.support.prometheus import prometheus, promtool

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana" / "aio-pika-batch.json").read_text())
ALERTS = DEPLOY / "prometheus" / "alerts.yaml"
PANELS = [each for each in DASHBOARD["panels"] if each["type"] != "row"]

VARIABLES = {"$__rate_interval": "1m", "$consumer": "Eventful", "$queue": "jobs"}


class Eventful(BatchConsumer):
    """Fails in every tenth batch."""

    number = count(1)

    async def process_messages(self, messages):
        """Ack, requeue and nack, and sometimes raise."""
        await asyncio.sleep(0.01)
        if next(self.number) % 10 == 0:
            raise KeyError
        for position, _ in enumerate(messages):
            yield [MessageResult.NACK, MessageResult.REQUEUE, MessageResult.ACK][min(position, 2)]


@asynccontextmanager
async def eventful(registry):
    """A consumer to which everything happens while the context is open."""
    broker = Broker()
    settings = BatchConsumerSettings(
        _env_file=None,
        url="memory://",
        queue_name="jobs",
        batch_size=10,
        batch_timeout=0.1,
        dead_letter_queue="dead",
        reconnect_delay=0.01,
        reconnect_delay_max=0.01,
    )
    consumer = Eventful(
        settings, transport=MemoryTransport(broker), observers=[PrometheusObserver(registry)]
    )

    async def happen():
        for number in count():
            for _ in range(20):
                broker.put("jobs", b"x")
            if number % 20 == 5:
                broker.faults.on_publish(PublishFault.REFUSE, times=1)
            if number % 20 == 10:
                broker.cut()
            await asyncio.sleep(0.05)

    async with consumer:
        happening = asyncio.create_task(happen())
        try:
            yield
        finally:
            happening.cancel()
            await asyncio.wait({happening})


def filled_in(expression):
    """Return an expression as Grafana sends it, with its variables replaced."""
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    assert "$" not in expression
    return expression


async def test_every_panel_and_alert_has_data(tmp_path):
    """No expression is invalid, and none is empty while everything happens."""
    registry = CollectorRegistry()
    port = free_port()
    server, thread = start_http_server(port, LOCALHOST, registry)
    try:
        registry.register(ProcessMetrics(ProcessManager(ProcessPolicy(2))))
        async with eventful(registry):
            await asyncio.to_thread(asks, tmp_path, f"{LOCALHOST}:{port}")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def asks(folder, target):
    """Ask everything; repeat while an expression is empty."""
    wanted = {
        (panel["title"], filled_in(each["expr"])) for panel in PANELS for each in panel["targets"]
    }
    rules = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]
    for rule in rules:
        # What an alert compares must be there; whether it goes off is another test's.
        for side in re.split(r"\s[<>]\s", rule["expr"].replace("\n", " ").strip()):
            # The last is an alert about series that are missing.
            if not re.fullmatch(r"[\d.]+|\d+\s+and.*|absent\(.*", side.strip()):
                wanted.add((rule["alert"], side))
    with prometheus(target, folder) as server:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            wanted = {each for each in wanted if not has_numbers(server.ask(each[1]))}
            if not wanted:
                return
            time.sleep(0.2)
    assert set() == wanted


def has_numbers(result):
    """Return whether there is a series with a number."""
    return any(not math.isnan(float(each["value"][1])) for each in result)


def test_the_dashboard_matches_grafanas_schema():
    """Grafana's library reads and writes it, and every key is kept."""
    read = Dashboard.from_json(DASHBOARD)
    written = json.loads(JSONEncoder(sort_keys=True).encode(read))

    def unknown(ours, theirs, where=""):
        if isinstance(ours, dict):
            for key, value in ours.items():
                if not isinstance(theirs, dict) or key not in theirs:
                    yield f"{where}.{key}"
                else:
                    yield from unknown(value, theirs[key], f"{where}.{key}")
        elif isinstance(ours, list):
            if not isinstance(theirs, list) or len(theirs) != len(ours):
                yield where
            else:
                for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
                    yield from unknown(one, other, f"{where}[{number}]")
        elif ours != theirs:
            yield f"{where}: {ours!r} became {theirs!r}"

    assert [] == list(unknown(DASHBOARD, written))


def test_panels_do_not_overlap_and_have_unique_names():
    """The schema does not check this."""
    assert len({each["id"] for each in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert len({each["title"] for each in PANELS}) == len(PANELS)
    taken = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert at["x"] + at["w"] <= 24
        assert not cells & taken
        taken |= cells


def test_every_metric_is_shown():
    """A metric that no panel shows need not exist."""
    registry = CollectorRegistry()
    PrometheusObserver(registry)
    shown = " ".join(each["expr"] for panel in PANELS for each in panel["targets"])
    assert [] == [each.name for each in registry.collect() if each.name not in shown]


WHO = 'consumer="C", queue="q"'

GOES_OFF = {
    "AioPikaBatchWorkersDown": {"worker_up": "2x2 1x100", "workers": "2x103"},
    "AioPikaBatchStuck": {
        "last_progress_timestamp_seconds": "0x100",
        "messages_in_progress": "3x100",
        "messages_buffered": "0x100",
    },
    "AioPikaBatchHandlerFails": {
        ("batches_total", 'trigger="size", outcome="error"'): "0+2x100",
        ("batches_total", 'trigger="size", outcome="ok"'): "0+8x100",
    },
    "AioPikaBatchDeadLetters": {("dead_letters_total", 'reason="exhausted"'): "0+1x100"},
    "AioPikaBatchDiscards": {"messages_discarded_total": "0+1x100"},
    "AioPikaBatchReconnects": {"reconnects_total": "0+1x100"},
    "AioPikaBatchCannotSettle": {("settle_errors_total", 'operation="publish"'): "0+1x100"},
    "AioPikaBatchProcessCrashes": {"process_crashes_total": "0+1x100"},
    "AioPikaBatchProcessesMissing": {"processes_running": "1x100", "processes_wanted": "2x100"},
    "AioPikaBatchNoProcess": {"build_info": "_x100"},
}
QUIET = {
    "worker_up": "2x100",
    "workers": "2x100",
    "last_progress_timestamp_seconds": "0+60x100",
    "messages_in_progress": "3x100",
    "messages_buffered": "0x100",
    ("batches_total", 'trigger="size", outcome="error"'): "1x100",
    "messages_discarded_total": "1x100",
    "process_crashes_total": "3x100",
    "processes_running": "2x100",
    "processes_wanted": "2x100",
    ("batches_total", 'trigger="size", outcome="ok"'): "0+8x100",
    ("dead_letters_total", 'reason="exhausted"'): "1x100",
    "reconnects_total": "1x100",
    ("settle_errors_total", 'operation="publish"'): "1x100",
}


def series(given):
    """Return made-up series in promtool's format."""
    for key, values in given.items():
        name, more = (key, "") if isinstance(key, str) else (key[0], f", {key[1]}")
        yield {"series": f"aio_pika_batch_{name}{{{WHO}{more}}}", "values": values}


def try_out(folder, given, expected):
    """Let promtool evaluate all rules over an hour of these series."""
    file = folder / "test.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "rule_files": [str(ALERTS)],
                "evaluation_interval": "1m",
                "tests": [
                    {
                        "interval": "1m",
                        "input_series": list(series({"build_info": "1x100", **given})),
                        "promql_expr_test": [
                            {
                                "expr": 'group by (alertname) (ALERTS{alertstate="firing"})',
                                "eval_time": "60m",
                                "exp_samples": [
                                    {"labels": f'{{alertname="{each}"}}', "value": 1}
                                    for each in expected
                                ],
                            }
                        ],
                    }
                ],
            }
        )
    )
    promtool("test", "rules", file)


def test_alerts_are_valid_rules():
    """As promtool checks them."""
    promtool("check", "rules", ALERTS)


@pytest.mark.parametrize("alert", GOES_OFF)
def test_an_alert_fires(tmp_path, alert):
    """And no other one."""
    try_out(tmp_path, GOES_OFF[alert], [alert])


def test_no_alert_fires_while_all_is_well(tmp_path):
    """Whatever happened before."""
    try_out(tmp_path, QUIET, [])


def test_every_alert_is_tested():
    """An alert that was never seen to fire may not work."""
    rules = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]
    assert [each["alert"] for each in rules] == list(GOES_OFF)
