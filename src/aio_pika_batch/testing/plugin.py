"""Which fixtures does a test get by this library being installed?

pytest loads this module in every run, so it imports next to nothing before a fixture is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from aio_pika_batch.testing.broker import BatchBroker
    from aio_pika_batch.testing.rabbitmq.find import Broker
    from aio_pika_batch.testing.rabbitmq.fixture import BatchRabbitMQ

OPTIONAL = "AIO_PIKA_BATCH_TEST_OPTIONAL"
"""Where it is set, tests for which there is no RabbitMQ are skipped. Else they fail: a test that is
skipped for want of a broker looks just like one that has passed.
"""


@pytest.fixture
def batch_broker_version() -> str:
    """The RabbitMQ that `batch_broker` imitates; override it, or parametrize a test with it."""
    from aio_pika_batch.adapters.memory.versions import NEWEST

    return NEWEST


@pytest.fixture
def batch_broker(batch_broker_version: str) -> BatchBroker:
    """A RabbitMQ in memory, of this test alone."""
    from aio_pika_batch.testing.broker import BatchBroker

    return BatchBroker(batch_broker_version)


@pytest.fixture(scope="session")
def batch_rabbitmq_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """The RabbitMQ of all tests that ask for `batch_rabbitmq`, found or started once."""
    from aio_pika_batch.testing.rabbitmq.find import NoBrokerError, choose

    with ExitStack() as running:
        try:
            broker = running.enter_context(choose().take(tmp_path_factory.mktemp("rabbitmq")))
        except NoBrokerError as error:
            why = str(error)
        else:
            why = ""
        if why:  # outside the handler, or the report would tell it twice
            if os.environ.get(OPTIONAL):
                pytest.skip(why)
            pytest.fail(f"{why}\n  - set {OPTIONAL}=1 to skip such tests", pytrace=False)
        yield broker


@pytest.fixture
def batch_rabbitmq(batch_rabbitmq_server: Broker) -> Iterator[BatchRabbitMQ]:
    """A real RabbitMQ: its `url`, and names that no other test uses."""
    from aio_pika_batch.testing.rabbitmq.fixture import of_one_test

    with of_one_test(batch_rabbitmq_server) as given:
        yield given
