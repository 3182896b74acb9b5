"""What an inbox and an outbox relay cost. ``python benchmarks/exactly_once.py [--rounds N]``.

One process consumes messages from a private RabbitMQ and writes them into a private PostgreSQL, in
turn with a plain transaction and with an inbox in it. It reads its own processor clock: the cost is
what a round with the inbox takes more than the round without, and the median over all rounds is
printed. A relay is measured by itself, from a full outbox to the queue.

One handler at a time waits for the database a few milliseconds longer with the inbox. The processor
is idle meanwhile, and what it does afterwards takes longer (an `asyncio.sleep(0.003)` in place of
the claim costs most of the difference at batch 100). Four handlers at a time keep it busy, and show
what the claim itself costs.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import statistics
import sys
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # not this folder: packages are imported as everybody sees them

import asyncpg  # noqa: E402  -- after the path is right

from aio_pika_batch import (  # noqa: E402
    BatchConsumer,
    BatchConsumerSettings,
    Message,
    MessageResult,
    Publication,
)
from aio_pika_batch.inbox import Inbox  # noqa: E402
from aio_pika_batch.outbox import Outbox, OutboxRelay, OutboxRelaySettings  # noqa: E402
from aio_pika_batch.transport import Endpoint, Queue, Topology, open_transport  # noqa: E402
from benchmarks import broker  # noqa: E402
from tests.support.postgres import postgres  # noqa: E402

QUEUE = "bench.exactly_once"
BATCHES = (100, 1000)
CONCURRENCY = (1, 4)
ADD = f"""INSERT INTO aio_pika_batch_outbox (message_id, exchange, routing_key, body)
SELECT md5(number::text), '', '{QUEUE}', repeat('x', 200)::bytea
FROM generate_series(1, $1) AS number"""  # noqa: S608  -- a constant
INSERT = "INSERT INTO effects SELECT unnest($1::integer[])"


class Writer(BatchConsumer):
    """Writes each batch in a transaction."""

    inbox: Inbox | None = None
    pool: Any
    expected = 0
    warmup = 0

    def prepare(self, pool: Any, inbox: Inbox | None, expected: int, warmup: int) -> asyncio.Event:  # noqa: ANN401  -- a driver's own
        """Begin to measure after so many messages; the event is set when all are handled."""
        self.pool, self.inbox, self.expected, self.warmup = pool, inbox, expected, warmup
        self.handled, self.began, self.took = 0, 0.0, 0.0
        self.done = asyncio.Event()
        return self.done

    async def process_messages(self, messages: Sequence[Message]) -> AsyncIterator[MessageResult]:
        """Write, and acknowledge."""
        if self.handled >= self.warmup and not self.began:
            self.began, self.measured_from = time.process_time(), self.handled
        if self.inbox is None:
            async with self.pool.acquire() as connection, connection.transaction():
                await connection.execute(INSERT, [int(each.body) for each in messages])
            for _ in messages:
                yield MessageResult.ACK
        else:
            async with (
                self.pool.acquire() as connection,
                self.inbox.transaction(connection, messages) as batch,
            ):
                await connection.execute(INSERT, [int(each.body) for each in batch.fresh])
            for result in batch.results:
                yield result
        self.handled += len(messages)
        if self.handled >= self.expected:
            self.took = time.process_time() - self.began
            self.done.set()


async def publish(url: str, count: int) -> None:
    """Put messages with ids into the queue."""
    async with open_transport(Endpoint(url=url)).publisher() as publisher:
        await publisher.publish(
            [
                Publication(b"%d" % number, routing_key=QUEUE, message_id=str(uuid.uuid4()))
                for number in range(count)
            ]
        )


async def consume(
    url: str,
    pool: Any,  # noqa: ANN401  -- a driver's own
    settings: dict[str, int],
    count: int,
    inbox: Inbox | None,
) -> float:
    """Microseconds of the processor for a message."""
    warmup = 4 * settings["batch_size"]
    await publish(url, count + warmup)
    writer = Writer(BatchConsumerSettings(url=url, queue_name=QUEUE, **settings))
    done = writer.prepare(pool, inbox, count + warmup, warmup)
    async with writer:
        await done.wait()
    return writer.took / (writer.handled - writer.measured_from) * 1e6


async def relay(url: str, dsn: str, count: int) -> float:
    """Microseconds of the processor for a message of a relay that has been started before."""
    outbox = Outbox()
    connection = await asyncpg.connect(dsn)
    await outbox.create(connection)
    settings = OutboxRelaySettings(url=url, batch_size=1000)
    async with OutboxRelay(outbox, lambda: asyncpg.connect(dsn), settings):
        began = time.process_time()
        # By the server, so that adding them takes no time of this process.
        await connection.execute(ADD, count)
        # Rarely, because it takes time of this process.
        while await outbox.count(connection):  # noqa: ASYNC110  -- of another connection
            await asyncio.sleep(1)
        took = time.process_time() - began
    await connection.close()
    return took / count * 1e6


async def measure(url: str, dsn: str, rounds: int, count: int) -> None:
    """Print what each costs."""
    await open_transport(Endpoint(url=url)).declare(Topology(queues=(Queue(QUEUE, durable=True),)))
    async with asyncpg.create_pool(dsn, min_size=max(CONCURRENCY)) as pool:
        await pool.execute("CREATE TABLE effects (number integer)")
        inbox = Inbox("bench")
        async with pool.acquire() as connection:
            await inbox.create(connection)
        print("| batch | concurrency | plain, µs | with an inbox |")
        print("| ---: | ---: | ---: | ---: |")
        for batch, concurrency in product(BATCHES, CONCURRENCY):
            settings = {"batch_size": batch, "concurrency": concurrency}
            plain, more = [], []
            for number in range(rounds):
                taken = {}
                for name in ("plain", "inbox")[:: 1 if number % 2 else -1]:
                    of = inbox if name == "inbox" else None
                    taken[name] = await consume(url, pool, settings, count, of)
                plain.append(taken["plain"])
                more.append(taken["inbox"] - taken["plain"])
            alone, extra = statistics.median(plain), statistics.median(more)
            print(f"| {batch} | {concurrency} | {alone:.2f} | {extra:+.2f} |")
        size = await pool.fetchrow(
            "SELECT pg_total_relation_size('aio_pika_batch_inbox') AS size, count(*) AS rows"
            " FROM aio_pika_batch_inbox"
        )
        print(f"{size['size'] / size['rows']:.0f} bytes for a row of the inbox, with its indexes")
        await pool.execute("DROP TABLE effects")
    found = [await relay(url, dsn, count) for _ in range(rounds)]
    print(f"{statistics.median(found):.2f} µs for a message of a relay, at 1,000 at a time")


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--messages", type=int, default=20_000)
    asked = parser.parse_args()
    logging.getLogger("aio_pika_batch").setLevel(logging.CRITICAL)
    with broker.running() as node, postgres() as dsn:
        asyncio.run(measure(node.url, dsn, asked.rounds, asked.messages))


if __name__ == "__main__":
    main()
