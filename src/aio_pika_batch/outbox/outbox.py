"""Adds publications to a table, in the transaction of the user's other effects, and reads them."""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from datetime import datetime
from decimal import Decimal
from functools import lru_cache
from typing import Any, Literal

from aio_pika_batch.core.message import DecodedSource, FieldValue, Properties
from aio_pika_batch.core.publication import Publication, StoredPublication
from aio_pika_batch.databases.connections import Database, Parameters, adapt
from aio_pika_batch.databases.outbox_table import OutboxTable, lane_of
from aio_pika_batch.errors import ConfigurationError


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


# -- publications as rows, and back ---------------------------------------------------------------

_DEFAULTS = Properties(delivery_mode=2)
_STORED = tuple(
    each.name for each in fields(Properties) if each.name not in ("message_id", "undecodable")
)


def row_of(publication: Publication, key: str | None) -> Parameters:
    """Return a publication as a row. It gets an id, if it has none, and keeps it.

    Args:
        key: Publications with the same key keep their order.

    Raises:
        TypeError: A header has a value that can't be stored.
    """
    properties = publication.properties
    more = {
        name: value
        for name in _STORED
        if (value := getattr(properties, name)) != getattr(_DEFAULTS, name)
    }
    if properties.headers:
        more["headers"] = _escape(properties.headers)
    if not publication.mandatory:
        more["mandatory"] = False
    return {
        "lane": None if key is None else lane_of(key),
        "order_key": key,
        "message_id": properties.message_id or uuid.uuid4().hex,
        "exchange": publication.exchange,
        "routing_key": publication.routing_key,
        "body": publication.body,
        "properties": json.dumps(more, default=_encode) if more else None,
    }


class Row(StoredPublication):
    """A row as a message, whose delivery tag is only valid in its session.

    Args:
        columns: See `databases.outbox_table`.

    Attributes:
        key: Rows with the same key keep their order; None: it may come at any place.

    Raises:
        ValueError, TypeError, AttributeError: The row was changed by hand, and isn't valid.
    """

    __slots__ = ("key",)

    def __init__(self, source: DecodedSource, tag: int, columns: Sequence[Any]) -> None:
        # What `Message` does, without another call: one is created for each publication.
        _, self.message_id, self.exchange, self.routing_key, self.body, stored, self.key = columns
        self.template, self.mandatory = _read(stored)
        self._source = source
        self.delivery_tag = tag
        self.redelivered = False
        self._properties = self.template
        self._read = None


@lru_cache(maxsize=64)  # the rows of a program have the same few texts
def _read(stored: str | None) -> tuple[Properties, bool]:
    """Return the properties of a row, without its id, and whether it is mandatory."""
    more = {} if stored is None else _JSON.decode(stored)
    more = {"delivery_mode": 2, "mandatory": True, **more}
    mandatory = more.pop("mandatory")
    return Properties(**more), mandatory


def _escape(value: Any) -> Any:  # noqa: ANN401  -- a header's value, or more of them
    """Double the `$` of a name that `_decode` would take for a type."""
    if isinstance(value, Mapping):
        is_like_type = len(value) == 1 and str(*value).startswith("$")
        return {f"${name}" if is_like_type else name: _escape(each) for name, each in value.items()}
    return list(map(_escape, value)) if isinstance(value, list | tuple) else value


def _encode(value: object) -> object:
    """Values that JSON doesn't have, each as an object with one name."""
    match value:
        case bytes():
            return {"$bytes": base64.b64encode(value).decode()}
        case datetime():
            return {"$datetime": value.isoformat()}
        case Decimal():
            return {"$decimal": str(value)}
        case _:
            raise TypeError(f"{type(value).__name__} cannot be stored in an outbox")


_DECODERS: Mapping[str, Callable[[str], FieldValue]] = {
    "$bytes": base64.b64decode,
    "$datetime": datetime.fromisoformat,
    "$decimal": Decimal,
}


def _decode(found: dict[str, Any]) -> Any:  # noqa: ANN401  -- a header's value, or more of them
    if len(found) == 1:
        [(name, text)] = found.items()
        decode = _DECODERS.get(name)
        if decode is not None:
            return decode(text)
        if name.startswith("$$"):
            return {name[1:]: text}
    return found


_JSON = json.JSONDecoder(object_hook=_decode)
