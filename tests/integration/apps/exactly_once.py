"""One process of a chain whose effects happen once: queue, inbox, outbox, relay, queue, inbox.

Usage: ``python exactly_once.py ROLE QUEUE``, with the broker in ``AIO_PIKA_BATCH_URL`` and the
database in ``DSN``. Effects are rows without a key, so that a repeated one is there twice.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import AsyncIterator, Sequence
from typing import Any

import asyncpg

from aio_pika_batch import BatchConsumer, BatchConsumerSettings, Message, MessageResult, Publication
from aio_pika_batch.inbox import Inbox
from aio_pika_batch.outbox import Outbox, OutboxRelay, OutboxRelaySettings

DSN = os.environ["DSN"]
RECONNECT = {"reconnect_delay": 0.1, "reconnect_delay_max": 0.5, "connect_timeout": 3}
OUTBOX = Outbox()


class Worker(BatchConsumer):
    """Writes effects; what fails is delivered again at once, since nothing is wrong with it."""

    table = "effects"

    def __init__(self, queue: str) -> None:
        super().__init__(
            BatchConsumerSettings(
                queue_name=queue,
                batch_size=200,
                batch_timeout=0.1,
                concurrency=2,
                unhandled_exception_action=MessageResult.REQUEUE_IMMEDIATE,
                breaker_threshold=0.5,
                breaker_pause=0.2,
                breaker_pause_max=0.5,
                **RECONNECT,
            )
        )

    async def on_start(self) -> None:
        self.pool = asyncpg.create_pool(DSN, min_size=0, max_size=4)
        await self.pool

    async def on_stop(self) -> None:
        self.pool.terminate()

    async def write(self, connection: Any, messages: Sequence[Message]) -> None:
        numbers = [int(message.body) for message in messages]
        await connection.execute(f"INSERT INTO {self.table} SELECT unnest($1::integer[])", numbers)

    async def process_messages(self, messages: Sequence[Message]) -> AsyncIterator[Any]:
        async with self.pool.acquire() as connection, connection.transaction():
            await self.write(connection, messages)
        for _ in messages:
            yield MessageResult.ACK


class Control(Worker):
    """Without an inbox."""

    table = "control"


class Chain(Worker):
    """With an inbox, and an outbox for one message each."""

    inbox = Inbox("chain")

    async def process_messages(self, messages: Sequence[Message]) -> AsyncIterator[Any]:
        async with (
            self.pool.acquire() as connection,
            self.inbox.transaction(connection, messages) as batch,
        ):
            await self.write(connection, batch.fresh)
            await self.publish_later(connection, batch.fresh)
        for result in batch.results:
            yield result

    async def publish_later(self, connection: Any, messages: Sequence[Message]) -> None:
        queue = f"{self.settings.queue_name}.downstream"
        out = [Publication(message.body, routing_key=queue) for message in messages]
        await OUTBOX.add(connection, out)


class Downstream(Chain):
    """At the end of the chain."""

    inbox = Inbox("downstream")
    table = "downstream"

    async def publish_later(self, connection: Any, messages: Sequence[Message]) -> None:
        pass


def make(role: str, queue: str) -> Any:
    """The consumer of a role."""
    match role:
        case "chain":
            return Chain(queue)
        case "control":
            return Control(f"{queue}.control")
        case "downstream":
            return Downstream(f"{queue}.downstream")
        case _:
            settings = OutboxRelaySettings(poll_interval=0.05, batch_size=500, **RECONNECT)
            return OutboxRelay(OUTBOX, lambda: asyncpg.connect(DSN), settings)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message).300s")
    asyncio.run(make(*sys.argv[1:]).run())
