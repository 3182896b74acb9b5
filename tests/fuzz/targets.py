"""What is checked of each input.

A target makes one input from a random number generator, and raises if the code breaks a promise: an
undeclared exception, more memory than the input, events that depend on the cuts, or a result that
differs from pamqp's if both can read the input.
"""

from __future__ import annotations

import math
from datetime import datetime
from decimal import Decimal
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pamqp import commands
from pamqp.body import ContentBody
from pamqp.frame import unmarshal
from pamqp.header import ContentHeader

from aio_pika_batch.adapters.aio_pika.amqp_spec import PROPERTIES
from aio_pika_batch.adapters.aio_pika.events import (
    Confirms,
    Deliveries,
    Malformed,
    PassThrough,
)
from aio_pika_batch.adapters.aio_pika.frame_parser import FrameParser
from aio_pika_batch.adapters.aio_pika.header_guard import HeaderGuard
from aio_pika_batch.adapters.aio_pika.properties import (
    decode,
    decode_headers,
    decode_route,
    splice,
)
from aio_pika_batch.core.message import Message
from aio_pika_batch.core.publication import UNDECODABLE_HEADERS, Copy
from aio_pika_batch.errors import PublishError
from tests.fuzz import amqp10
from tests.fuzz.mutate import frames_of, mutated, mutated_stream
from tests.fuzz.seeds import PROPERTY_LISTS, STREAMS, Seed
from tests.unit.adapters.aio_pika.broker_frames import Source

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from random import Random

    from aio_pika_batch.adapters.aio_pika.events import Event
    from aio_pika_batch.core.message import Headers

_HELD_AT_MOST = 3 * 131_072 + 262_144
"""Bytes of an unfinished message in frames of the usual size, and of one read."""

_CHANNEL_METHODS = (
    commands.Basic.Cancel,
    commands.Basic.Return,
    commands.Channel.Close,
    commands.Channel.CloseOk,
)


# --- the parser -----------------------------------------------------------------


def _tapped(seed: Seed, mode: int) -> FrameParser:
    parser = FrameParser()
    match mode:
        case 0 | 1 | 2:
            parser.tap_consumer(seed.channel, Source(consumer_tag=seed.consumer_tag))
        case 3:
            parser.tap_publisher(seed.channel)
        case 4:
            parser.tap_returns(seed.channel)
        case 5:
            parser.guard(seed.channel, HeaderGuard())
        case _:
            parser.watch(seed.channel)
    return parser


def _flat(events: Sequence[Event]) -> list[tuple[Any, ...]]:
    """The events, independent of how they were grouped."""
    reported: list[tuple[Any, ...]] = []
    for event in events:
        match event:
            case Deliveries(messages):
                reported.extend(_words(each) for each in messages)
            case Confirms(confirms):
                reported.extend(("confirm", *each) for each in confirms)
            case PassThrough(frames):
                reported.extend(("passed", each) for each in frames)
            case _:
                reported.append((type(event).__name__, *event))
    return reported


def _words(message: Message) -> tuple[Any, ...]:
    # Routes that no UTF-8 are must not raise either.
    route = (message.exchange, message.routing_key)
    state = (message.delivery_tag, message.redelivered)
    return ("message", *state, *route, message.raw_properties, message.body)


def split(random: Random) -> None:
    """Bytes of a connection: all cuts give the same events, and nothing is raised."""
    seed = random.choice(STREAMS)
    mode = random.randrange(7)
    if random.randrange(20) == 0:
        stream = random.randbytes(random.randrange(400))
    else:
        stream = mutated_stream(random, seed.frames)

    at_once = _tapped(seed, mode)
    whole = _flat(at_once.feed(stream))
    parser = _tapped(seed, mode)
    reported: list[Event] = []
    at = 0
    size = random.choice((1, 7, 40, 300, 3000))
    if len(stream) > 5_000:
        size = max(size, 300)
    while at < len(stream):
        step = random.randrange(1, size + 1)
        reported.extend(parser.feed(stream[at : at + step]))
        at += step
        held = parser._held_bytes if parser._held else 0
        assert held <= _HELD_AT_MOST, f"{held} bytes are held back"
    piecemeal = _flat(reported)
    if _is_broken(whole) != _is_broken(piecemeal):
        # What is wrong is found at once, or when all that was announced is there.
        whole, piecemeal = _finished(at_once, whole), _finished(parser, piecemeal)
    assert whole == piecemeal, "other cuts, other news"

    if mode < 3:
        expected = _as_pamqp_reads_it(stream, seed)
        if expected is not None and not _is_broken(whole):
            ours = [each for each in whole if each[0] == "message"]
            # Of the byte with `redelivered` pamqp reads one bit; brokers send 0 or 1.
            # And it takes delivery tags for signed.
            same = [(each[1] % 2**64, *each[3:]) for each in expected] == [
                (each[1], *each[3:]) for each in ours
            ]
            assert same, "pamqp reads other messages"


def _finished(parser: FrameParser, reported: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """The events once enough bytes have come that nothing is incomplete, without the reason."""
    reported = [*reported, *_flat(parser.feed(bytes(_HELD_AT_MOST)))]
    assert _is_broken(reported), "what was wrong is not any more"
    return reported[:-1]


def _is_broken(reported: Sequence[tuple[Any, ...]]) -> bool:
    return bool(reported) and reported[-1][0] == Malformed.__name__


def _as_pamqp_reads_it(stream: bytes, seed: Seed) -> list[tuple[Any, ...]] | None:
    """The messages in a stream; None if pamqp cannot read it, or if it has other methods."""
    messages: list[tuple[Any, ...]] = []
    pending: Any = None
    header, body, size = b"", b"", 0
    frames = _frames_of_the_channel(stream, seed)
    if frames is None:
        return None
    for raw, frame in frames:
        match frame:
            case commands.Basic.Deliver():
                pending, body = frame, b""
                continue
            case ContentHeader():
                header, size = raw[19:-1], frame.body_size
            case ContentBody():
                body += frame.value
        if pending is not None and len(body) == size:
            route = (pending.exchange, pending.routing_key)
            state = (pending.delivery_tag, pending.redelivered)
            messages.append(("message", *state, *route, header, body))
            pending = None
    return messages


def _frames_of_the_channel(stream: bytes, seed: Seed) -> list[tuple[bytes, Any]] | None:
    """The channel's frames, as bytes and as pamqp reads them; None as above."""
    frames = []
    try:
        for raw in frames_of(stream):
            _, channel, frame = unmarshal(raw)
            if isinstance(frame, commands.Connection.Tune):
                return None
            if channel == seed.channel:
                frames.append((raw, frame))
    except Exception:  # noqa: BLE001  -- what it raises is not ours to judge
        return None
    for _, frame in frames:
        if isinstance(frame, _CHANNEL_METHODS):
            return None
        if isinstance(frame, commands.Basic.Deliver) and frame.consumer_tag != seed.consumer_tag:
            return None
    return frames


# --- properties -------------------------------------------------------------------


def read(random: Random) -> None:
    """A property list: decoded as pamqp decodes it, or undecodable. Nothing is raised."""
    raw = _property_list(random)
    ours = decode(raw)
    try:
        headers = decode_headers(raw)
    except ValueError:
        assert "headers" in ours.undecodable, "headers alone cannot be read, and with others can"
    else:
        if "headers" not in ours.undecodable:
            assert _same(ours.headers, headers), "headers alone are other headers"
    _bounded(ours.undecodable)

    theirs = ContentHeader()
    try:
        theirs.unmarshal(bytes(12) + raw)
    except Exception:  # noqa: BLE001  -- what it raises is not ours to judge
        return
    if ours.undecodable or raw[1] & 0b11:
        return
    for _, name, _ in PROPERTIES:
        known = "message_type" if name == "type" else name
        mine, other = getattr(ours, name), getattr(theirs.properties, known)
        if name == "cluster_id" and mine is None:
            continue  # pamqp has no None for it
        assert _same(mine, other), f"{name} is {mine!r}, and pamqp reads {other!r}"


def _property_list(random: Random) -> bytes:
    if random.randrange(20) == 0:
        return random.randbytes(random.randrange(80))
    return mutated(random, random.choice(PROPERTY_LISTS))


def _bounded(undecodable: Mapping[str, str]) -> None:
    for name, why in undecodable.items():
        assert len(why) <= 32_000, f"{len(why)} characters say why {name} cannot be read"


def _same(ours: Any, theirs: Any) -> bool:  # noqa: PLR0911  -- one for each type
    match ours, theirs:
        case dict(), dict():
            return ours.keys() == theirs.keys() and all(
                _same(ours[key], theirs[key]) for key in ours
            )
        case list(), list():
            return len(ours) == len(theirs) and all(map(_same, ours, theirs))
        case float(), float():
            return ours == theirs or (math.isnan(ours) and math.isnan(theirs))
        case _, datetime():
            # pamqp takes large ones for milliseconds.
            seconds = ours.timestamp() if isinstance(ours, datetime) else ours
            return bool(seconds == theirs.timestamp() or seconds > 0xFFFF_FFFF)
        case Decimal(), _:
            return bool(ours == theirs)
        case (bytes(), str() | bytearray() | bytes()):
            return bytes(ours) == (theirs.encode() if isinstance(theirs, str) else bytes(theirs))
        case _:
            return bool(ours == theirs)


# --- copies -----------------------------------------------------------------------


_ADDED: Headers = {"x-retry-count": 3, "x-original-routing-key": "k", "x-first-failed-at": None}


@lru_cache(maxsize=1)
def _drop() -> frozenset[str]:
    return frozenset(("CC", "BCC", "x-death"))


def copy(random: Random) -> None:
    """A copy of a message with these properties: pamqp can read it."""
    raw = _property_list(random)
    message = Message(Source(), 1, False, b"", ("e", "k"), raw)
    if random.randrange(2):
        _ = message.has_readable_headers
    was = decode(raw)
    made = Copy(
        message,
        "",
        "q",
        _ADDED,
        _drop(),
        keep_expiration=bool(random.randrange(2)),
        expiration=random.choice((None, "1000")),
    )
    try:
        spliced = splice(raw, made, b"guest")
    except PublishError as error:
        msg = "no header that was added is wrong"
        raise AssertionError(msg) from error
    now = decode(spliced)
    if "not UTF-8" in now.undecodable.get("headers", ""):
        return  # a key that every broker can read, and keeps as it is
    assert "headers" not in now.undecodable, "the copy's headers cannot be read"
    headers = now.headers or {}
    assert all(headers[key] == value for key, value in _ADDED.items()), "a header was not added"
    if not was.undecodable:
        kept = {
            key: value
            for key, value in (was.headers or {}).items()
            if key not in _drop() and key not in _ADDED
        }
        assert not now.undecodable
        assert _same(kept, {key: headers[key] for key in headers if key not in _ADDED})
    elif "headers" in was.undecodable:
        is_key = "not UTF-8" in was.undecodable["headers"]  # its header may have been dropped
        assert is_key or UNDECODABLE_HEADERS in headers, "what cannot be read is gone"


def route(random: Random) -> None:
    """Exchange and routing key: any bytes are a route."""
    size = random.randrange(300)
    decode_route(random.randbytes(size))


TARGETS: Mapping[str, Callable[[Random], None]] = {
    "split": split,
    "read": read,
    "copy": copy,
    "route": route,
    **amqp10.TARGETS,
}
