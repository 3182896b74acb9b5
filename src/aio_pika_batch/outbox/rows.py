"""Publications as rows of the outbox, and back."""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from datetime import datetime
from decimal import Decimal
from typing import Any, cast

from aio_pika_batch.core.message import (
    NO_HEADERS,
    DecodedSource,
    FieldValue,
    Headers,
    Message,
    Properties,
)
from aio_pika_batch.core.publication import Copy, Publication
from aio_pika_batch.databases.connections import Parameters
from aio_pika_batch.databases.outbox_table import lane_of

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
    if not publication.mandatory:
        more["mandatory"] = False
    return {
        "lane": None if key is None else lane_of(key),
        "order_key": key,
        "message_id": properties.message_id or uuid.uuid4().hex,
        "exchange": publication.exchange,
        "routing_key": publication.routing_key,
        "body": bytes(publication.body),
        "properties": json.dumps(more, default=_encode) if more else None,
    }


class Row(Message):
    """A row as a message, whose delivery tag is only valid in its session.

    Attributes:
        row_id: Its key in the table.
        key: Rows with the same key keep their order; None if there is no order.
        has_failed: Whether it was published and not confirmed.
    """

    __slots__ = ("_message_id", "_stored", "has_failed", "key", "row_id")

    def __init__(self, source: DecodedSource, tag: int, columns: Sequence[Any]) -> None:
        row_id, message_id, exchange, routing_key, body, stored, key = columns
        # All that is known of its properties is in `_stored`, and read on demand.
        super().__init__(source, tag, False, body, (exchange, routing_key), _DEFAULTS)  # noqa: FBT003  -- as for any delivery
        self.row_id: int = row_id
        self.key: str | bytes | None = key
        self.has_failed = False
        self._message_id: str = message_id
        self._stored: str | None = stored

    @property
    def outgoing(self) -> RowCopy:
        """What is published.

        Raises:
            ValueError, TypeError, AttributeError: The row was changed by hand, and isn't valid.
        """
        exchange, routing_key = self._decoded_route()
        if self._stored is None:
            self._read = Properties(message_id=self._message_id, delivery_mode=2)
            return RowCopy(self, exchange, routing_key, NO_HEADERS)
        more = {"delivery_mode": 2, **json.loads(self._stored, object_hook=_decode)}
        mandatory = more.pop("mandatory", True)
        self._read = Properties(message_id=self._message_id, **more)
        return RowCopy(self, exchange, routing_key, NO_HEADERS, mandatory=mandatory)

    @property
    def properties(self) -> Properties:
        """All properties as values."""
        if not isinstance(self._read, Properties):
            _ = self.outgoing
        found: Any = self._read
        return cast("Properties", found)

    @property
    def headers(self) -> Headers:
        """The headers; empty if there are none."""
        return self.properties.headers or NO_HEADERS


class RowCopy(Copy):
    """A row to be published, with the properties that it has."""

    __slots__ = ()

    @property
    def properties(self) -> Properties:
        """Those of the row."""
        return self.message.properties


def _encode(value: object) -> object:
    """Values that JSON doesn't have, each as an object with one name."""
    match value:
        case bytes():
            return {"$bytes": base64.b64encode(value).decode()}
        case datetime():
            return {"$datetime": value.isoformat()}
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
