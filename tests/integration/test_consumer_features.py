"""Settings, hooks and publishing on RabbitMQ."""

from __future__ import annotations

import asyncio
import json
from collections import Counter, defaultdict

import aio_pika
import pytest
from aio_pika import ExchangeType, Message

from aio_pika_batch import (
    BatchConsumer,
    BatchConsumerSettings,
    Consumer,
    ConsumerSettings,
    MessageResult,
    Outcome,
    Publication,
    PublishError,
    TopologyError,
)
from aio_pika_batch.testing.rabbitmq.processes import LOCALHOST, free_port
from tests.integration.helpers import (
    PATIENCE,
    QUEUE_TYPES,
    Recorder,
    consumers,
    holds,
    publish,
    ready,
    take_all,
    until,
)


class Collecting(BatchConsumer):
    """Acks everything, and records it."""

    def __init__(self, settings, **more) -> None:
        super().__init__(settings, **more)
        self.seen: list[bytes] = []
        self.keys: Counter[str] = Counter()

    async def process_messages(self, messages):
        for message in messages:
            self.seen.append(message.body)
            self.keys[message.routing_key] += 1
            yield MessageResult.ACK


def settings_for(url: str, queue: str, **more) -> BatchConsumerSettings:
    """Return settings with short waits."""
    return BatchConsumerSettings(**{"url": url, "queue_name": queue, "batch_timeout": 0.05, **more})


# --- the pipeline of the first releases -------------------------------------------


class SourceConsumer(BatchConsumer):
    """Reads from a source exchange, and publishes to the staging exchange."""

    def __init__(self, settings, staging, sessions) -> None:
        super().__init__(settings)
        self._staging_name = staging
        self._sessions = sessions

    async def _run_internal(self, channel, queue, settings, stop_event, log):
        assert settings is self.settings
        assert queue.name == settings.queue_name
        assert not stop_event.is_set()
        log.info("session", source=settings.exchange_name)
        self._staging = await channel.declare_exchange(
            self._staging_name, type=ExchangeType.FANOUT, durable=True
        )
        self._sessions.append((self, channel))
        await super()._run_internal(channel, queue, settings, stop_event, log)

    async def process_messages(self, messages):
        for msg in messages:
            envelope = json.dumps(
                {"source": self.settings.exchange_name, "payload": msg.body.decode()}
            ).encode()
            await self._staging.publish(Message(body=envelope), routing_key="")
            yield MessageResult.ACK


class WriterConsumer(BatchConsumer):
    """Reads from staging, and writes to a sink that fails ten times."""

    def __init__(self, settings) -> None:
        super().__init__(settings)
        self.written: Counter[bytes] = Counter()
        self.failed: set[bytes] = set()

    async def process_messages(self, messages):
        results = await asyncio.gather(
            *[self._write(msg.body) for msg in messages], return_exceptions=True
        )
        for result in results:
            if isinstance(result, Exception):
                yield MessageResult.REQUEUE
            else:
                yield MessageResult.ACK

    async def _write(self, body):
        if body not in self.failed and len(self.failed) < 10:
            self.failed.add(body)
            raise ConnectionError
        self.written[body] += 1


async def test_many_sources_flow_into_one_staging_queue(channel, amqp_url, name) -> None:
    """Each worker declares and publishes on its own channel, with aio-pika's own objects."""
    staging = f"{name}.staging"
    sessions = []
    exchanges = [f"{name}.{each}" for each in ("user-events", "impressions", "search-logs")]
    fanout = {"exchange_type": "fanout", "num_workers": 2}
    sources = [
        SourceConsumer(
            settings_for(amqp_url, f"{name}:{each}", exchange_name=each, batch_size=50, **fanout),
            staging,
            sessions,
        )
        for each in exchanges
    ]
    writer = WriterConsumer(
        settings_for(amqp_url, f"{name}:writer", exchange_name=staging, batch_size=100, **fanout)
    )
    running = [asyncio.ensure_future(each.run()) for each in (writer, *sources)]
    await until(lambda: all(each.is_healthy for each in (writer, *sources)))
    payloads = [b"%d" % each for each in range(100)]
    for exchange in exchanges:
        await publish(channel, payloads, exchange=exchange, routing_key="")
    await until(lambda: writer.written.total() >= 300)
    for each in (*sources, writer):
        await each.stop()
    await asyncio.wait_for(asyncio.gather(*running), PATIENCE)

    assert Counter(
        (exchange, payload.decode()) for exchange in exchanges for payload in payloads
    ) == Counter(tuple(json.loads(body).values()) for body in writer.written.elements())
    assert 10 == len(writer.failed)
    assert 6 == len(sessions) == len({id(instance) for instance, _ in sessions})
    assert 6 == len({id(native) for _, native in sessions})


# --- publishing -------------------------------------------------------------------


async def test_handlers_publish_with_confirms(channel, amqp_url, name) -> None:
    """One by one and many at once, to an exchange with properties, and to a queue."""
    out = await channel.declare_queue(f"{name}.out", durable=True)
    outcomes = []

    class Forwarding(BatchConsumer):
        async def process_messages(self, messages):
            for message in messages:
                await self.publish(
                    message.body,
                    routing_key=out.name,
                    headers={"n": 1, "f": 1.1},
                    message_id="m",
                    priority=3,
                    expiration=60.0,
                )
                outcomes.extend(
                    await self.publish_many(
                        [Publication(b"%d" % each, routing_key=out.name) for each in range(20)]
                    )
                )
                yield MessageResult.ACK

    async with Forwarding(settings_for(amqp_url, name)):
        await publish(channel, [b"x"], routing_key=name)
        await holds(amqp_url, out.name, 21)
    assert [Outcome.CONFIRMED] * 20 == outcomes
    [first, *others] = await take_all(channel, out.name, 21)
    assert (b"x", "m", 3, 60.0, 2) == (
        first.body,
        first.message_id,
        first.priority,
        first.expiration,
        first.delivery_mode,
    )
    assert {"n": 1, "f": 1.1} == first.headers
    assert [b"%d" % each for each in range(20)] == [message.body for message in others]


async def test_an_unroutable_publication_is_an_error_and_consuming_goes_on(
    channel, amqp_url, name
) -> None:
    """A missing exchange, or no bound queue: requeues of other messages are not affected."""
    await channel.declare_exchange(f"{name}.empty", "fanout", durable=True)
    await channel.declare_queue(f"{name}.out", durable=True)
    errors = defaultdict(list)
    done = Counter()

    class Forwarding(BatchConsumer):
        async def process_messages(self, messages):
            for message in messages:
                if message.retry_count:
                    done[message.body] += 1
                    yield MessageResult.ACK
                    continue
                for exchange in (f"{name}.missing", f"{name}.empty"):
                    try:
                        await self.publish(b"", exchange=exchange, routing_key="k")
                    except PublishError as error:
                        errors[exchange].append(str(error))
                await self.publish(b"", exchange=f"{name}.empty", mandatory=False)
                yield MessageResult.REQUEUE

    recorder = Recorder()
    consumer = Forwarding(settings_for(amqp_url, name), observers=[recorder])
    async with consumer:
        await publish(channel, [b"%d" % each for each in range(10)], routing_key=name)
        await until(lambda: len(done) == 10, what=lambda: (done, errors))
        many = await consumer.publish_many(
            [
                Publication(b"", exchange=f"{name}.empty", routing_key="k"),
                Publication(b"", routing_key=f"{name}.out"),
            ]
        )
        assert consumer.is_healthy
    assert [Outcome.RETURNED, Outcome.CONFIRMED] == many
    assert {10} == {len(texts) for texts in errors.values()}
    assert all(f"{name}.missing" in text for text in errors[f"{name}.missing"])
    assert all("no queue" in text for text in errors[f"{name}.empty"])
    assert dict.fromkeys(done, 1) == done
    assert [1] == recorder.epochs


async def test_a_publish_error_is_a_handler_failure_like_any_other(channel, amqp_url, name) -> None:
    """The message is retried, not lost."""
    tries = Counter()

    class Forwarding(Consumer):
        async def process_message(self, message):
            tries[message.body] += 1
            if tries[message.body] < 3:
                await self.publish(b"", routing_key=f"{name}.no-such-queue")
            return MessageResult.ACK

    async with Forwarding(ConsumerSettings(url=amqp_url, queue_name=name)):
        await publish(channel, [b"1", b"2"], routing_key=name)
        await until(lambda: tries == {b"1": 3, b"2": 3})
    assert 0 == await ready(amqp_url, name)


# --- workers, queues, hosts -----------------------------------------------------------


async def test_four_workers_share_a_queue(channel, amqp_url, name) -> None:
    """Each with its own consumer, all busy, no message twice; the hooks are called once."""
    hooks = []
    busy = set()
    seen = Counter()

    class Shared(BatchConsumer):
        async def on_start(self):
            hooks.append("on_start")

        async def on_stop(self):
            hooks.append("on_stop")

        async def process_messages(self, messages):
            busy.add(messages[0].consumer_tag)
            await asyncio.sleep(0.05)
            for message in messages:
                seen[message.body] += 1
                yield MessageResult.ACK

    async with Shared(settings_for(amqp_url, name, num_workers=4, batch_size=10)):
        assert 4 == await consumers(amqp_url, name)
        bodies = [b"%d" % each for each in range(400)]
        await publish(channel, bodies, routing_key=name)
        await until(lambda: len(seen) == 400)
    assert 4 == len(busy)
    assert Counter(bodies) == seen
    assert ["on_start", "on_stop"] == hooks
    assert 0 == await consumers(amqp_url, name)


async def test_concurrency_runs_that_many_batches_at_once(channel, amqp_url, name) -> None:
    """And no more; prefetch bounds the unsettled messages."""
    now, most = 0, 0
    enough = asyncio.Event()

    class Several(BatchConsumer):
        async def process_messages(self, messages):
            nonlocal now, most
            now += 1
            most = max(most, now)
            if now == 3:
                enough.set()
            await enough.wait()
            await asyncio.sleep(0.01)
            now -= 1
            for _ in messages:
                yield MessageResult.ACK

    recorder = Recorder()
    consumer = Several(
        settings_for(amqp_url, name, concurrency=3, batch_size=5), observers=[recorder]
    )
    assert 20 == consumer.settings.effective_prefetch
    async with consumer:
        await publish(channel, [b"%d" % each for each in range(100)], routing_key=name)
        await until(lambda: recorder.results["ACK"] == 100)
    assert 3 == most


async def test_an_exclusive_queue_is_deleted_with_its_consumer(channel, amqp_url, name) -> None:
    """Other connections can't use it; requeues reach it nevertheless."""
    seen = []

    class Twice(BatchConsumer):
        async def process_messages(self, messages):
            for message in messages:
                seen.append((message.body, message.retry_count))
                yield MessageResult.ACK if message.retry_count else MessageResult.REQUEUE

    settings = settings_for(
        amqp_url,
        name,
        queue_exclusive=True,
        queue_durable=False,
        exchange_name=f"{name}.x",
        routing_key="k",
    )
    async with Twice(settings):
        await publish(channel, [b"1"], exchange=f"{name}.x", routing_key="k")
        await until(lambda: seen == [(b"1", 0), (b"1", 1)])
        other = Twice(settings)
        with pytest.raises(TopologyError, match=name):
            await other.start()
    assert -1 == await ready(amqp_url, name)


async def test_an_exclusive_queue_comes_back_after_a_loss(channel, amqp_url, name, proxy) -> None:
    """It was deleted with its connection; the next one declares and binds it again."""
    consumer = Collecting(
        settings_for(
            proxy.url(amqp_url),
            name,
            queue_exclusive=True,
            exchange_name=f"{name}.x",
            routing_key="k",
            reconnect_delay=0.1,
        )
    )
    async with consumer:
        proxy.cut()
        await until(lambda: consumer.status().workers[0].epoch > 1 and consumer.is_healthy)
        await publish(channel, [b"1"], exchange=f"{name}.x", routing_key="k")
        await until(lambda: consumer.seen == [b"1"])


async def test_an_auto_delete_queue_is_deleted_with_its_last_consumer(
    channel, amqp_url, name
) -> None:
    """The next start declares it again."""
    consumer = Collecting(settings_for(amqp_url, name, queue_auto_delete=True, num_workers=2))
    for turn in (1, 2):
        async with consumer:
            await publish(channel, [b"%d" % turn], routing_key=name)
            await until(lambda turn=turn: len(consumer.seen) == turn)
        await holds(amqp_url, name, -1)
    assert [b"1", b"2"] == consumer.seen


@pytest.mark.parametrize("form", ["hosts", "urls"])
async def test_an_unreachable_host_among_several_is_skipped(channel, amqp_url, name, form) -> None:
    """In one URL, or as several URLs, in any order."""
    there = amqp_url.rpartition("@")[2].rstrip("/")
    dead = f"{LOCALHOST}:{free_port()}"
    url = f"amqp://guest:guest@{dead},{there}/"
    if form == "urls":
        url = f"amqp://guest:guest@{dead}/,{amqp_url}"
    for turn in range(4):  # they are tried in random order
        consumer = Collecting(settings_for(url, f"{name}.{turn}"))
        async with asyncio.timeout(PATIENCE), consumer:
            await publish(channel, [b"x"], routing_key=f"{name}.{turn}")
            await until(lambda consumer=consumer: consumer.seen)


async def test_the_consumer_of_higher_priority_gets_the_messages(channel, amqp_url, name) -> None:
    """As long as it has prefetch left."""
    low = Collecting(settings_for(amqp_url, name, consumer_arguments={"x-priority": 1}))
    high = Collecting(settings_for(amqp_url, name, consumer_arguments={"x-priority": 9}))
    async with low, high:
        for each in range(50):
            await publish(channel, [b"%d" % each], routing_key=name)
            await until(lambda each=each: len(high.seen) + len(low.seen) > each)
    assert 50 == len(high.seen)


# --- exchanges --------------------------------------------------------------------


async def test_a_topic_exchange_with_several_patterns(channel, amqp_url, name) -> None:
    """A message that matches several comes once."""
    consumer = Collecting(
        settings_for(
            amqp_url,
            name,
            exchange_name=f"{name}.x",
            exchange_type="topic",
            routing_key=["order.*", "*.new", "audit.#"],
        )
    )
    async with consumer:
        exchange = await channel.get_exchange(f"{name}.x")
        for key in ("user.old", "order.a.b"):
            await exchange.publish(Message(b""), key, mandatory=False)
        for key in ("order.new", "order.paid", "user.new", "audit.a.b"):
            await exchange.publish(Message(b""), key)
        await until(lambda: consumer.keys.total() == 4)
    assert {"order.new": 1, "order.paid": 1, "user.new": 1, "audit.a.b": 1} == consumer.keys


async def test_a_headers_exchange_with_binding_arguments(channel, amqp_url, name) -> None:
    """All required headers must match."""
    consumer = Collecting(
        settings_for(
            amqp_url,
            name,
            exchange_name=f"{name}.x",
            exchange_type="headers",
            binding_arguments={"x-match": "all", "kind": "order", "level": 3},
        )
    )
    async with consumer:
        exchange = await channel.get_exchange(f"{name}.x")
        for headers in ({"kind": "order"}, {"kind": "order", "level": 4}):
            await exchange.publish(Message(b"no", headers=headers), "any", mandatory=False)
        await exchange.publish(Message(b"yes", headers={"kind": "order", "level": 3}), "any")
        await until(lambda: consumer.seen)
    assert [b"yes"] == consumer.seen


@pytest.mark.parametrize("kind", ["direct", "fanout", "topic", "headers"])
@QUEUE_TYPES
async def test_a_dead_letter_queue_is_declared_and_gets_every_dead_letter(
    channel, amqp_url, name, kind, queue_type
) -> None:
    """Whatever the type of its exchange or queue; a second declaration changes nothing."""

    class Refusing(BatchConsumer):
        async def process_messages(self, messages):
            for _ in messages:
                yield MessageResult.NACK

    settings = settings_for(
        amqp_url,
        name,
        exchange_name=f"{name}.x",
        routing_key=["red", "green"],
        queue_type=queue_type,
        dead_letter_queue=f"{name}.dead",
        dead_letter_exchange_type=kind,
    )
    for turn in (1, 2):
        async with Refusing(settings):
            for key in ("red", "green"):
                await publish(channel, [key.encode()], exchange=f"{name}.x", routing_key=key)
            await publish(channel, [b"default"], routing_key=name)
            await holds(amqp_url, f"{name}.dead", 3 * turn)
    letters = await take_all(channel, f"{name}.dead", 6)
    assert Counter({b"red": 2, b"green": 2, b"default": 2}) == Counter(
        letter.body for letter in letters
    )
    assert {f"{name}.dlx"} == {letter.exchange for letter in letters}
    # It is what it was declared to be.
    with pytest.raises(aio_pika.exceptions.ChannelPreconditionFailed):
        await channel.declare_queue(
            f"{name}.dead",
            durable=True,
            arguments={"x-queue-type": "quorum" if queue_type == "classic" else "classic"},
        )
