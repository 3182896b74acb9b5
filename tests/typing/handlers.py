"""Type checkers accept the handlers that the docs show, and reject wrong ones.

This is never run, only checked by mypy and pyright. Every ``type: ignore`` is an expectation: a
checker reports one that isn't needed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Generic, TypeVar, assert_type

from aio_pika import Channel
from aio_pika.abc import AbstractIncomingMessage, AbstractQueue
from structlog.typing import FilteringBoundLogger

from aio_pika_batch import (
    BatchConsumer,
    BatchConsumerSettings,
    Consumer,
    ConsumerSettings,
    Message,
    MessageResult,
    Nack,
    Requeue,
    Result,
    Yield,
)


class InOrder(BatchConsumer):
    """One result per message, in their order: a plain one, or one with a reason."""

    async def process_messages(self, messages: Sequence[Message]) -> AsyncIterator[Result]:
        for message in messages:
            assert_type(message.body, bytes)
            assert_type(message.redelivered, bool)
            assert_type(message.retry_count, int)
            yield MessageResult.ACK
            yield Nack(reason="no such customer")
            yield Requeue(reason="the bank is closed")


class OutOfOrder(BatchConsumer):
    """Each message with its result."""

    async def process_messages(
        self, messages: Sequence[Message]
    ) -> AsyncIterator[tuple[Message, Result]]:
        for message in reversed(messages):
            yield message, MessageResult.NACK


class OneByOne(Consumer):
    """One message at a time."""

    async def process_message(self, message: Message) -> Result:
        return MessageResult.ACK if message.body else Nack()


class AnswersInStrings(BatchConsumer):
    """A string isn't a result."""

    async def process_messages(  # type: ignore[override]
        self, messages: Sequence[Message]
    ) -> AsyncIterator[str]:
        for _ in messages:
            yield "ack"


class TakesAList(BatchConsumer):
    """A batch is a list."""

    async def process_messages(self, messages: list[Message]) -> AsyncGenerator[Yield, None]:
        for message in messages:
            yield message, Requeue(delay=1)
            yield MessageResult.ACK


class Importing(TakesAList):
    """Passes its batch on to the class that it extends."""

    async def process_messages(self, messages: list[Message]) -> AsyncGenerator[Yield, None]:
        async for each in super().process_messages(messages):
            yield each


# --- settings of one's own ----------------------------------------------------


class MySettings(BatchConsumerSettings):
    """With a field of its own."""

    database: str = "postgresql:///orders"


class MyOneByOneSettings(ConsumerSettings):
    """The same for single messages."""

    database: str = "postgresql:///orders"


class WithSettings(BatchConsumer[MySettings]):
    """Knows the fields of its settings."""

    async def process_messages(self, messages: list[Message]) -> AsyncIterator[Result]:
        assert_type(self.settings.database, str)
        for _ in messages:
            yield MessageResult.ACK


class OneByOneWithSettings(Consumer[MyOneByOneSettings]):
    """The same for single messages; a batch's settings are settings, too."""

    async def process_message(self, message: Message) -> Result:
        assert_type(self.settings.database, str)
        return MessageResult.ACK


class OneByOneOfABatch(Consumer[MySettings]):
    """Settings for batches have all that single messages need."""

    async def process_message(self, message: Message) -> Result:
        assert_type(self.settings.batch_size, int)
        return MessageResult.ACK


S = TypeVar("S", bound=BatchConsumerSettings)
T = TypeVar("T")


class Base(BatchConsumer[S], Generic[T, S]):
    """A base class of one's own, generic over its settings and something else."""

    def parse(self, message: Message) -> T:
        raise NotImplementedError(message)

    async def process_messages(self, messages: list[Message]) -> AsyncIterator[Result]:
        for message in messages:
            self.parse(message)
            yield MessageResult.ACK


class Derived(Base[int, MySettings]):
    """Knows both."""

    def parse(self, message: Message) -> int:
        assert_type(self.settings.database, str)
        return int(message.body)


class WrongSettings(BatchConsumer[MyOneByOneSettings]):  # type: ignore[type-var]
    """A batch consumer needs the settings of batches."""


# --- as users of 0.1.0 wrote it -----------------------------------------------


class OldBatches(BatchConsumer[MySettings]):
    """Names the classes of aio-pika and of structlog."""

    async def process_messages(
        self, messages: list[AbstractIncomingMessage]
    ) -> AsyncIterator[MessageResult]:
        assert_type(self.settings, MySettings)
        for message in messages:
            yield MessageResult.ACK if message.body else MessageResult.NACK

    async def _run_internal(
        self,
        channel: Channel,
        queue: AbstractQueue,
        settings: MySettings,
        stop_event: asyncio.Event,
        log: FilteringBoundLogger,
    ) -> None:
        await super()._run_internal(channel, queue, settings, stop_event, log)


class OldOneByOne(Consumer):
    """The same for single messages."""

    async def process_message(self, message: AbstractIncomingMessage) -> MessageResult:
        return MessageResult.ACK if message.body else MessageResult.NACK


async def run(settings: BatchConsumerSettings) -> None:
    """A consumer knows the settings that it was made with."""
    async with InOrder(settings) as consumer:
        assert_type(consumer, InOrder)
        assert_type(consumer.settings, BatchConsumerSettings)
        assert_type(consumer.is_running, bool)
        assert_type(consumer.is_healthy, bool)
    assert_type(await OneByOne().run(), None)

    mine = MySettings(queue_name="orders")
    together: list[BatchConsumer] = [InOrder(settings), WithSettings(mine), OldBatches(mine)]
    await asyncio.gather(*(each.run() for each in together))
    assert_type(OneByOne().settings, ConsumerSettings)
    InOrder(transport="amqp://localhost")  # type: ignore[arg-type]
