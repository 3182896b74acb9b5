"""What does nearly everything that arrives look like, and how is it taken in at a stroke?

A message is a method, a header and one body frame; a confirm is 21 bytes. Of either, all but a few
fields are the same bytes every time on one channel, so that three precompiled layouts and as many
comparisons read a message. Whatever looks otherwise is left to be taken frame by frame.

Routing keys and properties are not looked into here: few ask for them.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from aio_pika_batch.adapters.aio_pika.events import Confirm
from aio_pika_batch.core.message import Message

if TYPE_CHECKING:
    from aio_pika_batch.core.message import Source

METHOD, HEADER, BODY, HEARTBEAT = 1, 2, 3, 8
END = 0xCE
OVERHEAD = 8
"""Bytes of a frame besides its payload: type, channel, size and the end."""

SHORTEST_HEADER = 14
"""Bytes of a content header's payload: class, weight, the body's size and flags."""

BASIC_DELIVER = 60 << 16 | 60
BASIC_ACK = 60 << 16 | 80
BASIC_NACK = 60 << 16 | 120
_BASIC_CLASS = 60 << 16  # the class, and the content header's unused weight

_SIZE = struct.Struct(">3xI")
# Each begins with the end of the frame before.
_HEADER_FRAME = struct.Struct(">4sIIQ")
_BODY_FRAME = struct.Struct(">4sI")
_CONFIRM_FRAME = struct.Struct(">11sQBB")


class OrdinaryDeliveries:
    """Deliveries of one consumer, whose bodies have one frame each.

    Attributes:
        constant: The method and the consumer tag, which follow a deliver frame's first 7 bytes.
        route_at: Where exchange and routing key begin in it.
    """

    __slots__ = (
        "_body",
        "_deliver",
        "_header",
        "_method",
        "_shortest",
        "constant",
        "route_at",
        "source",
    )

    def __init__(self, channel: int, source: Source) -> None:
        tag = source.consumer_tag.encode()
        self.source = source
        self.constant = struct.pack(">IB", BASIC_DELIVER, len(tag)) + tag
        self._deliver = struct.Struct(f">3sI{len(self.constant)}sQ?")
        self.route_at = self._deliver.size
        self._shortest = self.route_at - 7 + 2  # exchange and routing key have a length at least
        self._method = struct.pack(">BH", METHOD, channel)
        self._header = struct.pack(">BBH", END, HEADER, channel)
        self._body = struct.pack(">BBH", END, BODY, channel)

    def take(
        self, data: bytes, position: int, largest: int, messages: list[Message]
    ) -> tuple[int, int]:
        """Append to *messages*, from *position* on, as long as ordinary ones come.

        Returns:
            Where something else begins, and 0; or where a message begins that is not all there yet,
            and how many bytes from there on are surely needed.
        """
        append = messages.append
        source = self.source
        unpack_deliver = self._deliver.unpack_from
        unpack_header = _HEADER_FRAME.unpack_from
        unpack_body = _BODY_FRAME.unpack_from
        method, constant, route_at = self._method, self.constant, self.route_at
        shortest = self._shortest
        header, body = self._header, self._body
        try:
            while True:
                head, size, what, tag, redelivered = unpack_deliver(data, position)
                if head != method or what != constant or not shortest <= size <= largest:
                    return position, 0
                route_end = position + 7 + size
                head, size, what, body_size = unpack_header(data, route_end)
                if head != header or what != _BASIC_CLASS or not SHORTEST_HEADER <= size <= largest:
                    return position, 0
                # An empty body has no frame, a large one has several.
                if not 0 < body_size <= largest:
                    return position, 0
                properties_end = route_end + 8 + size
                head, size = unpack_body(data, properties_end)
                if head != body or size != body_size:
                    return position, 0
                start = properties_end + 8
                end = start + size
                if data[end] != END:
                    return position, 0
                append(
                    Message(
                        source,
                        tag,
                        redelivered,
                        data[start:end],
                        data[position + route_at : route_end],
                        data[route_end + 20 : properties_end],
                    )
                )
                position = end + 1
        except (struct.error, IndexError):
            return position, self._needed(data, position, largest)

    def take_method(self, frame: bytes) -> tuple[int, bool]:
        """Read delivery tag and redelivered out of a deliver frame."""
        _, _, _, tag, redelivered = self._deliver.unpack_from(frame)
        return tag, redelivered

    def _needed(self, data: bytes, position: int, largest: int) -> int:
        """How many bytes from *position* on an ordinary message surely has.

        Returns:
            0 if something else may be standing there.
        """
        if len(data) - position < self.route_at:
            return 0
        at = position
        for head in (self._method, self._header[1:], self._body[1:]):
            if not head.startswith(data[at : at + 3]):
                return 0
            if len(data) - at < OVERHEAD:
                return at + OVERHEAD - position
            size: int = _SIZE.unpack_from(data, at)[0]
            if size > largest:
                return 0
            at += OVERHEAD + size
            if at > len(data):
                return at - position
        return 0


class OrdinaryConfirms:
    """Acks and nacks of one publishing channel."""

    __slots__ = ("_ack", "_nack")

    def __init__(self, channel: int) -> None:
        self._ack = struct.pack(">BHII", METHOD, channel, 13, BASIC_ACK)
        self._nack = struct.pack(">BHII", METHOD, channel, 13, BASIC_NACK)

    def take(self, data: bytes, position: int, confirms: list[Confirm]) -> int:
        """Append to *confirms*, from *position* on, and return where something else begins."""
        unpack = _CONFIRM_FRAME.unpack_from
        while len(data) - position >= _CONFIRM_FRAME.size:
            head, tag, bits, end = unpack(data, position)
            accepted = head == self._ack
            if not (accepted or head == self._nack) or end != END:
                break
            confirms.append(Confirm(tag, bool(bits & 1), accepted))
            position += _CONFIRM_FRAME.size
        return position
