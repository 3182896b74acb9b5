"""Measures what more workers and processes bring: ``python -m benchmarks.scale [--rounds N]``.

It uses a private node and a private cluster of three, with a quorum queue that is filled for each
measurement. It counts what all processes handle while all of them work, which excludes the start
and the last few messages. Each round measures everything once; ratios are taken within a round,
medians over rounds. Writes the tables of ``docs/scaling.md``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median

from aio_pika_batch import BatchConsumer, BatchConsumerSettings, Message, MessageResult
from aio_pika_batch.testing.rabbitmq.find import SERVER, installed
from aio_pika_batch.testing.rabbitmq.node import RabbitMQ
from benchmarks import machine
from benchmarks.environments import ROOT
from benchmarks.fill import connected
from tests.support.cluster import Cluster

PAGE = ROOT / "docs" / "scaling.md"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"

QUEUE = "scale"
BATCH = 100
PAUSE = 0.05
"""Seconds for which a handler that waits does so, for each batch."""

HANDLERS = {
    "waits": f"waits {PAUSE * 1000:.0f} ms for each batch of {BATCH}, as for a database",
    "light": "looks at each body, and waits for nothing",
}
SHAPES = ((1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (2, 4))
"""Processes, and workers in each."""

_QUIET = 0.5  # seconds without a batch: the queue is empty
_PATIENCE = 60.0  # seconds for a process to see its first message


@dataclass(frozen=True)
class Job:
    """The work of one process."""

    url: str
    workers: int
    handler: str


@dataclass(frozen=True)
class Work:
    """What one process has done: the end and size of each batch, and the CPU until then."""

    ended: list[float]
    sizes: list[int]
    cpu: list[float]


@dataclass(frozen=True)
class Seen:
    """A measurement: messages per second of all processes, and their µs of CPU per message."""

    rate: float
    cpu: float


def judge(works: Sequence[Work]) -> Seen:
    """Count what was done while all processes worked.

    Raises:
        ValueError: They never did.
    """
    begin = max(each.ended[0] for each in works)
    end = min(each.ended[-1] for each in works)
    if begin >= end:
        raise ValueError("the processes did not work at the same time: give them more messages")
    messages, cpu = 0, 0.0
    for each in works:
        inside = [index for index, at in enumerate(each.ended) if begin <= at <= end]
        # What ended first was begun before, so that it counts for the clocks only.
        messages += sum(each.sizes[index] for index in inside[1:])
        cpu += each.cpu[inside[-1]] - each.cpu[inside[0]]
    return Seen(messages / (end - begin), 1e6 * cpu / messages)


class Counting(BatchConsumer):
    """Notes the end of each batch."""

    pause: float
    work: Work

    async def process_messages(self, messages: Sequence[Message]) -> AsyncIterator[MessageResult]:
        """Acknowledge everything."""
        if self.pause:
            await asyncio.sleep(self.pause)
        for message in messages:
            memoryview(message.body)
            yield MessageResult.ACK
        self.work.ended.append(time.monotonic())  # one clock for all processes of a machine
        self.work.sizes.append(len(messages))
        self.work.cpu.append(time.process_time())


async def consume(job: Job) -> Work:
    """Consume until the queue is empty."""
    settings = BatchConsumerSettings(
        url=job.url,
        queue_name=QUEUE,
        queue_type="quorum",
        batch_size=BATCH,
        batch_timeout=0.2,
        num_workers=job.workers,
    )
    consumer = Counting(settings)
    consumer.pause = PAUSE if job.handler == "waits" else 0.0
    consumer.work = work = Work([], [], [])
    began = time.monotonic()
    async with consumer:
        while not work.ended or time.monotonic() - work.ended[-1] < _QUIET:
            if not work.ended and time.monotonic() - began > _PATIENCE:
                raise TimeoutError("no message came")
            await asyncio.sleep(0.05)
    return work


def child() -> None:
    """Run one of the processes: report when everything is imported, and begin on a signal."""
    job = Job(**json.loads(sys.argv[2]))
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps(asdict(asyncio.run(consume(job)))), flush=True)


@dataclass(frozen=True)
class Place:
    """A broker: its version, and the URLs to publish and to consume."""

    version: str
    fill: str
    drain: str


@contextmanager
def one_node(server: Path, folder: Path) -> Iterator[Place]:
    """Run a private node."""
    with RabbitMQ(server, folder) as broker:
        yield Place(broker.version, broker.url, broker.url)


@contextmanager
def three_nodes(server: Path, folder: Path) -> Iterator[Place]:
    """Run a private cluster, of which each worker chooses a node."""
    with Cluster(server, folder) as cluster:
        yield Place(cluster.version, cluster.nodes[0].url, cluster.url)


def measure(at: Place, processes: int, workers: int, handler: str) -> Seen:
    """Fill the queue, and empty it."""
    count = 30_000 if handler == "light" else round(1.5 * BATCH / PAUSE) * processes * workers
    with connected(at.fill) as filler:
        filler.delete(QUEUE)
        filler.make(QUEUE, "quorum")
        filler.fill(QUEUE, count, 256)
    job = json.dumps(asdict(Job(at.drain, workers, handler)))
    command = [sys.executable, "-m", "benchmarks.scale", "--child", job]
    children = [
        subprocess.Popen(  # noqa: S603  -- ourselves
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(processes)
    ]
    try:
        for each in children:
            assert each.stdout is not None
            each.stdout.readline()
        for each in children:
            assert each.stdin is not None
            each.stdin.write("go\n")
            each.stdin.flush()
        works = [Work(**json.loads(each.communicate(timeout=120)[0])) for each in children]
    finally:
        for each in children:
            each.kill()
            each.wait()
    return judge(works)


PLACES = {"one node": one_node, "three nodes": three_nodes}

Figures = dict[tuple[str, str, tuple[int, int]], list[Seen]]


def table(figures: Figures, place: str, handler: str) -> str:
    """Return the medians of one broker and one handler."""
    base = figures[place, handler, SHAPES[0]]
    lines = [
        f"**{place.capitalize()}; the handler {HANDLERS[handler]}**",
        "",
        "| processes × workers | messages/s | × of 1 × 1 | µs CPU per message |",
        "| --- | ---: | ---: | ---: |",
    ]
    for shape in SHAPES:
        rounds = figures[place, handler, shape]
        rates = [each.rate for each in rounds]
        ratio = median(one.rate / of.rate for one, of in zip(rounds, base, strict=True))
        shown = f"{shape[0]} × {shape[1]}"
        lines.append(
            f"| {shown} | {median(rates):,.0f} ({min(rates):,.0f}–{max(rates):,.0f})"
            f" | {ratio:.2f} | {median(each.cpu for each in rounds):.1f} |"
        )
    return "\n".join(lines)


def write(figures: Figures, about: str) -> None:
    """Write all tables between the marks of the page."""
    places = dict.fromkeys(place for place, _, _ in figures)
    tables = [table(figures, place, handler) for place in places for handler in HANDLERS]
    text = "\n\n".join([BEGIN, about, *tables, END])
    page = PAGE.read_text()
    pattern = f"{re.escape(BEGIN)}.*{re.escape(END)}"
    PAGE.write_text(re.sub(pattern, lambda _: text, page, flags=re.DOTALL))


def _server() -> Path:
    server = Path(os.environ[SERVER]) if SERVER in os.environ else installed()
    if server is None:
        raise SystemExit("install rabbitmq-server, or name its start script in " + SERVER)
    return server


def main() -> None:
    """Measure everything, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    before = machine.load()
    server = _server()
    figures: Figures = {}
    version = ""
    for name, start in PLACES.items():
        with (
            tempfile.TemporaryDirectory(prefix="scale-", ignore_cleanup_errors=True) as folder,
            start(server, Path(folder, "broker")) as place,
        ):
            version = place.version
            for number, handler, shape in product(range(rounds), HANDLERS, SHAPES):
                seen = measure(place, *shape, handler)
                figures.setdefault((name, handler, shape), []).append(seen)
                print(number, name, handler, shape, seen, flush=True)
    known = machine.describe("", before)
    about = (
        f"{known['date']}; {known['processor']}; {known['Python']}; RabbitMQ {version},"
        f" broker and clients on the same machine; quorum queue, 256-byte bodies, batches of"
        f" {BATCH}; medians of {rounds} rounds, the least and the greatest in brackets; load"
        f" before: {before}."
    )
    write(figures, about)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child()
    else:
        main()
