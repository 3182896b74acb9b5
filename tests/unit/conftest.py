"""What does a unit test get? Nothing that is real: no broker, no network, no time that passes.

Every asynchronous test below this folder runs, with its fixtures, on a loop of virtual time: an
hour's sleep takes no time, and what would hang is an error that says what it waits for.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from aio_pika_batch.testing.virtual_time import VirtualTimeLoop

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Tell pytest-asyncio on which loop the tests of this folder run."""
    return {"virtual": VirtualTimeLoop}


@pytest.fixture
async def virtual_loop() -> VirtualTimeLoop:
    """The loop that the test runs on, for its clock: ``virtual_loop.time()`` starts at 0."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualTimeLoop)
    return loop
