"""What you subclass: BatchConsumer, and Consumer for one message at a time."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Sequence
from typing import TypeAlias

from aio_pika_batch.batch_settings import BatchConsumerSettings
from aio_pika_batch.core.message import Message
from aio_pika_batch.core.results import Result
from aio_pika_batch.errors import ConfigurationError
from aio_pika_batch.lifecycle import BaseConsumer
from aio_pika_batch.runtime.handler import Process
from aio_pika_batch.settings import ConsumerSettings

Yield: TypeAlias = Result | tuple[Message, Result]
"""What `process_messages` may yield."""


class BatchConsumer(BaseConsumer[BatchConsumerSettings]):
    """Consumes batches: override `process_messages`.

    Example::

        class Importer(BatchConsumer):
            async def process_messages(self, messages):
                for message in messages:
                    yield MessageResult.ACK if await store(message) else MessageResult.REQUEUE


        asyncio.run(Importer(BatchConsumerSettings(queue_name="orders")).run())
    """

    settings_class = BatchConsumerSettings

    def process_messages(self, messages: Sequence[Message]) -> AsyncIterator[Yield]:
        """Yield a result for each message.

        The i-th yield is the i-th message's; a handler that works out of order yields `(message,
        result)` instead. What is left undecided, by an exception or by ending early, gets
        `unhandled_exception_action`: a missing result is never an ACK.

        Args:
            messages: Oldest first, never empty, at most `batch_size`.
        """
        raise NotImplementedError

    def _process(self) -> Process:
        return self.process_messages

    def _check_class(self) -> None:
        method = type(self).process_messages
        if method is BatchConsumer.process_messages:
            msg = f"{type(self).__name__} must override process_messages, an async generator"
            raise ConfigurationError(msg)
        if inspect.iscoroutinefunction(method) or inspect.isgeneratorfunction(method):
            msg = (
                f"{type(self).__name__}.process_messages is no async generator: it must be an"
                " `async def` that yields a MessageResult for each message"
            )
            raise ConfigurationError(msg)


class Consumer(BaseConsumer[ConsumerSettings]):
    """Consumes one message at a time: override `process_message`.

    `concurrency` of them run at once.
    """

    settings_class = ConsumerSettings

    async def process_message(self, message: Message) -> Result:
        """Return the result for a message, or raise: then it gets `unhandled_exception_action`."""
        raise NotImplementedError

    async def _one_by_one(self, messages: Sequence[Message]) -> AsyncIterator[Yield]:
        for message in messages:
            yield await self.process_message(message)

    def _process(self) -> Process:
        return self._one_by_one

    def _check_class(self) -> None:
        if type(self).process_message is Consumer.process_message:
            msg = f"{type(self).__name__} must override process_message, a coroutine"
            raise ConfigurationError(msg)
