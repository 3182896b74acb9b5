"""The broker in memory does what RabbitMQ does, in random programs that are played on both.

`AIO_PIKA_BATCH_TEST_PROGRAMS` says how many; `nox -s stories -- 400` plays 400 on each RabbitMQ
that can be fetched. If there are more than usual, they differ from day to day. A failure names its
program; `AIO_PIKA_BATCH_TEST_PROGRAM` plays that one again.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING

import pytest

from tests.integration.helpers import parse_version
from tests.support.programs import difference

if TYPE_CHECKING:
    from tests.support.find import RunningBroker

USUAL = 30
COUNT = int(os.environ.get("AIO_PIKA_BATCH_TEST_PROGRAMS", USUAL))
AT_ONCE = 6
VERSIONS = ((4, 3), (4, 0), (3, 10), (3, 8))
"""Those that the broker in memory imitates, the newest first."""


def numbers() -> range:
    """Return the numbers of the programs to play."""
    if (one := os.environ.get("AIO_PIKA_BATCH_TEST_PROGRAM")) is not None:
        return range(int(one), int(one) + 1)
    today = int(time.time() // 86_400)
    first = 0 if COUNT <= USUAL else today * 10_000
    return range(first, first + COUNT)


async def test_random_programs_run_as_on_rabbitmq(broker: RunningBroker, name: str) -> None:
    """Outcomes, deliveries with their order and headers, and what is left in the queues."""
    version = next(each for each in VERSIONS if each <= parse_version(broker))
    gate = asyncio.Semaphore(AT_ONCE)

    async def play(number: int) -> str | None:
        async with gate:
            imitated = ".".join(map(str, version))
            return await difference(broker.url, imitated, number, f"{name}-{number}")

    found = [each for each in await asyncio.gather(*map(play, numbers())) if each is not None]
    if found:
        pytest.fail("\n\n".join(found), pytrace=False)
