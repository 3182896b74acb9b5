"""Exactly-once effects while workers, the broker and the database are killed in turn.

`AIO_PIKA_BATCH_TEST_KILLS` is the number of kills, and `AIO_PIKA_BATCH_TEST_MESSAGES` that of the
messages; ``nox -s exactly_once`` makes them 100 and 200,000.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg
import pytest

from aio_pika_batch import Outcome, Publication, TransportError
from aio_pika_batch.inbox import Inbox
from aio_pika_batch.outbox import Outbox
from aio_pika_batch.testing.rabbitmq.processes import kill_group, spawn
from aio_pika_batch.transport import Endpoint, Queue, Topology, open_transport
from tests.integration.helpers import until
from tests.support.postgres import PostgresServer, private_postgres

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator

APPS = Path(__file__).parent / "apps"
KILLS = int(os.environ.get("AIO_PIKA_BATCH_TEST_KILLS", "6"))
MESSAGES = int(os.environ.get("AIO_PIKA_BATCH_TEST_MESSAGES", "6000"))
TABLES = ("effects", "downstream", "control")
COUNT = {table: f"SELECT count(*) FROM {table}" for table in TABLES}  # noqa: S608  -- constants
DISTINCT = {
    table: f"SELECT count(DISTINCT number) FROM {table}"  # noqa: S608  -- constants
    for table in TABLES
}
ROLES = ("chain", "chain", "relay", "downstream", "control")
"""Two processes share the queue, and any of the five can be the one that is killed."""


@pytest.fixture
def postgres() -> Iterator[PostgresServer]:
    """A server that may be killed."""
    with private_postgres() as server:
        yield server


class Processes:
    """One process for each role, started again when it is killed."""

    def __init__(self, url: str, dsn: str, queue: str, log: Path) -> None:
        self._environment = {**os.environ, "AIO_PIKA_BATCH_URL": url, "DSN": dsn}
        self._queue = queue
        self._log = log
        self.running = [self._start(role) for role in ROLES]

    def _start(self, role: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(APPS / "exactly_once.py"), role, self._queue]
        with (self._log / f"{role}.log").open("ab") as output:
            return spawn(command, cwd=APPS, env=self._environment, stdout=output)

    def kill(self, at: int) -> None:
        """Kill one by SIGKILL, and start it again."""
        kill_group(self.running[at])
        self.running[at] = self._start(ROLES[at])

    def revive(self) -> None:
        """Start again what has ended by itself: at its start, a broker that is away is fatal."""
        for at, process in enumerate(self.running):
            if process.poll() is not None:
                self.running[at] = self._start(ROLES[at])

    def stop(self) -> None:
        for process in self.running:
            process.send_signal(signal.SIGTERM)
        for process in self.running:
            process.wait(60)


async def publish(url: str, queue: str, numbers: range) -> None:
    """Publish each number for the chain and for the control, until all are confirmed."""
    left = [
        Publication(b"%d" % number, routing_key=each, message_id=f"message-{number}")
        for number in numbers
        for each in (queue, f"{queue}.control")
    ]
    while left:
        try:
            async with open_transport(Endpoint(url=url)).publisher() as publisher:
                outcomes = await publisher.publish(left)
        except TransportError:
            await asyncio.sleep(0.5)
            continue
        pairs = zip(left, outcomes, strict=True)
        left = [each for each, outcome in pairs if outcome is not Outcome.CONFIRMED]


@pytest.mark.long
@pytest.mark.needs_node
async def test_effects_equal_messages(rabbitmq, amqp_url, name, postgres, tmp_path) -> None:
    """Each effect is there once, in the table of the chain and in the one behind its outbox.

    The control, without an inbox, shows that the kills did repeat messages.
    """
    drawn = random.Random(name)
    queues = [name, f"{name}.control", f"{name}.downstream"]
    await open_transport(Endpoint(url=amqp_url)).declare(
        Topology(queues=tuple(Queue(each, durable=True) for each in queues))
    )
    setup = await asyncpg.connect(postgres.url)
    for table in TABLES:
        await setup.execute(f"CREATE TABLE {table} (number integer)")
    await Inbox("chain").create(setup)
    await Outbox().create(setup)
    await setup.close()

    processes = Processes(amqp_url, postgres.url, name, tmp_path)
    killed: Counter[str] = Counter()
    try:
        share = MESSAGES // (KILLS + 1)
        for kill in range(KILLS):
            await publish(amqp_url, name, range(kill * share, (kill + 1) * share))
            await asyncio.sleep(drawn.uniform(0.02, 1.0))
            match kill % 3:
                case 0:
                    at = drawn.randrange(len(ROLES))
                    processes.kill(at)
                    killed[ROLES[at]] += 1
                case 1:
                    rabbitmq.kill()
                    await asyncio.to_thread(rabbitmq.start)
                    killed["broker"] += 1
                case _:
                    postgres.kill()
                    await asyncio.sleep(drawn.uniform(0.0, 0.5))
                    await asyncio.to_thread(postgres.start)
                    killed["database"] += 1
            processes.revive()
        await publish(amqp_url, name, range(KILLS * share, MESSAGES))

        connection = await asyncpg.connect(postgres.url)

        async def all_there() -> bool:
            processes.revive()
            counts = [await connection.fetchval(each) for each in DISTINCT.values()]
            return [*counts, await Outbox().count(connection)] == [*[MESSAGES] * 3, 0]

        await until(all_there, within=300)
        # What is still to be delivered again must find its effects done.
        await asyncio.sleep(2)
    finally:
        processes.stop()
    rows = {table: await connection.fetchval(each) for table, each in COUNT.items()}
    await connection.close()
    sys.stdout.write(f"{MESSAGES} messages, killed {dict(killed)}, rows {rows}\n")
    assert (MESSAGES, MESSAGES) == (rows["effects"], rows["downstream"])
    assert rows["control"] >= MESSAGES
    if KILLS >= 30:
        assert rows["control"] > MESSAGES
