"""A transport whose sessions use AMQP 1.0 keeps the contract."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import pytest

from aio_pika_batch.adapters import rabbitmq
from aio_pika_batch.adapters.rabbitmq import Amqp10Transport
from aio_pika_batch.testing.contract import Features, TransportContract
from tests.integration.helpers import parse_version, skip_without_amqp10
from tests.integration.test_contract import RabbitHarness, features, opened
from tests.support.cluster import Cluster
from tests.support.find import RunningBroker

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def speaks_amqp10(broker: RunningBroker) -> None:
    """The local broker may be an older one; nox brings those that do."""
    skip_without_amqp10(broker)


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also before 4.3 with a delivery limit, where a consumer would use 0-9-1."""
    monkeypatch.setattr(rabbitmq, "queue_obstacle", lambda version, info: None)


@asynccontextmanager
async def opened10(broker: RunningBroker, url: str | None = None) -> AsyncIterator[RabbitHarness]:
    """The same scene, with another transport.

    Args:
        url: The node that is consumed from, if it isn't the broker's.
    """
    async with opened(broker, "fast", "quorum", url) as harness:
        harness.transport = Amqp10Transport(harness.transport._endpoint)
        yield harness


def features10(broker: RunningBroker) -> Features:
    """What can be done over AMQP 1.0."""
    return replace(
        features(broker, "quorum"),
        exclusive_consumers=False,
        exclusive_queues=False,
        has_native=False,
        retries=True,
        delays=parse_version(broker) >= (4, 3),
        confirms_settlements=True,
    )


async def test_the_contract_is_kept(broker: RunningBroker) -> None:
    """All of it but what AMQP 1.0 doesn't have."""
    contract = TransportContract(
        partial(opened10, broker), features10(broker), patience=30, quiet=0.3
    )
    report = await contract.run(at_once=8)
    report.raise_if_broken()
    assert len(report.kept) == len(contract.applicable)


@pytest.mark.long
@pytest.mark.needs_node
@pytest.mark.parametrize("place", ["leader", "follower"])
async def test_the_contract_is_kept_on_three_nodes(
    broker: RunningBroker, tmp_path: Path, place: str
) -> None:
    """Whether the consumer is connected to the node with the queue's leader, or to another."""
    assert broker.node is not None
    with Cluster(broker.node.server, tmp_path) as cluster:
        # A quorum queue's first leader is on the node where it is declared.
        first, second, _ = cluster.nodes
        declaring = RunningBroker(first.url, cluster.version, first)
        contract = TransportContract(
            partial(opened10, declaring, first.url if place == "leader" else second.url),
            features10(broker),
            patience=60,
            quiet=0.5,
        )
        report = await contract.run(at_once=8)
        report.raise_if_broken()
        assert len(report.kept) == len(contract.applicable)
