"""Standard logging, with the context as keywords.

The library never configures a logger; `getLogger("aio_pika_batch")` is the root of all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import TracebackType
from typing import TypeAlias

from aio_pika_batch.errors import safe_str

ExcInfo: TypeAlias = (
    "bool | BaseException | tuple[type[BaseException], BaseException, TracebackType | None]"
    " | tuple[None, None, None] | None"
)


_LONGEST = 4096
"""Characters of an exception's text in a line: who wrote it may have put a whole body into it."""


RESERVED = frozenset({*logging.makeLogRecord({}).__dict__, "message", "asctime", "event"})
"""Names that stand on a record anyway, or that we put there ourselves."""


class KeywordLogger:
    """A logger that takes its context as keywords, as structlog's do.

    The keywords are appended to the message as `key=value`. For formatters that want them apart,
    each stands on the record as an attribute, and the message without them as `event`; a keyword
    that a record has a name for already gets an underscore behind it there.
    """

    __slots__ = ("_context", "_logger")

    def __init__(self, logger: logging.Logger, **context: object) -> None:
        self._logger = logger
        self._context = context

    def bind(self, **context: object) -> KeywordLogger:
        """The same logger with more context."""
        return KeywordLogger(self._logger, **{**self._context, **context})

    def debug(self, event: str, **context: object) -> None:
        """Log at DEBUG."""
        self._log(logging.DEBUG, event, None, context)

    def info(self, event: str, **context: object) -> None:
        """Log at INFO."""
        self._log(logging.INFO, event, None, context)

    def warning(self, event: str, *, exc_info: ExcInfo = None, **context: object) -> None:
        """Log at WARNING."""
        self._log(logging.WARNING, event, exc_info, context)

    def error(self, event: str, *, exc_info: ExcInfo = None, **context: object) -> None:
        """Log at ERROR."""
        self._log(logging.ERROR, event, exc_info, context)

    def exception(self, event: str, **context: object) -> None:
        """Log at ERROR, with the traceback of the exception being handled."""
        self._log(logging.ERROR, event, True, context)  # noqa: FBT003

    def _log(self, level: int, event: str, exc_info: ExcInfo, context: dict[str, object]) -> None:
        if self._logger.isEnabledFor(level):
            text, extra = format_line(event, {**self._context, **context})
            # The text is an argument, never a format: it may hold a percent sign.
            self._logger.log(level, "%s", text, exc_info=exc_info, extra=extra, stacklevel=3)


def format_line(event: str, context: Mapping[str, object]) -> tuple[str, dict[str, object]]:
    """The text of a line, and what stands on its record besides."""
    words = " ".join(f"{key}={safe_str(value)}" for key, value in context.items())
    apart = {f"{key}_" if key in RESERVED else key: value for key, value in context.items()}
    return f"{event} [{words}]" if words else event, {"event": event, **apart}


def format_error(error: BaseException) -> str:
    """An exception's class and text, on whatever terms its `__str__` is, cut where it is long."""
    text = safe_str(error)
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}… ({len(text)} characters)"
    return f"{type(error).__name__}: {text}"
