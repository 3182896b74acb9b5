"""The command `relay`, from a database to a real RabbitMQ."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import aiosqlite
import pytest

from aio_pika_batch import Publication
from aio_pika_batch.outbox import Outbox
from aio_pika_batch.testing.rabbitmq.processes import spawn
from tests.integration.helpers import holds, take_all

if TYPE_CHECKING:
    from collections.abc import Iterator

APPS = Path(__file__).parent / "apps"


@contextmanager
def relay(url: str, database: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run one."""
    own = {"AIO_PIKA_BATCH_URL": url, "DATABASE": str(database)}
    command = [sys.executable, "-m", "aio_pika_batch", "relay", "outbox:relay", *arguments]
    process = spawn(command, cwd=APPS, env={**os.environ, **own})
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        assert 0 == process.wait(30)


@pytest.mark.parametrize(
    "arguments", [pytest.param((), marks=pytest.mark.long), ("--processes", "2")]
)
async def test_a_relay_publishes_what_is_committed(
    amqp_url, channel, name, tmp_path, arguments
) -> None:
    """Alone, or in supervised processes that share the work."""
    database, outbox = tmp_path / "test.sqlite", Outbox()
    await channel.declare_queue(name, durable=True)
    async with aiosqlite.connect(database) as connection:
        await outbox.create(connection)
        bodies = [b"%d" % number for number in range(2500)]
        await outbox.add(connection, [Publication(each, routing_key=name) for each in bodies])
        await connection.commit()
        with relay(amqp_url, database, *arguments):
            taken = await take_all(channel, name, len(bodies))
        assert 0 == await outbox.count(connection)
    assert bodies == [each.body for each in taken]
    assert len(bodies) == len({each.message_id for each in taken})
    await holds(amqp_url, name, 0)
