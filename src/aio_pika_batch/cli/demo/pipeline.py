"""How does a load get through the pipeline, to its end?"""

from __future__ import annotations

import asyncio
import random
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Annotated, Any

from cyclopts import Parameter

from aio_pika_batch import (
    BatchConsumerSettings,
    ConsumerSettings,
    MessageResult,
    Outcome,
    Publication,
)
from aio_pika_batch.adapters.memory import MemoryTransport
from aio_pika_batch.cli.demo.books import Row, balance
from aio_pika_batch.cli.demo.figures import Figures
from aio_pika_batch.cli.demo.load import Cleaner, Invoices, Orders, Stream, Undertaker
from aio_pika_batch.core.retry import make_delay_steps, wait_queue_name
from aio_pika_batch.status import ConsumerStatus
from aio_pika_batch.transport import Endpoint, open_transport

MAX_REQUEUE_ATTEMPTS = 3
FIRST_WAIT = 0.25
TICK = 0.05
PATIENCE = 60.0
"""Seconds after the load in which everything must have come to its end."""
CHAOS_EVERY = 3.0


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What goes through, and through what."""

    rate: int = 500
    """Orders a second."""
    seconds: float = 10.0
    """For how long."""
    batch_size: int = 50
    """Most orders in a batch; of invoices twice as many."""
    workers: Annotated[int, Parameter(alias="-w")] = 2
    """Workers of the first stage."""
    seed: int = 1
    """Which stream of orders."""
    chaos: Annotated[bool, Parameter(negative="")] = False
    """Cut all connections now and then; on memory:// only."""


class Pipeline:
    """Orders, their invoices, and the dead letters of both.

    Attributes:
        url: The broker.
        figures: What has happened.
        stages: The consumers, in the order of the pipeline.
    """

    def __init__(self, url: str, load: Load) -> None:
        self.url = url
        self.load = load
        self.figures = Figures(time.monotonic)
        self._stream = Stream(load.seed)
        unique = f"aio-pika-batch.demo.{random.randrange(16**6):06x}"
        self._exchange = f"{unique}.dlx"
        self._undertaker = Undertaker(
            self._settings(
                f"{unique}.dead",
                exchange_name=self._exchange,
                exchange_type="fanout",
                # Where the demo's dead letters end is here.
                unhandled_exception_action=MessageResult.NACK,
            )
        )
        self._invoices = Invoices(
            self._settings(f"{unique}.invoices", batch_size=2 * load.batch_size),
            observers=[self.figures],
            on_arrival=lambda since: self.figures.arrived(time.monotonic() - since),
        )
        self._orders = Orders(
            self._settings(
                f"{unique}.orders",
                dead_letter_exchange=self._exchange,
                batch_size=load.batch_size,
                num_workers=load.workers,
                max_requeue_attempts=MAX_REQUEUE_ATTEMPTS,
                requeue_delay=FIRST_WAIT,
            ),
            invoices=f"{unique}.invoices",
            observers=[self.figures],
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
    def came(self) -> int:
        """How many orders have come in."""
        return self._stream.drawn.total()

    @property
    def ended(self) -> int:
        """How many of them have come to their end, at least once."""
        return len({*self._invoices.seen, *self._undertaker.seen})

    def statuses(self) -> dict[str, ConsumerStatus]:
        """Look at the consumers."""
        return {type(each).__name__: each.status() for each in self.stages}

    async def start(self, stack: AsyncExitStack) -> None:
        """Start the consumers; they are stopped, and what they have declared is gone, at the end.

        Raises:
            AioPikaBatchError: The broker cannot be reached, or refuses.
        """
        stack.push_async_callback(self._clean_up)
        await stack.enter_async_context(self._undertaker)
        self._is_declared = True
        await stack.enter_async_context(self._invoices)
        await stack.enter_async_context(self._orders)

    async def drained(self) -> bool:
        """Wait until all has come to its end; returns whether that was in time."""
        deadline = time.monotonic() + PATIENCE
        while self.ended < self.came:
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(TICK)
        # What is delivered twice may still be on its way.
        await asyncio.sleep(5 * TICK)
        return True

    async def publish(self) -> None:
        """Publish the load at a steady rate, and again what is not confirmed."""
        began = time.monotonic()
        cut_at = began + CHAOS_EVERY
        pending: list[Publication] = []
        while (now := time.monotonic()) < began + self.load.seconds or pending:
            if now < began + self.load.seconds:
                due = int((now - began) * self.load.rate) - self.came
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
            if self.load.chaos and now > cut_at:
                cut_at = now + CHAOS_EVERY
                self._cut()
            await asyncio.sleep(TICK)

    def _cut(self) -> None:
        transport = open_transport(Endpoint(url=self.url))
        if isinstance(transport, MemoryTransport):
            transport.broker.cut()

    async def _clean_up(self) -> None:
        if not self._is_declared:
            return
        orders = self._orders.settings.queue_name
        waits = make_delay_steps(FIRST_WAIT).steps_for(MAX_REQUEUE_ATTEMPTS)
        cleaner = Cleaner(
            ConsumerSettings(url=self.url, queue_name=f"{orders}.cleaner", queue_auto_delete=True),
            queues=[
                *(each.settings.queue_name for each in (*self.stages, self._undertaker)),
                *(wait_queue_name(orders, wait) for wait in waits),
            ],
            exchange=self._exchange,
        )
        async with cleaner, asyncio.timeout(PATIENCE):
            await cleaner.done.wait()

    def books(self) -> list[Row]:
        """Balance the books."""
        orders = self.figures.stage(Orders.__name__)
        return balance(
            self._stream.drawn,
            self._invoices.seen,
            self._undertaker.seen,
            self._undertaker.reasons,
            retries=orders.retries,
            attempts=MAX_REQUEUE_ATTEMPTS,
            lost_connections=sum(each.losses for each in self.figures.stages.values()),
        )
