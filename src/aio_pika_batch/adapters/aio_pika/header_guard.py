"""Removes routes and properties from the deliveries that the client library carries.

The plain wire leaves deliveries to the library, which would decode their properties in its own way
and with its own limits: one property that it cannot read ends the connection, and the message is
redelivered forever. So exchange, routing key and property list are kept here, by delivery tag, and
the library receives the same frames with these empty.

Laws:

- Every other byte is passed on, and nothing is held back.
- What is kept is what was received, byte for byte.
"""

from __future__ import annotations

import struct

from aio_pika_batch.adapters.aio_pika.amqp_spec import (
    ARGUMENTS_AT,
    BASIC_DELIVER,
    FRAME_END,
    FRAME_HEAD,
    HEADER,
    METHOD,
    METHOD_ID,
    PAYLOAD_AT,
    PROPERTIES_AT,
)

_TAG = struct.Struct(">Q")
_NO_ROUTE = _NO_PROPERTIES = bytes((0, 0, FRAME_END))
_SHORTEST_DELIVER = ARGUMENTS_AT + 1 + _TAG.size + 1 + len(_NO_ROUTE)  # with all strings empty


class HeaderGuard:
    """The routes and properties of one channel's deliveries."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[bytes, bytes]] = {}
        self._tag: int | None = None
        self._route = b""

    def __len__(self) -> int:
        """The number of deliveries that were not taken yet."""
        return len(self._kept)

    def take(self, tag: int) -> tuple[bytes, bytes]:
        """Return the route and the properties of a delivery, once."""
        return self._kept.pop(tag)

    def pass_on(self, kind: int, frame: bytes) -> bytes:
        """Return what the library receives instead of a frame of the channel."""
        if kind == METHOD:
            return self._pass_on_method(frame)
        if kind == HEADER and self._tag is not None and len(frame) > PROPERTIES_AT:
            self._kept[self._tag] = (self._route, frame[PROPERTIES_AT:-1])
            self._tag = None
            return _resized(frame[:PROPERTIES_AT] + _NO_PROPERTIES)
        return frame

    def _pass_on_method(self, frame: bytes) -> bytes:
        self._tag = None
        if len(frame) < _SHORTEST_DELIVER:
            return frame
        method: int = METHOD_ID.unpack_from(frame, PAYLOAD_AT)[0]
        tag_at = ARGUMENTS_AT + 1 + frame[ARGUMENTS_AT]
        route_at = tag_at + _TAG.size + 1
        if method != BASIC_DELIVER or len(frame) < route_at + len(_NO_ROUTE):
            return frame
        self._tag = _TAG.unpack_from(frame, tag_at)[0]
        self._route = frame[route_at:-1]
        return _resized(frame[:route_at] + _NO_ROUTE)


def _resized(frame: bytes) -> bytes:
    """Return the frame with the size that it has now."""
    kind, channel, _ = FRAME_HEAD.unpack_from(frame)
    return FRAME_HEAD.pack(kind, channel, len(frame) - FRAME_HEAD.size - 1) + frame[PAYLOAD_AT:]
