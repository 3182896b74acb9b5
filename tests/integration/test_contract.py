"""The RabbitMQ adapter keeps the contract, on either wire and with either type of queue."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import aio_pika
import pytest
from aiormq.exceptions import ChannelLockedResource

from aio_pika_batch.adapters.rabbitmq import AioPikaTransport
from aio_pika_batch.testing.contract import Features, Harness, TransportContract
from aio_pika_batch.transport import Endpoint, Wire
from tests.integration.helpers import PATIENCE, parse_version, ready, until
from tests.support.proxy import TcpProxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from aio_pika.abc import AbstractChannel

    from tests.support.find import RunningBroker

CLASSIC = Features(
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
    pumps=True,
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


def features(broker: RunningBroker, kind: str) -> Features:
    """Return what this broker can do with this type of queue."""
    if kind == "classic":
        return CLASSIC
    version = parse_version(broker)
    return replace(
        CLASSIC,
        counts_deliveries=True,
        exclusive_consumers=False,
        # Without a delivery limit, what is given back goes to the end of the queue.
        keeps_place=version >= (4, 0),
        spares_returns=version >= (4, 3),
    )


class RabbitHarness(Harness):
    """A real broker through aio-pika, and a proxy that can be cut."""

    def __init__(
        self, url: str, proxy: TcpProxy, channel: AbstractChannel, wire: Wire, prefix: str
    ) -> None:
        self.transport = AioPikaTransport(
            Endpoint(url=proxy.url(url), wire=wire, publish_timeout=5)
        )
        self.queue = prefix
        self.fresh = f"{prefix}-fresh"
        self.dead_letters = f"{prefix}-dead"
        self.full = f"{prefix}-full"
        self._url = url
        self._proxy = proxy
        self._channel = channel

    async def declare(self, kind: str) -> None:
        """Declare the queues."""
        of_kind = {"x-queue-type": kind}
        dead = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": self.dead_letters}
        full = {"x-max-length": 5, "x-overflow": "reject-publish"}
        for queue, arguments in ((self.queue, dead), (self.dead_letters, {}), (self.full, full)):
            await self._channel.declare_queue(queue, durable=True, arguments=of_kind | arguments)

    async def delete(self) -> None:
        """Delete the queues."""
        for queue in (self.queue, self.fresh, self.dead_letters, self.full):
            await self._channel.queue_delete(queue)

    async def put(self, bodies: Sequence[bytes]) -> None:
        await asyncio.gather(
            *(
                self._channel.default_exchange.publish(aio_pika.Message(body), self.queue)
                for body in bodies
            )
        )

    async def count(self, queue: str) -> int | None:
        try:
            found = await ready(self._url, queue)
        except ChannelLockedResource:
            # Another connection's own, which is about to go.
            return 0
        return None if found < 0 else found

    async def take(self, queue: str) -> list[bytes]:
        source = await self._channel.get_queue(queue, ensure=False)
        taken: list[bytes] = []

        async def empty() -> bool:
            while (message := await source.get(no_ack=True, fail=False)) is not None:
                taken.append(message.body)
            return await self.count(queue) == 0

        await until(empty)
        return taken

    async def cut(self) -> None:
        self._proxy.cut()
        self._proxy.thaw()

    async def hush(self) -> None:
        self._proxy.freeze("to_client")

    async def end_subscriptions(self) -> None:
        await self._channel.queue_delete(self.queue)

    async def lock_out(self) -> None:
        await self._proxy.refuse()


@asynccontextmanager
async def opened(
    broker: RunningBroker, wire: Wire, kind: str, url: str | None = None
) -> AsyncIterator[RabbitHarness]:
    """Open new queues and a new proxy.

    Args:
        url: Where the transport connects, if it isn't the broker that the queues are declared on.
    """
    where = aio_pika.connection.make_url(url or broker.url)
    async with (
        await aio_pika.connect(broker.url) as connection,
        TcpProxy(where.host or "localhost", where.port or 5672) as proxy,
    ):
        channel = await connection.channel()
        prefix = f"contract-{uuid.uuid4().hex[:12]}"
        harness = RabbitHarness(broker.url, proxy, channel, wire, prefix)
        await harness.declare(kind)
        try:
            yield harness
        finally:
            await harness.delete()


@pytest.mark.parametrize(
    ("wire", "kind"),
    [
        ("fast", "classic"),
        ("fast", "quorum"),
        pytest.param("plain", "classic", marks=pytest.mark.long),
        pytest.param("plain", "quorum", marks=pytest.mark.long),
    ],
)
async def test_the_contract_is_kept(broker: RunningBroker, wire: Wire, kind: str) -> None:
    """All clauses concurrently, since most of the time is waiting."""
    contract = TransportContract(
        partial(opened, broker, wire, kind),
        features(broker, kind),
        # Only a failure takes it, and a busy machine is none.
        patience=PATIENCE,
        quiet=0.3,
    )
    report = await contract.run(at_once=8)
    report.raise_if_broken()
    assert len(report.kept) == len(contract.applicable)
