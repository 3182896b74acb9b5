"""A contract harness for the in-memory broker."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from aio_pika_batch.adapters.memory import Broker, ConnectFault, MemoryTransport, PublishFault
from aio_pika_batch.adapters.memory.rabbitmq import NEWEST
from aio_pika_batch.core.topology import Queue, Topology
from aio_pika_batch.testing.contract import Features, Harness
from aio_pika_batch.transport import Transport, Wire
from tests.unit.adapters.memory.client import Client

ALL = Features(
    keeps_order=True,
    keeps_place=True,
    prefetches=True,
    marks_redelivered=True,
    dead_letters=True,
    returns_unroutable=True,
    refuses_when_full=True,
    has_exchanges=True,
    limits_headers=True,
    carries_properties=True,
    checks_users=True,
    declares=True,
    compares=True,
    exclusive_consumers=True,
    exclusive_queues=True,
    adjusts=True,
    proves=True,
    confirms_settlements=True,
    has_native=True,
    tells_version=True,
    counts_ready=True,
    inspects=True,
    listens=True,
    can_cut=True,
    can_hush=True,
    can_end_subscriptions=True,
    can_lock_out=True,
)
"""What the broker in memory claims for a classic queue."""


class MemoryHarness(Harness):
    """Uses the broker itself, not the transport under test."""

    queue = "q"
    dead_letters = "dead"
    full = "full"

    def __init__(self, broker: Broker, transport: Transport) -> None:
        self.broker = broker
        self.transport = transport

    async def put(self, bodies: Sequence[bytes]) -> None:
        for body in bodies:
            assert self.broker.put(self.queue, body)

    async def count(self, queue: str) -> int | None:
        return len(self.broker.ready(queue)) if queue in self.broker.queues else None

    async def take(self, queue: str) -> list[bytes]:
        client = Client(self.broker, "behind its back")
        client.consume(queue)
        taken = client.deliveries()
        for delivery in taken:
            client.channel.ack(delivery.tag)
        client.connection.close()
        return [delivery.body for delivery in taken]

    async def cut(self) -> None:
        self.broker.cut()

    async def hush(self) -> None:
        self.broker.faults.on_publish(PublishFault.UNCONFIRMED)

    async def end_subscriptions(self) -> None:
        self.broker.cancel_consumers(self.queue)

    async def lock_out(self) -> None:
        self.broker.faults.connect_fault = ConnectFault.UNREACHABLE


@asynccontextmanager
async def opened(
    version: str = NEWEST,
    kind: str = "classic",
    wire: Wire = "auto",
    *,
    around: Callable[[MemoryTransport], Transport] = lambda transport: transport,
) -> AsyncIterator[MemoryHarness]:
    """Open a harness with a new broker; `around` wraps its transport."""
    broker = Broker(version)
    transport = MemoryTransport(broker, wire=wire, publish_timeout=3)
    dead = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": "dead"}
    of_kind = {"x-queue-type": kind}
    # Retries count as deliveries before 4.3, so a limit would prevent that wire.
    no_limit = {"x-delivery-limit": -1} if (version, wire) == ("4.0", "amqp10") else {}
    full = {"x-max-length": 5, "x-overflow": "reject-publish"}
    await transport.declare(
        Topology(
            queues=(
                Queue("q", arguments=of_kind | dead | no_limit),
                Queue("dead", arguments=of_kind),
                Queue("full", arguments=of_kind | full),
            )
        )
    )
    yield MemoryHarness(broker, around(transport))
