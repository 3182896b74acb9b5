"""Bytes become the same events, however they are cut and whichever way they are taken."""

from __future__ import annotations

import struct
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aio_pika_batch.adapters.amqp10 import spec
from aio_pika_batch.adapters.amqp10.codec import (
    Array,
    Described,
    Symbol,
    UByte,
    UInt,
    ULong,
    UShort,
    write,
)
from aio_pika_batch.adapters.amqp10.frames import (
    HEARTBEAT,
    Frames10Parser,
    ProtocolHeader,
    ReceivedRecord,
    TransferredMessages,
    Violation,
    WireEvent,
    pack,
)
from aio_pika_batch.adapters.amqp10.performatives import (
    Begin,
    Close,
    Flow,
    Mechanisms,
    Open,
    PeerError,
    SaslOutcome,
    Transfer,
    encode,
)
from aio_pika_batch.adapters.amqp10.transfers import Transfers
from tests.unit.adapters.amqp10.spoken import (
    FRAME_MAX,
    Plain,
    Sent,
    frame,
    parser,
    section,
    transfers,
)
from tests.unit.adapters.amqp10.values import names, text, values

FLOW = Flow(UInt(0), UInt(400), UInt(0), UInt(400))


def flat(events: list[WireEvent]) -> list[tuple[Any, ...]]:
    """Return each event as a tuple, however the reads were divided."""
    told: list[tuple[Any, ...]] = []
    for event in events:
        if isinstance(event, TransferredMessages):
            assert event.messages
            told.extend(
                ("message", m.delivery_tag, m.redelivered, m.body, m._route, m._properties)
                for m in event.messages
            )
        else:
            told.append((type(event).__name__, *event))
    return told


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    """The stream in pieces."""
    ends = sorted({place % (len(stream) + 1) for place in places} | {len(stream)})
    return [stream[a:b] for a, b in zip([0, *ends], ends, strict=False)]


def fed(pieces: list[bytes], kind: type[Transfers] = Transfers) -> list[tuple[Any, ...]]:
    """Return all events of these reads."""
    one = parser(kind)
    return flat([event for piece in pieces for event in one.feed(piece)])


small = st.binary(max_size=300)
sent = st.builds(
    Sent,
    body=small,
    redelivered=st.booleans(),
    route=st.tuples(st.sampled_from(["", "e", "ü" * 130]), st.sampled_from(["q", "k.1"])),
    annotations=st.just({}) | st.dictionaries(names, values, max_size=2),
    properties=st.none() | st.lists(st.none() | text | names, max_size=13),
    application_properties=st.none() | st.dictionaries(text, values, max_size=3),
    delivery_count=st.integers(0, 300),
)
payloads = (
    sent.map(lambda each: each.payload)
    | small
    | st.builds(lambda body: section(spec.DATA, body), small)
    | st.builds(lambda each, more: each.payload + section(spec.DATA, more), sent, small)
    | st.builds(lambda each: each.payload + section(spec.FOOTER, {}), sent)
    | st.builds(lambda each, value: each.head + section(spec.AMQP_VALUE, value), sent, values)
)
between = st.sampled_from([b"", b"", b"", HEARTBEAT, pack(FLOW), pack(FLOW, 7)])


@st.composite
def streams(draw: st.DrawFn, messages: st.SearchStrategy[bytes] = payloads) -> bytes:
    """A connection's bytes: messages, in one frame or several, and other frames in between."""
    first = draw(st.sampled_from([0, 1, 250, 254, 255, 70_000, 2**32 - 3]))
    nulls = draw(st.sampled_from([0, 6]))
    parts = []
    for number, payload in enumerate(draw(st.lists(messages, min_size=1, max_size=12))):
        size = draw(st.sampled_from([None, None, None, 100, 17]))
        delivery_id = (first + number) % 2**32
        parts.append(draw(between))
        parts.append(
            transfers(
                payload, delivery_id, size=size, trailing_nulls=0 if size else nulls, channel=0
            )
        )
    return b"".join(parts)


@given(streams(), st.lists(st.integers(min_value=0)))
def test_cuts_do_not_matter(stream, places):
    """And a message is the same whether it was taken at a stroke or not."""
    told = fed([stream])

    assert told == fed(cut(stream, places))
    assert told == fed([stream], Plain)
    assert told == fed(cut(stream, places), Plain)
    assert "Violation" not in {each[0] for each in told}


@given(streams(sent.map(lambda each: each.payload)))
def test_each_byte_may_come_alone(stream):
    """It takes longer, and nothing else."""
    assert fed([stream]) == fed([stream[at : at + 1] for at in range(len(stream))])


@given(streams(), st.data())
def test_a_broken_stream_is_found_out_or_read_as_something_else(stream, data):
    """One byte is wrong: no exception, and the same events however the stream is divided."""
    raw = bytearray(stream)
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    places = data.draw(st.lists(st.integers(min_value=0), max_size=5))

    whole, pieces = (
        fed([bytes(raw), bytes(FRAME_MAX)]),
        fed([*cut(bytes(raw), places), bytes(FRAME_MAX)]),
    )

    # What follows isn't AMQP: that is noticed at the latest after a whole frame of it.
    assert "Violation" == whole[-1][0] == pieces[-1][0]
    assert whole[:-1] == pieces[:-1]


@given(st.lists(sent, min_size=1, max_size=20), st.sampled_from([0, 6]), st.integers(0, 300))
def test_messages_are_what_was_sent(messages, nulls, first):
    """Body, head and whether it is delivered again; tags count from 1 on."""
    stream = b"".join(
        transfers(each.payload, first + number, trailing_nulls=nulls)
        for number, each in enumerate(messages)
    )

    expected = [
        ("message", number, each.redelivered, each.body, each.head, each.head)
        for number, each in enumerate(messages, 1)
    ]
    assert expected == fed([stream])


def test_ordinary_messages_are_taken_at_a_stroke():
    """All but the first, the second and the one from which on ids are longer; on 4.0 and 4.3."""
    for nulls in (0, 6):
        added = []

        class Counting(Transfers):
            __slots__ = ()

            def add(self, transfer, frame, payload_at):
                added.append(transfer.delivery_id)  # noqa: B023
                super().add(transfer, frame, payload_at)

        stream = b"".join(
            transfers(Sent(b"%d" % number).payload, number, trailing_nulls=nulls)
            for number in range(600)
        )
        assert 600 == len(fed([stream], Counting))
        assert [0, 1, 256] == added


def test_a_message_of_many_frames_is_one_message():
    """20 MB of it, in the frames that a broker makes of it, read as a socket reads."""
    body = bytes(range(256)) * 80_000
    stream = transfers(Sent(body).payload, 0, size=FRAME_MAX - 100)
    reads = [stream[at : at + 2**18] for at in range(0, len(stream), 2**18)]

    [message] = fed(reads)

    assert body == message[3]
    assert Sent(body).head == message[4]


def test_parts_without_payload_make_no_messages():
    """The last one may have none, either."""
    record = Transfer(UInt(0), UInt(0), b"0", UInt(0), settled=False, more=True)
    payload = Sent().payload
    stream = b"".join(
        (
            pack(record),
            transfers(payload, 0, more=True),
            pack(Transfer(UInt(0), more=False)),
        )
    )

    assert [("message", 1, False)] == [each[:3] for each in fed([stream])]


def hostile(record: Transfer, *more: Transfer) -> list[tuple[Any, ...]]:
    """Return the events of transfers that break the rules."""
    stream = b"".join(frame_of(each) for each in (record, *more))
    return fed([stream])


def frame_of(record: Transfer) -> bytes:
    """A message behind any performative."""
    return frame(encode(record) + Sent().payload)


ORDINARY = Transfer(UInt(0), UInt(5), b"0", UInt(0), settled=False, more=False)


@pytest.mark.parametrize(
    ("transfer", "why"),
    [
        (Transfer(UInt(0), UInt(5)), "delivery 5 came in place of 6"),
        (Transfer(UInt(0), UInt(7)), "delivery 7 came in place of 6"),
        (Transfer(UInt(0)), "without a delivery id"),
        (Transfer(UInt(0), UInt(6), settled=True), "aborted or settled"),
        (Transfer(UInt(0), UInt(6), aborted=True), "aborted or settled"),
    ],
)
def test_a_transfer_that_breaks_the_rules_ends_it(transfer, why):
    """Transfers before it are handed out."""
    told = hostile(ORDINARY, transfer, ORDINARY)

    assert ["message", "Violation"] == [each[0] for each in told]
    assert why in told[1][1]


def test_a_part_of_another_message_ends_it():
    """Parts of two messages do not mix on one link."""
    more = Transfer(UInt(0), UInt(5), more=True)
    told = hostile(more, Transfer(UInt(0), UInt(6)))
    assert [("Violation", "delivery 6 came in place of 5")] == told


def test_a_message_has_a_largest_size(monkeypatch):
    """So that a peer that never comes to an end is found out."""
    monkeypatch.setattr("aio_pika_batch.adapters.amqp10.transfers.LARGEST", 1000)
    stream = transfers(Sent(bytes(2000)).payload, 0, size=300)

    assert [("Violation", "a message has more than 1000 bytes")] == fed([stream])


def test_transfers_of_other_links_are_handed_out_unchanged():
    """Those links aren't attached; the connection decides what to do."""
    other = Transfer(UInt(1), UInt(0))
    assert [("ReceivedRecord", 0, other, b"")] == fed([pack(other)])
    assert [("ReceivedRecord", 3, ORDINARY, b"")] == fed([pack(ORDINARY, 3)])
    assert [("ReceivedRecord", 0, ORDINARY, b"")] == flat(
        Frames10Parser(FRAME_MAX).feed(pack(ORDINARY))
    )


# --- other frames ---------------------------------------------------------------


def test_the_events_of_a_handshake_keep_their_order():
    """Two protocol headers, the frames of SASL, and the first of AMQP."""
    records = [
        (Mechanisms(Symbol("PLAIN")), spec.SASL_FRAME),
        (SaslOutcome(UByte(0)), spec.SASL_FRAME),
    ]
    stream = spec.SASL_HEADER + b"".join(pack(record, 0, kind) for record, kind in records)
    stream += spec.AMQP_HEADER + pack(Open("c")) + pack(Begin(UShort(0), UInt(0), UInt(1), UInt(1)))
    expected = [
        ProtocolHeader(spec.SASL_HEADER),
        ReceivedRecord(0, records[0][0]),
        ReceivedRecord(0, records[1][0]),
        ProtocolHeader(spec.AMQP_HEADER),
        ReceivedRecord(0, Open("c")),
        ReceivedRecord(0, Begin(UShort(0), UInt(0), UInt(1), UInt(1))),
    ]

    assert expected == Frames10Parser(512).feed(stream)
    piecemeal = Frames10Parser(512)
    assert expected == [
        event for at in range(len(stream)) for event in piecemeal.feed(stream[at : at + 1])
    ]


def test_a_sign_of_life_says_nothing_else():
    """It is a frame without a body."""
    assert bytes.fromhex("0000000802000000") == HEARTBEAT
    assert [] == Frames10Parser(512).feed(HEARTBEAT * 3)


def test_an_extended_header_is_stepped_over():
    """The specification reserves it."""
    plain = pack(Close())
    body = plain[8:]
    extended = struct.pack(">IBBH", 12 + len(body), 3, 0, 0) + b"more" + body
    assert [ReceivedRecord(0, Close())] == Frames10Parser(512).feed(extended)
    assert [] == Frames10Parser(512).feed(struct.pack(">IBBH", 12, 3, 0, 0) + b"more")


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (struct.pack(">IBBH", 7, 2, 0, 0), "a frame of 7 bytes"),
        (struct.pack(">IBBH", 513, 2, 0, 0), "up to 512 bytes were agreed on"),
        (struct.pack(">IBBH", 8, 1, 0, 0), "with a body from byte 4 on"),
        (struct.pack(">IBBH", 8, 3, 0, 0), "with a body from byte 12 on"),
        (struct.pack(">IBBH", 9, 2, 2, 0) + b"\x40", "unknown type 2"),
        (b"HTTP/1.1 400 Bad Request\r\n", "is not possible"),
        (frame(b"\x40"), "must begin with a described list"),
        (frame(write(Described(ULong(0x10), {}))), "unknown performative|described list"),
        (frame(write(Described(ULong(0x19), []))), "unknown performative"),
        (frame(write(Described(Symbol("amqp:open:list"), ["c"]))), "unknown performative"),
        (frame(write(Described(ULong(0x10), []))), "container_id of open is missing"),
        (frame(write(Described(ULong(0x10), [5]))), "container_id of open is a int, not a str"),
        (frame(write(Described(ULong(0x18), [1, 2]))), "close has 2 fields, not 1"),
        (
            frame(write(Described(ULong(0x18), [Described(ULong(0x1D), [])]))),
            "condition of peererror is missing",
        ),
        (frame(write(Described(ULong(0x18), [Described(ULong(0x1C), [])]))), "unknown"),
        (frame(b"\x00\x53\x18\xc0\xff\x00"), "cut off"),
    ],
)
def test_an_invalid_frame_ends_the_stream(raw, why):
    """With what is wrong, and what came before it."""
    told = Frames10Parser(512)
    events = told.feed(HEARTBEAT + pack(FLOW) + raw + pack(FLOW))

    assert [ReceivedRecord(0, FLOW)] == events[:-1]
    assert isinstance(events[-1], Violation)
    assert any(each in events[-1].reason for each in why.split("|"))
    assert [] == told.feed(pack(FLOW)), "nothing is read after that"


def test_nothing_is_set_aside_for_an_announced_frame():
    """One that never comes to its end is held as far as it came."""
    one = Frames10Parser(FRAME_MAX)
    tracemalloc.start()
    try:
        one.feed(struct.pack(">IBBH", FRAME_MAX, 2, 0, 0))
        for _ in range(100):
            one.feed(b"x")
        assert tracemalloc.get_traced_memory()[1] < 50_000
    finally:
        tracemalloc.stop()


def test_records_keep_all_they_have():
    """An error within a close, symbols as an array or alone, maps."""
    error = PeerError(Symbol("amqp:not-found"), "no queue 'q'", {Symbol("a"): 1})
    assert [ReceivedRecord(0, Close(error))] == Frames10Parser(512).feed(pack(Close(error)))
    assert "amqp:not-found: no queue 'q'" == str(error)
    assert "amqp:not-found" == str(PeerError(Symbol("amqp:not-found")))
    array = b"\xe0\x0a\x02\xa3\x01a\x05PLAIN"
    raw = frame(b"\x00\x53\x40\xc0" + bytes((len(array) + 1, 1)) + array, kind=1)
    expected = Mechanisms(Array([Symbol("a"), Symbol("PLAIN")]))
    assert [ReceivedRecord(0, expected)] == Frames10Parser(512).feed(raw)
