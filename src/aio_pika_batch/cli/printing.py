"""Prints results: on a terminal with colours and fitted to its width, in a pipe as plain text.

In a pipe no line is wrapped. Text from elsewhere (bodies, headers, the broker's words) is printed
without control characters and markup.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from aio_pika_batch.cli.logging import as_json
from aio_pika_batch.core.dead_letter import format_header
from aio_pika_batch.core.message import Message
from aio_pika_batch.dead_letters import Letter, Looked
from aio_pika_batch.errors import safe_str
from aio_pika_batch.logs import escape_controls

_PIPE_WIDTH = 10_000

_LINE_INTERVAL = 1.0
"""Seconds between lines of progress in a pipe."""

MAX_JSON = 1 << 20
"""Bytes of a body that is indented as JSON; a larger one is shown as text."""

_HEX_ROW = 16


def console(*, is_error: bool = False) -> Console:
    """Return a console for standard output or standard error."""
    # Names may contain brackets and colons, which rich would take for markup and emoji.
    plain: dict[str, Any] = {
        "highlight": False,
        "markup": False,
        "emoji": False,
        "stderr": is_error,
    }
    found = Console(**plain)
    # Rich would wrap the lines at 80 columns.
    return found if found.is_terminal else Console(**plain, width=_PIPE_WIDTH)


def print_table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table without a frame."""
    made = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*(escaped(str(each)) for each in row))
    console().print(made)


def escaped(text: str) -> Text:
    """Return text from elsewhere without markup and control characters."""
    return Text(escape_controls(text))


def print_json(data: object) -> None:
    """Print a value as JSON."""
    print(json.dumps(as_json(data, _write), indent=2, ensure_ascii=False))


def _write(value: object) -> str:
    match value:
        case datetime():
            return value.isoformat()
        case bytes():
            return value.hex()
        case _:
            return safe_str(value)


class ProgressBar:
    """A progress bar on a terminal, and a line every second in a pipe."""

    def __init__(self, out: Console) -> None:
        self._out = out
        self._printed_at = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("looked at"),
            console=out,
            disable=not out.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        # Before version 15, rich ends a bar that isn't shown with an empty line.
        if not self._bar.disable:
            self._bar.stop()

    def update(self, text: str, seen: int, total: int | None) -> None:
        """Show how many dead letters were looked at, and what that text says of them."""
        self._bar.update(self._task, description=text, completed=seen, total=total)
        now = time.monotonic()
        if not self._out.is_terminal and now - self._printed_at >= _LINE_INTERVAL:
            self._printed_at = now
            of = "" if total is None else f" of {total}"
            self._out.print(f"{text}, {seen}{of} looked at …")


# --- dead letters ----------------------------------------------------------------


def summary(looked: Looked) -> dict[str, Any]:
    """Return a summary of the dead letters of a queue."""
    return {
        "queue": looked.queue,
        "letters": looked.ready,
        "looked_at": looked.seen,
        "reasons": dict(looked.reasons.most_common()),
        "oldest": looked.oldest,
        "newest": looked.newest,
        "ended": looked.ended,
    }


def print_letter(out: Console, letter: Letter, max_bytes: int) -> None:
    """Print a dead letter with at most `max_bytes` of its body."""
    message, death = letter.message, letter.death
    title = Text(f"dead letter {letter.number}", "bold").append(":", "not bold")
    out.print(title, escaped(death.reason), describe_age(death.died_at))
    lines = []
    if death.origin is not None:
        lines.append(f"to exchange {death.origin.exchange!r}, key {death.origin.routing_key!r}")
    if death.queue is not None:
        lines.append(f"died in queue {death.queue!r} after {death.retries} retries")
    if death.exception_type is not None:
        lines.append(f"{death.exception_type}: {death.exception_message or ''}")
    if death.detail is not None:
        lines.append(f"because: {death.detail}")
    lines += [f"{name}: {value}" for name, value in _properties(message).items()]
    lines += [f"header {name}: {format_header(value)}" for name, value in _headers(message).items()]
    lines.append(f"body: {len(message.body)} bytes")
    for line in lines:
        out.print(escaped(f"  {line}"))
    for line in body_lines(message.body, max_bytes):
        out.print(escaped(f"    {line}"))
    out.print()


def letter_as_json(letter: Letter, max_bytes: int) -> dict[str, object]:
    """Return a dead letter for JSON with at most `max_bytes` of its body."""
    message = letter.message
    shown = message.body[:max_bytes]
    text = _decoded(shown, is_whole=len(message.body) <= max_bytes)
    return {
        "letter": letter.number,
        **asdict(letter.death),
        "properties": _properties(message),
        "headers": _headers(message),
        "bytes": len(message.body),
        "body": shown.hex() if text is None else text,
        "body_is_hex": text is None,
    }


def _properties(message: Message) -> dict[str, object]:
    read = asdict(message.properties)
    undecodable = read.pop("undecodable")
    read.pop("headers")
    found = {name: value for name, value in read.items() if value is not None}
    return found | {name: f"(cannot be decoded: {why})" for name, why in undecodable.items()}


def _headers(message: Message) -> dict[str, Any]:
    return dict(message.headers) if message.has_readable_headers else {}


def describe_age(moment: datetime | None) -> str:
    """Return how long ago a moment was; empty if it is unknown."""
    if moment is None:
        return ""
    seconds = (datetime.now(UTC) - moment).total_seconds()
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(0, seconds):.0f} s ago"


_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_AMOUNT = re.compile(
    r"(\d+(?:\.\d+)?)\s*(s|m|h|d|w)"
    r"(?:ecs?|econds?|ins?|inutes?|rs?|ours?|ays?|ks?|eeks?)?\s*",
    re.IGNORECASE,
)


def parse_duration(text: str) -> timedelta:
    """Return a duration such as `90s`, `15m`, `2h`, `3 weeks` or `1d12h`.

    Raises:
        ValueError: It isn't one; the text says how one is written.
    """
    amounts = list(_AMOUNT.finditer(text.strip()))
    if not amounts or "".join(each[0] for each in amounts) != text.strip():
        raise ValueError(f"{text!r} is not a duration; write it as 90s, 15m, 2h, 3d or 1w")
    try:
        return timedelta(**{_UNITS[each[2].lower()]: float(each[1]) for each in amounts})
    except OverflowError:
        raise ValueError(f"{text!r} is longer than all of history") from None


# --- bodies ----------------------------------------------------------------------


def body_lines(body: bytes, max_bytes: int) -> Iterator[str]:
    """Return the lines that show a body: JSON indented, other text as it is, the rest as hex.

    Args:
        max_bytes: Limit of the bytes shown; for indented JSON, of the characters.
    """
    if not body:
        return
    text = _indented_json(body)
    if text is not None:
        yield from _text_lines(text[:max_bytes])
        if len(text) > max_bytes:
            yield f"… ({len(text) - max_bytes} more characters)"
        return
    shown = body[:max_bytes]
    decoded = _decoded(shown, is_whole=len(body) <= max_bytes)
    yield from _hex_lines(shown) if decoded is None else _text_lines(decoded)
    if len(body) > max_bytes:
        yield f"… ({len(body) - max_bytes} more bytes)"


def _indented_json(body: bytes) -> str | None:
    if len(body) > MAX_JSON or body[:1].isalnum():
        return None  # a single word or number needs no indentation
    try:
        return json.dumps(json.loads(body), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        return None


def _decoded(body: bytes, *, is_whole: bool) -> str | None:
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        # The limit may have cut a character in two.
        if is_whole or error.start < len(body) - 3 or "unexpected end" not in error.reason:
            return None
        text = body[: error.start].decode()
    # Text has no NUL, but many binary formats that decode as UTF-8 do.
    return None if "\0" in text else text


def _text_lines(text: str) -> Iterator[str]:
    for line in text.split("\n"):
        yield escape_controls(line.rstrip("\r").replace("\t", "    "))


def _hex_lines(body: bytes) -> Iterator[str]:
    for first in range(0, len(body), _HEX_ROW):
        row = body[first : first + _HEX_ROW]
        readable = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)  # noqa: PLR2004  -- ASCII
        yield f"{first:08x}  {row.hex(' '):<47}  {readable}"
