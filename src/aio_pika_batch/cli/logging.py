"""Configures logging for the command line: one handler on standard error for the whole process.

The library configures no logger. That is up to the program, and here the command line is the
program. What the user's code logs with `structlog` goes to the same handler, unless the user has
configured structlog.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from collections.abc import MutableMapping
from datetime import UTC, datetime
from typing import Any, Literal, TextIO, TypeAlias, get_args

from aio_pika_batch.errors import ConfigurationError, safe_str
from aio_pika_batch.logs import RESERVED, format_line
from aio_pika_batch.masking import mask_text

LogFormat: TypeAlias = Literal["auto", "console", "json"]
LogLevel: TypeAlias = Literal["debug", "info", "warning", "error", "critical"]
FORMATS: tuple[str, ...] = get_args(LogFormat)
LEVELS: tuple[str, ...] = get_args(LogLevel)

CLIENTS = ("aio_pika", "aiormq", "pamqp")
"""Client libraries, logged from WARNING on: below that, the library logs the same events itself."""


def configure_logging(
    level: str = "info",
    format: str = "auto",  # noqa: A002  -- named like the option
    *,
    stream: TextIO | None = None,
) -> None:
    """Send all log records of this process to one stream.

    Args:
        level: One of `LEVELS`, in upper or lower case.
        format: `console` writes text, in colour on a terminal if rich is installed. `json` writes
            one object per line. `auto` is `console` on a terminal and `json` elsewhere.
        stream: The stream; None for `sys.stderr`.

    Raises:
        ConfigurationError: The level or format is unknown.
    """
    if level.lower() not in LEVELS:
        raise ConfigurationError(f"log level {level!r}: must be one of {', '.join(LEVELS)}")
    if format not in FORMATS:
        raise ConfigurationError(f"log format {format!r}: must be one of {', '.join(FORMATS)}")
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
    """Formats a record as one line of JSON.

    The keys are `timestamp` (ISO 8601, UTC), `level`, `logger`, `event`, those given as `extra`,
    and `exception` if there is a traceback. Values that JSON doesn't support become text.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as JSON."""
        line: dict[str, object] = {
            "timestamp": datetime.fromtimestamp(record.created, UTC).isoformat("T", "milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": getattr(record, "event", None) or record.getMessage(),
        }
        line.update((key, each) for key, each in vars(record).items() if key not in RESERVED)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return mask_text(json.dumps(line, default=safe_str, ensure_ascii=False))


class MaskingFormatter(logging.Formatter):
    """Formats a record as text and masks passwords: any logger may log a URL with one."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as text."""
        return mask_text(super().format(record))


def _console_handler(stream: TextIO, *, is_terminal: bool) -> logging.Handler:
    if is_terminal and importlib.util.find_spec("rich"):
        from rich.console import Console
        from rich.logging import RichHandler

        # A repeated time stays on its line: lines are copied and searched one by one.

        handler: logging.Handler = RichHandler(
            console=Console(file=stream), show_path=False, omit_repeated_times=False
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
