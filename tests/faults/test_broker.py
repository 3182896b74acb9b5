"""Faults of the broker: kills, stops and pauses, a memory alarm, and consumer timeouts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping

import pytest

from aio_pika_batch.testing.rabbitmq.node import RabbitMQ
from tests.faults.conftest import OVER_091, OVER_10
from tests.integration.helpers import parse_version, until
from tests.support.find import RunningBroker

pytestmark = pytest.mark.needs_node


@pytest.mark.parametrize("wire", OVER_091)
async def test_a_killed_broker_is_waited_for(run, wire, rabbitmq) -> None:
    """SIGKILL, as in a power failure: confirmed messages are there afterwards."""
    async with run(
        "broker killed, classic queue",
        "SIGKILL to the node, which was started again on its data.",
        wire=wire,
    ) as trial:
        await asyncio.to_thread(rabbitmq.restart)
        trial.ends()
        await trial.recovers()


async def test_quorum_queues_of_a_killed_single_node(run, wire, rabbitmq, broker) -> None:
    """As a single node, RabbitMQ before 4.3 loses all messages in them."""
    if parse_version(broker) < (4, 3):
        pytest.skip(f"RabbitMQ {broker.version} empties the quorum queues of a node that is killed")
    async with run(
        "broker killed, quorum queue",
        "SIGKILL to the node, some seconds after the queue was declared; it was started again on"
        " its data.",
        wire=wire,
        queue_type="quorum",
    ) as trial:
        await asyncio.sleep(5)  # since 4.3 only what was declared a moment before is lost
        await asyncio.to_thread(rabbitmq.restart)
        trial.ends()
        await trial.recovers()


async def test_a_stopped_broker_is_waited_for(run, wire, rabbitmq) -> None:
    """A regular stop, as for an upgrade."""
    async with run(
        "broker stopped, quorum queue",
        "The broker was stopped gracefully, and started again.",
        wire=wire,
        queue_type="quorum",
    ) as trial:
        # A node that has many dead letters to deliver may need a minute.
        await asyncio.to_thread(rabbitmq.rabbitmqctl, "stop_app", timeout=180)
        # Not after the next command: on a busy machine new sessions are there before it ends.
        trial.ends()
        await asyncio.to_thread(rabbitmq.rabbitmqctl, "start_app")
        await trial.recovers()


async def test_a_paused_broker_is_noticed(run, wire, rabbitmq) -> None:
    """Its kernel still accepts connections: only heartbeats reveal it."""
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


@pytest.mark.parametrize("wire", OVER_091)
async def test_requeues_wait_during_a_memory_alarm(run, wire, rabbitmq) -> None:
    """Copies are not accepted, so their originals are not acked; everything else goes on."""
    async with run(
        "memory alarm",
        "The broker accepted no publications until held originals had waited too long for their"
        " copies.",
        wire=wire,
    ) as trial:
        await asyncio.to_thread(rabbitmq.set_memory_alarm, True)
        await until(
            lambda: any(worker.held for worker in trial.consumer.status().workers),
            what=trial.consumer.status,
        )
        await asyncio.to_thread(rabbitmq.set_memory_alarm, False)
        trial.ends()
        await trial.recovers(only_new=False)


@pytest.mark.parametrize("wire", [OVER_10], indirect=True)
async def test_without_copies_a_memory_alarm_stops_no_retries(run, wire, rabbitmq) -> None:
    """Only publishing stops."""
    async with run(
        "memory alarm, AMQP 1.0",
        "The broker accepted no publications until all messages were handled.",
        wire=wire,
    ) as trial:
        await asyncio.to_thread(rabbitmq.set_memory_alarm, True)
        trial.ends()
        trial.load.pause()
        await until(lambda: not trial.unfinished, what=trial.consumer.status)
        assert trial.consumer.is_healthy
        assert not any(worker.held for worker in trial.consumer.status().workers)
        await asyncio.to_thread(rabbitmq.set_memory_alarm, False)
        trial.load.resume()
        trial.ends()
        await trial.recovers(only_new=False)
    assert [] == trial.record.losses


@pytest.fixture
def short_consumer_timeout(
    rabbitmq: RabbitMQ, broker: RunningBroker
) -> Iterator[Mapping[str, int]]:
    """Set the consumer timeout to two seconds; return the consumer arguments for it.

    Since 4.3 the timeout is the consumer's. Before, it is the node's, which by default checks once
    per minute.
    """
    if parse_version(broker) >= (4, 3):
        yield {"x-consumer-timeout": 2000}
        return
    put = "application:set_env(rabbit, consumer_timeout, {}), "
    put += "application:set_env(rabbit, channel_tick_interval, {})."
    rabbitmq.eval(put.format(2000, 1000))
    yield {}
    rabbitmq.eval(put.format(1_800_000, 60_000))


@pytest.mark.parametrize("wire", OVER_091)
async def test_a_consumer_reconnects_after_the_consumer_timeout(
    run, wire, short_consumer_timeout
) -> None:
    """The broker takes its messages back, so the handler's late results are void."""
    async with run(
        "consumer timeout",
        "A handler took eight seconds for a batch, of which the broker waited for two"
        " (`consumer_timeout`). Its worker opened a new session when the handler had ended; the"
        " other worker continued.",
        wire=wire,
        queue_type="quorum",
        consumer_arguments=short_consumer_timeout,
    ) as trial:
        trial.ends()
        trial.consumer.linger(8)
        await trial.breaks()
        await trial.recovers()
    assert trial.figures.duplicated


@pytest.mark.parametrize("wire", [OVER_10], indirect=True)
async def test_a_session_outlives_the_consumer_timeout(run, wire, broker) -> None:
    """Over AMQP 1.0 the broker says which messages it has taken back; only these are repeated."""
    if parse_version(broker) < (4, 3):
        pytest.skip(f"RabbitMQ {broker.version} has no consumer timeout over AMQP 1.0")
    async with run(
        "consumer timeout, AMQP 1.0",
        "A handler took eight seconds for a batch, of which the broker waited for two"
        " (`x-consumer-timeout`). The sessions went on.",
        wire=wire,
        queue_arguments={"x-consumer-timeout": 2000},
    ) as trial:
        trial.ends()
        trial.consumer.linger(8)
        await asyncio.sleep(10)
        await trial.carries_on()
    assert trial.figures.duplicated
    assert [] == trial.record.losses
