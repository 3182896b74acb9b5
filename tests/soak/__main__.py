"""Runs a consumer under load through one fault after another, and checks that it does not grow.

``python -m tests.soak [--minutes 60] [--seed 1] [--docs docs]``. It exits with 1 if something was
lost or has grown; the page is written in any case.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import aio_pika

from aio_pika_batch.testing.rabbitmq.processes import kill_group, spawn
from tests.faults.figures import ROOT, this_machine
from tests.faults.load import Load
from tests.faults.trial import SETTINGS
from tests.integration.helpers import ready, take_all, until
from tests.soak.page import Soak, write
from tests.soak.tally import Tally
from tests.support.find import RunningBroker, choose
from tests.support.proxy import Direction, TcpProxy

QUEUE, DEAD = "soak", "soak.dead"
RATE = 400
"""Messages a second that are published."""

DIRECTIONS: tuple[Direction, ...] = ("to_broker", "to_client")

_LOOK_EVERY = 2.0
_BETWEEN = (4.0, 10.0)
"""Seconds from the end of a fault to the next one, at least and at most."""


@dataclass
class SoakRun:
    """The broker, the proxy, the load and the counts of a soak.

    Attributes:
        depth: How many messages waited in the queue, and when.
        faults: What was done, and when.
        dead: How often each message has become a dead letter.
    """

    broker: RunningBroker
    proxy: TcpProxy
    load: Load
    tally: Tally
    rng: random.Random
    depth: list[tuple[float, float]] = field(default_factory=list)
    faults: list[tuple[float, str]] = field(default_factory=list)
    dead: Counter[int] = field(default_factory=Counter)

    # -- faults -----------------------------------------------------------------------------------

    async def hurt(self) -> None:
        """Cause a random fault."""
        ways: dict[str, Callable[[], Awaitable[None]]] = {
            "cut": self._cut,
            "reset in mid-frame": self._reset,
            "broker paused": self._pause,
            "line frozen": self._freeze,
            "closed by an operator": self._close,
        }
        name = self.rng.choice(list(ways))
        self.faults.append((time.time(), name))
        await ways[name]()

    async def _cut(self) -> None:
        self.proxy.cut()

    async def _reset(self) -> None:
        self.proxy.cut_after(self.rng.randrange(1, 20_000), self.rng.choice(DIRECTIONS))

    async def _pause(self) -> None:
        assert self.broker.node is not None
        self.broker.node.pause()
        await asyncio.sleep(self.rng.uniform(1, 4))
        self.broker.node.resume()

    async def _freeze(self) -> None:
        self.proxy.freeze(self.rng.choice(DIRECTIONS))
        await asyncio.sleep(self.rng.uniform(1, 8))  # more than the heartbeat allows, or less
        self.proxy.thaw()

    async def _close(self) -> None:
        assert self.broker.node is not None
        await asyncio.to_thread(self.broker.node.close_all_connections, "maintenance")

    # -- watching ---------------------------------------------------------------------------------

    async def look(self) -> None:
        """Sample the depth of the queue forever; a paused broker is not asked."""
        while True:
            with suppress(Exception):
                async with asyncio.timeout(_LOOK_EVERY):
                    count = await ready(self.broker.url, QUEUE)
                    self.depth.append((time.time(), float(count)))
            await asyncio.sleep(_LOOK_EVERY)

    async def take_dead_letters(self) -> None:
        """Take and count the dead letters."""
        async with await aio_pika.connect(self.broker.url) as connection:
            channel = await connection.channel()
            self.dead += Counter(
                int(each.message_id or "") for each in await take_all(channel, DEAD)
            )

    @property
    def unfinished(self) -> set[int]:
        """Confirmed messages that are neither acked nor dead-lettered."""
        return self.load.confirmed - self.tally.done - self.dead.keys()


async def soak(minutes: float, seed: int, folder: Path, broker: RunningBroker) -> Soak:
    """Run the soak, and return what happened."""
    machine = this_machine()  # before another revision is checked out
    record, samples = folder / "record", folder / "samples"
    parts = urlsplit(broker.url)
    async with TcpProxy(parts.hostname or "", parts.port or 0) as proxy:
        options = {
            **SETTINGS,
            "url": proxy.url(broker.url),
            "queue_name": QUEUE,
            "queue_type": "quorum",
            "dead_letter_queue": DEAD,
            "record": str(record),
            "samples": str(samples),
        }
        async with consumer_process(options, folder / "output") as stop:
            await until(lambda: _is_well(samples), what=(folder / "output").read_text)
            async with Load([broker.url], QUEUE, rate=RATE, minimum=1) as load:
                run = SoakRun(broker, proxy, load, Tally(record), random.Random(seed))
                looking = asyncio.create_task(run.look())
                began = time.time()
                await _go_through_faults(run, began, minutes)
                await load.finish()
                await _come_to_rest(run, samples)
                looking.cancel()
            ended = time.time()
            code = await stop()
    run.tally.read()
    await run.take_dead_letters()
    left = await ready(broker.url, QUEUE)
    curves: dict[str, list[tuple[float, float]]] = {"depth": run.depth}
    for sample in map(json.loads, samples.read_text().splitlines()):
        for name in ("memory", "tasks", "files"):
            curves.setdefault(name, []).append((sample["at"], float(sample[name])))
    return Soak(
        minutes=(ended - began) / 60,
        broker=broker.version,
        machine=machine,
        messages=len(load.confirmed),
        handled=len(load.confirmed & (run.tally.done | run.dead.keys())),
        duplicated=run.tally.repeated + run.dead.total() - len(run.dead),
        lost=len(run.unfinished),
        left=left,
        exit_code=code,
        faults=[(at - began, name) for at, name in run.faults],
        curves={
            name: [(at - began, value) for at, value in points if began <= at <= ended]
            for name, points in curves.items()
        },
    )


async def _go_through_faults(run: SoakRun, began: float, minutes: float) -> None:
    while (passed := time.time() - began) < minutes * 60:
        await run.hurt()
        await asyncio.sleep(run.rng.uniform(*_BETWEEN))
        await run.take_dead_letters()
        run.tally.read()
        print(
            f"{passed / 60:5.1f} min: {len(run.load.confirmed)} confirmed,"
            f" {run.tally.total} answers, {len(run.unfinished)} on their way",
            flush=True,
        )


async def _come_to_rest(run: SoakRun, samples: Path) -> None:
    """Wait until every message is acked or dead-lettered, and nothing is left in the queue."""

    async def all_is_dealt_with() -> bool:
        await run.take_dead_letters()
        run.tally.read()
        return not run.unfinished

    await until(all_is_dealt_with, within=120, what=lambda: str(sorted(run.unfinished)[:20]))
    await until(lambda: _is_well(samples))

    async def nothing_is_left() -> bool:
        run.tally.read()
        seen = run.tally.total
        if await ready(run.broker.url, QUEUE):
            return False
        await asyncio.sleep(1)
        run.tally.read()
        return seen == run.tally.total

    await until(nothing_is_left)


def _is_well(samples: Path) -> bool:
    """Return whether the consumer was healthy in its last sample."""
    if not samples.exists():
        return False
    whole, _, _ = samples.read_text().rpartition("\n")
    return bool(whole) and bool(json.loads(whole.splitlines()[-1])["is_healthy"])


@asynccontextmanager
async def consumer_process(
    options: dict[str, object], output: Path
) -> AsyncIterator[Callable[[], Awaitable[int]]]:
    """Run the consumer; yield a function that stops it gracefully and returns its exit code."""
    command = [sys.executable, "-m", "tests.soak.soak_consumer", json.dumps(options)]
    with output.open("ab") as out:
        process = spawn(command, cwd=ROOT, stdout=out)

    async def stop() -> int:
        process.send_signal(signal.SIGTERM)
        await until(lambda: process.poll() is not None)
        return process.wait()

    try:
        yield stop
    finally:
        kill_group(process)


def main() -> int:
    """Return 1 if something was lost or has grown."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60, help="how long; an hour by default")
    parser.add_argument("--seed", type=int, default=1, help="chooses the faults")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where the page is")
    given = parser.parse_args()
    # Its lines about each cut connection would hide those of this program.
    logging.getLogger("aiormq").setLevel(logging.CRITICAL)
    source = choose()
    if not source.has_node:
        parser.error(f"a soak pauses its broker, and {source.description} must not be paused")
    with tempfile.TemporaryDirectory() as folder, source.start(Path(folder, "broker")) as broker:
        seen = asyncio.run(soak(given.minutes, given.seed, Path(folder), broker))
    write(seen, given.docs)
    for trend in seen.trends:
        print(trend)
    print(f"{seen.messages} messages, {seen.duplicated} duplicated, {seen.lost} lost")
    return 0 if seen.is_well else 1


if __name__ == "__main__":
    sys.exit(main())
