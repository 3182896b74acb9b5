"""Standard logging, with the context as keywords.

The library never configures a logger; `getLogger("aio_pika_batch")` is the root of all of them.
"""

from __future__ import annotations

import logging
from types import TracebackType
from typing import TypeAlias

ExcInfo: TypeAlias = (
    "bool | BaseException | tuple[type[BaseException], BaseException, TracebackType | None]"
    " | tuple[None, None, None] | None"
)


_LONGEST = 4096
"""Characters of an exception's text in a line: who wrote it may have put a whole body into it."""


class KeywordLogger:
    """A logger that takes its context as keywords, as structlog's do.

    The keywords are appended to the message as `key=value`, and stand on the record as attribute
    `context`, for formatters that want them apart.
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
            merged = {**self._context, **context}
            words = " ".join(f"{key}={_text(value)}" for key, value in merged.items())
            text = f"{event} [{words}]" if words else event
            # The text is an argument, never a format: it may hold a percent sign.
            self._logger.log(
                level,
                "%s",
                text,
                exc_info=exc_info,
                extra={"event": event, "context": merged},
                stacklevel=3,
            )


def told(error: BaseException) -> str:
    """An exception's class and text, on whatever terms its `__str__` is, cut where it is long."""
    text = _text(error)
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}… ({len(text)} characters)"
    return f"{type(error).__name__}: {text}"


def _text(value: object) -> str:
    try:
        return str(value)
    except Exception as broken:  # noqa: BLE001  -- somebody else's __str__ must not stop what is logged
        return f"(its text cannot be had: {type(broken).__name__})"
