"""From a queue into a table, a thousand rows at a time, and bad rows into a queue of their own.

Each batch is one INSERT, which fails as a whole if one row is bad; then it is tried again in
halves, until only the bad rows are left. Try it::

    python examples/rmq_to_postgres/main.py --samples

`RMQ_TO_POSTGRES_URL` and `RMQ_TO_POSTGRES_DSN` say where broker and database are; every other
setting can be set by the environment in the same way.
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
from aio_pika_batch.observer import DeadLettered, Origin, Settled

TABLE = """
CREATE TABLE IF NOT EXISTS orders (
    number   integer PRIMARY KEY,
    customer text NOT NULL,
    cents    integer NOT NULL CHECK (cents > 0)
)
"""

# What is delivered twice is written once.
INSERT = """
INSERT INTO orders
SELECT * FROM jsonb_to_recordset($1) AS row (number integer, customer text, cents integer)
ON CONFLICT (number) DO NOTHING
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

    # A row that the table does not take will never be taken. Everything else, a database that is
    # away, say, is the default's business: REQUEUE.
    exception_results = {  # noqa: RUF012
        asyncpg.DataError: MessageResult.NACK,
        asyncpg.IntegrityConstraintViolationError: MessageResult.NACK,
    }

    inserts = 0
    samples: Sequence[dict[str, object]] = ()

    async def on_start(self) -> None:
        """Connect, and see that there is a table."""
        self.pool = await asyncpg.create_pool(self.settings.dsn, min_size=1)
        await self.pool.execute(TABLE)

    async def on_stop(self) -> None:
        """Disconnect."""
        await self.pool.close()

    async def on_session(self, session: WorkerSession) -> None:
        """Fill the queue with samples, if asked to."""
        samples, self.samples = self.samples, ()
        await self.publish_many(
            [
                Publication(json.dumps(each).encode(), routing_key=session.queue_name)
                for each in samples
            ]
        )

    async def process_messages(self, messages: Sequence[Message]) -> AsyncIterator[Result]:
        """Write all or none; what is no JSON is dead-lettered by `json()`."""
        rows = json.dumps([message.json() for message in messages])
        self.inserts += 1
        await self.pool.execute(INSERT, rows)
        for _ in messages:
            yield MessageResult.ACK


class Books(Observer):
    """Counts what has come to its end, and stops the writer when that is everything."""

    def __init__(self, expected: int) -> None:
        self.expected = expected
        self.written = self.dead = 0
        self.writer: OrderWriter | None = None

    def settled(self, origin: Origin, event: Settled) -> None:
        """The broker has been told."""
        written = sum(
            count for (result, _), count in event.counts.items() if result is MessageResult.ACK
        )
        self.written += written
        print(f"{written} rows written by worker {origin.worker}")
        self._check()

    def dead_lettered(self, origin: Origin, event: DeadLettered) -> None:
        """A bad row is with the dead letters."""
        self.dead += 1
        body = event.message.body.decode()
        print(f"{event.reason.value} by worker {origin.worker}: {body}")
        self._check()

    def _check(self) -> None:
        if self.writer and self.expected and self.written + self.dead >= self.expected:
            self.writer.request_stop()


async def main(samples: Sequence[dict[str, object]]) -> None:
    """Run until Ctrl-C, or until all samples have come to their end."""
    books = Books(expected=len(samples))
    writer = books.writer = OrderWriter(Settings(), observers=[books])
    writer.samples = samples
    await writer.run()
    print(f"{books.written} rows, {books.dead} dead letters, {writer.inserts} INSERTs")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--samples", action="store_true", help="publish 1000 orders, 3 of them bad, and end"
    )
    asyncio.run(main(SAMPLES if parser.parse_args().samples else ()))
