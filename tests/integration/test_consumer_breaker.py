"""The circuit breaker on RabbitMQ: a consumer waits out an outage."""

from __future__ import annotations

from collections import Counter

import pytest

from aio_pika_batch import BatchConsumer, BatchConsumerSettings, MessageResult, WorkerState
from tests.integration.helpers import (
    QUEUE_TYPES,
    Recorder,
    consumers,
    holds,
    parse_version,
    publish,
    ready,
    take_all,
    until,
)


class Dependent(BatchConsumer):
    """Works while its service is up."""

    def __init__(self, settings, **more) -> None:
        super().__init__(settings, **more)
        self.is_up = False
        self.sizes: list[int] = []
        self.done: Counter[bytes] = Counter()
        self.delivery_counts: Counter[object] = Counter()

    async def process_messages(self, messages):
        self.sizes.append(len(messages))
        if not self.is_up:
            raise ConnectionError("the service is down")
        for message in messages:
            self.done[message.body] += 1
            self.delivery_counts[message.delivery_count] += not message.retry_count
            yield MessageResult.ACK


def settings_for(url, queue, queue_type, **more) -> BatchConsumerSettings:
    """Return settings that pause for a second once half of the messages fail."""
    given = {
        "url": url,
        "queue_name": queue,
        "queue_type": queue_type,
        "batch_size": 20,
        "batch_timeout": 0.05,
        "prefetch_count": 100,
        "max_requeue_attempts": 100,
        "breaker_threshold": 0.5,
        "breaker_pause": 1.0,
        "breaker_pause_max": 1.0,
    }
    return BatchConsumerSettings(**given | more)


@pytest.mark.usefixtures("on_both_wires")
@QUEUE_TYPES
async def test_an_outage_is_waited_out(channel, amqp_url, name, queue_type, broker) -> None:
    """The buffer goes back, nothing is consumed, single messages probe, and all are handled."""
    recorder = Recorder()
    # On a busy machine the first batch may need longer to arrive than the others' tests allow.
    settings = settings_for(amqp_url, name, queue_type, batch_timeout=2.0)
    consumer = Dependent(settings, observers=[recorder])
    bodies = [b"%d" % each for each in range(200)]
    async with consumer:
        await consumer.stop()
        await publish(channel, bodies, routing_key=name)
        await consumer.start()

        async def is_paused() -> bool:
            # On a busy machine a look at the queue may take longer than one pause.
            seen = list(recorder.breaker)
            state = consumer.status().workers[0].state
            look = await ready(amqp_url, name), await consumers(amqp_url, name)
            return (200, 0, WorkerState.PAUSED) == (*look, state) and seen == recorder.breaker

        await until(is_paused, what=consumer.status)
        assert consumer.is_healthy
        await until(lambda: len(recorder.breaker) >= 3)
        await until(is_paused, what=consumer.status)
        assert consumer.is_healthy

        consumer.is_up = True
        await until(lambda: len(consumer.done) == 200, what=consumer.status)
        await until(lambda: consumer.status().workers[0].state is WorkerState.CONSUMING)
        probes = recorder.breaker.count("probing")
        assert [*["opened", "probing"] * probes, "closed"] == recorder.breaker
        assert [20, *[1] * probes] == consumer.sizes[: 1 + probes]
        assert [] == recorder.losses
    assert dict.fromkeys(bodies, 1) == consumer.done
    assert 0 == await ready(amqp_url, name)
    if queue_type == "quorum" and parse_version(broker) >= (4, 3):
        # Returned twice, and no delivery spent by it.
        assert {None} == {count for count, times in consumer.delivery_counts.items() if times}


async def test_a_stop_during_a_pause_is_prompt_and_loses_nothing(channel, amqp_url, name) -> None:
    """All messages stay in the queue for the next consumer."""
    consumer = Dependent(
        settings_for(
            amqp_url, name, "quorum", breaker_pause=60.0, breaker_pause_max=60.0, shutdown_timeout=5
        )
    )
    bodies = [b"%d" % each for each in range(50)]
    async with consumer:
        await publish(channel, bodies, routing_key=name)
        await until(lambda: consumer.status().workers[0].state is WorkerState.PAUSED)
        await holds(amqp_url, name, 50)
    left = await take_all(channel, name, 50)
    assert set(bodies) == {each.body for each in left}
    assert 50 == len(left)


async def test_a_probe_whose_connection_is_cut_is_repeated(channel, amqp_url, name, proxy) -> None:
    """Nothing is lost, and consuming goes on."""
    recorder = Recorder()
    consumer = Dependent(
        settings_for(proxy.url(amqp_url), name, "classic", reconnect_delay=0.05),
        observers=[recorder],
    )
    bodies = [b"%d" % each for each in range(60)]
    async with consumer:
        await publish(channel, bodies, routing_key=name)
        await until(lambda: recorder.breaker[-1:] == ["probing"])
        proxy.cut()
        consumer.is_up = True
        await until(lambda: len(consumer.done) == 60, what=consumer.status)
        await until(lambda: consumer.status().workers[0].state is WorkerState.CONSUMING)
    assert 0 == await ready(amqp_url, name)
