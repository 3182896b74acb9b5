"""The pytest plugin: the fixtures `batch_broker` and `batch_rabbitmq`.

pytest loads this module in every run, so it imports almost nothing before a fixture is used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from aio_pika_batch.testing.broker import BatchBroker
    from aio_pika_batch.testing.rabbitmq.find import RunningBroker
    from aio_pika_batch.testing.rabbitmq.fixture import BatchRabbitMQ

OPTIONAL = "AIO_PIKA_BATCH_TEST_OPTIONAL"
"""If it is set, tests without a RabbitMQ are skipped. Otherwise they fail, since a skipped test is
easily taken for one that has passed.
"""


@pytest.fixture
def batch_broker_version() -> str:
    """The RabbitMQ version that `batch_broker` imitates; override it, or parametrize a test."""
    from aio_pika_batch.adapters.memory.rabbitmq import NEWEST

    return NEWEST


@pytest.fixture
def batch_broker(batch_broker_version: str) -> BatchBroker:
    """A new in-memory RabbitMQ for each test."""
    from aio_pika_batch.testing.broker import BatchBroker

    return BatchBroker(batch_broker_version)


@pytest.fixture(scope="session")
def batch_rabbitmq_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    """The RabbitMQ of all tests that use `batch_rabbitmq`, found or started once."""
    from aio_pika_batch.testing.rabbitmq.find import NoBrokerError, choose

    with ExitStack() as running:
        try:
            broker = running.enter_context(choose().start(tmp_path_factory.mktemp("rabbitmq")))
        except NoBrokerError as error:
            why = str(error)
        else:
            why = ""
        if why:  # outside the handler, or the report would show it twice
            if os.environ.get(OPTIONAL):
                pytest.skip(why)
            pytest.fail(f"{why}\n  - set {OPTIONAL}=1 to skip such tests", pytrace=False)
        yield broker


@pytest.fixture
def batch_rabbitmq(batch_rabbitmq_server: RunningBroker) -> Iterator[BatchRabbitMQ]:
    """A real RabbitMQ: its `url`, and unique names."""
    from aio_pika_batch.testing.rabbitmq.fixture import of_one_test

    with of_one_test(batch_rabbitmq_server) as given:
        yield given
