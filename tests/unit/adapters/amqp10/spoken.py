"""Frames as RabbitMQ writes them, and as others may."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field, replace
from typing import Any

from aio_pika_batch.adapters.amqp10 import spec
from aio_pika_batch.adapters.amqp10.codec import Described, Symbol, UByte, UInt, ULong, write
from aio_pika_batch.adapters.amqp10.frames import Frames10Parser
from aio_pika_batch.adapters.amqp10.messages import MessageSource
from aio_pika_batch.adapters.amqp10.performatives import Transfer, encode
from aio_pika_batch.adapters.amqp10.transfers import Transfers

FRAME_MAX = 1 << 20
SOURCE = MessageSource("q", "c-1", "x-retry-count")


def section(code: int, value: Any) -> bytes:
    """One section of a message."""
    return write(Described(ULong(code), value))


@dataclass(frozen=True)
class Sent:
    """A message, as the broker holds it."""

    body: bytes = b"x" * 40
    redelivered: bool = False
    route: tuple[str, str] = ("", "q")
    annotations: dict[Any, Any] = field(default_factory=dict)
    properties: list[Any] | None = None
    application_properties: dict[Any, Any] | None = None
    delivery_count: int = 0

    @property
    def head(self) -> bytes:
        """All sections before the body."""
        header = [True, UByte(4), None, not self.redelivered, UInt(self.delivery_count)]
        annotations = {
            Symbol("x-exchange"): self.route[0],
            Symbol("x-routing-key"): self.route[1],
            **self.annotations,
        }
        head = section(spec.HEADER, header) + section(spec.MESSAGE_ANNOTATIONS, annotations)
        if self.properties is not None:
            head += section(spec.PROPERTIES, self.properties)
        if self.application_properties is not None:
            head += section(spec.APPLICATION_PROPERTIES, self.application_properties)
        return head

    @property
    def payload(self) -> bytes:
        """The whole message."""
        return self.head + section(spec.DATA, self.body)


def frame(body: bytes, channel: int = 0, kind: int = 0) -> bytes:
    """Any frame."""
    return struct.pack(">IBBH", len(body) + 8, 2, kind, channel) + body


def transfers(
    payload: bytes,
    delivery_id: int,
    *,
    size: int | None = None,
    channel: int = 0,
    trailing_nulls: int = 0,
    **more: Any,
) -> bytes:
    """A message in one frame, or in frames of at most *size* bytes of payload.

    Args:
        trailing_nulls: 4.0 writes six, 4.3 none.
    """
    tag = struct.pack(">I", delivery_id)
    is_last = None if trailing_nulls else False
    first = Transfer(UInt(0), UInt(delivery_id), tag, UInt(0), settled=False, more=is_last)
    record = replace(first, **more)
    if size is None:
        body = encode(record)
        assert body[3] == 0xC0
        head = bytes((0xC0, body[4] + trailing_nulls, body[5] + trailing_nulls))
        return frame(
            body[:3] + head + body[6:] + b"\x40" * trailing_nulls + payload,
            channel,
        )
    parts = [payload[at : at + size] for at in range(0, len(payload), size)] or [b""]
    return b"".join(
        frame(encode(replace(record, more=number < len(parts) - 1)) + part, channel)
        for number, part in enumerate(parts)
    )


class Plain(Transfers):
    """Takes nothing at a stroke."""

    __slots__ = ()

    def take(self, data: bytes, at: int, frame_max: int) -> int:
        return at


def parser(kind: type[Transfers] = Transfers, frame_max: int = FRAME_MAX) -> Frames10Parser:
    """One that receives from a link."""
    parser = Frames10Parser(frame_max)
    parser.receive(kind(SOURCE, 0, 0))
    return parser
