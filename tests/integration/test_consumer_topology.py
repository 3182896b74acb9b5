"""What a consumer declares, accepts and refuses, and where dead letters go, on a real broker."""

from __future__ import annotations

import asyncio
import logging
import shlex

import aio_pika
import pytest
from yarl import URL

from aio_pika_batch import (
    BatchConsumer,
    BatchConsumerSettings,
    MessageResult,
    TopologyError,
)
from aio_pika_batch.adapters.rabbitmq import open_transport
from aio_pika_batch.dead_letters import look
from aio_pika_batch.transport import Endpoint
from tests.integration.helpers import (
    PATIENCE,
    declare_dead_letters,
    holds,
    parse_version,
    publish,
    ready,
    take_all,
    until,
)


class Answering(BatchConsumer):
    """Rejects each message, unless `answer` is changed."""

    answer = MessageResult.NACK

    def __init__(self, amqp_url, name, **given):
        usual = {"batch_timeout": 0.05, "batch_size": 1, "reconnect_delay": 0.1, "requeue_delay": 0}
        super().__init__(BatchConsumerSettings(url=amqp_url, queue_name=name, **usual | given))

    async def process_messages(self, messages):
        for _ in messages:
            yield self.answer


class Busy(BatchConsumer):
    """Takes one message, and does not let go of it."""

    async def process_messages(self, messages):
        await asyncio.sleep(3600)
        yield MessageResult.ACK


async def refused(consumer) -> str:
    """The text of the error with which the start is refused."""
    with pytest.raises(TopologyError) as caught:
        await asyncio.wait_for(consumer.start(), PATIENCE)
    return str(caught.value)


# --- where dead letters go -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["direct", "topic"])
async def test_an_existing_dead_letter_exchange_is_bound_by_its_type(
    channel, amqp_url, name, kind
) -> None:
    """Each service gets its own dead letters, although both have the same routing keys."""
    await channel.declare_exchange(f"{name}.shared", kind, durable=True)
    hotel, flight = (
        Answering(
            amqp_url,
            f"{name}.{each}",
            exchange_name=f"{name}.trips",
            exchange_type="topic",
            routing_key="trip.#",
            dead_letter_exchange=f"{name}.shared",
            dead_letter_queue=f"{name}.{each}.dead",
        )
        for each in ("hotel", "flight")
    )
    async with hotel, flight:
        await publish(channel, [b"both"], exchange=f"{name}.trips", routing_key="trip.booked")
        await publish(channel, [b"hotel"], routing_key=f"{name}.hotel")
        await holds(amqp_url, f"{name}.hotel.dead", 2)
        await holds(amqp_url, f"{name}.flight.dead", 1)
    letters = await take_all(channel, f"{name}.hotel.dead", 2)
    assert {b"both", b"hotel"} == {each.body for each in letters}
    [letter] = await take_all(channel, f"{name}.flight.dead", 1)
    assert "trip.booked" == letter.headers["x-original-routing-key"]


@pytest.mark.parametrize("kind", ["fanout", "headers"])
async def test_an_exchange_that_copies_dead_letters_to_all_queues_is_refused(
    channel, amqp_url, name, kind
) -> None:
    """Unless its name says that it is the consumer's own. Nothing is declared before the error."""
    await channel.declare_exchange(f"{name}.shared", kind, durable=True)
    shared = {"dead_letter_exchange": f"{name}.shared", "dead_letter_queue": f"{name}.dead"}
    text = await refused(Answering(amqp_url, f"{name}.jobs", **shared))
    assert "also to those of other services" in text
    assert -1 == await ready(amqp_url, f"{name}.jobs")
    await channel.declare_exchange(f"{name}.jobs.failed", kind, durable=True)
    shared["dead_letter_exchange"] = f"{name}.jobs.failed"
    async with Answering(amqp_url, f"{name}.jobs", **shared):
        await publish(channel, [b"0"], routing_key=f"{name}.jobs")
        await holds(amqp_url, f"{name}.dead", 1)


async def test_a_deleted_dead_letter_queue_is_declared_again(
    channel, amqp_url, name, caplog
) -> None:
    """While the consumer runs. The log says why the dead letter came back."""
    async with Answering(amqp_url, name, dead_letter_queue=f"{name}.dead"):
        await channel.queue_delete(f"{name}.dead")
        await publish(channel, [b"0"], routing_key=name)
        await holds(amqp_url, f"{name}.dead", 1)
    assert any("a dead letter did not arrive" in each.getMessage() for each in caplog.records)


@pytest.mark.needs_node
async def test_a_dead_letter_queue_has_no_limit_if_quorum_queues_are_the_default(
    rabbitmq, broker, amqp_url, name
) -> None:
    """A virtual host may say so. Each look counts as a delivery."""
    if parse_version(broker) < (4, 0):
        pytest.skip("before 4.0 there is no limit by default")
    await _ctl(rabbitmq, "add_vhost", name, "--default-queue-type", "quorum")
    await _ctl(rabbitmq, "set_permissions", "-p", name, "guest", ".*", ".*", ".*")
    url = str(URL(amqp_url).with_path(f"/{name}"))
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        async with Answering(url, name, dead_letter_queue=f"{name}.dead"):
            await publish(channel, [b"0"], routing_key=name)
            await holds(url, f"{name}.dead", 1)
        dead = await channel.get_queue(f"{name}.dead", ensure=False)
        for _ in range(30):
            letter = await until(lambda: dead.get(fail=False), what="the dead letter")
            await letter.reject(requeue=True)
        await take_all(channel, dead.name, 1)


async def _ctl(rabbitmq, *words: str) -> str:
    return await asyncio.to_thread(rabbitmq.rabbitmqctl, *words)


# --- what the broker gives up --------------------------------------------------------------------


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
@pytest.mark.parametrize("arguments", [{"x-message-ttl": 500}, {"x-max-length": 2}])
async def test_messages_that_the_broker_gives_up_are_in_the_dead_letter_queue(
    channel, amqp_url, name, queue_type, arguments
) -> None:
    """They expire, or the queue is full, while the consumer is busy."""
    consumer = Busy(
        BatchConsumerSettings(
            url=amqp_url,
            queue_name=name,
            queue_type=queue_type,
            queue_arguments=arguments,
            batch_size=1,
            prefetch_count=1,
            dead_letter_queue=f"{name}.dead",
            shutdown_timeout=1,
        )
    )
    async with consumer:
        await publish(channel, [b"first"], routing_key=name)
        await until(lambda: consumer.status().workers[0].in_hand == 1, what=consumer.status)
        await publish(channel, [b"%d" % each for each in range(6)], routing_key=name)

        async def all_there() -> bool:
            there = [await ready(amqp_url, each) for each in (name, f"{name}.dead")]
            return sum(there) == 6 and there[1] >= 3

        await until(all_there)


@pytest.mark.needs_node
async def test_the_policy_of_the_warning_has_the_same_effect(
    channel, rabbitmq, amqp_url, name, caplog
) -> None:
    """The queue exists without the arguments. The command in the log replaces them."""
    await channel.declare_queue(name, durable=True)
    async with Answering(amqp_url, name, dead_letter_queue=f"{name}.dead"):
        pass
    [line] = [
        each for each in caplog.records if "queue lacks dead-letter arguments" in each.getMessage()
    ]
    assert logging.WARNING == line.levelno
    program, *words = shlex.split(line.policy)
    assert "rabbitmqctl" == program
    await _ctl(rabbitmq, *words)
    await publish(channel, [b"0"], routing_key=name, expiration=0.1)
    await holds(amqp_url, f"{name}.dead", 1)


async def test_a_queue_is_declared_twice_with_the_same_arguments(channel, amqp_url, name) -> None:
    """Nothing is missing the second time, whatever the broker's version is."""
    for _ in range(2):
        given = {"queue_type": "quorum", "dead_letter_queue": f"{name}.dead"}
        async with Answering(amqp_url, name, **given):
            await publish(channel, [b"0"], routing_key=name)
    await holds(amqp_url, f"{name}.dead", 2)


async def test_the_latest_reason_of_a_dead_letter_counts(channel, amqp_url, name) -> None:
    """It was moved back by hand, and expired."""
    given = {"queue_arguments": {"x-message-ttl": 1000}, "dead_letter_queue": f"{name}.dead"}
    async with Answering(amqp_url, name, **given):
        await publish(channel, [b"0"], routing_key=name)
        await holds(amqp_url, f"{name}.dead", 1)
    assert ["rejected"] == await _reasons(amqp_url, f"{name}.dead")
    [letter] = await take_all(channel, f"{name}.dead", 1)
    await publish(channel, [letter.body], routing_key=name, headers=letter.headers)
    await holds(amqp_url, f"{name}.dead", 1)
    assert ["expired"] == await _reasons(amqp_url, f"{name}.dead")

    # And a consumer of the dead letter makes another one, whose reason is its own.
    exchange, last = await declare_dead_letters(channel, f"{name}.last")
    async with Answering(amqp_url, f"{name}.dead", declare=False, dead_letter_exchange=exchange):
        await holds(amqp_url, last, 1)
    assert ["rejected"] == await _reasons(amqp_url, last)


async def _reasons(url: str, queue: str) -> list[str]:
    looked = await look(open_transport(Endpoint(url=url)), queue)
    return [letter.death.reason for letter in looked.letters]


async def test_a_consumer_of_dead_letters_has_its_own_attempts(channel, amqp_url, name) -> None:
    """Also for a message that the broker has dead-lettered, with a count in its headers."""
    dlx, dlq = await declare_dead_letters(channel, name)
    arguments = {"x-dead-letter-exchange": dlx}
    await channel.declare_queue(name, durable=True, arguments=arguments)
    await publish(channel, [b"0"], routing_key=name, expiration=0.1, headers={"x-retry-count": 3})
    await holds(amqp_url, dlq, 1)
    exchange, last = await declare_dead_letters(channel, f"{name}.last")
    given = {"declare": False, "max_requeue_attempts": 2, "dead_letter_exchange": exchange}
    consumer = Answering(amqp_url, dlq, **given)
    consumer.answer = MessageResult.REQUEUE
    async with consumer:
        await holds(amqp_url, last, 1)
    [letter] = await take_all(channel, last, 1)
    assert (2, "exhausted") == (
        letter.headers["x-retry-count"],
        letter.headers["x-dead-letter-reason"],
    )


# --- permissions, streams, alarms ----------------------------------------------------------------


@pytest.mark.needs_node
@pytest.mark.parametrize("exchange", ["amq.default", "dlx"])
async def test_a_user_who_may_not_publish_is_refused_at_the_start(
    channel, rabbitmq, amqp_url, name, exchange
) -> None:
    """The error names the exchange and the permission."""
    dlx = await channel.declare_exchange(f"{name}.dlx", "fanout", durable=True)
    write = {"amq.default": f"^{name}", "dlx": f"^(amq.default|{name})$"}[exchange]
    await _ctl(rabbitmq, "add_user", name, "secret")
    await _ctl(rabbitmq, "set_permissions", name, f"^{name}", write, f"^{name}")
    url = str(URL(amqp_url).with_user(name).with_password("secret"))
    text = await refused(
        Answering(url, name, dead_letter_exchange=dlx.name, broker_dead_letters=False)
    )
    assert f"publishing to exchange '{exchange if '.' in exchange else dlx.name}'" in text
    assert "write permission" in text
    if exchange == "amq.default":
        assert -1 == await ready(amqp_url, name)


async def test_the_check_of_permissions_stores_nothing(channel, amqp_url, name) -> None:
    """Neither in the consumer's queue nor in one that takes dead letters."""
    dlx, dlq = await declare_dead_letters(channel, name)
    await channel.declare_queue(name, durable=True)
    for _ in range(3):
        async with Answering(amqp_url, name, declare=False, dead_letter_exchange=dlx):
            pass
    assert (0, 0) == (await ready(amqp_url, name), await ready(amqp_url, dlq))


@pytest.mark.long
@pytest.mark.needs_node
async def test_a_memory_alarm_does_not_prevent_the_start(channel, rabbitmq, amqp_url, name) -> None:
    """The broker then stops who publishes, and the check of permissions does."""
    consumer = Answering(amqp_url, name, dead_letter_queue=f"{name}.dead")
    consumer.answer = MessageResult.ACK
    await channel.declare_queue(name, durable=True)
    await publish(channel, [b"0"], routing_key=name)
    await asyncio.to_thread(rabbitmq.set_memory_alarm, True)
    try:
        async with asyncio.timeout(PATIENCE):
            await consumer.start()
            await until(lambda: consumer.is_healthy)
            await holds(amqp_url, name, 0)
            await consumer.stop()
    finally:
        await asyncio.to_thread(rabbitmq.set_memory_alarm, False)


async def test_a_stream_is_refused_without_declaring_it(channel, amqp_url, name, broker) -> None:
    """Before its first message."""
    if parse_version(broker) < (3, 10):
        pytest.skip("arguments of consumers are not checked")
    await channel.declare_queue(name, durable=True, arguments={"x-queue-type": "stream"})
    text = await refused(Answering(amqp_url, name, declare=False))
    assert f"queue '{name}'" in text
    assert "it is a stream" in text


# --- the consumer's exchange ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "settings"),
    [
        ({"auto_delete": True}, {"exchange_auto_delete": True}),
        ({"internal": True}, {"exchange_internal": True}),
        (
            {"arguments": {"alternate-exchange": "amq.fanout"}},
            {"exchange_arguments": {"alternate-exchange": "amq.fanout"}},
        ),
    ],
)
async def test_an_exchange_that_others_have_declared(
    channel, amqp_url, name, there, settings
) -> None:
    """Settings say what it is."""
    exchange = await channel.declare_exchange(f"{name}.x", "topic", durable=True, **there)
    source = await channel.declare_exchange(f"{name}.source", "fanout", durable=True)
    await exchange.bind(source)
    given = {"exchange_name": exchange.name, "exchange_type": "topic", "routing_key": "a.#"}
    assert "inequivalent" in await refused(Answering(amqp_url, name, **given))
    async with Answering(amqp_url, name, dead_letter_queue=f"{name}.dead", **given, **settings):
        await publish(channel, [b"0"], exchange=source.name, routing_key="a.b")
        await holds(amqp_url, f"{name}.dead", 1)
