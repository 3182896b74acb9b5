"""How is a dead letter shown, and how are many of them summed up?"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from rich.console import Console

from aio_pika_batch.cli.bodies import body_lines
from aio_pika_batch.cli.printing import harmless
from aio_pika_batch.core.dead_letter import format_header
from aio_pika_batch.core.message import Message
from aio_pika_batch.dead_letters import Letter, Looked


def summary(looked: Looked) -> dict[str, Any]:
    """What can be said of all letters that were looked at."""
    deaths = [letter.death for letter in looked.letters]
    moments = [death.died_at for death in deaths if death.died_at is not None]
    return {
        "queue": looked.queue,
        "letters": looked.ready,
        "looked_at": len(deaths),
        "reasons": dict(Counter(death.reason for death in deaths).most_common()),
        "oldest": min(moments, default=None),
        "newest": max(moments, default=None),
        "ended": looked.ended,
    }


def _properties(message: Message) -> dict[str, object]:
    read = asdict(message.properties)
    undecodable = read.pop("undecodable")
    read.pop("headers")
    found = {name: value for name, value in read.items() if value is not None}
    return found | {name: f"(cannot be decoded: {why})" for name, why in undecodable.items()}


def _headers(message: Message) -> dict[str, Any]:
    return dict(message.headers) if message.has_readable_headers else {}


def show_letter(out: Console, number: int, letter: Letter, most: int) -> None:
    """Print one letter; at most so many bytes of its body."""
    message, death = letter.message, letter.death
    out.print(f"[bold]letter {number}[/]:", harmless(death.reason), ago(death.died_at))
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
        out.print(harmless(f"  {line}"))
    for line in body_lines(message.body, most):
        out.print(harmless(f"    {line}"))
    out.print()


def as_data(number: int, letter: Letter, most: int) -> dict[str, object]:
    """One letter for programs; at most so many bytes of its body."""
    message = letter.message
    return {
        "letter": number,
        **asdict(letter.death),
        "properties": _properties(message),
        "headers": _headers(message),
        "bytes": len(message.body),
        "body": message.body[:most],
    }


def ago(moment: datetime | None) -> str:
    """How long ago something was; empty if nobody knows."""
    if moment is None:
        return ""
    seconds = (datetime.now(UTC) - moment).total_seconds()
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(0, seconds):.0f} s ago"
