"""Every frame is reported once, whole and in order, however the bytes were cut into reads."""

from __future__ import annotations

import struct
import tracemalloc
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pamqp import commands
from pamqp.body import ContentBody
from pamqp.frame import unmarshal
from pamqp.header import ContentHeader

from aio_pika_batch.adapters.aio_pika.events import (
    ChannelClosed,
    ChannelCloseOk,
    Confirms,
    ConnectionClosed,
    ConsumerCancelled,
    Deliveries,
    Event,
    Malformed,
    PassThrough,
    ReturnedPublication,
)
from aio_pika_batch.adapters.aio_pika.frame_parser import LARGEST, FrameParser
from tests.unit.adapters.aio_pika.broker_frames import (
    CHANNEL,
    HEARTBEAT,
    TAG,
    Source,
    delivery,
    method,
    returned,
)

ELSEWHERE = 7


def flat(events: list[Event]) -> list[tuple[Any, ...]]:
    """The events, independent of how they were grouped."""
    reported: list[tuple[Any, ...]] = []
    for event in events:
        match event:
            case Deliveries(messages):
                reported.extend(
                    (
                        "message",
                        each.delivery_tag,
                        each.redelivered,
                        each.exchange,
                        each.routing_key,
                        each.raw_properties,
                        each.body,
                    )
                    for each in messages
                )
            case Confirms(confirms):
                reported.extend(("confirm", *each) for each in confirms)
            case PassThrough(frames):
                reported.extend(("passed", each) for each in frames)
            case _:
                reported.append((type(event).__name__, *event))
    return reported


def reference(stream: bytes) -> list[tuple[Any, ...]]:
    """What pamqp reads from the same bytes, frame by frame, with the channel tapped."""
    reported: list[tuple[Any, ...]] = []
    pending: Any = None
    header = b""
    size = 0
    body = b""
    while stream:
        used, channel, frame = unmarshal(stream)
        raw, stream = stream[:used], stream[used:]
        if channel != CHANNEL:
            reported.append(("passed", raw))
            continue
        if isinstance(frame, commands.Basic.Deliver) and frame.consumer_tag == TAG:
            pending, body = frame, b""
            continue
        if pending is not None and isinstance(frame, ContentHeader):
            header, size = raw[19:-1], frame.body_size
        elif pending is not None and isinstance(frame, ContentBody):
            body += frame.value
        else:
            reported.append(("passed", raw))
            continue
        if len(body) == size:
            route = (pending.exchange, pending.routing_key)
            tag, redelivered = pending.delivery_tag, pending.redelivered
            reported.append(("message", tag, redelivered, *route, header, body))
            pending = None
    return reported


def fed(parser: FrameParser, stream: bytes, cuts: list[int]) -> list[tuple[Any, ...]]:
    """Feed *stream* in the pieces between *cuts*."""
    reported: list[Event] = []
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    for start, end in pairwise(edges):
        if start < end:
            reported.extend(parser.feed(stream[start:end]))
    return flat(reported)


names = st.text(max_size=12)
properties = st.builds(
    commands.Basic.Properties,
    content_type=st.none() | names,
    headers=st.none() | st.dictionaries(names, st.integers(0, 9) | names, max_size=3),
    message_id=st.none() | names,
    priority=st.none() | st.integers(0, 9),
)
deliveries = st.builds(
    delivery,
    st.integers(1, 2**62),
    st.binary(max_size=60),
    redelivered=st.booleans(),
    exchange=st.sampled_from(["", "orders"]),
    routing_key=st.sampled_from(["", "q", "häfen.b.c"]),
    properties=properties,
    part=st.integers(1, 70),
)
between = st.sampled_from(
    [
        HEARTBEAT,
        method(commands.Connection.Blocked("low on memory"), 0),
        method(commands.Queue.DeclareOk("q", 1, 2), CHANNEL),
        b"".join(delivery(5, b"native", channel=ELSEWHERE)),
        b"".join(delivery(5, b"theirs", consumer_tag="another")),
    ]
)


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """Deliveries, with other frames before, after and between them."""
    frames: list[bytes] = []
    for _ in range(draw(st.integers(0, 6))):
        if draw(st.booleans()):
            frames.append(draw(between))
        for frame in draw(deliveries):
            frames.append(frame)
            if draw(st.integers(0, 9)) == 0:
                # Only another channel may speak between a message's frames.
                frames.append(draw(st.sampled_from([HEARTBEAT, method(commands.Basic.QosOk(), 9)])))
    if draw(st.booleans()):
        frames.append(draw(between))
    return b"".join(frames)


@given(streams(), st.lists(st.integers(0, 900), max_size=8))
@example(b"".join(delivery(1, b"")), [])
@example(b"".join(delivery(1) + delivery(2)), [1])
def test_fragmentation_does_not_change_the_events(stream: bytes, cuts: list[int]) -> None:
    """Compared with pamqp, frame by frame."""
    parser = FrameParser()
    parser.tap_consumer(CHANNEL, Source())

    assert reference(stream) == fed(parser, stream, cuts)


@given(streams())
def test_single_bytes_give_the_same_events(stream: bytes) -> None:
    """The worst fragmentation."""
    parser = FrameParser()
    parser.tap_consumer(CHANNEL, Source())

    assert reference(stream) == fed(parser, stream, list(range(len(stream))))


@given(streams(), st.lists(st.integers(0, 900), max_size=5))
def test_without_a_tap_everything_passes_through(stream: bytes, cuts: list[int]) -> None:
    """Nothing is taken out if no channel is tapped."""
    reported = fed(FrameParser(), stream, cuts)

    assert {"passed"} >= {kind for kind, *_ in reported}
    assert stream == b"".join(frame for _, frame in reported)


confirms = st.one_of(
    st.builds(commands.Basic.Ack, st.integers(1, 2**60), st.booleans()),
    st.builds(commands.Basic.Nack, st.integers(1, 2**60), st.booleans(), st.booleans()),
)


@given(st.lists(confirms), st.lists(st.integers(0, 300), max_size=5))
def test_confirms_are_reported_in_order(methods: list[Any], cuts: list[int]) -> None:
    """Other frames may come between them."""
    parser = FrameParser()
    parser.tap_publisher(CHANNEL)
    stream = HEARTBEAT.join(method(each) for each in methods)

    reported = fed(parser, stream, cuts)

    accepted = [isinstance(each, commands.Basic.Ack) for each in methods]
    expected = [
        ("confirm", each.delivery_tag, each.multiple, yes)
        for each, yes in zip(methods, accepted, strict=True)
    ]
    assert expected == [each for each in reported if each[0] == "confirm"]
    assert max(0, len(methods) - 1) == sum(each == ("passed", HEARTBEAT) for each in reported)


@given(st.binary(max_size=250), st.lists(st.integers(0, 300), max_size=5))
def test_a_returned_publication_is_reported_whole(body: bytes, cuts: list[int]) -> None:
    """It comes before its confirm."""
    parser = FrameParser()
    parser.tap_publisher(CHANNEL)
    frames = returned(body, "orders", "a.b", commands.Basic.Properties(message_id="m"))
    stream = b"".join([*frames, method(commands.Basic.Ack(1))])

    reported = fed(parser, stream, cuts)

    expected = ("ReturnedPublication", 312, "NO_ROUTE", b"orders", b"a.b", b"\x00\x80\x01m", body)
    assert [expected, ("confirm", 1, False, True)] == reported


def test_a_cancelled_consumer_is_reported_after_its_deliveries() -> None:
    """basic.cancel is passed to the library, too."""
    parser = FrameParser()
    parser.tap_consumer(CHANNEL, Source())
    cancel = method(commands.Basic.Cancel(TAG, True))

    reported = parser.feed(b"".join([*delivery(1), cancel]))

    assert [Deliveries, ConsumerCancelled, PassThrough] == [type(each) for each in reported]
    assert ConsumerCancelled(TAG) == reported[1]


@pytest.mark.parametrize("closing", [[], delivery(2)[:1], delivery(2)[:2]])
def test_a_channel_that_the_broker_closes_is_no_longer_tapped(closing: list[bytes]) -> None:
    """Its number will be used again. Half a message before the close is dropped."""
    parser = FrameParser()
    parser.tap_consumer(CHANNEL, Source())
    close = method(commands.Channel.Close(406, "PRECONDITION_FAILED", 60, 80))
    later = b"".join(delivery(1))

    reported = parser.feed(b"".join([*delivery(1), *closing, close, later]))

    assert ChannelClosed(406, "PRECONDITION_FAILED") == reported[1]
    assert b"".join([close, later]) == b"".join(reported[2].frames)
    assert not parser.is_tapping
    parser.tap_consumer(CHANNEL, Source())
    (second,) = parser.feed(later)
    assert [1] == [each.delivery_tag for each in second.messages]


def test_a_channel_is_no_longer_tapped_after_close_ok() -> None:
    """Its number will be used again."""
    parser = FrameParser()
    parser.tap_consumer(CHANNEL, Source())
    gone = method(commands.Channel.CloseOk())

    reported = parser.feed(gone + b"".join(delivery(1)))

    assert [ChannelCloseOk, PassThrough] == [type(each) for each in reported]


def test_the_reason_of_a_closed_connection_is_reported() -> None:
    """The frame is passed on, because the library must answer."""
    close = method(commands.Connection.Close(320, "CONNECTION_FORCED", 0, 0), 0)

    assert [ConnectionClosed(320, "CONNECTION_FORCED"), PassThrough([close])] == FrameParser().feed(
        close
    )


def test_the_header_of_another_protocol_version_is_passed_on() -> None:
    """It is not a frame. The library reports it."""
    parser = FrameParser()

    assert [] == parser.feed(b"AMQ")
    assert [PassThrough([b"AMQP\x01\x01\x00\x0a"])] == parser.feed(b"P\x01\x01\x00\x0a")


@pytest.mark.parametrize("tapped", [True, False])
@pytest.mark.parametrize("cuts", [[], [8], [3, 50, 90]])
def test_a_frame_larger_than_frame_max_is_refused(*, tapped: bool, cuts: list[int]) -> None:
    """It isn't collected. What came before it is reported."""
    parser = FrameParser()
    tune = method(commands.Connection.Tune(2047, 4096, 60), 0)
    assert [PassThrough([tune])] == parser.feed(tune)
    assert parser.frame_max == 4096
    if tapped:
        parser.tap_consumer(CHANNEL, Source())
    before = b"".join(delivery(1))

    reported = fed(parser, before + b"".join(delivery(2, bytes(5000), part=5000)), cuts)

    assert reported[-1] == ("Malformed", "a frame has 5000 bytes, but 4096 are allowed")
    assert parser.feed(HEARTBEAT) == []
    if tapped:
        assert reported[0][:2] == ("message", 1)


def test_a_broker_may_set_no_limit() -> None:
    """frame_max 0 means no limit."""
    parser = FrameParser()
    parser.feed(method(commands.Connection.Tune(0, 0, 0), 0))
    parser.tap_consumer(CHANNEL, Source())

    [(_, _, _, _, _, _, body)] = flat(
        parser.feed(b"".join(delivery(1, bytes(500_000), part=500_000)))
    )

    assert len(body) == 500_000


@pytest.mark.parametrize("proposed", [0, 0xFFFF_FFFF, LARGEST + 1])
def test_a_frame_has_a_limit_even_if_the_broker_sets_none(proposed: int) -> None:
    """Otherwise a frame that announces 4 GiB would be collected."""
    parser = FrameParser()
    parser.feed(method(commands.Connection.Tune(0, proposed, 0), 0))

    assert [] == parser.feed(struct.pack(">BHI", 3, CHANNEL, LARGEST) + bytes(100))
    parser = FrameParser()
    parser.feed(method(commands.Connection.Tune(0, proposed, 0), 0))
    [reported] = parser.feed(struct.pack(">BHI", 3, CHANNEL, LARGEST + 1) + bytes(100))
    assert Malformed(f"a frame has {LARGEST + 1} bytes, but {LARGEST} are allowed") == reported


@pytest.mark.parametrize("size", [LARGEST + 1, 2**64 - 1])
def test_a_body_larger_than_rabbitmq_allows_is_refused(size: int) -> None:
    """As soon as it is announced."""
    parser = FrameParser()
    parser.tap_consumer(CHANNEL, Source())
    header = struct.pack(">BHIHHQHB", 2, CHANNEL, 14, 60, 0, size, 0, 0xCE)

    [reported] = parser.feed(delivery(1)[0] + header)

    assert Malformed(f"a body of {size} bytes is announced, but {LARGEST} are allowed") == reported
    parser = FrameParser()
    parser.tap_consumer(CHANNEL, Source())
    allowed = struct.pack(">BHIHHQHB", 2, CHANNEL, 14, 60, 0, LARGEST, 0, 0xCE)
    assert [] == parser.feed(delivery(1)[0] + allowed)


@pytest.mark.untraced
def test_empty_body_frames_take_no_memory() -> None:
    """However many come."""
    parser = FrameParser()
    parser.tap_consumer(CHANNEL, Source())
    method_frame, header, body = delivery(1)
    empty = struct.pack(">BHIB", 3, CHANNEL, 0, 0xCE)
    assert [] == parser.feed(method_frame + header)
    tracemalloc.start()
    try:
        for _ in range(100):
            assert [] == parser.feed(empty * 1000)
        assert 20_000 > tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()

    [reported] = parser.feed(body)

    assert [b"body"] == [each.body for each in reported.messages]


_HEADER = delivery(1)[1]
MALFORMED = {
    "no frame": b"HTTP/1.1 400 Bad Request\r\n",
    "wrong end": HEARTBEAT[:-1] + b"\x00",
    "wrong end of a body": b"".join(delivery(1))[:-1] + b"\x00",
    "a method in a message": b"".join([delivery(1)[0], method(commands.Basic.QosOk())]),
    "two headers": b"".join([delivery(1)[0], _HEADER, _HEADER]),
    "a body before its header": b"".join([delivery(1)[0], delivery(1)[2]]),
    "too much body": b"".join([*delivery(1)[:2], delivery(1, b"too long")[2]]),
    "a header cut off": delivery(1)[0] + b"\x02\x00\x03\x00\x00\x00\x02\x00\x3c\xce",
    "a delivery cut off in its tag": method(commands.Basic.Deliver(TAG, 1, False, "", ""))[:3]
    + b"\x00\x00\x00\x11\x00\x3c\x00\x3c\x0aconsumer-1\x00\x00\xce",
    "no method": b"\x01\x00\x03\x00\x00\x00\x02\x00\x3c\xce",
    "a close cut off": b"\x01\x00\x03\x00\x00\x00\x04\x00\x14\x00\x28\xce",
    "a text cut off": b"\x01\x00\x03\x00\x00\x00\x07\x00\x14\x00\x28\x01\x94\x09\xce",
    "no text": b"\x01\x00\x03\x00\x00\x00\x06\x00\x3c\x00\x1e\x01\x94\xce",
}


@pytest.mark.parametrize("stream", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_bytes_are_reported_once_and_end_parsing(stream: bytes) -> None:
    """Nothing is guessed after them."""
    parser = FrameParser()
    parser.tap_consumer(CHANNEL, Source())

    reported = parser.feed(stream + bytes(8))

    assert isinstance(reported[-1], Malformed)
    assert parser.feed(HEARTBEAT) == []


@given(st.binary(max_size=400), st.lists(st.integers(0, 400), max_size=4), st.booleans())
def test_arbitrary_bytes_raise_nothing(noise: bytes, cuts: list[int], publishing: bool) -> None:
    """They are reported, or the parser waits for more."""
    parser = FrameParser()
    if publishing:
        parser.tap_publisher(CHANNEL)
    else:
        parser.tap_consumer(CHANNEL, Source())
    start = b"".join(delivery(1)[:2])

    fed(parser, start + noise, cuts)


@pytest.mark.parametrize("cuts", [[], [25], list(range(90))])
def test_a_delivery_is_not_read_beyond_its_frame(cuts: list[int]) -> None:
    """Otherwise its tag would depend on how the bytes were cut."""
    deliver, header, body = delivery(1)
    short = deliver[7:-6]
    stream = deliver[:3] + struct.pack(">I", len(short)) + short + b"\xce" + header + body
    parser = FrameParser()
    parser.tap_consumer(CHANNEL, Source())

    assert [("Malformed", "a delivery is cut off")] == fed(parser, stream, cuts)


@pytest.mark.parametrize("cuts", [[], [50], list(range(90))])
def test_a_content_header_without_flags_is_malformed(cuts: list[int]) -> None:
    """However the bytes were cut."""
    deliver, _, body = delivery(1)
    header = struct.pack(">BHIHHQB", 2, CHANNEL, 12, 60, 0, 4, 0xCE)
    parser = FrameParser()
    parser.tap_consumer(CHANNEL, Source())

    reported = fed(parser, deliver + header + body, cuts)

    assert [("Malformed", "a content header is cut off, or comes twice")] == reported


def test_incomplete_reads_are_joined_only_once() -> None:
    """The time for a large message in small reads is linear."""
    parser = FrameParser()
    parser.tap_consumer(CHANNEL, Source())
    stream = b"".join(delivery(1, bytes(100_000), part=131_000))
    reported = [parser.feed(stream[at : at + 100]) for at in range(0, len(stream), 100)]

    assert [1] == [len(each) for each in reported if each]


def test_returned_publications_have_their_own_event_type() -> None:
    """Listeners match on it."""
    parser = FrameParser()
    parser.tap_publisher(CHANNEL)

    [reported] = parser.feed(b"".join(returned(b"", "", "q", commands.Basic.Properties())))

    assert ReturnedPublication(312, "NO_ROUTE", b"", b"q", b"\x00\x00", b"") == reported
