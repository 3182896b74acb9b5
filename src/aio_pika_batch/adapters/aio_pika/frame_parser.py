"""Splits the bytes of a connection into frames, and takes the tapped channel's messages out.

Pure and synchronous: bytes in, events out. It parses from the first byte of a connection on,
because it could not find the beginning of a frame later. Of one tapped channel it takes out what
comes in bulk: deliveries, or confirms and returned publications. Everything else is passed to the
client library, unchanged and in order. Only a guarded channel's deliveries are passed on without
routes and properties.

Laws:

- Events come in the order of the bytes, however these were cut into reads.
- What is held back is less than one ordinary message, or one frame, each limited by `frame_max`; or
  the body of one message, in frames. None is larger than `LARGEST`, whatever was negotiated. No
  memory is reserved for bytes that are only announced.
- A channel that either side closes is no longer tapped: its number will be used again.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from aio_pika_batch.adapters.aio_pika.amqp_spec import (
    ARGUMENTS_AT,
    BASIC_CANCEL,
    BASIC_DELIVER,
    BASIC_RETURN,
    BODY,
    CHANNEL_CLOSE,
    CHANNEL_CLOSE_OK,
    CONNECTION_CLOSE,
    CONNECTION_TUNE,
    CONTENT_HEAD,
    DEFAULT_FRAME_MAX,
    FRAME_END,
    FRAME_HEAD,
    FRAME_OVERHEAD,
    FRAME_TYPES,
    HEADER,
    METHOD,
    METHOD_ID,
    PAYLOAD_AT,
    PROPERTIES_AT,
    PROTOCOL_HEADER,
    SHORTEST_CONTENT_HEADER,
)
from aio_pika_batch.adapters.aio_pika.events import (
    ChannelClosed,
    ChannelCloseOk,
    Confirms,
    ConnectionClosed,
    ConsumerCancelled,
    Deliveries,
    Malformed,
    PassThrough,
    ReturnedPublication,
)
from aio_pika_batch.adapters.aio_pika.frame_fastpath import ConfirmFastPath, DeliveryFastPath
from aio_pika_batch.core.message import Message
from aio_pika_batch.errors import TransportError

if TYPE_CHECKING:
    from aio_pika_batch.adapters.aio_pika.events import Confirm, Event
    from aio_pika_batch.adapters.aio_pika.header_guard import HeaderGuard
    from aio_pika_batch.core.message import Source

# RabbitMQ's `max_message_size` allows no more, so only a broken peer can meet this limit. It is
# needed because a body announces its size in 64 bits, and because a broker may set no frame_max.
LARGEST = 512 * 2**20
"""The most bytes of a body, or of a frame if the broker sets no limit."""

_REPLY_CODE = struct.Struct(">H")
_TEXT_AT = ARGUMENTS_AT + _REPLY_CODE.size
_TUNE = struct.Struct(">HI")
_TUNE_BYTES = FRAME_OVERHEAD + 4 + 8


class FrameError(TransportError):
    """The received bytes are not AMQP 0-9-1, or break what was negotiated."""


class _PartialContent:
    """A delivery or a return whose header or body is incomplete."""

    __slots__ = ("method", "missing", "parts", "properties")

    def __init__(self, method: bytes) -> None:
        self.method = method
        self.properties: bytes | None = None
        self.parts: list[bytes] = []
        self.missing = 0


class FrameParser:
    """Parses the incoming bytes of one connection. At most one channel is tapped."""

    def __init__(self) -> None:
        self.frame_max = DEFAULT_FRAME_MAX
        """The largest frame that either side may send, including its overhead."""
        self._largest = DEFAULT_FRAME_MAX
        self._channel = -1
        self._deliveries: DeliveryFastPath | None = None
        self._confirms: ConfirmFastPath | None = None
        self._takes_returns = False
        self._guard: HeaderGuard | None = None
        self._content: _PartialContent | None = None
        self._has_started = False
        self._broken = False
        # Incomplete bytes. They are joined only once, when as many have arrived as are needed.
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._needed = 0
        self._events: list[Event] = []

    @property
    def is_tapping(self) -> bool:
        """Whether a channel is tapped."""
        return self._channel >= 0

    def tap_consumer(self, channel: int, source: Source) -> None:
        """Take out the deliveries to *source*'s consumer from now on."""
        self.watch(channel)
        self._deliveries = DeliveryFastPath(channel, source)

    def tap_publisher(self, channel: int) -> None:
        """Take out confirms and returned publications from now on."""
        self.tap_returns(channel)
        self._confirms = ConfirmFastPath(channel)

    def tap_returns(self, channel: int) -> None:
        """Take out returned publications, which the client library would confuse, from now on."""
        self.watch(channel)
        self._takes_returns = True

    def guard(self, channel: int, guard: HeaderGuard) -> None:
        """Pass deliveries on without routes and properties from now on; the guard keeps these."""
        self.watch(channel)
        self._guard = guard

    def watch(self, channel: int) -> None:
        """Report when the broker closes this channel, and take nothing out, from now on."""
        self.untap()
        self._channel = channel

    def untap(self) -> None:
        """Pass everything on from now on."""
        self._channel = -1
        self._deliveries = self._confirms = self._content = self._guard = None
        self._takes_returns = False

    def feed(self, data: bytes) -> list[Event]:
        """Return the events in the bytes of one read."""
        if self._broken:
            return []
        if self._held:
            self._held.append(data)
            self._held_bytes += len(data)
            if self._held_bytes < self._needed:
                return []
            data = b"".join(self._held)
            self._held = []
        events: list[Event] = []
        self._events = events
        try:
            position = self._parse(data)
        except FrameError as error:
            self._broken = True
            events.append(Malformed(str(error)))
            return events
        if position < len(data):
            rest = data[position:] if position else data
            self._held = [rest]
            self._held_bytes = len(rest)
        return events

    def _parse(self, data: bytes) -> int:
        """Parse whole frames; return where the first incomplete frame, or message, begins."""
        position = 0
        while position < len(data):
            self._needed = 0
            if self._content is None:
                position = self._take_fast(data, position)
            if self._needed:
                break
            # Whatever the fast path has left: another frame, or a message in an unusual form.
            before = position
            position = self._take_frame(data, position)
            if position == before:
                break
        return position

    def _take_fast(self, data: bytes, position: int) -> int:
        if self._deliveries is not None:
            messages: list[Message] = []
            position, self._needed = self._deliveries.take(data, position, self._largest, messages)
            self._deliver(messages)
        elif self._confirms is not None:
            confirms: list[Confirm] = []
            position = self._confirms.take(data, position, confirms)
            self._confirm(confirms)
        return position

    def _take_frame(self, data: bytes, position: int) -> int:
        if len(data) - position < FRAME_OVERHEAD:
            self._needed = FRAME_OVERHEAD
            return position
        if not self._has_started:
            self._has_started = True
            if data.startswith(PROTOCOL_HEADER):
                # A broker of another version answers with eight bytes that are not a frame.
                self._pass_through(data[:FRAME_OVERHEAD])
                return FRAME_OVERHEAD
        kind: int
        channel: int
        size: int
        kind, channel, size = FRAME_HEAD.unpack_from(data, position)
        if kind not in FRAME_TYPES:
            raise FrameError(f"{kind:#04x} does not begin an AMQP 0-9-1 frame")
        if size > self._largest:
            raise FrameError(f"a frame has {size} bytes, but {self._largest} are allowed")
        end = position + FRAME_OVERHEAD + size
        if end > len(data):
            self._needed = end - position
            return position
        if data[end - 1] != FRAME_END:
            raise FrameError(f"a frame of {size} bytes does not end where it should")
        frame = data[position:end]
        if channel == self._channel:
            self._dispatch(kind, frame)
        else:
            if channel == 0 and kind == METHOD:
                self._dispatch_connection(frame)
            self._pass_through(frame)
        return end

    def _dispatch_connection(self, frame: bytes) -> None:
        method = _method_of(frame)
        if method == CONNECTION_TUNE and len(frame) >= _TUNE_BYTES:
            proposed: int = _TUNE.unpack_from(frame, ARGUMENTS_AT)[1]
            # 0 means no limit; a frame's size has 32 bits.
            self.frame_max = proposed or 0xFFFF_FFFF
            self._largest = min(self.frame_max, LARGEST)
        elif method == CONNECTION_CLOSE:
            self._events.append(ConnectionClosed(*_code_and_text(frame)))

    def _dispatch(self, kind: int, frame: bytes) -> None:
        if self._guard is not None:
            frame = self._guard.pass_on(kind, frame)
        if kind == METHOD:
            self._dispatch_method(_method_of(frame), frame)
        elif self._content is None:
            self._pass_through(frame)
        elif kind == HEADER:
            self._open_content(self._content, frame)
        elif kind == BODY:
            self._fill_content(self._content, frame)

    def _dispatch_method(self, method: int, frame: bytes) -> None:
        if method == CHANNEL_CLOSE:
            self.untap()
            self._events.append(ChannelClosed(*_code_and_text(frame)))
            self._pass_through(frame)
            return
        if self._content is not None:
            raise FrameError("a method interrupts the content of a message")
        deliveries = self._deliveries
        if method == BASIC_DELIVER and deliveries is not None:
            if frame.startswith(deliveries.constant, PAYLOAD_AT):
                if len(frame) < deliveries.route_at + 3:
                    raise FrameError("a delivery is cut off")
                self._content = _PartialContent(frame)
                return
        elif method == BASIC_RETURN and self._takes_returns:
            self._content = _PartialContent(frame)
            return
        elif method == BASIC_CANCEL and not (deliveries is None and self._guard is None):
            tag, _ = _short(frame, ARGUMENTS_AT)
            self._events.append(ConsumerCancelled(tag.decode(errors="replace")))
        elif method == CHANNEL_CLOSE_OK:
            self.untap()
            self._events.append(ChannelCloseOk())
        self._pass_through(frame)

    def _open_content(self, content: _PartialContent, frame: bytes) -> None:
        if len(frame) < FRAME_OVERHEAD + SHORTEST_CONTENT_HEADER or content.properties is not None:
            raise FrameError("a content header is cut off, or comes twice")
        content.missing = CONTENT_HEAD.unpack_from(frame, PAYLOAD_AT)[1]
        if content.missing > LARGEST:
            raise FrameError(
                f"a body of {content.missing} bytes is announced, but {LARGEST} are allowed"
            )
        content.properties = frame[PROPERTIES_AT:-1]
        if not content.missing:
            self._close_content(content)

    def _fill_content(self, content: _PartialContent, frame: bytes) -> None:
        if content.properties is None:
            raise FrameError("the body of a message comes before its header")
        size = len(frame) - FRAME_OVERHEAD
        if not size:
            return  # any number of these may come: keep none
        content.parts.append(frame[PAYLOAD_AT:-1])
        content.missing -= size
        if content.missing < 0:
            raise FrameError("the body of a message is longer than its header says")
        if not content.missing:
            self._close_content(content)

    def _close_content(self, content: _PartialContent) -> None:
        self._content = None
        body = b"".join(content.parts)
        properties = content.properties or b""
        method = content.method
        deliveries = self._deliveries
        if deliveries is not None:
            tag, redelivered = deliveries.take_method(method)
            route = method[deliveries.route_at : -1]
            self._deliver([Message(deliveries.source, tag, redelivered, body, route, properties)])
        else:
            code, text = _code_and_text(method)
            exchange, at = _short(method, _TEXT_AT + 1 + method[_TEXT_AT])
            routing_key, _ = _short(method, at)
            self._events.append(
                ReturnedPublication(code, text, exchange, routing_key, properties, body)
            )

    def _deliver(self, messages: list[Message]) -> None:
        last = self._events[-1] if self._events else None
        if isinstance(last, Deliveries):
            last.messages.extend(messages)
        elif messages:
            self._events.append(Deliveries(messages))

    def _confirm(self, confirms: list[Confirm]) -> None:
        last = self._events[-1] if self._events else None
        if isinstance(last, Confirms):
            last.confirms.extend(confirms)
        elif confirms:
            self._events.append(Confirms(confirms))

    def _pass_through(self, frame: bytes) -> None:
        last = self._events[-1] if self._events else None
        if isinstance(last, PassThrough):
            last.frames.append(frame)
        else:
            self._events.append(PassThrough([frame]))


def _method_of(frame: bytes) -> int:
    if len(frame) < FRAME_OVERHEAD + 4:
        raise FrameError("a method frame has no method")
    method: int = METHOD_ID.unpack_from(frame, PAYLOAD_AT)[0]
    return method


def _code_and_text(frame: bytes) -> tuple[int, str]:
    """Return the reply code and the text with which `close` and `return` begin."""
    if len(frame) < FRAME_OVERHEAD + 7:
        raise FrameError("a method is cut off")
    code: int = _REPLY_CODE.unpack_from(frame, ARGUMENTS_AT)[0]
    return code, _short(frame, _TEXT_AT)[0].decode(errors="replace")


def _short(frame: bytes, at: int) -> tuple[bytes, int]:
    """Return a short string of a method frame, and where it ends."""
    if at >= len(frame) - 1:
        raise FrameError("a method is cut off")
    end = at + 1 + frame[at]
    if end > len(frame) - 1:
        raise FrameError("a method is cut off")
    return frame[at + 1 : end], end
