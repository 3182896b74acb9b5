"""Writes a copy's property list: the original's bytes, with a few headers changed.

The raw list is walked over instead of being decoded and encoded again, which would narrow numbers,
invent absent properties, and fail on what cannot be read.

Laws:

- Whatever `add` and `drop` don't name is the same in the copy as in the original, byte for byte and
  in the same order.
- An absent property stays absent. An empty header table stays empty.
- Bytes that a broker cannot read are not sent raw: they would end the connection.
"""

from __future__ import annotations

from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from aio_pika_batch.adapters.aio_pika.amqp_spec import (
    EXPIRATION_FLAG,
    FLAGS,
    HEADERS_FLAG,
    LENGTH,
    USER_ID_FLAG,
)
from aio_pika_batch.adapters.aio_pika.properties import (
    PropertyListError,
    encode_short,
    fields,
    header_table,
    is_complete_after,
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
"""Contains what cannot be read of the original: its header table, or its whole property list."""

_CACHED_TYPES = frozenset((int, str, datetime))


def splice(raw: bytes, copy: Copy, user: bytes) -> bytes:
    """Return the copy's property list.

    Args:
        raw: The original's property list.
        copy: What to change.
        user: The connection's user. Any other `user_id` would close the channel.

    Raises:
        PublishError: AMQP has no type for the value of an added header.
    """
    try:
        changes = _changes(copy.add, copy.drop)
    except TableError as error:
        raise PublishError(f"header {error}") from error
    if copy.keep_expiration and len(raw) > 1 and not raw[1] & USER_ID_FLAG:
        # The usual case: only the headers change.
        try:
            start, end = header_table(raw)
        except PropertyListError:
            return _rebuilt(raw, copy, user, changes)
        # The bytes around the table are copied unread, so check that they are complete.
        if end and is_complete_after(raw, end):
            return b"".join((raw[:start], *_table(raw, start, end, copy, changes), raw[end:]))
    return _rebuilt(raw, copy, user, changes)


def _rebuilt(raw: bytes, copy: Copy, user: bytes, changes: _Changes) -> bytes:
    """Return the copy's property list, written property by property."""
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
        # What was read before the cut is kept as properties, and all of it in a header.
        added += encode_entry(UNDECODABLE_HEADERS, raw)
    if copy.expiration is not None and not copy.keep_expiration:
        present |= EXPIRATION_FLAG
        parts.insert(expiration_at, encode_short("expiration", copy.expiration))
    if added and not present & HEADERS_FLAG:
        present |= HEADERS_FLAG
        parts.insert(headers_at, LENGTH.pack(len(added)) + added)
    parts[0] = FLAGS.pack(present)
    return b"".join(parts)


def _table(raw: bytes, start: int, end: int, copy: Copy, changes: _Changes) -> Sequence[bytes]:
    """Return the header table, in parts to be joined."""
    added = changes.added
    was = raw[start + 4 : end]
    try:
        if changes.names.isdisjoint(copy.message.headers):
            # They could be decoded, so a broker can read them, too.
            return LENGTH.pack(len(was) + len(added)), was, added
    except MessageDecodeError:
        pass  # the loop below keeps what it can
    kept = []
    try:
        for key, entry, value, value_end in entries(raw, start + 4, end):
            check_value(raw, value, value_end)
            if key not in changes.keys:
                kept.append(raw[entry:value_end])
    except TableError:
        # The readable half of a table may not be what its publisher meant.
        kept = [encode_entry(UNDECODABLE_HEADERS, was)]
    return LENGTH.pack(sum(map(len, kept)) + len(added)), *kept, added


class _Changes(NamedTuple):
    """The changes to a header table.

    Attributes:
        added: The bytes of the added entries.
        names: The headers that are added or dropped.
        keys: The same, encoded.
    """

    added: bytes
    names: frozenset[str]
    keys: frozenset[bytes]


def _changes(add: Headers, drop: frozenset[str]) -> _Changes:
    types = tuple(map(type, add.values()))
    if _CACHED_TYPES.issuperset(types):
        return _cached_changes(tuple(add.items()), types, drop)
    return _new_changes(add.items(), drop)


@lru_cache(maxsize=256)  # the copies of one batch are changed much alike
def _cached_changes(
    add: tuple[tuple[str, FieldValue], ...], _: tuple[type, ...], drop: frozenset[str]
) -> _Changes:
    # The types are part of the cache key: 1, 1.0 and True are equal, but are written differently.
    return _new_changes(add, drop)


def _new_changes(add: Iterable[tuple[str, FieldValue]], drop: frozenset[str]) -> _Changes:
    names, keys = _names(tuple([key for key, _ in add]), drop)
    return _Changes(b"".join([encode_entry(*each) for each in add]), names, keys)


@lru_cache(maxsize=64)  # a consumer's copies have the same few headers
def _names(add: tuple[str, ...], drop: frozenset[str]) -> tuple[frozenset[str], frozenset[bytes]]:
    names = drop.union(add)
    return names, frozenset(map(encode_text, names))
