"""Which bytes tell a broker what was settled, or carry a publication?

Whole frames only, joined, so that they can be written between the client library's own. A channel's
frames stay in their order, and no other's come in between one message's method, header and body.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from aio_pika_batch.adapters.aio_pika.frame_fastpath import BODY, END, HEADER, METHOD, OVERHEAD
from aio_pika_batch.adapters.aio_pika.properties import encode_short
from aio_pika_batch.core.settlement import Disposition

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aio_pika_batch.core.settlement import Frame

_BASIC, _PUBLISH, _ACK, _REJECT, _NACK = 60, 40, 80, 90, 120
_MULTIPLE, _REQUEUE = 1, 2

_SETTLE = struct.Struct(">BHIHHQBB")
_METHOD_HEAD = struct.Struct(">BHIHHH")
_CONTENT = struct.Struct(">BHIHHQ")
_FRAME = struct.Struct(">BHI")
_END = bytes((END,))
_HEADER_PAYLOAD = 12  # before the properties: class, weight, body size

# Reject has one bit, which says whether to requeue; nack has two, and multiple is the first.
_METHODS: Final = {
    Disposition.ACK: (_ACK, 0, _MULTIPLE),
    Disposition.REJECT: (_REJECT, 0, 0),
    Disposition.REQUEUE: (_REJECT, 1, 0),
    Disposition.RETURN: (_NACK, _REQUEUE, _MULTIPLE),
}


def pack_settlements(channel: int, frames: Iterable[Frame]) -> bytes:
    """Pack acks, rejects and nacks."""
    packed = []
    for frame in frames:
        method, bits, multiple = _METHODS[frame.disposition]
        if frame.multiple:
            bits |= multiple
        packed.append(_SETTLE.pack(METHOD, channel, 13, _BASIC, method, frame.tag, bits, END))
    return b"".join(packed)


@lru_cache(maxsize=512)  # a program publishes to few routes, again and again
def publish_method(channel: int, exchange: str, routing_key: str, *, mandatory: bool) -> bytes:
    """Pack the frame that says where a publication goes.

    Raises:
        PublishError: A name is longer than 255 bytes.
    """
    arguments = (
        encode_short("exchange", exchange)
        + encode_short("routing_key", routing_key)
        + bytes((mandatory,))
    )
    size = 6 + len(arguments)
    return _METHOD_HEAD.pack(METHOD, channel, size, _BASIC, _PUBLISH, 0) + arguments + _END


def pack_content(channel: int, properties: bytes, body: bytes, frame_max: int) -> tuple[bytes, ...]:
    """Pack the header and the body of a publication, in parts to be joined."""
    size = _HEADER_PAYLOAD + len(properties)
    header = _CONTENT.pack(HEADER, channel, size, _BASIC, 0, len(body)) + properties + _END
    largest = frame_max - OVERHEAD
    if not body:
        return (header,)
    if len(body) <= largest:
        return header, _FRAME.pack(BODY, channel, len(body)), body, _END
    parts = [header]
    for start in range(0, len(body), largest):
        part = body[start : start + largest]
        parts += (_FRAME.pack(BODY, channel, len(part)), part, _END)
    return tuple(parts)


def fits(properties: bytes, frame_max: int) -> bool:
    """Whether a property list fits into a frame: unlike a body, it cannot be divided."""
    return OVERHEAD + _HEADER_PAYLOAD + len(properties) <= frame_max
