"""Connections of each supported driver, for tests that run on all of them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from aio_pika_batch.databases.connections import Database, adapt

Connect = Callable[[], AbstractAsyncContextManager[Any]]

ON_POSTGRES = ("asyncpg", "psycopg", "sqlalchemy-asyncpg", "sqlalchemy-psycopg", "session-asyncpg")
ON_MARIADB = ("sqlalchemy-asyncmy", "session-asyncmy")
ON_SQLITE = ("aiosqlite", "sqlalchemy-aiosqlite", "session-aiosqlite")
DRIVERS = (*ON_POSTGRES, *ON_MARIADB, *ON_SQLITE)
_LONG = {"sqlalchemy-psycopg", "session-asyncmy", "sqlalchemy-aiosqlite", "session-aiosqlite"}


def by(*drivers: str) -> list[Any]:
    """Parameters of tests; combinations of what others already cover are marked as long."""
    return [
        pytest.param(each, marks=pytest.mark.long) if each in _LONG else each for each in drivers
    ]


EFFECTS = "CREATE TABLE effects (id varchar(255))"
"""No key: an effect that is repeated is there twice."""


@dataclass
class TestDatabase:
    """One database, reached by one driver.

    Attributes:
        driver: One of `DRIVERS`.
        connect: Opens a connection that has no transaction open.
    """

    __test__ = False

    driver: str
    url: str
    connect: Connect

    @property
    def database(self) -> Database:
        """Whose SQL its connections speak."""
        if self.driver in ON_POSTGRES:
            return Database.POSTGRESQL
        return Database.MYSQL if self.driver in ON_MARIADB else Database.SQLITE

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Any]:
        """A connection with a transaction open, as a user of this driver would begin it."""
        async with self.connect() as connection:
            if self.driver in {"asyncpg", "psycopg"}:
                async with connection.transaction():
                    yield connection
            elif self.driver == "aiosqlite":
                await connection.execute_fetchall("BEGIN IMMEDIATE")
                try:
                    yield connection
                except BaseException:
                    await connection.rollback()
                    raise
                await connection.commit()
            else:
                async with connection.begin():
                    yield connection

    async def effects(self) -> list[str]:
        """Every effect there is, sorted."""
        async with self.connect() as connection:
            rows = await adapt(connection).fetch("SELECT id FROM effects", {})
            return sorted(row[0] for row in rows)


async def write(connection: object, ids: Sequence[str]) -> None:
    """Write effects, in the transaction of the connection."""
    if ids:
        sql = "INSERT INTO effects (id) VALUES (:id)"
        await adapt(connection).execute_many(sql, [{"id": each} for each in ids])


@asynccontextmanager
async def database(
    driver: str, url: str, isolation_level: str | None = None
) -> AsyncIterator[TestDatabase]:
    """Open a database.

    Args:
        driver: One of `DRIVERS`.
        url: `postgresql://…`, `mysql+asyncmy://…`, or a file for SQLite.
        isolation_level: Of SQLAlchemy's connections.
    """
    kind, _, under = driver.partition("-")
    if kind == "asyncpg":
        import asyncpg

        async with asyncpg.create_pool(url, min_size=0, max_size=8) as pool:
            yield TestDatabase(driver, url, pool.acquire)
    elif kind == "psycopg":
        import psycopg_pool

        async with psycopg_pool.AsyncConnectionPool(url, min_size=1, max_size=8) as pool:
            yield TestDatabase(driver, url, pool.connection)
    elif kind == "aiosqlite":
        import aiosqlite

        yield TestDatabase(driver, url, lambda: aiosqlite.connect(url))
    else:
        from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
        from sqlalchemy.pool import NullPool

        scheme = {"asyncpg": "postgresql+asyncpg", "psycopg": "postgresql+psycopg"}
        full = f"sqlite+aiosqlite:///{url}" if under == "aiosqlite" else url
        if under in scheme:
            # asyncpg knows nothing of this option.
            full = url.replace("postgresql", scheme[under], 1)
        options: dict[str, Any] = {}
        if isolation_level is not None:
            options["isolation_level"] = isolation_level
        engine = create_async_engine(full, poolclass=NullPool, **options)
        try:
            if kind == "session":
                yield TestDatabase(driver, url, lambda: AsyncSession(engine))
            else:
                yield TestDatabase(driver, url, engine.connect)
        finally:
            await engine.dispose()
