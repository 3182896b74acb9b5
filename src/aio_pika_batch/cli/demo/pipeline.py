"""The demo's pipeline: orders become invoices, and the rest become dead letters."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import Parameter

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
from aio_pika_batch.adapters.memory import MemoryTransport
from aio_pika_batch.cli.app import Flag
from aio_pika_batch.cli.demo.orders import (
    FLAKY_FAILURES,
    CountCheck,
    OrderKind,
    OrderStream,
    PipelineStats,
    check_counts,
    number_of,
)
from aio_pika_batch.core.retry import make_delay_steps, wait_queue_name
from aio_pika_batch.core.topology import Topology
from aio_pika_batch.status import ConsumerStatus
from aio_pika_batch.transport import Endpoint, open_transport

MAX_REQUEUE_ATTEMPTS = 3
REQUEUE_DELAY = 0.25
TICK = 0.05
DRAIN_TIMEOUT = 60.0
"""Seconds after the last order within which all orders must be handled."""
CHAOS_INTERVAL = 3.0
"""Seconds between cut connections."""


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
    """The second stage: counts invoices by order number. One batch in fifty is slow."""

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
    """Counts dead letters by reason, and by the number of their order."""

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
    """Deletes the queues and the exchange of the demo."""

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


# --- the pipeline ----------------------------------------------------------------


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """Options for the load and the pipeline."""

    rate: int = 500
    """Orders per second."""
    seconds: float = 10.0
    """How long to publish orders."""
    batch_size: int = 50
    """Maximum orders in a batch; twice as many for invoices."""
    workers: Annotated[int, Parameter(alias="-w")] = 2
    """Number of workers that handle orders."""
    seed: int = 1
    """Seed of the random orders."""
    chaos: Flag = False
    """Cut all connections every 3 seconds; needs memory://."""


class Pipeline:
    """Orders, their invoices, and the dead letters of both."""

    def __init__(self, url: str, options: DemoOptions) -> None:
        self.url = url
        self.options = options
        self.stats = PipelineStats(time.monotonic)
        self._stream = OrderStream(options.seed)
        self._seconds = options.seconds
        prefix = f"aio-pika-batch.demo.{random.randrange(16**6):06x}"
        self._exchange = f"{prefix}.dlx"
        self._dead = DeadLetterCounter(
            self._settings(
                f"{prefix}.dead",
                exchange_name=self._exchange,
                exchange_type="fanout",
                # A dead letter must not be dead-lettered again.
                unhandled_exception_action=MessageResult.NACK,
            )
        )
        self._invoices = Invoices(
            self._settings(f"{prefix}.invoices", batch_size=2 * options.batch_size),
            observers=[self.stats],
            on_arrival=lambda since: self.stats.arrived(time.monotonic() - since),
        )
        self._orders = Orders(
            self._settings(
                f"{prefix}.orders",
                dead_letter_exchange=self._exchange,
                batch_size=options.batch_size,
                num_workers=options.workers,
                max_requeue_attempts=MAX_REQUEUE_ATTEMPTS,
                requeue_delay=REQUEUE_DELAY,
            ),
            invoices=f"{prefix}.invoices",
            observers=[self.stats],
        )
        self.stages = (self._orders, self._invoices)
        self._is_declared = False

    def _settings(self, queue: str, **more: Any) -> BatchConsumerSettings:  # noqa: ANN401  -- settings'
        return BatchConsumerSettings(
            url=self.url,
            queue_name=queue,
            batch_timeout=0.25,
            reconnect_delay=0.2,
            reconnect_delay_max=0.5,
            **more,
        )

    @property
    def published(self) -> int:
        """Number of published orders."""
        return self._stream.drawn.total()

    @property
    def finished(self) -> int:
        """Number of orders with an invoice or a dead letter."""
        return len({*self._invoices.seen, *self._dead.seen})

    def statuses(self) -> dict[str, ConsumerStatus]:
        """Return the status of each stage, by the consumer's class name."""
        return {type(each).__name__: each.status() for each in self.stages}

    async def start(self, stack: AsyncExitStack) -> None:
        """Start the consumers; closing the stack stops them and deletes what they declared.

        Raises:
            AioPikaBatchError: The broker is unreachable, or refuses.
        """
        # A consumer would wait for its broker, and say nothing: the log is off.
        await open_transport(Endpoint(url=self.url)).declare(Topology())
        stack.push_async_callback(self._clean_up)
        await stack.enter_async_context(self._dead)
        self._is_declared = True
        await stack.enter_async_context(self._invoices)
        await stack.enter_async_context(self._orders)

    def stop(self) -> None:
        """End publishing; what was published is still handled."""
        self._seconds = 0.0

    async def publish(self) -> None:
        """Publish orders at a steady rate, and publish again what isn't confirmed."""
        began = time.monotonic()
        cut_at = began + CHAOS_INTERVAL
        pending: list[Publication] = []
        while (now := time.monotonic()) < (ends := began + self._seconds) or pending:
            if now < ends:
                due = int((now - began) * self.options.rate) - self.published
                pending += [
                    Publication(body, routing_key=self._orders.settings.queue_name)
                    for body in self._stream.take(due, now)
                ]
            outcomes = await self._orders.publish_many(pending)
            pending = [
                publication
                for publication, outcome in zip(pending, outcomes, strict=True)
                if outcome is not Outcome.CONFIRMED
            ]
            if self.options.chaos and now > cut_at:
                cut_at = now + CHAOS_INTERVAL
                self._cut()
            await asyncio.sleep(TICK)

    async def wait_finished(self) -> bool:
        """Wait until all orders are finished; return whether that was in time."""
        deadline = time.monotonic() + DRAIN_TIMEOUT
        while self.finished < self.published:
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(TICK)
        # An order that is delivered a second time may still be on its way.
        await asyncio.sleep(5 * TICK)
        return True

    def check_counts(self) -> list[CountCheck]:
        """Compare the published orders with what happened to them."""
        return check_counts(
            self._stream.drawn,
            self._invoices.seen,
            self._dead.seen,
            self._dead.reasons,
            retries=self.stats.stage(Orders.__name__).retries,
            attempts=MAX_REQUEUE_ATTEMPTS,
            lost_connections=self.stats.lost_connections,
        )

    def _cut(self) -> None:
        transport = open_transport(Endpoint(url=self.url))
        if isinstance(transport, MemoryTransport):
            transport.broker.cut()

    async def _clean_up(self) -> None:
        if not self._is_declared:
            return
        orders = self._orders.settings.queue_name
        waits = make_delay_steps(REQUEUE_DELAY).steps_for(MAX_REQUEUE_ATTEMPTS)
        cleaner = Cleaner(
            ConsumerSettings(url=self.url, queue_name=f"{orders}.cleaner", queue_auto_delete=True),
            queues=[
                *(each.settings.queue_name for each in (*self.stages, self._dead)),
                *(wait_queue_name(orders, wait) for wait in waits),
            ],
            exchange=self._exchange,
        )
        async with cleaner, asyncio.timeout(DRAIN_TIMEOUT):
            await cleaner.done.wait()
