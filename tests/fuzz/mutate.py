"""Turns a valid input into an unexpected one.

Everything depends on one number, so that an input can be made again.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from random import Random

_HEAD = struct.Struct(">BHI")
_END = b"\xce"
_EDGES = (0, 1, 2, 3, 8, 0x7F, 0x80, 0xCE, 0xFF, 0x7FFF, 0xFFFF, 0x1_FFFF, 0x7FFF_FFFF, 0xFFFF_FFFF)
_LETTERS = b"tbBsuIilLfdTDVSxAF\x00?"
_LONGEST = 60_000


def _flip(random: Random, data: bytearray) -> None:
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)


def _set(random: Random, data: bytearray) -> None:
    data[random.randrange(len(data))] = random.randrange(256)


def _letter(random: Random, data: bytearray) -> None:
    data[random.randrange(len(data))] = random.choice(_LETTERS)


def _edge(random: Random, data: bytearray) -> None:
    width = random.choice((1, 2, 4, 8))
    at = random.randrange(len(data))
    value = random.choice(_EDGES) % (1 << 8 * width)
    data[at : at + width] = value.to_bytes(width, "big")


def _drop(random: Random, data: bytearray) -> None:
    at = random.randrange(len(data))
    del data[at : at + random.randrange(1, 16)]


def _double(random: Random, data: bytearray) -> None:
    start = random.randrange(len(data))
    piece = data[start : start + random.randrange(1, 64)]
    data[start:start] = piece * random.randrange(1, 8)


def _insert(random: Random, data: bytearray) -> None:
    at = random.randrange(len(data) + 1)
    data[at:at] = random.randbytes(random.randrange(1, 16))


def _truncate(random: Random, data: bytearray) -> None:
    del data[random.randrange(len(data)) :]


def _nest(random: Random, data: bytearray) -> None:
    """Wrap a value in many tables or arrays."""
    at = random.randrange(len(data))
    inner = bytes(data[at : at + random.randrange(16)])
    for _ in range(random.choice((2, 60, 63, 64, 65, 70, 400, 2_000))):
        if random.random() < 0.5:
            inner = b"A" + struct.pack(">I", len(inner)) + inner
        else:
            inner = b"F" + struct.pack(">I", len(inner) + 1) + b"\x00" + inner
    data[at:at] = b"\x01n" + inner


_WAYS: Sequence[Callable[[Random, bytearray], None]] = (
    *(_flip, _set, _letter, _edge, _edge, _drop, _double, _insert, _truncate),
    *(_flip, _set, _letter, _edge, _letter),
)


def mutated(random: Random, data: bytes) -> bytes:
    """The same bytes, with a few changes."""
    changed = bytearray(data)
    if random.randrange(50) == 0 and changed:
        _nest(random, changed)
    for _ in range(random.choice((1, 1, 1, 2, 3, 8))):
        if not changed:
            return random.randbytes(random.randrange(12))
        random.choice(_WAYS)(random, changed)
    return bytes(changed[:_LONGEST])


def frames_of(stream: bytes) -> list[bytes]:
    """The frames of a valid stream."""
    frames = []
    while stream:
        end = _HEAD.size + _HEAD.unpack_from(stream)[2] + len(_END)
        frames.append(stream[:end])
        stream = stream[end:]
    return frames


def framed(frame: bytes, payload: bytes) -> bytes:
    """The frame with another payload, and its size corrected."""
    kind, channel, _ = _HEAD.unpack_from(frame)
    return _HEAD.pack(kind, channel, len(payload)) + payload + _END


def mutated_stream(random: Random, frames: Sequence[bytes]) -> bytes:
    """A stream with few errors, so that what follows them is still parsed."""
    start = random.randrange(len(frames))
    chosen = list(frames[start : start + random.randrange(1, 24)])
    for _ in range(random.choice((0, 1, 1, 2, 4))):
        at = random.randrange(len(chosen))
        way = random.randrange(8)
        if way < 5 and len(chosen[at]) > _HEAD.size:
            chosen[at] = framed(chosen[at], mutated(random, chosen[at][_HEAD.size : -1]))
        elif way == 5:
            chosen.insert(random.randrange(len(chosen)), random.choice(frames))
        elif way == 6 and len(chosen) > 1:
            del chosen[at]
        else:
            chosen[at] = mutated(random, chosen[at])
    stream = b"".join(chosen)
    return mutated(random, stream) if random.randrange(10) == 0 else stream
