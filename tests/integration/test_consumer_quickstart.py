"""The main task: every message gets one result, and each result does what it says."""

from __future__ import annotations

import asyncio
import json
from collections import Counter

import pytest

from aio_pika_batch import BatchConsumer, BatchConsumerSettings, MessageResult
from tests.integration.helpers import (
    HEADERS,
    PATIENCE,
    PROPERTIES,
    RawClient,
    Recorder,
    declare_dead_letters,
    holds,
    long,
    pack_properties,
    publish,
    ready,
    take_all,
    unpack_properties,
    unpack_table,
    until,
)


class ServiceUnavailable(Exception):
    """Raised by a service that is down."""


class Service:
    """Accepts each message at a given attempt, or never; records the messages."""

    def __init__(self) -> None:
        self.attempts: Counter[int] = Counter()
        self.taken: Counter[int] = Counter()

    async def publish(self, data) -> None:
        self.attempts[data["id"]] += 1
        await asyncio.sleep(0)
        if self.attempts[data["id"]] <= data["fails"]:
            raise ServiceUnavailable
        self.taken[data["id"]] += 1


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
@pytest.mark.usefixtures("on_both_wires")
async def test_the_quick_start_treats_every_message_as_it_says(
    channel, amqp_url, name, queue_type
) -> None:
    """Of 200: the good ones are acked once, the bad and hopeless ones dead-lettered."""
    service = Service()

    class MyConsumer(BatchConsumer):
        async def process_messages(self, messages):
            for msg in messages:
                try:
                    data = json.loads(msg.body)
                    await service.publish(data)
                    yield MessageResult.ACK
                except json.JSONDecodeError:
                    yield MessageResult.NACK
                except ServiceUnavailable:
                    yield MessageResult.REQUEUE

    good, flaky, hopeless = range(140), range(140, 170), range(170, 180)
    bodies = [json.dumps({"id": each, "fails": 0}).encode() for each in good]
    bodies += [json.dumps({"id": each, "fails": 2}).encode() for each in flaky]
    bodies += [json.dumps({"id": each, "fails": 99}).encode() for each in hopeless]
    bad = [b"{no json %d" % each for each in range(20)]
    dlx, dlq = await declare_dead_letters(channel, name)
    recorder = Recorder()
    consumer = MyConsumer(
        BatchConsumerSettings(
            url=amqp_url,
            queue_name=name,
            exchange_name=f"{name}.exchange",
            exchange_type="fanout",
            batch_size=50,
            batch_timeout=0.2,
            prefetch_count=300,
            num_workers=6,
            queue_type=queue_type,
            queue_arguments={"x-dead-letter-exchange": dlx},
        ),
        observers=[recorder],
    )
    running = asyncio.ensure_future(consumer.run())
    await until(lambda: consumer.is_healthy)
    await publish(channel, [*bodies, *bad], routing_key="", exchange=f"{name}.exchange")

    await until(lambda: recorder.results["ACK"] + len(recorder.dead) >= 200)
    await consumer.stop()
    await asyncio.wait_for(running, PATIENCE)

    assert dict.fromkeys([*good, *flaky], 1) == service.taken
    assert dict.fromkeys(good, 1) | dict.fromkeys(flaky, 3) | dict.fromkeys(hopeless, 4) == (
        service.attempts
    )
    dead = await take_all(channel, dlq, 30)
    assert Counter(dict.fromkeys([*bad, *bodies[170:]], 1)) == Counter(
        letter.body for letter in dead
    )
    for letter in dead:
        reason, retries = ("rejected", 0) if letter.body in bad else ("exhausted", 3)
        assert reason == letter.headers["x-dead-letter-reason"]
        assert retries == letter.headers["x-retry-count"]
        assert name == letter.headers["x-original-queue"]
        assert f"{name}.exchange" == letter.headers["x-original-exchange"]
    assert 0 == await ready(amqp_url, name)
    assert 170 == recorder.results["ACK"]


class Hopeless(BatchConsumer):
    """Never succeeds."""

    attempts = 0

    async def process_messages(self, messages):
        for _ in messages:
            self.attempts += 1
            yield MessageResult.REQUEUE


@pytest.mark.parametrize("max_requeue_attempts", [0, 3])
@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
async def test_an_exhausted_message_is_dead_lettered_with_its_properties(
    channel, amqp_url, name, queue_type, max_requeue_attempts
) -> None:
    """Byte for byte; only the expiration is moved, so that the dead letter does not expire."""
    dlx, dlq = await declare_dead_letters(channel, name, kind="topic", keys=["order.#"])
    consumer = Hopeless(
        BatchConsumerSettings(
            url=amqp_url,
            queue_name=name,
            exchange_name=f"{name}.exchange",
            exchange_type="topic",
            routing_key="order.*",
            queue_type=queue_type,
            dead_letter_exchange=dlx,
            batch_timeout=0.05,
            max_requeue_attempts=max_requeue_attempts,
        )
    )
    async with consumer, RawClient.connect(amqp_url) as raw:
        await raw.publish(
            "order.new", pack_properties(PROPERTIES), b"{}", exchange=f"{name}.exchange"
        )
        letter = await raw.get(dlq)
    assert 1 + max_requeue_attempts == consumer.attempts
    assert (dlx, "order.new", b"{}") == (letter.exchange, letter.routing_key, letter.body)

    found = unpack_properties(letter.properties)
    headers = unpack_table(found.pop("headers"))
    expected = {key: raw for key, raw in PROPERTIES.items() if key not in {"headers", "expiration"}}
    assert expected == found
    assert HEADERS == {key: value for key, value in headers.items() if key in HEADERS}
    added = {key.decode(): value for key, value in headers.items() if key not in HEADERS}
    assert b"S" + long(b"600000") == added["x-original-expiration"]
    assert b"S" + long(b"order.new") == added["x-original-routing-key"]
    assert b"S" + long(f"{name}.exchange".encode()) == added["x-original-exchange"]
    assert b"S" + long(name.encode()) == added["x-original-queue"]
    assert b"S" + long(b"exhausted") == added["x-dead-letter-reason"]
    assert max_requeue_attempts == int.from_bytes(added["x-retry-count"][1:])
    assert {"x-first-failed-at", "x-dead-lettered-at"} < added.keys()
    assert not added.keys() & {"x-delivery-count", "x-acquired-count", "x-exception-type"}


@pytest.mark.usefixtures("on_both_wires")
async def test_a_requeued_copy_adds_its_count_and_its_origin_and_changes_nothing_else(
    amqp_url, name
) -> None:
    """With all properties and with none: absent ones stay absent."""
    seen = {}

    class Once(BatchConsumer):
        async def process_messages(self, messages):
            for message in messages:
                if message.retry_count:
                    seen[message.body] = (
                        message.raw_properties,
                        message.original_exchange,
                        message.original_routing_key,
                    )
                yield MessageResult.ACK if message.retry_count else MessageResult.REQUEUE

    settings = BatchConsumerSettings(
        url=amqp_url,
        queue_name=name,
        exchange_name=f"{name}.x",
        routing_key="k",
        batch_timeout=0.05,
    )
    async with Once(settings), RawClient.connect(amqp_url) as raw:
        for body, properties in ((b"all", PROPERTIES), (b"none", {})):
            await raw.publish("k", pack_properties(properties), body, exchange=f"{name}.x")
        await until(lambda: len(seen) == 2)

    for body, properties in ((b"all", PROPERTIES), (b"none", {})):
        copy, exchange, key = seen[body]
        assert (f"{name}.x", "k") == (exchange, key)
        found = unpack_properties(copy)
        headers = unpack_table(found.pop("headers"))
        assert {key: raw for key, raw in properties.items() if key != "headers"} == found
        assert (HEADERS if properties else {}) == {
            key: value for key, value in headers.items() if key in HEADERS
        }
        added = {key.decode(): value for key, value in headers.items() if key not in HEADERS}
        assert {
            "x-retry-count",
            "x-original-exchange",
            "x-original-routing-key",
            "x-first-failed-at",
        } == added.keys()
    await holds(amqp_url, name, 0)
