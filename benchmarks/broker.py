"""Where does the broker come from? From the tests: a private node, which dies with this process."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.find import RunningBroker, choose


@contextmanager
def running() -> Iterator[RunningBroker]:
    """A broker on 127.0.0.1, or the one that the tests were told to use.

    Raises:
        NoBrokerError: There is none; the message says what would help.
    """
    with (
        tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder,
        choose().start(Path(folder, "broker")) as broker,
    ):
        yield broker
