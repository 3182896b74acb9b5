"""Splits the bytes of a connection into frames: bytes in, events out, wherever they are cut.

Laws:

- Events have the order of the wire. The cuts between reads change no event.
- The parser keeps less than one frame, and at most one message in several frames. No frame is
  larger than agreed, and no memory is reserved for what is only announced.
- After the first error nothing more is read.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from aio_pika_batch.adapters.amqp10 import spec
from aio_pika_batch.adapters.amqp10.codec import CodecError
from aio_pika_batch.adapters.amqp10.performatives import Record, Transfer, decode, encode
from aio_pika_batch.adapters.amqp10.transfers import TransferError

if TYPE_CHECKING:
    from aio_pika_batch.adapters.amqp10.transfers import Transfers
    from aio_pika_batch.core.message import Message

_HEAD = struct.Struct(">IBBH")
_WORD: Final = 4
"""Bytes that a frame's data offset counts in."""

HEARTBEAT: Final = _HEAD.pack(spec.FRAME_HEAD, spec.FRAME_HEAD // _WORD, spec.AMQP_FRAME, 0)
"""A frame without a body."""


class ProtocolHeader(NamedTuple):
    """The eight bytes that a peer begins with, or with which it refuses ours."""

    header: bytes


class ReceivedRecord(NamedTuple):
    """A frame other than a transfer of the consuming link."""

    channel: int
    record: Record
    payload: bytes = b""


class TransferredMessages(NamedTuple):
    """Messages that arrived together, in the order of their tags."""

    messages: list[Message]


class Violation(NamedTuple):
    """The bytes aren't AMQP 1.0, or violate what was agreed. It is the last event."""

    reason: str


WireEvent: TypeAlias = ProtocolHeader | ReceivedRecord | TransferredMessages | Violation


def pack(
    record: Record, channel: int = 0, kind: int = spec.AMQP_FRAME, payload: bytes = b""
) -> bytes:
    """Return a frame."""
    body = encode(record) + payload
    return _HEAD.pack(spec.FRAME_HEAD + len(body), 2, kind, channel) + body


class Frames10Parser:
    """Splits one connection's incoming bytes.

    Args:
        frame_max: The largest frame that the peer may send.
    """

    def __init__(self, frame_max: int) -> None:
        self._frame_max = frame_max
        self._transfers: Transfers | None = None
        self._is_broken = False
        self._events: list[WireEvent] = []
        # Parts of an incomplete frame. They are joined once, when enough has arrived.
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._needed = 0

    def receive(self, transfers: Transfers) -> None:
        """Make messages of the transfers of this link from now on."""
        self._transfers = transfers

    def feed(self, data: bytes) -> list[WireEvent]:
        """Take the bytes of one read; return their events."""
        if self._is_broken:
            return []
        if self._held:
            self._held.append(data)
            self._held_bytes += len(data)
            if self._held_bytes < self._needed:
                return []
            data, self._held = b"".join(self._held), []
        try:
            at = self._split(data)
        except (CodecError, TransferError) as error:
            self._is_broken = True
            self._collect()
            self._events.append(Violation(str(error)))
            at = len(data)
        if at < len(data):
            self._held = [data[at:]]
            self._held_bytes = len(data) - at
        events, self._events = self._events, []
        return events

    def _split(self, data: bytes) -> int:
        """Split whole frames off; return where the first incomplete one begins."""
        at = 0
        while True:
            if self._transfers is not None:
                at = self._transfers.take(data, at, self._frame_max)
            size = self._size(data, at)
            if size > len(data) - at:
                self._needed = size
                break
            self._frame(data, at, at + size)
            at += size
        self._collect()
        return at

    def _size(self, data: bytes, at: int) -> int:
        """Return how many bytes are needed to go on at *at*."""
        if len(data) - at < spec.FRAME_HEAD or data.startswith(b"AMQP", at):
            return spec.FRAME_HEAD
        size, offset, kind, _ = _HEAD.unpack_from(data, at)
        if not spec.FRAME_HEAD <= offset * _WORD <= size <= self._frame_max:
            raise CodecError(
                f"a frame of {size} bytes, with a body from byte {offset * _WORD} on, is not"
                f" possible; frames of up to {self._frame_max} bytes were agreed on"
            )
        if kind not in (spec.AMQP_FRAME, spec.SASL_FRAME):
            raise CodecError(f"a frame has the unknown type {kind}")
        return int(size)

    def _frame(self, data: bytes, at: int, end: int) -> None:
        """Take the whole frame, or protocol header, between *at* and *end*."""
        if data.startswith(b"AMQP", at):
            self._collect()
            self._events.append(ProtocolHeader(data[at:end]))
            return
        _, offset, kind, channel = _HEAD.unpack_from(data, at)
        body_at = at + offset * _WORD
        if body_at == end:
            return  # a heartbeat
        record, size = decode(data[body_at:end])
        transfers = self._transfers
        if (
            isinstance(record, Transfer)
            and transfers is not None
            and (channel, record.handle) == (transfers.channel, transfers.handle)
        ):
            transfers.add(record, data[at:end], body_at + size - at)
            return
        self._collect()
        payload = data[body_at + size : end]
        self._events.append(
            ReceivedRecord(0 if kind == spec.SASL_FRAME else channel, record, payload)
        )

    def _collect(self) -> None:
        """Emit collected messages before what follows them."""
        if self._transfers is not None and (messages := self._transfers.collected()):
            self._events.append(TransferredMessages(messages))
