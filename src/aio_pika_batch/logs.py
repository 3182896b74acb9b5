"""Standard logging, with the context of a line as keyword arguments.

The library configures no logger. `getLogger("aio_pika_batch")` is the parent of all its loggers.
Where the program configures none either, warnings show their level, and a terminal shows one line
for each consumer that starts.
"""

from __future__ import annotations

import asyncio
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import TypeAlias

from aio_pika_batch.errors import safe_str

ExcInfo: TypeAlias = BaseException | None

_LONGEST = 4096
"""The maximum characters of an exception's text in a line: some contain the body of a message."""

RESERVED = frozenset({*logging.makeLogRecord({}).__dict__, "message", "asctime", "event"})
"""The attributes that every log record has, and those that this module sets."""


_CONTROLS = re.compile(
    # Control characters, those that change the direction of text or end a line of Unicode, and
    # surrogates, which no encoding can write.
    r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def escape_controls(text: str) -> str:
    """Write out the characters by which a text could forge a line, or act on a terminal."""
    return _CONTROLS.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"  # noqa: PLR2004  -- two digits


class KeywordLogger:
    """A logger that takes its context as keyword arguments, as those of structlog do.

    It appends the context to the message as `key=value`. For other formatters, each value is also
    an attribute of the log record, and the message without them is the attribute `event`. If a
    record already has an attribute of that name, an underscore is appended to it.
    """

    # Attributes and not one dictionary, because other formatters look for attributes.
    __slots__ = ("_context", "_logger")

    def __init__(self, logger: logging.Logger, **context: object) -> None:
        self._logger = logger
        self._context = context

    def bind(self, **context: object) -> KeywordLogger:
        """Return the same logger with more context."""
        return KeywordLogger(self._logger, **{**self._context, **context})

    def debug(self, event: str, **context: object) -> None:
        """Log at DEBUG."""
        self._log(logging.DEBUG, event, None, context)

    def info(self, event: str, **context: object) -> None:
        """Log at INFO."""
        self._log(logging.INFO, event, None, context)

    def announce(self, event: str, **context: object) -> None:
        """Log at INFO. If logging isn't configured, show the line if stderr is a terminal."""
        self._log(logging.INFO, event, None, context)
        # WARNING is the level without configuration; a program may have raised it.
        if self._logger.hasHandlers() or not self._logger.isEnabledFor(logging.WARNING):
            return
        # Either may fail for a stream that was closed or replaced; sys.stderr may also be None.
        with suppress(OSError, ValueError, AttributeError):
            if sys.stderr.isatty():
                text, _ = format_line(event, {**self._context, **context})
                sys.stderr.write(f"INFO {self._logger.name}: {text}\n")

    def warning(self, event: str, *, exc_info: ExcInfo = None, **context: object) -> None:
        """Log at WARNING."""
        self._log(logging.WARNING, event, exc_info, context)

    def error(self, event: str, *, exc_info: ExcInfo = None, **context: object) -> None:
        """Log at ERROR."""
        self._log(logging.ERROR, event, exc_info, context)

    def exception(self, event: str, **context: object) -> None:
        """Log at ERROR, with the traceback of the exception being handled."""
        self._log(logging.ERROR, event, sys.exception(), context)

    def _log(self, level: int, event: str, exc_info: ExcInfo, context: dict[str, object]) -> None:
        if self._logger.isEnabledFor(level):
            text, extra = format_line(event, {**self._context, **context})
            if not self._logger.hasHandlers():
                # Then logging prints the text alone, which doesn't show that it is a warning.
                text = f"{logging.getLevelName(level)} {self._logger.name}: {text}"
            # The text is an argument and not the format, because it may contain a percent sign.
            # The level of the stack is the caller's, so that a record names the line that logs.
            self._logger.log(level, "%s", text, exc_info=exc_info, extra=extra, stacklevel=3)


def missing_configuration() -> Iterator[str]:
    """What to warn of if the program configures structlog, but not what our lines go to."""
    structlog = sys.modules.get("structlog")
    if structlog is None or logging.getLogger("aio_pika_batch").hasHandlers():
        return
    if structlog.is_configured():
        yield "structlog doesn't get the library's log: configure logging, too"


BURST_INTERVAL = 60.0
"""Seconds between two lines about the same thing."""


class BurstLog:
    """One kind of line, logged at once the first time, and then as a number once a minute.

    Args:
        log: Logs the number of messages that the line is about.
    """

    def __init__(self, log: Callable[[int], None]) -> None:
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._count = 0
        self._timer: asyncio.TimerHandle | None = None

    def note(self, count: int) -> None:
        """Log now if nothing was logged in the last minute, and otherwise when it is over."""
        if self._timer is not None:
            self._count += count
            return
        self._log(count)
        self._timer = self._loop.call_later(BURST_INTERVAL, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        count, self._count = self._count, 0
        if count:
            self.note(count)

    def flush(self) -> None:
        """Log what hasn't been logged; nothing more will come."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        count, self._count = self._count, 0
        if count:
            self._log(count)


def format_line(event: str, context: Mapping[str, object]) -> tuple[str, dict[str, object]]:
    """Return the text of a line, and the extra attributes of its record."""
    # A value may come from a message: it must not look like another line.
    pairs = " ".join(f"{key}={escape_controls(safe_str(value))}" for key, value in context.items())
    extra = {f"{key}_" if key in RESERVED else key: value for key, value in context.items()}
    return f"{event} [{pairs}]" if pairs else event, {"event": event, **extra}


def format_error(error: BaseException) -> str:
    """The class and the text of an exception, shortened if it is long."""
    return f"{type(error).__name__}: {shorten(safe_str(error))}"


def shorten(text: str) -> str:
    """Cut a text that is longer than one in a line of the log may be."""
    return f"{text[:_LONGEST]}… ({len(text)} characters)" if len(text) > _LONGEST else text
