"""Database connections, as the inbox and the outbox use them.

A connection is recognised by its class, so that no driver is imported here: code that passes a
connection has imported its driver. SQL is written once for each database, with `:name` for
parameters, and translated to what the driver takes.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum
from functools import cache
from typing import Any, Self, TypeAlias

from aio_pika_batch.errors import ConfigurationError

Parameters: TypeAlias = Mapping[str, object]
Rows: TypeAlias = Sequence[Sequence[Any]]


class Database(Enum):
    """The databases whose SQL is known."""

    POSTGRESQL = "postgresql"
    MYSQL = "mysql"
    """MySQL and MariaDB."""
    SQLITE = "sqlite"


class DatabaseConnection(ABC):
    """A user's connection, with the few calls that are needed of it.

    Attributes:
        database: Whose SQL it speaks.
    """

    database: Database

    def __init__(self, connection: Any) -> None:  # noqa: ANN401  -- a driver's own
        self._connection = connection

    @property
    @abstractmethod
    def in_transaction(self) -> bool:
        """Whether a transaction is open."""

    @abstractmethod
    async def can_roll_back(self) -> bool:
        """Whether the next statement belongs to a transaction, which it may have to open."""

    @abstractmethod
    async def execute(self, sql: str, parameters: Parameters) -> int:
        """Run a statement, and return how many rows it has changed."""

    @abstractmethod
    async def execute_many(self, sql: str, parameters: Sequence[Parameters]) -> None:
        """Run a statement once for each set of parameters."""

    @abstractmethod
    async def fetch(self, sql: str, parameters: Parameters) -> Rows:
        """Run a statement, and return its rows."""

    @abstractmethod
    async def begin(self) -> None:
        """Open a transaction."""

    async def flush(self) -> None:  # noqa: B027  -- most drivers have nothing to do
        """Send what is still to be written."""

    async def commit(self) -> None:
        """Commit it."""
        await self._connection.commit()

    async def rollback(self) -> None:
        """Roll it back."""
        await self._connection.rollback()


_TABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)?", re.ASCII)


def check_table(name: str) -> str:
    """Return the name of a table, which goes into SQL as it is.

    Raises:
        ConfigurationError: It needs quotes.
    """
    if not _TABLE.fullmatch(name):
        msg = f"table={name!r}: use letters, digits and underscores, and one dot after a schema"
        raise ConfigurationError(msg)
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class Statements:
    """The statements for one database. Names in braces are filled in."""

    create: tuple[str, ...]

    def fill(self, pieces: Mapping[str, str]) -> Self:
        """Return the statements with each piece replaced by its text, in their order."""

        def filled(text: str) -> str:
            for name, piece in pieces.items():
                text = text.replace(name, piece)
            return text

        values = {each.name: getattr(self, each.name) for each in fields(self)}
        texts = {name: filled(value) for name, value in values.items() if isinstance(value, str)}
        return replace(self, create=tuple(map(filled, self.create)), **texts)


def adapt(connection: object) -> DatabaseConnection:
    """Return what makes a user's connection look like any other.

    Raises:
        ConfigurationError: It is of a driver or a database that is not supported.
    """
    cls: Any = type(connection)
    return _adapter(cls)(connection)


@cache
def _adapter(cls: Any) -> Callable[[Any], DatabaseConnection]:  # noqa: ANN401  -- a class, which is hashable
    keys = [(each.__module__.partition(".")[0], each.__qualname__) for each in cls.__mro__]
    for key in keys:
        if key in _ADAPTERS:
            return _ADAPTERS[key]
    name = f"{cls.__module__}.{cls.__qualname__}"
    for key in keys:
        if key in _HINTS:
            raise ConfigurationError(f"{name} can't be used here: {_HINTS[key]}")
    raise ConfigurationError(
        f"{name} is not supported: use a connection of asyncpg, psycopg (AsyncConnection),"
        " SQLAlchemy (AsyncConnection or AsyncSession) or aiosqlite"
    )


# -- the drivers --------------------------------------------------------------------------------

_PARAMETER = re.compile(r":([a-z_]+)")


@cache
def _numbered(sql: str) -> tuple[str, tuple[str, ...]]:
    """The statement with `$1`, `$2`, …, and which parameter each of them is."""
    names = tuple(dict.fromkeys(_PARAMETER.findall(sql)))
    return _PARAMETER.sub(lambda found: f"${names.index(found[1]) + 1}", sql), names


class _Asyncpg(DatabaseConnection):
    """A connection of asyncpg, or what its pool hands out."""

    database = Database.POSTGRESQL
    _transaction: Any

    @property
    def in_transaction(self) -> bool:
        return bool(self._connection.is_in_transaction())

    async def can_roll_back(self) -> bool:
        return self.in_transaction

    async def execute(self, sql: str, parameters: Parameters) -> int:
        text, names = _numbered(sql)
        tag = await self._connection.execute(text, *[parameters[name] for name in names])
        count: str = tag.rpartition(" ")[2]  # such as "DELETE 7"
        return int(count) if count.isdecimal() else 0

    async def execute_many(self, sql: str, parameters: Sequence[Parameters]) -> None:
        text, names = _numbered(sql)
        rows = [[each[name] for name in names] for each in parameters]
        await self._connection.executemany(text, rows)

    async def fetch(self, sql: str, parameters: Parameters) -> Rows:
        text, names = _numbered(sql)
        rows: Rows = await self._connection.fetch(text, *[parameters[name] for name in names])
        return rows

    async def begin(self) -> None:
        self._transaction = self._connection.transaction()
        await self._transaction.start()

    async def commit(self) -> None:
        await self._transaction.commit()

    async def rollback(self) -> None:
        await self._transaction.rollback()


@cache
def _formatted(sql: str) -> str:
    return _PARAMETER.sub(r"%(\1)s", sql)


class _Psycopg(DatabaseConnection):
    """An AsyncConnection of psycopg 3."""

    database = Database.POSTGRESQL

    @property
    def in_transaction(self) -> bool:
        return str(self._connection.info.transaction_status.name) != "IDLE"

    async def can_roll_back(self) -> bool:
        return self.in_transaction or not self._connection.autocommit

    async def execute(self, sql: str, parameters: Parameters) -> int:
        async with self._connection.cursor() as cursor:
            await cursor.execute(_formatted(sql), parameters)
            return int(cursor.rowcount)

    async def execute_many(self, sql: str, parameters: Sequence[Parameters]) -> None:
        async with self._connection.cursor() as cursor:
            await cursor.executemany(_formatted(sql), parameters)

    async def fetch(self, sql: str, parameters: Parameters) -> Rows:
        # As tuples, whatever the connection makes of rows otherwise.
        async with self._connection.cursor(row_factory=lambda _: tuple) as cursor:
            await cursor.execute(_formatted(sql), parameters)
            rows: Rows = await cursor.fetchall()
            return rows

    async def begin(self) -> None:
        if self._connection.autocommit:
            await self._connection.execute("BEGIN")


class _Aiosqlite(DatabaseConnection):
    """A connection of aiosqlite."""

    database = Database.SQLITE

    @property
    def in_transaction(self) -> bool:
        return bool(self._connection.in_transaction)

    async def can_roll_back(self) -> bool:
        # Since Python 3.12 `autocommit` outdoes `isolation_level`, if it is a bool.
        autocommit = getattr(self._connection._conn, "autocommit", None)  # noqa: SLF001  -- not passed on by aiosqlite
        begins = self._connection.isolation_level is not None
        if isinstance(autocommit, bool):
            begins = not autocommit
        return begins or self.in_transaction

    async def execute(self, sql: str, parameters: Parameters) -> int:
        async with self._connection.execute(sql, parameters) as cursor:
            return int(cursor.rowcount)

    async def execute_many(self, sql: str, parameters: Sequence[Parameters]) -> None:
        async with self._connection.executemany(sql, parameters):
            pass

    async def fetch(self, sql: str, parameters: Parameters) -> Rows:
        rows = await self._connection.execute_fetchall(sql, parameters)
        # A row factory of the user's may have made dicts of them.
        return [tuple(row.values()) if isinstance(row, dict) else tuple(row) for row in rows]

    async def begin(self) -> None:
        # At once, and not at the first write: SQLite cannot wait for a lock where it has read.
        await self._connection.execute_fetchall("BEGIN IMMEDIATE")


@cache
def _text(sql: str) -> Any:  # noqa: ANN401  -- SQLAlchemy's own
    import sqlalchemy

    return sqlalchemy.text(sql)


_SQLALCHEMY = {
    "postgresql": Database.POSTGRESQL,
    "mysql": Database.MYSQL,
    "mariadb": Database.MYSQL,
    "sqlite": Database.SQLITE,
}


class _Sqlalchemy(DatabaseConnection):
    """An AsyncConnection or an AsyncSession of SQLAlchemy, which do this in the same words."""

    def __init__(self, connection: Any) -> None:  # noqa: ANN401  -- SQLAlchemy's own
        super().__init__(connection)
        name = self._dialect.name
        if name not in _SQLALCHEMY:
            known = "PostgreSQL, MySQL, MariaDB and SQLite"
            raise ConfigurationError(f"{name} is not supported through SQLAlchemy: {known} are")
        self.database = _SQLALCHEMY[name]

    @property
    def _dialect(self) -> Any:  # noqa: ANN401  -- SQLAlchemy's own
        is_session = hasattr(self._connection, "get_bind")
        return (self._connection.get_bind() if is_session else self._connection).dialect

    @property
    def in_transaction(self) -> bool:
        return bool(self._connection.in_transaction())

    async def can_roll_back(self) -> bool:
        # With the isolation level AUTOCOMMIT a transaction only seems to be one.
        connection = self._connection
        if hasattr(connection, "get_bind"):
            connection = await connection.connection()
        detect = getattr(self._dialect, "detect_autocommit_setting", None)
        try:
            driver = await connection.get_raw_connection()
            return detect is None or not detect(driver.dbapi_connection)
        except NotImplementedError:
            return True

    async def execute(self, sql: str, parameters: Parameters) -> int:
        return int((await self._connection.execute(_text(sql), parameters)).rowcount)

    async def execute_many(self, sql: str, parameters: Sequence[Parameters]) -> None:
        await self._connection.execute(_text(sql), parameters)

    async def fetch(self, sql: str, parameters: Parameters) -> Rows:
        rows: Rows = (await self._connection.execute(_text(sql), parameters)).fetchall()
        return rows

    async def begin(self) -> None:
        await self._connection.begin()

    async def flush(self) -> None:
        if hasattr(self._connection, "flush"):
            await self._connection.flush()


_ADAPTERS: Mapping[tuple[str, str], Callable[[Any], DatabaseConnection]] = {
    ("asyncpg", "Connection"): _Asyncpg,
    ("asyncpg", "PoolConnectionProxy"): _Asyncpg,
    ("psycopg", "AsyncConnection"): _Psycopg,
    ("sqlalchemy", "AsyncConnection"): _Sqlalchemy,
    ("sqlalchemy", "AsyncSession"): _Sqlalchemy,
    ("aiosqlite", "Connection"): _Aiosqlite,
}
"""By package and class."""

_HINTS: Mapping[tuple[str, str], str] = {
    ("asyncpg", "Pool"): "take one by `async with pool.acquire() as connection`",
    ("psycopg_pool", "AsyncConnectionPool"): (
        "take one by `async with pool.connection() as connection`"
    ),
    ("psycopg", "Connection"): "it blocks the event loop; use psycopg.AsyncConnection",
    ("sqlalchemy", "AsyncEngine"): "take one by `async with engine.connect() as connection`",
    ("sqlalchemy", "async_sessionmaker"): "take a session by `async with maker() as session`",
    ("sqlalchemy", "Connection"): "it blocks the event loop; use AsyncConnection",
    ("sqlalchemy", "Session"): "it blocks the event loop; use AsyncSession",
    ("sqlite3", "Connection"): "it blocks the event loop; use aiosqlite",
}


# -- their errors --------------------------------------------------------------------------------

_DEADLOCKS = frozenset({"40001", "40P01", 1020, 1213})
"""SQLSTATEs, and error numbers of MySQL: a serialization failure, or a deadlock."""


def code_of(error: BaseException) -> str | int | None:
    """The SQLSTATE of an error, or MySQL's number; None if it was not the server that raised it."""
    error = getattr(error, "orig", None) or error  # SQLAlchemy's wrapper
    state: object = getattr(error, "sqlstate", None)
    if isinstance(state, str):
        return state
    module = type(error).__module__.partition(".")[0]
    if module == "sqlite3":
        return "SQLITE"
    number: object = error.args[0] if error.args else None
    if module in {"asyncmy", "pymysql", "aiomysql", "MySQLdb"} and isinstance(number, int):
        return number
    return None


def is_deadlock(error: BaseException) -> bool:
    """Whether the same transaction may succeed when it is run again from its beginning."""
    return code_of(error) in _DEADLOCKS


_LOST = ("08", "57P")
"""Classes of SQLSTATEs: a connection that is lost, a server that is shutting down."""

_CLIENT_ERRORS = 2000
"""From here on, MySQL's numbers are those of its client library."""


def is_refusal(error: BaseException) -> bool:
    """Whether the server has reported that it did not commit.

    Otherwise it is unknown whether a COMMIT that failed has taken effect.
    """
    match code_of(error):
        case None:
            return False
        case int() as number:
            return number < _CLIENT_ERRORS
        case state:
            return not state.startswith(_LOST)
