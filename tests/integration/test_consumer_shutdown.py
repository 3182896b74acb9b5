"""Graceful shutdown: batches in progress are finished, and the rest stays in the queue."""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import time
from collections import Counter

import pytest

from aio_pika_batch import (
    BatchConsumer,
    BatchConsumerSettings,
    DrainIncomplete,
    MessageResult,
    SessionClosed,
    StartInterrupted,
)
from tests.integration.helpers import (
    PATIENCE,
    QUEUE_TYPES,
    SLACK,
    Recorder,
    Stopwatch,
    app,
    consumers,
    holds,
    publish,
    ready,
    take_all,
    until,
)


def numbered(count: int, kind: str = "good") -> list[bytes]:
    """Return messages as the programs understand them."""
    return [json.dumps({"id": each, "kind": kind}).encode() for each in range(count)]


# --- signals --------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@QUEUE_TYPES
async def test_a_signal_during_a_batch_finishes_it_and_returns_the_rest(
    channel, amqp_url, name, tmp_path, queue_type, number
) -> None:
    """Nothing twice, nothing lost, exit code 0."""
    async with app(
        "work",
        tmp_path,
        amqp_url,
        name,
        queue_type=queue_type,
        batch_size=20,
        batch_timeout=0.1,
        prefetch_count=100,
        pace=0.5,
    ) as program:
        await program.noted("consuming")
        await publish(channel, numbered(200), routing_key=name)
        await program.noted("begin", 3)  # two are done, and the third is being handled
        program.send(number)
        code = await program.ended()

    assert 0 == code, program.printed
    begun = [each for batch in program.of("begin") for each in batch]
    done = program.of("done")
    assert begun == done
    assert len(program.of("end")) == len(program.of("begin"))
    assert [name] == program.of("on_stop")
    left = await take_all(channel, name, 200 - len(done))
    assert Counter(range(200)) == Counter(done) + Counter(
        json.loads(message.body)["id"] for message in left
    )


async def test_one_signal_stops_all_consumers_of_a_process(
    channel, amqp_url, name, tmp_path
) -> None:
    """Each finishes its batch and calls its hook."""
    queues = [f"{name}.{each}" for each in range(3)]
    async with app(
        "work",
        tmp_path,
        amqp_url,
        ",".join(queues),
        batch_size=10,
        batch_timeout=0.1,
        pace=0.5,
        num_workers=2,
    ) as program:
        await program.noted("consuming")
        for queue in queues:
            await publish(channel, numbered(60), routing_key=queue)
        await program.noted("begin", 6)
        program.send(signal.SIGTERM)
        assert 0 == await program.ended(), program.printed

    assert sorted(queues) == sorted(program.of("on_stop"))
    assert len(program.of("end")) == len(program.of("begin"))
    left = sum([await ready(amqp_url, queue) for queue in queues])
    assert 180 == len(program.of("done")) + left


async def test_a_second_signal_abandons_the_drain(channel, amqp_url, name, tmp_path) -> None:
    """Messages in handlers go back; the exit code and the error say so."""
    async with app(
        "work", tmp_path, amqp_url, name, batch_size=10, batch_timeout=0.1, pace=600
    ) as program:
        await program.noted("consuming")
        await publish(channel, numbered(30), routing_key=name)
        await program.noted("begin")
        program.send(signal.SIGTERM)
        await until(lambda: "draining" in program.printed)
        assert program.process.poll() is None
        watch = Stopwatch()
        program.send(signal.SIGTERM)
        code = await program.ended()

    assert 0 != code
    assert "DrainIncomplete" in program.printed
    assert watch.seconds < SLACK  # the drain itself would take 25 s
    await holds(amqp_url, name, 30)


# --- order and time ---------------------------------------------------------------


class Slow(BatchConsumer):
    """Waits for permission in each batch, and records what happens in order."""

    def __init__(self, settings, **more) -> None:
        super().__init__(settings, **more)
        self.may_end = asyncio.Event()
        self.begun: list[bytes] = []
        self.done: list[bytes] = []
        self.story: list[object] = []

    async def process_messages(self, messages):
        self.begun += [message.body for message in messages]
        self.story.append("begin")
        await self.may_end.wait()
        for message in messages:
            self.done.append(message.body)
            yield MessageResult.ACK
        self.story.append("end")

    async def on_stop(self) -> None:
        self.story.append(("on_stop", await consumers(self.settings.url, self.settings.queue_name)))


async def test_a_drain_handles_buffered_messages_if_a_slot_is_free(channel, amqp_url, name) -> None:
    """It does not wait for `batch_timeout`; the hook runs last, after everything is settled."""
    recorder = Recorder()
    consumer = Slow(
        BatchConsumerSettings(url=amqp_url, queue_name=name, batch_size=10, batch_timeout=600),
        observers=[recorder],
    )
    consumer.may_end.set()
    await consumer.start()
    await publish(channel, numbered(3), routing_key=name)
    await until(lambda: consumer.status().workers[0].buffered == 3)
    await consumer.stop()

    assert ["drain"] == recorder.triggers
    assert ["begin", "end", ("on_stop", 0)] == consumer.story
    assert numbered(3) == consumer.done
    assert not consumer.is_running
    assert 0 == await ready(amqp_url, name)


@QUEUE_TYPES
@pytest.mark.usefixtures("on_both_wires")
async def test_a_drain_returns_buffered_messages_if_all_slots_are_taken(
    channel, amqp_url, name, queue_type
) -> None:
    """Even if a slot becomes free later."""
    consumer = Slow(
        BatchConsumerSettings(
            url=amqp_url,
            queue_name=name,
            batch_size=5,
            # The first batch is full, however long the change of the prefetch count takes.
            batch_timeout=60,
            prefetch_count=20,
            queue_type=queue_type,
        )
    )
    # A session on a quorum queue starts with prefetch 1, beside which the full prefetch counts.
    extra = 1 if queue_type == "quorum" else 0
    await consumer.start()
    await publish(channel, numbered(30), routing_key=name)
    await until(lambda: consumer.status().workers[0].buffered == 15 + extra, what=consumer.status)
    assert "consuming" == consumer.status().workers[0].state.value
    stopping = asyncio.ensure_future(consumer.stop())
    await until(lambda: "draining" == consumer.status().workers[0].state.value)
    assert not consumer.is_healthy
    await ready(amqp_url, name)  # time for the broker to confirm the cancellation
    assert not stopping.done()
    consumer.may_end.set()
    await stopping

    assert consumer.begun == consumer.done
    # Should the broker take longer, a slot is free by then, and what is being collected gets it.
    assert len(consumer.done) in {5, 10}
    left = await take_all(channel, name, 30 - len(consumer.done))
    assert Counter(numbered(30)) == Counter(consumer.done) + Counter(each.body for each in left)


async def test_a_drain_ends_in_time_whatever_the_handler_does(channel, amqp_url, name) -> None:
    """After `shutdown_timeout`; cut-off messages go back, and `run` says how many."""
    consumer = Slow(
        BatchConsumerSettings(
            url=amqp_url, queue_name=name, batch_size=5, batch_timeout=60, shutdown_timeout=2.0
        )
    )
    running = asyncio.ensure_future(consumer.run())
    await until(lambda: consumer.is_healthy)
    await publish(channel, numbered(5), routing_key=name)
    await until(lambda: consumer.begun)
    watch = Stopwatch()
    consumer.request_stop()
    with pytest.raises(DrainIncomplete, match="5 messages"):
        await running
    assert 1.0 < watch.seconds < 2.0 + SLACK  # by default it would take 25 s
    assert ["begin", ("on_stop", 0)] == consumer.story
    await holds(amqp_url, name, 5)


async def test_a_drain_ends_in_time_if_the_broker_is_silent(amqp_url, name, proxy, caplog) -> None:
    """After `shutdown_timeout`."""
    consumer = Slow(
        BatchConsumerSettings(
            url=proxy.url(amqp_url),
            queue_name=name,
            batch_size=5,
            batch_timeout=0.05,
            shutdown_timeout=2.0,
        )
    )
    consumer.on_stop = lambda: asyncio.sleep(0)
    consumer.may_end.set()
    await consumer.start()
    proxy.freeze()
    watch = Stopwatch()
    await consumer.stop()
    assert watch.seconds < 2.0 + SLACK
    del consumer
    gc.collect()
    assert "never retrieved" not in caplog.text


async def test_results_that_come_at_the_last_moment_are_settled(channel, amqp_url, name) -> None:
    """Those of a handler that ends just in time."""
    consumer = Slow(
        BatchConsumerSettings(
            url=amqp_url, queue_name=name, batch_size=5, batch_timeout=60, shutdown_timeout=6.0
        )
    )
    await consumer.start()
    await publish(channel, numbered(10), routing_key=name)
    await until(lambda: consumer.begun and 5 == consumer.status().workers[0].buffered)
    asyncio.get_running_loop().call_later(2.0, consumer.may_end.set)
    await consumer.stop()
    assert len(consumer.done) in {5, 10}
    await holds(amqp_url, name, 10 - len(consumer.done))


@pytest.fixture
def quorum(broker) -> str:
    """The queue type: quorum, except on RabbitMQ 3.8.

    There a cancelled consumer of a quorum queue still gets returned messages, and acked ones may
    come again with them, with any client. A classic queue does neither.
    """
    return "classic" if broker.version.startswith("3.8.") else "quorum"


# --- nothing twice ----------------------------------------------------------------


@pytest.mark.parametrize(
    "attempt", [0, *(pytest.param(each, marks=pytest.mark.long) for each in (1, 2))]
)
@pytest.mark.parametrize("pattern", ["ack, nack", "ack, requeue"])
@pytest.mark.usefixtures("on_both_wires")
async def test_a_quorum_queue_loses_none_of_many_single_settlements(
    channel, amqp_url, name, pattern, attempt, quorum
) -> None:
    """Its channel delays acks if there are many: acked messages must not come again."""
    results = [
        MessageResult.ACK,
        MessageResult.NACK if "nack" in pattern else MessageResult.REQUEUE_IMMEDIATE,
    ]
    done = asyncio.Event()
    acked, refused = set(), set()

    class Alternating(BatchConsumer):
        async def process_messages(self, messages):
            for index, message in enumerate(messages):
                yield results[index % 2]
                (refused if index % 2 else acked).add(message.body)
            done.set()
            self.request_stop()

    consumer = Alternating(
        BatchConsumerSettings(
            url=amqp_url,
            queue_name=name,
            queue_type=quorum,
            batch_size=1000,
            batch_timeout=600,
            prefetch_count=1000,
        )
    )
    running = asyncio.ensure_future(consumer.run())
    await until(lambda: consumer.is_healthy)
    await publish(channel, numbered(1000), routing_key=name)
    await asyncio.wait_for(done.wait(), PATIENCE)
    await running

    again = {message.body for message in await take_all(channel, name)}
    assert set(numbered(1000)) == acked | refused
    assert set() == again & acked
    # What was put back early may have come again, and have been acked, while it drained.
    assert (set() if "nack" in pattern else refused - acked) == again


async def test_start_and_stop_in_turns_handle_everything_once(
    channel, amqp_url, name, quorum
) -> None:
    """The consumer is stopped again and again under load: no message twice, none lost."""
    handled: Counter[bytes] = Counter()

    class Counting(BatchConsumer):
        async def process_messages(self, messages):
            for message in messages:
                await asyncio.sleep(0)
                handled[message.body] += 1
                yield MessageResult.ACK

    consumer = Counting(
        BatchConsumerSettings(
            url=amqp_url,
            queue_name=name,
            queue_type=quorum,
            batch_size=25,
            batch_timeout=0.05,
            num_workers=2,
        )
    )
    async with consumer:
        pass
    await publish(channel, numbered(1000), routing_key=name)
    for turn in range(1, 4):
        async with consumer:
            await until(lambda turn=turn: len(handled) >= 200 * turn)
    left = await take_all(channel, name, 1000 - len(handled))
    assert Counter(numbered(1000)) == handled + Counter(message.body for message in left)


# --- stopping at odd moments --------------------------------------------------------


async def test_stop_is_idempotent_and_may_come_from_a_handler(channel, amqp_url, name) -> None:
    """A handler that stops its own consumer does not wait for itself."""
    settings = BatchConsumerSettings(url=amqp_url, queue_name=name, batch_timeout=0.05)

    class Last(BatchConsumer):
        async def process_messages(self, messages):
            for _ in messages:
                await self.stop()
                yield MessageResult.ACK

    consumer = Last(settings)
    await consumer.start()
    assert consumer.is_running
    assert consumer.is_healthy
    await publish(channel, numbered(1), routing_key=name)
    await until(lambda: not consumer.is_running)
    await asyncio.gather(consumer.stop(), consumer.stop())
    assert not consumer.is_healthy
    assert 0 == await ready(amqp_url, name)
    with pytest.raises(SessionClosed):
        await consumer.publish(b"", routing_key=name)


async def test_stop_interrupts_a_start_that_waits_for_its_broker(
    channel, amqp_url, name, proxy
) -> None:
    """A broker that refuses connections is waited for until the stop."""
    await proxy.refuse()
    hooks = []

    class Hooked(Slow):
        async def on_start(self) -> None:
            hooks.append("on_start")

        async def on_stop(self) -> None:
            hooks.append("on_stop")

    consumer = Hooked(
        BatchConsumerSettings(
            url=proxy.url(amqp_url), queue_name=name, reconnect_delay=0.1, reconnect_delay_max=0.3
        )
    )
    starting = asyncio.ensure_future(consumer.start())
    await until(lambda: consumer.is_running and consumer.status().workers)
    worker = await until(lambda: [w for w in consumer.status().workers if w.last_error])
    assert "connection refused" in worker[0].last_error
    assert not consumer.is_healthy
    watch = Stopwatch()
    await consumer.stop()
    with pytest.raises(StartInterrupted):
        await starting
    assert watch.seconds < SLACK
    assert ["on_start", "on_stop"] == hooks

    starting = asyncio.ensure_future(consumer.start())
    began = time.monotonic()
    await until(lambda: time.monotonic() - began > 0.5)
    assert not starting.done()
    await proxy.refuse(False)
    await asyncio.wait_for(starting, PATIENCE)
    assert consumer.is_healthy
    await consumer.stop()
