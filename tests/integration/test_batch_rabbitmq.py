"""The fixture `batch_rabbitmq`: a real RabbitMQ for users' tests, cleared after each test."""

from __future__ import annotations

import asyncio

import aio_pika
import pytest

from aio_pika_batch import PublishError
from aio_pika_batch.testing.rabbitmq.find import RunningBroker
from aio_pika_batch.testing.rabbitmq.fixture import BatchRabbitMQ, of_one_test
from tests.integration.helpers import ready

pytest_plugins = "pytester"

STORY = """
import asyncio

from aio_pika_batch import BatchConsumer, BatchConsumerSettings, MessageResult


class Importer(BatchConsumer):
    async def process_messages(self, messages):
        for message in messages:
            yield MessageResult.ACK if message.body == b"good" else MessageResult.NACK


def test_orders(batch_rabbitmq):
    dead = batch_rabbitmq.name("dead")
    settings = BatchConsumerSettings(
        url=batch_rabbitmq.url,
        queue_name=batch_rabbitmq.name("orders"),
        dead_letter_queue=dead,
        batch_size=2,
    )

    async def scenario():
        async with Importer(settings):
            await batch_rabbitmq.publish(b"good", b"bad", routing_key=settings.queue_name)
            found = []
            while not found:
                found = await batch_rabbitmq.drain(dead)
        return [message.body for message in found]

    assert [b"bad"] == asyncio.run(scenario())
    print("on RabbitMQ", batch_rabbitmq.version, settings.queue_name)
"""


def test_a_users_test_runs_on_a_real_rabbitmq(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, broker: RunningBroker
) -> None:
    """Found like ours, without any other plugin."""
    monkeypatch.setenv("AIO_PIKA_BATCH_TEST_URL", broker.url)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makeini("[pytest]")
    pytester.makepyfile(STORY)

    plugin = "aio_pika_batch.testing.plugin"
    ran = pytester.runpytest_subprocess("-p", plugin, "-p", "no:cacheprovider", "-rP")

    ran.assert_outcomes(passed=1)
    ran.stdout.fnmatch_lines([f"on RabbitMQ {broker.version} orders-*"])


def test_named_queues_and_exchanges_are_deleted_on_a_shared_broker(
    broker: RunningBroker,
) -> None:
    """Queues, exchanges, and the exchange for dead letters."""
    with of_one_test(RunningBroker(broker.url, broker.version)) as given:
        name, other = given.name("orders"), given.name()
        assert name.startswith("orders-")
        assert name != other

        async def declare() -> None:
            async with given.channel() as channel:
                await channel.declare_queue(name, durable=True)
                await channel.declare_exchange(other, durable=True)
                await channel.declare_exchange(f"{name}.dlx", durable=True)

        asyncio.run(declare())

    async def look() -> None:
        assert -1 == await ready(broker.url, name)
        for exchange in (other, f"{name}.dlx"):
            async with await aio_pika.connect(broker.url) as connection:
                channel = await connection.channel()
                with pytest.raises(aio_pika.exceptions.ChannelNotFoundEntity):
                    await channel.get_exchange(exchange)

    asyncio.run(look())


async def test_publishing_to_a_missing_queue_is_an_error(broker: RunningBroker) -> None:
    """It says why, and what to do."""
    given = BatchRabbitMQ(broker)
    with pytest.raises(PublishError, match=r"routing key 'nowhere-.*returned"):
        await given.publish(b"lost", routing_key=given.name("nowhere"))


async def test_a_queue_is_drained_in_order(broker: RunningBroker) -> None:
    """With everything that was published."""
    given = BatchRabbitMQ(broker)
    name = given.name()
    async with given.channel() as channel:
        await channel.declare_queue(name, durable=True)
    await given.publish(b"1", b"2", routing_key=name, headers={"x": 1}, message_id="m")

    found = await given.drain(name)

    assert [b"1", b"2"] == [message.body for message in found]
    assert {(1, "m")} == {(each.headers["x"], each.message_id) for each in found}
    assert [] == await given.drain(name)
    await given.clear()
