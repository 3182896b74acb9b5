"""The broker of the benchmarks: the private node of the tests, which ends with this process."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.find import RunningBroker, choose


@contextmanager
def running() -> Iterator[RunningBroker]:
    """Run a broker on 127.0.0.1, or use the one that the environment names for the tests.

    Raises:
        NoBrokerError: There is none; the message says what would help.
    """
    with (
        tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder,
        choose().start(Path(folder, "broker")) as broker,
    ):
        yield broker
