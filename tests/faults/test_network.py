"""Faults of the network: black holes, resets, slow lines and lost confirms."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from random import Random
from typing import TYPE_CHECKING

import pytest

from tests.faults.conftest import OVER_091
from tests.support.find import RunningBroker

if TYPE_CHECKING:
    from aio_pika_batch.transport import Wire


@pytest.fixture
def short_broker_heartbeat(broker: RunningBroker, wire: Wire) -> Iterator[None]:
    """Over AMQP 1.0 the broker's own setting says for how long a consumer may be silent."""
    if wire != "amqp10":
        yield
        return
    assert broker.node is not None
    broker.node.eval("application:set_env(rabbit, heartbeat, 2).")
    yield
    broker.node.eval("application:set_env(rabbit, heartbeat, 60).")


RESETS = 15
"""Below the delivery limit of 20 that RabbitMQ 4 has for quorum queues."""


@pytest.mark.parametrize(
    ("direction", "fault", "did"),
    [
        (
            "to_broker",
            "black hole to the broker",
            "Nothing that the consumer sent arrived, while the broker's messages still arrived.",
        ),
        (
            "to_client",
            "black hole to the consumer",
            "Nothing that the broker sent arrived, while acks and copies did.",
        ),
    ],
    ids=["to_broker", "to_client"],
)
@pytest.mark.parametrize(
    "wire",
    [*OVER_091, pytest.param("amqp10", marks=[pytest.mark.long, pytest.mark.needs_node])],
    indirect=True,
)
@pytest.mark.usefixtures("short_broker_heartbeat")
async def test_a_consumer_recovers_from_a_black_hole(
    run, wire, proxy, amqp_url, direction, fault, did
) -> None:
    """Silence reveals it, since the connection stays open."""
    did += " It lasted until the consumer noticed; then the delayed data arrived."
    async with run(fault, did, url=proxy.url(amqp_url), wire=wire) as trial:
        proxy.freeze(direction)
        await trial.suffers()
        proxy.thaw()
        trial.ends()
        await trial.recovers()


@pytest.mark.parametrize(
    ("queue_type", "wire"),
    [
        ("classic", "fast"),
        ("classic", "plain"),
        ("quorum", "fast"),
        pytest.param("quorum", "amqp10", marks=pytest.mark.long),
    ],
    indirect=["wire"],
)
async def test_resets_at_random_bytes_lose_nothing(run, proxy, amqp_url, queue_type, wire) -> None:
    """In either direction, in the middle of a frame or not."""
    chance = Random(5672)
    async with run(
        f"resets, {queue_type} queue",
        f"{RESETS} times, all connections were reset after a random number of bytes, in a random"
        " direction.",
        url=proxy.url(amqp_url),
        wire=wire,
        queue_type=queue_type,
    ) as trial:
        for _ in range(RESETS):
            trial.ends()
            proxy.cut_after(chance.randrange(1, 10_000), chance.choice(["to_broker", "to_client"]))
            # So few acks may be left, each for a whole batch, that as much never comes.
            deadline = asyncio.get_running_loop().call_later(2, proxy.cut)
            await trial.breaks()
            deadline.cancel()
            await trial.recovers()
            await trial.flows(100)


async def test_a_slow_line_is_not_taken_for_a_dead_one(run, wire, proxy, amqp_url) -> None:
    """Messages just take longer."""
    async with run(
        "slow line",
        "For five seconds each way took 0.2 s longer, and let through 1,000 bytes every 20 ms.",
        url=proxy.url(amqp_url),
        wire=wire,
    ) as trial:
        proxy.latency(0.2)
        proxy.trickle(1000, 0.02)
        await asyncio.sleep(5)
        assert [] == trial.record.losses
        proxy.latency(0)
        proxy.trickle(0, 0)
        trial.ends()
        await trial.recovers(only_new=False)


@pytest.mark.parametrize("wire", OVER_091)
async def test_lost_confirms_cause_duplicates_and_no_loss(run, wire, proxy, amqp_url) -> None:
    """The broker has the copies, and their originals come back."""
    async with run(
        "confirms lost",
        "Nothing that the broker sent arrived, while copies did; then the connections were reset,"
        " so their confirms never arrived.",
        url=proxy.url(amqp_url),
        wire=wire,
    ) as trial:
        proxy.freeze("to_client")
        await trial.suffers()
        proxy.cut()
        proxy.thaw()
        trial.ends()
        await trial.recovers()
    assert trial.figures.duplicated
