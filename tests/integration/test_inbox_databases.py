"""An inbox keeps its laws on each database, by each driver."""

from __future__ import annotations

import asyncio
import random
import uuid
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import aiosqlite
import pytest

from aio_pika_batch import ConfigurationError, MessageResult
from aio_pika_batch.databases.connections import adapt
from aio_pika_batch.inbox import Inbox
from aio_pika_batch.testing import make_message
from tests.support.databases import (
    DRIVERS,
    EFFECTS,
    ON_MARIADB,
    ON_POSTGRES,
    ON_SQLITE,
    by,
    database,
    write,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.databases import TestDatabase

REQUEUE, NACK, ACK = MessageResult.REQUEUE, MessageResult.NACK, MessageResult.ACK


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


with_many_writers = pytest.mark.parametrize("db", by(*ON_POSTGRES, *ON_MARIADB), indirect=True)
"""SQLite has one at a time."""


@pytest.fixture
async def inbox(db) -> AsyncIterator[Inbox]:
    """An inbox with a table of its own."""
    made = Inbox("orders", table=f"inbox_{uuid.uuid4().hex[:12]}")
    async with db.transaction() as connection:
        await adapt(connection).execute("DROP TABLE IF EXISTS effects", {})
        await adapt(connection).execute(EFFECTS, {})
        await made.create(connection)
    yield made
    async with db.transaction() as connection:
        await adapt(connection).execute(f"DROP TABLE {made.table}", {})


def named(*ids):
    """Messages with these ids."""
    return [make_message(b"", message_id=each) for each in ids]


def ids(messages):
    """Of messages, in their order."""
    return [each.message_id for each in messages]


async def test_creating_it_again_changes_nothing(db, inbox):
    """Every process of a consumer does it at its start."""
    async with db.transaction() as connection:
        await inbox.claim(connection, named("a"))
    async with db.transaction() as connection:
        await inbox.create(connection)
    async with db.transaction() as connection:
        assert [] == await inbox.claim(connection, named("a"))


async def test_many_create_it_at_once(db):
    """IF NOT EXISTS alone fails in PostgreSQL, where two do so at the same time."""
    made = Inbox("orders", table=f"inbox_{uuid.uuid4().hex[:12]}")

    async def create():
        async with db.transaction() as connection:
            await made.create(connection)

    await asyncio.gather(*(create() for _ in range(6)))
    async with db.transaction() as connection:
        await adapt(connection).execute(f"DROP TABLE {made.table}", {})


async def test_what_was_committed_is_not_claimed_again(db, inbox):
    """Fresh ones come in their order, whatever the order of their ids."""
    async with db.transaction() as connection:
        assert ["b", "a", "c"] == ids(await inbox.claim(connection, named("b", "a", "c")))
    async with db.transaction() as connection:
        assert ["e", "d"] == ids(await inbox.claim(connection, named("c", "e", "a", "d")))


async def test_what_was_rolled_back_is_claimed_again(db, inbox):
    """Claims and effects share their fate."""

    async def fail():
        async with db.transaction() as connection:
            await write(connection, ids(await inbox.claim(connection, named("a", "b"))))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    async with db.transaction() as connection:
        assert ["a", "b"] == ids(await inbox.claim(connection, named("a", "b")))
    assert [] == await db.effects()


async def test_released_ones_are_claimed_again(db, inbox):
    """The others are not."""
    async with db.transaction() as connection:
        messages = await inbox.claim(connection, named("a", "b", "c"))
        await inbox.release(connection, [messages[1]])
    async with db.transaction() as connection:
        assert ["b"] == ids(await inbox.claim(connection, named("a", "b", "c")))


async def test_ids_that_look_alike_are_different(db, inbox):
    """Whatever a collation thinks of them."""
    strange = [
        "a",
        "A",
        "a ",
        "á",
        "a\u0301",
        "ß",
        "ss",
        "😀",
        "🎉",
        "\\",
        "'",
        '"',
        "%",
        ":id",
        "$1",
    ]
    async with db.transaction() as connection:
        assert strange == ids(await inbox.claim(connection, named(*strange)))
    async with db.transaction() as connection:
        assert ["a  "] == ids(await inbox.claim(connection, named(*strange, "a  ")))


async def test_the_longest_ids_differ_in_their_last_character(db, inbox):
    """Nothing is cut."""
    long = ["é" * 254 + last for last in "abc"]
    mine = Inbox("n" * 255, table=inbox.table, identity=lambda message: message.body.decode())
    messages = [make_message(each.encode()) for each in long]
    async with db.transaction() as connection:
        assert messages == await mine.claim(connection, messages)
    async with db.transaction() as connection:
        assert [] == await mine.claim(connection, messages)


async def test_each_consumer_has_claims_of_its_own(db, inbox):
    """In the same table."""
    other = Inbox("invoices", table=inbox.table)
    async with db.transaction() as connection:
        await inbox.claim(connection, named("a"))
        assert ["a"] == ids(await other.claim(connection, named("a")))


async def test_old_claims_are_forgotten(db, inbox):
    """Those of this consumer, and no others."""
    other = Inbox("invoices", table=inbox.table)
    async with db.transaction() as connection:
        await inbox.claim(connection, named("a", "b"))
        await other.claim(connection, named("a"))
    async with db.transaction() as connection:
        assert 0 == await inbox.prune(connection, older_than=60)
        assert 2 == await inbox.prune(connection, older_than=-5)
    async with db.transaction() as connection:
        assert ["a", "b"] == ids(await inbox.claim(connection, named("a", "b")))
        assert [] == await other.claim(connection, named("a"))


@with_many_writers
async def test_a_claim_of_another_transaction_is_waited_for(db, inbox):
    """Committed, it is a duplicate; rolled back, it is fresh."""
    for commits in (True, False):
        claimed, told = asyncio.Event(), asyncio.Event()
        key = f"shared {commits}"

        async def first(claimed=claimed, told=told, key=key, commits=commits):
            async with db.transaction() as connection:
                await inbox.claim(connection, named(key))
                claimed.set()
                await told.wait()
                if not commits:
                    raise ZeroDivisionError

        async def second(claimed=claimed, key=key):
            await claimed.wait()
            async with db.transaction() as connection:
                return ids(await inbox.claim(connection, named(key)))

        running, waiting = asyncio.ensure_future(first()), asyncio.ensure_future(second())
        await asyncio.sleep(0.3)
        assert not waiting.done()
        told.set()
        await asyncio.wait({running})
        running.exception()
        assert ([] if commits else [key]) == await waiting


async def test_the_transaction_commits_effects_and_claims(db, inbox):
    """Results come after the commit; what was requeued has left no claim behind."""
    messages = named("a", "b", "c", "b", "d")
    async with db.connect() as connection, inbox.transaction(connection, messages) as batch:
        assert ["a", "b", "c", "d"] == ids(batch.fresh)
        await write(connection, ["a", "d"])
        batch.set_result(messages[1], REQUEUE)
        batch.set_result(messages[2], NACK)
    assert [ACK, REQUEUE, NACK, REQUEUE, ACK] == list(batch.results)
    assert ["a", "d"] == await db.effects()
    async with db.connect() as connection, inbox.transaction(connection, messages) as batch:
        assert ["b", "c"] == ids(batch.fresh)
        await write(connection, ids(batch.fresh))
    assert [ACK] * 5 == list(batch.results)
    assert ["a", "b", "c", "d"] == await db.effects()


async def test_a_failure_in_the_block_rolls_back(db, inbox):
    """And leaves a connection that can be used again."""

    async def fail(connection):
        async with inbox.transaction(connection, named("a")):
            await write(connection, ["a"])
            raise ZeroDivisionError

    async with db.connect() as connection:
        with pytest.raises(ZeroDivisionError):
            await fail(connection)
        async with inbox.transaction(connection, named("a")) as batch:
            await write(connection, ids(batch.fresh))
    assert ["a"] == await db.effects()


async def test_a_failed_statement_in_the_block_rolls_back(db, inbox):
    """The database itself has aborted the transaction, where it does so."""

    async def fail(connection):
        async with inbox.transaction(connection, named("a")):
            await write(connection, ["a"])
            await adapt(connection).execute("INSERT INTO nowhere VALUES (1)", {})

    async with db.connect() as connection:
        with pytest.raises(Exception, match="nowhere"):
            await fail(connection)
        async with inbox.transaction(connection, named("a")) as batch:
            assert ["a"] == ids(batch.fresh)
    assert [] == await db.effects()


async def test_a_transaction_in_another_is_refused(db, inbox):
    """It would only seem to be committed."""
    async with db.transaction() as connection:
        await adapt(connection).fetch("SELECT 1", {})
        with pytest.raises(ConfigurationError, match="has an open transaction"):
            async with inbox.transaction(connection, named("a")):
                raise AssertionError


async def test_a_claim_without_a_transaction_is_refused(db, inbox):
    """In whichever way the driver commits by itself."""

    @asynccontextmanager
    async def autocommit():
        if db.driver == "asyncpg":
            async with db.connect() as connection:
                yield connection
        elif db.driver == "psycopg":
            async with db.connect() as connection:
                await connection.set_autocommit(True)
                yield connection
                await connection.set_autocommit(False)
        elif db.driver == "aiosqlite":
            async with aiosqlite.connect(db.url, isolation_level=None) as connection:
                yield connection
        else:
            async with database(db.driver, db.url, "AUTOCOMMIT") as other, other.connect() as found:
                yield found

    async with autocommit() as connection:
        with pytest.raises(ConfigurationError, match="no transaction"):
            await inbox.claim(connection, named("a"))
    async with db.transaction() as connection:
        assert ["a"] == ids(await inbox.claim(connection, named("a")))


async def test_a_cancellation_during_the_commit_waits_for_its_outcome(db, inbox):
    """It is committed, and then the cancellation goes on."""

    async def handle():
        async with db.connect() as connection, inbox.transaction(connection, named("a")):
            await write(connection, ["a"])
            asyncio.get_running_loop().call_soon(task.cancel)

    task = asyncio.ensure_future(handle())
    await asyncio.wait({task})
    assert task.cancelled()
    committed = await db.effects()
    async with db.transaction() as connection:
        fresh = ids(await inbox.claim(connection, named("a")))
    assert committed == ([] if fresh else ["a"])
    assert ["a"] == committed


@with_many_writers
async def test_overlapping_claims_do_not_deadlock(db, inbox):
    """Shuffled, from several connections at once; each id is fresh once."""
    fresh = []

    async def claims(seed):
        rnd = random.Random(seed)
        for at in range(40):
            batch = named(*(str(each) for each in rnd.sample(range(at * 20, at * 20 + 200), 60)))
            rnd.shuffle(batch)
            async with db.transaction() as connection:
                fresh.extend(ids(await inbox.claim(connection, batch)))

    await asyncio.gather(*(claims(seed) for seed in range(4)))
    assert len(set(fresh)) == len(fresh)
