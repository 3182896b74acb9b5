"""Nothing is lost when processes are killed, connections are cut or brokers go away.

A message may be handled twice, and that is counted; it must not be lost.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import time
from collections import Counter

import aio_pika
import pytest

from aio_pika_batch import BatchConsumer, BatchConsumerSettings, MessageResult
from tests.integration.helpers import (
    PATIENCE,
    SLACK,
    Recorder,
    Stopwatch,
    app,
    consumers,
    counts,
    declare_dead_letters,
    holds,
    ids,
    publish,
    take_all,
    until,
)

_log = logging.getLogger("tests.faults")

KINDS = ("good",) * 16 + ("flaky",) * 2 + ("bad", "doomed")


def mixed(count: int) -> dict[int, bytes]:
    """Return messages, four in five of them good."""
    return {
        each: json.dumps({"id": each, "kind": KINDS[each % len(KINDS)]}).encode()
        for each in range(count)
    }


def kind(number: int) -> str:
    """Return what a message does."""
    return KINDS[number % len(KINDS)]


@pytest.mark.long
@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
async def test_five_kills_under_load_lose_nothing(
    channel, amqp_url, name, tmp_path, queue_type
) -> None:
    """SIGKILL: each message is done, dead-lettered or in the queue; after a last run, done or
    dead-lettered.
    """
    messages = mixed(5000)
    dlx, dlq = await declare_dead_letters(channel, name)
    settings = {
        "queue_type": queue_type,
        "batch_size": 50,
        "batch_timeout": 0.1,
        "num_workers": 2,
        "dead_letter_exchange": dlx,
    }
    async with app("work", tmp_path, amqp_url, name, **settings) as program:
        await program.noted("consuming")
        program.send(signal.SIGTERM)
        await program.ended()
    await publish(channel, messages.values(), routing_key=name)

    for _ in range(5):
        async with app("work", tmp_path, amqp_url, name, pace=0.05, **settings) as program:
            before = len(program.of("done"))
            await program.noted("done", before + 400)
            program.send(signal.SIGKILL)
            assert -signal.SIGKILL == await program.ended()
    # It died in the middle of something, if not each time: that is what this is about.
    assert len(program.of("begin")) > len(program.of("end"))

    async with app("work", tmp_path, amqp_url, name, **settings) as program:
        good = {each for each in messages if kind(each) in {"good", "flaky"}}
        await until(lambda: good <= set(program.of("done")), what=lambda: program.printed[-4000:])
        await until(lambda: _is_empty_and_idle(amqp_url, name, program))
        program.send(signal.SIGTERM)
        assert 0 == await program.ended()
        done = Counter(program.of("done"))
    dead = ids(await take_all(channel, dlq, 500))
    left = ids(await take_all(channel, name))

    assert Counter() == left
    assert good == done.keys()
    assert messages.keys() - good == dead.keys()
    twice = done.total() - len(done), dead.total() - len(dead)
    _log.info("handled twice, dead twice: %s", twice)
    # A crash repeats what was being handled, and no more: two workers with two batches of 50 each.
    assert sum(twice) <= 5 * 2 * 2 * 50


async def _is_empty_and_idle(url, queue, program) -> bool:
    """Return whether nothing is ready or unsettled."""
    begun = len(program.of("begin"))
    await holds(url, queue, 0)
    await asyncio.sleep(0.5)
    return begun == len(program.of("begin")) and len(program.of("done")) > 0


class Handled(BatchConsumer):
    """Does what its messages say, slowly, and records it."""

    def __init__(self, settings, **more) -> None:
        super().__init__(settings, **more)
        self.done: Counter[int] = Counter()

    async def process_messages(self, messages):
        await asyncio.sleep(0.02)
        for message in messages:
            content = message.json()
            match content["kind"]:
                case "bad":
                    yield MessageResult.NACK
                case "doomed":
                    yield MessageResult.REQUEUE
                case "flaky" if message.retry_count < 2:
                    yield MessageResult.REQUEUE
                case _:
                    self.done[content["id"]] += 1
                    yield MessageResult.ACK


class Watched(Handled):
    """Records its health whenever a session is lost."""

    def __init__(self, settings) -> None:
        self.recorder = Recorder()
        super().__init__(settings, observers=[self.recorder])
        self.health: list[bool] = []
        self.recorder.on_lost = lambda: self.health.append(self.is_healthy)

    @property
    def epochs(self) -> list[int]:
        return [worker.epoch for worker in self.status().workers]

    async def comes_back(self, before: list[int]) -> None:
        """Wait until each worker has a new session; the consumer was unhealthy in between."""
        await until(
            lambda: all(now > was for now, was in zip(self.epochs, before, strict=True)),
            what=self.status,
        )
        await until(lambda: self.is_healthy, what=self.status)
        assert self.is_running
        assert self.health
        assert not any(self.health)


def settings_for(url: str, name: str, **more) -> BatchConsumerSettings:
    """Return settings that reconnect quickly."""
    return BatchConsumerSettings(
        **{
            "url": url,
            "queue_name": name,
            "batch_size": 50,
            "batch_timeout": 0.05,
            "reconnect_delay": 0.1,
            "reconnect_delay_max": 1.0,
            "connect_timeout": 3.0,
            **more,
        }
    )


async def all_is_well(channel, url, name, consumer, messages, dlq) -> tuple[int, int]:
    """Wait until all messages are done or dead-lettered; return how many were so repeatedly."""
    good = {each for each in messages if kind(each) in {"good", "flaky"}}
    bad = messages.keys() - good

    async def missing():
        left = sorted(good - consumer.done.keys())
        ready, present = await counts(url, name)
        return f"{left} not done; {ready} ready, {present} consumers: {consumer.status()}"

    await until(lambda: good <= consumer.done.keys(), what=missing)
    await until(lambda: consumer.is_healthy)
    dead: Counter[int] = Counter()
    async with asyncio.timeout(PATIENCE):
        while bad - dead.keys():
            dead += ids(await take_all(channel, dlq))
            await asyncio.sleep(0.05)
    await until(lambda: consumer.status().workers[0].in_hand == 0)
    await consumer.stop()
    left = ids(await take_all(channel, name))
    dead += ids(await take_all(channel, dlq))
    # A copy of something that is done or dead may be left, if its first was not known to be stored.
    assert left.keys() <= consumer.done.keys() | dead.keys()
    assert good == consumer.done.keys()
    assert bad == dead.keys()
    return consumer.done.total() - len(good), dead.total() - len(bad)


@pytest.mark.long
@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
@pytest.mark.usefixtures("on_both_wires")
async def test_ten_cuts_under_load_lose_nothing(channel, amqp_url, name, proxy, queue_type) -> None:
    """The connection is reset, also within a frame: the consumer reconnects each time."""
    messages = mixed(5000)
    dlx, dlq = await declare_dead_letters(channel, name)
    consumer = Watched(
        settings_for(proxy.url(amqp_url), name, queue_type=queue_type, dead_letter_exchange=dlx)
    )
    async with consumer:
        await publish(channel, messages.values(), routing_key=name)
        for cut in range(10):
            goal = min(len(consumer.done) + 200, 3900)
            await until(lambda goal=goal: len(consumer.done) >= goal)
            before = consumer.epochs
            if cut % 2:
                proxy.cut_after(5000 + cut, "to_client" if cut % 4 == 1 else "to_broker")
                # So few acks may be left, each for a whole batch, that as much never comes.
                deadline = asyncio.get_running_loop().call_later(5, proxy.cut)
            else:
                deadline = None
                proxy.cut()
            await consumer.comes_back(before)
            if deadline is not None:
                deadline.cancel()
        twice = await all_is_well(channel, amqp_url, name, consumer, messages, dlq)
    _log.info("handled twice, dead twice: %s", twice)
    assert len(consumer.recorder.losses) >= 10
    # Each cut repeats unsettled messages at most: prefetch is 100.
    assert sum(twice) <= 10 * 100


def kill(node) -> None:
    """Kill a node, like a power failure."""
    node.kill()


def start(node) -> None:
    """Start it again."""
    node.start()


def stop_app(node) -> None:
    """Stop a broker regularly."""
    node.rabbitmqctl("stop_app")


def start_app(node) -> None:
    """Start it again."""
    node.rabbitmqctl("start_app")


@pytest.mark.needs_node
@pytest.mark.parametrize(
    ("queue_type", "end", "begin"),
    [
        ("classic", kill, start),
        pytest.param("classic", stop_app, start_app, marks=pytest.mark.long),
        # Of a node alone that is killed, RabbitMQ 3.10 does not find its quorum queues again.
        pytest.param("quorum", stop_app, start_app, marks=pytest.mark.long),
    ],
)
async def test_a_broker_that_goes_away_is_waited_for_and_nothing_is_lost(
    rabbitmq, amqp_url, name, queue_type, end, begin
) -> None:
    """Confirmed messages are there after the restart, and the consumer reconnects."""
    messages = mixed(1000)
    async with await aio_pika.connect(amqp_url) as connection:
        channel = await connection.channel()
        dlx, dlq = await declare_dead_letters(channel, name)
    consumer = Watched(
        settings_for(amqp_url, name, queue_type=queue_type, dead_letter_exchange=dlx, num_workers=2)
    )
    async with consumer:
        async with await aio_pika.connect(amqp_url) as connection:
            channel = await connection.channel()
            await publish(channel, messages.values(), routing_key=name)
            await until(lambda: len(consumer.done) >= 200)
        before = consumer.epochs
        await asyncio.to_thread(end, rabbitmq)
        await asyncio.to_thread(begin, rabbitmq)
        await consumer.comes_back(before)
        async with await aio_pika.connect(amqp_url) as connection:
            channel = await connection.channel()
            twice = await all_is_well(channel, amqp_url, name, consumer, messages, dlq)
    _log.info("handled twice, dead twice: %s", twice)


@pytest.mark.parametrize("queue_type", ["classic", "quorum"])
@pytest.mark.usefixtures("on_both_wires")
async def test_a_queue_deleted_under_the_consumer_is_declared_again(
    channel, amqp_url, name, queue_type
) -> None:
    """With its binding: the consumer works as before."""
    consumer = Watched(
        settings_for(
            amqp_url, name, queue_type=queue_type, exchange_name=f"{name}.x", routing_key="k"
        )
    )
    async with consumer:
        before = consumer.epochs
        await channel.queue_delete(name)
        await consumer.comes_back(before)
        body = json.dumps({"id": 1, "kind": "good"}).encode()
        await publish(channel, [body], exchange=f"{name}.x", routing_key="k")
        await until(lambda: consumer.done[1])


@pytest.mark.needs_node
async def test_a_consumer_reconnects_after_the_operator_closes_all_connections(
    rabbitmq, channel, amqp_url, name
) -> None:
    """All workers and the publisher."""
    consumer = Watched(settings_for(amqp_url, name, num_workers=2))
    async with consumer:
        body = json.dumps({"id": 1, "kind": "flaky"}).encode()
        await publish(channel, [body], routing_key=name)
        await until(lambda: consumer.done[1])
        before = consumer.epochs
        await asyncio.to_thread(rabbitmq.close_all_connections, "maintenance")
        await consumer.comes_back(before)
        assert all("maintenance" in worker.last_error for worker in consumer.status().workers)
        async with await aio_pika.connect(amqp_url) as connection:
            body = json.dumps({"id": 2, "kind": "flaky"}).encode()
            await publish(await connection.channel(), [body], routing_key=name)
        await until(lambda: consumer.done[2])


@pytest.mark.parametrize("heartbeat", [1, 2])
@pytest.mark.usefixtures("on_both_wires")
async def test_a_silent_line_is_noticed_within_three_heartbeats(
    channel, amqp_url, name, proxy, heartbeat
) -> None:
    """No data and no error in either direction; afterwards everything works again."""
    consumer = Handled(settings_for(proxy.url(amqp_url), name, heartbeat=heartbeat))
    async with consumer:
        proxy.freeze()
        watch = Stopwatch()
        await until(lambda: not consumer.is_healthy)
        _log.info("noticed after %.1f s", watch.seconds)
        assert watch.seconds < 3 * heartbeat + SLACK  # by default it would take minutes
        proxy.thaw()
        await until(lambda: consumer.is_healthy)
        body = json.dumps({"id": 1, "kind": "good"}).encode()
        await publish(channel, [body], routing_key=name)
        await until(lambda: consumer.done[1])


@pytest.mark.needs_node
async def test_a_paused_broker_is_noticed_and_waited_for(rabbitmq, amqp_url, name) -> None:
    """Its kernel still accepts connections: only heartbeats reveal it."""
    consumer = Handled(settings_for(amqp_url, name, heartbeat=1))
    async with consumer:
        rabbitmq.pause()
        watch = Stopwatch()
        await until(lambda: not consumer.is_healthy)
        assert watch.seconds < 3 + SLACK
        rabbitmq.resume()
        await until(lambda: consumer.is_healthy)
        body = json.dumps({"id": 1, "kind": "good"}).encode()
        async with await aio_pika.connect(amqp_url) as connection:
            await publish(await connection.channel(), [body], routing_key=name)
        await until(lambda: consumer.done[1])


async def test_a_cut_connection_affects_one_worker_only(channel, amqp_url, name, proxy) -> None:
    """One of three is cut: the others continue, and `is_healthy` counts all."""
    consumer = Handled(settings_for(proxy.url(amqp_url), name, num_workers=3))
    async with consumer:
        proxy.cut_after(1000)
        messages = {each: json.dumps({"id": each, "kind": "good"}).encode() for each in range(500)}
        await publish(channel, messages.values(), routing_key=name)
        await until(lambda: messages.keys() == consumer.done.keys())
        await until(lambda: consumer.is_healthy)
        assert 3 == await consumers(amqp_url, name)
    await holds(amqp_url, name, 0)


class Blocking(BatchConsumer):
    """Blocks the event loop with its first batch."""

    blocks = True

    async def process_messages(self, messages):
        if self.blocks:
            self.blocks = False
            time.sleep(3)  # noqa: ASYNC251  -- the fault that is tried
        for _ in messages:
            yield MessageResult.ACK


async def test_a_handler_that_blocks_the_event_loop_is_seen_in_the_log(
    channel, amqp_url, name, caplog
) -> None:
    """The error of the connection that the broker cuts says nothing about the cause."""
    settings = BatchConsumerSettings(
        url=amqp_url, queue_name=name, heartbeat=1, batch_timeout=0.1, reconnect_delay=0.1
    )
    async with Blocking(settings):
        await publish(channel, [b"slow"], routing_key=name)
        await until(lambda: "the event loop was blocked" in caplog.text)
