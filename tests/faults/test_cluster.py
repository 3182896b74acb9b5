"""Faults of a cluster: a consumer keeps its queue while nodes come and go.

There are three nodes, a quorum queue with a replica on each, and a consumer whose ``url`` names all
of them. Confirmed messages are on two of three nodes, so a single node can't lose them.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import pytest

from tests.faults.conftest import OVER_10
from tests.faults.trial import under_load
from tests.integration.helpers import parse_version, until
from tests.support.cluster import Cluster
from tests.support.find import RunningBroker

if TYPE_CHECKING:
    from aio_pika_batch.testing.rabbitmq.node import RabbitMQ
    from aio_pika_batch.transport import Wire
    from tests.faults.conftest import Run
    from tests.faults.trial import Trial

pytestmark = [
    pytest.mark.needs_node,
    pytest.mark.parametrize("wire", ["fast", OVER_10], indirect=True),
]

KILLS = 6
MESSAGES = 50_000
PAUSE = 15.0
"""Seconds that a node stands still: more than its peers and clients wait for it."""


@pytest.fixture(scope="module")
def members(broker: RunningBroker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of three nodes of the broker's installation."""
    assert broker.node is not None
    with Cluster(broker.node.server, tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
def cluster(members: Cluster) -> Iterator[Cluster]:
    """The cluster with all nodes up, also after the test."""
    yield members
    members.restore()


@pytest.fixture
def run_on_all(cluster: Cluster, name: str, keep_figures: Callable[..., None], wire: Wire) -> Run:
    """``under_load``, for a quorum queue on the cluster."""
    return partial(
        under_load,
        urls=[node.url for node in cluster.nodes],
        url=cluster.url,
        broker=cluster.version,
        name=name,
        keep=keep_figures,
        queue_type="quorum",
        num_workers=3,
        wire=wire,
    )


def describe_recoveries(trial: Trial) -> str:
    """Return how long each recovery took, as a text."""
    seconds = trial.recoveries
    return (
        f"The longest pause after each of {len(seconds)} kills: median"
        f" {statistics.median(seconds):.1f} s, worst {max(seconds):.1f} s."
    )


async def test_repeated_kills_of_the_leader_lose_nothing(run_on_all, cluster, name) -> None:
    """The new leader is killed next, when the last one is back."""
    async with run_on_all(
        "leader killed, cluster of three",
        f"SIGKILL for the node with the queue's leader, {KILLS} times, each time as soon as the"
        f" last killed node had rejoined, while {MESSAGES:,} messages passed.",
        minimum=MESSAGES,
        rate=2500,
    ) as trial:
        for _ in range(KILLS):
            leader = await asyncio.to_thread(cluster.leader_of, name)
            trial.ends()
            leader.kill()
            await trial.flows()
            await asyncio.to_thread(cluster.start)
            await asyncio.to_thread(cluster.wait_for_replicas, name)
            await trial.carries_on()
        trial.remark = describe_recoveries(trial)


@pytest.mark.parametrize("who", ["leader", "follower"])
async def test_a_consumer_leaves_a_paused_node(run_on_all, broker, cluster, name, who) -> None:
    """Connections to it stay open, and nothing answers on them."""
    if parse_version(broker) < (4, 0):
        pytest.skip("before RabbitMQ 4.0 a node that stood still may not find back to its cluster")
    async with run_on_all(
        f"{who} paused, cluster of three",
        f"SIGSTOP for a node with the queue's {who}, and SIGCONT {PAUSE:.0f} s later, while"
        " messages passed through the others.",
    ) as trial:
        leader = await asyncio.to_thread(cluster.leader_of, name)
        victim = leader if who == "leader" else _another(cluster, leader)
        trial.ends()
        victim.pause()
        await asyncio.sleep(PAUSE)
        await trial.flows()  # although it still stands
        victim.resume()
        await asyncio.to_thread(cluster.wait_for_all)
        await asyncio.to_thread(cluster.wait_for_replicas, name)
        await trial.carries_on()


def _another(cluster: Cluster, than: RabbitMQ) -> RabbitMQ:
    return next(node for node in cluster.nodes if node is not than)


async def test_a_cluster_without_a_majority_is_waited_for(run_on_all, cluster, name) -> None:
    """Two of three nodes are gone: nothing is confirmed or lost, and everything goes on when one is
    back.
    """
    async with run_on_all(
        "majority lost, cluster of three",
        "SIGKILL for two of three nodes at once, the queue's leader among them; both were started"
        " again after 5 s.",
    ) as trial:
        leader = await asyncio.to_thread(cluster.leader_of, name)
        victims = [leader, _another(cluster, leader)]
        for victim in victims:
            victim.kill()
        await until(lambda: not trial.consumer.is_healthy, what=trial.consumer.status)
        await asyncio.sleep(5)
        trial.ends()
        await asyncio.to_thread(cluster.start)
        await trial.recovers()
        await asyncio.to_thread(cluster.wait_for_replicas, name)
