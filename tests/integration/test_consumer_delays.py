"""Delayed retries on RabbitMQ: messages come back in time and unchanged, whatever happens."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import aio_pika
import pytest

from aio_pika_batch import (
    BatchConsumer,
    BatchConsumerSettings,
    MessageResult,
    Requeue,
)
from tests.integration.helpers import (
    HEADERS,
    PROPERTIES,
    QUEUE_TYPES,
    SLACK,
    RawClient,
    holds,
    long,
    pack_properties,
    publish,
    ready,
    unpack_properties,
    unpack_table,
    until,
)

if TYPE_CHECKING:
    from tests.support.find import RunningBroker

SECOND = 1000


def is_old(broker: RunningBroker) -> bool:
    """Return whether the broker may lose waiting messages."""
    return broker.version.startswith("3.8.")


@pytest.fixture
def settings(amqp_url: str, name: str) -> Any:
    """Return a factory of settings; with a short batch_timeout."""

    def make(**given: Any) -> BatchConsumerSettings:
        return BatchConsumerSettings(
            url=amqp_url,
            batch_timeout=0.05,
            **{"queue_name": name} | given,
        )

    return make


class Retrying(BatchConsumer):
    """Requeues each message with the delays in its body, and records when it came.

    A body is ``b"name delay delay …"``; after its delays it is ACKed. A delay of ``-`` means the
    configured one.
    """

    def __init__(self, settings: BatchConsumerSettings, **more: Any) -> None:
        super().__init__(settings, **more)
        self.seen: dict[bytes, list[float]] = {}
        self.last: dict[bytes, Any] = {}
        self.done: Counter[bytes] = Counter()

    async def process_messages(self, messages):
        for message in messages:
            key, *delays = message.body.split()
            self.seen.setdefault(key, []).append(time.monotonic())
            self.last[key] = message
            if message.retry_count >= len(delays):
                self.done[key] += 1
                yield MessageResult.ACK
            else:
                asked = delays[message.retry_count]
                yield MessageResult.REQUEUE if asked == b"-" else Requeue(delay=float(asked))

    def waits(self, key: bytes) -> list[float]:
        """Return how long a message waited each time."""
        times = self.seen[key]
        return [after - before for before, after in pairwise(times)]


# --- in time ----------------------------------------------------------------------------


@QUEUE_TYPES
@pytest.mark.usefixtures("on_both_wires")
async def test_delays_double_and_do_not_hold_up_each_other(
    channel, amqp_url, name, settings, queue_type
) -> None:
    """Half a second, one, two; longer or later delays hold up no other."""
    beside = [b"long%d 2" % each for each in range(20)]
    beside += [b"short%d 0.5 1" % each for each in range(20)]
    consumer = Retrying(settings(queue_type=queue_type, requeue_delay=0.5, requeue_delay_max=20))
    async with consumer:
        await publish(channel, [b"first 20", *beside[::2], b"delay_steps - - -"], routing_key=name)
        await publish(channel, [*beside[1::2], b"first 20"], routing_key=name)
        await until(lambda: len(consumer.done) == 41)
        assert 1 == len(consumer.seen[b"first"]) - 1
        delay_steps = consumer.waits(b"delay_steps")
        for wait, level in zip(delay_steps, (0.5, 1, 2), strict=True):
            # What waits for 20 s holds up nothing.
            assert level <= wait < level + SLACK, delay_steps
        for body in beside:
            key, *delays = body.split()
            for wait, level in zip(consumer.waits(key), map(float, delays), strict=True):
                assert level <= wait + 0.01, (key, consumer.waits(key))
        assert 3 == consumer.last[b"delay_steps"].retry_count
        assert name == consumer.last[b"delay_steps"].original_routing_key
    assert 2 == await ready(amqp_url, f"{name}.retry.20000")


async def test_a_level_is_declared_when_a_handler_needs_it(
    channel, amqp_url, name, settings
) -> None:
    """Not before, and again after its queue was deleted."""
    consumer = Retrying(settings(requeue_delay_max=0.5))
    async with consumer:
        assert -1 == await ready(amqp_url, f"{name}.retry.500")
        await publish(channel, [b"one 0.3"], routing_key=name)
        await until(lambda: consumer.done[b"one"])
        await channel.queue_delete(f"{name}.retry.500")
        await publish(channel, [b"two 0.3"], routing_key=name)
        await until(lambda: consumer.done[b"two"])
    assert 0 == await ready(amqp_url, f"{name}.retry.500")


# --- as it was --------------------------------------------------------------------------


@QUEUE_TYPES
@pytest.mark.parametrize("properties", [PROPERTIES, {}], ids=["all", "none"])
async def test_a_delay_changes_only_a_few_headers(
    amqp_url, name, settings, queue_type, properties
) -> None:
    """Byte for byte; a header keeps the expiration until an undelayed copy."""
    seen = []

    class Twice(BatchConsumer):
        async def process_messages(self, messages):
            for message in messages:
                seen.append((message, message.raw_properties))
                yield (Requeue(delay=0.2), Requeue(), MessageResult.ACK)[message.retry_count]

    consumer = Twice(
        settings(
            queue_type=queue_type,
            requeue_delay_max=0.2,
            exchange_name=f"{name}.x",
            routing_key="k",
        )
    )
    async with consumer, RawClient.connect(amqp_url) as raw:
        await raw.publish("k", pack_properties(properties), b"body", exchange=f"{name}.x")
        await until(lambda: len(seen) == 3)

    for (message, copy), with_expiration in zip(seen[1:], (False, True), strict=True):
        assert (f"{name}.x", "k") == (message.original_exchange, message.original_routing_key)
        assert ("", name) == (message.exchange, message.routing_key)
        found = unpack_properties(copy)
        headers = unpack_table(found.pop("headers"))
        expected = {key: raw for key, raw in properties.items() if key != "headers"}
        if properties and not with_expiration:
            assert b"S" + long(expected.pop("expiration")[1:]) == headers[b"x-original-expiration"]
        else:
            assert b"x-original-expiration" not in headers
        assert expected == found
        if properties:
            assert HEADERS == {key: value for key, value in headers.items() if key in HEADERS}
        death = message.headers["x-death"][0]
        assert (f"{name}.retry.200", "expired") == (death["queue"], death["reason"])


async def test_a_message_that_was_dead_lettered_here_before_comes_back(
    channel, name, settings
) -> None:
    """RabbitMQ before 4.0 would detect a cycle in the `x-death` of a copy, and drop it."""
    death = {"queue": name, "reason": "expired", "count": 1, "exchange": "", "routing-keys": [name]}
    consumer = Retrying(settings(requeue_delay_max=0.2))
    async with consumer:
        await publish(channel, [b"a 0.2 0.2"], routing_key=name, headers={"x-death": [death]})
        await until(lambda: consumer.done[b"a"])


# --- whatever happens ---------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.needs_node
@QUEUE_TYPES
@pytest.mark.parametrize("how", ["killed", "stopped"])
async def test_a_broker_restart_during_a_delay_loses_nothing(
    rabbitmq, amqp_url, name, settings, queue_type, how, broker
) -> None:
    """Waiting and expired messages are there afterwards; with 3.8 that is not guaranteed."""
    if is_old(broker):
        return
    count = 50
    bodies = [b"%d 1" % each for each in range(count)]
    consumer = Retrying(settings(queue_type=queue_type, requeue_delay_max=1))
    async with await aio_pika.connect(amqp_url) as connection:
        channel = await connection.channel()
        async with consumer:
            await publish(channel, bodies, routing_key=name)
            await until(lambda: len(consumer.seen) == count)
    if how == "killed":
        # A node alone knows its new quorum queues again only once it has written down their names.
        await asyncio.to_thread(rabbitmq.eval, "[dets:sync(T) || T <- dets:all()].")
        await asyncio.to_thread(rabbitmq.restart)
    else:
        await asyncio.to_thread(rabbitmq.rabbitmqctl, "stop_app")
        await asyncio.to_thread(rabbitmq.rabbitmqctl, "start_app")
    async with consumer:
        await until(lambda: len(consumer.done) == count)
    assert {1} == {message.retry_count for message in consumer.last.values()}
    await holds(amqp_url, name, 0)


@pytest.mark.needs_node
@QUEUE_TYPES
async def test_a_message_that_expires_into_a_full_queue_is_kept(
    rabbitmq, channel, amqp_url, name, settings, queue_type, broker
) -> None:
    """The broker retries every three minutes, here every second; only 3.8 would lose it."""
    if is_old(broker):
        return
    setting = "application:set_env(rabbit, dead_letter_worker_publisher_confirm_timeout, {})."
    await asyncio.to_thread(rabbitmq.eval, setting.format(SECOND))
    full = {"x-max-length": 3, "x-overflow": "reject-publish"}
    made = settings(queue_type=queue_type, queue_arguments=full, requeue_delay_max=0.5)
    first = Retrying(made)
    waited = [b"%d 0.5" % each for each in range(3)]
    async with first:
        await publish(channel, waited, routing_key=name)
        await holds(amqp_url, f"{name}.retry.500", 3)
    stuffing = 0
    while True:
        try:
            await publish(channel, [b"stuffing"], routing_key=name)
        except aio_pika.exceptions.DeliveryError:
            break
        stuffing += 1
    # What expires is out of the wait queue's count, and not in the full queue's.
    await holds(amqp_url, f"{name}.retry.500", 0)
    assert stuffing == await ready(amqp_url, name)
    second = Retrying(made)
    async with second:
        await until(lambda: len(second.done) == 1 + len(waited))
    assert {b"0", b"1", b"2", b"stuffing"} == second.done.keys()
    await asyncio.to_thread(rabbitmq.eval, setting.format(180 * SECOND))


async def test_an_exclusive_queue_gets_delayed_messages_back(
    channel, amqp_url, name, settings
) -> None:
    """As long as it exists."""
    consumer = Retrying(settings(queue_exclusive=True, requeue_delay_max=0.3))
    async with consumer:
        await publish(channel, [b"a 0.3 0.3"], routing_key=name)
        await until(lambda: consumer.done[b"a"])


# --- whose queues they are -------------------------------------------------------------------


async def test_instead_of_a_wait_queue_with_other_arguments_the_consumer_holds_retries(
    channel, amqp_url, name, settings, caplog
) -> None:
    """The log says why, and what to do."""
    await channel.declare_queue(f"{name}.retry.1000", durable=True)
    async with Retrying(settings(requeue_delay=1)) as consumer:
        await publish(channel, [b"a -"], routing_key=name)
        await until(lambda: consumer.done[b"a"])
        assert 1 <= consumer.waits(b"a")[0] < 2.5
    [line] = [each for each in caplog.messages if "delay queues can't be used" in each]
    for words in (f"queue '{name}.retry.1000'", "inequivalent arg", "let the queue run empty"):
        assert words in line


async def test_without_declaring_the_wait_queues_are_used_if_they_exist(
    channel, amqp_url, name, settings, caplog
) -> None:
    """Otherwise the consumer holds the retries."""
    await channel.declare_queue(name, durable=True)
    given = settings(requeue_delay=0.2, max_requeue_attempts=1, declare=False)
    async with Retrying(given) as holding:
        await publish(channel, [b"a -"], routing_key=name)
        await until(lambda: holding.done[b"a"])
    [line] = [each for each in caplog.messages if "delay queues can't be used" in each]
    assert f"queue '{name}.retry.200'" in line
    consumer = Retrying(given)
    arguments = {
        "x-message-ttl": 200,
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": name,
    }
    await channel.declare_queue(f"{name}.retry.200", durable=True, arguments=arguments)
    async with consumer:
        await publish(channel, [b"a -"], routing_key=name)
        await until(lambda: consumer.done[b"a"])


async def test_without_declaring_a_handlers_missing_level_is_held(
    channel, amqp_url, name, settings, caplog
) -> None:
    """Its message is retried in time; the log says what is missing."""
    await channel.declare_queue(name, durable=True)
    async with Retrying(settings(declare=False, requeue_delay_max=0.2)) as consumer:
        await publish(channel, [b"a 0.2"], routing_key=name)
        await until(lambda: consumer.done[b"a"])
        assert 0.2 <= consumer.waits(b"a")[0] < 1.7
    assert f"{name}.retry.200" in caplog.text
    assert 1 == consumer.last[b"a"].retry_count


# --- how old the broker is ----------------------------------------------------------------------


async def test_on_a_broker_that_may_lose_waiting_messages_retries_are_held(
    channel, amqp_url, name, settings, broker, caplog
) -> None:
    """Before 3.10; a newer broker keeps them in wait queues. Either way they are delayed."""
    async with Retrying(settings(requeue_delay=1)) as consumer:
        await publish(channel, [b"a -"], routing_key=name)
        await until(lambda: consumer.done[b"a"])
        assert 1 <= consumer.waits(b"a")[0] < 2.5
    expected = f"RabbitMQ {broker.version} may lose" if is_old(broker) else None
    held = [each for each in caplog.messages if "delay queues can't be used" in each]
    assert [True] * len(held) == [expected in each for each in held]
    assert bool(held) is is_old(broker)


async def test_by_default_retries_are_held_and_nothing_is_declared(
    channel, amqp_url, name, settings
) -> None:
    """One second, then two."""
    async with Retrying(settings(requeue_delay=None)) as consumer:
        await publish(channel, [b"a - -"], routing_key=name)
        await until(lambda: consumer.done[b"a"])
        first, second = consumer.waits(b"a")
    assert 1 <= first < 2.5
    assert 2 <= second < 3.5
    assert 2 == consumer.last[b"a"].retry_count
