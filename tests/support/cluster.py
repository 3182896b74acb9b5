"""A private cluster of three RabbitMQ nodes, which can be killed and paused one by one.

The nodes share a port mapper and a cookie, and find each other by a list in their configuration.
Everything else is as with a single node. A node without a majority pauses, as RabbitMQ recommends.

All methods block, as those of a single node.
"""

from __future__ import annotations

import json
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Self

from aio_pika_batch.testing.rabbitmq.node import Epmd, RabbitMQ
from aio_pika_batch.testing.rabbitmq.processes import LOCALHOST

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

SIZE = 3

_JOIN_TIMEOUT = 120  # seconds; an idle machine needs 4 to 26, more the older the broker
_NAMES = [f"r{number}" for number in range(1, SIZE + 1)]
_CONF = [
    "cluster_name = private",
    "cluster_formation.peer_discovery_backend = classic_config",
    *(
        f"cluster_formation.classic_config.nodes.{number} = {name}@localhost"
        for number, name in enumerate(_NAMES, start=1)
    ),
    "cluster_partition_handling = pause_minority",
]


class Cluster:
    """Three private nodes.

    Args:
        server: The start script of an installation, as for one node.
        folder: An empty folder for all that the nodes write.
        conf: Further lines of each ``rabbitmq.conf``.

    Attributes:
        nodes: All of them, whether they run or not.
    """

    def __init__(self, server: Path, folder: Path, *, conf: Sequence[str] = ()) -> None:
        self._epmd = Epmd(server)
        self.nodes = tuple(
            RabbitMQ(server, folder / name, conf=[*_CONF, *conf], name=name, epmd=self._epmd)
            for name in _NAMES
        )

    @property
    def url(self) -> str:
        """A URL that names all nodes."""
        hosts = ",".join(f"{LOCALHOST}:{node.port}" for node in self.nodes)
        return f"amqp://guest:guest@{hosts}/"

    @property
    def version(self) -> str:
        """The nodes' version."""
        return self.nodes[0].version

    def start(self) -> None:
        """Start all stopped nodes at the same time, and wait until they form the cluster."""
        self._epmd.start()  # once, before all of them would
        self._at_once(RabbitMQ.start, [node for node in self.nodes if not node.is_running])
        self.wait_for_all()

    def wait_for_all(self) -> None:
        """Wait until each node sees all others running."""
        _wait(lambda: all(map(self._sees_all, self.nodes)), "the nodes did not become one cluster")

    def replicas(self, queue: str, *, seen_by: RabbitMQ) -> dict[str, str]:
        """Return what each replica of a quorum queue is, such as ``leader``, by its node's name.

        Raises:
            RuntimeError: The node cannot tell just now.
        """
        told = json.loads(seen_by.queues("quorum_status", queue, "--formatter", "json"))
        return {row["Node Name"]: row["Raft State"] for row in told}

    def leader_of(self, queue: str) -> RabbitMQ:
        """Return the running node with the leader of a quorum queue, as soon as there is one."""
        running = [node for node in self.nodes if node.is_running]
        found: list[RabbitMQ] = []

        def look() -> bool:
            states = self.replicas(queue, seen_by=running[0])
            found.extend(node for node in running if states.get(node.name) == "leader")
            return bool(found)

        _wait(look, f"{queue} got no leader")
        return found[0]

    def wait_for_replicas(self, queue: str) -> None:
        """Wait until a quorum queue has a leader, and followers on all other nodes."""

        def look() -> bool:
            states = self.replicas(queue, seen_by=self.nodes[0])
            return sorted(states.values()) == ["follower"] * (SIZE - 1) + ["leader"]

        _wait(look, f"{queue} is not on all nodes")

    def restore(self) -> None:
        """Start or continue all nodes."""
        for node in self.nodes:
            if node.is_running:
                node.resume()
        self.start()

    def close(self) -> None:
        """Kill all nodes for good; the caller removes their folders."""
        for node in self.nodes:
            node.close()
        self._epmd.close()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _sees_all(self, node: RabbitMQ) -> bool:
        told = json.loads(node.rabbitmqctl("cluster_status", "--formatter", "json"))
        return len(told["running_nodes"]) == SIZE

    @staticmethod
    def _at_once(do: Callable[[RabbitMQ], None], nodes: Iterable[RabbitMQ]) -> None:
        with ThreadPoolExecutor(SIZE) as pool:
            for done in [pool.submit(do, node) for node in nodes]:
                done.result()


def _wait(look: Callable[[], bool], otherwise: str) -> None:
    """Call *look* until it returns true; a node that cannot answer yet counts as false."""
    deadline = time.monotonic() + _JOIN_TIMEOUT
    last: Exception | None = None
    while time.monotonic() < deadline:
        try:
            if look():
                return
        except (RuntimeError, ValueError, subprocess.TimeoutExpired) as error:
            last = error
        time.sleep(0.1)
    raise RuntimeError(f"{otherwise} within {_JOIN_TIMEOUT} s") from last
