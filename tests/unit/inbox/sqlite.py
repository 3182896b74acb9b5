"""A connection that works like one of aiosqlite, without its thread, which virtual time cannot see.

`tests/integration/test_inbox_databases.py` runs the same calls on the real one.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self


class Connection:
    """As much of aiosqlite.Connection as the library uses."""

    def __init__(self, path: Path | str) -> None:
        self._conn = sqlite3.connect(path, timeout=0)
        # No process is killed here.
        self._conn.executescript("PRAGMA synchronous=OFF; PRAGMA journal_mode=MEMORY")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._conn.close()

    async def _step(self, work: Callable[[], Any]) -> Any:
        # As with a thread, others run meanwhile, and a cancellation can come before it or after it.
        await asyncio.sleep(0)
        for _ in range(500):
            try:
                done = work()
                break
            except sqlite3.OperationalError as error:
                if "locked" not in str(error):
                    raise
                await asyncio.sleep(0.01)  # as long as SQLite waits by default: 5 s
        else:
            done = work()
        await asyncio.sleep(0)
        return done

    @property
    def in_transaction(self) -> bool:
        return self._conn.in_transaction

    @property
    def isolation_level(self) -> str | None:
        return self._conn.isolation_level

    async def execute_fetchall(self, sql: str, parameters: Any = ()) -> list[Any]:
        return await self._step(lambda: self._conn.execute(sql, parameters).fetchall())

    @asynccontextmanager
    async def execute(self, sql: str, parameters: Any = ()) -> AsyncIterator[sqlite3.Cursor]:
        yield await self._step(lambda: self._conn.execute(sql, parameters))

    @asynccontextmanager
    async def executemany(self, sql: str, parameters: Any) -> AsyncIterator[sqlite3.Cursor]:
        yield await self._step(lambda: self._conn.executemany(sql, parameters))

    async def commit(self) -> None:
        await self._step(self._conn.commit)

    async def rollback(self) -> None:
        await self._step(self._conn.rollback)


Connection.__module__ = "aiosqlite.core"
