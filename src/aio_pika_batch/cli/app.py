"""Which commands are there?

Each is imported when it is called: `--help` is quick, and imports no consumer and no AMQP client. A
command returns its exit code, or None for 0; a known error that leaves it is told in one line.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from cyclopts import App, CycloptsError

from aio_pika_batch.cli.exits import Exit, exit_of
from aio_pika_batch.errors import AioPikaBatchError

NAME = "aio-pika-batch"

EXIT_CODES = (
    "Exit codes: 0 all is well; 1 crashed, unhealthy, or the drain took too long; 2 wrong usage or"
    " configuration; 3 cannot connect."
)


def complain(error: object) -> None:
    """Say on standard error what is wrong."""
    print(f"{NAME}: {error}", file=sys.stderr)


def _usage(error: CycloptsError) -> str:
    command = " ".join([NAME, *(error.command_chain or ())])
    return f"{NAME}: {error}\nTry: {command} --help"


app = App(
    name=NAME,
    help="Run batch consumers for RabbitMQ, look after them, and repair what they left.",
    help_epilogue=EXIT_CODES,
    version=lambda: version("aio-pika-batch"),
    error_formatter=_usage,
    result_action="return_int_as_exit_code_else_zero",
)


def _add(name: str, text: str, example: str, *, module: str | None = None) -> None:
    """Add the function of a name from the module of that name, or from another one.

    What its help says about it stands here, since looking for it would import the command.
    """
    app.command(
        f"aio_pika_batch.cli.{module or name}:{name}",
        name=name,
        help=text,
        help_epilogue=f"Example: {NAME} {name} {example}\n\n{EXIT_CODES}",
    )


_add(
    "run",
    "Run consumers until SIGTERM or Ctrl-C, then drain; a second signal gives up the drain.",
    "shop:Importer --processes 2 --health-port 8080",
)
_add(
    "health",
    "Ask a running program how it is: a probe.",
    "--url http://127.0.0.1:8080/livez",
)
_add(
    "check",
    "Show a consumer's configuration, and hold it to the broker.\n\nNothing is declared.",
    "shop:Importer --strict",
)
_add(
    "topology",
    "Show what a consumer needs on its broker, or declare it.\n\nNothing is asked of a broker"
    " without --apply and --dry-run, but for its version where definitions depend on it.",
    "shop:Importer --dry-run",
)
_add(
    "demo",
    "Watch a load go through a pipeline of consumers, and the books balance at its end.",
    "--chaos",
    module="demo.command",
)
app.command(
    "aio_pika_batch.cli.dlq:app",
    name="dlq",
    help="Look at dead letters, send them back, delete them.\n\n"
    f"Example: {NAME} dlq list shop:Importer",
)


def run_app(tokens: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        tokens: What was typed, without the program's name; None takes it from `sys.argv`.

    Returns:
        The exit code.
    """
    try:
        code: int = app(tokens, exit_on_error=False)
        sys.stdout.flush()
    except CycloptsError:
        return Exit.USAGE  # told by cyclopts, as `_usage` has it
    except AioPikaBatchError as error:
        complain(error)
        return exit_of(error)
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has left, as `head` does; nothing may be flushed at exit, either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.FAILED
    return code
