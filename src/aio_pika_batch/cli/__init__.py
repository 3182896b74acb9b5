"""The command line: `aio-pika-batch`, or `python -m aio_pika_batch`."""

from __future__ import annotations

import sys
from importlib.util import find_spec

NEEDED = ("cyclopts", "rich", "dotenv")
"""Packages of the extra `cli`, which a consumer doesn't need."""


def main() -> None:
    """Run the command line and exit with its code."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        print(
            f"aio-pika-batch: the command line is not installed ({', '.join(missing)} not found);"
            " run: pip install 'aio-pika-batch[cli]'",
            file=sys.stderr,
        )
        sys.exit(2)
    from aio_pika_batch.cli.app import run_app

    sys.exit(run_app())
