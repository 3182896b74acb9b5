"""What goes through the pipeline, and who handles it?

Orders come in: most are good, some are no JSON, some fail twice before they go well, and a few fail
for ever. Each good one becomes an invoice, which is the end of it. The rest are dead letters.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from enum import Enum

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

FLAKY_FAILURES = 2
"""How often a flaky order fails before it goes well."""


class Kind(Enum):
    """What an order will do, and its share of the stream."""

    GOOD = 0.90
    BAD = 0.03
    FLAKY = 0.06
    HOPELESS = 0.01


class Stream:
    """Orders that are drawn one after another.

    Attributes:
        drawn: How many of each kind there were.
    """

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)
        self.drawn: Counter[Kind] = Counter()

    def take(self, count: int, now: float) -> list[bytes]:
        """Draw the bodies of some orders; one that is no JSON tells its number all the same."""
        kinds = list(Kind)
        bodies = []
        for kind in self._draw.choices(kinds, [kind.value for kind in kinds], k=count):
            number = self.drawn.total()
            self.drawn[kind] += 1
            order = json.dumps({"number": number, "kind": kind.name, "at": now})
            bodies.append(f"{number} {{ no JSON".encode() if kind is Kind.BAD else order.encode())
        return bodies


class Orders(BatchConsumer):
    """The first stage: makes an invoice of each order that goes well."""

    def __init__(
        self, settings: BatchConsumerSettings, *, invoices: str, observers: Sequence[Observer]
    ) -> None:
        super().__init__(settings, observers=observers)
        self._invoices = invoices

    async def process_messages(
        self, messages: Sequence[Message]
    ) -> AsyncIterator[tuple[Message, Result]]:
        """Decide about each order by what is in it."""
        good = []
        for message in messages:
            order = message.json()  # what is no JSON is dead-lettered, alone
            is_flaky = order["kind"] == Kind.FLAKY.name and message.retry_count < FLAKY_FAILURES
            if is_flaky or order["kind"] == Kind.HOPELESS.name:
                yield message, MessageResult.REQUEUE
            else:
                good.append(message)
        await asyncio.sleep(0.01 + len(good) / 20_000)
        outcomes = await self.publish_many(
            [Publication(each.body, routing_key=self._invoices) for each in good]
        )
        for message, outcome in zip(good, outcomes, strict=True):
            is_safe = outcome is Outcome.CONFIRMED
            yield message, MessageResult.ACK if is_safe else MessageResult.REQUEUE


class Invoices(BatchConsumer):
    """The second stage: the end of the pipeline. Now and then it is slow.

    Attributes:
        seen: How often each order's invoice has arrived, by its number.
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
        self._moods = random.Random(settings.queue_name)

    async def process_messages(self, messages: Sequence[Message]) -> AsyncIterator[Result]:
        """Take note of each."""
        slow = self._moods.random() < 0.02  # noqa: PLR2004  -- one batch in fifty
        await asyncio.sleep(0.5 if slow else 0.02)
        for message in messages:
            order = message.json()
            self.seen[order["number"]] += 1
            self._on_arrival(order["at"])
            yield MessageResult.ACK


class Undertaker(BatchConsumer):
    """Receives the dead letters.

    Attributes:
        reasons: How many there are, by reason.
        seen: How often each order has arrived as a dead letter, by its number.
    """

    def __init__(self, settings: BatchConsumerSettings) -> None:
        super().__init__(settings)
        self.reasons: Counter[str] = Counter()
        self.seen: Counter[int] = Counter()

    async def process_messages(self, messages: Sequence[Message]) -> AsyncIterator[Result]:
        """Count each by its reason."""
        for message in messages:
            self.reasons[str(message.headers.get("x-dead-letter-reason"))] += 1
            self.seen[number_of(message.body)] += 1
            yield MessageResult.ACK


class Cleaner(Consumer):
    """Removes what the demo has declared, when nobody uses it any more.

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


def number_of(body: bytes) -> int:
    """Return the number of an order, be it JSON or not."""
    head, _, _ = body.partition(b" ")
    return int(head) if head.isdigit() else int(json.loads(body)["number"])
