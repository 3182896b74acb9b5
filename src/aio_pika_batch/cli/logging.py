"""Configures logging for the command line: one handler on standard error for the whole process.

The library configures no logger. That is up to the program, and here the command line is the
program. What the user's code logs with `structlog` goes to the same handler, unless the user has
configured structlog.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import re
import sys
from collections.abc import Callable, Mapping, MutableMapping
from datetime import UTC, datetime
from typing import Any, Literal, TextIO, TypeAlias

from aio_pika_batch.errors import safe_str
from aio_pika_batch.logs import RESERVED, escape_controls, format_line
from aio_pika_batch.masking import mask_text

LogFormat: TypeAlias = Literal["auto", "console", "json"]
LogLevel: TypeAlias = Literal["debug", "info", "warning", "error", "critical"]

_JSON_ESCAPED = re.compile(r"[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that JSON allows, and terminals, splitters of lines or encodings don't."""

_OUR_KEYS = frozenset({"timestamp", "level", "logger", "event", "exception", "stack"})

CLIENTS = ("aio_pika", "aiormq", "pamqp")
"""Client libraries, logged from WARNING on: below that, the library logs the same events itself."""


def configure_logging(
    level: LogLevel = "info",
    format: LogFormat = "auto",  # noqa: A002  -- named like the option
    *,
    stream: TextIO | None = None,
) -> None:
    """Send all log records of this process to one stream.

    Args:
        level: The lowest level that is logged.
        format: `console` writes text, in colour on a terminal if rich is installed. `json` writes
            one object per line. `auto` is `console` on a terminal and `json` elsewhere.
        stream: The stream; None for `sys.stderr`.
    """
    stream = stream or sys.stderr
    is_terminal = stream.isatty()
    handler: logging.Handler
    if format == "json" or (format == "auto" and not is_terminal):
        handler = logging.StreamHandler(stream)
        handler.setFormatter(JsonFormatter())
    else:
        handler = _console_handler(stream, is_terminal=is_terminal)
    # Replaces what an import has configured: two handlers would write every line twice.
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    for name in CLIENTS:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))
    _redirect_structlog()


def silence_clients() -> None:
    """Silence the loggers of client libraries: the command reports an error itself, once."""
    for name in CLIENTS:
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON, whatever the record contains.

    The keys are `timestamp` (ISO 8601, UTC), `level`, `logger`, `event`, those given as `extra`,
    and `exception` and `stack` if there are any. An `extra` of one of these names gets an
    underscore. Values that JSON doesn't support become text.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as JSON."""
        text, context = _text(record), vars(record)
        # The event is ours only if the text begins with it, and not some logger's own `extra`.
        event = context.get("event")
        is_ours = isinstance(event, str) and text.startswith(event)
        line: dict[str, object] = {
            "timestamp": datetime.fromtimestamp(record.created, UTC).isoformat("T", "milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": (event or text) if is_ours else text,
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = record.stack_info
        for key, value in context.items():
            if key not in RESERVED or (key == "event" and not is_ours):
                line[f"{key}_" if key in _OUR_KEYS else key] = value
        return _JSON_ESCAPED.sub(
            lambda found: f"\\u{ord(found[0]):04x}",
            json.dumps(as_json(line, _masked), ensure_ascii=False, allow_nan=False),
        )


class MaskingFormatter(logging.Formatter):
    """Formats a record as text that can't be taken for another record.

    Any logger may log a URL with a password, or text from a message. A traceback
    is indented, because the text of an exception may look like a line of the log.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text."""
        record.message = escape_controls(_text(record))
        if self.usesTime():
            record.asctime = self.formatTime(record, self.datefmt)
        lines = [self.formatMessage(record)]
        if record.exc_info:
            lines += self.formatException(record.exc_info).split("\n")
        if record.stack_info:
            lines += record.stack_info.split("\n")
        return mask_text("\n    ".join(map(escape_controls, lines)))


def as_json(value: object, write: Callable[[object], str], depth: int = 8) -> object:
    """Return a value that JSON can contain, whatever it was.

    Args:
        write: Returns the text of a string, of what JSON doesn't have, and of what is too deep.
    """
    match value:
        case None | bool() | int():
            return value
        case float() if math.isfinite(value):
            return value
        case Mapping() if depth:
            items = [(safe_str(key), each) for key, each in value.items()]
            return {write(key): as_json(each, write, depth - 1) for key, each in items}
        case list() | tuple() if depth:
            return [as_json(each, write, depth - 1) for each in value]
        case _:
            return write(value)


def _masked(value: object) -> str:
    return mask_text(safe_str(value))


def _text(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # noqa: BLE001  -- arguments that don't fit, or whose text can't be had
        return f"{safe_str(record.msg)} {safe_str(record.args)}"


def _console_handler(stream: TextIO, *, is_terminal: bool) -> logging.Handler:
    if is_terminal and importlib.util.find_spec("rich"):
        from rich.console import Console
        from rich.logging import RichHandler

        handler: logging.Handler = RichHandler(
            console=Console(file=stream),
            show_path=False,
            omit_repeated_times=False,  # lines are copied and searched one by one
        )
        handler.setFormatter(MaskingFormatter("%(name)s: %(message)s"))
        return handler
    handler = logging.StreamHandler(stream)
    handler.setFormatter(MaskingFormatter("%(asctime)s %(levelname)-8s %(name)s: %(message)s"))
    return handler


def _redirect_structlog() -> None:
    """Send what structlog logs to standard logging, unless the user has configured structlog."""
    if not importlib.util.find_spec("structlog"):
        return
    import structlog

    if structlog.is_configured():
        return
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.filter_by_level,
            _to_record,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


def _to_record(
    _logger: object, method: str, event: MutableMapping[str, Any]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """Return a structlog event as arguments for a method of `logging.Logger`."""
    exc_info = event.pop("exc_info", method == "exception")
    stack_info = event.pop("stack_info", False)
    text, extra = format_line(str(event.pop("event", "")), event)
    return ("%s", text), {"exc_info": exc_info, "stack_info": stack_info, "extra": extra}
