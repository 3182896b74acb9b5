"""Outboxes and their relays on each database, by each driver."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING

import pytest

from aio_pika_batch import ConfigurationError, Publication, TopologyError
from aio_pika_batch.databases.connections import adapt
from aio_pika_batch.outbox import Outbox, OutboxRelay, OutboxRelaySettings
from aio_pika_batch.testing import BatchBroker
from aio_pika_batch.transport import Subscription
from tests.integration.helpers import until
from tests.support.databases import DRIVERS, ON_MARIADB, ON_POSTGRES, ON_SQLITE, by, database

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.databases import TestDatabase


@pytest.fixture(params=by(*DRIVERS))
async def db(request, tmp_path) -> AsyncIterator[TestDatabase]:
    """A database, by each driver."""
    driver = request.param
    if driver in ON_SQLITE:
        url = str(tmp_path / "test.sqlite")
    else:
        url = request.getfixturevalue("mariadb_url" if driver in ON_MARIADB else "postgres_url")
    async with database(driver, url) as found:
        yield found


@pytest.fixture
async def outbox(db) -> AsyncIterator[Outbox]:
    """An outbox with tables of its own."""
    made = Outbox(table=f"outbox_{uuid.uuid4().hex[:12]}")
    async with db.transaction() as connection:
        await made.create(connection)
    yield made
    async with db.transaction() as connection:
        for table in (made.table, f"{made.table}_lanes", f"{made.table}_lease"):
            await adapt(connection).execute(f"DROP TABLE IF EXISTS {table}", {})


@pytest.fixture
def broker():
    """One in memory, with a queue."""
    made = BatchBroker()
    made.declare("orders")
    return made


def relay(db, outbox, broker, **given):
    """A relay from the database to the broker."""
    given = {"url": "memory://", "poll_interval": 0.05, "reconnect_delay": 0.1} | given
    return OutboxRelay(outbox, db.connect, OutboxRelaySettings(**given), transport=broker.transport)


def numbered(count, first=0, **given):
    """Publications to the queue."""
    given = {"routing_key": "orders"} | given
    return [Publication(b"%d" % number, **given) for number in range(first, first + count)]


async def waiting(db, outbox):
    """How many wait."""
    async with db.transaction() as connection:
        return await outbox.count(connection)


def bodies(broker, queue="orders"):
    """What a queue has."""
    return [each.body for each in broker.broker.ready(queue)]


async def test_what_is_committed_is_published(db, outbox, broker):
    """In the order in which it was added, and then it is gone. What is rolled back is not."""

    async def fail():
        async with db.transaction() as connection:
            await outbox.add(connection, numbered(3, first=100))
            raise ZeroDivisionError

    async with db.transaction() as connection:
        await outbox.create(connection)  # it is there already
        await outbox.add(connection, numbered(2))
    with pytest.raises(ZeroDivisionError):
        await fail()
    async with relay(db, outbox, broker):
        await until(lambda: len(bodies(broker)) == 2)
        async with db.transaction() as connection:
            await outbox.add(connection, numbered(2, first=2))
        await until(lambda: len(bodies(broker)) == 4)
    assert [b"0", b"1", b"2", b"3"] == bodies(broker)
    assert 0 == await waiting(db, outbox)


async def test_each_property_is_kept(db, outbox, broker):
    """And a message gets an id, if it has none."""
    headers = {
        "text": "é😀",
        "flag": True,
        "nothing": None,
        "bytes": b"\x00\xff",
        "decimal": Decimal("1.5"),
        "time": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        "list": [1, {"$bytes": "no bytes", "x": 2.5}],
        "table": {"deep": b"x"},
    }
    whole = Publication(
        b"\x00\xff",
        routing_key="orders",
        headers=headers,
        content_type="text/plain",
        content_encoding="utf-8",
        delivery_mode=1,
        priority=5,
        correlation_id="c",
        reply_to="r",
        expiration=timedelta(seconds=60),
        message_id="own",
        timestamp=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        type="t",
        app_id="a",
    )
    async with db.transaction() as connection:
        await outbox.add(connection, [whole, *numbered(1)])
    async with relay(db, outbox, broker):
        await until(lambda: len(bodies(broker)) == 2)
    first, second = broker.drain("orders")
    assert whole.properties == first.properties
    assert b"\x00\xff" == first.body
    assert 32 == len(second.properties.message_id)
    assert (None, 2) == (second.properties.headers, second.properties.delivery_mode)


async def test_a_key_keeps_its_order(db, outbox, broker):
    """Although its first message is refused at first; others do not wait for it."""
    async with db.transaction() as connection:
        await outbox.add(
            connection,
            [
                *numbered(1, routing_key="later"),
                *numbered(2, first=1, routing_key="orders"),
                *numbered(2, first=3, routing_key="later"),
            ],
            key=lambda each: each.routing_key,
        )
        await outbox.add(connection, numbered(1, first=5))
    async with relay(db, outbox, broker):
        await until(lambda: len(bodies(broker)) == 3)
        broker.declare("later")
        async with db.transaction() as connection:
            await outbox.add(
                connection, numbered(1, first=6, routing_key="later"), key=lambda _: "later"
            )
        await until(lambda: len(bodies(broker, "later")) == 4)
    assert {b"1", b"2", b"5"} == set(bodies(broker))
    assert bodies(broker).index(b"1") < bodies(broker).index(b"2")
    assert [b"0", b"3", b"4", b"6"] == bodies(broker, "later")
    assert 0 == await waiting(db, outbox)


async def test_an_unroutable_row_waits_and_holds_nothing_up(db, outbox, broker):
    """It is tried again after a pause that grows."""
    async with db.transaction() as connection:
        await outbox.add(connection, numbered(3, routing_key="nowhere"))
        await outbox.add(connection, numbered(3))
    async with relay(db, outbox, broker, batch_size=2):
        await until(lambda: len(bodies(broker)) == 3)

        async def only_three_wait():
            return await waiting(db, outbox) == 3

        await until(only_three_wait)
        broker.declare("nowhere")
        await until(lambda: len(bodies(broker, "nowhere")) == 3)
    assert 0 == await waiting(db, outbox)


async def test_a_broker_that_goes_away_loses_nothing(db, outbox, broker):
    """The relay comes back, and knows meanwhile that it isn't well."""
    async with relay(db, outbox, broker) as running:
        assert running.is_healthy
        with broker.down():
            async with db.transaction() as connection:
                await outbox.add(connection, numbered(5))
            await until(lambda: not running.is_healthy)
        await until(lambda: len(bodies(broker)) == 5)
        await until(lambda: running.is_healthy)


async def test_a_table_that_is_not_there_is_an_error_at_the_start(db, broker):
    """It says what to do."""
    with pytest.raises(TopologyError, match=r"create it by Outbox\.create"):
        await relay(db, Outbox(table="nowhere"), broker).start()


@pytest.mark.parametrize("db", ["asyncpg"], indirect=True)
async def test_adding_without_a_transaction_is_refused(db, outbox):
    """Where the driver can tell."""
    async with db.connect() as connection:
        with pytest.raises(ConfigurationError, match="no transaction"):
            await outbox.add(connection, numbered(1))


@pytest.mark.parametrize("db", by(*ON_POSTGRES, *ON_MARIADB), indirect=True)
async def test_relays_share_the_work(db, outbox, broker):
    """Each message is published once, and those of a key in their order."""
    async with db.transaction() as connection:
        await outbox.add(connection, numbered(300))
        keyed = [
            Publication(b"%d %d" % (key, number), routing_key="orders")
            for number in range(10)
            for key in range(30)
        ]
        await outbox.add(connection, keyed, key=lambda each: each.body.split()[0].decode())
    first = relay(db, outbox, broker, batch_size=40)
    second = relay(db, outbox, broker, batch_size=40, num_workers=2)
    async with first, second:
        await until(lambda: len(bodies(broker)) == 600)
    found = bodies(broker)
    assert {1} == set(Counter(found).values())
    for key in range(30):
        of_key = [int(each.split()[1]) for each in found if each.startswith(b"%d " % key)]
        assert sorted(of_key) == of_key
    assert 0 == await waiting(db, outbox)


@pytest.mark.parametrize("db", by(*ON_SQLITE), indirect=True)
async def test_one_relay_at_a_time_has_the_lease(db, outbox, broker):
    """On SQLite, which cannot lock rows; so each message is published once."""
    async with db.transaction() as connection:
        await outbox.add(connection, numbered(200))
    async with relay(db, outbox, broker, batch_size=20), relay(db, outbox, broker, batch_size=20):
        await until(lambda: len(bodies(broker)) == 200)
    assert {1} == set(Counter(bodies(broker)).values())


@pytest.mark.parametrize("db", by(*ON_POSTGRES, *ON_MARIADB), indirect=True)
async def test_adding_goes_on_while_a_relay_publishes(db, outbox, broker):
    """The relay's open transaction locks the rows that it has taken, and nothing else."""
    session_of = relay(db, outbox, broker)._transport.session
    async with db.transaction() as connection:
        await outbox.add(connection, numbered(3), key=lambda _: "key")
        await outbox.add(connection, numbered(3))
    async with session_of(Subscription(queue="outbox", prefetch=10, consumer_tag="")) as session:
        rows = await anext(aiter(session))
        assert 6 == len(rows)
        async with asyncio.timeout(5), db.transaction() as connection:
            await outbox.add(connection, numbered(3), key=lambda _: "key")
            await outbox.add(connection, numbered(3))
    assert 12 == await waiting(db, outbox)
