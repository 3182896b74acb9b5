"""What quorum queues count as failed deliveries, by version.

`tests/integration/test_consumer_limits.py` tests the same on real brokers.
"""

from __future__ import annotations

import asyncio

import pytest

from tests.unit.shell.helpers import (
    REQUEUE_IMMEDIATE,
    QueueBroker,
    RecordingConsumer,
    ack,
    answering,
    first_then,
    numbered,
    taking,
)

VERSIONS = ["3.8", "3.10", "4.0", "4.3"]
SPENT = {"3.8": True, "3.10": True, "4.0": True, "4.3": False}
"""Whether what was not started has spent a delivery."""


def quorum(rabbit, answer, *, limit=None, **given):
    """Return a consumer of a quorum queue, with dead letters in `dead`."""
    arguments = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": "dead"}
    if limit is not None:
        arguments["x-delivery-limit"] = limit
    rabbit.declare("dead")
    rabbit.declare(**arguments | {"x-queue-type": "quorum"})
    return RecordingConsumer(
        answer,
        transport=rabbit.transport,
        queue_type="quorum",
        queue_arguments=arguments,
        **{"batch_size": 1, "reconnect_delay": 0.1} | given,
    )


@pytest.mark.parametrize("version", VERSIONS)
async def test_failures_count_until_the_delivery_limit(version):
    """After one delivery more than the limit, the message is dead-lettered."""
    rabbit = QueueBroker(version)
    async with quorum(rabbit, answering(REQUEUE_IMMEDIATE), limit=3) as consumer:
        rabbit.put(b"poison")
        await asyncio.sleep(60)
    assert [b"poison"] * 4 == consumer.handled
    assert [b"poison"] == rabbit.waiting("dead")


@pytest.mark.parametrize("version", ["3.10", "4.0", "4.3"])
async def test_a_message_that_is_always_requeued_at_once_has_no_attempts_left_in_the_end(version):
    """Each sixth time counts as a retry, so the broker's own limit, if there is one, never acts."""
    rabbit = QueueBroker(version)
    async with quorum(rabbit, taking(1, answering(REQUEUE_IMMEDIATE))) as consumer:
        rabbit.put(b"poison")
        await asyncio.sleep(98.5)
    assert 4 * 6 == len(consumer.handled)
    [letter] = rabbit.drain("dead")
    assert "exhausted" == letter.properties.headers["x-dead-letter-reason"]


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_lost_connection_counts_for_all_prefetched_messages(version):
    """The broker can't know which of them caused it."""
    rabbit = QueueBroker(version)
    async with quorum(rabbit, taking(5), limit=1, prefetch_count=5):
        rabbit.put(*numbered(5))
        for _ in range(2):
            await asyncio.sleep(1)
            rabbit.broker.cut()
        await asyncio.sleep(60)
    assert numbered(5) == sorted(rabbit.waiting("dead"))


@pytest.mark.parametrize("version", VERSIONS)
async def test_drains_never_bring_a_message_to_the_limit(version):
    """Each drain finishes one message and returns the others. Before one is returned once too
    often, a copy takes its place.
    """
    rabbit = QueueBroker(version)
    for turn in range(3):
        async with quorum(rabbit, taking(1), limit=2, prefetch_count=10):
            if not turn:
                rabbit.put(*numbered(5))
            await asyncio.sleep(0.5)
    assert [] == rabbit.waiting("dead")
    assert numbered(2, 3) == sorted(rabbit.waiting())


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_breaker_pause_counts_no_delivery_on_newer_brokers(version, jitter):
    """Messages that the breaker returns have not failed, however often they come."""
    rabbit = QueueBroker(version)
    consumer = quorum(
        rabbit,
        first_then(answering(*[REQUEUE_IMMEDIATE] * 2), ack),
        batch_size=2,
        prefetch_count=10,
        breaker_threshold=1.0,
        breaker_min_samples=2,
        breaker_pause=10,
    )
    async with consumer:
        rabbit.put(*numbered(6))
        await asyncio.sleep(60)
    counts = {each.body: each.delivery_count or 0 for each in consumer.messages[2:]}
    assert all(counts.pop(failed) >= 1 for failed in (b"0", b"1"))
    assert dict.fromkeys(numbered(4, 2), 1 if SPENT[version] else 0) == counts
