"""Fixtures of the unit tests, which use no broker, no network and no real time.

Every asynchronous test below this folder runs, with its fixtures, on a loop of virtual time: an
hour's sleep takes no time, and what would hang is an error that says what it waits for.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import TYPE_CHECKING

import pytest

from aio_pika_batch.cli.logging import CLIENTS
from aio_pika_batch.testing.virtual_time import VirtualTimeLoop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Tell pytest-asyncio on which loop the tests of this folder run."""
    return {"virtual": VirtualTimeLoop}


@pytest.fixture
async def virtual_loop() -> VirtualTimeLoop:
    """The loop that the test runs on, for its clock: ``virtual_loop.time()`` starts at 0."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    return loop


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Undo what a test's command line configures: its handler would outlive the test's stderr."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    if root.handlers != handlers or root.level != level:
        root.handlers[:] = [each for each in root.handlers if each in handlers]
        root.setLevel(level)
        logging.captureWarnings(capture=False)
        for name in CLIENTS:
            logging.getLogger(name).setLevel(logging.NOTSET)
        if "structlog" in sys.modules:
            sys.modules["structlog"].reset_defaults()
