"""Packs the frames of settlements and publications.

It packs whole frames and joins them, so that they can be written between the client library's own.
The frames of a channel stay in order, and the method, header and body of a message stay together.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from aio_pika_batch.adapters.aio_pika.amqp_spec import (
    ACK_SIZE,
    BASIC_ACK,
    BASIC_NACK,
    BASIC_PUBLISH,
    BASIC_REJECT,
    BODY,
    CONTENT_CLASS,
    CONTENT_HEAD,
    FRAME_END,
    FRAME_HEAD,
    FRAME_OVERHEAD,
    HEADER,
    METHOD,
    MULTIPLE,
    NACK_REQUEUE,
    REJECT_REQUEUE,
)
from aio_pika_batch.adapters.aio_pika.properties import encode_short
from aio_pika_batch.core.settlement import Disposition

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aio_pika_batch.core.settlement import Frame

_SETTLE_FRAME = struct.Struct(">BHIIQBB")
_PUBLISH_HEAD = struct.Struct(">BHIIH")
_HEADER_HEAD = struct.Struct(">BHIIQ")
_RESERVED = 0
_LEAST_HEADER = FRAME_OVERHEAD + CONTENT_HEAD.size
_END = bytes((FRAME_END,))

# The method, the flags, and the flag for `multiple`. A reject has only one flag.
_SETTLE_METHODS: Final = {
    Disposition.ACK: (BASIC_ACK, 0, MULTIPLE),
    Disposition.REJECT: (BASIC_REJECT, 0, 0),
    Disposition.REQUEUE: (BASIC_REJECT, REJECT_REQUEUE, 0),
    Disposition.RETURN: (BASIC_NACK, NACK_REQUEUE, MULTIPLE),
}


def pack_settlements(channel: int, frames: Iterable[Frame]) -> bytes:
    """Pack acks, rejects and nacks."""
    packed = []
    for frame in frames:
        method, flags, multiple = _SETTLE_METHODS[frame.disposition]
        if frame.multiple:
            flags |= multiple
        packed.append(
            _SETTLE_FRAME.pack(METHOD, channel, ACK_SIZE, method, frame.tag, flags, FRAME_END)
        )
    return b"".join(packed)


@lru_cache(maxsize=512)  # a program publishes to the same few routes again and again
def pack_publish(channel: int, exchange: str, routing_key: str, *, mandatory: bool) -> bytes:
    """Pack the method frame of a publication.

    Raises:
        PublishError: A name is too long.
    """
    arguments = (
        encode_short("exchange", exchange)
        + encode_short("routing_key", routing_key)
        + bytes((mandatory,))
    )
    size = 6 + len(arguments)
    return _PUBLISH_HEAD.pack(METHOD, channel, size, BASIC_PUBLISH, _RESERVED) + arguments + _END


def pack_content(channel: int, properties: bytes, body: bytes, frame_max: int) -> tuple[bytes, ...]:
    """Pack the header and the body of a publication, in parts to be joined."""
    size = CONTENT_HEAD.size + len(properties)
    header = _HEADER_HEAD.pack(HEADER, channel, size, CONTENT_CLASS, len(body)) + properties + _END
    largest = frame_max - FRAME_OVERHEAD
    if not body:
        return (header,)
    if len(body) <= largest:
        return header, FRAME_HEAD.pack(BODY, channel, len(body)), body, _END
    parts = [header]
    for start in range(0, len(body), largest):
        part = body[start : start + largest]
        parts += (FRAME_HEAD.pack(BODY, channel, len(part)), part, _END)
    return tuple(parts)


def fits(properties: bytes, frame_max: int) -> bool:
    """Return whether a property list fits into one frame. Unlike a body, it cannot be split."""
    return _LEAST_HEADER + len(properties) <= frame_max
