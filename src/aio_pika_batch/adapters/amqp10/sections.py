"""Divides an AMQP 1.0 message into its sections."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, Final, NamedTuple, TypeVar

from aio_pika_batch.adapters.amqp10 import spec
from aio_pika_batch.adapters.amqp10.codec import CodecError, end_of, read, read_map

_BODIES: Final = (spec.DATA, spec.AMQP_SEQUENCE, spec.AMQP_VALUE)
_SHORT: Final = {
    0x53 << 16 | code << 8 | constructor: code
    for code in (*range(spec.HEADER, spec.APPLICATION_PROPERTIES + 1), spec.DATA)
    for constructor in (0xC0, 0xC1, 0xA0)
}
"""The beginnings of lists, maps and binaries of less than 256 bytes, and the sections' codes."""

_BEGINNING_AT: Final = struct.Struct(">IB").unpack_from

_CODE_AT, _VALUE_AT = 2, 3
"""Offsets of the descriptor's code and of the value in a section: `00 53 code value`."""

_FIRST_ACQUIRER: Final = 3
"""The position of the field `first-acquirer` in the header section."""

_T = TypeVar("_T", list[Any], dict[Any, Any])


class Content(NamedTuple):
    """A message in parts.

    Attributes:
        head: All sections before the body.
        is_encoded: Whether the body is a value in its encoding.
    """

    head: bytes
    body: bytes
    redelivered: bool
    is_encoded: bool


def sections(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield the code, the start and the end of each section.

    Raises:
        CodecError: Something isn't a section, or is incomplete.
    """
    at, size = 0, len(data)
    while at < size:
        # The usual sections have short lists and maps.
        kind, length = _BEGINNING_AT(data, at) if at + 5 <= size else (0, 0)
        code = _SHORT.get(kind)
        if code is None:
            if data[at : at + _CODE_AT] != b"\x00\x53" or at + _VALUE_AT >= size:
                raise CodecError(f"no section begins at byte {at}")
            code = data[at + _CODE_AT]
            end = end_of(data, at + _VALUE_AT, size)
        else:
            end = at + 5 + length
        if end > size:
            raise CodecError(f"the section at byte {at} is cut off")
        yield code, at, end
        at = end


def split(data: bytes) -> Content:
    """Divide a transferred message into head and body.

    Never raises. A message that cannot be divided is handed out as it came: if the session ended
    instead, the broker would deliver it again, together with everything that was prefetched.
    """
    head_end = 0
    redelivered = False
    body: list[bytes] = []
    try:
        for code, start, end in sections(data):
            if code in _BODIES:
                content, _ = read(data, start + _VALUE_AT, end)
                if code != spec.DATA or not isinstance(content, bytes):
                    break
                body.append(content)
            elif not body:
                head_end = end
                if code == spec.HEADER:
                    redelivered = is_redelivered(data[start:end])
        else:
            if body:
                return Content(data[:head_end], b"".join(body), redelivered, is_encoded=False)
    except CodecError:
        pass
    # A footer goes with an encoded body, as it does for 0-9-1 consumers.
    return Content(data[:head_end], data[head_end:], redelivered, is_encoded=True)


def is_redelivered(header: bytes) -> bool:
    """Return whether a header section says that the message was delivered before."""
    try:
        fields, _ = read(header, _VALUE_AT, len(header))
    except CodecError:
        return False
    return isinstance(fields, list) and field(fields, _FIRST_ACQUIRER) is False


def section(head: bytes, wanted: int, kind: type[_T]) -> _T:
    """Return the value of a section; an empty one if it is missing.

    Raises:
        CodecError: It cannot be read, or is of another type.
    """
    for code, start, end in sections(head):
        if code == wanted:
            return section_at(head, start, end, kind)
    return kind()


def section_at(head: bytes, start: int, end: int, kind: type[_T]) -> _T:
    """Return the value of the section at *start*.

    Raises:
        CodecError: It cannot be read, or is of another type.
    """
    value = read_map(head, start + _VALUE_AT, end)
    if not isinstance(value, kind):
        raise CodecError(f"section 0x{head[start + _CODE_AT]:02x} is not a {kind.__name__}")
    return value


def field(fields: list[Any], place: int) -> Any:  # noqa: ANN401
    """Return a field of a list whose last fields may be missing."""
    return fields[place] if place < len(fields) else None
