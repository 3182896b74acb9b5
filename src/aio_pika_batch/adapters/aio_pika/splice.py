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
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from aio_pika_batch.adapters.aio_pika.properties import (
    EXPIRATION_FLAG,
    HEADERS_FLAG,
    PropertyListError,
    encode_short,
    fields,
    header_table,
    is_whole_after,
)
from aio_pika_batch.adapters.aio_pika.tables import (
    TableError,
    check_value,
    encode_entry,
    encode_text,
    entries,
)
from aio_pika_batch.errors import MessageDecodeError, PublishError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

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
        changes = _changes(copy.add, copy.drop)
    except TableError as error:
        raise PublishError(f"header {error}") from error
    if copy.keep_expiration and len(raw) > 1 and not raw[1] & _USER_ID_FLAG:
        # What is nearly always asked for: nothing is changed but the headers.
        try:
            start, end = header_table(raw)
        except PropertyListError:
            return _rebuilt(raw, copy, user, changes)
        if end and is_whole_after(raw, end):
            return b"".join((raw[:start], *_table(raw, start, end, copy, changes), raw[end:]))
    return _rebuilt(raw, copy, user, changes)


def _rebuilt(raw: bytes, copy: Copy, user: bytes, changes: _Changes) -> bytes:
    """Write the list property by property."""
    present = 0
    parts = [b""]
    headers_at = expiration_at = 1
    added = changes.added
    try:
        for flag, name, _, start, end in fields(raw):
            match name:
                case "headers":
                    part = b"".join(_table(raw, start, end, copy, changes))
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
            expiration_at += flag > EXPIRATION_FLAG
    except PropertyListError:
        added += encode_entry(UNDECODABLE_HEADERS, raw)
    if copy.expiration is not None and not copy.keep_expiration:
        present |= EXPIRATION_FLAG
        parts.insert(expiration_at, encode_short("expiration", copy.expiration))
    if added and not present & HEADERS_FLAG:
        present |= HEADERS_FLAG
        parts.insert(headers_at, _LENGTH.pack(len(added)) + added)
    parts[0] = _FLAGS.pack(present)
    return b"".join(parts)


def _table(raw: bytes, start: int, end: int, copy: Copy, changes: _Changes) -> Sequence[bytes]:
    """Write the header table, in parts to be joined."""
    added = changes.added
    was = raw[start + 4 : end]
    try:
        if changes.names.isdisjoint(copy.message.headers):
            # They have been read, so that a broker can read them too.
            return _LENGTH.pack(len(was) + len(added)), was, added
    except MessageDecodeError:
        pass  # what can be kept of them is seen below
    kept = []
    try:
        for key, entry, value, value_end in entries(raw, start + 4, end):
            check_value(raw, value, value_end)
            if key not in changes.keys:
                kept.append(raw[entry:value_end])
    except TableError:
        # What can be read of half a table may not be what its publisher meant.
        kept = [encode_entry(UNDECODABLE_HEADERS, was)]
    return _LENGTH.pack(sum(map(len, kept)) + len(added)), *kept, added


class _Changes(NamedTuple):
    """What is changed about a header table.

    Attributes:
        added: The entries to be added.
        names: The headers that are added or left out.
        keys: The same, as they stand on the wire.
    """

    added: bytes
    names: frozenset[str]
    keys: frozenset[bytes]


def _changes(add: Headers, drop: frozenset[str]) -> _Changes:
    types = tuple(map(type, add.values()))
    if _REPEATED.issuperset(types):
        return _known(tuple(add.items()), types, drop)
    return _new(add.items(), drop)


@lru_cache(maxsize=256)  # the copies of one batch are changed much alike
def _known(
    add: tuple[tuple[str, FieldValue], ...], _: tuple[type, ...], drop: frozenset[str]
) -> _Changes:
    # The types are part of what is remembered: 1, 1.0 and True are equal, and written differently.
    return _new(add, drop)


def _new(add: Iterable[tuple[str, FieldValue]], drop: frozenset[str]) -> _Changes:
    names, keys = _names(tuple([key for key, _ in add]), drop)
    return _Changes(b"".join([encode_entry(*each) for each in add]), names, keys)


@lru_cache(maxsize=64)  # a consumer's copies have the same few headers
def _names(add: tuple[str, ...], drop: frozenset[str]) -> tuple[frozenset[str], frozenset[bytes]]:
    names = drop.union(add)
    return names, frozenset(map(encode_text, names))
