"""What is checked of bytes that an AMQP 1.0 broker might send."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from aio_pika_batch.adapters.amqp10.codec import CodecError, read, write
from aio_pika_batch.adapters.amqp10.frames import (
    Frames10Parser,
    TransferredMessages,
    Violation,
    WireEvent,
)
from aio_pika_batch.adapters.amqp10.messages import (
    decode_headers,
    decode_properties,
    decode_route,
)
from aio_pika_batch.adapters.amqp10.transfers import Transfers
from tests.fuzz.mutate import mutated
from tests.fuzz.seeds import CORPUS
from tests.unit.adapters.amqp10.spoken import FRAME_MAX, SOURCE, Plain

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from random import Random

    from aio_pika_batch.core.message import Message

_HEAD = 8


def _frames_of(stream: bytes) -> list[bytes]:
    """The frames and protocol headers of a valid stream."""
    frames = []
    while stream:
        size = _HEAD if stream.startswith(b"AMQP") else int.from_bytes(stream[:4], "big")
        frames.append(stream[:size])
        stream = stream[size:]
    return frames


_STREAMS = [_frames_of(path.read_bytes()) for path in sorted(CORPUS.glob("amqp10-*.bin"))]


def _framed(frame: bytes, body: bytes) -> bytes:
    """The frame with another body, and its size corrected."""
    return (_HEAD + len(body)).to_bytes(4, "big") + frame[4:_HEAD] + body


def _stream(random: Random) -> bytes:
    """A part of a connection with a few errors."""
    frames = random.choice(_STREAMS)
    start = random.randrange(len(frames))
    chosen = list(frames[start : start + random.randrange(1, 24)])
    for _ in range(random.choice((0, 1, 1, 2, 4))):
        at = random.randrange(len(chosen))
        way = random.randrange(8)
        if way < 5:
            chosen[at] = _framed(chosen[at], mutated(random, chosen[at][_HEAD:]))
        elif way == 5:
            chosen.insert(at, random.choice(frames))
        elif way == 6 and len(chosen) > 1:
            del chosen[at]
        else:
            chosen[at] = mutated(random, chosen[at])
    return b"".join(chosen)


def _parser(kind: type[Transfers]) -> Frames10Parser:
    parser = Frames10Parser(FRAME_MAX)
    parser.receive(kind(SOURCE, 0, 0))
    return parser


def _flat(events: Sequence[WireEvent]) -> list[Any]:
    """The events, independent of how they were grouped."""
    flat: list[Any] = []
    for event in events:
        if isinstance(event, TransferredMessages):
            flat.extend(_words(message) for message in event.messages)
        else:
            flat.append((type(event).__name__, *event))
    return flat


def _words(message: Message) -> tuple[Any, ...]:
    undecodable = message.properties.undecodable
    assert all(len(why) < 1000 for why in undecodable.values()), "a long text"
    route = (message.exchange, message.routing_key)
    return (message.delivery_tag, message.redelivered, message.body, route, repr(undecodable))


def frames(random: Random) -> None:
    """Bytes of a connection: all cuts, and both ways to read transfers, give the same events."""
    stream = random.randbytes(200) if random.randrange(20) == 0 else _stream(random)
    whole = _flat(_parser(Transfers).feed(stream))
    assert whole == _flat(_parser(Plain).feed(stream)), "the fast way reads something else"
    assert all(len(each[1]) < 1000 for each in whole if each[0] == Violation.__name__)
    parser = _parser(Transfers)
    pieces: list[WireEvent] = []
    at = 0
    size = random.choice((1, 7, 40, 300, 3000))
    while at < len(stream):
        step = random.randrange(1, size + 1)
        pieces.extend(parser.feed(stream[at : at + step]))
        at += step
        assert (parser._held_bytes if parser._held else 0) <= len(stream)
    assert whole == _flat(pieces), "other cuts, other events"


def sections(random: Random) -> None:
    """The sections before a body: every property is decoded, or undecodable."""
    head = mutated(random, random.choice(_heads()))
    properties = decode_properties(head)
    decode_route(head)
    try:
        headers = decode_headers(head)
    except ValueError:
        assert "headers" in properties.undecodable, "headers alone cannot be read"
    else:
        if "headers" not in properties.undecodable:
            assert repr(headers) == repr(properties.headers), "headers alone are other headers"


@lru_cache(maxsize=1)
def _heads() -> list[bytes]:
    """The sections of captured messages."""
    return [
        event_message._properties
        for frames in _STREAMS
        for event in _parser(Transfers).feed(b"".join(frames))
        if isinstance(event, TransferredMessages)
        for event_message in event.messages
        if isinstance(event_message._properties, bytes)
    ]


def values(random: Random) -> None:
    """A value: read and written again, or a CodecError."""
    data = random.choice(random.choice(_STREAMS))[_HEAD:]
    data = mutated(random, data) if random.randrange(9) else random.randbytes(40)
    try:
        value, end = read(data, 0, len(data))
    except CodecError:
        return
    assert end <= len(data)
    try:
        again = write(value)
    except CodecError:
        return  # an array, which is only read
    assert repr(value) == repr(read(again, 0, len(again))[0])


TARGETS: Mapping[str, Callable[[Random], None]] = {
    "amqp10": frames,
    "amqp10 sections": sections,
    "amqp10 values": values,
}
