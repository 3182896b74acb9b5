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


def complain(error: object) -> None:
    """Say on standard error what is wrong."""
    print(f"{NAME}: {error}", file=sys.stderr)


def _usage(error: CycloptsError) -> str:
    command = " ".join([NAME, *(error.command_chain or ())])
    return f"{NAME}: {error}\nTry: {command} --help"


app = App(
    name=NAME,
    help="Run batch consumers for RabbitMQ, look after them, and repair what they left.",
    help_epilogue="Exit codes: 0 all went well; 1 crashed, or the drain took too long;"
    " 2 wrong usage or configuration; 3 cannot connect.",
    version=lambda: version("aio-pika-batch"),
    error_formatter=_usage,
    result_action="return_int_as_exit_code_else_zero",
)

# The first line of each command's help stands here, since looking for it would import the command.
app.command(
    "aio_pika_batch.cli.run:run",
    name="run",
    help="Run consumers until SIGTERM or Ctrl-C, then drain.",
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
