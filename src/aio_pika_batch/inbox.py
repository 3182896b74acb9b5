"""Exactly-once effects: a table that records, in your transaction, which messages took effect.

RabbitMQ delivers at least once. A message that is delivered again after its effect was committed is
found in the table and dropped. One statement claims a whole batch.

Laws:

- A claim is part of the transaction of its effect: both are committed, or neither.
- Claims are taken in the order of their ids, so that two batches never wait for each other.
- A message that is not acknowledged leaves no claim behind.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Literal, Self, TypeAlias

from aio_pika_batch.core.message import Message
from aio_pika_batch.core.results import MessageResult, Result
from aio_pika_batch.databases import (
    Database,
    DatabaseConnection,
    adapt,
    check_table,
    is_deadlock,
    is_refusal,
)
from aio_pika_batch.errors import (
    ConfigurationError,
    MessageDecodeError,
    MissingMessageId,
    ResultError,
)
from aio_pika_batch.logs import KeywordLogger, format_error
from aio_pika_batch.runtime.handler_context import current_context

__all__ = ["Claims", "Inbox", "MissingMessageId"]

Identity: TypeAlias = Callable[[Message], str | None]

LONGEST = 255
"""Characters of a consumer's name and of an id; AMQP's ids have 255 bytes at most."""

ATTEMPTS = 10
"""How often a transaction is begun again whose claim has met a deadlock."""

_log = KeywordLogger(logging.getLogger("aio_pika_batch.inbox"))


# -- SQL ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Sql:
    """The statements for one database, with `{table}` and `{index}` for names.

    Attributes:
        create: Several statements, since not every driver takes several at once.
        claim: Returns the ids that it has inserted, unless `claimed` does.
        claimed: Returns what `claim` has inserted, where that cannot return rows.
    """

    create: tuple[str, ...]
    claim: str
    release: str
    prune: str
    claimed: str | None = None


_POSTGRESQL = _Sql(
    create=(
        # One at a time: two sessions that create the same table at once fail, IF NOT EXISTS or not.
        """DO $$ BEGIN
PERFORM pg_advisory_xact_lock(7146204551);
CREATE TABLE IF NOT EXISTS {table} (
    consumer text COLLATE "C" NOT NULL,
    message_id text COLLATE "C" NOT NULL,
    claimed_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (consumer, message_id)
);
CREATE INDEX IF NOT EXISTS {index} ON {table} USING brin (claimed_at);
END $$""",
    ),
    claim="""INSERT INTO {table} (consumer, message_id)
SELECT CAST(:consumer AS text), id FROM unnest(CAST(:ids AS text[])) AS id ORDER BY id COLLATE "C"
ON CONFLICT DO NOTHING RETURNING message_id""",
    release="""DELETE FROM {table}
WHERE consumer = :consumer AND message_id = ANY(CAST(:ids AS text[]))""",
    prune="""DELETE FROM {table} WHERE consumer = :consumer
AND claimed_at < now() - make_interval(secs => CAST(:seconds AS double precision))""",
)

_MYSQL = _Sql(
    # Ids are bytes: a collation would take "a" and "A", or "a" and "a ", for the same id.
    create=(
        """CREATE TABLE IF NOT EXISTS {table} (
    consumer varbinary(1020) NOT NULL,
    message_id varbinary(1020) NOT NULL,
    claim binary(16) NOT NULL,
    claimed_at datetime NOT NULL,
    PRIMARY KEY (consumer, message_id),
    KEY {index} (claimed_at)
) ENGINE=InnoDB""",
    ),
    # INSERT IGNORE would lock an id that is there for reading. Two sessions that wait for an id
    # whose owner rolls back then hold such a lock each, and deadlock over the right to write.
    claim="""INSERT INTO {table} (consumer, message_id, claim, claimed_at)
SELECT :consumer, ids.id, :claim, UTC_TIMESTAMP() FROM {ids} ORDER BY ids.id
ON DUPLICATE KEY UPDATE claim = {table}.claim""",
    # From the ids to their rows: the other way round it would read all that the consumer claimed.
    claimed="""SELECT claims.message_id FROM {ids} STRAIGHT_JOIN {table} AS claims
ON claims.consumer = :consumer AND claims.message_id = CAST(ids.id AS BINARY)
WHERE claims.claim = :claim""",
    release="""DELETE claims FROM {ids} STRAIGHT_JOIN {table} AS claims
ON claims.consumer = :consumer AND claims.message_id = CAST(ids.id AS BINARY)""",
    prune="""DELETE FROM {table} WHERE consumer = :consumer
AND claimed_at < UTC_TIMESTAMP() - INTERVAL :seconds SECOND""",
)

_SQLITE = _Sql(
    create=(
        """CREATE TABLE IF NOT EXISTS {table} (
    consumer text NOT NULL,
    message_id text NOT NULL,
    claimed_at integer NOT NULL,
    PRIMARY KEY (consumer, message_id)
) WITHOUT ROWID""",
    ),
    claim="""INSERT INTO {table} (consumer, message_id, claimed_at)
SELECT :consumer, value, {now} FROM json_each(:ids) WHERE true ORDER BY value
ON CONFLICT DO NOTHING RETURNING message_id""",
    release="""DELETE FROM {table}
WHERE consumer = :consumer AND message_id IN (SELECT value FROM json_each(:ids))""",
    prune="""DELETE FROM {table} WHERE consumer = :consumer
AND claimed_at < {now} - CAST(:seconds AS REAL)""",
)

_PIECES = {
    "{ids}": (
        "JSON_TABLE(:ids, '$[*]' COLUMNS (id VARCHAR(255) CHARACTER SET utf8mb4 PATH '$')) AS ids"
    ),
    "{now}": "CAST(strftime('%s', 'now') AS INTEGER)",
}

_SQL: Mapping[Database, _Sql] = {
    Database.POSTGRESQL: _POSTGRESQL,
    Database.MYSQL: _MYSQL,
    Database.SQLITE: _SQLITE,
}


# -- the inbox ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Sorted:
    """The messages of a batch, after its claim.

    Attributes:
        fresh: Those to be handled.
        ids: What has been claimed, and by which of them.
        twins: Those with the id of another one in the batch, which stands for both.
        dropped: Those that have taken effect before.
    """

    fresh: list[Message]
    ids: dict[str, Message]
    twins: list[tuple[Message, Message]]
    dropped: list[Message]


class Inbox:
    """Records in your transactions which messages have taken effect.

    A message is identified by its `message_id`, which its publisher must set, together with the
    consumer's name. Copies of it, requeued or replayed, keep the id.

    Args:
        consumer: Whose effects these are. Consumers of the same messages with different effects
            need different names. At most 255 characters.
        table: Shared by all consumers that name it. Letters, digits and underscores, and one dot
            after a schema.
        identity: Returns a message's id, instead of its `message_id`; at most 255 characters. An
            id that is used again makes the inbox drop the later message.
        missing: What to do with a message that has no id: `"raise"` MissingMessageId, or
            `"process"` it unprotected, so that its effect is repeated with it.

    Raises:
        ConfigurationError: The name or the table does not fit.
    """

    def __init__(
        self,
        consumer: str,
        *,
        table: str = "aio_pika_batch_inbox",
        identity: Identity | None = None,
        missing: Literal["raise", "process"] = "raise",
    ) -> None:
        if not 0 < len(consumer) <= LONGEST or "\0" in consumer:
            msg = f"the name of an inbox's consumer must have 1 to {LONGEST} characters"
            raise ConfigurationError(msg)
        if missing not in ("raise", "process"):
            raise ConfigurationError(f"missing={missing!r}: must be 'raise' or 'process'")
        self.consumer = consumer
        self.table = check_table(table)
        self._identity = identity
        self._raises = missing == "raise"
        index = f"{table.rpartition('.')[2]}_claimed_at"
        names = {**_PIECES, "{table}": table, "{index}": index}
        self._sql = {database: _named(sql, names) for database, sql in _SQL.items()}

    def schema(self, database: Database | str) -> str:
        """Return the SQL that `create` runs, for a migration of yours.

        Args:
            database: `"postgresql"`, `"mysql"` (or MariaDB), or `"sqlite"`.
        """
        return "".join(f"{each};\n" for each in self._sql[Database(database)].create)

    async def create(self, connection: object) -> None:
        """Create the table, unless it is there. Commit afterwards, as after any statement.

        Args:
            connection: As for `claim`.
        """
        database = adapt(connection)
        for statement in self._sql[database.database].create:
            await database.execute(statement, {})

    async def claim(self, connection: object, messages: Sequence[Message]) -> list[Message]:
        """Claim messages in your transaction; returns those that have not taken effect yet.

        Write the effects of these, commit, and then yield ACK for all messages, those that were not
        returned included. An id that another open transaction has claimed is waited for.

        A handler may call it with `settle="atomic"` only. Otherwise an ACK that was yielded before
        a commit that fails would lose the effect. :meth:`transaction` has no such condition.

        Args:
            connection: An open connection with an open transaction: of asyncpg, psycopg (async),
                SQLAlchemy (AsyncConnection, AsyncSession) or aiosqlite.
            messages: Call it once in a transaction: claims of several calls may deadlock.

        Returns:
            In their order. Of messages with the same id, the first.

        Raises:
            MissingMessageId: A message has no id.
            ConfigurationError: There is no transaction, the driver is not supported, or a handler
                calls this without `settle="atomic"`.
        """
        run = current_context.get()
        if run is not None and not run.is_atomic:
            raise ConfigurationError(
                "Inbox.claim() needs settle='atomic' in the consumer's settings: with any other, an"
                " ACK counts although the commit fails; use Inbox.transaction() instead"
            )
        database = adapt(connection)
        await _refuse_autocommit(database)
        found = await self._claim(database, messages)
        self._tell_dropped([*found.dropped, *(twin for twin, _ in found.twins)])
        return found.fresh

    async def release(self, connection: object, messages: Iterable[Message]) -> None:
        """Take back claims in the transaction that made them: of messages that are not ACKed.

        Args:
            connection: As for `claim`.
            messages: Those that this transaction has claimed and has no effects of.
        """
        ids = [each for each in map(self._id, messages) if each]
        await self._release(adapt(connection), ids)

    async def prune(self, connection: object, *, older_than: timedelta | float) -> int:
        """Forget old claims; returns how many. Commit afterwards.

        A message that is delivered again after its claim was forgotten takes effect again.

        Args:
            connection: As for `claim`.
            older_than: Seconds, or a timedelta, since the claim. Longer than a message can wait in
                a queue or among dead letters.
        """
        if isinstance(older_than, timedelta):
            older_than = older_than.total_seconds()
        database = adapt(connection)
        sql = self._sql[database.database].prune
        return await database.execute(
            sql, {"consumer": self.consumer, "seconds": float(older_than)}
        )

    def transaction(self, connection: object, messages: Sequence[Message]) -> Claims:
        """Begin a transaction that claims messages, and commit it at the end of the block.

        Write the effects of `fresh` inside of the block, and yield `results` after it::

            async with self.inbox.transaction(connection, messages) as batch:
                await write(connection, batch.fresh)
            for result in batch.results:
                yield result

        What the block raises rolls everything back, claims and effects. It works with every
        `settle`. A deadlock between claims is retried.

        Args:
            connection: As for `claim`, but without an open transaction.
            messages: A handler's, or a part of them.
        """
        return Claims(self, adapt(connection), messages)

    # -- inside -----------------------------------------------------------------------------------

    def _id(self, message: Message) -> str | None:
        return message.message_id if self._identity is None else self._identity(message)

    async def _claim(self, database: DatabaseConnection, messages: Sequence[Message]) -> _Sorted:
        found = _Sorted([], {}, [], [])
        missing: list[Message] = []
        for message in messages:
            key = self._id(message)
            if not key:
                missing.append(message)
            elif (twin := found.ids.setdefault(key, message)) is not message:
                found.twins.append((message, twin))
        if missing and self._raises:
            raise MissingMessageId(missing)
        if found.ids:
            _check(found.ids)
            known = found.ids.keys() - await self._insert(database, list(found.ids))
            for key in [key for key in found.ids if key in known]:
                found.dropped.append(found.ids.pop(key))
        out = {id(each) for each in found.dropped}
        out.update(id(twin) for twin, _ in found.twins)
        found.fresh.extend(each for each in messages if id(each) not in out)
        return found

    async def _insert(self, database: DatabaseConnection, ids: Sequence[str]) -> set[str]:
        """Insert what is not there, and return it."""
        sql = self._sql[database.database]
        given = {"consumer": self.consumer, "ids": _array(database, ids)}
        if sql.claimed is None:
            rows = await database.fetch(sql.claim, given)
        else:
            given["claim"] = f"{random.getrandbits(64):016x}"
            await database.execute(sql.claim, given)
            rows = await database.fetch(sql.claimed, given)
        fresh = {row[0].decode() if isinstance(row[0], bytes) else row[0] for row in rows}
        if not fresh.issubset(ids):
            # A text factory or a codec of the user's; what it makes of an id is no id of ours, and
            # would be dropped as known.
            raise ConfigurationError("the connection returns ids that are not those it was given")
        return fresh

    async def _release(self, database: DatabaseConnection, ids: Sequence[str]) -> None:
        if ids:
            given = {"consumer": self.consumer, "ids": _array(database, ids)}
            await database.execute(self._sql[database.database].release, given)

    def _tell_dropped(self, messages: Sequence[Message]) -> None:
        if not messages:
            return
        _log.info(
            "messages that have taken effect before are dropped",
            inbox=self.consumer,
            messages=len(messages),
            first_id=self._id(messages[0]),
        )
        run = current_context.get()
        if run is not None:
            run.dropped(self.consumer, messages)


def _named(sql: _Sql, names: Mapping[str, str]) -> _Sql:
    def fill(text: str) -> str:
        for name, value in names.items():
            text = text.replace(name, value)
        return text

    return _Sql(
        create=tuple(map(fill, sql.create)),
        claim=fill(sql.claim),
        release=fill(sql.release),
        prune=fill(sql.prune),
        claimed=None if sql.claimed is None else fill(sql.claimed),
    )


def _check(ids: Mapping[str, Message]) -> None:
    """Refuse an id that a database would cut or refuse, on its message's account only."""
    for key, message in ids.items():
        if len(key) > LONGEST:
            msg = f"has {len(key)} characters; an inbox takes {LONGEST}: hash it in `identity`"
            raise MessageDecodeError(message, "message_id", msg)
        if "\0" in key:
            msg = "has a null character, which not every database stores"
            raise MessageDecodeError(message, "message_id", msg)


def _array(database: DatabaseConnection, ids: Sequence[str]) -> object:
    # JSON in ASCII does not depend on the character set of a connection to MySQL.
    return ids if database.database is Database.POSTGRESQL else json.dumps(ids)


async def _refuse_autocommit(database: DatabaseConnection) -> None:
    if not await database.can_roll_back():
        raise ConfigurationError(
            "there is no transaction: a claim must be committed together with its effect, so begin"
            " one first, or use Inbox.transaction()"
        )


# -- the helper ---------------------------------------------------------------------------------


class Claims:
    """A transaction with the claims of a batch, as :meth:`Inbox.transaction` opens it.

    Attributes:
        fresh: The messages that have not taken effect yet, in their order: write their effects.
    """

    def __init__(
        self, inbox: Inbox, database: DatabaseConnection, messages: Sequence[Message]
    ) -> None:
        self._inbox = inbox
        self._database = database
        self._messages = messages
        self._run = current_context.get()
        self._found = _Sorted([], {}, [], [])
        self._fresh: frozenset[int] | None = None
        self._others: dict[int, Result] = {}
        self._results: list[Result] | None = None
        self.fresh: list[Message] = []

    def set_result(self, message: Message, result: Result) -> None:
        """Decide that a message is not ACKed. It must have no effect in this transaction.

        Its claim is not committed, so that it is handled when it is delivered again.

        Args:
            message: One of `fresh`.
            result: What to yield for it: REQUEUE, `Nack("…")` and so on.

        Raises:
            ResultError: The message is not one of `fresh`, or the block is over.
        """
        if self._results is not None:
            raise ResultError("the transaction is committed: set results inside of its block")
        if self._fresh is None:
            self._fresh = frozenset(map(id, self.fresh))
        if id(message) not in self._fresh:
            raise ResultError(f"{message!r} is not one of `fresh`: the others are ACKed")
        if result is MessageResult.ACK:
            self._others.pop(id(message), None)
        else:
            self._others[id(message)] = result

    @property
    def results(self) -> Sequence[Result]:
        """A result for each message, in their order, once the transaction is committed.

        Raises:
            ResultError: It is not committed yet: yield after the block.
        """
        if self._results is None:
            raise ResultError(
                "results are known once the transaction is committed: yield them after the"
                " `async with` block"
            )
        return self._results

    async def __aenter__(self) -> Self:
        database = self._database
        if database.in_transaction:
            raise ConfigurationError(
                "the connection has a transaction open, and Inbox.transaction() commits one of its"
                " own: commit the other before, or use Inbox.claim() in it"
            )
        for attempt in range(ATTEMPTS):
            try:
                await database.begin()
                await _refuse_autocommit(database)
                self._found = await self._inbox._claim(database, self._messages)  # noqa: SLF001  -- its own
                break
            except BaseException as error:
                await self._roll_back()
                if not is_deadlock(error) or attempt == ATTEMPTS - 1:
                    raise
                # Nothing but the claim is lost.
                _log.debug("a claim met a deadlock", error=format_error(error), attempt=attempt)
            await asyncio.sleep(random.random() * 0.01 * 2**attempt)
        self.fresh = self._found.fresh
        if self._run is not None:
            self._run.begins_transaction()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if exc_type is None:
                await self._finish()
            else:
                await self._roll_back()
        finally:
            if self._run is not None:
                self._run.ends_transaction()

    async def _finish(self) -> None:
        others, found, database = self._others, self._found, self._database
        try:
            ids = [key for key, message in found.ids.items() if id(message) in others]
            await self._inbox._release(database, ids)  # noqa: SLF001  -- its own
            await database.flush()
        except BaseException:
            await self._roll_back()
            raise
        cancelled = await self._commit()
        # A twin shares the fate of the message that stands for it: ACKed, it would be gone while
        # the other one may still fail.
        others |= {id(twin): others[id(of)] for twin, of in found.twins if id(of) in others}
        self._results = [others.get(id(each), MessageResult.ACK) for each in self._messages]
        self._decide(self._results)
        dropped = [twin for twin, _ in found.twins if id(twin) not in others]
        self._inbox._tell_dropped([*found.dropped, *dropped])  # noqa: SLF001  -- its own
        if cancelled is not None:
            raise cancelled

    async def _commit(self) -> asyncio.CancelledError | None:
        """Commit; a cancellation waits for the outcome, on which depends what was ACKed.

        Returns:
            The cancellation that came meanwhile.
        """
        committing = asyncio.ensure_future(self._database.commit())
        cancelled: asyncio.CancelledError | None = None
        while not committing.done():
            try:
                await asyncio.wait({committing})
            except asyncio.CancelledError as error:
                if cancelled is not None:
                    # The handler is given up, and with it the session that would be told.
                    raise
                cancelled = error
        try:
            committing.result()
        except BaseException as error:
            if not is_refusal(error):
                # Delivered again, they are found in the table if it was committed after all. Any
                # other result could dead-letter what has taken effect.
                self._decide([MessageResult.REQUEUE_IMMEDIATE] * len(self._messages))
                _log.warning(
                    "the outcome of a commit is unknown; its messages are requeued",
                    inbox=self._inbox.consumer,
                    messages=len(self._messages),
                    error=format_error(error),
                )
            await self._roll_back()
            raise
        return cancelled

    def _decide(self, results: Iterable[Result]) -> None:
        if self._run is not None:
            self._run.decide(zip(self._messages, results, strict=True))

    async def _roll_back(self) -> None:
        # What went wrong before is worth telling; that the connection is gone, too, is not.
        with suppress(Exception):
            await self._database.rollback()
