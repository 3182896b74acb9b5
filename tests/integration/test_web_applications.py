"""Consumers in web applications under uvicorn, and forked or spawned processes of handlers."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from itertools import cycle, product
from pathlib import Path

import httpx
import pytest

from aio_pika_batch import BatchConsumer, BatchConsumerSettings, MessageResult
from aio_pika_batch.testing.rabbitmq.processes import free_port, spawn
from tests.integration.helpers import PATIENCE

APP = Path(__file__).with_name("apps") / "web_application.py"


def until(condition):
    """Wait until it returns something true, and return that."""
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def answer(port, path):
    """Return the response; None if the port is closed."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}{path}", timeout=10)
    except httpx.TransportError:
        return None


def serve(tmp_path, framework, lifespan, url):
    """Start the application; return its process, its port, and the file that it prints into."""
    port, printed = free_port(), tmp_path / "printed"
    given = {"URL": url, "QUEUE_NAME": "jobs", "BATCH_TIMEOUT": "0.05", "RECONNECT_DELAY": "0.2"}
    environment = os.environ | {f"AIO_PIKA_BATCH_{name}": value for name, value in given.items()}
    with printed.open("wb") as file:
        process = spawn(
            [sys.executable, str(APP), framework, lifespan, str(port)],
            env=environment,
            cwd=tmp_path,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    return process, port, printed


def combinations(lifespans):
    """All of them; only one framework and signal for each lifespan isn't long."""
    frameworks, numbers = ["fastapi", "starlette"], [signal.SIGTERM, signal.SIGINT]
    quick = [*zip(cycle(frameworks), lifespans, cycle(numbers))]
    return pytest.mark.parametrize(
        ("framework", "lifespan", "number"),
        [
            pytest.param(*each, marks=[] if each in quick else pytest.mark.long)
            for each in product(frameworks, lifespans, numbers)
        ],
    )


@combinations(["block", "task", "unaware"])
def test_an_application_comes_up_and_ends_without_its_broker(tmp_path, framework, lifespan, number):
    """It isn't ready, and a signal ends it."""
    url = f"amqp://guest:guest@127.0.0.1:{free_port()}/"
    process, port, _ = serve(tmp_path, framework, lifespan, url)
    assert 503 == until(lambda: answer(port, "/readyz")).status_code
    process.send_signal(number)
    began = time.monotonic()
    process.wait(PATIENCE)
    assert time.monotonic() - began < PATIENCE / 2


@combinations(["block", "task"])
def test_a_signal_ends_an_application_after_its_batch(tmp_path, framework, lifespan, number):
    """The batch that is being handled is finished first."""
    process, port, printed = serve(tmp_path, framework, lifespan, "memory://")
    until(lambda: (found := answer(port, "/readyz")) and found.status_code == 200)
    assert 200 == answer(port, "/publish").status_code
    until(lambda: "began" in printed.read_text())
    process.send_signal(number)
    process.wait(PATIENCE)
    lines = printed.read_text().splitlines()  # those of the log stand between them
    assert ["began", "handled 1"] == [each for each in lines if each in {"began", "handled 1"}]


def sleep() -> None:
    """Work that takes too long."""
    time.sleep(3600)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
async def test_a_handler_can_end_its_own_process(method):
    """`terminate()` ends it, however it was started."""
    statuses = []

    class Limits(BatchConsumer):
        async def process_messages(self, messages):
            process = multiprocessing.get_context(method).Process(target=sleep)
            await asyncio.to_thread(process.start)
            process.terminate()
            await asyncio.to_thread(process.join, PATIENCE)
            statuses.append(process.exitcode)
            process.kill()
            for _ in messages:
                yield MessageResult.ACK

    settings = BatchConsumerSettings(url="memory://", queue_name="jobs", batch_timeout=0.05)
    consumer = Limits(settings)
    running = asyncio.create_task(consumer.run())
    while not consumer.is_healthy:  # noqa: ASYNC110  -- it has no event to wait for
        await asyncio.sleep(0.01)
    await consumer.publish(b"1", routing_key="jobs")
    async with asyncio.timeout(PATIENCE):
        while not statuses:  # noqa: ASYNC110  -- the handler has no event to wait for
            await asyncio.sleep(0.01)
    assert [-signal.SIGTERM] == statuses
    assert consumer.is_healthy
    await consumer.stop()
    await running
