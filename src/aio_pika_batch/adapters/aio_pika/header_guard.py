"""What of a delivery does a client library get to see that only has to carry it?

Pure: frames in, frames out. Of each delivery on one channel, the exchange, the routing key and the
property list stay here, by delivery tag; the library gets the same frames with these empty. It
would have to decode them, in its own way and with its own limits: one property that it cannot read
ends its connection, and the message comes again, for ever. Nobody asks it for them.

Laws:

- Everything else goes on byte for byte, and nothing is held back.
- What stays here is what came, byte for byte, until it is taken.
"""

from __future__ import annotations

import struct

from aio_pika_batch.adapters.aio_pika.frame_fastpath import BASIC_DELIVER, END, HEADER, METHOD

_HEAD = struct.Struct(">BHI")
_METHOD_ID = struct.Struct(">I")
_TAG = struct.Struct(">Q")
_METHOD_AT = 7
_CONSUMER_TAG_AT = 11
_SHORTEST_DELIVER = 24  # with all texts empty
_PROPERTIES_AT = 19
_NO_ROUTE = bytes((0, 0, END))
_NO_PROPERTIES = bytes((0, 0, END))


class Guard:
    """The deliveries of one channel that a client library carries."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[bytes, bytes]] = {}
        self._tag: int | None = None
        self._route = b""

    def __len__(self) -> int:
        """How many deliveries have come and were not taken."""
        return len(self._kept)

    def take(self, tag: int) -> tuple[bytes, bytes] | None:
        """Route and properties of a delivery, once."""
        return self._kept.pop(tag, None)

    def pass_on(self, kind: int, frame: bytes) -> bytes:
        """What the library gets instead of a frame of the channel, if not the same."""
        if kind == METHOD:
            return self._method(frame)
        if kind == HEADER and self._tag is not None and len(frame) > _PROPERTIES_AT:
            self._kept[self._tag] = (self._route, frame[_PROPERTIES_AT:-1])
            self._tag = None
            return _resized(frame[:_PROPERTIES_AT] + _NO_PROPERTIES)
        return frame

    def _method(self, frame: bytes) -> bytes:
        self._tag = None
        if len(frame) < _SHORTEST_DELIVER:
            return frame
        method: int = _METHOD_ID.unpack_from(frame, _METHOD_AT)[0]
        tag_at = _CONSUMER_TAG_AT + 1 + frame[_CONSUMER_TAG_AT]
        route_at = tag_at + _TAG.size + 1
        if method != BASIC_DELIVER or len(frame) < route_at + len(_NO_ROUTE):
            return frame
        self._tag = _TAG.unpack_from(frame, tag_at)[0]
        self._route = frame[route_at:-1]
        return _resized(frame[:route_at] + _NO_ROUTE)


def _resized(frame: bytes) -> bytes:
    """The same frame, with the size that it has."""
    kind, channel, _ = _HEAD.unpack_from(frame)
    return _HEAD.pack(kind, channel, len(frame) - _HEAD.size - 1) + frame[_HEAD.size :]
