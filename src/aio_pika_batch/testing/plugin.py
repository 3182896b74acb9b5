"""Which fixtures does a test get by this library being installed?

pytest loads this module in every run, so it imports next to nothing before a fixture is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from aio_pika_batch.testing.broker import BatchBroker


@pytest.fixture
def batch_broker_version() -> str:
    """The RabbitMQ that `batch_broker` imitates; override it, or parametrize a test with it."""
    from aio_pika_batch.adapters.memory.dialect import NEWEST

    return NEWEST


@pytest.fixture
def batch_broker(batch_broker_version: str) -> BatchBroker:
    """A RabbitMQ in memory, of this test alone."""
    from aio_pika_batch.testing.broker import BatchBroker

    return BatchBroker(batch_broker_version)
