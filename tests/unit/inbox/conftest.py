"""A consumer's inbox on a database in a file, and a broker in memory."""

from __future__ import annotations

import pytest

from aio_pika_batch.inbox import Inbox
from tests.support.databases import EFFECTS
from tests.unit.inbox.sqlite import Connection
from tests.unit.shell.helpers import QueueBroker


@pytest.fixture
def rabbit():
    """A broker with a queue for dead letters."""
    made = QueueBroker()
    made.declare()
    made.declare("dead")
    return made


@pytest.fixture
def path(tmp_path):
    """Of the database."""
    return tmp_path / "test.sqlite"


@pytest.fixture
async def connection(path):
    """A connection to it."""
    async with Connection(path) as made:
        yield made


@pytest.fixture
async def inbox(connection):
    """With its table, and one for effects."""
    made = Inbox("orders")
    await made.create(connection)
    await connection.execute_fetchall(EFFECTS)
    return made
