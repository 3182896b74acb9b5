"""How does a process that runs consumers log?

The library itself configures no logger; whoever owns the process does, and on the command line that
is us. One handler, on stderr, for everything that is logged in the process, however it was said:
lines of `structlog`, where a user's code writes such and has not configured it, come out alike.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from collections.abc import MutableMapping
from datetime import UTC, datetime
from typing import Any, Literal, TextIO, TypeAlias

from aio_pika_batch.errors import ConfigurationError, safe_str
from aio_pika_batch.logs import RESERVED, format_line
from aio_pika_batch.masking import mask_text

LogFormat: TypeAlias = Literal["auto", "console", "json"]
FORMATS: tuple[LogFormat, ...] = ("auto", "console", "json")
LEVELS = ("debug", "info", "warning", "error", "critical")

CLIENTS = ("aio_pika", "aiormq", "pamqp")
"""Client libraries: what they tell below WARNING is told by the library's own lines already."""


def configure_logging(
    level: str = "info",
    format: LogFormat = "auto",  # noqa: A002  -- as the option is called
    *,
    stream: TextIO | None = None,
) -> None:
    """Log to stderr, all that is logged in this process.

    Args:
        level: One of `LEVELS`, in upper or lower case.
        format: `console` is for readers, in colours on a terminal where rich is installed; `json`
            is one object a line; `auto` is `console` on a terminal, and `json` elsewhere.
        stream: Where to; None: `sys.stderr`.

    Raises:
        ConfigurationError: There is no such level or format.
    """
    if level.lower() not in LEVELS:
        raise ConfigurationError(f"log level {level!r}: it must be one of {', '.join(LEVELS)}")
    if format not in FORMATS:
        raise ConfigurationError(f"log format {format!r}: it must be one of {', '.join(FORMATS)}")
    stream = stream or sys.stderr
    is_terminal = stream.isatty()
    handler: logging.Handler
    if format == "json" or (format == "auto" and not is_terminal):
        handler = logging.StreamHandler(stream)
        handler.setFormatter(JsonFormatter())
    else:
        handler = _for_readers(stream, is_terminal=is_terminal)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(capture=True)
    for name in CLIENTS:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))
    _take_in_structlog()


class JsonFormatter(logging.Formatter):
    """Writes a record as one line of JSON.

    Its keys are `timestamp` (ISO 8601, UTC), `level`, `logger`, `event`, whatever else was given
    as `extra`, and `exception` where there is a traceback. What JSON has no form for is written as
    text.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Write one."""
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
    """Writes a record as it is told to, but no password: others' lines may have one in a URL."""

    def format(self, record: logging.LogRecord) -> str:
        """Write one."""
        return mask_text(super().format(record))


def _for_readers(stream: TextIO, *, is_terminal: bool) -> logging.Handler:
    if is_terminal and importlib.util.find_spec("rich"):
        from rich.console import Console
        from rich.logging import RichHandler

        handler: logging.Handler = RichHandler(
            console=Console(file=stream), show_path=False, omit_repeated_times=False
        )
        handler.setFormatter(MaskingFormatter("%(name)s: %(message)s"))
        return handler
    handler = logging.StreamHandler(stream)
    handler.setFormatter(MaskingFormatter("%(asctime)s %(levelname)-8s %(name)s: %(message)s"))
    return handler


def _take_in_structlog() -> None:
    """Let what is said to structlog come out with all the rest, unless its user has other plans."""
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
    _logger: object, method: str, said: MutableMapping[str, Any]
) -> tuple[tuple[object, ...], dict[str, object]]:
    """The last step of structlog: what it has gathered, as arguments of a logger's method."""
    exc_info = said.pop("exc_info", method == "exception")
    stack_info = said.pop("stack_info", False)
    text, extra = format_line(str(said.pop("event", "")), said)
    return ("%s", text), {"exc_info": exc_info, "stack_info": stack_info, "extra": extra}
