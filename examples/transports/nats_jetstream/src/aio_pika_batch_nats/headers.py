"""Encodes properties as NATS headers, which are lines of text, and decodes them.

Each AMQP header becomes a NATS header. Plain text stays plain, so that other clients can read and
write it. Other values become JSON behind a mark; types that JSON doesn't have are named. The other
properties become headers with a prefix. Absent properties are left out.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from typing import Any
from urllib.parse import quote, unquote

from aio_pika_batch.transport import Properties

_MARK = "json:"
_PREFIX = "Amqp-"
_EMPTY = "%"
_PLAIN = re.compile(r"(?!json:)[!-~]([ -~]*[!-~])?")
_TYPES: dict[str, type] = {
    "content_type": str,
    "content_encoding": str,
    "delivery_mode": int,
    "priority": int,
    "correlation_id": str,
    "reply_to": str,
    "expiration": str,
    "message_id": str,
    "timestamp": datetime,
    "type": str,
    "user_id": str,
    "app_id": str,
}


def encoded(properties: Properties) -> dict[str, str] | None:
    """Return properties as NATS headers; None if there are none."""
    told = {_escaped(name): _line(value) for name, value in (properties.headers or {}).items()}
    for name in _TYPES:
        value = getattr(properties, name)
        if value is not None:
            told[_PREFIX + name] = _line(value)
    return told or None


def decoded(lines: Mapping[str, str] | None) -> Properties:
    """Return the properties of a message from any publisher. Never raises: see `undecodable`."""
    properties = Properties()
    if not lines:
        return properties
    headers: dict[str, Any] = {}
    undecodable: dict[str, str] = {}
    for line_name, line in lines.items():
        name = line_name.removeprefix(_PREFIX)
        wanted = None if name == line_name else _TYPES.get(name)
        try:
            value = _value(line)
            if wanted is None:
                headers["" if line_name == _EMPTY else unquote(line_name)] = value
            elif isinstance(value, wanted):
                setattr(properties, name, value)
            else:
                undecodable[name] = f"{line_name} is not of type {wanted.__name__}"
        except (ValueError, ArithmeticError, RecursionError) as error:
            undecodable["headers" if wanted is None else name] = f"{line_name}: {error}"
    if headers and "headers" not in undecodable:
        properties.headers = headers
    properties.undecodable = undecodable
    return properties


def _escaped(name: str) -> str:
    # A copied `Nats-Msg-Id` would be an order to drop the copy as a duplicate.
    if name.lower().startswith(("nats-", _PREFIX.lower())):
        return f"%{ord(name[0]):02X}{quote(name[1:], safe='')}"
    return quote(name, safe="") or _EMPTY


def _line(value: object) -> str:
    if isinstance(value, str) and _PLAIN.fullmatch(value):
        return value
    return _MARK + json.dumps(_told(value))


def _told(value: object) -> object:
    match value:
        case bytes() | bytearray():
            return {"bytes": base64.b64encode(value).decode()}
        case Decimal():
            return {"decimal": str(value)}
        case datetime():
            return {"datetime": value.isoformat()}
        case Mapping():
            return {"table": {name: _told(each) for name, each in value.items()}}
        case list() | tuple():
            return [_told(each) for each in value]
        case _:
            return value


def _value(line: str) -> Any:  # noqa: ANN401  -- whatever was told
    return _untold(json.loads(line.removeprefix(_MARK))) if line.startswith(_MARK) else line


def _untold(value: Any) -> Any:  # noqa: ANN401  -- the same
    match value:
        case {"bytes": str(text)}:
            return base64.b64decode(text)
        case {"decimal": str(text)}:
            return Decimal(text)
        case {"datetime": str(text)}:
            return datetime.fromisoformat(text)
        case {"table": dict(table)}:
            return {name: _untold(each) for name, each in table.items()}
        case list():
            return [_untold(each) for each in value]
        case dict():
            raise ValueError(f"{value!r} is nothing that was written here")
        case _:
            return value
