"""Adds publications to a table, in the transaction of the user's other effects."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

from aio_pika_batch.core.publication import Publication
from aio_pika_batch.databases.connections import Database, adapt
from aio_pika_batch.databases.outbox_table import OutboxTable
from aio_pika_batch.errors import ConfigurationError
from aio_pika_batch.outbox.rows import row_of


class Outbox:
    """Publications that a relay publishes once your transaction is committed.

    Args:
        table: Letters, digits and underscores, and one dot after a schema.

    Raises:
        ConfigurationError: The name isn't allowed.
    """

    def __init__(self, *, table: str = "aio_pika_batch_outbox") -> None:
        self.table = table
        self._rows = OutboxTable(table)

    def schema(self, database: Database | Literal["postgresql", "mysql", "sqlite"]) -> str:
        """Return the SQL that `create` runs, for your migrations.

        Args:
            database: `"mysql"` is for MariaDB too.
        """
        return self._rows.schema(Database(database))

    async def create(self, connection: object) -> None:
        """Create the tables if they don't exist. Commit afterwards."""
        await self._rows.create(adapt(connection))

    async def add(
        self,
        connection: object,
        publications: Iterable[Publication],
        *,
        key: Callable[[Publication], str | None] | None = None,
    ) -> None:
        """Add publications in your transaction. A relay publishes them after the commit.

        A publication without a `message_id` gets one, and keeps it if it is published again.

        Args:
            connection: One with an open transaction: of asyncpg, psycopg (AsyncConnection),
                SQLAlchemy (AsyncConnection or AsyncSession) or aiosqlite.
            key: Returns the key of a publication. Publications with the same key are published in
                the order in which they were added, each after the one before it was confirmed.
                None means no order.

        Raises:
            ConfigurationError: There is no transaction, or the driver isn't supported.
            TypeError: A header has a value that can't be stored.
        """
        database = adapt(connection)
        if not await database.can_roll_back():
            raise ConfigurationError(
                "there is no transaction: publications must be committed together with the other"
                " effects; begin one first"
            )
        rows = [row_of(each, None if key is None else key(each)) for each in publications]
        if rows:
            await self._rows.add(database, rows)

    async def count(self, connection: object) -> int:
        """Return how many publications wait."""
        return await self._rows.count(adapt(connection))
