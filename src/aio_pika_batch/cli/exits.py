"""With which code does a command end?"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

from aio_pika_batch.errors import (
    AccessRefused,
    BrokerUnavailable,
    ConfigurationError,
    TopologyError,
)


class Exit(IntEnum):
    """What a command tells whoever has started it."""

    OK = 0
    FAILED = 1
    """Crashed, or the drain took too long."""
    USAGE = 2
    """Wrong usage or configuration: trying again mends nothing."""
    NO_CONNECTION = 3
    INTERRUPTED = 130
    """By Ctrl-C, before there was anything to drain; so shells say of what SIGINT ended."""


def exit_of(error: BaseException) -> Exit:
    """The code for an error: whose fault is it?"""
    match error:
        case ConfigurationError() | TopologyError():
            return Exit.USAGE
        case BrokerUnavailable() | AccessRefused():
            return Exit.NO_CONNECTION
        case KeyboardInterrupt():
            return Exit.INTERRUPTED
        case _:
            return Exit.FAILED


def exit_of_all(errors: Iterable[BaseException]) -> Exit:
    """The code for several at once: a crash counts most, then what is configured."""
    codes = {exit_of(error) for error in errors}
    return next((code for code in Exit if code is not Exit.OK and code in codes), Exit.OK)
