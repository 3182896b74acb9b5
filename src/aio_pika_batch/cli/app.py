"""The commands of the command line, and their exit codes.

A command's module is imported when the command is called, so that `--help` is quick and imports no
consumer and no AMQP client. A command returns its exit code, or None for 0. An error of this
library that it raises is printed on one line.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from enum import IntEnum
from importlib.metadata import version
from typing import Annotated, Any, TypeAlias, TypeVar
from urllib.parse import urlsplit

from cyclopts import App, CycloptsError, Parameter

from aio_pika_batch.errors import (
    AccessRefused,
    AioPikaBatchError,
    BrokerUnavailable,
    ConfigurationError,
    TopologyError,
)
from aio_pika_batch.logs import escape_controls

NAME = "aio-pika-batch"

_T = TypeVar("_T")

Flag: TypeAlias = Annotated[bool, Parameter(show_default=False)]
Strings: TypeAlias = Annotated[tuple[str, ...], Parameter(show_default=False)]
"""Types of options whose defaults say nothing."""

EXIT_CODES = "Exit codes: 0 success; {failed}; 2 wrong usage or configuration; 3 cannot connect."

_CANNOT_WRITE = frozenset(
    {errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF, errno.EROFS}
)


class Exit(IntEnum):
    """Exit codes."""

    OK = 0
    FAILED = 1
    """A crash, a failed check, or a drain that took too long."""
    USAGE = 2
    """Wrong usage or configuration: trying again doesn't help."""
    NO_CONNECTION = 3
    INTERRUPTED = 130
    """Ctrl-C before there was anything to drain: 128 + SIGINT, as shells report it."""


def exit_code(error: BaseException) -> Exit:
    """Return the exit code for an error."""
    match error:
        # A wrong queue stays wrong until the settings or the broker are changed.
        case ConfigurationError() | TopologyError():
            return Exit.USAGE
        case BrokerUnavailable() | AccessRefused():
            return Exit.NO_CONNECTION
        case KeyboardInterrupt():
            return Exit.INTERRUPTED
        case _:
            return Exit.FAILED


def exit_code_of_all(errors: Iterable[BaseException]) -> Exit:
    """Return the exit code for several errors: the lowest, so that a crash comes first."""
    return min(map(exit_code, errors), default=Exit.OK)


def print_error(error: object) -> None:
    """Print an error on standard error."""
    # The error may contain text from elsewhere, such as the broker's. Its line breaks are kept.
    text = "\n".join(map(escape_controls, str(error).split("\n")))
    with suppress(OSError):  # there is nowhere left to say it
        print(f"{NAME}: {text}", file=sys.stderr, flush=True)


def flush_streams() -> OSError | None:
    """Flush standard output and error; return why the output couldn't be written.

    What can't be written is dropped: the interpreter would fail at it once more when it exits.
    """
    failed = None
    for stream in filter(None, (sys.stderr, sys.stdout)):  # None: it was closed from the start
        try:
            stream.flush()
        except OSError as error:
            failed = error if stream is sys.stdout else None
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return failed


def run_interruptible(work: Coroutine[Any, Any, _T], stop: Callable[[], None]) -> _T:
    """Run a coroutine. The first signal calls `stop`, the second cancels the coroutine.

    Raises:
        KeyboardInterrupt: It was cancelled.
    """
    # Not above: these would make all other commands start more slowly.
    import asyncio

    from aio_pika_batch.runtime.shutdown import process_signals

    async def main() -> _T:
        task = asyncio.ensure_future(work)

        def abandon() -> None:
            task.cancel()

        with process_signals.listen(stop, abandon):
            return await task

    try:
        return asyncio.run(main())
    except asyncio.CancelledError:
        # As after a Ctrl-C that nothing handles.
        raise KeyboardInterrupt from None


def _format_usage_error(error: CycloptsError) -> str:
    command = " ".join([NAME, *(error.command_chain or ())])
    return f"{NAME}: {error}\nTry: {command} --help"


app = App(
    name=NAME,
    help="Run and inspect batch consumers for RabbitMQ, and repair dead letters.",
    help_epilogue=EXIT_CODES.format(failed="1 failure, see the help of each command"),
    version=lambda: version("aio-pika-batch"),
    default_parameter=Parameter(negative=""),  # no --no-… options
    error_formatter=_format_usage_error,
    result_action="return_int_as_exit_code_else_zero",
)


def _add(name: str, text: str, example: str, *, failed: str, module: str | None = None) -> None:
    """Add the function of this name from the module of this name, or from another one.

    The help text is given here: reading it from the function would import its module.

    Args:
        failed: What exit code 1 means.
    """
    codes = EXIT_CODES.format(failed=f"1 {failed}")
    app.command(
        f"aio_pika_batch.cli.{module or name}:{name}",
        name=name,
        help=text,
        help_epilogue=f"Example: {NAME} {name} {example}\n\n{codes}",
    )


_add(
    "run",
    "Run consumers until SIGTERM or Ctrl-C.\n\nThe first signal drains: batches in progress are"
    " finished and settled. A second signal abandons the drain.",
    "shop:Importer --processes 2 --health-port 8080",
    failed="crash or incomplete drain",
)
_add(
    "relay",
    "Publish what waits in an outbox, until SIGTERM or Ctrl-C.\n\nA relay is an OutboxRelay, and"
    " runs like a consumer. Several processes share the work.",
    "shop:relay --processes 2 --health-port 8080",
    failed="crash or incomplete drain",
    module="run",
)
_add(
    "health",
    "Check the health of a running program.",
    "--url http://127.0.0.1:8080/livez",
    failed="unhealthy",
    module="app",
)
_add(
    "check",
    "Show a consumer's settings and compare them with the broker.\n\nDeclares nothing.",
    "shop:Importer --strict",
    failed="problems found",
)
_add(
    "topology",
    "Show the queues, exchanges and bindings of a consumer, or declare them.\n\nConnects to the"
    " broker only with --apply or --dry-run, or if definitions depend on its version.",
    "shop:Importer --dry-run",
    failed="something differs, or is refused",
    module="check",
)
_add(
    "demo",
    "Run a demo: a pipeline of two consumers under load, with live statistics.\n\nAt the end it"
    " checks that no message was lost.",
    "--chaos",
    failed="orders not accounted for",
    module="demo.command",
)
app.register_install_completion_command()
app.command(
    "aio_pika_batch.cli.dlq:app",
    name="dlq",
    help=f"List, show, replay and delete dead letters.\n\nExample: {NAME} dlq list shop:Importer",
)


_MAX_BYTES = 64 * 1024
"""Bytes of a response that `health` prints."""


def health(*, url: str = "http://127.0.0.1:8080/livez", timeout: float = 3.0) -> int:
    """Request a health endpoint of a running program and print the response.

    Args:
        url: Endpoint served by --health-port: /livez, /readyz, /status or /metrics.
        timeout: Seconds to wait for the response.
    """
    # Not above: an HTTP client would make all other commands start more slowly.
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.request import ProxyHandler, build_opener

    if urlsplit(url).scheme != "http":
        raise ConfigurationError(f"--url: {url} must start with http://")
    opener = build_opener(ProxyHandler({}))  # a proxy wouldn't reach this machine
    try:
        with opener.open(url, timeout=timeout) as answer:
            print(answer.read(_MAX_BYTES).decode(errors="replace"), end="")
    except HTTPError as error:
        with error:
            print(error.read(_MAX_BYTES).decode(errors="replace"), end="")
        return Exit.FAILED
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise BrokerUnavailable(
            f"{url}: no answer: {reason}; is the program running with --health-port?"
        ) from error
    return Exit.OK


def run_app(tokens: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    Args:
        tokens: The arguments without the program's name; None takes them from `sys.argv`.
    """
    code: int
    failed: OSError | None = None
    try:
        code = app(tokens, exit_on_error=False)
    except CycloptsError:
        code = Exit.USAGE  # cyclopts has printed it, see `_format_usage_error`
    except AioPikaBatchError as error:
        print_error(error)
        code = exit_code(error)
    except KeyboardInterrupt:
        code = Exit.INTERRUPTED
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        code, failed = Exit.FAILED, error
    failed = flush_streams() or failed
    if failed is None:
        return code
    # If the reader of our output has exited, as `head` does, that is its own decision.
    if not isinstance(failed, BrokenPipeError):
        print_error(f"the output can't be written: {failed.strerror}")
    return code or Exit.FAILED
