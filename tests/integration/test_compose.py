"""The setup of deploy/compose.yaml works, with local processes in place of its containers.

The consumer, the publisher, the environment, the Prometheus configuration and the alerts are the
same; only hosts and ports differ.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

import yaml

from aio_pika_batch.testing.rabbitmq.processes import LOCALHOST, free_port, kill_group, spawn
from tests.integration.helpers import ready, until
from tests.support.prometheus import prometheus, promtool

DEPLOY = Path(__file__).parents[2] / "deploy"
SERVICES = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
RUN = ["run", "shop:Importer", "--health-host", "0.0.0.0", "--health-port"]  # noqa: S104  -- as there


async def test_orders_are_imported_and_counted(tmp_path, amqp_url, name, channel) -> None:
    """Orders are imported, dead letters are kept, and Prometheus has all metrics and alerts."""
    port = free_port()
    env = {
        **os.environ,
        **SERVICES["consumer"]["environment"],
        "AIO_PIKA_BATCH_URL": amqp_url,
        "AIO_PIKA_BATCH_QUEUE_NAME": name,
        "AIO_PIKA_BATCH_DEAD_LETTER_QUEUE": f"{name}.dead",
    }
    log = tmp_path / "log"
    with ExitStack() as stack:
        output = stack.enter_context(log.open("wb"))

        def start(*arguments: str) -> None:
            process = spawn(
                [sys.executable, *arguments], cwd=DEPLOY / "compose", env=env, stdout=output
            )
            stack.callback(kill_group, process)

        start("-m", "aio_pika_batch", *RUN, str(port))
        await until(lambda: "consuming" in log.read_text(), what=log.read_text)
        start("shop.py", *SERVICES["orders"]["command"])

        folder = tmp_path / "prometheus"
        shutil.copytree(DEPLOY / "prometheus", folder)
        promtool("check", "config", folder / "prometheus.yaml")
        # Starting it blocks, and the consumer is another process.
        server = await asyncio.to_thread(
            stack.enter_context,
            prometheus(f"{LOCALHOST}:{port}", folder, folder / "prometheus.yaml"),
        )

        async def value(expression: str) -> float:
            found = await asyncio.to_thread(server.ask, expression)
            return float(found[0]["value"][1]) if found else 0.0

        async def has(expression: str) -> bool:
            return await value(expression) > 0

        settled = "aio_pika_batch_messages_settled_total"
        for result in ("ack", "nack", "requeue"):
            await until(lambda r=result: has(f'sum({settled}{{result="{r}"}})'), what=log.read_text)
        await until(lambda: has("aio_pika_batch_worker_up == 1"))
        assert {"AioPikaBatchWorkersDown"} <= set(await asyncio.to_thread(server.alerts))
        dead = await ready(amqp_url, f"{name}.dead")
    assert 0 < dead
    for queue in (name, f"{name}.dead", *(f"{name}.retry.{ms}" for ms in (1000, 2000, 4000))):
        await channel.queue_delete(queue)
    await channel.exchange_delete(f"{name}.dlx")
