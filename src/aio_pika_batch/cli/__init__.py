"""The command line: `aio-pika-batch`, or `python -m aio_pika_batch`."""

from __future__ import annotations

import io
import os
import signal
import sys
from importlib.util import find_spec
from types import FrameType

NEEDED = ("cyclopts", "rich", "dotenv")
"""Packages of the extra `cli`, which a consumer doesn't need."""


def _end_early(number: int, frame: FrameType | None) -> None:
    del frame
    # Nothing runs yet, so that a consumer has drained all that it had.
    sys.exit(0 if sys.argv[1:2] in (["run"], ["relay"]) else 128 + number)


def _replace_closed_streams() -> None:
    # The descriptor of a closed one would be that of the next connection. uvloop doesn't bear that,
    # and neither does the connection if something is printed.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Takes the lowest number that is free: this one. Processes started here inherit it.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # noqa: FBT003
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: PTH123, SIM115  -- until the end
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: PTH123, SIM115
    # A name with characters that the terminal's encoding lacks must not end a command.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def main() -> None:
    """Run the command line and exit with its code."""
    # The kernel keeps signals without a handler from process 1, and imports take a second.
    previous = signal.signal(signal.SIGTERM, _end_early)
    try:
        sys.exit(_run())
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)


def _run() -> int:
    _replace_closed_streams()
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        print(
            f"aio-pika-batch: the command line is not installed ({', '.join(missing)} not found);"
            " run: pip install 'aio-pika-batch[cli]'",
            file=sys.stderr,
        )
        return 2
    from aio_pika_batch.cli.app import run_app

    return run_app()
