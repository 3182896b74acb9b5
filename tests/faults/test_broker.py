"""What a broker can do: die, stand still, run out of memory, lose patience."""

from __future__ import annotations

import asyncio

import pytest

from tests.integration.helpers import until

pytestmark = pytest.mark.needs_node


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
async def test_a_broker_that_is_killed_is_waited_for(run, wire, rabbitmq, queue_type) -> None:
    """SIGKILL, as in a power cut: what was confirmed is there afterwards."""
    async with run(
        f"broker killed, {queue_type} queue",
        "SIGKILL to the node, which was started again on its data.",
        wire=wire,
        queue_type=queue_type,
    ) as trial:
        await asyncio.to_thread(rabbitmq.restart)
        trial.ends()
        await trial.recovers()


async def test_a_broker_that_stands_still_is_noticed(run, wire, rabbitmq) -> None:
    """Its kernel goes on taking connections: only heartbeats tell."""
    async with run(
        "broker paused",
        "SIGSTOP to the node until the consumer had noticed, then SIGCONT.",
        wire=wire,
    ) as trial:
        rabbitmq.pause()
        await trial.suffers()
        rabbitmq.resume()
        trial.ends()
        await trial.recovers()


async def test_a_memory_alarm_holds_what_is_requeued(run, wire, rabbitmq) -> None:
    """Copies are not taken, and their originals are not acked; everything else goes on."""
    async with run(
        "memory alarm",
        "The broker took no publications until originals had been held in vain for their copies.",
        wire=wire,
    ) as trial:
        await asyncio.to_thread(rabbitmq.set_memory_alarm, True)
        await until(
            lambda: any(worker.held for worker in trial.consumer.status().workers),
            what=trial.consumer.status,
        )
        await asyncio.to_thread(rabbitmq.set_memory_alarm, False)
        trial.ends()
        await trial.recovers(anew=False)
