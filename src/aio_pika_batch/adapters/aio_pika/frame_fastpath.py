"""Parses ordinary deliveries and confirms, and packs settlements and publications.

All with precompiled layouts, and several frames at a time.

An ordinary message is a method frame, a header frame and one body frame; a confirm has 21 bytes. On
one channel, all but a few fields have the same bytes every time, so three layouts and as many
comparisons read a message. Everything else is left to
:class:`~aio_pika_batch.adapters.aio_pika.frame_parser.FrameParser`, frame by frame.

Routes and properties stay raw, because few handlers read them.

Frames are packed whole and joined, so that they can be written between the client library's own.
The frames of a channel stay in order, and the method, header and body of a message stay together.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from aio_pika_batch.adapters.aio_pika.amqp_spec import (
    ACK_SIZE,
    BASIC_ACK,
    BASIC_DELIVER,
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
    PAYLOAD_AT,
    REJECT_REQUEUE,
    SHORTEST_CONTENT_HEADER,
)
from aio_pika_batch.adapters.aio_pika.events import Confirm
from aio_pika_batch.adapters.aio_pika.properties import encode_short
from aio_pika_batch.core.message import Message
from aio_pika_batch.core.settlement import Disposition

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aio_pika_batch.core.message import Source
    from aio_pika_batch.core.settlement import Frame

_SIZE = struct.Struct(">3xI")
# Each begins with the end of the frame before: one byte less to compare for each frame.
_HEADER_FRAME = struct.Struct(">4sIIQ")
_BODY_FRAME = struct.Struct(">4sI")
_CONFIRM_FRAME = struct.Struct(">11sQBB")

_SETTLE_FRAME = struct.Struct(">BHIIQBB")
_PUBLISH_HEAD = struct.Struct(">BHIIH")
_HEADER_HEAD = struct.Struct(">BHIIQ")
_BODY_HEAD = struct.Struct(">BBHI")  # after the end of the frame before
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


class DeliveryFastPath:
    """Parses the deliveries of one consumer whose bodies have one frame each.

    Attributes:
        constant: The method and the consumer tag, which follow the head of a deliver frame.
        route_at: Where exchange and routing key begin in a deliver frame.
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
        # Exchange and routing key have at least their length bytes.
        self._shortest = self.route_at - PAYLOAD_AT + 2
        self._method = struct.pack(">BH", METHOD, channel)
        self._header = struct.pack(">BBH", FRAME_END, HEADER, channel)
        self._body = struct.pack(">BBH", FRAME_END, BODY, channel)

    def take(
        self, data: bytes, position: int, largest: int, messages: list[Message]
    ) -> tuple[int, int]:
        """Append the ordinary messages that begin at *position* to *messages*.

        Returns:
            The position of what follows them, and 0; or the position of a message that is not
            complete yet, and the number of bytes from there on that it has at least.
        """
        # Local names and literal offsets, because this loop runs for each message. 7 is the head of
        # a frame, 8 the same with the end of the frame before, and 20 reaches to the properties.
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
                if (
                    head != header
                    or what != CONTENT_CLASS
                    or not SHORTEST_CONTENT_HEADER <= size <= largest
                ):
                    return position, 0
                # An empty body has no frame, and a large one has several.
                if not 0 < body_size <= largest:
                    return position, 0
                properties_end = route_end + 8 + size
                head, size = unpack_body(data, properties_end)
                if head != body or size != body_size:
                    return position, 0
                start = properties_end + 8
                end = start + size
                if data[end] != FRAME_END:
                    return position, 0
                # Slices are copies, so a message does not keep the bytes of the whole read alive.
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
            # The data ends within a message. This happens once for each read, so it may cost more
            # than a check of the length for each message would.
            return position, self._needed(data, position, largest)

    def take_method(self, frame: bytes) -> tuple[int, bool]:
        """Return the delivery tag and the redelivered flag of a deliver frame."""
        _, _, _, tag, redelivered = self._deliver.unpack_from(frame)
        return tag, redelivered

    def _needed(self, data: bytes, position: int, largest: int) -> int:
        """Return how many bytes an ordinary message at *position* has at least; 0 if unknown."""
        if len(data) - position < self.route_at:
            return 0
        at = position
        for head in (self._method, self._header[1:], self._body[1:]):
            if not head.startswith(data[at : at + 3]):
                return 0
            if len(data) - at < FRAME_OVERHEAD:
                return at + FRAME_OVERHEAD - position
            size: int = _SIZE.unpack_from(data, at)[0]
            if size > largest:
                return 0
            at += FRAME_OVERHEAD + size
            if at > len(data):
                return at - position
        return 0


class ConfirmFastPath:
    """Parses the acks and nacks of one publishing channel."""

    __slots__ = ("_ack", "_nack")

    def __init__(self, channel: int) -> None:
        head = FRAME_HEAD.pack(METHOD, channel, ACK_SIZE)
        self._ack = head + struct.pack(">I", BASIC_ACK)
        self._nack = head + struct.pack(">I", BASIC_NACK)

    def take(self, data: bytes, position: int, confirms: list[Confirm]) -> int:
        """Append the confirms that begin at *position*; return the position of what follows."""
        unpack = _CONFIRM_FRAME.unpack_from
        while len(data) - position >= _CONFIRM_FRAME.size:
            head, tag, bits, end = unpack(data, position)
            accepted = head == self._ack
            if not (accepted or head == self._nack) or end != FRAME_END:
                break
            confirms.append(Confirm(tag, bool(bits & MULTIPLE), accepted))
            position += _CONFIRM_FRAME.size
        return position


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


def pack_publications(
    channel: int,
    publications: Iterable[tuple[tuple[bytes, object], bytes, bytes]],
    frame_max: int,
) -> bytes:
    """Pack publications.

    Args:
        publications: For each a tuple that begins with its method frame, its properties and body.
    """
    parts: list[bytes] = []
    largest = frame_max - FRAME_OVERHEAD
    for (method, _), properties, body in publications:
        length = len(body)
        size = CONTENT_HEAD.size + len(properties)
        head = _HEADER_HEAD.pack(HEADER, channel, size, CONTENT_CLASS, length)
        if 0 < length <= largest:
            body_head = _BODY_HEAD.pack(FRAME_END, BODY, channel, length)
            parts += (method, head, properties, body_head, body, _END)
            continue
        parts += (method, head, properties, _END)
        for start in range(0, length, largest):
            part = body[start : start + largest]
            parts += (FRAME_HEAD.pack(BODY, channel, len(part)), part, _END)
    return b"".join(parts)


def largest_properties(frame_max: int) -> int:
    """Return the size of the largest property list: it can't be split over several frames."""
    return frame_max - _LEAST_HEADER
