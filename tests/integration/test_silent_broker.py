"""A broker that leaves a request unanswered, while its heartbeats go on, stops no consumer."""

from __future__ import annotations

import asyncio

import pytest
from pamqp import commands

from aio_pika_batch import (
    BatchConsumer,
    BatchConsumerSettings,
    Consumer,
    ConsumerSettings,
    DrainIncomplete,
    MessageResult,
)
from aio_pika_batch.adapters.aio_pika import session as sessions
from aio_pika_batch.runtime import consume_loop
from tests.integration.helpers import SLACK, Stopwatch, until
from tests.support.silent_broker import SilentBroker

QUICK = {
    "queue_name": "q",
    "connect_timeout": 1,
    "publish_timeout": 1,
    "reconnect_delay": 0.1,
    "reconnect_delay_max": 0.2,
    "requeue_delay": 0,
    "without_dead_letter": "reject",
}


class Failing(BatchConsumer):
    """Fails with every message."""

    async def process_messages(self, messages):
        for _ in messages:
            yield MessageResult.REQUEUE_IMMEDIATE


class Released(Consumer):
    """ACKs messages once it is released."""

    begun = 0
    started = False

    async def start(self):
        await super().start()
        self.started = True

    async def process_message(self, message):
        self.begun += 1
        await self.release.wait()
        return MessageResult.ACK


@pytest.mark.parametrize(
    "request_",
    [
        commands.Channel.Open,
        commands.Queue.Declare,
        commands.Basic.Qos,
        commands.Basic.Consume,
    ],
)
async def test_a_request_that_is_not_answered_at_the_start_is_made_again(request_) -> None:
    """On another connection. When the broker answers, the consumer starts."""
    async with SilentBroker() as broker:
        broker.silent = {request_}
        consumer = Failing(BatchConsumerSettings(url=broker.url, **QUICK))
        starting = asyncio.create_task(consumer.start())
        await until(lambda: broker.asked[request_] >= 3)
        assert not consumer.is_healthy
        broker.silent.clear()
        await starting
        assert consumer.is_healthy
        await consumer.stop()


@pytest.mark.usefixtures("on_both_wires")
async def test_a_worker_whose_cancel_is_not_answered_consumes_again(monkeypatch) -> None:
    """Its breaker has opened, so it wants another session."""
    monkeypatch.setattr(consume_loop, "CANCEL_TIMEOUT", 0.5)
    monkeypatch.setattr(sessions, "WIND_UP_TIMEOUT", 0.5)
    async with SilentBroker(messages=30) as broker:
        broker.silent = {commands.Basic.Cancel}
        settings = BatchConsumerSettings(
            url=broker.url,
            batch_size=2,
            batch_timeout=0.05,
            breaker_threshold=0.5,
            breaker_min_samples=2,
            breaker_pause=0.1,
            shutdown_timeout=2,
            **QUICK,
        )
        consumer = Failing(settings)
        async with consumer:
            await until(lambda: broker.asked[commands.Basic.Consume] >= 3)


@pytest.mark.parametrize(
    ("request_", "unproven"),
    [
        (commands.Basic.Cancel, 40),
        (commands.Tx.Select, 40),
        (commands.Tx.Commit, 40),
        (commands.Channel.Close, 0),
        (commands.Connection.Close, 0),
    ],
)
async def test_a_stop_ends_although_a_request_is_not_answered(request_, unproven) -> None:
    """In time, and it says how many settlements are not confirmed."""
    async with SilentBroker(messages=40) as broker:
        consumer = Released(
            ConsumerSettings(
                url=broker.url, concurrency=40, prefetch_count=40, shutdown_timeout=5, **QUICK
            )
        )
        consumer.release = asyncio.Event()
        running = asyncio.create_task(consumer.run())
        await until(lambda: consumer.begun == 40 and consumer.started)
        broker.silent = {request_}
        watch = Stopwatch()
        consumer.request_stop()
        await until(lambda: broker.asked[commands.Basic.Cancel])
        consumer.release.set()
        if unproven:
            with pytest.raises(DrainIncomplete, match=f"{unproven} messages are settled"):
                await running
        else:
            await asyncio.wait({running})
        assert watch.seconds < 5 + SLACK


async def test_a_publisher_that_is_not_answered_connects_again() -> None:
    """The original waits for its copy, which is published on another connection."""

    class Requeueing(BatchConsumer):
        async def process_messages(self, messages):
            for _ in messages:
                yield MessageResult.REQUEUE

    async with SilentBroker(messages=1) as broker:
        broker.silent = {commands.Confirm.Select}
        settings = BatchConsumerSettings(
            url=broker.url, batch_timeout=0.1, shutdown_timeout=3, **QUICK
        )
        async with Requeueing(settings):
            await until(lambda: broker.asked[commands.Confirm.Select] >= 3)


async def test_a_native_channel_that_is_not_opened_ends_the_session(monkeypatch) -> None:
    """The hook that asked for it gets an error, and the worker reconnects."""
    monkeypatch.setattr(sessions, "ANSWER_TIMEOUT", 0.5)

    class Asking(Failing):
        async def on_session(self, session):
            broker.silent = {commands.Channel.Open}
            try:
                await session.native()
            finally:
                broker.silent.clear()

    async with SilentBroker() as broker:
        consumer = Asking(BatchConsumerSettings(url=broker.url, **QUICK))
        starting = asyncio.create_task(consumer.start())
        await until(lambda: broker.asked[commands.Basic.Consume] >= 3)
        consumer.request_stop()
        await asyncio.wait({starting})
