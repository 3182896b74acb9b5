"""How do properties travel as NATS headers, which are lines of text, and come back as they were?

A header of AMQP is a header of NATS. Plain text stays plain, so that other clients can read and
write it; whatever else is JSON behind a mark, with types that JSON has not got spelt out. The other
properties are headers with a prefix. What is absent is left out.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from datetime import datetime
from decimal import Decimal
from typing import Any
from urllib.parse import unquote

from aio_pika_batch.transport import Properties

_MARK = "json:"
_PREFIX = "Amqp-"
_PLAIN = re.compile(r"(?!json:)[!-~]([ -~]*[!-~])?")
_NAMES = tuple(
    name for name in Properties.__slots__ if name not in {"headers", "cluster_id", "undecodable"}
)


def encoded(properties: Properties) -> dict[str, str] | None:
    """Properties as headers of NATS; None where there is nothing to tell."""
    told = {_escaped(name): _line(value) for name, value in (properties.headers or {}).items()}
    for name in _NAMES:
        value = getattr(properties, name)
        if value is not None:
            told[_PREFIX + name] = _line(value)
    return told or None


def decoded(lines: Mapping[str, str] | None) -> Properties:
    """Properties of a message, whoever has published it."""
    if not lines:
        return Properties()
    properties = Properties()
    headers: dict[str, Any] = {}
    undecodable: dict[str, str] = {}
    for line_name, line in lines.items():
        name = line_name.removeprefix(_PREFIX)
        is_property = name != line_name and name in _NAMES
        try:
            value = _value(line)
        except ValueError as error:
            undecodable[name if is_property else "headers"] = str(error)
            continue
        if is_property:
            setattr(properties, name, value)
        else:
            headers[unquote(line_name)] = value
    if "headers" not in undecodable:
        properties.headers = headers or None
    properties.undecodable = undecodable
    return properties


def _escaped(name: str) -> str:
    # A copied `Nats-Msg-Id` would be an order to drop the copy as a duplicate.
    reserved = name.lower().startswith(("nats-", _PREFIX.lower(), "status", "description"))
    kept = "" if reserved else name[:1]
    head = kept if _is_safe(kept) else "".join(f"%{byte:02X}" for byte in name[:1].encode())
    return head + "".join(
        each if _is_safe(each) else "".join(f"%{byte:02X}" for byte in each.encode())
        for each in name[1:]
    )


def _is_safe(letter: str) -> bool:
    return letter.isascii() and (letter.isalnum() or letter in "-_.") and letter != ""


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
