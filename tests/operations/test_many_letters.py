"""Tests of the dead-letter tools on 100,000 letters; `nox -s letters` runs them.

`AIO_PIKA_BATCH_TEST_LETTERS` is another number. Every command runs as a process on a terminal, and
its peak memory is measured.
"""

from __future__ import annotations

import asyncio
import os
import pty
import random
import re
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from aio_pika_batch.core.publication import Outcome, Publication
from aio_pika_batch.queue_browser import browse
from aio_pika_batch.testing.rabbitmq.processes import spawn
from aio_pika_batch.transport import Endpoint, open_transport
from tests.integration.helpers import ready, until

if TYPE_CHECKING:
    import subprocess

COUNT = int(os.environ.get("AIO_PIKA_BATCH_TEST_LETTERS", "100000"))
BODY = b"x" * 1000
MOST_MEMORY = 64 << 10  # KiB
IN_FLIGHT = 100
QUEUE_TYPES = pytest.mark.parametrize("queue_type", ["classic", "quorum"])


@dataclass
class Ended:
    """A command that has ended: its output, its exit code, its peak memory in KiB, its time."""

    output: str
    code: int
    memory: int
    seconds: float
    shown: list[int]
    """The numbers of letters that its progress bar has shown."""


def peak_memory(pid: int) -> int:
    """Return the peak memory of a process in KiB; 0 if it has ended."""
    # Not by `wait4`: its peak is at least that of the process that has forked this one.
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) if found else 0


class Command:
    """A command of `aio-pika-batch dlq` on a terminal of its own."""

    def __init__(self, url: str, queue: str, *arguments: str) -> None:
        self._began = time.monotonic()
        where = ["--queue", queue, "--url", url]
        self._terminal, theirs = pty.openpty()
        self.process: subprocess.Popen[bytes] = spawn(
            [sys.executable, "-m", "aio_pika_batch", "dlq", *arguments, *where],
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "COLUMNS": "120", "TERM": "xterm"},
        )
        os.close(theirs)
        self._output = bytearray()

    def _read(self) -> None:
        with suppress(OSError):  # the last one who wrote to it is gone
            while data := os.read(self._terminal, 65536):
                self._output += data

    @property
    def is_showing(self) -> bool:
        """Whether it shows numbers of letters."""
        return b"/%d" % COUNT in self._output

    async def ended(self) -> Ended:
        """Wait until it exits."""
        reading = asyncio.create_task(asyncio.to_thread(self._read))
        memory = 0
        while self.process.poll() is None:
            memory = max(memory, peak_memory(self.process.pid))
            await asyncio.sleep(0.02)
        await reading
        os.close(self._terminal)
        text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self._output.decode())
        shown = [int(each) for each in re.findall(rf"(\d+)/{COUNT}\b", text)]
        seconds = time.monotonic() - self._began
        return Ended(" ".join(text.split()), self.process.returncode, memory, seconds, shown)


async def run(
    url: str, queue: str, *arguments: str, code: int = 0, has_progress: bool = True
) -> Ended:
    """Run a command that must succeed within its memory, and report its figures."""
    ended = await Command(url, queue, *arguments).ended()
    print(
        f"dlq {' '.join(arguments)}: {ended.seconds:.1f} s, {ended.memory / 1024:.1f} MiB,"
        f" {len(set(ended.shown))} steps shown"
    )
    assert code == ended.code, ended.output[-2000:]
    assert ended.memory < MOST_MEMORY, f"{ended.memory} KiB"
    if has_progress:
        assert len(set(ended.shown)) > 3, ended.output[-2000:]
    return ended


async def bury(url: str, dlq: str, queue: str) -> None:
    """Publish the dead letters. The last one has another reason than the others."""
    transport = open_transport(Endpoint(url=url))
    async with transport.publisher() as publisher:
        for start in range(0, COUNT, 2000):
            letters = [
                Publication(
                    b"%d " % number + BODY,
                    routing_key=dlq,
                    headers={
                        "x-dead-letter-reason": "rejected" if number < COUNT - 1 else "exhausted",
                        "x-original-exchange": "",
                        "x-original-routing-key": queue,
                        "x-original-queue": queue,
                        "x-dead-lettered-at": datetime.now(UTC),
                    },
                )
                for number in range(start, min(start + 2000, COUNT))
            ]
            assert {Outcome.CONFIRMED} == set(await publisher.publish(letters))


async def numbers_in(url: str, queue: str) -> list[int]:
    """Return the numbers of all letters in a queue, which stay there."""
    count = await ready(url, queue)
    found: list[int] = []
    # Not by one large prefetch: a quorum queue delivers at most 2,000 messages at a time.
    async with browse(open_transport(Endpoint(url=url)), queue) as browser:
        while chunk := await browser.next_chunk():
            found += [int(message.body.split(b" ")[0]) for message in chunk]
    await until(lambda: is_back(url, queue, count))
    return found


async def is_back(url: str, queue: str, count: int) -> bool:
    """Whether all letters are ready again."""
    return await ready(url, queue) == count


@pytest.fixture
async def queues(channel, name, queue_type):
    """A queue and its dead-letter queue, which is returned first."""
    for queue in (name, f"{name}.dlq"):
        arguments = {"x-queue-type": queue_type}
        await channel.declare_queue(queue, durable=True, arguments=arguments)
    yield f"{name}.dlq", name
    for queue in (name, f"{name}.dlq"):
        await channel.queue_delete(queue)


@QUEUE_TYPES
async def test_all_commands_count_right_within_their_memory(amqp_url, queues, queue_type):
    """List, show, dry run, replay and purge of all letters."""
    dlq, queue = queues
    await bury(amqp_url, dlq, queue)
    last = ("--reason", "exhausted")

    listed = await run(amqp_url, dlq, "list", has_progress=False)
    assert f"{COUNT} 100 100 rejected" in listed.output
    listed = await run(amqp_url, dlq, "list", "--look-at", str(COUNT))
    assert f"{COUNT} {COUNT} {COUNT - 1} rejected, 1 exhausted" in listed.output
    shown = await run(amqp_url, dlq, "show", *last)
    # An old quorum queue returns what many consumers have received in another order.
    assert re.search(r"dead letter \d+: exhausted", shown.output)
    assert f"1 shown, {COUNT} looked at, {COUNT} in {dlq}" in shown.output
    dry = await run(amqp_url, dlq, "replay", "--dry-run")
    assert f"{COUNT} of {COUNT} dead letters would be replayed; 0 did not match" in dry.output
    dry = await run(amqp_url, dlq, "purge", *last, code=2)
    assert f"1 of {COUNT} dead letters would be deleted; {COUNT - 1} did not match" in dry.output
    assert await until(lambda: is_back(amqp_url, dlq, COUNT))

    rare = await run(amqp_url, dlq, "replay", *last)
    assert f"1 of {COUNT} dead letters replayed; {COUNT - 1} did not match" in rare.output
    assert [COUNT - 1] == await numbers_in(amqp_url, queue)
    await run(amqp_url, dlq, "replay", has_progress=False)
    assert list(range(COUNT)) == sorted(await numbers_in(amqp_url, queue))
    assert 0 == await ready(amqp_url, dlq)

    await bury(amqp_url, dlq, queue)
    purged = await run(amqp_url, dlq, "purge", "--yes")
    assert f"{COUNT} of {COUNT} dead letters deleted; 0 did not match, 0 failed" in purged.output
    assert 0 == await ready(amqp_url, dlq)


@QUEUE_TYPES
async def test_no_letter_is_missing_after_interruptions(amqp_url, queues, queue_type):
    """At any point of any command, by Ctrl-C, SIGTERM or SIGKILL."""
    dlq, queue = queues
    await bury(amqp_url, dlq, queue)
    draw = random.Random(15)
    killed = 0
    reads = [
        ("list", "--look-at", str(COUNT)),
        ("show", "--reason", "gone"),
        ("replay", "--dry-run"),
    ]
    for arguments in [*reads, *([("replay",)] * 9)]:
        command = Command(amqp_url, dlq, *arguments)
        waiting = asyncio.create_task(command.ended())
        number = draw.choice([signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
        # Some while it starts, most while it reads or publishes.
        if draw.random() < 0.8:
            await until(lambda: command.is_showing or waiting.done())  # noqa: B023  -- awaited here
        await asyncio.sleep(draw.uniform(0, COUNT / 25_000))
        if command.process.poll() is None:
            command.process.send_signal(number)
        ended = await waiting
        killed += number is signal.SIGKILL
        print(f"dlq {' '.join(arguments)}, {number.name}: {ended.code}, {ended.output[-70:]}")
        await asyncio.sleep(0.5)  # until the broker has noticed
        left = await ready(amqp_url, dlq)
        assert COUNT <= left + await ready(amqp_url, queue) <= COUNT + killed * IN_FLIGHT
        if arguments != ("replay",):
            assert COUNT == left

    await run(amqp_url, dlq, "replay", has_progress=False)
    found = await numbers_in(amqp_url, queue)
    assert set(range(COUNT)) == set(found)
    assert len(found) <= COUNT + killed * IN_FLIGHT
    assert 0 == await ready(amqp_url, dlq)
