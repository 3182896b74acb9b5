"""Do type checkers agree with what users are told to write, and object to what is wrong?

Never run, only checked, by mypy and by pyright. Every ``type: ignore`` is an expectation: where a
checker has nothing to object to, it objects to that.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import assert_type

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
    """A string is no result."""

    async def process_messages(  # type: ignore[override]
        self, messages: Sequence[Message]
    ) -> AsyncIterator[str]:
        for _ in messages:
            yield "ack"


async def run(settings: BatchConsumerSettings) -> None:
    """A consumer knows the settings that it was made with."""
    async with InOrder(settings) as consumer:
        assert_type(consumer, InOrder)
        assert_type(consumer.settings, BatchConsumerSettings)
        assert_type(consumer.is_running, bool)
        assert_type(consumer.is_healthy, bool)
    assert_type(await OneByOne().run(), None)
    assert_type(OneByOne().settings, ConsumerSettings)
    InOrder(transport="amqp://localhost")  # type: ignore[arg-type]
