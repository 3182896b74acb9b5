"""What operators do to a running consumer: stop it, close its connections, delete its queue.

These tests are fast enough to run with all others.
"""

from __future__ import annotations

import asyncio

import pytest

pytestmark = pytest.mark.needs_node


async def test_a_graceful_stop_under_load_duplicates_nothing(run, wire) -> None:
    """Stopped and started again, while messages come and are requeued."""
    async with run(
        "graceful stop",
        "The consumer was stopped under load, and started again, five times.",
        wire=wire,
        # A confirm that is late on a busy machine would be a duplicate, with no fault at all.
        publish_timeout=30.0,
    ) as trial:
        for _ in range(5):
            await trial.consumer.stop()
            trial.ends()
            await trial.consumer.start()
            await trial.recovers(only_new=False)  # a stop settles everything
            await trial.flows()
    assert 0 == trial.figures.duplicated


async def test_a_consumer_reconnects_after_an_operator_closes_all_connections(
    run, wire, rabbitmq
) -> None:
    """The consumer's, its publisher's and all others."""
    async with run(
        "connections closed",
        "An operator closed all connections, with `rabbitmqctl`.",
        wire=wire,
    ) as trial:
        trial.ends()
        await asyncio.to_thread(rabbitmq.close_all_connections, "maintenance")
        await trial.breaks()
        await trial.recovers()


async def test_a_queue_that_is_deleted_is_declared_again(run, wire, channel, name) -> None:
    """It is empty when it is deleted: its messages would be lost with it."""
    async with run(
        "queue deleted",
        "The queue was deleted in a moment when it was empty, and the consumer declared it again.",
        wire=wire,
    ) as trial:
        await trial.rests()
        trial.ends()
        await channel.queue_delete(name)
        trial.load.resume()
        await trial.breaks()
        await trial.recovers()
