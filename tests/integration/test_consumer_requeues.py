"""Retries and dead letters on RabbitMQ under difficult conditions."""

from __future__ import annotations

import asyncio
from collections import Counter

import aio_pika
import pytest

from aio_pika_batch import (
    BatchConsumer,
    BatchConsumerSettings,
    MessageResult,
    Nack,
)
from tests.integration.helpers import (
    QUEUE_TYPES,
    Recorder,
    Stopwatch,
    declare_dead_letters,
    holds,
    publish,
    ready,
    set_policy,
    take_all,
    until,
)


def bodies(count: int) -> list[bytes]:
    """Return this many different bodies."""
    return [b"%d" % each for each in range(count)]


class Always(BatchConsumer):
    """Has one result."""

    answer = MessageResult.REQUEUE

    async def process_messages(self, messages):
        for _ in messages:
            yield self.answer


# --- where dead letters go --------------------------------------------------------


@pytest.mark.parametrize("named_by", ["dead_letter_exchange", "queue_arguments"])
@QUEUE_TYPES
async def test_an_exhausted_copy_is_dead_lettered_with_its_original_key(
    channel, amqp_url, name, queue_type, named_by
) -> None:
    """The copy's own key is the queue's name, for which the direct exchange has no binding."""
    dlx, dlq = await declare_dead_letters(channel, name, kind="direct", keys=["red", "green"])
    settings = {"dead_letter_exchange": dlx}
    if named_by == "queue_arguments":
        settings = {"queue_arguments": {"x-dead-letter-exchange": dlx}}
    consumer = Always(
        BatchConsumerSettings(
            url=amqp_url,
            queue_name=name,
            exchange_name=f"{name}.x",
            routing_key=["red", "green"],
            queue_type=queue_type,
            batch_timeout=0.05,
            **settings,
        )
    )
    async with consumer:
        for key in ("red", "green"):
            await publish(channel, [key.encode()], routing_key=key, exchange=f"{name}.x")
        await holds(amqp_url, dlq, 2)
    letters = await take_all(channel, dlq, 2)
    assert {"red", "green"} == {letter.routing_key for letter in letters}
    for letter in letters:
        assert letter.body.decode() == letter.routing_key
        assert letter.routing_key == letter.headers["x-original-routing-key"]
        assert "exhausted" == letter.headers["x-dead-letter-reason"]


async def test_a_dead_letter_routing_key_replaces_the_original_one(channel, amqp_url, name) -> None:
    """From the setting, or from the queue's arguments."""
    dlx, dlq = await declare_dead_letters(channel, name, kind="direct", keys=["dead"])
    arguments = {"x-dead-letter-exchange": dlx, "x-dead-letter-routing-key": "dead"}
    for number, settings in enumerate(
        (
            {"dead_letter_exchange": dlx, "dead_letter_routing_key": "dead"},
            {"queue_arguments": arguments},
        )
    ):
        queue = f"{name}.{number}"
        consumer = Always(
            BatchConsumerSettings(url=amqp_url, queue_name=queue, batch_timeout=0.05, **settings)
        )
        consumer.answer = Nack("too old")
        async with consumer:
            await publish(channel, [b"x"], routing_key=queue)
            await holds(amqp_url, dlq, 1)
        [letter] = await take_all(channel, dlq, 1)
        assert "dead" == letter.routing_key
        assert queue == letter.headers["x-original-routing-key"]
        assert "rejected" == letter.headers["x-dead-letter-reason"]


async def test_without_a_dead_letter_exchange_bad_messages_are_discarded(
    channel, amqp_url, name, caplog
) -> None:
    """If the settings ask for it. A warning at start says so, and the queue is empty at the end."""
    recorder = Recorder()
    consumer = Always(
        BatchConsumerSettings(
            url=amqp_url, queue_name=name, batch_timeout=0.05, without_dead_letter="reject"
        ),
        observers=[recorder],
    )
    async with consumer:
        await publish(channel, bodies(20), routing_key=name)
        await until(lambda: recorder.results["REQUEUE"] >= 80)
    assert 0 == await ready(amqp_url, name)
    warnings = [each for each in caplog.messages if "no dead-letter destination" in each]
    assert 1 == len(warnings)
    assert "discard" in warnings[0]


async def test_without_a_dead_letter_exchange_nothing_is_lost_by_default(
    channel, amqp_url, name, caplog
) -> None:
    """Messages that fail for good are retried, and are in the queue when the consumer stops."""
    recorder = Recorder()
    consumer = Always(
        BatchConsumerSettings(url=amqp_url, queue_name=name, batch_timeout=0.05),
        observers=[recorder],
    )
    async with consumer:
        await publish(channel, bodies(20), routing_key=name)
        await until(lambda: recorder.results["REQUEUE"] >= 80)
    assert 20 == await ready(amqp_url, name)
    assert "no dead-letter destination is known: they are retried" in caplog.text


@pytest.mark.needs_node
async def test_a_policy_dead_letters_rejected_messages(rabbitmq, channel, amqp_url, name) -> None:
    """The broker knows the policy, the library does not."""
    dlx, dlq = await declare_dead_letters(channel, name)
    policy = f'{{"dead-letter-exchange":"{dlx}"}}'
    await asyncio.to_thread(set_policy, rabbitmq, name, policy)
    consumer = Always(
        BatchConsumerSettings(
            url=amqp_url, queue_name=name, batch_timeout=0.05, without_dead_letter="reject"
        )
    )
    async with consumer:
        await publish(channel, bodies(3), routing_key=name)
        await holds(amqp_url, dlq, 3)


async def test_an_unroutable_dead_letter_is_not_lost(channel, amqp_url, name) -> None:
    """The exchange has no queue: the original stays until there is one."""
    dlx = await channel.declare_exchange(f"{name}.dlx", "fanout", durable=True)
    consumer = Always(
        BatchConsumerSettings(
            url=amqp_url, queue_name=name, batch_timeout=0.05, dead_letter_exchange=dlx.name
        )
    )
    consumer.answer = MessageResult.NACK
    async with consumer:
        await publish(channel, bodies(5), routing_key=name)
        await until(lambda: consumer.status().workers[0].held == 5)
        queue = await channel.declare_queue(f"{name}.dlq", durable=True)
        await queue.bind(dlx)
        await holds(amqp_url, queue.name, 5)
        await until(lambda: consumer.status().workers[0].held == 0)
    assert 0 == await ready(amqp_url, name)


# --- a full queue -----------------------------------------------------------------


@QUEUE_TYPES
async def test_requeues_into_a_full_queue_do_not_stall_the_consumer(
    channel, amqp_url, name, queue_type, broker
) -> None:
    """All messages fail while the queue is full, and no copy fits: consuming goes on slowly."""
    if broker.version.startswith("3.8."):
        queue_type = "classic"  # quorum queues there do not know how to refuse
    prefetch = 20
    arguments = {"x-max-length": prefetch, "x-overflow": "reject-publish"}
    handled: Counter[bytes] = Counter()
    acked: Counter[bytes] = Counter()
    queue_is_full, service_is_up = asyncio.Event(), asyncio.Event()

    class Down(BatchConsumer):
        async def process_messages(self, messages):
            await queue_is_full.wait()
            for message in messages:
                handled[message.body] += 1
                if service_is_up.is_set():
                    acked[message.body] += 1
                    yield MessageResult.ACK
                else:
                    yield MessageResult.REQUEUE

    consumer = Down(
        BatchConsumerSettings(
            url=amqp_url,
            queue_name=name,
            queue_type=queue_type,
            batch_size=10,
            batch_timeout=0.05,
            prefetch_count=prefetch,
            max_requeue_attempts=1000,
            queue_arguments=arguments,
            requeue_hold=2.0,
        )
    )
    async with consumer:
        sent = bodies(prefetch)
        await publish(channel, sent, routing_key=name)
        await holds(amqp_url, name, 0)
        while await _accepted(channel, name, b"more-%d" % len(sent)):
            sent.append(b"more-%d" % len(sent))
        assert len(sent) >= 2 * prefetch
        watch = Stopwatch()
        queue_is_full.set()
        # Longer than anything is held: all have gone back, and been handled again.
        await until(lambda: handled.total() >= 3 * prefetch and watch.seconds > 3)
        # No hot loop: no message comes more often than each quarter of a second.
        assert handled.total() < prefetch * (4 * watch.seconds + 2)
        assert consumer.is_healthy
        service_is_up.set()
        await until(lambda: len(acked) == len(sent), what=lambda: acked)
        await until(lambda: consumer.status().workers[0].held == 0)
    assert set(sent) == acked.keys()
    assert Counter(sent) == acked
    assert 0 == await ready(amqp_url, name)


async def _accepted(channel, queue, body) -> bool:
    try:
        await publish(channel, [body], routing_key=queue)
    except aio_pika.exceptions.DeliveryError:
        return False
    return True


async def test_good_messages_make_room_for_a_copy_in_a_full_queue(channel, amqp_url, name) -> None:
    """Their acks free the place for which the copy waits."""
    acked: Counter[bytes] = Counter()

    class Picky(BatchConsumer):
        async def process_messages(self, messages):
            for message in messages:
                if int(message.body) % 2 and not message.retry_count:
                    yield MessageResult.REQUEUE
                else:
                    acked[message.body] += 1
                    yield MessageResult.ACK

    queue = await channel.declare_queue(
        name, durable=True, arguments={"x-max-length": 20, "x-overflow": "reject-publish"}
    )
    consumer = Picky(
        BatchConsumerSettings(
            url=amqp_url,
            queue_name=name,
            batch_size=10,
            batch_timeout=0.05,
            prefetch_count=20,
            queue_arguments={"x-max-length": 20, "x-overflow": "reject-publish"},
        )
    )
    await publish(channel, bodies(20), routing_key=queue.name)
    async with consumer:
        late = [b"%d" % each for each in range(100, 160)]
        for body in late:
            await until(lambda body=body: _accepted(channel, name, body))
        await until(lambda: len(acked) == 80, what=lambda: acked)
    assert Counter([*bodies(20), *late]) == acked


# --- a memory alarm ---------------------------------------------------------------


@pytest.mark.needs_node
@pytest.mark.parametrize("queue_type", ["classic", pytest.param("quorum", marks=pytest.mark.long)])
async def test_under_a_memory_alarm_acks_go_on_and_requeues_wait(
    rabbitmq, channel, amqp_url, name, queue_type
) -> None:
    """Nothing is lost; waiting copies are published when the alarm has ended."""
    acked: Counter[bytes] = Counter()

    class Half(BatchConsumer):
        async def process_messages(self, messages):
            for message in messages:
                if message.body.endswith(b"f") and not message.retry_count:
                    yield MessageResult.REQUEUE
                else:
                    acked[message.body] += 1
                    yield MessageResult.ACK

    consumer = Half(
        BatchConsumerSettings(
            url=amqp_url,
            queue_name=name,
            queue_type=queue_type,
            batch_size=20,
            batch_timeout=0.05,
            prefetch_count=100,
            publish_timeout=1.0,
        )
    )
    good = [b"%d" % each for each in range(300)]
    flaky = [b"%df" % each for each in range(30)]
    mixed = [
        body for each in range(30) for body in (*good[10 * each : 10 * each + 10], flaky[each])
    ]
    async with consumer:
        await publish(channel, [b"0f"], routing_key=name)  # so that it has published before
        await until(lambda: acked[b"0f"])
        acked.clear()
        await consumer.stop()
        await publish(channel, mixed, routing_key=name)
        await asyncio.to_thread(rabbitmq.set_memory_alarm, True)
        await consumer.start()
        await until(lambda: set(good) <= acked.keys(), what=consumer.status)
        assert not acked.keys() & set(flaky)
        assert consumer.is_healthy
        await asyncio.to_thread(rabbitmq.set_memory_alarm, False)
        await until(lambda: set(flaky) <= acked.keys(), what=consumer.status)
        await until(lambda: consumer.status().workers[0].held == 0)
    assert Counter(good) == Counter({each: acked[each] for each in good})
    # Published once for each connection, and all of them may have arrived: never fewer than one.
    assert set(mixed) == acked.keys()
    await holds(amqp_url, name, 0)


# --- a dead letter that does not arrive at first --------------------------------------


class DeadLetterFault:
    """A dead-letter exchange with a queue, and a fault that can be fixed."""

    def __init__(self, channel, name, proxy) -> None:
        self._channel = channel
        self._proxy = proxy
        self.dlx = f"{name}.dlx"
        self.dlq = f"{name}.dlq"

    async def open(self, trouble) -> None:
        """Declare it; from now on the queue is full, or the binding is missing."""
        full = {"x-max-length": 1, "x-overflow": "reject-publish"}
        arguments = full if trouble == "refused" else {}
        exchange = await self._channel.declare_exchange(self.dlx, "direct", durable=True)
        queue = await self._channel.declare_queue(self.dlq, durable=True, arguments=arguments)
        if trouble != "returned":
            await queue.bind(exchange, "order.created")
        if trouble == "refused":
            await publish(self._channel, [b"in the way"], routing_key=self.dlq)

    def begin(self, trouble) -> None:
        """Start the fault when the message is about to be dead-lettered."""
        if trouble == "unconfirmed":
            self._proxy.freeze("to_client")

    async def fix(self, trouble) -> None:
        """End the fault."""
        queue = await self._channel.get_queue(self.dlq, ensure=False)
        match trouble:
            case "refused":
                await queue.purge()
            case "returned":
                await queue.bind(self.dlx, "order.created")
            case _:
                self._proxy.thaw()


@pytest.mark.parametrize("trouble", ["refused", "returned", "unconfirmed"])
@QUEUE_TYPES
async def test_an_exhausted_message_stays_until_its_dead_letter_is_confirmed(
    channel, amqp_url, name, proxy, queue_type, trouble
) -> None:
    """The dead letter has its properties, its original key and the reason."""
    office = DeadLetterFault(channel, name, proxy)
    await office.open(trouble)
    last = asyncio.Event()
    recorder = Recorder()

    class Failing(BatchConsumer):
        async def process_messages(self, messages):
            for message in messages:
                if message.retry_count == 1:
                    await until(lambda: recorder.copies)  # its original is done with
                    office.begin(trouble)
                    last.set()
                raise LookupError("no such order")
            yield MessageResult.ACK

    consumer = Failing(
        BatchConsumerSettings(
            url=proxy.url(amqp_url),
            queue_name=name,
            queue_type=queue_type,
            exchange_name=f"{name}.x",
            routing_key="order.created",
            batch_size=1,
            batch_timeout=0.05,
            max_requeue_attempts=1,
            dead_letter_exchange=office.dlx,
            dead_letter_exchange_type="direct",
            publish_timeout=0.5,
            connect_timeout=1.0,
        ),
        observers=[recorder],
    )
    async with consumer:
        await publish(
            channel,
            [b"order 1"],
            exchange=f"{name}.x",
            routing_key="order.created",
            message_id="m-1",
            correlation_id="c-1",
            priority=3,
            expiration=600,
            headers={"tenant": "acme"},
        )
        await last.wait()
        await until(lambda: consumer.status().workers[0].held == 1, what=consumer.status)
        # Neither gone nor given up: it is with its consumer.
        assert 0 == await ready(amqp_url, name)
        await office.fix(trouble)
        await until(lambda: consumer.status().workers[0].held == 0, what=consumer.status)
        letters = await take_all(channel, office.dlq, 1)
    assert 0 == await ready(amqp_url, name)
    # If the first was never confirmed, it may have arrived, too.
    assert len(letters) == 1 or trouble == "unconfirmed"
    for letter in letters:
        assert (b"order 1", office.dlx, "order.created") == (
            letter.body,
            letter.exchange,
            letter.routing_key,
        )
        assert ("m-1", "c-1", 3, None, 2) == (
            letter.message_id,
            letter.correlation_id,
            letter.priority,
            letter.expiration,
            letter.delivery_mode,
        )
        said = dict(letter.headers)
        assert said.pop("x-first-failed-at") <= said.pop("x-dead-lettered-at")
        assert {
            "tenant": "acme",
            "x-dead-letter-reason": "exhausted",
            "x-exception-type": "builtins.LookupError",
            "x-exception-message": "no such order",
            "x-original-queue": name,
            "x-original-exchange": f"{name}.x",
            "x-original-routing-key": "order.created",
            "x-original-expiration": "600000",
            "x-retry-count": 1,
        } == said
