"""The whole API type-checks as users type it.

This is never run, only checked by mypy and pyright. `handlers.py` is about handlers; this is the
program around them. `unannotated.py` is the same without annotations.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Hashable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, assert_type

from hypothesis import strategies as st
from pydantic_settings import SettingsConfigDict

from aio_pika_batch import (
    AccessRefused,
    AioPikaBatchError,
    BatchConsumer,
    BatchConsumerSettings,
    Cause,
    Consumer,
    ConsumerSettings,
    ConsumerStatus,
    DeadLetterReason,
    DrainIncomplete,
    Message,
    MessageDecodeError,
    MessageResult,
    Nack,
    Observer,
    Outcome,
    Publication,
    PublishError,
    Requeue,
    Result,
    TopologyError,
    Trigger,
    WorkerSession,
    WorkerState,
)
from aio_pika_batch.adapters.memory import (
    Broker,
    ConnectFault,
    EventKind,
    MemoryTransport,
    PublishFault,
)
from aio_pika_batch.core.publication import Outgoing
from aio_pika_batch.core.settlement import Settlement
from aio_pika_batch.core.topology import Topology
from aio_pika_batch.logs import KeywordLogger
from aio_pika_batch.observer import BatchCut, BreakerOpened, DeadLettered, Lost, Origin, Settled
from aio_pika_batch.testing import (
    BatchBroker,
    BatchOutcome,
    DeadLetter,
    RequeuedMessage,
    make_message,
    process,
)
from aio_pika_batch.testing.strategies import headers, messages, results
from aio_pika_batch.testing.virtual_time import run
from aio_pika_batch.transport import Endpoint, Publisher, Session, Subscription, Transport

# --- handlers -----------------------------------------------------------------


class Iterating(BatchConsumer):
    """The annotation that most people write."""

    async def process_messages(self, messages: Sequence[Message]) -> AsyncIterator[Result]:
        for _ in messages:
            yield MessageResult.ACK


class Generating(BatchConsumer):
    """What a generator function really returns, with a narrower item."""

    async def process_messages(
        self, messages: Sequence[Message]
    ) -> AsyncGenerator[MessageResult, None]:
        for _ in messages:
            yield MessageResult.REQUEUE_IMMEDIATE


class Mixing(BatchConsumer):
    """Reasons beside plain results."""

    async def process_messages(
        self, messages: Sequence[Message]
    ) -> AsyncGenerator[MessageResult | Nack | Requeue, None]:
        for message in messages:
            try:
                message.json()
            except MessageDecodeError as error:
                yield Nack(reason=f"{error.field}: {error}")
            else:
                yield Requeue() if message.retry_count else MessageResult.ACK
                yield Requeue(delay=2 * message.retry_count)
                yield Requeue(reason="not yet", delay=timedelta(minutes=1))


class OneByOne(Consumer):
    """One message at a time."""

    async def process_message(self, message: Message) -> MessageResult:
        assert_type(message.message_id, str | None)
        assert_type(message.timestamp, datetime | None)
        assert_type(message.expiration, float | None)
        assert_type(message.priority, int | None)
        assert_type(message.original_routing_key, str)
        assert_type(message.delivery_count, int | None)
        assert_type(message.age, float | None)
        return MessageResult.ACK


class Keyed(BatchConsumer):
    """A key of one's own type, and of no type in particular; None is none."""

    def batch_key(self, message: Message) -> tuple[str, int] | None:
        return (message.routing_key, 1) if message.routing_key else None

    async def process_messages(self, messages: Sequence[Message]) -> AsyncIterator[Result]:
        assert_type(self.batch_key(messages[0]), tuple[str, int] | None)
        for _ in messages:
            yield MessageResult.ACK


class KeyedOneByOne(Consumer):
    """The same for single messages."""

    def batch_key(self, message: Message) -> Hashable:
        return message.routing_key

    async def process_message(self, message: Message) -> MessageResult:
        assert_type(message.retry_count, int)
        return MessageResult.ACK


# --- settings -----------------------------------------------------------------


class MySettings(BatchConsumerSettings):
    """With a prefix, and a setting, of its own."""

    model_config = SettingsConfigDict(env_prefix="MY_APP_")

    bucket: str = "archive"


class WithMySettings(BatchConsumer[MySettings]):
    """Knows which class its settings have."""

    exception_results: ClassVar[Mapping[type[Exception], Result]] = {
        ConnectionError: MessageResult.REQUEUE,
        ValueError: MessageResult.NACK,
    }

    async def process_messages(self, messages: Sequence[Message]) -> AsyncIterator[Result]:
        assert_type(self.settings.bucket, str)
        for _ in messages:
            yield MessageResult.ACK


class WithReasons(BatchConsumer):
    """Its exceptions get results with a reason and a delay."""

    exception_results = {  # noqa: RUF012  -- as users write it
        KeyError: Nack(reason="no customer"),
        TimeoutError: Requeue(delay=30),
        OSError: MessageResult.REQUEUE_IMMEDIATE,
    }


SETTINGS = BatchConsumerSettings(
    url="amqps://user:secret@host1,host2/vhost",
    queue_name="orders",
    exchange_name="events",
    exchange_type="topic",
    routing_key=["orders.#", "refunds.#"],
    queue_arguments={"x-message-ttl": 60_000},
    batch_size=100,
    batch_timeout=0.5,
    prefetch_count=300,
    num_workers=2,
    concurrency=4,
    unhandled_exception_action=MessageResult.NACK,
    dead_letter_queue="orders.dead",
)

# --- hooks and publishing -----------------------------------------------------


class Hooked(BatchConsumer):
    """Every hook, old and new."""

    async def on_start(self) -> None:
        await self.publish(
            b"hello",
            exchange="events",
            routing_key="started",
            headers={"x-when": datetime.now(UTC), "x-list": [1, "two"], "x-table": {"a": None}},
            message_id="1",
            expiration=60,
            mandatory=False,
        )

    async def on_session(self, session: WorkerSession) -> None:
        assert_type((session.worker, session.epoch, session.queue_name), tuple[int, int, str])
        native = await session.native()
        await native.channel.declare_exchange("events", type="topic")

    async def _run_internal(
        self,
        channel: Any,
        queue: Any,
        settings: ConsumerSettings,
        stop_event: asyncio.Event,
        log: KeywordLogger,
    ) -> None:
        log.bind(queue=queue.name).info("session", size=settings.prefetch_count)
        await super()._run_internal(channel, queue, settings, stop_event, log)

    async def process_messages(self, messages: Sequence[Message]) -> AsyncIterator[Result]:
        outcomes = await self.publish_many(
            [
                Publication(each.body, exchange="copies", expiration=timedelta(minutes=1))
                for each in messages
            ]
        )
        for outcome in outcomes:
            assert_type(outcome, Outcome)
            yield MessageResult.ACK if outcome is Outcome.CONFIRMED else MessageResult.REQUEUE


# --- observers ----------------------------------------------------------------


class Watcher(Observer):
    """Overrides what it wants to see."""

    def batch_cut(self, origin: Origin, event: BatchCut) -> None:
        if event.trigger is Trigger.TIMEOUT:
            assert_type((origin.queue, event.waited), tuple[str, float])

    def settled(self, origin: Origin, event: Settled) -> None:
        for (result, cause), count in event.counts.items():
            assert_type(result, MessageResult | None)
            assert_type(cause, Cause)
            assert_type(count, int)

    def dead_lettered(self, origin: Origin, event: DeadLettered) -> None:
        assert_type(event.reason, DeadLetterReason)

    def lost(self, origin: Origin, event: Lost) -> None:
        assert_type(event.error, BaseException)

    def breaker_opened(self, origin: Origin, event: BreakerOpened) -> None:
        assert_type((event.failed, event.samples, event.pause), tuple[int, int, float])


# --- a transport of one's own -------------------------------------------------


class MyTransport:
    """Fits the port by its shape; nothing is inherited."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint

    async def declare(self, topology: Topology) -> None:
        assert_type(topology.queues[0].name, str)

    def session(self, subscription: Subscription) -> AbstractAsyncContextManager[MySession]:
        raise NotImplementedError(subscription)

    def publisher(self) -> AbstractAsyncContextManager[MyPublisher]:
        raise NotImplementedError


class MySession:
    """A session by its shape."""

    def __aiter__(self) -> AsyncIterator[Sequence[Message]]:
        raise NotImplementedError

    async def cancel(self) -> None: ...

    async def settle(self, settlements: Sequence[Settlement]) -> None: ...


class MyPublisher:
    """A publisher by its shape."""

    is_open = True

    async def publish(self, publications: Sequence[Outgoing]) -> Sequence[Outcome]:
        return [Outcome.CONFIRMED for _ in publications]


def fits(session: MySession, publisher: MyPublisher, endpoint: Endpoint) -> Transport:
    """Checked by assigning it."""
    _session: Session = session
    _publisher: Publisher = publisher
    return MyTransport(endpoint)


# --- a program, and a test ----------------------------------------------------


async def main() -> None:
    """Three ways to run, and what can be asked meanwhile."""
    await asyncio.gather(*(each(SETTINGS).run() for each in (Iterating, Generating, Mixing)))

    consumer = Hooked(SETTINGS, observers=[Watcher()])
    try:
        await consumer.start()
    except (AccessRefused, TopologyError) as error:
        raise SystemExit(str(error)) from error
    consumer.request_stop()
    await consumer.stop()

    async with WithMySettings(
        MySettings(queue_name="orders"), transport=MyTransport(Endpoint(url="x"))
    ) as mine:
        status = mine.status()
        assert_type(status, ConsumerStatus)
        for worker in status.workers:
            assert_type(worker.state, WorkerState)
            assert_type(worker.last_error, str | None)
        with suppress(PublishError):
            await mine.publish(b"x", routing_key="orders")

    try:
        await OneByOne(ConsumerSettings(queue_name="orders")).run()
    except DrainIncomplete as error:
        assert_type(error, DrainIncomplete)
    except AioPikaBatchError:
        pass


def test_something() -> None:
    """A user's unit test."""

    async def scenario() -> int:
        broker = Broker("4.0")
        broker.faults.connect_fault = ConnectFault.NONE
        broker.faults.on_publish(PublishFault.REFUSE, times=1)
        async with Iterating(SETTINGS, transport=MemoryTransport(broker)):
            await asyncio.sleep(3600)
        assert_type(broker.ready("orders")[0].body, bytes)
        return len(broker.journal.of(EventKind.ACKED))

    assert_type(run(scenario()), int)


async def test_a_handler(batch_broker: BatchBroker) -> None:
    """The same with the test kit."""
    message = make_message(
        b"{}", headers={"x-retry-count": 1}, routing_key="created", exchange="events", priority=3
    )
    outcome = await process(Iterating(SETTINGS), [message, b"{}"], hooks=False)
    assert_type(outcome, BatchOutcome)
    assert_type(outcome.acked, list[Message])
    assert_type(outcome.requeued, list[RequeuedMessage])
    assert_type(outcome.dead_lettered, list[DeadLetter])
    assert_type(outcome.dead_lettered[0].reason, DeadLetterReason)
    assert_type(outcome.results, list[Result])
    assert_type(outcome.published[0].body, bytes)
    await process(OneByOne(ConsumerSettings(queue_name="orders")), (b"x" for _ in range(3)))

    batch_broker.declare("orders", x_queue_type="quorum")
    batch_broker.publish(b"1", b"2", routing_key="orders", expiration=timedelta(minutes=1))
    async with Iterating(SETTINGS, transport=batch_broker.transport):
        batch_broker.refuse(2, exchange="dlx")
        with batch_broker.down():
            await batch_broker.advance(60)
        await batch_broker.settled(within=600)
    assert_type(batch_broker.drain("orders")[0].body, bytes)


def draw() -> None:
    """What hypothesis is given."""
    assert_type(messages(st.binary(), queue="orders"), st.SearchStrategy[Message])
    assert_type(results, st.SearchStrategy[Result])
    assert_type(headers.example().get("x-retry-count") is None, bool)
