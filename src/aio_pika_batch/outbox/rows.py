"""Publications as rows of the outbox, and back."""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from datetime import datetime
from decimal import Decimal
from functools import lru_cache
from typing import Any

from aio_pika_batch.core.message import DecodedSource, FieldValue, Properties
from aio_pika_batch.core.publication import Publication, StoredPublication
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
        "body": bytes(publication.body),
        "properties": json.dumps(more, default=_encode) if more else None,
    }


class Row(StoredPublication):
    """A row as a message, whose delivery tag is only valid in its session.

    Args:
        columns: See `databases.outbox_table`.

    Attributes:
        key: Rows with the same key keep their order; None if there is no order.

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
