"""Reads and writes a message's property list, and changes the headers in one.

A property list is kept as raw bytes and is decoded on first use. Client libraries decode it and
encode it again with losses: doubles become floats, absent priorities become 0, and one string that
is not UTF-8 ends the connection. So a copy's list is made of the original's bytes.

Laws:

- Reading never raises. A property that cannot be read is listed in `undecodable` with the reason,
  and the others are read all the same.
- A float is written as a double, never narrower. An absent property is not written at all.
- A value that AMQP has no type for is refused with the property's name, before anything is sent.
- Whatever a copy's `add` and `drop` don't name is as in the original, byte for byte and in order.
- A copy contains nothing that a broker cannot read: that would end the connection.
"""

from __future__ import annotations

import struct
from datetime import UTC, datetime
from functools import lru_cache
from itertools import dropwhile
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aio_pika_batch.adapters.aio_pika.amqp_spec import (
    CORRELATION_ID_FLAG,
    EXPIRATION_FLAG,
    FLAGS,
    HEADERS_FLAG,
    LENGTH,
    MESSAGE_ID_FLAG,
    OCTET,
    PROPERTIES,
    SECONDS,
    SHORT,
    TABLE,
    TIME,
    TIMESTAMP_FLAG,
    UNDEFINED_FLAGS,
    USER_ID_FLAG,
)
from aio_pika_batch.adapters.aio_pika.tables import (
    TableError,
    check_value,
    encode_entry,
    encode_table,
    encode_text,
    entries,
    read_table,
    to_seconds,
)
from aio_pika_batch.core.message import SHORT_STRING, Properties
from aio_pika_batch.core.publication import UNDECODABLE_HEADERS
from aio_pika_batch.errors import MessageDecodeError, PublishError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from aio_pika_batch.core.message import FieldValue, Headers
    from aio_pika_batch.core.publication import Copy

_CACHED_TYPES = frozenset((int, str, datetime))


class PropertyListError(ValueError):
    """A property list ends before its properties do."""


@lru_cache(maxsize=256)  # the messages of a queue have the same few sets of properties
def _announced(flags: int) -> tuple[tuple[int, str, int], ...]:
    """Return the properties that a list with these flags has."""
    return tuple(each for each in PROPERTIES if flags & each[0])


def fields(raw: bytes) -> Iterator[tuple[int, str, int, int, int]]:
    """Yield (flag, name, type, start, end) of each property that is present.

    Raises:
        PropertyListError: From here on, nothing can be found.
    """
    size = len(raw)
    if size < FLAGS.size:
        raise PropertyListError("the property list has no flags")
    present: int = FLAGS.unpack_from(raw)[0]
    if present & UNDEFINED_FLAGS:
        raise PropertyListError("the property list has flags that AMQP 0-9-1 does not define")
    at = FLAGS.size
    for flag, name, kind in _announced(present):
        if at >= size:
            raise PropertyListError(f"the property list is cut off in {name}")
        if kind == SHORT:
            end = at + 1 + raw[at]
        elif kind != TABLE:
            end = at + (1 if kind == OCTET else SECONDS.size)
        elif at + LENGTH.size <= size:
            end = at + LENGTH.size + LENGTH.unpack_from(raw, at)[0]
        else:
            end = size + 1
        if end > size:
            raise PropertyListError(f"the property list is cut off in {name}")
        yield flag, name, kind, at, end
        at = end


@lru_cache(maxsize=256)  # as above
def _around_headers(flags: int) -> tuple[int, tuple[int, ...]]:
    """Return the number of short strings before the headers, and the sizes of what follows them.

    A size of 0 stands for a short string.
    """
    after: list[int] = []
    before = 0
    for flag, _, kind in _announced(flags):
        if flag > HEADERS_FLAG:
            before += 1
        elif flag < HEADERS_FLAG:
            after.append(0 if kind == SHORT else 1 if kind == OCTET else SECONDS.size)
    return before, tuple(after)


def header_table(raw: bytes) -> tuple[int, int]:
    """Return where the header table begins, with its length, and ends; (0, 0) without headers.

    Raises:
        PropertyListError: The list ends before the table does.
    """
    # Finds what `fields` would find, but skips the rest, with literal sizes: this runs twice for
    # each failed message.
    try:
        flags = raw[0] << 8 | raw[1]
        if not flags & UNDEFINED_FLAGS:
            if not flags & HEADERS_FLAG:
                return 0, 0
            start = 2
            for _ in range(_around_headers(flags)[0]):
                start += 1 + raw[start]
            end: int = start + 4 + LENGTH.unpack_from(raw, start)[0]
            if end <= len(raw):
                return start, end
    except (IndexError, struct.error):
        pass
    for _, _, kind, start, end in fields(raw):
        if kind == TABLE:
            return start, end
    return 0, 0


def is_complete_after(raw: bytes, end: int) -> bool:
    """Return whether the properties after the header table, which ends at *end*, are complete."""
    at = end
    try:
        for size in _around_headers(raw[0] << 8 | raw[1])[1]:
            at += size or 1 + raw[at]
    except IndexError:
        return False
    return at <= len(raw)


def decode(raw: bytes) -> Properties:
    """Read a property list. Never raises."""
    properties = Properties()
    undecodable: dict[str, str] = {}
    seen = 0
    try:
        for flag, name, kind, start, end in fields(raw):
            seen |= flag
            try:
                if kind == SHORT:  # most properties are; without a call it is read sooner
                    setattr(properties, name, raw[start + 1 : end].decode())
                else:
                    setattr(properties, name, _READERS[kind](raw, start, end))
            except TableError as error:
                undecodable[name] = str(error)
            except UnicodeDecodeError as error:
                undecodable[name] = f"{raw[start + 1 : end]!r} is not UTF-8: {error.reason}"
            except (OverflowError, ValueError, OSError):
                seconds = SECONDS.unpack_from(raw, start)[0]
                undecodable[name] = f"{seconds} is not a time in seconds that a datetime can hold"
    except PropertyListError as error:
        flags = int.from_bytes(raw[:2], "big") if len(raw) >= FLAGS.size else UNDEFINED_FLAGS
        for flag, name, _ in PROPERTIES if flags & UNDEFINED_FLAGS else _announced(flags):
            if not seen & flag:
                undecodable[name] = str(error)
    if undecodable:
        properties.undecodable = undecodable
    return properties


def decode_headers(raw: bytes) -> dict[str, Any] | None:
    """Read only the headers of a property list; None without headers.

    Raises:
        ValueError: The headers cannot be read.
    """
    start, end = header_table(raw)
    return read_table(raw, start, end) if end else None


@lru_cache(maxsize=256)  # as above
def _before_message_id(flags: bytes) -> tuple[int, tuple[int, ...]]:
    """Return the end of the first properties before the message id, and the types of the others.

    The first ones have one byte each: mostly the delivery mode, and nothing follows it. The end is
    0 if there is no message id.

    Raises:
        LookupError: A property isn't defined.
    """
    [present] = FLAGS.unpack(flags)
    if present & UNDEFINED_FLAGS:
        raise LookupError
    if not present & MESSAGE_ID_FLAG:
        return 0, ()
    kinds = tuple(kind for flag, _, kind in _announced(present) if flag > MESSAGE_ID_FLAG)
    others = tuple(dropwhile(OCTET.__eq__, kinds))
    return FLAGS.size + len(kinds) - len(others), others


def decode_message_ids(raws: Iterable[bytes]) -> list[str | None]:
    """Read only the message id of each property list; None without one.

    Raises:
        ValueError: One cannot be read.
    """
    # An inbox needs nothing else of whole batches. So this finds what `fields` would, but skips the
    # rest, and everything before the id if it is the same as in the list before.
    found: list[str | None] = []
    before, at = b"", 0
    for raw in raws:
        if not (at and raw.startswith(before)):
            at = _message_id_at(raw)
            before = raw[:at]
        if not at:
            found.append(None)
        elif at >= len(raw) or (end := at + 1 + raw[at]) > len(raw):
            raise PropertyListError("the property list is cut off in message_id")
        else:
            found.append(raw[at + 1 : end].decode())
    return found


def _message_id_at(raw: bytes) -> int:
    """Return where the message id begins; 0 if there is none."""
    try:
        at, kinds = _before_message_id(raw[:2])
        for kind in kinds:
            if kind == SHORT:
                at += 1 + raw[at]
            else:
                at += 1 if kind == OCTET else 4 + LENGTH.unpack_from(raw, at)[0]
    except (LookupError, struct.error):
        return next((start for flag, _, _, start, _ in fields(raw) if flag == MESSAGE_ID_FLAG), 0)
    return at


# From the raw list, the property's start and its end.
_READERS: Final[dict[int, Callable[[bytes, int, int], Any]]] = {
    TABLE: read_table,
    OCTET: lambda raw, start, _: raw[start],
    TIME: lambda raw, start, _: datetime.fromtimestamp(SECONDS.unpack_from(raw, start)[0], UTC),
}


def decode_route(raw: bytes) -> tuple[str, str]:
    """Read exchange and routing key. Never raises.

    Bytes that are not UTF-8 become lone surrogates, and become the same bytes when written again.
    """
    exchange_end = 1 + raw[0] if raw else 1
    exchange = raw[1:exchange_end]
    key_at = exchange_end + 1
    # Use the key's length, not the end: other bytes may follow the key.
    routing_key = raw[key_at : key_at + raw[exchange_end]] if key_at < len(raw) else b""
    return exchange.decode(errors="surrogateescape"), routing_key.decode(errors="surrogateescape")


_LENGTHS = [bytes((length,)) for length in range(SHORT_STRING + 1)]


def encode_short(name: str, text: str) -> bytes:
    """Return the bytes of a short string.

    Raises:
        PublishError: The text is too long.
    """
    try:
        data = text.encode()
    except UnicodeEncodeError:
        data = encode_text(text)
    except AttributeError as error:
        raise PublishError(f"{name} cannot be {text!r}: it isn't a str") from error
    try:
        return _LENGTHS[len(data)] + data
    except IndexError:
        msg = f"{name} has {len(data)} bytes in UTF-8; AMQP allows {SHORT_STRING}"
        raise PublishError(msg) from None


# These differ from message to message. The others are mostly the same, and are encoded once. Each
# getter is one call, because a publisher encodes the properties of every message.
_VARYING = ("headers", "correlation_id", "timestamp")
_varying = attrgetter(*_VARYING)
_CONSTANT = tuple(each for each in PROPERTIES if each[1] not in (*_VARYING, "message_id"))
_constant = attrgetter(*(name for _, name, _ in _CONSTANT))


def encode(properties: Properties) -> bytes:
    """Return the bytes of a property list.

    Raises:
        PublishError: AMQP has no type for the value of a property or a header. The text names it.
    """
    message_id = properties.message_id
    before, after = encode_around_id(properties, has_id=message_id is not None)
    if message_id is None:
        return before + after
    return before + encode_short("message_id", message_id) + after


def encode_around_id(properties: Properties, *, has_id: bool = True) -> tuple[bytes, bytes]:
    """Return the bytes of a property list before and after its message id. Raises as `encode`."""
    headers, correlation_id, timestamp = _varying(properties)
    try:
        flags, data, before_correlation_id, before_message_id, last = _encode_constant(
            *_constant(properties)
        )
        if headers is not None:
            flags |= HEADERS_FLAG
            data += encode_table(headers)
        data += before_correlation_id
        if correlation_id is not None:
            flags |= CORRELATION_ID_FLAG
            data += encode_short("correlation_id", correlation_id)
        data += before_message_id
        if has_id:
            flags |= MESSAGE_ID_FLAG
        if timestamp is not None:
            flags |= TIMESTAMP_FLAG
            last = SECONDS.pack(to_seconds(timestamp)) + last
        return FLAGS.pack(flags) + data, last
    except _INVALID as error:
        for _, name, kind in PROPERTIES:
            value = getattr(properties, name)
            if value is not None:
                _write(name, kind, value)
        raise PublishError(f"the properties can't be encoded: {error}") from error


_INVALID = (struct.error, ValueError, TypeError, AttributeError, OverflowError)


@lru_cache(maxsize=256, typed=True)  # typed, because 3.0 equals 3 but is refused
def _encode_constant(*values: str | int | None) -> tuple[int, bytes, bytes, bytes, bytes]:
    """Return flags, and what stands before headers, correlation id and message id, and at the end.

    Args:
        values: Those of `_CONSTANT`.
    """
    flags = 0
    parts = [b"", b"", b"", b""]
    for (flag, name, kind), value in zip(_CONSTANT, values, strict=True):
        if value is not None:
            flags |= flag
            varying_before = (HEADERS_FLAG, CORRELATION_ID_FLAG, MESSAGE_ID_FLAG)
            parts[sum(flag < each for each in varying_before)] += _write(name, kind, value)
    first, second, third, last = parts
    return flags, first, second, third, last


def _write(name: str, kind: int, value: object) -> bytes:
    try:
        return _WRITERS[kind](name, value)
    except TableError as error:
        raise PublishError(f"header {error}") from error
    except _INVALID as error:
        raise PublishError(f"{name} cannot be {value!r}: {error}") from error


# From the property's name and its value.
_WRITERS: Final[dict[int, Callable[[str, Any], bytes]]] = {
    SHORT: encode_short,
    TABLE: lambda _, value: encode_table(value),
    OCTET: lambda _, value: bytes((value,)),
    TIME: lambda _, value: SECONDS.pack(to_seconds(value)),
}


# --- the property list of a copy ------------------------------------------------


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
        if UNDECODABLE_HEADERS not in copy.drop:
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
        keeps = UNDECODABLE_HEADERS not in copy.drop
        kept = [encode_entry(UNDECODABLE_HEADERS, was)] if keeps else []
    return LENGTH.pack(sum(map(len, kept)) + len(added)), *kept, added


class _Changes(NamedTuple):
    """The added entries of a header table, and the names that are added or dropped."""

    added: bytes
    names: frozenset[str]
    keys: frozenset[bytes]
    """The names, encoded."""


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
