"""Tests of all alerts by a real Prometheus on real consumers, as `nox -s alerts` runs them.

The rules are those of `deploy/prometheus/alerts.yaml`, with a second for each of their minutes.
Each
alert must fire on what happens first after the start, and no other with it.
"""

from __future__ import annotations

import asyncio
import itertools
import re
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry, start_http_server

from aio_pika_batch import BatchConsumer, BatchConsumerSettings, MessageResult
from aio_pika_batch.adapters.memory import Broker, ConnectFault, MemoryTransport, PublishFault
from aio_pika_batch.cli.process_manager import Heartbeat, ProcessManager, ProcessPolicy
from aio_pika_batch.cli.supervisor import ProcessMetrics
from aio_pika_batch.observers.prometheus import PrometheusObserver
from aio_pika_batch.testing.rabbitmq.processes import LOCALHOST, free_port
from tests.integration.helpers import until
from tests.support.prometheus import prometheus

DEPLOY = Path(__file__).parents[2] / "deploy" / "prometheus"
RULES = DEPLOY / "alerts.yaml"
NAMES = [each["alert"] for each in yaml.safe_load(RULES.read_text())["groups"][0]["rules"]]
QUIET = 20
"""Seconds: as long as the longest window of a rule, and its `for`."""


def hurried(rules: str) -> str:
    """Return the rules with a second for each minute."""
    rules = re.sub(r"\[(\d+)m\]", r"[\1s]", rules)
    rules = re.sub(r"for: (\d+)m", r"for: \1s", rules)
    return rules.replace("> 900", "> 15")


class Scripted(BatchConsumer):
    """Answers as its test says."""

    answer = MessageResult.ACK

    async def process_messages(self, messages):
        """Yield the answer, raise it, or wait for ever."""
        if self.answer is None:
            await asyncio.Event().wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        for _ in messages:
            yield self.answer


@dataclass
class Rig:
    """A consumer and a supervisor that are well, and what scrapes them."""

    broker: Broker
    consumer: Scripted
    registry: CollectorRegistry
    manager: ProcessManager
    is_over: bool = False
    numbers: itertools.count = field(default_factory=itertools.count)

    def put(self, count=1):
        """Publish messages."""
        for _ in range(count):
            self.broker.put("jobs", b"%d" % next(self.numbers))

    async def steadily(self, do, every=0.2):
        """Do something until the test is over."""
        while not self.is_over:
            do()
            await asyncio.sleep(every)


@asynccontextmanager
async def rig(**more):
    """A rig under a steady load, which is acknowledged."""
    broker, registry = Broker(), CollectorRegistry()
    manager = ProcessManager(ProcessPolicy(2))
    for slot in range(2):
        manager.poll(0)
        manager.on_heartbeat(slot, Heartbeat(True, False, 20.0), 0)
    registry.register(ProcessMetrics(manager))
    settings = {"dead_letter_queue": "dead", "requeue_delay": 0, "max_requeue_attempts": 10**6}
    consumer = Scripted(
        BatchConsumerSettings(
            _env_file=None,
            url="memory://",
            queue_name="jobs",
            batch_size=10,
            batch_timeout=0.1,
            reconnect_delay=0.01,
            reconnect_delay_max=0.1,
            shutdown_timeout=1,
            **{**settings, **more},
        ),
        transport=MemoryTransport(broker),
        observers=[PrometheusObserver(registry)],
    )
    made = Rig(broker, consumer, registry, manager)
    await consumer.start()
    load = asyncio.create_task(made.steadily(made.put))
    try:
        yield made
    finally:
        made.is_over = True
        await load
        broker.faults.connect_fault = ConnectFault.NONE
        with suppress(Exception):  # its handler may hang
            await consumer.stop()


async def workers_down(rig):
    """The broker doesn't answer any more."""
    rig.broker.faults.connect_fault = ConnectFault.UNREACHABLE
    rig.broker.cut()


async def hang(rig):
    """The handler never returns."""
    rig.consumer.answer = None


async def fail(rig):
    """The handler raises."""
    rig.consumer.answer = KeyError("sku")


async def refuse(rig):
    """A burst of 50 messages is refused, and nothing after that."""
    rig.consumer.answer = MessageResult.NACK
    rig.put(50)
    await asyncio.sleep(0.5)
    rig.consumer.answer = MessageResult.ACK


async def reconnect(rig):
    """The connection is lost seven times."""
    for _ in range(7):
        rig.broker.cut()
        await asyncio.sleep(0.5)


async def cannot_publish(rig):
    """The dead-letter queue takes nothing."""
    rig.broker.faults.on_publish(PublishFault.REFUSE)
    rig.consumer.answer = MessageResult.NACK


async def crash(rig):
    """Processes crash four times, and come back."""
    for number in range(4):
        rig.manager.on_exit(0, -9, number)
        rig.manager.poll(number + 60)
        rig.manager.on_heartbeat(0, Heartbeat(True, False, 20.0), number + 60)


async def miss(rig):
    """A process can't be started again."""
    rig.manager.on_exit(0, -9, 0)


async def vanish(rig):
    """Nothing is scraped any more."""
    for collector in list(rig.registry._collector_to_names):
        rig.registry.unregister(collector)


CAUSES = {
    "AioPikaBatchWorkersDown": workers_down,
    "AioPikaBatchStuck": hang,
    "AioPikaBatchHandlerFails": fail,
    "AioPikaBatchDeadLetters": refuse,
    "AioPikaBatchDiscards": refuse,
    "AioPikaBatchReconnects": reconnect,
    "AioPikaBatchCannotSettle": cannot_publish,
    "AioPikaBatchProcessCrashes": crash,
    "AioPikaBatchProcessesMissing": miss,
    "AioPikaBatchNoProcess": vanish,
}
SETTINGS = {
    "AioPikaBatchDiscards": {"dead_letter_queue": None, "without_dead_letter": "reject"},
}


@pytest.fixture
def configuration(tmp_path):
    """The configuration of `deploy/prometheus`, in a hurry."""
    (tmp_path / "alerts.yaml").write_text(hurried(RULES.read_text()))
    file = tmp_path / "prometheus.yaml"
    file.write_text((DEPLOY / "prometheus.yaml").read_text())
    return file


@asynccontextmanager
async def scraped(registry, folder, configuration):
    """A Prometheus that scrapes this registry, and has done so."""
    port = free_port()
    exporter, thread = start_http_server(port, LOCALHOST, registry)
    opened = prometheus(f"{LOCALHOST}:{port}", folder, configuration)
    server = await asyncio.to_thread(opened.__enter__)
    try:
        yield server
    finally:
        await asyncio.to_thread(opened.__exit__, None, None, None)
        exporter.shutdown()
        exporter.server_close()
        thread.join()


async def firing(server):
    """Return the alerts that fire."""
    found = await asyncio.to_thread(server.ask, 'ALERTS{alertstate="firing"}')
    return {each["metric"]["alertname"] for each in found}


def test_every_alert_has_a_cause():
    """In the order of the rules."""
    assert list(CAUSES) == NAMES


@pytest.mark.parametrize("alert", CAUSES)
async def test_an_alert_fires_on_the_first_burst(alert, tmp_path, configuration):
    """And no other one before it."""
    async with (
        rig(**SETTINGS.get(alert, {})) as made,
        scraped(made.registry, tmp_path, configuration) as server,
    ):
        assert set() == await firing(server)
        await CAUSES[alert](made)
        first = await until(lambda: firing(server))
        assert {alert} == first


async def test_no_alert_fires_in_normal_operation(tmp_path, configuration):
    """Also with a message that is requeued now and then, and one lost connection."""
    async with (
        rig() as made,
        scraped(made.registry, tmp_path, configuration) as server,
    ):
        made.broker.cut()
        for _ in range(QUIET):
            made.consumer.answer = MessageResult.REQUEUE
            await asyncio.sleep(0.2)
            made.consumer.answer = MessageResult.ACK
            await asyncio.sleep(0.8)
            assert set() == await firing(server)
