"""Makes copies fit into a frame. A body can be split over several frames, but headers can't.

A message whose headers nearly fill a frame leaves no room for the headers of its retry or dead
letter. Then such a copy could never be published, and its message would never end.

Laws:

- What a copy needs is never left out: its retry count, and where and why it was dead-lettered.
- Headers of the original are left out of dead letters only, the largest ones first, and the dead
  letter lists their names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from aio_pika_batch.core.message import (
    NO_HEADERS,
    FieldValue,
    Headers,
    Properties,
    readable_headers,
)
from aio_pika_batch.core.publication import Copy

OMITTED = "x-omitted-headers"
"""Header of a dead letter: the names of the original's headers that didn't fit into a frame."""

UNDECODABLE_HEADERS = "x-undecodable-headers"
"""Contains what cannot be read of the original: its header table, or its whole property list."""

LONGEST_LIST = 1000
"""Bytes of names in `OMITTED`, at most."""

_LONG = 5
"""Bytes of the type and the length of a long value."""

_FIXED = 9
"""Bytes of the largest value of a fixed length, with its type."""


def fit(copy: Copy, limit: int, size: Callable[[Copy], int]) -> Copy | None:
    """Return a copy whose property list has at most `limit` bytes, with as much as fits.

    Args:
        size: Returns the bytes of a copy's property list.

    Returns:
        None if that can't be.
    """
    if size(copy) <= limit:
        return copy
    smaller, add = copy, dict(copy.add)
    for name in copy.spare:
        if add.pop(name, None) is not None:
            smaller = replace(copy, add=dict(add))
            if size(smaller) <= limit:
                return smaller
    return _without_large_headers(copy, smaller, limit, size) if copy.may_omit else None


def _without_large_headers(
    copy: Copy, smallest: Copy, limit: int, size: Callable[[Copy], int]
) -> Copy | None:
    headers = readable_headers(copy.message)
    if headers is None:
        # What can't be read is kept whole, in one header.
        names = [UNDECODABLE_HEADERS]
    else:
        weights = {
            name: header_size(name, value)
            for name, value in headers.items()
            if name not in copy.add and name not in copy.drop
        }
        names = sorted(weights, key=weights.__getitem__, reverse=True)
    count = 0
    while count < len(names):
        # Twice as many each time, since each attempt makes a whole new list. If one large header
        # is the cause, which it mostly is, no other is left out.
        count = min(len(names), max(1, 2 * count))
        omitted = names[:count]
        # With so much room our own headers fit again, unless many small ones are the cause.
        for each in (copy, smallest):
            smaller = replace(
                each,
                add={**each.add, OMITTED: _shortened(omitted)},
                drop=copy.drop | frozenset(omitted),
            )
            if size(smaller) <= limit:
                return smaller
    return None


def _shortened(names: list[str]) -> list[FieldValue]:
    listed: list[FieldValue] = []
    left = LONGEST_LIST
    for name in names:
        left -= len(name.encode(errors="replace"))
        if left < 0:
            return [*listed, "…"]
        listed.append(name)
    return listed


def header_size(name: str, value: FieldValue) -> int:
    """Return about how many bytes a header takes in a table."""
    return 1 + len(name.encode(errors="replace")) + _value_size(value)


def _value_size(value: FieldValue) -> int:
    match value:
        case str():
            return _LONG + len(value.encode(errors="replace"))
        case bytes():
            return _LONG + len(value)
        case list():
            return _LONG + sum(map(_value_size, value))
        case Mapping():
            return _LONG + _table_size(value)
        case _:
            return _FIXED


def _table_size(headers: Headers) -> int:
    return sum(header_size(name, value) for name, value in headers.items())


def property_list_size(properties: Properties) -> int:
    """Return about how many bytes a property list takes, for a broker that encodes nothing."""
    texts = sum(
        1 + len(value.encode(errors="replace"))
        for name in Properties.__slots__
        if isinstance(value := getattr(properties, name), str)
    )
    return 2 + _LONG + texts + 2 * _FIXED + _table_size(properties.headers or NO_HEADERS)
