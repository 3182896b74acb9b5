"""Turns the transfers of one link into messages.

Nearly all messages arrive in one frame. Except for two numbers, the sections and their lengths, the
frames have the same bytes. Those are read by a precompiled layout and a few comparisons, without
decoding a value. All others are read frame by frame.

Laws:

- Delivery ids follow one another. A message's tag is the number of its delivery, from 1 on.
- Both ways make the same messages of the same bytes.
- Memory grows with the bytes that arrived, and no message is larger than `LARGEST`.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from aio_pika_batch.adapters.amqp10 import spec
from aio_pika_batch.adapters.amqp10.messages import ENCODED, SectionMessage
from aio_pika_batch.adapters.amqp10.sections import is_redelivered, split

if TYPE_CHECKING:
    from collections.abc import Callable

    from aio_pika_batch.adapters.amqp10.performatives import Transfer
    from aio_pika_batch.core.message import Message, Properties, Source

LARGEST: Final = 512 * 2**20
"""The largest message in bytes: RabbitMQ's upper limit for `max_message_size`."""

_SIZE_AT = struct.Struct(">I").unpack_from
_SECTION_AT = struct.Struct(">IB").unpack_from

_TRANSFER_LIST: Final = b"\x02\x00"  # data offset and type of a frame, then the channel
_LIST8, _MAP8, _LIST32, _MAP32, _BINARY8, _BINARY32 = 0xC0, 0xC1, 0xD0, 0xD1, 0xA0, 0xB0


def _beginning(code: int, constructor: int) -> int:
    """Return the four bytes that a section begins with: `00 53 code constructor`."""
    return 0x53 << 16 | code << 8 | constructor


_HEADER, _ANNOTATIONS = (
    _beginning(spec.HEADER, _LIST8),
    _beginning(spec.MESSAGE_ANNOTATIONS, _MAP8),
)
_SHORT_SECTIONS: Final = frozenset(
    (
        _ANNOTATIONS,
        _beginning(spec.PROPERTIES, _LIST8),
        _beginning(spec.APPLICATION_PROPERTIES, _MAP8),
    )
)
_LONG_SECTIONS: Final = frozenset(
    (
        _beginning(spec.MESSAGE_ANNOTATIONS, _MAP32),
        _beginning(spec.PROPERTIES, _LIST32),
        _beginning(spec.APPLICATION_PROPERTIES, _MAP32),
    )
)
_SHORT_BODY: Final = _beginning(spec.DATA, _BINARY8)
_LONG_BODY: Final = _beginning(spec.DATA, _BINARY32)
_UINT0, _SMALL_UINT, _UINT = 0x43, 0x52, 0x70
_TAG: Final = b"\xa0\x04"
"""The constructor of a delivery tag as RabbitMQ writes it: four bytes, the delivery id again."""

_NO_PREFIX: Final = b"\xff"
"""No message begins with it."""

_FEW: Final = 64
"""How many different header sections are remembered."""


class TransferError(ValueError):
    """The peer violated the rules for transfers."""


class _Layout(NamedTuple):
    """What the frames of ordinary transfers look like up to the message."""

    unpack: Callable[[bytes, int], tuple[int, bytes, int, bytes, bytes]]
    head: bytes
    tail: bytes
    size: int


class Transfers:
    """The incoming deliveries of one link.

    Attributes:
        frames: The number of transfers so far.
        count: The number of messages so far, which is the last one's tag.
    """

    __slots__ = (
        "_headers",
        "_is_partial",
        "_layout",
        "_offset",
        "_parts",
        "_prefix",
        "_prefix_redelivered",
        "_ready",
        "_size",
        "_source",
        "channel",
        "count",
        "frames",
        "handle",
    )

    def __init__(self, source: Source, channel: int, handle: int) -> None:
        self.channel = channel
        self.handle = handle
        self.frames = 0
        self.count = 0
        self._source = source
        self._offset: int | None = None
        self._ready: list[Message] = []
        self._is_partial = False
        self._parts: list[bytes] = []
        self._size = 0
        self._layout: _Layout | None = None
        self._prefix = _NO_PREFIX
        self._prefix_redelivered = False
        self._headers: dict[bytes, bool] = {}

    def delivery_id(self, tag: int) -> int:
        """Return the peer's number for the delivery with this tag."""
        return (tag + (self._offset or 0)) & spec.SERIAL

    def tag(self, delivery_id: int) -> int:
        """Return the tag of the newest delivery with this number; 0 or less if there was none."""
        newest = self.delivery_id(self.count)
        return self.count - ((newest - delivery_id) & spec.SERIAL)

    def collected(self) -> list[Message]:
        """Return the messages since the last call."""
        ready, self._ready = self._ready, []
        return ready

    def take(self, data: bytes, at: int, frame_max: int) -> int:  # noqa: C901, PLR0912
        """Take ordinary messages from *at* on; return where something else begins."""
        # Written in one loop and with local names, because it runs once for each message.
        layout = self._layout
        if layout is None or self._is_partial:
            return at
        unpack, head, tail, payload_at = layout
        section_at = _SECTION_AT
        source, append = self._source, self._ready.append
        prefix, redelivered = self._prefix, self._prefix_redelivered
        tag, size = self.count + 1, len(data)
        delivery_id = self.delivery_id(tag)
        try:
            while True:
                length, its_head, its_id, its_tag, its_tail = unpack(data, at)
                end = at + length
                if (
                    its_id != delivery_id
                    or its_head != head
                    or its_tail != tail
                    or its_tag != _TAG
                    or end > size
                    or length > frame_max
                ):
                    break
                start = section = at + payload_at
                if data.startswith(prefix, start):
                    section += len(prefix)
                else:
                    section, redelivered = self._look(data, start)
                    prefix = self._prefix
                while True:
                    kind, short = section_at(data, section)
                    if kind in _SHORT_SECTIONS:
                        section += 5 + short
                    elif kind == _LONG_BODY:
                        body_at = section + 8
                        body_end = body_at + _SIZE_AT(data, section + 4)[0]
                        break
                    elif kind == _SHORT_BODY:
                        body_at = section + 5
                        body_end = body_at + short
                        break
                    elif kind in _LONG_SECTIONS:
                        section += 8 + _SIZE_AT(data, section + 4)[0]
                    else:
                        body_end = 0
                        break
                if body_end != end:
                    break
                sections = data[start:section]
                append(
                    SectionMessage(source, tag, redelivered, data[body_at:end], sections, sections)
                )
                tag += 1
                delivery_id += 1
                at = end
        except (struct.error, IndexError):
            pass
        taken = tag - 1 - self.count
        self.count += taken
        self.frames += taken
        return at

    def _look(self, data: bytes, start: int) -> tuple[int, bool]:
        """Return where header and annotations end, and whether the message is redelivered.

        They are remembered, because the next message probably begins with the same bytes.
        """
        at = start
        redelivered = False
        kind, short = _SECTION_AT(data, at)
        if kind == _HEADER:
            at += 5 + short
            header = data[start:at]
            known = self._headers.get(header)
            if known is None:
                if len(self._headers) == _FEW:
                    self._headers.clear()
                known = self._headers[header] = is_redelivered(header)
            redelivered = known
            kind, short = _SECTION_AT(data, at)
        if kind == _ANNOTATIONS:
            at += 5 + short
        self._prefix, self._prefix_redelivered = data[start:at] or _NO_PREFIX, redelivered
        return at, redelivered

    def add(self, transfer: Transfer, frame: bytes, payload_at: int) -> None:
        """Add any transfer of the link: the record, its frame, and where the payload begins.

        Raises:
            TransferError: It violates the rules.
        """
        self.frames += 1
        if transfer.aborted or transfer.settled:
            raise TransferError("a transfer is aborted or settled, which was not agreed on")
        delivery_id = transfer.delivery_id
        if delivery_id is None and not self._is_partial:
            raise TransferError("a transfer begins a message without a delivery id")
        if self._offset is None:
            self._offset = ((delivery_id or 0) - 1) & spec.SERIAL
        expected = self.delivery_id(self.count + 1)
        if delivery_id not in (None, expected):
            raise TransferError(f"delivery {delivery_id} came in place of {expected}")
        payload = frame[payload_at:]
        if transfer.more or self._is_partial:
            self._is_partial = bool(transfer.more)
            self._size += len(payload)
            if self._size > LARGEST:
                raise TransferError(f"a message has more than {LARGEST} bytes")
            if payload:
                self._parts.append(payload)
            if transfer.more:
                return
            payload, self._parts, self._size = b"".join(self._parts), [], 0
        else:
            self._learn(frame, payload_at)
        self._finish(payload)

    def _finish(self, payload: bytes) -> None:
        self.count += 1
        content = split(payload)
        properties: bytes | Properties = content.head
        if content.is_encoded:
            properties = self._source.decode_properties(content.head)
            properties.type = ENCODED
        self._ready.append(
            SectionMessage(
                self._source,
                self.count,
                content.redelivered,
                content.body,
                content.head,
                properties,
            )
        )

    def _learn(self, frame: bytes, payload_at: int) -> None:
        """Remember the layout of ordinary transfers, if this is one."""
        # A handle takes one byte, or two: 43, or 52 and its number. An id takes two, later five.
        id_at = {_UINT0: 15, _SMALL_UINT: 16}.get(frame[14], 0)
        letter, width = {_SMALL_UINT: ("B", 1), _UINT: ("I", 4)}.get(frame[id_at], ("", 0))
        tag_at = id_at + 1 + width
        after = tag_at + len(_TAG) + 4
        if (
            width == 0
            or after > payload_at
            or not frame.startswith(_TRANSFER_LIST, 4)
            or frame[11] != _LIST8
            or not frame.startswith(_TAG, tag_at)
        ):
            return
        head, tail = frame[4 : id_at + 1], frame[after:payload_at]
        layout = struct.Struct(f">I{len(head)}s{letter}2s4x{len(tail)}s")
        self._layout = _Layout(layout.unpack_from, head, tail, payload_at)
