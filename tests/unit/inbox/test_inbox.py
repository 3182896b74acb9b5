"""Claims of messages, apart from consumers."""

from __future__ import annotations

import logging
import sqlite3

import pytest

from aio_pika_batch import (
    ConfigurationError,
    MessageDecodeError,
    MessageResult,
    MissingMessageId,
    ResultError,
)
from aio_pika_batch.databases.connections import Database
from aio_pika_batch.inbox import Inbox
from aio_pika_batch.testing import make_message
from tests.unit.inbox.sqlite import Connection

ACK, NACK, REQUEUE = MessageResult.ACK, MessageResult.NACK, MessageResult.REQUEUE


def named(*ids):
    """Messages with these ids."""
    return [make_message(b"", message_id=each) for each in ids]


async def test_a_claim_without_a_transaction_is_refused(inbox, path):
    """A connection that commits every statement could keep a claim whose effect has failed."""
    async with Connection(path) as own:
        own._conn.isolation_level = None
        with pytest.raises(ConfigurationError, match="there is no transaction"):
            await inbox.claim(own, named("a"))


async def test_an_id_that_occurs_twice_is_claimed_once(inbox, connection):
    """Its first message stands for both."""
    first, second, other = named("a", "a", "b")
    assert [first, other] == await inbox.claim(connection, [first, second, other])


async def test_claiming_no_messages_runs_no_statement(inbox, connection):
    """Nothing is claimed, and no transaction is begun."""
    assert [] == await inbox.claim(connection, [])
    assert not connection.in_transaction


async def test_a_message_without_an_id_is_an_error(inbox, connection):
    """It says which, how many, and what to do; nothing has been claimed."""
    with pytest.raises(MissingMessageId) as caught:
        await inbox.claim(connection, messages := named("a", None, ""))
    assert tuple(messages[1:]) == caught.value.messages
    assert "2 messages have no message_id" in str(caught.value)
    for remedy in ("let the publisher set one", "identity=", "missing='process'"):
        assert remedy in str(caught.value)
    assert ["a"] == [each.message_id for each in await inbox.claim(connection, named("a"))]


async def test_a_message_without_an_id_may_be_processed_unprotected(connection):
    """In its place, each time."""
    inbox = Inbox("orders", missing="process")
    await inbox.create(connection)
    messages = named(None, "a", None)
    assert messages == await inbox.claim(connection, messages)
    assert [messages[0], messages[2]] == await inbox.claim(connection, messages)
    await inbox.release(connection, messages)
    assert messages == await inbox.claim(connection, messages)


async def test_something_else_may_identify_a_message(connection):
    """Such as a number in its body."""
    inbox = Inbox("orders", identity=lambda message: str(message.json()["number"]))
    await inbox.create(connection)
    messages = [make_message(b'{"number": 7}'), make_message(b'{"number": 8}')]
    assert messages == await inbox.claim(connection, messages)
    assert [] == await inbox.claim(connection, messages)


@pytest.mark.parametrize("key", ["a" * 256, "a\0b"])
async def test_an_id_that_a_database_would_cut_fails_its_message_only(inbox, connection, key):
    """The error is one that dead-letters this message alone."""
    inbox = Inbox("orders", identity=lambda message: message.body.decode())
    messages = [make_message(b"good"), make_message(key.encode())]
    with pytest.raises(MessageDecodeError, match="255 characters, not null") as caught:
        await inbox.claim(connection, messages)
    assert messages[1] is caught.value.message


@pytest.mark.parametrize(
    "given",
    [
        {"consumer": ""},
        {"consumer": "x" * 256},
        {"consumer": "a\0"},
        {"table": "in box"},
        {"table": "a.b.c"},
        {"table": "inbox; DROP TABLE orders"},
        {"missing": "drop"},
    ],
)
def test_what_does_not_fit_is_refused(given):
    """When the inbox is made."""
    with pytest.raises(ConfigurationError):
        Inbox(**{"consumer": "orders"} | given)


def test_the_schema_can_go_into_a_migration(tmp_path):
    """As SQL that runs as it is."""
    inbox = Inbox("orders", table="main.claims")
    with sqlite3.connect(tmp_path / "test.sqlite") as database:
        database.executescript(inbox.schema("sqlite"))
        assert [] == database.execute("SELECT * FROM claims").fetchall()
    assert "claims_claimed_at ON main.claims" in inbox.schema(Database.POSTGRESQL)
    assert "{" not in inbox.schema("mysql")


class Unknown:
    """Of no driver."""


def of(module, name):
    """A class of this name in this module."""
    return type(name, (), {"__module__": module})


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (Unknown(), "test_inbox.Unknown is not supported: use a connection of asyncpg"),
        (of("asyncpg.pool", "Pool")(), "asyncpg.pool.Pool can't be used here: take one"),
        (of("psycopg_pool.pool_async", "AsyncConnectionPool")(), "pool.connection()"),
        (of("psycopg", "Connection")(), "use psycopg.AsyncConnection"),
        (of("sqlalchemy.ext.asyncio.engine", "AsyncEngine")(), "engine.connect()"),
        (of("sqlalchemy.orm.session", "Session")(), "use AsyncSession"),
        (sqlite3.connect(":memory:"), "sqlite3.Connection can't be used here: it blocks"),
    ],
)
async def test_an_invalid_connection_is_refused_with_its_type(inbox, refused, words):
    """With what to do instead."""
    for call in (inbox.claim, inbox.release):
        with pytest.raises(ConfigurationError) as caught:
            await call(refused, named("a"))
        assert words in str(caught.value)
    with pytest.raises(ConfigurationError):
        inbox.transaction(refused, named("a"))


async def test_a_connection_that_changes_ids_is_refused(inbox, connection):
    """Else all its messages would be dropped as known."""
    connection._conn.text_factory = lambda raw: f"<{raw.decode()}>"
    with pytest.raises(ConfigurationError, match="other ids than it was given"):
        await inbox.claim(connection, named("a"))


async def test_rows_may_be_dicts(inbox, connection):
    """As a row factory of the user's makes them."""
    connection._conn.row_factory = lambda cursor, row: {
        column[0]: value for column, value in zip(cursor.description, row, strict=True)
    }
    assert 1 == len(await inbox.claim(connection, named("a")))
    assert 0 == len(await inbox.claim(connection, named("a")))


# -- its own transaction --


async def test_results_are_not_known_before_the_commit(inbox, connection):
    """A handler that yields them inside of the block fails, and is rolled back."""

    async def yields_too_early():
        async with inbox.transaction(connection, named("a")) as batch:
            return batch.results

    with pytest.raises(ResultError, match="after the `async with` block"):
        await yields_too_early()
    assert 1 == len(await inbox.claim(connection, named("a")))


async def test_only_fresh_messages_can_be_given_a_result(inbox, connection):
    """And only inside of the block."""
    old, fresh, twin = named("a", "b", "b")
    async with inbox.transaction(connection, [old]):
        pass
    async with inbox.transaction(connection, [old, fresh, twin]) as batch:
        for each in (old, twin, make_message(b"")):
            with pytest.raises(ResultError, match="is not one of `fresh`"):
                batch.set_result(each, REQUEUE)
        batch.set_result(fresh, REQUEUE)
    with pytest.raises(ResultError, match="in its block"):
        batch.set_result(fresh, REQUEUE)
    assert [ACK, REQUEUE, REQUEUE] == list(batch.results)


async def test_a_result_can_be_changed(inbox, connection):
    """The last one counts."""
    messages = named("a", "b")
    async with inbox.transaction(connection, messages) as batch:
        batch.set_result(messages[0], REQUEUE)
        batch.set_result(messages[0], ACK)
        batch.set_result(messages[1], REQUEUE)
        batch.set_result(messages[1], NACK)
    assert [ACK, NACK] == list(batch.results)
    assert [messages[1]] == await inbox.claim(connection, messages)


async def test_what_was_dropped_is_logged(inbox, connection, caplog):
    """So that an operator who replays dead letters sees what happened to them."""
    caplog.set_level(logging.INFO)
    async with inbox.transaction(connection, named("a", "b")):
        pass
    async with inbox.transaction(connection, named("b", "c", "a")):
        pass
    [record] = caplog.records
    assert "aio_pika_batch.inbox" == record.name
    assert (
        "dropped messages that took effect before"
        " [inbox=orders messages=2 first_id=b]" == record.getMessage()
    )


class Deadlock(Exception):
    """As a server reports it."""

    sqlstate = "40P01"


class Deadlocking(Connection):
    """Its claims meet a deadlock *times* times.

    Attributes:
        times: How many are left.
        statements: What has been run.
    """

    def __init__(self, path, times):
        super().__init__(path)
        self.times = times
        self.statements = []

    async def execute_fetchall(self, sql, parameters=()):
        self.statements.append(sql.split()[0])
        if sql.startswith("INSERT") and self.times:
            self.times -= 1
            raise Deadlock
        return await super().execute_fetchall(sql, parameters)

    async def rollback(self):
        self.statements.append("ROLLBACK")
        await super().rollback()


Deadlocking.__module__ = "aiosqlite.core"


async def test_a_deadlock_between_claims_is_retried(inbox, path):
    """From the beginning of the transaction."""
    async with (
        Deadlocking(path, 2) as connection,
        inbox.transaction(connection, named("a")) as batch,
    ):
        assert 1 == len(batch.fresh)
    assert ["BEGIN", "INSERT", "ROLLBACK"] * 2 + ["BEGIN", "INSERT"] == connection.statements


async def test_a_deadlock_that_stays_is_raised(inbox, path):
    """After ten attempts."""
    async with Deadlocking(path, 100) as connection:
        with pytest.raises(Deadlock):
            await inbox.transaction(connection, named("a")).__aenter__()
        assert 90 == connection.times
        assert not connection.in_transaction
