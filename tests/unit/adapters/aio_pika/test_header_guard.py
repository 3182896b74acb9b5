"""A guarded library receives what it has to carry, and nothing that it cannot decode."""

from __future__ import annotations

import struct
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pamqp import commands
from pamqp.frame import unmarshal

from aio_pika_batch.adapters.aio_pika.events import ChannelClosed, PassThrough, ReturnedPublication
from aio_pika_batch.adapters.aio_pika.frame_parser import FrameParser
from aio_pika_batch.adapters.aio_pika.header_guard import HeaderGuard
from tests.unit.adapters.aio_pika.broker_frames import (
    CHANNEL,
    HEARTBEAT,
    TAG,
    delivery,
    method,
    raw_properties,
    returned,
)

ELSEWHERE = 7
POISON = struct.pack(">H", 1 << 10) + b"\x03\xff\xfe\xfd"


def short(text: bytes) -> bytes:
    """An encoded short string."""
    return bytes((len(text),)) + text


def framed(kind: int, payload: bytes) -> bytes:
    """A frame of the channel with this payload."""
    return struct.pack(">BHI", kind, CHANNEL, len(payload)) + payload + b"\xce"


def raw_delivery(tag: int, route: bytes, properties: bytes, body: bytes) -> list[bytes]:
    """The frames of a delivery, byte by byte: pamqp would not write invalid properties."""
    deliver = struct.pack(">HH", 60, 60) + short(TAG.encode()) + struct.pack(">QB", tag, 1) + route
    header = struct.pack(">HHQ", 60, 0, len(body)) + properties
    bodies = [framed(3, body[at : at + 10]) for at in range(0, len(body), 10)]
    return [framed(1, deliver), framed(2, header), *bodies]


def cut(stream: bytes, cuts: list[int]) -> list[bytes]:
    """The stream in pieces."""
    at = sorted({0, *(each % (len(stream) + 1) for each in cuts), len(stream)})
    return [stream[start:stop] for start, stop in pairwise(at)]


def passed(parser: FrameParser, pieces: list[bytes]) -> bytes:
    """What is passed on to the library."""
    events = [event for piece in pieces for event in parser.feed(piece)]
    assert all(isinstance(event, PassThrough) for event in events), events
    return b"".join(
        frame for event in events if isinstance(event, PassThrough) for frame in event.frames
    )


routes = st.tuples(st.binary(max_size=20), st.binary(max_size=20)).map(
    lambda names: short(names[0]) + short(names[1])
)
deliveries = st.tuples(routes, st.binary(max_size=40), st.binary(max_size=35))
others = st.sampled_from(
    [
        HEARTBEAT,
        method(commands.Basic.QosOk()),
        method(commands.Basic.CancelOk(TAG)),
        method(commands.Channel.Flow(active=True), ELSEWHERE),
        b"".join(delivery(5, b"theirs", channel=ELSEWHERE, routing_key="k")),
    ]
)


@given(st.lists(deliveries | others, max_size=8), st.lists(st.integers(0, 10_000), max_size=20))
@example([(short(b"") + short(b"\xff"), POISON, b"body"), HEARTBEAT], [])
@example([(short(b"") + short(b""), b"", b"")], [30, 31, 32])
def test_only_routes_and_properties_are_kept(story: list[Any], cuts: list[int]) -> None:
    """By delivery tag, unchanged. Everything else is passed on byte for byte."""
    stream, expected = b"", b""
    kept = {}
    for tag, each in enumerate(story, 1):
        if isinstance(each, bytes):
            stream += each
            expected += each
        else:
            route, properties, body = each
            kept[tag] = (route, properties)
            stream += b"".join(raw_delivery(tag, route, properties, body))
            expected += b"".join(raw_delivery(tag, b"\0\0", b"\0\0", body))
    parser = FrameParser()
    guard = HeaderGuard()
    parser.guard(CHANNEL, guard)

    assert expected == passed(parser, cut(stream, cuts))
    assert len(kept) == len(guard)
    assert kept == {tag: guard.take(tag) for tag in kept}
    assert len(guard) == 0
    with pytest.raises(KeyError):
        guard.take(1)


@given(routes, st.binary(max_size=40))
def test_what_is_passed_on_can_be_decoded(route: bytes, properties: bytes) -> None:
    """The library reads tag, redelivered flag and body, whatever was published."""
    parser = FrameParser()
    parser.guard(CHANNEL, HeaderGuard())
    stream = passed(parser, [b"".join(raw_delivery(9, route, properties, b"body"))])

    used, _, deliver = unmarshal(stream)
    more, _, header = unmarshal(stream[used:])
    _, _, body = unmarshal(stream[used + more :])
    assert (9, True, "", "") == (
        deliver.delivery_tag,
        deliver.redelivered,
        deliver.exchange,
        deliver.routing_key,
    )
    assert (4, None, b"body") == (header.body_size, header.properties.message_id, body.value)


def test_a_guarded_channel_that_is_closed_is_no_longer_guarded() -> None:
    """Even in the middle of a message. The close is reported and passed on."""
    parser = FrameParser()
    guard = HeaderGuard()
    parser.guard(CHANNEL, guard)
    frames = raw_delivery(1, b"\0\0", POISON, b"body")
    close = method(commands.Channel.Close(406, "PRECONDITION_FAILED", 60, 80))

    events = parser.feed(frames[0] + close)

    assert ChannelClosed(406, "PRECONDITION_FAILED") in events
    assert close == b"".join(events[-1].frames)
    assert b"".join(frames) == passed(parser, [b"".join(frames)])
    assert len(guard) == 0


def test_returns_are_taken_out_and_confirms_are_passed_on() -> None:
    """The library would match returns by message id, and be wrong."""
    parser = FrameParser()
    parser.tap_returns(CHANNEL)
    properties = commands.Basic.Properties(message_id="same")
    ack = method(commands.Basic.Ack(1))

    events = parser.feed(b"".join(returned(b"body", "e", "k", properties)) + ack)

    raw = raw_properties(message_id="same")
    assert [
        ReturnedPublication(312, "NO_ROUTE", b"e", b"k", raw, b"body"),
        PassThrough([ack]),
    ] == events
