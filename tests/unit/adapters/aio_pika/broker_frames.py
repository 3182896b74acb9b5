"""Frames as a broker sends them, written by pamqp, so that the adapter is not tested by itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pamqp import commands
from pamqp.body import ContentBody
from pamqp.frame import marshal
from pamqp.header import ContentHeader
from pamqp.heartbeat import Heartbeat

from aio_pika_batch.adapters.aio_pika.properties import decode, decode_headers, decode_route
from aio_pika_batch.core.message import Message

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aio_pika_batch.core.message import Headers, Properties

CHANNEL = 3
TAG = "consumer-1"
HEARTBEAT = Heartbeat().marshal()


@dataclass(frozen=True)
class Source:
    """What the messages of a session share."""

    queue: str = "q"
    consumer_tag: str = TAG
    retry_count_header: str = "x-retry-count"
    time: float = field(default=0.0)

    def decode_properties(self, raw: bytes, /) -> Properties:
        return decode(raw)

    def decode_headers(self, raw: bytes, /) -> Headers | None:
        return decode_headers(raw)

    def decode_route(self, raw: bytes, /) -> tuple[str, str]:
        return decode_route(raw)

    def now(self) -> float:
        return self.time


def method(what: Any, channel: int = CHANNEL) -> bytes:
    """One method frame."""
    return marshal(what, channel)


def content(
    body: bytes, properties: Any, *, channel: int = CHANNEL, part: int = 100
) -> list[bytes]:
    """The header frame of a message, and its body in frames of at most *part* bytes."""
    header = ContentHeader(body_size=len(body), properties=properties)
    bodies = [ContentBody(body[at : at + part]) for at in range(0, len(body), part)]
    return [marshal(header, channel), *(marshal(each, channel) for each in bodies)]


def delivery(
    tag: int,
    body: bytes = b"body",
    *,
    consumer_tag: str = TAG,
    redelivered: bool = False,
    exchange: str = "",
    routing_key: str = "q",
    properties: Any = None,
    channel: int = CHANNEL,
    part: int = 100,
) -> list[bytes]:
    """The frames of a delivery."""
    deliver = commands.Basic.Deliver(
        consumer_tag=consumer_tag,
        delivery_tag=tag,
        redelivered=redelivered,
        exchange=exchange,
        routing_key=routing_key,
    )
    properties = properties or commands.Basic.Properties()
    return [method(deliver, channel), *content(body, properties, channel=channel, part=part)]


def returned(body: bytes, exchange: str, routing_key: str, properties: Any) -> list[bytes]:
    """The frames of a returned publication."""
    what = commands.Basic.Return(
        reply_code=312, reply_text="NO_ROUTE", exchange=exchange, routing_key=routing_key
    )
    return [method(what), *content(body, properties)]


def message(raw: bytes, body: bytes = b"body", **route: str) -> Message:
    """A message with these raw properties."""
    where = (route.get("exchange", ""), route.get("routing_key", "q"))
    return Message(Source(), 1, False, body, where, raw)


def raw_properties(**values: Any) -> bytes:
    """A property list, written by pamqp."""
    properties = commands.Basic.Properties(**values)
    return ContentHeader(properties=properties).marshal()[12:]


def header_table(headers: Mapping[str, Any]) -> bytes:
    """A property list of headers only, written by pamqp."""
    return raw_properties(headers=dict(headers))
