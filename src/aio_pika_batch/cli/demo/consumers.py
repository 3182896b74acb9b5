"""The consumers of the demo: orders become invoices, and the rest become dead letters."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence

from aio_pika_batch import (
    BatchConsumer,
    BatchConsumerSettings,
    Consumer,
    ConsumerSettings,
    Message,
    MessageResult,
    Observer,
    Outcome,
    Publication,
    Result,
    WorkerSession,
)
from aio_pika_batch.cli.demo.orders import FLAKY_FAILURES, OrderKind, number_of


class Orders(BatchConsumer):
    """The first stage: publishes an invoice for each order that succeeds."""

    def __init__(
        self, settings: BatchConsumerSettings, *, invoices: str, observers: Sequence[Observer]
    ) -> None:
        super().__init__(settings, observers=observers)
        self._invoices = invoices

    async def process_messages(
        self, messages: Sequence[Message]
    ) -> AsyncIterator[tuple[Message, Result]]:
        """Requeue the orders that fail, and publish invoices for the others."""
        good = []
        for message in messages:
            order = message.json()  # if it isn't valid JSON, only this message is dead-lettered
            is_flaky = (
                order["kind"] == OrderKind.FLAKY.name and message.retry_count < FLAKY_FAILURES
            )
            if is_flaky or order["kind"] == OrderKind.HOPELESS.name:
                yield message, MessageResult.REQUEUE
            else:
                good.append(message)
        # Stands in for the work of a real handler, which takes time per batch and per message.
        await asyncio.sleep(0.01 + len(good) / 20_000)
        outcomes = await self.publish_many(
            [Publication(each.body, routing_key=self._invoices) for each in good]
        )
        for message, outcome in zip(good, outcomes, strict=True):
            is_confirmed = outcome is Outcome.CONFIRMED
            yield message, MessageResult.ACK if is_confirmed else MessageResult.REQUEUE


class Invoices(BatchConsumer):
    """The second stage: the end of the pipeline. One batch in fifty is slow.

    Attributes:
        seen: How often the invoice of each order arrived, by the order's number.
    """

    def __init__(
        self,
        settings: BatchConsumerSettings,
        *,
        observers: Sequence[Observer],
        on_arrival: Callable[[float], None],
    ) -> None:
        super().__init__(settings, observers=observers)
        self.seen: Counter[int] = Counter()
        self._on_arrival = on_arrival
        self._random = random.Random(settings.queue_name)

    async def process_messages(self, messages: Sequence[Message]) -> AsyncIterator[Result]:
        """Count each invoice."""
        is_slow = self._random.random() < 0.02  # noqa: PLR2004  -- one batch in fifty
        await asyncio.sleep(0.5 if is_slow else 0.02)
        for message in messages:
            order = message.json()
            self.seen[order["number"]] += 1
            self._on_arrival(order["at"])
            yield MessageResult.ACK


class DeadLetterCounter(BatchConsumer):
    """Counts the dead letters.

    Attributes:
        reasons: Dead letters by reason.
        seen: How often each order arrived as a dead letter, by its number.
    """

    def __init__(self, settings: BatchConsumerSettings) -> None:
        super().__init__(settings)
        self.reasons: Counter[str] = Counter()
        self.seen: Counter[int] = Counter()

    async def process_messages(self, messages: Sequence[Message]) -> AsyncIterator[Result]:
        """Count each dead letter."""
        for message in messages:
            self.reasons[str(message.headers.get("x-dead-letter-reason"))] += 1
            self.seen[number_of(message.body)] += 1
            yield MessageResult.ACK


class Cleaner(Consumer):
    """Deletes the queues and the exchange of the demo.

    Args:
        queues: Their names.
        exchange: Its name.
    """

    def __init__(self, settings: ConsumerSettings, *, queues: Sequence[str], exchange: str) -> None:
        super().__init__(settings)
        self._queues = queues
        self._exchange = exchange
        self.done = asyncio.Event()

    async def on_session(self, session: WorkerSession) -> None:
        """Delete them."""
        channel = (await session.native()).channel
        for name in self._queues:
            queue = await channel.get_queue(name, ensure=False)
            await queue.delete(if_unused=False, if_empty=False)
        exchange = await channel.get_exchange(self._exchange, ensure=False)
        await exchange.delete()
        self.done.set()

    async def process_message(self, message: Message) -> Result:
        """Never called: nothing is published to its queue."""
        raise NotImplementedError(message)
