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

import struct
from functools import lru_cache
from typing import TYPE_CHECKING

from aio_pika_batch.adapters.aio_pika.properties import PropertyListError, fields
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

    from aio_pika_batch.core.publication import Copy

UNDECODABLE_HEADERS = "x-undecodable-headers"
"""Holds what cannot be read of the original: its header table, or its whole property list."""

_FLAGS = struct.Struct(">H")
_LENGTH = struct.Struct(">I")
_HEADERS_FLAG = 1 << 13


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
        added = [encode_entry(key, value) for key, value in copy.add.items()]
    except TableError as error:
        raise PublishError(f"header {error}") from error
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
                    headers_at += flag > _HEADERS_FLAG
                    part = raw[start:end]
            parts.append(part)
            present |= flag
    except PropertyListError:
        if not present & _HEADERS_FLAG:
            added.append(encode_entry(UNDECODABLE_HEADERS, raw))
    if added and not present & _HEADERS_FLAG:
        present |= _HEADERS_FLAG
        parts.insert(headers_at, _with_length(added))
    parts[0] = _FLAGS.pack(present)
    return b"".join(parts)


def _table(raw: bytes, start: int, end: int, copy: Copy, added: list[bytes]) -> bytes:
    leave_out = _names(tuple(copy.add), copy.drop)
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


def _with_length(rows: Iterable[bytes]) -> bytes:
    data = b"".join(rows)
    return _LENGTH.pack(len(data)) + data
