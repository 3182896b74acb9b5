"""How is a body shown to somebody who wants to know what is wrong with it?

JSON is laid out, other text shown as it is, everything else as bytes; none of it without end, and
nothing in it reaches the terminal as a command.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from aio_pika_batch.cli.printing import plain

LARGEST_JSON = 1 << 20
"""Bytes that are laid out at most; more is shown as text."""

_ROW = 16


def body_lines(body: bytes, most: int) -> Iterator[str]:
    """The lines that show a body.

    Args:
        most: Show so many of its bytes at most; of laid-out JSON, so many characters.
    """
    if not body:
        return
    text = _laid_out(body)
    if text is not None:
        yield from _lines(text[:most])
        if len(text) > most:
            yield f"… ({len(text) - most} more characters)"
        return
    shown = body[:most]
    decoded = _text(shown, is_whole=len(body) <= most)
    yield from _hex(shown) if decoded is None else _lines(decoded)
    if len(body) > most:
        yield f"… ({len(body) - most} more bytes)"


def _laid_out(body: bytes) -> str | None:
    if len(body) > LARGEST_JSON or body[:1].isalnum():
        return None  # a lone word or number gains nothing
    try:
        return json.dumps(json.loads(body), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        return None


def _text(body: bytes, *, is_whole: bool) -> str | None:
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        # It may have been cut within a character.
        if is_whole or error.start < len(body) - 3 or "unexpected end" not in error.reason:
            return None
        text = body[: error.start].decode()
    return None if "\0" in text else text


def _lines(text: str) -> Iterator[str]:
    for line in text.split("\n"):
        yield plain(line.rstrip("\r").replace("\t", "    "))


def _hex(body: bytes) -> Iterator[str]:
    for first in range(0, len(body), _ROW):
        row = body[first : first + _ROW]
        readable = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)  # noqa: PLR2004  -- ASCII
        yield f"{first:08x}  {row.hex(' '):<47}  {readable}"
