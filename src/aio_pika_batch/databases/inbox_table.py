"""The table of claims: one row for each message of a consumer that took effect."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aio_pika_batch.databases.connections import (
    Database,
    DatabaseConnection,
    Statements,
    check_table,
)
from aio_pika_batch.errors import ConfigurationError

LONGEST = 255
"""Maximum characters of a consumer's name and of an id. AMQP allows 255 bytes for an id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Statements(Statements):
    """The statements of an inbox.

    Attributes:
        claim: Inserts ids, in their order.
        inserted: Returns what `claim` inserted; None if `claim` itself returns that.
        summarizes: Whether `claim` returns one JSON array instead, or null if it inserted all ids.
    """

    claim: str
    release: str
    prune: str
    inserted: str | None = None
    summarizes: bool = False


_POSTGRESQL = _Statements(
    # Without the lock, sessions that create the table at the same time fail, IF NOT EXISTS or not.
    create=(
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
    # Nearly always all are inserted, which spares the driver a row for each message.
    claim="""WITH inserted AS (INSERT INTO {table} (consumer, message_id)
SELECT CAST(:consumer AS text), id FROM {each} AS ids(id) ORDER BY id COLLATE "C"
ON CONFLICT DO NOTHING RETURNING message_id)
SELECT CASE WHEN count(*) < CAST(:count AS bigint)
THEN COALESCE(CAST(json_agg(message_id) AS text), '[]') END FROM inserted""",
    summarizes=True,
    # In an array, so that each of them is looked up in the index.
    release="""DELETE FROM {table}
WHERE consumer = :consumer AND message_id = ANY(ARRAY(SELECT {each}))""",
    prune="""DELETE FROM {table} WHERE consumer = :consumer
AND claimed_at < now() - make_interval(secs => CAST(:seconds AS double precision))""",
)

_MYSQL = _Statements(
    # Ids are bytes: most collations take "a" and "A", or "a" and "a ", for the same id.
    create=(
        """CREATE TABLE IF NOT EXISTS {table} (
    consumer varbinary(1020) NOT NULL,
    message_id varbinary(1020) NOT NULL,
    claim binary(16) NOT NULL,
    claimed_at datetime NOT NULL,
    PRIMARY KEY (consumer, message_id),
    KEY {index} (consumer, claimed_at)
) ENGINE=InnoDB""",
    ),
    # INSERT IGNORE takes a shared lock on an id that exists. Two sessions that wait for an id would
    # both get one when its transaction rolls back, and deadlock when both want to insert.
    claim="""INSERT INTO {table} (consumer, message_id, claim, claimed_at)
SELECT :consumer, ids.id, :claim, UTC_TIMESTAMP() FROM {ids} ORDER BY ids.id
ON DUPLICATE KEY UPDATE claim = {table}.claim""",
    # STRAIGHT_JOIN looks up each id. The optimizer might read all claims of the consumer instead.
    inserted="""SELECT claims.message_id FROM {ids} STRAIGHT_JOIN {table} AS claims
ON claims.consumer = :consumer AND claims.message_id = CAST(ids.id AS BINARY)
WHERE claims.claim = :claim""",
    release="""DELETE claims FROM {ids} STRAIGHT_JOIN {table} AS claims
ON claims.consumer = :consumer AND claims.message_id = CAST(ids.id AS BINARY)""",
    prune="""DELETE FROM {table} WHERE consumer = :consumer
AND claimed_at < UTC_TIMESTAMP() - INTERVAL :seconds SECOND""",
)

_SQLITE = _Statements(
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
    # Drivers take ten times as long to encode an array. The inner cast avoids a codec for JSON that
    # the user may have set.
    "{each}": "json_array_elements_text(CAST(CAST(:ids AS text) AS json))",
    "{ids}": (
        "JSON_TABLE(:ids, '$[*]' COLUMNS (id VARCHAR(255) CHARACTER SET utf8mb4 PATH '$')) AS ids"
    ),
    "{now}": "CAST(strftime('%s', 'now') AS INTEGER)",
}

_STATEMENTS: Mapping[Database, _Statements] = {
    Database.POSTGRESQL: _POSTGRESQL,
    Database.MYSQL: _MYSQL,
    Database.SQLITE: _SQLITE,
}


class InboxTable:
    """Reads and writes the claims of one consumer.

    Args:
        consumer: Its name, 1 to 255 characters.
        table: The name of the table.

    Raises:
        ConfigurationError: A name isn't allowed.
    """

    def __init__(self, consumer: str, table: str) -> None:
        if not 0 < len(consumer) <= LONGEST or "\0" in consumer:
            msg = f"the name of an inbox's consumer must have 1 to {LONGEST} characters"
            raise ConfigurationError(msg)
        self._consumer = consumer
        index = f"{check_table(table).rpartition('.')[2]}_claimed_at"
        names = {**_PIECES, "{table}": table, "{index}": index}
        self._statements = {each: found.fill(names) for each, found in _STATEMENTS.items()}

    def schema(self, database: Database) -> str:
        """Return the statement that creates the table."""
        return "".join(f"{each};\n" for each in self._statements[database].create)

    async def create(self, connection: DatabaseConnection) -> None:
        """Create the table if it doesn't exist."""
        for statement in self._statements[connection.database].create:
            await connection.execute(statement, {})

    async def insert(self, connection: DatabaseConnection, ids: Sequence[str]) -> set[str]:
        """Insert the ids that aren't in the table, and return those that were there before."""
        statements = self._statements[connection.database]
        parameters = self._parameters(ids)
        if statements.inserted is None:
            parameters["count"] = len(ids)
            rows = await connection.fetch(statements.claim, parameters)
        else:
            parameters["claim"] = f"{random.getrandbits(64):016x}"
            await connection.execute(statements.claim, parameters)
            rows = await connection.fetch(statements.inserted, parameters)
        if statements.summarizes:
            ((text,),) = rows
            if text is None:
                return set()
            found = set(json.loads(text))
        else:
            found = {row[0].decode() if isinstance(row[0], bytes) else row[0] for row in rows}
        if found and not found.issubset(ids):
            # The user's connection converts text. Messages would be dropped or handled again if
            # their ids weren't recognised.
            raise ConfigurationError("the connection returns other ids than it was given")
        return set(ids) - found

    async def delete(self, connection: DatabaseConnection, ids: Sequence[str]) -> None:
        """Delete these ids."""
        if ids:
            sql = self._statements[connection.database].release
            await connection.execute(sql, self._parameters(ids))

    async def prune(self, connection: DatabaseConnection, seconds: float) -> int:
        """Delete the claims that are older than this, and return their number."""
        sql = self._statements[connection.database].prune
        return await connection.execute(sql, {"consumer": self._consumer, "seconds": seconds})

    def _parameters(self, ids: Sequence[str]) -> dict[str, object]:
        # JSON in ASCII doesn't depend on the character set of a connection to MySQL.
        return {"consumer": self._consumer, "ids": json.dumps(ids)}
