"""Writes orders from a queue into a table, a thousand rows at a time, each order exactly once.

Each batch is one INSERT, which fails as a whole if one row is bad. The batch is then tried again in
halves, until only the bad rows are left, which become dead letters. Try it::

    python examples/rmq_to_postgres/main.py --samples

`RMQ_TO_POSTGRES_URL` and `RMQ_TO_POSTGRES_DSN` name the broker and the database. The environment
sets every other setting in the same way.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator, Sequence

import asyncpg
from pydantic import Field
from pydantic_settings import SettingsConfigDict

from aio_pika_batch import (
    BatchConsumer,
    BatchConsumerSettings,
    Message,
    MessageResult,
    Observer,
    Publication,
    Result,
    WorkerSession,
)
from aio_pika_batch.inbox import Inbox
from aio_pika_batch.observer import DeadLettered, Origin, Settled

TABLE = """
CREATE TABLE IF NOT EXISTS orders (
    number   integer PRIMARY KEY,
    customer text NOT NULL,
    cents    integer NOT NULL CHECK (cents > 0)
)
"""

INSERT = """
INSERT INTO orders
SELECT * FROM jsonb_to_recordset($1) AS row (number integer, customer text, cents integer)
"""

SAMPLES = [{"number": n, "customer": f"customer {n % 90}", "cents": 100 + n} for n in range(1000)]
SAMPLES[123]["cents"] = -5
SAMPLES[456]["cents"] = "a lot"
SAMPLES[789]["customer"] = None


class Settings(BatchConsumerSettings):
    """The library's settings with defaults of our own, and one more."""

    model_config = SettingsConfigDict(env_prefix="RMQ_TO_POSTGRES_")

    queue_name: str = "orders"
    dead_letter_queue: str = "orders.dead"
    batch_size: int = 1000
    batch_timeout: float = 1.0
    isolate_failures: bool = True
    dsn: str = Field(default="postgresql://postgres@localhost/postgres", repr=False)


class OrderWriter(BatchConsumer):
    """Writes orders."""

    settings: Settings

    inbox = Inbox("orders")

    # A row that the table refuses is refused every time. Any other failure, such as a database that
    # is away, is retried by default.
    exception_results = {  # noqa: RUF012
        asyncpg.DataError: MessageResult.NACK,
        asyncpg.IntegrityConstraintViolationError: MessageResult.NACK,
    }

    inserts = 0
    samples: Sequence[dict[str, object]] = ()

    async def on_start(self) -> None:
        """Connect, and create the tables."""
        self.pool = await asyncpg.create_pool(self.settings.dsn, min_size=1)
        await self.pool.execute(TABLE)
        async with self.pool.acquire() as connection:
            await self.inbox.create(connection)

    async def on_stop(self) -> None:
        """Disconnect."""
        await self.pool.close()

    async def on_session(self, session: WorkerSession) -> None:
        """Publish the samples, if there are any."""
        samples, self.samples = self.samples, ()
        await self.publish_many(
            [
                Publication(
                    json.dumps(each).encode(),
                    routing_key=session.queue_name,
                    message_id=f"order-{each['number']}",
                )
                for each in samples
            ]
        )

    async def process_messages(self, messages: Sequence[Message]) -> AsyncIterator[Result]:
        """Write all orders that aren't written yet, or none."""
        async with (
            self.pool.acquire() as connection,
            self.inbox.transaction(connection, messages) as batch,
        ):
            rows = json.dumps([message.json() for message in batch.fresh])
            self.inserts += 1
            await connection.execute(INSERT, rows)
        for result in batch.results:
            yield result


class Progress(Observer):
    """Counts rows and dead letters, and stops the writer when all samples are settled."""

    def __init__(self, expected: int) -> None:
        self.expected = expected
        self.written = self.dead = 0
        self.writer: OrderWriter | None = None

    def settled(self, origin: Origin, event: Settled) -> None:
        """Count messages that were acknowledged."""
        written = sum(
            count for (result, _), count in event.counts.items() if result is MessageResult.ACK
        )
        self.written += written
        print(f"{written} rows written by worker {origin.worker}")
        self._check()

    def dead_lettered(self, origin: Origin, event: DeadLettered) -> None:
        """Count a bad row."""
        self.dead += 1
        body = event.message.body.decode()
        print(f"{event.reason.value} by worker {origin.worker}: {body}")
        self._check()

    def _check(self) -> None:
        if self.writer and self.expected and self.written + self.dead >= self.expected:
            self.writer.request_stop()


async def main(samples: Sequence[dict[str, object]]) -> None:
    """Run until Ctrl-C, or until all samples are settled."""
    progress = Progress(expected=len(samples))
    writer = progress.writer = OrderWriter(Settings(), observers=[progress])
    writer.samples = samples
    await writer.run()
    print(f"{progress.written} rows, {progress.dead} dead letters, {writer.inserts} INSERTs")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--samples", action="store_true", help="publish 1000 orders, 3 of them bad, and end"
    )
    asyncio.run(main(SAMPLES if parser.parse_args().samples else ()))
