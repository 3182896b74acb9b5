"""How does a copy of a message keep every property, byte for byte, but for a few headers?

Its raw property list is walked over, not read and written again: reading and writing narrows
numbers, invents absent properties, and cannot carry what it cannot read.

Laws:

- What is not named in `add` or `drop` stands in the copy as it stood in the original, and in its
  order.
- Absent stays absent; an empty header table stays empty.
- What a broker could not read is not sent raw: that would end the connection, for everybody on it.
"""

from __future__ import annotations

import re
import struct
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING

from aio_pika_batch.adapters.aio_pika.properties import HEADERS_FLAG, PropertyListError, fields
from aio_pika_batch.adapters.aio_pika.tables import (
    TableError,
    check_value,
    encode_entry,
    encode_text,
    entries,
)
from aio_pika_batch.errors import PublishError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aio_pika_batch.core.message import FieldValue, Headers
    from aio_pika_batch.core.publication import Copy

UNDECODABLE_HEADERS = "x-undecodable-headers"
"""Holds what cannot be read of the original: its header table, or its whole property list."""

_FLAGS = struct.Struct(">H")
_LENGTH = struct.Struct(">I")
_USER_ID_FLAG = 1 << 4
_REPEATED = frozenset((int, str, datetime))


def splice(raw: bytes, copy: Copy, user: bytes) -> bytes:
    """Write the copy's property list.

    Args:
        raw: The original's.
        copy: What to change.
        user: The connection's; a `user_id` other than this would close the channel.

    Raises:
        PublishError: A header to be added has a value that AMQP cannot carry.
    """
    try:
        added = _added(copy.add)
    except TableError as error:
        raise PublishError(f"header {error}") from error
    present = int.from_bytes(raw[:2], "big")
    if copy.keep_expiration and present & (HEADERS_FLAG | _USER_ID_FLAG) == HEADERS_FLAG:
        # What is nearly always asked for: nothing is changed but the headers.
        start, end = _headers_of(raw)
        if end:
            return b"".join((raw[:start], _table(raw, start, end, copy, added), raw[end:]))
    return _rebuilt(raw, copy, user, added)


def _rebuilt(raw: bytes, copy: Copy, user: bytes, added: list[bytes]) -> bytes:
    """Write the list property by property."""
    present = 0
    parts = [b""]
    headers_at = 1
    try:
        for flag, name, _, start, end in fields(raw):
            match name:
                case "headers":
                    part = _table(raw, start, end, copy, added)
                case "expiration" if not copy.keep_expiration:
                    continue
                case "user_id" if raw[start + 1 : end] != user:
                    continue
                case _:
                    # Only content type and encoding come before the headers.
                    headers_at += flag > HEADERS_FLAG
                    part = raw[start:end]
            parts.append(part)
            present |= flag
    except PropertyListError:
        if not present & HEADERS_FLAG:
            added.append(encode_entry(UNDECODABLE_HEADERS, raw))
    if added and not present & HEADERS_FLAG:
        present |= HEADERS_FLAG
        parts.insert(headers_at, _with_length(added))
    parts[0] = _FLAGS.pack(present)
    return b"".join(parts)


def _table(raw: bytes, start: int, end: int, copy: Copy, added: list[bytes]) -> bytes:
    leave_out = _names(tuple(copy.add), copy.drop)
    if copy.message.has_readable_headers:
        # They have been read, so that a broker can read them too.
        was = raw[start + 4 : end]
        if not _any_of(leave_out).search(was):
            return _with_length((was, *added))
    kept = []
    try:
        for key, entry, value, value_end in entries(raw, start + 4, end):
            check_value(raw, value, value_end)
            if key not in leave_out:
                kept.append(raw[entry:value_end])
    except TableError:
        # What can be read of half a table may not be what its publisher meant.
        kept = [encode_entry(UNDECODABLE_HEADERS, raw[start + 4 : end])]
    return _with_length((*kept, *added))


@lru_cache(maxsize=64)  # a consumer's copies are all changed alike
def _names(add: tuple[str, ...], drop: frozenset[str]) -> frozenset[bytes]:
    return frozenset(encode_text(key) for key in (*add, *drop))


@lru_cache(maxsize=64)
def _any_of(names: frozenset[bytes]) -> re.Pattern[bytes]:
    return re.compile(b"|".join(map(re.escape, names)) if names else b"(?!)")


def _headers_of(raw: bytes) -> tuple[int, int]:
    """Where the header table begins and ends; (0, 0) if the list is not whole."""
    found = (0, 0)
    try:
        for _, name, _, start, end in fields(raw):
            if name == "headers":
                found = (start, end)
    except PropertyListError:
        return 0, 0
    return found


def _added(headers: Headers) -> list[bytes]:
    """Write the headers to be added."""
    types = tuple(map(type, headers.values()))
    if types and _REPEATED.issuperset(types):
        return [_known(tuple(headers.items()), types)]
    return [encode_entry(key, value) for key, value in headers.items()]


@lru_cache(maxsize=256)  # the copies of one batch are added much the same
def _known(headers: tuple[tuple[str, FieldValue], ...], _: tuple[type, ...]) -> bytes:
    # The types are part of what is remembered: 1, 1.0 and True are equal, and written differently.
    return b"".join([encode_entry(key, value) for key, value in headers])


def _with_length(rows: Iterable[bytes]) -> bytes:
    data = b"".join(rows)
    return _LENGTH.pack(len(data)) + data
