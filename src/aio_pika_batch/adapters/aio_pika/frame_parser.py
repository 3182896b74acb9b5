"""Where does one frame end, and which frames are not for the client library?

Pure and synchronous: bytes in, events out. It splits from the first byte of a connection on, since
it could not know later where a frame begins. Of one tapped channel it takes out what travels in
bulk: deliveries, or confirms and returns. Everything else passes through, untouched and in order;
only a guarded channel's deliveries pass without what the client library need not decode.

Laws:

- Events stand in the order of the wire, however the bytes were cut into reads.
- What is held back is less than one ordinary message, or one frame, each bounded by `frame_max`;
  or the body of one message, in frames. None is larger than `LARGEST`, whatever is agreed on, and
  nothing is set aside for what is only announced.
- A channel that is closed, by either side, is no longer tapped: its number will be used again.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from aio_pika_batch.adapters.aio_pika.events import (
    ChannelClosed,
    ChannelGone,
    Confirms,
    ConnectionClosed,
    ConsumerCancelled,
    Deliveries,
    Malformed,
    PassThrough,
    Returned,
)
from aio_pika_batch.adapters.aio_pika.frame_fastpath import (
    BASIC_DELIVER,
    BODY,
    END,
    HEADER,
    HEARTBEAT,
    METHOD,
    OVERHEAD,
    SHORTEST_HEADER,
    OrdinaryConfirms,
    OrdinaryDeliveries,
)
from aio_pika_batch.adapters.aio_pika.header_guard import Guard
from aio_pika_batch.core.message import Message
from aio_pika_batch.errors import TransportError

if TYPE_CHECKING:
    from aio_pika_batch.adapters.aio_pika.events import Confirm, Event
    from aio_pika_batch.core.message import Source

DEFAULT_FRAME_MAX = 131_072
"""Until the broker proposes its own; RabbitMQ's default."""

LARGEST = 512 * 2**20
"""Bytes of a body, or of a frame where the broker sets no limit: no RabbitMQ can be told to take
larger messages (`max_message_size`)."""

_FRAME = struct.Struct(">BHI")
_METHOD_ID = struct.Struct(">I")
_CONTENT = struct.Struct(">IQ")
_CODE = struct.Struct(">H")
_TUNE = struct.Struct(">HI")
_TUNE_BYTES = OVERHEAD + 4 + 8

_CONNECTION_TUNE = 10 << 16 | 30
_CONNECTION_CLOSE = 10 << 16 | 50
_CHANNEL_CLOSE = 20 << 16 | 40
_CHANNEL_CLOSE_OK = 20 << 16 | 41
_BASIC_CANCEL = 60 << 16 | 30
_BASIC_RETURN = 60 << 16 | 50


class FrameError(TransportError):
    """What came is no AMQP 0-9-1, or breaks what was negotiated."""


class _Content:
    """A delivery or a return whose header or body is still to come."""

    __slots__ = ("method", "missing", "parts", "properties")

    def __init__(self, method: bytes) -> None:
        self.method = method
        self.properties: bytes | None = None
        self.parts: list[bytes] = []
        self.missing = 0


class Splitter:
    """Split one connection's incoming bytes; tap at most one channel of it."""

    def __init__(self) -> None:
        self.frame_max = DEFAULT_FRAME_MAX
        """The largest frame, overhead included, that either side may send."""
        self._largest = DEFAULT_FRAME_MAX
        self._channel = -1
        self._deliveries: OrdinaryDeliveries | None = None
        self._confirms: OrdinaryConfirms | None = None
        self._takes_returns = False
        self._guard: Guard | None = None
        self._content: _Content | None = None
        self._greeted = False
        self._broken = False
        # Of an unfinished read: joined once, when as much is there as is known to be needed.
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._needed = 0
        self._events: list[Event] = []

    @property
    def is_tapping(self) -> bool:
        """Whether a channel is tapped."""
        return self._channel >= 0

    def tap_consumer(self, channel: int, source: Source) -> None:
        """From now on, take the deliveries to *source*'s consumer out."""
        self.watch(channel)
        self._deliveries = OrdinaryDeliveries(channel, source)

    def tap_publisher(self, channel: int) -> None:
        """From now on, take confirms and returns out."""
        self.tap_returns(channel)
        self._confirms = OrdinaryConfirms(channel)

    def tap_returns(self, channel: int) -> None:
        """From now on, take returns out, which the client library cannot tell apart."""
        self.watch(channel)
        self._takes_returns = True

    def guard(self, channel: int) -> Guard:
        """From now on, let deliveries pass without routes and properties, which are kept here."""
        self.watch(channel)
        self._guard = Guard()
        return self._guard

    def watch(self, channel: int) -> None:
        """From now on, tell when the broker closes this channel, and take nothing out."""
        self.untap()
        self._channel = channel

    def untap(self) -> None:
        """Let everything pass through."""
        self._channel = -1
        self._deliveries = self._confirms = self._content = self._guard = None
        self._takes_returns = False

    def feed(self, data: bytes) -> list[Event]:
        """Take in what one read has brought."""
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
            position = self._split(data)
        except FrameError as error:
            self._broken = True
            events.append(Malformed(str(error)))
            return events
        if position < len(data):
            rest = data[position:] if position else data
            self._held = [rest]
            self._held_bytes = len(rest)
        return events

    def _split(self, data: bytes) -> int:
        """Take whole frames; return where the first unfinished one, or message, begins."""
        position = 0
        while position < len(data):
            self._needed = 0
            if self._content is None:
                position = self._take_ordinary(data, position)
            if self._needed:
                break
            before = position
            position = self._take_frame(data, position)
            if position == before:
                break
        return position

    def _take_ordinary(self, data: bytes, position: int) -> int:
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
        if len(data) - position < OVERHEAD:
            self._needed = OVERHEAD
            return position
        if not self._greeted:
            self._greeted = True
            if data.startswith(b"AMQP"):
                # A broker that speaks another version says so, in eight bytes and no frame.
                self._pass(data[:OVERHEAD])
                return OVERHEAD
        kind: int
        channel: int
        size: int
        kind, channel, size = _FRAME.unpack_from(data, position)
        if kind not in {METHOD, HEADER, BODY, HEARTBEAT}:
            raise FrameError(f"no AMQP 0-9-1 frame begins with {kind:#04x}")
        if size > self._largest:
            raise FrameError(f"a frame of {size} bytes came, but {self._largest} are allowed")
        end = position + OVERHEAD + size
        if end > len(data):
            self._needed = end - position
            return position
        if data[end - 1] != END:
            raise FrameError(f"a frame of {size} bytes does not end where it says")
        frame = data[position:end]
        if channel == self._channel:
            self._sort(kind, frame)
        else:
            if channel == 0 and kind == METHOD:
                self._sort_connection(frame)
            self._pass(frame)
        return end

    def _sort_connection(self, frame: bytes) -> None:
        method = _method_of(frame)
        if method == _CONNECTION_TUNE and len(frame) >= _TUNE_BYTES:
            proposed: int = _TUNE.unpack_from(frame, 11)[1]
            # 0 means that there is no limit; a frame's size has 32 bits.
            self.frame_max = proposed or 0xFFFF_FFFF
            self._largest = min(self.frame_max, LARGEST)
        elif method == _CONNECTION_CLOSE:
            self._events.append(ConnectionClosed(*_code_and_text(frame)))

    def _sort(self, kind: int, frame: bytes) -> None:
        if self._guard is not None:
            frame = self._guard.pass_on(kind, frame)
        if kind == METHOD:
            self._sort_method(_method_of(frame), frame)
        elif self._content is None:
            self._pass(frame)
        elif kind == HEADER:
            self._open_content(self._content, frame)
        elif kind == BODY:
            self._fill_content(self._content, frame)

    def _sort_method(self, method: int, frame: bytes) -> None:
        if method == _CHANNEL_CLOSE:
            self.untap()
            self._events.append(ChannelClosed(*_code_and_text(frame)))
            self._pass(frame)
            return
        if self._content is not None:
            raise FrameError("a method came where a message's content should have")
        deliveries = self._deliveries
        if method == BASIC_DELIVER and deliveries is not None:
            if frame.startswith(deliveries.constant, 7):
                if len(frame) < deliveries.route_at + 3:
                    raise FrameError("a delivery was cut off")
                self._content = _Content(frame)
                return
        elif method == _BASIC_RETURN and self._takes_returns:
            self._content = _Content(frame)
            return
        elif method == _BASIC_CANCEL and deliveries is not None:
            self._events.append(ConsumerCancelled(_short(frame, 11)[0].decode(errors="replace")))
        elif method == _CHANNEL_CLOSE_OK:
            self.untap()
            self._events.append(ChannelGone())
        self._pass(frame)

    def _open_content(self, content: _Content, frame: bytes) -> None:
        if len(frame) < OVERHEAD + SHORTEST_HEADER or content.properties is not None:
            raise FrameError("a message's content header is not one")
        content.missing = _CONTENT.unpack_from(frame, 7)[1]
        if content.missing > LARGEST:
            raise FrameError(
                f"a body of {content.missing} bytes was announced; {LARGEST} are allowed"
            )
        content.properties = frame[19:-1]
        if not content.missing:
            self._close_content(content)

    def _fill_content(self, content: _Content, frame: bytes) -> None:
        if content.properties is None:
            raise FrameError("a message's body came before its header")
        size = len(frame) - OVERHEAD
        if not size:
            return  # any number of these may come, and none is worth keeping
        content.parts.append(frame[7:-1])
        content.missing -= size
        if content.missing < 0:
            raise FrameError("a message's body is longer than its header said")
        if not content.missing:
            self._close_content(content)

    def _close_content(self, content: _Content) -> None:
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
            exchange, at = _short(method, 14 + method[13])
            routing_key, _ = _short(method, at)
            self._events.append(Returned(code, text, exchange, routing_key, properties, body))

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

    def _pass(self, frame: bytes) -> None:
        last = self._events[-1] if self._events else None
        if isinstance(last, PassThrough):
            last.frames.append(frame)
        else:
            self._events.append(PassThrough([frame]))


def _method_of(frame: bytes) -> int:
    if len(frame) < OVERHEAD + 4:
        raise FrameError("a method frame without a method came")
    method: int = _METHOD_ID.unpack_from(frame, 7)[0]
    return method


def _code_and_text(frame: bytes) -> tuple[int, str]:
    """Read what `close` and `return` begin with: a reply code and a text."""
    if len(frame) < OVERHEAD + 7:
        raise FrameError("a method was cut off")
    code: int = _CODE.unpack_from(frame, 11)[0]
    return code, _short(frame, 13)[0].decode(errors="replace")


def _short(frame: bytes, at: int) -> tuple[bytes, int]:
    """Read a short string of a method frame, and where it ends."""
    if at >= len(frame) - 1:
        raise FrameError("a method was cut off")
    end = at + 1 + frame[at]
    if end > len(frame) - 1:
        raise FrameError("a method was cut off")
    return frame[at + 1 : end], end
