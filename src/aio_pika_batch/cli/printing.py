"""How is something said on a terminal, and how in a pipe?

On a terminal tables fit its width and have colours. In a pipe a line is never broken, whatever its
length, and there is nothing in it but text.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import datetime

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from aio_pika_batch.cli.app import complain as told
from aio_pika_batch.cli.logging import CLIENTS

_PIPE_WIDTH = 10_000

_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160))}


def console() -> Console:
    """Standard output."""
    found = Console(highlight=False, soft_wrap=False)
    if not found.is_terminal:
        found = Console(highlight=False, width=_PIPE_WIDTH)
    return found


def table(*columns: str) -> Table:
    """A table without a frame."""
    made = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def harmless(text: str) -> Text:
    """Somebody else's text: neither markup nor anything that a terminal would obey."""
    return Text(plain(text))


def plain(text: str) -> str:
    """The same, as a string: control characters are written out."""
    return text.translate(_CONTROLS)


def complain(text: str) -> None:
    """Say on standard error what is wrong; it may hold somebody else's words."""
    told(plain(text))


def hush() -> None:
    """Let client libraries say nothing: what goes wrong is told once, by the command itself."""
    for name in CLIENTS:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def print_json(data: object) -> None:
    """Print something for programs."""
    print(json.dumps(data, indent=2, ensure_ascii=False, default=_json))


def _json(value: object) -> object:
    match value:
        case datetime():
            return value.isoformat()
        case bytes():
            return value.hex()
        case Mapping():
            return dict(value)
        case frozenset() | set():
            return sorted(value, key=str)
        case _:
            return str(value)
