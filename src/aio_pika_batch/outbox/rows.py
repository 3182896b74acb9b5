"""Publications as rows of the outbox, and back."""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

from aio_pika_batch.core.message import (
    NO_HEADERS,
    DecodedSource,
    FieldValue,
    Headers,
    Message,
    Properties,
)
from aio_pika_batch.core.publication import Publication
from aio_pika_batch.databases.connections import Parameters
from aio_pika_batch.databases.outbox_table import lane_of

_COLUMNS = ("body", "exchange", "routing_key", "message_id")
_DEFAULTS = {
    field.name: field.default for field in fields(Publication) if field.name not in _COLUMNS
}


def row_of(publication: Publication, key: str | None) -> Parameters:
    """Return a publication as a row. It gets an id, if it has none, and keeps it.

    Args:
        key: Publications with the same key keep their order.
    """
    properties = {
        name: value
        for name, default in _DEFAULTS.items()
        if (value := getattr(publication, name)) != default
    }
    return {
        "lane": None if key is None else lane_of(key),
        "order_key": key,
        "message_id": publication.message_id or uuid.uuid4().hex,
        "exchange": publication.exchange,
        "routing_key": publication.routing_key,
        "body": bytes(publication.body),
        "properties": json.dumps(properties, default=_encode) if properties else None,
    }


class Row(Message):
    """A row as a message, whose delivery tag is only valid in its session.

    Attributes:
        row_id: Its key in the table.
        key: Rows with the same key keep their order; None if there is no order.
        has_failed: Whether it was published and not confirmed.
    """

    __slots__ = ("_message_id", "_publication", "_stored", "has_failed", "key", "row_id")

    def __init__(self, source: DecodedSource, tag: int, columns: Sequence[Any]) -> None:
        row_id, message_id, exchange, routing_key, body, stored, key, attempts = columns
        super().__init__(source, tag, attempts > 0, body, (exchange, routing_key), _NONE)
        self.row_id: int = row_id
        self.key: str | bytes | None = key
        self.has_failed = False
        self._message_id: str = message_id
        self._stored: str | None = stored
        self._publication: Publication | None = None

    @property
    def publication(self) -> Publication:
        """What is published.

        Raises:
            ValueError, TypeError: The row was changed by hand, and isn't valid.
        """
        found = self._publication
        if found is None:
            exchange, routing_key = self._decoded_route()
            stored = self._stored
            more = {} if stored is None else json.loads(stored, object_hook=_decode)
            found = self._publication = Publication(
                self.body,
                exchange=exchange,
                routing_key=routing_key,
                message_id=self._message_id,
                **more,
            )
        return found

    @property
    def properties(self) -> Properties:
        """All properties as values, for observers."""
        return self.publication.properties

    @property
    def headers(self) -> Headers:
        """The headers; empty if there are none."""
        return self.publication.headers or NO_HEADERS


_NONE = Properties()
"""So that no row seems to have properties in AMQP's encoding."""


def _encode(value: object) -> object:
    """Values that JSON doesn't have, each as an object with one name."""
    match value:
        case bytes():
            return {"$bytes": base64.b64encode(value).decode()}
        case datetime():
            return {"$datetime": value.isoformat()}
        case timedelta():
            return value.total_seconds()
        case Decimal():
            return {"$decimal": str(value)}
        case Mapping():
            return dict(value)
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
    return found
