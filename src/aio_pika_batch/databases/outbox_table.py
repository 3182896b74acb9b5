"""The table of publications that wait for a relay, and the lanes that keep their order.

Publications with a key belong to one of `LANES` lanes, by a hash of the key. A relay locks a lane
before it reads from it, so that only one relay publishes the messages of a key at a time. SQLite
has no row locks: there one relay at a time has a lease of the whole table.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

from aio_pika_batch.databases.connections import (
    Database,
    DatabaseConnection,
    Parameters,
    Statements,
    check_table,
)

LANES = 64
LANES_AT_ONCE = 16
"""Lanes that a relay locks in one transaction. The others are left to other relays."""

LEASE = 30.0
"""Seconds for which a relay has the table, where rows can't be locked."""

_LOCKED = [f"lane_{letter}" for letter in "abcdefghijklmnop"]

_PIECES = {
    # Drivers take ten times as long to encode an array.
    "{array}": "CAST(translate(CAST(:ids AS text), '[]', '{}') AS bigint[])",
    "{columns}": "id, message_id, exchange, routing_key, body, properties, order_key",
    "{due}": "(retry_at IS NULL OR retry_at <= {now})",
    # A row that waits for another attempt holds up all later rows with the same key.
    "{in_order}": "order_key NOT IN (SELECT late.order_key FROM {table} AS late"
    " WHERE late.retry_at > {now} AND late.order_key IS NOT NULL)",
    "{locked}": f"lane IN ({', '.join(f':{each}' for each in _LOCKED)})",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Statements(Statements):
    """The statements of an outbox.

    Attributes:
        now: The current time. Like `lock`, it is a part of other statements.
        lock: Locks the rows that are read.
        begin: Runs at the beginning of a transaction that takes rows; None if nothing is needed.
        lanes: Locks lanes that have rows; None where `lease` is used instead.
        lease: Takes or renews the lease, and returns a row if it has been taken.
    """

    delete: str
    postpone: str
    now: str
    lock: str
    begin: str | None = None
    lanes: str | None = None
    lease: str | None = None
    without_key: str = """SELECT {columns} FROM {table}
WHERE lane IS NULL AND {due} ORDER BY id LIMIT :limit{lock}"""
    of_lanes: str = """SELECT {columns} FROM {table}
WHERE {locked} AND {in_order} ORDER BY id LIMIT :limit"""
    all: str = """SELECT {columns} FROM {table}
WHERE {due} AND (lane IS NULL OR {in_order}) ORDER BY id LIMIT :limit"""
    add: str = """INSERT INTO {table}
(lane, order_key, message_id, exchange, routing_key, body, properties)
VALUES (:lane, :order_key, :message_id, :exchange, :routing_key, :body, :properties)"""
    release: str = "DELETE FROM {table}_lease WHERE owner = :owner"
    count: str = "SELECT count(*) FROM {table}"
    check: str = "SELECT 1 FROM {table} WHERE id = 0"


_POSTGRESQL = _Statements(
    # Without the lock, sessions that create the table at the same time fail, IF NOT EXISTS or not.
    create=(
        """DO $$ BEGIN
PERFORM pg_advisory_xact_lock(7146204552);
CREATE TABLE IF NOT EXISTS {table} (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    lane smallint,
    order_key text,
    message_id text NOT NULL,
    exchange text NOT NULL,
    routing_key text NOT NULL,
    body bytea NOT NULL,
    properties text,
    attempts integer NOT NULL DEFAULT 0,
    retry_at timestamptz,
    added_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX IF NOT EXISTS {index}_lane ON {table} (lane, id);
CREATE INDEX IF NOT EXISTS {index}_retry ON {table} (retry_at) WHERE retry_at IS NOT NULL;
CREATE TABLE IF NOT EXISTS {table}_lanes (lane smallint PRIMARY KEY);
INSERT INTO {table}_lanes SELECT generate_series(0, {last_lane}) ON CONFLICT DO NOTHING;
END $$""",
    ),
    delete="DELETE FROM {table} WHERE id = ANY({array})",
    postpone="""UPDATE {table} SET attempts = attempts + 1,
retry_at = now() + power(2, least(attempts, 8)) * interval '1 second'
WHERE id = ANY({array})""",
    lock=" FOR UPDATE SKIP LOCKED",
    lanes="""SELECT lane FROM {table}_lanes AS lanes
WHERE EXISTS (SELECT 1 FROM {table} AS waiting WHERE waiting.lane = lanes.lane)
ORDER BY random() LIMIT {lanes} FOR UPDATE SKIP LOCKED""",
    now="now()",
)

_MYSQL = _Statements(
    create=(
        """CREATE TABLE IF NOT EXISTS {table} (
    id bigint NOT NULL AUTO_INCREMENT PRIMARY KEY,
    lane smallint,
    order_key varbinary(1020),
    message_id varchar(255) CHARACTER SET utf8mb4 NOT NULL,
    exchange varchar(255) CHARACTER SET utf8mb4 NOT NULL,
    routing_key varchar(255) CHARACTER SET utf8mb4 NOT NULL,
    body longblob NOT NULL,
    properties mediumtext CHARACTER SET utf8mb4,
    attempts integer NOT NULL DEFAULT 0,
    retry_at datetime,
    added_at timestamp NOT NULL DEFAULT CURRENT_TIMESTAMP,
    KEY {index}_lane (lane, id),
    KEY {index}_retry (retry_at)
) ENGINE=InnoDB""",
        "CREATE TABLE IF NOT EXISTS {table}_lanes (lane smallint PRIMARY KEY) ENGINE=InnoDB",
        "INSERT IGNORE INTO {table}_lanes VALUES {each_lane}",
    ),
    # STRAIGHT_JOIN looks up each id. A plain IN reads, and locks, the whole table.
    delete="""DELETE these FROM JSON_TABLE(:ids, '$[*]' COLUMNS (id BIGINT PATH '$')) AS ids
STRAIGHT_JOIN {table} AS these ON these.id = ids.id""",
    # Assignments are made from left to right.
    postpone="""UPDATE JSON_TABLE(:ids, '$[*]' COLUMNS (id BIGINT PATH '$')) AS ids
STRAIGHT_JOIN {table} AS these ON these.id = ids.id
SET these.retry_at = UTC_TIMESTAMP() + INTERVAL POW(2, LEAST(these.attempts, 8)) SECOND,
these.attempts = these.attempts + 1""",
    lock=" FOR UPDATE SKIP LOCKED",
    # At its default level MySQL locks the gaps between rows, and no transaction could add rows.
    begin="SET TRANSACTION ISOLATION LEVEL READ COMMITTED",
    lanes="""SELECT lane FROM {table}_lanes AS lanes
WHERE EXISTS (SELECT 1 FROM {table} AS waiting WHERE waiting.lane = lanes.lane)
ORDER BY RAND() LIMIT {lanes} FOR UPDATE SKIP LOCKED""",
    now="UTC_TIMESTAMP()",
)

_SQLITE = _Statements(
    create=(
        """CREATE TABLE IF NOT EXISTS {table} (
    id integer PRIMARY KEY AUTOINCREMENT,
    lane integer,
    order_key text,
    message_id text NOT NULL,
    exchange text NOT NULL,
    routing_key text NOT NULL,
    body blob NOT NULL,
    properties text,
    attempts integer NOT NULL DEFAULT 0,
    retry_at integer,
    added_at integer NOT NULL DEFAULT (strftime('%s', 'now'))
)""",
        "CREATE INDEX IF NOT EXISTS {table}_lane ON {index} (lane, id)",
        """CREATE INDEX IF NOT EXISTS {table}_retry ON {index} (retry_at)
WHERE retry_at IS NOT NULL""",
        "CREATE TABLE IF NOT EXISTS {table}_lease (id integer PRIMARY KEY, owner text, ends real)",
    ),
    delete="DELETE FROM {table} WHERE id IN (SELECT value FROM json_each(:ids))",
    postpone="""UPDATE {table} SET attempts = attempts + 1,
retry_at = {now} + (1 << min(attempts, 8)) WHERE id IN (SELECT value FROM json_each(:ids))""",
    lock="",
    lease="""INSERT INTO {table}_lease VALUES (1, :owner, :ends)
ON CONFLICT (id) DO UPDATE SET owner = excluded.owner, ends = excluded.ends
WHERE owner = excluded.owner OR ends < :now RETURNING id""",
    now="CAST(strftime('%s', 'now') AS INTEGER)",
)

_STATEMENTS = {
    Database.POSTGRESQL: _POSTGRESQL,
    Database.MYSQL: _MYSQL,
    Database.SQLITE: _SQLITE,
}


def lane_of(key: str) -> int:
    """Return the lane of a key, the same in every process."""
    return crc32(key.encode()) % LANES


class OutboxTable:
    """Reads and writes publications that wait.

    Args:
        table: The name of the table.

    Raises:
        ConfigurationError: The name isn't allowed.
    """

    def __init__(self, table: str) -> None:
        names = {
            "{table}": check_table(table),
            "{index}": table.rpartition(".")[2],
            "{lanes}": str(LANES_AT_ONCE),
            "{last_lane}": str(LANES - 1),
            "{each_lane}": ", ".join(f"({lane})" for lane in range(LANES)),
        }
        self._statements = {
            database: each.fill({**_PIECES, "{now}": each.now, "{lock}": each.lock, **names})
            for database, each in _STATEMENTS.items()
        }

    def schema(self, database: Database) -> str:
        """Return the statements that create the tables, as a script."""
        return "".join(f"{each};\n" for each in self._statements[database].create)

    async def create(self, connection: DatabaseConnection) -> None:
        """Create the tables if they don't exist."""
        for statement in self._statements[connection.database].create:
            await connection.execute(statement, {})

    @staticmethod
    def locks_rows(connection: DatabaseConnection) -> bool:
        """Return whether `take` locks rows until the transaction ends, so it must stay open."""
        return _STATEMENTS[connection.database].lease is None

    async def check(self, connection: DatabaseConnection) -> None:
        """Raise the database's error if there is no such table."""
        await connection.fetch(self._statements[connection.database].check, {})

    async def count(self, connection: DatabaseConnection) -> int:
        """Return the number of publications that wait."""
        [[count]] = await connection.fetch(self._statements[connection.database].count, {})
        return int(count)

    async def add(self, connection: DatabaseConnection, rows: Sequence[Parameters]) -> None:
        """Insert rows, in this order."""
        await connection.execute_many(self._statements[connection.database].add, rows)

    async def take(
        self, connection: DatabaseConnection, limit: int, *, owner: str, now: float
    ) -> list[Sequence[Any]]:
        """Return rows that no other relay has, oldest first; locked until the transaction ends.

        Args:
            owner: Identifies the relay, for a lease.
            now: Seconds since the Unix epoch, for a lease.
        """
        statements = self._statements[connection.database]
        if statements.lease is not None:
            lease: Parameters = {"owner": owner, "now": now, "ends": now + LEASE}
            if not await connection.fetch(statements.lease, lease):
                return []
            return list(await connection.fetch(statements.all, {"limit": limit}))
        if statements.begin is not None:
            await connection.execute(statements.begin, {})
        rows = list(await connection.fetch(statements.without_key, {"limit": limit}))
        if statements.lanes is not None and len(rows) < limit:
            lanes = [row[0] for row in await connection.fetch(statements.lanes, {})]
            if lanes:
                padded = [*lanes, *[lanes[0]] * (LANES_AT_ONCE - len(lanes))]
                parameters = dict(zip(_LOCKED, padded, strict=True))
                left = {"limit": limit - len(rows), **parameters}
                rows += await connection.fetch(statements.of_lanes, left)
        return rows

    async def release(self, connection: DatabaseConnection, *, owner: str) -> None:
        """Give back the lease, if there is one."""
        statements = self._statements[connection.database]
        if statements.lease is not None:
            await connection.begin()
            await connection.execute(statements.release, {"owner": owner})
            await connection.commit()

    async def delete(self, connection: DatabaseConnection, ids: Sequence[int]) -> None:
        """Delete rows that were published."""
        sql = self._statements[connection.database].delete
        await connection.execute(sql, {"ids": json.dumps(ids)})

    async def postpone(self, connection: DatabaseConnection, ids: Sequence[int]) -> None:
        """Let rows wait for another attempt: for 1 s, then twice as long each time, up to 256 s."""
        sql = self._statements[connection.database].postpone
        await connection.execute(sql, {"ids": json.dumps(ids)})
