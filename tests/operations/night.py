"""A night in 20 minutes: two supervised processes, and everything that can happen to them.

``python -m tests.operations.night [--minutes 20] [--seed 1] [--docs docs]``, or ``nox -s night``.

Processes are killed and stopped, the supervisor is paused, its folder of metrics is removed,
hostile clients connect to its probes, its output is closed, and messages try to forge its log.
Meanwhile a real Prometheus evaluates `deploy/prometheus/alerts.yaml`. It exits with 1 if a message
was lost, if nothing was consumed for 10 s, if memory has grown, or if another alert fired than
should.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from textwrap import fill
from urllib.error import HTTPError
from urllib.request import urlopen

from aio_pika_batch.core.publication import Outcome, Publication
from aio_pika_batch.testing.rabbitmq.processes import LOCALHOST, free_port, kill_group, spawn
from aio_pika_batch.transport import Endpoint, Subscription, open_transport
from tests.faults.figures import ROOT, this_machine
from tests.faults.report import between_marks
from tests.integration.helpers import ready
from tests.support.find import choose
from tests.support.prometheus import Prometheus, prometheus

QUEUE, DEAD = "night", "night.dead"
RATE = 50
"""Messages a second."""

PROCESSES = 2
HUNG_AFTER = 10.0
GAP = 10.0
"""Seconds without a handled message that are allowed, unless all processes were killed."""

SHOULD_FIRE = {"AioPikaBatchDeadLetters", "AioPikaBatchProcessCrashes"}
BEGIN, END = "<!-- night: begin -->", "<!-- night: end -->"

FORGED = "2001-01-01 00:00:00,000 ERROR    aio_pika_batch.consumer: FORGED"
HOSTILE = f"x\n{FORGED}\r\x1b[31m{FORGED}\u2028{FORGED}\x85{FORGED}\u202e"

_RECORD = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} |    ")
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202e]")


@dataclass
class Night:
    """What is under way, and what was seen."""

    url: str
    folder: Path
    port: int
    random: random.Random
    supervisor: int = 0
    published: list[int] = field(default_factory=list)
    refused: set[int] = field(default_factory=set)
    events: list[tuple[float, str]] = field(default_factory=list)
    excused: list[tuple[float, float]] = field(default_factory=list)
    probes: list[float] = field(default_factory=list)
    memory: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    fired: dict[str, float] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    last_drain: float | None = None
    is_paused: bool = False
    is_over: asyncio.Event = field(default_factory=asyncio.Event)

    # -- the processes ------------------------------------------------------------------------

    def children(self) -> list[int]:
        """Return the processes of the supervisor."""
        with suppress(OSError):
            listed = Path(f"/proc/{self.supervisor}/task/{self.supervisor}/children").read_text()
            return [int(each) for each in listed.split()]
        return []

    def probe(self, path: str) -> int:
        """Return the status of an endpoint; 0 without an answer."""
        try:
            with urlopen(f"http://{LOCALHOST}:{self.port}{path}", timeout=5) as answer:
                return int(answer.status)
        except HTTPError as error:
            return error.code
        except OSError:
            return 0

    async def recovers(self, what: str) -> None:
        """Wait until all processes are ready."""
        await asyncio.sleep(2)  # until the supervisor has noticed
        for _ in range(1200):
            is_ready = await asyncio.to_thread(self.probe, "/readyz") == 200
            if is_ready and len(self.children()) == PROCESSES:
                return
            await asyncio.sleep(0.1)
        self.faults.append(f"not ready 120 s after: {what}")

    # -- what happens -------------------------------------------------------------------------

    async def kill_one(self) -> None:
        """Kill a process."""
        os.kill(self.random.choice(self.children()), signal.SIGKILL)

    async def kill_all(self) -> None:
        """Kill all processes at once."""
        began = time.time()
        for child in self.children():
            os.kill(child, signal.SIGKILL)
        await self.recovers("all processes were killed")
        self.excused.append((began, time.time() + 2))

    async def stop_one(self) -> None:
        """Stop a process, which is then killed as hung."""
        child = self.random.choice(self.children())
        os.kill(child, signal.SIGSTOP)
        for _ in range(400):
            await asyncio.sleep(0.1)
            if child not in self.children():
                return
        self.faults.append("a stopped process was not replaced within 40 s")
        os.kill(child, signal.SIGKILL)

    async def pause_supervisor(self) -> None:
        """Pause the supervisor, and perhaps kill a process meanwhile."""
        self.is_paused = True
        before = self.children()
        os.kill(self.supervisor, signal.SIGSTOP)
        kills = self.random.random() < 0.5
        if kills:
            os.kill(before[0], signal.SIGKILL)
        await asyncio.sleep(self.random.uniform(3, 2 * HUNG_AFTER))
        os.kill(self.supervisor, signal.SIGCONT)
        self.is_paused = False
        await asyncio.sleep(HUNG_AFTER / 2)
        gone = set(before) - set(self.children())
        if len(gone) > kills:
            self.faults.append("a healthy process was killed after a pause of the supervisor")

    async def remove_metrics(self) -> None:
        """Remove the folder of metrics, as a cleaner of temporary files does."""
        for folder in (self.folder / "tmp").glob("aio-pika-batch-metrics-*"):
            shutil.rmtree(folder, ignore_errors=True)

    async def hostile_clients(self) -> None:
        """Open 300 connections to the probes: idle ones, slow ones, and random bytes."""
        clients = []
        for number in range(300):
            client = socket.socket()
            client.setblocking(False)
            clients.append(client)
            with suppress(OSError):
                client.connect((LOCALHOST, self.port))
            await asyncio.sleep(0.005)
            with suppress(OSError):
                match number % 3:
                    case 0:
                        client.send(b"GET /livez HTTP/1.1\r\nx: ")
                    case 1:
                        client.send(self.random.randbytes(2000))
        for _ in range(8):
            await asyncio.sleep(1)
            for client in clients[::3]:
                with suppress(OSError):
                    client.send(b"x")
        for client in clients:
            client.close()

    async def roll(self) -> None:
        """Replace the processes one by one."""
        os.kill(self.supervisor, signal.SIGHUP)
        await asyncio.sleep(5)

    async def happen(self, minutes: float, close: Callable[[], None]) -> None:
        """Let one thing after another happen, in rounds of a random order."""
        ways: list[Callable[[], Awaitable[None]]] = [
            self.kill_one,
            self.kill_one,
            self.stop_one,
            self.pause_supervisor,
            self.remove_metrics,
            self.hostile_clients,
            self.roll,
            self.kill_all,
        ]
        began = time.time()
        is_closed = False
        while True:
            for way in self.random.sample(ways, len(ways)):
                if time.time() - began > minutes * 60:
                    return
                if not is_closed and time.time() - began > minutes * 45:
                    is_closed = True
                    self.events.append((time.time(), "closed streams"))
                    close()
                what = way.__name__.replace("_", " ")
                self.events.append((time.time(), what))
                await way()
                await self.recovers(what)
                await asyncio.sleep(self.random.uniform(3, 8))

    # -- what is watched ----------------------------------------------------------------------

    async def publish(self) -> None:
        """Publish orders, hostile ones among them, until the night is over."""
        transport = open_transport(Endpoint(url=self.url))
        async with transport.publisher() as publisher:
            number, began = 0, time.monotonic()
            while not self.is_over.is_set():
                due = int((time.monotonic() - began) * RATE) - number
                orders = [self._order(each) for each in range(number, number + due)]
                assert {Outcome.CONFIRMED} >= set(await publisher.publish(orders))
                self.published += range(number, number + due)
                number += due
                await asyncio.sleep(0.1)

    def _order(self, number: int) -> Publication:
        kind = "good"
        if number % 1000 == 500:
            kind = "impossible"
        elif number % 100 == 50:
            kind = "hostile"
        if kind != "good":
            self.refused.add(number)
        body = b"{}" if kind == "good" else HOSTILE.encode()
        kind_and_id = {"type": kind, "message_id": str(number)}
        return Publication(body, routing_key=QUEUE, **kind_and_id)

    async def watch(self, server: Prometheus) -> None:
        """Look at probes, memory and alerts until the night is over."""
        while not self.is_over.is_set():
            if not self.is_paused:
                began = time.monotonic()
                status = await asyncio.to_thread(self.probe, "/livez")
                seconds = time.monotonic() - began
                if not self.is_paused:
                    self.probes.append(seconds)
                    if status != 200:
                        self.faults.append(f"/livez: {status} after {seconds:.1f} s")
            self._measure("supervisor", self.supervisor)
            for child in self.children():
                self._measure("processes", child)
            firing = await asyncio.to_thread(server.ask, 'ALERTS{alertstate="firing"}')
            for each in firing:
                self.fired.setdefault(each["metric"]["alertname"], time.time())
            await asyncio.sleep(1)

    def _measure(self, what: str, pid: int) -> None:
        with suppress(OSError):
            found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
            if found and int(found[1]) > 20_000:  # one that starts is still small
                self.memory.setdefault(what, []).append((time.time(), int(found[1]) / 1024))

    # -- what is judged -----------------------------------------------------------------------

    def growth(self, what: str) -> tuple[float, float]:
        """Return the median memory in MiB in the second quarter of the night, and in the last."""
        values = [value for _, value in self.memory[what]]
        quarter = len(values) // 4
        return (
            statistics.median(values[quarter : 2 * quarter]),
            statistics.median(values[3 * quarter :]),
        )

    def longest_gap(self, handled: list[float]) -> float:
        """Return the longest time without a handled message while not all were killed."""
        moments = sorted(handled)
        gaps = [0.0]
        for earlier, later in pairwise(moments):
            if not any(earlier < end and later > start for start, end in self.excused):
                gaps.append(later - earlier)
        return max(gaps)

    def forged(self) -> list[str]:
        """Return the lines of the log that a message has made."""
        raw = (self.folder / "log.txt").read_text(errors="replace")
        lines = [line for line in raw.split("\n") if line][:-1]  # the last was cut off
        return [line for line in lines if not _RECORD.match(line) or _CONTROL.search(line)] + [
            line for line in lines if line.startswith(FORGED[:10])
        ]


async def pump(read: int, file: Path, closed: asyncio.Event) -> None:
    """Copy a pipe into a file until that is closed from here."""
    os.set_blocking(read, False)
    with file.open("wb") as copy:
        while not closed.is_set():
            with suppress(BlockingIOError):
                while data := os.read(read, 65536):
                    copy.write(data)
            await asyncio.sleep(0.05)
    os.close(read)


@asynccontextmanager
async def supervised(night: Night) -> AsyncIterator[Callable[[], None]]:
    """Run the supervisor; yields what closes both of its streams."""
    (night.folder / "tmp").mkdir()
    streams = [os.pipe(), os.pipe()]
    settings = {
        "URL": night.url,
        "QUEUE_NAME": QUEUE,
        "QUEUE_TYPE": "quorum",
        "DEAD_LETTER_QUEUE": DEAD,
        "BATCH_SIZE": "20",
        "BATCH_TIMEOUT": "0.2",
        "ISOLATE_FAILURES": "true",
        "MAX_REQUEUE_ATTEMPTS": "1",
        "REQUEUE_DELAY": "0",
    }
    command = [sys.executable, "-m", "aio_pika_batch", "run", "night_consumer:Importer"]
    options = ["--processes", PROCESSES, "--health-port", night.port, "--hung-after", HUNG_AFTER]
    process = spawn(
        [*command, *map(str, options), "--log-format", "console"],
        cwd=Path(__file__).parent,
        stdout=streams[0][1],
        stderr=streams[1][1],
        env={
            **os.environ,
            **{f"AIO_PIKA_BATCH_{name}": value for name, value in settings.items()},
            "NIGHT_RECORD": str(night.folder / "record.txt"),
            "TMPDIR": str(night.folder / "tmp"),
        },
    )
    for _, write in streams:
        os.close(write)
    night.supervisor = process.pid
    closed = asyncio.Event()
    names = ("output.txt", "log.txt")
    pumps = [
        asyncio.create_task(pump(read, night.folder / name, closed))
        for (read, _), name in zip(streams, names, strict=True)
    ]
    try:
        await night.recovers("the start")
        yield closed.set
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        code = await asyncio.to_thread(process.wait, 60)
        if code != 0:
            night.faults.append(f"the supervisor ended with {code}")
        night.last_drain = time.monotonic() - began
    finally:
        kill_group(process)
        closed.set()
        await asyncio.gather(*pumps)


async def numbers_in(url: str, queue: str) -> list[int]:
    """Return the numbers of all messages in a queue."""
    count = await ready(url, queue)
    found: list[int] = []
    subscription = Subscription(queue=queue, prefetch=0, consumer_tag="count")
    async with open_transport(Endpoint(url=url)).session(subscription) as session:
        while len(found) < count:
            async for chunk in session:
                found += [int(message.message_id or "") for message in chunk]
                if len(found) >= count:
                    break
    return found


async def run(url: str, folder: Path, minutes: float, seed: int) -> tuple[Night, dict[str, object]]:
    """Let a night pass, and return its figures."""
    night = Night(url, folder, free_port(), random.Random(seed))
    deploy = ROOT / "deploy" / "prometheus"
    for name in ("prometheus.yaml", "alerts.yaml"):
        shutil.copy(deploy / name, folder)
    async with supervised(night) as close:
        target = f"{LOCALHOST}:{night.port}"
        opened = prometheus(target, folder, folder / "prometheus.yaml", interval="5s")
        server = await asyncio.to_thread(opened.__enter__)
        try:
            tasks = [
                asyncio.create_task(night.publish()),
                asyncio.create_task(night.watch(server)),
            ]
            await asyncio.sleep(5)
            await night.happen(minutes, close)
            night.is_over.set()
            await asyncio.gather(*tasks)
        finally:
            await asyncio.to_thread(opened.__exit__, None, None, None)
        for _ in range(600):
            if await ready(url, QUEUE) == 0:
                break
            await asyncio.sleep(0.1)
        await asyncio.sleep(2)
    return night, await judge(night, minutes)


async def judge(night: Night, minutes: float) -> dict[str, object]:
    """Return the figures, and add what is wrong to the faults."""
    lines = [each.split() for each in (night.folder / "record.txt").read_text().splitlines()]
    handled = Counter(int(number) for _, _, number in lines)
    dead = Counter(await numbers_in(night.url, DEAD))
    left = await ready(night.url, QUEUE)
    lost = set(night.published) - set(handled) - set(dead)
    gap = night.longest_gap([float(moment) for moment, _, _ in lines])
    forged = night.forged()
    growth = {what: night.growth(what) for what in night.memory}
    faults = night.faults
    if lost or left:
        faults.append(f"{len(lost)} messages are lost, {left} left in the queue")
    if set(dead) != night.refused:
        faults.append(f"dead letters differ: {sorted(set(dead) ^ night.refused)[:10]}")
    if gap > GAP:
        faults.append(f"nothing was consumed for {gap:.1f} s")
    if forged:
        faults.append(f"{len(forged)} lines of the log are forged: {forged[:3]!r}")
    for what, (before, after) in growth.items():
        if after > 1.1 * before + 2:
            faults.append(f"memory of {what} has grown from {before:.1f} to {after:.1f} MiB")
    if set(night.fired) != SHOULD_FIRE:
        faults.append(f"alerts that fired: {sorted(night.fired)}")
    return {
        "minutes": minutes,
        "messages": len(night.published),
        "handled": len(handled),
        "dead": len(dead),
        "lost": len(lost),
        "again": sum(handled.values()) - len(handled) + sum(dead.values()) - len(dead),
        "gap": gap,
        "slowest probe": max(night.probes),
        "probes": len(night.probes),
        "memory": growth,
        "events": dict(Counter(what for _, what in night.events)),
        "fired": sorted(night.fired),
        "last drain": night.last_drain,
    }


def page(figures: dict[str, object], broker: str) -> str:
    """Return the figures as a table."""
    machine = this_machine()
    memory = figures["memory"]
    assert isinstance(memory, dict)
    rows = {
        "messages published, all confirmed": figures["messages"],
        "lost": figures["lost"],
        "handled again": figures["again"],
        "dead letters, all of them hostile messages": figures["dead"],
        "longest time without a handled message, unless all processes were killed": (
            f"{figures['gap']:.1f} s"
        ),
        "slowest answer of `/livez`, while the supervisor ran": f"{figures['slowest probe']:.2f} s",
        **{
            f"memory of the {what}, second quarter and last": f"{one:.0f} MiB, {other:.0f} MiB"
            for what, (one, other) in memory.items()
        },
        "the drain at the end": f"{figures['last drain']:.1f} s",
        "alerts that fired": ", ".join(map(str, figures["fired"])),
    }
    events = ", ".join(f"{what} {count}×" for what, count in figures["events"].items())
    where = f"RabbitMQ {broker} and {machine.processors} processors, revision {machine.revision}"
    lines = [
        f"{figures['minutes']:g} minutes on {where}:",
        "",
        "| seen | |",
        "| --- | ---: |",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        "",
        fill(f"What happened: {events}.", 100),
    ]
    return "\n".join(lines)


def main() -> int:
    """Run a night, print its figures, and write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--docs", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, choose().start(Path(name)) as broker:
        folder = Path(name) / "night"
        folder.mkdir()
        night, figures = asyncio.run(run(broker.url, folder, options.minutes, options.seed))
        print(json.dumps(figures, indent=2))
        for fault in night.faults:
            print(f"FAULT: {fault}")
        if options.docs and not night.faults:
            file = options.docs / "reliability.md"
            text = between_marks(
                file.read_text(), page(figures, broker.version), begin=BEGIN, end=END
            )
            file.write_text(text)
        if night.faults:
            shutil.copytree(folder, "night-failed", dirs_exist_ok=True)
    return 1 if night.faults else 0


if __name__ == "__main__":
    sys.exit(main())
